"""Rearranging and adding up: the linear maps whose weights are all 0 or 1.

Letters: n place in the result, k place along the axes that are summed. Their Jacobian is a table of
zeros and ones, so their backward is its transpose: a rearrangement is undone, and what was added up
receives the same gradient in every place. Each is tested as an adjoint: Σ z·u over the outputs
equals Σ x·(backward of u) over the inputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

Array = Shaped[Tensor, "..."]


def reshape_forward(x: Array, shape: tuple[int, ...]) -> tuple[Array, tuple]:
    """The same elements in the same order under another shape: view, reshape, flatten.

    Forward:
        z[flat index f] = x[flat index f]

    Derivation:
        Every element has one place in x and one in z; the gradient goes back to where it came from.

    Backward:
        grad_x[flat index f] = grad_z[flat index f]

    Saved:
        the shape of x.

    Shapes:
        x of any shape, z of `shape`, with equally many elements.

    Source:
        a permutation matrix is orthogonal: its transpose is its inverse.
    """
    return x.reshape(shape), (x.shape,)


def reshape_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (shape,) = saved
    return (grad_z.reshape(shape) if needs[0] else None,)


def permute_forward(x: Array, dims: tuple[int, ...]) -> tuple[Array, tuple]:
    """Axes in another order: permute, transpose, T.

    Forward:
        z's axis d is x's axis dims[d]

    Derivation:
        An element keeps its value and changes its address; the backward applies the inverse
        permutation to the axes, and inverse[dims[d]] = d is what argsort computes.

    Backward:
        grad_x's axis dims[d] is grad_z's axis d

    Saved:
        dims.

    Shapes:
        x (s_0, ..., s_k), z (s_dims[0], ..., s_dims[k]).

    Source:
        a permutation matrix is orthogonal: its transpose is its inverse.
    """
    return x.permute(dims), (dims,)


def permute_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (dims,) = saved
    inverse = sorted(range(len(dims)), key=lambda d: dims[d] % len(dims))
    return (grad_z.permute(inverse) if needs[0] else None,)


def pad_forward(x: Array, pad: tuple[int, ...], value: float = 0.0) -> tuple[Array, tuple]:
    """A border of constants; one of negative width cuts off instead.

    Forward:
        z[i] = x[i − before] where 0 ≤ i − before < size, else value;  i along each padded axis

    Derivation:
        Inside, z is a copy of x that has moved by the width of the border, and its gradient moves
        back. The border does not depend on x, so what arrives there goes nowhere. What a negative
        width cut off reached no output, and its gradient is 0.

    Backward:
        grad_x[i] = grad_z[i + before] where 0 ≤ i + before < its size, else 0

    Saved:
        the widths.

    Shapes:
        `pad` holds (before, after) of the last axis, then of the one before it, and so on; those
        axes of z are as much longer.

    Source:
        the transpose of a matrix with a single 1 in each column.
    """
    return F.pad(x, pad, value=value), (pad,)


def pad_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (pad,) = saved
    return (F.pad(grad_z, [-width for width in pad]) if needs[0] else None,)


def clone_forward(
    x: Array, memory_format: torch.memory_format = torch.preserve_format, always: bool = True
) -> tuple[Array, tuple]:
    """A copy: clone, and contiguous where the memory is not in order (not `always`).

    Forward:
        z = x

    Derivation:
        The identity; its Jacobian is the identity matrix.

    Backward:
        grad_x = grad_z

    Saved:
        nothing.

    Shapes:
        x and z have the same shape.

    Source:
        none needed.
    """
    copy = x.clone if always else x.contiguous
    return copy(memory_format=memory_format), ()


def clone_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    return (grad_z if needs[0] else None,)


def cast_forward(
    x: Array,
    dtype: torch.dtype,
    copy: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Array, tuple]:
    """The same numbers in another precision: to, float, double, bfloat16, half.

    Forward:
        z = x, rounded to the nearest number of the new type

    Derivation:
        Rounding is a staircase whose true slope is 0 or undefined; the rule takes the slope of the
        line that it follows, 1, as torch does.

    Backward:
        grad_x = grad_z, rounded to the type of x

    Saved:
        the type of x.

    Shapes:
        x and z have the same shape.

    Source:
        Micikevicius et al. 2018, Mixed precision training, section 3.
    """
    return x.to(dtype, copy=copy, memory_format=memory_format), (x.dtype,)


def cast_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (dtype,) = saved
    return (grad_z.to(dtype) if needs[0] else None,)


def sum_forward(x: Array, dim=None, keepdim: bool = False, dtype=None) -> tuple[Array, tuple]:
    """Sum over the axes `dim`; over all of them if None.

    Forward:
        z[n] = Σ_k x[n,k]

    Derivation:
        ∂z[n]/∂x[n,k] = 1 for every k: each summand receives the gradient of the sum, unchanged.

    Backward:
        grad_x[n,k] = grad_z[n]

    Saved:
        the shape and type of x, and the axes.

    Shapes:
        x of any shape; z without the axes in `dim`, or with size 1 there if keepdim.

    Source:
        the transpose of a row of ones is a column of ones.
    """
    dims = _axes(dim, x.dim())
    return torch.sum(x, dims, keepdim=keepdim, dtype=dtype), (x.shape, x.dtype, dims, keepdim)


def sum_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    shape, dtype, dims, keepdim = saved
    if not needs[0]:
        return (None,)
    if not keepdim:
        for d in dims:  # ascending: each axis goes back to its own place
            grad_z = grad_z.unsqueeze(d)
    return (grad_z.to(dtype).expand(shape),)


def mean_forward(x: Array, dim=None, keepdim: bool = False, dtype=None) -> tuple[Array, tuple]:
    """Mean over the axes `dim`; over all of them if None.

    Forward:
        z[n] = 1/K Σ_k x[n,k],  K the number of places k

    Derivation:
        A sum divided by a constant: each summand receives 1/K of the gradient.

    Backward:
        grad_x[n,k] = grad_z[n] / K

    Saved:
        the shape and type of x, and the axes.

    Shapes:
        x of any shape; z without the axes in `dim`, or with size 1 there if keepdim.

    Source:
        the sum's rule and a constant factor.
    """
    dims = _axes(dim, x.dim())
    return torch.mean(x, dims, keepdim=keepdim, dtype=dtype), (x.shape, x.dtype, dims, keepdim)


def mean_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    shape, _, dims, _ = saved
    count = 1
    for d in dims:
        count *= shape[d]
    return sum_backward(grad_z / count, saved, needs) if needs[0] else (None,)


def _axes(dim, rank: int) -> tuple[int, ...]:
    """The axes that `dim` names (None and () mean all), each from 0 to rank - 1, ascending."""
    if dim is None or dim == () or dim == []:
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))) if rank else ()
