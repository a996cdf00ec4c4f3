"""What does it save, and what does it cost, to use one weight for all layers?

    python experiments/tied_depth.py              # MNIST, 9 networks × 3 rates × 12 seeds
    python experiments/tied_depth.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/tied_depth/README.md.
"""

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nn_backprop import figures, studies
from nn_backprop.models import StackNetwork, tied_network, untied_network
from nn_backprop.models.counting import multiply_adds, parameters
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


class Kind(NamedTuple):
    """One contestant."""

    tied: bool
    depth: int


def kind_of(tied: bool, depth: int) -> Kind:
    """At depth 1 the untied network is the tied one."""
    return Kind(tied or depth == 1, depth)


KINDS = tuple(dict.fromkeys(kind_of(tied, depth) for depth in DEPTHS for tied in NAMES))
SHALLOW = kind_of(True, 1)


class Job(NamedTuple):
    """One training."""

    kind: Kind
    lr: float
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    jobs = [
        Job(kind, lr, seed, options)
        for seed in range(options.seeds)
        for kind in KINDS
        for lr in LRS
    ]

    def tag(row: Row) -> dict[str, float]:
        return {f"validation/{NAMES[row['tied']]} {row['depth']}": row["validation_accuracy"]}

    run.train_all(train, jobs, tag)


def train(job: Job) -> Row:
    """One network, trained and tested."""
    data = studies.load_data(job.options)
    tied, depth = job.kind
    width = SMOKE_WIDTH if job.options.smoke else WIDTH
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    torch.manual_seed(job.seed)
    model = (tied_network if tied else untied_network)(width, depth)
    trained = studies.train_network(
        model, data, lr=job.lr, epochs=epochs, batch_size=BATCH, seed=job.seed
    )
    return {
        "tied": tied,
        "depth": depth,
        "seed": job.seed,
        "dataset": data.name,
        "width": width,
        "epochs": epochs,
        "lr": job.lr,
        "parameters": parameters(model),
        "multiply_adds": multiply_adds(model, data.batch(data.train[:1])[0]),
        "trained_bytes": trained_bytes(model, trained.optimizer),
        "kept_bytes": kept_bytes(model, *data.batch(data.train[:BATCH])),
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


def kept_bytes(model: StackNetwork, inputs: Tensor, targets: Tensor) -> int:
    """Of all that autograd keeps of a forward pass for the backward pass, but for parameters.

    What is kept twice counts once: h_t is what the ReLU made, and what the next layer was handed.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # alive to the end: no address serves twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(model(inputs), targets)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


# --- What the rows come to ----------------------------------------------------------------------

ByKind = Mapping[Kind, Rows]


def by_kind(rows: Rows) -> ByKind:
    """Of each network the rows with its best rate."""
    best = rows.best(("tied", "depth"), ("lr",), "validation_accuracy").by("tied", "depth")
    return {kind: best[kind] for kind in KINDS}


def claims(rows: Rows) -> list[Claim]:
    by = by_kind(rows)
    return counts(by) + differences(by)


def counts(by: ByKind) -> list[Claim]:
    """What is counted, on any data."""

    def both(what: str, depth: int) -> tuple[int, int]:
        return count(by, kind_of(True, depth), what), count(by, kind_of(False, depth), what)

    sizes = [both("parameters", depth)[0] for depth in DEPTHS]
    claim = "parameters of tied: from the fewest to the most of any depth"
    found = [studies.counted(claim, None, max(sizes) - min(sizes), 0, 0)]
    for what, named in (
        ("multiply_adds", "multiply-adds of an image"),
        ("kept_bytes", "bytes kept for the backward pass"),
    ):
        off = max(abs(tied - untied) for tied, untied in (both(what, depth) for depth in DEPTHS))
        claim = f"{named}: at one depth, tied and untied differ by at most"
        found.append(studies.counted(claim, None, off, 0, 0))
    deepest = DEPTHS[-1]
    for what, named, published in (
        ("parameters", "fewer parameters", None),
        ("bytes", "less memory, both parts together,", None),
        ("multiply_adds", "fewer multiply-adds", "computational efficiency"),
    ):
        tied, untied = both(what, deepest)
        claim = f"tied depth {deepest} needs {named} than untied depth {deepest}: saved, %"
        found.append(studies.counted(claim, published, 100 * (1 - tied / untied), 1e-9))
    return found


def differences(by: ByKind) -> list[Claim]:
    """What training found; first, whether depth matters here at all."""
    found = []
    for tied in (False, True):
        for depth in COMPARED:
            claim = f"{NAMES[tied]} depth {depth} is more accurate than depth 1, in points"
            found.append(studies.between(claim, None, gain(by, kind_of(tied, depth), SHALLOW), 0))
    for depth in COMPARED:
        claim = (
            f"test accuracy of tied depth {depth} less that of untied depth {depth}, in points: "
            f"−{MARGIN:g} or more (our bar)"
        )
        price = gain(by, kind_of(True, depth), kind_of(False, depth))
        found.append(studies.between(claim, None, price, low=-MARGIN))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = by_kind(rows)
    needs = [
        {
            "weights": NAMES[kind.tied] if kind.depth > 1 else "either",
            "depth": kind.depth,
            "parameters": f"{count(by, kind, 'parameters'):,}",
            "multiply-adds of an image": f"{count(by, kind, 'multiply_adds'):,}",
            "parameters, gradients, moments, KiB": f"{kib(by, kind, 'trained_bytes'):,.0f}",
            f"kept of {BATCH} images for the backward pass, KiB":
                f"{kib(by, kind, 'kept_bytes'):,.0f}",
            "both, KiB": f"{kib(by, kind, 'bytes'):,.0f}",
            "training, s": f"{statistics.median(of.values('train_seconds')):.1f}",
        }
        for kind, of in by.items()
    ]  # fmt: skip
    reached = []
    for depth in DEPTHS:
        tied, untied = kind_of(True, depth), kind_of(False, depth)
        gains = [
            studies.mean_sd(gain(by, one, other), "+") if one != other else "–"
            for one, other in ((tied, untied), (tied, SHALLOW), (untied, SHALLOW))
        ]
        reached.append(
            {
                "depth": depth,
                "rates": f"{by[tied].one('lr'):g}; {by[untied].one('lr'):g}",
                "tied, %": studies.mean_sd(percent(by, tied)),
                "untied, %": studies.mean_sd(percent(by, untied)),
                "tied less untied, points": gains[0],
                "tied less depth 1": gains[1],
                "untied less depth 1": gains[2],
                "tied, on the training images, %": studies.mean_sd(percent(by, tied, "train")),
                "untied": studies.mean_sd(percent(by, untied, "train")),
            }
        )
    return {
        f"What a network of width {rows.one('width')} needs": needs,
        f"Test accuracy after {rows.one('epochs')} epochs, {len(by[SHALLOW])} seeds; the best of "
        f"the rates {', '.join(f'{lr:g}' for lr in LRS)} for each (tied; untied)": reached,
    }


def picture(rows: Rows) -> figures.Figure:
    by = by_kind(rows)
    by_depth, memory, by_size = {}, {}, {}
    for tied, name in NAMES.items():
        kinds = [kind_of(tied, depth) for depth in DEPTHS]
        by_depth[name] = [figures.point(kind.depth, percent(by, kind)) for kind in kinds]
        memory[name] = [(kind.depth, kib(by, kind, "trained_bytes"), 0.0) for kind in kinds]
    memory["either: kept for the backward pass"] = [
        (depth, kib(by, kind_of(True, depth), "kept_bytes"), 0.0) for depth in DEPTHS
    ]
    for depth in DEPTHS:
        by_size[f"depth {depth}"] = [
            figures.point(count(by, kind, "parameters") / 1000, percent(by, kind))
            for kind in KINDS
            if kind.depth == depth
        ]
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


def count(by: ByKind, kind: Kind, what: str) -> int:
    """The same for every seed. "bytes" are those of both parts of the memory."""
    if what == "bytes":
        return count(by, kind, "trained_bytes") + count(by, kind, "kept_bytes")
    return by[kind].one(what)


def kib(by: ByKind, kind: Kind, what: str) -> float:
    return count(by, kind, what) / 1024


def percent(by: ByKind, kind: Kind, split: str = "test") -> np.ndarray:
    """Accuracy of each seed."""
    return by[kind].values(f"{split}_accuracy", 100)


def gain(by: ByKind, one: Kind, other: Kind) -> np.ndarray:
    """Test accuracy of one less that of the other, of each seed, in percentage points."""
    return percent(by, one) - percent(by, other)


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
