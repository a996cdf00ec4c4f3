"""Mistakes in pooling."""

import torch
import torch.nn.functional as F

from mutants.catalogue.dense import Elementwise
from mutants.mutant import Case, mutant, normal, numbers


def max_pool(
    kernel: int, stride: int, padding: int = 0, change: Elementwise = torch.clone, size: int = 7
) -> Case:
    def max_pooling(x):
        return F.max_pool2d(x, kernel, stride, padding)

    def backward(grad_z, z, x, mistake=""):
        outside = 0.0 if mistake == "padded with zeros" else -torch.inf
        around = F.pad(x, (padding,) * 4, value=outside)
        patches = F.unfold(around, kernel, stride=stride).unflatten(1, (x.shape[1], -1))  # nckl
        grad_z = grad_z.flatten(2)
        if mistake in ("all ties", "ties share"):
            ties = (patches == z.flatten(2)[:, :, None]).to(x.dtype)
            share = ties / ties.sum(2, keepdim=True) if mistake == "ties share" else ties
            grad_patches = (share * grad_z[:, :, None]).flatten(1, 2)
            return (F.fold(grad_patches, x.shape[2:], kernel, 1, padding, stride),)
        winner = patches.argmax(2)
        if mistake == "last tie":
            winner = kernel * kernel - 1 - patches.flip(2).argmax(2)
        place = torch.arange(grad_z.shape[2])
        row = place // z.shape[3] * stride - padding + winner // kernel
        column = place % z.shape[3] * stride - padding + winner % kernel
        inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        index = torch.where(inside, row * x.shape[3] + column, 0)
        if mistake == "local index":
            index = winner
        grad_x = torch.zeros_like(x).flatten(2)
        if mistake == "overlap overwritten":
            grad_x = grad_x.scatter(2, index, grad_z)
        else:
            grad_x = grad_x.scatter_add(2, index, grad_z * inside)
        return (grad_x.view_as(x),)

    return Case(max_pooling, backward, lambda: tuple(map(change, numbers((2, 3, size, size)))))


def with_ties(x):
    return x.round()


def average_pool(padding: int, channels: int = 3) -> Case:
    """The mean over what a window of 3 by 3 holds of x, padding not counted."""

    def average_pooling(x):
        return F.avg_pool2d(x, 3, 2, padding, count_include_pad=False)

    def backward(grad_z, z, x, mistake=""):
        count = F.unfold(torch.ones_like(x[:1, :1]), 3, 1, padding, 2).sum(1, keepdim=True)
        if mistake == "k² at the border":
            count = torch.full_like(count, 9)
        elif mistake == "not divided":
            count = torch.ones_like(count)
        grad_patches = (grad_z.flatten(2) / count).repeat_interleave(9, 1)
        return (F.fold(grad_patches, x.shape[2:], 3, 1, padding, 2),)

    return Case(average_pooling, backward, normal((2, channels, 7, 5)))


def adaptive_pool(length: int) -> Case:
    """Three bins; where 3 does not divide the length they overlap."""

    def adaptive_pooling(x):
        return F.adaptive_avg_pool1d(x, 3)

    def backward(grad_z, z, x, mistake=""):
        grad_x = torch.zeros_like(x)
        for i in range(3):
            first, end = i * length // 3, -(-(i + 1) * length // 3)
            if mistake == "uniform bins":
                first, end = i * (length // 3), (i + 1) * (length // 3)
            grad_x[..., first:end] += grad_z[..., i : i + 1] / (end - first)
        return (grad_x,)

    return Case(adaptive_pooling, backward, normal((2, 3, length)))


GLOBAL_POOL = Case(
    lambda x: x.mean((2, 3)),
    lambda grad_z, z, x: ((grad_z / x[0, 0].numel())[:, :, None, None].expand_as(x),),
    normal((2, 3, 7, 5)),
)


# fmt: off
POOLING = (
    mutant("pooling/all ties get the gradient", ("extra-term", "wrong-branch"),
        max_pool(2, 2, change=with_ties, size=6), max_pool(2, 2), mistake="all ties"),
    mutant("pooling/index within the window used as index in the plane", ("wrong-operand",),
        max_pool(2, 2, size=6), max_pool(5, 5, size=5), mistake="local index"),
    mutant("pooling/overlapping windows overwrite each other", ("overwritten",), max_pool(3, 1),
        max_pool(2, 2), mistake="overlap overwritten", classic=True),
    mutant("pooling/padding taken for zeros", ("wrong-operand", "wrong-branch"),
        max_pool(3, 2, 1, change=lambda x: x - 1), max_pool(3, 2, 1, change=torch.exp),
        mistake="padded with zeros"),
    mutant("pooling/average without 1/k²", ("scale",), average_pool(0), mistake="not divided"),
    mutant("pooling/padding counted in the divisor", ("wrong-operand", "missing-factor"),
        average_pool(1), average_pool(0), mistake="k² at the border"),
    mutant("pooling/uniform bins in adaptive pooling", ("wrong-operand",), adaptive_pool(7),
        adaptive_pool(6), mistake="uniform bins", classic=True),
    mutant("pooling/global average divided by one side only", ("scale",), GLOBAL_POOL,
        GLOBAL_POOL._replace(data=normal((2, 3, 7, 1))), x=lambda at: at.grad_x * at.x.shape[3]),
)
# fmt: on
