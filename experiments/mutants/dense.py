"""Mistakes in linear layers, in biases and in other broadcasts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutants.mutant import Case, layer_of, mutant, numbers

DECAY = 0.3
SCALE = 5.0 / 2  # α/r

# --- Linear: z_no = Σ_i x_ni weight_oi + bias_o; bilinear; einsum --------------------------------


@layer_of(lambda x, weight, bias: F.linear(x, weight, bias), (3, 5), (5, 5), (5,))
def square_linear(grad_z, z, x, weight, bias):
    return grad_z @ weight, grad_z.T @ x, grad_z.sum(0)


def linear(n: int, i: int, o: int) -> Case:
    return square_linear.of((n, i), (o, i), (o,))


def with_weight(weight: Callable[[Tensor], Tensor]) -> Case:
    return square_linear.on(lambda x, free, bias: (x, weight(free), bias))


@layer_of(
    lambda x, weight: (x @ weight.T).square().sum() + DECAY / 2 * weight.square().sum(),
    *((5, 3), (7, 3)),
)
def penalised(grad_z, z, x, weight):
    residual = x @ weight.T
    return grad_z * 2 * residual @ weight, grad_z * (2 * residual.T @ x + DECAY * weight)


@layer_of(
    lambda left, right, weight: torch.einsum("ni,oij,nj->no", left, weight, right),
    *((3, 5), (3, 5), (7, 5, 5)),
)
def bilinear(grad_z, z, left, right, weight):
    grad_left = torch.einsum("no,oij,nj->ni", grad_z, weight, right)
    grad_right = torch.einsum("no,oij,ni->nj", grad_z, weight, left)
    return grad_left, grad_right, torch.einsum("no,ni,nj->oij", grad_z, left, right)


# z_n = x_nᵀ A x_n.
@layer_of(lambda x, matrix: ((x @ matrix) * x).sum(1), (3, 5), (5, 5))
def quadratic_form(grad_z, z, x, matrix):
    return grad_z[:, None] * (x @ (matrix + matrix.T)), (grad_z[:, None] * x).T @ x


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


def adapter(x):
    weight, down, up = numbers((7, 5), (2, 5), (7, 2), seed=3)
    return x, nn.Parameter(weight, requires_grad=False), down, up


# A frozen linear layer plus α/r times a trained one of rank r.
@layer_of(
    lambda x, weight, down, up: x @ weight.T + SCALE * (x @ down.T @ up.T), (3, 5), data=adapter
)
def low_rank_adapter(grad_z, z, x, weight, down, up):
    grad_h, grad_up = SCALE * (grad_z @ up), SCALE * (grad_z.T @ (x @ down.T))
    return grad_z @ weight + grad_h @ down, grad_z.T @ x, grad_h.T @ x, grad_up


# A linear layer with some of its connections cut.
@layer_of(
    lambda x, weight, connected: x @ (weight * connected).T,
    *((3, 5), (7, 5), (7, 5)),
    data=lambda x, weight, chance: (x, weight, chance > 0),
)
def pruned(grad_z, z, x, weight, connected):
    return grad_z @ (weight * connected), grad_z.T @ x * connected, None


LINEAR = (
    mutant("linear/grad_x uses the weight transposed", "wrong-operand transposed", square_linear,
        with_weight(lambda weight: weight + weight.T), x=lambda at: at.grad_z @ at.weight.T),
    mutant("linear/grad_weight transposed, square", "transposed", square_linear,
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight transposed, not square", "transposed", linear(5, 3, 7),
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight times N", "scale", linear(5, 3, 7), linear(1, 3, 7),
        weight=lambda at: at.grad_weight * len(at.x)),
    mutant("linear/grad_weight divided by N", "scale wrong-reduction", linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: at.grad_weight / len(at.x)),
    mutant("linear/grad_weight from the output", "wrong-operand", square_linear,
        weight=lambda at: at.grad_z.T @ at.z),
    mutant("linear/grad_x without the weight", "missing-factor", square_linear,
        with_weight(lambda weight: torch.eye(5, dtype=weight.dtype)),
        x=lambda at: at.grad_z.clone()),
    mutant("linear/grad_weight of the last sample only", "subset overwritten", linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: torch.outer(at.grad_z[-1], at.x[-1])),
    mutant("linear/grad_weight negated", "sign", linear(5, 3, 7),
        weight=lambda at: -at.grad_weight),
    mutant("linear/weight decay added by the layer", "extra-term", linear(5, 3, 7),
        with_weight(torch.zeros_like), weight=lambda at: at.grad_weight + DECAY * at.weight),
    mutant("linear/weight decay of the objective counted twice", "extra-term", penalised,
        penalised.on(lambda x, weight: (x, torch.zeros_like(weight))),
        weight=lambda at: at.grad_weight + at.grad_z * DECAY * at.weight),
)  # fmt: skip
UNSEEN_LINEAR = (
    mutant("linear/bilinear grad_weight with its two inputs exchanged", "transposed wrong-operand",
        bilinear, weight=lambda at: torch.einsum("no,nj,ni->oij", at.grad_z, at.left, at.right)),
    mutant("linear/quadratic form's matrix taken for symmetric", "wrong-operand transposed",
        quadratic_form, x=lambda at: 2 * at.grad_z[:, None] * (at.x @ at.matrix)),
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

# --- Bias: z_nohw = x_nohw + bias_o, and other broadcasts ---------------------------------------


@layer_of(lambda x, bias: x + bias, (5, 3), (3,))
def biased(grad_z, z, x, bias):
    return grad_z, grad_z.sum_to_size(bias.shape)


channel_bias = biased.of((2, 3, 5, 7), (3, 1, 1))


@layer_of(lambda rows, columns: rows[:, None] + columns, (5,), (5,))
def outer_sum(grad_z, z, rows, columns):
    return grad_z.sum(1), grad_z.sum(0)


@layer_of(lambda x, gain: x * gain, (3, 5, 7), (7,))
def layer_scale(grad_z, z, x, gain):
    return grad_z * gain, (grad_z * x).sum((0, 1))


# Of every row of a and every row of b.
@layer_of(lambda a, b: a[:, None] - b[None], (3, 7), (5, 7))
def differences(grad_z, z, a, b):
    return grad_z.sum(1), -grad_z.sum(0)


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
    mutant("bias/mean for sum", "scale wrong-reduction", biased, biased.of((1, 3), (3,)),
        bias=lambda at: at.grad_z.mean(0)),
    mutant("bias/last sample only", "subset overwritten", biased, biased.of((1, 3), (3,)),
        classic=True, bias=lambda at: at.grad_z[-1].clone()),
    mutant("bias/summed over the wrong axis", "wrong-reduction", biased.of((5, 5), (5,)),
        biased.of((1, 1), (1,)), bias=lambda at: at.grad_z.sum(1)),
    mutant("bias/zero", "detached", biased, classic=True, bias=lambda at: at.grad_bias * 0),
    mutant("bias/missing", "detached", biased, bias=lambda at: None),
    mutant("bias/not summed", "wrong-reduction", channel_bias, bias=lambda at: at.grad_z.clone()),
    mutant("bias/summed dimension kept", "wrong-reduction", biased,
        bias=lambda at: at.grad_z.sum(0, keepdim=True)),
    mutant("bias/averaged over the positions", "scale wrong-reduction", channel_bias,
        channel_bias.of((2, 3, 1, 1), (3, 1, 1)),
        bias=lambda at: at.grad_bias / at.x[0, 0].numel()),
    mutant("bias/both operands of a broadcast get the same gradient", "wrong-reduction", outer_sum,
        outer_sum.of((1,), (1,)), classic=True, rows=lambda at: at.grad_z.sum(0)),
)  # fmt: skip
UNSEEN_BIAS = (
    mutant("bias/gain's gradient averaged over the batch, summed over the tokens",
        "scale wrong-reduction", layer_scale, layer_scale.of((1, 5, 7), (7,)), classic=True,
        gain=lambda at: (at.grad_z * at.x).mean(0).sum(0)),
    mutant("bias/minus of a broadcast difference forgotten", "sign", differences,
        b=lambda at: at.grad_z.sum(0)),
    mutant("bias/pairs at one distance overwrite each other", "overwritten subset", relative_bias,
        classic=True, change={"+= summed": "= summed"}),
)  # fmt: skip
