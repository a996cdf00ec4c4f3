"""The oracles: which is used where, that it is right, and how sure it is of itself."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import Square, cancels, double, function
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop import check_gradients
from nn_backprop.check.oracle.oracle import Oracle, extrapolated
from nn_backprop.check.oracle.rounding import Rounding
from nn_backprop.check.target.target import Target


def oracle_of(target, *inputs: Tensor, reference=None, loss=None) -> tuple[dict, list[Tensor]]:
    """What is expected of a target, and the upstream gradient it is expected for."""
    subject = Target(target, inputs, {}, loss)
    outputs = subject.forward(subject.leaves_of()[1])
    upstream = [double(*z.shape, seed=9 + i) for i, z in enumerate(outputs)]
    source = subject if reference is None else subject.as_computed_by(reference, target)
    oracle = Oracle(subject, source, subject.dtype, given=reference is not None)
    return oracle.prepare(upstream), upstream


def hiding(hide) -> type[Function]:
    """x³, of which autograd sees x² times a constant."""
    return function(
        lambda x: x.square() * hide(x),
        lambda ctx, grad_z: 3 * ctx.saved_tensors[0].square() * grad_z,
    )


def without_grad(x):
    with torch.no_grad():
        return x.clone()


HIDING = {
    "detach": lambda x: x.detach(),
    "no_grad": without_grad,
    "data": lambda x: x.data,
    "NumPy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "item": lambda x: torch.tensor([value.item() for value in x], dtype=x.dtype),
}
X = double(7)


def cube(x):
    return x**3


NAMED = {  # oracle: target, reference
    "plain forward": (function(cube, lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g), None),
    "reference": (lambda x: x * x * x, cube),
    "forward mode": (cube, None),
    "differences": ((lambda x: x**3, lambda g, x: 3 * x**2 * g), None),
}


@pytest.mark.parametrize("name", NAMED)
def test_each_oracle_is_named_and_right(name):
    target, reference = NAMED[name]
    (expected,), (upstream,) = (
        list(part.values()) if isinstance(part, dict) else part
        for part in oracle_of(target, X, reference=reference)
    )
    assert expected.oracle == name
    error = (expected.value - 3 * X**2 * upstream).abs().max().item()
    assert error <= expected.uncertainty < 1e-7
    assert (expected.uncertainty < 1e-13) == (name != "differences")
    report = check_gradients(target, X, reference=reference)
    assert report.ok and [e.oracle for e in report.tensors] == [name]


@pytest.mark.parametrize("way", HIDING)
def test_a_forward_that_hides_a_dependence_is_not_believed(way):
    """Autograd through this forward gives ⅔ of the derivative; the backward is right."""
    expected, (upstream,) = oracle_of(hiding(HIDING[way]), X)
    (gradient,) = expected.values()
    assert gradient.oracle == "differences"
    error = (gradient.value - 3 * X**2 * upstream).abs().max().item()
    assert error <= gradient.uncertainty < 1e-7
    assert check_gradients(hiding(HIDING[way]), X).ok


def test_a_hidden_dependence_in_plain_torch_is_a_wrong_gradient():
    """There, what autograd gives is itself under test."""
    report = check_gradients(lambda x: x.square() * x.detach(), X)
    assert (report.verdict, report.tensors[0].oracle) == ("fail", "differences")


def test_forward_mode_products_are_right():
    expected, (upstream,) = oracle_of(torch.sin, double(5000))
    (gradient,) = expected.values()
    assert gradient.oracle == "forward-mode products" and gradient.value is None
    known = double(5000).cos() * upstream
    for direction, (product, _) in zip(gradient.directions, gradient.products, strict=True):
        assert set(direction.tolist()) == {-1.0, 1.0}
        assert math.isclose(product, (direction * known).sum().item(), rel_tol=1e-12)


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_products_find_one_wrong_element_among_many(error):
    def target(x):
        x = x * 1
        if x.requires_grad:
            wrong = torch.ones(20_000, dtype=torch.float64)
            wrong[12_345] += error
            x.register_hook(lambda grad: grad * wrong.to(grad))
        return x.sin()

    report = check_gradients(target, double(20_000))
    assert report.verdict == ("fail" if error else "pass"), report
    assert report.tensors[0].oracle == "forward-mode products"


def test_differences_of_many_elements(monkeypatch):
    monkeypatch.setattr("nn_backprop.check.judge.RESOLVED", 0)  # what is wrong stays as it is
    x = np.random.default_rng(0).standard_normal(4000)
    right, wrong = lambda g, x: g * np.cos(x), lambda g, x: g * np.cos(x) * (x < 3)
    report = check_gradients((np.sin, right), x)
    assert report.ok and report.tensors[0].oracle == "difference products"
    assert (x >= 3).sum() < 20
    assert check_gradients((np.sin, wrong), x).verdict == "fail"


# --- extrapolation, against known derivatives ---

KNOWN = {
    "exp": (math.exp, 0.7, math.exp(0.7)),
    "1/x": (lambda x: 1 / x, 2.0, -1 / 4),
    "1/x near its pole": (lambda x: 1 / (x - 0.9), 1.0, -100.0),
    "x³": (lambda x: x**3, -1.3, 3 * 1.3**2),
    "|x| off the kink": (abs, -0.2, -1.0),
    "|x| close to the kink": (abs, 1e-3, 1.0),
    "sin, fast": (lambda x: math.sin(50 * x), 1.0, 50 * math.cos(50)),
    "sin, faster": (lambda x: math.sin(1e4 * x), 1.0, 1e4 * math.cos(1e4)),
    "constant": (lambda x: 3.0, 1.0, 0.0),
    "a large constant beside it": (lambda x: 1e6 + x, 1.0, 1.0),
    "tanh, saturated": (math.tanh, 12.0, 1 / math.cosh(12) ** 2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_extrapolated_slope_is_within_its_own_error(name):
    f, x, slope = KNOWN[name]
    eps = torch.finfo(torch.float64).eps
    noise = [torch.tensor([4 * eps * abs(f(x))], dtype=torch.float64)]

    def outputs(step: float) -> list[Tensor]:
        return [torch.tensor([f(x + step)], dtype=torch.float64)]

    upstream = [torch.ones(1, dtype=torch.float64)]
    found, error = extrapolated(outputs, upstream, 1.0, eps, noise)
    assert abs(found - slope) <= error
    if "saturated" not in name:
        assert error <= 1e-7 * max(abs(slope), abs(f(x)))


@pytest.mark.parametrize("speed", [1, 32, 1024])
def test_a_fast_function_is_not_called_wrong(speed):
    """Where every step is longer than a period, differences tell nothing."""
    for seed in range(3):
        x = double(3, 5, seed=seed)
        report = check_gradients(lambda x: (speed * x).square().sin(), x)
        assert report.ok and report.tensors[0].oracle == "forward mode", report
        pair = (
            lambda x: np.sin((speed * x) ** 2),
            lambda grad, x: grad * np.cos((speed * x) ** 2) * 2 * speed**2 * x,
        )
        assert check_gradients(pair, x.numpy()).verdict != "fail"


def test_the_error_does_not_hide_a_kink():
    """At |x|'s kink there is no slope: whatever is answered, 0 ± 0 is a lie about f(x) = x + |x|,
    and so is more than the slopes 0 and 2."""
    eps = torch.finfo(torch.float64).eps
    found, _ = extrapolated(
        lambda h: [torch.tensor([h + abs(h)], dtype=torch.float64)],
        [torch.ones(1, dtype=torch.float64)], 1.0, eps, [torch.zeros(1, dtype=torch.float64)],
    )  # fmt: skip
    assert 0 <= found <= 2


# --- rounding ---

LAYERS = {
    "linear": lambda: (nn.Linear(5, 7), double(3, 5)),
    "convolution": lambda: (nn.Conv2d(3, 5, 3), double(2, 3, 7, 7)),
    "batch norm": lambda: (nn.BatchNorm1d(5), double(11, 5)),
    "softmax": lambda: (nn.Softmax(1), double(5, 7)),
    "GRU": lambda: (nn.GRU(5, 3), double(2, 7, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_well_conditioned_layer_has_a_tight_bound(layer):
    module, x = LAYERS[layer]()
    report = check_gradients(module.double(), x)
    assert report.ok
    for entry in report.tensors:
        largest = (
            entry.error / entry.relative_error if entry.relative_error else abs(entry.expected)
        )
        assert 0 < entry.smallest_visible <= 1e-9 * largest


def test_the_bound_grows_with_cancellation():
    def visible(mean: float) -> float:
        report = check_gradients(nn.BatchNorm1d(5, affine=False).double(), double(11, 5) + mean)
        assert report.ok, report
        (entry,) = report.tensors
        return entry.smallest_visible

    plain, cancelling = visible(0.0), visible(1e6)
    assert 1e4 * plain < cancelling < 1e8 * plain


def test_the_bound_is_that_of_the_precision():
    visible = [
        check_gradients(Square, double(5).to(dtype)).tensors[0].smallest_visible
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    ratios = [later / earlier for earlier, later in itertools.pairwise(visible)]
    assert ratios == pytest.approx([2.0**29, 2.0**16], rel=0.9)


def test_a_gradient_lost_in_rounding_is_inconclusive():
    """Beside 3·10⁵, what float32 leaves of an x around 1 has two digits."""
    report = check_gradients(cancels, double(11).float() + 3e5)
    assert report.verdict == "inconclusive", report
    assert "rounding in float32" in report.reason


def test_gelu_in_its_two_forms_is_told_apart_by_the_reference():
    x = double(3, 5)
    tanh_form = partial(F.gelu, approximate="tanh")
    assert check_gradients(tanh_form, x).ok
    assert check_gradients(tanh_form, x, reference=F.gelu).verdict == "fail"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "pass"), (1.3, "fail")])
def test_what_rounding_hides_is_told_in_float64(factor, verdict):
    """tanh′ at 8.2 is 3·10⁻⁷, two units of float32's rounding of 1."""

    def backward(ctx, grad_z):
        y = ctx.saved_tensors[0].tanh()
        return factor * grad_z * (1 - y * y)

    target = function(lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()), backward)
    report = check_gradients(target, torch.tensor([8.2, 8.1, 8.15]))
    assert report.verdict == verdict
    assert "told in float64" in report.tensors[0].note or verdict == "fail"


@pytest.mark.parametrize(("factor", "verdict"), [(1, "pass"), (2, "fail")])
def test_a_tie_in_the_lower_precision_only(factor, verdict):
    """10⁸ + 10⁻³ and 10⁸ + 2·10⁻³ are two numbers in float64 and one in float32: the plain forward
    in float32, like the target, takes the first for the larger."""

    def larger(x):
        return (1e8 + 1e-3 * x).max(1).values

    def backward(ctx, grad_z):
        at = (1e8 + 1e-3 * ctx.saved_tensors[0]).argmax(1)
        return 1e-3 * factor * grad_z[:, None] * F.one_hot(at, 2)

    x = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    report = check_gradients(function(larger, backward), x)
    assert report.verdict == verdict
    assert "to rounding in float32" in report.tensors[0].note or verdict == "fail"


def test_infinity_is_not_rounded():
    mode = Rounding(torch.float32, 1, keep_ties=False)
    moved = mode.moved(torch.tensor([-math.inf, 1.0]).double())
    assert moved[0] == -math.inf
    assert 0 < abs(moved[1] - 1) <= 2**-23


def test_a_saturated_attention_with_a_mask_is_as_uncertain_as_it_is():
    """Its dot products reach 10³, so that all but one weight vanish, and huge terms cancel."""
    query, key, value = (
        1e-7 * double(2, 1, 3, 5),
        4e9 * double(2, 1, 3, 5),
        4e8 * double(2, 1, 3, 7),
    )

    def attention(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    assert check_gradients(attention, query, key, value).verdict == "pass"


def test_beyond_a_kink_a_difference_is_not_asked():
    """The second entry of the pair stays below the first in a neighbourhood of 10⁻³ of it."""
    x = 1e-9 * np.array([[1.2051, 1.2071, -0.5], [-0.3, 0.2, 0.2004]])

    def backward(grad_z, x):
        return ((x == x.max(1, keepdims=True)) * grad_z[:, None],)

    report = check_gradients((lambda x: x.max(1), backward), x)
    assert report.tensors[0].oracle == "differences"
    assert report.tensors[0].verdict == "pass", report


def test_where_nothing_moves_a_gradient_below_rounding_is_not_wrong():
    """x Φ(x) is 0 in float64 from x = −9 on, and its derivative 10⁻¹⁷⁷ at −28.5."""
    x = double(1) * 0 - 28.5
    normal = torch.distributions.Normal(0.0, 1.0)

    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        return grad_z * (normal.cdf(x) + x * normal.log_prob(x).exp())

    report = check_gradients(function(F.gelu, backward), x)
    assert report.verdict == "inconclusive"
    assert "no power" in report.reason


@pytest.mark.parametrize("seed", [1, 4, 5])
def test_half_precision_below_its_smallest_normal_number(seed):
    """There, float16 has steps of 6·10⁻⁸, and the outputs are of that size."""
    x, w = 2e-4 * double(4, 4, seed=seed).half(), 3e-3 * double(4, 4, seed=seed + 9).half()
    report = check_gradients(lambda x, w: (x @ w) @ w, x, w)
    assert report.verdict == "pass", report


@pytest.mark.parametrize("seed", [0, 1])
def test_a_product_below_the_smallest_normal_number(seed):
    """A product of four factors of 3·10⁻¹¹ has few digits left in float32."""
    x = 3e-11 * double(5, 7, 4, seed=seed)
    assert check_gradients(lambda x: x.prod(2), x).verdict == "pass"


def nearly_tied(slope: float) -> type[Function]:
    """max(x, 0) in a Function that says `slope` for x < 0, and cannot be recorded as torch ops."""

    class Larger(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(np.maximum(x.detach().numpy(), 0.0) + np.ones_like(x.numpy()))

        @staticmethod
        def backward(ctx, grad_z):
            (x,) = ctx.saved_tensors
            return torch.where(x < 0, slope, 1.0) * grad_z

    return Larger


def test_differences_that_shorter_steps_contradict_are_unsure():
    """Beside a kink at 3e-13, where steps of 1e-9 see half the slope, with outputs of size 1."""
    x = torch.tensor([[-3e-13], [0.7], [-0.4]], dtype=torch.float64)
    assert check_gradients(nearly_tied(0.0), x).verdict != "fail"


@pytest.mark.parametrize("slope", [0.5, 1e-3, -1.0])
def test_but_a_wrong_slope_away_from_the_kink_fails(slope):
    x = torch.tensor([[-3e-2], [0.7], [-0.4]], dtype=torch.float64)
    assert check_gradients(nearly_tied(slope), x).verdict == "fail"


def test_where_half_precision_is_far_from_float64_rounding_is_still_that_of_half_precision():
    """The mean of two numbers that are close is rounded, which changes their standard deviation;
    so that float64 is no model of it, but says how far rounding goes."""
    x = torch.tensor([[0.26, 0.084], [0.257, 0.0845]]).bfloat16()
    torch.manual_seed(0)
    norm = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.BatchNorm1d(5)).bfloat16()
    assert check_gradients(norm, x / 8).verdict != "fail"
