"""A study: a question, trainings over seeds, and what their rows come to."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tyro
from tqdm import tqdm

from nn_backprop.data import DataError
from nn_backprop.errors import UsageError
from nn_backprop.figures import Figure, save
from nn_backprop.studies import page
from nn_backprop.studies.evidence import Claim
from nn_backprop.studies.jobs import Job, Row, StudyError, results
from nn_backprop.studies.page import Table
from nn_backprop.studies.rows import Rows
from nn_backprop.tracking import Run, RunError, default_run_dir, describe_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every study can be asked, one that trains nothing, too; a script adds its own."""

    least: ClassVar[dict[str, int]] = {}
    """Of each count the least that is accepted, which is also what a smoke run has."""

    smoke: bool = False
    """A small version on the embedded digits, in seconds."""
    page: bool = False
    """Measure nothing: renew the tables, claims and picture in results/ from the rows there."""


@dataclasses.dataclass(frozen=True)
class Options(Command):
    """What every study over seeds can be asked."""

    least: ClassVar[dict[str, int]] = {"seeds": 2, "workers": 1}

    seeds: int = 5
    """Number of seeds, from 0."""
    workers: int = 2
    """Trainings at the same time, each on one processor thread."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a script defines, and what its command does with it.

    `collect(run, options)` trains: it calls `run.train_all`, once or more. The other three are
    functions of the rows alone, so that a page can be made of a committed rows.jsonl. `picture` may
    return None where it needs a file that is not in `rows.folder`: the old picture stays.
    """

    options: type[Command]
    collect: Callable[["StudyRun", Any], None]
    claims: Callable[[Rows], Sequence[Claim]]
    tables: Callable[[Rows], Mapping[str, Table]]
    picture: Callable[[Rows], Figure | None]

    @property
    def script(self) -> Path:
        """Where `collect` stands."""
        return Path(self.collect.__code__.co_filename)

    @property
    def name(self) -> str:
        """That of the script."""
        return self.script.stem

    @property
    def results(self) -> Path:
        """The committed results of a full run: results/<study> beside the script."""
        return self.script.parent / "results" / self.name

    def main(self, arguments: list[str] | None = None) -> int:
        """Reads the options, trains, writes and shows the results; returns the exit code.

        0 done, 1 if a training diverged or its process was killed, 2 bad input, 130 interrupted.
        What is not 0 is explained in one sentence, with the folder if there is one by then.
        """
        doc = sys.modules[self.collect.__module__].__doc__
        asked = tyro.cli(self.options, args=arguments, description=doc)
        smallest: dict[str, Any] = asked.least if asked.smoke else {}
        options = dataclasses.replace(asked, **smallest)
        run = StudyRun(self.name, options)
        try:
            for count, least in asked.least.items():
                if getattr(asked, count) < least:
                    option = f"--{count.replace('_', '-')}"
                    raise UsageError(
                        f"{option} must be {least} or more, not {getattr(asked, count)}"
                    )
            if asked.page:
                self.renew_page()
                print(f"Written anew from its rows: {self.results}")
            else:
                with run:
                    self.collect(run, options)
                    self._finish(run)
            return 0
        except (UsageError, RunError) as error:
            code, why = 2, f"{error}"
        except DataError as error:
            code, why = 2, f"{error}; --smoke needs neither files nor network"
        except StudyError as error:
            code, why = 1, f"{error}"
        except KeyboardInterrupt:
            code, why = 130, "interrupted"
        if run.folder.exists():
            why += f"; the rows so far are in {run.folder}"
        print(f"{self.script.name}: {why}", file=sys.stderr)
        return code

    def renew_page(self) -> None:
        """Writes tables, claims and picture of the committed results from their rows.

        Raises UsageError if there are none, or the page's blocks are not those of the rows.
        """
        folder = self.results
        if not (folder / "rows.jsonl").exists():
            raise UsageError(f"{folder} has no rows.jsonl: copy there what a full run has left")
        rows, about = Rows.read(folder), page.read_about(folder)
        claims = self.claims(rows)
        blocks = page.blocks(self.tables(rows), claims, len(rows), about)
        text = page.renewed((folder / "README.md").read_text(encoding="utf-8"), blocks)
        (folder / "README.md").write_text(text, encoding="utf-8")
        page.write_claims(folder, claims, about)
        if figure := self.picture(rows):
            save(figure, folder / "picture.png")

    def _finish(self, run: "StudyRun") -> None:
        """Writes claims.json, README.md and picture.png into the run's folder; prints the tables.

        The rows are written once more, in the order of the jobs. The claims of a smoke test say
        that they are of one.
        """
        rows = Rows(run.rows, run.folder)
        page.write_rows(run.folder, rows)
        claims = list(self.claims(rows))
        if run.options.smoke:
            claims = [dataclasses.replace(c, claim=f"{c.claim} (smoke: not MNIST)") for c in claims]
        about = {
            "experiment": run.name,
            "config": {k: v for k, v in dataclasses.asdict(run.options).items() if k != "page"},
            "machine": describe_machine(),
            "seconds": time.perf_counter() - run.began,
        }
        page.write_claims(run.folder, claims, about)
        text = page.plain_page(page.blocks(self.tables(rows), claims, len(rows), about))
        (run.folder / "README.md").write_text(text, encoding="utf-8")
        if figure := self.picture(rows):
            png = run.opened.figure("results", figure, len(rows))
            (run.folder / "picture.png").write_bytes(png)
        print(f"\n{text}\nTables, rows, claims and picture: {shlex.quote(str(run.folder))}")


class StudyRun:
    """A study under way: its folder, which is a TensorBoard run too, and its rows so far.

    `folder` is `runs/<name>/<date>-<time>-<full|smoke>`, made before the first training. Each row
    is added to rows.jsonl in it as it arrives, so that a study that ends early has lost none.
    """

    def __init__(self, name: str, options: Command) -> None:
        self.name, self.options = name, options
        self.folder = default_run_dir(name, "smoke" if options.smoke else "full")
        self.rows: list[Row] = []
        self.began = time.perf_counter()
        self._opened: Run | None = None
        self._jobs_done = 0

    def __enter__(self) -> "StudyRun":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def opened(self) -> Run:
        """The run directory, made when it is first asked for."""
        if self._opened is None:
            config = {"options": dataclasses.asdict(self.options), **describe_machine()}
            self._opened = Run.create(self.folder, config)
        return self._opened

    def train_all(
        self,
        train: Callable[[Job], Row | list[Row]],
        jobs: Sequence[Job],
        tag: Callable[[Row], Mapping[str, float]] = lambda row: {},
    ) -> Rows:
        """Every job's row or rows, in the order of the jobs; a progress bar meanwhile.

        They are added to `rows`, too. `tag(row)` names numbers of it for TensorBoard, where the
        step is how many jobs are done. Raises StudyError if a training diverges or its process is
        killed.
        """
        run = self.opened
        found: dict[int, list[Row]] = {}
        with tqdm(total=len(jobs), unit="training", desc=train.__name__.strip("_")) as bar:
            for number, result in results(train, jobs, getattr(self.options, "workers", 1)):
                found[number] = result if isinstance(result, list) else [result]
                self._append(found[number])
                self._jobs_done += 1
                tags = {name: x for row in found[number] for name, x in tag(row).items()}
                run.log(self._jobs_done, 0, {"done": float(self._jobs_done), **tags})
                bar.update()
        rows = Rows((row for number in range(len(jobs)) for row in found[number]), self.folder)
        self.rows += rows
        return rows

    def add(self, rows: Sequence[Row]) -> None:
        """Rows that are no trainings, such as timings."""
        self._append(rows)
        self.rows += rows

    def _append(self, rows: Sequence[Row]) -> None:
        with open(self.opened.path / "rows.jsonl", "a", encoding="utf-8") as kept:
            kept.writelines(map(page.line_of, rows))
