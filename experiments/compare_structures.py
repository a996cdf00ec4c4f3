"""Eight ways to build a network, at one number of parameters: what does each reach, at what cost?

    python experiments/compare_structures.py              # MNIST, 8 structures × 2 sizes × 3 rates
    python experiments/compare_structures.py --smoke      # the embedded digits, seconds

**The structures**, each with at most 20,000 trained parameters and at least 19,000: a plain
784-25-10; 5 × 5 fields with weights of their own; the same with weights shared over the image;
octave convolution with half of the maps at half the size; random features of patches, pooled to
4 × 4 (their filters are fixed, and not counted); one hidden layer of 24 units applied four times;
LeNet-300-100 as products of rank 14 and 8; LeNet-300-100 with its smallest weights pruned. The last
two begin as trained LeNet-300-100 of 266,610 parameters: they are trained as such for half of the
steps, then cut, at once or in three rounds, and trained on for the other half.

**The budget.** All see the same 1,000 or 55,000 examples of MNIST (5,000 of the 60,000 are kept for
validation), equally often and in an order that the seed decides. Every structure is trained with
three rates on either number, each twice the one before, about one that short trainings suggested,
and with further ones until the best is neither the least nor the largest: that with the highest
mean accuracy over the seeds on the validation split. It is the one that counts. Those that are cut
train on with a third of the rate after the cut. The test images are read once for each training,
when it has ended.

**The costs**: parameters that are trained and left; multiply-adds of one image, as they are carried
out, and for the pruned network also without those by a zero; processor seconds of training.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load, subset
from nn_backprop.engines import autograd
from nn_backprop.layers import LowRankLinear
from nn_backprop.models import (
    MLP,
    KernelNetwork,
    OctaveCNN,
    lenet_300_100,
    locally_connected,
    shared_weights,
    tied_network,
)
from nn_backprop.models.counting import multiply_adds
from nn_backprop.studies.evidence import Claim, between, differences, spread, tuned
from nn_backprop.studies.old_study import Row, Study, StudyOptions, command
from nn_backprop.training import (
    evaluate,
    fit,
    make_optimizer,
    make_schedule,
    parameters_left,
    prune_smallest,
    shares_kept,
    steps_per_epoch,
)

BUDGET = 20_000  # parameters
BATCH = 128
RANKS = (14, 8)  # of LeNet-300-100's first two layers
# The shares of its weights that Han et al. 2015, table 3, keep, times what the budget leaves of
# them: 19,577 weights and 410 biases.
KEPT = {f"layers.{k}": 0.899 * share for k, share in enumerate((0.08, 0.09, 0.26))}
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
class Options(StudyOptions):
    """Eight structures at one number of parameters, with few and with many examples."""


class Job(NamedTuple):
    """A network to train."""

    data: str
    root: Path | None
    structure: str
    n: int  # training examples
    epochs: int
    lr: float
    seed: int


def conduct(study: Study, options: Options) -> None:
    name, root = "digits" if options.smoke else "mnist", options.data_root
    most = len(load(name, root).train)
    # The longer first; about 2,600 and 1,500 steps.
    epochs = {most: 4, 300: 12} if options.smoke else {most: 6, 1_000: 188}
    rates = {
        (structure, n): [times * how.lrs[n == most] for times in ((1,) if options.smoke else RATES)]
        for n in epochs
        for structure, how in STRUCTURES.items()
    }
    rows: list[Row] = []
    while rates:
        jobs = [
            Job(name, root, structure, n, epochs[n], lr, seed)
            for (structure, n), lrs in rates.items()
            for lr in lrs
            for seed in range(options.seeds)
        ]
        rows += study.carry_out(
            train, jobs, lambda row: {f"{row['structure']}/{row['n']}": row["validation"]}
        )
        best = tuned(rows, ("structure", "n"), ("lr",), "validation")
        rates = {} if options.smoke else beyond(rows, best)
    study.finish(_tables(best), _claims(best), _figure(best))


def beyond(rows: Sequence[Row], best: Sequence[Row]) -> dict[tuple[str, int], list[float]]:
    """Of each structure and number of examples, the rate to try next: none if the best is inside.

    rows are all that were trained, best those with the best rate.
    """
    found = {}
    for cell, lr in dict.fromkeys(((row["structure"], row["n"]), row["lr"]) for row in best):
        tried = [row["lr"] for row in rows if (row["structure"], row["n"]) == cell]
        if lr in (min(tried), max(tried)):
            found[cell] = [lr / 2 if lr == min(tried) else 2 * lr]
    return found


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """Trains a network, and cuts it if it is one of those; accuracies are shares, 0 to 1."""
    torch.manual_seed(job.seed)
    structure = STRUCTURES[job.structure]
    data = subset(_data(job.data, job.root), job.n, job.seed)
    model = structure.build(job.seed)
    began = time.process_time()
    if not structure.cut:
        _fit(model, data, job.lr, job.epochs, job.seed)
    else:
        half = job.epochs // 2
        _fit(model, data, job.lr, half, job.seed)
        if structure.cut == "low rank":
            assert isinstance(model, MLP)
            for k, rank in enumerate(RANKS):
                layer = model.layers[k]
                assert isinstance(layer, nn.Linear)
                model.layers[k] = LowRankLinear.from_linear(layer, rank)
            _fit(model, data, job.lr / 3, job.epochs - half, job.seed + 1_000)
        else:
            left = job.epochs - half
            for done, kept in enumerate(shares_kept(KEPT, ROUNDS)):
                prune_smallest(model, kept)
                epochs = left // ROUNDS + (done >= ROUNDS - left % ROUNDS)
                if epochs:
                    _fit(model, data, job.lr / 3, epochs, job.seed + 1_000 * (done + 1))
    seconds = time.process_time() - began
    image = data.batch(data.train[:1])[0]
    carried_out = multiply_adds(model, image)
    zeros = sum(int((m == 0).sum()) for name, m in model.named_buffers() if "weight_mask" in name)
    return {
        "structure": job.structure, "n": job.n, "lr": job.lr, "seed": job.seed,
        "parameters": parameters_left(model),
        "multiply_adds": carried_out,
        "multiply_adds_without_zeros": carried_out - zeros,  # an affine layer: one a weight
        "seconds": seconds,
        "train": evaluate(model, data, data.train).accuracy,
        "validation": evaluate(model, data, data.validation).accuracy,
        "test": evaluate(model, data, data.test).accuracy,
    }  # fmt: skip


def _fit(model: nn.Module, data: ImageData, lr: float, epochs: int, seed: int) -> None:
    optimizer = make_optimizer("adam", model.parameters(), lr, 0.0)
    steps = epochs * steps_per_epoch(len(data.train), BATCH)
    schedule = make_schedule("one-cycle", optimizer, lr, steps)
    fit(model, autograd, optimizer, schedule, data, epochs=epochs, batch_size=BATCH, seed=seed)


@functools.cache
def _data(name: str, root: Path | None) -> ImageData:
    return load(name, root, say=lambda line: None)


# --- What the rows come to ----------------------------------------------------------------------


def _of(rows: Sequence[Row], structure: str, n: int, value: str = "test") -> list[float]:
    """One value of a structure's rows, in the order of the seeds; accuracies in percent."""
    scale = 100 if value == "test" else 1
    chosen = [row for row in rows if (row["structure"], row["n"]) == (structure, n)]
    return [scale * row[value] for row in sorted(chosen, key=lambda row: row["seed"])]


def _sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({row["n"] for row in rows})


def _tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    few, many = _sizes(rows)
    table = []
    for structure in STRUCTURES:
        of = next(row for row in rows if row["structure"] == structure)
        without = f"{of['multiply_adds_without_zeros']:,}"
        table.append(
            {
                "structure": structure,
                "parameters": f"{of['parameters']:,}",
                "multiply-adds of an image": f"{of['multiply_adds']:,}"
                + (f" ({without} without zeros)" if structure == "pruned" else ""),
                f"n = {few:,}: rate": f"{_of(rows, structure, few, 'lr')[0]:g}",
                f"n = {few:,}: test accuracy, %": spread(_of(rows, structure, few)),
                "training, s": _seconds(_of(rows, structure, few, "seconds")),
                f"n = {many:,}: rate": f"{_of(rows, structure, many, 'lr')[0]:g}",
                f"n = {many:,}: test accuracy, %": spread(_of(rows, structure, many)),
                "training, s ": _seconds(_of(rows, structure, many, "seconds")),
            }
        )
    seeds = len({row["seed"] for row in rows})
    return {f"Eight structures with about {BUDGET:,} parameters, {seeds} seeds": table}


def _seconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}"


def _claims(rows: Sequence[Row]) -> list[Claim]:
    claims = []
    for n in _sizes(rows):
        plain = _of(rows, PLAIN, n)
        for structure in STRUCTURES:
            if structure != PLAIN:
                points = differences(_of(rows, structure, n), plain)
                what = f"n = {n:,}: {structure} is more accurate than plain, in points"
                claims.append(between(what, None, points, low=0))
    return claims


def _figure(rows: Sequence[Row]) -> figures.Figure:
    def against(value: str, n: int) -> dict[str, list[tuple[float | str, float, float]]]:
        costs = {s: statistics.median(_of(rows, s, n, value)) for s in STRUCTURES}
        return {s: [figures.point(cost, _of(rows, s, n))] for s, cost in costs.items()}

    few, many = _sizes(rows)
    parts = [
        figures.Panel(f"{n:,} training examples", axis, "test accuracy, %", against(value, n), "x")
        for n, value, axis in (
            (few, "multiply_adds", "multiply-adds of an image"),
            (many, "multiply_adds", "multiply-adds of an image"),
            (many, "seconds", "processor seconds of training"),
        )
    ]
    return figures.side_by_side(
        parts,
        f"Eight structures with about {BUDGET:,} parameters: mean ± standard deviation over seeds",
    )


if __name__ == "__main__":
    sys.exit(command(Options, __doc__, conduct))
