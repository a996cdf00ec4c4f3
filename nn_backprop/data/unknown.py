"""Images that are no digits: noise, halves of digits, and written signs of other kinds.

Rubbish that a network is trained to refuse must not come back in its test. Each name below is a
source of its own, and none is in both lists; what is made from digits is made from those that the
caller hands over, so training rubbish comes of training digits and test rubbish of test digits.
"""

import gzip
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nn_backprop.data.download import Silence, download
from nn_backprop.data.files import MISSING, OK, DataError, Official, data_root, state
from nn_backprop.data.pictures import BOX, centred
from nn_backprop.data.repair import settle
from nn_backprop.data.variants import normal_pixels, random_pixels

FOLDER = "unknown"  # under the root, beside MNIST
IN_BOTH_ARCHIVES = ("Greek", "Latin")
THICKENING = 3  # pixels: the side of the square that each pixel of a stroke becomes

UNKNOWN_FOR_TRAINING = ("Omniglot 1", "uniform noise")
UNKNOWN_FOR_TESTING = (
    "Omniglot 2", "notMNIST", "Fashion-MNIST", "KMNIST", "EMNIST letters",
    "half digits", "random pixels", "Gaussian digits", "Gaussian noise",
)  # fmt: skip


def uniform_noise(images: Tensor, seed: int) -> Tensor:
    """As many images of the same size, each pixel even in 0 to 255.

    Source of this and of the next: Hendrycks & Gimpel 2017, A baseline for detecting misclassified
    and out-of-distribution examples in neural networks, section 3.1 and the code to it.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    return noise.to(images.device)


def gaussian_noise(images: Tensor, seed: int) -> Tensor:
    """As many images of the same size, each pixel 255 times a standard normal number, cut off.

    The source does not cut off. A picture has no values below 0 or above 255: half of the pixels
    are black here, and 16 % white.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator).mul_(255)
    return noise.round_().clamp_(0, 255).to(torch.uint8).to(images.device)


def gaussian_digits(images: Tensor, seed: int) -> Tensor:
    """As many images from a normal distribution with the mean and the covariance of the pixels.

    Cut off at 0 and 255, so that what is black in all images stays black; `gaussian_images` keeps
    the distribution instead, and its ground is grey.
    """
    return normal_pixels(images, seed).round_().clamp_(0, 255).to(torch.uint8)


def half_digits(images: Tensor, seed: int) -> Tensor:
    """Each image (N, 1, H, W) cut in half: its upper, lower, left or right half, the rest black.

    Which half is drawn evenly, and it stays where it was. The cut goes through the middle, where
    MNIST's digits have their centre of mass. Some halves are digits to any eye (half a 1 is a
    short 1, half an 8 a small 0), so no network can refuse them all.
    """
    H, W = images.shape[-2:]
    upper = (torch.arange(H) < H // 2)[:, None].expand(H, W)
    left = (torch.arange(W) < W // 2).expand(H, W)
    halves = torch.stack([upper, ~upper, left, ~left])[:, None].to(images.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(halves), (len(images),), generator=generator)
    return images * halves[drawn.to(images.device)]


def _idx(file: IO[bytes] | Path) -> Tensor:
    """The images (n, 1, 28, 28) in a compressed file of MNIST's format, as they are."""
    with gzip.open(file) as plain:
        n, H, W = struct.unpack(">4x3I", plain.read(16))
        return torch.frombuffer(bytearray(plain.read()), dtype=torch.uint8).view(n, 1, H, W)


def _omniglot(path: Path) -> Tensor:
    """The characters of an archive (n, 1, 28, 28), made up like MNIST's digits, white on black.

    Each is cut out, scaled to fit 20 × 20 pixels and put with its centre of mass in the middle,
    after its thin strokes of a pen were widened by one of 105 pixels on either side. Then they
    have MNIST's mean and deviation of the pixels (0.133 and 0.313 of archive 1; MNIST's test
    images 0.133 and 0.310), and the mean brightness does not tell the one from the other (AUROC
    0.50). Without the widening it does to 0.75, and to 0.99 if the whole picture is scaled.

    The order is that of the alphabets, the characters, the 20 writers; in archive 1: 480 Balinese,
    440 Early Aramaic, 800 Korean images. A few look like digits: the Korean ieung is a 0.
    """
    from PIL import Image, ImageFilter, ImageOps

    images = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".png") or name.split("/")[1] in IN_BOTH_ARCHIVES:
                continue
            with archive.open(name) as file, Image.open(file) as picture:
                ink = ImageOps.invert(picture.convert("L"))
            wide = ink.filter(ImageFilter.MaxFilter(THICKENING))
            images.append(centred(np.asarray(wide, dtype=np.float32), BOX["mnist"]))
    return torch.stack(images)


def _emnist_letters(path: Path) -> Tensor:
    """The test images of EMNIST's letters, set upright: the file has rows for columns.

    Many look like digits (O, I, l, Z, S, B, b, q), and their writers may have written some of
    MNIST's digits: both are of NIST's collection.
    """
    name = "gzip/emnist-letters-test-images-idx3-ubyte.gz"
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        return _idx(file).transpose(2, 3).contiguous()


class Source(NamedTuple):
    """One file of images that are no digits."""

    file: str  # under FOLDER
    official: Official
    url: str
    read: Callable[[Path], Tensor]  # uint8 (n, 1, 28, 28)


# B. Lake, R. Salakhutdinov, J. Tenenbaum 2015, Human-level concept learning through probabilistic
# program induction: Omniglot. The two smaller background sets; their Greek and Latin are the same.
# Y. Bulatov 2011: notMNIST, letters A to J of printed fonts, converted by D. Flanagan. They fill
# all 28 × 28 pixels, an I may be a white square, and some are no letters.
# H. Xiao, K. Rasul, R. Vollgraf 2017: Fashion-MNIST, clothes. T. Clanuwat et al. 2018: KMNIST, old
# Japanese characters. G. Cohen et al. 2017: EMNIST. Of these three, the test images, from where
# torchvision takes them; SHA-256 stands for its MD5, as at files.OFFICIAL.
SOURCES = {
    "Omniglot 1": Source(
        "omniglot_images_background_small1.zip",
        Official(1_319_022, "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
        "images_background_small1.zip",
        _omniglot,
    ),
    "Omniglot 2": Source(
        "omniglot_images_background_small2.zip",
        Official(1_580_917, "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"),
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
        "images_background_small2.zip",
        _omniglot,
    ),
    "notMNIST": Source(
        "notMNIST/t10k-images-idx3-ubyte.gz",
        Official(3_172_375, "70ae9e06201f2827e5b0a3781a3169d735dd2efc69996b9eeaee7f10ed4044d7"),
        "https://raw.githubusercontent.com/davidflanagan/notMNIST-to-MNIST/master/"
        "t10k-images-idx3-ubyte.gz",
        _idx,
    ),
    "Fashion-MNIST": Source(
        "FashionMNIST/t10k-images-idx3-ubyte.gz",
        Official(4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-images-idx3-ubyte.gz",
        _idx,
    ),
    "KMNIST": Source(
        "KMNIST/t10k-images-idx3-ubyte.gz",
        Official(3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/t10k-images-idx3-ubyte.gz",
        _idx,
    ),
    "EMNIST letters": Source(
        "EMNIST/gzip.zip",
        Official(561_753_746, "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e"),
        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
        _emnist_letters,
    ),
}
MADE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform noise": uniform_noise,
    "Gaussian noise": gaussian_noise,
    "Gaussian digits": gaussian_digits,
    "random pixels": random_pixels,
    "half digits": half_digits,
}


def unknown_sets(
    names: Iterable[str],
    digits: Tensor,
    seed: int,
    root: str | Path | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Tensor]:
    """The named sets of images that are no digits, uint8 (n, 1, 28, 28), on the device of digits.

    digits are uint8 images (N, 1, 28, 28) of one split: a set that is made has as many, made from
    them by the seed. A set that is a file has all that the file holds, in a fixed order; it is
    taken from ``unknown`` under root (see ``data_root``), verified by size and SHA-256, and
    downloaded if it is missing or damaged. One that cannot be had is left out, and ``say`` is told
    which and why. Raises ValueError for a name that there is not.
    """
    names = list(names)
    for name in names:
        if name not in MADE and name not in SOURCES:
            raise ValueError(f"there is no set {name!r}: choose of {', '.join([*MADE, *SOURCES])}")
    silence = Silence()  # one for all, so that without network the wait is not for each
    sets = {}
    for name in names:
        if name in MADE:
            sets[name] = MADE[name](digits, seed)
            continue
        try:
            path = _file(name, data_root(root), say, silence)
        except DataError as error:
            say(f"*** {name} is left out: {error}")
        else:
            sets[name] = SOURCES[name].read(path).to(digits.device)
    return sets


def _file(name: str, root: Path, say: Callable[[str], object], silence: Silence) -> Path:
    """Where the verified file of a source is, under root or where else it could be stored."""
    source = SOURCES[name]

    def tell(line: str) -> None:
        say(f"{name}: {line}")

    def path(place: Path) -> Path:
        return place / FOLDER / source.file

    def good(place: Path) -> bool:
        return state(path(place), source.official) == OK

    def fill(place: Path) -> None:
        if good(place):  # by now: another process had the lock
            return
        found = state(path(root), source.official)
        if found != MISSING:
            tell(f"{path(root)} is {found}; taking a good one instead")
        path(place).parent.mkdir(exist_ok=True)
        try:
            download(path(place), source.official, [source.url], tell, silence)
        except DataError as error:
            raise DataError(
                f"{path(root)} is {found} and could not be downloaded ({error}): put the file "
                f"there, or set $NN_BACKPROP_DATA to a folder that has it in {FOLDER}/{source.file}"
            ) from error

    return path(settle(name, f"{FOLDER}/.lock", root, good, fill, tell))
