"""The catalogue of mistakes: correct layers, each with exactly one mistake in its gradient.

It measures the checker: how many wrong gradients it catches, how many it names, and whether it
leaves right ones alone. The mistakes are those that people make in hand-written backward passes,
as seen in public issues; the layers around them are written here. Each comes with data on which it
shows and, where there is such a thing, with data on which it cannot (a batch of one, a symmetric
kernel, γ = 1, no ties), and with the one or two kinds of cause that would be a right name for it.
Those were decided from the mistake and the wording of `KINDS`, before any diagnosis of it was
seen. Beside the mutants stand the equivalents: right gradients that look unusual.

A forward is plain torch code, so autograd through it is the truth (where a module cuts its own
graph, finite differences are); a backward is written out by hand. The data are float64, but for
two mistakes of float32.

The hypotheses were written with the mutants of `fit()`, every second of a family, and the names
first scored on the others, `held_out()`. Their misses have been read since, so that names are now
scored on those of `unseen_dense.py` and `unseen_spatial.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop.check.report import KINDS


@dataclass(frozen=True)
class Mutant:
    """A layer with one mistake (or, among the equivalents, with none)."""

    name: str
    """"family/what is wrong"."""
    family: str
    kinds: tuple[str, ...]
    """The one or two words of `KINDS` that name it rightly; none for an equivalent."""
    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    """A fresh target and the inputs on which the mistake shows."""
    hides: Callable[[], tuple[Any, tuple[Any, ...]]] | None = None
    """The same mistake with inputs on which the gradient comes out right."""
    second_order: bool = False
    """Shows in the second derivative only."""

    def __post_init__(self) -> None:
        if not set(self.kinds) <= set(KINDS) or len(self.kinds) > 2:
            raise ValueError(f"{self.name}: {self.kinds} are not one or two kinds of cause")


# --- The workshop -------------------------------------------------------------------------------


class Case(NamedTuple):
    """A layer and its data: forward(*inputs) -> z, backward(grad_z, z, *inputs) -> gradients."""

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]
    data: Callable[[], tuple[Any, ...]]


def layer(
    forward: Callable[..., Any], backward: Callable[..., tuple[Any, ...]], classic: bool = False
) -> type[Function]:
    """A Function out of two pure ones, in torch's classic style or in that of `setup_context`.

    Several outputs reach `backward` as a tuple, and so do their gradients.
    """
    parameters = list(inspect.signature(forward).parameters.values())
    count = len(parameters)

    def save(ctx: Any, inputs: Any, z: Any) -> None:
        ctx.save_for_backward(*inputs, *(z if isinstance(z, tuple) else (z,)))

    def play(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        inputs, z = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if len(z) == 1:
            return tuple(backward(grad_z[0], z[0], *inputs))
        return tuple(backward(grad_z, z, *inputs))

    def forward_and_save(ctx: Any, *inputs: Any) -> Any:
        z = forward(*inputs)
        save(ctx, inputs, z)
        return z

    ctx_first = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    cast(Any, forward_and_save).__signature__ = inspect.Signature([ctx_first, *parameters])
    members: dict[str, Any] = {"forward": staticmethod(forward_and_save)}
    if not classic:
        set_up: Any = save
        members = {"forward": staticmethod(forward), "setup_context": staticmethod(set_up)}
    members["backward"] = staticmethod(play)
    name = forward.__name__.removesuffix("_forward").title().replace("_", "")
    return cast(type[Function], type(name, (Function,), members))


def mutant(
    name: str,
    kinds: tuple[str, ...],
    shows: Case,
    hides: Case | None = None,
    *,
    mistake: str = "",
    classic: bool = False,
    second_order: bool = False,
    **wrong: Callable[[Any], Any],
) -> Mutant:
    """The layer of `shows` with one mistake: a switch of its backward, or some gradients replaced.

    `weight=lambda at: …` replaces grad_weight; `at` holds grad_z, z, the inputs by name, and the
    right gradients as grad_x, grad_weight, ….
    """

    def make(case: Case) -> tuple[Any, tuple[Any, ...]]:
        names = list(inspect.signature(case.forward).parameters)
        right = partial(case.backward, mistake=mistake) if mistake else case.backward

        def backward(grad_z: Any, z: Any, *inputs: Any) -> tuple[Any, ...]:
            gradients = dict(zip(names, right(grad_z, z, *inputs), strict=True))
            at = SimpleNamespace(grad_z=grad_z, z=z, **dict(zip(names, inputs, strict=True)))
            at.__dict__.update({f"grad_{name}": gradients[name] for name in names})
            return tuple(wrong[name](at) if name in wrong else gradients[name] for name in names)

        return layer(case.forward, backward if wrong else right, classic), case.data()

    family = name.partition("/")[0]
    hidden = hides and partial(make, hides)
    return Mutant(name, family, kinds, partial(make, shows), hidden, second_order)


def written_out(
    name: str,
    kinds: tuple[str, ...],
    build: Callable[[], Any],
    data: Callable[[], tuple[Any, ...]],
    second_order: bool = False,
) -> Mutant:
    """A mutant that is a module, or a Function of its own; `build` makes it afresh."""
    family = name.partition("/")[0]
    return Mutant(name, family, kinds, lambda: (build(), data()), second_order=second_order)


def numbers(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Normal numbers of these shapes, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Callable[[], Any]:
    """What makes `numbers`."""
    return lambda: numbers(*shapes, dtype=dtype)


# --- Linear: z_no = Σ_i x_ni weight_oi + bias_o -------------------------------------------------


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def linear_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    return grad_z @ weight, grad_z.T @ x, grad_z.sum(0)


def linear(n: int, i: int, o: int) -> Case:
    return Case(linear_forward, linear_backward, normal((n, i), (o, i), (o,)))


def linear_weight(weight: Callable[[Tensor], Tensor]) -> Case:
    """A square linear layer with a weight of one's choice."""

    def data() -> tuple[Tensor, ...]:
        x, free, bias = numbers((3, 5), (5, 5), (5,))
        return x, weight(free), bias

    return Case(linear_forward, linear_backward, data)


DECAY = 0.3


def penalised_forward(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).square().sum() + DECAY / 2 * weight.square().sum()


def penalised_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    residual = x @ weight.T
    return grad_z * 2 * residual @ weight, grad_z * (2 * residual.T @ x + DECAY * weight)


PENALISED = Case(penalised_forward, penalised_backward, normal((5, 3), (7, 3)))

# fmt: off
LINEAR = (
    mutant("linear/grad_x uses the weight transposed", ("wrong-operand", "transposed"),
        linear(3, 5, 5), linear_weight(lambda weight: weight + weight.T),
        x=lambda at: at.grad_z @ at.weight.T),
    mutant("linear/grad_weight transposed, square", ("transposed",), linear(3, 5, 5),
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight transposed, not square", ("transposed",), linear(5, 3, 7),
        weight=lambda at: at.x.T @ at.grad_z),
    mutant("linear/grad_weight times N", ("scale",), linear(5, 3, 7), linear(1, 3, 7),
        weight=lambda at: at.grad_weight * len(at.x)),
    mutant("linear/grad_weight divided by N", ("scale", "wrong-reduction"), linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: at.grad_weight / len(at.x)),
    mutant("linear/grad_weight from the output", ("wrong-operand",), linear(3, 5, 5),
        weight=lambda at: at.grad_z.T @ at.z),
    mutant("linear/grad_x without the weight", ("missing-factor",), linear(3, 5, 5),
        linear_weight(lambda weight: torch.eye(5, dtype=weight.dtype)),
        x=lambda at: at.grad_z.clone()),
    mutant("linear/grad_weight of the last sample only", ("subset", "overwritten"), linear(5, 3, 7),
        linear(1, 3, 7), classic=True, weight=lambda at: torch.outer(at.grad_z[-1], at.x[-1])),
    mutant("linear/grad_weight negated", ("sign",), linear(5, 3, 7),
        weight=lambda at: -at.grad_weight),
    mutant("linear/weight decay added by the layer", ("extra-term",), linear(5, 3, 7),
        linear_weight(torch.zeros_like), weight=lambda at: at.grad_weight + DECAY * at.weight),
    mutant("linear/weight decay of the objective counted twice", ("extra-term",), PENALISED,
        PENALISED._replace(data=lambda: (*numbers((5, 3)), torch.zeros(7, 3, dtype=torch.float64))),
        weight=lambda at: at.grad_weight + at.grad_z * DECAY * at.weight),
)
# fmt: on

# --- Bias: z_nohw = x_nohw + bias_o, and other broadcasts ---------------------------------------


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias


def add_bias_backward(grad_z: Tensor, z: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return grad_z, grad_z.sum(0)


def bias(n: int, o: int) -> Case:
    return Case(add_bias, add_bias_backward, normal((n, o), (o,)))


def channel_bias_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_z, grad_z.sum((0, 2, 3))[:, None, None]


CHANNEL_BIAS = Case(add_bias, channel_bias_backward, normal((2, 3, 5, 7), (3, 1, 1)))


def outer_sum(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] + columns


def outer_sum_backward(
    grad_z: Tensor, z: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_z.sum(1), grad_z.sum(0)


# fmt: off
BIAS = (
    mutant("bias/mean for sum", ("scale", "wrong-reduction"), bias(5, 3), bias(1, 3),
        bias=lambda at: at.grad_z.mean(0)),
    mutant("bias/last sample only", ("subset", "overwritten"), bias(5, 3), bias(1, 3), classic=True,
        bias=lambda at: at.grad_z[-1].clone()),
    mutant("bias/summed over the wrong axis", ("wrong-reduction",), bias(5, 5), bias(1, 1),
        bias=lambda at: at.grad_z.sum(1)),
    mutant("bias/zero", ("detached",), bias(5, 3), classic=True, bias=lambda at: at.grad_bias * 0),
    mutant("bias/missing", ("detached",), bias(5, 3), bias=lambda at: None),
    mutant("bias/not summed", ("wrong-reduction",), CHANNEL_BIAS,
        bias=lambda at: at.grad_z.clone()),
    mutant("bias/summed dimension kept", ("wrong-reduction",), bias(5, 3),
        bias=lambda at: at.grad_z.sum(0, keepdim=True)),
    mutant("bias/averaged over the positions", ("scale", "wrong-reduction"), CHANNEL_BIAS,
        CHANNEL_BIAS._replace(data=normal((2, 3, 1, 1), (3, 1, 1))),
        bias=lambda at: at.grad_bias / at.x[0, 0].numel()),
    mutant("bias/both operands of a broadcast get the same gradient", ("wrong-reduction",),
        Case(outer_sum, outer_sum_backward, normal((5,), (5,))),
        Case(outer_sum, outer_sum_backward, normal((1,), (1,))), classic=True,
        rows=lambda at: at.grad_z.sum(0)),
)
# fmt: on

# --- Activation: a = f(x), element by element ---------------------------------------------------

Elementwise = Callable[[Tensor], Tensor]


def elementwise(
    forward: Elementwise,
    slope: Callable[[Tensor, Tensor], Tensor],
    change: Elementwise = torch.clone,
) -> Case:
    """grad_x = slope(x, a) grad_a, on normal data after `change`."""

    def activation(x: Tensor) -> Tensor:
        return forward(x)

    def backward(grad_a: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor]:
        return (grad_a * slope(x, a),)

    return Case(activation, backward, lambda: tuple(map(change, numbers((5, 7)))))


SLOPE = 0.2


def square_root_of_two(x: Tensor) -> Tensor:
    return x / 2**0.5


def gelu_slope(x: Tensor, a: Tensor) -> Tensor:
    """Φ(x) + x φ(x)."""
    return (1 + torch.erf(square_root_of_two(x))) / 2 + x * torch.exp(-x * x / 2) / (
        2 * torch.pi
    ) ** 0.5


def gelu_tanh_slope(x: Tensor, a: Tensor) -> Tensor:
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


def prelu_forward(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def prelu_backward(grad_a: Tensor, a: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    negative = x <= 0
    return torch.where(negative, slope * grad_a, grad_a), (grad_a * x * negative).sum().view(1)


# fmt: off
ACTIVATION = (
    mutant("activation/sigmoid's derivative taken at the output", ("wrong-operand",), SIGMOID,
        x=lambda at: at.grad_z * torch.sigmoid(at.z) * (1 - torch.sigmoid(at.z))),
    mutant("activation/tanh's derivative missing", ("missing-factor",), TANH,
        x=lambda at: at.grad_z.clone()),
    mutant("activation/1 - a for 1 - a² in tanh", ("missing-factor", "wrong-operand"), TANH,
        x=lambda at: at.grad_z * (1 - at.z)),
    mutant("activation/a for a (1 - a) in the sigmoid", ("missing-factor",), SIGMOID, classic=True,
        x=lambda at: at.grad_z * at.z),
    mutant("activation/ReLU's mask taken from the gradient",
        ("nonlinear-in-upstream", "wrong-operand"), RELU, x=lambda at: at.grad_z * (at.grad_z > 0)),
    mutant("activation/leaky slope on the wrong side", ("wrong-branch", "wrong-operand"), LEAKY(),
        classic=True, x=lambda at: at.grad_z * torch.where(at.x > 0, SLOPE, torch.ones_like(at.x))),
    mutant("activation/leaky slope forgotten, negative side passed on",
        ("missing-factor", "wrong-branch"), LEAKY(), LEAKY(torch.abs),
        x=lambda at: at.grad_z.clone()),
    mutant("activation/leaky slope forgotten, negative side zero", ("wrong-branch", "subset"),
        LEAKY(), LEAKY(torch.abs), x=lambda at: at.grad_z * (at.x > 0)),
    mutant("activation/upstream gradient ignored", ("ignores-upstream",), SIGMOID,
        x=lambda at: at.z * (1 - at.z)),
    mutant("activation/PReLU's slope gradient not summed", ("wrong-reduction",),
        Case(prelu_forward, prelu_backward, normal((5, 7), (1,))),
        slope=lambda at: at.grad_z * at.x * (at.x <= 0)),
    mutant("activation/clip passes the gradient outside its range",
        ("wrong-branch", "missing-factor"), CLIP(lambda x: 2 * x), CLIP(torch.tanh),
        x=lambda at: at.grad_z.clone()),
    mutant("activation/SiLU without the term of its second factor", ("missing-term",), SILU,
        classic=True, x=lambda at: at.grad_z * torch.sigmoid(at.x)),
    mutant("activation/tanh form's derivative for the exact GELU", ("wrong-operand",),
        elementwise(F.gelu, gelu_slope), x=lambda at: at.grad_z * gelu_tanh_slope(at.x, at.z)),
)
# fmt: on

# --- Softmax and losses -------------------------------------------------------------------------


def softmax_forward(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def softmax_backward(grad_a: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor]:
    return (a * (grad_a - (grad_a * a).sum(-1, keepdim=True)),)


def log_softmax_forward(x: Tensor) -> Tensor:
    return x - x.logsumexp(-1, keepdim=True)


def log_softmax_backward(grad_a: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_a - a.exp() * grad_a.sum(-1, keepdim=True),)


SOFTMAX = Case(softmax_forward, softmax_backward, normal((5, 7)))
LOG_SOFTMAX = Case(log_softmax_forward, log_softmax_backward, normal((5, 7)))

IGNORED = -100


def cross_entropy(labels: list[int], class_weights: list[float] | None = None) -> Case:
    """−Σ_n w_y log p_ny / Σ_n w_y over the labels that are not ignored."""
    weights = torch.tensor(class_weights or [1.0] * 3, dtype=torch.float64)

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED)

    def backward(
        grad_loss: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, mistake: str = ""
    ) -> tuple[Tensor, None]:
        p = logits.softmax(-1)
        if mistake == "softmax twice":
            p = p.softmax(-1)
        y = labels.clamp(min=0)
        counted = (labels != IGNORED).to(logits.dtype)
        share = weights[y] * counted / (weights[y] * counted).sum()
        if mistake == "ignored labels":  # label 0 stands where the ignored one was
            share = weights[y] / (weights[y] * counted).sum()
        elif mistake == "divided by N":
            share = weights[y] * counted / len(labels)
        elif mistake == "no weights":
            share = counted / counted.sum()
        elif mistake == "not averaged":
            share = weights[y] * counted
        target = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        if mistake == "no target":
            target = torch.zeros_like(target)
        elif mistake == "smoothed target":
            target = 0.9 * target + 0.1 / logits.shape[1]
        elif mistake == "target of the next sample":
            target = target.roll(-1, 0)
        if mistake == "upstream ignored":
            grad_loss = torch.ones_like(grad_loss)
        return grad_loss * share[:, None] * (p - target), None

    forward.__name__ = "cross_entropy"
    return Case(forward, backward, lambda: (*numbers((len(labels), 3)), torch.tensor(labels)))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean()


def squared_error_backward(
    grad_loss: Tensor, loss: Tensor, prediction: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    grad_prediction = grad_loss * 2 * (prediction - target) / prediction.numel()
    return grad_prediction, -grad_prediction


def squared(n: int, d: int) -> Case:
    return Case(squared_error, squared_error_backward, normal((n, d), (n, d)))


LABELS = [2, 0, 1, 1, 2]

# fmt: off
LOSS = (
    mutant("loss/softmax with its diagonal only", ("missing-term",), SOFTMAX,
        x=lambda at: at.grad_z * at.z * (1 - at.z)),
    mutant("loss/softmax without the factor a", ("missing-factor",), SOFTMAX,
        x=lambda at: at.grad_z - (at.grad_z * at.z).sum(-1, keepdim=True)),
    mutant("loss/softmax negated", ("sign",), SOFTMAX, classic=True, x=lambda at: -at.grad_x),
    mutant("loss/softmax summed over the batch", ("wrong-reduction",), SOFTMAX,
        x=lambda at: at.z * (at.grad_z - (at.grad_z * at.z).sum(0))),
    mutant("loss/log-softmax without its second term", ("missing-term",), LOG_SOFTMAX,
        x=lambda at: at.grad_z.clone()),
    mutant("loss/p without -1 at the target", ("missing-term",), cross_entropy(LABELS),
        mistake="no target", classic=True),
    mutant("loss/cross entropy without 1/N", ("scale", "wrong-reduction"), cross_entropy(LABELS),
        cross_entropy([1]), mistake="not averaged"),
    mutant("loss/ignored labels counted", ("extra-term", "missing-factor"),
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS),
        mistake="ignored labels"),
    mutant("loss/divided by N with ignored labels among them", ("scale",),
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS), mistake="divided by N",
        classic=True),
    mutant("loss/class weights missing", ("missing-factor", "per-channel-scale"),
        cross_entropy(LABELS, [0.5, 1.0, 3.0]), cross_entropy(LABELS, [1.0, 1.0, 1.0]),
        mistake="no weights"),
    mutant("loss/upstream gradient ignored", ("ignores-upstream",), cross_entropy(LABELS),
        mistake="upstream ignored"),
    mutant("loss/softmax twice", ("wrong-operand", "missing-factor"), cross_entropy(LABELS),
        mistake="softmax twice"),
    mutant("loss/label smoothing in the gradient only", ("extra-term",), cross_entropy(LABELS),
        mistake="smoothed target", classic=True),
    mutant("loss/targets of the next sample", ("shifted", "wrong-operand"), cross_entropy(LABELS),
        cross_entropy([1, 1, 1]), mistake="target of the next sample"),
    mutant("loss/factor 2 of the square missing", ("scale",), squared(5, 3),
        prediction=lambda at: at.grad_prediction / 2, target=lambda at: at.grad_target / 2),
    mutant("loss/1/N for 1/(N·D)", ("scale",), squared(5, 3), squared(5, 1), classic=True,
        prediction=lambda at: at.grad_prediction * at.target.shape[1],
        target=lambda at: at.grad_target * at.target.shape[1]),
    mutant("loss/target minus prediction", ("sign",), squared(5, 3),
        prediction=lambda at: -at.grad_prediction),
)
# fmt: on

# --- Convolution: z_nohw = Σ_cpq patches_ncpqhw weight_ocpq + bias_o ----------------------------


def patches_of(
    x: Tensor, kernel: torch.Size, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """ncpqhw, with h and w laid out in one axis."""
    patches = F.unfold(x, tuple(kernel), dilation, padding, stride)
    return patches.view(len(x), x.shape[1], *kernel, -1)


def conv(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    symmetric: bool = False,
) -> Case:
    def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def grad_of_x(grad_z: Tensor, x: Tensor, weight: Tensor, mistake: str) -> Tensor:
        """grad_z spread out by the stride, correlated with the kernel mirrored in space."""
        n, o, h, w = grad_z.shape
        spread = grad_z.new_zeros(n, o, (h - 1) * stride + 1, (w - 1) * stride + 1)
        spread[..., ::stride, ::stride] = grad_z
        if mistake == "stride not spread out":
            spread = grad_z
        kernel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        if mistake == "kernel not flipped":
            kernel = kernel.flip(2, 3)
        elif mistake == "channels not exchanged":
            kernel = weight.flip(2, 3)
        rows, columns = dilation * (weight.shape[2] - 1), dilation * (weight.shape[3] - 1)
        reached = F.conv2d(
            F.pad(spread, (columns, columns, rows, rows)), kernel, dilation=dilation, groups=groups
        )
        below = x.shape[2] + 2 * padding - reached.shape[2]  # what no window reached: zero
        right = x.shape[3] + 2 * padding - reached.shape[3]
        if mistake == "remainder first":
            padded = F.pad(reached, (right, 0, below, 0))
        elif mistake == "remainder cut off":
            cropped = F.pad(reached, (-padding, -padding, -padding, -padding))
            return F.pad(cropped, (0, right, 0, below))
        else:
            padded = F.pad(reached, (0, right, 0, below))
        first = 0 if mistake == "padding not cropped" else padding
        return padded[..., first : first + x.shape[2], first : first + x.shape[3]]

    def backward(
        grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mistake: str = ""
    ) -> tuple[Tensor, ...]:
        if mistake == "dilation ignored":  # the dense patches that start where the dilated ones do
            patches = patches_of(x, weight.shape[2:], stride, padding)
            rows = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
            patches = patches.unflatten(-1, (rows, -1))[..., : z.shape[2], : z.shape[3]]
            patches = patches.flatten(-2)
        else:
            patches = patches_of(x, weight.shape[2:], stride, padding, dilation)
        grad_weight = torch.einsum(
            "ngol,ngcpql->gocpq",
            grad_z.flatten(2).unflatten(1, (groups, -1)),
            patches.unflatten(1, (groups, -1)),
        )
        grad_x = grad_of_x(grad_z, x, weight, mistake)
        if mistake == "group 0 only":
            grad_weight = torch.cat([grad_weight[:1], 0 * grad_weight[1:]])
        elif mistake == "leak between groups":
            grad_groups = grad_x.unflatten(1, (groups, -1))
            grad_x = grad_groups.sum(1, keepdim=True).expand_as(grad_groups).flatten(1, 2)
        return grad_x, grad_weight.flatten(0, 1), grad_z.sum((0, 2, 3))

    def data() -> tuple[Tensor, ...]:
        x, weight, bias = numbers(x_shape, weight_shape, (weight_shape[0],))
        if symmetric:
            weight = weight + weight.flip(2, 3)
            weight = weight + weight.transpose(0, 1)
        return x, weight, bias

    return Case(convolution, backward, data)


def conv_by_patches(stride: int) -> Case:
    """The same layer by unfolding, one matrix product, and folding back window by window."""

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        patches = patches_of(x, weight.shape[2:], stride)
        columns = (x.shape[3] - weight.shape[3]) // stride + 1
        return torch.einsum("ncpql,ocpq->nol", patches, weight).unflatten(2, (-1, columns))

    def backward(
        grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
    ) -> tuple[Tensor, Tensor]:
        patches = patches_of(x, weight.shape[2:], stride)
        grad_patches = torch.einsum("nohw,ocpq->ncpqhw", grad_z, weight)
        grad_x = torch.zeros_like(x)
        for h in range(z.shape[2]):
            for w in range(z.shape[3]):
                window = grad_x[
                    :,
                    :,
                    h * stride : h * stride + weight.shape[2],
                    w * stride : w * stride + weight.shape[3],
                ]
                if mistake == "overlap overwritten":
                    window.copy_(grad_patches[..., h, w])
                else:
                    window.add_(grad_patches[..., h, w])
        return grad_x, torch.einsum("nol,ncpql->ocpq", grad_z.flatten(2), patches)

    return Case(convolution, backward, normal((2, 3, 7, 5), (5, 3, 3, 2)))


def transposed_conv(symmetric: bool = False) -> Case:
    def transposed_convolution(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, padding=1)

    def backward(
        grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
    ) -> tuple[Tensor, Tensor]:
        plain = mistake == "plain convolution's gradient"
        grad_x = (F.conv_transpose2d if plain else F.conv2d)(grad_z, weight, padding=1)
        patches = patches_of(grad_z, weight.shape[2:], padding=1)
        return grad_x, torch.einsum("ncl,nopql->copq", x.flatten(2), patches)

    _, _, data = conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=symmetric)
    return Case(transposed_convolution, backward, lambda: data()[:2])


PLAIN = conv((2, 3, 7, 5), (5, 3, 3, 2))
GROUPED = conv((2, 6, 7, 5), (4, 3, 3, 2), groups=2)


# fmt: off
CONVOLUTION = (
    mutant("convolution/kernel not flipped in grad_x", ("flipped",),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1, symmetric=True), mistake="kernel not flipped"),
    mutant("convolution/grad_weight flipped", ("flipped",), PLAIN, conv((2, 3, 7, 5), (5, 3, 1, 1)),
        weight=lambda at: at.grad_weight.flip(2, 3)),
    mutant("convolution/channels not exchanged in grad_x", ("transposed", "wrong-operand"),
        conv((2, 3, 7, 5), (3, 3, 3, 2)), conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=True),
        mistake="channels not exchanged", classic=True),
    mutant("convolution/input channels of grad_weight in reverse order", ("permuted",), PLAIN,
        conv((2, 1, 7, 5), (5, 1, 3, 2)), weight=lambda at: at.grad_weight.flip(1)),
    mutant("convolution/padding not cropped", ("shifted",),
        conv((2, 3, 7, 5), (5, 3, 3, 2), padding=1), PLAIN, mistake="padding not cropped"),
    mutant("convolution/upstream gradient not spread out by the stride", ("wrong-operand",),
        conv((2, 3, 7, 5), (5, 3, 3, 2), stride=2), PLAIN, mistake="stride not spread out"),
    mutant("convolution/remainder rows of a stride put first", ("shifted",),
        conv((2, 3, 8, 7), (5, 3, 3, 2), stride=2), PLAIN, mistake="remainder first", classic=True),
    mutant("convolution/remainder rows of a stride cut off", ("subset",),
        conv((2, 3, 8, 6), (5, 3, 3, 3), stride=2, padding=1), PLAIN, mistake="remainder cut off"),
    mutant("convolution/dilation ignored in grad_weight", ("wrong-operand",),
        conv((2, 3, 11, 7), (5, 3, 3, 2), dilation=2), PLAIN, mistake="dilation ignored"),
    mutant("convolution/grad_x leaks between groups", ("extra-term", "wrong-reduction"), GROUPED,
        PLAIN, mistake="leak between groups"),
    mutant("convolution/grad_weight of group 0 only", ("subset",), GROUPED, PLAIN,
        mistake="group 0 only", classic=True),
    mutant("convolution/grad_bias from one position", ("subset",), PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z[:, :, 0, 0].sum(0)),
    mutant("convolution/grad_bias averaged over the positions", ("scale", "wrong-reduction"), PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z.mean((2, 3)).sum(0)),
    mutant("convolution/fold overwrites where patches overlap", ("overwritten",),
        conv_by_patches(1), conv_by_patches(3), mistake="overlap overwritten"),
    mutant("convolution/transposed convolution with the plain one's gradient", ("wrong-operand",),
        transposed_conv(), transposed_conv(symmetric=True), mistake="plain convolution's gradient",
        classic=True),
)
# fmt: on

# --- Pooling ------------------------------------------------------------------------------------


def max_pool(
    kernel: int, stride: int, padding: int = 0, change: Elementwise = torch.clone, size: int = 7
) -> Case:
    def max_pooling(x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel, stride, padding)

    def backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
        outside = 0.0 if mistake == "padded with zeros" else -torch.inf
        around = F.pad(x, (padding,) * 4, value=outside)
        patches = F.unfold(around, kernel, stride=stride).unflatten(1, (x.shape[1], -1))  # nckl
        grad_z = grad_z.flatten(2)
        if mistake in ("all ties", "ties share"):
            ties = (patches == z.flatten(2)[:, :, None]).to(x.dtype)
            share = ties / ties.sum(2, keepdim=True) if mistake == "ties share" else ties
            grad_patches = (share * grad_z[:, :, None]).flatten(1, 2)
            return (F.fold(grad_patches, x.shape[2:], kernel, 1, padding, stride),)
        winner = patches.argmax(2)
        if mistake == "last tie":
            winner = kernel * kernel - 1 - patches.flip(2).argmax(2)
        place = torch.arange(grad_z.shape[2])
        row = place // z.shape[3] * stride - padding + winner // kernel
        column = place % z.shape[3] * stride - padding + winner % kernel
        inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        index = torch.where(inside, row * x.shape[3] + column, 0)
        if mistake == "local index":
            index = winner
        grad_x = torch.zeros_like(x).flatten(2)
        if mistake == "overlap overwritten":
            grad_x = grad_x.scatter(2, index, grad_z)
        else:
            grad_x = grad_x.scatter_add(2, index, grad_z * inside)
        return (grad_x.view_as(x),)

    return Case(max_pooling, backward, lambda: tuple(map(change, numbers((2, 3, size, size)))))


def with_ties(x: Tensor) -> Tensor:
    return x.round()


def average_pool(padding: int, channels: int = 3) -> Case:
    """The mean over what a window of 3 by 3 holds of x, padding not counted."""

    def average_pooling(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 2, padding, count_include_pad=False)

    def backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
        count = F.unfold(torch.ones_like(x[:1, :1]), 3, 1, padding, 2).sum(1, keepdim=True)
        if mistake == "k² at the border":
            count = torch.full_like(count, 9)
        elif mistake == "not divided":
            count = torch.ones_like(count)
        grad_patches = (grad_z.flatten(2) / count).repeat_interleave(9, 1)
        return (F.fold(grad_patches, x.shape[2:], 3, 1, padding, 2),)

    return Case(average_pooling, backward, normal((2, channels, 7, 5)))


def adaptive_pool(length: int) -> Case:
    """Three bins; where 3 does not divide the length they overlap."""

    def adaptive_pooling(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(x, 3)

    def backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
        grad_x = torch.zeros_like(x)
        for i in range(3):
            first, end = i * length // 3, -(-(i + 1) * length // 3)
            if mistake == "uniform bins":
                first, end = i * (length // 3), (i + 1) * (length // 3)
            grad_x[..., first:end] += grad_z[..., i : i + 1] / (end - first)
        return (grad_x,)

    return Case(adaptive_pooling, backward, normal((2, 3, length)))


def global_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def global_pool_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return ((grad_z / x[0, 0].numel())[:, :, None, None].expand_as(x),)


GLOBAL_POOL = Case(global_pool, global_pool_backward, normal((2, 3, 7, 5)))

# fmt: off
POOLING = (
    mutant("pooling/all ties get the gradient", ("extra-term", "wrong-branch"),
        max_pool(2, 2, change=with_ties, size=6), max_pool(2, 2), mistake="all ties"),
    mutant("pooling/index within the window used as index in the plane", ("wrong-operand",),
        max_pool(2, 2, size=6), max_pool(5, 5, size=5), mistake="local index"),
    mutant("pooling/overlapping windows overwrite each other", ("overwritten",), max_pool(3, 1),
        max_pool(2, 2), mistake="overlap overwritten", classic=True),
    mutant("pooling/padding taken for zeros", ("wrong-operand", "wrong-branch"),
        max_pool(3, 2, 1, change=lambda x: x - 1), max_pool(3, 2, 1, change=torch.exp),
        mistake="padded with zeros"),
    mutant("pooling/average without 1/k²", ("scale",), average_pool(0), mistake="not divided"),
    mutant("pooling/padding counted in the divisor", ("wrong-operand", "missing-factor"),
        average_pool(1), average_pool(0), mistake="k² at the border"),
    mutant("pooling/uniform bins in adaptive pooling", ("wrong-operand",), adaptive_pool(7),
        adaptive_pool(6), mistake="uniform bins", classic=True),
    mutant("pooling/global average divided by one side only", ("scale",), GLOBAL_POOL,
        GLOBAL_POOL._replace(data=normal((2, 3, 7, 1))), x=lambda at: at.grad_x * at.x.shape[3]),
)
# fmt: on

# --- Normalisation: z = γ x̂ + β, x̂ = (x − μ) / σ ----------------------------------------------

EPS = 0.05


def standardised_backward(
    grad_x_hat: Tensor, x: Tensor, axes: tuple[int, ...], mistake: str = ""
) -> tuple[Tensor, Tensor]:
    """grad_x = (grad_x̂ − mean(grad_x̂) − x̂ mean(grad_x̂ x̂)) / σ over `axes`; and x̂."""
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    count = x.numel() / variance.numel()
    if mistake == "unbiased variance":
        variance = variance * count / (count - 1)
    x_hat = centred * (variance + EPS).rsqrt()
    inverse = (variance + (0 if mistake == "no ε" else EPS)).rsqrt()
    if mistake == "unbiased factor":
        inverse = (variance * count / (count - 1) + EPS).rsqrt()
    elif mistake == "no 1/σ":
        inverse = torch.ones_like(inverse)
    over = (0,) if mistake == "over the batch" else axes
    mean = grad_x_hat.mean(over, keepdim=True)
    along = x_hat * (grad_x_hat * x_hat).mean(over, keepdim=True)
    if mistake in ("no mean term", "eval formula"):
        mean = torch.zeros_like(mean)
    if mistake in ("no variance term", "eval formula"):
        along = torch.zeros_like(along)
    return inverse * (grad_x_hat - mean - along), x_hat


def batch_norm(n: int = 5, t: int = 7, gamma_is_one: bool = False, spread: float = 1.0) -> Case:
    def batch_normalisation(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)

    def backward(
        grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
    ) -> tuple[Tensor, ...]:
        grad_x_hat = grad_z if mistake == "no γ" else grad_z * gamma[:, None]
        grad_x, x_hat = standardised_backward(grad_x_hat, x, (0, 2), mistake)
        if mistake == "grad_γ from x":
            x_hat = x
        return grad_x, (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    def data() -> tuple[Tensor, ...]:
        x, gamma, beta = numbers((n, 3, t), (3,), (3,))
        x = spread * x * torch.tensor([0.5, 1, 2], dtype=x.dtype)[:, None] + 1
        return x, torch.ones_like(gamma) if gamma_is_one else gamma, beta

    return Case(batch_normalisation, backward, data)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * gamma + beta


def layer_norm_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
    grad_x, x_hat = standardised_backward(grad_z * gamma, x, (1,), mistake)
    return grad_x, (grad_z * x_hat).sum(0), grad_z.sum(0)


LAYER_NORM = Case(layer_norm, layer_norm_backward, normal((5, 7), (7,), (7,)))


def group_norm(groups: int) -> Case:
    def group_normalisation(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.group_norm(x, groups, gamma, beta, eps=EPS)

    def backward(
        grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
    ) -> tuple[Tensor, ...]:
        def split(u: Tensor) -> Tensor:
            """(N, groups, values)"""
            if mistake == "groups interleaved":
                return u.unflatten(1, (-1, groups)).transpose(1, 2).flatten(2)
            return u.unflatten(1, (groups, -1)).flatten(2)

        def join(u: Tensor) -> Tensor:
            if mistake == "groups interleaved":
                return u.unflatten(2, (-1, x.shape[2])).transpose(1, 2).reshape(x.shape)
            return u.reshape(x.shape)

        grad_x, _ = standardised_backward(split(grad_z * gamma[:, None]), split(x), (2,))
        x_hat = (z - beta[:, None]) / gamma[:, None]
        return join(grad_x), (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    return Case(group_normalisation, backward, normal((5, 6, 7), (6,), (6,)))


class DetachedStatistics(nn.Module):
    """Batch normalisation that treats the batch's own mean and deviation as constants."""

    def __init__(self) -> None:
        super().__init__()
        gamma, beta = numbers((3,), (3,), seed=1)
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(beta)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.detach().mean(0), x.detach().var(0, unbiased=False)
        return (x - mean) / torch.sqrt(variance + EPS) * self.gamma + self.beta


BATCH_NORM = batch_norm()

# fmt: off
NORMALIZATION = (
    mutant("normalization/eval's formula in training", ("missing-term",), BATCH_NORM,
        mistake="eval formula", classic=True),
    mutant("normalization/mean term missing", ("missing-term",), BATCH_NORM,
        mistake="no mean term"),
    mutant("normalization/variance term missing", ("missing-term",), BATCH_NORM,
        mistake="no variance term"),
    mutant("normalization/γ missing", ("per-channel-scale", "missing-factor"), BATCH_NORM,
        batch_norm(gamma_is_one=True), mistake="no γ"),
    mutant("normalization/1/σ missing", ("per-channel-scale", "missing-factor"), BATCH_NORM,
        mistake="no 1/σ", classic=True),
    mutant("normalization/unbiased variance throughout", ("wrong-operand",), BATCH_NORM,
        mistake="unbiased variance"),
    mutant("normalization/unbiased variance in the factor 1/σ", ("scale", "wrong-operand"),
        LAYER_NORM, mistake="unbiased factor"),
    mutant("normalization/ε omitted", ("per-channel-scale", "wrong-operand"), BATCH_NORM,
        batch_norm(spread=1e7), mistake="no ε"),
    mutant("normalization/grad_γ from x", ("wrong-operand",), BATCH_NORM, mistake="grad_γ from x"),
    mutant("normalization/grad_β averaged", ("scale", "wrong-reduction"), BATCH_NORM, classic=True,
        beta=lambda at: at.grad_z.mean((0, 2))),
    mutant("normalization/layer norm reduced over the batch", ("wrong-reduction",), LAYER_NORM,
        mistake="over the batch"),
    mutant("normalization/groups along the wrong axis", ("permuted", "wrong-reduction"),
        group_norm(2), group_norm(1), mistake="groups interleaved"),
    written_out("normalization/statistics detached", ("missing-term",), DetachedStatistics,
        normal((5, 3))),
    mutant("normalization/grad_γ of layer norm over the features", ("wrong-reduction",),
        LAYER_NORM._replace(data=normal((7, 7), (7,), (7,))),
        gamma=lambda at: (at.grad_z * (at.z - at.beta) / at.gamma).sum(1)),
)
# fmt: on

# --- Dropout: z = mask x / (1 − p) --------------------------------------------------------------


def dropout(p: float) -> Case:
    def drop_out(x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= p) / (1 - p)

    def backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
        mask = torch.rand_like(x) >= p if mistake == "new mask" else z != 0
        if mistake == "no mask":
            mask = torch.ones_like(mask)
        keep = 1.0 if mistake == "not scaled" else 1 - p
        return (grad_z * mask / keep,)

    return Case(drop_out, backward, normal((5, 7)))


class DropsInEval(nn.Module):
    """Dropout whose backward does not ask whether it is training."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, p: float, training: bool) -> Tensor:
            ctx.mask, ctx.p = torch.rand_like(x) >= p, p
            return x * ctx.mask / (1 - p) if training else x.clone()

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            return grad_z[0] * ctx.mask / (1 - ctx.p), None, None

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, 0.4, self.training))


# fmt: off
DROPOUT = (
    mutant("dropout/new mask in the backward", ("nondeterministic", "wrong-operand"), dropout(0.4),
        dropout(0.0), mistake="new mask"),
    mutant("dropout/1/(1 - p) missing", ("scale",), dropout(0.4), dropout(0.0),
        mistake="not scaled", classic=True),
    mutant("dropout/mask missing in the backward", ("missing-factor",), dropout(0.4), dropout(0.0),
        mistake="no mask"),
    written_out("dropout/applied in eval", ("missing-factor", "nondeterministic"),
        lambda: DropsInEval().eval(), normal((5, 7))),
)
# fmt: on

# --- Recurrent: h_t = tanh(x_t weight_xᵀ + h_{t−1} weight_hᵀ + bias), x (N, T, C), h (N, T, H) --


def rnn(
    t: int = 5, lengths: list[int] | None = None, reverse: bool = False, symmetric: bool = False
) -> Case:
    """A plain recurrent layer; a sample that has ended (`lengths`) keeps its last state."""
    running = torch.tensor([[[i < end] for i in range(t)] for end in lengths or [t, t, t]])

    def recurrent(
        x: Tensor, h0: Tensor, weight_x: Tensor, weight_h: Tensor, bias: Tensor
    ) -> Tensor:
        h_t, states = h0, []
        for i in range(x.shape[1]):
            x_t = x[:, -1 - i if reverse else i]
            new = torch.tanh(x_t @ weight_x.T + h_t @ weight_h.T + bias)
            h_t = torch.where(running[:, i], new, h_t)
            states.append(h_t)
        return torch.stack(states[::-1] if reverse else states, 1)

    def backward(
        grad_h: Tensor,
        h: Tensor,
        x: Tensor,
        h0: Tensor,
        weight_x: Tensor,
        weight_h: Tensor,
        bias: Tensor,
        mistake: str = "",
    ) -> tuple[Any, ...]:
        if reverse:  # from here on in the order of the steps taken
            grad_h, h, x = grad_h.flip(1), h.flip(1), x.flip(1)
        grad_x: list[Tensor] = []
        carry = torch.zeros_like(h0)
        grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
        grad_bias = torch.zeros_like(bias)
        for i in reversed(range(x.shape[1])):
            upstream = grad_h[:, i]
            if mistake == "last step only" and i < x.shape[1] - 1:
                upstream = torch.zeros_like(upstream)
            grad_h_t = upstream + carry
            runs = torch.ones_like(running[:, i]) if mistake == "no mask" else running[:, i]
            grad_a = grad_h_t * runs * (1 - h[:, i] ** 2)
            before = h[:, i - 1] if i else h0
            if mistake == "h_t":
                before = h[:, i]
            elif mistake == "overwritten":
                grad_weight_h = torch.zeros_like(weight_h)
            grad_weight_x = grad_weight_x + grad_a.T @ x[:, i]
            grad_weight_h = grad_weight_h + grad_a.T @ before
            grad_bias = grad_bias + grad_a.sum(0)
            grad_x.insert(0, grad_a @ weight_x)
            carry = grad_a @ (weight_h.T if mistake == "transposed" else weight_h)
            carry = carry + grad_h_t * ~runs
            if mistake == "no carry" and i:
                carry = torch.zeros_like(carry)
        flipped = reverse and mistake != "grad_x not reversed"
        stacked = torch.stack(grad_x[::-1] if flipped else grad_x, 1)
        return stacked, carry, grad_weight_x, grad_weight_h, grad_bias

    def data() -> tuple[Tensor, ...]:
        x, h0, weight_x, weight_h, bias = numbers((3, t, 2), (3, 7), (7, 2), (7, 7), (7,))
        weight_h = weight_h / 2
        return x, h0, weight_x, weight_h + weight_h.T if symmetric else weight_h, bias

    return Case(recurrent, backward, data)


def lstm(t: int = 5) -> Case:
    """Gates i, f, g, o; c_t = f c_{t−1} + i g; h_t = o tanh c_t; returns every h and c_T."""

    def gates_of(x_t: Tensor, h_t: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weight_x, weight_h, bias = weights
        i, f, g, o = (x_t @ weight_x.T + h_t @ weight_h.T + bias).chunk(4, 1)
        return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

    def long_short_term_memory(
        x: Tensor, h0: Tensor, c0: Tensor, weight_x: Tensor, weight_h: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        h_t, c_t, states = h0, c0, []
        for x_t in x.unbind(1):
            i, f, g, o = gates_of(x_t, h_t, weight_x, weight_h, bias)
            c_t = f * c_t + i * g
            h_t = o * torch.tanh(c_t)
            states.append(h_t)
        return torch.stack(states, 1), c_t

    def backward(
        grad_z: tuple[Tensor, Tensor],
        z: tuple[Tensor, Tensor],
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_x: Tensor,
        weight_h: Tensor,
        bias: Tensor,
        mistake: str = "",
    ) -> tuple[Any, ...]:
        h_before = torch.cat([h0[:, None], z[0][:, :-1]], 1)
        gates, c = [], [c0]
        for x_t, h_t in zip(x.unbind(1), h_before.unbind(1), strict=True):
            gates.append(gates_of(x_t, h_t, weight_x, weight_h, bias))
            c.append(gates[-1][1] * c[-1] + gates[-1][0] * gates[-1][2])
        grad_x: list[Tensor] = []
        carry_h, carry_c = torch.zeros_like(h0), grad_z[1]
        if mistake == "last state ignored":
            carry_c = torch.zeros_like(c0)
        grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
        grad_bias = torch.zeros_like(bias)
        for step in reversed(range(x.shape[1])):
            i, f, g, o = gates[step]
            tanh_c = torch.tanh(c[step + 1])
            grad_h_t = grad_z[0][:, step] + carry_h
            through = 1.0 if mistake == "no o (1 - tanh²)" else o * (1 - tanh_c**2)
            grad_c = carry_c + grad_h_t * through
            grad_i = grad_c * g * i * (1 - i)
            grad_f = grad_c * c[step + (mistake == "forget gate with c_t")] * f * (1 - f)
            grad_g = grad_c * i * (1 - g**2)
            grad_o = grad_h_t * tanh_c * o * (1 - o)
            order = [grad_i, grad_f, grad_g, grad_o]
            if mistake == "gates exchanged":
                order = [grad_f, grad_i, grad_g, grad_o]
            grad_a = torch.cat(order, 1)
            if mistake == "bias overwritten":
                grad_bias = torch.zeros_like(bias)
            grad_weight_x = grad_weight_x + grad_a.T @ x[:, step]
            grad_weight_h = grad_weight_h + grad_a.T @ h_before[:, step]
            grad_bias = grad_bias + grad_a.sum(0)
            grad_x.insert(0, grad_a @ weight_x)
            carry_h = grad_a @ weight_h
            carry_c = grad_c if mistake == "carry without f" else grad_c * f
        return (
            torch.stack(grad_x, 1), carry_h, carry_c, grad_weight_x, grad_weight_h, grad_bias
        )  # fmt: skip

    shapes = (3, t, 2), (3, 5), (3, 5), (20, 2), (20, 5), (20,)
    return Case(long_short_term_memory, backward, normal(*shapes))


# fmt: off
RECURRENT = (
    mutant("recurrent/h_t for h_(t-1) in grad_weight_h", ("wrong-operand", "shifted"), rnn(),
        mistake="h_t"),
    mutant("recurrent/grad_weight_h overwritten over time", ("overwritten", "subset"), rnn(),
        rnn(1), mistake="overwritten", classic=True),
    mutant("recurrent/carry dropped", ("missing-term",), rnn(), rnn(1), mistake="no carry"),
    mutant("recurrent/carry through weight_h transposed", ("wrong-operand", "transposed"), rnn(),
        rnn(symmetric=True), mistake="transposed"),
    mutant("recurrent/o (1 - tanh² c) missing in the LSTM", ("missing-factor",), lstm(),
        mistake="no o (1 - tanh²)"),
    mutant("recurrent/gates i and f exchanged in the LSTM", ("permuted",), lstm(),
        mistake="gates exchanged", classic=True),
    mutant("recurrent/forget gate with c_t for c_(t-1)", ("wrong-operand", "shifted"), lstm(),
        mistake="forget gate with c_t"),
    mutant("recurrent/gradient of the last state ignored", ("ignores-upstream", "missing-term"),
        lstm(), mistake="last state ignored"),
    mutant("recurrent/only the last step receives upstream", ("subset", "ignores-upstream"), rnn(),
        rnn(1), mistake="last step only"),
    mutant("recurrent/reverse direction not reversed", ("flipped", "permuted"), rnn(reverse=True),
        rnn(1, reverse=True), mistake="grad_x not reversed", classic=True),
    mutant("recurrent/padded steps contribute", ("extra-term", "missing-factor"), rnn(5, [5, 2, 3]),
        rnn(5, [5, 5, 5]), mistake="no mask"),
    mutant("recurrent/h0's gradient missing", ("detached",), rnn(), h0=lambda at: None),
    mutant("recurrent/cell's carry without the forget gate", ("missing-factor",), lstm(),
        mistake="carry without f"),
    mutant("recurrent/grad_bias overwritten over time in the LSTM", ("overwritten", "subset"),
        lstm(), lstm(1), mistake="bias overwritten"),
    mutant("recurrent/grad_weight_h divided by T", ("scale", "wrong-reduction"), rnn(), rnn(1),
        classic=True, weight_h=lambda at: at.grad_weight_h / at.x.shape[1]),
)
# fmt: on

# --- Embedding and attention --------------------------------------------------------------------


def embedding(index: list[list[int]], padding: int = -1) -> Case:
    """Rows of the weight by index; the vectors at the padding index are zero."""

    def embed(index: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(index, weight) * (index != padding)[..., None]

    def backward(
        grad_z: Tensor, z: Tensor, index: Tensor, weight: Tensor, mistake: str = ""
    ) -> tuple[None, Tensor]:
        rows = grad_z * (index != padding)[..., None]
        if mistake == "padding counted":
            rows = grad_z
        rows, flat = rows.flatten(0, 1), index.flatten()
        grad_weight = torch.zeros_like(weight)
        if mistake == "overwritten":
            for k, row in zip(flat.tolist(), rows, strict=True):
                grad_weight[k] = row
            return None, grad_weight
        if mistake == "off by one":
            flat = (flat + 1) % len(weight)
        return None, grad_weight.index_add(0, flat, rows)

    return Case(embed, backward, lambda: (torch.tensor(index), *numbers((11, 3))))


def attention(t: int = 5, d: int = 7, causal: bool = False) -> Case:
    """softmax(query keyᵀ / √d) value, (N, T, d)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def backward(
        grad_z: Tensor, z: Tensor, query: Tensor, key: Tensor, value: Tensor, mistake: str = ""
    ) -> tuple[Tensor, ...]:
        root = d**0.5
        scores = query @ key.mT / root
        if causal and mistake != "no causal mask":
            later = torch.ones(t, t, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        p = scores.softmax(-1)
        grad_p = grad_z @ value.mT
        mean = 0.0 if mistake == "diagonal" else (grad_p * p).sum(-1, keepdim=True)
        grad_scores = p * (grad_p - mean)
        return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z

    return Case(attend, backward, normal((2, t, d), (2, t, d), (2, t, d)))


def shared_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every head of the query (N, heads, T, d) reads the same key and value (N, 1, T, d)."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def shared_keys_backward(
    grad_z: Tensor, z: Tensor, query: Tensor, key: Tensor, value: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
    root = query.shape[-1] ** 0.5
    p = (query @ key.mT / root).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / root
    grad_key, grad_value = grad_scores.mT @ query, p.mT @ grad_z
    if mistake == "not summed":
        return grad_scores @ key, grad_key, grad_value
    if mistake == "first head":
        return grad_scores @ key, grad_key[:, :1], grad_value[:, :1]
    return grad_scores @ key, grad_key.sum(1, keepdim=True), grad_value.sum(1, keepdim=True)


def shared(heads: int) -> Case:
    shapes = (2, heads, 5, 7), (2, 1, 5, 7), (2, 1, 5, 7)
    return Case(shared_keys, shared_keys_backward, normal(*shapes))


REPEATED = [[3, 7, 3], [1, 3, 8]]
DISTINCT = [[3, 7, 0], [1, 4, 8]]

# fmt: off
EMBEDDING = (
    mutant("embedding/repeated indices overwritten", ("overwritten",), embedding(REPEATED),
        embedding(DISTINCT), mistake="overwritten"),
    mutant("embedding/padding index not zeroed", ("extra-term", "missing-factor"),
        embedding(REPEATED, padding=3), embedding(REPEATED), mistake="padding counted",
        classic=True),
    mutant("embedding/index off by one", ("shifted",), embedding(REPEATED), mistake="off by one"),
)
# fmt: on

# fmt: off
ATTENTION = (
    mutant("attention/1/√d missing", ("scale",), attention(), attention(d=1),
        query=lambda at: at.grad_query * at.query.shape[-1] ** 0.5,
        key=lambda at: at.grad_key * at.query.shape[-1] ** 0.5),
    mutant("attention/1/√d twice", ("scale",), attention(), attention(d=1), classic=True,
        query=lambda at: at.grad_query / at.query.shape[-1] ** 0.5),
    mutant("attention/grad_query and grad_key exchanged", ("permuted", "wrong-operand"),
        attention(), query=lambda at: at.grad_key, key=lambda at: at.grad_query),
    mutant("attention/causal mask missing in the backward", ("missing-factor", "wrong-operand"),
        attention(causal=True), attention(t=1, causal=True), mistake="no causal mask"),
    mutant("attention/heads not summed for shared keys", ("wrong-reduction",), shared(3), shared(1),
        mistake="not summed"),
    mutant("attention/first head only for shared keys", ("subset", "overwritten"), shared(3),
        shared(1), mistake="first head", classic=True),
    mutant("attention/softmax with its diagonal only", ("missing-term",), attention(),
        mistake="diagonal"),
)
# fmt: on

# --- Graph and protocol


def tied(x: Tensor, weight: Tensor) -> Tensor:
    """An autoencoder that uses one weight twice."""
    return torch.tanh(x @ weight.T) @ weight


def tied_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    h = torch.tanh(x @ weight.T)
    grad_a = grad_z @ weight.T * (1 - h**2)
    grad_weight = h.T @ grad_z
    if mistake != "one use":
        grad_weight = grad_weight + grad_a.T @ x
    return grad_a @ weight, grad_weight


class TiedInTheGraph(nn.Module):
    """The same as a module that cuts the weight's first use out of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 3), seed=1)[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.detach().T) @ self.weight


def residual(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.tanh(x @ weight.T)


def residual_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    grad_a = grad_z * (1 - (z - x) ** 2)
    return grad_z + grad_a @ weight, grad_a.T @ x


def fan_out(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(x), x**2


def fan_out_backward(
    grad_z: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], x: Tensor
) -> tuple[Tensor]:
    return (grad_z[0] * torch.cos(x) + grad_z[1] * 2 * x,)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


def softplus_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_z * torch.where(x > 20, 1.0, torch.sigmoid(x)),)


def reciprocal(x: Tensor) -> Tensor:
    return 1 / x


def reciprocal_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (-grad_z * z * z,)


def cube(x: Tensor) -> Tensor:
    return x**3


def cube_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_z * 3 * x**2,)


def by_length(x: Tensor, lengths: Tensor) -> Tensor:
    """Works through the samples from the longest down and hands them back in their own order."""
    order = lengths.argsort(descending=True, stable=True)
    return torch.tanh(x[order])[order.argsort()]


def by_length_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, lengths: Tensor
) -> tuple[Tensor, None]:
    return grad_z * (1 - z**2), None


def sorted_by_length(lengths: list[int]) -> Case:
    data = lambda: (*numbers((len(lengths), 3)), torch.tensor(lengths))  # noqa: E731
    return Case(by_length, by_length_backward, data)


def as_if_contiguous(grad: Tensor, offset: int) -> Tensor:
    """What a kernel reads that is given grad's memory and believes that it is packed."""
    stored = torch.empty(0, dtype=grad.dtype).set_(grad.detach().untyped_storage())
    read = stored[offset : offset + grad.numel()]
    return F.pad(read, (0, grad.numel() - len(read))).view(grad.shape)


def masked_in_place(at: Any) -> Tensor:
    return cast(Tensor, at.grad_z.mul_(at.x > 0))


def buffer_reused(at: Any) -> Tensor:
    """The saved input's memory taken for the result's intermediate."""
    mask = at.x > 0
    at.x.data.mul_(0.5)
    return cast(Tensor, at.grad_z * mask)


def in_float32(name: str, wrong: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Wrong for float32 only."""
    return lambda at: wrong(at) if at.x.dtype == torch.float32 else getattr(at, f"grad_{name}")


class Remembers(nn.Module):
    """A linear layer whose backward reads the x that its module remembers, perhaps another's."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, owner: "Remembers") -> Tensor:
            ctx.save_for_backward(weight)
            ctx.owner = owner
            if owner.x is None or not owner.first_only:
                owner.x = x.detach().clone()
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            (weight,) = ctx.saved_tensors
            return grad_z[0] @ weight, grad_z[0].T @ ctx.owner.x, None

    def __init__(self, first_only: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 3), seed=1)[0])
        self.x: Tensor | None = None
        self.first_only = first_only

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self.weight, self))


class NeverCleared(nn.Module):
    """A linear layer that adds up grad_weight itself, from backward to backward."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.total = total
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            ctx.total += (grad_z[0].T @ x).detach()
            return grad_z[0] @ weight, ctx.total.clone(), None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 3), seed=1)[0])
        self.total = torch.zeros_like(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self.weight, self.total))


class NotPassedIn(nn.Module):
    """A linear layer whose Function reads the weight from its module."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, owner: "NotPassedIn") -> Tensor:
            ctx.owner = owner
            return x @ owner.weight.T

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            return grad_z[0] @ ctx.owner.weight, None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 3), seed=1)[0])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self))


class Detached(nn.Module):
    """Two outputs, of which `cut` are cut out of the graph."""

    def __init__(self, cut: tuple[bool, bool]) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 3), seed=1)[0])
        self.cut = cut

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(x @ self.weight.T)
        outputs = h, h.square().sum(1)
        return tuple(z.detach() if cut else z for z, cut in zip(outputs, self.cut, strict=True))


class MasksForXOnly(Function):
    """relu(x weightᵀ): the mask is applied inside the branch that computes grad_x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        a = F.relu(x @ weight.T)
        ctx.save_for_backward(x, weight, a)
        return a

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        x, weight, a = ctx.saved_tensors
        grad_a, grad_x = grad_z[0], None
        if ctx.needs_input_grad[0]:
            grad_a = grad_a * (a > 0)
            grad_x = grad_a @ weight
        return grad_x, grad_a.T @ x


class BiasWithTheWeightOnly(Function):
    """A linear layer that forgets the bias where the weight is frozen."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        x, weight, _ = ctx.saved_tensors
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight, grad_bias = grad_z[0].T @ x, grad_z[0].sum(0)
        return grad_z[0] @ weight, grad_weight, grad_bias


class KeepsItsSlope(Function):
    """x³ with 3 x² worked out in the forward, where no graph records it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> Tensor:
        return grad_z[0] * ctx.slope


LINEAR_CASE = linear(5, 3, 7)
TIED = Case(tied, tied_backward, normal((5, 3), (7, 3)))
RESIDUAL = Case(residual, residual_backward, normal((5, 3), (3, 3)))
SOFTPLUS = Case(softplus, softplus_backward, lambda: (25 * numbers((5, 7))[0],))
RECIPROCAL = Case(reciprocal, reciprocal_backward, normal((5, 7), dtype=torch.float32))
CUBE = Case(cube, cube_backward, normal((5, 7)))

# fmt: off
PROTOCOL = (
    mutant("protocol/only the last use of a shared weight counts", ("overwritten", "missing-term"),
        TIED, mistake="one use"),
    written_out("protocol/first use of a shared weight cut off", ("overwritten", "missing-term"),
        TiedInTheGraph, normal((5, 3))),
    mutant("protocol/residual branch dropped", ("missing-term",), RESIDUAL,
        x=lambda at: at.grad_x - at.grad_z),
    mutant("protocol/residual branch doubled", ("extra-term",), RESIDUAL, classic=True,
        x=lambda at: at.grad_x + at.grad_z),
    mutant("protocol/fan-out overwritten", ("overwritten", "missing-term"),
        Case(fan_out, fan_out_backward, normal((5, 3))), x=lambda at: at.grad_z[1] * 2 * at.x),
    written_out("protocol/activation kept on self and overwritten by the next call",
        ("stale-state",), lambda: Remembers(first_only=False), normal((5, 3))),
    written_out("protocol/activation of the first call kept for ever", ("stale-state",),
        lambda: Remembers(first_only=True), normal((5, 3))),
    written_out("protocol/gradient not cleared", ("stale-state", "extra-term"), NeverCleared,
        normal((5, 3))),
    mutant("protocol/upstream gradient overwritten in place", ("mutates-input",), RELU,
        elementwise(F.relu, lambda x, a: torch.ones_like(x), torch.exp), classic=True,
        x=masked_in_place),
    mutant("protocol/saved input overwritten", ("mutates-input",), RELU, x=buffer_reused),
    mutant("protocol/strides of the upstream gradient ignored", ("assumes-contiguous",),
        LINEAR_CASE, linear(1, 3, 1),
        weight=lambda at: as_if_contiguous(at.grad_z, at.grad_z.storage_offset()).T @ at.x),
    mutant("protocol/storage offset of the upstream gradient ignored", ("assumes-contiguous",),
        RELU, classic=True, x=lambda at: as_if_contiguous(at.grad_z.contiguous(), 0) * (at.x > 0)),
    written_out("protocol/outputs detached", ("detached",), lambda: Detached((True, True)),
        normal((5, 3))),
    written_out("protocol/second output detached", ("detached",), lambda: Detached((False, True)),
        normal((5, 3))),
    mutant("protocol/None for a needed input", ("detached",), LINEAR_CASE, weight=lambda at: None),
    written_out("protocol/parameter not passed in to the Function", ("detached",), NotPassedIn,
        normal((5, 3))),
    written_out("protocol/wrong only when x needs no gradient", ("needs-input-grad",),
        lambda: MasksForXOnly, normal((5, 3), (7, 3))),
    written_out("protocol/grad_bias forgotten where the weight is frozen", ("needs-input-grad",),
        lambda: BiasWithTheWeightOnly, normal((5, 3), (7, 3), (7,))),
    mutant("protocol/accumulated in half precision", ("wrong-precision",), LINEAR_CASE,
        weight=lambda at: (at.grad_z.half().T @ at.x.half()).to(at.x.dtype)),
    mutant("protocol/float32 accumulated in bfloat16", ("wrong-precision",),
        LINEAR_CASE._replace(data=normal((5, 3), (7, 3), (7,), dtype=torch.float32)), LINEAR_CASE,
        classic=True,
        weight=in_float32("weight", lambda at: (at.grad_z.bfloat16().T @ at.x.bfloat16()).float())),
    mutant("protocol/float32 takes a quick reciprocal", ("wrong-precision",), RECIPROCAL,
        RECIPROCAL._replace(data=normal((5, 7))),
        x=in_float32("x", lambda at: -at.grad_z * at.z.bfloat16().float() ** 2)),
    mutant("protocol/branch that only large inputs take", ("wrong-branch",), SOFTPLUS,
        SOFTPLUS._replace(data=normal((5, 7))),
        x=lambda at: at.grad_z * torch.where(at.x > 20, at.x, torch.sigmoid(at.x))),
    mutant("protocol/grad_bias not un-broadcast", ("wrong-reduction",), LINEAR_CASE,
        bias=lambda at: at.grad_z.clone()),
    mutant("protocol/second derivative detached", ("detached",), CUBE, second_order=True,
        x=lambda at: at.grad_z * 3 * at.x.detach() ** 2),
    written_out("protocol/second derivative lost with what the forward kept", ("detached",),
        lambda: KeepsItsSlope, normal((5, 7)), second_order=True),
    mutant("protocol/tail of a batch dropped", ("subset",), linear(7, 3, 5), linear(8, 3, 5),
        weight=lambda at: at.grad_z[: len(at.x) // 4 * 4].T @ at.x[: len(at.x) // 4 * 4]),
    mutant("protocol/upstream gradient clipped on the way", ("nonlinear-in-upstream",), LINEAR_CASE,
        classic=True, x=lambda at: at.grad_z.clamp(-0.5, 0.5) @ at.weight),
    mutant("protocol/noise in the gradient", ("nondeterministic",), LINEAR_CASE,
        x=lambda at: at.grad_x * (1 + 0.01 * torch.randn_like(at.grad_x))),
    mutant("protocol/samples left in sorted order", ("permuted",),
        sorted_by_length([2, 7, 3, 5, 1]), sorted_by_length([7, 5, 3, 2, 1]),
        x=lambda at: at.grad_x[at.lengths.argsort(descending=True, stable=True)]),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *LINEAR,
    *BIAS,
    *ACTIVATION,
    *LOSS,
    *CONVOLUTION,
    *POOLING,
    *NORMALIZATION,
    *DROPOUT,
    *RECURRENT,
    *EMBEDDING,
    *ATTENTION,
    *PROTOCOL,
)

# --- Equivalents: right, though not what autograd does to the letter ----------------------------


def equivalent(name: str, case: Case, mistake: str = "", **other: Any) -> Mutant:
    """`mistake` is a switch of the backward, here between right ones."""
    return mutant(name, (), case, mistake=mistake, **other)


def at_zero(forward: Elementwise, sides: Elementwise, value: float) -> Case:
    """A slope that is `value` where x = 0, on data with many zeros."""
    return elementwise(
        forward,
        lambda x, a: torch.where(x == 0, value, sides(x)),
        torch.round,
    )


def at_the_bound(value: float) -> Case:
    return elementwise(
        lambda x: x.clamp(-1, 1),
        lambda x, a: torch.where(x.abs() == 1, value, (x.abs() < 1).to(x.dtype)),
        torch.round,
    )


def step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def samples_in_reverse(at: Any) -> Tensor:
    total = torch.zeros_like(at.weight)
    for n in reversed(range(len(at.x))):
        total = total + torch.outer(at.grad_z[n], at.x[n])
    return total


def softmax_by_jacobian(at: Any) -> Tensor:
    """grad_a (diag(a) − a aᵀ), the matrix written out."""
    jacobian = torch.diag_embed(at.z) - at.z[:, :, None] * at.z[:, None, :]
    return torch.einsum("nk,nkj->nj", at.grad_z, jacobian)


def batch_norm_in_sums(at: Any) -> Tensor:
    """γ/(Mσ) (M grad_z − grad_β − x̂ grad_γ) with M values a channel."""
    count = at.x.shape[0] * at.x.shape[2]
    inverse = 1 / torch.sqrt(at.x.var((0, 2), unbiased=False, keepdim=True) + EPS)
    x_hat = (at.x - at.x.mean((0, 2), keepdim=True)) * inverse
    sums = at.grad_beta[:, None] + x_hat * at.grad_gamma[:, None]
    return cast(Tensor, at.gamma[:, None] * inverse / count * (count * at.grad_z - sums))


TIES = partial(max_pool, 2, 2, change=with_ties, size=6)

# fmt: off
EQUIVALENTS: tuple[Mutant, ...] = (
    equivalent("activation/ReLU'(0) = 0", at_zero(F.relu, step, 0.0)),
    equivalent("activation/ReLU'(0) = ½", at_zero(F.relu, step, 0.5)),
    equivalent("activation/ReLU'(0) = 1", at_zero(F.relu, step, 1.0)),
    equivalent("activation/|x|' = 0 at 0", at_zero(torch.abs, torch.sign, 0.0)),
    equivalent("activation/|x|' = 1 at 0", at_zero(torch.abs, torch.sign, 1.0)),
    equivalent("activation/|x|' = -1 at 0", at_zero(torch.abs, torch.sign, -1.0)),
    equivalent("activation/clip's slope 0 at its bounds", at_the_bound(0.0)),
    equivalent("activation/clip's slope 1 at its bounds", at_the_bound(1.0)),
    equivalent("activation/tanh form of GELU, declared",
        elementwise(lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_slope)),
    equivalent("activation/sigmoid's derivative from the input", SIGMOID,
        x=lambda at: at.grad_z / (2 + at.x.exp() + (-at.x).exp())),
    equivalent("pooling/ties to the first", TIES()),
    equivalent("pooling/ties to the last", TIES(), mistake="last tie"),
    equivalent("pooling/ties share evenly", TIES(), mistake="ties share"),
    equivalent("pooling/gradient handed back expanded", GLOBAL_POOL),
    equivalent("linear/samples summed in reverse", linear(5, 3, 7), weight=samples_in_reverse),
    equivalent("linear/samples summed in chunks", linear(5, 3, 7),
        weight=lambda at: at.grad_z[:2].T @ at.x[:2] + at.grad_z[2:].T @ at.x[2:]),
    equivalent("linear/einsum for the matrix product", linear(5, 3, 7),
        x=lambda at: torch.einsum("no,oi->ni", at.grad_z, at.weight),
        weight=lambda at: torch.einsum("no,ni->oi", at.grad_z, at.x)),
    equivalent("convolution/by unfolding and folding", conv_by_patches(1)),
    equivalent("convolution/by the mirrored kernel",
        conv((2, 6, 11, 8), (4, 3, 3, 2), stride=2, padding=1, dilation=2, groups=2)),
    equivalent("loss/softmax without its Jacobian", SOFTMAX),
    equivalent("loss/softmax by its Jacobian", SOFTMAX, x=softmax_by_jacobian),
    equivalent("normalization/batch norm in means", BATCH_NORM),
    equivalent("normalization/batch norm in sums", BATCH_NORM, x=batch_norm_in_sums),
    equivalent("dropout/mask read off the output", dropout(0.4)),
    equivalent("recurrent/LSTM worked out again from h", lstm()),
)
# fmt: on


def fit() -> tuple[Mutant, ...]:
    """The half that hypotheses may be fitted to: the even places in each family."""
    return _half(0)


def held_out() -> tuple[Mutant, ...]:
    """The half that the first score counted on: the odd places in each family."""
    return _half(1)


def _half(parity: int) -> tuple[Mutant, ...]:
    families = dict.fromkeys(m.family for m in MUTANTS)
    in_order = {family: [m for m in MUTANTS if m.family == family] for family in families}
    return tuple(m for members in in_order.values() for m in members[parity::2])
