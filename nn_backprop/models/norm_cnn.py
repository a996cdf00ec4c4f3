"""A convolutional network with batch norm, in two sizes: one to be quick, one to be accurate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.models.classifier import Classifier


@dataclass(frozen=True, slots=True)
class Stage:
    """Convolution, `pool` × `pool` max-pooling, batch norm, ReLU."""

    channels: int
    kernel_size: int
    padding: int = 0
    pool: int = 1


class NormCNN(Classifier):
    """Stages of convolution and batch norm, then affine layers to the logits.

    With `block` > 1 the image is first cut into blocks of block × block pixels, and the pixels of a
    block become channels of an image that is as much smaller: the first convolution then reads
    large patches at few places. With `hidden` > 0 there is one more affine layer of that width,
    normalised too. The pool comes before the norm, which has a quarter of the work then. In
    training mode the loss smooths the labels: of each, `label_smoothing` is spread evenly over all
    classes.

    Shapes: inputs (N, 1, image_size, image_size); output (N, classes), logits.
    Raises ValueError if the image does not consist of whole blocks, or is too small for the stages.

    Sources: Ioffe & Szegedy 2015, Batch normalization, for the norm; Szegedy et al. 2016,
    Rethinking the Inception architecture, section 7, for the labels.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        block: int = 1,
        hidden: int = 0,
        image_size: int = 28,
        classes: int = 10,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % block:
            raise ValueError(f"{image_size} pixels a side are not whole blocks of {block}")
        self.block, self.label_smoothing = block, label_smoothing
        self.pools = [stage.pool for stage in stages]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels, side = block * block, image_size // block
        for stage in stages:
            side = (side + 2 * stage.padding - stage.kernel_size + 1) // stage.pool
            if side < 1:
                raise ValueError(
                    f"an image of {image_size} pixels a side is too small for {stages}"
                )
            # The norm subtracts the mean, and any bias with it.
            self.convs.append(
                nn.Conv2d(
                    channels, stage.channels, stage.kernel_size, padding=stage.padding, bias=False
                )
            )
            self.norms.append(nn.BatchNorm2d(stage.channels))
            channels = stage.channels
        features = channels * side * side
        self.hidden = nn.Linear(features, hidden, bias=False) if hidden else None
        self.hidden_norm = nn.BatchNorm1d(hidden) if hidden else None
        self.output = nn.Linear(hidden or features, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.block > 1:
            x = F.pixel_unshuffle(x, self.block).contiguous(memory_format=torch.channels_last)
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            x = conv(x)
            if pool > 1:
                x = F.max_pool2d(x, pool)
            x = F.relu(norm(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # in the order of the memory, so nothing is moved
        if self.hidden is not None and self.hidden_norm is not None:
            x = F.relu(self.hidden_norm(self.hidden(x)))
        return self.output(x)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of a batch: output (N, K) logits, targets (N,) in 0..K−1."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(output, targets, label_smoothing=smoothing)


def fast_cnn() -> NormCNN:
    """Two stages on 2 × 2 blocks, 86,090 parameters: about 99 % after one epoch."""
    return NormCNN([Stage(32, 3, pool=2), Stage(64, 3)], block=2, hidden=64)


def accurate_cnn() -> NormCNN:
    """Four stages at the full resolution, 141,930 parameters."""
    return NormCNN(
        [Stage(32, 5, pool=2), Stage(64, 3, padding=1), Stage(64, 3, pool=2), Stage(128, 3)]
    )
