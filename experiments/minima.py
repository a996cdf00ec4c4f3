"""Are the points that training reaches of about equal quality, the more so the wider the network?

    python experiments/minima.py              # MNIST, 1,000 networks, a quarter of an hour
    python experiments/minima.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/minima/README.md.
"""

import functools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.stats import iqr
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, random_labels, resize, subset
from nn_backprop.engines import autograd
from nn_backprop.studies import Claim, Recipe, Row, Rows
from nn_backprop.training import evaluate_many

TRUE, RANDOM = LABELS = ("true labels", "random labels")
WIDTHS = (25, 50, 100, 250, 500)
NARROW, WIDE = WIDTHS[0], WIDTHS[-1]
SIDE = 10  # pixels
EXAMPLES, SMOKE_EXAMPLES = 10_000, 500
HOW = Recipe((), epochs=100, lr=0.1, batch_size=50, optimizer="sgd")
SMOKE_EPOCHS = 3
TOGETHER = 25  # seeds to a job
BAR = 0.1  # of the gradient's norm at the start, our own
LOSSES = ("train_loss", "test_loss")
NUMBERS = (*LOSSES, "train_accuracy", "test_accuracy")
By = Mapping[tuple[str, int], Rows]  # labels and width


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
    run.train_all(train, jobs, lambda row: {tag.format(**row): fmean(row["test_loss"])})


def train(job: Job) -> Row:
    """The networks of the job, trained and tested; each list is in the order of the seeds."""
    data = data_of(job.options, job.labels)
    epochs = SMOKE_EPOCHS if job.options.smoke else HOW.epochs
    recipe = HOW._replace(hidden=(job.width,), epochs=epochs)
    models = [recipe.network(seed, SIDE * SIDE) for seed in job.seeds]
    started = gradient_norms(models, data)
    began = time.perf_counter()
    recipe.train(models, data, job.seeds)
    seconds = time.perf_counter() - began
    on_train = evaluate_many(models, data, data.train)
    on_test = evaluate_many(models, data, data.test)  # read here alone
    return {
        "labels": job.labels, "width": job.width, "seeds": list(job.seeds),
        "dataset": data.name, "examples": len(data.train), "epochs": epochs, "lr": recipe.lr,
        "gradient_at_the_start": started, "gradient_at_the_end": gradient_norms(models, data),
        "train_loss": on_train.loss.tolist(), "train_accuracy": on_train.accuracy.tolist(),
        "test_loss": on_test.loss.tolist(), "test_accuracy": on_test.accuracy.tolist(),
        "train_seconds": seconds,
    }  # fmt: skip


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


def networks(rows: Rows) -> By:
    """The rows' lists as a row a network, by labels and width.

    "gradient" is its norm at the end, divided by that at the start.
    """
    each = Rows(
        {
            "labels": row["labels"], "width": row["width"], "seed": seed,
            "gradient": row["gradient_at_the_end"][k] / row["gradient_at_the_start"][k],
            **{name: row[name][k] for name in NUMBERS},
        }
        for row in rows
        for k, seed in enumerate(row["seeds"])
    )  # fmt: skip
    return each.by("labels", "width")


def deviation(values: Any) -> Any:
    """The standard deviation of values (..., n), with n − 1."""
    return np.std(values, axis=-1, ddof=1)


def relative_deviation(values: Any) -> Any:
    """The same, in percent of their mean."""
    return 100 * deviation(values) / np.mean(values, axis=-1)


def correlation(one: Any, other: Any) -> Any:
    """Pearson's, of two times (..., n) values."""
    a, b = (values - np.mean(values, axis=-1, keepdims=True) for values in (one, other))
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


SPREADS: dict[str, Callable[[Any], Any]] = {
    "standard deviation": deviation,
    "interquartile range": functools.partial(iqr, axis=-1),
}


def estimated(
    statistic: Callable[..., Any], *samples: Collection[float]
) -> tuple[float, tuple[float, float]]:
    """The statistic of the samples, and its interval over seeds."""
    return float(statistic(*samples)), studies.bootstrap_interval(statistic, *samples)


def claims(rows: Rows) -> list[Claim]:
    of = networks(rows)
    return [*spread(of), correlated(of), *settled(of)]


def spread(of: By) -> Iterator[Claim]:
    for labels in LABELS:
        wide, narrow = (of[labels, width].values("test_loss") for width in (WIDE, NARROW))
        published = "shrinks with width" if labels == TRUE else None
        for name, statistic in SPREADS.items():
            claim = f"{labels}: {name} of the test loss with {WIDE} hidden units, divided by that "
            ratio = estimated(lambda a, b, of=statistic: of(a) / of(b), wide, narrow)
            yield studies.judged(f"{claim}with {NARROW}: below 1", published, *ratio, high=1)


def correlated(of: By) -> Claim:
    losses = [of[TRUE, width].values(loss) for width in (WIDE, NARROW) for loss in LOSSES]
    less = estimated(lambda a, b, c, d: correlation(a, b) - correlation(c, d), *losses)
    claim = f"{TRUE}: correlation of training and test loss over seeds with {WIDE} hidden units"
    claim += f", less that with {NARROW}: below 0"
    return studies.judged(claim, "falls with width", *less, high=0)


def settled(of: By) -> Iterator[Claim]:
    for labels in LABELS:
        claim = f"{labels}: the gradient's norm at the end, divided by that at the start, of the "
        claim += f"worst width of a seed: at most {BAR:g} (our bar)"
        worst = np.max([of[labels, width].values("gradient") for width in WIDTHS], axis=0)
        yield studies.between(claim, None, worst, high=BAR)


def tables(rows: Rows) -> dict[str, studies.Table]:
    of, made = networks(rows), dict[str, studies.Table]()

    def spreads(group: Rows) -> Row:
        test = group.values("test_loss")
        return {
            "mean": f"{fmean(test):.4g}",
            **{name: cell(statistic, test) for name, statistic in SPREADS.items()},
            "standard deviation, % of the mean": cell(relative_deviation, test),
            "correlation with the training loss":
                cell(correlation, group.values("train_loss"), test),
        }  # fmt: skip

    def medians(group: Rows) -> Row:
        return {
            "training loss": f"{median(group.values('train_loss')):.3g}",
            "gradient's norm, % of that at the start":
                f"{100 * median(group.values('gradient')):.3g}",
            "training accuracy, %": f"{100 * median(group.values('train_accuracy')):.2f}",
            "test accuracy, %": f"{100 * median(group.values('test_accuracy')):.2f}",
        }  # fmt: skip

    for labels in LABELS:
        seeds = len(of[labels, NARROW])
        for title, columns in (
            (f"test loss of {seeds} networks of each width", spreads),
            ("where training has come to, medians", medians),
        ):
            made[f"{labels.capitalize()}: {title}"] = [
                {"hidden units": width, **columns(of[labels, width])} for width in WIDTHS
            ]
    return made


def cell(statistic: Callable[..., Any], *samples: Collection[float]) -> str:
    value, (low, high) = estimated(statistic, *samples)
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def picture(rows: Rows) -> figures.Figure:
    of = networks(rows)

    def line(statistic: Callable[..., Any], labels: str, *names: str) -> list[figures.Point]:
        points: list[figures.Point] = []
        for width in WIDTHS:
            samples = [of[labels, width].values(name) for name in names]
            value, (low, high) = estimated(statistic, *samples)
            points.append((width, value, (value - low, high - value)))
        return points

    losses = {
        labels: [figures.point(width, of[labels, width].values("test_loss")) for width in WIDTHS]
        for labels in LABELS
    }
    spreads = {
        f"{labels}, {name}": line(statistic, labels, "test_loss")
        for labels in LABELS
        for name, statistic in SPREADS.items()
    }
    alike = {labels: line(correlation, labels, *LOSSES) for labels in LABELS}
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
        f"The points reached by {len(of[TRUE, NARROW])} seeds of each width: "
        f"{rows.one('dataset')}, {rows.one('examples'):,} images of {SIDE} × {SIDE}, "
        f"{rows.one('epochs')} epochs",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
