"""Five networks for 16 × 16 digits, from one layer to shared weights in two: Net-1 to Net-5.

Net-1 and Net-2 are fully connected. Net-3 has local fields; Net-4 shares the weights of its first
layer over the image, Net-5 those of both; every unit has a bias of its own, even there. Pixels and
units range about from −1, the background, to 1, and the virtual inputs beyond the border are
constants of −1: they have weights, and count as links.

All units compute f(z) = 1.7159 tanh(2/3 z), for which f(±1) = ±1; the wanted outputs are 1 for the
class and −1 for the others. Weights and biases start uniform in ±2.4 / fan-in, the bias counted in.

Sources: LeCun 1989, Generalization and network design strategies, for the networks (retold by
Hastie, Tibshirani & Friedman 2009, The elements of statistical learning, section 11.7); LeCun et
al. 1989, Backpropagation applied to handwritten zip code recognition, for f, the −1 and the
start.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers import LocallyConnected2d, UnitBiasConv2d

BACKGROUND = -1.0


class LeCun1989(nn.Module):
    """Layers of units with f: those with fields first, then fully connected ones to 10 outputs.

    `borders[k]` is the width of the border around the input of spatial layer k.

    Shapes: inputs (N, 1, 16, 16) from −1 to 1; output (N, 10), about −1 to 1.
    """

    loss_name = "squared_error"
    image_size = 16
    normalisation = (0.5, 0.5)  # pixels of 0..1 become −1..1

    def __init__(self, *layers: nn.Module, borders: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers, self.borders = nn.ModuleList(layers), borders
        for layer in layers:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            fan_in = weight.shape[-3:].numel() if weight.dim() > 2 else weight.shape[1]
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -2.4 / (fan_in + 1), 2.4 / (fan_in + 1))

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            if k < len(self.borders):
                width = self.borders[k]
                x = F.pad(x, (width, width, width, width), value=BACKGROUND)
            else:
                x = x.flatten(1)
            x = 1.7159 * torch.tanh(2 / 3 * layer(x))
        return x

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The sum of squares over the outputs, the mean over a batch: targets (N,) in 0..9."""
        wanted = 2 * F.one_hot(targets, output.shape[1]).to(output.dtype) - 1
        return F.mse_loss(output, wanted, reduction="sum") / len(output)

    def probabilities(self, output: Tensor) -> Tensor:
        """The confidence in each class, (N, 10): outputs from −1 on, divided by their sum."""
        positive = (output + 1).clamp(min=1e-9)
        return positive / positive.sum(1, keepdim=True)


def net1() -> LeCun1989:
    """256 → 10: 2,570 weights."""
    return _counted(2_570, LeCun1989(nn.Linear(256, 10)))


def net2() -> LeCun1989:
    """256 → 12 → 10: 3,214 weights."""
    return _counted(3_214, LeCun1989(nn.Linear(256, 12), nn.Linear(12, 10)))


def net3() -> LeCun1989:
    """Local fields, nothing shared: 8 × 8 units, then 4 × 4; 1,226 weights."""
    return _counted(1_226, _two_stages(LocallyConnected2d, LocallyConnected2d, (1, 1)))


def net4() -> LeCun1989:
    """Two 8 × 8 maps with shared weights, 4 × 4 units without: 1,132 weights on 2,266 links."""
    return _counted(1_132, _two_stages(UnitBiasConv2d, LocallyConnected2d, (2, 1)))


def net5() -> LeCun1989:
    """Two 8 × 8 maps, four 4 × 4 maps, all with shared weights: 1,060 weights on 5,194 links."""
    return _counted(1_060, _two_stages(UnitBiasConv2d, UnitBiasConv2d, (2, 4)))


def net5_unshared() -> LeCun1989:
    """The units and links of Net-5 with a weight for each link, 5,194: ours, not of 1989.

    It separates what sharing does from what more units do.
    """
    return _counted(5_194, _two_stages(LocallyConnected2d, LocallyConnected2d, (2, 4)))


Fields = type[LocallyConnected2d] | type[UnitBiasConv2d]


def _two_stages(first: Fields, second: Fields, maps: tuple[int, int]) -> LeCun1989:
    """So many maps of 8 × 8 units, then of 4 × 4, then the outputs."""
    return LeCun1989(
        first(1, maps[0], 18, 3, stride=2),
        second(maps[0], maps[1], 12, 5, stride=2),
        nn.Linear(16 * maps[1], 10),
        borders=(1, 2),
    )


def _counted(weights: int, network: LeCun1989) -> LeCun1989:
    assert sum(p.numel() for p in network.parameters()) == weights
    return network


NETS: dict[str, Callable[[], LeCun1989]] = {
    "net1": net1,
    "net2": net2,
    "net3": net3,
    "net4": net4,
    "net5": net5,
    "net5-unshared": net5_unshared,
}
