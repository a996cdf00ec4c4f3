"""What can be handed to the checker, how its parts are named, and that nothing of it is touched."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import Doubled, Square, double
from torch import nn
from torch.autograd import Function

from nn_backprop import check_gradients


def names(report) -> list[str]:
    return [entry.name for entry in report.tensors]


def oracles(report) -> set[str]:
    return {entry.oracle for entry in report.tensors}


# --- modules ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.there(x) @ self.back.weight


class Keeping(nn.Module):
    """Keeps its activations on itself, some of them with a graph."""

    def __init__(self):
        super().__init__()
        self.linear, self.kept = nn.Linear(3, 5), None

    def forward(self, x):
        self.kept = self.linear(x)
        return self.kept.tanh()


class SameName(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(double(3))

    def forward(self, x):
        return x * self.x


def test_parameters_are_named_at_any_depth_and_frozen_ones_are_left_out():
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2))).double()
    model[0].weight.requires_grad_(False)
    report = check_gradients(model, double(7, 3))
    assert report.ok, report
    assert names(report) == ["input", "0.bias", "1.1.weight", "1.1.bias"]


def test_a_tied_parameter_is_checked_once_with_the_sum_over_its_uses():
    report = check_gradients(Tied().double(), double(7, 3))
    assert report.ok, report
    assert names(report) == ["x", "there.weight"]


def test_a_module_may_keep_activations_on_itself():
    model = Keeping().double()
    model(double(7, 3))
    kept = model.kept
    report = check_gradients(model, double(7, 3, seed=1))
    assert report.ok, report
    assert model.kept is kept


def test_a_parameter_and_an_input_of_one_name_are_told_apart():
    report = check_gradients(SameName(), double(2, 3))
    assert report.ok, report
    assert names(report) == ["x", "parameter x"]


def test_nothing_of_the_callers_is_touched():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3)).double()
    x = double(7, 3).requires_grad_()
    not_a_leaf = x * 2
    not_a_leaf.retain_grad()
    model(not_a_leaf).sum().backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x, "2x":
               not_a_leaf}  # fmt: skip

    def state() -> list:
        values = [t.detach().clone() for t in tensors.values()]
        grads = [t.grad.clone() for t in tensors.values() if t.grad is not None]
        return values + grads + [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1])]

    before, python, mode = state(), random.getstate(), [m.training for m in model.modules()]
    versions = [t._version for t in tensors.values()]
    assert check_gradients(model, not_a_leaf).ok
    assert len(before) == 17
    assert all(map(torch.equal, state(), before))
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == mode
    assert [t._version for t in tensors.values()] == versions
    assert x.requires_grad and not_a_leaf.requires_grad


def test_a_wrong_parameter_gradient_is_found_in_a_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(double(3))

        def forward(self, x):
            return x + Doubled.apply(self.scale)

    report = check_gradients(Scaled(), double(2, 3))
    assert {e.name: e.verdict for e in report.tensors} == {"x": "pass", "scale": "fail"}


# --- Functions ---


class NewStyle(Function):
    @staticmethod
    def forward(base, slope, count):
        return base * slope * count

    @staticmethod
    def setup_context(ctx, inputs, output):
        base, slope, ctx.count = inputs
        ctx.save_for_backward(base, slope)

    @staticmethod
    def backward(ctx, grad_z):
        base, slope = ctx.saved_tensors
        return grad_z * slope * ctx.count, grad_z * base * ctx.count, None


class NewStyleWrong(NewStyle):
    @staticmethod
    def backward(ctx, grad_z):
        base, slope = ctx.saved_tensors
        return grad_z * slope * ctx.count, grad_z * base, None


APPLY = Square.apply  # taken hold of before any check


@pytest.mark.parametrize("target", [Square, Square.apply, APPLY, lambda x: APPLY(x)])
def test_a_function_may_come_as_a_class_or_as_its_apply(target):
    report = check_gradients(target, double(3, 5))
    assert report.ok and names(report) == ["x"] and oracles(report) == {"plain forward"}


def test_a_function_with_a_setup_context():
    arguments = double(3, 5), double(3, 5, seed=1), 3
    report = check_gradients(NewStyle, *arguments)
    assert report.ok, report
    assert names(report) == ["base", "slope"] and oracles(report) == {"plain forward"}
    report = check_gradients(NewStyleWrong, *arguments)
    assert [entry.verdict for entry in report.tensors] == ["pass", "fail"]


# --- NumPy pairs ---


def rows(table, index):
    return table[index] ** 2


def grad_rows(grad, table, index):
    grad_table = np.zeros_like(table)
    np.add.at(grad_table, index, 2 * table[index] * grad)
    return grad_table


def grad_rows_overwritten(grad, table, index):
    grad_table = np.zeros_like(table)
    grad_table[index] = 2 * table[index] * grad
    return grad_table


PAIRS = {  # forward, right backward, wrong backward, inputs, names
    "single": (
        np.sin, lambda g, x: g * np.cos(x), lambda g, x: g * np.sin(x),
        [double(3, 5)], ["input0"],
    ),
    "several": (
        lambda x, y: (x * y, x.sum()), lambda g, x, y: (g[0] * y + g[1], g[0] * x),
        lambda g, x, y: (g[0] * y, g[0] * x), [double(5), double(5, seed=1)], ["x", "y"],
    ),
    "integers": (
        rows, grad_rows, grad_rows_overwritten, [double(3, 5), np.array([0, 2, 2])], ["table"],
    ),
    "None for integers": (
        rows, lambda g, t, i: (grad_rows(g, t, i), None),
        lambda g, t, i: (grad_rows_overwritten(g, t, i), None),
        [double(3, 5), np.array([0, 2, 2])], ["table"],
    ),
    "an integer between": (
        lambda x, power, y: x**power + y, lambda g, x, power, y: (g * power * x ** (power - 1), g),
        lambda g, x, power, y: (g * power * x, g), [double(5), 3, double(5, seed=1)], ["x", "y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_a_numpy_pair(pair):
    forward, right, wrong, inputs, expected = PAIRS[pair]
    inputs = [i.numpy() if isinstance(i, torch.Tensor) else i for i in inputs]
    before = [np.copy(i) for i in inputs]
    report = check_gradients((forward, right), *inputs)
    assert report.ok, report
    assert names(report)[1 if pair == "single" else 0 :] == expected[1 if pair == "single" else 0 :]
    assert oracles(report) == {"differences"}
    assert check_gradients((forward, wrong), *inputs).verdict == "fail"
    assert all(map(np.array_equal, inputs, before))


# --- callables ---


def nested(x, state, *rest, scale, flag=False):
    hidden, cell = state
    assert flag and rest[1] == "text"
    return {"sum": x + hidden, "others": (x * cell * scale, [rest[0].sin()]), "index": x.argmax()}


def test_a_callable_with_nested_inputs_and_outputs_and_keywords():
    x, hidden, cell, other, scale = (double(3, seed=i) for i in range(5))
    report = check_gradients(nested, x, (hidden, cell), other, "text", scale=scale, flag=True)
    assert report.ok, report
    assert names(report) == ["x", "state[0]", "state[1]", "input2", "scale"]


def test_an_lstm():
    state = double(2, 3, 5), double(2, 3, 5, seed=1)
    lstm = nn.LSTM(7, 5, num_layers=2).double()
    report = check_gradients(lstm, double(2, 3, 7), state)
    assert report.ok, report
    assert names(report)[:3] == ["input", "hx[0]", "hx[1]"] and len(names(report)) == 11


def test_integers_pass_through():
    report = check_gradients(F.nll_loss, double(3, 5).log_softmax(1), torch.tensor([0, 4, 2]))
    assert report.ok and names(report) == ["input"]


@pytest.mark.parametrize("target", [nn.ReLU(inplace=True), torch.Tensor.exp_, torch.sigmoid_])
def test_a_forward_in_place(target):
    x = double(3, 5)
    before = x.clone()
    assert check_gradients(target, x).ok
    assert torch.equal(x, before)


def test_the_gradient_of_a_loss():
    target = torch.tensor([1, 0, 2])

    def loss(logits):
        return F.cross_entropy(logits, target)

    model = nn.Linear(5, 3).double()
    assert check_gradients(model, double(3, 5), loss=loss).ok
    assert check_gradients(Square, double(3, 5), loss=loss).ok
    assert check_gradients(Doubled, double(3, 5), loss=loss).verdict == "fail"


# --- references ---


class Renamed(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(double(5, 3)), nn.Parameter(double(5))
        self.factor = factor

    def forward(self, x):
        return self.factor * (x @ self.matrix.t() + self.offset)


class Mine(nn.Module):
    """A linear layer whose backward is right, or wrong in the weight."""

    def __init__(self, wrong=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(double(5, 3)), nn.Parameter(double(5, seed=1))
        self.wrong = wrong

    def forward(self, x):
        weight = self.weight * 1
        if self.wrong and weight.requires_grad:
            weight.register_hook(lambda grad: grad * 1.01)
        return F.linear(x, weight, self.bias)


REFERENCES = {
    "callable": lambda mine: lambda x: x @ mine.weight.t() + mine.bias,
    "module, by name": lambda mine: nn.Linear(3, 5).double(),
    "module, by place": lambda mine: Renamed(),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_reference(kind):
    for wrong in (False, True):
        mine = Mine(wrong)
        report = check_gradients(mine, double(7, 3), reference=REFERENCES[kind](mine))
        assert oracles(report) == {"reference"}
        verdicts = {entry.name: entry.verdict for entry in report.tensors}
        expected = {"x": "pass", "weight": "fail" if wrong else "pass", "bias": "pass"}
        assert verdicts == expected, report


def test_a_reference_with_another_forward_is_a_failure_with_its_reason():
    report = check_gradients(Mine(), double(7, 3), reference=Renamed(1.001))
    assert report.verdict == "fail"
    assert "the forward itself is not the reference's" in report.reason


def test_a_reference_of_another_shape_is_a_failure_with_its_reason():
    report = check_gradients(Square, double(3), reference=lambda x: x.square().sum())
    assert report.verdict == "fail" and "shapes" in report.reason


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (lambda x: x @ x, "the reference could not be run"),
        (nn.Linear(3, 5, bias=False).double(), "match the target's neither by name nor by place"),
        ("linear", "the reference is a str"),
    ],
)
def test_a_reference_that_will_not_do_is_refused_in_a_sentence(reference, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_gradients(Mine(), double(7, 3), reference=reference)
