"""Mistakes unseen, in normalisation, dropout and masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.mutant import Case, mutant, normal, numbers, written_out

# --- Normalisation ------------------------------------------------------------------------------

EPS = 0.01


def standardise(x, axes):
    """x̂ and 1/σ."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = (variance + EPS).rsqrt()
    return (x - mean) * inverse, inverse


def rms_norm(x, gamma):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma


def rms_norm_backward(grad_z, z, x, gamma, mistake=""):
    inverse = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    x_hat = x * inverse
    grad_x_hat = grad_z * gamma
    along = (grad_x_hat * x_hat).sum(-1, keepdim=True)
    if mistake != "summed":
        along = along / x.shape[-1]
    return inverse * (grad_x_hat - x_hat * along), (grad_z * x_hat).sum((0, 1))


class WeightNorm(Function):
    """weight_o = gain_o v_o / ‖v_o‖; the term along v is taken from the gain's gradient."""

    @staticmethod
    def forward(ctx, v, gain):
        length = v.norm(dim=1, keepdim=True)
        ctx.save_for_backward(v / length, gain / length.squeeze(1))
        return gain[:, None] * v / length

    @staticmethod
    def backward(ctx, grad_z):
        direction, ratio = ctx.saved_tensors
        grad_v, grad_gain = grad_z, None
        if ctx.needs_input_grad[1]:
            grad_gain = (grad_z * direction).sum(1)
            grad_v = grad_v - direction * grad_gain[:, None]  # a frozen gain needs it as well
        return ratio[:, None] * grad_v, grad_gain


class QuickLayerNorm(Function):
    """Layer normalisation; the backward takes E[x²] − E[x]² for the variance."""

    @staticmethod
    def forward(ctx, x, gamma):
        ctx.save_for_backward(x, gamma)
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt() * gamma

    @staticmethod
    def backward(ctx, grad_z):
        x, gamma = ctx.saved_tensors
        mean = x.mean(1, keepdim=True)
        variance = x.square().mean(1, keepdim=True) - mean.square()  # cancels in float32
        inverse = (variance + EPS).rsqrt()
        x_hat = (x - mean) * inverse
        u = grad_z * gamma
        along = (u * x_hat).mean(1, keepdim=True)
        grad_x = inverse * (u - u.mean(1, keepdim=True) - x_hat * along)
        return grad_x, (grad_z * x_hat).sum(0)


def far_from_zero():
    x, gamma = numbers((5, 7), (7,))
    return (x + 500).float(), gamma.float()


def on_sphere(x):
    return x / x.norm(dim=1, keepdim=True)


def on_sphere_backward(grad_z, z, x, mistake=""):
    ray = x if mistake == "x for z" else z
    return ((grad_z - ray * (grad_z * ray).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True),)


ALPHA, BETA = 0.5, 0.75


def neighbours(channels: int) -> Tensor:
    place = torch.arange(channels)
    return ((place[:, None] - place).abs() <= 1).to(torch.float64)


def local_response(x):
    """x_c / s_c^β, s_c = 1 + α Σ x² over the channel and its two neighbours."""
    s = 1 + ALPHA * torch.einsum("dc,nct->ndt", neighbours(x.shape[1]), x**2)
    return x * s**-BETA


def local_response_backward(grad_z, z, x, mistake=""):
    near = neighbours(x.shape[1])
    s = 1 + ALPHA * torch.einsum("dc,nct->ndt", near, x**2)
    if mistake == "own channel only":
        near = torch.eye(x.shape[1], dtype=x.dtype)
    grad_s = -BETA * grad_z * x * s ** (-BETA - 1)
    return (grad_z * s**-BETA + 2 * ALPHA * x * torch.einsum("dc,ndt->nct", near, grad_s),)


def instance_norm(x, gamma, beta):
    return F.instance_norm(x, weight=gamma, bias=beta, eps=EPS)


def instance_norm_backward(grad_z, z, x, gamma, beta, mistake=""):
    x_hat, inverse = standardise(x, (2, 3))
    over = (0, 2, 3) if mistake == "over the batch too" else (2, 3)
    u = grad_z * gamma[:, None, None]
    grad_x = u - u.mean(over, keepdim=True) - x_hat * (u * x_hat).mean(over, keepdim=True)
    return inverse * grad_x, (grad_z * x_hat).sum((0, 2, 3)), grad_z.sum((0, 2, 3))


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
            u = grad_z * gamma
            grad_x = inverse * (u - u.mean(0) - x_hat * (u * x_hat).mean(0))
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


def layer_norm(x, gamma, beta):
    return F.layer_norm(x, x.shape[2:], gamma, beta, eps=EPS)


def layer_norm_backward(grad_z, z, x, gamma, beta, mistake=""):
    x_hat, inverse = standardise(x, (2,))

    def centre(u):
        return u - u.mean(2, keepdim=True) - x_hat * (u * x_hat).mean(2, keepdim=True)

    if mistake == "γ last":
        grad_x = inverse * gamma * centre(grad_z)
    else:
        grad_x = inverse * centre(grad_z * gamma)
    return grad_x, (grad_z * x_hat).sum((0, 1)), grad_z.sum((0, 1))


GROUPS = 2


def group_norm(x, gamma, beta):
    return F.group_norm(x, GROUPS, gamma, beta, eps=EPS)


def group_norm_backward(grad_z, z, x, gamma, beta, mistake=""):
    x_hat, inverse = standardise(x.unflatten(1, (GROUPS, -1)), (2, 3))
    u = (grad_z * gamma[:, None]).unflatten(1, (GROUPS, -1))
    along = x_hat * (u * x_hat).mean((2, 3), keepdim=True)
    grad_x = inverse * (u - u.mean((2, 3), keepdim=True) - along)
    per_channel = (grad_z.unflatten(1, (GROUPS, -1)) * x_hat).sum((0, 3))
    if mistake == "one sum a group":
        per_channel = per_channel.sum(1, keepdim=True).expand_as(per_channel)
    return grad_x.flatten(1, 2), per_channel.flatten(), grad_z.sum((0, 2))


# fmt: off
NORMALIZATION = (
    mutant("normalization/RMS norm's second term summed for averaged",
        ("wrong-reduction", "missing-factor"),
        Case(rms_norm, rms_norm_backward, normal((2, 5, 7), (7,))), mistake="summed"),
    written_out("normalization/weight norm's projection lost where the gain is frozen",
        ("needs-input-grad",), lambda: WeightNorm, normal((5, 7), (5,))),
    written_out("normalization/variance as a difference of squares in float32",
        ("wrong-precision",), lambda: QuickLayerNorm, far_from_zero),
    mutant("normalization/projection on x for x / |x|", ("wrong-operand", "missing-factor"),
        Case(on_sphere, on_sphere_backward, normal((5, 7))), classic=True, mistake="x for z"),
    mutant("normalization/local response's neighbouring channels left out",
        ("missing-term", "subset"),
        Case(local_response, local_response_backward, normal((2, 5, 7))),
        mistake="own channel only"),
    mutant("normalization/instance norm's means over the batch too", ("wrong-reduction",),
        Case(instance_norm, instance_norm_backward, normal((3, 2, 5, 7), (2,), (2,))),
        mistake="over the batch too"),
    written_out("normalization/training's formula in eval", ("extra-term", "wrong-operand"),
        lambda: RunningNorm().eval(), normal((5, 3))),
    mutant("normalization/γ multiplied in after the means", ("wrong-operand", "missing-factor"),
        Case(layer_norm, layer_norm_backward, normal((3, 5, 7), (7,), (7,))), classic=True,
        mistake="γ last"),
    mutant("normalization/grad_γ summed over the channels of a group", ("wrong-reduction",),
        Case(group_norm, group_norm_backward, normal((3, 10, 7), (10,), (10,))),
        mistake="one sum a group"),
)
# fmt: on

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


def masked_mean(x, mask):
    """The mean over the steps that count: x (N, T, C), mask (N, T)."""
    return (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def masked_mean_backward(grad_z, z, x, mask, mistake=""):
    count = mask.sum(1)
    if mistake == "divided by T":
        count = torch.full_like(count, x.shape[1])
    return grad_z[:, None] * mask[..., None] / count[:, None, None], None


def of_lengths():
    (x,) = numbers((3, 7, 5))
    return x, torch.arange(7) < torch.tensor([[5], [2], [3]])


class DropConnect(Function):
    """A linear layer, some of whose connections are cut by a mask."""

    @staticmethod
    def forward(ctx, x, weight, mask):
        ctx.save_for_backward(x, weight * mask)
        return x @ (weight * mask).T

    @staticmethod
    def backward(ctx, grad_z):
        x, masked = ctx.saved_tensors
        return grad_z @ masked, grad_z.T @ x, None  # the mask is missing in grad_weight


def with_connections():
    x, weight, chance = numbers((5, 3), (7, 3), (7, 3))
    return x, weight, chance > -0.3


# fmt: off
DROPOUT = (
    written_out("dropout/scaled mask divided by 1 - p again", ("scale",), ChannelDropout,
        normal((5, 7, 3))),
    mutant("dropout/masked mean divided by T in the backward",
        ("wrong-operand", "per-channel-scale"),
        Case(masked_mean, masked_mean_backward, of_lengths), mistake="divided by T"),
    written_out("dropout/mask of the connections missing in grad_weight", ("missing-factor",),
        lambda: DropConnect, with_connections),
)
# fmt: on
