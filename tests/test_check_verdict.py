"""Verdicts: what they rest on, how they are reported, and mistakes that other checkers let pass."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import Doubled, Square, cancels, double, elementwise, function
from torch import nn
from torch.autograd import Function

from nn_backprop import GradientMismatch, as_function, assert_gradients, check_gradients, rules

X = double(3, 5)
FAR = double(11).float() + 3e5
FOUR = {  # one target for each verdict, and one that cannot be run
    "pass": (Square, X),
    "fail": (Doubled, X),
    "inconclusive": (cancels, FAR),
    "cannot be run": (lambda x: x @ x, X),
}

# --- the report ---


def test_assert_gradients():
    report = assert_gradients(Square, X)
    assert report.ok and report.verdict == "pass" and report.reason == "" and not report.causes
    with pytest.raises(GradientMismatch) as caught:
        assert_gradients(Doubled, X, allow_inconclusive=True)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == str(caught.value.report)
    assert caught.value.report.verdict == "fail" and not caught.value.report.ok
    with pytest.raises(GradientMismatch, match="INCONCLUSIVE"):
        assert_gradients(cancels, FAR)
    report = assert_gradients(cancels, FAR, allow_inconclusive=True)
    assert report.verdict == "inconclusive" and not report.ok


@pytest.mark.parametrize("name", FOUR)
def test_a_report_is_readable_by_eye_and_by_machine(name):
    target, x = FOUR[name]
    report = check_gradients(target, x)
    assert report.verdict == (name if name in ("pass", "fail") else "inconclusive")
    text = str(report)
    assert text.startswith(report.verdict.upper())
    head = text.split("\n\n")[0].splitlines()
    assert all(len(line) <= 100 for line in head)
    assert (report.reason == "") == (name == "pass") == report.ok
    assert (report.error is not None) == (name == "cannot be run")
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["verdict"] == report.verdict and plain["ok"] == report.ok
    assert len(plain["tensors"]) == len(report.tensors)
    assert len(plain["causes"]) == len(report.causes) == (name == "fail")


def test_a_gradient_that_is_not_a_number_can_be_reported():
    report = check_gradients(elementwise(torch.square, lambda x: x / 0), X)
    assert report.verdict == "fail"
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["tensors"][0]["actual"] in ("inf", "-inf")


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


# --- scale ---


def scaled(inputs: float, outputs: float, factor: float) -> type[Function]:
    """outputs · sin(x / inputs), with its gradient times a factor."""
    slope = factor * outputs / inputs
    return elementwise(
        lambda x: outputs * torch.sin(x / inputs), lambda x: slope * torch.cos(x / inputs)
    )


@pytest.mark.parametrize("outputs", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("inputs", [1e-12, 1.0, 1e12])
def test_no_scale_changes_a_verdict(inputs, outputs):
    x = double(7) * inputs
    assert check_gradients(scaled(inputs, outputs, 1.0), x).ok
    report = check_gradients(scaled(inputs, outputs, 1.001), x)
    assert report.verdict == "fail"
    assert report.tensors[0].relative_error == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("outputs", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("inputs", [1e-12, 1.0, 1e12])
def test_no_scale_changes_a_verdict_by_differences(inputs, outputs):
    x = double(7).numpy() * inputs

    def pair(factor):
        return (
            lambda x: outputs * np.sin(x / inputs),
            lambda grad, x: factor * grad * outputs / inputs * np.cos(x / inputs),
        )

    report = check_gradients(pair(1.0), x)
    assert report.ok, report
    assert check_gradients(pair(1.001), x).verdict == "fail"


def test_an_all_zero_gradient_of_a_small_function_is_found():
    assert check_gradients(elementwise(lambda x: 1e-6 * x, torch.zeros_like), X).verdict == "fail"


@pytest.mark.parametrize("shape", [(10_000,), (100, 100)])
def test_one_wrong_element_in_float32(shape):
    def slope(x):
        slope = 2 * x
        slope.view(-1)[4321] *= 1.001
        return slope

    x = double(*shape).float()
    assert check_gradients(elementwise(torch.square, lambda x: 2 * x), x).ok
    report = check_gradients(elementwise(torch.square, slope), x)
    assert report.verdict == ("fail" if abs(x.view(-1)[4321]) > 0.1 else "pass")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 700)])
def test_a_factor_of_two_is_found_in_each_precision(dtype, shape):
    x = double(*shape).to(dtype)
    assert check_gradients(Square, x).ok
    report = check_gradients(Doubled, x)
    assert (report.verdict, report.causes[0].kind) == ("fail", "scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(64, 7), nn.Conv2d(3, 5, 3), nn.LayerNorm(64), nn.Softmax(1), nn.GELU()],
    ids=lambda layer: type(layer).__name__,
)
def test_torchs_own_layers_pass_in_low_precision(layer, dtype):
    shape = (2, 3, 7, 7) if isinstance(layer, nn.Conv2d) else (5, 64)
    report = check_gradients(layer.to(dtype), double(*shape).to(dtype))
    # Of 8 bits, sums may leave too little to tell.
    assert report.verdict in ("pass", "inconclusive" if dtype == torch.bfloat16 else "pass"), report


# --- gradients that are zero, kinks ---


def zero_bias():
    """Batch norm takes away whatever a bias adds."""
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double(), double(7, 3)


ZEROS = {
    "a bias before batch norm": (*zero_bias(), "0.bias"),
    "softmax with a constant upstream": (
        lambda x, y: x.softmax(1).sum() + y.sum(), (double(3, 5), double(2)), "x",
    ),
    "an output that does not depend on it": (
        lambda x, y: x.sin() + 0 * y.sum(), (double(3), double(2)), "y",
    ),
    "not used at all": (lambda x, y: x.sin(), (double(3), double(2)), "y"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZEROS)
def test_a_gradient_that_is_zero_passes(name):
    target, inputs, zero = ZEROS[name]
    report = check_gradients(target, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    assert report.ok, report
    (entry,) = (e for e in report.tensors if e.name == zero)
    assert "zero" in entry.note
    assert all(not e.note for e in report.tensors if e.name != zero)


def test_a_gradient_that_ought_to_be_zero_and_is_not_fails():
    add = function(lambda x, y: x * 1, lambda ctx, g: (g, 1e-9 * g))
    report = check_gradients(add, double(3), double(3))
    assert [entry.verdict for entry in report.tensors] == ["pass", "fail"]


KINKS = {  # target, input, how many of the entries are kinks of torch's own answer
    "relu at 0": (torch.relu, torch.zeros(5, dtype=torch.float64)),
    "abs at 0": (torch.abs, torch.zeros(5, dtype=torch.float64)),
    "max-pool of ties": (lambda x: F.max_pool2d(x, 2), torch.ones(1, 2, 4, 4).double()),
    "amax of ties": (lambda x: x.amax(1), torch.tensor([[1.0, 1, 0], [2, 2, 2]]).double()),
    "max of ties": (lambda x: x.max(1)[0], torch.tensor([[1.0, 1, 0], [2, 2, 2]]).double()),
    "closer than any step": (torch.relu, torch.tensor([1e-9, -1e-9, 1.0, -1.0]).double()),
}


@pytest.mark.parametrize("name", KINKS)
def test_torchs_answer_at_a_kink_passes(name):
    target, x = KINKS[name]
    report = check_gradients(target, x)
    assert report.verdict != "fail", report


def ties(rule) -> type[Function]:
    """The largest of each row; `rule` shares one gradient among the ties."""
    return function(
        lambda x: x.max(1)[0],
        lambda ctx, grad_z: (
            grad_z[:, None]
            * rule((ctx.saved_tensors[0] == ctx.saved_tensors[0].amax(1, keepdim=True)).double())
        ),
    )


@pytest.mark.parametrize(
    ("rule", "right"),
    [
        (lambda tied: tied / tied.sum(1, keepdim=True), True),
        (lambda tied: tied * (tied.cumsum(1) == 1), True),
        (lambda tied: tied * (tied.flip(1).cumsum(1).flip(1) == 1), True),
        (lambda tied: tied, False),
        (lambda tied: tied * 0, False),
        (lambda tied: tied / 2, False),
    ],
)
def test_ties_share_one_gradient(rule, right):
    x = torch.tensor([[1.0, 1, 1, 0], [2, 2, 2, 2], [0, 3, 1, 2]], dtype=torch.float64)
    assert check_gradients(ties(rule), x).ok == right


def test_a_kink_does_not_excuse_another_entry():
    def slope(x):
        return (x > 0).double() + (x < -1) * 1e-3

    report = check_gradients(elementwise(torch.relu, slope), torch.tensor([0.0, 1, -2, 0]).double())
    assert report.verdict == "fail" and report.tensors[0].worst_index == (2,)


# --- what cannot be run, and what is handed over wrongly ---


def with_backward(backward) -> type[Function]:
    return function(torch.square, lambda ctx, g: backward(g, *ctx.saved_tensors))


def raising(grad_z, x):
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (with_backward(raising), "the backward raised RuntimeError: out of registers"),
        (with_backward(lambda g, x: (g, g)), "returned an incorrect number of gradients"),
        (with_backward(lambda g, x: g[:2]), "returned an invalid gradient"),
        (with_backward(lambda g, x: "text"), "expected Variable or None (got str)"),
        ((np.square, lambda g, x: 1 / 0), "the backward raised ZeroDivisionError"),
        ((np.square, lambda g, x: (g, g, g)), "backward returned 3 gradients for 1 inputs"),
    ],
)
def test_a_backward_that_raises_fails_with_what_it_says(target, sentence):
    report = check_gradients(target, X if isinstance(target, type) else X.numpy())
    assert report.verdict == "fail" and report.error is not None
    assert sentence in report.reason and report.causes


def test_a_forward_that_autograd_cannot_run_and_a_backward_that_raises():
    def forward(x):
        return torch.mul(x, x, out=torch.empty_like(x).detach())

    report = check_gradients(function(forward, lambda ctx, g: raising(g, None)), X)
    assert report.verdict == "fail" and "out of registers" in report.reason


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_fails(what):
    report = check_gradients(elementwise(torch.square, lambda x: 2 * x + what), X)
    assert report.verdict == "fail" and report.causes
    report = check_gradients((np.square, lambda g, x: 2 * x * g + what), X.numpy())
    assert report.verdict == "fail" and report.causes


def test_empty_tensors_beside_others():
    nothing = torch.empty(0, 3, dtype=torch.float64)
    report = check_gradients(lambda x, y: x.sin().sum() + y.sum(), X, nothing)
    assert report.ok, report
    assert [entry.note for entry in report.tensors] == ["", "empty"]


def test_an_empty_output_is_inconclusive():
    report = check_gradients(lambda x: x[:0], X)
    assert report.verdict == "inconclusive" and "every output is empty" in report.reason


def test_a_forward_that_raises_is_kept_with_the_report():
    def target(x):
        raise ZeroDivisionError("no such luck")

    report = check_gradients(target, X)
    assert report.verdict == "inconclusive" and isinstance(report.error, ZeroDivisionError)
    assert "no such luck" in report.reason


@pytest.mark.parametrize(
    ("target", "inputs", "sentence"),
    [
        (lambda x: x + 1j, (X,), "complex"),
        (lambda x: x.to_sparse(), (X,), "sparse"),
        (nn.Flatten(), (torch.arange(3),), "no parameter requires grad"),
        (lambda x: None, (X,), "no output is a floating tensor"),
        (nn.Linear, (X,), "the target is the class Linear"),
        (None, (X,), "the target is a NoneType"),
        ((np.sin,), (X.numpy(),), "the target is a tuple"),
        (X, (X,), "the target is a Tensor"),
        (torch.sin, (), "nothing to differentiate"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_sentence(target, inputs, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        check_gradients(target, *inputs)
    assert "\n" not in str(caught.value)


# --- networks ---

CONV, RELU, POOL, LINEAR, LOSS = (
    rules.TABLE[f] for f in (F.conv2d, F.relu, F.max_pool2d, F.linear, F.cross_entropy)
)


def wrong(rule, operand: str, by=lambda grad: 1.5 * grad):
    """The Function of a rule with a mistake in one gradient."""
    from comparison import spoilt

    return as_function(spoilt(rule, operand, by))


class Layer(nn.Module):
    """A Function in a module of its own, with the parameters of a plain one."""

    def __init__(self, function, plain=None, *rest):
        super().__init__()
        self.function, self.plain, self.rest = function, plain, rest

    def forward(self, x):
        parameters = () if self.plain is None else (self.plain.weight, self.plain.bias)
        return self.function.apply(x, *parameters, *self.rest)


def lenet(conv=None, relu=None, pool=None, linear=None, last=None) -> nn.Module:
    """Two convolutions and two linear layers by hand; the wrong ones are given."""
    torch.manual_seed(0)
    conv, relu, pool = (
        conv or as_function(CONV),
        relu or as_function(RELU),
        pool or as_function(POOL),
    )
    linear, last = linear or as_function(LINEAR), last or as_function(LINEAR)
    features = nn.Sequential(
        Layer(as_function(CONV), nn.Conv2d(1, 3, 3)), Layer(as_function(RELU)),
        Layer(as_function(POOL), None, 2),
        Layer(conv, nn.Conv2d(3, 5, 2)), Layer(relu), Layer(pool, None, 2),
    )  # fmt: skip
    head = nn.Sequential(Layer(linear, nn.Linear(20, 7)), Layer(as_function(RELU)),
                         Layer(last, nn.Linear(7, 3)))  # fmt: skip
    return nn.ModuleDict({"features": features, "head": head}).double()


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        parts = lenet(**layers)
        self.features, self.head = parts["features"], parts["head"]

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


IMAGES = double(2, 1, 12, 12)
MISTAKES = {  # the wrong layers, and which of them is to be named
    "a convolution": ({"conv": wrong(CONV, "weight")}, "features.3 (conv2d)"),
    "its gradient of x": ({"conv": wrong(CONV, "x")}, "features.3 (conv2d)"),
    "an activation": ({"relu": wrong(RELU, "z")}, "features.4 (relu)"),
    "the last layer": ({"last": wrong(LINEAR, "bias")}, "head.2 (linear)"),
    "two": ({"conv": wrong(CONV, "x"), "linear": wrong(LINEAR, "weight")}, "head.0 (linear)"),
}


def loss(logits):
    return as_function(LOSS).apply(logits, torch.tensor([2, 0]))


def test_a_network_of_layers_by_hand_passes():
    report = check_gradients(Net(), IMAGES, loss=loss)
    assert report.ok and not report.where, report
    assert len(report.tensors) == 9
    assert {entry.oracle for entry in report.tensors} == {"plain forward"}
    inside = [probe.name for probe in report.probes if probe.name.endswith("by itself")]
    assert len(inside) == 10 and "features.3 (conv2d) by itself" in inside


@pytest.mark.parametrize("mistake", MISTAKES)
def test_in_a_network_the_wrong_layer_nearest_the_loss_is_named(mistake):
    layers, where = MISTAKES[mistake]
    report = check_gradients(Net(**layers), IMAGES, loss=loss)
    assert report.verdict == "fail"
    assert report.where == where and where in report.reason
    assert report.causes[0].kind == "scale"
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
    report = check_gradients(model, double(7, 3))
    assert report.verdict == "fail" and report.where == "1.1 (Hooked)", report
    assert report.causes[0].kind == "sign"


def test_a_mistake_of_protocol_deep_in_a_network_is_named():
    """The formula is right, and so are the network's gradients."""
    relu = as_function(RELU)

    class Strided(Square):
        @staticmethod
        def backward(ctx, grad_z):
            (x,) = ctx.saved_tensors
            return 2 * x * torch.as_strided(grad_z, x.shape, x.stride(), 0)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Layer(relu), Layer(Strided))

        def forward(self, x):
            return self.block(x) * 3

    report = check_gradients(Deep(), X)
    assert report.verdict == "fail" and report.where == "block.1 (Strided)"
    assert [entry.verdict for entry in report.tensors] == ["pass"]
    assert "assumes-contiguous" in [cause.kind for cause in report.causes]
