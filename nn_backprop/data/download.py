"""Download one file from the first mirror that has it, without ever hanging."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from nn_backprop.data.files import OK, DataError, Official, state
from nn_backprop.data.vision import torchvision_mnist

ATTEMPT_SECONDS = 8.0  # without a byte, after which the next mirror is tried
QUIET_SECONDS = 20.0  # without a byte from any mirror, after which downloading is given up
ROUNDS = 2  # over all mirrors
PAUSE_SECONDS = 1.0  # between rounds


def mirrors() -> list[str]:
    """Base URLs: those in $NN_BACKPROP_MNIST_URL, separated by spaces, else torchvision's."""
    return os.environ.get("NN_BACKPROP_MNIST_URL", "").split() or list(torchvision_mnist().mirrors)


class Silence:
    """Since when no byte has arrived. Downloads that share it give up together."""

    def __init__(self) -> None:
        self.since = time.monotonic()


def write(target: Path, official: Official, pieces: Iterable[bytes]) -> None:
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
                if file.tell() > official.size:
                    break
        problem = state(part, official)
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


def download(
    target: Path,
    official: Official,
    urls: list[str],
    say: Callable[[str], object],
    silence: Silence | None = None,
) -> str:
    """Fetch the official file to target from one of its addresses, and return which.

    A download may be slow as long as bytes arrive; QUIET_SECONDS of silence, by default from the
    start of this download on, end it. Raises DataError, which lists the addresses and what came
    of each, when all fail; OSError when target cannot be written.
    """
    failures: dict[str, str] = {}  # of each address, its last
    silence = silence or Silence()

    def arriving(url: str, patience: float) -> Iterator[bytes]:
        with tqdm(total=official.size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for piece in stream(url, patience):
                silence.since = time.monotonic()
                bar.update(len(piece))
                yield piece

    for turn in range(ROUNDS):
        time.sleep(PAUSE_SECONDS if turn else 0)
        for url in urls:
            patience = min(ATTEMPT_SECONDS, silence.since + QUIET_SECONDS - time.monotonic())
            if patience <= 0:
                failures.setdefault(url, "not tried, since no other address had answered")
                continue
            say(f"downloading {url} ({official.size:,} bytes)")
            try:
                write(target, official, arriving(url, patience))
            except DataError as error:
                failures[url] = str(error)
            else:
                return url
    raise DataError("; ".join(f"{url}: {failure}" for url, failure in failures.items()))
