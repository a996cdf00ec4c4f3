"""The time of a training step, gradients and update, by each engine, against autograd's.

A step is gradients and SGD with momentum 0.9. autograd, the tape and torch.compile have torch's
SGD, fused; by hand has what train.py has for it, LeanSGD of one flat parameter, and once torch's.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import common
from benchmarks.training_step import CASES, FIRST, SMOKE_CASES, TORCHS, Case, step
from nn_backprop import figures
from nn_backprop.models import CNN
from nn_backprop.studies import Claim, Row, Rows, StudyRun, Table

LARGEST = ("784-512-256-10, batch 256", "CNN, batch 128")
TAPE = 1.0  # the tape's bar, everywhere
WANTED = {(name, "tape"): TAPE for name in CASES} | {
    (name, engine): bar for name, case in CASES.items() for engine, bar in case.wanted.items()
}


@dataclass(frozen=True, kw_only=True)
class EnginesOptions(common.Options):
    """The time of a training step by each engine, against autograd's."""

    compile: bool = True
    """Whether torch.compile takes part, whose compilation lasts minutes."""


def collect(run: StudyRun, options: EnginesOptions) -> None:
    options.begin()
    for name in tqdm(SMOKE_CASES if options.smoke else CASES, unit="case"):
        run.add(_case_rows(name, options))


def _case_rows(name: str, options: EnginesOptions) -> list[Row]:
    case = CASES[name]
    contestants: dict[str, common.Work] = {
        engine: step(engine, case.make, case.batch, options.device)
        for engine in ("autograd", "tape", "by-hand", TORCHS if case.make is not CNN else FIRST)
    }
    compile_seconds = None
    if options.compile and not options.smoke:
        began = time.perf_counter()
        try:
            contestants["torch.compile"] = step(
                "torch.compile", case.make, case.batch, options.device
            )
            contestants["torch.compile"]()
            compile_seconds = round(time.perf_counter() - began, 1)
        except Exception as error:  # no C++ compiler, or one of many ways in which it fails
            del contestants["torch.compile"]
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            tqdm.write(f"torch.compile is left out at {name}: {reason}")
    side = 256 if options.smoke else 2048
    large = name in LARGEST or options.smoke
    if large:
        contestants["peak"] = _matrix_product(side, options.device)
    times = common.in_turn(contestants, options)
    rates = [2 * side**3 / seconds for seconds in times.pop("peak")] if large else []
    rows = common.compared(name, times, "autograd")
    if compile_seconds is not None:
        rows[-1]["compile_seconds"] = compile_seconds
    return rows + [_share(name, case, engine, times[engine], rates)
                   for engine in ("autograd", "by-hand") if large]  # fmt: skip


def _share(name: str, case: Case, engine: str, seconds: list[float], rates: list[float]) -> Row:
    """Of the rate of a matrix product, timed in the same rounds, the share that a step reaches."""
    operations = operations_of(case)
    reached = [operations / s / rate for s, rate in zip(seconds, rates, strict=True)]
    return {
        "case": name, "contestant": engine, "peer": "matrix product", "operations": operations,
        "peak": statistics.median(rates), **common.spread(reached),
    }  # fmt: skip


def _matrix_product(side: int, device: str) -> common.Work:
    a, b, out = torch.randn(3, side, side, device=device)
    return lambda: torch.mm(a, b, out=out)


def operations_of(case: Case) -> int:
    """Multiplications and additions of matrix products and convolutions, forward and backward."""
    model = case.make()
    with FlopCounterMode(display=False) as counter:
        inputs, targets = torch.randn(case.batch, 1, 28, 28), torch.randint(10, (case.batch,))
        model.loss(model(inputs), targets).backward()  # type: ignore[operator]
    return int(counter.get_total_flops())


def claims(rows: Rows) -> list[Claim]:
    return common.bar_claims(rows.where(peer="autograd"), WANTED)


def tables(rows: Rows) -> dict[str, Table]:
    return {
        "A training step": common.times_table(rows.where(peer="autograd"), "step"),
        "Share of the rate of a large matrix product, float32": [
            {
                "case": row["case"],
                "": row["contestant"],
                "operations a step": f"{row['operations'] / 1e6:.4g} million",
                "matrix product": f"{row['peak'] / 1e9:.3g} GFLOP/s",
                "share reached": f"{100 * row['ratio']:.3g} % "
                f"({100 * row['lowest']:.3g}–{100 * row['highest']:.3g})",
            }
            for row in rows.where(peer="matrix product")
        ],
    }


def picture(rows: Rows) -> figures.Figure:
    return common.ratios_picture(
        rows.where(peer="autograd"), "A training step against autograd's", WANTED
    )


STUDY = common.Benchmark(EnginesOptions, collect, claims, tables, picture)
