"""Mistakes unseen, in pooling and resampling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.mutant import layer, layer_of, mutant, normal, numbers, written_out


class MaxOverTime(nn.Module):
    """The largest value over time; where it stood is kept on the module, not with the call."""

    class Apply(Function):
        @staticmethod
        def forward(ctx, x, owner):
            values, owner.where = x.max(2, keepdim=True)
            ctx.owner, ctx.shape = owner, x.shape
            return values.squeeze(2)

        @staticmethod
        def backward(ctx, grad_z):
            grad_x = grad_z.new_zeros(ctx.shape)
            return grad_x.scatter(2, ctx.owner.where, grad_z[..., None]), None

    where: Tensor

    def forward(self, x):
        return self.Apply.apply(x, self)


# Means over windows of 3, every 2 steps.
@layer_of(lambda x: F.avg_pool1d(x, 3, stride=2), (2, 3, 11))
def smooth(grad_z, z, x):
    grad_x, share = torch.zeros_like(x), grad_z / 3
    for t in range(share.shape[2]):
        grad_x[..., 2 * t : 2 * t + 3] += share[..., t : t + 1]
    return (grad_x,)


def bins(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


@layer_of(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 3, 7, 5))
def adaptive(grad_z, z, x):
    grad_x = torch.zeros_like(x)
    for i, rows in enumerate(bins(x.shape[2], 3)):
        for j, columns in enumerate(bins(x.shape[3], 2)):
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            grad_x[:, :, rows, columns] += (grad_z[:, :, i, j] / area)[..., None, None]
    return (grad_x,)


# Lp pooling with p = 3 over windows of 3; what is left at the end is not pooled.
@layer_of(lambda x: x.unfold(2, 3, 3).abs().pow(3).sum(-1).pow(1 / 3), (2, 5, 11))
def cubic_mean(grad_z, z, x):
    windows = x.unfold(2, 3, 3)
    slope = windows.abs() ** 2 / z[..., None] ** 2 * windows.sign()
    grad_x = torch.zeros_like(x)
    grad_x[..., : 3 * z.shape[2]] = (grad_z[..., None] * slope).flatten(2)
    return (grad_x,)


# Every pixel four times.
@layer_of(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), (2, 3, 5, 3))
def enlarge(grad_z, z, x):
    n, c, h, w = x.shape
    blocks = grad_z.reshape(n, c, h, 2, w, 2)
    return (blocks.sum((3, 5)),)


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


@layer_of(
    lambda x: F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=True), (2, 2, 3, 5)
)
def bilinear(grad_z, z, x):
    corners = True
    rows = interpolation(x.shape[2], z.shape[2], corners)
    columns = interpolation(x.shape[3], z.shape[3], corners)
    return (torch.einsum("nchw,hi,wj->ncij", grad_z, rows, columns),)


class SubPixel(nn.Module):
    """A pixel shuffle by 2, with a gain for every channel."""

    @staticmethod
    def exchanged(grad_z, z, x):
        blocks = grad_z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # n c h r w s
        return (blocks.permute(0, 1, 5, 3, 2, 4).flatten(1, 3),)  # r before s is right

    Shuffle = layer("Shuffle", lambda x: F.pixel_shuffle(x, 2), exchanged)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(numbers((3, 1, 1), seed=1)[0])

    def forward(self, x):
        return self.Shuffle.apply(x) * self.gain


FRAME, HOP = 5, 2


# Overlapping frames of a signal: (N, frames, FRAME).
@layer_of(lambda x: x.unfold(1, FRAME, HOP).clone(), (3, 11))
def frames(grad_z, z, x):
    place = (torch.arange(z.shape[1])[:, None] * HOP + torch.arange(FRAME)).flatten()
    return (torch.zeros_like(x).index_add(1, place, grad_z.flatten(1)),)


POOLING = (
    written_out("pooling/place of the maximum kept on self", "stale-state", MaxOverTime,
        normal((3, 5, 7))),
    mutant("pooling/average divided by the stride", "scale", smooth, classic=True,
        change={"grad_z / 3": "grad_z / 2"}),
    mutant("pooling/overlapping adaptive bins overwrite each other", "overwritten", adaptive,
        change={"+=": "="}),
    mutant("pooling/Lp pooling without the sign of x", "missing-factor wrong-branch", cubic_mean,
        classic=True, change={" * windows.sign()": ""}),
    mutant("pooling/blocks of the enlarged gradient read as if contiguous", "assumes-contiguous",
        enlarge, classic=True,
        change={"grad_z.reshape(n, c, h, 2, w, 2)":
                "torch.as_strided(grad_z, (n, c, h, 2, w, 2), "
                "(4 * c * h * w, 4 * h * w, 4 * w, 2 * w, 2, 1))"}),
    mutant("pooling/bilinear weights without aligned corners", "wrong-operand", bilinear,
        change={"corners = True": "corners = False"}),
    written_out("pooling/pixel shuffle's sub-rows and sub-columns exchanged", "permuted transposed",
        SubPixel, normal((2, 12, 5, 3))),
    mutant("pooling/overlapping frames averaged", "wrong-reduction missing-factor", frames,
        change={"grad_z.flatten(1)),)":
                "grad_z.flatten(1)) / torch.bincount(place, minlength=x.shape[1]),)"}),
)  # fmt: skip
