"""Gradients of a function easily taken for the one in the forward: which, and in whose place."""

import pytest
import torch
import torch.nn.functional as F
from suspects import double, function
from torch import Tensor
from torch.func import vjp

from nn_backprop import check_gradients


def mistaken(forward, taken_for):
    """The forward of one function, and the backward of another."""

    def backward(ctx, grad_z):
        return vjp(taken_for, *ctx.saved_tensors)[1](grad_z)

    return function(forward, backward)


def masked_sum(x: Tensor) -> Tensor:
    mask = torch.tensor([True, True, False, True, False]).expand_as(x)
    h = x[:, 0].tanh()
    for i in range(1, x.shape[1]):
        h = torch.where(mask[:, i], (h * x[:, i]).sin(), h)
    return h


def unmasked_sum(x: Tensor) -> Tensor:
    """Masked values, and derivatives that know no mask."""
    values = [x[:, 0].tanh()]
    for i in range(1, x.shape[1]):
        running = i in (1, 3)
        values.append((values[-1] * x[:, i]).sin() if running else values[-1])
    h = values[0]
    for i in range(1, x.shape[1]):
        h = (h * x[:, i]).sin()
        h = h + (values[i] - h).detach()
    return h


POOLED = double(2, 3, 6, 6)
EXCHANGED = {  # forward, what its backward is of, the input, kind of cause, a word of its detail
    "GELU": (
        F.gelu, lambda x: F.gelu(x, approximate="tanh"), double(5, 7), "wrong-operand", "tanh form"
    ),
    "transposed convolution": (
        lambda x: F.conv_transpose2d(x, double(3, 3, 3, 3, seed=1), padding=1),
        lambda x: F.conv2d(x, double(3, 3, 3, 3, seed=1), padding=1),
        POOLED, "wrong-operand", "convolution",
    ),
    "adaptive pooling": (
        lambda x: F.adaptive_avg_pool1d(x, 3), lambda x: F.avg_pool1d(x, 2, 2)[..., :3],
        double(2, 3, 7), "wrong-operand", "equal size",
    ),
    "average for maximum": (
        lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), POOLED,
        "wrong-operand", "average pooling",
    ),
    "no maximum": (
        lambda x: F.max_pool2d(x, 2), lambda x: 4 * F.avg_pool2d(x, 2), POOLED,
        "missing-factor", "the sum over each window",
    ),
    "the smallest for the largest": (
        lambda x: F.max_pool2d(x, 2), lambda x: -F.max_pool2d(-x, 2), POOLED,
        "wrong-operand", "smallest",
    ),
    "tiled for repeated": (
        lambda x: F.avg_pool2d(x, 2), lambda x: x.view(2, 3, 2, 3, 2, 3).mean((2, 4)), POOLED,
        "wrong-operand", "tiling",
    ),
    "norm without a mean": (
        lambda x: F.layer_norm(x, [7]), lambda x: F.rms_norm(x, [7], eps=1e-5), double(5, 7),
        "wrong-operand", "rms_norm",
    ),
    "a mask": (masked_sum, unmasked_sum, double(4, 5), "missing-factor", "mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGED)
def test_the_sibling_is_named(name):
    forward, other, x, kind, word = EXCHANGED[name]
    report = check_gradients(mistaken(forward, other), x)
    assert report.verdict == "fail"
    assert report.causes[0].kind == kind
    assert word in report.causes[0].detail
    assert check_gradients(mistaken(forward, forward), x).ok


def test_a_stranger_is_no_sibling():
    report = check_gradients(mistaken(F.gelu, lambda x: (x**3 + 2 * x).sinh()), double(5, 7))
    assert report.verdict == "fail"
    assert [cause.kind for cause in report.causes] == ["unknown"]
