"""Verdicts: what they rest on, how they are reported, and mistakes that other checkers let pass."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import spoilt
from suspects import (
    Doubled,
    Square,
    cancels,
    double,
    elementwise,
    expect,
    function,
    oracles,
    square,
)
from torch import nn
from torch.autograd import Function

from nn_backprop import (
    Cause,
    GradientMismatch,
    as_function,
    assert_gradients,
    check_gradients,
    compare_gradients,
    rules,
)

X = double(3, 5)
FAR = double(11).float() + 3e5
LOW = [torch.float32, torch.bfloat16, torch.float16]
FOUR = {  # one target for each verdict, and one that cannot be run
    "pass": (Square, X),
    "fail": (Doubled, X),
    "inconclusive": (cancels, FAR),
    "cannot be run": (lambda x: x @ x, X),
}


def raising(grad_z, x):
    raise RuntimeError("out of registers")


# --- the report ---


def test_a_report_is_readable_by_eye_and_by_machine_and_raised_unless_right():
    for name, (target, x) in FOUR.items():
        verdict = name if name in ("pass", "fail") else "inconclusive"
        if verdict == "pass":
            report = assert_gradients(target, x)
        else:
            with pytest.raises(GradientMismatch, match=verdict.upper()) as caught:
                assert_gradients(target, x, allow_inconclusive=verdict == "fail")
            report = caught.value.report
            assert isinstance(caught.value, AssertionError) and str(caught.value) == str(report)
        text = str(report)
        assert text.startswith(report.verdict.upper()) and report.verdict == verdict
        assert all(len(line) <= 100 for line in text.split("\n\n")[0].splitlines())
        assert (report.reason == "") == (name == "pass") == report.ok
        assert (report.error is not None) == (name == "cannot be run")
        plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert plain["verdict"] == verdict and plain["ok"] == report.ok
        assert len(plain["tensors"]) == len(report.tensors)
        assert len(plain["causes"]) == len(report.causes) == (name == "fail")
    report = assert_gradients(cancels, FAR, allow_inconclusive=True)
    assert report.verdict == "inconclusive" and not report.ok


def test_the_report_gives_the_figures():
    (entry,) = check_gradients(Doubled, X).tensors
    assert (entry.name, entry.shape, entry.verdict) == ("x", (3, 5), "fail")
    assert entry.actual == pytest.approx(2 * entry.expected, rel=1e-12)
    assert entry.error == pytest.approx(abs(entry.expected), rel=1e-12)
    assert entry.relative_error == pytest.approx(1.0, rel=1e-12)
    assert entry.units > 1e12
    assert entry.error > 1e9 * entry.smallest_visible > 0


def test_the_seed_changes_the_upstream_gradient_and_nothing_else_does():
    values = [check_gradients(Square, X, seed=s).tensors[0].actual for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_hypotheses_that_raise_are_counted(monkeypatch):
    def diagnose(mismatches, forward=None, failures=None):
        failures += ["transforms: ZeroDivisionError", "siblings: KeyError"]
        return [Cause("unknown", "grad_x is wrong", "no more is known")]

    for stage in ("explanation", "comparison"):
        monkeypatch.setattr(f"nn_backprop.check.{stage}.diagnose", diagnose)
    for report in (
        check_gradients(Doubled, X),
        check_gradients(nn.Sequential(nn.Tanh(), Layer(Doubled)), X),  # the causes of a part
        check_gradients(square(lambda g, x: (g, g)), X),
        compare_gradients({"x": 2 * X}, {"x": X}),
    ):
        assert report.failed_hypotheses == report.to_dict()["failed_hypotheses"] == 2
        assert "2 families of hypotheses raised an error" in str(report)
    assert not check_gradients(Square, X).failed_hypotheses


# --- scale ---


def scaled(inputs: float, outputs: float, factor: float) -> list:
    """outputs · sin(x / inputs), with its gradient times a factor: a Function and a pair."""
    slope = factor * outputs / inputs
    return [
        elementwise(
            lambda x: outputs * torch.sin(x / inputs), lambda x: slope * torch.cos(x / inputs)
        ),
        (
            lambda x: outputs * np.sin(x / inputs),
            lambda grad, x: grad * slope * np.cos(x / inputs),
        ),
    ]


@pytest.mark.parametrize("inputs", [1e-12, 1.0, 1e12])
def test_no_scale_changes_a_verdict(inputs):
    for outputs in (1e-12, 1.0, 1e12):
        x = double(7) * inputs
        function, pair = scaled(inputs, outputs, 1.0)
        expect("pass", function, x)
        expect("pass", pair, x.numpy())
        function, pair = scaled(inputs, outputs, 1.001)
        report = expect("fail", function, x)
        assert report.tensors[0].relative_error == pytest.approx(1e-3, rel=1e-6)
        expect("fail", pair, x.numpy())


def test_an_all_zero_gradient_of_a_small_function_is_found():
    expect("fail", elementwise(lambda x: 1e-6 * x, torch.zeros_like), X)


@pytest.mark.parametrize("shape", [(5,), (3, 700)])
def test_a_factor_of_two_is_found_in_each_precision(shape):
    for dtype in (torch.float64, *LOW):
        x = double(*shape).to(dtype)
        expect("pass", Square, x)
        expect("fail", Doubled, x, kind="scale")


@pytest.mark.parametrize("dtype", LOW)
def test_torchs_own_layers_pass_in_low_precision(dtype):
    layers = [nn.Linear(64, 7), nn.Conv2d(3, 5, 3), nn.LayerNorm(64), nn.Softmax(1), nn.GELU()]
    for layer in layers:
        shape = (2, 3, 7, 7) if isinstance(layer, nn.Conv2d) else (5, 64)
        report = check_gradients(layer.to(dtype), double(*shape).to(dtype))
        # Of 8 bits, sums may leave too little to tell.
        unsure = "inconclusive" if dtype == torch.bfloat16 else "pass"
        assert report.verdict in ("pass", unsure), report


# --- gradients that are zero, kinks ---


def test_a_gradient_that_is_zero_passes():
    through_batch_norm = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double()
    two = (double(3), double(2))
    for target, inputs, zero in [
        (through_batch_norm, (double(7, 3),), "0.bias"),
        (lambda x, y: x.softmax(1).sum() + y.sum(), (double(3, 5), double(2)), "x"),
        (lambda x, y: x.sin() + 0 * y.sum(), two, "y"),
        (lambda x, y: x.sin(), two, "y"),
    ]:
        notes = {e.name: e.note for e in expect("pass", target, *inputs).tensors}
        assert "zero" in notes.pop(zero) and not any(notes.values())


def test_a_gradient_that_ought_to_be_zero_and_is_not_fails():
    add = function(lambda x, y: x * 1, lambda g, x, y: (g, 1e-9 * g))
    report = check_gradients(add, double(3), double(3))
    assert [entry.verdict for entry in report.tensors] == ["pass", "fail"]


def test_torchs_answer_at_a_kink_passes():
    zeros = torch.zeros(5, dtype=torch.float64)
    tied = torch.tensor([[1.0, 1, 0], [2, 2, 2]], dtype=torch.float64)
    for target, x in [
        (torch.relu, zeros),
        (torch.abs, zeros),
        (lambda x: F.max_pool2d(x, 2), torch.ones(1, 2, 4, 4).double()),
        (lambda x: x.amax(1), tied),
        (lambda x: x.max(1)[0], tied),
        (torch.relu, torch.tensor([1e-9, -1e-9, 1.0, -1.0]).double()),  # closer than any step
    ]:
        report = check_gradients(target, x)
        assert report.verdict != "fail", report


def test_ties_share_one_gradient():
    def ties(rule) -> type[Function]:
        """The largest of each row; `rule` shares one gradient among the ties."""
        return function(
            lambda x: x.max(1)[0],
            lambda g, x: g[:, None] * rule((x == x.amax(1, keepdim=True)).double()),
        )

    x = torch.tensor([[1.0, 1, 1, 0], [2, 2, 2, 2], [0, 3, 1, 2]], dtype=torch.float64)
    for verdict, rule in [
        ("pass", lambda tied: tied / tied.sum(1, keepdim=True)),
        ("pass", lambda tied: tied * (tied.cumsum(1) == 1)),
        ("pass", lambda tied: tied * (tied.flip(1).cumsum(1).flip(1) == 1)),
        ("fail", lambda tied: tied),
        ("fail", lambda tied: tied * 0),
        ("fail", lambda tied: tied / 2),
    ]:
        expect(verdict, ties(rule), x)


def test_between_the_slopes_at_a_kink_any_answer_passes():
    for verdict, at_zero in [("pass", 0.5), ("fail", 1.5)]:
        relu = elementwise(torch.relu, lambda x, a=at_zero: torch.where(x == 0, a, (x > 0).to(x)))
        expect(verdict, relu, torch.tensor([[0.0, 0, 1, -1, 2]]).double())


def test_a_kink_does_not_excuse_another_entry():
    slope = elementwise(torch.relu, lambda x: (x > 0).double() + (x < -1) * 1e-3)
    report = expect("fail", slope, torch.tensor([0.0, 1, -2, 0]).double())
    assert report.tensors[0].worst_index == (2,)


# --- what cannot be run, and what is handed over wrongly ---


def test_a_backward_that_raises_fails_with_what_it_says():
    no_autograd = function(lambda x: torch.mul(x, x, out=torch.empty_like(x).detach()), raising)
    for target, x, sentence in [
        (square(raising), X, "the backward raised RuntimeError: out of registers"),
        (square(lambda g, x: (g, g)), X, "returned an incorrect number of gradients"),
        (square(lambda g, x: g[:2]), X, "returned an invalid gradient"),
        (square(lambda g, x: "text"), X, "expected Variable or None (got str)"),
        ((np.square, lambda g, x: 1 / 0), X.numpy(), "the backward raised ZeroDivisionError"),
        ((np.square, lambda g, x: (g, g, g)), X.numpy(), "returned 3 gradients for 1 inputs"),
        (no_autograd, X, "out of registers"),
    ]:
        report = expect("fail", target, x)
        assert sentence in report.reason and report.error is not None and report.causes


def test_a_gradient_that_is_not_finite_fails():
    for what in (float("nan"), float("inf")):
        report = expect("fail", square(lambda g, x, w=what: g * (2 * x + w)), X)
        plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert plain["tensors"][0]["actual"] in ("nan", "inf", "-inf") and report.causes
        assert expect("fail", (np.square, lambda g, x, w=what: 2 * x * g + w), X.numpy()).causes


def test_empty_tensors():
    nothing = torch.empty(0, 3, dtype=torch.float64)
    report = expect("pass", lambda x, y: x.sin().sum() + y.sum(), X, nothing)
    assert [entry.note for entry in report.tensors] == ["", "empty"]
    expect("inconclusive", lambda x: x[:0], X, says="every output is empty")
    expect("inconclusive", torch.sin, nothing, says="every input is empty")


def test_a_forward_that_raises_is_kept_with_the_report():
    report = expect("inconclusive", lambda x: x * (1 / 0), X, says="division by zero")
    assert isinstance(report.error, ZeroDivisionError)


# --- networks ---

CONV, RELU, POOL, LINEAR, LOSS = (
    rules.TABLE[f] for f in (F.conv2d, F.relu, F.max_pool2d, F.linear, F.cross_entropy)
)
IMAGES = double(2, 1, 8, 10)


def wrong(rule, operand: str):
    """The Function of a rule with a mistake in one gradient."""
    return as_function(spoilt(rule, operand, lambda grad: 1.5 * grad))


def loss(logits):
    return as_function(LOSS).apply(logits, torch.tensor([2, 0]))


class Layer(nn.Module):
    """A Function in a module of its own, with the parameters of a plain one."""

    def __init__(self, function, plain=None, *rest):
        super().__init__()
        self.function, self.plain, self.rest = function, plain, rest

    def forward(self, x):
        parameters = () if self.plain is None else (self.plain.weight, self.plain.bias)
        return self.function.apply(x, *parameters, *self.rest)


class Net(nn.Module):
    """Two convolutions and two linear layers by hand; the wrong ones are given."""

    def __init__(self, conv=None, relu=None, linear=None, last=None):
        super().__init__()
        torch.manual_seed(0)
        conv_, relu_, pool_, linear_ = map(as_function, (CONV, RELU, POOL, LINEAR))
        self.features = nn.Sequential(
            Layer(conv_, nn.Conv2d(1, 3, 3)), Layer(relu_), Layer(pool_, None, 2),
            Layer(conv or conv_, nn.Conv2d(3, 5, 2)), Layer(relu or relu_), Layer(pool_, None, 2),
        )  # fmt: skip
        self.head = nn.Sequential(
            Layer(linear or linear_, nn.Linear(5, 7)), Layer(relu_),
            Layer(last or linear_, nn.Linear(7, 3)),
        )  # fmt: skip
        self.double()

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def test_a_network_of_layers_by_hand_passes():
    report = expect("pass", Net(), IMAGES, loss=loss)
    assert not report.where and len(report.tensors) == 9
    assert oracles(report) == {"plain forward"}
    inside = [probe.name for probe in report.probes if probe.name.endswith("by itself")]
    assert len(inside) == 10 and "features.3 (conv2d) by itself" in inside


@pytest.mark.parametrize("mistakes", [
    ("features.3 (conv2d)", {"conv": (CONV, "weight")}),
    ("features.3 (conv2d)", {"conv": (CONV, "x")}),
    ("features.4 (relu)", {"relu": (RELU, "z")}),
    ("head.2 (linear)", {"last": (LINEAR, "bias")}),
    ("head.0 (linear)", {"conv": (CONV, "x"), "linear": (LINEAR, "weight")}),
])  # fmt: skip
def test_in_a_network_the_wrong_layer_nearest_the_loss_is_named(mistakes):
    where, layers = mistakes
    net = Net(**{place: wrong(*mistake) for place, mistake in layers.items()})
    report = expect("fail", net, IMAGES, loss=loss, kind="scale")
    assert report.where == where and where in report.reason
    assert all(cause.detail.startswith(where) for cause in report.causes)


class Hooked(nn.Module):
    """A gradient that goes wrong without any Function."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda grad: -grad)
        return self.linear(x)


def test_a_mistake_without_functions_is_found_in_its_submodule():
    block = nn.Sequential(nn.Linear(5, 7), Hooked(nn.Linear(7, 11)), nn.Tanh())
    model = nn.Sequential(nn.Linear(3, 5), block, nn.Linear(11, 2)).double()
    assert expect("fail", model, double(7, 3), kind="sign").where == "1.1 (Hooked)"


def test_a_mistake_of_protocol_deep_in_a_network_is_named():
    """The formula is right, and so are the network's gradients."""
    strided = square(lambda g, x: 2 * x * torch.as_strided(g, x.shape, x.stride(), 0))
    block = nn.Sequential(Layer(as_function(RELU)), Layer(strided))
    report = expect("fail", nn.Sequential(block, nn.Hardtanh(-100, 100)), X)
    assert report.where == "0.1 (Suspect)"
    assert [entry.verdict for entry in report.tensors] == ["pass"]
    assert "assumes-contiguous" in [cause.kind for cause in report.causes]
