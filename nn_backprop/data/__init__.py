"""Data sets: found or fetched, verified, repaired, and held in one uint8 tensor on the device."""

from nn_backprop.data.files import DataError, data_root, verify
from nn_backprop.data.images import ImageData, channels_last
from nn_backprop.data.loading import load
from nn_backprop.data.pictures import read_digit
from nn_backprop.data.repair import prepare
from nn_backprop.data.variants import on_clutter, on_noise, resize, rotated, shift, subset, suited

__all__ = [
    "DataError",
    "ImageData",
    "channels_last",
    "data_root",
    "load",
    "on_clutter",
    "on_noise",
    "prepare",
    "read_digit",
    "resize",
    "rotated",
    "shift",
    "subset",
    "suited",
    "verify",
]
