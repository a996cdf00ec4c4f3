"""Mistakes unseen, in linear layers, broadcasts and activations."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from mutants.catalogue.dense import elementwise
from mutants.mutant import Case, mutant, normal, numbers, written_out

# --- Linear, bilinear and einsum ----------------------------------------------------------------


def bilinear_forward(left, right, weight):
    return torch.einsum("ni,oij,nj->no", left, weight, right)


def bilinear_backward(grad_z, z, left, right, weight):
    return (
        torch.einsum("no,oij,nj->ni", grad_z, weight, right),
        torch.einsum("no,oij,ni->nj", grad_z, weight, left),
        torch.einsum("no,ni,nj->oij", grad_z, left, right),
    )


def quadratic_form(x, matrix):
    """z_n = x_nᵀ A x_n."""
    return ((x @ matrix) * x).sum(1)


def quadratic_form_backward(grad_z, z, x, matrix):
    return grad_z[:, None] * (x @ (matrix + matrix.T)), (grad_z[:, None] * x).T @ x


def block_linear(x, weight):
    """One weight (O, I) for each of the G blocks of x (N, G, I)."""
    return torch.einsum("ngi,goi->ngo", x, weight)


def block_linear_backward(grad_z, z, x, weight):
    by_block = grad_z.transpose(0, 1)  # gno
    return (by_block @ weight).transpose(0, 1), by_block.mT @ x.transpose(0, 1)


def low_rank_bilinear(x, y, u, v):
    """The product, element by element, of two projections."""
    return (x @ u.T) * (y @ v.T)


def low_rank_bilinear_backward(grad_z, z, x, y, u, v):
    grad_a, grad_b = grad_z * (y @ v.T), grad_z * (x @ u.T)
    return grad_a @ u, grad_b @ v, grad_a.T @ x, grad_b.T @ y


class LowRankAdapter(nn.Module):
    """A frozen linear layer plus α/r times a trained one of rank r."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, weight, down, up, scale):
            h = x @ down.T
            ctx.save_for_backward(x, weight, down, up, h)
            ctx.scale = scale
            return x @ weight.T + scale * (h @ up.T)

        @staticmethod
        def backward(ctx, grad_z):
            x, weight, down, up, h = ctx.saved_tensors
            grad_h = ctx.scale * (grad_z @ up)
            grad_weight = grad_z.T @ x if ctx.needs_input_grad[1] else None
            grad_up = grad_z.T @ h  # without α/r
            return grad_z @ weight + grad_h @ down, grad_weight, grad_h.T @ x, grad_up, None

    def __init__(self, rank=2, alpha=5.0):
        super().__init__()
        weight, down, up = numbers((7, 5), (rank, 5), (7, rank), seed=3)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = alpha / rank

    def forward(self, x):
        return self.Step.apply(x, self.weight, self.down, self.up, self.scale)


class PrunedLinear(Function):
    """A linear layer with some of its connections cut."""

    @staticmethod
    def forward(ctx, x, weight, connected):
        ctx.save_for_backward(x, weight, connected)
        return x @ (weight * connected).T

    @staticmethod
    def backward(ctx, grad_z):
        x, weight, connected = ctx.saved_tensors
        grad_weight = grad_z.T @ x  # of the cut ones too
        return grad_z @ (weight * connected), grad_weight, None


def pruned_data():
    x, weight, chance = numbers((3, 5), (7, 5), (7, 5))
    return x, weight, chance > 0


BILINEAR = Case(bilinear_forward, bilinear_backward, normal((3, 5), (3, 5), (7, 5, 5)))
QUADRATIC_FORM = Case(quadratic_form, quadratic_form_backward, normal((3, 5), (5, 5)))
BLOCK_LINEAR = Case(block_linear, block_linear_backward, normal((5, 3, 7), (3, 2, 7)))
LOW_RANK_BILINEAR = Case(
    low_rank_bilinear, low_rank_bilinear_backward, normal((3, 5), (3, 2), (7, 5), (7, 2))
)

# fmt: off
LINEAR = (
    mutant("linear/bilinear grad_weight with its two inputs exchanged",
        ("transposed", "wrong-operand"), BILINEAR,
        weight=lambda at: torch.einsum("no,nj,ni->oij", at.grad_z, at.left, at.right)),
    mutant("linear/quadratic form's matrix taken for symmetric", ("wrong-operand", "transposed"),
        QUADRATIC_FORM, x=lambda at: 2 * at.grad_z[:, None] * (at.x @ at.matrix)),
    mutant("linear/blocks reshaped where they had to be transposed", ("permuted", "transposed"),
        BLOCK_LINEAR, BLOCK_LINEAR.of((5, 1, 7), (1, 2, 7)), classic=True,
        x=lambda at: (at.grad_z.transpose(0, 1) @ at.weight).reshape(at.x.shape)),
    mutant("linear/projection's own branch for the other in grad_u", ("wrong-operand",),
        LOW_RANK_BILINEAR, u=lambda at: (at.grad_z * (at.x @ at.u.T)).T @ at.x),
    written_out("linear/adapter's α/r missing in grad_up", ("scale", "missing-factor"),
        LowRankAdapter, normal((3, 5))),
    written_out("linear/cut connections get a gradient", ("missing-factor",),
        lambda: PrunedLinear, pruned_data),
)
# fmt: on

# --- Bias and other broadcasts ------------------------------------------------------------------


LAYER_SCALE = Case(
    lambda x, gain: x * gain,
    lambda grad_z, z, x, gain: (grad_z * gain, (grad_z * x).sum((0, 1))),
    normal((3, 5, 7), (7,)),
)


# Of every row of a and every row of b.
DIFFERENCES = Case(
    lambda a, b: a[:, None] - b[None],
    lambda grad_z, z, a, b: (grad_z.sum(1), -grad_z.sum(0)),
    normal((3, 7), (5, 7)),
)


class RelativeBias(Function):
    """Scores (N, T, T) plus a bias that depends on the distance i − j only."""

    @staticmethod
    def forward(ctx, scores, table):
        steps = torch.arange(scores.shape[-1])
        ctx.distance = steps[:, None] - steps + len(steps) - 1
        return scores + table[ctx.distance]

    @staticmethod
    def backward(ctx, grad_z):
        summed = grad_z.sum(0)
        grad_table = summed.new_zeros(2 * len(summed) - 1)
        for i, row in enumerate(ctx.distance.tolist()):
            for j, distance in enumerate(row):
                grad_table[distance] = summed[i, j]  # = for +=
        return grad_z, grad_table


# fmt: off
BIAS = (
    mutant("bias/gain's gradient averaged over the batch, summed over the tokens",
        ("scale", "wrong-reduction"),
        LAYER_SCALE,
        LAYER_SCALE.of((1, 5, 7), (7,)), classic=True,
        gain=lambda at: (at.grad_z * at.x).mean(0).sum(0)),
    mutant("bias/minus of a broadcast difference forgotten", ("sign",),
        DIFFERENCES,
        b=lambda at: at.grad_z.sum(0)),
    written_out("bias/pairs at one distance overwrite each other", ("overwritten", "subset"),
        lambda: RelativeBias, normal((2, 5, 5), (9,))),
)
# fmt: on

# --- Activation ---------------------------------------------------------------------------------

SHARPNESS = 3.0
THRESHOLD = 0.5
ALPHA = 0.7


def swish(x, beta):
    return x * torch.sigmoid(beta * x)


def swish_backward(grad_a, a, x, beta):
    gate = torch.sigmoid(beta * x)
    grad_gate = grad_a * x * gate * (1 - gate)
    return grad_a * gate + grad_gate * beta, (grad_gate * x).sum().view(1)


def swish_data():
    return *numbers((5, 7)), torch.tensor([1.3], dtype=torch.float64)


def swish_beta_without_inner_x(at):
    """The chain stops at u = βx: ∂u/∂β = x is left out."""
    gate = torch.sigmoid(at.beta * at.x)
    return (at.grad_z * at.x * gate * (1 - gate)).sum().view(1)


def hypotenuse(x, y):
    return torch.sqrt(x * x + y * y)


def hypotenuse_backward(grad_z, z, x, y):
    return grad_z * x / z, grad_z * y / z


def concatenated_relu(x):
    """[relu(x), relu(−x)]."""
    return torch.cat([F.relu(x), F.relu(-x)], 1)


def concatenated_relu_backward(grad_a, a, x, mistake=""):
    above, below = grad_a.chunk(2, 1)
    if mistake == "inner minus":
        below = -below
    return (above * (x > 0) - below * (x < 0),)


class GatedLinearUnit(Function):
    """a σ(b), where x = [a, b]."""

    @staticmethod
    def forward(x):
        a, b = x.chunk(2, -1)
        return a * torch.sigmoid(b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, -1)
        gate = torch.sigmoid(b)
        grad_a, grad_b = grad_z * gate, grad_z * a * gate * (1 - gate)
        return torch.cat([grad_b, grad_a], -1)  # the wrong way round


SOFTPLUS = elementwise(
    lambda x: F.softplus(x, beta=SHARPNESS), lambda x, a: torch.sigmoid(SHARPNESS * x)
)
SOFT_SHRINK = partial(
    elementwise,
    lambda x: F.softshrink(x, THRESHOLD),
    lambda x, a: (x.abs() > THRESHOLD).to(x.dtype),
)
ELU = elementwise(
    lambda x: F.elu(x, ALPHA), lambda x, a: torch.where(x > 0, torch.ones_like(x), a + ALPHA)
)

# fmt: off
ACTIVATION = (
    written_out("activation/halves of the GLU's gradient exchanged", ("permuted",),
        lambda: GatedLinearUnit, normal((5, 14))),
    mutant("activation/softplus with σ(x) for σ(βx)", ("wrong-operand",), SOFTPLUS,
        x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/soft shrinkage passes the positive side only", ("wrong-branch", "subset"),
        SOFT_SHRINK(), SOFT_SHRINK(torch.abs), classic=True,
        x=lambda at: at.grad_z * (at.x > THRESHOLD)),
    mutant("activation/x for x² in the gradient of swish's β", ("missing-factor",),
        Case(swish, swish_backward, swish_data),
        beta=swish_beta_without_inner_x),
    mutant("activation/+α missing in ELU's derivative", ("missing-term", "wrong-branch"), ELU,
        x=lambda at: torch.where(at.x > 0, at.grad_z, at.grad_z * at.z)),
    mutant("activation/hypotenuse's grad_y copied from grad_x", ("wrong-operand",),
        Case(hypotenuse, hypotenuse_backward, normal((5, 7), (5, 7))), classic=True,
        y=lambda at: at.grad_z * at.x / at.z),
    mutant("activation/inner minus of concatenated ReLU forgotten", ("sign", "wrong-branch"),
        Case(concatenated_relu, concatenated_relu_backward, normal((5, 7))),
        mistake="inner minus"),
)
# fmt: on
