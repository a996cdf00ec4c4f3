"""How fast, next to a named peer that is timed in the same run?

    python experiments/benchmark.py engines             # a step of each engine against autograd's
    python experiments/benchmark.py time-to-accuracy    # MNIST, from the textbook loop down
    python experiments/benchmark.py many                # 64 networks at once, and one by one
    python experiments/benchmark.py checker             # check_gradients against gradcheck
    python experiments/benchmark.py memory              # peaks, and what grows over 10,000 steps
    python experiments/benchmark.py scaling             # batch sizes, widths, threads
    python experiments/benchmark.py startup             # import nn_backprop against import torch

With `--smoke` each takes seconds and reads the embedded digits. The contestants work in turn, each
until the clock has something to read, in an order that is rotated from round to round, with the
garbage collector switched off; a ratio is the peer's time over the contestant's of one round. The
tables give the median of the rounds and, in brackets, the lowest and the highest. A bar is reached
(`reproduced`) if the whole interval of the median lies above it: the interval between two of the
sorted ratios that has a probability of 95 % or more, whatever their distribution.
"""

import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.autograd import Function, gradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim import SGD, Adadelta, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nn_backprop import check_gradients, engines, figures
from nn_backprop.data import DataError, ImageData, channels_last, data_root, load
from nn_backprop.engines.by_hand_fast import flat_parameter
from nn_backprop.models import CNN, MLP, MODELS, happy
from nn_backprop.studies.evidence import Claim, Verdict, markdown_table, write_results
from nn_backprop.tracking import default_run_dir, describe_machine, read_json
from nn_backprop.training import (
    LeanSGD,
    evaluate,
    fit,
    fit_many,
    make_optimizer,
    make_schedule,
    steps_per_epoch,
)

Row = dict[str, Any]
Work = Callable[[], object]
Times = dict[str, list[float]]  # seconds a call, by contestant and round

LR, MOMENTUM = 1e-6, 0.9  # so small that the networks stay what they are while they are timed


# --- The options ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Common:
    rounds: int = 15
    """Rounds in which every contestant has its turn; from 6 on the interval of the median has 95 %
    or more."""
    turn: float = 0.2
    """Seconds that a turn lasts at least."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: int | None = None
    """Processor threads; by default as many as torch takes."""
    smoke: bool = False
    """Seconds instead of minutes: two short rounds, the smallest cases, the embedded digits."""


@dataclass(frozen=True, kw_only=True)
class Engines(Common):
    """The time of a training step, gradients and update, by each engine, against autograd's."""

    compile: bool = True
    """Whether torch.compile takes part, whose compilation lasts minutes."""


@dataclass(frozen=True, kw_only=True)
class TimeToAccuracy(Common):
    """Seconds of training to a validation accuracy, against a textbook's loop."""

    seeds: int = 10
    """Seeds, from 0, of every contestant but the textbook's loop and scikit-learn."""
    textbook_seeds: int = 3
    """Seeds of those two, and of the rungs that last as long, of the same numbers."""
    accurate_seeds: int = 5
    """Seeds of the preset accurate."""
    rungs: tuple[str, ...] | None = None
    """Names of the rungs of the ladder to climb; by default all."""
    presets: tuple[str, ...] = ("fast", "accurate")
    """Presets of train.py."""
    target: float = 0.99
    """Validation accuracy, 0 to 1, at which the textbook's loop ends."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""


@dataclass(frozen=True, kw_only=True)
class Many(Common):
    """A step of many networks at once, against the same networks one after another."""


@dataclass(frozen=True, kw_only=True)
class Checker(Common):
    """The time of check_gradients against torch.autograd.gradcheck, on right gradients."""

    rounds: int = 6


@dataclass(frozen=True, kw_only=True)
class Memory(Common):
    """The peak memory of a step against autograd's, and what has grown after 10,000 steps."""


@dataclass(frozen=True, kw_only=True)
class Scaling(Common):
    """Examples a second over batch sizes, widths and threads, by hand against autograd."""

    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class Startup(Common):
    """The time of an import and of --help in fresh processes, against import torch."""


Options = Engines | TimeToAccuracy | Many | Checker | Memory | Scaling | Startup


@dataclass
class Found:
    """What a sub-command measured: rows for results.json, and how they are shown."""

    rows: list[Row]
    tables: dict[str, list[Row]]  # by title
    figure: Any
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out and why, how it was measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for what could not be run."""
    began = time.perf_counter()
    options: Options = tyro.cli(Options, args=arguments, description=__doc__)
    name, measure = SUBCOMMANDS[type(options)]
    if (problem := _problem(options)) is not None:
        print(f"benchmark.py: {problem}", file=sys.stderr)
        return 2
    if options.smoke:
        options = replace(options, rounds=2, turn=0.005)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        found = measure(options)
    except DataError as error:
        print(f"benchmark.py: {error}; --smoke needs neither files nor network", file=sys.stderr)
        return 2
    if options.smoke:
        found.claims = []  # they need the whole run
    where = describe_machine() | {"cores": _cores(), "device": _device_name(options)}
    heading = (
        f"{where['device']}; {where['threads']} of {where['cores']} cores; "
        f"torch {where['versions']['torch']}"
    )
    folder = default_run_dir("benchmark", f"{name}-smoke" if options.smoke else name)
    folder.mkdir(parents=True)
    write_results(
        folder / "results.json", f"benchmark {name}", asdict(options) | {"notes": found.notes},
        found.rows, found.claims, where, time.perf_counter() - began,
    )  # fmt: skip
    figures.save(found.figure, folder / "results.png")
    text = "\n".join(
        [heading + "\n"]
        + [f"**{title}**\n\n{markdown_table(rows)}" for title, rows in found.tables.items()]
        + [f"- {note}" for note in found.notes]
        + [
            f"- {claim.verdict}: {claim.claim}; measured {claim.measured:.3g} "
            f"[{claim.interval[0]:.3g}, {claim.interval[1]:.3g}]"
            for claim in found.claims
        ]
    )
    (folder / "results.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"{text}\nTable, picture and results.json: {folder}")
    return 0


def _problem(options: Options) -> str | None:
    """What is wrong with the options, in a sentence."""
    counts: dict[str, Any] = {"rounds": options.rounds, "threads": options.threads}
    if isinstance(options, TimeToAccuracy):
        counts |= {"seeds": options.seeds, "textbook-seeds": options.textbook_seeds}
        if not 0 < options.target < 1:
            return f"--target must be between 0 and 1, not {options.target}"
        for rung in options.rungs or ():
            if rung not in RUNGS:
                return f"there is no rung {rung!r}: choose from {', '.join(map(repr, RUNGS))}"
    for name, count in counts.items():
        if count is not None and count < 1:
            return f"--{name} must be 1 or more, not {count}"
    if not 0 < options.turn < math.inf:
        return f"--turn must be a number of seconds above 0, not {options.turn}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds none here; choose cpu"
    return None


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(options: Common) -> str:
    processor = str(describe_machine()["processor"])
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()} beside {processor}"
    return processor


# --- Timing ---------------------------------------------------------------------------------------


def in_turn(contestants: Mapping[str, Work], options: Common) -> Times:
    """Seconds a call, by contestant and round. What comes before the rounds warms up, and finds how
    many calls a turn takes."""
    calls: dict[str, int] = {}
    times: Times = {name: [] for name in contestants}
    names = list(contestants)
    gc.disable()
    try:
        for name, work in contestants.items():
            slow = _seconds(work, 1, options.device) > 10 * options.turn
            began, calls[name] = time.perf_counter(), int(slow)
            while not calls[name] or (not slow and time.perf_counter() - began < options.turn):
                calls[name] += 1
                _seconds(work, 1, options.device)
        for round_ in range(options.rounds):
            gc.collect()
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                if calls[name] > 1:
                    contestants[name]()  # the others have emptied the caches
                times[name].append(_seconds(contestants[name], calls[name], options.device))
    finally:
        gc.enable()
    return times


def _seconds(work: Work, calls: int, device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compared(case: str, times: Times, peer: str, per: int = 1, **more: Any) -> list[Row]:
    """A row a contestant: its time, and how many times as fast as the peer it was in each round."""
    rows = []
    for name, seconds in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times[peer], seconds, strict=False)]
        rows.append({
            "case": case, "contestant": name, "peer": peer,
            "seconds": statistics.median(seconds) / per, **spread(ratios), **more,
        })  # fmt: skip
    return rows


def spread(ratios: Sequence[float]) -> Row:
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ratios": list(ratios),
    }


def shown(rows: Sequence[Row], per: str, **columns: Callable[[Row], str]) -> list[Row]:
    """The rows as the table has them."""
    return [
        {"case": row["case"], "": row["contestant"], f"time a {per}": _time(row["seconds"]),
         f"times as fast as {row['peer']}": _ratio(row)}
        | {name.replace("_", " "): show(row) for name, show in columns.items()}
        for row in rows
    ]  # fmt: skip


def _ratio(row: Row) -> str:
    if row["contestant"] == row["peer"]:
        return "1"
    return f"{row['ratio']:.3g} ({row['lowest']:.3g}–{row['highest']:.3g})"


def _time(seconds: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def drawn(rows: Sequence[Row], title: str, wanted: Mapping[tuple[str, str], float]) -> Any:
    """The ratios of all contestants but the peer, by case."""
    by_case: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["contestant"] != row["peer"]:
            by_case.setdefault(row["case"], {})[row["contestant"]] = row["ratios"]
    return figures.speed_ratios(by_case, wanted, title, f"times as fast as {rows[0]['peer']}")


def held(claim: str, bar: float, values: Sequence[float], at_most: bool = False) -> Claim:
    """The claim that the median of what `values` were drawn from is `bar` or more (or less)."""
    low, high = median_interval(values)
    sure, refuted = (high <= bar, low > bar) if at_most else (low >= bar, high < bar)
    verdict: Verdict = "reproduced" if sure else "not reproduced" if refuted else "undecided"
    return Claim(claim, bar, statistics.median(values), (low, high), verdict)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The closest k-th lowest and k-th highest that have the median between them with 95 %.

    The number of values below the median is binomial, so P(fewer than k) = Σ_(i<k) C(n, i) / 2^n.
    With fewer than 6 values even the lowest and the highest, which are returned, have less.
    """
    n, k = len(values), 1
    while sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.025:
        k += 1
    return sorted(values)[k - 1], sorted(values)[-k]


# --- Engines --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network and a batch size, and how many times as fast as autograd an engine should be."""

    make: Callable[[], nn.Module]
    batch: int
    wanted: Mapping[str, float] = field(default_factory=dict)


CASES = {
    "784-16-16-10, batch 32": Case(partial(MLP, (784, 16, 16, 10)), 32, {"by-hand": 2.7}),
    "784-30-10, batch 10": Case(partial(MLP, (784, 30, 10)), 10, {"by-hand": 2.7}),
    "784-128-10, batch 64": Case(partial(MLP, (784, 128, 10)), 64, {"by-hand": 1.4}),
    "784-512-256-10, batch 256": Case(partial(MLP, (784, 512, 256, 10)), 256, {"by-hand": 1.1}),
    "happy, batch 32": Case(happy, 32),
    "CNN, batch 128": Case(CNN, 128, {"by-hand": 0.8}),
}
LARGEST = ("784-512-256-10, batch 256", "CNN, batch 128")
TAPE = 1.0  # the tape's bar, everywhere
FIRST = "autograd, channels first"
TORCHS = "by-hand, torch's SGD"
SMOKE_CASES = ("784-16-16-10, batch 32",)


def measure_engines(options: Engines) -> Found:
    rows: list[Row] = []
    shares: list[Row] = []
    notes: list[str] = []
    for name in tqdm(SMOKE_CASES if options.smoke else CASES, unit="case"):
        case = CASES[name]
        contestants: dict[str, Work] = {
            engine: step(engine, case.make, case.batch, options.device)
            for engine in ("autograd", "tape", "by-hand", TORCHS if case.make is not CNN else FIRST)
        }
        if options.compile and not options.smoke:
            began = time.perf_counter()
            try:
                compiled = step("torch.compile", case.make, case.batch, options.device)
                compiled()
                contestants["torch.compile"] = compiled
                seconds = time.perf_counter() - began
                notes.append(f"torch.compile took {seconds:.1f} s to compile {name} and is timed "
                             "without it.")  # fmt: skip
            except Exception as error:  # no C++ compiler, or one of many ways in which it fails
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                notes.append(f"torch.compile is left out at {name}: {reason}")
        large = name in LARGEST or options.smoke
        side = 256 if options.smoke else 2048
        if large:
            contestants["peak"] = _matrix_product(side, options.device)
        times = in_turn(contestants, options)
        if large:
            rates = [2 * side**3 / seconds for seconds in times.pop("peak")]
            operations = _operations(case)
            for engine in ("autograd", "by-hand"):
                reached = [
                    operations / seconds / rate
                    for seconds, rate in zip(times[engine], rates, strict=True)
                ]
                shares.append({
                    "case": name, "contestant": engine, "peer": "matrix product",
                    "operations": operations, "peak": statistics.median(rates), **spread(reached),
                })  # fmt: skip
        rows += compared(name, times, "autograd")
    notes.append(
        "A step is gradients and SGD with momentum 0.9: torch's, fused; by hand, what train.py has "
        f"for it, LeanSGD of one flat parameter, but for {TORCHS!r}. torch.compile takes forward "
        "and loss, and with them the backward pass; the peer is zero_grad, backward and step, as "
        "they are usually written. Images have their channels last in memory, as our training "
        f"loop hands them out, but for {FIRST!r}."
    )
    claims = []
    for row in rows:
        bar = TAPE if row["contestant"] == "tape" else CASES[row["case"]].wanted.get(
            row["contestant"]
        )  # fmt: skip
        if bar is not None:
            claims.append(held(
                f"{row['case']}: {row['contestant']} is at least {bar} times as fast as autograd "
                "(median over rounds)", bar, row["ratios"],
            ))  # fmt: skip
    tables = {
        "A training step": shown(rows, "step"),
        "Share of the rate of a large matrix product, float32": [
            {
                "case": row["case"],
                "": row["contestant"],
                "operations a step": f"{row['operations'] / 1e6:.4g} million",
                "matrix product": f"{row['peak'] / 1e9:.3g} GFLOP/s",
                "share reached": f"{100 * row['ratio']:.3g} % "
                f"({100 * row['lowest']:.3g}–{100 * row['highest']:.3g})",
            }
            for row in shares
        ],
    }
    wanted = {(name, "tape"): TAPE for name in CASES}
    wanted |= {(n, engine): bar for n, case in CASES.items() for engine, bar in case.wanted.items()}
    title = f"A training step against autograd's, {_short(options)}"
    return Found(rows + shares, tables, drawn(rows, title, wanted), claims, notes)


def _short(options: Common) -> str:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{_device_name(options)}, {threads}"


def step(name: str, make: Callable[[], nn.Module], batch: int, device: str = "cpu") -> Work:
    """A training step of a new network on one batch: gradients by `name`, then SGD."""
    torch.manual_seed(0)
    model = make().to(device)
    inputs = channels_last(torch.randn(batch, 1, 28, 28, device=device))
    targets = torch.randint(10, (batch,), device=device)
    compute, parameters = engine_for("by-hand" if name == TORCHS else name, model)
    if name == FIRST:
        inputs = inputs.flatten(1).view(batch, 1, 28, 28)
    optimizer_of = LeanSGD if name == "by-hand" else SGD
    optimizer = optimizer_of(parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def work() -> None:
        compute(model, inputs, targets)
        optimizer.step()

    return work


def engine_for(name: str, model: nn.Module) -> tuple[engines.Engine, list[nn.Parameter]]:
    """An engine that may keep its buffers between calls, and what its optimizer updates.

    autograd and torch.compile are written here, as they are usually used.
    """

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return model.loss(model(inputs), targets)  # type: ignore[operator]

    def as_usual(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(inputs, targets)
        loss.backward()
        return loss.detach()

    parameters = list(model.parameters())
    if name == "torch.compile":
        loss_of = torch.compile(loss_of)
    if name in ("autograd", FIRST, "torch.compile"):
        return as_usual, parameters
    if name == "by-hand":
        parameters = [flat_parameter(model)]
    return engines.for_training(name), parameters


def _matrix_product(side: int, device: str) -> Work:
    a, b, out = torch.randn(3, side, side, device=device)
    return lambda: torch.mm(a, b, out=out)


def _operations(case: Case) -> int:
    """Multiplications and additions of matrix products and convolutions, forward and backward."""
    model = case.make()
    with FlopCounterMode(display=False) as counter:
        inputs, targets = torch.randn(case.batch, 1, 28, 28), torch.randint(10, (case.batch,))
        model.loss(model(inputs), targets).backward()  # type: ignore[operator]
    return int(counter.get_total_flops())


# --- Time to accuracy -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What every contestant of a run is told; it is sent to other processes."""

    data: Literal["mnist", "digits"]
    data_root: Path | None
    target: float
    most_epochs: int
    threads: int
    device: str


@dataclass(frozen=True)
class Outcome:
    """A training run. Its seconds are those of training alone, without any evaluation."""

    seconds: float
    validation: float  # accuracies, 0 to 1
    test: float
    epoch_seconds: float | None = None  # the median
    epochs: int | None = None


class Unavailable(Exception):
    """A contestant cannot take part, for the reason given."""


class Textbook(nn.Sequential):
    """The convolutional network of many introductions: 1,199,882 weights and biases."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 10),
        )  # fmt: skip
        assert sum(p.numel() for p in self.parameters()) == 1_199_882

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets)

    def probabilities(self, output: Tensor) -> Tensor:
        return output.softmax(1)


@dataclass(frozen=True)
class Rung:
    """A step of the ladder from the textbook's loop to the fastest: images in one tensor, and
    `training.fit`."""

    model: str  # of MODELS, or textbook
    optimizer: str  # of make_optimizer, or adadelta with the textbook's schedule
    lr: float
    batch_size: int
    epochs: int
    weight_decay: float = 0.0
    channels_last: bool = True
    bfloat16: bool = False  # where the processor has it
    few: bool = False  # as few seeds as the textbook's loop


CYCLE = Rung("cnn", "adam", 6e-3, 128, 3, 0.1)
RUNGS = {
    "images in one tensor": Rung("textbook", "adadelta", 1.0, 64, 4, channels_last=False, few=True),
    "… and a small network": Rung("cnn", "adadelta", 1.0, 64, 6, channels_last=False),
    "… one-cycle, fused AdamW": replace(CYCLE, channels_last=False),
    "… channels last": CYCLE,
    "… bfloat16": replace(CYCLE, bfloat16=True),
    "… batch norm, on 2 × 2 blocks": Rung("fast-cnn", "adam", 2e-2, 128, 1, 0.01, bfloat16=True),
}  # fmt: skip


def measure_time_to_accuracy(options: TimeToAccuracy) -> Found:
    setting = Setting(
        "digits" if options.smoke else "mnist", options.data_root,
        0.6 if options.smoke else options.target, 2 if options.smoke else 14,
        torch.get_num_threads(), options.device,
    )  # fmt: skip
    _data(setting)  # fails here, with a sentence, if there is none
    contestants: dict[str, Callable[[int, Setting], Outcome]] = {
        "textbook": textbook_run, "scikit-learn": sklearn_run
    }  # fmt: skip
    presets, rungs = options.presets, options.rungs or tuple(RUNGS)
    if options.smoke:
        presets, rungs = presets[:1], rungs[:1]
    contestants |= {f"preset {name}": partial(preset_run, name) for name in presets}
    contestants |= {rung: partial(rung_run, rung) for rung in rungs}
    seeds, few = (1, 1) if options.smoke else (options.seeds, options.textbook_seeds)
    limits = {"textbook": few, "scikit-learn": few}
    limits |= {rung: few for rung in rungs if RUNGS[rung].few}
    limits |= {"preset accurate": 1 if options.smoke else options.accurate_seeds}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    notes: list[str] = []
    turns = [
        (seed, name)
        for seed in range(max(seeds, few))
        for name in contestants
        if seed < limits.get(name, seeds)
    ]
    # A process of its own for each, so that the first seed is cold and the later are warm; a preset
    # starts one itself.
    alone = [name for name in contestants if not name.startswith("preset ")]
    with _processes(alone) as pools, tqdm(turns, unit="run") as bar:
        for seed, name in bar:
            if name not in outcomes:
                continue
            bar.set_postfix_str(f"{name}, seed {seed}")
            try:
                if name in pools:
                    outcome = pools[name].submit(contestants[name], seed, setting).result()
                else:
                    outcome = contestants[name](seed, setting)
                outcomes[name].append(outcome)
            except Unavailable as error:
                notes.append(f"{name} is left out: {error}")
                del outcomes[name]
    rows = [_outcome_row(name, got, outcomes, setting) for name, got in outcomes.items()]
    notes += [
        "Seconds are those of training, without loading, evaluation and the start of the process. "
        "A ratio is the textbook's median over the seconds of one seed. "
        "The textbook's loop ends with the first epoch whose validation accuracy is "
        f"{100 * setting.target:g} % or more, after {setting.most_epochs} at most.",
        "Cold is the first seed in a fresh process, warm the median of the later ones in it; a "
        "preset is a process of its own for each seed.",
    ]
    table = [
        {
            "": row["contestant"],
            "seeds": row["seeds"],
            "training": _time(row["seconds"]),
            "cold; warm": _time(row["cold"]) + ("; " + _time(row["warm"]) if row["warm"] else ""),
            "an epoch": _time(row["epoch_seconds"]) if row["epoch_seconds"] else "–",
            "validation, %": _mean_and_sd(row["validation"]),
            f"≥ {100 * setting.target:g} %": f"{row['reached']} of {row['seeds']}",
            "test, %": _mean_and_sd(row["test"]),
            "times as fast as textbook": _ratio(row),
        }
        for row in rows
    ]
    figure = figures.time_against_accuracy(
        {row["contestant"]: (row["all_seconds"], row["validation"]) for row in rows},
        setting.target,
        f"Training on {setting.data} against the textbook's loop, {_short(options)}",
    )
    return Found(rows, {"Time to accuracy": table}, figure, [], notes)


def _outcome_row(
    name: str, got: list[Outcome], outcomes: dict[str, list[Outcome]], setting: Setting
) -> Row:
    seconds = [outcome.seconds for outcome in got]
    epochs = [outcome.epoch_seconds for outcome in got if outcome.epoch_seconds]
    textbook = statistics.median(outcome.seconds for outcome in outcomes["textbook"])
    ratios = [textbook / mine for mine in seconds]
    return {
        "case": setting.data, "contestant": name, "peer": "textbook", "seeds": len(got),
        "seconds": statistics.median(seconds), "cold": seconds[0],
        "warm": statistics.median(seconds[1:]) if seconds[1:] else None,
        "epoch_seconds": statistics.median(epochs) if epochs else None,
        "epochs": [outcome.epochs for outcome in got],
        "validation": [outcome.validation for outcome in got],
        "test": [outcome.test for outcome in got],
        "reached": sum(outcome.validation >= setting.target for outcome in got),
        "all_seconds": seconds, **spread(ratios),
    }  # fmt: skip


def _mean_and_sd(shares: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.2f}{deviation}"


@contextmanager
def _processes(names: Sequence[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A fresh process for each name, which starts with its first task and stays."""
    pools = {name: ProcessPoolExecutor(1, mp_context=get_context("spawn")) for name in names}
    try:
        yield pools
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


@cache
def _data(setting: Setting) -> ImageData:
    return load(setting.data, setting.data_root, setting.device)


class _Pictures(Dataset):
    """The embedded digits as torchvision gives MNIST's: pictures, transformed one by one."""

    def __init__(self, data: ImageData, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        picture = Image.fromarray(self.data.images[index, 0].numpy())
        return self.transform(picture), int(self.data.labels[index])


def textbook_run(seed: int, setting: Setting) -> Outcome:
    """As introductions train it: a DataLoader, Adadelta, a learning rate that falls each epoch."""
    from torchvision import datasets, transforms

    torch.set_num_threads(setting.threads)
    torch.manual_seed(seed)
    data = _data(setting)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    if setting.data == "mnist":
        root = data_root(setting.data_root)
        items: Dataset = datasets.MNIST(root, train=True, transform=transform)
        unseen: Dataset = datasets.MNIST(root, train=False, transform=transform)
    else:
        items = _Pictures(data.to("cpu"), transform)
        unseen = Subset(items, data.test.tolist())
    batches = DataLoader(Subset(items, data.train.tolist()), batch_size=64, shuffle=True)
    held_out = Subset(items, data.validation.tolist())
    model = Textbook().to(setting.device)
    optimizer = Adadelta(model.parameters(), lr=1.0)
    schedule = StepLR(optimizer, step_size=1, gamma=0.7)
    seconds: list[float] = []
    accuracy = 0.0
    while len(seconds) < setting.most_epochs and accuracy < setting.target:
        began = time.perf_counter()
        model.train()
        for images, labels in batches:
            images, labels = images.to(setting.device), labels.to(setting.device)
            optimizer.zero_grad()
            model.loss(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        _wait(setting.device)
        seconds.append(time.perf_counter() - began)
        accuracy = _accuracy(model, held_out, setting.device)
    return Outcome(
        sum(seconds), accuracy, _accuracy(model, unseen, setting.device),
        statistics.median(seconds), len(seconds),
    )  # fmt: skip


@torch.no_grad()
def _accuracy(model: nn.Module, items: Dataset, device: str) -> float:
    model.eval()
    right = torch.cat([
        model(images.to(device)).argmax(1).cpu() == labels
        for images, labels in DataLoader(items, batch_size=1000)
    ])  # fmt: skip
    return right.double().mean().item()


def sklearn_run(seed: int, setting: Setting) -> Outcome:
    """scikit-learn's MLPClassifier with its own options, 50 epochs at most."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    data = _data(replace(setting, device="cpu"))
    splits = [data.batch(indices) for indices in (data.train, data.validation, data.test)]
    (x, y), *others = [(images.flatten(1).numpy(), labels.numpy()) for images, labels in splits]
    model = MLPClassifier(max_iter=2 if setting.data == "digits" else 50, random_state=seed)
    with threadpool_limits(setting.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        began = time.perf_counter()
        model.fit(x, y)
        seconds = time.perf_counter() - began
        validation, test = (float(model.score(*split)) for split in others)
    return Outcome(seconds, validation, test, seconds / model.n_iter_, model.n_iter_)


def preset_run(name: str, seed: int, setting: Setting) -> Outcome:
    """`train.py --preset NAME`, as a user runs it; the seconds are those of its training loop."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--preset", name]
        command += ["--seed", str(seed), "--run-dir", f"{folder}/run", "--data", setting.data]
        command += ["--threads", str(setting.threads), "--device", setting.device]
        command += ["--data-root", str(setting.data_root)] if setting.data_root else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.replace("─", " ").split())[:200]
            raise Unavailable(f"train.py --preset {name} ended with {done.returncode}: {said}")
        summary = read_json(f"{folder}/run/summary.json")
    return Outcome(
        summary["train_seconds"], summary["validation_accuracy"], summary["test_accuracy"],
        summary["train_seconds"] / summary["epochs"], summary["epochs"],
    )  # fmt: skip


def rung_run(name: str, seed: int, setting: Setting) -> Outcome:
    """A rung of the ladder, in this process."""
    rung, data = RUNGS[name], _data(setting)
    epochs = min(rung.epochs, setting.most_epochs)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(seed)
    model = (Textbook() if rung.model == "textbook" else MODELS[rung.model]()).to(setting.device)
    compute, parameters = engine_for("autograd", model)
    if rung.bfloat16 and engines.has_bfloat16(torch.device(setting.device)):
        compute = engines.in_precision(engines.autograd, torch.bfloat16)
    if not rung.channels_last:
        compute = _channels_first(compute)
    optimizer, schedule = _rules(rung, parameters, epochs, len(data.train))
    model.train()
    began = time.perf_counter()
    steps = fit(
        model, compute, optimizer, schedule, data, epochs=epochs, batch_size=rung.batch_size,
        seed=seed,
    )  # fmt: skip
    _wait(setting.device)
    seconds = time.perf_counter() - began
    trained = steps // steps_per_epoch(len(data.train), rung.batch_size)
    validation, test = (evaluate(model, data, x).accuracy for x in (data.validation, data.test))
    return Outcome(seconds, validation, test, seconds / trained, trained)


def _channels_first(compute: engines.Engine) -> engines.Engine:
    """Images as torch usually has them. (`ImageData.batch` hands them out with channels last.)"""

    def computed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return compute(model, inputs.flatten(1).view(-1, 1, 28, 28), targets)

    return computed


def _rules(
    rung: Rung, parameters: list[nn.Parameter], epochs: int, examples: int
) -> tuple[Optimizer, LRScheduler]:
    per_epoch = steps_per_epoch(examples, rung.batch_size)
    if rung.optimizer == "adadelta":
        adadelta = Adadelta(parameters, lr=rung.lr)
        return adadelta, LambdaLR(adadelta, lambda done: 0.7 ** (done // per_epoch))
    optimizer = make_optimizer(rung.optimizer, parameters, rung.lr, rung.weight_decay)
    return optimizer, make_schedule("one-cycle", optimizer, rung.lr, epochs * per_epoch)


# --- Many networks --------------------------------------------------------------------------------

# Sizes, batch, steps of a call, and numbers of networks.
MANY: dict[str, tuple[tuple[int, ...], int, int, tuple[int, ...]]] = {
    "784-16-10, batch 32": ((784, 16, 10), 32, 100, (1, 8, 64)),
    "784-30-10, batch 10": ((784, 30, 10), 10, 100, (1, 8, 64)),
    "784-128-10, batch 64": ((784, 128, 10), 64, 50, (1, 8, 64)),
    "784-512-256-10, batch 256": ((784, 512, 256, 10), 256, 10, (1, 8)),
}
BAR_OF_MANY = {"64 × 784-16-10, batch 32": 6.0}  # elsewhere 1


def measure_many(options: Many) -> Found:
    rows: list[Row] = []
    notes: list[str] = []
    cases = [
        (f"{number} × {name}", sizes, batch, 5 if options.smoke else steps, number)
        for name, (sizes, batch, steps, numbers) in MANY.items()
        for number in numbers
    ]
    for name, sizes, batch, steps, number in tqdm(
        cases[:2] if options.smoke else cases, unit="case"
    ):
        data = _noise(steps * batch, options.device)
        contestants: dict[str, Work] = {}
        for contestant, make in MANY_WAYS.items():
            torch.manual_seed(0)
            models = [MLP(sizes).to(options.device) for _ in range(number)]
            contestants[contestant] = make(models, data, batch)
        times = in_turn(contestants, options)
        rows += compared(name, times, "autograd, one by one", number * steps, networks=number)
    notes.append(
        "A step is a batch gathered from uint8 images and normalised, gradients, and AdamW, fused; "
        "each network has an order of its own. One by one is `training.fit`; the time of fit_many "
        "includes what it sets up."
    )
    bars = {
        (row["case"], row["contestant"]): BAR_OF_MANY.get(row["case"], 1.0)
        for row in rows
        if row["contestant"] == "at once"
    }
    claims = [
        held(
            f"{row['case']}: at once is at least {bar:g} times as fast as autograd, one by one "
            "(median over rounds)", bar, row["ratios"],
        )
        for row in rows
        if (bar := bars.get((row["case"], row["contestant"]))) is not None
    ]  # fmt: skip
    title = f"Many networks against autograd one by one, {_short(options)}"
    tables = {"Many networks": shown(rows, "network's step")}
    return Found(rows, tables, drawn(rows, title, bars), claims, list(dict.fromkeys(notes)))


def _noise(examples: int, device: str) -> ImageData:
    images = torch.randint(256, (examples, 1, 28, 28), dtype=torch.uint8)
    labels, none = torch.randint(10, (examples,)), torch.arange(0)
    return ImageData(
        "noise", "a benchmark", images, labels, torch.arange(examples), none, none, 0.5, 0.29
    ).to(device)


def _at_once(models: Sequence[nn.Module], data: ImageData, batch: int) -> Work:
    return lambda: fit_many(
        models, data, seeds=range(len(models)), lrs=LR, optimizer="adam", schedule="constant",
        epochs=1, batch_size=batch,
    )  # fmt: skip


def _one_by_one(engine: str, models: Sequence[nn.Module], data: ImageData, batch: int) -> Work:
    ready = []
    for model in models:
        compute, parameters = engine_for(engine, model)
        optimizer = make_optimizer("adam", parameters, LR, 0.0)
        ready.append((model, compute, optimizer, make_schedule("constant", optimizer, LR, 1)))

    def work() -> None:
        for seed, training in enumerate(ready):
            fit(*training, data, epochs=1, batch_size=batch, seed=seed)

    return work


def _vmapped(models: Sequence[nn.Module], data: ImageData, batch: int) -> Work:
    """torch.func's ensembles: one network's gradient, mapped over stacked parameters."""
    parameters, _ = stack_module_state(list(models))
    skeleton: Any = copy.deepcopy(models[0]).to("meta")

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return skeleton.loss(functional_call(skeleton, parameters, (inputs,)), targets)

    gradients = vmap(grad(loss_of))
    optimizer = make_optimizer("adam", parameters.values(), LR, 0.0)

    def work() -> None:
        orders = torch.stack([torch.randperm(len(data.train)) for _ in models])
        for rows in orders.to(data.train.device).split(batch, 1):
            inputs, targets = data.batch(data.train[rows.flatten()])
            with torch.no_grad():
                found = gradients(
                    parameters, inputs.unflatten(0, rows.shape), targets.unflatten(0, rows.shape)
                )
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            optimizer.step()

    return work


MANY_WAYS: dict[str, Callable[[Sequence[nn.Module], ImageData, int], Work]] = {
    "autograd, one by one": partial(_one_by_one, "autograd"),
    "by-hand, one by one": partial(_one_by_one, "by-hand"),
    "vmap(grad)": _vmapped,
    "at once": _at_once,
}


# --- The checker ----------------------------------------------------------------------------------


class Affine(Function):
    """z = x weightᵀ + bias, with its gradients by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_z,), (x, weight) = grads, ctx.saved_tensors
        return grad_z @ weight, grad_z.T @ x, grad_z.sum(0)


def _lenet(side: int, channels: tuple[int, int], widths: tuple[int, int]) -> nn.Module:
    """LeNet-5's layers, in float64; 32, (6, 16), (120, 84) are its sizes: 61,706 parameters."""
    last = (side // 2 - 2) // 2 - 2  # pixels a side after the second pool
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels[0], 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(*channels, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(channels[1] * last**2, widths[0]), nn.Tanh(),
        nn.Linear(*widths), nn.Tanh(), nn.Linear(widths[1], 10),
    ).double()  # fmt: skip


def _targets() -> dict[str, tuple[Any, tuple[Tensor, ...], bool]]:
    """By name: target, inputs, and whether gradcheck's slow mode ends in reasonable time."""
    torch.manual_seed(0)
    small, full = _lenet(16, (2, 3), (7, 5)), _lenet(32, (6, 16), (120, 84))
    assert [sum(p.numel() for p in net.parameters()) for net in (small, full)] == [333, 61_706]
    return {
        "linear Function by hand": (
            Affine,
            (torch.randn(5, 7).double(), torch.randn(3, 7).double(), torch.randn(3).double()),
            True,
        ),
        "conv2d, float32": (nn.Conv2d(3, 5, 3), (torch.randn(2, 3, 7, 7),), True),
        "LeNet-5's layers, 333 parameters": (small, (torch.randn(2, 1, 16, 16).double(),), True),
        "LeNet-5, 61,706 parameters": (full, (torch.randn(2, 1, 32, 32).double(),), False),
    }


def measure_checker(options: Checker) -> Found:
    rows: list[Row] = []
    cases = list(_targets().items())
    for name, (target, inputs, slow) in tqdm(cases[:1] if options.smoke else cases, unit="case"):
        if not check_gradients(target, *inputs).ok:
            raise RuntimeError(f"check_gradients called {name} wrong")
        contestants: dict[str, Work] = {"gradcheck, fast mode": _gradcheck(target, inputs, True)}
        if slow:
            contestants["gradcheck"] = _gradcheck(target, inputs, False)
        contestants["check_gradients"] = partial(check_gradients, target, *inputs)
        rows += compared(name, in_turn(contestants, options), "gradcheck, fast mode")
    notes = [
        "gradcheck is given the same data in float64, which it needs; a module's parameters are "
        "inputs to it too. It compares derivatives with differences once; check_gradients also "
        "probes strides, repeated calls, precisions and ranges.",
        "gradcheck's slow mode is left out at LeNet-5: it runs the network twice for each of its "
        "63,754 inputs.",
    ]  # fmt: skip
    title = f"A check against gradcheck in fast mode, {_short(options)}"
    return Found(rows, {"A check": shown(rows, "check")}, drawn(rows, title, {}), [], notes)


def _gradcheck(target: Any, inputs: tuple[Tensor, ...], fast: bool) -> Work:
    given = [x.detach().double().requires_grad_() for x in inputs]
    if not isinstance(target, nn.Module):
        return lambda: gradcheck(target.apply, given, fast_mode=fast)
    module, count = copy.deepcopy(target).double(), len(given)
    names = [name for name, _ in module.named_parameters()]
    given += [p.detach().clone().requires_grad_() for p in module.parameters()]

    def call(*args: Tensor) -> Any:
        values = dict(zip(names, args[count:], strict=True))
        return functional_call(module, values, args[:count])

    return lambda: gradcheck(call, given, fast_mode=fast)


# --- Memory ---------------------------------------------------------------------------------------

GROWTH = {
    "784-16-16-10, batch 32": CASES["784-16-16-10, batch 32"],
    "CNN, batch 8": Case(CNN, 8),
}
MIB = 2**20


def measure_memory(options: Memory) -> Found:
    rows: list[Row] = []
    growth: list[Row] = []
    names = ("autograd", "by-hand") if options.smoke else ("autograd", "tape", "by-hand")
    for case in tqdm(SMOKE_CASES if options.smoke else CASES, unit="case"):
        peaks = {n: _alone(_peak, n, case, options.device, torch.get_num_threads()) for n in names}
        theirs = peaks["autograd"]["beyond"]
        rows += [
            {"case": case, "contestant": name, "peer": "autograd", **peak,
             **spread([peak["beyond"] / theirs])}
            for name, peak in peaks.items()
        ]  # fmt: skip
    checkpoints = (20, 200) if options.smoke else (1_000, 10_000)
    grown = names[-1:] if options.smoke else names
    for case in tqdm(list(GROWTH)[: 1 if options.smoke else None], unit="case"):
        for name in grown:
            first, last = _alone(
                _levels, name, case, checkpoints, options.device, torch.get_num_threads()
            )
            growth.append({
                "case": case, "contestant": name, "peer": f"itself after {checkpoints[0]:,} steps",
                "resident": [first[0], last[0]], "tensors": [first[1], last[1]],
                **spread([last[0] / first[0]]),
            })  # fmt: skip
    claims = [
        Claim(
            f"{row['case']}: {row['contestant']} keeps no tensor, and 1 MiB more at most, between "
            f"steps {checkpoints[0]:,} and {checkpoints[1]:,} (MiB)",
            1.0, grown, (grown, grown),
            "reproduced" if grown <= 1 and row["tensors"][0] == row["tensors"][1]
            else "not reproduced",
        )
        for row in growth
        for grown in [(row["resident"][1] - row["resident"][0]) / MIB]
    ]  # fmt: skip
    how = "torch.cuda.max_memory_allocated" if options.device == "cuda" else (
        "the running total of what torch's allocator gave and took back, as torch.profiler records "
        "it from before the network is made (the work space of libraries is not in it)"
    )  # fmt: skip
    notes = [
        f"Each number comes from a fresh process. The peak is that of the fourth step, by {how}.",
        "The ratio is of the peaks without parameters, momentum and batch, which all of them need.",
        "Growth: the resident set of the process and the live tensors that Python knows.",
    ]
    tables = {
        "Peak of a step": [
            {
                "case": row["case"],
                "": row["contestant"],
                "all, MiB": f"{row['peak'] / MIB:.3f}",
                "without parameters, momentum and batch, MiB": f"{row['beyond'] / MIB:.3f}",
                "times autograd's": f"{row['ratio']:.2f}",
            }
            for row in rows
        ],
        f"After {checkpoints[0]:,} and after {checkpoints[1]:,} steps": [
            {
                "case": row["case"],
                "": row["contestant"],
                "resident, MiB": " → ".join(f"{level / MIB:.1f}" for level in row["resident"]),
                "live tensors": " → ".join(map(str, row["tensors"])),
            }
            for row in growth
        ],
    }
    by_case: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["contestant"] != "autograd":
            by_case.setdefault(row["case"], {})[row["contestant"]] = row["ratios"]
    figure = figures.speed_ratios(
        by_case, {}, f"Peak memory of a step against autograd's, {_short(options)}",
        "times autograd's peak, without parameters, momentum and batch",
    )  # fmt: skip
    return Found(rows + growth, tables, figure, claims, notes)


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _peak(name: str, case_name: str, device: str, threads: int) -> Row:
    """Bytes at the peak of the fourth step, in all, and beyond parameters, momentum and batch."""
    torch.set_num_threads(threads)
    case = CASES[case_name]
    parameters = sum(p.numel() for p in case.make().parameters())
    needed = 4 * (2 * parameters + case.batch * 28 * 28) + 8 * case.batch
    gc.collect()
    if device == "cuda":
        work = step(name, case.make, case.batch, device)
        for _ in range(3):
            work()
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _profiled_peak(name, case)
    return {"peak": peak, "beyond": peak - needed}


def _profiled_peak(name: str, case: Case) -> int:
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work = step(name, case.make, case.batch)
        for _ in range(3):
            work()
        with record_function("measured"):
            work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    (began,) = (event["ts"] for event in events if event.get("name") == "measured")
    totals = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]"
    )
    before = [total for when, _, total in totals if when < began][-1]
    return max([before, *(total for when, _, total in totals if when >= began)])


def _levels(
    name: str, case_name: str, checkpoints: Sequence[int], device: str, threads: int
) -> list[tuple[int, int]]:
    """(bytes resident, live tensors) after each number of steps."""
    torch.set_num_threads(threads)
    case, done, levels = GROWTH[case_name], 0, []
    work = step(name, case.make, case.batch, device)
    for checkpoint in checkpoints:
        for _ in range(checkpoint - done):
            work()
        done = checkpoint
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        levels.append((_resident(), tensors))
    return levels


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the highest that it ever was
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


# --- Scaling --------------------------------------------------------------------------------------


def measure_scaling(options: Scaling) -> Found:
    few = options.smoke
    batches = (1, 16) if few else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    widths = (16, 64) if few else (16, 32, 64, 128, 256, 512, 1024)
    threads = [2**k for k in range(_cores().bit_length()) if 2**k < _cores()] + [_cores()]
    points: list[tuple[str, int, tuple[int, ...], int, int | None]] = [
        ("batch size", batch, (784, 128, 10), batch, None) for batch in batches
    ]
    points += [("width", width, (784, width, 10), 64, None) for width in widths]
    if options.device == "cpu":
        points += [("threads", count, (784, 512, 256, 10), 256, count) for count in threads]
    rows: list[Row] = []
    usual = torch.get_num_threads()
    for axis, value, sizes, batch, count in tqdm(points, unit="point"):
        torch.set_num_threads(count or usual)
        contestants = {
            name: step(name, partial(MLP, sizes), batch, options.device)
            for name in ("autograd", "by-hand")
        }
        times = in_turn(contestants, options)
        rows += compared(f"{axis} {value}", times, "autograd", axis=axis, value=value, batch=batch)
    torch.set_num_threads(usual)
    for row in rows:
        row["examples a second"] = row["batch"] / row["seconds"]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = panels.setdefault(PANELS[row["axis"]], {})
        lines.setdefault(row["contestant"], []).append((row["value"], row["examples a second"]))
    figure = figures.log_lines(
        panels, "examples a second", f"Training steps by hand and by autograd, {_short(options)}"
    )
    table = shown(rows, "step", examples_a_second=lambda row: f"{row['examples a second']:,.0f}")
    return Found(rows, {"Scaling": table}, figure)


PANELS = {
    "batch size": "batch size (784-128-10)",
    "width": "width of the hidden layer (784-width-10, batch 64)",
    "threads": "threads (784-512-256-10, batch 256)",
}


# --- Startup --------------------------------------------------------------------------------------

STARTS = {
    "import torch": ["-c", "import torch"],
    "import nn_backprop": ["-c", "import nn_backprop"],
    "python -m nn_backprop --help": ["-m", "nn_backprop", "--help"],
}
MORE = 0.3  # seconds


def measure_startup(options: Startup) -> Found:
    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    contestants = {name: partial(start, arguments) for name, arguments in STARTS.items()}
    rounds = 1 if options.smoke else options.rounds
    times = in_turn(contestants, replace(options, turn=1e-3, rounds=rounds))  # a start a turn
    rows = compared("a fresh process", times, "import torch")
    for row in rows:
        row["more"] = [
            mine - theirs
            for mine, theirs in zip(times[row["contestant"]], times["import torch"], strict=True)
        ]
    claims = [
        held(
            f"{row['contestant']} takes at most {MORE} s more than import torch (median over "
            "rounds, in s)", MORE, row["more"], at_most=True,
        )
        for row in rows[1:]
    ]  # fmt: skip
    table = shown(rows, "start", seconds_more=lambda row: f"{statistics.median(row['more']):.3f}")
    title = f"A fresh process against import torch, {_short(options)}"
    return Found(rows, {"Start": table}, drawn(rows, title, {}), claims)


SUBCOMMANDS: dict[type, tuple[str, Callable[[Any], Found]]] = {
    Engines: ("engines", measure_engines),
    TimeToAccuracy: ("time-to-accuracy", measure_time_to_accuracy),
    Many: ("many", measure_many),
    Checker: ("checker", measure_checker),
    Memory: ("memory", measure_memory),
    Scaling: ("scaling", measure_scaling),
    Startup: ("startup", measure_startup),
}


if __name__ == "__main__":
    sys.exit(main())
