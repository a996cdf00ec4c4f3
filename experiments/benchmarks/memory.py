"""The peak memory of a step against autograd's, and what has grown after 10,000 steps.

Each number comes from a fresh process. The peak is that of the fourth step. On a processor it is
the running total of what torch's allocator gave and took back, as torch.profiler records it from
before the network is made (the work space of libraries is not in it); on a GPU it is
torch.cuda.max_memory_allocated. The ratio is of the peaks without parameters, momentum and batch,
which all contestants need. What grows is the resident set of the process and the number of live
tensors that Python knows.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import common
from benchmarks.training_step import CASES, SMOKE_CASES, Case, step
from nn_backprop import figures
from nn_backprop.models import CNN
from nn_backprop.studies import Claim, Row, Rows, StudyRun, Table, counted

GROWTH = {
    "784-16-16-10, batch 32": CASES["784-16-16-10, batch 32"],
    "CNN, batch 8": Case(CNN, 8),
}
MIB = 2**20
ITSELF = "itself after "  # the peer in rows of growth


def collect(run: StudyRun, options: common.Options) -> None:
    options.begin()
    names = ("autograd", "by-hand") if options.smoke else ("autograd", "tape", "by-hand")
    threads = torch.get_num_threads()
    for case in tqdm(SMOKE_CASES if options.smoke else CASES, unit="case"):
        peaks = {name: _alone(_peak, name, case, options.device, threads) for name in names}
        run.add([
            {"case": case, "contestant": name, "peer": "autograd", **peak,
             **common.spread([peak["beyond"] / peaks["autograd"]["beyond"]])}
            for name, peak in peaks.items()
        ])  # fmt: skip
    checkpoints = (20, 200) if options.smoke else (1_000, 10_000)
    for case in tqdm(list(GROWTH)[: 1 if options.smoke else None], unit="case"):
        for name in names[-1:] if options.smoke else names:
            first, last = _alone(_levels, name, case, checkpoints, options.device, threads)
            run.add([{
                "case": case, "contestant": name,
                "peer": f"{ITSELF}{checkpoints[0]:,} steps", "steps": checkpoints,
                "resident": [first[0], last[0]], "tensors": [first[1], last[1]],
                **common.spread([last[0] / first[0]]),
            }])  # fmt: skip


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
        peak = profiled_peak(name, case)
    return {"peak": peak, "beyond": peak - needed}


def profiled_peak(name: str, case: Case) -> int:
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


def claims(rows: Rows) -> list[Claim]:
    """A tensor that is kept refutes the claim whatever the process has grown by."""
    found = []
    for row in rows.having("resident"):
        grown = (row["resident"][1] - row["resident"][0]) / MIB
        first, last = (f"{steps:,}" for steps in row["steps"])
        found.append(counted(
            f"{row['case']}: {row['contestant']} keeps no tensor, and 1 MiB more at most, between "
            f"steps {first} and {last} (MiB)",
            1.0, grown, high=1 if row["tensors"][0] == row["tensors"][1] else float("-inf"),
        ))  # fmt: skip
    return found


def tables(rows: Rows) -> dict[str, Table]:
    peaks, growth = rows.having("peak"), rows.having("resident")
    first, last = (f"{steps:,}" for steps in growth[0]["steps"])
    return {
        "Peak of a step": [
            {
                "case": row["case"],
                "": row["contestant"],
                "all, MiB": f"{row['peak'] / MIB:.3f}",
                "without parameters, momentum and batch, MiB": f"{row['beyond'] / MIB:.3f}",
                "times autograd's": f"{row['ratio']:.2f}",
            }
            for row in peaks
        ],
        f"After {first} and after {last} steps": [
            {
                "case": row["case"],
                "": row["contestant"],
                "resident, MiB": " → ".join(f"{level / MIB:.1f}" for level in row["resident"]),
                "live tensors": " → ".join(map(str, row["tensors"])),
            }
            for row in growth
        ],
    }


def picture(rows: Rows) -> figures.Figure:
    return common.ratios_picture(
        rows.having("peak"), "Peak memory of a step against autograd's",
        label="times autograd's peak, without parameters, momentum and batch",
    )  # fmt: skip


STUDY = common.Benchmark(common.Options, collect, claims, tables, picture)
