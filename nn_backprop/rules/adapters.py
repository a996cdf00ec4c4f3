"""How torch's callables write their arguments, read into the order of our forwards.

Each adapter has the signature of the torch callables that it serves and returns
``(arguments, in_place)``. A use that the rule does not cover raises NotImplementedError, saying
which; the tape reports it with the operation's name.
"""

from typing import Any

import torch
from torch import Tensor

Read = tuple[tuple, bool]


def in_place(*args, input=None, other=None, negative_slope=None, alpha=None) -> Read:
    """relu_(x), add_(x, y, alpha=...): the result replaces the first argument."""
    named = (value for value in (input, other, negative_slope, alpha) if value is not None)
    return (*args, *named), True


def relu(input, inplace=False) -> Read:
    return (input,), inplace


def leaky_relu(input, negative_slope=0.01, inplace=False) -> Read:
    return (input, negative_slope), inplace


def gelu(input, approximate="none") -> Read:
    return (input, approximate), False


def softmax(input, dim=None, _stacklevel=3, dtype=None) -> Read:
    """F.softmax, whose third argument is none of ours."""
    if dim is None:
        raise NotImplementedError("softmax without dim, which torch deprecates")
    return (input, dim, dtype), False


def dropout(input, p=0.5, training=True, inplace=False) -> Read:
    return (input, p, training), inplace


def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Read:
    if return_indices:
        raise NotImplementedError("return_indices=True")
    return (input, kernel_size, stride, padding, dilation, ceil_mode), False


def interpolate(
    input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False,
) -> Read:  # fmt: skip
    if mode not in ("nearest", "nearest-exact"):
        raise NotImplementedError(f"mode={mode!r}")
    if input.dim() != 4:
        raise NotImplementedError(f"an input with {input.dim()} axes, not 4")
    _refuse(align_corners=align_corners, antialias=antialias or None)
    return (input, size, scale_factor, mode, recompute_scale_factor), False


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0,
) -> Read:  # fmt: skip
    _refuse(size_average=size_average, reduce=reduce)
    return (input, target, weight, ignore_index, reduction, label_smoothing), False


def nll_loss(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"
) -> Read:
    _refuse(size_average=size_average, reduce=reduce)
    return (input, target, weight, ignore_index, reduction), False


def mse_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None) -> Read:
    _refuse(size_average=size_average, reduce=reduce)
    return (input, target, reduction, weight), False


def div(input, other, *, rounding_mode=None) -> Read:
    _refuse(rounding_mode=rounding_mode)
    return (input, other), False


def swapped(input, other) -> Read:
    """1 − x and 1 / x, for which torch calls the operand's reflected method."""
    return (other, input), False


def power(input, exponent) -> Read:
    if isinstance(exponent, Tensor):
        raise NotImplementedError("a tensor as the exponent")
    return (input, exponent), False


def reshape(input, *shape, **named) -> Read:
    """view and reshape take the sizes one by one, or as one sequence."""
    shape = shape or tuple(named.values())
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    if isinstance(shape, torch.dtype):
        raise NotImplementedError("a view as another dtype")
    return (input, tuple(shape)), False


def flatten(input, start_dim=0, end_dim=-1) -> Read:
    rank = input.dim()
    start, end = start_dim % max(rank, 1), end_dim % max(rank, 1)
    if rank == 0:
        return (input, (1,)), False
    size = input.shape[start : end + 1].numel()
    return (input, (*input.shape[:start], size, *input.shape[end + 1 :])), False


def squeeze(input, dim=None) -> Read:
    return (input, tuple(torch.squeeze(input, *([] if dim is None else [dim])).shape)), False


def unsqueeze(input, dim) -> Read:
    return (input, tuple(torch.unsqueeze(input, dim).shape)), False


def permute(input, *dims, **named) -> Read:
    dims = dims or (named["dims"],)
    if not isinstance(dims[0], int):
        dims = dims[0]
    return (input, tuple(dims)), False


def pad(input, pad, mode="constant", value=None) -> Read:
    if mode != "constant":
        raise NotImplementedError(f"padding of mode {mode!r}")
    return (input, tuple(pad), 0.0 if value is None else value), False


def transpose(input, dim0, dim1) -> Read:
    dims = list(range(input.dim()))
    if not dims:  # a scalar, whose one axis 0 torch imagines
        return (input, ()), False
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return (input, tuple(dims)), False


def reverse_axes(input) -> Read:
    """x.T and x.t()."""
    return (input, tuple(reversed(range(input.dim())))), False


def matrix_transpose(input) -> Read:
    """x.mT: the last two axes exchanged."""
    return transpose(input, -2, -1)


def contiguous(input, memory_format=torch.contiguous_format) -> Read:
    return (input, memory_format, False), False


def reduction(input, dim=None, keepdim=False, *, dtype=None, axis=None) -> Read:
    """sum and mean."""
    return (input, dim if axis is None else axis, keepdim, dtype), False


def cast_to(dtype: torch.dtype):
    """float(), double(), ...: the method's name is the type."""
    return lambda input: ((input, dtype), False)


def cast(input, *args, memory_format=torch.preserve_format, **kwargs) -> Read:
    """x.to(dtype), x.to(other), x.to(device, dtype), ...: torch itself says what it means."""
    like: Any = torch.empty(0, dtype=input.dtype, device=input.device)
    cast: Any = like.to(*args, **kwargs)
    if cast.device != input.device:
        raise NotImplementedError("a move to another device")
    return (input, cast.dtype, cast is not like, memory_format), False


def _refuse(**named) -> None:
    for name, value in named.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r}")
