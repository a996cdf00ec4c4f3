"""What elementwise functions, reductions, losses and attention are taken for."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop.check.diagnosis.confusions import UNFIT, Siblings

ACTIVATIONS: dict[str, Callable] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu,
    "gelu of the tanh form": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "softplus": F.softplus, "elu": F.elu, "leaky_relu": F.leaky_relu, "selu": F.selu,
    "mish": F.mish, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "relu6": F.relu6,
    "hardtanh": F.hardtanh, "softsign": F.softsign, "exp": torch.exp, "log_sigmoid": F.logsigmoid,
    "erf": torch.erf, "sin": torch.sin, "cos": torch.cos, "softshrink": F.softshrink,
    "hardshrink": F.hardshrink, "tanhshrink": F.tanhshrink, "celu": F.celu, "abs": torch.abs,
    "square": torch.square, "sqrt": torch.sqrt, "log": torch.log, "log1p": torch.log1p,
    "expm1": torch.expm1, "reciprocal": torch.reciprocal, "rsqrt": torch.rsqrt,
}  # fmt: skip
LOSSES = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.hinge_embedding_loss,
    F.poisson_nll_loss,
)  # fmt: skip
CARRIED_OUT = ("inplace", "_stacklevel", "dtype", "size_average", "reduce", "return_indices")


def without_an_option(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Siblings:
    """The same function with one of its options left out."""
    try:
        given = inspect.signature(func).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a function that Python knows no signature of
        return
    for name, parameter in given.signature.parameters.items():
        default = parameter.default
        if name not in given.arguments or default is parameter.empty or name in CARRIED_OUT:
            continue
        if given.arguments[name] is not default and not isinstance(default, Tensor):
            with suppress(*UNFIT):
                yield f"the same without its {name}", func(**{**given.arguments, name: default})


def of_activation(own: str) -> Callable[..., Siblings]:
    def siblings(x: Tensor, *_: Any, **__: Any) -> Siblings:
        yield "the identity", x
        for name, function in ACTIVATIONS.items():
            yield name + " without its options" * (name == own), function(x)

    return siblings


def of_softmax(x: Tensor, dim: int, **_: Any) -> Siblings:
    yield "log_softmax", torch.log_softmax(x, dim)
    yield "sigmoid", torch.sigmoid(x)
    for other in range(x.dim()):
        yield f"softmax over axis {other}", torch.softmax(x, other)


def of_log_softmax(x: Tensor, dim: int, **_: Any) -> Siblings:
    yield "softmax", torch.softmax(x, dim)
    for other in range(x.dim()):
        yield f"log_softmax over axis {other}", torch.log_softmax(x, other)


def of_running_sum(x: Tensor, dim: int, *_: Any, **__: Any) -> Siblings:
    yield "the same from the other end", x.flip(dim).cumsum(dim).flip(dim)
    yield "the same without its own entry", x.cumsum(dim) - x
    yield "the identity", x


def of_extreme(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Siblings:
    dims = tuple(range(x.dim())) if dim is None else dim
    for function in (torch.amax, torch.amin, torch.mean, torch.logsumexp):
        yield function.__name__, function(x, dims, keepdim)


def of_spread(x: Tensor, *args: Any, **kwargs: Any) -> Siblings:
    other = {k: v for k, v in kwargs.items() if k not in ("unbiased", "correction")}
    dims = [a for a in args[:1] if type(a) is not bool]
    for function in (torch.var, torch.std):
        for n in (0, 1):
            yield f"{function.__name__} with n − {n}", function(x, *dims, correction=n, **other)


def of_pair(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Siblings:
    yield "maximum", torch.maximum(a, b)
    yield "minimum", torch.minimum(a, b)
    yield "hypot", torch.hypot(a, b)
    yield "atan2", torch.atan2(a, b)
    yield "atan2 of them exchanged", torch.atan2(b, a)
    yield "the mean of both", (a + b) / 2


def of_loss(x: Tensor, y: Tensor, *_: Any, **kwargs: Any) -> Siblings:
    for loss in LOSSES:
        with suppress(*UNFIT):
            yield loss.__name__, loss(x, y, reduction=kwargs.get("reduction", "mean"))


def of_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, **_: Any,
) -> Siblings:  # fmt: skip
    d = query.shape[-1]
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    common = {"attn_mask": attn_mask, "is_causal": is_causal}
    yield "the same without its attn_mask", attend(query, key, value, scale=scale)
    for text, factor in {"1": 1.0, "1/d": 1 / d, "1/√d": d**-0.5}.items():
        yield f"the same scaled by {text}", attend(query, key, value, scale=factor, **common)
