"""What do the weights of the first layer look like, and when do they come to look so?

    python experiments/first_layer.py              # MNIST, seven minutes on two cores
    python experiments/first_layer.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/first_layer/README.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, random_labels, subset
from nn_backprop.models import MODELS
from nn_backprop.studies import Claim, Row, Rows


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
class Options(studies.Options):
    """The first layer's weights over training: pictures, and Moran's I."""

    seeds: int = 10
    """Number of seeds, from 0."""


class Job(NamedTuple):
    """One training."""

    name: str  # of the kind
    seed: int
    options: Options
    folder: Path  # for the weights of the first seed, which are drawn


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    jobs = [
        Job(name, seed, options, run.folder)
        for name in (FILTERS, SOURCE, ALL, FEW, RANDOM)  # the longest first
        for seed in range(options.seeds)
    ]
    run.train_all(train, jobs, lambda row: {f"morans_i/{row['kind']}": row["morans_i"][-1]})


def train(job: Job) -> Row:
    """One network, trained and tested, its first layer measured after each pass."""
    kind, data = KINDS[job.name], data_for(job)
    per_pass = part(job.options) if kind.few else 1
    torch.manual_seed(job.seed)
    model = MODELS[kind.model]()
    if kind.as_in_the_source:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    seen = [first_weights(model)]

    def look(steps: int, epochs: int) -> None:
        if epochs % per_pass == 0:
            seen.append(first_weights(model))

    trained = studies.train_network(
        model, data, lr=kind.lr, epochs=per_pass * shown(job.options.smoke)[-1],
        batch_size=kind.batch_size, seed=job.seed,
        optimizer="sgd" if kind.as_in_the_source else "adam",
        schedule="constant" if kind.as_in_the_source else "one-cycle", on_epoch=look,
    )  # fmt: skip
    if job.seed == 0:
        np.save(job.folder / file_of(job.name), torch.stack(seen).numpy())

    whole = studies.load_data(job.options)
    digits = whole.images[whole.train, 0]
    area = digits_area(digits)
    row: Row = {
        "kind": job.name,
        "seed": job.seed,
        "dataset": data.name,
        "examples": len(data.train),
        "lr": kind.lr,
        **studies.accuracies(model, data, ("train", "test")),
        "train_seconds": trained.seconds,
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
    orders = [shuffled(seen[-1], area, seed) for seed in range(SHUFFLES)]
    chance = torch.stack([morans_i(order, area) for order in orders])
    return row | {
        "morans_i": [morans_i(weight, area).mean().item() for weight in seen],
        "morans_i_shuffled": chance.mean().item(),
        "beyond_all_shuffles": (ends > chance.amax(0)).double().mean().item(),
    }


def data_for(job: Job) -> ImageData:
    """What the job's network learns and is tested on."""
    kind, data = KINDS[job.name], studies.load_data(job.options)
    if kind.few:
        data = subset(data, len(data.train) // part(job.options), job.seed)
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


def file_of(name: str) -> str:
    """Of the weights of the first seed, after each pass."""
    return f"weights-{list(KINDS).index(name)}.npy"


def part(options: Options) -> int:
    return SMOKE_PART if options.smoke else PART


def shown(smoke: bool) -> tuple[int, ...]:
    return SMOKE_SHOWN if smoke else SHOWN


# --- What the rows come to ----------------------------------------------------------------------


def at(rows: Rows, what: str, moment: int) -> np.ndarray:
    """A number of each seed before training (moment 0) or after it (−1)."""
    return rows.values(lambda row: row[what][moment])


def claims(rows: Rows) -> list[Claim]:
    by = rows.by("kind")
    found = []

    def claim(words: str, published: str | None, values: Sequence[float] | np.ndarray,
              low: float = 0, high: float = np.inf) -> None:  # fmt: skip
        found.append(studies.between(words, published, values, low, high))

    for name in (SOURCE, ALL, FILTERS):
        of, source = by[name], name == SOURCE
        ends = at(of, "morans_i", -1)
        what, loose = f"{name}: Moran's I after training", "loose patterns" if source else None
        claim(f"{what} less that before: above 0", loose, ends - at(of, "morans_i", 0))
        mixed = of.values("morans_i_shuffled")
        claim(f"{what} less that of the weights shuffled: above 0", loose, ends - mixed)
        if name == FILTERS:
            continue
        almost = f"{what}, divided by that of the digits: at most {LIKENESS:g} (our bar)"
        claim(almost, "almost random" if source else None, ends / of.values("digits_i"),
              low=-np.inf, high=LIKENESS)  # fmt: skip
        for energy, others in (("energy", "all others"), ("energy_in_area", "others in the area")):
            words = f"{name}: mean squared weight in the middle, divided by that of {others}"
            published = "in the middle" if source else None
            claim(f"{words}: above 1", published, at(of, energy, -1), low=1)
    few = "few images: Moran's I after training with true labels less that with random ones"
    gains = at(by[FEW], "morans_i", -1) - at(by[RANDOM], "morans_i", -1)
    claim(f"{few}: above 0", None, gains)
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = rows.by("kind")
    table = []
    for name in KINDS:
        of = by[name]
        energies = [
            studies.mean_sd(at(of, what, -1)) if what in of[0] else "–"
            for what in ("energy", "energy_in_area")
        ]
        table.append({
            "network": name,
            "images": f"{of.one('examples'):,}",
            "Moran's I before": studies.mean_sd(at(of, "morans_i", 0), digits=3),
            "after": studies.mean_sd(at(of, "morans_i", -1), digits=3),
            "after, shuffled": studies.mean_sd(of.values("morans_i_shuffled"), digits=3),
            f"units beyond all {SHUFFLES} shuffles, %":
                studies.mean_sd(of.values("beyond_all_shuffles", 100)),
            "middle's energy, all others' = 1": energies[0],
            "others' in the area = 1": energies[1],
            "training accuracy, %": studies.mean_sd(of.values("train_accuracy", 100)),
            "test accuracy, %": studies.mean_sd(of.values("test_accuracy", 100)),
        })  # fmt: skip
    first = by[ALL][0]
    title = (
        f"The first layer after {len(first['morans_i']) - 1} passes, {len(by[ALL])} seeds; the "
        f"digits' area has {first['area_pixels']} pixels, in which their own I is "
        f"{first['digits_i']:.3f}"
    )
    return {title: table}


def picture(rows: Rows) -> figures.Figure | None:
    by = rows.by("kind")
    folder = rows.folder
    if folder is None or not (folder / file_of(ALL)).exists():
        return None
    strips, dataset = {}, rows.one("dataset")
    for name in KINDS:
        weights = np.load(folder / file_of(name))
        strips[name] = {
            f"{n} passes" if n != 1 else "1 pass": weights[n, :DRAWN]
            for n in shown(dataset == "digits")
        }

    def lines(what: str) -> dict[str, list[figures.Point]]:
        return {
            name: [figures.point(n, at(by[name], what, n)) for n in range(len(by[name][0][what]))]
            for name in KINDS
            if what in by[name][0]
        }

    levels = {"the digits themselves": by[ALL][0]["digits_i"], "noise": 0}
    x, y, alike = "passes", "ratio of mean squares", {"alike": 1.0}
    panels = [
        figures.Panel("Neighbours alike", x, "Moran's I", lines("morans_i"), levels=levels),
        figures.Panel("Middle against all others", x, y, lines("energy"), levels=alike),
        figures.Panel("Middle against others in the area", x, y, lines("energy_in_area"),
                      levels=alike),
    ]  # fmt: skip
    return figures.weights_over_time(
        strips, panels,
        f"{DRAWN} units of the first layer over training, {dataset}\n"
        f"below: all units, mean ± standard deviation over {len(by[ALL])} seeds",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
