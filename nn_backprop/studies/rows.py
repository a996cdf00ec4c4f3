"""The rows of a study: what its trainings left, as they were written, and how to ask them."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nn_backprop.studies.jobs import Row


class Rows(list[Row]):
    """A list of rows, each a dict as JSON gives it: ints stay ints, and rows of two kinds may mix.

    `folder` is where they lie, for a picture that needs another file from there.
    """

    def __init__(self, rows: Iterable[Row] = (), folder: Path | None = None) -> None:
        super().__init__(rows)
        self.folder = folder

    @classmethod
    def read(cls, folder: Path, file: str = "rows.jsonl") -> "Rows":
        """Those of a study's folder, from its rows.jsonl or another file."""
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        return cls(map(json.loads, lines), folder)

    def where(self, **wanted: Any) -> "Rows":
        """Those that have all these values; a row that lacks a key has none."""
        missing = object()
        kept = (row for row in self if all(row.get(k, missing) == v for k, v in wanted.items()))
        return Rows(kept, self.folder)

    def having(self, key: str) -> "Rows":
        """Those that have the key: one kind of rows among others."""
        return Rows((row for row in self if key in row), self.folder)

    def by(self, *keys: str) -> dict[Any, "Rows"]:
        """Groups, in the order of their first rows: by one key's value, or the tuple of several."""
        groups = self._by_tuple(keys)
        return {at[0] if len(keys) == 1 else at: rows for at, rows in groups.items()}

    def values(self, what: str | Callable[[Row], float], scale: float = 1) -> np.ndarray:
        """Numbers times `scale`, float64 (n,), of each row; in the order of the seeds, if any.

        `what` is a key, or makes a number of a row. The rows are one contestant's: raises
        ValueError if two have the same seed, or there are none. Arrays of two contestants subtract
        and divide seed by seed; of different numbers of seeds they raise ValueError, too.
        """
        seeds = [row["seed"] for row in self if "seed" in row]
        if not self or len(set(seeds)) < len(seeds):
            raise ValueError(f"one row a seed is expected, not {len(self)} rows of seeds {seeds}")
        rows = sorted(self, key=lambda row: row["seed"]) if seeds else self
        found = [row[what] if isinstance(what, str) else what(row) for row in rows]
        return scale * np.array(found, dtype=np.float64)

    def one(self, key: str) -> Any:
        """The value that all rows share. Raises ValueError if they differ."""
        first, *others = (row[key] for row in self)
        if any(other != first for other in others):
            raise ValueError(f"{key} is not the same in all rows: {first!r} and others")
        return first

    def best(self, group: Iterable[str], settings: Iterable[str], score: str) -> "Rows":
        """Of each group the rows with its best settings: those of the highest mean score.

        A group has the same values under all keys of `group`, and settings are what stands under
        those of `settings`. The score is of a validation split, lest what is tuned by it be judged
        on the data that tuned it. Of equal means, the settings that come first in the rows are
        taken. Rows keep their order.
        """
        group, settings = tuple(group), tuple(settings)
        best: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for at, rows in self._by_tuple(group).items():
            tried = rows._by_tuple(settings)
            best[at] = max(tried, key=lambda one: statistics.fmean(r[score] for r in tried[one]))
        kept = (row for row in self if _at(row, settings) == best[_at(row, group)])
        return Rows(kept, self.folder)

    def _by_tuple(self, keys: tuple[str, ...]) -> dict[tuple[Any, ...], "Rows"]:
        groups: dict[tuple[Any, ...], Rows] = {}
        for row in self:
            groups.setdefault(_at(row, keys), Rows(folder=self.folder)).append(row)
        return groups


def _at(row: Row, keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row[key] for key in keys)
