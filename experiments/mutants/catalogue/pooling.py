"""Mistakes in pooling."""

import torch
import torch.nn.functional as F

from mutants.catalogue.dense import Elementwise
from mutants.mutant import Case, layer_of, mutant, normal, numbers


def max_pool(
    kernel: int, stride: int, padding: int = 0, change: Elementwise = torch.clone, size: int = 7
) -> Case:
    @layer_of(
        lambda x: F.max_pool2d(x, kernel, stride, padding),
        lambda: tuple(map(change, numbers((2, 3, size, size)))),
    )
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


def with_ties(x):
    return x.round()


def average_pool(padding: int) -> Case:
    """The mean over what a window of 3 by 3 holds of x, padding not counted."""

    @layer_of(lambda x: F.avg_pool2d(x, 3, 2, padding, count_include_pad=False), (2, 3, 7, 5))
    def average_pooling(grad_z, z, x):
        count = F.unfold(torch.ones_like(x[:1, :1]), 3, 1, padding, 2).sum(1, keepdim=True)
        grad_patches = (grad_z.flatten(2) / count).repeat_interleave(9, 1)
        return (F.fold(grad_patches, x.shape[2:], 3, 1, padding, 2),)

    return average_pooling


def adaptive_pool(length: int) -> Case:
    """Three bins; where 3 does not divide the length they overlap."""

    @layer_of(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, length))
    def adaptive_pooling(grad_z, z, x):
        grad_x = torch.zeros_like(x)
        for i in range(3):
            first, end = i * length // 3, -(-(i + 1) * length // 3)
            grad_x[..., first:end] += grad_z[..., i : i + 1] / (end - first)
        return (grad_x,)

    return adaptive_pooling


GLOBAL_POOL = Case(
    lambda x: x.mean((2, 3)),
    lambda grad_z, z, x: ((grad_z / x[0, 0].numel())[:, :, None, None].expand_as(x),),
    normal((2, 3, 7, 5)),
)

POOLING = (
    mutant("pooling/all ties get the gradient", "extra-term wrong-branch",
        max_pool(2, 2, change=with_ties, size=6), max_pool(2, 2), x=to_all_ties),
    mutant("pooling/index within the window used as index in the plane", "wrong-operand",
        max_pool(2, 2, size=6), max_pool(5, 5, size=5),
        change={"torch.where(inside, row * x.shape[3] + column, 0)": "winner"}),
    mutant("pooling/overlapping windows overwrite each other", "overwritten", max_pool(3, 1),
        max_pool(2, 2), classic=True, change={"scatter_add": "scatter"}),
    mutant("pooling/padding taken for zeros", "wrong-operand wrong-branch",
        max_pool(3, 2, 1, change=lambda x: x - 1), max_pool(3, 2, 1, change=torch.exp),
        change={"-torch.inf": "0.0"}),
    mutant("pooling/average without 1/k²", "scale", average_pool(0), change={" / count": ""}),
    mutant("pooling/padding counted in the divisor", "wrong-operand missing-factor",
        average_pool(1), average_pool(0), change={"/ count": "/ 9"}),
    mutant("pooling/uniform bins in adaptive pooling", "wrong-operand", adaptive_pool(7),
        adaptive_pool(6), classic=True,
        change={"i * length // 3, -(-(i + 1) * length // 3)":
                "i * (length // 3), (i + 1) * (length // 3)"}),
    mutant("pooling/global average divided by one side only", "scale", GLOBAL_POOL,
        GLOBAL_POOL._replace(data=normal((2, 3, 7, 1))), x=lambda at: at.grad_x * at.x.shape[3]),
)  # fmt: skip
