"""The layers that torch.nn lacks, as `nn.Module`s: they hold parameters, the rules compute."""

from nn_backprop.layers.kernel import (
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    median_distance,
    random_patches,
)

__all__ = [
    "RandomFourierFeatures",
    "RandomFourierFeatures2d",
    "median_distance",
    "random_patches",
]
