"""A picture of a digit, from any file, in the form of the images that a network was trained on."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nn_backprop.data.files import DataError

SIDE = 28
BOX = {"mnist": 20, "digits": 28}  # pixels: what the longer side of a digit is scaled to
FAINT = 0.2  # of the picture's contrast: what is fainter counts as background


def read_digit(path: str | Path, layout: str = "mnist") -> Tensor:
    """The digit in a picture, uint8 (1, 28, 28), light (255) on dark (0).

    The background is what most of the picture's border shows; a dark digit on a light ground is
    inverted, and transparent parts are taken to be white. As in MNIST the digit is cut out, scaled
    to fit 20 × 20 pixels with its proportions kept, and put with its centre of mass in the middle;
    with the layout "digits" it fills 28 × 28, as in that data set. Of an animation the first frame
    counts, and a photograph is turned as its EXIF data say.

    Raises DataError if the file is no picture, the picture is too large (about 90 million pixels)
    or of one colour.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":  # 16 bits a pixel and more: convert would clip them at 255
            deep = np.array(picture, dtype=np.float64)
            deep -= deep.min()
            picture = Image.fromarray(np.uint8(255 * deep / (deep.max() or 1)))
        coloured = picture.convert("RGBA")
    except Exception as error:  # damaged files fail in many ways
        raise DataError(
            f"{path} cannot be read as a picture ({error}): give a PNG or JPEG"
        ) from None
    on_white = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    grey = np.asarray(on_white.convert("L"), dtype=np.float32)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    if ink.max() < 8:  # of 255: less is noise of compression
        raise DataError(f"{path} shows no digit: it is of one colour; give a picture with contrast")
    ink[ink < FAINT * ink.max()] = 0
    return centred(ink, BOX[layout])


def centred(ink: np.ndarray, box: int) -> Tensor:
    """The ink, a float32 array of any size and not all 0, as a digit of MNIST: uint8 (1, 28, 28).

    What is not 0 is cut out, scaled to fit box × box pixels with its proportions kept, each new
    pixel the mean of those it covers, and put with its centre of mass in the middle. The
    brightest pixel becomes 255.
    """
    from PIL import Image

    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    digit = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    width, height = (max(1, round(box / max(digit.size) * side)) for side in digit.size)
    small = np.array(digit.resize((width, height), Image.Resampling.BOX))
    image = np.zeros((SIDE, SIDE), dtype=np.uint8)
    place = []
    for axis, length in enumerate(small.shape):
        centre = (small.sum(axis=1 - axis) * np.arange(length)).sum() / small.sum()
        place.append(int(np.clip(round(SIDE / 2 - centre), 0, SIDE - length)))  # 14, as in MNIST
    image[place[0] : place[0] + height, place[1] : place[1] + width] = np.rint(
        255 * small / small.max()
    )
    return torch.from_numpy(image)[None]
