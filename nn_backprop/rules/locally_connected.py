"""Local connection without sharing: at every place of the image a small set of weights of its own.

Letters as in `convolution`: n batch (may be absent), c in-channel, o out-channel, h w position in
the output, p q offset in the field, i j pixel, s stride, x̃ the image with its border. A *field* is
what a convolution calls a patch: the pixels that one unit reads.

torch has no such operation, so `locally_connected2d` stands for it: a function that the tape can
intercept like torch's own, and the key of the rule in the table.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from nn_backprop.rules.convolution import Pair, Window, border, pair


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
) -> Tensor:
    """A convolution whose every output has weights of its own.

    Shapes: input (N, C, H, W) or (C, H, W), weight (H', W', O, C, P, Q), bias (O, H', W'); output
    (N, O, H', W'), with H' = ⌊(H + 2 padding − P) / stride⌋ + 1. Raises ValueError for a stride
    below 1, a negative or unknown padding, and for weights or biases of another size than image,
    stride and padding ask for.
    """
    operands = tuple(t for t in (input, weight, bias) if t is not None)
    if has_torch_function(operands):
        return handle_torch_function(
            locally_connected2d, operands, input, weight, bias, stride, padding
        )
    return locally_connected2d_forward(input, weight, bias, stride, padding)[0]


def locally_connected2d_forward(
    x: Float[Tensor, "*n C H W"],
    weight: Float[Tensor, "h w O C P Q"],
    bias: Float[Tensor, "O h w"] | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
) -> tuple[Float[Tensor, "*n O h w"], tuple]:
    """Each output is a weighted sum of its own small field of the image, with its own weights.

    Forward:
        z[n,o,h,w] = Σ_c,p,q patches[n,h,w,p,q,c] weight[h,w,o,c,p,q] + bias[o,h,w]
        patches[n,h,w,p,q,c] = x̃[n,c, s h + p, s w + q]

    Derivation:
        Fix a place (h, w). What is left is a linear layer: its inputs are the numbers of the field,
        with one letter k for (c, p, q), and z[n,o] = Σ_k patches[n,k] weight[o,k] + bias[o]. There
        is one such layer for each place, and no weight is used in two of them, so a weight's
        gradient is the linear layer's, with the letters h and w on everything:
            grad_weight[h,w,o,c,p,q] = Σ_n grad_z[n,o,h,w] patches[n,h,w,p,q,c].
        Only n is summed: it is the only letter that the weight lacks. If all places shared their
        weights, weight[o,c,p,q] would lack h and w as well, and its gradient would be the sum of
        these over h and w. That is convolution's, and the whole difference.

        The linear layer's other gradient is what the field gets,
            grad_patches[n,h,w,p,q,c] = Σ_o grad_z[n,o,h,w] weight[h,w,o,c,p,q],
        and a pixel that stands in several fields adds up what they send (`Window.scatter`). Here
        the kernel cannot be mirrored and slid, as in a convolution: each field has another.

        A worked case, one row, fields of two pixels, no border: z_0 = a x_0 + b x_1 and
        z_1 = c x_1 + d x_2. So grad_a = grad_z_0 x_0 (one term: a is used once), and
        grad_x_1 = b grad_z_0 + c grad_z_1 (read twice, by different weights). With c = a and d = b
        shared, grad_a = grad_z_0 x_0 + grad_z_1 x_1: the sum of what a and c got.

    Backward:
        grad_x̃[n,c,i,j] = Σ_h,w,p,q [i = s h + p] [j = s w + q] (
                              Σ_o grad_z[n,o,h,w] weight[h,w,o,c,p,q] )
        grad_x = grad_x̃ without the border
        grad_weight[h,w,o,c,p,q] = Σ_n grad_z[n,o,h,w] patches[n,h,w,p,q,c]
        grad_bias[o,h,w] = Σ_n grad_z[n,o,h,w]

    Saved:
        x and weight. The patches are up to P·Q times as large as x, and are cut again in the
        backward.

    Shapes:
        x (N, C, H, W) or (C, H, W); weight (H', W', O, C, P, Q); bias (O, H', W');
        z (N, O, H', W') with H' = ⌊(H + top + bottom − P) / s⌋ + 1, and W' likewise.

    Source:
        LeCun 1989, Generalization and network design strategies, the network Net-3.
    """
    h, w, out_channels, C, P, Q = weight.shape
    window = field((P, Q), stride, padding)
    if x.dim() not in (3, 4) or x.shape[-3] != C:
        raise ValueError(f"the weights are for (N, {C}, H, W) or ({C}, H, W), not {(*x.shape,)}")
    if bias is not None and bias.shape != (units := (out_channels, h, w)):
        raise ValueError(f"the bias must be {units}, one for each unit, not {(*bias.shape,)}")
    if (given := window.places(x.shape[-2], x.shape[-1])) != (h, w):
        raise ValueError(
            f"the weights are for {h} × {w} places, but a {P} × {Q} field with stride {stride} and "
            f"padding {padding} has {given[0]} × {given[1]} on {x.shape[-2]} × {x.shape[-1]} pixels"
        )
    z = torch.einsum("nhwpqc,hwocpq->nohw", window.patches(_channels_last(x)), weight)
    if bias is not None:
        z = z + bias
    return z.view(*x.shape[:-3], *z.shape[1:]), (x, weight, window)


def locally_connected2d_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, weight, window = saved
    grad_x = grad_weight = grad_bias = None
    grad_z = grad_z if grad_z.dim() == 4 else grad_z.unsqueeze(0)
    if needs[0]:
        grad_patches = torch.einsum("nohw,hwocpq->nhwpqc", grad_z, weight)
        grad_x = window.scatter(grad_patches, (x.shape[-2], x.shape[-1]))
        grad_x = grad_x.movedim(-1, 1).reshape(x.shape)
    if needs[1]:
        patches = window.patches(_channels_last(x))
        grad_weight = torch.einsum("nohw,nhwpqc->hwocpq", grad_z, patches)
    if needs[2]:
        grad_bias = grad_z.sum(0)  # nohw->ohw
    return grad_x, grad_weight, grad_bias


def field(kernel: tuple[int, int], stride: Pair, padding: Pair | str) -> Window:
    """Where the fields lie. Raises ValueError for a stride or a padding that cannot be."""
    if min(pair(stride)) < 1:
        raise ValueError(f"stride must be at least 1, not {stride}")
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"padding must be 'valid', 'same' or a number, not {padding!r}")
        if padding == "same" and pair(stride) != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, not {stride}")
    elif min(pair(padding)) < 0:
        raise ValueError(f"padding must not be negative, as {padding} is")
    return Window(kernel, pair(stride), border(padding, kernel, (1, 1)), (1, 1))


def _channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) or (C, H, W) as (N, H, W, C)."""
    return (x if x.dim() == 4 else x.unsqueeze(0)).movedim(1, -1)
