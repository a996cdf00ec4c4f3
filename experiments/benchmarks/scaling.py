"""Examples a second over batch sizes, widths and threads, by hand against autograd."""

import os
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from benchmarks import common
from benchmarks.training_step import step
from nn_backprop import figures
from nn_backprop.models import MLP
from nn_backprop.studies import Rows, StudyRun, Table

PANELS = {
    "batch size": "batch size (784-128-10)",
    "width": "width of the hidden layer (784-width-10, batch 64)",
    "threads": "threads (784-512-256-10, batch 256)",
}


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(common.Options):
    """Examples a second over batch sizes, widths and threads, by hand against autograd."""

    rounds: int = 7


def collect(run: StudyRun, options: ScalingOptions) -> None:
    options.begin()
    batches = (1, 16) if options.smoke else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    widths = (16, 64) if options.smoke else (16, 32, 64, 128, 256, 512, 1024)
    points: list[tuple[str, int, tuple[int, ...], int, int | None]] = [
        ("batch size", batch, (784, 128, 10), batch, None) for batch in batches
    ]
    points += [("width", width, (784, width, 10), 64, None) for width in widths]
    if options.device == "cpu":
        points += [("threads", count, (784, 512, 256, 10), 256, count) for count in _threads()]
    usual = torch.get_num_threads()
    for axis, value, sizes, batch, count in tqdm(points, unit="point"):
        torch.set_num_threads(count or usual)
        contestants = {
            name: step(name, partial(MLP, sizes), batch, options.device)
            for name in ("autograd", "by-hand")
        }
        times = common.in_turn(contestants, options)
        rows = common.compared(
            f"{axis} {value}", times, "autograd", axis=axis, value=value, batch=batch
        )
        run.add([row | {"examples a second": batch / row["seconds"]} for row in rows])
    torch.set_num_threads(usual)


def _threads() -> list[int]:
    """Powers of two, up to the cores that this process may use; and those."""
    usable = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    return [2**k for k in range(cores.bit_length()) if 2**k < cores] + [cores]


def tables(rows: Rows) -> dict[str, Table]:
    def examples(row: dict) -> str:
        return f"{row['examples a second']:,.0f}"

    return {"Scaling": common.times_table(rows, "step", examples_a_second=examples)}


def picture(rows: Rows) -> figures.Figure:
    panels = {
        PANELS[axis]: {
            name: [(row["value"], row["examples a second"]) for row in line]
            for name, line in part.by("contestant").items()
        }
        for axis, part in rows.by("axis").items()
    }
    title = "Training steps by hand and by autograd"
    return figures.log_lines(panels, "examples a second", title)


STUDY = common.Benchmark(ScalingOptions, collect, lambda rows: [], tables, picture)
