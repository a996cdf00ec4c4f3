"""The four official MNIST files, plain and compressed: what they are, and whether ours are they.

Also, for any file: how it is known to be the right one, and where data are kept.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import platformdirs

OK = "ok"
MISSING = "missing"


class DataError(Exception):
    """One clear sentence: what was wrong, what was expected, what to do."""


class Official(NamedTuple):
    """What identifies one file."""

    size: int  # bytes
    sha256: str


# Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits. The archives have the
# MD5s that torchvision.datasets.MNIST lists; MD5 can be forged, so the table holds SHA-256.
OFFICIAL = {
    "train-images-idx3-ubyte": Official(
        47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-images-idx3-ubyte.gz": Official(
        9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte": Official(
        60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "train-labels-idx1-ubyte.gz": Official(
        28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte": Official(
        7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-images-idx3-ubyte.gz": Official(
        1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte": Official(
        10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
    "t10k-labels-idx1-ubyte.gz": Official(
        4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
NAMES = tuple(name for name in OFFICIAL if not name.endswith(".gz"))


def user_cache() -> Path:
    """The folder for data that this platform gives to this user."""
    return platformdirs.user_cache_path("nn_backprop")


def data_root(option: str | Path | None = None) -> Path:
    """The folder for data, which holds ``MNIST/raw`` and ``unknown``.

    It is option, else $NN_BACKPROP_DATA, else the user's cache.
    """
    chosen = option or os.environ.get("NN_BACKPROP_DATA")
    return Path(chosen).expanduser() if chosen else user_cache()


def raw_folder(root: Path) -> Path:
    """Where torchvision looks for the files under a root."""
    return root / "MNIST" / "raw"


def state(path: Path, official: Official | None = None) -> str:
    """ "ok" if path holds the official file (default: MNIST's of its name), else the problem."""
    size, sha256 = official or OFFICIAL[path.name]
    try:
        found = path.stat().st_size
        if found < size:
            return f"truncated: {found:,} of {size:,} bytes"
        if found > size:
            return f"too long: {found:,} instead of {size:,} bytes"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    if digest != sha256:
        return f"wrong bytes (SHA-256 {digest[:8]} instead of {sha256[:8]})"
    return OK


def verify(root: str | Path) -> dict[str, str]:
    """What each of the four uncompressed files under root is: "ok", or its problem in one phrase.

    Sizes and SHA-256 of all bytes are compared (55 MB, about 50 ms). Writes nothing and uses no
    network; a file that cannot be read is a problem, not an exception.
    """
    folder = raw_folder(Path(root))
    found = {name: state(folder / name) for name in NAMES}
    for name, problem in found.items():
        if problem == MISSING and state(folder / f"{name}.gz") == OK:
            found[name] = "not extracted (archive beside it is good)"
    return found
