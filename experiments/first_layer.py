"""What do the weights of the first layer look like, and when do they come to look so?

    python experiments/first_layer.py              # MNIST, seven minutes on two cores
    python experiments/first_layer.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/first_layer/README.md.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, random_labels, subset
from nn_backprop.models import MODELS
from nn_backprop.studies import Claim, Row, Rows, between, mean_sd

SOURCE, ALL, FEW, RANDOM, FILTERS = (
    "as in the source", "all images", "few images", "few, random labels", "CNN filters"
)  # fmt: skip
KINDS = {  # a network, its rate, its batch size
    SOURCE: ("happy", 1.5, 10),
    ALL: ("happy", 1e-2, 32),
    FEW: ("happy", 1e-2, 32),
    RANDOM: ("happy", 1e-2, 32),
    FILTERS: ("cnn", 6e-3, 128),
}
SHOWN, SMOKE_SHOWN = (0, 1, 3, 10), (0, 1, 2, 4)  # passes; the last is the end of training
PART, SMOKE_PART = 55, 3  # of all images, few are the 55th part
OFTEN = 0.01  # the share of the images that must not be black at a pixel of the area
SHUFFLES = 99
LIKENESS = 0.5  # of the digits' own I
MIDDLE = slice(7, 21)  # of the 28 pixels of a side
ENERGIES = {"energy": "all others", "energy_in_area": "others in the area"}
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
    name, seed, options, folder = job
    network, lr, batch_size = KINDS[name]
    whole, data = studies.load_data(options), data_for(job)
    per_pass = len(whole.train) // len(data.train)  # a pass is as long for few images as for all
    passes = (SMOKE_SHOWN if options.smoke else SHOWN)[-1]
    torch.manual_seed(seed)
    model = MODELS[network]()
    if name == SOURCE:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    seen = [first_weights(model)]

    def look(steps: int, epochs: int) -> None:
        if epochs % per_pass == 0:
            seen.append(first_weights(model))

    optimizer, schedule = ("sgd", "constant") if name == SOURCE else ("adam", "one-cycle")
    trained = studies.train_network(
        model, data, lr=lr, epochs=per_pass * passes, batch_size=batch_size, seed=seed,
        optimizer=optimizer, schedule=schedule, on_epoch=look,
    )  # fmt: skip
    if seed == 0:
        np.save(folder / file_of(name), torch.stack(seen).numpy())

    digits = whole.images[whole.train, 0]
    area = digits_area(digits)
    row: Row = {
        "kind": name, "seed": seed, "dataset": data.name, "examples": len(data.train), "lr": lr,
        **studies.accuracies(model, data, ("train", "test")),
        "train_seconds": trained.seconds,
        "area_pixels": int(area.sum()), "digits_i": morans_i(digits[:1000], area).mean().item(),
    }  # fmt: skip
    everywhere = torch.ones(seen[0].shape[1:], dtype=torch.bool)
    if name == FILTERS:
        area = everywhere  # a filter sees every pixel
    else:
        for energy, inside in zip(ENERGIES, (everywhere, area), strict=True):
            row[energy] = [energy_ratio(weight, inside) for weight in seen]
    ends = morans_i(seen[-1], area)
    orders = [shuffled(seen[-1], area, order) for order in range(SHUFFLES)]
    chance = torch.stack([morans_i(order, area) for order in orders])
    return row | {
        "morans_i": [morans_i(weight, area).mean().item() for weight in seen],
        "morans_i_shuffled": chance.mean().item(),
        "beyond_all_shuffles": (ends > chance.amax(0)).double().mean().item(),
    }


def data_for(job: Job) -> ImageData:
    """What the job's network learns and is tested on."""
    data = studies.load_data(job.options)
    if job.name == SOURCE:
        return replace(data, mean=0.0, std=1.0)
    if job.name in (FEW, RANDOM):
        part = SMOKE_PART if job.options.smoke else PART
        data = subset(data, len(data.train) // part, job.seed)
    return random_labels(data, share=1, seed=job.seed) if job.name == RANDOM else data


def first_weights(model: nn.Module) -> Tensor:
    """The weights of each unit or map of the first layer as an image: a copy (units, H, W)."""
    weight = next(model.parameters()).detach().clone()
    return weight.view(-1, 28, 28) if weight.dim() == 2 else weight[:, 0]


def file_of(name: str) -> str:
    """Of the weights of the first seed, after each pass."""
    return f"weights-{list(KINDS).index(name)}.npy"


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


def energy_ratio(weight: Tensor, inside: Tensor) -> float:
    """The mean squared weight (units, 28, 28) in the middle 14 × 14 pixels that are inside, bool
    (28, 28), divided by that of all others that are."""
    middle = torch.zeros_like(inside)
    middle[MIDDLE, MIDDLE] = True
    energy = weight.double().square().mean(0)
    return (energy[middle & inside].mean() / energy[~middle & inside].mean()).item()


# --- What the rows come to ----------------------------------------------------------------------


def at(rows: Rows, what: str, moment: int) -> np.ndarray:
    """A number of each seed after so many passes; before training 0, at the end −1."""
    return rows.values(lambda row: row[what][moment])


def claims(rows: Rows) -> list[Claim]:
    by = rows.by("kind")
    found = [claim for name in (SOURCE, ALL, FILTERS) for claim in of_one(name, by[name])]
    few = "few images: Moran's I after training with true labels less that with random ones"
    gains = at(by[FEW], "morans_i", -1) - at(by[RANDOM], "morans_i", -1)
    return [*found, between(f"{few}: above 0", None, gains, low=0)]


def of_one(name: str, of: Rows) -> Iterator[Claim]:
    """What the source says of its network, and the same of another."""
    said = ("loose patterns", "almost random", "in the middle") if name == SOURCE else 3 * (None,)
    loose, almost, middle = said
    what, ends = f"{name}: Moran's I after training", at(of, "morans_i", -1)
    yield between(f"{what} less that before: above 0", loose, ends - at(of, "morans_i", 0), low=0)
    yield between(f"{what} less that of the weights shuffled: above 0", loose,
                  ends - of.values("morans_i_shuffled"), low=0)  # fmt: skip
    if name == FILTERS:
        return
    yield between(f"{what}, divided by that of the digits: at most {LIKENESS:g} (our bar)", almost,
                  ends / of.values("digits_i"), high=LIKENESS)  # fmt: skip
    for energy, others in ENERGIES.items():
        yield between(f"{name}: mean squared weight in the middle, divided by that of {others}: "
                      "above 1", middle, at(of, energy, -1), low=1)  # fmt: skip


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = rows.by("kind")

    def line(name: str) -> Row:
        of = by[name]
        energies = [mean_sd(at(of, what, -1)) if what in of[0] else "–" for what in ENERGIES]
        return {
            "network": name,
            "images": f"{of.one('examples'):,}",
            "Moran's I before": mean_sd(at(of, "morans_i", 0), digits=3),
            "after": mean_sd(at(of, "morans_i", -1), digits=3),
            "after, shuffled": mean_sd(of.values("morans_i_shuffled"), digits=3),
            f"units beyond all {SHUFFLES} shuffles, %":
                mean_sd(of.values("beyond_all_shuffles", 100)),
            "middle's energy, all others' = 1": energies[0],
            "others' in the area = 1": energies[1],
            "training accuracy, %": mean_sd(of.values("train_accuracy", 100)),
            "test accuracy, %": mean_sd(of.values("test_accuracy", 100)),
        }  # fmt: skip

    first = by[ALL][0]
    title = (
        f"The first layer after {len(first['morans_i']) - 1} passes, {len(by[ALL])} seeds; the "
        f"digits' area has {first['area_pixels']} pixels, in which their own I is "
        f"{first['digits_i']:.3f}"
    )
    return {title: [*map(line, KINDS)]}


def picture(rows: Rows) -> figures.Figure | None:
    by, folder, dataset = rows.by("kind"), rows.folder, rows.one("dataset")
    if folder is None or not (folder / file_of(ALL)).exists():
        return None
    shown, strips = SMOKE_SHOWN if dataset == "digits" else SHOWN, {}
    for name in KINDS:
        weights = np.load(folder / file_of(name))
        strips[name] = {f"{n} pass{'es' * (n != 1)}": weights[n, :DRAWN] for n in shown}

    def panel(title: str, y: str, what: str, levels: dict[str, float]) -> figures.Panel:
        lines = {
            name: [figures.point(n, at(of, what, n)) for n in range(len(of[0][what]))]
            for name in KINDS
            if what in (of := by[name])[0]
        }
        return figures.Panel(title, "passes", y, lines, levels=levels)

    ratio, alike = "ratio of mean squares", {"alike": 1.0}
    return figures.weights_over_time(
        strips,
        [
            panel("Neighbours alike", "Moran's I", "morans_i",
                  {"the digits themselves": by[ALL][0]["digits_i"], "noise": 0}),
            panel("Middle against all others", ratio, "energy", alike),
            panel("Middle against others in the area", ratio, "energy_in_area", alike),
        ],
        f"{DRAWN} units of the first layer over training, {dataset}\n"
        f"below: all units, mean ± standard deviation over {len(by[ALL])} seeds",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
