"""Resampling: an image of another size.

Letters as in `convolution`: h w position in the output, i j pixel of the input. Batch and channel
axes are carried along and not written.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nn_backprop.rules.convolution import Pair


def upsample_nearest_forward(
    x: Float[Tensor, "N C H W"],
    size: Pair | None = None,
    scale_factor: float | tuple[float, ...] | list[float] | None = None,
    mode: str = "nearest",
    recompute_scale_factor: bool | None = None,
) -> tuple[Float[Tensor, "N C h w"], tuple]:
    """Each output is a copy of one pixel, the nearest.

    Forward:
        z[h,w] = x[row[h], column[w]]
        row[h] = ⌊h / s⌋ with mode "nearest", ⌊(h + ½) / s⌋ with "nearest-exact"; column[w] likewise

    Derivation:
        s, the enlargement, is H'/H if `size` gives H' or `recompute_scale_factor` is set, else
        `scale_factor`, and H' = ⌊s H⌋; below 1 it leaves pixels out. z[h,w] has the slope 1 in the
        pixel that it copies and 0 in every other. So a pixel adds up the gradients of its copies,
        and one that was never copied gets 0: reading by index becomes adding by index, first over
        rows and then over columns.

        With s = 2 in both axes, pixel (i, j) has the four copies (2i, 2j) … (2i+1, 2j+1), and their
        sum is 4 times their mean: the gradient is 4 times the 2 × 2 average pool of grad_z. (And
        the gradient of that pool is ¼ of the upsampled one: but for the factor, each is the other's
        way back.)

        Where h / s is a whole number but for rounding, floating point decides which pixel is read,
        and torch rounds otherwise for float64 than for float32, and otherwise for other layouts in
        memory. So the numbers of the rows and columns go the way of the pixels: what torch makes of
        them is what it has read.

    Backward:
        grad_x[i,j] = Σ_h,w grad_z[h,w] [row[h] = i] [column[w] = j]

    Saved:
        row and column, and the size of x.

    Shapes:
        x (N, C, H, W), z (N, C, H', W'), row (H',), column (W',).

    Source:
        PyTorch's documentation of torch.nn.functional.interpolate, for the two modes.
    """
    H, W = x.shape[-2:]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32  # in which torch divides
    like = x[:1, :1] if len(x) else x.new_empty(1, 1, H, W)
    zeros = torch.zeros_like(like, dtype=kind)  # laid out in memory as x is
    z, row, column = (
        F.interpolate(
            image, size, scale_factor, mode, recompute_scale_factor=recompute_scale_factor
        )
        for image in (
            x,
            zeros + torch.arange(H, dtype=kind, device=x.device)[:, None],
            zeros + torch.arange(W, dtype=kind, device=x.device),
        )
    )
    return z, (row[0, 0, :, 0].long(), column[0, 0, 0].long(), (H, W))


def upsample_nearest_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    row, column, (H, W) = saved
    if not needs[0]:
        return (None,)
    *n, _, w = grad_z.shape
    by_row = grad_z.new_zeros(*n, H, w).index_add(-2, row, grad_z)
    return (grad_z.new_zeros(*n, H, W).index_add(-1, column, by_row),)
