"""Mistakes unseen, in the graph and in the protocol between torch and a Function."""

import torch
from torch.autograd import Function

from mutants.mutant import Case, Weighted, mutant, normal, numbers, written_out


class AveragedOverCalls(Weighted):
    """A linear layer whose grad_weight is divided by how often the layer has been called."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, weight, owner):
            ctx.save_for_backward(x, weight)
            ctx.owner = owner
            owner.calls += 1
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad_z):
            x, weight = ctx.saved_tensors
            grad_weight = grad_z.T @ x / ctx.owner.calls
            return grad_z @ weight, grad_weight, None

    def __init__(self):
        super().__init__(7, 5, seed=3)
        self.calls = 0

    def forward(self, x):
        return self.Step.apply(x, self.weight, self)


class AddTanh(Function):
    """A residual connection: x + tanh(y)."""

    @staticmethod
    def forward(ctx, x, y):
        a = torch.tanh(y)
        ctx.save_for_backward(a)
        return x + a

    @staticmethod
    def backward(ctx, grad_z):
        (a,) = ctx.saved_tensors
        grad_x = grad_z
        grad_y = grad_z.mul_(1 - a**2)  # in the memory that is grad_x as well
        return grad_x, grad_y


RUNNING_SUM = Case(
    lambda x: x.cumsum(1),
    lambda grad_z, z, x: (grad_z.flip(1).cumsum(1).flip(1),),
    normal((5, 7)),
)


def running_sum_in_memory_order(at):
    """Takes the upstream gradient's entries in the order in which they lie in memory."""
    flat = torch.from_numpy(at.grad_z.detach().numpy().ravel(order="K").copy())
    return flat.view(at.x.shape).flip(1).cumsum(1).flip(1)


def distances(x, y):
    """Of every row of x from every row of y."""
    return (x[:, None] - y).square().sum(-1).sqrt()


def distances_backward(grad_z, z, x, y, mistake=""):
    distance = z
    if mistake == "expanded":  # ‖x‖² − 2 x·y + ‖y‖², which cancels
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        distance = (squares - 2 * x @ y.T).clamp(min=1e-6).sqrt()
    along = (grad_z / distance)[..., None] * (x[:, None] - y)
    return along.sum(1), -along.sum(0)


def far_from_the_origin():
    return tuple(u + 200 for u in numbers((3, 5), (7, 5), dtype=torch.float32))


class GuardsExchanged(Function):
    """x weightᵀ; each gradient is worked out where the other one is asked for."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        weight_asked, x_asked = ctx.needs_input_grad  # in the wrong order
        if x_asked:
            grad_x = grad_z @ weight
        if weight_asked:
            grad_weight = grad_z.T @ x
        return grad_x, grad_weight


class SampledGradient(Weighted):
    """A linear layer that estimates grad_weight from half of the samples, drawn anew each time."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad_z):
            x, weight = ctx.saved_tensors
            drawn = torch.rand(len(x), 1) < 0.5
            return grad_z @ weight, 2 * (grad_z * drawn).T @ x


def siamese(x, y, weight):
    """Two inputs through one layer."""
    return x @ weight.T, y @ weight.T


def siamese_backward(grad_z, z, x, y, weight):
    return grad_z[0] @ weight, grad_z[1] @ weight, grad_z[0].T @ x + grad_z[1].T @ y


DISTANCES = Case(distances, distances_backward, far_from_the_origin)

# fmt: off
PROTOCOL = (
    written_out("protocol/gradient divided by the number of calls so far",
        ("stale-state", "scale"), AveragedOverCalls, normal((3, 5))),
    written_out("protocol/residual's upstream gradient shared and then overwritten",
        ("mutates-input",), lambda: AddTanh, normal((5, 7), (5, 7))),
    mutant("protocol/upstream gradient read in memory order", ("assumes-contiguous",),
        RUNNING_SUM, x=running_sum_in_memory_order),
    mutant("protocol/distance recomputed with cancellation", ("wrong-precision",), DISTANCES,
        mistake="expanded"),
    written_out("protocol/guards of two gradients exchanged", ("needs-input-grad",),
        lambda: GuardsExchanged, normal((3, 5), (7, 5))),
    written_out("protocol/gradient from samples drawn at random", ("nondeterministic", "subset"),
        lambda: SampledGradient(5, 3, seed=3), normal((7, 3))),
    mutant("protocol/upstream gradients of two outputs exchanged for a shared weight",
        ("permuted", "wrong-operand"),
        Case(siamese, siamese_backward, normal((3, 5), (3, 5), (7, 5))), classic=True,
        weight=lambda at: at.grad_z[1].T @ at.x + at.grad_z[0].T @ at.y),
)
# fmt: on
