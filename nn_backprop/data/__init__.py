"""Data sets: found or fetched, verified, repaired, and held in one uint8 tensor on the device."""

from nn_backprop.data.files import DataError, data_root, verify
from nn_backprop.data.images import ImageData, channels_last
from nn_backprop.data.loading import load
from nn_backprop.data.pictures import read_digit
from nn_backprop.data.repair import prepare
from nn_backprop.data.unknown import (
    UNKNOWN_FOR_TESTING,
    UNKNOWN_FOR_TRAINING,
    gaussian_digits,
    gaussian_noise,
    half_digits,
    uniform_noise,
    unknown_sets,
)
from nn_backprop.data.variants import (
    gaussian_images,
    on_clutter,
    on_noise,
    quarter_shifted,
    random_labels,
    random_pixels,
    resize,
    rotated,
    shift,
    shuffled_pixels,
    subset,
    suited,
    training_only,
    varied,
)

__all__ = [
    "UNKNOWN_FOR_TESTING",
    "UNKNOWN_FOR_TRAINING",
    "DataError",
    "ImageData",
    "channels_last",
    "data_root",
    "gaussian_digits",
    "gaussian_images",
    "gaussian_noise",
    "half_digits",
    "load",
    "on_clutter",
    "on_noise",
    "prepare",
    "quarter_shifted",
    "random_labels",
    "random_pixels",
    "read_digit",
    "resize",
    "rotated",
    "shift",
    "shuffled_pixels",
    "subset",
    "suited",
    "training_only",
    "uniform_noise",
    "unknown_sets",
    "varied",
    "verify",
]
