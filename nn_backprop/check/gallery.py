"""The gallery of mistakes: for every kind of cause a small and typical one, and its report.

Each Function or module below is right but for one mistake in its backward. Nobody imports them:
they are there to be read, and to be checked.
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


class Difference(Function):
    """a − b"""

    @staticmethod
    def forward(ctx, a, b):
        return a - b

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z, grad_z


class MeanSquaredError(Function):
    """mean((y − target)²)"""

    @staticmethod
    def forward(ctx, y, target):
        ctx.save_for_backward(y, target)
        return ((y - target) ** 2).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        y, target = ctx.saved_tensors
        grad_y = grad_loss * 2 * (y - target)
        return grad_y, -grad_y / y.numel()


class Whiten(Function):
    """the channels of an image divided by their standard deviations in ImageNet"""

    @staticmethod
    def forward(ctx, x):
        return x / torch.tensor([0.229, 0.224, 0.225]).to(x)[:, None, None]

    @staticmethod
    def backward(ctx, grad_z):  # those of CIFAR-10
        return grad_z / torch.tensor([0.247, 0.243, 0.262]).to(grad_z)[:, None, None]


class Linear(Function):
    """x Wᵀ"""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        return grad_z @ weight, x.T @ grad_z


class Convolution(Function):
    """a convolution with stride 1 and no padding"""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        p, q = weight.shape[2:]
        grad_x = F.conv2d(F.pad(grad_z, (q - 1, q - 1, p - 1, p - 1)), weight.transpose(0, 1))
        grad_weight = F.conv2d(x.transpose(0, 1), grad_z.transpose(0, 1)).transpose(0, 1)
        return grad_x, grad_weight


class Pad(Function):
    """zeros around a signal"""

    @staticmethod
    def forward(ctx, x):
        return F.pad(x, (2, 2))

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z[..., 1:-3]


class GatedLinearUnit(Function):
    """a σ(b), a and b being the halves of x"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=1)
        return a * b.sigmoid()

    @staticmethod
    def backward(ctx, grad_z):
        a, b = ctx.saved_tensors[0].chunk(2, dim=1)
        gate = b.sigmoid()
        return torch.cat([grad_z * a * gate * (1 - gate), grad_z * gate], dim=1)


class Bias(Function):
    """x + bias"""

    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z, grad_z[-1]


class Embedding(Function):
    """the rows of weight at some indices"""

    @staticmethod
    def forward(ctx, weight, index):
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return weight[index]

    @staticmethod
    def backward(ctx, grad_z):
        (index,) = ctx.saved_tensors
        grad_weight = grad_z.new_zeros(ctx.shape)
        grad_weight[index] = grad_z
        return grad_weight, None


class Softmax(Function):
    """softmax over the last axis"""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return ctx.saved_tensors[0] * grad_y


class Scale(Function):
    """x × weight, element by element"""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        return grad_z * weight, (grad_z * x).sum(0) + 0.01 * weight


class Sigmoid(Function):
    """σ(x)"""

    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * (1 - ctx.saved_tensors[0])


class Tanh(Function):
    """tanh(x)"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * (1 - ctx.saved_tensors[0] ** 2)


class Shift(Function):
    """x + shift, the same of all features for each example"""

    @staticmethod
    def forward(ctx, x, shift):
        return x + shift

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z, grad_z


class Energy(Function):
    """½ Σ x²"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * (x**2).sum()

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0]


class Affine(Function):
    """x Wᵀ + b"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        return grad_z @ weight, grad_z.T @ x, None


class Square(Function):
    """x², with x remembered on the class"""

    x: Tensor

    @staticmethod
    def forward(ctx, x):
        Square.x = x.detach()
        return x**2

    @staticmethod
    def backward(ctx, grad_z):
        return 2 * Square.x * grad_z


class ReLU(Function):
    """max(x, 0)"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z.mul_(ctx.saved_tensors[0] > 0)


class Sine(Function):
    """sin(x), by a kernel that walks over memory from the first number"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        memory = grad_z.as_strided((x.numel(),), (1,)) if grad_z.stride()[-1] else grad_z
        return x.cos() * memory.view(x.shape)


class Product(Function):
    """a b"""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad_z):
        a, b = ctx.saved_tensors
        grad_a = grad_z * b if ctx.needs_input_grad[0] else None
        grad_b = grad_z * a if ctx.needs_input_grad[0] else None
        return grad_a, grad_b


class Softplus(Function):
    """log(1 + eˣ)"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.logaddexp(x, torch.zeros_like(x))

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        return grad_z * x.exp() / (1 + x.exp())


class Dropout(Function):
    """x with a quarter of its entries at 0, the others times 4/3"""

    @staticmethod
    def forward(ctx, x):
        return x * (torch.rand_like(x) > 0.25) / 0.75

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z * (torch.rand_like(grad_z) > 0.25) / 0.75


class Exponential(Function):
    """eˣ, with a backward that is afraid of large gradients"""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y.clamp(-1, 1) * ctx.saved_tensors[0]


class ReLU6(Function):
    """x between 0 and 6"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z * (ctx.saved_tensors[0] > 0)


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
    lines = ["# The gallery of mistakes", ""]
    for kind, source, report in examples:
        head = replace(report, tensors=[], probes=[], causes=report.causes[:1])
        lines += [f"## {kind}", "", f"The gradient {KINDS[kind]}.", ""]
        lines += ["```python", source.rstrip(), "```", "", "```", str(head), "```", ""]
    return "\n".join(lines).rstrip()
