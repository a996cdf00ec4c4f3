"""What torch does in one kernel (a norm, a softmax, a loss), taken apart into the steps that a
hand-written backward is about."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(dim or range(x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    n = math.prod(x.shape[d] for d in dims)
    var = (centred * centred).mean(dims, keepdim=True)
    correction = 1 if correction is None else correction
    if correction:
        var = var * (n / max(n - correction, 0))
    return (var, mean) if keepdim else (var.squeeze(dims), mean.squeeze(dims))


def _normalise(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = _var_mean(x, dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + eps)
    return (x - mean) * inverse, mean, inverse


def _scaled(y: Tensor, w: Any, b: Any) -> Tensor:
    """With a weight and a bias for each channel."""
    shape = [1, -1] + [1] * (y.dim() - 2)
    y = y if w is None else y * w.view(shape)
    return y if b is None else y + b.view(shape)


def _batch_norm(x: Tensor, w: Any, b: Any, mean: Any, var: Any, train: bool, _: Any, eps: Any):
    shape = [1, -1] + [1] * (x.dim() - 2)
    if train:
        y, mean, inverse = _normalise(x, [d for d in range(x.dim()) if d != 1], eps)
    else:
        inverse = torch.rsqrt(var + eps)
        y = (x - mean.view(shape)) * inverse.view(shape)
    return _scaled(y, w, b), mean.flatten(), inverse.flatten()


def _group_norm(x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    y, mean, inverse = _normalise(x.reshape(n, groups, -1), [2], eps)
    return _scaled(y.view(x.shape), w, b), mean.flatten(1), inverse.flatten(1)


class InstanceNorm(TorchFunctionMode):
    """Inside, instance norm is taken apart: torch folds the batch into the channels for it, where
    nobody would find the axis again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.instance_norm:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            x, mean, _, w, b, _, _, eps = given.args
            if mean is None:
                return _scaled(_normalise(x, list(range(2, x.dim())), eps)[0], w, b)
        return func(*args, **(kwargs or {}))


def _log_softmax(x: Tensor, dim: int, _: bool = False) -> Tensor:
    return x - torch.logsumexp(x, dim, keepdim=True)


def _softmax(x: Tensor, dim: int, _: Any = None, dtype: Any = None) -> Tensor:
    return _log_softmax(x if dtype is None else x.to(dtype), dim).exp()


def _bce_with_logits(
    x: Tensor, t: Tensor, w: Any = None, positive: Any = None, reduction: int = 1
) -> Any:
    if positive is not None:
        return NotImplemented
    loss = torch.nn.functional.softplus(x) - t * x
    loss = loss if w is None else loss * w
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _convolution(x: Tensor, w: Tensor, b: Any, *rest: Any) -> Any:
    if b is None:
        return NotImplemented
    return torch.convolution(x, w, None, *rest) + b.view([-1] + [1] * (x.dim() - 2))


def _addmm(b: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = x @ y
    product = product if alpha == 1 else product * alpha
    return product + (b if beta == 1 else b * beta)


OURS: dict[Any, Callable] = {
    aten.var.correction: lambda *args, **options: _var_mean(*args, **options)[0],
    aten.var_mean.correction: _var_mean,
    aten.std.correction: lambda *args, **options: _var_mean(*args, **options)[0].sqrt(),
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: lambda x, w, b, *rest: _batch_norm(
        x, w, b, None, None, *rest
    ),
    aten.native_group_norm.default: _group_norm,
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten.binary_cross_entropy_with_logits.default: _bce_with_logits,
    aten.gelu.default: _gelu,
    aten.convolution.default: _convolution,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.copy.default: lambda to, x, _=False: x.expand(to.shape).to(to.dtype),
}
TORCHS_OWN = {  # operations of which torch has a decomposition that is as plain
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "binary_cross_entropy", "smooth_l1_loss",
    "huber_loss", "_prelu_kernel", "addcmul", "addcdiv", "lerp", "native_dropout",
    "log_sigmoid_forward", "linalg_vector_norm", "masked_fill", "rsub", "glu", "elu", "hardswish",
    "hardsigmoid", "mish", "_unsafe_view", "silu", "leaky_relu", "native_layer_norm",
}  # fmt: skip
TABLE: dict[Any, Callable] = {
    func: rule
    for func, rule in torch._decomp.decomposition_table.items()
    if isinstance(func, torch._ops.OpOverload) and func.overloadpacket.__name__ in TORCHS_OWN
} | OURS
