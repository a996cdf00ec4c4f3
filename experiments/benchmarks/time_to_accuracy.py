"""Seconds of training to a validation accuracy, from a textbook's loop down to the fast preset.

Seconds are those of training, without loading, evaluation and the start of the process. A ratio is
the textbook's median over the seconds of one seed. The textbook's loop ends with the first epoch
whose validation accuracy is the target or more. Cold is the first seed in a fresh process, warm the
median of the later ones in it; a preset is a process of its own for each seed.
"""

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from tqdm import tqdm

from benchmarks import common
from benchmarks.contestants import (
    RUNGS,
    AccuracyOptions,
    Outcome,
    Unavailable,
    data_of,
    preset_run,
    rung_run,
    sklearn_run,
    textbook_run,
)
from nn_backprop import figures, studies
from nn_backprop.studies import Row, Rows, StudyRun, Table


def collect(run: StudyRun, options: AccuracyOptions) -> None:
    options.begin()
    options = replace(options, threads=torch.get_num_threads())  # for other processes, too
    data_of(options)  # fails here, with a sentence, if there is none
    some = slice(1 if options.smoke else None)
    rungs, presets = tuple(RUNGS)[some], ("fast", "accurate")[some]
    contestants: dict[str, Callable[[int, AccuracyOptions], Outcome]] = {
        "textbook": textbook_run,
        "scikit-learn": sklearn_run,
        **{f"preset {name}": partial(preset_run, name) for name in presets},
        **{rung: partial(rung_run, rung) for rung in rungs},
    }
    few = ["textbook", "scikit-learn", *(rung for rung in rungs if RUNGS[rung].few)]
    seeds = dict.fromkeys(contestants, options.seeds) | dict.fromkeys(few, options.textbook_seeds)
    if "preset accurate" in seeds:
        seeds["preset accurate"] = max(1, options.seeds // 2)
    turns = [(seed, n) for seed in range(max(seeds.values())) for n in seeds if seed < seeds[n]]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    with ExitStack() as processes, tqdm(turns, unit="run") as bar:
        # A process of its own for each, which starts with its first seed and stays, so that the
        # first is cold and the later are warm; a preset starts one itself.
        pools = {
            name: processes.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for name in contestants
            if not name.startswith("preset ")
        }
        for seed, name in bar:
            if name not in outcomes:
                continue
            bar.set_postfix_str(f"{name}, seed {seed}")
            try:
                if name in pools:
                    outcome = pools[name].submit(contestants[name], seed, options).result()
                else:
                    outcome = contestants[name](seed, options)
                outcomes[name].append(outcome)
            except Unavailable as error:
                tqdm.write(f"{name} is left out: {error}")
                del outcomes[name]
    run.add([_row(name, got, outcomes["textbook"], options) for name, got in outcomes.items()])


def _row(name: str, got: list[Outcome], textbook: list[Outcome], options: AccuracyOptions) -> Row:
    seconds = [outcome.seconds for outcome in got]
    peer = statistics.median(outcome.seconds for outcome in textbook)
    return {
        "case": options.data, "contestant": name, "peer": "textbook", "target": options.to_reach,
        "seeds": len(got), "seconds": statistics.median(seconds), "cold": seconds[0],
        "warm": statistics.median(seconds[1:]) if seconds[1:] else None,
        "epoch_seconds": statistics.median(outcome.epoch_seconds for outcome in got),
        "epochs": [outcome.epochs for outcome in got],
        "validation": [outcome.validation for outcome in got],
        "test": [outcome.test for outcome in got],
        "reached": sum(outcome.validation >= options.to_reach for outcome in got),
        "all_seconds": seconds, **common.spread([peer / mine for mine in seconds]),
    }  # fmt: skip


def _mean_sd(shares: Sequence[float]) -> str:
    percent = [100 * share for share in shares]
    return studies.mean_sd(percent) if len(percent) > 1 else f"{percent[0]:.2f}"


def tables(rows: Rows) -> dict[str, Table]:
    time_text = common.time_text
    return {
        "Time to accuracy": [
            {
                "": row["contestant"],
                "seeds": row["seeds"],
                "training": time_text(row["seconds"]),
                "cold; warm": "; ".join(time_text(row[k]) for k in ("cold", "warm") if row[k]),
                "an epoch": time_text(row["epoch_seconds"]),
                "validation, %": _mean_sd(row["validation"]),
                f"≥ {100 * row['target']:g} %": f"{row['reached']} of {row['seeds']}",
                "test, %": _mean_sd(row["test"]),
                "times as fast as textbook": common.ratio_text(row),
            }
            for row in rows
        ]
    }


def picture(rows: Rows) -> figures.Figure:
    return figures.time_against_accuracy(
        {row["contestant"]: (row["all_seconds"], row["validation"]) for row in rows},
        rows.one("target"),
        f"Training on {rows.one('case')} against the textbook's loop",
    )


STUDY = common.Benchmark(AccuracyOptions, collect, lambda rows: [], tables, picture)
