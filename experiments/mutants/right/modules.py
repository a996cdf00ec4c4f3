"""Modules of torch.nn, and small networks whose layers are rules as Functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutants.mutant import layer
from mutants.right.arguments import conv
from mutants.right.draw import Call, Draw
from nn_backprop import as_function, rules


def module(d: Draw) -> Call:
    with torch.random.fork_rng():
        torch.manual_seed(d.random.randrange(10**6))
        made, args, kwargs = d.pick(*MODULES)(d)
    made = made.to(d.dtype)
    scale = d.scale() if d.chance(0.5) else 1.0
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    made.train(d.chance(0.7))
    if d.chance(0.1):
        for number, parameter in enumerate(made.parameters()):
            parameter.requires_grad_(number % 2 == 0)
    return Call(type(made).__name__, made, args, kwargs)


Made = tuple[nn.Module, tuple, dict[str, Any]]


def _linear_module(d: Draw) -> Made:
    i, o = d.size(), d.size()
    return nn.Linear(i, o, bias=d.chance(0.7)), (d.x(*d.shape(0, 1, 2), i),), {}


def _conv_module(d: Draw) -> Made:
    dims = d.pick(1, 2, 2, 3)
    x, weight, bias, stride, padding, dilation, groups = conv(d, dims)
    kind = getattr(nn, f"Conv{dims}d")
    fits = all(p < size for p, size in zip(padding, x.shape[-dims:], strict=True))
    mode: Any = d.pick("circular", "replicate") if fits and d.chance(0.4) else "zeros"
    module = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(stride),
        tuple(padding), tuple(dilation), groups, bias is not None,
        mode,
    )  # fmt: skip
    return module, (x,), {}


def _transposed(d: Draw) -> Made:
    c, o, groups, stride = d.size(1, 2, 3), d.size(1, 2), d.pick(1, 2), d.size(1, 2, 3)
    module = nn.ConvTranspose2d(
        c * groups, o * groups, d.size(2, 3), stride, d.size(0, 1), d.size(0, stride - 1), groups,
        d.chance(0.7),
    )  # fmt: skip
    return module, (d.x(d.size(1, 2), c * groups, d.size(2, 3, 4), d.size(2, 3)),), {}


def _batch_norm_module(d: Draw) -> Made:
    c = d.size(1, 2, 3, 5)
    kind, more = d.pick((nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (2, 3)))
    module = kind(c, affine=d.chance(0.8), track_running_stats=d.chance(0.8), eps=d.pick(1e-5, 0.1))
    return module, (d.x(d.size(2, 3, 5), c, *more),), {}


def _norm_module(d: Draw) -> Made:
    c, t, n = d.size(2, 4, 6), d.size(2, 3, 5), d.size(1, 2, 3)
    return d.pick(
        lambda: (nn.LayerNorm(t, elementwise_affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.LayerNorm((c, t)), (d.x(n, c, t),), {}),
        lambda: (nn.GroupNorm(2, c, affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.InstanceNorm1d(c, affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.RMSNorm(t), (d.x(n, c, t),), {}),
    )()


def _recurrent(d: Draw) -> Made:
    i, h, t, n = d.size(1, 2, 3), d.size(1, 2, 3), d.size(1, 2, 4), d.size(1, 2, 3)
    kind = d.pick(nn.RNN, nn.LSTM, nn.GRU)
    module = kind(
        i, h, d.pick(1, 1, 2), bias=d.chance(0.8), batch_first=d.chance(0.5),
        bidirectional=d.chance(0.4),
    )  # fmt: skip
    x = d.x(n, t, i) if module.batch_first else d.x(t, n, i)
    if d.chance(0.5):
        return module, (x,), {}
    states = module.num_layers * (2 if module.bidirectional else 1)
    h0 = d.unit(states, n, h)
    return module, (x, (h0, d.unit(states, n, h)) if kind is nn.LSTM else h0), {}


def _cell(d: Draw) -> Made:
    i, h, n = d.size(), d.size(), d.size()
    return d.pick(nn.RNNCell, nn.LSTMCell, nn.GRUCell)(i, h), (d.x(n, i),), {}


def _attention_module(d: Draw) -> Made:
    heads, each = d.size(1, 2, 3), d.size(1, 2, 3)
    e, t, s, n = heads * each, d.size(1, 2, 4), d.size(1, 3), d.size(1, 2)
    module = nn.MultiheadAttention(e, heads, bias=d.chance(0.7), batch_first=d.chance(0.5))
    first = (lambda n, t: (n, t)) if module.batch_first else (lambda n, t: (t, n))
    query = d.x(*first(n, t), e)
    if d.chance(0.5):
        return module, (query, query, query), {"need_weights": d.chance(0.5)}
    return module, (query, d.x(*first(n, s), e), d.x(*first(n, s), e)), {}


def _embedding_module(d: Draw) -> Made:
    n = d.size(2, 3, 5, 11)
    if d.chance(0.3):
        return nn.EmbeddingBag(n, d.size(), mode=d.pick("sum", "mean", "max")), (
            d.index(n, 3, 4),), {}  # fmt: skip
    return nn.Embedding(n, d.size(), padding_idx=d.pick(None, 0)), (d.index(n, *d.shape(1, 2)),), {}


def _other_module(d: Draw) -> Made:
    n, c, t = d.size(), d.size(2, 3), d.size(2, 3, 5)
    return d.pick(
        lambda: (nn.PReLU(d.pick(1, c)), (d.x(n, c, t),), {}),
        lambda: (nn.Dropout(d.pick(0.1, 0.5)), (d.x(n, c, t),), {}),
        lambda: (nn.Dropout2d(0.5), (d.x(n, c, t, 2),), {}),
        lambda: (nn.Bilinear(c, t, 2), (d.x(n, c), d.x(n, t)), {}),
        lambda: (nn.MaxPool2d(2, ceil_mode=True), (d.x(n, c, t, 3),), {}),
        lambda: (nn.AvgPool2d(2, padding=1), (d.x(n, c, t, 3),), {}),
        lambda: (nn.AdaptiveAvgPool2d((2, 1)), (d.x(n, c, t, 3),), {}),
        lambda: (nn.Softmax(-1), (d.x(n, c, t),), {}),
        lambda: (nn.TransformerEncoderLayer(4, 2, 3, 0.1, batch_first=True),
                 (d.unit(2, 3, 4),), {}),
    )()  # fmt: skip


MODULES: tuple[Callable[[Draw], Made], ...] = (
    *[_linear_module] * 3, *[_conv_module] * 4, *[_transposed] * 2, *[_batch_norm_module] * 3,
    *[_norm_module] * 3, *[_recurrent] * 4, _cell, *[_attention_module] * 2,
    *[_embedding_module] * 2, *[_other_module] * 3,
)  # fmt: skip


Masking = layer(
    "Masking",
    lambda x, mask: x * mask,
    lambda grad_z, z, x, mask: (grad_z * mask, None),
    classic=True,
)


class ByRules(nn.Module):
    """A small convolutional network all of whose layers are rules as Functions."""

    def __init__(self, channels: int, hidden: int, classes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, 1, 3, 3))
        self.gamma = nn.Parameter(torch.randn(hidden))
        self.inner = nn.Linear(channels * 4, hidden)
        self.outer = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        conv, relu, pool, linear, norm, tanh = (
            as_function(rules.TABLE[f]).apply
            for f in (F.conv2d, F.relu, F.max_pool2d, F.linear, F.layer_norm, F.tanh)
        )
        a = pool(relu(conv(x, self.kernel, None, 1, 0)), 2)
        z = linear(a.flatten(1), self.inner.weight, self.inner.bias)
        a = tanh(norm(z, [z.shape[1]], self.gamma))
        return linear(a, self.outer.weight, self.outer.bias)


class Masked(nn.Module):
    """A layer whose output is masked by a Function."""

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(36, hidden)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x.flatten(1))
        return Masking.apply(z, 2.0 * (torch.arange(z.shape[1]) % 2).to(z))


def network(d: Draw) -> Call:
    c, h, k, n = d.size(1, 2, 3), d.size(2, 3, 5), d.size(1, 2, 5), d.size(1, 2, 3)
    with torch.random.fork_rng():
        torch.manual_seed(d.random.randrange(10**6))
        network = d.pick(
            lambda: ByRules(c, h, k),
            lambda: Masked(h),
            lambda: nn.Sequential(
                nn.Conv2d(1, c, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(4 * c, h), nn.BatchNorm1d(h), nn.Sigmoid(), nn.Linear(h, k),
            ) if n > 1 else nn.Sequential(
                nn.Flatten(), nn.Linear(36, h), nn.GELU(), nn.Linear(h, k)
            ),
        )()  # fmt: skip
    return Call("network", network.to(d.dtype), (d.x(n, 1, 6, 6),))
