"""Pooling: a window of pixels becomes one number, its largest or its mean.

Letters as in `convolution`: h w position in the output, p q offset in the window, i j pixel, s
stride, d dilation, x̃ the image with its border. Batch and channel axes are carried along and not
written.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nn_backprop.rules.convolution import Pair, Window, pair


def max_pool2d_forward(
    x: Float[Tensor, "*n H W"],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[Float[Tensor, "*n h w"], tuple]:
    """The largest value in each window.

    Forward:
        z[h,w] = max_p,q x̃[s h + d p, s w + d q],  x̃ = x with a border of −∞

    Derivation:
        Let (p*, q*) be the offset of the largest value in the window of (h, w), and winner[h,w] the
        pixel there. While it stays the largest, z[h,w] is a copy of that pixel: slope 1 in it, 0 in
        all the others. A pixel that wins several overlapping windows adds up what they send.

        In a tie, moving one of the equal pixels up raises z and moving it down leaves z as it is,
        so no derivative exists; the rule gives the whole gradient to the first in reading order, as
        torch does. Giving it to all of them would count it several times over.

    Backward:
        grad_x[i,j] = Σ_h,w grad_z[h,w] [winner[h,w] = (i, j)]

    Saved:
        the winners, as places in the flattened image, and the image's size.

    Shapes:
        x (N, C, H, W) or (C, H, W), z (N, C, H', W').

    Source:
        Ranzato, Huang, Boureau & LeCun 2007, Unsupervised learning of invariant feature
        hierarchies, section 2; Scherer, Müller & Behnke 2010, Evaluation of pooling operations in
        convolutional architectures for object recognition.
    """
    z, winner = F.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    return z, (winner, (x.shape[-2], x.shape[-1]))


def max_pool2d_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    winner, (H, W) = saved
    if not needs[0]:
        return (None,)
    if winner.dim() == 4 and not winner.is_contiguous():  # channels last in memory, as x was
        N, C = winner.shape[:2]
        grad_x = grad_z.new_zeros(N, H * W, C).transpose(1, 2)
    else:
        grad_x = grad_z.new_zeros(*grad_z.shape[:-2], H * W)
    grad_x.scatter_add_(-1, winner.flatten(-2), grad_z.flatten(-2))
    return (grad_x.unflatten(-1, (H, W)),)


def avg_pool2d_forward(
    x: Float[Tensor, "*n H W"],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Float[Tensor, "*n h w"], tuple]:
    """The mean of each window: a convolution with equal weights, channel by channel.

    Forward:
        z[h,w] = 1/K[h,w] Σ_p,q x̃[s h + p, s w + q],  x̃ = x with a border of 0

    Derivation:
        z is linear in x. Each of a window's pixels has the weight 1/K, so it receives 1/K of the
        window's gradient; one in several windows adds up the parts (`Window.scatter`).

        K is `divisor_override` if given. Else it counts the pixels of the window: those of the
        image alone, or with `count_include_pad` those of the border too. With `ceil_mode` a last
        window may reach past the border; what lies beyond counts in neither case.

    Backward:
        grad_x̃[i,j] = Σ_h,w,p,q [i = s h + p] [j = s w + q] grad_z[h,w] / K[h,w]
        grad_x = grad_x̃ without the border

    Saved:
        the size of x, the window, and K, which depends on sizes alone.

    Shapes:
        x (N, C, H, W) or (C, H, W), z (N, C, H', W'), K (H', W').

    Source:
        LeCun et al. 1998, Gradient-based learning applied to document recognition, sections II.A
        and II.B.
    """
    z = F.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    (P, Q), (top, left) = pair(kernel_size), pair(padding)
    s, t = (P, Q) if stride in (None, (), []) else pair(stride)
    (H, W), (h, w) = x.shape[-2:], z.shape[-2:]
    # How far the last window reaches past the border below and on the right (ceil_mode only).
    below = max(0, s * (h - 1) + P - (H + 2 * top))
    beside = max(0, t * (w - 1) + Q - (W + 2 * left))
    window = Window((P, Q), (s, t), (top, top + below, left, left + beside), (1, 1))
    if divisor_override is not None:
        count = x.new_full((h, w), divisor_override)
    else:
        countable = x.new_ones(H, W)
        if count_include_pad:
            countable = F.pad(countable, (left, left, top, top), value=1.0)
            inner = Window((P, Q), (s, t), (0, below, 0, beside), (1, 1))
        else:
            inner = window
        count = inner.patches(countable[..., None])[:h, :w].sum((-3, -2, -1))
    return z, (count, window, (H, W))


def avg_pool2d_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    count, window, size = saved
    if not needs[0]:
        return (None,)
    grad_patches = (grad_z / count)[..., None, None, None]
    grad_patches = grad_patches.expand(*grad_z.shape, *window.kernel, 1)
    return (window.scatter(grad_patches, size).squeeze(-1),)
