"""What convolutions, normalisations, pooling, padding and interpolation are taken for."""

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop.check.diagnosis.confusions import UNFIT, Siblings, each

CONVOLVE: dict[int, Callable] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def of_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Siblings:  # fmt: skip
    """In groups: each kernel sees every group, or groups of other channels."""
    if groups > 1:
        convolve = CONVOLVE[x.dim()]
        tiled = weight.repeat(1, groups, *[1] * (x.dim() - 2))
        z = convolve(x, tiled, bias, stride, padding, dilation)
        yield "the convolution of all groups' channels", z
        z = convolve(_interleaved(x, groups), weight, bias, stride, padding, dilation, groups)
        yield "the same with its groups interleaved", z


def of_transposed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    *_: Any, **__: Any,
) -> Siblings:  # fmt: skip
    """The plain one of the same kernel, where the sizes agree."""
    mirrored = weight.flip(tuple(range(2, weight.dim())))
    pads = [k - 1 - p for k, p in zip(weight.shape[2:], each(padding, x.dim() - 2), strict=True)]
    for name, kernel in {"": weight, " with the mirrored kernel": mirrored}.items():
        text = f"the plain convolution{name}"
        yield text, CONVOLVE[x.dim()](x, kernel.transpose(0, 1), bias, 1, pads)
        if weight.shape[0] == weight.shape[1]:
            yield f"{text}, its channels exchanged", CONVOLVE[x.dim()](x, kernel, bias, 1, pads)


def _interleaved(x: Tensor, groups: int) -> Tensor:
    """Channels k, k + groups, … one after another."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)


def of_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Siblings:  # fmt: skip
    channels = x.shape[1]
    shape = (-1, *[1] * (x.dim() - 2))
    z = _interleaved(F.group_norm(_interleaved(x, groups), groups, eps=eps), channels // groups)
    z = z if weight is None else z * weight.view(shape)
    z = z if bias is None else z + bias.view(shape)
    yield "the same with its groups interleaved", z
    for other, text in ((1, "one group"), (channels, "as many groups as channels"),
                        (channels // groups, "groups and their channels exchanged")):  # fmt: skip
        yield f"the same with {text}", F.group_norm(x, other, weight, bias, eps)
    yield "group_norm without ε", F.group_norm(x, groups, weight, bias, 0.0)


def of_layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Siblings:  # fmt: skip
    yield "rms_norm", F.rms_norm(x, list(shape), weight, eps) + (0 if bias is None else bias)
    yield "layer_norm without ε", F.layer_norm(x, shape, weight, bias, 0.0)


def of_batch_norm(
    x: Tensor, mean: Any, variance: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Siblings:  # fmt: skip
    yield "batch_norm in training", F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    if mean is not None:
        z = F.batch_norm(x, mean, variance, weight, bias, False, 0, eps)
        yield "batch_norm in evaluation", z
    if training:
        yield "batch_norm without ε", F.batch_norm(x, None, None, weight, bias, True, momentum, 0.0)
    if x.dim() > 2:
        yield "instance_norm", F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def of_instance_norm(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Siblings:  # fmt: skip
    yield "batch_norm", F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    if weight is None and bias is None:
        yield "layer_norm", F.layer_norm(x, x.shape[1:], eps=eps)
    yield "instance_norm without ε", F.instance_norm(x, weight=weight, bias=bias, eps=0.0)


POOLS: dict[int, tuple[Callable, Callable]] = {
    1: (F.avg_pool1d, F.max_pool1d),
    2: (F.avg_pool2d, F.max_pool2d),
    3: (F.avg_pool3d, F.max_pool3d),
}


def of_max_pooling(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, *_: Any, **__: Any,
) -> Siblings:  # fmt: skip
    for dims, (average, largest) in POOLS.items():
        options = (kernel_size, stride, padding, dilation, ceil_mode)
        places = {
            "the smallest entry": -x, "the entry of largest magnitude": x.abs(),
            "the first entry of each window": torch.zeros_like(x),
            "the first sample's largest entry": x[:1].expand_as(x),
        }  # fmt: skip
        if x.dim() > dims + 1:
            places["the first channel's largest entry"] = x[:, :1].expand_as(x)
        with suppress(*UNFIT):
            for text, by in places.items():
                yield f"taking {text}", _picked(x, by, largest, dims, options)
            if dims == 2 and dilation in (1, (1, 1)):
                _, at = largest(x, *options, return_indices=True)
                within = _within(at, x.shape[-1], kernel_size, stride, padding)
                z = _taken(x, within, 2)
                yield "taking the entry whose place in the plane is that within the window", z
                turned = at // x.shape[-1] * x.shape[-2] + at % x.shape[-1]
                z = _taken(x, turned.clamp(max=x.shape[-1] * x.shape[-2] - 1), 2)
                yield "taking the entry at row · H + column instead of row · W + column", z
            pads = [p for p in reversed(each(padding, dims)) for _ in range(2)]
            z = largest(F.pad(x, pads), kernel_size, stride, 0, dilation, ceil_mode)
            yield "pooling with zeros around", z
            mean = average(x, kernel_size, stride, padding, ceil_mode)
            yield "average pooling", mean
            yield "the sum over each window", mean * math.prod(each(kernel_size, dims))
            for other in (1, kernel_size):
                z = largest(x, kernel_size, other, padding, dilation, ceil_mode)
                yield f"pooling with stride {other}", _cropped(z, mean.shape)


def of_average_pooling(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Siblings:  # fmt: skip
    for dims, (pool, largest) in POOLS.items():
        options = (kernel_size, stride, padding, 1, ceil_mode)
        entries = math.prod(each(kernel_size, dims))
        with suppress(*UNFIT):
            how = "without" if count_include_pad else "with"
            z = pool(x, kernel_size, stride, padding, ceil_mode, not count_include_pad)
            yield f"pooling {how} the padding in the divisor", z
            z = largest(x, *options)
            yield "max pooling", z
            first = _picked(x, torch.zeros_like(x), largest, dims, options)
            yield "taking the first entry of each window", first
            yield f"taking the first entry of each window over {entries}", first / entries
            for other in (1, kernel_size):
                mean = pool(x, kernel_size, other, padding, ceil_mode, count_include_pad)
                yield f"pooling with stride {other}", _cropped(mean, z.shape)
            if dims > 1:
                mean = pool(x, kernel_size, stride, padding, ceil_mode, divisor_override=entries)
                yield f"pooling with the divisor {entries} at the border too", mean
            pairs = zip(x.shape[-dims:], z.shape[-dims:], strict=True)
            sizes = [n for size, windows in pairs for n in (size // windows, windows)]
            apart = x.reshape(*x.shape[:-dims], *sizes)
            copies = tuple(range(-2, -2 * dims - 1, -2))
            yield "tiling the windows instead of repeating them", apart.mean(copies)


def of_adaptive_pooling(x: Tensor, output_size: Any) -> Siblings:
    is_single = not isinstance(output_size, (tuple, list))
    for dims in POOLS if is_single else (len(output_size),):
        if x.dim() > dims:
            sizes = each(output_size, dims)
            steps = [n // size for n, size in zip(x.shape[-dims:], sizes, strict=True)]
            yield "pooling in windows of equal size", POOLS[dims][0](x, steps, steps)


def _taken(x: Tensor, at: Tensor, dims: int) -> Tensor:
    """The entries of x at these places in the plane."""
    return x.flatten(-dims).gather(-1, at.flatten(-dims)).view(at.shape)


def _picked(x: Tensor, by: Tensor, largest: Callable, dims: int, options: tuple) -> Tensor:
    """The entry of x in each window where `by` is largest."""
    return _taken(x, largest(by, *options, return_indices=True)[1], dims)


def _within(at: Tensor, width: int, kernel_size: Any, stride: Any, padding: Any) -> Tensor:
    """The place within each window, row by row, of an entry at this place in the plane."""
    sizes = zip(at.shape[-2:], each(stride or kernel_size, 2), each(padding, 2), strict=True)
    rows, columns = (torch.arange(n) * s - p for n, s, p in sizes)
    return (at // width - rows[:, None]) * each(kernel_size, 2)[1] + at % width - columns


def _cropped(z: Tensor, shape: torch.Size) -> Tensor:
    return z[tuple(slice(n) for n in shape)]


def of_interpolation(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> Siblings:  # fmt: skip
    smooth = {3: ("linear",), 4: ("bilinear", "bicubic"), 5: ("trilinear",)}[x.dim()]
    for other in ("nearest", "nearest-exact", "area"):
        yield f"interpolation of mode {other}", F.interpolate(x, size, scale_factor, other)
    for other, corners in itertools.product(smooth, (False, True)):
        z = F.interpolate(x, size, scale_factor, other, align_corners=corners)
        yield f"interpolation of mode {other} with align_corners={corners}", z
    if scale_factor in (2, 3, 4):  # the copies one after another
        yield "tiling", x.repeat(1, 1, *[int(scale_factor)] * (x.dim() - 2))


def of_padding(x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Siblings:
    for other in ("constant", "reflect", "replicate", "circular"):
        with suppress(*UNFIT):
            yield f"padding of mode {other}", F.pad(x, pad, other)
