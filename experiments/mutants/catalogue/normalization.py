"""Mistakes in normalisation and dropout."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from mutants.mutant import Case, mutant, normal, numbers, written_out

# --- Normalisation: z = γ x̂ + β, x̂ = (x − μ) / σ ----------------------------------------------

EPS = 0.05


def standardised_backward(grad_x_hat, x, axes, mistake=""):
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
    def batch_normalisation(x, gamma, beta):
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)

    def backward(grad_z, z, x, gamma, beta, mistake=""):
        grad_x_hat = grad_z if mistake == "no γ" else grad_z * gamma[:, None]
        grad_x, x_hat = standardised_backward(grad_x_hat, x, (0, 2), mistake)
        if mistake == "grad_γ from x":
            x_hat = x
        return grad_x, (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    def data():
        x, gamma, beta = numbers((n, 3, t), (3,), (3,))
        x = spread * x * torch.tensor([0.5, 1, 2], dtype=x.dtype)[:, None] + 1
        return x, torch.ones_like(gamma) if gamma_is_one else gamma, beta

    return Case(batch_normalisation, backward, data)


def layer_norm(x, gamma, beta):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * gamma + beta


def layer_norm_backward(grad_z, z, x, gamma, beta, mistake=""):
    grad_x, x_hat = standardised_backward(grad_z * gamma, x, (1,), mistake)
    return grad_x, (grad_z * x_hat).sum(0), grad_z.sum(0)


LAYER_NORM = Case(layer_norm, layer_norm_backward, normal((5, 7), (7,), (7,)))


def group_norm(groups: int) -> Case:
    def group_normalisation(x, gamma, beta):
        return F.group_norm(x, groups, gamma, beta, eps=EPS)

    def backward(grad_z, z, x, gamma, beta, mistake=""):
        def split(u):
            """(N, groups, values)"""
            if mistake == "groups interleaved":
                return u.unflatten(1, (-1, groups)).transpose(1, 2).flatten(2)
            return u.unflatten(1, (groups, -1)).flatten(2)

        def join(u):
            if mistake == "groups interleaved":
                return u.unflatten(2, (-1, x.shape[2])).transpose(1, 2).reshape(x.shape)
            return u.reshape(x.shape)

        grad_x, _ = standardised_backward(split(grad_z * gamma[:, None]), split(x), (2,))
        x_hat = (z - beta[:, None]) / gamma[:, None]
        return join(grad_x), (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))

    return Case(group_normalisation, backward, normal((5, 6, 7), (6,), (6,)))


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
        LAYER_NORM.of((7, 7), (7,), (7,)),
        gamma=lambda at: (at.grad_z * (at.z - at.beta) / at.gamma).sum(1)),
)
# fmt: on

# --- Dropout: z = mask x / (1 − p) --------------------------------------------------------------


def dropout(p: float) -> Case:
    def drop_out(x):
        return x * (torch.rand_like(x) >= p) / (1 - p)

    def backward(grad_z, z, x, mistake=""):
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
        def forward(ctx, x, p, training):
            ctx.mask, ctx.p = torch.rand_like(x) >= p, p
            return x * ctx.mask / (1 - p) if training else x.clone()

        @staticmethod
        def backward(ctx, grad_z):
            return grad_z * ctx.mask / (1 - ctx.p), None, None

    def forward(self, x):
        return self.Step.apply(x, 0.4, self.training)


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
