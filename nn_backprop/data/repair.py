"""Make the four MNIST files good: extract, copy or download what is missing or damaged."""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from nn_backprop.data.download import download, mirrors, write
from nn_backprop.data.files import (
    MISSING,
    NAMES,
    OFFICIAL,
    OK,
    DataError,
    raw_folder,
    state,
    user_cache,
    verify,
)

LOCK_SECONDS = 300.0


def prepare(root: str | Path, say: Callable[[str], object] = print) -> Path:
    """A root whose ``MNIST/raw`` holds the four official files, uncompressed and verified.

    It is ``root`` itself, and nothing is written, if they are good there. What is not good is
    extracted from a good archive beside it, else downloaded; a file is replaced only by a verified
    one. If root cannot be written, the user's cache takes its place, else a temporary folder.
    Processes that prepare one root at the same time take turns. ``say`` is told each thing done.

    Raises DataError if a file can neither be repaired nor downloaded, if no folder can be
    written, or if another process holds the lock for minutes.
    """
    root = Path(root)

    def tell(line: str) -> None:
        say(f"MNIST: {line}")

    def good(place: Path) -> bool:
        return set(verify(place).values()) == {OK}

    return settle("MNIST", "MNIST/.lock", root, good, lambda place: _fill(place, root, tell), tell)


def settle(
    what: str,
    lock: str,
    root: Path,
    good: Callable[[Path], bool],
    fill: Callable[[Path], None],
    say: Callable[[str], object],
) -> Path:
    """The first that is good, or can be filled, of root, the user's cache and a temporary folder.

    fill(place) is called while the file called lock under place is locked; an OSError of its makes
    the next folder be tried. Raises DataError, which names what is to be stored, if no folder can
    be written or another process holds the lock for minutes, and lets those of fill pass.
    """
    refusals = []
    for place in (root, user_cache(), Path(tempfile.gettempdir()) / "nn_backprop"):
        if good(place):
            return place
        try:
            (place / lock).parent.mkdir(parents=True, exist_ok=True)
            with _locked(place / lock, what, say):
                fill(place)
            return place
        except OSError as error:
            refusals.append(f"{place} cannot be written ({error.strerror or error})")
            say(f"{refusals[-1]}; trying elsewhere")
    raise DataError(f"{what} cannot be stored: {', '.join(refusals)}; name a folder by --data-root")


@contextmanager
def _locked(path: Path, what: str, say: Callable[[str], object]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            say(f"waiting for another process, which holds {path}")
            lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise DataError(
            f"another process has held {path} for {LOCK_SECONDS:.0f} s: "
            f"wait until it has fetched {what}, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _fill(place: Path, root: Path, say: Callable[[str], object]) -> None:
    """Make the files under place good, from what is under place and root, else by download."""
    bases: list[str] = []
    here, there = raw_folder(place), raw_folder(root)
    here.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if state(here / name) == OK:
            continue
        found = state(there / name)
        if found not in (OK, MISSING):
            say(f"{there / name} is {found}; taking a good one instead")
        archive = here / f"{name}.gz"
        sources = (there / name, archive, there / archive.name)
        source = next((path for path in sources if state(path) == OK), None)
        if source is None:
            try:
                bases = bases or mirrors()
                urls = [f"{base.rstrip('/')}/{archive.name}" for base in bases]
                worked = download(archive, OFFICIAL[archive.name], urls, say)
                bases.insert(0, bases.pop(urls.index(worked)))
            except DataError as error:
                raise DataError(
                    f"{there / name} is {found} and could not be downloaded ({error}): "
                    f"put the four files, plain or .gz, into {here}, or set $NN_BACKPROP_DATA to "
                    "a folder that has them in MNIST/raw, or $NN_BACKPROP_MNIST_URL to a mirror"
                ) from error
            source = archive
        say(f"writing {here / name} from {source}")
        with gzip.open(source) if source.suffix == ".gz" else open(source, "rb") as file:
            write(here / name, OFFICIAL[name], iter(partial(file.read, 1 << 20), b""))
