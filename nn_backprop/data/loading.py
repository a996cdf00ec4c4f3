"""Choose a data set, load it once, split it by a fixed seed."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nn_backprop.data.files import DataError, data_root
from nn_backprop.data.images import ImageData, mean_and_std
from nn_backprop.data.repair import prepare
from nn_backprop.data.vision import torchvision_mnist

SPLIT_SEED = 0
MNIST_VALIDATION = 5_000  # of the official 60,000 for training
DIGITS_HELD_OUT = 300  # for validation, and as many for the test, of 1,797


def load(
    data: str = "auto",
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[str], object] = print,
) -> ImageData:
    """The data set called ``mnist`` or ``digits``, on device.

    ``auto`` takes MNIST if it is under root (see ``data_root``) or can be fetched, else says
    loudly why not and takes the embedded digits; the reason is in the result.

    Raises DataError if data is none of the three words, or MNIST was asked for and cannot be had.
    """
    if data not in ("auto", "mnist", "digits"):
        raise DataError(f"there is no data set {data!r}: choose auto, mnist or digits")
    if data == "digits":
        return _digits("asked for").to(device)
    try:
        return _mnist(data_root(root), say).to(device)
    except DataError as error:
        if data == "mnist":
            raise
        reason = f"MNIST could not be had: {error}"
    say(f"*** {reason}")
    say("*** This run takes the embedded digits instead: scikit-learn's 1,797, scaled to 28 x 28.")
    return _digits(reason).to(device)


def _mnist(root: Path, say: Callable[[str], object]) -> ImageData:
    class MNIST(torchvision_mnist()):  # type: ignore[misc]  # torchvision reads the name: a folder
        def _check_legacy_exist(self) -> bool:
            return False  # else it prefers MNIST/processed/*.pt, which nobody has verified

    root = prepare(root, say)
    parts = [MNIST(root, train=train) for train in (True, False)]
    images = torch.cat([part.data for part in parts])[:, None]
    labels = torch.cat([part.targets for part in parts])
    official_train = len(parts[0].data)
    shuffled = _shuffled(official_train)
    validation, train = shuffled[:MNIST_VALIDATION], shuffled[MNIST_VALIDATION:]
    test = torch.arange(official_train, len(images))
    reason = f"MNIST found in {root}"
    mean, std = mean_and_std(images[train])
    return ImageData("mnist", reason, images, labels, train, validation, test, mean, std)


def _digits(reason: str) -> ImageData:
    """The test part of E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    greys = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # (1797, 1, 8, 8), from 0..16
    images = torch.nn.functional.interpolate(greys, size=(28, 28), mode="bilinear")
    images = images.round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    held_out = 2 * DIGITS_HELD_OUT
    shuffled = _shuffled(len(images))
    validation, test = shuffled[:held_out].chunk(2)
    train = shuffled[held_out:]
    mean, std = mean_and_std(images[train])
    return ImageData("digits", reason, images, labels, train, validation, test, mean, std)


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
