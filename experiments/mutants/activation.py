"""Mistakes in activations: a = f(x), element by element, and gates."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.mutant import Case, layer_of, mutant

Elementwise = Callable[[Tensor], Tensor]


def elementwise(forward: Elementwise, slope: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """grad_x = slope(x, a) grad_a."""
    return Case(
        lambda x: forward(x), lambda grad_a, a, x: (grad_a * slope(x, a),), shapes=((5, 7),)
    )


SLOPE = 0.2
SHARPNESS = 3.0
THRESHOLD = 0.5
ALPHA = 0.7


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
CUBE = elementwise(lambda x: x**3, lambda x, a: 3 * x**2)
RECIPROCAL = elementwise(torch.reciprocal, lambda x, a: -a * a)
SOFTPLUS = elementwise(F.softplus, lambda x, a: torch.where(x > 20, 1.0, torch.sigmoid(x)))
SHARP_SOFTPLUS = elementwise(
    lambda x: F.softplus(x, beta=SHARPNESS), lambda x, a: torch.sigmoid(SHARPNESS * x)
)
LEAKY = elementwise(
    lambda x: F.leaky_relu(x, SLOPE), lambda x, a: torch.where(x > 0, torch.ones_like(x), SLOPE)
)
CLIP = elementwise(lambda x: x.clamp(-1, 1), lambda x, a: ((x > -1) & (x < 1)).to(x.dtype))
SOFT_SHRINK = elementwise(
    lambda x: F.softshrink(x, THRESHOLD), lambda x, a: (x.abs() > THRESHOLD).to(x.dtype)
)
ELU = elementwise(
    lambda x: F.elu(x, ALPHA), lambda x, a: torch.where(x > 0, torch.ones_like(x), a + ALPHA)
)


@layer_of(lambda x, slope: torch.where(x > 0, x, slope * x), (5, 7), (1,))
def prelu(grad_a, a, x, slope):
    negative = x <= 0
    return torch.where(negative, slope * grad_a, grad_a), (grad_a * x * negative).sum().view(1)


@layer_of(
    lambda x, beta: x * torch.sigmoid(beta * x), (5, 7), data=lambda x: (x, x.new_tensor([1.3]))
)
def swish(grad_a, a, x, beta):
    gate = torch.sigmoid(beta * x)
    grad_gate = grad_a * x * gate * (1 - gate)
    return grad_a * gate + grad_gate * beta, (grad_gate * x).sum().view(1)


@layer_of(lambda x, y: torch.sqrt(x * x + y * y), (5, 7), (5, 7))
def hypotenuse(grad_z, z, x, y):
    return grad_z * x / z, grad_z * y / z


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
    mutant("activation/leaky slope on the wrong side", "wrong-branch wrong-operand", LEAKY,
        classic=True, x=lambda at: at.grad_z * torch.where(at.x > 0, SLOPE, torch.ones_like(at.x))),
    mutant("activation/leaky slope forgotten, negative side passed on",
        "missing-factor wrong-branch", LEAKY, LEAKY.on(torch.abs), x=lambda at: at.grad_z.clone()),
    mutant("activation/leaky slope forgotten, negative side zero", "wrong-branch subset", LEAKY,
        LEAKY.on(torch.abs), x=lambda at: at.grad_z * (at.x > 0)),
    mutant("activation/upstream gradient ignored", "ignores-upstream", SIGMOID,
        x=lambda at: at.z * (1 - at.z)),
    mutant("activation/PReLU's slope gradient not summed", "wrong-reduction", prelu,
        change={"(grad_a * x * negative).sum().view(1)": "grad_a * x * negative"}),
    mutant("activation/clip passes the gradient outside its range", "wrong-branch missing-factor",
        CLIP.on(lambda x: 2 * x), CLIP.on(torch.tanh), x=lambda at: at.grad_z.clone()),
    mutant("activation/SiLU without the term of its second factor", "missing-term", SILU,
        classic=True, x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/tanh form's derivative for the exact GELU", "wrong-operand",
        elementwise(F.gelu, gelu_slope), x=lambda at: at.grad_z * gelu_tanh_slope(at.x, at.z)),
)  # fmt: skip
UNSEEN_ACTIVATION = (
    mutant("activation/halves of the GLU's gradient exchanged", "permuted", glu,
        change={"[grad_a, grad_b]": "[grad_b, grad_a]"}),
    mutant("activation/softplus with σ(x) for σ(βx)", "wrong-operand", SHARP_SOFTPLUS,
        x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/soft shrinkage passes the positive side only", "wrong-branch subset",
        SOFT_SHRINK, SOFT_SHRINK.on(torch.abs), classic=True,
        x=lambda at: at.grad_z * (at.x > THRESHOLD)),
    mutant("activation/x for x² in the gradient of swish's β", "missing-factor", swish,
        change={"(grad_gate * x).sum()": "grad_gate.sum()"}),
    mutant("activation/+α missing in ELU's derivative", "missing-term wrong-branch", ELU,
        x=lambda at: torch.where(at.x > 0, at.grad_z, at.grad_z * at.z)),
    mutant("activation/hypotenuse's grad_y copied from grad_x", "wrong-operand", hypotenuse,
        classic=True, y=lambda at: at.grad_z * at.x / at.z),
    mutant("activation/inner minus of concatenated ReLU forgotten", "sign wrong-branch",
        concatenated_relu, change={"- below": "+ below"}),
)  # fmt: skip
