"""What those studies have in common that are no `Study` yet.

A study trains many networks. Each training is a job: a call of a module-level function with one
argument that can be pickled, and its result is a row, a dict of plain numbers and words. Jobs are
shared out to processes of one thread each: two networks side by side use two cores better than one
network that is split between them.
"""

import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from tqdm import tqdm

from nn_backprop import figures
from nn_backprop.data import DataError
from nn_backprop.errors import UsageError
from nn_backprop.studies.evidence import Claim, markdown_table, write_results
from nn_backprop.tracking import Run, RunError, default_run_dir, describe_machine
from nn_backprop.training import Diverged

Job = TypeVar("Job")
Row = dict[str, Any]


class StudyError(Exception):
    """A training that could not be brought to its end, in one sentence."""


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What every study can be told; a script adds its own."""

    seeds: int = 5
    """Number of seeds, from 0; at least 2."""
    workers: int = 2
    """Trainings at the same time, each on one processor thread."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""
    smoke: bool = False
    """Two seeds of a small version on the embedded digits, in seconds."""


Options = TypeVar("Options", bound=StudyOptions)


def command(kind: type[Options], doc: str | None, conduct: Callable[["Study", Options], None],
            arguments: list[str] | None = None) -> int:  # fmt: skip
    """Reads the options, conducts the study, and returns the exit code.

    0 done, 1 if a training diverged or its process was killed, 2 bad input, 130 interrupted; what
    is not 0 is told in one sentence, with the folder if there is one by then. The study is named
    after the script in which `conduct` stands.
    """
    name = Path(conduct.__code__.co_filename).stem
    options = asked = tyro.cli(kind, args=arguments, description=doc)
    if asked.smoke:
        options = dataclasses.replace(asked, seeds=2, workers=1)
    study = Study(name, options)
    try:
        if asked.seeds < 2:
            raise UsageError(f"--seeds must be 2 or more, not {asked.seeds}")
        if asked.workers < 1:
            raise UsageError(f"--workers must be 1 or more, not {asked.workers}")
        with study:
            conduct(study, options)
        return 0
    except (UsageError, RunError) as error:
        code, told = 2, f"{error}"
    except DataError as error:
        code, told = 2, f"{error}; --smoke needs neither files nor network"
    except StudyError as error:
        code, told = 1, f"{error}"
    except KeyboardInterrupt:
        code, told = 130, "interrupted"
    if study.folder.exists():
        told += f"; the rows so far are in {study.folder}"
    print(f"{name}.py: {told}", file=sys.stderr)
    return code


class Study:
    """A study under way: its folder, which is a TensorBoard run too, and its trainings.

    `folder` is `runs/<name>/<date>-<time>-<full|smoke>`, made before the first training. Each row
    is added to rows.jsonl in it as it arrives, so that a study that ends early has lost none.
    """

    def __init__(self, name: str, options: StudyOptions) -> None:
        self.name, self.options = name, options
        self.folder = default_run_dir(name, "smoke" if options.smoke else "full")
        self.rows: list[Row] = []
        self._began = time.perf_counter()
        self._opened: Run | None = None

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def run(self) -> Run:
        """The run directory, made when it is first asked for."""
        if self._opened is None:
            config = {"options": dataclasses.asdict(self.options), **describe_machine()}
            self._opened = Run.create(self.folder, config)
        return self._opened

    def carry_out(
        self,
        function: Callable[[Job], Row],
        jobs: Sequence[Job],
        tag: Callable[[Row], Mapping[str, float]] = lambda row: {},
    ) -> list[Row]:
        """Every job's row, in the order of the jobs; a progress bar meanwhile.

        Rows are added to `rows`. `tag(row)` names numbers of it for TensorBoard, where the step is
        how many jobs are done. Raises StudyError if a training diverges or its process is killed.
        """
        run = self.run
        found: dict[int, Row] = {}
        bar = tqdm(total=len(jobs), unit="training", desc=function.__name__.strip("_"))
        with bar, open(self.folder / "rows.jsonl", "a", buffering=1, encoding="utf-8") as kept:
            for number, row in _results(function, jobs, self.options.workers):
                found[number] = row
                kept.write(json.dumps(row) + "\n")
                step = len(self.rows) + len(found)
                run.log(step, 0, {"done": float(step), **tag(row)})
                bar.update()
        rows = [found[number] for number in range(len(jobs))]
        self.rows += rows
        return rows

    def finish(
        self,
        tables: Mapping[str, Sequence[Mapping[str, Any]]],
        claims: Sequence[Claim],
        figure: figures.Figure,
    ) -> None:
        """Writes results.json, .md and .png; prints tables and verdicts; shows the picture.

        `tables` by title, what the rows come to. The Markdown file holds tables and verdicts. The
        claims of a smoke test say that they are of one.
        """
        if self.options.smoke:
            claims = [
                dataclasses.replace(claim, claim=f"{claim.claim} (smoke: not MNIST)")
                for claim in claims
            ]
        seconds = time.perf_counter() - self._began
        about = describe_machine()
        config = dataclasses.asdict(self.options)
        write_results(
            self.folder / "results.json", self.name, config, self.rows, claims, about, seconds
        )
        png = self.run.figure("results", figure, len(self.rows))
        (self.folder / "results.png").write_bytes(png)
        if claims:
            tables = {**tables, "Claims": [_told(claim) for claim in claims]}
        text = "\n".join(f"**{title}**\n\n{markdown_table(rows)}" for title, rows in tables.items())
        text += (
            f"\n{len(self.rows)} rows in {seconds / 60:.1f} minutes; "
            f"{about['processor']}, {self.options.workers} processes of one thread, "
            f"torch {about['versions']['torch']}\n"
        )
        (self.folder / "results.md").write_text(text, encoding="utf-8")
        print(f"\n{text}\nTables, picture and results.json: {shlex.quote(str(self.folder))}")


def _told(claim: Claim) -> dict[str, str]:
    low, high = claim.interval
    return {
        "claim": claim.claim,
        "published": "–" if claim.published is None else f"{claim.published}",
        "measured": f"{claim.measured:.4g}",
        "95 % interval": f"{low:.4g} to {high:.4g}",
        "verdict": f"**{claim.verdict}**",
    }


def _results(
    function: Callable[[Job], Row], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Row]]:
    """(number of the job, its row), in the order in which they are done."""
    tasks = [(function, number, job) for number, job in enumerate(jobs)]
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(_carry_out, tasks)
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned, since a forked torch may hang; they import the script anew, once each.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, _begin) as pool:
        try:
            # Each begins as a task is submitted, and inherits that Ctrl-C is ignored, even while it
            # imports; the price is that one in these milliseconds must be repeated.
            hears = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                futures = [pool.submit(_carry_out, task) for task in tasks]
            finally:
                signal.signal(signal.SIGINT, hears)
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise StudyError(
                "the process of a training was killed, perhaps for want of memory: try --workers 1"
            ) from None
        except BaseException:  # Ctrl-C, for one
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin() -> None:
    """In each process of trainings: one thread; and if the study itself is killed, so is this."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _carry_out(task: tuple[Callable[[Any], Row], int, Any]) -> tuple[int, Row]:
    function, number, job = task
    try:
        return number, function(job)
    except Diverged as error:
        what, _, _ = str(error).partition(":")  # goes on with advice for one who chose the rate
        raise StudyError(f"a training diverged, {job}: {what}") from None
