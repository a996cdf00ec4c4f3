"""Are the points that training reaches of about equal quality, the more so the wider the network?

    python experiments/minima.py              # MNIST, 1,000 networks, a quarter of an hour
    python experiments/minima.py --smoke      # the embedded digits, seconds

Choromanska, Henaff, Mathieu, Ben Arous & LeCun 2015, The loss surfaces of multilayer networks: the
larger the network, the narrower the band of losses in which training ends, and the less a better
training loss says of the test loss. They trained networks with one hidden layer of 25 to 500 ReLUs
on MNIST made 10 × 10, many of each width. So do we: 100-n₁-10, cross-entropy, SGD without momentum,
100 seeds of each width, each with its own start and its own order of the same 10,000 images. Beside
them stand as many networks whose training labels are random, one draw for all; their test labels
are true, and the more such a network has memorised, the worse it does on them.

What is reached is called a point, not a minimum: training stops after so many epochs. How far it
has come is told by the gradient of the loss of all training images, its norm at the end as a share
of that at the start. With random labels the gradient is small from the start, for hardly anything
is common to the images of a label. A tenth is our own bar, set before the first run.

A spread is a standard deviation or an interquartile range over seeds. It may shrink because the
loss itself is smaller; so it is also told as a share of the mean. Intervals of spreads, their
ratios and correlations are bootstrapped over seeds.

One learning rate serves all. It was chosen on the validation split, with two seeds beyond those of
the study and true labels: with 0.03, 0.1 and 0.3 the loss, mean of the widths 25, 100 and 500, was
0.177, 0.159 and 0.195. The test images are read when a training has ended.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load, random_labels, resize, subset
from nn_backprop.engines import autograd
from nn_backprop.models import MLP
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, bootstrap_interval, judged
from nn_backprop.training import evaluate_many, fit_many

TRUE, RANDOM = LABELS = ("true labels", "random labels")
WIDTHS = (25, 50, 100, 250, 500)
NARROW, WIDE = WIDTHS[0], WIDTHS[-1]
SIDE = 10  # pixels
EXAMPLES, SMOKE_EXAMPLES = 10_000, 500
EPOCHS, SMOKE_EPOCHS, BATCH = 100, 3, 50
LR = 0.1
SMOKE_SEEDS = FEWEST = 20  # fewer have no bootstrap
TOGETHER = 25  # seeds to a job
BAR = 0.1  # of the gradient's norm at the start


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """The quality of the points that training reaches, by width, over many seeds."""

    seeds: int = 100
    """Number of seeds, from 0; at least 20."""


class Job(NamedTuple):
    """Networks of one kind, trained together."""

    labels: str
    width: int
    seeds: range
    options: Options


class Group(NamedTuple):
    """All networks of one kind: each number in the order of the seeds."""

    train_loss: Sequence[float]
    test_loss: Sequence[float]
    gradient: Sequence[float]  # its norm at the end, divided by that at the start
    train_accuracy: Sequence[float]
    test_accuracy: Sequence[float]


Groups = Mapping[tuple[str, int], Group]


def conduct(under_way: study.Study, options: Options) -> None:
    seeds = SMOKE_SEEDS if options.smoke else options.seeds
    if seeds < FEWEST:
        raise study.UsageError(f"--seeds must be {FEWEST} or more, not {seeds}")
    _data(options, TRUE)  # so that a missing MNIST ends the study here
    jobs = [
        Job(labels, width, range(first, min(first + TOGETHER, seeds)), options)
        for width in reversed(WIDTHS)  # the longest first
        for labels in LABELS
        for first in range(0, seeds, TOGETHER)
    ]
    rows = under_way.carry_out(
        train, jobs,
        lambda row: {
            f"{row['labels']} {row['width']}/test_loss": statistics.fmean(row["test_loss"])
        },
    )  # fmt: skip
    groups = gathered(rows)
    under_way.finish(_tables(groups), _claims(groups), _picture(groups, rows[0]))


def train(job: Job) -> study.Row:
    """The networks of the job, trained and tested; each list is in the order of the seeds."""
    data = _data(job.options, job.labels)
    models = []
    for seed in job.seeds:
        torch.manual_seed(seed)
        models.append(MLP((SIDE * SIDE, job.width, 10)))
    started = _gradient_norms(models, data)
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    began = time.perf_counter()
    losses = fit_many(
        models, data, seeds=job.seeds, lrs=LR, optimizer="sgd", epochs=epochs, batch_size=BATCH
    )
    seconds = time.perf_counter() - began
    if not losses.isfinite().all():
        raise study.StudyError(f"a training diverged, {job}")
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
        "gradient_at_the_end": _gradient_norms(models, data),
        "train_loss": on_train.loss.tolist(),
        "train_accuracy": on_train.accuracy.tolist(),
        "test_loss": on_test.loss.tolist(),
        "test_accuracy": on_test.accuracy.tolist(),
        "train_seconds": seconds,
    }


def _gradient_norms(models: Sequence[nn.Module], data: ImageData) -> list[float]:
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
def _data(options: Options, labels: str) -> ImageData:
    data = load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)
    data = replace(data, images=resize(data.images, SIDE))
    data = subset(data, SMOKE_EXAMPLES if options.smoke else EXAMPLES, seed=0)
    return random_labels(data, share=1, seed=0) if labels == RANDOM else data


# --- What the rows come to ----------------------------------------------------------------------


def gathered(rows: Sequence[study.Row]) -> Groups:
    """The rows' lists, joined by labels and width, in the order of the seeds."""
    groups = {}
    for labels in LABELS:
        for width in WIDTHS:
            parts = [row for row in rows if (row["labels"], row["width"]) == (labels, width)]
            parts.sort(key=lambda row: row["seeds"][0])
            of = {name: [x for row in parts for x in row[name]] for name in _LISTS}
            shares = [
                end / start
                for end, start in zip(
                    of["gradient_at_the_end"], of["gradient_at_the_start"], strict=True
                )
            ]
            groups[labels, width] = Group(
                of["train_loss"], of["test_loss"], shares,
                of["train_accuracy"], of["test_accuracy"],
            )  # fmt: skip
    return groups


_LISTS = (
    "gradient_at_the_start", "gradient_at_the_end",
    "train_loss", "test_loss", "train_accuracy", "test_accuracy",
)  # fmt: skip


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


def _estimated(
    statistic: Callable[..., Any], *samples: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The statistic of the samples, and its interval over seeds."""
    value = float(statistic(*map(np.asarray, samples)))
    return value, bootstrap_interval(statistic, *samples)


def _claims(groups: Groups) -> list[Claim]:
    claims = []
    for labels in LABELS:
        narrow, wide = groups[labels, NARROW], groups[labels, WIDE]
        for name, spread in SPREADS.items():
            claim = (
                f"{labels}: {name} of the test loss with {WIDE} hidden units, divided by that with "
                f"{NARROW}: below 1"
            )
            published = "shrinks with width" if labels == TRUE else None
            ratio = functools.partial(_ratio, spread)
            found = _estimated(ratio, wide.test_loss, narrow.test_loss)
            claims.append(judged(claim, published, *found, high=1))
    narrow, wide = groups[TRUE, NARROW], groups[TRUE, WIDE]
    claim = (
        f"{TRUE}: correlation of training and test loss over seeds with {WIDE} hidden units, less "
        f"that with {NARROW}: below 0"
    )
    found = _estimated(
        lambda a, b, c, d: correlation(a, b) - correlation(c, d),
        wide.train_loss, wide.test_loss, narrow.train_loss, narrow.test_loss,
    )  # fmt: skip
    claims.append(judged(claim, "falls with width", *found, high=0))
    for labels in LABELS:
        claim = (
            f"{labels}: the gradient's norm at the end, divided by that at the start, of the worst "
            f"width of a seed: at most {BAR:g} (our bar)"
        )
        of_widths = (groups[labels, width].gradient for width in WIDTHS)
        worst = [max(shares) for shares in zip(*of_widths, strict=True)]
        claims.append(between(claim, None, worst, high=BAR))
    return claims


def _ratio(spread: Callable[[Any], Any], one: Any, other: Any) -> Any:
    return spread(one) / spread(other)


def _tables(groups: Groups) -> dict[str, list[study.Row]]:
    tables = {}
    for labels in LABELS:
        of = {width: groups[labels, width] for width in WIDTHS}
        seeds = len(of[NARROW].test_loss)
        tables[f"{labels.capitalize()}: test loss of {seeds} networks of each width"] = [
            {
                "hidden units": width,
                "mean": f"{statistics.fmean(group.test_loss):.4g}",
                **{name: _told(spread, group.test_loss) for name, spread in SPREADS.items()},
                "standard deviation, % of the mean": _told(relative_deviation, group.test_loss),
                "correlation with the training loss": _told(
                    correlation, group.train_loss, group.test_loss
                ),
            }
            for width, group in of.items()
        ]
        tables[f"{labels.capitalize()}: where training has come to, medians"] = [
            {
                "hidden units": width,
                "training loss": f"{statistics.median(group.train_loss):.3g}",
                "gradient's norm, % of that at the start": (
                    f"{100 * statistics.median(group.gradient):.3g}"
                ),
                "training accuracy, %": f"{100 * statistics.median(group.train_accuracy):.2f}",
                "test accuracy, %": f"{100 * statistics.median(group.test_accuracy):.2f}",
            }
            for width, group in of.items()
        ]
    return tables


def _told(statistic: Callable[..., Any], *samples: Sequence[float]) -> str:
    value, (low, high) = _estimated(statistic, *samples)
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def _picture(groups: Groups, of: study.Row) -> figures.Figure:
    def line(statistic: Callable[..., Any], labels: str, *names: str) -> list[figures.Point]:
        points: list[figures.Point] = []
        for width in WIDTHS:
            samples = [getattr(groups[labels, width], name) for name in names]
            value, (low, high) = _estimated(statistic, *samples)
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
    correlations = {
        labels: line(correlation, labels, "train_loss", "test_loss") for labels in LABELS
    }
    x, bar = "hidden units", "bar: 95 % interval"
    return figures.side_by_side(
        [
            figures.Panel("Test loss; bar: standard deviation", x, "test loss", losses, "xy"),
            figures.Panel(f"Over the seeds; {bar}", x, "spread of the test loss", spreads, "xy"),
            figures.Panel(
                f"Training and test loss; {bar}", x, "correlation over seeds", correlations, "x",
                levels={"none": 0},
            ),
        ],
        f"The points reached by {len(groups[TRUE, NARROW].test_loss)} seeds of each width: "
        f"{of['dataset']}, {of['examples']:,} images of {SIDE} × {SIDE}, {of['epochs']} epochs",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
