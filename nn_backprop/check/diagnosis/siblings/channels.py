"""What convolutions and normalisations are taken for."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nn_backprop.check.diagnosis.confusions import Siblings, each

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
