"""The convolutional network: local receptive fields and shared weights."""

import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.models.classifier import Classifier


class CNN(Classifier):
    """Two stages of convolution, ReLU and 2×2 max-pooling, then one affine layer to the logits.

    Each map slides one `kernel_size` × `kernel_size` set of weights over its input, so that what is
    learnt at one place of the image is known at every other. No padding: with the defaults the maps
    measure 28 → 24 → 12 → 8 → 4 pixels a side.

    Shapes: inputs (N, 1, image_size, image_size); output (N, classes), logits.
    Raises ValueError for a size below 1, or if the image is too small for the two stages.

    Source: LeCun et al. 1989, Backpropagation applied to handwritten zip code recognition; here
    with ReLU, max-pooling and cross-entropy, as has become usual.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (16, 32),
        kernel_size: int = 5,
        image_size: int = 28,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if min(*channels, kernel_size, classes) < 1:
            raise ValueError(
                f"channels, kernel_size and classes must be at least 1, not {channels}, "
                f"{kernel_size} and {classes}"
            )
        side = ((image_size - kernel_size + 1) // 2 - kernel_size + 1) // 2
        if side < 1:
            raise ValueError(
                f"an image of {image_size} pixels a side is too small for two stages of a "
                f"{kernel_size}×{kernel_size} kernel and a 2×2 pool"
            )
        self.conv1 = nn.Conv2d(1, channels[0], kernel_size)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size)
        self.output = nn.Linear(channels[1] * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.output(x.flatten(1))
