"""A hypothesis that raises costs the others nothing, and is written down; in tests it raises."""

from collections.abc import Iterator
from contextlib import contextmanager

STRICT = False  # whether what a family of hypotheses raises is raised on


@contextmanager
def guarded(name: str, failures: list[str]) -> Iterator[None]:
    """Appends one line to `failures` for what is raised inside."""
    try:
        yield
    except Exception as error:  # a stranger's forward may do anything
        if STRICT:
            raise
        line = f"{name}: {type(error).__name__}: {error}"
        if line not in failures:
            failures.append(line)
