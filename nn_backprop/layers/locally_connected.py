"""Units with small fields of the image: with weights of their own, or with shared ones."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.rules.convolution import Pair, pair
from nn_backprop.rules.locally_connected import field, locally_connected2d


class LocallyConnected2d(nn.Module):
    """A convolution without sharing: every output place has weights and biases of its own.

    With N images: input (N, C, H, W) or (C, H, W), where (H, W) is `input_size`; output
    (N, O, H', W') or (O, H', W'), with H' = ⌊(H + 2 padding − P) / stride⌋ + 1 and W' likewise
    (with padding="same", H' = H). weight (H', W', O, C, P, Q), bias (O, H', W'); both start uniform
    in ±1/√(C P Q), as those of torch.nn.Conv2d do, whose arguments of the same names mean the same.

    It has as many weights as multiply-adds, H' W' O C P Q: H' W' times as many as a convolution
    needs for the same links. The rule and its derivation are in `rules.locally_connected`.

    Raises ValueError for a size below 1, a negative padding, a field that does not fit into the
    image, and at a call for an image of another size.

    Source: LeCun 1989, Generalization and network design strategies.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Pair,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        h, w = _places(in_channels, out_channels, input_size, kernel_size, stride, padding)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = pair(input_size), pair(kernel_size)
        self.stride, self.padding = stride, padding
        size = (h, w, out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty((out_channels, h, w), device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew."""
        bound = 1 / math.sqrt(self.weight[0, 0, 0].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.input_size)
        return locally_connected2d(x, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return _described(self) + ("" if self.bias is not None else ", bias=False")


class UnitBiasConv2d(nn.Module):
    """A convolution whose weights are shared, while every output unit has a bias of its own.

    Shapes and errors as for `LocallyConnected2d`: weight (O, C, P, Q), bias (O, H', W'); of the
    H' W' O (C P Q + 1) links, C P Q O weights and H' W' O biases are free. It is a convolution
    without bias and an addition, and so is its gradient: the weight's sums over n, h and w, the
    bias's over n alone.

    Source: LeCun 1989, Generalization and network design strategies, the networks Net-4 and Net-5.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Pair,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        h, w = _places(in_channels, out_channels, input_size, kernel_size, stride, padding)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = pair(input_size), pair(kernel_size)
        self.stride, self.padding = stride, padding
        size = (out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty((out_channels, h, w), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.input_size)
        return F.conv2d(x, self.weight, None, self.stride, self.padding) + self.bias

    def extra_repr(self) -> str:
        return _described(self)


def _places(
    in_channels: int,
    out_channels: int,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair | str,
) -> tuple[int, int]:
    """Rows and columns of the output, once the arguments have been found possible."""
    sizes = {
        "in_channels": (in_channels,),
        "out_channels": (out_channels,),
        "input_size": pair(input_size),
        "kernel_size": pair(kernel_size),
    }
    for name, values in sizes.items():
        if not all(isinstance(value, int) for value in values) or min(values) < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {_plain(values)}")
    kernel = pair(kernel_size)
    h, w = field(kernel, stride, padding).places(*pair(input_size))
    if h < 1 or w < 1:
        raise ValueError(
            f"a field of {kernel[0]} × {kernel[1]} pixels does not fit into an image of "
            f"{' × '.join(map(str, pair(input_size)))} with padding {padding}"
        )
    return h, w


def _plain(values: Sequence[int]) -> str:
    return str(values[0] if len(values) == 1 else values)


def _check_size(x: Tensor, input_size: tuple[int, int]) -> None:
    if x.shape[-2:] != input_size:
        raise ValueError(
            f"the layer was made for images of {input_size[0]} × {input_size[1]} pixels, not "
            f"{' × '.join(map(str, x.shape[-2:]))}"
        )


def _described(layer: LocallyConnected2d | UnitBiasConv2d) -> str:
    return (
        f"{layer.in_channels}, {layer.out_channels}, input_size={layer.input_size}, "
        f"kernel_size={layer.kernel_size}, stride={layer.stride}, padding={layer.padding!r}"
    )
