"""Mistakes unseen, in the graph and in the protocol between torch and a Function."""

import torch

from mutants.mutant import Case, Owned, layer_of, mutant, normal, numbers, written_out


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


# A residual connection.
@layer_of(lambda x, y: x + torch.tanh(y), (5, 7), (5, 7))
def add_tanh(grad_z, z, x, y):
    return grad_z, grad_z * (1 - torch.tanh(y) ** 2)


RUNNING_SUM = Case(
    lambda x: x.cumsum(1),
    lambda grad_z, z, x: (grad_z.flip(1).cumsum(1).flip(1),),
    normal((5, 7)),
)


def running_sum_in_memory_order(at):
    """Takes the upstream gradient's entries in the order in which they lie in memory."""
    flat = torch.from_numpy(at.grad_z.detach().numpy().ravel(order="K").copy())
    return flat.view(at.x.shape).flip(1).cumsum(1).flip(1)


def far_from_the_origin():
    return tuple(u + 200 for u in numbers((3, 5), (7, 5), dtype=torch.float32))


# Of every row of x from every row of y.
@layer_of(lambda x, y: (x[:, None] - y).square().sum(-1).sqrt(), far_from_the_origin)
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


PROTOCOL = (
    written_out("protocol/gradient divided by the number of calls so far", "stale-state scale",
        lambda: AveragedOverCalls(7, 5, seed=3), normal((3, 5))),
    mutant("protocol/residual's upstream gradient shared and then overwritten", "mutates-input",
        add_tanh, classic=True,
        change={"grad_z * (1 - torch.tanh(y) ** 2)": "grad_z.mul_(1 - torch.tanh(y) ** 2)"}),
    mutant("protocol/upstream gradient read in memory order", "assumes-contiguous", RUNNING_SUM,
        x=running_sum_in_memory_order),
    mutant("protocol/distance recomputed with cancellation", "wrong-precision", distances,
        change={"distance = z": "distance = expanded(x, y)"}),
    mutant("protocol/guards of two gradients exchanged", "needs-input-grad", guarded, classic=True,
        change={"x_asked, weight_asked = asked": "weight_asked, x_asked = asked"}),
    written_out("protocol/gradient from samples drawn at random", "nondeterministic subset",
        lambda: SampledGradient(5, 3, seed=3), normal((7, 3))),
    mutant("protocol/upstream gradients of two outputs exchanged for a shared weight",
        "permuted wrong-operand", siamese, classic=True,
        change={"grad_z[0].T @ x + grad_z[1].T @ y": "grad_z[1].T @ x + grad_z[0].T @ y"}),
)  # fmt: skip
