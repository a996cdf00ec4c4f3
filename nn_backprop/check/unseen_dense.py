"""Mistakes in dense layers, activations, losses, look-ups and protocol, for scoring names.

As in the catalogue, a mutant is a right layer with exactly one mistake in its backward, and its
kinds were decided from the mistake and the wording of `KINDS`, before any diagnosis of it was seen.
The layers are others than the catalogue's. A forward is plain torch code; the data are float64, but
for the mistake of float32.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop.check.catalogue import (
    Case,
    Mutant,
    elementwise,
    mutant,
    normal,
    numbers,
    written_out,
)

# --- Linear, bilinear and einsum ----------------------------------------------------------------


def bilinear_forward(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ni,oij,nj->no", left, weight, right)


def bilinear_backward(
    grad_z: Tensor, z: Tensor, left: Tensor, right: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    return (
        torch.einsum("no,oij,nj->ni", grad_z, weight, right),
        torch.einsum("no,oij,ni->nj", grad_z, weight, left),
        torch.einsum("no,ni,nj->oij", grad_z, left, right),
    )


def quadratic_form(x: Tensor, matrix: Tensor) -> Tensor:
    """z_n = x_nᵀ A x_n."""
    return ((x @ matrix) * x).sum(1)


def quadratic_form_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_z[:, None] * (x @ (matrix + matrix.T)), (grad_z[:, None] * x).T @ x


def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """One weight (O, I) for each of the G blocks of x (N, G, I)."""
    return torch.einsum("ngi,goi->ngo", x, weight)


def block_linear_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    by_block = grad_z.transpose(0, 1)  # gno
    return (by_block @ weight).transpose(0, 1), by_block.mT @ x.transpose(0, 1)


def low_rank_bilinear(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The product, element by element, of two projections."""
    return (x @ u.T) * (y @ v.T)


def low_rank_bilinear_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, y: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    grad_a, grad_b = grad_z * (y @ v.T), grad_z * (x @ u.T)
    return grad_a @ u, grad_b @ v, grad_a.T @ x, grad_b.T @ y


class LowRankAdapter(nn.Module):
    """A frozen linear layer plus α/r times a trained one of rank r."""

    class Step(Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
        ) -> Tensor:
            h = x @ down.T
            ctx.save_for_backward(x, weight, down, up, h)
            ctx.scale = scale
            return x @ weight.T + scale * (h @ up.T)

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            x, weight, down, up, h = ctx.saved_tensors
            (grad,) = grad_z
            grad_h = ctx.scale * (grad @ up)
            grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
            grad_up = grad.T @ h  # without α/r
            return grad @ weight + grad_h @ down, grad_weight, grad_h.T @ x, grad_up, None

    def __init__(self, rank: int = 2, alpha: float = 5.0) -> None:
        super().__init__()
        weight, down, up = numbers((7, 5), (rank, 5), (7, rank), seed=3)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self.weight, self.down, self.up, self.scale))


class PrunedLinear(Function):
    """A linear layer with some of its connections cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, connected: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, connected)
        return x @ (weight * connected).T

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        x, weight, connected = ctx.saved_tensors
        grad_weight = grad_z[0].T @ x  # of the cut ones too
        return grad_z[0] @ (weight * connected), grad_weight, None


def pruned_data() -> tuple[Tensor, ...]:
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
        BLOCK_LINEAR, BLOCK_LINEAR._replace(data=normal((5, 1, 7), (1, 2, 7))), classic=True,
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


def layer_scale(x: Tensor, gain: Tensor) -> Tensor:
    return x * gain


def layer_scale_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_z * gain, (grad_z * x).sum((0, 1))


def differences(a: Tensor, b: Tensor) -> Tensor:
    """Of every row of a and every row of b."""
    return a[:, None] - b[None]


def differences_backward(grad_z: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return grad_z.sum(1), -grad_z.sum(0)


class RelativeBias(Function):
    """Scores (N, T, T) plus a bias that depends on the distance i − j only."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, table: Tensor) -> Tensor:
        steps = torch.arange(scores.shape[-1])
        ctx.distance = steps[:, None] - steps + len(steps) - 1
        return scores + table[ctx.distance]

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        summed = grad_z[0].sum(0)
        grad_table = summed.new_zeros(2 * len(summed) - 1)
        for i, row in enumerate(ctx.distance.tolist()):
            for j, distance in enumerate(row):
                grad_table[distance] = summed[i, j]  # = for +=
        return grad_z[0], grad_table


# fmt: off
BIAS = (
    mutant("bias/gain's gradient averaged over the batch, summed over the tokens",
        ("scale", "wrong-reduction"),
        Case(layer_scale, layer_scale_backward, normal((3, 5, 7), (7,))),
        Case(layer_scale, layer_scale_backward, normal((1, 5, 7), (7,))), classic=True,
        gain=lambda at: (at.grad_z * at.x).mean(0).sum(0)),
    mutant("bias/minus of a broadcast difference forgotten", ("sign",),
        Case(differences, differences_backward, normal((3, 7), (5, 7))),
        b=lambda at: at.grad_z.sum(0)),
    written_out("bias/pairs at one distance overwrite each other", ("overwritten", "subset"),
        lambda: RelativeBias, normal((2, 5, 5), (9,))),
)
# fmt: on

# --- Activation ---------------------------------------------------------------------------------

SHARPNESS = 3.0
THRESHOLD = 0.5
ALPHA = 0.7


def swish(x: Tensor, beta: Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


def swish_backward(grad_a: Tensor, a: Tensor, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(beta * x)
    grad_gate = grad_a * x * gate * (1 - gate)
    return grad_a * gate + grad_gate * beta, (grad_gate * x).sum().view(1)


def swish_data() -> tuple[Tensor, ...]:
    return *numbers((5, 7)), torch.tensor([1.3], dtype=torch.float64)


def swish_beta_without_inner_x(at: Any) -> Tensor:
    """The chain stops at u = βx: ∂u/∂β = x is left out."""
    gate = torch.sigmoid(at.beta * at.x)
    return cast(Tensor, (at.grad_z * at.x * gate * (1 - gate)).sum().view(1))


def hypotenuse(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y)


def hypotenuse_backward(grad_z: Tensor, z: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return grad_z * x / z, grad_z * y / z


def concatenated_relu(x: Tensor) -> Tensor:
    """[relu(x), relu(−x)]."""
    return torch.cat([F.relu(x), F.relu(-x)], 1)


def concatenated_relu_backward(
    grad_a: Tensor, a: Tensor, x: Tensor, mistake: str = ""
) -> tuple[Tensor]:
    above, below = grad_a.chunk(2, 1)
    if mistake == "inner minus":
        below = -below
    return (above * (x > 0) - below * (x < 0),)


class GatedLinearUnit(Function):
    """a σ(b), where x = [a, b]."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * torch.sigmoid(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, -1)
        gate = torch.sigmoid(b)
        grad_a, grad_b = grad_z[0] * gate, grad_z[0] * a * gate * (1 - gate)
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

# --- Losses -------------------------------------------------------------------------------------


def logit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy with logits, averaged over the classes: one loss a sample."""
    y = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)


def logit_loss_backward(
    grad_loss: Tensor, loss: Tensor, logits: Tensor, labels: Tensor
) -> tuple[Tensor, None]:
    slope = (torch.sigmoid(logits) - labels) / logits.shape[1]
    return grad_loss[:, None] * slope, None


def logit_loss_data() -> tuple[Tensor, Tensor]:
    logits, chance = numbers((5, 7), (5, 7))
    return logits, (chance > 0).long()


def divergence(log_q: Tensor, p: Tensor) -> Tensor:
    """KL(p ‖ q), averaged over the samples."""
    return (p * (p.log() - log_q)).sum(1).mean()


def divergence_backward(
    grad_loss: Tensor, loss: Tensor, log_q: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    share = grad_loss / len(p)
    return -share * p, share * (p.log() - log_q + 1)


def divergence_data() -> tuple[Tensor, Tensor]:
    x, y = numbers((3, 5), (3, 5))
    return x.log_softmax(1), y.softmax(1)


TEMPERATURE = 0.3


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Row n of a has to find row n of b."""
    return F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)))


def info_nce_backward(
    grad_loss: Tensor, loss: Tensor, a: Tensor, b: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    p = (a @ b.T / TEMPERATURE).softmax(1)
    grad_scores = grad_loss * (p - torch.eye(len(a), dtype=a.dtype)) / len(a)
    if mistake != "temperature":
        grad_scores = grad_scores / TEMPERATURE
    return grad_scores @ b, grad_scores.T @ a


FOCUS = 2.0


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """−(1 − p)^γ log p of the labelled classes, averaged over the samples."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** FOCUS * log_p).mean()


def focal_backward(
    grad_loss: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, mistake: str = ""
) -> tuple[Tensor, None]:
    p = logits.softmax(1)
    target = F.one_hot(labels, logits.shape[1]).to(p.dtype)
    p_label = (p * target).sum(1)
    grad_log_p = -((1 - p_label) ** FOCUS)
    if mistake != "constant":
        grad_log_p = grad_log_p + FOCUS * (1 - p_label) ** (FOCUS - 1) * p_label * p_label.log()
    return grad_loss / len(p) * grad_log_p[:, None] * (target - p), None


def log_sum_exp(x: Tensor) -> Tensor:
    """Over the channels of x (N, C, T)."""
    return x.logsumexp(1)


def log_sum_exp_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_z[:, None] * x.softmax(1),)


class HuberLoss(Function):
    """Quadratic up to `delta`, linear beyond, averaged over all entries."""

    delta = 0.4

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        residual = prediction - target
        ctx.save_for_backward(residual)
        size, delta = residual.abs(), HuberLoss.delta
        return torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean()

    @staticmethod
    def backward(ctx: Any, *grad_loss: Tensor) -> tuple[Any, ...]:
        (residual,) = ctx.saved_tensors
        far = residual.sign()  # without δ
        slope = torch.where(residual.abs() <= HuberLoss.delta, residual, far)
        grad_prediction = grad_loss[0] * slope / residual.numel()
        return grad_prediction, -grad_prediction


class MulticlassHinge(Function):
    """Σ_{j ≠ y} max(0, 1 + s_j − s_y), averaged over the samples."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        margin = 1 + scores - scores.gather(1, labels[:, None])
        margin = margin.scatter(1, labels[:, None], 0.0).clamp(min=0)
        ctx.save_for_backward(margin, labels)
        return margin.sum() / len(scores)

    @staticmethod
    def backward(ctx: Any, *grad_loss: Tensor) -> tuple[Any, ...]:
        margin, labels = ctx.saved_tensors
        share = grad_loss[0] / len(margin)
        grad_scores = torch.zeros_like(margin)
        for n, y in enumerate(labels.tolist()):
            for j in range(margin.shape[1]):
                if margin[n, j] > 0:
                    grad_scores[n, j] += share
                    grad_scores[n, y] = -share  # = for -=
        return grad_scores, None


class TripletLoss(nn.Module):
    """max(0, ‖a − p‖² − ‖a − n‖² + margin), averaged over the triplets."""

    class Step(Function):
        @staticmethod
        def forward(
            ctx: Any, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float
        ) -> Tensor:
            ctx.save_for_backward(anchor, positive, negative)
            near = (anchor - positive).square().sum(1)
            far = (anchor - negative).square().sum(1)
            violation = near - far + margin
            ctx.active = violation > 0
            return F.relu(violation).mean()

        @staticmethod
        def backward(ctx: Any, *grad_loss: Tensor) -> tuple[Any, ...]:
            anchor, positive, negative = ctx.saved_tensors
            share = 2 * grad_loss[0] / len(anchor)  # of every triplet, active or not
            grad_anchor = share * (negative - positive)
            grad_positive = share * (positive - anchor)
            grad_negative = share * (anchor - negative)
            return grad_anchor, grad_positive, grad_negative, None

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(anchor, positive, negative, 0.5))


# fmt: off
LOSS = (
    mutant("loss/losses of the samples taken for one, upstream gradient averaged",
        ("ignores-upstream", "wrong-reduction"),
        Case(logit_loss, logit_loss_backward, logit_loss_data),
        logits=lambda at: at.grad_z.mean() * (torch.sigmoid(at.logits) - at.labels)
        / at.logits.shape[1]),
    mutant("loss/+1 missing in the target's gradient of the divergence", ("missing-term",),
        Case(divergence, divergence_backward, divergence_data),
        p=lambda at: at.grad_z / len(at.p) * (at.p.log() - at.log_q)),
    written_out("loss/Huber's δ missing on the linear part", ("wrong-branch", "missing-factor"),
        lambda: HuberLoss, normal((5, 7), (5, 7))),
    written_out("loss/hinge's target counts one violated margin", ("overwritten", "missing-factor"),
        lambda: MulticlassHinge, lambda: (*numbers((5, 7)), torch.tensor([2, 0, 6, 3, 3]))),
    written_out("loss/triplets beyond the margin counted", ("missing-factor", "wrong-branch"),
        TripletLoss, normal((7, 5), (7, 5), (7, 5))),
    mutant("loss/temperature missing in the contrastive gradient", ("scale", "missing-factor"),
        Case(info_nce, info_nce_backward, normal((5, 3), (5, 3))), mistake="temperature"),
    mutant("loss/focal weight taken for a constant", ("missing-term",),
        Case(focal, focal_backward, lambda: (*numbers((5, 3)), torch.tensor([2, 0, 1, 1, 0]))),
        mistake="constant", classic=True),
    mutant("loss/log-sum-exp with the softmax over the last axis",
        ("wrong-reduction", "wrong-operand"),
        Case(log_sum_exp, log_sum_exp_backward, normal((2, 3, 7))),
        x=lambda at: at.grad_z[:, None] * at.x.softmax(-1)),
)
# fmt: on

# --- Embedding, gather and scatter, attention ---------------------------------------------------


def embedding_bag(index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """The sum over each bag; bag b starts at offsets[b]."""
    bag = torch.searchsorted(offsets, torch.arange(len(index)), right=True) - 1
    return weight.new_zeros(len(offsets), weight.shape[1]).index_add(0, bag, weight[index])


def embedding_bag_backward(
    grad_z: Tensor, z: Tensor, index: Tensor, offsets: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[None, None, Tensor]:
    inclusive = mistake != "starts in the bag before"
    bag = torch.searchsorted(offsets, torch.arange(len(index)), right=inclusive) - 1
    return None, None, torch.zeros_like(weight).index_add(0, index, grad_z[bag])


def bag_data() -> tuple[Tensor, ...]:
    return torch.tensor([3, 7, 0, 3, 9, 1, 7]), torch.tensor([0, 2, 5]), *numbers((11, 5))


def message_passing(edges: Tensor, x: Tensor) -> Tensor:
    """Every node sums the features of the nodes that point to it."""
    source, target = edges
    return torch.zeros_like(x).index_add(0, target, x[source])


def message_passing_backward(
    grad_z: Tensor, z: Tensor, edges: Tensor, x: Tensor
) -> tuple[None, Tensor]:
    source, target = edges
    return None, torch.zeros_like(x).index_add(0, source, grad_z[target])


def graph_data() -> tuple[Tensor, ...]:
    edges = torch.tensor([[0, 0, 1, 2, 3, 4, 4, 1], [1, 2, 3, 3, 4, 0, 2, 4]])
    return edges, *numbers((5, 3))


REPEATS = 3


def upsample(x: Tensor) -> Tensor:
    return x.repeat_interleave(REPEATS, 1)


def upsample_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_z.view(len(x), -1, REPEATS).sum(2),)


def rotated(x: Tensor) -> Tensor:
    """The pairs of features of x (N, T, D), turned by an angle that grows with the position."""
    position = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    angle = position * 0.4 ** torch.arange(x.shape[2] // 2, dtype=x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class RotaryEmbedding(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rotated(x)

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> Tensor:
        return rotated(grad_z[0])  # onwards, not back


CAP = 1.5


def capped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose scores s are capped: c tanh(s / c)."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (CAP * torch.tanh(scores / CAP)).softmax(-1) @ value


def capped_attention_backward(
    grad_z: Tensor, z: Tensor, query: Tensor, key: Tensor, value: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
    root = query.shape[-1] ** 0.5
    share = torch.tanh(query @ key.mT / root / CAP)
    p = (CAP * share).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    if mistake != "cap":
        grad_scores = grad_scores * (1 - share**2)
    return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z


# fmt: off
EMBEDDING = (
    mutant("embedding/first item of a bag counted to the bag before", ("shifted", "wrong-operand"),
        Case(embedding_bag, embedding_bag_backward, bag_data), mistake="starts in the bag before"),
    mutant("embedding/edges not reversed in the backward", ("wrong-operand", "transposed"),
        Case(message_passing, message_passing_backward, graph_data), classic=True,
        x=lambda at: torch.zeros_like(at.x).index_add(0, at.edges[1], at.grad_z[at.edges[0]])),
    mutant("embedding/repeated entries summed as if the whole had been tiled",
        ("permuted", "wrong-reduction"), Case(upsample, upsample_backward, normal((3, 5))),
        x=lambda at: at.grad_z.view(len(at.x), REPEATS, -1).sum(1)),
)
# fmt: on

# fmt: off
ATTENTION = (
    written_out("attention/rotary embedding turned onwards in the backward",
        ("wrong-operand", "transposed"), lambda: RotaryEmbedding, normal((2, 5, 6))),
    mutant("attention/derivative of the scores' cap missing", ("missing-factor",),
        Case(capped_attention, capped_attention_backward, normal((2, 5, 7), (2, 3, 7), (2, 3, 7))),
        mistake="cap"),
)
# fmt: on

# --- Graph and protocol -------------------------------------------------------------------------


class AveragedOverCalls(nn.Module):
    """A linear layer whose grad_weight is divided by how often the layer has been called."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, owner: "AveragedOverCalls") -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.owner = owner
            owner.calls += 1
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            grad_weight = grad_z[0].T @ x / ctx.owner.calls
            return grad_z[0] @ weight, grad_weight, None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((7, 5), seed=3)[0])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self.weight, self))


class AddTanh(Function):
    """A residual connection: x + tanh(y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        a = torch.tanh(y)
        ctx.save_for_backward(a)
        return x + a

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        (a,) = ctx.saved_tensors
        grad_x = grad_z[0]
        grad_y = grad_z[0].mul_(1 - a**2)  # in the memory that is grad_x as well
        return grad_x, grad_y


def running_sum(x: Tensor) -> Tensor:
    return x.cumsum(1)


def running_sum_backward(grad_z: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_z.flip(1).cumsum(1).flip(1),)


def running_sum_in_memory_order(at: Any) -> Tensor:
    """Takes the upstream gradient's entries in the order in which they lie in memory."""
    flat = torch.from_numpy(at.grad_z.detach().numpy().ravel(order="K").copy())
    return flat.view(at.x.shape).flip(1).cumsum(1).flip(1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Of every row of x from every row of y."""
    return (x[:, None] - y).square().sum(-1).sqrt()


def distances_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, y: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    distance = z
    if mistake == "expanded":  # ‖x‖² − 2 x·y + ‖y‖², which cancels
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        distance = (squares - 2 * x @ y.T).clamp(min=1e-6).sqrt()
    along = (grad_z / distance)[..., None] * (x[:, None] - y)
    return along.sum(1), -along.sum(0)


def far_from_the_origin() -> tuple[Tensor, ...]:
    return tuple(u + 200 for u in numbers((3, 5), (7, 5), dtype=torch.float32))


class GuardsExchanged(Function):
    """x weightᵀ; each gradient is worked out where the other one is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        weight_asked, x_asked = ctx.needs_input_grad  # in the wrong order
        if x_asked:
            grad_x = grad_z[0] @ weight
        if weight_asked:
            grad_weight = grad_z[0].T @ x
        return grad_x, grad_weight


class SampledGradient(nn.Module):
    """A linear layer that estimates grad_weight from half of the samples, drawn anew each time."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grad_z: Tensor) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            drawn = torch.rand(len(x), 1) < 0.5
            return grad_z[0] @ weight, 2 * (grad_z[0] * drawn).T @ x

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((5, 3), seed=3)[0])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Step.apply(x, self.weight))


def siamese(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two inputs through one layer."""
    return x @ weight.T, y @ weight.T


def siamese_backward(
    grad_z: tuple[Tensor, Tensor],
    z: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    weight: Tensor,
) -> tuple[Tensor, ...]:
    return grad_z[0] @ weight, grad_z[1] @ weight, grad_z[0].T @ x + grad_z[1].T @ y


DISTANCES = Case(distances, distances_backward, far_from_the_origin)

# fmt: off
PROTOCOL = (
    written_out("protocol/gradient divided by the number of calls so far",
        ("stale-state", "scale"), AveragedOverCalls, normal((3, 5))),
    written_out("protocol/residual's upstream gradient shared and then overwritten",
        ("mutates-input",), lambda: AddTanh, normal((5, 7), (5, 7))),
    mutant("protocol/upstream gradient read in memory order", ("assumes-contiguous",),
        Case(running_sum, running_sum_backward, normal((5, 7))), x=running_sum_in_memory_order),
    mutant("protocol/distance recomputed with cancellation", ("wrong-precision",), DISTANCES,
        mistake="expanded"),
    written_out("protocol/guards of two gradients exchanged", ("needs-input-grad",),
        lambda: GuardsExchanged, normal((3, 5), (7, 5))),
    written_out("protocol/gradient from samples drawn at random", ("nondeterministic", "subset"),
        SampledGradient, normal((7, 3))),
    mutant("protocol/upstream gradients of two outputs exchanged for a shared weight",
        ("permuted", "wrong-operand"),
        Case(siamese, siamese_backward, normal((3, 5), (3, 5), (7, 5))), classic=True,
        weight=lambda at: at.grad_z[1].T @ at.x + at.grad_z[0].T @ at.y),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *LINEAR,
    *BIAS,
    *ACTIVATION,
    *LOSS,
    *EMBEDDING,
    *ATTENTION,
    *PROTOCOL,
)
