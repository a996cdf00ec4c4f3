"""The checker: right passes, wrong fails with its cause, and what cannot be told says so."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from nn_backprop import GradientMismatch, as_function, assert_gradients, check_gradients, rules
from nn_backprop.check import catalogue


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def function(forward, backward) -> type[Function]:
    """A Function from forward(*inputs) and backward(grad_z, *inputs)."""

    class Checked(Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, grad_z):
            return backward(grad_z, *ctx.saved_tensors)

    return Checked


def linear_backward(grad_z, x, weight, bias):
    return grad_z @ weight, grad_z.t() @ x, grad_z.sum(0)


RIGHT = function(lambda x, w, b: x @ w.t() + b, linear_backward)
OPERANDS = (double(5, 7), double(3, 7), double(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_function_passes_in_each_precision(dtype):
    report = check_gradients(RIGHT, *(t.to(dtype) for t in OPERANDS))
    assert report.ok, report
    assert {entry.oracle for entry in report.tensors} == {"plain forward"}
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(report).startswith("PASS")


@pytest.mark.parametrize(
    "mistake, kind",
    [
        (lambda g, x, w, b: (g @ w, g.t() @ x / 5, g.sum(0)), "scale"),
        (lambda g, x, w, b: (g @ w, -g.t() @ x, g.sum(0)), "sign"),
        (lambda g, x, w, b: (g @ w, x.t() @ g, g.sum(0)), "transposed"),
        (lambda g, x, w, b: (g @ w, g.t() @ x, g), "wrong-reduction"),
        (lambda g, x, w, b: (g @ w, g.t() @ x, None), "detached"),
        (lambda g, x, w, b: (g @ w, g.t() @ x + w, g.sum(0)), "extra-term"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_one_fails_and_the_cause_is_named(mistake, kind, dtype):
    wrong = function(lambda x, w, b: x @ w.t() + b, mistake)
    operands = [t.to(dtype) for t in OPERANDS]
    report = check_gradients(wrong, *operands)
    assert report.verdict == "fail"
    assert report.causes[0].kind == kind, report
    with pytest.raises(GradientMismatch, match="FAIL"):
        assert_gradients(wrong, *operands)


@pytest.mark.parametrize("error", [1000.0, 1e-6])
def test_one_wrong_entry_among_ten_thousand_is_found(error):
    def backward(grad_z, x):
        grad_x = grad_z.clone()
        grad_x[777] += error * grad_z[778]
        return grad_x

    report = check_gradients(function(torch.clone, backward), double(10_000))
    assert report.verdict == "fail"
    assert report.tensors[0].worst_index == (777,)
    assert report.causes[0].kind == "unknown"


def test_an_all_zero_gradient_of_a_small_function_is_found():
    report = check_gradients(function(lambda x: 1e-6 * x, lambda g, x: 0 * g), double(7))
    assert (report.verdict, report.causes[0].kind) == ("fail", "detached")


def test_a_mistake_in_float32_only_is_found():
    def backward(grad_z, x):
        return grad_z * x.exp() * (1.1 if x.dtype == torch.float32 else 1)

    report = check_gradients(function(torch.exp, backward), double(7))
    assert (report.verdict, report.causes[0].kind) == ("fail", "wrong-precision")


def test_a_branch_that_only_large_inputs_take_is_found():
    def backward(grad_z, x):
        return grad_z * 2 * x * torch.where(x.abs() > 20, 0.9, 1.0)

    report = check_gradients(function(torch.square, backward), double(7))
    assert (report.verdict, report.causes[0].kind) == ("fail", "wrong-branch")


@pytest.mark.parametrize("at_zero, right", [(0.0, True), (0.5, True), (1.0, True), (1.5, False)])
def test_at_a_kink_any_value_between_the_slopes_is_right(at_zero, right):
    def backward(grad_z, x):
        return grad_z * torch.where(x == 0, at_zero, (x > 0).to(x))

    x = torch.tensor([-1.0, 0, 2, 0, 0, 3], dtype=torch.float64)
    assert check_gradients(function(torch.relu, backward), x).ok == right


@pytest.mark.parametrize("shares, right", [(True, True), (False, False)])
def test_in_a_tie_the_sum_has_to_be_right_too(shares, right):
    def forward(x):
        return x.reshape(len(x), -1, 2).max(-1)

    def backward(grad, x):
        pairs = x.reshape(len(x), -1, 2)
        chosen = (pairs == pairs.max(-1, keepdims=True)).astype(float)
        if shares:
            chosen /= chosen.sum(-1, keepdims=True)
        return (chosen * grad[..., None]).reshape(x.shape)

    x = np.random.default_rng(0).integers(0, 3, (4, 8)).astype(float)
    report = check_gradients((forward, backward), x)
    assert report.ok == right
    assert report.tensors[0].oracle == "differences"


def test_a_module_is_checked_by_name_and_left_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2))
    model[3].bias.requires_grad_(False)
    x = double(7, 3).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    report = check_gradients(model, x)
    assert report.ok, report
    names = [entry.name for entry in report.tensors]
    assert names == ["input", "0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert torch.equal(random, torch.get_rng_state())


def test_in_a_network_the_first_mistake_from_the_loss_down_is_named():
    class Layer(nn.Module):
        def __init__(self, inputs, outputs, function):
            super().__init__()
            self.weight = nn.Parameter(double(outputs, inputs))
            self.bias = nn.Parameter(double(outputs))
            self.function = function

        def forward(self, x):
            return self.function.apply(x, self.weight, self.bias)

    forward = lambda x, w, b: x @ w.t() + b  # noqa: E731
    negated = function(forward, lambda g, x, w, b: (-g @ w, g.t() @ x, g.sum(0)))
    fifth = function(forward, lambda g, x, w, b: (g @ w, g.t() @ x / 5, g.sum(0)))
    model = nn.Sequential(Layer(7, 11, negated), nn.Tanh(), Layer(11, 13, fifth), nn.Tanh(),
                          Layer(13, 3, RIGHT))  # fmt: skip
    report = check_gradients(model, double(5, 7))
    assert report.where == "2 (Checked)"
    assert report.causes[0].kind == "scale"


@pytest.mark.parametrize(
    "reference, right", [(lambda x: F.softmax(x, 1), True), (lambda x: F.softmax(x, 0), False)]
)
def test_a_reference_is_compared_by_value_first(reference, right):
    report = check_gradients(lambda x: x.softmax(1), double(5, 7), reference=reference)
    assert report.ok == right
    if right:
        assert report.tensors[0].oracle == "reference"
    else:
        assert "the forward itself is not the reference's" in report.reason


PROTOCOL = {
    "assumes-contiguous": lambda g, x: torch.as_strided(
        g, (5,), (1,), 0) * x if g.untyped_storage().nbytes() >= 40 else g * x,
    "mutates-input": lambda g, x: g.mul_(x),
    "nonlinear-in-upstream": lambda g, x: g.clamp(-1, 1) * x,
    "ignores-upstream": lambda g, x: x,
    "nondeterministic": lambda g, x: g * x * torch.rand(()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROTOCOL)
def test_a_breach_of_the_protocol_is_named(kind):
    half_square = lambda x: x.square() / 2  # noqa: E731
    report = check_gradients(function(half_square, PROTOCOL[kind]), 1 + double(5).abs())
    assert (report.verdict, report.causes[0].kind) == ("fail", kind), report
    assert check_gradients(function(half_square, lambda g, x: g * x), double(5)).ok


def test_a_second_derivative_that_is_cut_is_found_only_if_asked_for():
    cut = function(torch.exp, lambda g, x: g * x.exp().detach())
    assert check_gradients(cut, double(5)).ok
    report = check_gradients(cut, double(5), second_order=True)
    assert (report.verdict, report.causes[0].kind) == ("fail", "detached")


@pytest.mark.parametrize(
    "target, inputs, sentence",
    [
        (torch.relu, (torch.arange(3),), "nothing to differentiate"),
        (lambda x: x.long(), (double(3),), "nothing to differentiate"),
        (torch.abs, (double(3) + 1j,), "complex"),
        (torch.abs, (double(3, 3).to_sparse(),), "sparse"),
        ("relu", (double(3),), "the target is a str"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_sentence(target, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_gradients(target, *inputs)


@pytest.mark.parametrize(
    "target, x, reason",
    [
        (torch.log, -double(3).abs(), "NaN"),
        (lambda x: x / 0, double(3), "Inf"),
        (torch.exp, torch.empty(0, dtype=torch.float64), "empty"),
        (lambda x: torch.ones(3), double(3), "no power"),
        (lambda x: x * np.random.default_rng().random(), double(3), "changes its answer"),
        (lambda x: x @ x, double(3, 4), "could not be run"),
    ],
)
def test_what_cannot_be_told_is_inconclusive_with_its_reason(target, x, reason):
    report = check_gradients(target, x)
    assert report.verdict == "inconclusive"
    assert reason in report.reason


def test_a_constant_of_a_function_inside_is_not_asked_for():
    masked = function(lambda x, mask: x * mask, lambda g, x, mask: (g * mask, None))
    mask = (double(5) > 0).double()
    assert check_gradients(lambda x: masked.apply(x, mask).square(), double(5)).ok


def test_layers_by_hand_in_a_network_pass():
    table = rules.TABLE
    conv2d, relu, pool, linear = (
        as_function(table[f]) for f in (F.conv2d, F.relu, F.max_pool2d, F.linear)
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 3, 3), nn.Linear(27, 5)

        def forward(self, x):
            a = pool.apply(relu.apply(conv2d.apply(x, self.conv.weight, self.conv.bias)), 2)
            return linear.apply(a.flatten(1), self.linear.weight, self.linear.bias)

    report = check_gradients(Net().double(), double(2, 1, 8, 8))
    assert report.ok, report
    assert {entry.oracle for entry in report.tensors} == {"plain forward"}


@pytest.mark.slow
def test_every_mutant_of_the_catalogue_is_detected():
    missed = []
    for mutant in catalogue.MUTANTS:
        target, inputs = mutant.make()
        report = check_gradients(target, *inputs, second_order=mutant.second_order)
        missed += [mutant.name] if report.verdict != "fail" or not report.causes else []
    assert not missed


@pytest.mark.parametrize("equivalent", catalogue.EQUIVALENTS, ids=lambda e: e.name)
def test_no_equivalent_is_flagged(equivalent):
    target, inputs = equivalent.make()
    report = check_gradients(target, *inputs)
    assert report.ok, report
