"""Sums, differences, products, quotients and powers of tensors, and what broadcasting does to them.

An operand of a smaller shape is used again for every place of the axes that it lacks, so the loss
reaches it by all those ways, and its gradient is the sum over them (`unbroadcast`). Letters: n an
element of the result. neg, pow, exp and log are elementwise: z goes in and a comes out, as in
`activation`.
"""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from nn_backprop.rules.activation import elementwise

Operand = Shaped[Tensor, "..."] | float


def like(operand: Operand) -> Any:
    """Shape and type of an operand, without its values; None for a number."""
    return (tuple(operand.shape), operand.dtype) if isinstance(operand, Tensor) else None


def unbroadcast(grad: Tensor, like: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
    """The gradient of an operand, from the gradient of the shape to which it was broadcast.

    Broadcasting copies: z[..., n, ...] = x[...] for every n of an axis that x lacks, or has with
    size 1. So ∂z/∂x is 1 at each copy, and grad_x is the sum of grad over that axis.
    """
    shape, dtype = like
    if len(shape) < grad.dim():
        grad = grad.sum(dim=tuple(range(grad.dim() - len(shape))))
    stretched = tuple(d for d, size in enumerate(shape) if size == 1 and grad.shape[d] != 1)
    if stretched:
        grad = grad.sum(dim=stretched, keepdim=True)
    return grad.to(dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32 if its type is shorter: sums of many terms lose too much in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_forward(x: Operand, y: Operand, alpha: float = 1) -> tuple[Operand, tuple]:
    """Sum of two tensors of one shape, or of shapes that broadcast to one.

    Forward:
        z[n] = x[n] + alpha y[n]

    Derivation:
        ∂z[n]/∂x[n] = 1 and ∂z[n]/∂y[n] = alpha: a sum hands its gradient to both sides. (The
        mirror image: a value that is used in several places reaches the loss in several ways, and
        its gradient is their sum.)

    Backward:
        grad_x[n] = grad_z[n]
        grad_y[n] = alpha grad_z[n]

    Saved:
        the operands' shapes and types.

    Shapes:
        x, y of any shapes that broadcast, or numbers; z of the common shape.

    Source:
        the sum rule of calculus; broadcasting as in `unbroadcast`.
    """
    return x + (y if alpha == 1 else alpha * y), (like(x), like(y), alpha)


def add_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    like_x, like_y, alpha = saved
    grad_x = unbroadcast(grad_z, like_x) if needs[0] else None
    grad_y = unbroadcast(grad_z if alpha == 1 else alpha * grad_z, like_y) if needs[1] else None
    return grad_x, grad_y


def sub_forward(x: Operand, y: Operand, alpha: float = 1) -> tuple[Operand, tuple]:
    """Difference of two tensors, with broadcasting.

    Forward:
        z[n] = x[n] − alpha y[n]

    Derivation:
        As the sum, with −alpha in the place of alpha.

    Backward:
        grad_x[n] = grad_z[n]
        grad_y[n] = −alpha grad_z[n]

    Saved:
        the operands' shapes and types.

    Shapes:
        as for add.

    Source:
        the sum rule of calculus.
    """
    return x - (y if alpha == 1 else alpha * y), (like(x), like(y), alpha)


def sub_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    like_x, like_y, alpha = saved
    grad_x = unbroadcast(grad_z, like_x) if needs[0] else None
    grad_y = unbroadcast(-alpha * grad_z, like_y) if needs[1] else None
    return grad_x, grad_y


def mul_forward(x: Operand, y: Operand) -> tuple[Operand, tuple]:
    """Elementwise product, with broadcasting.

    Forward:
        z[n] = x[n] y[n]

    Derivation:
        z is linear in each operand; its slope in one is the other.

    Backward:
        grad_x[n] = grad_z[n] y[n]
        grad_y[n] = grad_z[n] x[n]

    Saved:
        both operands.

    Shapes:
        as for add.

    Source:
        the product rule of calculus.
    """
    return x * y, (x, y)


def mul_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, y = saved
    grad_x = unbroadcast(grad_z * y, like(x)) if needs[0] else None
    grad_y = unbroadcast(grad_z * x, like(y)) if needs[1] else None
    return grad_x, grad_y


def div_forward(x: Operand, y: Operand) -> tuple[Operand, tuple]:
    """Elementwise quotient, with broadcasting.

    Forward:
        z[n] = x[n] / y[n]

    Derivation:
        ∂z/∂x = 1/y. For y, d(1/y) = −dy/y², so ∂z/∂y = −x/y² = −z/y.

    Backward:
        grad_x[n] = grad_z[n] / y[n]
        grad_y[n] = −grad_z[n] x[n] / y[n]²

    Saved:
        both operands.

    Shapes:
        as for add.

    Source:
        the quotient rule of calculus.
    """
    return x / y, (x, y)


def div_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, y = saved
    grad_x = unbroadcast(grad_z / y, like(x)) if needs[0] else None
    grad_y = unbroadcast(-grad_z * (x / y) / y, like(y)) if needs[1] else None
    return grad_x, grad_y


def _neg_slope(a):
    """The negative.

    Forward:
        a = −z

    Derivation:
        A straight line of slope −1.

    Backward:
        grad_z = −grad_a

    Saved:
        the result, for its shape alone.

    Shapes:
        z and a have the same shape.

    Source:
        the sum rule of calculus.
    """
    return -torch.ones_like(a)


neg_forward, neg_backward = elementwise(torch.neg, _neg_slope)


def _pow_slope(z, exponent):
    """A constant power.

    Forward:
        a = z^exponent

    Derivation:
        d z^exponent = exponent z^(exponent−1) dz. For exponent = 0 the function is constant and the
        slope is 0 everywhere, also at z = 0, where 0 · 0^−1 would not be a number.

    Backward:
        grad_z = grad_a · exponent · z^(exponent − 1)

    Saved:
        z.

    Shapes:
        z and a have the same shape; exponent is a number.

    Source:
        the power rule of calculus.
    """
    return exponent * z ** (exponent - 1) if exponent != 0 else torch.zeros_like(z)


pow_forward, pow_backward = elementwise(torch.pow, _pow_slope)


def _exp_slope(a):
    """The exponential function.

    Forward:
        a = e^z

    Derivation:
        e^z is its own derivative, and it is the result a.

    Backward:
        grad_z = grad_a · a

    Saved:
        a.

    Shapes:
        z and a have the same shape.

    Source:
        any book of calculus.
    """
    return a


exp_forward, exp_backward = elementwise(torch.exp, _exp_slope)


def _log_slope(z):
    """The natural logarithm.

    Forward:
        a = log z

    Derivation:
        From e^a = z: e^a da = dz, so da/dz = 1/z.

    Backward:
        grad_z = grad_a / z

    Saved:
        z.

    Shapes:
        z and a have the same shape.

    Source:
        any book of calculus.
    """
    return 1 / z


log_forward, log_backward = elementwise(torch.log, _log_slope)
