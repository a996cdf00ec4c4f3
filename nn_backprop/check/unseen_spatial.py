"""Mistakes for scoring names: convolution, pooling, normalisation, dropout and recurrence.

Each is a right layer with one mistake in its backward, in the manner of `catalogue.py`, and of
another sort than those there. The words that would name a mistake rightly were decided from the
mistake and from the wording of `KINDS`, without a look at what the checker says of it.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop.check.catalogue import Case, Mutant, mutant, normal, numbers, written_out

# --- Convolution --------------------------------------------------------------------------------


class CausalConv(Function):
    """z_t sees x up to t only: the padding is all on the left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        (grad_z,) = grads
        k = weight.shape[2]
        grad_padded = F.conv_transpose1d(grad_z, weight)
        grad_x = grad_padded[..., : x.shape[2]]  # the padding stands on the left, not on the right
        windows = F.pad(x, (k - 1, 0)).unfold(2, k, 1)
        return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


MULTIPLIER = 2


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Every channel has kernels of its own, `MULTIPLIER` of them."""
    return F.conv2d(x, weight, groups=x.shape[1])


def depthwise_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for o in range(len(weight)):
        c = o // MULTIPLIER
        back = F.conv_transpose2d(grad_z[:, o : o + 1], weight[o : o + 1])[:, 0]
        if mistake == "set, not added":
            grad_x[:, c] = back
        else:
            grad_x[:, c] += back
        grad_weight[o, 0] = torch.einsum("nhw,nhwpq->pq", grad_z[:, o], windows[:, c])
    return grad_x, grad_weight


def ring(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution on a circle."""
    p = weight.shape[2] // 2
    return F.conv1d(F.pad(x, (p, p), mode="circular"), weight)


def ring_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    k = weight.shape[2]
    p = k // 2
    grad_padded = F.conv_transpose1d(grad_z, weight)
    grad_x = grad_padded[..., p:-p].clone()
    if mistake != "cropped only":
        grad_x[..., -p:] += grad_padded[..., :p]
        grad_x[..., :p] += grad_padded[..., -p:]
    windows = F.pad(x, (p, p), mode="circular").unfold(2, k, 1)
    return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


class MirrorConv(Function):
    """A convolution whose border is padded by reflection, the edge itself not repeated."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        p = weight.shape[2] // 2
        return F.conv1d(F.pad(x, (p, p), mode="reflect"), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        k, p = weight.shape[2], weight.shape[2] // 2
        grad_padded = F.conv_transpose1d(grads[0], weight)
        grad_x = grad_padded[..., p:-p].clone()
        grad_x[..., :p] += grad_padded[..., :p].flip(-1)  # one place off: the edge has no image
        grad_x[..., -p:] += grad_padded[..., -p:].flip(-1)
        windows = F.pad(x, (p, p), mode="reflect").unfold(2, k, 1)
        return grad_x, torch.einsum("not,nctk->ock", grads[0], windows)


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(x, weight, groups=2)


def grouped_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    grads_x, grads_weight = [], []
    windows = x.unfold(2, weight.shape[2], 1)
    parts = zip(grad_z.chunk(2, 1), weight.chunk(2), windows.chunk(2, 1), strict=True)
    for grad_part, weight_part, window in parts:
        grads_x.append(F.conv_transpose1d(grad_part, weight_part))
        grads_weight.append(torch.einsum("not,nctk->ock", grad_part, window))
    axis = 2 if mistake == "stacked behind the channels" else 1
    return torch.stack(grads_x, axis).flatten(1, 2), torch.cat(grads_weight)


def strided(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, stride=2)


def strided_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    """grad_weight is x convolved with grad_z, the stride of the forward being its dilation."""
    stride, dilation = (2, 1) if mistake == "stride kept a stride" else (1, 2)
    grad_weight = F.conv2d(
        x.transpose(0, 1), grad_z.transpose(0, 1), stride=stride, dilation=dilation
    ).transpose(0, 1)
    grad_weight = grad_weight[..., : weight.shape[2], : weight.shape[3]]
    return F.conv_transpose2d(grad_z, weight, stride=2), grad_weight


class Upscale(nn.Module):
    """A transposed convolution with as many channels out as in."""

    class Apply(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return F.conv_transpose1d(x, weight, stride=2)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            (grad_z,) = grads
            windows = grad_z.unfold(2, weight.shape[2], 2)
            # weight is (in, out, k) here, unlike a plain convolution's
            grad_weight = torch.einsum("nct,notk->ock", x, windows)
            return F.conv1d(grad_z, weight, stride=2), grad_weight

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers((5, 5, 3), seed=1)[0])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Apply.apply(x, self.weight))


def locally_connected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A kernel of its own at every position: weight (T, O, C, k)."""
    windows = x.unfold(2, weight.shape[3], 1)
    return torch.einsum("nctk,tock->not", windows, weight) + bias


def locally_connected_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    k = weight.shape[3]
    grad_windows = torch.einsum("not,tock->nctk", grad_z, weight)
    grad_x = torch.zeros_like(x)
    for t in range(z.shape[2]):
        grad_x[..., t : t + k] += grad_windows[:, :, t]
    grad_weight = torch.einsum("not,nctk->tock", grad_z, x.unfold(2, k, 1))
    return grad_x, grad_weight, grad_z.sum(0)


class ConvRelu(Function):
    """Convolution and ReLU in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        a = F.conv2d(x, weight, bias).clamp(min=0)
        ctx.save_for_backward(x, weight, a)
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, a = ctx.saved_tensors
        (grad_a,) = grads
        grad_bias = grad_a.sum((0, 2, 3))  # before the mask
        grad_z = grad_a * (a > 0)
        windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
        grad_weight = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
        return F.conv_transpose2d(grad_z, weight), grad_weight, grad_bias


def true_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """What mathematicians call a convolution: the kernel mirrored."""
    return F.conv2d(x, weight.flip(2, 3))


def true_convolution_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, weight: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_mirrored = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
    axes = [2] if mistake == "rows only" else [2, 3]
    return F.conv_transpose2d(grad_z, weight.flip(2, 3)), grad_mirrored.flip(axes)


# fmt: off
CONVOLUTION = (
    written_out("convolution/causal convolution cropped on the wrong side", ("shifted",),
        lambda: CausalConv, normal((2, 3, 11), (5, 3, 3))),
    mutant("convolution/depthwise kernels of one channel overwrite each other",
        ("overwritten", "subset"),
        Case(depthwise, depthwise_backward, normal((2, 3, 7, 5), (6, 1, 3, 2))),
        mistake="set, not added"),
    mutant("convolution/gradient of the circular padding dropped", ("missing-term", "subset"),
        Case(ring, ring_backward, normal((2, 3, 7), (3, 3, 5))), mistake="cropped only"),
    written_out("convolution/reflected border folded back on the edge",
        ("shifted", "wrong-operand"), lambda: MirrorConv, normal((2, 3, 7), (3, 3, 5))),
    mutant("convolution/grad_x's groups interleaved", ("permuted",),
        Case(grouped, grouped_backward, normal((2, 6, 7), (4, 3, 3))), classic=True,
        mistake="stacked behind the channels"),
    mutant("convolution/grad_weight slides by the stride instead of dilating by it",
        ("wrong-operand",), Case(strided, strided_backward, normal((2, 2, 11, 7), (5, 2, 3, 3))),
        mistake="stride kept a stride"),
    written_out("convolution/transposed convolution's grad_weight as out by in", ("transposed",),
        Upscale, normal((3, 5, 7))),
    mutant("convolution/locally connected kernels' gradient shared", ("wrong-reduction",),
        Case(locally_connected, locally_connected_backward,
             normal((3, 2, 7), (5, 3, 2, 3), (3, 5))),
        weight=lambda at: at.grad_weight.sum(0, keepdim=True).repeat(len(at.weight), 1, 1, 1)),
    written_out("convolution/fused ReLU's mask missing in grad_bias",
        ("missing-factor", "wrong-operand"), lambda: ConvRelu,
        normal((2, 3, 7, 5), (5, 3, 3, 2), (5,))),
    mutant("convolution/mirrored kernel's gradient mirrored back along one axis", ("flipped",),
        Case(true_convolution, true_convolution_backward, normal((2, 3, 7, 5), (5, 3, 2, 3))),
        classic=True, mistake="rows only"),
)
# fmt: on

# --- Pooling and resampling ---------------------------------------------------------------------


class MaxOverTime(nn.Module):
    """The largest value over time; where it stood is kept on the module, not with the call."""

    class Apply(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, owner: "MaxOverTime") -> Tensor:
            values, owner.where = x.max(2, keepdim=True)
            ctx.owner, ctx.shape = owner, x.shape
            return values.squeeze(2)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            grad_x = grads[0].new_zeros(ctx.shape)
            return grad_x.scatter(2, ctx.owner.where, grads[0][..., None]), None

    where: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Apply.apply(x, self))


class Smooth(Function):
    """Means over windows of 3, every 2 steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.avg_pool1d(x, 3, stride=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_x = grads[0].new_zeros(ctx.shape)
        share = grads[0] / 2  # the stride for the size
        for t in range(share.shape[2]):
            grad_x[..., 2 * t : 2 * t + 3] += share[..., t : t + 1]
        return grad_x


def bins(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def adaptive(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, (3, 2))


def adaptive_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    grad_x = torch.zeros_like(x)
    for i, rows in enumerate(bins(x.shape[2], 3)):
        for j, columns in enumerate(bins(x.shape[3], 2)):
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = (grad_z[:, :, i, j] / area)[..., None, None]
            if mistake == "set, not added":
                grad_x[:, :, rows, columns] = share
            else:
                grad_x[:, :, rows, columns] += share
    return (grad_x,)


def cubic_mean(x: Tensor) -> Tensor:
    """Lp pooling with p = 3 over windows of 3; what is left at the end is not pooled."""
    return x.unfold(2, 3, 3).abs().pow(3).sum(-1).pow(1 / 3)


def cubic_mean_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    windows = x.unfold(2, 3, 3)
    slope = windows.abs() ** 2 / z[..., None] ** 2
    if mistake != "no sign":
        slope = slope * windows.sign()
    grad_x = torch.zeros_like(x)
    grad_x[..., : 3 * z.shape[2]] = (grad_z[..., None] * slope).flatten(2)
    return (grad_x,)


class Enlarge(Function):
    """Every pixel four times; the backward sums blocks of 2 by 2 where it believes them to lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        n, c, h, w = ctx.shape
        sizes, strides = (n, c, h, 2, w, 2), (4 * c * h * w, 4 * h * w, 4 * w, 2 * w, 2, 1)
        return torch.as_strided(grads[0], sizes, strides).sum((3, 5))


def interpolation(size: int, out: int, corners: bool) -> Tensor:
    """The matrix (out, size) of linear interpolation."""
    place = torch.arange(out, dtype=torch.float64)
    if corners:
        place = place * (size - 1) / (out - 1)
    else:
        place = ((place + 0.5) * size / out - 0.5).clamp(min=0)
    distance = (place[:, None] - torch.arange(size)).abs()
    near = (1 - distance).clamp(min=0)
    return near / near.sum(1, keepdim=True)


def bilinear(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=True)


def bilinear_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    corners = mistake != "corners not aligned"
    rows = interpolation(x.shape[2], z.shape[2], corners)
    columns = interpolation(x.shape[3], z.shape[3], corners)
    return (torch.einsum("nchw,hi,wj->ncij", grad_z, rows, columns),)


class SubPixel(nn.Module):
    """A pixel shuffle by 2, with a gain for every channel."""

    class Shuffle(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return F.pixel_shuffle(x, 2)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            blocks = grads[0].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # n c h r w s
            return blocks.permute(0, 1, 5, 3, 2, 4).flatten(1, 3)  # r before s is right

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(numbers((3, 1, 1), seed=1)[0])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Shuffle.apply(x)) * self.gain


FRAME, HOP = 5, 2


def frames(x: Tensor) -> Tensor:
    """Overlapping frames of a signal: (N, frames, FRAME)."""
    return x.unfold(1, FRAME, HOP).clone()


def frames_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    place = (torch.arange(z.shape[1])[:, None] * HOP + torch.arange(FRAME)).flatten()
    grad_x = torch.zeros_like(x).index_add(1, place, grad_z.flatten(1))
    if mistake == "overlap averaged":
        grad_x = grad_x / torch.bincount(place, minlength=x.shape[1])
    return (grad_x,)


# fmt: off
POOLING = (
    written_out("pooling/place of the maximum kept on self", ("stale-state",), MaxOverTime,
        normal((3, 5, 7))),
    written_out("pooling/average divided by the stride", ("scale",), lambda: Smooth,
        normal((2, 3, 11))),
    mutant("pooling/overlapping adaptive bins overwrite each other", ("overwritten",),
        Case(adaptive, adaptive_backward, normal((2, 3, 7, 5))), mistake="set, not added"),
    mutant("pooling/Lp pooling without the sign of x", ("missing-factor", "wrong-branch"),
        Case(cubic_mean, cubic_mean_backward, normal((2, 5, 11))), mistake="no sign",
        classic=True),
    written_out("pooling/blocks of the enlarged gradient read as if contiguous",
        ("assumes-contiguous",), lambda: Enlarge, normal((2, 3, 5, 3))),
    mutant("pooling/bilinear weights without aligned corners", ("wrong-operand",),
        Case(bilinear, bilinear_backward, normal((2, 2, 3, 5))), mistake="corners not aligned"),
    written_out("pooling/pixel shuffle's sub-rows and sub-columns exchanged",
        ("permuted", "transposed"), SubPixel, normal((2, 12, 5, 3))),
    mutant("pooling/overlapping frames averaged", ("wrong-reduction", "missing-factor"),
        Case(frames, frames_backward, normal((3, 11))), mistake="overlap averaged"),
)
# fmt: on

# --- Normalisation ------------------------------------------------------------------------------

EPS = 0.01


def standardise(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x̂ and 1/σ."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = (variance + EPS).rsqrt()
    return (x - mean) * inverse, inverse


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma


def rms_norm_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, mistake: str = ""
) -> tuple[Tensor, Tensor]:
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
    def forward(ctx: Any, v: Tensor, gain: Tensor) -> Tensor:
        length = v.norm(dim=1, keepdim=True)
        ctx.save_for_backward(v / length, gain / length.squeeze(1))
        return gain[:, None] * v / length

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        direction, ratio = ctx.saved_tensors
        grad_v, grad_gain = grads[0], None
        if ctx.needs_input_grad[1]:
            grad_gain = (grads[0] * direction).sum(1)
            grad_v = grad_v - direction * grad_gain[:, None]  # a frozen gain needs it as well
        return ratio[:, None] * grad_v, grad_gain


class QuickLayerNorm(Function):
    """Layer normalisation; the backward takes E[x²] − E[x]² for the variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma)
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt() * gamma

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, gamma = ctx.saved_tensors
        mean = x.mean(1, keepdim=True)
        variance = x.square().mean(1, keepdim=True) - mean.square()  # cancels in float32
        inverse = (variance + EPS).rsqrt()
        x_hat = (x - mean) * inverse
        u = grads[0] * gamma
        along = (u * x_hat).mean(1, keepdim=True)
        grad_x = inverse * (u - u.mean(1, keepdim=True) - x_hat * along)
        return grad_x, (grads[0] * x_hat).sum(0)


def far_from_zero() -> tuple[Tensor, Tensor]:
    x, gamma = numbers((5, 7), (7,))
    return (x + 500).float(), gamma.float()


def on_sphere(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def on_sphere_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    ray = x if mistake == "x for z" else z
    return ((grad_z - ray * (grad_z * ray).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True),)


ALPHA, BETA = 0.5, 0.75


def neighbours(channels: int) -> Tensor:
    place = torch.arange(channels)
    return ((place[:, None] - place).abs() <= 1).to(torch.float64)


def local_response(x: Tensor) -> Tensor:
    """x_c / s_c^β, s_c = 1 + α Σ x² over the channel and its two neighbours."""
    s = 1 + ALPHA * torch.einsum("dc,nct->ndt", neighbours(x.shape[1]), x**2)
    return x * s**-BETA


def local_response_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = ""
) -> tuple[Tensor]:
    near = neighbours(x.shape[1])
    s = 1 + ALPHA * torch.einsum("dc,nct->ndt", near, x**2)
    if mistake == "own channel only":
        near = torch.eye(x.shape[1], dtype=x.dtype)
    grad_s = -BETA * grad_z * x * s ** (-BETA - 1)
    return (grad_z * s**-BETA + 2 * ALPHA * x * torch.einsum("dc,ndt->nct", near, grad_s),)


def instance_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=EPS)


def instance_norm_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
    x_hat, inverse = standardise(x, (2, 3))
    over = (0, 2, 3) if mistake == "over the batch too" else (2, 3)
    u = grad_z * gamma[:, None, None]
    grad_x = u - u.mean(over, keepdim=True) - x_hat * (u * x_hat).mean(over, keepdim=True)
    return inverse * grad_x, (grad_z * x_hat).sum((0, 2, 3)), grad_z.sum((0, 2, 3))


class RunningNorm(nn.Module):
    """Batch normalisation with running statistics, whose backward does not ask for the mode."""

    class Apply(Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, running: tuple[Tensor, Tensor] | None
        ) -> Tensor:
            mean, variance = running or (x.mean(0), x.var(0, correction=0))
            inverse = (variance + EPS).rsqrt()
            x_hat = (x - mean) * inverse
            ctx.save_for_backward(x_hat, inverse, gamma)
            return x_hat * gamma + beta

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            x_hat, inverse, gamma = ctx.saved_tensors
            u = grads[0] * gamma
            grad_x = inverse * (u - u.mean(0) - x_hat * (u * x_hat).mean(0))
            return grad_x, (grads[0] * x_hat).sum(0), grads[0].sum(0), None

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        gamma, beta, mean, spread = numbers((3,), (3,), (3,), (3,), seed=1)
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(beta)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_variance", 1 + spread**2)

    def forward(self, x: Tensor) -> Tensor:
        running = None if self.training else (self.running_mean, self.running_variance)
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
            self.running_variance.lerp_(x.detach().var(0), 0.1)
        return cast(Tensor, self.Apply.apply(x, self.gamma, self.beta, running))


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[2:], gamma, beta, eps=EPS)


def layer_norm_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
    x_hat, inverse = standardise(x, (2,))

    def centre(u: Tensor) -> Tensor:
        return u - u.mean(2, keepdim=True) - x_hat * (u * x_hat).mean(2, keepdim=True)

    if mistake == "γ last":
        grad_x = inverse * gamma * centre(grad_z)
    else:
        grad_x = inverse * centre(grad_z * gamma)
    return grad_x, (grad_z * x_hat).sum((0, 1)), grad_z.sum((0, 1))


GROUPS = 2


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, gamma, beta, eps=EPS)


def group_norm_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mistake: str = ""
) -> tuple[Tensor, ...]:
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
        def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
            mask = (torch.rand(x.shape[:2], dtype=x.dtype)[..., None] >= p) / (1 - p)
            ctx.save_for_backward(mask)
            ctx.p = p
            return x * mask

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            (mask,) = ctx.saved_tensors
            return grads[0] * mask / (1 - ctx.p), None  # divided again

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Apply.apply(x, 0.3)) if self.training else x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the steps that count: x (N, T, C), mask (N, T)."""
    return (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def masked_mean_backward(
    grad_z: Tensor, z: Tensor, x: Tensor, mask: Tensor, mistake: str = ""
) -> tuple[Tensor, None]:
    count = mask.sum(1)
    if mistake == "divided by T":
        count = torch.full_like(count, x.shape[1])
    return grad_z[:, None] * mask[..., None] / count[:, None, None], None


def of_lengths() -> tuple[Tensor, Tensor]:
    (x,) = numbers((3, 7, 5))
    return x, torch.arange(7) < torch.tensor([[5], [2], [3]])


class DropConnect(Function):
    """A linear layer, some of whose connections are cut by a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight * mask)
        return x @ (weight * mask).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, masked = ctx.saved_tensors
        return grads[0] @ masked, grads[0].T @ x, None  # the mask is missing in grad_weight


def with_connections() -> tuple[Tensor, ...]:
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

# --- Recurrent ----------------------------------------------------------------------------------


class DiagonalScan(Function):
    """h_t = decay_t h_(t−1) + x_t; the backward runs the same scan within the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor) -> Tensor:
        states = [x[:, 0]]
        for t in range(1, x.shape[1]):
            states.append(decay[:, t] * states[-1] + x[:, t])
        h = torch.stack(states, 1)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        decay, h = ctx.saved_tensors
        grad_h = grads[0]  # a clone is missing here
        for t in reversed(range(h.shape[1] - 1)):
            grad_h[:, t] += decay[:, t + 1] * grad_h[:, t + 1]
        grad_decay = torch.zeros_like(decay)
        grad_decay[:, 1:] = grad_h[:, 1:] * h[:, :-1]
        return grad_decay, grad_h.clone()


def running_sum(x: Tensor) -> Tensor:
    return x.cumsum(1)


def running_sum_backward(grad_z: Tensor, z: Tensor, x: Tensor, mistake: str = "") -> tuple[Tensor]:
    later = grad_z.sum(1, keepdim=True) - grad_z.cumsum(1)
    return (later if mistake == "later steps only" else later + grad_z,)


def gru_gates(x_t: Tensor, h: Tensor, weight_x: Tensor, weight_h: Tensor) -> tuple[Tensor, ...]:
    """r, u, n and what r multiplies."""
    r_x, u_x, n_x = (x_t @ weight_x.T).chunk(3, 1)
    r_h, u_h, n_h = (h @ weight_h.T).chunk(3, 1)
    r, u = torch.sigmoid(r_x + r_h), torch.sigmoid(u_x + u_h)
    return r, u, torch.tanh(n_x + r * n_h), n_h


def gru(x: Tensor, h0: Tensor, weight_x: Tensor, weight_h: Tensor) -> Tensor:
    """h_t = (1 − u) n + u h_(t−1), n = tanh(… + r weight_n h_(t−1))."""
    h, states = h0, []
    for x_t in x.unbind(1):
        _, u, n, _ = gru_gates(x_t, h, weight_x, weight_h)
        h = (1 - u) * n + u * h
        states.append(h)
    return torch.stack(states, 1)


def gru_backward(
    grad_z: Tensor,
    z: Tensor,
    x: Tensor,
    h0: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    mistake: str = "",
) -> tuple[Tensor, ...]:
    carry, grad_x = torch.zeros_like(h0), torch.zeros_like(x)
    grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
    for t in reversed(range(x.shape[1])):
        before = z[:, t - 1] if t else h0
        r, u, n, n_h = gru_gates(x[:, t], before, weight_x, weight_h)
        grad_h = grad_z[:, t] + carry
        difference = n - before if mistake == "n - h" else before - n
        grad_u = grad_h * difference * u * (1 - u)
        grad_n = grad_h * (1 - u) * (1 - n**2)
        grad_r = grad_n * n_h * r * (1 - r)
        by_x = torch.cat([grad_r, grad_u, grad_n], 1)
        by_h = by_x if mistake == "no r" else torch.cat([grad_r, grad_u, grad_n * r], 1)
        grad_x[:, t] = by_x @ weight_x
        grad_weight_x += by_x.T @ x[:, t]
        grad_weight_h += by_h.T @ before
        carry = grad_h * u + by_h @ weight_h
    return grad_x, carry, grad_weight_x, grad_weight_h


GRU = Case(gru, gru_backward, normal((3, 7, 2), (3, 5), (15, 2), (15, 5)))


class Elman(nn.Module):
    """h_t = tanh(weight_x x_t + weight_h h_(t−1)) from h_0 = start."""

    class Unroll(Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, start: Tensor, weight_x: Tensor, weight_h: Tensor
        ) -> Tensor:
            states = [start.expand(len(x), -1)]
            for x_t in x.unbind(1):
                states.append(torch.tanh(x_t @ weight_x.T + states[-1] @ weight_h.T))
            h = torch.stack(states, 1)
            ctx.save_for_backward(x, h, weight_x, weight_h)
            return h[:, 1:]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            x, h, weight_x, weight_h = ctx.saved_tensors
            grad_x, carry = torch.zeros_like(x), torch.zeros_like(h[:, 0])
            grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
            for t in range(x.shape[1] - 1, 0, -1):  # ends at step 1 and leaves out step 0
                grad_a = (grads[0][:, t] + carry) * (1 - h[:, t + 1] ** 2)
                grad_x[:, t] = grad_a @ weight_x
                grad_weight_x += grad_a.T @ x[:, t]
                grad_weight_h += grad_a.T @ h[:, t]
                carry = grad_a @ weight_h
            return grad_x, carry.sum(0), grad_weight_x, grad_weight_h

    def __init__(self) -> None:
        super().__init__()
        start, weight_x, weight_h = numbers((5,), (5, 2), (5, 5), seed=1)
        self.start = nn.Parameter(start)
        self.weight_x, self.weight_h = nn.Parameter(weight_x), nn.Parameter(weight_h / 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Unroll.apply(x, self.start, self.weight_x, self.weight_h))


def unrolled(x: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
    """h_t = tanh(weight x_t + decay · h_(t−1)), every unit with a decay of its own."""
    h, states = torch.zeros_like(x[:, 0] @ weight.T), []
    for x_t in x.unbind(1):
        h = torch.tanh(x_t @ weight.T + decay * h)
        states.append(h)
    return torch.stack(states, 1)


def unrolled_backward(
    grad_h: Tensor, h: Tensor, x: Tensor, weight: Tensor, decay: Tensor
) -> tuple[Tensor, ...]:
    grads_a: list[Tensor] = []
    carry = torch.zeros_like(h[:, 0])
    for t in reversed(range(h.shape[1])):
        grads_a.insert(0, (grad_h[:, t] + carry) * (1 - h[:, t] ** 2))
        carry = grads_a[0] * decay
    grad_a = torch.stack(grads_a, 1)
    grad_decay = (grad_a[:, 1:] * h[:, :-1]).sum((0, 1))
    return grad_a @ weight, torch.einsum("nto,nti->oi", grad_a, x), grad_decay


def both_ways(
    x: Tensor, weight: Tensor, decay: Tensor, weight_2: Tensor, decay_2: Tensor
) -> Tensor:
    """The states of both directions side by side."""
    there = unrolled(x, weight, decay)
    return torch.cat([there, unrolled(x.flip(1), weight_2, decay_2).flip(1)], 2)


def both_ways_backward(
    grad_z: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    decay: Tensor,
    weight_2: Tensor,
    decay_2: Tensor,
    mistake: str = "",
) -> tuple[Tensor, ...]:
    sizes = [len(weight), len(weight_2)]
    (grad_1, grad_2), (h_1, h_2) = grad_z.split(sizes, 2), z.split(sizes, 2)
    grad_x, *grads_there = unrolled_backward(grad_1, h_1, x, weight, decay)
    grad_back, *grads_back = unrolled_backward(
        grad_2.flip(1), h_2.flip(1), x.flip(1), weight_2, decay_2
    )
    grad_back = grad_back.flip(1)
    grad_x = grad_back if mistake == "second direction only" else grad_x + grad_back
    return grad_x, *grads_there, *grads_back


# fmt: off
RECURRENT = (
    written_out("recurrent/scan runs within the upstream gradient", ("mutates-input",),
        lambda: DiagonalScan, normal((3, 5, 2), (3, 5, 2))),
    mutant("recurrent/cumulative sum's own step left out", ("missing-term", "shifted"),
        Case(running_sum, running_sum_backward, normal((3, 7, 2))), mistake="later steps only"),
    mutant("recurrent/n - h for h - n in the GRU's update gate", ("sign",), GRU,
        mistake="n - h"),
    mutant("recurrent/reset gate missing on the GRU's way to h", ("missing-factor",), GRU,
        classic=True, mistake="no r"),
    written_out("recurrent/first step left out of the loop", ("subset",), Elman,
        normal((3, 7, 2))),
    mutant("recurrent/grad_x of the second direction overwrites the first's",
        ("overwritten", "missing-term"),
        Case(both_ways, both_ways_backward, normal((3, 7, 2), (3, 2), (3,), (5, 2), (5,))),
        mistake="second direction only"),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *CONVOLUTION,
    *POOLING,
    *NORMALIZATION,
    *DROPOUT,
    *RECURRENT,
)
