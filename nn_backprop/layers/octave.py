"""Octave convolution: some channels at half the resolution, for what varies slowly in an image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers.arguments import as_pairs, require_integers
from nn_backprop.rules.convolution import Pair

Maps = Tensor | tuple[Tensor, Tensor]


class OctaveConv2d(nn.Module):
    """A convolution between maps of two resolutions: high ones, and low ones of half the size.

    Of the in- and of the out-channels, the fractions `alpha_in` and `alpha_out` are low (rounded
    down to whole channels). Every in-channel feeds every out-channel, as in a plain convolution;
    where they differ in size, the image is pooled before the convolution, or its result enlarged:

        Y^H = f(X^H; W^HH) + up₂ f(X^L; W^LH)
        Y^L = f(X^L; W^LL) + f(pool₂ X^H; W^HL)

    f is a convolution with stride 1 whose border of zeros keeps the size, pool₂ the 2 × 2 average
    pool and up₂ the nearest upsampling. Each of Y^H and Y^L has one bias. Of an odd size H, low
    maps have ⌈H/2⌉ rows: the last pool has only the pixels that exist, and what up₂ makes of the
    last row is cut to H. If only high channels go in (`alpha_in` = 0), the layer takes one tensor
    in place of a pair, and terms with X^L fall away; likewise with `alpha_out` = 0.

    Gradients:
        With p and q counted from the middle of the kernel, and zeros beyond the border, f is
            f(X; W)[n,o,h,w] = Σ_c,p,q X[n,c,h+p,w+q] W[o,c,p,q].
        What a gradient G at its output makes of one at its image and of one at its weight is
        derived at the rule conv2d; call them
            f*(G; W)[n,c,i,j] = Σ_o,p,q G[n,o,i−p,j−q] W[o,c,p,q]
            f°(X, G)[o,c,p,q] = Σ_n,h,w G[n,o,h,w] X[n,c,h+p,w+q].
        A sum hands its gradient on to both its terms. That of Y^H goes on through up₂, each of
        whose outputs copies a pixel: on the way back, up₂ᵀ, a pixel adds up its (at most) four
        copies. That of Y^L reaches X^H through pool₂, each of whose outputs is a mean: on the way
        back, pool₂ᵀ, every one of its (at most) four pixels receives an equal part. X^H and X^L are
        used twice each, so two terms come together:

            grad_W^HH = f°(X^H, grad_Y^H)           grad_W^LH = f°(X^L, up₂ᵀ grad_Y^H)
            grad_W^LL = f°(X^L, grad_Y^L)           grad_W^HL = f°(pool₂ X^H, grad_Y^L)
            grad_X^H = f*(grad_Y^H; W^HH) + pool₂ᵀ f*(grad_Y^L; W^HL)
            grad_X^L = f*(grad_Y^L; W^LL) + f*(up₂ᵀ grad_Y^H; W^LH)

        and the biases' gradients are grad_Y^H and grad_Y^L summed over n, h and w. For even sizes
        pool₂ᵀ = ¼ up₂ and up₂ᵀ = 4 pool₂: on the way back, pool and upsampling change places.

    Shapes:
        X^H (N, C^H, H, W), X^L (N, C^L, ⌈H/2⌉, ⌈W/2⌉); Y^H and Y^L likewise. weight_hh
        (O^H, C^H, P, Q), weight_lh (O^H, C^L, P, Q), weight_hl (O^L, C^H, P, Q), weight_ll
        (O^L, C^L, P, Q), bias_h (O^H,), bias_l (O^L,); those without channels are None.

    Parameters:
        in_channels · out_channels · P · Q + out_channels, as many as in nn.Conv2d, whatever the
        alphas. They are drawn as nn.Conv2d draws them, within ±1/√(in_channels · P · Q): the bound
        does not depend on the alphas, and with both 0 the same seed gives the same numbers.

    Multiply-adds:
        (C^H O^H + (C^L O^H + C^H O^L + C^L O^L) / 4) P Q H W for one image of an even size; of a
        plain convolution's, the share `cost_ratio`.

    Raises ValueError for a size that is below 1 or no integer, an even kernel, a stride other than
    1, a `padding` that does not keep the size, an alpha that is not from 0 to below 1, or that is
    above 0 and leaves no channel of either kind; and for maps that do not fit the layer.

    Source: Chen et al. 2019, Drop an octave: reducing spatial redundancy in convolutional neural
    networks with octave convolution, section 3. Ours are the odd sizes, and that strides are
    refused.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        alpha_in: float = 0.5,
        alpha_out: float = 0.5,
        stride: Pair = 1,
        padding: Pair | str = "same",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integers(in_channels=in_channels, out_channels=out_channels)
        (P, Q), steps = as_pairs(kernel_size=kernel_size, stride=stride)
        if P % 2 == 0 or Q % 2 == 0:
            raise ValueError(f"kernel_size must be odd, to have a middle, not {kernel_size}")
        if steps != (1, 1):
            raise ValueError(f"stride must be 1, not {stride}: pool the maps instead")
        self.padding = (P // 2, Q // 2)
        given = padding if isinstance(padding, str) else as_pairs(0, padding=padding)[0]
        if given not in ("same", self.padding):
            raise ValueError(
                f"padding must keep the size of the maps, 'same' or {self.padding}, not {padding!r}"
            )
        low_in = _low("in", in_channels, alpha_in)
        low_out = _low("out", out_channels, alpha_out)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (P, Q)
        self.alpha_in, self.alpha_out = alpha_in, alpha_out

        def parameter(*shape: int) -> Any:
            if not all(shape):  # there are no such channels
                return None
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        high_in, high_out = in_channels - low_in, out_channels - low_out
        self.channels_in = high_in, low_in
        self.weight_hh = parameter(high_out, high_in, P, Q)
        self.weight_lh = parameter(high_out, low_in, P, Q)
        self.weight_hl = parameter(low_out, high_in, P, Q)
        self.weight_ll = parameter(low_out, low_in, P, Q)
        self.bias_h = parameter(high_out) if bias else None
        self.bias_l = parameter(low_out) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        P, Q = self.kernel_size
        bound = (self.in_channels * P * Q) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Maps) -> Maps:
        high, low = self._maps(x)
        z_high = F.conv2d(high, self.weight_hh, self.bias_h, padding=self.padding)
        if low is not None:
            from_low = F.conv2d(low, self.weight_lh, padding=self.padding)
            z_high = z_high + F.interpolate(from_low, size=high.shape[-2:])
        if self.weight_hl is None:
            return z_high
        pooled = F.avg_pool2d(high, 2, ceil_mode=True, count_include_pad=False)
        z_low = F.conv2d(pooled, self.weight_hl, self.bias_l, padding=self.padding)
        if low is not None:
            z_low = z_low + F.conv2d(low, self.weight_ll, padding=self.padding)
        return z_high, z_low

    def _maps(self, x: Maps) -> tuple[Tensor, Tensor | None]:
        """X^H and X^L, or None for X^L; ValueError if the layer has not been made for them."""
        maps = list(x) if isinstance(x, (tuple, list)) else [x]
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part) for part in maps]
        is_map = bool(maps) and isinstance(maps[0], Tensor) and maps[0].dim() == 4
        N, _, H, W = maps[0].shape if is_map else (0, 0, 0, 0)
        high_in, low_in = self.channels_in
        expected = [(N, high_in, H, W), (N, low_in, -(-H // 2), -(-W // 2))][: 2 if low_in else 1]
        if shapes != expected:
            form = f"(N, {high_in}, H, W)"
            if low_in:
                form = f"a pair of {form} and (N, {low_in}, ⌈H/2⌉, ⌈W/2⌉)"
            given = " and ".join(map(str, shapes)) or "nothing"
            raise ValueError(f"the layer takes {form}, not {given}")
        return maps[0], maps[1] if low_in else None

    def extra_repr(self) -> str:
        bias = "" if self.bias_h is not None else ", bias=False"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"alpha_in={self.alpha_in}, alpha_out={self.alpha_out}{bias}"
        )


def cost_ratio(alpha: float) -> float:
    """Multiply-adds of an inner layer, as a share of a plain convolution's: 1 − ¾ α (2 − α).

    Inner: α_in = α_out = α, whole numbers of channels, an even size. Of the four products of
    fractions only that from high to high, (1 − α)², is done at all pixels, the other 1 − (1 − α)² =
    α (2 − α) at a quarter of them.
    """
    return 1 - 3 / 4 * alpha * (2 - alpha)


def memory_ratio(alpha: float) -> float:
    """Numbers in maps of even size with a fraction α of low channels, as a share: 1 − ¾ α."""
    return 1 - 3 / 4 * alpha


def _low(which: str, channels: int, alpha: float) -> int:
    """How many channels are low."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha_{which} must be from 0 to below 1, not {alpha}")
    low = int(alpha * channels + 1e-9)  # 0.29 · 100 is 29, not 28.999...
    if alpha > 0 and not 0 < low < channels:
        raise ValueError(
            f"alpha_{which} = {alpha} makes {low} of {channels} channels low: there must be both "
            "kinds, or with 0 only high ones"
        )
    return low
