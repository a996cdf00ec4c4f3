"""Units with small fields of the image: with weights of their own, or with shared ones."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers.arguments import as_pairs, require_integers
from nn_backprop.rules.convolution import Pair
from nn_backprop.rules.locally_connected import field, locally_connected2d


class _Fields(nn.Module):
    """What the two layers share: arguments, biases, start, and the check of an image's size."""

    shared: ClassVar[bool]  # one weight for all places

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
        require_integers(in_channels=in_channels, out_channels=out_channels)
        self.input_size, (P, Q) = as_pairs(input_size=input_size, kernel_size=kernel_size)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (P, Q)
        self.stride, self.padding = stride, padding
        h, w = field((P, Q), stride, padding).places(*self.input_size)
        if h < 1 or w < 1:
            raise ValueError(
                f"a field of {P} × {Q} pixels does not fit into an image of "
                f"{' × '.join(map(str, self.input_size))} with padding {padding}"
            )

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        places = () if self.shared else (h, w)
        self.weight = parameter(*places, out_channels, in_channels, P, Q)
        self.bias = parameter(out_channels, h, w) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew."""
        bound = 1 / math.sqrt(self.weight.shape[-3:].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _check_size(self, x: Tensor) -> None:
        if x.shape[-2:] != self.input_size:
            raise ValueError(
                "the layer was made for images of "
                f"{' × '.join(map(str, self.input_size))} pixels, not "
                f"{' × '.join(map(str, x.shape[-2:]))}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
            + ("" if self.bias is not None else ", bias=False")
        )


class LocallyConnected2d(_Fields):
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

    shared = False

    def forward(self, x: Tensor) -> Tensor:
        self._check_size(x)
        return locally_connected2d(x, self.weight, self.bias, self.stride, self.padding)


class UnitBiasConv2d(_Fields):
    """A convolution whose weights are shared, while every output unit has a bias of its own.

    Arguments, shapes and errors as for `LocallyConnected2d`, but weight (O, C, P, Q): of the
    H' W' O (C P Q + 1) links, C P Q O weights and H' W' O biases are free. It is a convolution
    without bias and an addition, and so is its gradient: the weight's sums over n, h and w, the
    bias's over n alone.

    Source: LeCun 1989, Generalization and network design strategies, the networks Net-4 and Net-5.
    """

    shared = True

    def forward(self, x: Tensor) -> Tensor:
        self._check_size(x)
        z = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return z if self.bias is None else z + self.bias
