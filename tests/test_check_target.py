"""What can be handed to the checker, how its parts are named, and that nothing of it is touched."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import Doubled, Square, double, expect, names, oracles
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop import check_gradients

# --- modules ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.there(x) @ self.back.weight


class Keeping(nn.Module):
    """Keeps its activations on itself, some of them with a graph, in a list too."""

    def __init__(self):
        super().__init__()
        self.linear, self.kept, self.all = nn.Linear(3, 5), None, []

    def forward(self, x):
        self.kept = self.linear(x)
        self.all = [self.kept]
        return self.kept.tanh()


class Multiplied(nn.Module):
    """x by a parameter of the same name, or by a wrong square of it."""

    def __init__(self, function=None):
        super().__init__()
        self.x, self.function = nn.Parameter(double(3)), function

    def forward(self, x):
        return x * self.x if self.function is None else x + self.function.apply(self.x)


def test_the_parameters_of_a_module_are_named():
    """At any depth, but not frozen ones; a tied one once, with the sum over its uses; and one that
    is called as an input is."""
    frozen = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2))).double()
    frozen[0].weight.requires_grad_(False)
    for model, found in [
        (frozen, ["input", "0.bias", "1.1.weight", "1.1.bias"]),
        (Tied().double(), ["x", "there.weight"]),
        (Multiplied(), ["x", "parameter x"]),
    ]:
        assert names(expect("pass", model, double(7, 3))) == found
    report = check_gradients(Multiplied(Doubled), double(2, 3))
    assert {e.name: e.verdict for e in report.tensors} == {"x": "pass", "parameter x": "fail"}


def test_a_module_may_keep_activations_on_itself():
    model = Keeping().double()
    model(double(7, 3))
    kept = model.kept
    expect("pass", model, double(7, 3, seed=1))
    assert model.kept is kept


def test_nothing_of_the_callers_is_touched():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3)).double()
    x = double(7, 3).requires_grad_()
    not_a_leaf = x * 2
    not_a_leaf.retain_grad()
    model(not_a_leaf).sum().backward()
    tensors = [*model.parameters(), *model.buffers(), x, not_a_leaf]

    def state() -> list:
        values = [t.detach().clone() for t in tensors]
        grads = [t.grad.clone() for t in tensors if t.grad is not None]
        return values + grads + [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1])]

    before, python, mode = state(), random.getstate(), [m.training for m in model.modules()]
    versions = [t._version for t in tensors]
    assert check_gradients(model, not_a_leaf).ok
    assert len(before) == 17
    assert all(map(torch.equal, state(), before))
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == mode
    assert [t._version for t in tensors] == versions
    assert x.requires_grad and not_a_leaf.requires_grad


# --- Functions ---


class NewStyle(Function):
    generate_vmap_rule = True

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


def test_a_function_may_come_as_a_class_or_as_its_apply():
    for target in (Square, Square.apply, APPLY, lambda x: APPLY(x)):
        report = expect("pass", target, double(3, 5))
        assert names(report) == ["x"] and oracles(report) == {"plain forward"}


def test_a_function_with_a_setup_context():
    arguments = double(3, 5), double(3, 5, seed=1), 3
    report = expect("pass", NewStyle, *arguments)
    assert names(report) == ["base", "slope"] and oracles(report) == {"plain forward"}
    report = check_gradients(NewStyleWrong, *arguments)
    assert [entry.verdict for entry in report.tensors] == ["pass", "fail"]
    mapped = torch.vmap(lambda base, slope: NewStyle.apply(base, slope, 3))
    expect("pass", lambda base, slope: mapped(base, slope), *arguments[:2])


# --- NumPy pairs ---


def grad_rows(grad, table, index):
    grad_table = np.zeros_like(table)
    np.add.at(grad_table, index, 2 * table[index] * grad)
    return grad_table


def grad_rows_overwritten(grad, table, index):
    grad_table = np.zeros_like(table)
    grad_table[index] = 2 * table[index] * grad
    return grad_table


def test_a_numpy_pair():
    """One output or several, integers with or without a gradient, also between the others."""
    table, x, y = double(3, 5).numpy(), double(5).numpy(), double(5, seed=1).numpy()
    index = np.array([0, 2, 2])
    rows = lambda table, index: table[index] ** 2  # noqa: E731
    for found, inputs, forward, right, wrong in [
        (["x"], [table], lambda x: np.sin(x), lambda g, x: g * np.cos(x),
         lambda g, x: g * np.sin(x)),
        (["x", "y"], [x, y], lambda x, y: (x * y, x.sum()),
         lambda g, x, y: (g[0] * y + g[1], g[0] * x), lambda g, x, y: (g[0] * y, g[0] * x)),
        (["table"], [table, index], rows, grad_rows, grad_rows_overwritten),
        (["table"], [table, index], rows, lambda g, t, i: (grad_rows(g, t, i), None),
         lambda g, t, i: (grad_rows_overwritten(g, t, i), None)),
        (["x", "y"], [x, 3, y], lambda x, power, y: x**power + y,
         lambda g, x, power, y: (g * power * x ** (power - 1), g),
         lambda g, x, power, y: (g * power * x, g)),
    ]:  # fmt: skip
        before = [np.copy(i) for i in inputs]
        report = expect("pass", (forward, right), *inputs)
        assert names(report) == found and oracles(report) == {"differences"}
        expect("fail", (forward, wrong), *inputs)
        assert all(map(np.array_equal, inputs, before))
    assert len(names(expect("pass", (np.sin, lambda g, x: g * np.cos(x)), x))) == 1  # a ufunc


# --- callables ---


def nested(x, state, *rest, scale, flag=False):
    hidden, cell = state
    assert flag and rest[1] == "text"
    return {"sum": x + hidden, "others": (x * cell * scale, [rest[0].sin()]), "index": x.argmax()}


def test_nested_inputs_and_outputs_keywords_and_integers():
    x, hidden, cell, other, scale = (double(3, seed=i) for i in range(5))
    report = expect("pass", nested, x, (hidden, cell), other, "text", scale=scale, flag=True)
    assert names(report) == ["x", "state[0]", "state[1]", "input2", "scale"]
    report = expect("pass", nn.LSTM(7, 5, num_layers=2).double(), double(2, 3, 7),
                    (double(2, 3, 5), double(2, 3, 5, seed=1)))  # fmt: skip
    assert names(report)[:3] == ["input", "hx[0]", "hx[1]"] and len(names(report)) == 11
    report = expect("pass", F.nll_loss, double(3, 5).log_softmax(1), torch.tensor([0, 4, 2]))
    assert names(report) == ["input"]


def test_a_forward_in_place():
    for target in (nn.ReLU(inplace=True), Tensor.exp_, torch.sigmoid_):
        x = double(3, 5)
        expect("pass", target, x)
        assert torch.equal(x, double(3, 5))


def test_the_gradient_of_a_loss():
    def loss(logits):
        return F.cross_entropy(logits, torch.tensor([1, 0, 2]))

    expect("pass", nn.Linear(5, 3).double(), double(3, 5), loss=loss)
    expect("pass", Square, double(3, 5), loss=loss)
    expect("fail", Doubled, double(3, 5), loss=loss)


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


def test_a_reference():
    """A callable, or a module whose parameters are found by name or by place."""
    for wrong in (False, True):
        mine = Mine(wrong)
        by_hand = lambda x: x @ mine.weight.t() + mine.bias  # noqa: B023, E731
        for reference in (by_hand, nn.Linear(3, 5).double(), Renamed()):
            report = check_gradients(mine, double(7, 3), reference=reference)
            assert oracles(report) == {"reference"}
            verdicts = {entry.name: entry.verdict for entry in report.tensors}
            weight = "fail" if wrong else "pass"
            assert verdicts == {"x": "pass", "weight": weight, "bias": "pass"}, report


def test_a_reference_with_another_forward_is_a_failure_with_its_reason():
    says = "the forward itself is not the reference's"
    expect("fail", Mine(), double(7, 3), reference=Renamed(1.001), says=says)
    expect("fail", Square, double(3), reference=lambda x: x.square().sum(), says="shapes")


def test_a_reference_that_will_not_do_is_refused_in_a_sentence():
    for reference, sentence in [
        (lambda x: x @ x, "the reference could not be run"),
        (nn.Linear(3, 5, bias=False).double(), "match the target's neither by name nor by place"),
        ("linear", "the reference is a str"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_gradients(Mine(), double(7, 3), reference=reference)
