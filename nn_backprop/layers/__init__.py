"""The layers that torch.nn lacks, as `nn.Module`s: they hold parameters, the rules compute."""

from nn_backprop.layers.kernel import (
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    median_distance,
    random_patches,
)
from nn_backprop.layers.locally_connected import LocallyConnected2d, UnitBiasConv2d
from nn_backprop.layers.octave import OctaveConv2d

__all__ = [
    "LocallyConnected2d",
    "OctaveConv2d",
    "RandomFourierFeatures",
    "RandomFourierFeatures2d",
    "UnitBiasConv2d",
    "median_distance",
    "random_patches",
]
