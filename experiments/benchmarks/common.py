"""What the measures share: timings in turn, rows of ratios, and how they are shown and judged.

The contestants work in turn, each until the clock has something to read, in an order that is
rotated from round to round, with the garbage collector switched off. A ratio is the peer's time
over the contestant's in the same round. Tables give the median of the rounds and, in brackets, the
lowest and the highest. A bar is reached (`reproduced`) if the whole 95 % interval of the median
lies above it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from nn_backprop import figures, studies
from nn_backprop.studies import Claim, Row, Rows

Work = Callable[[], object]
Times = dict[str, list[float]]  # seconds a call, by contestant and round


@dataclass(frozen=True, kw_only=True)
class Options(studies.Command):
    """What every measure can be asked."""

    least: ClassVar[dict[str, int]] = {"rounds": 1}

    rounds: int = 15
    """Rounds in which every contestant has its turn; verdicts need 6 or more."""
    turn: float = 0.2
    """Seconds that a turn lasts at least."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: int | None = None
    """Processor threads; by default as many as torch takes."""

    def begin(self) -> None:
        """Sets the threads. Raises UsageError for what cannot be measured."""
        if self.threads is not None and self.threads < 1:
            raise studies.UsageError(f"--threads must be 1 or more, not {self.threads}")
        if not 0 < self.turn < math.inf:
            raise studies.UsageError(f"--turn must be a number of seconds above 0, not {self.turn}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise studies.UsageError("--device cuda: torch finds none here; choose cpu")
        if self.threads is not None:
            torch.set_num_threads(self.threads)


class Benchmark(studies.Study):
    """A study that times. `benchmark.py NAME` runs it; its page is results/benchmark-NAME."""

    @property
    def name(self) -> str:
        return f"benchmark-{self.script.stem.replace('_', '-')}"

    @property
    def results(self) -> Path:
        return self.script.parents[1] / "results" / self.name


# --- Timing -------------------------------------------------------------------------------------


def in_turn(contestants: Mapping[str, Work], options: Options) -> Times:
    """Seconds a call, by contestant and round. What comes before the rounds warms up, and finds how
    many calls a turn takes."""
    turn = 0.005 if options.smoke else options.turn
    calls: dict[str, int] = {}
    times: Times = {name: [] for name in contestants}
    names = list(contestants)
    gc.disable()
    try:
        for name, work in contestants.items():
            slow = seconds_of(work, 1, options.device) > 10 * turn
            began, calls[name] = time.perf_counter(), int(slow)
            while not calls[name] or (not slow and time.perf_counter() - began < turn):
                calls[name] += 1
                seconds_of(work, 1, options.device)
        for round_ in range(options.rounds):
            gc.collect()
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                if calls[name] > 1:
                    contestants[name]()  # the others have emptied the caches
                times[name].append(seconds_of(contestants[name], calls[name], options.device))
    finally:
        gc.enable()
    return times


def seconds_of(work: Work, calls: int, device: str) -> float:
    """Seconds a call."""
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (time.perf_counter() - began) / calls


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- Rows ---------------------------------------------------------------------------------------


def compared(case: str, times: Times, peer: str, per: int = 1, **more: Any) -> list[Row]:
    """A row a contestant: its time, and how many times as fast as the peer it was in each round."""
    return [
        {
            "case": case,
            "contestant": name,
            "peer": peer,
            "seconds": statistics.median(seconds) / per,
            **spread([a / b for a, b in zip(times[peer], seconds, strict=True)]),
            **more,
        }
        for name, seconds in times.items()
    ]


def spread(ratios: Sequence[float]) -> Row:
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ratios": list(ratios),
    }


# --- What is made of them -----------------------------------------------------------------------


def times_table(
    rows: Sequence[Row], per: str, **columns: Callable[[Row], str]
) -> list[dict[str, str]]:
    """A line a row, with columns of one's own; an underscore in their names is a space."""
    return [
        {
            "case": row["case"],
            "": row["contestant"],
            f"time a {per}": time_text(row["seconds"]),
            f"times as fast as {row['peer']}": ratio_text(row),
            **{name.replace("_", " "): show(row) for name, show in columns.items()},
        }
        for row in rows
    ]


def ratio_text(row: Row) -> str:
    if row["contestant"] == row["peer"]:
        return "1"
    return f"{row['ratio']:.3g} ({row['lowest']:.3g}–{row['highest']:.3g})"


def time_text(seconds: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def ratios_picture(
    rows: Sequence[Row],
    title: str,
    wanted: Mapping[tuple[str, str], float] | None = None,
    label: str = "",
) -> figures.Figure:
    """The ratios of all contestants but the peer, by case."""
    by_case: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["contestant"] != row["peer"]:
            by_case.setdefault(row["case"], {})[row["contestant"]] = row["ratios"]
    label = label or f"times as fast as {rows[0]['peer']}"
    return figures.speed_ratios(by_case, wanted or {}, title, label)


def bar_claims(rows: Rows, bars: Mapping[tuple[str, str], float]) -> list[Claim]:
    """For each (case, contestant) with a bar, the claim that the median of its ratios reaches it;
    none where there are fewer than the six rounds that an interval needs."""
    return [
        studies.median_between(
            f"{row['case']}: {row['contestant']} is at least {bar} times as fast as {row['peer']} "
            "(median over rounds)", float(bar), row["ratios"], low=bar,
        )
        for row in rows
        if (bar := bars.get((row["case"], row["contestant"]))) and len(row["ratios"]) >= 6
    ]  # fmt: skip
