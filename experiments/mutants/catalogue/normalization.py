"""Mistakes in normalisation and dropout."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from mutants.mutant import Case, layer_of, mutant, normal, numbers, written_out

# --- Normalisation: z = γ x̂ + β, x̂ = (x − μ) / σ ----------------------------------------------

EPS = 0.05


def standardised(x, axes, eps=EPS, unbiased=False):
    """x̂ = (x − μ) / σ over `axes`, and 1/σ."""
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    if unbiased:
        count = x.numel() / variance.numel()
        variance = variance * count / (count - 1)
    inverse = (variance + eps).rsqrt()
    return centred * inverse, inverse


def grad_standardised(grad_x_hat, x_hat, inverse, over):
    """grad_x = (grad_x̂ − mean(grad_x̂) − x̂ mean(grad_x̂ x̂)) / σ."""
    mean = grad_x_hat.mean(over, keepdim=True)
    along = x_hat * (grad_x_hat * x_hat).mean(over, keepdim=True)
    return inverse * (grad_x_hat - mean - along)


def batch_norm(n: int = 5, t: int = 7, gamma_is_one: bool = False, spread: float = 1.0) -> Case:
    def data():
        x, gamma, beta = numbers((n, 3, t), (3,), (3,))
        x = spread * x * torch.tensor([0.5, 1, 2], dtype=x.dtype)[:, None] + 1
        return x, torch.ones_like(gamma) if gamma_is_one else gamma, beta

    @layer_of(
        lambda x, gamma, beta: F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS),
        data,
    )
    def batch_normalisation(grad_z, z, x, gamma, beta):
        grad_x_hat = grad_z * gamma[:, None]
        x_hat, inverse = standardised(x, (0, 2))
        mean = grad_x_hat.mean((0, 2), keepdim=True)
        along = x_hat * (grad_x_hat * x_hat).mean((0, 2), keepdim=True)
        grad_x = inverse * (grad_x_hat - mean - along)
        return grad_x, (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    return batch_normalisation


def layer_normalised(x, gamma, beta):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * gamma + beta


@layer_of(layer_normalised, (5, 7), (7,), (7,))
def layer_norm(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardised(x, (1,))
    grad_x = grad_standardised(grad_z * gamma, x_hat, inverse, (1,))
    return grad_x, (grad_z * x_hat).sum(0), grad_z.sum(0)


def group_norm(groups: int) -> Case:
    @layer_of(
        lambda x, gamma, beta: F.group_norm(x, groups, gamma, beta, eps=EPS), (5, 6, 7), (6,), (6,)
    )
    def group_normalisation(grad_z, z, x, gamma, beta):
        order = torch.arange(6)  # of the channels, group by group
        x_hat, inverse = standardised(x[:, order].unflatten(1, (groups, -1)).flatten(2), (2,))
        grad_x_hat = (grad_z * gamma[:, None])[:, order].unflatten(1, (groups, -1)).flatten(2)
        grad_x = grad_standardised(grad_x_hat, x_hat, inverse, (2,)).reshape(x.shape)
        x_hat = (z - beta[:, None]) / gamma[:, None]
        return grad_x[:, order.argsort()], (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    return group_normalisation


class DetachedStatistics(nn.Module):
    """Batch normalisation that treats the batch's own mean and deviation as constants."""

    def __init__(self):
        super().__init__()
        gamma, beta = numbers((3,), (3,), seed=1)
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(beta)

    def forward(self, x):
        mean, variance = x.detach().mean(0), x.detach().var(0, unbiased=False)
        return (x - mean) / torch.sqrt(variance + EPS) * self.gamma + self.beta


BATCH_NORM = batch_norm()

NORMALIZATION = (
    mutant("normalization/eval's formula in training", "missing-term", BATCH_NORM, classic=True,
        change={" - mean - along": ""}),
    mutant("normalization/mean term missing", "missing-term", BATCH_NORM, change={" - mean": ""}),
    mutant("normalization/variance term missing", "missing-term", BATCH_NORM,
        change={" - along": ""}),
    mutant("normalization/γ missing", "per-channel-scale missing-factor", BATCH_NORM,
        batch_norm(gamma_is_one=True), change={"grad_z * gamma[:, None]": "grad_z"}),
    mutant("normalization/1/σ missing", "per-channel-scale missing-factor", BATCH_NORM,
        classic=True, change={"inverse * (": "("}),
    mutant("normalization/unbiased variance throughout", "wrong-operand", BATCH_NORM,
        change={"standardised(x, (0, 2))": "standardised(x, (0, 2), unbiased=True)"}),
    mutant("normalization/unbiased variance in the factor 1/σ", "scale wrong-operand", layer_norm,
        change={"x_hat, inverse, (": "x_hat, standardised(x, (1,), unbiased=True)[1], ("}),
    mutant("normalization/ε omitted", "per-channel-scale wrong-operand", BATCH_NORM,
        batch_norm(spread=1e7), change={"inverse * (": "standardised(x, (0, 2), eps=0)[1] * ("}),
    mutant("normalization/grad_γ from x", "wrong-operand", BATCH_NORM,
        change={"(grad_z * x_hat)": "(grad_z * x)"}),
    mutant("normalization/grad_β averaged", "scale wrong-reduction", BATCH_NORM, classic=True,
        beta=lambda at: at.grad_z.mean((0, 2))),
    mutant("normalization/layer norm reduced over the batch", "wrong-reduction", layer_norm,
        change={"inverse, (1,)": "inverse, (0,)"}),
    mutant("normalization/groups along the wrong axis", "permuted wrong-reduction", group_norm(2),
        group_norm(1), change={"torch.arange(6)": "torch.arange(6).view(-1, groups).T.flatten()"}),
    written_out("normalization/statistics detached", "missing-term", DetachedStatistics,
        normal((5, 3))),
    mutant("normalization/grad_γ of layer norm over the features", "wrong-reduction",
        layer_norm.of((7, 7), (7,), (7,)),
        gamma=lambda at: (at.grad_z * (at.z - at.beta) / at.gamma).sum(1)),
)  # fmt: skip

# --- Dropout: z = mask x / (1 − p) --------------------------------------------------------------


def dropout(p: float) -> Case:
    @layer_of(lambda x: x * (torch.rand_like(x) >= p) / (1 - p), (5, 7))
    def drop_out(grad_z, z, x):
        mask = z != 0
        return (grad_z * mask / (1 - p),)

    return drop_out


class DropsInEval(nn.Module):
    """Dropout whose backward does not ask whether it is training."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, p, training):
            ctx.mask, ctx.p = torch.rand_like(x) >= p, p
            return x * ctx.mask / (1 - p) if training else x.clone()

        @staticmethod
        def backward(ctx, grad_z):
            return grad_z * ctx.mask / (1 - ctx.p), None, None

    def forward(self, x):
        return self.Step.apply(x, 0.4, self.training)


DROPOUT = (
    mutant("dropout/new mask in the backward", "nondeterministic wrong-operand", dropout(0.4),
        dropout(0.0), change={"z != 0": "torch.rand_like(x) >= p"}),
    mutant("dropout/1/(1 - p) missing", "scale", dropout(0.4), dropout(0.0), classic=True,
        change={" / (1 - p)": ""}),
    mutant("dropout/mask missing in the backward", "missing-factor", dropout(0.4), dropout(0.0),
        change={" * mask": ""}),
    written_out("dropout/applied in eval", "missing-factor nondeterministic",
        lambda: DropsInEval().eval(), normal((5, 7))),
)  # fmt: skip
