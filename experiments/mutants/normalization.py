"""Mistakes in normalisation, dropout and masks."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.dense import pruned
from mutants.mutant import Case, layer_of, mutant, numbers, written_out

EPS = 0.05
SMALL_EPS = 0.01
GROUPS = 2
ALPHA, BETA = 0.5, 0.75

# --- Normalisation: z = γ x̂ + β, x̂ = (x − μ) / σ ----------------------------------------------


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


def spread(x, gamma, beta, scale=1.0):
    """Every channel has a deviation of its own, and a mean."""
    return scale * x * x.new_tensor([0.5, 1, 2])[:, None] + 1, gamma, beta


@layer_of(
    lambda x, gamma, beta: F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS),
    *((5, 3, 7), (3,), (3,)),
    data=spread,
)
def batch_norm(grad_z, z, x, gamma, beta):
    grad_x_hat = grad_z * gamma[:, None]
    x_hat, inverse = standardised(x, (0, 2))
    mean = grad_x_hat.mean((0, 2), keepdim=True)
    along = x_hat * (grad_x_hat * x_hat).mean((0, 2), keepdim=True)
    grad_x = inverse * (grad_x_hat - mean - along)
    return grad_x, (grad_z * x_hat).sum((0, 2)), grad_z.sum((0, 2))


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


def standardise(x, axes):
    """x̂ and 1/σ."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = (variance + SMALL_EPS).rsqrt()
    return (x - mean) * inverse, inverse


@layer_of(
    lambda x, gamma: x * (x.square().mean(-1, keepdim=True) + SMALL_EPS).rsqrt() * gamma,
    *((2, 5, 7), (7,)),
)
def rms_norm(grad_z, z, x, gamma):
    inverse = (x.square().mean(-1, keepdim=True) + SMALL_EPS).rsqrt()
    x_hat = x * inverse
    grad_x_hat = grad_z * gamma
    along = (grad_x_hat * x_hat).sum(-1, keepdim=True) / x.shape[-1]
    return inverse * (grad_x_hat - x_hat * along), (grad_z * x_hat).sum((0, 1))


# weight_o = gain_o v_o / ‖v_o‖.
@layer_of(lambda v, gain: gain[:, None] * v / v.norm(dim=1, keepdim=True), (5, 7), (5,))
def weight_norm(grad_z, z, v, gain, asked):
    length = v.norm(dim=1, keepdim=True)
    direction, ratio = v / length, gain / length.squeeze(1)
    grad_gain = (grad_z * direction).sum(1)
    grad_v = grad_z - direction * grad_gain[:, None]
    return ratio[:, None] * grad_v, grad_gain if asked[1] else None


def centred_and_scaled(x, gamma):
    centred = x - x.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + SMALL_EPS).rsqrt() * gamma


# In float32 and far from 0.
@layer_of(
    centred_and_scaled, (5, 7), (7,), data=lambda x, gamma: ((x + 500).float(), gamma.float())
)
def quick_layer_norm(grad_z, z, x, gamma):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    inverse = (variance + SMALL_EPS).rsqrt()
    x_hat = (x - mean) * inverse
    return grad_standardised(grad_z * gamma, x_hat, inverse, (1,)), (grad_z * x_hat).sum(0)


@layer_of(lambda x: x / x.norm(dim=1, keepdim=True), (5, 7))
def on_sphere(grad_z, z, x):
    ray = z
    return ((grad_z - ray * (grad_z * ray).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True),)


def strength(x):
    """Which channels are neighbours, and s_c = 1 + α Σ x² over the channel and its neighbours."""
    place = torch.arange(x.shape[1])
    near = ((place[:, None] - place).abs() <= 1).to(torch.float64)
    return near, 1 + ALPHA * torch.einsum("dc,nct->ndt", near, x**2)


@layer_of(lambda x: x * strength(x)[1] ** -BETA, (2, 5, 7))
def local_response(grad_z, z, x):
    near, s = strength(x)
    grad_s = -BETA * grad_z * x * s ** (-BETA - 1)
    return (grad_z * s**-BETA + 2 * ALPHA * x * torch.einsum("dc,ndt->nct", near, grad_s),)


@layer_of(
    lambda x, gamma, beta: F.instance_norm(x, weight=gamma, bias=beta, eps=SMALL_EPS),
    *((3, 2, 5, 7), (2,), (2,)),
)
def instance_norm(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardise(x, (2, 3))
    grad_x = grad_standardised(grad_z * gamma[:, None, None], x_hat, inverse, (2, 3))
    return grad_x, (grad_z * x_hat).sum((0, 2, 3)), grad_z.sum((0, 2, 3))


class RunningNorm(nn.Module):
    """Batch normalisation with running statistics, whose backward does not ask for the mode."""

    class Apply(Function):
        @staticmethod
        def forward(ctx, x, gamma, beta, running):
            mean, variance = running or (x.mean(0), x.var(0, correction=0))
            inverse = (variance + SMALL_EPS).rsqrt()
            x_hat = (x - mean) * inverse
            ctx.save_for_backward(x_hat, inverse, gamma)
            return x_hat * gamma + beta

        @staticmethod
        def backward(ctx, grad_z):
            x_hat, inverse, gamma = ctx.saved_tensors
            grad_x = grad_standardised(grad_z * gamma, x_hat, inverse, (0,))
            return grad_x, (grad_z * x_hat).sum(0), grad_z.sum(0), None

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self):
        super().__init__()
        gamma, beta, mean, spread = numbers((3,), (3,), (3,), (3,), seed=1)
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(beta)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_variance", 1 + spread**2)

    def forward(self, x):
        running = None if self.training else (self.running_mean, self.running_variance)
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
            self.running_variance.lerp_(x.detach().var(0), 0.1)
        return self.Apply.apply(x, self.gamma, self.beta, running)


@layer_of(
    lambda x, gamma, beta: F.layer_norm(x, x.shape[2:], gamma, beta, eps=SMALL_EPS),
    *((3, 5, 7), (7,), (7,)),
)
def layer_norm_of_steps(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardise(x, (2,))
    grad_x = grad_standardised(grad_z * gamma, x_hat, inverse, (2,))
    return grad_x, (grad_z * x_hat).sum((0, 1)), grad_z.sum((0, 1))


@layer_of(
    lambda x, gamma, beta: F.group_norm(x, GROUPS, gamma, beta, eps=SMALL_EPS),
    *((3, 10, 7), (10,), (10,)),
)
def group_norm_of_steps(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardise(x.unflatten(1, (GROUPS, -1)), (2, 3))
    u = (grad_z * gamma[:, None]).unflatten(1, (GROUPS, -1))
    grad_x = grad_standardised(u, x_hat, inverse, (2, 3))
    per_channel = (grad_z.unflatten(1, (GROUPS, -1)) * x_hat).sum((0, 3))
    return grad_x.flatten(1, 2), per_channel.flatten(), grad_z.sum((0, 2))


NORMALIZATION = (
    mutant("normalization/eval's formula in training", "missing-term", batch_norm, classic=True,
        change={" - mean - along": ""}),
    mutant("normalization/mean term missing", "missing-term", batch_norm, change={" - mean": ""}),
    mutant("normalization/variance term missing", "missing-term", batch_norm,
        change={" - along": ""}),
    mutant("normalization/γ missing", "per-channel-scale missing-factor", batch_norm,
        batch_norm.on(lambda x, gamma, beta: spread(x, torch.ones_like(gamma), beta)),
        change={"grad_z * gamma[:, None]": "grad_z"}),
    mutant("normalization/1/σ missing", "per-channel-scale missing-factor", batch_norm,
        classic=True, change={"inverse * (": "("}),
    mutant("normalization/unbiased variance throughout", "wrong-operand", batch_norm,
        change={"standardised(x, (0, 2))": "standardised(x, (0, 2), unbiased=True)"}),
    mutant("normalization/unbiased variance in the factor 1/σ", "scale wrong-operand", layer_norm,
        change={"x_hat, inverse, (": "x_hat, standardised(x, (1,), unbiased=True)[1], ("}),
    mutant("normalization/ε omitted", "per-channel-scale wrong-operand", batch_norm,
        batch_norm.on(partial(spread, scale=1e7)),
        change={"inverse * (": "standardised(x, (0, 2), eps=0)[1] * ("}),
    mutant("normalization/grad_γ from x", "wrong-operand", batch_norm,
        change={"(grad_z * x_hat)": "(grad_z * x)"}),
    mutant("normalization/grad_β averaged", "scale wrong-reduction", batch_norm, classic=True,
        beta=lambda at: at.grad_z.mean((0, 2))),
    mutant("normalization/layer norm reduced over the batch", "wrong-reduction", layer_norm,
        change={"inverse, (1,)": "inverse, (0,)"}),
    mutant("normalization/groups along the wrong axis", "permuted wrong-reduction", group_norm(2),
        group_norm(1), change={"torch.arange(6)": "torch.arange(6).view(-1, groups).T.flatten()"}),
    written_out("normalization/statistics detached", "missing-term", DetachedStatistics,
        (5, 3)),
    mutant("normalization/grad_γ of layer norm over the features", "wrong-reduction",
        layer_norm.of((7, 7), (7,), (7,)),
        gamma=lambda at: (at.grad_z * (at.z - at.beta) / at.gamma).sum(1)),
)  # fmt: skip
UNSEEN_NORMALIZATION = (
    mutant("normalization/RMS norm's second term summed for averaged",
        "wrong-reduction missing-factor", rms_norm, change={" / x.shape[-1]": ""}),
    mutant("normalization/weight norm's projection lost where the gain is frozen",
        "needs-input-grad", weight_norm, classic=True,
        change={"* grad_gain[:, None]": "* grad_gain[:, None] * asked[1]"}),
    mutant("normalization/variance as a difference of squares in float32", "wrong-precision",
        quick_layer_norm, classic=True,
        change={"(x - mean).square().mean(1, keepdim=True)":
                "x.square().mean(1, keepdim=True) - mean.square()"}),
    mutant("normalization/projection on x for x / |x|", "wrong-operand missing-factor", on_sphere,
        classic=True, change={"ray = z": "ray = x"}),
    mutant("normalization/local response's neighbouring channels left out", "missing-term subset",
        local_response, change={'torch.einsum("dc,ndt->nct", near, grad_s)': "grad_s"}),
    mutant("normalization/instance norm's means over the batch too", "wrong-reduction",
        instance_norm, change={"inverse, (2, 3)": "inverse, (0, 2, 3)"}),
    written_out("normalization/training's formula in eval", "extra-term wrong-operand",
        lambda: RunningNorm().eval(), (5, 3)),
    mutant("normalization/γ multiplied in after the means", "wrong-operand missing-factor",
        layer_norm_of_steps, classic=True,
        change={"grad_z * gamma, x_hat, inverse": "grad_z, x_hat, inverse * gamma"}),
    mutant("normalization/grad_γ summed over the channels of a group", "wrong-reduction",
        group_norm_of_steps,
        change={"per_channel.flatten()":
                "per_channel.sum(1, keepdim=True).expand(-1, 5).flatten()"}),
)  # fmt: skip

# --- Dropout, z = mask x / (1 − p), and masks ---------------------------------------------------


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


class ChannelDropout(nn.Module):
    """Drops whole channels; the mask that is kept holds 1 / (1 − p) already."""

    class Apply(Function):
        @staticmethod
        def forward(ctx, x, p):
            mask = (torch.rand(x.shape[:2], dtype=x.dtype)[..., None] >= p) / (1 - p)
            ctx.save_for_backward(mask)
            ctx.p = p
            return x * mask

        @staticmethod
        def backward(ctx, grad_z):
            (mask,) = ctx.saved_tensors
            return grad_z * mask / (1 - ctx.p), None  # divided again

    def forward(self, x):
        return self.Apply.apply(x, 0.3) if self.training else x


# Over the steps that count: x (N, T, C), mask (N, T).
@layer_of(
    lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1)[:, None],
    (3, 7, 5),
    data=lambda x: (x, torch.arange(7) < torch.tensor([[5], [2], [3]])),
)
def masked_mean(grad_z, z, x, mask):
    count = mask.sum(1)
    return grad_z[:, None] * mask[..., None] / count[:, None, None], None


drop_connect = pruned.of((5, 3), (7, 3), (7, 3)).on(lambda x, w, chance: (x, w, chance > -0.3))

DROPOUT = (
    mutant("dropout/new mask in the backward", "nondeterministic wrong-operand", dropout(0.4),
        dropout(0.0), change={"z != 0": "torch.rand_like(x) >= p"}),
    mutant("dropout/1/(1 - p) missing", "scale", dropout(0.4), dropout(0.0), classic=True,
        change={" / (1 - p)": ""}),
    mutant("dropout/mask missing in the backward", "missing-factor", dropout(0.4), dropout(0.0),
        change={" * mask": ""}),
    written_out("dropout/applied in eval", "missing-factor nondeterministic",
        lambda: DropsInEval().eval(), (5, 7)),
)  # fmt: skip
UNSEEN_DROPOUT = (
    written_out("dropout/scaled mask divided by 1 - p again", "scale", ChannelDropout, (5, 7, 3)),
    mutant("dropout/masked mean divided by T in the backward", "wrong-operand per-channel-scale",
        masked_mean, change={"mask.sum(1)": "torch.full((len(x),), x.shape[1])"}),
    mutant("dropout/mask of the connections missing in grad_weight", "missing-factor", drop_connect,
        classic=True, change={"x * connected, None": "x, None"}),
)  # fmt: skip
