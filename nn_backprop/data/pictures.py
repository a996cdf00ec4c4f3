"""A picture of a digit, from any file, in the form of the images that a network was trained on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nn_backprop.data.files import DataError

SIDE = 28
FAINT = 0.2  # of the picture's contrast: what is fainter counts as background


def read_digit(path: str | Path, layout: str = "mnist") -> Tensor:
    """The digit in a picture, uint8 (1, 28, 28), light (255) on dark (0).

    The background is what most of the picture's border shows; a dark digit on a light ground is
    inverted, and transparent parts are taken to be white. As in MNIST the digit is cut out, scaled
    to fit 20 × 20 pixels with its proportions kept, and put with its centre of mass in the middle;
    with the layout "digits" it is stretched over the whole image, as in that data set.

    Raises DataError if the file is no picture or the picture is of one colour.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            coloured = file.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a picture ({error}): give a PNG or JPEG"
        ) from None
    on_white = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    grey = np.asarray(on_white.convert("L"), dtype=np.float64)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    if ink.max() < 8:  # of 255: less is noise of compression
        raise DataError(f"{path} shows no digit: it is of one colour; give a picture with contrast")
    ink /= ink.max()
    ink[ink < FAINT] = 0
    rows, columns = ink.any(axis=1).nonzero()[0], ink.any(axis=0).nonzero()[0]
    digit = Image.fromarray(
        np.uint8(255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    )
    if layout == "digits":
        return torch.from_numpy(np.array(digit.resize((SIDE, SIDE), Image.Resampling.BOX)))[None]
    scale = 20 / max(digit.size)
    size = tuple(max(1, round(scale * side)) for side in digit.size)
    small = np.array(digit.resize((size[0], size[1]), Image.Resampling.BOX), dtype=np.uint8)
    total = max(small.sum(dtype=np.int64), 1)
    image = np.zeros((SIDE, SIDE), dtype=np.uint8)
    place = []
    for axis, length in enumerate(small.shape):
        centre = (small.sum(axis=1 - axis, dtype=np.int64) * np.arange(length)).sum() / total
        place.append(int(np.clip(round((SIDE - 1) / 2 - centre), 0, SIDE - length)))
    image[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = small
    return torch.from_numpy(image)[None]
