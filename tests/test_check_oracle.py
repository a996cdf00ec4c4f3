"""The oracles: which is used where, that it is right, and how sure it is of itself."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from properties import about
from suspects import Square, cancels, double, expect, function
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop import check_gradients
from nn_backprop.check.oracle.differences import extrapolated
from nn_backprop.check.oracle.oracle import Oracle
from nn_backprop.check.oracle.rounding import Rounding
from nn_backprop.check.target.target import Target

X = double(7)
EPS = torch.finfo(torch.float64).eps


def oracle_of(target, x: Tensor, reference=None):
    """What is expected of a target with one output, and the upstream gradient for that."""
    subject = Target(target, (x,), {})
    (z,) = subject.forward(subject.leaves_of()[1])
    upstream = double(*z.shape, seed=9)
    source = subject if reference is None else subject.as_computed_by(reference, target)
    oracle = Oracle(subject, source, subject.dtype, given=reference is not None)
    (expected,) = oracle.prepare([upstream]).values()
    return expected, upstream


def cube(x):
    return x**3


def test_each_oracle_is_named_and_right():
    for name, target, reference in [
        ("plain forward", function(cube, lambda g, x: 3 * x**2 * g), None),
        ("reference", lambda x: x * x * x, cube),
        ("forward mode", cube, None),
        ("differences", (lambda x: x**3, lambda g, x: 3 * x**2 * g), None),
    ]:
        expected, upstream = oracle_of(target, X, reference)
        assert expected.oracle == name
        error = (expected.value - 3 * X**2 * upstream).abs().max().item()
        assert error <= expected.uncertainty < 1e-7
        assert (expected.uncertainty < 1e-13) == (name != "differences")
        assert [e.oracle for e in expect("pass", target, X, reference=reference).tensors] == [name]


def test_a_forward_that_hides_a_dependence_is_not_believed():
    """x³, of which autograd sees x² times a constant, and so ⅔ of the derivative; the backward is
    right. In plain torch, what autograd gives is itself under test."""

    def without_grad(x):
        with torch.no_grad():
            return x.clone()

    for hide in (
        Tensor.detach,
        without_grad,
        lambda x: x.data,
        lambda x: torch.from_numpy(x.detach().numpy().copy()),
        lambda x: torch.tensor([value.item() for value in x], dtype=x.dtype),
    ):
        hiding, misled = (
            function(
                lambda x, hide=hide: x.square() * hide(x),
                lambda grad_z, x, slope=slope: slope * x.square() * grad_z,
            )
            for slope in (3, 2)
        )
        gradient, upstream = oracle_of(hiding, X)
        assert gradient.oracle == "differences"
        error = (gradient.value - 3 * X**2 * upstream).abs().max().item()
        assert error <= gradient.uncertainty < 1e-7
        expect("pass", hiding, X)
        expect("fail", misled, X)
    report = expect("fail", lambda x: x.square() * x.detach(), X)
    assert report.tensors[0].oracle == "differences"


def test_a_kernel_of_one_precision_that_autograd_cannot_see_into():
    """In float32 an untrue zero is harder to tell: where values are large or small, too."""

    def kernel(forward):
        def call(*inputs):
            if any(t.dtype != torch.float32 for t in inputs):
                raise TypeError("float32 only")
            return torch.from_numpy(forward(*(t.detach().numpy() for t in inputs)))

        return call

    def softmax(x):
        exps = np.exp(x - x.max(1, keepdims=True))
        return exps / exps.sum(1, keepdims=True)

    for forward, gradients, shapes in [
        (np.multiply, lambda g, x, w: [g * w, (g * x).sum(0)], [(5, 3), (3,)]),
        (np.matmul, lambda g, x, w: [g @ w.T, x.T @ g], [(2, 5), (5, 3)]),
        (lambda x: np.maximum(x, 0), lambda g, x: [g * (x > 0)], [(5, 3)]),
        (softmax, lambda g, x: [(g - (g * x.softmax(1)).sum(1, True)) * x.softmax(1)], [(5, 3)]),
    ]:
        for scale, factor in itertools.product((1e-3, 1.0), (1, 1.5)):  # the checker adds others
            inputs = [(scale * double(*shape)).float() for shape in shapes]
            backward = lambda *at, of=gradients, f=factor: (*(f * g for g in of(*at)),)  # noqa: E731
            with about(forward, scale, factor):
                target = function(kernel(forward), backward)
                expect("pass" if factor == 1 else "fail", target, *inputs)


def test_forward_mode_products_are_right():
    gradient, upstream = oracle_of(torch.sin, double(5000))
    assert gradient.oracle == "forward-mode products" and gradient.value is None
    known = double(5000).cos() * upstream
    for direction, (product, _) in zip(gradient.directions, gradient.products, strict=True):
        assert set(direction.tolist()) == {-1.0, 1.0}
        assert math.isclose(product, (direction * known).sum().item(), rel_tol=1e-12)


def test_products_find_one_wrong_element_among_many():
    def target(x, error):
        x = x * 1
        if x.requires_grad:
            wrong = torch.ones(20_000, dtype=torch.float64)
            wrong[12_345] += error
            x.register_hook(lambda grad: grad * wrong.to(grad))
        return x.sin()

    for verdict, error in [("pass", 0.0), ("fail", 1e-6)]:
        report = expect(verdict, partial(target, error=error), double(20_000))
        assert report.tensors[0].oracle == "forward-mode products"


def test_differences_of_many_elements(monkeypatch):
    monkeypatch.setattr("nn_backprop.check.judge.RESOLVED", 0)  # what is wrong stays as it is
    x = np.random.default_rng(0).standard_normal(4000)
    right, wrong = lambda g, x: g * np.cos(x), lambda g, x: g * np.cos(x) * (x < 3)
    report = expect("pass", (np.sin, right), x)
    assert report.tensors[0].oracle == "difference products"
    assert (x >= 3).sum() < 20
    expect("fail", (np.sin, wrong), x)


# --- extrapolation, against known derivatives ---


def slope_of(f, x: float, noise: float) -> tuple[float, float]:
    """By differences, with its own error."""
    return extrapolated(
        lambda h: [torch.tensor([f(x + h)], dtype=torch.float64)],
        [torch.ones(1, dtype=torch.float64)], 1.0, EPS, [torch.tensor([noise]).double()],
    )  # fmt: skip


def test_the_extrapolated_slope_is_within_its_own_error():
    for f, x, slope in [
        (math.exp, 0.7, math.exp(0.7)),
        (lambda x: 1 / x, 2.0, -1 / 4),
        (lambda x: 1 / (x - 0.9), 1.0, -100.0),  # near its pole
        (lambda x: x**3, -1.3, 3 * 1.3**2),
        (abs, -0.2, -1.0),
        (abs, 1e-3, 1.0),  # close to its kink
        (lambda x: math.sin(50 * x), 1.0, 50 * math.cos(50)),
        (lambda x: math.sin(1e4 * x), 1.0, 1e4 * math.cos(1e4)),
        (lambda x: 3.0, 1.0, 0.0),
        (lambda x: 1e6 + x, 1.0, 1.0),
        (math.tanh, 12.0, 1 / math.cosh(12) ** 2),  # saturated
    ]:
        found, error = slope_of(f, x, 4 * EPS * abs(f(x)))
        assert abs(found - slope) <= error, (x, slope)
        assert error <= 1e-7 * max(abs(slope), abs(f(x))) or f is math.tanh


@pytest.mark.parametrize("seed", range(3))
def test_a_fast_function_is_not_called_wrong(seed):
    """Where every step is longer than a period, differences tell nothing."""
    for speed in (1, 32, 1024):
        x = double(3, 5, seed=seed)
        report = expect("pass", lambda x, speed=speed: (speed * x).square().sin(), x)
        assert report.tensors[0].oracle == "forward mode", report
        pair = (
            lambda x, speed=speed: np.sin((speed * x) ** 2),
            lambda grad, x, speed=speed: grad * np.cos((speed * x) ** 2) * 2 * speed**2 * x,
        )
        assert check_gradients(pair, x.numpy()).verdict != "fail"


def test_the_error_does_not_hide_a_kink():
    """At |x|'s kink there is no slope: whatever is answered, 0 ± 0 is a lie about f(x) = x + |x|,
    and so is more than the slopes 0 and 2."""
    assert 0 <= slope_of(lambda h: h + abs(h), 0.0, 0.0)[0] <= 2


# --- rounding ---


def test_a_well_conditioned_layer_has_a_tight_bound():
    for module, x in [
        (nn.Linear(5, 7), double(3, 5)),
        (nn.Conv2d(3, 5, 3), double(2, 3, 7, 7)),
        (nn.BatchNorm1d(5), double(11, 5)),
        (nn.Softmax(1), double(5, 7)),
        (nn.GRU(5, 3), double(2, 7, 5)),
    ]:
        for e in expect("pass", module.double(), x).tensors:
            largest = e.error / e.relative_error if e.relative_error else abs(e.expected)
            assert 0 < e.smallest_visible <= 1e-9 * largest, (module, e)


def test_the_bound_grows_with_cancellation():
    norm = nn.BatchNorm1d(5, affine=False).double()
    plain, cancelling = (
        expect("pass", norm, double(11, 5) + mean).tensors[0].smallest_visible
        for mean in (0.0, 1e6)
    )
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
    expect("inconclusive", cancels, double(11).float() + 3e5, says="rounding in float32")


def test_gelu_in_its_two_forms_is_told_apart_by_the_reference():
    tanh_form = partial(F.gelu, approximate="tanh")
    expect("pass", tanh_form, double(3, 5))
    expect("fail", tanh_form, double(3, 5), reference=F.gelu)


def test_what_rounding_hides_is_told_in_float64():
    """tanh′ at 8.2 is 3·10⁻⁷, two units of float32's rounding of 1."""

    def backward(factor, grad_z, x):
        y = x.tanh()
        return factor * grad_z * (1 - y * y)

    def tanh(x):
        return (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())

    x = torch.tensor([8.2, 8.1, 8.15])
    expect("pass", function(tanh, partial(backward, 1.0)), x, says="told in float64")
    expect("fail", function(tanh, partial(backward, 1.3)), x)


def test_a_tie_in_the_lower_precision_only():
    """10⁸ + 10⁻³ and 10⁸ + 2·10⁻³ are two numbers in float64 and one in float32: the plain forward
    in float32, like the target, takes the first for the larger."""

    def backward(factor, grad_z, x):
        at = (1e8 + 1e-3 * x).argmax(1)
        return 1e-3 * factor * grad_z[:, None] * F.one_hot(at, 2)

    larger = lambda x: (1e8 + 1e-3 * x).max(1).values  # noqa: E731
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    expect("pass", function(larger, partial(backward, 1)), x, says="to rounding in float32")
    expect("fail", function(larger, partial(backward, 2)), x)


def test_infinity_is_not_rounded():
    mode = Rounding(torch.float32, 1, keep_ties=False)
    moved = mode.moved(torch.tensor([-math.inf, 1.0]).double())
    assert moved[0] == -math.inf
    assert 0 < abs(moved[1] - 1) <= 2**-23


def test_a_saturated_attention_with_a_mask_is_as_uncertain_as_it_is():
    """Its dot products reach 10³, so that all but one weight vanish, and huge terms cancel."""
    attention = partial(F.scaled_dot_product_attention, is_causal=True)
    query, key = 1e-7 * double(2, 1, 3, 5), 4e9 * double(2, 1, 3, 5)
    expect("pass", attention, query, key, 4e8 * double(2, 1, 3, 7))


def test_beyond_a_kink_a_difference_is_not_asked():
    """The second entry of the pair stays below the first in a neighbourhood of 10⁻³ of it."""
    x = 1e-9 * np.array([[1.2051, 1.2071, -0.5], [-0.3, 0.2, 0.2004]])
    backward = lambda g, x: ((x == x.max(1, keepdims=True)) * g[:, None],)  # noqa: E731
    (entry,) = check_gradients((lambda x: x.max(1), backward), x).tensors
    assert (entry.oracle, entry.verdict) == ("differences", "pass"), entry


def test_where_nothing_moves_a_gradient_below_rounding_is_not_wrong():
    """x Φ(x) is 0 in float64 from x = −9 on, and its derivative 10⁻¹⁷⁷ at −28.5."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def backward(grad_z, x):
        return grad_z * (normal.cdf(x) + x * normal.log_prob(x).exp())

    expect("inconclusive", function(F.gelu, backward), double(1) * 0 - 28.5, says="no power")


def test_below_the_smallest_normal_number():
    """There, float16 has steps of 6·10⁻⁸, and the outputs are of that size; and a product of four
    factors of 3·10⁻¹¹ has few digits left in float32."""
    for seed in (1, 4, 5):
        x, w = 2e-4 * double(4, 4, seed=seed).half(), 3e-3 * double(4, 4, seed=seed + 9).half()
        expect("pass", lambda x, w: (x @ w) @ w, x, w)
    for seed in (0, 1):
        expect("pass", lambda x: x.prod(2), 3e-11 * double(5, 7, 4, seed=seed))


def nearly_tied(slope: float) -> type[Function]:
    """max(x, 0) + 1 with `slope` for x < 0, by a forward that cannot be recorded as torch ops."""
    return function(
        lambda x: torch.from_numpy(np.maximum(x.numpy(), 0.0) + 1.0),
        lambda grad_z, x: torch.where(x < 0, slope, 1.0) * grad_z,
    )


def test_differences_that_shorter_steps_contradict_are_unsure():
    """Beside a kink at 3e-13, where steps of 1e-9 see half the slope, with outputs of size 1; but
    a wrong slope away from the kink fails."""
    x = torch.tensor([[-3e-13], [0.7], [-0.4]], dtype=torch.float64)
    assert check_gradients(nearly_tied(0.0), x).verdict != "fail"
    x[0] = -3e-2
    for slope in (0.5, 1e-3, -1.0):
        expect("fail", nearly_tied(slope), x)


def test_where_half_precision_is_far_from_float64_rounding_is_still_that_of_half_precision():
    """The mean of two numbers that are close is rounded, which changes their standard deviation;
    so that float64 is no model of it, but says how far rounding goes."""
    x = torch.tensor([[0.26, 0.084], [0.257, 0.0845]]).bfloat16()
    torch.manual_seed(0)
    norm = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.BatchNorm1d(5)).bfloat16()
    assert check_gradients(norm, x / 8).verdict != "fail"
