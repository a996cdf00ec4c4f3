"""Dropout: in training, a random part of the values is set to 0."""

import torch
from jaxtyping import Float
from torch import Tensor


def dropout_forward(
    x: Float[Tensor, "..."], p: float = 0.5, training: bool = True
) -> tuple[Float[Tensor, "..."], tuple]:
    """Drops each element with probability p and enlarges the others to make up for it.

    Forward:
        z[n] = x[n] mask[n] / (1 − p),  mask[n] = 1 with probability 1 − p, else 0

    Derivation:
        The mask is drawn without regard to x, so once drawn it is a constant: z is x times a
        number, and the gradient is multiplied by that same number. What was dropped had no
        influence on the loss and receives nothing. The mean of mask/(1 − p) is 1, so that the mean
        of z is x, and evaluation (z = x) needs no factor. With p = 1 all is dropped, and the
        factor, which would be 1/0, is taken as 0; with p = 0 nothing is, and nothing is drawn.

    Backward:
        grad_x[n] = grad_z[n] mask[n] / (1 − p)

    Saved:
        the mask, one byte an element, and 1/(1 − p). Drawing again would give another mask.

    Shapes:
        x, z and mask have the same shape; n is an element.

    Source:
        Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov 2014, Dropout, section 4; the
        division by the share that is kept, which they call p, section 10.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0:
        return x, (None, 1.0)  # the input itself, as torch
    if p == 1:  # as torch, which draws nothing here
        mask = torch.zeros_like(x, dtype=torch.bool)
        return x * mask, (mask, 0.0)
    z, mask = torch.native_dropout(x, p, True)  # draws the mask that F.dropout would draw
    return z, (mask, 1 / (1 - p))


def dropout_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    mask, scale = saved
    if not needs[0]:
        return (None,)
    return (grad_z if mask is None else grad_z * mask * scale,)
