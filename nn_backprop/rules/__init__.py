"""The table of derivatives: what torch calls an operation, and the rule that differentiates it.

A row names a rule, the module that derives it (`<name>_forward` and `<name>_backward` there), the
torch callables that it stands for, and, where they take their arguments in another form than the
forward, the adapter that reads them. To add a rule: write its two functions, add its row.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop.rules import (
    activation,
    adapters,
    arithmetic,
    convolution,
    dropout,
    linear,
    locally_connected,
    loss,
    normalization,
    pooling,
    resampling,
    shape,
    winners,
)
from nn_backprop.rules.rule import Rule

__all__ = ["TABLE", "Rule"]


def _getter(name: str) -> Callable:
    """What torch calls when a property of a tensor is read."""
    return getattr(Tensor, name).__get__


_ROWS: list[tuple] = [
    # weighted sums
    ("linear", linear, [F.linear]),
    ("matmul", linear, [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
                        torch.bmm, Tensor.bmm]),
    ("conv2d", convolution, [F.conv2d]),
    ("locally_connected2d", locally_connected, [locally_connected.locally_connected2d]),
    # pooling
    ("max_pool2d", pooling, [F.max_pool2d, torch.max_pool2d], adapters.max_pool2d),
    ("avg_pool2d", pooling, [F.avg_pool2d]),
    ("upsample_nearest", resampling, [F.interpolate], adapters.interpolate),
    # activations
    ("relu", activation, [F.relu, torch.relu, Tensor.relu], adapters.relu),
    ("relu", activation, [F.relu_, torch.relu_, Tensor.relu_], adapters.in_place),
    ("leaky_relu", activation, [F.leaky_relu], adapters.leaky_relu),
    ("leaky_relu", activation, [F.leaky_relu_], adapters.in_place),
    ("sigmoid", activation, [F.sigmoid, torch.sigmoid, Tensor.sigmoid]),
    ("sigmoid", activation, [torch.sigmoid_, Tensor.sigmoid_], adapters.in_place),
    ("tanh", activation, [F.tanh, torch.tanh, Tensor.tanh]),
    ("tanh", activation, [torch.tanh_, Tensor.tanh_], adapters.in_place),
    ("gelu", activation, [F.gelu], adapters.gelu),
    ("cos", activation, [torch.cos, Tensor.cos]),
    ("k_winners", winners, [winners.k_winners]),
    ("softmax", activation, [F.softmax], adapters.softmax),
    ("softmax", activation, [torch.softmax, Tensor.softmax]),
    ("log_softmax", activation, [F.log_softmax], adapters.softmax),
    ("log_softmax", activation, [torch.log_softmax, Tensor.log_softmax]),
    # losses
    ("cross_entropy", loss, [F.cross_entropy], adapters.cross_entropy),
    ("nll_loss", loss, [F.nll_loss], adapters.nll_loss),
    ("mse_loss", loss, [F.mse_loss], adapters.mse_loss),
    # normalisation, noise
    ("batch_norm", normalization, [F.batch_norm]),
    ("layer_norm", normalization, [F.layer_norm]),
    ("dropout", dropout, [F.dropout], adapters.dropout),
    # arithmetic
    ("add", arithmetic, [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__]),
    ("add", arithmetic, [Tensor.add_, Tensor.__iadd__], adapters.in_place),
    ("sub", arithmetic, [torch.sub, Tensor.sub, Tensor.__sub__]),
    ("sub", arithmetic, [Tensor.sub_, Tensor.__isub__], adapters.in_place),
    ("sub", arithmetic, [Tensor.__rsub__], adapters.swapped),
    ("mul", arithmetic, [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__]),
    ("mul", arithmetic, [Tensor.mul_, Tensor.__imul__], adapters.in_place),
    ("div", arithmetic, [torch.div, Tensor.div, Tensor.__truediv__], adapters.div),
    ("div", arithmetic, [Tensor.div_, Tensor.__itruediv__], adapters.in_place),
    ("div", arithmetic, [Tensor.__rtruediv__, Tensor.__rdiv__], adapters.swapped),
    ("neg", arithmetic, [torch.neg, Tensor.neg, Tensor.__neg__]),
    ("pow", arithmetic, [torch.pow, Tensor.pow, Tensor.__pow__], adapters.power),
    ("exp", arithmetic, [torch.exp, Tensor.exp]),
    ("log", arithmetic, [torch.log, Tensor.log]),
    # rearranging, adding up
    ("reshape", shape, [torch.reshape, Tensor.reshape, Tensor.view], adapters.reshape),
    ("reshape", shape, [torch.flatten, Tensor.flatten], adapters.flatten),
    ("reshape", shape, [torch.squeeze, Tensor.squeeze], adapters.squeeze),
    ("reshape", shape, [torch.unsqueeze, Tensor.unsqueeze], adapters.unsqueeze),
    ("permute", shape, [torch.permute, Tensor.permute], adapters.permute),
    ("permute", shape, [torch.transpose, Tensor.transpose], adapters.transpose),
    ("permute", shape, [_getter("T"), torch.t, Tensor.t], adapters.reverse_axes),
    ("permute", shape, [_getter("mT")], adapters.matrix_transpose),
    ("pad", shape, [F.pad], adapters.pad),
    ("clone", shape, [torch.clone, Tensor.clone]),
    ("clone", shape, [Tensor.contiguous], adapters.contiguous),
    ("cast", shape, [Tensor.to], adapters.cast),
    ("cast", shape, [Tensor.float], adapters.cast_to(torch.float32)),
    ("cast", shape, [Tensor.double], adapters.cast_to(torch.float64)),
    ("cast", shape, [Tensor.bfloat16], adapters.cast_to(torch.bfloat16)),
    ("cast", shape, [Tensor.half], adapters.cast_to(torch.float16)),
    ("sum", shape, [torch.sum, Tensor.sum], adapters.reduction),
    ("mean", shape, [torch.mean, Tensor.mean], adapters.reduction),
]  # fmt: skip


def _table(rows: list[tuple]) -> Mapping[Callable, Rule]:
    table: dict[Callable, Rule] = {}
    for name, module, functions, *adapter in rows:
        forward, backward = (getattr(module, f"{name}_{half}") for half in ("forward", "backward"))
        table |= dict.fromkeys(functions, Rule(name, forward, backward, *adapter))
    return MappingProxyType(table)


TABLE: Mapping[Callable, Rule] = _table(_ROWS)
