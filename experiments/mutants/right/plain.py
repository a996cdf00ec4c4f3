"""Calls of plain torch functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.right.arguments import ARGUMENTS, conv, nll, pool
from mutants.right.draw import Call, Constant, Draw, holding


def _plain(function: Callable, *args: Any, **kwargs: Any) -> Call:
    """The call of a torch function, through a callable that checks nothing else."""

    held, args = holding(function, args)

    def call(*args, **kwargs):
        return held(*args, **kwargs)

    call.__name__ = getattr(function, "__name__", str(function))
    return Call(call.__name__, call, args, kwargs)


def _same(d: Draw, count: int, *ranks: int) -> tuple[Tensor, ...]:
    shape = d.shape(*ranks)
    return tuple(d.x(*shape) for _ in range(count))


def _axis(d: Draw, function: Callable, **kwargs: Any) -> Call:
    x = d.x(*d.shape(1, 2, 3))
    return _plain(function, x, d.random.randrange(x.dim()), **kwargs)


def _loss(d: Draw, function: Callable, **kwargs: Any) -> Call:
    return _plain(function, *_same(d, 2), reduction=d.pick("mean", "sum", "none"), **kwargs)


def _attention(d: Draw) -> Call:
    lead = (d.size(1, 2), d.size(1, 2, 3))
    t, s, e, v = d.size(), d.size(), d.size(), d.size()
    causal = d.chance(0.3)
    s = t if causal else s
    return _plain(
        F.scaled_dot_product_attention, d.x(*lead, t, e), d.x(*lead, s, e), d.x(*lead, s, v),
        is_causal=causal,
    )  # fmt: skip


def _index_add(d: Draw) -> Call:
    n, m, k = d.size(), d.size(), d.size()
    return _plain(torch.index_add, d.x(n, m), 0, d.index(n, k), d.x(k, m))


def _embedding(d: Draw) -> Call:
    n = d.size(2, 3, 5, 11)
    rows, weight = d.index(n, *d.shape(1, 2)), d.x(n, d.size())
    return _plain(F.embedding, rows, weight, padding_idx=d.pick(None, 0))


def _pooled(d: Draw) -> Call:
    dims = d.pick(1, 2, 3)
    if d.chance(0.5):
        shape = [d.size(1, 2, 3), d.size(1, 2), *(d.size() for _ in range(dims))]
        function = getattr(F, f"adaptive_{d.pick('avg', 'max')}_pool{dims}d")
        return _plain(function, d.x(*shape), [d.size(1, 2, 3) for _ in range(dims)])
    arguments = pool(d, dims)
    return _plain(getattr(F, f"{d.pick('max', 'avg')}_pool{dims}d"), *arguments)


def _convolved(d: Draw) -> Call:
    dims = d.pick(1, 2, 2, 3)
    return _plain(getattr(F, f"conv{dims}d"), *conv(d, dims))


def _interpolate(d: Draw) -> Call:
    mode = d.pick("nearest", "bilinear", "bicubic", "area")
    more = {} if mode in ("nearest", "area") else {"align_corners": d.pick(False, True)}
    x = d.x(d.size(1, 2), d.size(1, 2, 3), d.size(2, 3, 5), d.size(2, 3, 5))
    return _plain(F.interpolate, x, (d.size(1, 2, 5, 7), d.size(2, 3, 6)), mode=mode, **more)


def _einsum(d: Draw) -> Call:
    n, i, j, k = (d.size() for _ in range(4))
    equation, *shapes = d.pick(
        ("ni,ij->nj", (n, i), (i, j)),
        ("nij,njk,nk->ni", (n, i, j), (n, j, k), (n, k)),
        ("ii->i", (i, i)),
    )

    def einsum(*tensors: Tensor) -> Tensor:
        return torch.einsum(equation, *tensors)

    return _plain(einsum, *(d.x(*shape) for shape in shapes))


def _cosine(d: Draw) -> Call:
    shape = d.shape(1, 2)
    # Away from norms of 1e-8 and less, where torch's own gradient of it is wrong: the norm is
    # clamped to eps out of sight of autograd.
    x, y = (d.signed(*shape) for _ in range(2))
    return _plain(F.cosine_similarity, *(1e-3 * v / v.abs().min() for v in (x, y)), dim=-1)


# Without two that torch has wrong: hardsigmoid's derivative is 1/6 as float32 has it, in float64
# too; asinh's, 1/√(x² + 1), is 0 in float16 where x² overflows.
ELEMENTWISE: tuple[Callable, ...] = (
    F.relu, F.relu6, F.elu, F.selu, F.celu, F.silu, F.mish, F.gelu, F.softplus, F.logsigmoid,
    F.hardtanh, F.hardswish, F.softshrink, F.tanhshrink, F.softsign, F.leaky_relu,
    torch.abs, torch.sin, torch.cos, torch.exp, torch.expm1, torch.tanh, torch.sigmoid, torch.atan,
    torch.square, torch.erf, torch.sinh, torch.cosh,
)  # fmt: skip
POSITIVE: tuple[Callable, ...] = (
    torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p, torch.lgamma, torch.log2,
)  # fmt: skip
TORCH: tuple[Callable[[Draw], Call], ...] = (
    *[lambda d, f=f: _plain(f, d.tensor()) for f in ELEMENTWISE],
    *[lambda d, f=f: _plain(f, d.positive(*d.shape())) for f in POSITIVE],
    *[lambda d, f=f: _plain(f, *ARGUMENTS[f](d)) for f in ARGUMENTS if f is not F.nll_loss] * 2,
    # torch's own backward of it refuses pixels whose memory is not contiguous
    *[lambda d: _plain(F.nll_loss, *nll(d, pixels=False))] * 2,
    *[_convolved] * 8,
    *[_pooled] * 6,
    *[_attention] * 4,
    *[_embedding] * 2,
    *[_einsum] * 2,
    *[lambda d, f=f: _axis(d, f) for f in (
        torch.cumsum, torch.logsumexp, torch.amax, torch.amin, torch.prod, torch.cumprod,
        torch.sort, torch.median, torch.unbind, torch.softmax)],
    *[lambda d, f=f: _loss(d, f) for f in (
        F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.mse_loss)] * 2,
    *[lambda d, f=f: _plain(f, *_same(d, 2)) for f in (
        torch.maximum, torch.minimum, torch.fmax, torch.atan2, torch.hypot)],
    lambda d: _plain(torch.gather, d.x(n := d.size(), m := d.size()), 1, d.index(m, n, d.size())),
    _index_add,
    _interpolate,
    _cosine,
    lambda d: _plain(torch.where, d.index(2, 3, 5).bool(), d.x(3, 5), d.x(3, 5)),
    lambda d: _plain(torch.clamp, d.x(*d.shape()), -1, 1),
    lambda d: _plain(torch.clamp, d.unit(*d.shape()), d.unit(), None),
    lambda d: _plain(F.binary_cross_entropy_with_logits, d.x(3, 5), d.share(3, 5)),
    lambda d: _plain(F.binary_cross_entropy, d.share(3, 5), d.share(3, 5)),
    lambda d: _plain(F.kl_div, d.x(3, 5), d.share(3, 5), reduction=d.pick("batchmean", "sum")),
    # of variances above 1e-6, to which torch clamps them out of sight of autograd
    lambda d: _plain(F.gaussian_nll_loss, d.x(3, 5), d.x(3, 5), d.unit(3, 5).abs() + 0.1),
    lambda d: _plain(
        F.soft_margin_loss, d.x(3, 5), Constant((2 * d.index(2, 3, 5) - 1).to(d.dtype))
    ),
    lambda d: _plain(F.poisson_nll_loss, d.small(3, 5), d.positive(3, 5)),
    lambda d: _plain(F.triplet_margin_loss, d.x(3, 5), d.x(3, 5), d.x(3, 5)),
    lambda d: _plain(F.normalize, d.signed(*d.shape(2)), dim=-1),
    lambda d: _plain(torch.linalg.vector_norm, d.signed(*d.shape(1, 2))),
    lambda d: _plain(torch.var, d.x(*d.shape(1), 3), -1),
    lambda d: _plain(torch.std, d.signed(d.size(), 5), -1),
    lambda d: _plain(F.pad, d.x(2, 3, 5), (1, 2), mode=d.pick("constant", "reflect", "replicate",
                                                             "circular")),
    lambda d: _plain(F.unfold, d.x(d.size(), d.size(1, 2), 5, 6), (2, 3), d.pick(1, 2), 1),
    lambda d: _plain(F.fold, d.x(d.size(), 2 * 6, 4 * 4), (5, 6), (2, 3)),
    lambda d: _plain(F.glu, d.x(d.size(), 6), -1),
    lambda d: _plain(F.prelu, d.x(2, 3, d.size()), d.x(d.pick(1, 3))),
    lambda d: _plain(F.bilinear, d.x(3, 2), d.x(3, 5), d.x(4, 2, 5), d.x(4)),
    lambda d: _plain(F.pixel_shuffle, d.x(d.size(), 4, 2, 3), 2),
    lambda d: _plain(F.local_response_norm, d.unit(2, 5, 3), 3),
    lambda d: _plain(F.group_norm, d.x(d.size(), 4, 3), 2, d.x(4), d.x(4)),
    lambda d: _plain(F.instance_norm, d.x(d.size(), 3, 5), weight=d.x(3), bias=d.x(3)),
    lambda d: _plain(F.rms_norm, d.x(*d.shape(1, 2), 5), (5,), d.x(5)),
    lambda d: _plain(torch.cat, [d.x(2, 3), d.x(d.size(), 3)]),
    lambda d: _plain(torch.stack, [d.x(2, 3), d.x(2, 3)], 1),
    lambda d: _plain(torch.chunk, d.x(d.size(), 3), 2),
    lambda d: _plain(torch.addmm, d.x(3, 4), d.x(3, d_ := d.size()), d.x(d_, 4)),
    lambda d: _plain(torch.cdist, d.x(3, 4), d.x(2, 4)),
    lambda d: _plain(torch.topk, d.x(d.size(), 5), d.pick(1, 2, 3)),
    lambda d: _plain(torch.outer, d.x(d.size()), d.x(d.size())),
    lambda d: _plain(torch.tril, d.x(3, d.size())),
    lambda d: _plain(torch.roll, d.x(3, d.size()), d.pick(1, -1), 1),
)  # fmt: skip


def torch_call(d: Draw) -> Call:
    return d.pick(*TORCH)(d)
