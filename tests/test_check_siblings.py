"""Gradients of a function easily taken for the one in the forward: which, and in whose place."""

import pytest
import torch
import torch.nn.functional as F
from suspects import double, expect, function
from torch import Tensor
from torch.func import vjp

from nn_backprop import check_gradients


def mistaken(forward, taken_for):
    """The forward of one function, and the backward of another."""
    return function(forward, lambda grad_z, x: vjp(taken_for, x)[1](grad_z))


def masked_sum(x: Tensor) -> Tensor:
    mask = torch.tensor([True, True, False, True, False]).expand_as(x)
    h = x[:, 0].tanh()
    for i in range(1, x.shape[1]):
        h = torch.where(mask[:, i], (h * x[:, i]).sin(), h)
    return h


def unmasked_sum(x: Tensor) -> Tensor:
    """Masked values, and derivatives that know no mask."""
    h = value = x[:, 0].tanh()
    for i in range(1, x.shape[1]):
        value = (value * x[:, i]).sin() if i in (1, 3) else value
        h = (h * x[:, i]).sin()
        h = h + (value - h).detach()
    return h


def interleaved(x: Tensor, groups: int) -> Tensor:
    """Channels k, k + groups, … one after another."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)


POOLED, KERNEL = double(2, 3, 6, 6), double(4, 3, 3, 2, seed=1)
LABELS, CLASS_WEIGHTS = torch.tensor([0, 2, 1, 1, 2]), torch.tensor([0.5, 2.0, 3.0]).double()
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
    "a maximum among zeros": (
        lambda x: F.max_pool2d(x - 1, 3, 2, 1),
        lambda x: F.max_pool2d(F.pad(x - 1, (1, 1, 1, 1)), 3, 2), POOLED,
        "wrong-operand", "zeros around",
    ),
    "groups that leak": (
        lambda x: F.conv2d(x, KERNEL, groups=2),
        lambda x: F.conv2d(x, KERNEL.repeat(1, 2, 1, 1)), double(2, 6, 5, 7),
        "extra-term", "all groups",
    ),
    "groups interleaved": (
        lambda x: F.group_norm(x, 2),
        lambda x: interleaved(F.group_norm(interleaved(x, 2), 2), 3), double(5, 6, 7),
        "permuted", "interleaved",
    ),
    "another padding": (
        lambda x: F.pad(x, (2, 2), "circular"), lambda x: F.pad(x, (2, 2), "reflect"),
        double(2, 3, 7), "wrong-operand", "padding of mode reflect",
    ),
    "another interpolation": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), POOLED,
        "wrong-operand", "align_corners=True",
    ),
    "class weights left out": (
        lambda x: F.cross_entropy(x, LABELS, CLASS_WEIGHTS, reduction="none"),
        lambda x: F.cross_entropy(x, LABELS, reduction="none"), double(5, 3),
        "missing-factor", "",
    ),
    "label smoothing left out": (
        lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.2),
        lambda x: F.cross_entropy(x, LABELS), double(5, 3), "missing-term", "",
    ),
    "attention scaled twice": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x.flip(1), x**2),
        lambda x: F.scaled_dot_product_attention(x, 2 * x.flip(1), x**2, scale=1 / 7),
        double(2, 5, 7), "wrong-operand", "1/d",
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
    report = expect("fail", mistaken(forward, other), x, kind=kind)
    assert word in report.causes[0].detail, report


def test_each_with_its_own_backward_passes():
    for name, (forward, _, x, *_) in EXCHANGED.items():
        assert check_gradients(mistaken(forward, forward), x).ok, name


def test_the_place_within_a_window_is_no_place_in_the_plane():
    def backward(grad_z, x):
        windows = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        within = windows.argmax(4).flatten(2)
        return torch.zeros_like(x).flatten(2).scatter_add(2, within, grad_z.flatten(2)).view_as(x)

    pool = function(lambda x: F.max_pool2d(x, 2), backward)
    report = expect("fail", pool, POOLED, kind="wrong-operand")
    assert "within the window" in report.causes[0].detail


def test_a_stranger_is_no_sibling():
    report = expect("fail", mistaken(F.gelu, lambda x: (x**3 + 2 * x).sinh()), double(5, 7))
    assert [cause.kind for cause in report.causes] == ["unknown"]
