"""Right gradients that are not what autograd does to the letter."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mutants.activation import SIGMOID, Elementwise, elementwise, gelu_tanh_slope
from mutants.convolution import conv, conv_by_patches
from mutants.dense import linear
from mutants.losses import softmax
from mutants.mutant import Case, Mutant, mutant
from mutants.normalization import EPS, batch_norm, dropout
from mutants.pooling import TIES, global_pool, to_all_ties
from mutants.recurrent import lstm


def equivalent(name: str, case: Case, **other: Any) -> Mutant:
    return mutant(name, "", case, **other)


def at_zero(forward: Elementwise, sides: Elementwise, value: float) -> Case:
    """A slope that is `value` where x = 0, on data with many zeros."""
    slope = elementwise(forward, lambda x, a: torch.where(x == 0, value, sides(x)))
    return slope.on(torch.round)


def at_the_bound(value: float) -> Case:
    return elementwise(
        lambda x: x.clamp(-1, 1),
        lambda x, a: torch.where(x.abs() == 1, value, (x.abs() < 1).to(x.dtype)),
    ).on(torch.round)


def step(x):
    return (x > 0).to(x.dtype)


def samples_in_reverse(at):
    total = torch.zeros_like(at.weight)
    for n in reversed(range(len(at.x))):
        total = total + torch.outer(at.grad_z[n], at.x[n])
    return total


def softmax_by_jacobian(at):
    """grad_a (diag(a) − a aᵀ), the matrix written out."""
    jacobian = torch.diag_embed(at.z) - at.z[:, :, None] * at.z[:, None, :]
    return torch.einsum("nk,nkj->nj", at.grad_z, jacobian)


def batch_norm_in_sums(at):
    """γ/(Mσ) (M grad_z − grad_β − x̂ grad_γ) with M values a channel."""
    count = at.x.shape[0] * at.x.shape[2]
    inverse = 1 / torch.sqrt(at.x.var((0, 2), unbiased=False, keepdim=True) + EPS)
    x_hat = (at.x - at.x.mean((0, 2), keepdim=True)) * inverse
    sums = at.grad_beta[:, None] + x_hat * at.grad_gamma[:, None]
    return at.gamma[:, None] * inverse / count * (count * at.grad_z - sums)


EQUIVALENTS: tuple[Mutant, ...] = (
    equivalent("activation/ReLU'(0) = 0", at_zero(F.relu, step, 0.0)),
    equivalent("activation/ReLU'(0) = ½", at_zero(F.relu, step, 0.5)),
    equivalent("activation/ReLU'(0) = 1", at_zero(F.relu, step, 1.0)),
    equivalent("activation/|x|' = 0 at 0", at_zero(torch.abs, torch.sign, 0.0)),
    equivalent("activation/|x|' = 1 at 0", at_zero(torch.abs, torch.sign, 1.0)),
    equivalent("activation/|x|' = -1 at 0", at_zero(torch.abs, torch.sign, -1.0)),
    equivalent("activation/clip's slope 0 at its bounds", at_the_bound(0.0)),
    equivalent("activation/clip's slope 1 at its bounds", at_the_bound(1.0)),
    equivalent("activation/tanh form of GELU, declared",
        elementwise(lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_slope)),
    equivalent("activation/sigmoid's derivative from the input", SIGMOID,
        x=lambda at: at.grad_z / (2 + at.x.exp() + (-at.x).exp())),
    equivalent("pooling/ties to the first", TIES),
    equivalent("pooling/ties to the last", TIES,
        change={"patches.argmax(2)": "kernel * kernel - 1 - patches.flip(2).argmax(2)"}),
    equivalent("pooling/ties share evenly", TIES, x=partial(to_all_ties, shared=True)),
    equivalent("pooling/gradient handed back expanded", global_pool),
    equivalent("linear/samples summed in reverse", linear(5, 3, 7), weight=samples_in_reverse),
    equivalent("linear/samples summed in chunks", linear(5, 3, 7),
        weight=lambda at: at.grad_z[:2].T @ at.x[:2] + at.grad_z[2:].T @ at.x[2:]),
    equivalent("linear/einsum for the matrix product", linear(5, 3, 7),
        x=lambda at: torch.einsum("no,oi->ni", at.grad_z, at.weight),
        weight=lambda at: torch.einsum("no,ni->oi", at.grad_z, at.x)),
    equivalent("convolution/by unfolding and folding", conv_by_patches(1)),
    equivalent("convolution/by the mirrored kernel",
        conv((2, 6, 11, 8), (4, 3, 3, 2), stride=2, padding=1, dilation=2, groups=2)),
    equivalent("loss/softmax without its Jacobian", softmax),
    equivalent("loss/softmax by its Jacobian", softmax, x=softmax_by_jacobian),
    equivalent("normalization/batch norm in means", batch_norm),
    equivalent("normalization/batch norm in sums", batch_norm, x=batch_norm_in_sums),
    equivalent("dropout/mask read off the output", dropout(0.4)),
    equivalent("recurrent/LSTM worked out again from h", lstm),
)  # fmt: skip
