"""Are the points that training reaches of about equal quality, the more so the wider the network?

    python experiments/minima.py              # MNIST, 1,000 networks, a quarter of an hour
    python experiments/minima.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/minima/README.md.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, random_labels, resize, subset
from nn_backprop.engines import autograd
from nn_backprop.models import MLP
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.training import evaluate_many, fit_many

TRUE, RANDOM = LABELS = ("true labels", "random labels")
WIDTHS = (25, 50, 100, 250, 500)
NARROW, WIDE = WIDTHS[0], WIDTHS[-1]
SIDE = 10  # pixels
EXAMPLES, SMOKE_EXAMPLES = 10_000, 500
EPOCHS, SMOKE_EPOCHS, BATCH = 100, 3, 50
LR = 0.1
TOGETHER = 25  # seeds to a job
BAR = 0.1  # of the gradient's norm at the start, our own


@dataclass(frozen=True)
class Options(studies.Options):
    """The quality of the points that training reaches, by width, over many seeds."""

    least: ClassVar[dict[str, int]] = {**studies.Options.least, "seeds": 20}  # for the bootstrap
    seeds: int = 100
    """Number of seeds, from 0."""


class Job(NamedTuple):
    """Networks of one kind, trained together."""

    labels: str
    width: int
    seeds: range
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    jobs = [
        Job(labels, width, range(first, min(first + TOGETHER, options.seeds)), options)
        for width in reversed(WIDTHS)  # the longest first
        for labels in LABELS
        for first in range(0, options.seeds, TOGETHER)
    ]
    tag = "{labels} {width}/test_loss"
    run.train_all(train, jobs, lambda row: {tag.format(**row): statistics.fmean(row["test_loss"])})


def train(job: Job) -> Row:
    """The networks of the job, trained and tested; each list is in the order of the seeds."""
    data = data_of(job.options, job.labels)
    models = []
    for seed in job.seeds:
        torch.manual_seed(seed)
        models.append(MLP((SIDE * SIDE, job.width, 10)))
    started = gradient_norms(models, data)
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    began = time.perf_counter()
    losses = fit_many(
        models, data, seeds=job.seeds, lrs=LR, optimizer="sgd", epochs=epochs, batch_size=BATCH
    )
    seconds = time.perf_counter() - began
    if not losses.isfinite().all():
        raise studies.StudyError(f"a training diverged, {job}")
    on_train = evaluate_many(models, data, data.train)
    on_test = evaluate_many(models, data, data.test)  # read here alone
    return {
        "labels": job.labels,
        "width": job.width,
        "seeds": list(job.seeds),
        "dataset": data.name,
        "examples": len(data.train),
        "epochs": epochs,
        "lr": LR,
        "gradient_at_the_start": started,
        "gradient_at_the_end": gradient_norms(models, data),
        "train_loss": on_train.loss.tolist(),
        "train_accuracy": on_train.accuracy.tolist(),
        "test_loss": on_test.loss.tolist(),
        "test_accuracy": on_test.accuracy.tolist(),
        "train_seconds": seconds,
    }


def gradient_norms(models: Sequence[nn.Module], data: ImageData) -> list[float]:
    """Of each network: the Euclidean norm of the gradient of its loss on all training images."""
    inputs, targets = data.batch(data.train)
    norms = []
    for model in models:
        autograd(model, inputs, targets)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())
        model.zero_grad()
    return norms


@functools.cache
def data_of(options: Options, labels: str) -> ImageData:
    data = studies.load_data(options)
    data = replace(data, images=resize(data.images, SIDE))
    data = subset(data, SMOKE_EXAMPLES if options.smoke else EXAMPLES, seed=0)
    return random_labels(data, share=1, seed=0) if labels == RANDOM else data


# --- What the rows come to ----------------------------------------------------------------------


class Group(NamedTuple):
    """All networks of one kind: each number in the order of the seeds."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray
    gradient: np.ndarray  # its norm at the end, divided by that at the start


def gathered(rows: Rows) -> Mapping[tuple[str, int], Group]:
    """The rows' lists, joined by labels and width."""
    groups = {}
    for kind, parts in rows.by("labels", "width").items():

        def joined(name: str, parts: Rows = parts) -> np.ndarray:
            in_order = sorted(parts, key=lambda row: row["seeds"][0])
            return np.concatenate([row[name] for row in in_order])

        gradient = joined("gradient_at_the_end") / joined("gradient_at_the_start")
        groups[kind] = Group._make([*map(joined, Group._fields[:-1]), gradient])
    return groups


def deviation(values: Any) -> Any:
    """The standard deviation of values (..., n), with n − 1."""
    return np.std(values, axis=-1, ddof=1)


def relative_deviation(values: Any) -> Any:
    """The same, in percent of their mean."""
    return 100 * deviation(values) / np.mean(values, axis=-1)


def interquartile(values: Any) -> Any:
    """From the first to the third quartile of values (..., n)."""
    first, third = np.quantile(values, (0.25, 0.75), axis=-1)
    return third - first


def correlation(one: Any, other: Any) -> Any:
    """Pearson's, of two times (..., n) values."""
    a = one - np.mean(one, axis=-1, keepdims=True)
    b = other - np.mean(other, axis=-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


SPREADS: dict[str, Callable[[Any], Any]] = {
    "standard deviation": deviation,
    "interquartile range": interquartile,
}


def estimated(
    statistic: Callable[..., Any], *samples: Collection[float]
) -> tuple[float, tuple[float, float]]:
    """The statistic of the samples, and its interval over seeds."""
    return float(statistic(*samples)), studies.bootstrap_interval(statistic, *samples)


def claims(rows: Rows) -> list[Claim]:
    groups, found = gathered(rows), []
    for labels in LABELS:
        narrow, wide = groups[labels, NARROW], groups[labels, WIDE]
        published = "shrinks with width" if labels == TRUE else None
        for name, spread in SPREADS.items():
            claim = (
                f"{labels}: {name} of the test loss with {WIDE} hidden units, divided by that with "
                f"{NARROW}: below 1"
            )

            def ratio(one: Any, other: Any, spread: Callable[[Any], Any] = spread) -> Any:
                return spread(one) / spread(other)

            measured = estimated(ratio, wide.test_loss, narrow.test_loss)
            found.append(studies.judged(claim, published, *measured, high=1))
    narrow, wide = groups[TRUE, NARROW], groups[TRUE, WIDE]
    claim = (
        f"{TRUE}: correlation of training and test loss over seeds with {WIDE} hidden units, less "
        f"that with {NARROW}: below 0"
    )
    measured = estimated(
        lambda a, b, c, d: correlation(a, b) - correlation(c, d),
        wide.train_loss, wide.test_loss, narrow.train_loss, narrow.test_loss,
    )  # fmt: skip
    found.append(studies.judged(claim, "falls with width", *measured, high=0))
    for labels in LABELS:
        claim = (
            f"{labels}: the gradient's norm at the end, divided by that at the start, of the worst "
            f"width of a seed: at most {BAR:g} (our bar)"
        )
        worst = np.max([groups[labels, width].gradient for width in WIDTHS], axis=0)
        found.append(studies.between(claim, None, worst, high=BAR))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    groups, made = gathered(rows), dict[str, studies.Table]()
    for labels in LABELS:
        of = {width: groups[labels, width] for width in WIDTHS}
        seeds = len(of[NARROW].test_loss)
        made[f"{labels.capitalize()}: test loss of {seeds} networks of each width"] = [
            {
                "hidden units": width,
                "mean": f"{statistics.fmean(group.test_loss):.4g}",
                **{name: cell(spread, group.test_loss) for name, spread in SPREADS.items()},
                "standard deviation, % of the mean": cell(relative_deviation, group.test_loss),
                "correlation with the training loss":
                    cell(correlation, group.train_loss, group.test_loss),
            }
            for width, group in of.items()
        ]  # fmt: skip
        made[f"{labels.capitalize()}: where training has come to, medians"] = [
            {
                "hidden units": width,
                "training loss": f"{statistics.median(group.train_loss):.3g}",
                "gradient's norm, % of that at the start":
                    f"{100 * statistics.median(group.gradient):.3g}",
                "training accuracy, %": f"{100 * statistics.median(group.train_accuracy):.2f}",
                "test accuracy, %": f"{100 * statistics.median(group.test_accuracy):.2f}",
            }
            for width, group in of.items()
        ]  # fmt: skip
    return made


def cell(statistic: Callable[..., Any], *samples: Collection[float]) -> str:
    value, (low, high) = estimated(statistic, *samples)
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def picture(rows: Rows) -> figures.Figure:
    groups = gathered(rows)

    def line(statistic: Callable[..., Any], labels: str, *names: str) -> list[figures.Point]:
        points: list[figures.Point] = []
        for width in WIDTHS:
            samples = [getattr(groups[labels, width], name) for name in names]
            value, (low, high) = estimated(statistic, *samples)
            points.append((width, value, (value - low, high - value)))
        return points

    losses = {
        labels: [figures.point(width, groups[labels, width].test_loss) for width in WIDTHS]
        for labels in LABELS
    }
    spreads = {
        f"{labels}, {name}": line(spread, labels, "test_loss")
        for labels in LABELS
        for name, spread in SPREADS.items()
    }
    alike = {labels: line(correlation, labels, "train_loss", "test_loss") for labels in LABELS}
    x, bar = "hidden units", "bar: 95 % interval"
    return figures.side_by_side(
        [
            figures.Panel("Test loss; bar: standard deviation", x, "test loss", losses, "xy"),
            figures.Panel(f"Over the seeds; {bar}", x, "spread of the test loss", spreads, "xy"),
            figures.Panel(
                f"Training and test loss; {bar}", x, "correlation over seeds", alike, "x",
                levels={"none": 0},
            ),
        ],
        f"The points reached by {len(groups[TRUE, NARROW].test_loss)} seeds of each width: "
        f"{rows.one('dataset')}, {rows.one('examples'):,} images of {SIDE} × {SIDE}, "
        f"{rows.one('epochs')} epochs",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
