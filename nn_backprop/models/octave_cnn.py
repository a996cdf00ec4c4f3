"""A convolutional network whose maps have two resolutions."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers import OctaveConv2d
from nn_backprop.models.classifier import Classifier


class OctaveCNN(Classifier):
    """Three stages of octave convolution, 2×2 max-pooling and ReLU, then one affine layer.

    A fraction `alpha` of the maps between the layers is low, of half the size. The first layer has
    high maps alone before it (α_in = 0), the last behind it (α_out = 0); only the one between is an
    inner layer. ReLU and pool work on both kinds of maps; of an odd size, the last pool has only
    the pixels that exist, so that low maps stay half as large, rounded up. With alpha = 0 it is a
    plain convolutional network, with as many parameters. The defaults' maps measure 28, 14 and 7
    pixels a side, the low ones 14, 7 and 4; after the last pool, 4.

    Shapes: inputs (N, 1, image_size, image_size); output (N, classes), logits.
    Raises ValueError for a size below 1, and as OctaveConv2d does.

    Source: Chen et al. 2019, Drop an octave, sections 3 and 3.3, for the first and last layer; the
    network is ours.
    """

    def __init__(
        self,
        channels: tuple[int, int, int] = (16, 32, 32),
        alpha: float = 0.5,
        kernel_size: int = 3,
        image_size: int = 28,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if min(image_size, classes) < 1:
            raise ValueError(
                f"image_size and classes must be at least 1, not {image_size} and {classes}"
            )
        first, inner, last = channels
        self.conv1 = OctaveConv2d(1, first, kernel_size, 0, alpha)
        self.conv2 = OctaveConv2d(first, inner, kernel_size, alpha, alpha)
        self.conv3 = OctaveConv2d(inner, last, kernel_size, alpha, 0)
        self.image_size = image_size
        side = -(-image_size // 8)  # ⌈⌈⌈s/2⌉/2⌉/2⌉
        self.output = nn.Linear(last * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor | tuple[Tensor, ...] = x
        for conv in (self.conv1, self.conv2, self.conv3):
            maps = _each(lambda z: F.relu(F.max_pool2d(z, 2, ceil_mode=True)), conv(maps))
        assert isinstance(maps, Tensor)
        return self.output(maps.flatten(1))


def _each(
    function: Callable[[Tensor], Tensor], maps: Tensor | tuple[Tensor, ...]
) -> Tensor | tuple[Tensor, ...]:
    """The function of the maps, of both kinds if there are two."""
    return function(maps) if isinstance(maps, Tensor) else tuple(map(function, maps))
