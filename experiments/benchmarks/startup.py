"""The time of an import and of --help in fresh processes, against import torch."""

import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial

from benchmarks import common
from nn_backprop import studies
from nn_backprop.studies import Claim, Row, Rows, StudyRun, Table

STARTS = {
    "import torch": ["-c", "import torch"],
    "import nn_backprop": ["-c", "import nn_backprop"],
    "python -m nn_backprop --help": ["-m", "nn_backprop", "--help"],
}
MORE = 0.3  # seconds


def collect(run: StudyRun, options: common.Options) -> None:
    options.begin()

    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    contestants = {name: partial(start, arguments) for name, arguments in STARTS.items()}
    times = common.in_turn(contestants, replace(options, turn=1e-3, smoke=False))  # a start a turn
    run.add([
        row | {"more": [
            mine - torchs
            for mine, torchs in zip(times[row["contestant"]], times["import torch"], strict=True)
        ]}
        for row in common.compared("a fresh process", times, "import torch")
    ])  # fmt: skip


def claims(rows: Rows) -> list[Claim]:
    return [
        studies.median_between(
            f"{row['contestant']} takes at most {MORE} s more than import torch (median over "
            "rounds, in s)", MORE, row["more"], high=MORE,
        )
        for row in rows
        if row["contestant"] != row["peer"] and len(row["more"]) >= 6
    ]  # fmt: skip


def tables(rows: Rows) -> dict[str, Table]:
    def more(row: Row) -> str:
        return f"{statistics.median(row['more']):.3f}"

    return {"Start": common.times_table(rows, "start", seconds_more=more)}


STUDY = common.Benchmark(
    common.Options, collect, claims, tables,
    picture=lambda rows: common.ratios_picture(rows, "A fresh process against import torch"),
)  # fmt: skip
