"""Mistakes unseen, in linear layers, broadcasts and activations."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mutants.catalogue.dense import elementwise
from mutants.mutant import Case, layer_of, mutant, normal, numbers

# --- Linear, bilinear and einsum ----------------------------------------------------------------

BILINEAR = Case(
    lambda left, right, weight: torch.einsum("ni,oij,nj->no", left, weight, right),
    lambda grad_z, z, left, right, weight: (
        torch.einsum("no,oij,nj->ni", grad_z, weight, right),
        torch.einsum("no,oij,ni->nj", grad_z, weight, left),
        torch.einsum("no,ni,nj->oij", grad_z, left, right),
    ),
    normal((3, 5), (3, 5), (7, 5, 5)),
)
# z_n = x_nᵀ A x_n.
QUADRATIC_FORM = Case(
    lambda x, matrix: ((x @ matrix) * x).sum(1),
    lambda grad_z, z, x, matrix: (
        grad_z[:, None] * (x @ (matrix + matrix.T)),
        (grad_z[:, None] * x).T @ x,
    ),
    normal((3, 5), (5, 5)),
)


# One weight (O, I) for each of the G blocks of x (N, G, I).
@layer_of(lambda x, weight: torch.einsum("ngi,goi->ngo", x, weight), (5, 3, 7), (3, 2, 7))
def block_linear(grad_z, z, x, weight):
    by_block = grad_z.transpose(0, 1)  # gno
    return (by_block @ weight).transpose(0, 1), by_block.mT @ x.transpose(0, 1)


# The product, element by element, of two projections.
@layer_of(lambda x, y, u, v: (x @ u.T) * (y @ v.T), (3, 5), (3, 2), (7, 5), (7, 2))
def low_rank_bilinear(grad_z, z, x, y, u, v):
    grad_a, grad_b = grad_z * (y @ v.T), grad_z * (x @ u.T)
    return grad_a @ u, grad_b @ v, grad_a.T @ x, grad_b.T @ y


SCALE = 5.0 / 2  # α/r


def adapter_data():
    weight, down, up = numbers((7, 5), (2, 5), (7, 2), seed=3)
    return *numbers((3, 5)), nn.Parameter(weight, requires_grad=False), down, up


# A frozen linear layer plus α/r times a trained one of rank r.
@layer_of(
    lambda x, weight, down, up: x @ weight.T + SCALE * (x @ down.T @ up.T),
    adapter_data,
)
def low_rank_adapter(grad_z, z, x, weight, down, up):
    grad_h, grad_up = SCALE * (grad_z @ up), SCALE * (grad_z.T @ (x @ down.T))
    return grad_z @ weight + grad_h @ down, grad_z.T @ x, grad_h.T @ x, grad_up


def pruned_data():
    x, weight, chance = numbers((3, 5), (7, 5), (7, 5))
    return x, weight, chance > 0


# A linear layer with some of its connections cut.
@layer_of(lambda x, weight, connected: x @ (weight * connected).T, pruned_data)
def pruned(grad_z, z, x, weight, connected):
    return grad_z @ (weight * connected), grad_z.T @ x * connected, None


LINEAR = (
    mutant("linear/bilinear grad_weight with its two inputs exchanged", "transposed wrong-operand",
        BILINEAR, weight=lambda at: torch.einsum("no,nj,ni->oij", at.grad_z, at.left, at.right)),
    mutant("linear/quadratic form's matrix taken for symmetric", "wrong-operand transposed",
        QUADRATIC_FORM, x=lambda at: 2 * at.grad_z[:, None] * (at.x @ at.matrix)),
    mutant("linear/blocks reshaped where they had to be transposed", "permuted transposed",
        block_linear, block_linear.of((5, 1, 7), (1, 2, 7)), classic=True,
        change={"(by_block @ weight).transpose(0, 1)": "(by_block @ weight).reshape(x.shape)"}),
    mutant("linear/projection's own branch for the other in grad_u", "wrong-operand",
        low_rank_bilinear, change={"grad_a.T @ x": "(grad_z * (x @ u.T)).T @ x"}),
    mutant("linear/adapter's α/r missing in grad_up", "scale missing-factor", low_rank_adapter,
        classic=True, given=1, change={"SCALE * (grad_z.T @": "(grad_z.T @"}),
    mutant("linear/cut connections get a gradient", "missing-factor", pruned, classic=True,
        change={"x * connected, None": "x, None"}),
)  # fmt: skip

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


def distances(t):
    return torch.arange(t)[:, None] - torch.arange(t) + t - 1


# Scores (N, T, T) plus a bias that depends on the distance i − j only.
@layer_of(lambda scores, table: scores + table[distances(scores.shape[-1])], (2, 5, 5), (9,))
def relative_bias(grad_z, z, scores, table):
    summed, grad_table = grad_z.sum(0), torch.zeros_like(table)
    for i, row in enumerate(distances(len(summed)).tolist()):
        for j, distance in enumerate(row):
            grad_table[distance] += summed[i, j]
    return grad_z, grad_table


BIAS = (
    mutant("bias/gain's gradient averaged over the batch, summed over the tokens",
        "scale wrong-reduction", LAYER_SCALE, LAYER_SCALE.of((1, 5, 7), (7,)), classic=True,
        gain=lambda at: (at.grad_z * at.x).mean(0).sum(0)),
    mutant("bias/minus of a broadcast difference forgotten", "sign", DIFFERENCES,
        b=lambda at: at.grad_z.sum(0)),
    mutant("bias/pairs at one distance overwrite each other", "overwritten subset", relative_bias,
        classic=True, change={"+= summed": "= summed"}),
)  # fmt: skip

# --- Activation ---------------------------------------------------------------------------------

SHARPNESS = 3.0
THRESHOLD = 0.5
ALPHA = 0.7


@layer_of(
    lambda x, beta: x * torch.sigmoid(beta * x),
    lambda: (*numbers((5, 7)), torch.tensor([1.3], dtype=torch.float64)),
)
def swish(grad_a, a, x, beta):
    gate = torch.sigmoid(beta * x)
    grad_gate = grad_a * x * gate * (1 - gate)
    return grad_a * gate + grad_gate * beta, (grad_gate * x).sum().view(1)


HYPOTENUSE = Case(
    lambda x, y: torch.sqrt(x * x + y * y),
    lambda grad_z, z, x, y: (grad_z * x / z, grad_z * y / z),
    normal((5, 7), (5, 7)),
)


@layer_of(lambda x: torch.cat([F.relu(x), F.relu(-x)], 1), (5, 7))
def concatenated_relu(grad_a, a, x):
    above, below = grad_a.chunk(2, 1)
    return (above * (x > 0) - below * (x < 0),)


def gated_linear_unit(x):
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(b)


@layer_of(gated_linear_unit, (5, 14))
def glu(grad_z, z, x):
    a, b = x.chunk(2, -1)
    gate = torch.sigmoid(b)
    grad_a, grad_b = grad_z * gate, grad_z * a * gate * (1 - gate)
    return (torch.cat([grad_a, grad_b], -1),)


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

ACTIVATION = (
    mutant("activation/halves of the GLU's gradient exchanged", "permuted", glu,
        change={"[grad_a, grad_b]": "[grad_b, grad_a]"}),
    mutant("activation/softplus with σ(x) for σ(βx)", "wrong-operand", SOFTPLUS,
        x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/soft shrinkage passes the positive side only", "wrong-branch subset",
        SOFT_SHRINK(), SOFT_SHRINK(torch.abs), classic=True,
        x=lambda at: at.grad_z * (at.x > THRESHOLD)),
    mutant("activation/x for x² in the gradient of swish's β", "missing-factor", swish,
        change={"(grad_gate * x).sum()": "grad_gate.sum()"}),
    mutant("activation/+α missing in ELU's derivative", "missing-term wrong-branch", ELU,
        x=lambda at: torch.where(at.x > 0, at.grad_z, at.grad_z * at.z)),
    mutant("activation/hypotenuse's grad_y copied from grad_x", "wrong-operand", HYPOTENUSE,
        classic=True, y=lambda at: at.grad_z * at.x / at.z),
    mutant("activation/inner minus of concatenated ReLU forgotten", "sign wrong-branch",
        concatenated_relu, change={"- below": "+ below"}),
)  # fmt: skip
