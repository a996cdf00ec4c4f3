"""Eight ways to build a network, at one number of parameters: what does each reach, at what cost?

    python experiments/compare_structures.py              # MNIST, 8 structures × 2 sizes × 3 rates
    python experiments/compare_structures.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/compare_structures/README.md.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, subset
from nn_backprop.layers.low_rank import cut_to_rank
from nn_backprop.models import (
    MLP,
    KernelNetwork,
    OctaveCNN,
    lenet_300_100,
    locally_connected,
    shared_weights,
    tied_network,
)
from nn_backprop.models.counting import multiply_adds, multiply_adds_left
from nn_backprop.models.lenet import KEPT
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.training import parameters_left, prune_smallest, shares_kept

BUDGET = 20_000  # parameters
BATCH = 128
RANKS = {"layers.0": 14, "layers.1": 8}  # of LeNet-300-100
# Of the shares of its weights that Han et al. keep, what the budget leaves: 19,577 weights; and 410
# biases.
LEFT = {name: 0.899 * share for name, share in KEPT["LeNet-300-100"].items()}
ROUNDS = 3
RATES = (0.5, 1.0, 2.0)  # times a structure's own
PLAIN = "plain"


class Structure(NamedTuple):
    """How a network is built, about what rate it trains, and what is done to it at half-time."""

    build: Callable[[int], nn.Module]  # of a seed, which torch has already
    lrs: tuple[float, float]  # for few examples, and for many
    cut: str = ""  # "", "low rank" or "pruned"


STRUCTURES: dict[str, Structure] = {
    PLAIN: Structure(lambda _: MLP((784, 25, 10)), (3e-2, 1e-2)),
    "locally connected": Structure(lambda _: locally_connected((2, 3)), (1e-2, 1e-2)),
    "shared weights": Structure(lambda _: shared_weights((10, 26)), (1e-2, 1e-2)),
    "octave": Structure(lambda _: OctaveCNN(), (1e-2, 2e-2)),
    "kernel + pooling": Structure(lambda seed: KernelNetwork(124, seed=seed), (3e-2, 3e-1)),
    "tied": Structure(lambda _: tied_network(24), (3e-2, 3e-2)),
    "low rank": Structure(lambda _: lenet_300_100(), (1e-2, 1e-2), "low rank"),
    "pruned": Structure(lambda _: lenet_300_100(), (1e-2, 1e-2), "pruned"),
}


@dataclass(frozen=True)
class Options(studies.Options):
    """Eight structures at one number of parameters, with few and with many examples."""


class Job(NamedTuple):
    """A network to train."""

    options: Options
    structure: str
    n: int  # training examples
    epochs: int
    lr: float
    seed: int


def collect(run: studies.StudyRun, options: Options) -> None:
    most = len(studies.load_data(options).train)
    # The longer first; about 2,600 and 1,500 steps.
    epochs = {most: 4, 300: 12} if options.smoke else {most: 6, 1_000: 188}
    rates = {
        (structure, n): [times * how.lrs[n == most] for times in ((1,) if options.smoke else RATES)]
        for n in epochs
        for structure, how in STRUCTURES.items()
    }
    while rates:
        jobs = [
            Job(options, structure, n, epochs[n], lr, seed)
            for (structure, n), lrs in rates.items()
            for lr in lrs
            for seed in range(options.seeds)
        ]
        run.train_all(train, jobs, lambda row: {"{structure}/{n}".format(**row): row["validation"]})
        rates = {} if options.smoke else beyond(Rows(run.rows))


def beyond(rows: Rows) -> dict[tuple[str, int], list[float]]:
    """Of each structure and number of examples, the rate to try next: none if the best is inside.

    rows are all that were trained.
    """
    found = {}
    for cell, of in best(rows).items():
        lr, tried = of.one("lr"), rows.by("structure", "n")[cell].by("lr")
        if lr in (min(tried), max(tried)):
            found[cell] = [lr / 2 if lr == min(tried) else 2 * lr]
    return found


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """Trains a network, and cuts it if it is one of those; accuracies are shares, 0 to 1."""
    torch.manual_seed(job.seed)
    structure = STRUCTURES[job.structure]
    data = subset(studies.load_data(job.options), job.n, job.seed)
    model = structure.build(job.seed)
    began = time.process_time()
    if not structure.cut:
        train_on(model, data, job.lr, job.epochs, job.seed)
    else:
        half = job.epochs // 2
        left = job.epochs - half
        train_on(model, data, job.lr, half, job.seed)
        if structure.cut == "low rank":
            cut_to_rank(model, RANKS)
            train_on(model, data, job.lr / 3, left, job.seed + 1_000)
        else:
            for done, kept in enumerate(shares_kept(LEFT, ROUNDS)):
                prune_smallest(model, kept)
                epochs = left // ROUNDS + (done >= ROUNDS - left % ROUNDS)
                if epochs:
                    train_on(model, data, job.lr / 3, epochs, job.seed + 1_000 * (done + 1))
    seconds = time.process_time() - began
    image = data.batch(data.train[:1])[0]
    reached = studies.accuracies(model, data)
    return {
        "structure": job.structure, "n": job.n, "lr": job.lr, "seed": job.seed,
        "parameters": parameters_left(model),
        "multiply_adds": multiply_adds(model, image),
        "multiply_adds_without_zeros": multiply_adds_left(model, image),
        "seconds": seconds,
        **{split: reached[f"{split}_accuracy"] for split in ("train", "validation", "test")},
    }  # fmt: skip


def train_on(model: nn.Module, data: ImageData, lr: float, epochs: int, seed: int) -> None:
    studies.train_network(model, data, lr=lr, epochs=epochs, batch_size=BATCH, seed=seed)


# --- What the rows come to ----------------------------------------------------------------------


def best(rows: Rows) -> dict[tuple[str, int], Rows]:
    """Of each structure and number of examples the rows with its best rate."""
    return rows.best(("structure", "n"), ("lr",), "validation").by("structure", "n")


def claims(rows: Rows) -> list[Claim]:
    by, found = best(rows), []
    for n in sorted(rows.by("n")):
        plain = by[PLAIN, n].values("test", 100)
        for structure in STRUCTURES:
            if structure != PLAIN:
                claim = f"n = {n:,}: {structure} is more accurate than plain, in points"
                gain = by[structure, n].values("test", 100) - plain
                found.append(studies.between(claim, None, gain, low=0))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by, (few, many) = best(rows), sorted(rows.by("n"))
    table = []
    for structure in STRUCTURES:
        at_few, at_many = by[structure, few], by[structure, many]
        without = at_few.one("multiply_adds_without_zeros")
        table.append({
            "structure": structure,
            "parameters": f"{at_few.one('parameters'):,}",
            "multiply-adds of an image": f"{at_few.one('multiply_adds'):,}"
            + (f" ({without:,} without zeros)" if structure == "pruned" else ""),
            f"n = {few:,}: rate": f"{at_few.one('lr'):g}",
            f"n = {few:,}: test accuracy, %": studies.mean_sd(at_few.values("test", 100)),
            "training, s": f"{statistics.median(at_few.values('seconds')):.1f}",
            f"n = {many:,}: rate": f"{at_many.one('lr'):g}",
            f"n = {many:,}: test accuracy, %": studies.mean_sd(at_many.values("test", 100)),
            "training, s ": f"{statistics.median(at_many.values('seconds')):.1f}",
        })  # fmt: skip
    seeds = len(rows.by("seed"))
    return {f"Eight structures with about {BUDGET:,} parameters, {seeds} seeds": table}


def picture(rows: Rows) -> figures.Figure:
    by, (few, many) = best(rows), sorted(rows.by("n"))
    parts = []
    for n, value, axis in (
        (few, "multiply_adds", "multiply-adds of an image"),
        (many, "multiply_adds", "multiply-adds of an image"),
        (many, "seconds", "processor seconds of training"),
    ):
        points = {
            name: [figures.point(statistics.median(of.values(value)), of.values("test", 100))]
            for name, of in ((name, by[name, n]) for name in STRUCTURES)
        }
        title = f"{n:,} training examples"
        parts.append(figures.Panel(title, axis, "test accuracy, %", points, "x"))
    return figures.side_by_side(
        parts,
        f"Eight structures with about {BUDGET:,} parameters: mean ± standard deviation over seeds",
    )


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
