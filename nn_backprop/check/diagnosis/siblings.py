"""Diagnosis by confusion: is it the gradient of a function easily taken for the one in the forward?

The exact GELU and its tanh form, a convolution and the transposed one, a mask and no mask: their
values may be close, and their derivatives get exchanged. So the forward runs once more for each
such sibling g of one function f in it, with the value of f and the derivative of g,

    g(x) + stop(f(x) − g(x)),

and where autograd then gives the wrong gradient, the sibling is the diagnosis. So is, last of all,
an input that is turned, mirrored, moved, or another one in its place.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause

EXACT = 1e-6  # the residual below which a sibling explains a gradient
MOST_TRIALS = 400
# What a sibling means, where it is not that the derivative of another function was taken.
KINDS = {
    "the identity": "missing-factor", "the sum over each window": "missing-factor",
    "the convolution of all groups' channels": "extra-term",
    "the same with its groups interleaved": "permuted",
    **{f"the same without its {option}": kind for option, kind in {
        "weight": "missing-factor", "pos_weight": "missing-factor", "attn_mask": "missing-factor",
        "is_causal": "missing-factor", "ignore_index": "extra-term", "padding_idx": "extra-term",
        "label_smoothing": "missing-term",
    }.items()},
}  # fmt: skip
BITS = 12.0  # after any single mistake in the chain rule itself

POOLS: dict[int, tuple[Callable, Callable]] = {
    1: (F.avg_pool1d, F.max_pool1d),
    2: (F.avg_pool2d, F.max_pool2d),
    3: (F.avg_pool3d, F.max_pool3d),
}
UNFIT = (RuntimeError, TypeError, ValueError, IndexError)  # another number of axes, say

Forward = Callable[[dict[str, Tensor]], list[Tensor]]

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


def _of_softmax(x: Tensor, dim: int, **_: Any) -> Iterator[tuple[str, Tensor]]:
    yield "log_softmax", torch.log_softmax(x, dim)
    yield "sigmoid", torch.sigmoid(x)
    for other in range(x.dim()):
        yield f"softmax over axis {other}", torch.softmax(x, other)


def _of_log_softmax(x: Tensor, dim: int, **_: Any) -> Iterator[tuple[str, Tensor]]:
    yield "softmax", torch.softmax(x, dim)
    for other in range(x.dim()):
        yield f"log_softmax over axis {other}", torch.log_softmax(x, other)


def _of_transposed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    *rest: Any, **kwargs: Any,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The plain one of the same kernel, where the sizes agree."""
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    mirrored = weight.flip(tuple(range(2, weight.dim())))
    pads = [k - 1 - p for k, p in zip(weight.shape[2:], _each(padding, x.dim() - 2), strict=True)]
    for name, kernel in {"": weight, " with the mirrored kernel": mirrored}.items():
        yield f"the plain convolution{name}", convolve(x, kernel.transpose(0, 1), bias, 1, pads)
        if weight.shape[0] == weight.shape[1]:
            text = f"the plain convolution{name}, its channels exchanged"
            yield text, convolve(x, kernel, bias, 1, pads)


def _of_adaptive_pooling(x: Tensor, output_size: Any) -> Iterator[tuple[str, Tensor]]:
    dims = len(output_size) if isinstance(output_size, (tuple, list)) else None
    for d in [dims] if dims else (1, 2, 3):
        sizes = _each(output_size, d)
        if x.dim() > d:
            steps = [n // s for n, s in zip(x.shape[-d:], sizes, strict=True)]
            yield "pooling in windows of equal size", POOLS[d][0](x, steps, steps)


def _of_max_pooling(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, *_: Any, **__: Any,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
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
            _, at = largest(x, *options, return_indices=True)
            if dims == 2 and dilation in (1, (1, 1)):
                within = _within(at, x.shape[-1], kernel_size, stride, padding)
                z = x.flatten(-2).gather(-1, within.flatten(-2)).view(at.shape)
                yield "taking the entry whose place in the plane is that within the window", z
                turned = at // x.shape[-1] * x.shape[-2] + at % x.shape[-1]
                turned = turned.clamp(max=x.shape[-1] * x.shape[-2] - 1)
                z = x.flatten(-2).gather(-1, turned.flatten(-2)).view(at.shape)
                yield "taking the entry at row · H + column instead of row · W + column", z
            pads = [p for p in reversed(_each(padding, dims)) for _ in range(2)]
            z = largest(F.pad(x, pads), kernel_size, stride, 0, dilation, ceil_mode)
            yield "pooling with zeros around", z
            mean = average(x, kernel_size, stride, padding, ceil_mode)
            yield "average pooling", mean
            yield "the sum over each window", mean * math.prod(_each(kernel_size, dims))
            for other in (1, kernel_size):
                z = largest(x, kernel_size, other, padding, dilation, ceil_mode)
                yield f"pooling with stride {other}", _cropped(z, mean.shape)


def _of_average_pooling(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    counted = "without" if count_include_pad else "with"
    for dims, (pool, largest) in POOLS.items():
        options = (kernel_size, stride, padding, 1, ceil_mode)
        entries = math.prod(_each(kernel_size, dims))
        with suppress(*UNFIT):
            yield (
                f"pooling {counted} the padding in the divisor",
                pool(x, kernel_size, stride, padding, ceil_mode, not count_include_pad),
            )
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


def _picked(x: Tensor, by: Tensor, largest: Callable, dims: int, options: tuple) -> Tensor:
    """The entry of x in each window where `by` is largest."""
    _, at = largest(by, *options, return_indices=True)
    return x.flatten(-dims).gather(-1, at.flatten(-dims)).view(at.shape)


def _within(at: Tensor, width: int, kernel_size: Any, stride: Any, padding: Any) -> Tensor:
    """The place within each window, row by row, of an entry at this place in the plane."""
    kernel, pads = _each(kernel_size, 2), _each(padding, 2)
    steps = _each(stride or kernel_size, 2)
    rows, columns = (
        torch.arange(n) * s - p for n, s, p in zip(at.shape[-2:], steps, pads, strict=True)
    )
    return (at // width - rows[:, None]) * kernel[1] + at % width - columns


def _cropped(z: Tensor, shape: torch.Size) -> Tensor:
    return z[tuple(slice(n) for n in shape)]


def _of_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """In groups: each kernel sees every group, or groups of other channels."""
    if groups == 1:
        return
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    tiled = weight.repeat(1, groups, *[1] * (x.dim() - 2))
    z = convolve(x, tiled, bias, stride, padding, dilation)
    yield "the convolution of all groups' channels", z
    z = convolve(_interleaved(x, groups), weight, bias, stride, padding, dilation, groups)
    yield "the same with its groups interleaved", z


def _interleaved(x: Tensor, groups: int) -> Tensor:
    """Channels k, k + groups, … one after another."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)


def _of_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    def scaled(z: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        z = z if weight is None else z * weight.view(shape)
        return z if bias is None else z + bias.view(shape)

    channels = x.shape[1]
    z = _interleaved(F.group_norm(_interleaved(x, groups), groups, eps=eps), channels // groups)
    yield "the same with its groups interleaved", scaled(z)
    for other, text in ((1, "one group"), (channels, "as many groups as channels"),
                        (channels // groups, "groups and their channels exchanged")):  # fmt: skip
        yield f"the same with {text}", scaled(F.group_norm(x, other, eps=eps))
    yield "group_norm without ε", F.group_norm(x, groups, weight, bias, 0.0)


def _of_interpolation(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    smooth = {3: ("linear",), 4: ("bilinear", "bicubic"), 5: ("trilinear",)}[x.dim()]
    for other in ("nearest", "nearest-exact", "area"):
        yield f"interpolation of mode {other}", F.interpolate(x, size, scale_factor, other)
    for other, corners in itertools.product(smooth, (False, True)):
        z = F.interpolate(x, size, scale_factor, other, align_corners=corners)
        yield f"interpolation of mode {other} with align_corners={corners}", z
    if scale_factor in (2, 3, 4):  # the copies one after another
        yield "tiling", x.repeat(1, 1, *[int(scale_factor)] * (x.dim() - 2))


def _of_padding(
    x: Tensor, pad: Any, mode: str = "constant", value: Any = None
) -> Iterator[tuple[str, Tensor]]:
    for other in ("constant", "reflect", "replicate", "circular"):
        with suppress(*UNFIT):
            yield f"padding of mode {other}", F.pad(x, pad, other)


def _of_accumulation(x: Tensor, dim: int, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
    yield "the same from the other end", x.flip(dim).cumsum(dim).flip(dim)
    yield "the same without its own entry", x.cumsum(dim) - x
    yield "the identity", x


def _of_extreme(
    x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
) -> Iterator[tuple[str, Tensor]]:
    dims = tuple(range(x.dim())) if dim is None else dim
    yield "amax", torch.amax(x, dims, keepdim)
    yield "amin", torch.amin(x, dims, keepdim)
    yield "mean", torch.mean(x, dims, keepdim)
    yield "logsumexp", torch.logsumexp(x, dims, keepdim)


def _of_spread(x: Tensor, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    for text, function in {"var": torch.var, "std": torch.std}.items():
        for correction in (0, 1):
            other = {k: v for k, v in kwargs.items() if k not in ("unbiased", "correction")}
            dims = [a for a in args[:1] if type(a) is not bool]
            yield (
                f"{text} with n − {correction}",
                function(x, *dims, correction=correction, **other),
            )


def _of_pair(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
    functions = {"maximum": torch.maximum, "minimum": torch.minimum, "hypot": torch.hypot,
                 "atan2": torch.atan2, "the mean of both": lambda a, b: (a + b) / 2}  # fmt: skip
    for text, function in functions.items():
        yield text, function(a, b)
        if text == "atan2":
            yield "atan2 of them exchanged", function(b, a)


def _of_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, **_: Any,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    d = query.shape[-1]
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    common = {"attn_mask": attn_mask, "is_causal": is_causal}
    yield "the same without its attn_mask", attend(query, key, value, scale=scale)
    for text, factor in {"1": 1.0, "1/d": 1 / d, "1/√d": d**-0.5}.items():
        yield f"the same scaled by {text}", attend(query, key, value, scale=factor, **common)


def _of_options(
    func: Callable, args: tuple, kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
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
                left_out = {**given.arguments, name: default}
                yield f"the same without its {name}", func(**left_out)


def _of_layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    yield "rms_norm", F.rms_norm(x, list(shape), weight, eps) + (0 if bias is None else bias)
    yield "layer_norm without ε", F.layer_norm(x, shape, weight, bias, 0.0)


def _of_batch_norm(
    x: Tensor, mean: Any, variance: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    yield "batch_norm in training", F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    if mean is not None:
        yield (
            "batch_norm in evaluation",
            F.batch_norm(x, mean, variance, weight, bias, False, 0, eps),
        )
    if training:
        yield "batch_norm without ε", F.batch_norm(x, None, None, weight, bias, True, momentum, 0.0)
    if x.dim() > 2:
        yield "instance_norm", F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _of_instance_norm(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    yield "batch_norm", F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    z = F.layer_norm(x, x.shape[1:], eps=eps)
    if weight is None and bias is None:
        yield "layer_norm", z
    yield "instance_norm without ε", F.instance_norm(x, weight=weight, bias=bias, eps=0.0)


def _of_loss(x: Tensor, y: Tensor, *_: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    reduction = kwargs.get("reduction", "mean")
    for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss,
                 F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
                 F.hinge_embedding_loss, F.poisson_nll_loss):  # fmt: skip
        with suppress(*UNFIT):
            yield loss.__name__, loss(x, y, reduction=reduction)


CARRIED_OUT = ("inplace", "_stacklevel", "dtype", "size_average", "reduce", "return_indices")

SIBLINGS: dict[str, Callable[..., Iterator[tuple[str, Tensor]]]] = {
    **{f"conv{d}d": _of_convolution for d in (1, 2, 3)}, "group_norm": _of_group_norm,
    "batch_norm": _of_batch_norm, "instance_norm": _of_instance_norm,
    "interpolate": _of_interpolation, "pad": _of_padding, "cumsum": _of_accumulation,
    "scaled_dot_product_attention": _of_attention,
    **{name: _of_extreme for name in ("amax", "amin")},
    **{name: _of_spread for name in ("var", "std")},
    **{name: _of_pair for name in ("maximum", "minimum", "hypot", "atan2", "arctan2")},
    "softmax": _of_softmax, "log_softmax": _of_log_softmax, "layer_norm": _of_layer_norm,
    **{f"conv_transpose{d}d": _of_transposed_convolution for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _of_adaptive_pooling for d in (1, 2, 3)},
    **{f"max_pool{d}d": _of_max_pooling for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _of_average_pooling for d in (1, 2, 3)},
    **{f"{loss}_loss": _of_loss for loss in ("mse", "l1", "smooth_l1", "huber", "soft_margin")},
    **{f"binary_cross_entropy{more}": _of_loss for more in ("", "_with_logits")},
}  # fmt: skip


def explain(m: Mismatch, forward: Forward) -> list[Hypothesis]:
    """The siblings that give exactly the wrong gradient. Never raises: what cannot be run in the
    place of another is no sibling."""
    if m.actual.shape != m.expected.shape:
        return []
    error = (m.actual - m.expected).norm().item()
    found: dict[str, Hypothesis] = {}
    trials = list(itertools.islice(_trials(m, forward), MOST_TRIALS))
    for kind, text, mode in trials:
        with suppress(Exception):
            wrong = _gradient(m, forward, mode)
            left = (m.actual - wrong).norm().item() / error
            if left <= EXACT and kind not in found:
                bits = BITS + math.log2(len(trials))
                evidence = f"the forward with that derivative reproduces it to {left:.1g}"
                detail = f"grad_{m.name} {text}"
                found[kind] = Hypothesis(bits, Cause(kind, detail, evidence, left))
    return list(found.values())


class _At(TorchFunctionMode):
    """Changes nothing: the derivative is taken at other inputs."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.inputs = inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _operands(m: Mismatch) -> Iterator[tuple[str, str, TorchFunctionMode]]:
    """The derivative taken where one operand is another one, or is turned, mirrored or moved."""
    for name, t in m.inputs.items():
        others = [("wrong-operand", f"−{name}", -t)]
        for a, b in itertools.combinations(range(t.dim()), 2):
            if t.shape[a] == t.shape[b] > 1:
                text = f"{name} with the axes {a} and {b} exchanged"
                others.append(("wrong-operand", text, t.transpose(a, b)))
        for d, n in enumerate(t.shape):
            if n > 1:
                others.append(("flipped", f"{name} mirrored along axis {d}", t.flip(d)))
            for by in (1, -1) if n > 2 else ():
                others.append(("shifted", f"{name} rolled by {by} along axis {d}", t.roll(by, d)))
        known = {**m.inputs, **{f"output {k}": z for k, z in enumerate(m.outputs)}}
        for other, value in known.items():
            if other != name and value.shape == t.shape:
                others.append(("wrong-operand", other, value))
        for kind, text, value in others:
            said = f"has the derivative at {text}, where {name} belongs"
            yield kind, said, _At({**m.inputs, name: value})


def _trials(m: Mismatch, forward: Forward) -> Iterator[tuple[str, str, TorchFunctionMode]]:
    """Kind, sentence, and the mode in which autograd would give that gradient."""
    listing = _Listing()
    try:
        _gradient(m, forward, listing)
    except Exception:  # not for autograd
        return
    text = "counts what a mask leaves out: it is not multiplied by the mask"
    yield "missing-factor", text, _Unmasked()
    alike: dict[str, list[int]] = {}  # the places of each function
    for place, (name, _) in listing.found.items():
        alike.setdefault(name, []).append(place)
    alone = [([place], "") for place in listing.found]
    together = [(places, ", each time") for places in alike.values() if len(places) > 1]
    for places, often in together + alone:
        name, texts = listing.found[places[0]]
        for text in texts:
            kind = KINDS.get(text, "wrong-operand")
            said = f"has the derivative of {text} where that of {name} belongs{often}"
            yield kind, said, _InItsPlace(places, text)
    yield from _operands(m)


def _gradient(m: Mismatch, forward: Forward, mode: TorchFunctionMode) -> Tensor:
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        at = mode.inputs if isinstance(mode, _At) else m.inputs
        leaves = {n: v.clone().requires_grad_(n == m.name) for n, v in at.items()}
        with mode:
            outputs = forward(leaves)
        pairs = [(z, u) for z, u in zip(outputs, m.upstream, strict=True) if z.requires_grad]
        (grad,) = torch.autograd.grad(
            [z for z, _ in pairs], [leaves[m.name]], [u for _, u in pairs], allow_unused=True
        )
    return torch.zeros_like(m.expected) if grad is None else grad


def _alternatives(
    func: Callable, z: Any, args: tuple, kwargs: dict[str, Any], only: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The siblings of a call, by name, with their outputs; or only the one of that name."""
    name = getattr(func, "__name__", "").strip("_").removesuffix("_with_indices")
    z = z[0] if isinstance(z, tuple) and z else z
    if not isinstance(z, Tensor) or not z.requires_grad or not args:
        return

    def activations() -> Iterator[tuple[str, Tensor]]:
        yield "the identity", args[0]
        for other, g in ACTIVATIONS.items():
            text = f"{other} without its options" if other == name else other
            if only in (None, text):
                yield text, g(args[0])

    for siblings in (activations() if name in ACTIVATIONS else (),
                     SIBLINGS[name](*args, **kwargs) if name in SIBLINGS else (),
                     _of_options(func, args, kwargs)):  # fmt: skip
        with suppress(*UNFIT, KeyError):
            for text, g in siblings:
                if only in (None, text) and g.shape == z.shape and not torch.equal(g, z):
                    yield text, g


class _Listing(TorchFunctionMode):
    """Notes the calls that have siblings, by their number among all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: dict[int, tuple[str, list[str]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        if texts := [text for text, _ in _alternatives(func, z, args, kwargs or {})]:
            self.found[self.calls] = func.__name__.strip("_"), texts
        self.calls += 1
        return z


class _InItsPlace(TorchFunctionMode):
    """The calls of these numbers take the derivative of the sibling of that name."""

    def __init__(self, places: list[int], text: str) -> None:
        super().__init__()
        self.places, self.text, self.calls = places, text, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        if self.calls in self.places:
            for _, g in _alternatives(func, z, args, kwargs or {}, self.text):
                if isinstance(z, tuple):  # and the places of the maxima
                    z = (g + (z[0] - g).detach(), *z[1:])
                else:
                    z = g + (z - g).detach()
                break
        self.calls += 1
        return z


class _Unmasked(TorchFunctionMode):
    """In the derivative, every mask that is not itself computed from another is all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shadows: dict[int, tuple[Tensor, Tensor]] = {}  # of constants: without the mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        flat, spec = tree_flatten((args, kwargs or {}))
        others = [self.shadow(a) if isinstance(a, Tensor) else a for a in flat]
        if all(a is b for a, b in zip(flat, others, strict=True)) or not isinstance(z, Tensor):
            return z
        more_args, more_kwargs = tree_unflatten(others, spec)
        g = func(*more_args, **more_kwargs)
        if z.requires_grad:
            return g + (z - g).detach()
        self.shadows[id(z)] = (z, g)
        return z

    def shadow(self, t: Tensor) -> Tensor:
        if id(t) in self.shadows:
            return self.shadows[id(t)][1]
        if t.requires_grad or not (t.dtype == torch.bool or t.is_floating_point()):
            return t
        is_mask = bool(((t == 0) | (t == 1)).all())
        if is_mask and bool((t == 1).any()) and bool((t == 0).any()):
            self.shadows[id(t)] = (t, torch.ones_like(t))
            return self.shadows[id(t)][1]
        return t


def _each(size: Any, dims: int) -> list[int]:
    return list(size) if isinstance(size, (tuple, list)) else [size] * dims
