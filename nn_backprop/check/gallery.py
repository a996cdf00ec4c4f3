"""The gallery of mistakes: for every kind of cause a small and typical one, and its report.

Each Function below is right but for one mistake in its backward. Nobody imports them: they are
there to be read, and to be checked.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nn_backprop.check.checker import check_gradients
from nn_backprop.check.report import KINDS, Report


class Example(Function):
    """What the examples share: the inputs are saved."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class Difference(Example):
    """a − b"""

    forward = staticmethod(lambda a, b: a - b)
    backward = staticmethod(lambda ctx, grad_z: (grad_z, grad_z))


class MeanSquaredError(Example):
    """mean((y − target)²)"""

    forward = staticmethod(lambda y, target: ((y - target) ** 2).mean())

    @staticmethod
    def backward(ctx, grad_loss):
        y, target = ctx.saved_tensors
        grad_y = grad_loss * 2 * (y - target)
        return grad_y, -grad_y / y.numel()


class Whiten(Example):
    """the channels of an image divided by their standard deviations in ImageNet"""

    @staticmethod
    def forward(x):
        return x / torch.tensor([0.229, 0.224, 0.225]).to(x)[:, None, None]

    @staticmethod
    def backward(ctx, grad_z):  # those of CIFAR-10
        return grad_z / torch.tensor([0.247, 0.243, 0.262]).to(grad_z)[:, None, None]


class Linear(Example):
    """x Wᵀ"""

    forward = staticmethod(lambda x, weight: x @ weight.T)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        return grad_z @ weight, x.T @ grad_z


class Convolution(Example):
    """a convolution with stride 1 and no padding"""

    forward = staticmethod(lambda x, weight: F.conv2d(x, weight))

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        p, q = weight.shape[2:]
        grad_x = F.conv2d(F.pad(grad_z, (q - 1, q - 1, p - 1, p - 1)), weight.transpose(0, 1))
        grad_weight = F.conv2d(x.transpose(0, 1), grad_z.transpose(0, 1)).transpose(0, 1)
        return grad_x, grad_weight


class Pad(Example):
    """zeros around a signal"""

    forward = staticmethod(lambda x: F.pad(x, (2, 2)))
    backward = staticmethod(lambda ctx, grad_z: grad_z[..., 1:-3])


class GatedLinearUnit(Example):
    """a σ(b), a and b being the halves of x"""

    @staticmethod
    def forward(x):
        a, b = x.chunk(2, dim=1)
        return a * b.sigmoid()

    @staticmethod
    def backward(ctx, grad_z):
        a, b = ctx.saved_tensors[0].chunk(2, dim=1)
        gate = b.sigmoid()
        return torch.cat([grad_z * a * gate * (1 - gate), grad_z * gate], dim=1)


class Bias(Example):
    """x + bias"""

    forward = staticmethod(lambda x, bias: x + bias)
    backward = staticmethod(lambda ctx, grad_z: (grad_z, grad_z[-1]))


class Embedding(Example):
    """the rows of weight at some indices"""

    forward = staticmethod(lambda weight, index: weight[index])

    @staticmethod
    def backward(ctx, grad_z):
        weight, index = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight)
        grad_weight[index] = grad_z
        return grad_weight, None


class Softmax(Example):
    """softmax over the last axis"""

    forward = staticmethod(lambda x: x.softmax(-1))
    backward = staticmethod(lambda ctx, grad_y: ctx.saved_tensors[0].softmax(-1) * grad_y)


class Scale(Example):
    """x × weight, element by element"""

    forward = staticmethod(lambda x, weight: x * weight)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        return grad_z * weight, (grad_z * x).sum(0) + 0.01 * weight


class Sigmoid(Example):
    """σ(x)"""

    forward = staticmethod(lambda x: x.sigmoid())
    backward = staticmethod(lambda ctx, grad_y: grad_y * (1 - ctx.saved_tensors[0].sigmoid()))


class Tanh(Example):
    """tanh(x)"""

    forward = staticmethod(lambda x: x.tanh())
    backward = staticmethod(lambda ctx, grad_y: grad_y * (1 - ctx.saved_tensors[0] ** 2))


class Shift(Example):
    """x + shift, the same of all features for each example"""

    forward = staticmethod(lambda x, shift: x + shift)
    backward = staticmethod(lambda ctx, grad_z: (grad_z, grad_z))


class Energy(Example):
    """½ Σ x²"""

    forward = staticmethod(lambda x: 0.5 * (x**2).sum())
    backward = staticmethod(lambda ctx, grad_loss: ctx.saved_tensors[0])


class Affine(Example):
    """x Wᵀ + b"""

    forward = staticmethod(lambda x, weight, bias: x @ weight.T + bias)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight, _ = ctx.saved_tensors
        return grad_z @ weight, grad_z.T @ x, None


class Square(Example):
    """x², with x remembered on the class"""

    x: Tensor

    forward = staticmethod(lambda x: x**2)
    backward = staticmethod(lambda ctx, grad_z: 2 * Square.x * grad_z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        Square.x = inputs[0].detach()


class ReLU(Example):
    """max(x, 0)"""

    forward = staticmethod(lambda x: x.clamp(min=0))
    backward = staticmethod(lambda ctx, grad_z: grad_z.mul_(ctx.saved_tensors[0] > 0))


class Sine(Example):
    """sin(x), by a kernel that walks over memory from the first number"""

    forward = staticmethod(lambda x: x.sin())

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        memory = grad_z.as_strided((x.numel(),), (1,)) if grad_z.stride()[-1] else grad_z
        return x.cos() * memory.view(x.shape)


class Product(Example):
    """a b"""

    forward = staticmethod(lambda a, b: a * b)

    @staticmethod
    def backward(ctx, grad_z):
        a, b = ctx.saved_tensors
        grad_a = grad_z * b if ctx.needs_input_grad[0] else None
        grad_b = grad_z * a if ctx.needs_input_grad[0] else None
        return grad_a, grad_b


class Softplus(Example):
    """log(1 + eˣ)"""

    forward = staticmethod(lambda x: torch.logaddexp(x, torch.zeros_like(x)))

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        return grad_z * x.exp() / (1 + x.exp())


class Dropout(Example):
    """x with a quarter of its entries at 0, the others times 4/3"""

    forward = staticmethod(lambda x: x * (torch.rand_like(x) > 0.25) / 0.75)
    backward = staticmethod(lambda ctx, grad_z: grad_z * (torch.rand_like(grad_z) > 0.25) / 0.75)


class Exponential(Example):
    """eˣ, with a backward that is afraid of large gradients"""

    forward = staticmethod(lambda x: x.exp())
    backward = staticmethod(lambda ctx, grad_y: grad_y.clamp(-1, 1) * ctx.saved_tensors[0].exp())


class ReLU6(Example):
    """x between 0 and 6"""

    forward = staticmethod(lambda x: x.clamp(0, 6))
    backward = staticmethod(lambda ctx, grad_z: grad_z * (ctx.saved_tensors[0] > 0))


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "sign": (Difference, (_draw(3, 5), _draw(3, 5, seed=1))),
    "scale": (MeanSquaredError, (_draw(3, 5), _draw(3, 5, seed=1))),
    "per-channel-scale": (Whiten, (_draw(2, 3, 5, 7),)),
    "transposed": (Linear, (_draw(3, 5), _draw(7, 5, seed=1))),
    "flipped": (Convolution, (_draw(2, 3, 7, 11), _draw(5, 3, 3, 2, seed=1))),
    "shifted": (Pad, (_draw(3, 7),)),
    "permuted": (GatedLinearUnit, (_draw(3, 10),)),
    "subset": (Bias, (_draw(3, 5), _draw(5, seed=1))),
    "overwritten": (Embedding, (_draw(7, 5), torch.tensor([2, 0, 2, 5, 2, 0]))),
    "missing-term": (Softmax, (_draw(3, 5),)),
    "extra-term": (Scale, (_draw(3, 5), _draw(5, seed=1))),
    "missing-factor": (Sigmoid, (_draw(3, 5),)),
    "wrong-operand": (Tanh, (_draw(3, 5),)),
    "wrong-reduction": (Shift, (_draw(3, 5), _draw(3, 1, seed=1))),
    "ignores-upstream": (Energy, (_draw(3, 5),)),
    "detached": (Affine, (_draw(3, 5), _draw(7, 5, seed=1), _draw(7, seed=2))),
    "stale-state": (Square, (_draw(3, 5),)),
    "mutates-input": (ReLU, (_draw(3, 5),)),
    "assumes-contiguous": (Sine, (_draw(3, 5),)),
    "needs-input-grad": (Product, (_draw(3, 5), _draw(3, 5, seed=1))),
    "wrong-precision": (Softplus, (60 * _draw(3, 5),)),
    "nondeterministic": (Dropout, (_draw(7, 11),)),
    "nonlinear-in-upstream": (Exponential, (_draw(3, 5),)),
    "wrong-branch": (ReLU6, (_draw(3, 5),)),
}


def gallery() -> Iterator[tuple[str, str, Report]]:
    """For each kind of cause but `unknown`: the kind, the source of the example, and its check."""
    for kind, (target, inputs) in EXAMPLES.items():
        yield kind, inspect.getsource(target), check_gradients(target, *inputs)


def page(examples: list[tuple[str, str, Report]]) -> str:
    """The gallery as Markdown: of each example, the verdict and the first cause."""
    lines = [
        "# The gallery of mistakes",
        "",
        "Each example is a `torch.autograd.Function` of this kind:",
    ]
    lines += ["", "```python", inspect.getsource(Example).rstrip(), "```", ""]
    for kind, source, report in examples:
        head = replace(report, tensors=[], probes=[], causes=report.causes[:1])
        lines += [f"## {kind}", "", f"The gradient {KINDS[kind]}.", "", "```python"]
        lines += [source.rstrip(), "```", "", "```", str(head), "```", ""]
    return "\n".join(lines).rstrip()
