"""Mistakes in the graph and in the protocol between torch and a Function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.activation import CUBE, RECIPROCAL, RELU, SOFTPLUS, elementwise
from mutants.dense import linear
from mutants.mutant import layer_of, mutant, numbers, written_out
from mutants.recurrent import running_sum


class Weighted(nn.Module):
    """A layer of one weight."""

    def __init__(self, *shape, seed=1):
        super().__init__()
        self.weight = nn.Parameter(numbers(shape, seed=seed)[0])


class Owned(Weighted):
    """A linear layer that sees what goes through it, and works out grad_weight itself."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, weight, owner):
            ctx.save_for_backward(x, weight)
            ctx.owner = owner
            owner.sees(x)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad_z):
            x, weight = ctx.saved_tensors
            return grad_z @ weight, ctx.owner.grad_weight(grad_z, x), None

    def forward(self, x):
        return self.Step.apply(x, self.weight, self)

    def sees(self, x):
        pass


class TiedInTheGraph(Weighted):
    """An autoencoder that uses one weight twice, and cuts its first use out of the graph."""

    def forward(self, x):
        return torch.tanh(x @ self.weight.detach().T) @ self.weight


class Remembers(Owned):
    """grad_weight is of the x that the module remembers, perhaps another call's."""

    x = None

    def sees(self, x):
        self.x = x.detach().clone()

    def grad_weight(self, grad_z, x):
        return grad_z.T @ self.x


class RemembersTheFirst(Remembers):
    def sees(self, x):
        if self.x is None:
            super().sees(x)


class NeverCleared(Owned):
    """grad_weight adds up from backward to backward."""

    total: Any = 0

    def grad_weight(self, grad_z, x):
        self.total = self.total + (grad_z.T @ x).detach()
        return self.total.clone()


class NotPassedIn(Weighted):
    """A linear layer whose Function reads the weight from its module."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, owner):
            ctx.owner = owner
            return x @ owner.weight.T

        @staticmethod
        def backward(ctx, grad_z):
            return grad_z @ ctx.owner.weight, None

    def forward(self, x):
        return self.Step.apply(x, self)


class Detached(Weighted):
    """Two outputs, of which `cut` are cut out of the graph."""

    def __init__(self, *cut):
        super().__init__(7, 3)
        self.cut = cut

    def forward(self, x):
        h = torch.tanh(x @ self.weight.T)
        outputs = h, h.square().sum(1)
        return tuple(z.detach() if cut else z for z, cut in zip(outputs, self.cut, strict=True))


class KeepsItsSlope(Function):
    """x³ with 3 x² worked out in the forward, where no graph records it."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, grad_z):
        return grad_z * ctx.slope


class AveragedOverCalls(Owned):
    """grad_weight is divided by how often the layer has been called."""

    calls = 0

    def sees(self, x):
        self.calls += 1

    def grad_weight(self, grad_z, x):
        return grad_z.T @ x / self.calls


class SampledGradient(Owned):
    """grad_weight is estimated from half of the samples, drawn anew each time."""

    def grad_weight(self, grad_z, x):
        drawn = torch.rand(len(x), 1) < 0.5
        return 2 * (grad_z * drawn).T @ x


# The same autoencoder.
@layer_of(lambda x, weight: torch.tanh(x @ weight.T) @ weight, (5, 3), (7, 3))
def tied(grad_z, z, x, weight):
    h = torch.tanh(x @ weight.T)
    grad_a = grad_z @ weight.T * (1 - h**2)
    return grad_a @ weight, h.T @ grad_z + grad_a.T @ x


@layer_of(lambda x, weight: x + torch.tanh(x @ weight.T), (5, 3), (3, 3))
def residual(grad_z, z, x, weight):
    grad_a = grad_z * (1 - (z - x) ** 2)
    return grad_z + grad_a @ weight, grad_a.T @ x


@layer_of(lambda x: (torch.sin(x), x**2), (5, 3))
def fan_out(grad_z, z, x):
    return (grad_z[0] * torch.cos(x) + grad_z[1] * 2 * x,)


def by_length(x, lengths):
    """Works through the samples from the longest down and hands them back in their own order."""
    order = lengths.argsort(descending=True, stable=True)
    return torch.tanh(x[order])[order.argsort()]


@layer_of(by_length, (5, 3), data=lambda x: (x, torch.tensor([2, 7, 3, 5, 1])))
def sorted_by_length(grad_z, z, x, lengths):
    return grad_z * (1 - z**2), None


def as_if_contiguous(grad, offset):
    """What a kernel reads that is given grad's memory and believes that it is packed."""
    stored = torch.empty(0, dtype=grad.dtype).set_(grad.detach().untyped_storage())
    read = stored[offset : offset + grad.numel()]
    return F.pad(read, (0, grad.numel() - len(read))).view(grad.shape)


def buffer_reused(at):
    """The saved input's memory taken for the result's intermediate."""
    mask = at.x > 0
    at.x.data.mul_(0.5)
    return at.grad_z * mask


def in_float32(name, wrong):
    """Wrong for float32 only."""
    return lambda at: wrong(at) if at.x.dtype == torch.float32 else getattr(at, f"grad_{name}")


@layer_of(lambda x, weight: F.relu(x @ weight.T), (5, 3), (7, 3))
def linear_relu(grad_z, a, x, weight, asked):
    grad_a = grad_z * (a > 0)
    return grad_a @ weight if asked[0] else None, grad_a.T @ x


@layer_of(lambda x, weight, bias: F.linear(x, weight, bias), (5, 3), (7, 3), (7,))
def guarded_linear(grad_z, z, x, weight, bias, asked):
    grad_weight = grad_z.T @ x if asked[1] else None
    return grad_z @ weight, grad_weight, grad_z.sum(0) if asked[2] else None


# A residual connection.
@layer_of(lambda x, y: x + torch.tanh(y), (5, 7), (5, 7))
def add_tanh(grad_z, z, x, y):
    return grad_z, grad_z * (1 - torch.tanh(y) ** 2)


def running_sum_in_memory_order(at):
    """Takes the upstream gradient's entries in the order in which they lie in memory."""
    flat = torch.from_numpy(at.grad_z.detach().numpy().ravel(order="K").copy())
    return flat.view(at.x.shape).flip(1).cumsum(1).flip(1)


# Of every row of x from every row of y, far from the origin and in float32.
@layer_of(
    lambda x, y: (x[:, None] - y).square().sum(-1).sqrt(),
    *((3, 5), (7, 5)),
    data=lambda x, y: (x.float() + 200, y.float() + 200),
)
def distances(grad_z, z, x, y):
    distance = z
    along = (grad_z / distance)[..., None] * (x[:, None] - y)
    return along.sum(1), -along.sum(0)


def expanded(x, y):
    """The distances as ‖x‖² − 2 x·y + ‖y‖², which cancels."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp(min=1e-6).sqrt()


@layer_of(lambda x, weight: x @ weight.T, (3, 5), (7, 5))
def guarded(grad_z, z, x, weight, asked):
    x_asked, weight_asked = asked
    return grad_z @ weight if x_asked else None, grad_z.T @ x if weight_asked else None


# Two inputs through one layer.
@layer_of(lambda x, y, weight: (x @ weight.T, y @ weight.T), (3, 5), (3, 5), (7, 5))
def siamese(grad_z, z, x, y, weight):
    return grad_z[0] @ weight, grad_z[1] @ weight, grad_z[0].T @ x + grad_z[1].T @ y


LINEAR_CASE = linear(5, 3, 7)

PROTOCOL = (
    mutant("protocol/only the last use of a shared weight counts", "overwritten missing-term", tied,
        change={" + grad_a.T @ x": ""}),
    written_out("protocol/first use of a shared weight cut off", "overwritten missing-term",
        lambda: TiedInTheGraph(7, 3), (5, 3)),
    mutant("protocol/residual branch dropped", "missing-term", residual,
        x=lambda at: at.grad_x - at.grad_z),
    mutant("protocol/residual branch doubled", "extra-term", residual, classic=True,
        x=lambda at: at.grad_x + at.grad_z),
    mutant("protocol/fan-out overwritten", "overwritten missing-term", fan_out,
        x=lambda at: at.grad_z[1] * 2 * at.x),
    written_out("protocol/activation kept on self and overwritten by the next call", "stale-state",
        lambda: Remembers(7, 3), (5, 3)),
    written_out("protocol/activation of the first call kept for ever", "stale-state",
        lambda: RemembersTheFirst(7, 3), (5, 3)),
    written_out("protocol/gradient not cleared", "stale-state extra-term",
        lambda: NeverCleared(7, 3), (5, 3)),
    mutant("protocol/upstream gradient overwritten in place", "mutates-input", RELU,
        elementwise(F.relu, lambda x, a: torch.ones_like(x)).on(torch.exp), classic=True,
        x=lambda at: at.grad_z.mul_(at.x > 0)),
    mutant("protocol/saved input overwritten", "mutates-input", RELU, x=buffer_reused),
    mutant("protocol/strides of the upstream gradient ignored", "assumes-contiguous", LINEAR_CASE,
        linear(1, 3, 1),
        weight=lambda at: as_if_contiguous(at.grad_z, at.grad_z.storage_offset()).T @ at.x),
    mutant("protocol/storage offset of the upstream gradient ignored", "assumes-contiguous", RELU,
        classic=True, x=lambda at: as_if_contiguous(at.grad_z.contiguous(), 0) * (at.x > 0)),
    written_out("protocol/outputs detached", "detached", lambda: Detached(True, True),
        (5, 3)),
    written_out("protocol/second output detached", "detached", lambda: Detached(False, True),
        (5, 3)),
    mutant("protocol/None for a needed input", "detached", LINEAR_CASE, weight=lambda at: None),
    written_out("protocol/parameter not passed in to the Function", "detached",
        lambda: NotPassedIn(7, 3), (5, 3)),
    mutant("protocol/wrong only when x needs no gradient", "needs-input-grad", linear_relu,
        classic=True, change={"grad_z * (a > 0)": "grad_z * (a > 0) if asked[0] else grad_z"}),
    mutant("protocol/grad_bias forgotten where the weight is frozen", "needs-input-grad",
        guarded_linear, change={"asked[2]": "asked[1]"}),
    mutant("protocol/accumulated in half precision", "wrong-precision", LINEAR_CASE,
        weight=lambda at: (at.grad_z.half().T @ at.x.half()).to(at.x.dtype)),
    mutant("protocol/float32 accumulated in bfloat16", "wrong-precision",
        LINEAR_CASE.on(lambda *inputs: tuple(x.float() for x in inputs)), LINEAR_CASE, classic=True,
        weight=in_float32("weight", lambda at: (at.grad_z.bfloat16().T @ at.x.bfloat16()).float())),
    mutant("protocol/float32 takes a quick reciprocal", "wrong-precision",
        RECIPROCAL.on(Tensor.float), RECIPROCAL,
        x=in_float32("x", lambda at: -at.grad_z * at.z.bfloat16().float() ** 2)),
    mutant("protocol/branch that only large inputs take", "wrong-branch",
        SOFTPLUS.on(lambda x: 25 * x), SOFTPLUS,
        x=lambda at: at.grad_z * torch.where(at.x > 20, at.x, torch.sigmoid(at.x))),
    mutant("protocol/grad_bias not un-broadcast", "wrong-reduction", LINEAR_CASE,
        bias=lambda at: at.grad_z.clone()),
    mutant("protocol/second derivative detached", "detached", CUBE, second_order=True,
        x=lambda at: at.grad_z * 3 * at.x.detach() ** 2),
    written_out("protocol/second derivative lost with what the forward kept", "detached",
        lambda: KeepsItsSlope, (5, 7), second_order=True),
    mutant("protocol/tail of a batch dropped", "subset", linear(7, 3, 5), linear(8, 3, 5),
        weight=lambda at: at.grad_z[: len(at.x) // 4 * 4].T @ at.x[: len(at.x) // 4 * 4]),
    mutant("protocol/upstream gradient clipped on the way", "nonlinear-in-upstream", LINEAR_CASE,
        classic=True, x=lambda at: at.grad_z.clamp(-0.5, 0.5) @ at.weight),
    mutant("protocol/noise in the gradient", "nondeterministic", LINEAR_CASE,
        x=lambda at: at.grad_x * (1 + 0.01 * torch.randn_like(at.grad_x))),
    mutant("protocol/samples left in sorted order", "permuted", sorted_by_length,
        sorted_by_length.on(lambda x: (x, torch.tensor([7, 5, 3, 2, 1]))),
        x=lambda at: at.grad_x[at.lengths.argsort(descending=True, stable=True)]),
)  # fmt: skip
UNSEEN_PROTOCOL = (
    written_out("protocol/gradient divided by the number of calls so far", "stale-state scale",
        lambda: AveragedOverCalls(7, 5, seed=3), (3, 5)),
    mutant("protocol/residual's upstream gradient shared and then overwritten", "mutates-input",
        add_tanh, classic=True,
        change={"grad_z * (1 - torch.tanh(y) ** 2)": "grad_z.mul_(1 - torch.tanh(y) ** 2)"}),
    mutant("protocol/upstream gradient read in memory order", "assumes-contiguous",
        running_sum.of((5, 7)), x=running_sum_in_memory_order),
    mutant("protocol/distance recomputed with cancellation", "wrong-precision", distances,
        change={"distance = z": "distance = expanded(x, y)"}),
    mutant("protocol/guards of two gradients exchanged", "needs-input-grad", guarded, classic=True,
        change={"x_asked, weight_asked = asked": "weight_asked, x_asked = asked"}),
    written_out("protocol/gradient from samples drawn at random", "nondeterministic subset",
        lambda: SampledGradient(5, 3, seed=3), (7, 3)),
    mutant("protocol/upstream gradients of two outputs exchanged for a shared weight",
        "permuted wrong-operand", siamese, classic=True,
        change={"grad_z[0].T @ x + grad_z[1].T @ y": "grad_z[1].T @ x + grad_z[0].T @ y"}),
)  # fmt: skip
