"""What does it save, and what does it cost, to use one weight for all layers?

    python experiments/tied_depth.py              # MNIST, 9 networks × 3 rates × 12 seeds
    python experiments/tied_depth.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/tied_depth/README.md.
"""

import statistics
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nn_backprop import figures, studies
from nn_backprop.models import StackNetwork, tied_network, untied_network
from nn_backprop.models.counting import kept_bytes, multiply_adds, parameters
from nn_backprop.studies import Claim, Row, Rows

DEPTHS = (1, 2, 4, 8, 16)
COMPARED = (4, 16)
WIDTH, SMOKE_WIDTH = 64, 16
EPOCHS, SMOKE_EPOCHS, BATCH = 8, 6, 128
LRS = (2.5e-3, 5e-3, 1e-2)
MARGIN = 0.1  # percentage points, our bar
NAMES = {True: "tied", False: "untied"}


@dataclass(frozen=True)
class Options(studies.Options):
    """One weight for all layers: parameters, multiply-adds, memory and accuracy by depth."""

    seeds: int = 12
    """Number of seeds, from 0."""


# Depth 1 is trained once: there the untied network is the tied one.
KINDS = [(tied, depth) for depth in DEPTHS for tied in (True, False) if tied or depth > 1]
DEEPEST = DEPTHS[-1]


class Job(NamedTuple):
    """One training."""

    tied: bool
    depth: int
    lr: float
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    seeds = range(options.seeds)
    jobs = [Job(*kind, lr, seed, options) for seed in seeds for kind in KINDS for lr in LRS]
    run.train_all(
        train, jobs,
        lambda row: {f"validation/{NAMES[row['tied']]} {row['depth']}": row["validation_accuracy"]},
    )  # fmt: skip


def train(job: Job) -> Row:
    """One network, trained and tested."""
    data = studies.load_data(job.options)
    width = SMOKE_WIDTH if job.options.smoke else WIDTH
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    torch.manual_seed(job.seed)
    model = (tied_network if job.tied else untied_network)(width, job.depth)
    trained = studies.train_network(
        model, data, lr=job.lr, epochs=epochs, batch_size=BATCH, seed=job.seed
    )
    inputs, targets = data.batch(data.train[:BATCH])
    return {
        "tied": job.tied,
        "depth": job.depth,
        "seed": job.seed,
        "dataset": data.name,
        "width": width,
        "epochs": epochs,
        "lr": job.lr,
        "parameters": parameters(model),
        "multiply_adds": multiply_adds(model, inputs[:1]),
        "trained_bytes": trained_bytes(model, trained.optimizer),
        "kept_bytes": kept_bytes(model, lambda: model.loss(model(inputs), targets)),
        **studies.accuracies(model, data),
        "train_seconds": trained.seconds,
    }


def trained_bytes(model: StackNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Of the parameters, their gradients and Adam's moments, after a step."""
    total = 0
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        of_one = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        total += sum(tensor.nbytes for tensor in of_one)
    return total


# --- What the rows come to ----------------------------------------------------------------------

ByKind = dict[tuple[bool, int], Rows]  # tied or not, depth


def by_kind(rows: Rows) -> ByKind:
    """Of each network the rows with its best rate; that of depth 1 is found as either."""
    best = rows.best(("tied", "depth"), ("lr",), "validation_accuracy").by("tied", "depth")
    return {(True, 1): best[True, 1], (False, 1): best[True, 1]} | best


def claims(rows: Rows) -> list[Claim]:
    by = by_kind(rows)
    return counts(by) + differences(by)


def counts(by: ByKind) -> list[Claim]:
    """What is counted, on any data."""
    sizes = [count(by[True, depth], "parameters") for depth in DEPTHS]
    claim = "parameters of tied: from the fewest to the most of any depth"
    found = [studies.counted(claim, None, max(sizes) - min(sizes), 0, 0)]
    for what, named in (
        ("multiply_adds", "multiply-adds of an image"),
        ("kept_bytes", "bytes kept for the backward pass"),
    ):
        off = [abs(count(by[True, d], what) - count(by[False, d], what)) for d in DEPTHS]
        claim = f"{named}: at one depth, tied and untied differ by at most"
        found.append(studies.counted(claim, None, max(off), 0, 0))
    for what, named, published in (
        ("parameters", "fewer parameters", None),
        ("bytes", "less memory, both parts together,", None),
        ("multiply_adds", "fewer multiply-adds", "computational efficiency"),
    ):
        saved = 100 * (1 - count(by[True, DEEPEST], what) / count(by[False, DEEPEST], what))
        claim = f"tied depth {DEEPEST} needs {named} than untied depth {DEEPEST}: saved, %"
        found.append(studies.counted(claim, published, saved, 1e-9))
    return found


def differences(by: ByKind) -> list[Claim]:
    """What training found; first, whether depth matters here at all."""
    found = []
    for tied in (False, True):
        for depth in COMPARED:
            claim = f"{NAMES[tied]} depth {depth} is more accurate than depth 1, in points"
            gain = percent(by[tied, depth]) - percent(by[True, 1])
            found.append(studies.between(claim, None, gain, low=0))
    for depth in COMPARED:
        claim = (
            f"test accuracy of tied depth {depth} less that of untied depth {depth}, in points: "
            f"−{MARGIN:g} or more (our bar)"
        )
        price = percent(by[True, depth]) - percent(by[False, depth])
        found.append(studies.between(claim, None, price, low=-MARGIN))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = by_kind(rows)
    needs = [
        {
            "weights": NAMES[tied] if depth > 1 else "either",
            "depth": depth,
            "parameters": f"{count(by[tied, depth], 'parameters'):,}",
            "multiply-adds of an image": f"{count(by[tied, depth], 'multiply_adds'):,}",
            "parameters, gradients, moments, KiB": f"{kib(by[tied, depth], 'trained_bytes'):,.0f}",
            f"kept of {BATCH} images for the backward pass, KiB":
                f"{kib(by[tied, depth], 'kept_bytes'):,.0f}",
            "both, KiB": f"{kib(by[tied, depth], 'bytes'):,.0f}",
            "training, s": f"{statistics.median(by[tied, depth].values('train_seconds')):.1f}",
        }
        for tied, depth in KINDS
    ]  # fmt: skip
    reached = []
    for depth in DEPTHS:
        tied, untied, first = by[True, depth], by[False, depth], by[True, 1]
        gains = [
            studies.mean_sd(percent(one) - percent(other), "+") if one != other else "–"
            for one, other in ((tied, untied), (tied, first), (untied, first))
        ]
        reached.append({
            "depth": depth,
            "rates": f"{tied.one('lr'):g}; {untied.one('lr'):g}",
            "tied, %": studies.mean_sd(percent(tied)),
            "untied, %": studies.mean_sd(percent(untied)),
            "tied less untied, points": gains[0],
            "tied less depth 1": gains[1],
            "untied less depth 1": gains[2],
            "tied, on the training images, %": studies.mean_sd(percent(tied, "train")),
            "untied": studies.mean_sd(percent(untied, "train")),
        })  # fmt: skip
    return {
        f"What a network of width {rows.one('width')} needs": needs,
        f"Test accuracy after {rows.one('epochs')} epochs, {len(by[True, 1])} seeds; the best of "
        f"the rates {', '.join(f'{lr:g}' for lr in LRS)} for each (tied; untied)": reached,
    }


def picture(rows: Rows) -> figures.Figure:
    by = by_kind(rows)
    by_depth, memory = {}, {}
    for tied, name in NAMES.items():
        by_depth[name] = [figures.point(depth, percent(by[tied, depth])) for depth in DEPTHS]
        memory[name] = [(depth, kib(by[tied, depth], "trained_bytes"), 0.0) for depth in DEPTHS]
    memory["either: kept for the backward pass"] = [
        (depth, kib(by[True, depth], "kept_bytes"), 0.0) for depth in DEPTHS
    ]
    by_size = {
        f"depth {depth}": [
            figures.point(count(by[tied, depth], "parameters") / 1000, percent(by[tied, depth]))
            for tied in (True, False)
            if (tied, depth) in KINDS
        ]
        for depth in DEPTHS
    }
    accuracy = "test accuracy, %"
    return figures.side_by_side(
        [
            figures.Panel("At equal multiply-adds", "depth", accuracy, by_depth, "x"),
            figures.Panel("From tied, left, to untied", "thousand parameters", accuracy, by_size),
            figures.Panel("Memory of parameters, gradients, moments", "depth", "KiB", memory, "x"),
        ],
        f"One weight for all layers, {rows.one('dataset')}, width {rows.one('width')}: "
        "mean ± standard deviation over seeds",
    )


def count(rows: Rows, what: str) -> int:
    """The same for every seed. "bytes" are those of both parts of the memory."""
    parts = ("trained_bytes", "kept_bytes") if what == "bytes" else (what,)
    return sum(rows.one(part) for part in parts)


def kib(rows: Rows, what: str) -> float:
    return count(rows, what) / 1024


def percent(rows: Rows, split: str = "test") -> np.ndarray:
    """Accuracy of each seed."""
    return rows.values(f"{split}_accuracy", 100)


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
