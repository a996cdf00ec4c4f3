"""What does it save, and what does it cost, to use one weight for all layers?

    python experiments/tied_depth.py              # MNIST, 9 networks × 3 rates × 12 seeds
    python experiments/tied_depth.py --smoke      # the embedded digits, seconds

h_0 = ReLU(u), h_t = ReLU(W_t h_{t−1} + u) for t = 1 … L, with u = U x + b, at depths L = 1, 2, 4, 8
and 16: in `tied_network` the W_t are one matrix, in `untied_network` they are L. At depth 1 the two
are one network, with as many parameters as every tied one; it is trained once. All networks have
one width, and the same data in the same order for the same epochs.

What is saved is counted: parameters, multiply-adds of an image, and memory in two parts, the bytes
of the parameters, their gradients and Adam's two moments, and the bytes of all else that the
forward pass of a batch keeps for the backward pass. "Computational efficiency", for which sharing
between layers is praised, is held against the multiply-adds. What it costs is test accuracy, in
differences within a seed; at most 0.1 percentage points is our own bar, set before the first run.

Adam's rate may depend on tying and on depth. Every network is trained with each of three, and the
one that counts is that with the best mean accuracy over the seeds on the validation split; it
stands in the table, where one sees whether it is at the edge of what was tried.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nn_backprop import figures
from nn_backprop.data import ImageData, load
from nn_backprop.engines import ENGINES
from nn_backprop.models import StackNetwork, tied_network, untied_network
from nn_backprop.models.counting import multiply_adds, parameters
from nn_backprop.studies import study
from nn_backprop.studies.evidence import Claim, between, differences, judged, spread, tuned
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch

DEPTHS = (1, 2, 4, 8, 16)
COMPARED = (4, 16)
WIDTH, SMOKE_WIDTH = 64, 16
EPOCHS, SMOKE_EPOCHS, BATCH = 8, 6, 128
LRS = (2.5e-3, 5e-3, 1e-2)
MARGIN = 0.1  # percentage points
NAMES = {True: "tied", False: "untied"}


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """One weight for all layers: parameters, multiply-adds, memory and accuracy by depth."""

    seeds: int = 12
    """Number of seeds, from 0; at least 2."""


class Kind(NamedTuple):
    """One contestant."""

    tied: bool
    depth: int


def kind_of(tied: bool, depth: int) -> Kind:
    """At depth 1 the untied network is the tied one."""
    return Kind(tied or depth == 1, depth)


KINDS = tuple(dict.fromkeys(kind_of(tied, depth) for depth in DEPTHS for tied in NAMES))
SHALLOW = kind_of(True, 1)
Rows = Mapping[Kind, Sequence[study.Row]]  # in the order of the seeds


class Job(NamedTuple):
    """One training."""

    kind: Kind
    lr: float
    seed: int
    options: Options


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here
    jobs = [
        Job(kind, lr, seed, options)
        for seed in range(options.seeds)
        for kind in KINDS
        for lr in LRS
    ]
    rows = under_way.carry_out(
        train, jobs,
        lambda row: {
            f"validation/{NAMES[row['tied']]} {row['depth']}": row["validation_accuracy"]
        },
    )  # fmt: skip
    by = by_kind(rows)
    under_way.finish(_tables(by), _counts(by) + _found(by), _picture(by))


def by_kind(rows: Sequence[study.Row]) -> dict[Kind, list[study.Row]]:
    """Of each network the rows with its best rate, in the order of the seeds."""
    best = tuned(rows, ("tied", "depth"), ("lr",), "validation_accuracy")
    return {kind: [row for row in best if (row["tied"], row["depth"]) == kind] for kind in KINDS}


def train(job: Job) -> study.Row:
    """One network, trained and tested."""
    data = _data(job.options)
    tied, depth = job.kind
    width = SMOKE_WIDTH if job.options.smoke else WIDTH
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    torch.manual_seed(job.seed)
    model = (tied_network if tied else untied_network)(width, depth)
    optimizer = make_optimizer("adam", model.parameters(), job.lr, 0.0)
    schedule = make_schedule(
        "one-cycle", optimizer, job.lr, epochs * steps_per_epoch(len(data.train), BATCH)
    )
    began = time.perf_counter()
    fit(model, ENGINES["autograd"], optimizer, schedule, data,
        epochs=epochs, batch_size=BATCH, seed=job.seed)  # fmt: skip
    seconds = time.perf_counter() - began
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
        "trained_bytes": _trained_bytes(model, optimizer),
        "kept_bytes": _kept_bytes(model, *data.batch(data.train[:BATCH])),
        "train_accuracy": evaluate(model, data, data.train).accuracy,
        "validation_accuracy": evaluate(model, data, data.validation).accuracy,
        "test_accuracy": evaluate(model, data, data.test).accuracy,  # read here alone
        "train_seconds": seconds,
    }


def _trained_bytes(model: StackNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Of the parameters, their gradients and Adam's moments, after a step."""
    total = 0
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        of_one = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        total += sum(tensor.nbytes for tensor in of_one)
    return total


def _kept_bytes(model: StackNetwork, inputs: Tensor, targets: Tensor) -> int:
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


def _counts(by: Rows) -> list[Claim]:
    """What is counted, on any data. A count has no spread: its interval is one number."""

    def counted(claim: str, published: str | None, value: float, low: float, high: float) -> Claim:
        return judged(claim, published, value, (value, value), low, high)

    def both(what: str, depth: int) -> tuple[int, int]:
        return _count(by, kind_of(True, depth), what), _count(by, kind_of(False, depth), what)

    sizes = [both("parameters", depth)[0] for depth in DEPTHS]
    grown = max(sizes) - min(sizes)
    claims = [
        counted("parameters of tied: from the fewest to the most of any depth", None, grown, 0, 0)
    ]
    for what, named in (
        ("multiply_adds", "multiply-adds of an image"),
        ("kept_bytes", "bytes kept for the backward pass"),
    ):
        off = max(abs(tied - untied) for tied, untied in (both(what, depth) for depth in DEPTHS))
        claims.append(
            counted(f"{named}: at one depth, tied and untied differ by at most", None, off, 0, 0)
        )
    deepest = DEPTHS[-1]
    for what, named, published in (
        ("parameters", "fewer parameters", None),
        ("bytes", "less memory, both parts together,", None),
        ("multiply_adds", "fewer multiply-adds", "computational efficiency"),
    ):
        tied, untied = both(what, deepest)
        claim = f"tied depth {deepest} needs {named} than untied depth {deepest}: saved, %"
        claims.append(counted(claim, published, 100 * (1 - tied / untied), 1e-9, math.inf))
    return claims


def _found(by: Rows) -> list[Claim]:
    """What training found; first, whether depth matters here at all."""
    claims = []
    for tied in (False, True):
        for depth in COMPARED:
            claim = f"{NAMES[tied]} depth {depth} is more accurate than depth 1, in points"
            gains = _differences(by, kind_of(tied, depth), SHALLOW)
            claims.append(between(claim, None, gains, low=0))
    for depth in COMPARED:
        claim = (
            f"test accuracy of tied depth {depth} less that of untied depth {depth}, in points: "
            f"−{MARGIN:g} or more (our bar)"
        )
        costs = _differences(by, kind_of(True, depth), kind_of(False, depth))
        claims.append(between(claim, None, costs, low=-MARGIN))
    return claims


def _tables(by: Rows) -> dict[str, list[study.Row]]:
    first = by[SHALLOW][0]
    needs: list[study.Row] = [
        {
            "weights": NAMES[kind.tied] if kind.depth > 1 else "either",
            "depth": kind.depth,
            "parameters": f"{_count(by, kind, 'parameters'):,}",
            "multiply-adds of an image": f"{_count(by, kind, 'multiply_adds'):,}",
            "parameters, gradients, moments, KiB": _kib(_count(by, kind, "trained_bytes")),
            f"kept of {BATCH} images for the backward pass, KiB": _kib(
                _count(by, kind, "kept_bytes")
            ),
            "both, KiB": _kib(_count(by, kind, "bytes")),
            "training, s": f"{statistics.median(row['train_seconds'] for row in rows):.1f}",
        }
        for kind, rows in by.items()
    ]
    reached: list[study.Row] = []
    for depth in DEPTHS:
        tied, untied = kind_of(True, depth), kind_of(False, depth)
        reached.append(
            {
                "depth": depth,
                "rates": f"{by[tied][0]['lr']:g}; {by[untied][0]['lr']:g}",
                "tied, %": spread(_percent(by[tied])),
                "untied, %": spread(_percent(by[untied])),
                "tied less untied, points": _gain(by, tied, untied),
                "tied less depth 1": _gain(by, tied, SHALLOW),
                "untied less depth 1": _gain(by, untied, SHALLOW),
                "tied, on the training images, %": spread(_percent(by[tied], "train_accuracy")),
                "untied": spread(_percent(by[untied], "train_accuracy")),
            }
        )
    return {
        f"What a network of width {first['width']} needs": needs,
        f"Test accuracy after {first['epochs']} epochs, {len(by[SHALLOW])} seeds; the best of the "
        f"rates {', '.join(f'{lr:g}' for lr in LRS)} for each (tied; untied)": reached,
    }


def _picture(by: Rows) -> figures.Figure:
    first = by[SHALLOW][0]
    by_depth, memory, by_size = {}, {}, {}
    for tied, name in NAMES.items():
        kinds = [kind_of(tied, depth) for depth in DEPTHS]
        by_depth[name] = [figures.point(kind.depth, _percent(by[kind])) for kind in kinds]
        memory[name] = [_kept(by, kind, "trained_bytes") for kind in kinds]
    memory["either: kept for the backward pass"] = [
        _kept(by, kind_of(True, depth), "kept_bytes") for depth in DEPTHS
    ]
    for depth in DEPTHS:
        by_size[f"depth {depth}"] = [
            figures.point(_count(by, kind, "parameters") / 1000, _percent(by[kind]))
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
        f"One weight for all layers, {first['dataset']}, width {first['width']}: "
        "mean ± standard deviation over seeds",
    )


def _count(by: Rows, kind: Kind, what: str) -> int:
    """The same for every seed. "bytes" are those of both parts of the memory."""
    if what == "bytes":
        return _count(by, kind, "trained_bytes") + _count(by, kind, "kept_bytes")
    (count,) = {row[what] for row in by[kind]}
    return count


def _percent(rows: Sequence[study.Row], what: str = "test_accuracy") -> list[float]:
    return [100 * row[what] for row in rows]


def _differences(by: Rows, one: Kind, other: Kind) -> list[float]:
    """Of the test accuracies of each seed, in percentage points."""
    return differences(_percent(by[one]), _percent(by[other]))


def _gain(by: Rows, one: Kind, other: Kind) -> str:
    return spread(_differences(by, one, other), "+") if one != other else "–"


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f}"


def _kept(by: Rows, kind: Kind, what: str) -> tuple[float, float, float]:
    return kind.depth, _count(by, kind, what) / 1024, 0.0


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
