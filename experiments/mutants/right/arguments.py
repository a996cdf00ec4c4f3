"""Arguments of the callables that this project has rules for, and calls of the rules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.right.draw import Call, Constant, Draw, holding
from nn_backprop import as_function, rules


def _linear(d: Draw) -> tuple:
    i, o = d.size(), d.size()
    lead = d.pick((), (d.size(),), (d.size(), d.size()), (d.size(1, 40),))
    if d.chance(0.1):
        return d.x(*lead, i), d.x(i), *(() if len(lead) == 1 else (d.x(),))
    return d.x(*lead, i), d.x(o, i), *d.pick((), (d.x(o),))


def _matmul(d: Draw) -> tuple:
    i, j, k, n = (d.size() for _ in range(4))
    return d.pick(
        lambda: (d.x(i, j), d.x(j, k)), lambda: (d.x(j), d.x(j)), lambda: (d.x(i, j), d.x(j)),
        lambda: (d.x(j), d.x(n, j, k)), lambda: (d.x(n, i, j), d.x(j)),
        lambda: (d.x(n, i, j), d.x(n, j, k)), lambda: (d.x(2, 1, i, j), d.x(n, j, k)),
    )()  # fmt: skip


def conv(d: Draw, dims: int = 2) -> tuple:
    groups = d.pick(1, 1, 1, 2, 3)
    kernel = [d.size(1, 2, 3) for _ in range(dims)]
    dilation = [d.size(1, 1, 2, 3) for _ in range(dims)]
    padding = [d.size(0, 0, 1, 2) for _ in range(dims)]
    stride = [d.size(1, 1, 2, 3) for _ in range(dims)]
    size = [
        max(1, r * (k - 1) + 1 - 2 * p) + d.size(0, 1, 2, 3)
        for k, r, p in zip(kernel, dilation, padding, strict=True)
    ]
    c, o, n = d.size(1, 2, 3), d.size(1, 2, 3), d.pick((), (d.size(1, 2, 3),))
    x, weight = d.x(*n, c * groups, *size), d.x(o * groups, c, *kernel)
    return x, weight, d.pick(None, d.x(o * groups)), stride, padding, dilation, groups


def pool(d: Draw, dims: int = 2) -> tuple[Tensor, list[int], list[int], list[int]]:
    kernel = [d.size(1, 2, 3) for _ in range(dims)]
    stride = [d.size(1, 2, 3) for _ in range(dims)]
    padding = [d.size(*range(k // 2 + 1)) for k in kernel]
    size = [max(2, k) + d.size(0, 1, 2, 3) for k in kernel]
    n = d.pick((), (d.size(1, 2, 3),))
    return d.x(*n, d.size(1, 2, 3), *size), kernel, stride, padding


def _max_pool(d: Draw) -> tuple:
    x, kernel, stride, padding = pool(d)
    dilation = d.pick(1, 2) if min(x.shape[-2:]) > 2 * max(kernel) else 1
    return x, kernel, stride, padding, dilation, d.pick(False, True)


def _avg_pool(d: Draw) -> tuple:
    x, kernel, stride, padding = pool(d)
    return x, kernel, stride, padding, d.pick(False, True), d.pick(False, True), d.pick(None, 5)


def _axis(d: Draw) -> tuple:
    x = d.x(*d.shape())
    return x, d.random.randrange(-x.dim(), x.dim())


def _cross_entropy(d: Draw) -> tuple:
    n, c = d.size(), d.size(2, 3, 5, 7)
    more = d.pick((), (), (d.size(),))
    weight = d.pick(None, Constant(d.unit(c).abs() + 0.1))
    reduction = d.pick("mean", "sum", "none")
    smoothing = d.pick(0.0, 0.0, 0.3)
    if d.chance(0.2):
        y = torch.softmax(d.unit(n, c, *more).double(), 1).to(d.dtype)
        return d.x(n, c, *more), y, weight, None, -100, None, reduction, smoothing
    y = d.labels(n, *more, classes=c, ignored=d.pick(None, -100))
    return d.x(n, c, *more), y, weight, None, -100, None, reduction, smoothing


def nll(d: Draw, pixels: bool = True) -> tuple:
    n, c = d.size(), d.size(2, 3, 5, 7)
    more = d.pick((), (), (d.size(), d.size())) if pixels else ()
    y = d.labels(n, *more, classes=c, ignored=d.pick(None, -100))
    return d.x(n, c, *more), y, None, None, -100, None, d.pick("mean", "sum", "none")


def _batch_norm(d: Draw) -> tuple:
    c, training = d.size(1, 2, 3, 5), d.chance(0.6)
    shape = d.pick((d.size(2, 3, 5, 7), c), (d.size(2, 3), c, d.size(2, 3, 5)), (2, c, 3, 2))
    running: tuple = (None, None)
    if not training or d.chance(0.5):
        # A running mean of stride 0 makes torch read beyond it for the weight's gradient.
        running = Constant(d.unit(c).contiguous()), Constant(d.unit(c).abs() + 0.1)
    affine = d.pick((None, None), (d.x(c), d.x(c)))
    return d.x(*shape), *running, *affine, training, 0.1, d.pick(1e-5, 0.1, 1e-3)


def _layer_norm(d: Draw) -> tuple:
    shape = (*d.shape(0, 1, 2), d.size(2, 3, 5, 7))
    axes = d.size(1, 2) if len(shape) > 1 else 1
    norm = shape[-axes:]
    affine = d.pick((None, None), (d.x(*norm), d.x(*norm)))
    return d.x(*shape), list(norm), *affine, d.pick(1e-5, 0.1)


def _broadcast(d: Draw, second: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    shape = d.shape(1, 2, 3)
    first = [d.pick(s, s, s, 1) for s in shape]
    other = [d.pick(s, s, s, 1) for s in shape][d.random.randrange(len(shape)) :]
    return d.x(*first), (second or d.x)(*other)


def _reduction(d: Draw) -> tuple:
    x = d.x(*d.shape())
    axes = d.random.sample(range(x.dim()), d.random.randint(1, x.dim()))
    return x, *d.pick((), (axes,), (axes[0], True), (axes, d.pick(False, True)))


def _one(d: Draw) -> tuple:
    return (d.tensor(),)


ARGUMENTS: dict[Callable, Callable[[Draw], tuple]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    F.conv2d: conv,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.relu: _one,
    F.leaky_relu: lambda d: (d.tensor(), *d.pick((), (0.2,), (-0.2,))),
    **dict.fromkeys((F.sigmoid, F.tanh, F.gelu), _one),
    **dict.fromkeys((F.softmax, torch.softmax, F.log_softmax, torch.log_softmax), _axis),
    F.cross_entropy: _cross_entropy,
    F.nll_loss: nll,
    F.mse_loss: lambda d: (d.x(*(shape := d.shape())), d.x(*shape), None, None,
                           d.pick("mean", "sum", "none")),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.dropout: lambda d: (d.tensor(), d.pick(0.0, 0.1, 0.5), d.pick(True, True, False)),
    **dict.fromkeys((torch.add, torch.sub), _broadcast),
    Tensor.__rsub__: lambda d: (d.tensor(), d.pick(1.0, 2.5)),
    torch.mul: _broadcast,
    torch.div: lambda d: _broadcast(d, d.signed),
    Tensor.__rtruediv__: lambda d: (d.signed(*d.shape()), d.pick(1.0, 2.5)),
    torch.neg: _one,
    torch.pow: lambda d: d.pick((d.tensor(), d.pick(1, 2, 3)),
                                (d.positive(*d.shape()), d.pick(-0.7, 0.5, -2, 1.5))),
    torch.exp: _one,
    torch.log: lambda d: (d.positive(*d.shape()),),
    torch.reshape: lambda d: (d.x(*(shape := d.shape(2, 3))),
                              d.pick((-1,), (1, -1), shape[::-1], (shape[0], -1))),
    torch.flatten: lambda d: (d.x(*d.shape(2, 3)), d.pick(0, 1)),
    torch.squeeze: lambda d: (x := d.x(*d.shape(1, 2, 3)),
                              *d.pick((), (d.random.randrange(x.dim()),))),
    torch.unsqueeze: lambda d: (d.tensor(), d.pick(0, -1)),
    torch.permute: lambda d: (x := d.x(*d.shape()), d.random.sample(range(x.dim()), x.dim())),
    torch.transpose: lambda d: (d.x(*d.shape(2, 3)), 0, d.pick(1, -1)),
    Tensor.T.__get__: lambda d: (d.x(*d.shape(2)),),  # type: ignore[attr-defined]
    Tensor.mT.__get__: lambda d: (d.x(*d.shape(2, 3)),),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.clone, Tensor.contiguous), _one),
    Tensor.to: lambda d: (d.tensor(), d.pick(torch.float64, torch.float32)),
    **dict.fromkeys((Tensor.float, Tensor.double, Tensor.bfloat16), _one),
    Tensor.half: lambda d: (d.unit(*d.shape()),),
    **dict.fromkeys((torch.sum, torch.mean), _reduction),
}  # fmt: skip


def rule(d: Draw) -> Call:
    function = d.pick(*ARGUMENTS)
    args = ARGUMENTS[function](d)
    found = rules.TABLE[function]
    target: Any = as_function(found)
    tensors = [n for n, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    if len(tensors) > 1 and d.chance(0.1):
        place = d.pick(*tensors)
        args = tuple(Constant(a) if n == place else a for n, a in enumerate(args))
    if any(isinstance(a, Constant) for a in args):
        target, args = holding(target.apply, args)
    return Call(found.name, target, args, second_order=d.chance(0.25))
