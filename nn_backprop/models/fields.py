"""Three networks with the same units: fully connected, locally connected, with shared weights."""

import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers import LocallyConnected2d
from nn_backprop.models.classifier import Classifier
from nn_backprop.models.mlp import MLP


class FieldNetwork(Classifier):
    """Maps of 14 × 14 units, then of 7 × 7, ten outputs; the units have 5 × 5 fields.

    `fields1` makes the first maps, `fields2` so many as `maps` says. Fields lie two pixels apart,
    in a border of zeros; units are ReLUs.

    Shapes: inputs (N, 1, 28, 28); output (N, 10), logits.
    """

    def __init__(self, fields1: nn.Module, fields2: nn.Module, maps: int) -> None:
        super().__init__()
        self.fields1, self.fields2 = fields1, fields2
        self.output = nn.Linear(maps * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fields1(x))
        x = F.relu(self.fields2(x))
        return self.output(x.flatten(1))


def fully_connected() -> MLP:
    """784 and 392 hidden units, as the others have, each fed by all below: 927,090 weights."""
    return MLP((28 * 28, 4 * 14 * 14, 8 * 7 * 7, 10))


def locally_connected(maps: tuple[int, int] = (4, 8)) -> FieldNetwork:
    """Fields with weights of their own: with the default maps, 63,906 weights on as many links."""
    first, second = maps
    return FieldNetwork(
        LocallyConnected2d(1, first, 28, 5, stride=2, padding=2),
        LocallyConnected2d(first, second, 14, 5, stride=2, padding=2),
        second,
    )


def shared_weights(maps: tuple[int, int] = (4, 8)) -> FieldNetwork:
    """The same links with shared weights: 4,842 with the default maps."""
    first, second = maps
    return FieldNetwork(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.Conv2d(first, second, 5, stride=2, padding=2),
        second,
    )
