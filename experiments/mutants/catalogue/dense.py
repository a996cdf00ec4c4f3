"""Mistakes in linear layers, biases and activations."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.mutant import Case, layer_of, mutant, normal, numbers

# --- Linear: z_no = Σ_i x_ni weight_oi + bias_o -------------------------------------------------


AFFINE = Case(
    lambda x, weight, bias: F.linear(x, weight, bias),
    lambda grad_z, z, x, weight, bias: (grad_z @ weight, grad_z.T @ x, grad_z.sum(0)),
    normal((3, 5), (5, 5), (5,)),
)


def linear(n: int, i: int, o: int) -> Case:
    return AFFINE.of((n, i), (o, i), (o,))


def linear_weight(weight: Callable[[Tensor], Tensor]) -> Case:
    """A square linear layer with a weight of one's choice."""

    def data():
        x, free, bias = numbers((3, 5), (5, 5), (5,))
        return x, weight(free), bias

    return AFFINE._replace(data=data)


DECAY = 0.3


@layer_of(
    lambda x, weight: (x @ weight.T).square().sum() + DECAY / 2 * weight.square().sum(),
    *((5, 3), (7, 3)),
)
def penalised(grad_z, z, x, weight):
    residual = x @ weight.T
    return grad_z * 2 * residual @ weight, grad_z * (2 * residual.T @ x + DECAY * weight)


LINEAR = (
    mutant("linear/grad_x uses the weight transposed", "wrong-operand transposed", linear(3, 5, 5),
        linear_weight(lambda weight: weight + weight.T), x=lambda at: at.grad_z @ at.weight.T),
    mutant("linear/grad_weight transposed, square", "transposed", linear(3, 5, 5),
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight transposed, not square", "transposed", linear(5, 3, 7),
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight times N", "scale", linear(5, 3, 7), linear(1, 3, 7),
        weight=lambda at: at.grad_weight * len(at.x)),
    mutant("linear/grad_weight divided by N", "scale wrong-reduction", linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: at.grad_weight / len(at.x)),
    mutant("linear/grad_weight from the output", "wrong-operand", linear(3, 5, 5),
        weight=lambda at: at.grad_z.T @ at.z),
    mutant("linear/grad_x without the weight", "missing-factor", linear(3, 5, 5),
        linear_weight(lambda weight: torch.eye(5, dtype=weight.dtype)),
        x=lambda at: at.grad_z.clone()),
    mutant("linear/grad_weight of the last sample only", "subset overwritten", linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: torch.outer(at.grad_z[-1], at.x[-1])),
    mutant("linear/grad_weight negated", "sign", linear(5, 3, 7),
        weight=lambda at: -at.grad_weight),
    mutant("linear/weight decay added by the layer", "extra-term", linear(5, 3, 7),
        linear_weight(torch.zeros_like), weight=lambda at: at.grad_weight + DECAY * at.weight),
    mutant("linear/weight decay of the objective counted twice", "extra-term", penalised,
        penalised._replace(data=lambda: (*numbers((5, 3)), torch.zeros(7, 3, dtype=torch.float64))),
        weight=lambda at: at.grad_weight + at.grad_z * DECAY * at.weight),
)  # fmt: skip

# --- Bias: z_nohw = x_nohw + bias_o, and other broadcasts ---------------------------------------


BIASED = Case(
    lambda x, bias: x + bias,
    lambda grad_z, z, x, bias: (grad_z, grad_z.sum(0)),
    normal((5, 3), (3,)),
)
CHANNEL_BIAS = Case(
    lambda x, bias: x + bias,
    lambda grad_z, z, x, bias: (grad_z, grad_z.sum((0, 2, 3))[:, None, None]),
    normal((2, 3, 5, 7), (3, 1, 1)),
)
OUTER_SUM = Case(
    lambda rows, columns: rows[:, None] + columns,
    lambda grad_z, z, rows, columns: (grad_z.sum(1), grad_z.sum(0)),
    normal((5,), (5,)),
)

BIAS = (
    mutant("bias/mean for sum", "scale wrong-reduction", BIASED, BIASED.of((1, 3), (3,)),
        bias=lambda at: at.grad_z.mean(0)),
    mutant("bias/last sample only", "subset overwritten", BIASED, BIASED.of((1, 3), (3,)),
        classic=True, bias=lambda at: at.grad_z[-1].clone()),
    mutant("bias/summed over the wrong axis", "wrong-reduction", BIASED.of((5, 5), (5,)),
        BIASED.of((1, 1), (1,)), bias=lambda at: at.grad_z.sum(1)),
    mutant("bias/zero", "detached", BIASED, classic=True, bias=lambda at: at.grad_bias * 0),
    mutant("bias/missing", "detached", BIASED, bias=lambda at: None),
    mutant("bias/not summed", "wrong-reduction", CHANNEL_BIAS, bias=lambda at: at.grad_z.clone()),
    mutant("bias/summed dimension kept", "wrong-reduction", BIASED,
        bias=lambda at: at.grad_z.sum(0, keepdim=True)),
    mutant("bias/averaged over the positions", "scale wrong-reduction", CHANNEL_BIAS,
        CHANNEL_BIAS.of((2, 3, 1, 1), (3, 1, 1)),
        bias=lambda at: at.grad_bias / at.x[0, 0].numel()),
    mutant("bias/both operands of a broadcast get the same gradient", "wrong-reduction", OUTER_SUM,
        OUTER_SUM.of((1,), (1,)), classic=True, rows=lambda at: at.grad_z.sum(0)),
)  # fmt: skip

# --- Activation: a = f(x), element by element ---------------------------------------------------

Elementwise = Callable[[Tensor], Tensor]


def elementwise(
    forward: Elementwise,
    slope: Callable[[Tensor, Tensor], Tensor],
    change: Elementwise = torch.clone,
) -> Case:
    """grad_x = slope(x, a) grad_a, on normal data after `change`."""
    return Case(
        lambda x: forward(x),
        lambda grad_a, a, x: (grad_a * slope(x, a),),
        lambda: tuple(map(change, numbers((5, 7)))),
    )


SLOPE = 0.2


def gelu_slope(x, a):
    """Φ(x) + x φ(x)."""
    density = x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return (1 + torch.erf(x / 2**0.5)) / 2 + density


def gelu_tanh_slope(x, a):
    """The derivative of ½ x (1 + tanh u), u = √(2/π) (x + 0.044715 x³)."""
    root = (2 / torch.pi) ** 0.5
    t = torch.tanh(root * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)


SIGMOID = elementwise(torch.sigmoid, lambda x, a: a * (1 - a))
TANH = elementwise(torch.tanh, lambda x, a: 1 - a * a)
RELU = elementwise(F.relu, lambda x, a: (x > 0).to(x.dtype))
SILU = elementwise(F.silu, lambda x, a: torch.sigmoid(x) * (1 + x - a))
LEAKY = partial(
    elementwise,
    lambda x: F.leaky_relu(x, SLOPE),
    lambda x, a: torch.where(x > 0, torch.ones_like(x), SLOPE),
)
CLIP = partial(
    elementwise,
    lambda x: x.clamp(-1, 1),
    lambda x, a: ((x > -1) & (x < 1)).to(x.dtype),
)


@layer_of(lambda x, slope: torch.where(x > 0, x, slope * x), (5, 7), (1,))
def prelu(grad_a, a, x, slope):
    negative = x <= 0
    return torch.where(negative, slope * grad_a, grad_a), (grad_a * x * negative).sum().view(1)


ACTIVATION = (
    mutant("activation/sigmoid's derivative taken at the output", "wrong-operand", SIGMOID,
        x=lambda at: at.grad_z * torch.sigmoid(at.z) * (1 - torch.sigmoid(at.z))),
    mutant("activation/tanh's derivative missing", "missing-factor", TANH,
        x=lambda at: at.grad_z.clone()),
    mutant("activation/1 - a for 1 - a² in tanh", "missing-factor wrong-operand", TANH,
        x=lambda at: at.grad_z * (1 - at.z)),
    mutant("activation/a for a (1 - a) in the sigmoid", "missing-factor", SIGMOID, classic=True,
        x=lambda at: at.grad_z * at.z),
    mutant("activation/ReLU's mask taken from the gradient", "nonlinear-in-upstream wrong-operand",
        RELU, x=lambda at: at.grad_z * (at.grad_z > 0)),
    mutant("activation/leaky slope on the wrong side", "wrong-branch wrong-operand", LEAKY(),
        classic=True, x=lambda at: at.grad_z * torch.where(at.x > 0, SLOPE, torch.ones_like(at.x))),
    mutant("activation/leaky slope forgotten, negative side passed on",
        "missing-factor wrong-branch", LEAKY(), LEAKY(torch.abs), x=lambda at: at.grad_z.clone()),
    mutant("activation/leaky slope forgotten, negative side zero", "wrong-branch subset", LEAKY(),
        LEAKY(torch.abs), x=lambda at: at.grad_z * (at.x > 0)),
    mutant("activation/upstream gradient ignored", "ignores-upstream", SIGMOID,
        x=lambda at: at.z * (1 - at.z)),
    mutant("activation/PReLU's slope gradient not summed", "wrong-reduction", prelu,
        change={"(grad_a * x * negative).sum().view(1)": "grad_a * x * negative"}),
    mutant("activation/clip passes the gradient outside its range", "wrong-branch missing-factor",
        CLIP(lambda x: 2 * x), CLIP(torch.tanh), x=lambda at: at.grad_z.clone()),
    mutant("activation/SiLU without the term of its second factor", "missing-term", SILU,
        classic=True, x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/tanh form's derivative for the exact GELU", "wrong-operand",
        elementwise(F.gelu, gelu_slope), x=lambda at: at.grad_z * gelu_tanh_slope(at.x, at.z)),
)  # fmt: skip
