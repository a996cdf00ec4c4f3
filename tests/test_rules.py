"""Every rule against autograd, finite differences and arithmetic, and every check against a rule
that has been spoilt."""

import ast
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comparison as check
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, constant, labels, positive, shares, x
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes
from jaxtyping import TypeCheckError
from torch import Tensor

from nn_backprop import rules
from nn_backprop.rules import Rule, activation, linear, normalization
from nn_backprop.rules.locally_connected import locally_connected2d as local
from nn_backprop.rules.winners import k_winners

# torch and therefore the rule say that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

BY_ID = {case.id: case for case in CASES}
RULES = {rule.name: rule for rule in rules.TABLE.values()}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, -t], -1)[..., 0],
    "transposed": lambda t: backwards(backwards(t).contiguous()),
    "offset": lambda t: torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t.flatten()[:1].sum().expand(t.shape),
}


def backwards(t: Tensor) -> Tensor:
    return t.permute(tuple(reversed(range(t.dim()))))


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


SMOOTH = [case for case in CASES if not case.staircase]


# --- the table of cases ---


def test_every_callable_of_the_table_has_a_case():
    assert set(rules.TABLE) == {case.function for case in CASES}
    assert len(BY_ID) == len(CASES)


@pytest.mark.parametrize("name", RULES)
def test_every_gradient_that_a_rule_derives_has_a_case(name):
    derived = set(re.findall(r"^ *grad_(\w+)", section(RULES[name], "Backward"), re.MULTILINE))
    assert derived == {n for case in CASES if case.rule.name == name for n in case.names}


# --- the properties ---


@pytest.mark.parametrize("device", DEVICES)
@over(CASES)
def test_matches_autograd(case, device):
    check.matches_autograd(case, device=device)


@over(SMOOTH)
def test_matches_finite_differences(case):
    check.matches_differences(case)


@over([case for case in SMOOTH if check.linear_in(case)])
def test_is_the_adjoint_of_a_linear_map(case):
    check.is_the_adjoint(case)


@over(CASES)
def test_float32(case):
    check.matches_float32(case)


@over(CASES)
def test_bfloat16(case):
    check.matches_bfloat16(case)


@over(CASES)
def test_a_gradient_has_shape_and_type_of_its_operand(case):
    for dtype in (torch.float64, torch.float32):
        played = check.play(case, dtype=dtype)
        for name, grad in played.grads.items():
            operand = played.operands[name]
            assert (grad.shape, grad.dtype) == (operand.shape, operand.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@over(CASES)
def test_memory_layout_of_the_upstream_gradient(case, layout):
    played = check.play(case, upstream_layout=LAYOUTS[layout])
    _, grads = check.by_autograd(case, played.grad_z)
    # Where all of the upstream gradient is one number, softmax and the norms leave 0 and rounding.
    check.all_close(played.grads, grads, least=played.grad_z.abs().max().item())


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
@over([case for case in CASES if case.rule.name != "dropout"])  # whose mask follows the memory
def test_memory_layout_of_the_inputs(case, layout):
    played = check.play(case, input_layout=LAYOUTS[layout])
    check.all_close(played.grads, check.by_autograd(case)[1])


def test_dropout_of_a_transposed_input_drops_what_torch_drops():
    image = torch.ones(7, 11).T
    torch.manual_seed(0)
    z, _ = RULES["dropout"].forward(image, 0.3)
    torch.manual_seed(0)
    assert torch.equal(z, F.dropout(image, 0.3))


@over(CASES)
def test_the_result_shares_memory_with_an_input_where_torch_does(case):
    """What is a view, and what is a copy, decides what an in-place operation changes later."""
    shared = []
    with torch.no_grad():
        for by_rule in (True, False):
            args, kwargs = case.draw()
            arguments, in_place = case.rule.arguments(args, kwargs)
            if in_place:
                return
            z = case.rule.forward(*arguments)[0] if by_rule else case.function(*args, **kwargs)
            memory = z.untyped_storage().data_ptr()
            shared.append([memory == t.untyped_storage().data_ptr() for t in tensors(arguments)])
    assert shared[0] == shared[1]


@over(CASES)
def test_needs(case):
    """What is not wanted is None, and what is does not depend on what else is."""
    rule, played = case.rule, check.play(case)
    for wanted in itertools.product([False, True], repeat=len(case.names)):
        chosen = {name for name, w in zip(case.names, wanted, strict=True) if w}
        needs = tuple(name in chosen for name in rule.tensors)
        with torch.no_grad():
            grads = check.by_name(rule, rule.backward(played.grad_z, played.saved, needs))
        check.all_close(grads, {name: played.grads[name] for name in chosen})


@over(CASES)
def test_changes_nothing_that_it_was_handed(case):
    rule, (args, kwargs) = case.rule, case.draw()
    arguments, _ = rule.arguments(args, kwargs)
    training = rule.name == "batch_norm" and True in arguments[5:6]
    buffers = [id(arguments[i]) for i in (1, 2)] if training else []
    inputs = [t for t in tensors((args, kwargs)) if id(t) not in buffers]
    with torch.no_grad():
        before = [t.clone() for t in inputs]
        torch.manual_seed(case.seed)
        z, saved = rule.forward(*arguments)
        assert all(map(torch.equal, inputs, before))
        handed = [*inputs, *tensors(saved), check.upstream(case, z)]
        before = [t.clone() for t in handed]
        needs = tuple(name in case.names for name in rule.tensors)
        first = check.by_name(rule, rule.backward(handed[-1], saved, needs))
        assert all(map(torch.equal, handed, before))
        first = {name: grad.clone() for name, grad in first.items()}
        again = check.by_name(rule, rule.backward(handed[-1], saved, needs))
    assert all(torch.equal(first[name], again[name]) for name in first)


def tensors(nested) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    nested = nested.values() if isinstance(nested, dict) else nested
    return [t for n in nested for t in tensors(n)] if isinstance(nested, (tuple, list)) else []


# --- every check can fail ---

GRADIENTS = [(case, name) for case in CASES for name in case.names]


@pytest.mark.parametrize(
    ("case", "name"), GRADIENTS, ids=[f"{case.id}: {name}" for case, name in GRADIENTS]
)
def test_a_gradient_wrong_by_a_thousandth_is_refused(case, name):
    wrong = check.spoilt(case.rule, name)
    checks = [check.matches_autograd, check.matches_float32]
    if not case.staircase:
        checks.append(check.matches_differences)
        if name in check.linear_in(case):
            checks.append(check.is_the_adjoint)
    for refuses in checks:
        with pytest.raises(AssertionError, match="not close"):
            refuses(case, wrong)


@pytest.mark.parametrize(
    ("rule_name", "name"), sorted({(case.rule.name, name) for case, name in GRADIENTS})
)
def test_a_gradient_wrong_by_a_quarter_is_refused_in_bfloat16(rule_name, name):
    """With 8 bits and many terms no check is sharp; some case of each rule has few terms."""

    def refused(case: Case) -> bool:
        try:
            check.matches_bfloat16(case, check.spoilt(case.rule, name, lambda g: 1.25 * g))
        except AssertionError:
            return True
        return False

    assert any(refused(c) for c, n in GRADIENTS if (c.rule.name, n) == (rule_name, name))


def with_backward(rule: Rule, backward: Callable) -> Rule:
    return replace(rule, backward=backward)


def _softmax_uncoupled(rule: Rule) -> Rule:
    return with_backward(rule, lambda grad_a, saved, needs: (grad_a * saved[0],))


def _softmax_as_sigmoid(rule: Rule) -> Rule:
    return with_backward(rule, lambda g, saved, needs: (g * saved[0] * (1 - saved[0]),))


def _log_softmax_uncoupled(rule: Rule) -> Rule:
    return with_backward(rule, lambda grad_a, saved, needs: (grad_a * (1 - saved[0].exp()),))


def _kernel_not_mirrored(rule: Rule) -> Rule:
    def backward(grad_z, saved, needs):
        _, grad_weight, grad_bias = rule.backward(grad_z, saved, needs)
        flipped = (saved[0], saved[1].flip(2, 3), *saved[2:])
        return rule.backward(grad_z, flipped, needs)[0], grad_weight, grad_bias

    return with_backward(rule, backward)


def _last_window_wins(rule: Rule) -> Rule:
    def backward(grad_z, saved, needs):
        winner, (H, W) = saved
        grad_x = grad_z.new_zeros(*grad_z.shape[:-2], H * W)
        grad_x.scatter_(-1, winner.flatten(-2), grad_z.flatten(-2))
        return (grad_x.unflatten(-1, (H, W)),)

    return with_backward(rule, backward)


def _border_counted(rule: Rule) -> Rule:
    def backward(grad_z, saved, needs):
        return rule.backward(grad_z, (torch.full_like(saved[0], 9), *saved[1:]), needs)

    return with_backward(rule, backward)


def _statistics_held(rule: Rule) -> Rule:
    """The means over the batch taken for constants, as in evaluation."""

    def backward(grad_z, saved, needs):
        x, _, *rest = saved
        over_n = [d for d in range(x.dim()) if d != 1]
        held = (x.mean(over_n), x.var(over_n, unbiased=False))
        return rule.backward(grad_z, (x, held, *rest), needs)

    return with_backward(rule, backward)


def _without(term: str) -> Callable[[Rule], Rule]:
    """A norm that lacks one of the three ways by which x reaches the loss."""

    def spoil(rule: Rule) -> Rule:
        def backward(grad_z, saved, needs):
            x, weight = saved[0], saved[2]
            dims = (0,) if rule.name == "batch_norm" else (1,)  # of x with two axes
            x_hat, inv_std = normalization.standardize(x, dims, saved[-1])
            kept = grad = grad_z * weight
            if term != "mean":
                kept = kept - grad.mean(dims, keepdim=True)
            if term != "variance":
                kept = kept - x_hat * (grad * x_hat).mean(dims, keepdim=True)
            return (inv_std * kept, *rule.backward(grad_z, saved, needs)[1:])

        return with_backward(rule, backward)

    return spoil


def _ignored_counted(rule: Rule) -> Rule:
    return check.spoilt(rule, "logits", lambda g: g * 2 / 3)


def _gelu_without_density(rule: Rule) -> Rule:
    def backward(grad_a, saved, needs):
        return (grad_a * 0.5 * (1 + torch.erf(saved[0] / math.sqrt(2))),)

    return with_backward(rule, backward)


# Mistakes that people make. Those by a factor are left to the tests above.
MISTAKES = [
    ("functional.linear", lambda r: check.spoilt(r, "bias", lambda g: g / 3)),
    ("functional.linear", lambda r: check.spoilt(r, "weight", lambda g: g.T)),
    ("functional.linear", lambda r: check.spoilt(r, "bias", torch.zeros_like)),
    ("functional.linear leading axes", lambda r: check.spoilt(r, "bias", lambda g: g / 6)),
    ("torch.matmul broadcast", lambda r: check.spoilt(r, "x", lambda g: g / 11)),
    ("functional.conv2d", _kernel_not_mirrored),
    ("functional.conv2d groups", _kernel_not_mirrored),
    ("functional.max_pool2d overlapping, border", _last_window_wins),
    ("functional.avg_pool2d border not counted", _border_counted),
    ("torch.softmax", _softmax_uncoupled),
    ("torch.softmax", _softmax_as_sigmoid),
    ("torch.log_softmax", _log_softmax_uncoupled),
    ("functional.gelu", _gelu_without_density),
    ("functional.cross_entropy ignored", _ignored_counted),
    ("functional.cross_entropy pixels", lambda r: check.spoilt(r, "logits", lambda g: g * 14)),
    ("functional.mse_loss", lambda r: check.spoilt(r, "y", torch.neg)),
    ("functional.batch_norm", _statistics_held),
    ("functional.batch_norm", _without("mean")),
    ("functional.batch_norm", _without("variance")),
    ("functional.layer_norm", _without("mean")),
    ("functional.layer_norm", _without("variance")),
    ("functional.dropout", lambda r: check.spoilt(r, "x", lambda g: g * 0.7)),
]


@pytest.mark.parametrize(("name", "spoil"), MISTAKES)
def test_a_mistake_is_refused(name, spoil):
    case = BY_ID[name]
    for refuses in (check.matches_autograd, check.matches_differences):
        with pytest.raises(AssertionError):
            refuses(case, spoil(case.rule))


def test_a_transposed_gradient_of_a_square_weight_is_refused():
    square = Case(F.linear, (x(3, 5), x(5, 5)))
    check.matches_autograd(square)
    with pytest.raises(AssertionError, match="not close"):
        check.matches_autograd(square, check.spoilt(square.rule, "weight", lambda g: g.T))


def test_the_spoilt_rule_is_otherwise_the_rule():
    """`spoilt` by a factor of 1 passes: what is refused above is the mistake and nothing else."""
    for case, name in GRADIENTS:
        check.matches_autograd(case, check.spoilt(case.rule, name, lambda g: g * 1.0))


# --- any sizes ---

SIDE = st.integers(1, 4)
LAYOUT = st.sampled_from(["strided", "transposed", "offset"])


def holds(function: Callable, args: tuple, kwargs: dict, layout: str) -> None:
    note = ""  # the seed depends on it
    case = Case(function, args, kwargs, note)
    check.matches_autograd(case)
    played = check.play(case, upstream_layout=LAYOUTS[layout], input_layout=LAYOUTS[layout])
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
    holds(F.conv2d, (image, weight, bias, stride, padding, dilation, groups), {}, layout)


@given(st.data(), BATCH, PAIR, st.none() | PAIR, PAIR, SIDE, st.booleans(), LAYOUT)
def test_max_pool2d_of_any_size(data, N, kernel, stride, dilation, C, ceil, layout):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    H, W = data.draw(images(kernel, padding, dilation))
    args = (x(*N, C, H, W), kernel, stride, padding, dilation, ceil)
    holds(F.max_pool2d, args, {}, layout)


@given(st.data(), BATCH, PAIR, st.none() | PAIR, SIDE, st.booleans(), st.booleans(),
       st.none() | st.integers(1, 5), LAYOUT)  # fmt: skip
def test_avg_pool2d_of_any_size(data, N, kernel, stride, C, ceil, count_border, divisor, layout):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    H, W = data.draw(images(kernel, padding, (1, 1)))
    args = (x(*N, C, H, W), kernel, stride, padding, ceil, count_border, divisor)
    holds(F.avg_pool2d, args, {}, layout)


@given(BATCH.filter(bool), SIDE, SIDE, SIDE, st.tuples(st.integers(1, 9), st.integers(1, 9)),
       st.sampled_from([None, 0.5, 2.0, 2.5, (3, 1)]), st.booleans(), LAYOUT)  # fmt: skip
def test_interpolate_of_any_size(N, C, H, W, size, scale, exact, layout):
    image = x(*N, C, 2 * H, 2 * W)  # twice, since halves of one pixel are none
    args = (image, size) if scale is None else (image, None, scale)
    holds(F.interpolate, args, {"mode": "nearest-exact" if exact else "nearest"}, layout)


@given(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), SIDE, SIDE, LAYOUT)
def test_linear_of_any_size(leading, i, o, layout):
    holds(F.linear, (x(*leading, i), x(o, i), x(o)), {}, layout)


@given(mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=3), LAYOUT)
def test_matmul_of_any_size(shapes, layout):
    holds(torch.matmul, tuple(x(*shape) for shape in shapes.input_shapes), {}, layout)


@given(
    st.sampled_from([torch.add, torch.sub, torch.mul, torch.div]),
    mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=4, max_dims=4),
    LAYOUT,
)
def test_arithmetic_with_any_broadcasting(function, shapes, layout):
    holds(function, tuple(positive(*shape) for shape in shapes.input_shapes), {}, layout)


# At least two places along an axis that is normalised: with one, the gradient is 0, and only the
# rounding of torch's own way there would be compared.


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=4), LAYOUT)
def test_softmax_along_any_axis(data, shape, layout):
    for function in (torch.softmax, torch.log_softmax):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        holds(function, (x(*shape), dim), {}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4), LAYOUT)
def test_sum_and_mean_over_any_axes(data, shape, layout):
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    axes = tuple(data.draw(st.sampled_from([d, d - len(shape)])) for d in axes)
    for function in (torch.sum, torch.mean):
        keepdim = data.draw(st.booleans())
        holds(function, (x(*shape), axes), {"keepdim": keepdim}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4), LAYOUT)
def test_any_permutation(data, shape, layout):
    dims = data.draw(st.permutations(range(len(shape))))
    dims = tuple(data.draw(st.sampled_from([d, d - len(shape)])) for d in dims)
    holds(torch.permute, (x(*shape), dims), {}, layout)


@given(SIDE, st.integers(2, 4), array_shapes(min_dims=0, max_dims=2, max_side=3), st.booleans(),
       st.sampled_from(["none", "sum", "mean"]), st.sampled_from([0.0, 0.3]), LAYOUT)  # fmt: skip
def test_losses_of_any_size(N, C, rest, weighted, reduction, smoothing, layout):
    logits, y, weight = x(N, C, *rest), labels(N, *rest, classes=C), positive(C)
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = constant(weight)
    holds(F.nll_loss, (logits, y), options, layout)
    options["label_smoothing"] = smoothing
    holds(F.cross_entropy, (logits, y), options, layout)
    if weighted:
        options["weight"] = weight
    holds(F.cross_entropy, (logits, shares(N, C, *rest)), options, layout)


# eps = 0.5: with torch's 1e-5 and a batch of two, x̂ is ±1 but for 1e-5, and so much of the
# gradient cancels that two right ways to it agree to fewer digits than we ask for.


@given(st.integers(2, 4), SIDE, array_shapes(min_dims=0, max_dims=2, max_side=3), st.booleans(),
       st.booleans(), LAYOUT)  # fmt: skip
def test_batch_norm_of_any_size(N, C, rest, affine, training, layout):
    running = (constant(x(C)), constant(positive(C)))
    learned = (x(C), x(C)) if affine else (None, None)
    args = (x(N, C, *rest), *running, *learned, training, 0.1, 0.5)
    holds(F.batch_norm, args, {}, layout)


@given(st.data(), array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=4), LAYOUT)
def test_layer_norm_of_any_size(data, shape, layout):
    normalized = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    learned = [data.draw(st.sampled_from([x(*normalized), None])) for _ in range(2)]
    holds(F.layer_norm, (x(*shape), normalized, *learned, 0.5), {}, layout)


# --- by hand ---

LOG2 = math.log(2)
EXAMPLES = {
    # one row x = (1, 2, 4), kernel (a, b) = (3, 5), grad_z = (7, 11), as derived at conv2d
    "conv2d": (
        F.conv2d, ([[[1, 2, 4]]], [[[[3, 5]]]], [0]), [[[7, 11]]],
        ([[[3 * 7, 5 * 7 + 3 * 11, 5 * 11]]], [[[[1 * 7 + 2 * 11, 2 * 7 + 4 * 11]]]], [18]),
    ),
    # one row x = (1, 2, 4), weights (3, 5) at one place and (7, 9) at the other
    "locally_connected2d": (
        local, ([[[1, 2, 4]]], [[[[[[3, 5]]]], [[[[7, 9]]]]]], [[[0, 0]]]), [[[11, 13]]],
        ([[[3 * 11, 5 * 11 + 7 * 13, 9 * 13]]],
         [[[[[[1 * 11, 2 * 11]]]], [[[[2 * 13, 4 * 13]]]]]], [[[11, 13]]]),
    ),
    "cross_entropy": (
        F.cross_entropy, ([0, 0, LOG2], 2), 1, ([1 / 4, 1 / 4, -1 / 2],),
    ),
    "batch_norm": (
        F.batch_norm, ([[1], [1], [4]], None, None, [1], [0], True, 0.1, 2.0), [[6], [0], [0]],
        ([[1.75], [-1.25], [-0.5]], [-3], [6]),
    ),
    "layer_norm": (
        F.layer_norm, ([1, 1, 4], (3,), [1, 1, 1], [0, 0, 0], 2.0), [6, 0, 0],
        ([1.75, -1.25, -0.5], [-3, 0, 0], [6, 0, 0]),
    ),
    # x = (1, 2), weight rows (3, 5), (7, 11): a step along either output
    "linear": (
        F.linear, ([1, 2], [[3, 5], [7, 11]], [0, 0]), [13, 17],
        ([3 * 13 + 7 * 17, 5 * 13 + 11 * 17], [[13, 26], [17, 34]], [13, 17]),
    ),
    # e^z = (1, 2), so a = (1/3, 2/3); Σ grad·a = 4, grad_z = a (grad − 4)
    "softmax": (torch.softmax, ([0, LOG2], 0), [6, 3], ([2 / 3, -2 / 3],)),
    "log_softmax": (torch.log_softmax, ([0, LOG2], 0), [6, 3], ([6 - 9 / 3, 3 - 9 * 2 / 3],)),
    "sigmoid": (torch.sigmoid, ([0, LOG2],), [1, 9], ([1 / 4, 2],)),  # a = (1/2, 2/3)
    "tanh": (torch.tanh, ([0, LOG2],), [1, 25], ([1, 16],)),  # tanh log 2 = 3/5
    "gelu": (F.gelu, ([0],), [2], ([1],)),
    "cos": (torch.cos, ([0, math.pi / 6],), [5, 4], ([0, -2],)),  # sin π/6 = 1/2
    # windows of two that overlap: 5 wins both
    "max_pool2d": (F.max_pool2d, ([[[1, 5, 2]]], (1, 2), 1), [[[7, 11]]], ([[[0, 18, 0]]],)),
    # scores (3, 4, 2): the second wins
    "k_winners": (k_winners, ([[3, 1, 2]], 1, [1, 4, 1]), [[5, 7, 11]], ([[0, 7, 0]],)),
    "avg_pool2d": (F.avg_pool2d, ([[[1, 5, 2]]], (1, 2), 1), [[[6, 10]]], ([[[3, 8, 5]]],)),
    # enlarged by 2: each pixel has four copies, 4 times the mean of their gradients
    "upsample_nearest": (
        F.interpolate, ([[[[1, 2]]]], None, 2), [[[[3, 5, 7, 11], [13, 17, 19, 23]]]],
        ([[[[4 * 9.5, 4 * 15]]]],),
    ),
    # a border of one before, and one cut off behind
    "pad": (F.pad, ([1, 2, 4], (1, -1)), [7, 11, 13], ([11, 13, 0],)),
    "mse_loss": (F.mse_loss, ([1, 2], [4, 0]), 1, ([-3, 2], [3, -2])),
    "div": (torch.div, ([6], [2]), [8], ([4], [-12])),
    "pow": (torch.pow, ([2, -1], 3), [1, 1], ([12, 3],)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example(name):
    function, args, grad_z, expected = EXAMPLES[name]
    rule = rules.TABLE[function]

    def tensor(value):
        return torch.tensor(value, dtype=torch.float64)

    places = rule.tensors.values()
    arguments = [tensor(a) if i in places and a is not None else a for i, a in enumerate(args)]
    if name == "cross_entropy":
        arguments[1] = torch.tensor(2)
    _, saved = rule.forward(*rule.arguments(tuple(arguments), {})[0])
    needs = tuple(i < len(args) and args[i] is not None for i in places)
    grads = [g for g in rule.backward(tensor(grad_z), saved, needs) if g is not None]
    for grad, numbers in zip(grads, expected, strict=True):
        check.close(grad, tensor(numbers))


# --- kinks and ties ---


KINKS = [
    (torch.relu, [-1.0, -0.0, 0.0, 2.0], (), [0, 0, 0, 1]),
    (F.leaky_relu, [-1.0, -0.0, 0.0, 2.0], (0.25,), [0.25, 0.25, 0.25, 1]),
    (F.max_pool2d, [[[3.0, 3.0], [3.0, 3.0]]], (2,), [[[1, 0], [0, 0]]]),
    (F.max_pool2d, [[[0.0, -0.0, 0.0]]], ((1, 2), 1), [[[1, 1, 0]]]),
    (F.max_pool2d, [[[1.0, 3.0, 3.0, 3.0]]], ((1, 3), 1), [[[0, 2, 0, 0]]]),
    (F.max_pool2d, [[[2.0, math.nan, math.nan]]], ((1, 3),), [[[0, 0, 1]]]),
    (F.max_pool2d, [[[-math.inf, -math.inf]]], ((1, 2),), [[[1, 0]]]),
    (k_winners, [[1.0, 3.0, 3.0, 3.0]], (2,), [[0, 1, 1, 0]]),
    (k_winners, [[0.0, -0.0, 0.0]], (2,), [[1, 1, 0]]),
    (k_winners, [[math.inf, -math.inf, -math.inf]], (2,), [[1, 1, 0]]),
    (k_winners, [[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]], (1,), [[1, 1, 1], [0, 0, 1]]),
    (torch.pow, [0.0, 2.0], (0,), [0, 0]),
    (torch.pow, [0.0, 2.0], (1,), [1, 1]),
    (torch.pow, [0.0, 4.0], (0.5,), [math.inf, 0.25]),
]


@pytest.mark.parametrize(("function", "values", "args", "slope"), KINKS)
def test_kinks_and_ties(function, values, args, slope):
    rule, z = rules.TABLE[function], torch.tensor(values, requires_grad=True)
    a = function(z, *args)
    (expected,) = torch.autograd.grad(a, z, torch.ones_like(a))
    _, saved = rule.forward(*rule.arguments((z.detach(), *args), {})[0])
    grad = rule.backward(torch.ones_like(a), saved, (True,))[0]
    assert torch.equal(grad, torch.tensor(slope, dtype=torch.float32))
    assert torch.equal(grad, expected)


# --- what single rules promise ---


def test_the_shared_gradient_is_the_sum_of_the_unshared_ones():
    played = check.play(BY_ID["functional.conv2d"])
    image, weight = played.operands["x"], played.operands["weight"]
    N, C, P, Q = len(image), *weight.shape[1:]
    h, w = played.z.shape[-2:]
    patches = F.unfold(image, (P, Q)).view(N, C, P, Q, h, w)
    unshared = torch.einsum("nohw,ncpqhw->hwocpq", played.grad_z, patches)
    check.close(played.grads["weight"], unshared.sum((0, 1)))
    assert unshared.shape == (h, w, *weight.shape)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_moves_its_buffers_as_torch_does(training):
    case = Case(F.batch_norm, (x(2, 3, 5), x(3), positive(3), None, None, training, 0.3))
    (args, _), (torchs, _) = case.draw(), case.draw()
    with torch.no_grad():
        case.rule.forward(*args)
        F.batch_norm(*torchs)
    for buffer, expected, before in zip(args[1:3], torchs[1:3], case.draw()[0][1:3], strict=True):
        check.close(buffer, expected)
        assert torch.equal(buffer, before) != training


@pytest.mark.filterwarnings("ignore:Using a target size")  # the subject of this test
def test_mse_loss_of_shapes_that_differ():
    check.matches_autograd(Case(F.mse_loss, (x(3, 5), x(5))))


def test_dropout_of_everything():
    case = Case(F.dropout, (x(3, 5), 1.0))
    check.matches_autograd(case)
    assert not check.play(case).grads["x"].any()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interpolate_sends_back_along_the_way_that_it_read(dtype, layout, mode):
    """At these factors torch reads other pixels for float64 than for float32 or another layout, and
    its own backward (of 2.14, at least) sends some gradients in float64 to a pixel beside."""
    for rows, factor in ((17, 7.4), (18, 6.9)):
        image = torch.arange(rows).to(dtype).view(1, 1, rows, 1).expand(2, 3, rows, 5)
        image = image.contiguous(memory_format=layout)
        rule = RULES["upsample_nearest"]
        z, saved = rule.forward(image, None, (factor, 1.0), mode)
        assert torch.equal(z, F.interpolate(image, None, (factor, 1.0), mode))
        (grad,) = rule.backward(torch.ones_like(z), saved, (True,))
        copies = torch.bincount(z[0, 0, :, 0].long(), minlength=rows)
        assert torch.equal(grad, copies.to(dtype).view(rows, 1).expand_as(grad))


def test_interpolate_of_no_images():
    check.matches_autograd(Case(F.interpolate, (x(0, 3, 5, 7), None, 2)))


REFUSED = [
    (F.interpolate, (x(1, 3, 5, 7), 11), {"mode": "bilinear"}, "bilinear"),
    (F.interpolate, (x(3, 5, 7), 11), {}, "3 axes"),
    (F.interpolate, (x(1, 3, 5, 7), 11), {"antialias": True}, "antialias"),
    (F.max_pool2d, (x(1, 2, 2), 2), {"return_indices": True}, "return_indices"),
    (F.softmax, (x(3, 5),), {}, "dim"),
    (F.cross_entropy, (x(3, 5), x(3, 5)), {"size_average": True}, "size_average"),
    (F.nll_loss, (x(3, 5), labels(3, classes=5)), {"reduce": False}, "reduce"),
    (F.mse_loss, (x(3), x(3)), {"reduce": True}, "reduce"),
    (torch.div, (x(3), x(3)), {"rounding_mode": "floor"}, "rounding_mode"),
    (torch.pow, (positive(3), x(3)), {}, "exponent"),
    (Tensor.view, (x(3), torch.int64), {}, "dtype"),
    (Tensor.view, (x(3),), {"dtype": torch.int64}, "dtype"),
    (Tensor.to, (x(3), "meta"), {}, "device"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "why"), REFUSED)
def test_a_use_that_is_not_covered_is_refused(function, args, kwargs, why):
    case = Case(function, args, kwargs)
    with pytest.raises(NotImplementedError, match=why):
        case.rule.arguments(*case.draw())


# --- how they are written ---

SECTIONS = ["Forward", "Derivation", "Backward", "Saved", "Shapes", "Source"]


def section(rule: Rule, name: str) -> str:
    """The text of a section of the derivation, without its heading."""
    parts = re.split(r"^(\w+):$", rule.derivation, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[name].strip("\n")


@pytest.mark.parametrize("name", RULES)
def test_derivation_is_complete(name):
    rule = RULES[name]
    parts = re.split(r"^(\w+):$", rule.derivation, flags=re.MULTILINE)
    assert parts[0].strip() and parts[1::2] == SECTIONS
    assert all(section(rule, heading).strip() for heading in SECTIONS)
    for block in ("Forward", "Backward"):
        assert all(line.strip() in rule.equations for line in section(rule, block).splitlines())


def names_in(source: str) -> set[str]:
    """Of what is imported, and of attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
            names |= set((getattr(node, "module", None) or "").split("."))
    return names


def forbidden(source: str) -> set[str]:
    """Names by which another would do the work: autograd, its functions, torch's own kernels."""
    return {
        name
        for name in names_in(source)
        if re.search(r"autograd|_backward$|^grad$|^[vj][jv]p$|^aten$|^func$|requires_grad", name)
    }


@pytest.mark.parametrize(
    "path", sorted(Path(rules.__file__).parent.glob("*.py")), ids=lambda path: path.name
)
def test_rules_are_arithmetic_alone(path):
    assert not forbidden(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "torch.nn.grad.conv2d_weight(x)",
        "torch.ops.aten.convolution_backward(x)",
        "torch.autograd.grad(z, x)",
        "from torch.func import vjp",
    ],
)
def test_other_peoples_derivatives_are_noticed(source):
    assert forbidden(source)


def test_shapes_are_checked_under_pytest():
    with pytest.raises(TypeCheckError):
        linear.linear_forward(torch.zeros(3, 5), torch.zeros(7, 2))
    with pytest.raises(TypeCheckError):
        activation.softmax_forward(torch.zeros(3, dtype=torch.int64), 0)
