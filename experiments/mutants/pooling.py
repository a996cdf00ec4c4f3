"""Mistakes in pooling and resampling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mutants.mutant import Case, layer, layer_of, mutant, numbers, written_out


def max_pool(kernel: int, stride: int, padding: int = 0, size: int = 7) -> Case:
    @layer_of(lambda x: F.max_pool2d(x, kernel, stride, padding), (2, 3, size, size))
    def max_pooling(grad_z, z, x):
        around = F.pad(x, (padding,) * 4, value=-torch.inf)
        patches = F.unfold(around, kernel, stride=stride).unflatten(1, (x.shape[1], -1))  # nckl
        winner = patches.argmax(2)
        place = torch.arange(z.shape[2] * z.shape[3])
        row = place // z.shape[3] * stride - padding + winner // kernel
        column = place % z.shape[3] * stride - padding + winner % kernel
        inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        index = torch.where(inside, row * x.shape[3] + column, 0)
        grad_x = torch.zeros_like(x).flatten(2)
        return (grad_x.scatter_add(2, index, grad_z.flatten(2) * inside).view_as(x),)

    return max_pooling


def to_all_ties(at, shared=False):
    """The gradient of windows of 2 by 2, given to all that are the largest of theirs, or shared."""
    patches = F.unfold(at.x, 2, stride=2).unflatten(1, (at.x.shape[1], -1))  # nckl
    ties = (patches == at.z.flatten(2)[:, :, None]).to(at.x.dtype)
    share = ties / ties.sum(2, keepdim=True) if shared else ties
    grad_patches = (share * at.grad_z.flatten(2)[:, :, None]).flatten(1, 2)
    return F.fold(grad_patches, at.x.shape[2:], 2, stride=2)


TIES = max_pool(2, 2, size=6).on(torch.round)


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


def average_pool(padding: int) -> Case:
    """The mean over what a window of 3 by 3 holds of x, padding not counted."""

    @layer_of(lambda x: F.avg_pool2d(x, 3, 2, padding, count_include_pad=False), (2, 3, 7, 5))
    def average_pooling(grad_z, z, x):
        count = F.unfold(torch.ones_like(x[:1, :1]), 3, 1, padding, 2).sum(1, keepdim=True)
        grad_patches = (grad_z.flatten(2) / count).repeat_interleave(9, 1)
        return (F.fold(grad_patches, x.shape[2:], 3, 1, padding, 2),)

    return average_pooling


# Means over windows of 3, every 2 steps.
@layer_of(lambda x: F.avg_pool1d(x, 3, stride=2), (2, 3, 11))
def smooth(grad_z, z, x):
    grad_x, share = torch.zeros_like(x), grad_z / 3
    for t in range(share.shape[2]):
        grad_x[..., 2 * t : 2 * t + 3] += share[..., t : t + 1]
    return (grad_x,)


def bins(size: int, count: int) -> list[slice]:
    """Of adaptive pooling; they overlap where the count does not divide the size."""
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def uniform_bins(size: int, count: int) -> list[slice]:
    width = size // count
    return [slice(i * width, (i + 1) * width) for i in range(count)]


@layer_of(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, 7))
def adaptive_in_1d(grad_z, z, x):
    grad_x = torch.zeros_like(x)
    for i, places in enumerate(bins(x.shape[2], 3)):
        grad_x[..., places] += grad_z[..., i : i + 1] / (places.stop - places.start)
    return (grad_x,)


@layer_of(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 3, 7, 5))
def adaptive_in_2d(grad_z, z, x):
    grad_x = torch.zeros_like(x)
    for i, rows in enumerate(bins(x.shape[2], 3)):
        for j, columns in enumerate(bins(x.shape[3], 2)):
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            grad_x[:, :, rows, columns] += (grad_z[:, :, i, j] / area)[..., None, None]
    return (grad_x,)


@layer_of(lambda x: x.mean((2, 3)), (2, 3, 7, 5))
def global_pool(grad_z, z, x):
    return ((grad_z / x[0, 0].numel())[:, :, None, None].expand_as(x),)


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
    mutant("pooling/all ties get the gradient", "extra-term wrong-branch", TIES, max_pool(2, 2),
        x=to_all_ties),
    mutant("pooling/index within the window used as index in the plane", "wrong-operand",
        max_pool(2, 2, size=6), max_pool(5, 5, size=5),
        change={"torch.where(inside, row * x.shape[3] + column, 0)": "winner"}),
    mutant("pooling/overlapping windows overwrite each other", "overwritten", max_pool(3, 1),
        max_pool(2, 2), classic=True, change={"scatter_add": "scatter"}),
    mutant("pooling/padding taken for zeros", "wrong-operand wrong-branch",
        max_pool(3, 2, 1).on(lambda x: x - 1), max_pool(3, 2, 1).on(torch.exp),
        change={"-torch.inf": "0.0"}),
    mutant("pooling/average without 1/k²", "scale", average_pool(0), change={" / count": ""}),
    mutant("pooling/padding counted in the divisor", "wrong-operand missing-factor",
        average_pool(1), average_pool(0), change={"/ count": "/ 9"}),
    mutant("pooling/uniform bins in adaptive pooling", "wrong-operand", adaptive_in_1d,
        adaptive_in_1d.of((2, 3, 6)), classic=True, change={"bins(": "uniform_bins("}),
    mutant("pooling/global average divided by one side only", "scale", global_pool,
        global_pool.of((2, 3, 7, 1)), x=lambda at: at.grad_x * at.x.shape[3]),
)  # fmt: skip
UNSEEN_POOLING = (
    written_out("pooling/place of the maximum kept on self", "stale-state", MaxOverTime, (3, 5, 7)),
    mutant("pooling/average divided by the stride", "scale", smooth, classic=True,
        change={"grad_z / 3": "grad_z / 2"}),
    mutant("pooling/overlapping adaptive bins overwrite each other", "overwritten", adaptive_in_2d,
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
        SubPixel, (2, 12, 5, 3)),
    mutant("pooling/overlapping frames averaged", "wrong-reduction missing-factor", frames,
        change={"grad_z.flatten(1)),)":
                "grad_z.flatten(1)) / torch.bincount(place, minlength=x.shape[1]),)"}),
)  # fmt: skip
