"""Every rule with options, at sizes, strides, borders and memory layouts drawn at random."""

from collections.abc import Callable

import comparison as check
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case, constant, labels, positive, shares, x
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes

# torch and therefore the rule say that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SIDE = st.integers(1, 4)
LAYOUT = st.sampled_from(["strided", "transposed", "offset"])


def agrees(function: Callable, args: tuple, kwargs: dict, layout: str) -> None:
    note = ""  # the seed depends on it
    case = Case(function, args, kwargs, note)
    check.matches_autograd(case)
    played = check.play(
        case, upstream_layout=check.LAYOUTS[layout], input_layout=check.LAYOUTS[layout]
    )
    check.all_close(played.grads, check.play(case).grads)


@st.composite
def images(draw, kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]):
    """H and W for which the output has at least one place."""
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    return tuple(n + draw(st.integers(0, 4)) for n in least)


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
BATCH = st.sampled_from([(), (1,), (2,), (3,)])


@given(st.data(), BATCH, PAIR, PAIR, PAIR, SIDE, SIDE, st.integers(1, 3), st.booleans(), LAYOUT)
def test_conv2d_of_any_size(data, N, kernel, stride, dilation, C, O, groups, biased, layout):  # noqa: E741
    padding = data.draw(
        st.sampled_from(["valid", "same"] if stride == (1, 1) else ["valid"])
        | st.tuples(st.integers(0, 3), st.integers(0, 3))
    )
    border = padding if isinstance(padding, tuple) else (0, 0)
    H, W = data.draw(images(kernel, border, dilation))
    image, weight = x(*N, groups * C, H, W), x(groups * O, C, *kernel)
    bias = x(groups * O) if biased else None
    agrees(F.conv2d, (image, weight, bias, stride, padding, dilation, groups), {}, layout)


@given(st.data(), BATCH, PAIR, st.none() | PAIR, PAIR, SIDE, st.booleans(), LAYOUT)
def test_max_pool2d_of_any_size(data, N, kernel, stride, dilation, C, ceil, layout):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    H, W = data.draw(images(kernel, padding, dilation))
    args = (x(*N, C, H, W), kernel, stride, padding, dilation, ceil)
    agrees(F.max_pool2d, args, {}, layout)


@given(st.data(), BATCH, PAIR, st.none() | PAIR, SIDE, st.booleans(), st.booleans(),
       st.none() | st.integers(1, 5), LAYOUT)  # fmt: skip
def test_avg_pool2d_of_any_size(data, N, kernel, stride, C, ceil, count_border, divisor, layout):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    H, W = data.draw(images(kernel, padding, (1, 1)))
    args = (x(*N, C, H, W), kernel, stride, padding, ceil, count_border, divisor)
    agrees(F.avg_pool2d, args, {}, layout)


@given(BATCH.filter(bool), SIDE, SIDE, SIDE, st.tuples(st.integers(1, 9), st.integers(1, 9)),
       st.sampled_from([None, 0.5, 2.0, 2.5, (3, 1)]), st.booleans(), LAYOUT)  # fmt: skip
def test_interpolate_of_any_size(N, C, H, W, size, scale, exact, layout):
    image = x(*N, C, 2 * H, 2 * W)  # twice, since halves of one pixel are none
    args = (image, size) if scale is None else (image, None, scale)
    agrees(F.interpolate, args, {"mode": "nearest-exact" if exact else "nearest"}, layout)


@given(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), SIDE, SIDE, LAYOUT)
def test_linear_of_any_size(leading, i, o, layout):
    agrees(F.linear, (x(*leading, i), x(o, i), x(o)), {}, layout)


@given(mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=3), LAYOUT)
def test_matmul_of_any_size(shapes, layout):
    agrees(torch.matmul, tuple(x(*shape) for shape in shapes.input_shapes), {}, layout)


@given(
    st.sampled_from([torch.add, torch.sub, torch.mul, torch.div]),
    mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=4, max_dims=4),
    LAYOUT,
)
def test_arithmetic_with_any_broadcasting(function, shapes, layout):
    agrees(function, tuple(positive(*shape) for shape in shapes.input_shapes), {}, layout)


# At least two places along an axis that is normalised: with one, the gradient is 0, and only the
# rounding of torch's own way there would be compared.


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=4), LAYOUT)
def test_softmax_along_any_axis(data, shape, layout):
    for function in (torch.softmax, torch.log_softmax):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        agrees(function, (x(*shape), dim), {}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4), LAYOUT)
def test_sum_and_mean_over_any_axes(data, shape, layout):
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    axes = tuple(data.draw(st.sampled_from([d, d - len(shape)])) for d in axes)
    for function in (torch.sum, torch.mean):
        keepdim = data.draw(st.booleans())
        agrees(function, (x(*shape), axes), {"keepdim": keepdim}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4), LAYOUT)
def test_any_permutation(data, shape, layout):
    dims = data.draw(st.permutations(range(len(shape))))
    dims = tuple(data.draw(st.sampled_from([d, d - len(shape)])) for d in dims)
    agrees(torch.permute, (x(*shape), dims), {}, layout)


@given(SIDE, st.integers(2, 4), array_shapes(min_dims=0, max_dims=2, max_side=3), st.booleans(),
       st.sampled_from(["none", "sum", "mean"]), st.sampled_from([0.0, 0.3]), LAYOUT)  # fmt: skip
def test_losses_of_any_size(N, C, rest, weighted, reduction, smoothing, layout):
    logits, y, weight = x(N, C, *rest), labels(N, *rest, classes=C), positive(C)
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = constant(weight)
    agrees(F.nll_loss, (logits, y), options, layout)
    options["label_smoothing"] = smoothing
    agrees(F.cross_entropy, (logits, y), options, layout)
    if weighted:
        options["weight"] = weight
    agrees(F.cross_entropy, (logits, shares(N, C, *rest)), options, layout)


# eps = 0.5: with torch's 1e-5 and a batch of two, x̂ is ±1 but for 1e-5, and so much of the
# gradient cancels that two right ways to it agree to fewer digits than we ask for.


@given(st.integers(2, 4), SIDE, array_shapes(min_dims=0, max_dims=2, max_side=3), st.booleans(),
       st.booleans(), LAYOUT)  # fmt: skip
def test_batch_norm_of_any_size(N, C, rest, affine, training, layout):
    running = (constant(x(C)), constant(positive(C)))
    learned = (x(C), x(C)) if affine else (None, None)
    args = (x(N, C, *rest), *running, *learned, training, 0.1, 0.5)
    agrees(F.batch_norm, args, {}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=4), LAYOUT)
def test_layer_norm_of_any_size(data, shape, layout):
    normalized = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    learned = [data.draw(st.sampled_from([x(*normalized), None])) for _ in range(2)]
    agrees(F.layer_norm, (x(*shape), normalized, *learned, 0.5), {}, layout)
