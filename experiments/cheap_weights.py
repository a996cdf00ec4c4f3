"""A weight matrix made cheaper, by low rank or by pruning: better than a smaller dense network?

    python experiments/cheap_weights.py           # MNIST, half an hour on two cores
    python experiments/cheap_weights.py --smoke   # the embedded digits, seconds

LeNet-300-100 is trained, and from the same trained network of a seed start

- `pruned`: the smallest weights of each layer are dropped in rounds, with training in between. At
  12× each layer keeps the share that Han et al. 2015 published (tables 3 and 4); at another factor,
  that share to a power, the same for all layers, with which so many parameters are left. Biases
  are not pruned.
- `low rank`: the first two matrices are cut to the same rank by their singular values and trained
  on as products. At 2× that rank would make the second dearer, and it stays whole; so does the last
  (100 × 10) always.
- `dense, longer`: it is trained on in the same way, and nothing dropped, lest the epochs be taken
  for a gain.

They train on for 16 epochs in four cycles of the rate, each with a new Adam.

`small dense` is 784-w₁-w₂-10 with as many parameters, within 1 %, and a start of its own: w₂ is
about w₁/3 at 2× and 4×, and w₁ or nearly so where a third of it would be too narrow. It is trained
for as many epochs as the others had altogether, in one cycle. All see the same batches in the same
epoch. LeNet-5 is pruned only, 12×, and trained on for 6 epochs in three cycles.

Han et al. found that the error falls, from 1.64 to 1.59 % and from 0.80 to 0.77 % (table 1), and L2
regularization best for what is to be pruned; here it is weight decay. Each contestant for
LeNet-300-100, at each factor, is trained with two rates and two decays; the pair that counts is
that with the least mean error over the seeds on the validation split; of equal ones, the smaller.
The rates are 0.003 and 0.01, of `dense, longer` 0.0003 and 0.001, the decays 0.05 and 0.3. What
starts from a trained network starts from that of rate 0.003 and decay 0.3, which suited pruning
best in trials with one seed that is not reported; LeNet-5 has these too, and 0.0003 for `dense,
longer`. The test images are read once for each training, when it has ended.

What it saves: parameters; multiply-adds, those that a dense kernel carries out and those of the
weights that are left; the bytes of the file that numpy's `savez_compressed` (zlib) makes of the
float32 arrays, as they are and packed: only what is not zero, and a bit for each place. Measured
afterwards is the time of LeNet-300-100's forward pass on one thread, of the networks of seed 0.
There the pruned network runs twice: as it is, with its zeros, and with its matrices in
`torch.sparse_csr`. A round has every network once, in an order drawn anew.
"""

import functools
import io
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load
from nn_backprop.engines import autograd
from nn_backprop.layers import LowRankLinear
from nn_backprop.layers.low_rank import break_even
from nn_backprop.models import MLP, LeNet5, lenet_300_100
from nn_backprop.models.counting import multiply_adds, parameters
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import (
    Claim,
    between,
    differences,
    judged,
    median_interval,
    spread,
    tuned,
)
from nn_backprop.training import (
    evaluate,
    fit,
    make_optimizer,
    make_permanent,
    make_schedule,
    parameters_left,
    prune_smallest,
    shares_kept,
    steps_per_epoch,
)

# Han et al. 2015: the test error in % before and after, and the share that each layer keeps.
PUBLISHED = {"LeNet-300-100": (1.64, 1.59), "LeNet-5": (0.80, 0.77)}
KEPT = {
    "LeNet-300-100": {"layers.0": 0.08, "layers.1": 0.09, "layers.2": 0.26},
    "LeNet-5": {"conv1": 0.66, "conv2": 0.12, "hidden": 0.08, "output": 0.19},
}
HAN = 12


class Size(NamedTuple):
    """What leaves LeNet-300-100 one of so many parameters, within 1 %."""

    power: float  # pruned: of the published shares
    ranks: tuple[int, ...]  # low rank: of the first layers
    widths: tuple[int, int]  # small dense


SIZES = {
    2: Size(0.277, (94,), (158, 53)),
    4: Size(0.555, (44, 44), (82, 27)),
    HAN: Size(1.0, (14, 14), (27, 26)),
    30: Size(1.378, (5, 5), (11, 11)),
}


class Plan(NamedTuple):
    """Epochs of the dense network; how often it is pruned, and the epochs after each time."""

    dense: int
    prunings: int
    retraining: int


PLANS = {"LeNet-300-100": Plan(12, 4, 4), "LeNet-5": Plan(6, 3, 2)}
SMOKE_PLAN, SMOKE_FACTORS = Plan(2, 2, 1), (2, HAN)
BATCH = 128
LR, LR_LONGER, DECAY = 3e-3, 3e-4, 0.3  # of what is not tuned, and of what others start from
LRS, LRS_LONGER, DECAYS = (LR, 1e-2), (LR_LONGER, 1e-3), (0.05, DECAY)
PASSES = {1: 100, 128: 10}  # how many are timed together, by the images in a batch
AS_IS, CSR = "pruned, dense kernel", "pruned, CSR"
BAR = 0.95  # of the dense network's time


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Low rank and pruning against smaller dense networks: error, bytes, multiply-adds, time."""

    rounds: int = 30
    """Timings of each forward pass; at least 6, for the interval of a median."""


class Job(NamedTuple):
    """One training. Every network is left in a file in `folder`: some start from another's."""

    network: str
    contestant: str
    factor: int
    lr: float
    decay: float
    seed: int
    folder: Path
    options: Options

    @property
    def file(self) -> Path:
        name = "-".join(f"{of}" for of in self[:6])
        return self.folder / f"{name.replace(',', '').replace(' ', '-').lower()}.npz"


def conduct(under_way: study.Study, options: Options) -> None:
    if options.rounds < 6:
        raise study.UsageError(f"--rounds must be 6 or more, not {options.rounds}")
    _data(options)  # so that a missing MNIST ends the study here
    folder = under_way.run.path / "networks"
    folder.mkdir()
    factors = SMOKE_FACTORS if options.smoke else tuple(SIZES)
    dense = [("LeNet-5", "dense", 1), ("LeNet-300-100", "dense", 1)]
    others = [("LeNet-5", "pruned", HAN), ("LeNet-5", "dense, longer", 1)]
    others += [("LeNet-300-100", "dense, longer", 1)]
    for contestant in ("pruned", "low rank", "small dense"):
        others += [("LeNet-300-100", contestant, factor) for factor in factors]
    rows: list[study.Row] = []
    for contestants in (dense, others):
        rows += under_way.carry_out(
            train,
            [
                Job(*of, lr, decay, seed, folder, options)
                for of in contestants
                for lr, decay in _settings(*of[:2], options)
                for seed in range(options.seeds)
            ],
            lambda row: {
                "{network}/{contestant} {factor}".format(**row): row["validation_accuracy"]
            },
        )
    best = tuned(rows, ("network", "contestant", "factor"), ("lr", "decay"), "validation_accuracy")
    timings = _timings([row for row in best if row["seed"] == 0], folder, options)
    under_way.rows += timings
    claims = _found(best) + _faster(timings)
    tables = {
        f"{network}, {options.seeds} seeds (published: {before:.2f} % dense, {after:.2f} % pruned "
        f"{HAN}×)": _summary([row for row in best if row["network"] == network])
        for network, (before, after) in PUBLISHED.items()
    }
    tables["Time of a forward pass of LeNet-300-100 as a multiple of the dense network's: median "
           "(quartiles)"] = _times(timings)  # fmt: skip
    under_way.finish(tables, _counts() + claims, _picture(best, timings))


def _settings(network: str, contestant: str, options: Options) -> list[tuple[float, float]]:
    """Rates and decays to train with; one pair where nothing is tuned."""
    longer = contestant == "dense, longer"
    if network == "LeNet-5" or options.smoke:
        return [(LR_LONGER if longer else LR, DECAY)]
    return [(lr, decay) for lr in (LRS_LONGER if longer else LRS) for decay in DECAYS]


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> study.Row:
    """Trains a network, tests it and leaves it in its file; errors are shares, 0 to 1."""
    data = _data(job.options)
    plan = SMOKE_PLAN if job.options.smoke else PLANS[job.network]
    torch.manual_seed(job.seed)
    if job.contestant in ("dense", "small dense"):
        model, done = _made(job.network, job.contestant, job.factor), 0
        more = plan.prunings * plan.retraining if job.contestant == "small dense" else 0
        stretches = [plan.dense + more]
    else:
        dense = job._replace(contestant="dense", factor=1, lr=LR, decay=DECAY)
        model, done = _made(job.network, job.contestant, job.factor, dense.file), plan.dense
        stretches = [plan.retraining] * plan.prunings
    kept = {}
    if job.contestant == "pruned":
        kept = {name: share ** SIZES[job.factor].power for name, share in KEPT[job.network].items()}
    began = time.perf_counter()
    for epochs, share in zip(stretches, shares_kept(kept, len(stretches)), strict=True):
        prune_smallest(model, share)
        _train_on(model, data, job, done, epochs)
        done += epochs
    seconds = time.perf_counter() - began
    left = parameters_left(model)
    make_permanent(model)
    arrays: dict[str, Any] = {name: x.numpy() for name, x in model.state_dict().items()}
    np.savez_compressed(job.file, **arrays)
    packed = io.BytesIO()
    np.savez_compressed(packed, **_packed(arrays))
    image = data.batch(data.train[:1])[0]
    return {
        "network": job.network,
        "contestant": job.contestant,
        "factor": job.factor,
        "lr": job.lr,
        "decay": job.decay,
        "seed": job.seed,
        "dataset": data.name,
        "epochs": done,
        "parameters": left,
        "multiply_adds": multiply_adds(model, image),
        "multiply_adds_left": _multiply_adds_left(model, image),
        "bytes": job.file.stat().st_size,
        "bytes_packed": packed.tell(),
        "validation_accuracy": evaluate(model, data, data.validation).accuracy,
        # The only time that the test split is read.
        "test_error": 1 - evaluate(model, data, data.test).accuracy,
        "train_seconds": seconds,
    }


def _packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What suffices to restore arrays whose shapes are known: without zeros, each as it is."""
    packed: dict[str, Any] = {}
    for name, array in arrays.items():
        there = array != 0
        packed[name] = array if there.all() else array[there]
        if not there.all():
            packed[f"{name} there"] = np.packbits(there)
    return packed


def _made(network: str, contestant: str, factor: int, dense: Path | None = None) -> nn.Module:
    """A contestant before its training, made of the dense network in a file, or of a new one."""
    if contestant == "small dense":
        return MLP((784, *SIZES[factor].widths, 10))
    model = LeNet5() if network == "LeNet-5" else lenet_300_100()
    if dense is not None:
        _read(model, dense)
    if contestant == "low rank":
        for number, rank in enumerate(SIZES[factor].ranks):
            whole = model.get_submodule(f"layers.{number}")
            assert isinstance(whole, nn.Linear)
            model.set_submodule(f"layers.{number}", LowRankLinear.from_linear(whole, rank))
    return model


def _read(model: nn.Module, file: Path) -> None:
    """Gives a model the numbers that `train` left in a file."""
    with np.load(file) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})


def _train_on(model: nn.Module, data: ImageData, job: Job, done: int, epochs: int) -> None:
    """One cycle of the rate, over the epochs that follow those done."""
    per_epoch = steps_per_epoch(len(data.train), BATCH)
    optimizer = make_optimizer("adam", model.parameters(), job.lr, job.decay)
    schedule = make_schedule("one-cycle", optimizer, job.lr, epochs * per_epoch)
    fit(model, autograd, optimizer, schedule, data,
        epochs=done + epochs, batch_size=BATCH, seed=job.seed, done=done * per_epoch)  # fmt: skip


@torch.no_grad()
def _multiply_adds_left(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the weights that are not zero, for one image: each as often as it is used.

    A matrix is used once, a kernel at every place of its maps.
    """
    count = 0

    def add(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal count
        weights = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        count += sum(int(p.count_nonzero()) for p in weights) * output[0, 0].numel()

    layers = [module for module in model.modules() if any(True for _ in module.parameters(False))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    model(image)
    for handle in handles:
        handle.remove()
    return count


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


# --- Time ---------------------------------------------------------------------------------------


@torch.inference_mode()
def _timings(trained: Sequence[study.Row], folder: Path, options: Options) -> list[study.Row]:
    """Forward passes of one seed's networks on one thread, and their ratios in a round."""
    rounds, order = 6 if options.smoke else options.rounds, random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    forward: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
    for row in sorted(trained, key=lambda row: row["factor"]):
        network, contestant, factor = row["network"], row["contestant"], row["factor"]
        if network == "LeNet-5" or contestant == "dense, longer":
            continue
        model = _made(network, contestant, factor).eval()
        of = network, contestant, factor, row["lr"], row["decay"], row["seed"]
        _read(model, Job(*of, folder, options).file)
        if contestant == "pruned":
            forward[AS_IS, factor], forward[CSR, factor] = model, _with_csr(model)
        else:
            forward[contestant, factor] = model
    rows = []
    for batch, passes in PASSES.items():
        images = torch.randn(batch, 1, 28, 28)
        for number in range(-1, rounds):  # the first does not count
            shuffled = order.sample(list(forward), len(forward))
            seconds = {one: _seconds(forward[one], images, passes) for one in shuffled}
            rows += [
                {
                    "timed": timed,
                    "factor": factor,
                    "batch": batch,
                    "round": number,
                    "seconds": seconds[timed, factor],
                    "ratio": seconds[timed, factor] / seconds["dense", 1],
                }
                for timed, factor in forward
                if number >= 0
            ]
    torch.set_num_threads(threads)
    return rows


def _with_csr(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """An MLP's forward pass with its matrices in compressed sparse rows: zᵀ = W aᵀ + b."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        layers = [
            (layer.weight.detach().to_sparse_csr(), layer.bias.detach()[:, None])
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        ]

    def forward(x: Tensor) -> Tensor:
        a = x.flatten(1).T
        for weight, bias in layers[:-1]:
            a = torch.addmm(bias, weight, a).relu()
        weight, bias = layers[-1]
        return torch.addmm(bias, weight, a).T

    return forward


def _seconds(forward: Callable[[Tensor], Tensor], images: Tensor, passes: int) -> float:
    """Of one of so many passes."""
    began = time.perf_counter()
    for _ in range(passes):
        forward(images)
    return (time.perf_counter() - began) / passes


# --- What the rows come to ----------------------------------------------------------------------


def _counts() -> list[Claim]:
    """What is counted, on any data. A count has no spread: its interval is one number."""
    claims = []
    for m, n in ((784, 300), (300, 100)):
        x, bound, wrong = torch.empty(1, m, device="meta"), break_even(m, n), 0
        for rank in range(1, min(m, n) + 1):
            layer = LowRankLinear(m, n, rank, bias=False, device="meta")
            saves = [parameters(layer) < m * n, multiply_adds(layer, x) < m * n]
            wrong += saves != [rank < bound] * 2
        claims.append(
            judged(
                f"{m} × {n}: a product saves weights and multiply-adds if and only if its rank is "
                f"below mn/(m + n) = {bound:.2f}; ranks that contradict", 0,
                wrong, (wrong, wrong), 0, 0,
            )
        )  # fmt: skip
    return claims


def _found(rows: Sequence[study.Row]) -> list[Claim]:
    """What the trainings found, in differences or ratios of each seed."""
    claims = []

    def of(network: str, contestant: str, value: str = "test_error") -> list[float]:
        factor = 1 if contestant.startswith("dense") else HAN
        return _of(rows, network, contestant, factor, value)

    for network, (before, after) in PUBLISHED.items():
        for other, published in (("dense", f"−{before - after:.2f}"), ("dense, longer", None)):
            claims.append(
                between(
                    f"{network}: test error pruned {HAN}× less that of “{other}”, percentage "
                    "points: 0 or less", published,
                    _points(of(network, "pruned"), of(network, other)), high=0,
                )
            )  # fmt: skip
    small = of("LeNet-300-100", "small dense")
    for contestant in ("pruned", "low rank"):
        claims.append(
            between(
                f"LeNet-300-100: test error of “{contestant}” {HAN}× less that of “small dense” "
                "with as many parameters, percentage points: below 0", None,
                _points(of("LeNet-300-100", contestant), small), high=0,
            )
        )  # fmt: skip
    ratios = [
        pruned / dense
        for pruned, dense in zip(
            of("LeNet-300-100", "pruned", "bytes_packed"),
            of("LeNet-300-100", "small dense", "bytes_packed"), strict=True,
        )
    ]  # fmt: skip
    claims.append(
        between(
            f"LeNet-300-100: packed file of “pruned” {HAN}× as a multiple of that of “small dense” "
            "with as many parameters: 1 or less", None, ratios, high=1,
        )
    )  # fmt: skip
    return claims


def _faster(timings: Sequence[study.Row]) -> list[Claim]:
    """What the timings found, in ratios of each round."""
    claims = []
    for batch in PASSES:
        for timed, low, high, told in (
            (AS_IS, BAR, math.inf, f"{BAR} or more (our bar): not faster"),
            (CSR, -math.inf, 1, "below 1: faster"),
            ("low rank", -math.inf, 1, "below 1: faster"),
        ):
            ratios = _timed(timings, timed, HAN, batch)
            claims.append(
                judged(
                    f"batch of {batch}, “{timed}” {HAN}×: median of a forward pass's time as a "
                    f"multiple of the dense network's: {told}", None,
                    statistics.median(ratios), median_interval(ratios), low, high,
                )
            )  # fmt: skip
    return claims


def _summary(rows: Sequence[study.Row]) -> list[study.Row]:
    """A line for each contestant of a network."""
    network = rows[0]["network"]
    settings = sorted(
        dict.fromkeys((row["contestant"], row["factor"]) for row in rows), key=lambda of: of[1]
    )
    lines = []
    for contestant, factor in settings:
        found = {key: _of(rows, network, contestant, factor, key) for key in rows[0]}
        line = {
            "network": contestant if factor == 1 else f"{contestant} {factor}×",
            "rate, decay": f"{found['lr'][0]:g}, {found['decay'][0]:g}",
            "epochs": found["epochs"][0],
            "parameters": f"{found['parameters'][0]:,}",
            "test error, %": spread([100 * error for error in found["test_error"]]),
        }
        for rival, its_factor in (("dense", 1), ("small dense", factor)):
            if any(row["contestant"] == rival for row in rows):
                errors = _of(rows, network, rival, its_factor, "test_error")
                line[f"less that of “{rival}”, points"] = (
                    spread(_points(found["test_error"], errors), "+")
                    if errors and rival != contestant
                    else "–"
                )
        lines.append(
            line
            | {
                "multiply-adds as run": f"{found['multiply_adds'][0]:,}",
                "of weights left": f"{found['multiply_adds_left'][0]:,}",
                "file, kB": f"{statistics.fmean(found['bytes']) / 1000:.1f}",
                "packed": f"{statistics.fmean(found['bytes_packed']) / 1000:.1f}",
            }
        )
    return lines


def _times(timings: Sequence[study.Row]) -> list[study.Row]:
    """A line for each network that was timed."""
    lines = []
    for timed, factor in dict.fromkeys((row["timed"], row["factor"]) for row in timings):
        line = {"network": timed if factor == 1 else f"{timed} {factor}×"}
        for batch in PASSES:
            microseconds = 1e6 * statistics.median(_timed(timings, timed, factor, batch, "seconds"))
            low, middle, high = _quartiles(_timed(timings, timed, factor, batch))
            line[f"batch of {batch}, µs"] = f"{microseconds:.0f}"
            line[f"batch of {batch}, ratio"] = f"{middle:.2f} ({low:.2f}–{high:.2f})"
        lines.append(line)
    return lines


def _picture(rows: Sequence[study.Row], timings: Sequence[study.Row]) -> figures.Figure:
    """Error and time against the parameters that are left."""
    name = "LeNet-300-100"
    left = {row["factor"]: row["parameters"] for row in rows
            if (row["network"], row["contestant"]) == (name, "pruned")}  # fmt: skip

    def errors(contestant: str, factor: int) -> list[float]:
        return _of(rows, name, contestant, factor, "test_error")

    def duration(timed: str, factor: int, batch: int) -> tuple[float, float]:
        low, middle, high = _quartiles(_timed(timings, timed, factor, batch))
        return middle, (high - low) / 2

    across = "parameters left, within 1 %"
    parts = [
        figures.Panel(
            "Error: mean ± standard deviation", across, "test error",
            {
                contestant: [
                    figures.point(x, errors(contestant, factor)) for factor, x in left.items()
                ]
                for contestant in ("pruned", "low rank", "small dense")
            },
            log="xy", percent=True,
            levels={
                other: statistics.fmean(errors(other, 1)) for other in ("dense", "dense, longer")
            },
        )
    ]  # fmt: skip
    parts += [
        figures.Panel(
            f"{batch} image{'s' * (batch > 1)}: median ± ½ interquartile range", across,
            "time of a forward pass, of the dense one's",
            {
                timed: [(x, *duration(timed, factor, batch)) for factor, x in left.items()]
                for timed in (AS_IS, CSR, "low rank", "small dense")
            },
            log="xy", levels={"dense": 1.0},
        )
        for batch in PASSES
    ]  # fmt: skip
    data = rows[0]["dataset"]
    return figures.side_by_side(parts, f"{name} on {data}: 266,610 parameters made fewer")


def _of(
    rows: Sequence[study.Row], network: str, contestant: str, factor: int, value: str
) -> list[float]:
    """One value of a contestant, in the order of the seeds."""
    wanted = (network, contestant, factor)
    chosen = [row for row in rows if (row["network"], row["contestant"], row["factor"]) == wanted]
    return [row[value] for row in sorted(chosen, key=lambda row: row["seed"])]


def _timed(
    timings: Sequence[study.Row], timed: str, factor: int, batch: int, value: str = "ratio"
) -> list[float]:
    """One value of a network that was timed, of each round."""
    wanted = (timed, factor, batch)
    return [row[value] for row in timings if (row["timed"], row["factor"], row["batch"]) == wanted]


def _points(errors: Sequence[float], others: Sequence[float]) -> list[float]:
    return [100 * points for points in differences(errors, others)]


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
