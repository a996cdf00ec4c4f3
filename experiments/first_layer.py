"""What do the weights of the first layer look like, and when do they come to look so?

    python experiments/first_layer.py              # MNIST, ten minutes on two cores
    python experiments/first_layer.py --smoke      # the embedded digits, seconds

3Blue1Brown 2017, Gradient descent, how neural networks learn, of 784-16-16-10 (sigmoids, squared
error): drawn as images, the first layer's weights are no edges; they look "almost random, just with
some very loose patterns in the middle". Here they are drawn over training,

- `as in the source`: whose code is Nielsen's (2015, Neural networks and deep learning, chapter 1).
  Weights and biases start from the normal distribution of deviation 1; inputs are 0 to 1; plain SGD
  with rate 3 for half the squared error, 1.5 for ours, and batches of 10, as for his 784-30-10;
- `all images`: the same network as this project trains it. torch's start, of which no weight is
  larger than 1/28; normalised inputs; Adam and a one-cycle schedule;
- `few images` and `few, random labels`: the same with 1,000 of the images, for random labels can be
  memorised only if they are few. The two differ in their labels alone, and take as many steps;
- `CNN filters`: the 16 filters of 5 × 5 of a convolutional network.

A pattern is neighbours that are alike: Moran's I (`morans_i`), 0 for noise and 1 for a smooth
image, the mean over units, inside the digits' area only: the pixels that are not black in at least
1 % of the training images. It is held against the same weights shuffled within the area, against
the initial weights, and against the digits' own I; "almost random" is taken as at most half of
that, our own bar. Whether what is there looks like an edge is not measured, only shown. The middle
are the inner 14 × 14 pixels; their energy is the mean of the squared weights.

Where every image is black, an input of the source is 0, and its weight stays as it started. One
that is normalised, less the mean and divided by the deviation of all pixels, is a constant there,
and its weight learns what a second bias would: outside the area the weights of a unit move by the
same amount, and the initial noise stays on top.

A pass is as many examples as there are training images. The rate of our 784-16-16-10 was chosen on
the validation split, with all images and a seed beyond those of the study: 0.003, 0.01 and 0.03
gave 92.8, 92.8 and 90.8 %. The CNN's is that of train.py. The test images are read when a training
has ended.
"""

import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load, random_labels, subset
from nn_backprop.engines import autograd
from nn_backprop.models import MODELS
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, differences, spread
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch


class Kind(NamedTuple):
    """A network, what it learns, and how."""

    model: str
    lr: float
    batch_size: int
    few: bool = False
    random: bool = False
    as_in_the_source: bool = False


SOURCE, ALL, FEW, RANDOM, FILTERS = (
    "as in the source", "all images", "few images", "few, random labels", "CNN filters"
)  # fmt: skip
KINDS = {
    SOURCE: Kind("happy", 1.5, 10, as_in_the_source=True),
    ALL: Kind("happy", 1e-2, 32),
    FEW: Kind("happy", 1e-2, 32, few=True),
    RANDOM: Kind("happy", 1e-2, 32, few=True, random=True),
    FILTERS: Kind("cnn", 6e-3, 128),
}
SHOWN, SMOKE_SHOWN = (0, 1, 3, 10), (0, 1, 2, 4)  # passes; the last is the end of training
PART, SMOKE_PART = 55, 3  # of all images, few are the 55th part
OFTEN = 0.01  # the share of the images that must not be black at a pixel of the area
SHUFFLES = 99
LIKENESS = 0.5  # of the digits' own I
MIDDLE = 14  # pixels a side
DRAWN = 9  # units of each network, so that the picture stays small


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """The first layer's weights over training: pictures, and Moran's I."""

    seeds: int = 10
    """Number of seeds, from 0; at least 2."""


class Job(NamedTuple):
    """One training."""

    name: str  # of the kind
    seed: int
    options: Options
    folder: Path  # for the weights of the first seed, which are drawn


Rows = Mapping[str, Sequence[study.Row]]  # by kind, in the order of the seeds


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here
    jobs = [
        Job(name, seed, options, under_way.folder)
        for name in (FILTERS, SOURCE, ALL, FEW, RANDOM)  # the longest first
        for seed in range(options.seeds)
    ]
    rows = under_way.carry_out(
        train, jobs, lambda row: {f"morans_i/{row['kind']}": row["morans_i"][-1]}
    )
    by = {name: [row for row in rows if row["kind"] == name] for name in KINDS}
    under_way.finish(_tables(by), _claims(by), _picture(by, under_way.folder, _shown(options)))


def train(job: Job) -> study.Row:
    """One network, trained and tested, its first layer measured after each pass."""
    kind, data = KINDS[job.name], data_for(job)
    per_pass = _part(job.options) if kind.few else 1
    torch.manual_seed(job.seed)
    model = MODELS[kind.model]()
    if kind.as_in_the_source:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    optimizer_name, schedule_name = (
        ("sgd", "constant") if kind.as_in_the_source else ("adam", "one-cycle")
    )
    epochs = per_pass * _shown(job.options)[-1]
    steps = epochs * steps_per_epoch(len(data.train), kind.batch_size)
    optimizer = make_optimizer(optimizer_name, model.parameters(), kind.lr, 0.0)
    schedule = make_schedule(schedule_name, optimizer, kind.lr, steps)
    seen = [first_weights(model)]

    def look(steps: int, epochs: int) -> None:
        if epochs % per_pass == 0:
            seen.append(first_weights(model))

    began = time.perf_counter()
    fit(model, autograd, optimizer, schedule, data,
        epochs=epochs, batch_size=kind.batch_size, seed=job.seed, on_epoch=look)  # fmt: skip
    seconds = time.perf_counter() - began
    if job.seed == 0:
        np.save(job.folder / _file(job.name), torch.stack(seen).numpy())

    whole = _data(job.options)
    digits = whole.images[whole.train, 0]
    area = digits_area(digits)
    row = {
        "kind": job.name,
        "seed": job.seed,
        "dataset": data.name,
        "examples": len(data.train),
        "lr": kind.lr,
        "train_accuracy": evaluate(model, data, data.train).accuracy,
        "test_accuracy": evaluate(model, data, data.test).accuracy,  # read here alone
        "train_seconds": seconds,
        "area_pixels": int(area.sum()),
        "digits_i": morans_i(digits[:1000], area).mean().item(),
    }
    if kind.model == "happy":
        middle, inside = middle_of(area), torch.ones_like(area)
        row["energy"] = [energy_ratio(weight, middle, inside) for weight in seen]
        row["energy_in_area"] = [energy_ratio(weight, middle, area) for weight in seen]
    else:
        area = torch.ones(seen[0].shape[1:], dtype=torch.bool)  # a filter sees every pixel
    ends = morans_i(seen[-1], area)
    chance = torch.stack(
        [morans_i(shuffled(seen[-1], area, seed), area) for seed in range(SHUFFLES)]
    )
    return row | {
        "morans_i": [morans_i(weight, area).mean().item() for weight in seen],
        "morans_i_shuffled": chance.mean().item(),
        "beyond_all_shuffles": (ends > chance.amax(0)).double().mean().item(),
    }


def data_for(job: Job) -> ImageData:
    """What the job's network learns and is tested on."""
    kind, data = KINDS[job.name], _data(job.options)
    if kind.few:
        data = subset(data, len(data.train) // _part(job.options), job.seed)
    if kind.random:
        data = random_labels(data, share=1, seed=job.seed)
    return replace(data, mean=0.0, std=1.0) if kind.as_in_the_source else data


def first_weights(model: nn.Module) -> Tensor:
    """The weights of each unit or map of the first layer as an image: a copy (units, H, W)."""
    weight = next(model.parameters()).detach().clone()
    return weight.view(-1, 28, 28) if weight.dim() == 2 else weight[:, 0]


# --- What is measured ---------------------------------------------------------------------------


def morans_i(images: Tensor, area: Tensor) -> Tensor:
    """How alike neighbours are, (units,), in images (units, H, W), inside the area, bool (H, W).

    Moran's I of the N pixels of the area, with w_ij = 1 if i and j share a side (the rook's
    neighbours), else 0, and W = Σ_ij w_ij, in which each pair counts twice:

        I = N/W · Σ_ij w_ij (x_i − x̄)(x_j − x̄) / Σ_i (x_i − x̄)²

    It is near 1 for a smooth image and near −1 for a chessboard. Over all orders of the same pixels
    its mean is −1/(N − 1), whatever they are. An image without any contrast has none: NaN.

    Source: Moran 1950, Notes on continuous stochastic phenomena, Biometrika 37.
    """
    N = int(area.sum())
    pairs = int((area[1:] & area[:-1]).sum() + (area[:, 1:] & area[:, :-1]).sum())
    x = images.double()
    x = (x - x[:, area].mean(1)[:, None, None]) * area  # 0 outside: no pair reaches there
    products = (x[:, 1:] * x[:, :-1]).sum((1, 2)) + (x[:, :, 1:] * x[:, :, :-1]).sum((1, 2))
    return N / (2 * pairs) * 2 * products / x.square().sum((1, 2))


def shuffled(images: Tensor, area: Tensor, seed: int) -> Tensor:
    """The images with their pixels inside the area in another order, each image in its own."""
    generator = torch.Generator().manual_seed(seed)
    inside = images[:, area]
    order = torch.rand(inside.shape, generator=generator).argsort(1)
    mixed = images.clone()
    mixed[:, area] = inside.gather(1, order)
    return mixed


def digits_area(images: Tensor) -> Tensor:
    """The pixels, bool (H, W), that are not black in at least 1 % of the images (n, H, W)."""
    return (images > 0).double().mean(0) >= OFTEN


def middle_of(area: Tensor) -> Tensor:
    """The square of 14 × 14 pixels in the middle of an image like the area, bool (H, W)."""
    middle = torch.zeros_like(area)
    top, left = ((size - MIDDLE) // 2 for size in area.shape)
    middle[top : top + MIDDLE, left : left + MIDDLE] = True
    return middle


def energy_ratio(weight: Tensor, middle: Tensor, inside: Tensor) -> float:
    """The mean squared weight in the middle, divided by that of all others that are inside."""
    energy = weight.double().square().mean(0)
    return (energy[middle & inside].mean() / energy[~middle & inside].mean()).item()


def _file(name: str) -> str:
    return f"weights-{list(KINDS).index(name)}.npy"


def _part(options: Options) -> int:
    return SMOKE_PART if options.smoke else PART


def _shown(options: Options) -> tuple[int, ...]:
    return SMOKE_SHOWN if options.smoke else SHOWN


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


# --- What the rows come to ----------------------------------------------------------------------


def _end(rows: Sequence[study.Row], what: str) -> list[float]:
    return [row[what][-1] for row in rows]


def _claims(by: Rows) -> list[Claim]:
    claims = []
    for name in (SOURCE, ALL, FILTERS):
        rows = by[name]
        ends, starts = _end(rows, "morans_i"), [row["morans_i"][0] for row in rows]
        what = f"{name}: Moran's I after training less that"
        loose = "loose patterns" if name == SOURCE else None
        gains = differences(ends, starts)
        claims.append(between(f"{what} before: above 0", loose, gains, low=0))
        gains = differences(ends, [row["morans_i_shuffled"] for row in rows])
        claims.append(between(f"{what} of the weights shuffled: above 0", loose, gains, low=0))
        if name == FILTERS:
            continue
        claim = f"{name}: Moran's I after training, divided by that of the digits: at most "
        shares = [end / row["digits_i"] for end, row in zip(ends, rows, strict=True)]
        almost = "almost random" if name == SOURCE else None
        claims.append(between(f"{claim}{LIKENESS:g} (our bar)", almost, shares, high=LIKENESS))
        middle = "in the middle" if name == SOURCE else None
        for energy, others in (("energy", "all others"), ("energy_in_area", "others in the area")):
            claim = f"{name}: mean squared weight in the middle, divided by that of {others}"
            claims.append(between(f"{claim}: above 1", middle, _end(rows, energy), low=1))
    gains = differences(_end(by[FEW], "morans_i"), _end(by[RANDOM], "morans_i"))
    claim = "few images: Moran's I after training with true labels less that with random ones"
    claims.append(between(f"{claim}: above 0", None, gains, low=0))
    return claims


def _tables(by: Rows) -> dict[str, list[study.Row]]:
    first = by[ALL][0]
    table: list[study.Row] = []
    for name, rows in by.items():
        shares = {
            what: spread([100 * row[what] for row in rows])
            for what in ("beyond_all_shuffles", "train_accuracy", "test_accuracy")
        }
        table.append(
            {
                "network": name,
                "images": f"{rows[0]['examples']:,}",
                "Moran's I before": _spread([row["morans_i"][0] for row in rows]),
                "after": _spread(_end(rows, "morans_i")),
                "after, shuffled": _spread([row["morans_i_shuffled"] for row in rows]),
                f"units beyond all {SHUFFLES} shuffles, %": shares["beyond_all_shuffles"],
                "middle's energy, all others' = 1": (
                    spread(_end(rows, "energy")) if "energy" in rows[0] else "–"
                ),
                "others' in the area = 1": (
                    spread(_end(rows, "energy_in_area")) if "energy" in rows[0] else "–"
                ),
                "training accuracy, %": shares["train_accuracy"],
                "test accuracy, %": shares["test_accuracy"],
            }
        )
    title = (
        f"The first layer after {len(first['morans_i']) - 1} passes, {len(by[ALL])} seeds; the "
        f"digits' area has {first['area_pixels']} pixels, in which their own I is "
        f"{first['digits_i']:.3f}"
    )
    return {title: table}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def _picture(by: Rows, folder: Path, shown: Sequence[int]) -> figures.Figure:
    strips = {}
    for name in KINDS:
        weights = np.load(folder / _file(name))
        strips[name] = {f"{n} passes" if n != 1 else "1 pass": weights[n, :DRAWN] for n in shown}

    def lines(what: str) -> dict[str, list[figures.Point]]:
        return {
            name: [
                figures.point(n, [row[what][n] for row in rows]) for n in range(len(rows[0][what]))
            ]
            for name, rows in by.items()
            if what in rows[0]
        }

    levels = {"the digits themselves": by[ALL][0]["digits_i"], "noise": 0}
    x, y = "passes", "ratio of mean squares"
    parts = [
        figures.Panel("Neighbours alike", x, "Moran's I", lines("morans_i"), levels=levels),
        figures.Panel("Middle against all others", x, y, lines("energy"), levels={"alike": 1}),
        figures.Panel(
            "Middle against others in the area", x, y, lines("energy_in_area"), levels={"alike": 1}
        ),
    ]
    return figures.weights_over_time(
        strips, parts,
        f"{DRAWN} units of the first layer over training, {by[ALL][0]['dataset']}\n"
        f"below: all units, mean ± standard deviation over {len(by[ALL])} seeds",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
