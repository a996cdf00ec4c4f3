"""Download one file from the first mirror that has it, without ever hanging."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from nn_backprop.data.files import OFFICIAL, OK, DataError, state
from nn_backprop.data.vision import torchvision_mnist

ATTEMPT_SECONDS = 8.0  # without a byte, after which the next mirror is tried
QUIET_SECONDS = 20.0  # without a byte from any mirror, after which the download is given up
ROUNDS = 2  # over all mirrors
PAUSE_SECONDS = 1.0  # between rounds


def mirrors() -> list[str]:
    """Base URLs: those in $NN_BACKPROP_MNIST_URL, separated by spaces, else torchvision's."""
    return os.environ.get("NN_BACKPROP_MNIST_URL", "").split() or list(torchvision_mnist().mirrors)


def write(target: Path, pieces: Iterable[bytes]) -> None:
    """Write pieces to a temporary name, and rename it to target if they are the official file.

    Raises DataError if they are not, OSError if the folder cannot be written; target is then as it
    was, and nothing is left beside it.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a process that was killed
        with open(part, "xb") as file:
            for piece in pieces:
                file.write(piece)
                if file.tell() > OFFICIAL[target.name].size:
                    break
        problem = state(part, target.name)
        if problem != OK:
            raise DataError(f"the content is {problem}")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def stream(url: str, patience: float) -> Iterator[bytes]:
    """The bytes at url as they arrive; DataError on failure, or patience seconds of silence.

    A thread does the waiting, since looking up a host name knows no timeout.
    """
    pieces: queue.Queue[bytes | DataError] = queue.Queue()
    stop = threading.Event()

    def pump() -> None:
        try:
            with urlopen(url, timeout=patience) as response:
                while not stop.is_set():
                    pieces.put(piece := response.read1(1 << 16))
                    if not piece:
                        return
        except Exception as error:  # whatever it is, it must reach the reader
            text = str(error).removeprefix("<urlopen error ").removesuffix(">")
            pieces.put(DataError(text or type(error).__name__))

    threading.Thread(target=pump, daemon=True).start()
    try:
        while piece := pieces.get(timeout=patience):
            if isinstance(piece, DataError):
                raise piece
            yield piece
    except queue.Empty:
        raise DataError(f"nothing arrived for {patience:.0f} s") from None
    finally:
        stop.set()


def download(target: Path, bases: list[str], say: Callable[[str], object]) -> None:
    """Fetch the official file called target.name to target from one of the base URLs.

    The base that worked is moved to the front. A download may be slow as long as bytes arrive;
    QUIET_SECONDS without any end it. Raises DataError, which lists the addresses and what came of
    each, when all fail; OSError when target cannot be written.
    """
    size = OFFICIAL[target.name].size
    failures: dict[str, str] = {}  # of each address, its last
    heard = time.monotonic()

    def arriving(url: str, patience: float) -> Iterator[bytes]:
        nonlocal heard
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for piece in stream(url, patience):
                heard = time.monotonic()
                bar.update(len(piece))
                yield piece

    for turn in range(ROUNDS):
        time.sleep(PAUSE_SECONDS if turn else 0)
        for base in list(bases):
            patience = min(ATTEMPT_SECONDS, heard + QUIET_SECONDS - time.monotonic())
            if patience <= 0:
                break
            url = f"{base.rstrip('/')}/{target.name}"
            say(f"MNIST: downloading {url} ({size:,} bytes)")
            try:
                write(target, arriving(url, patience))
            except DataError as error:
                failures[url] = str(error)
            else:
                bases.remove(base)
                bases.insert(0, base)
                return
    raise DataError("; ".join(f"{url}: {failure}" for url, failure in failures.items()))
