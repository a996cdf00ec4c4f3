"""Mistakes unseen, in normalisation, dropout and masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.catalogue.normalization import grad_standardised
from mutants.mutant import layer_of, mutant, normal, numbers, written_out

# --- Normalisation ------------------------------------------------------------------------------

EPS = 0.01


def standardise(x, axes):
    """x̂ and 1/σ."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = (variance + EPS).rsqrt()
    return (x - mean) * inverse, inverse


@layer_of(
    lambda x, gamma: x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma, (2, 5, 7), (7,)
)
def rms_norm(grad_z, z, x, gamma):
    inverse = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
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
    return centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt() * gamma


def far_from_zero():
    x, gamma = numbers((5, 7), (7,))
    return (x + 500).float(), gamma.float()


@layer_of(centred_and_scaled, far_from_zero)
def quick_layer_norm(grad_z, z, x, gamma):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    inverse = (variance + EPS).rsqrt()
    x_hat = (x - mean) * inverse
    return grad_standardised(grad_z * gamma, x_hat, inverse, (1,)), (grad_z * x_hat).sum(0)


@layer_of(lambda x: x / x.norm(dim=1, keepdim=True), (5, 7))
def on_sphere(grad_z, z, x):
    ray = z
    return ((grad_z - ray * (grad_z * ray).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True),)


ALPHA, BETA = 0.5, 0.75


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
    lambda x, gamma, beta: F.instance_norm(x, weight=gamma, bias=beta, eps=EPS),
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
            inverse = (variance + EPS).rsqrt()
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
    lambda x, gamma, beta: F.layer_norm(x, x.shape[2:], gamma, beta, eps=EPS),
    *((3, 5, 7), (7,), (7,)),
)
def layer_norm(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardise(x, (2,))
    grad_x = grad_standardised(grad_z * gamma, x_hat, inverse, (2,))
    return grad_x, (grad_z * x_hat).sum((0, 1)), grad_z.sum((0, 1))


GROUPS = 2


@layer_of(
    lambda x, gamma, beta: F.group_norm(x, GROUPS, gamma, beta, eps=EPS),
    *((3, 10, 7), (10,), (10,)),
)
def group_norm(grad_z, z, x, gamma, beta):
    x_hat, inverse = standardise(x.unflatten(1, (GROUPS, -1)), (2, 3))
    u = (grad_z * gamma[:, None]).unflatten(1, (GROUPS, -1))
    grad_x = grad_standardised(u, x_hat, inverse, (2, 3))
    per_channel = (grad_z.unflatten(1, (GROUPS, -1)) * x_hat).sum((0, 3))
    return grad_x.flatten(1, 2), per_channel.flatten(), grad_z.sum((0, 2))


NORMALIZATION = (
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
        lambda: RunningNorm().eval(), normal((5, 3))),
    mutant("normalization/γ multiplied in after the means", "wrong-operand missing-factor",
        layer_norm, classic=True,
        change={"grad_z * gamma, x_hat, inverse": "grad_z, x_hat, inverse * gamma"}),
    mutant("normalization/grad_γ summed over the channels of a group", "wrong-reduction",
        group_norm,
        change={"per_channel.flatten()":
                "per_channel.sum(1, keepdim=True).expand(-1, 5).flatten()"}),
)  # fmt: skip

# --- Dropout and masks --------------------------------------------------------------------------


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


def of_lengths():
    return *numbers((3, 7, 5)), torch.arange(7) < torch.tensor([[5], [2], [3]])


# Over the steps that count: x (N, T, C), mask (N, T).
@layer_of(lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1)[:, None], of_lengths)
def masked_mean(grad_z, z, x, mask):
    count = mask.sum(1)
    return grad_z[:, None] * mask[..., None] / count[:, None, None], None


def with_connections():
    x, weight, chance = numbers((5, 3), (7, 3), (7, 3))
    return x, weight, chance > -0.3


# A linear layer, some of whose connections are cut.
@layer_of(lambda x, weight, mask: x @ (weight * mask).T, with_connections)
def drop_connect(grad_z, z, x, weight, mask):
    return grad_z @ (weight * mask), grad_z.T @ x * mask, None


DROPOUT = (
    written_out("dropout/scaled mask divided by 1 - p again", "scale", ChannelDropout,
        normal((5, 7, 3))),
    mutant("dropout/masked mean divided by T in the backward", "wrong-operand per-channel-scale",
        masked_mean, change={"mask.sum(1)": "torch.full((len(x),), x.shape[1])"}),
    mutant("dropout/mask of the connections missing in grad_weight", "missing-factor", drop_connect,
        classic=True, change={"x * mask, None": "x, None"}),
)  # fmt: skip
