"""Targets as people bring them: right ones that were once called wrong, or that once crashed."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import double, function
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from nn_backprop import check_gradients, compare_gradients


def product(transform, right=True):
    """x w, by a forward that `transform` takes out of autograd's sight."""
    return function(
        transform,
        lambda ctx, grad_z: (
            grad_z @ ctx.saved_tensors[1].t() * (1 if right else 0),
            ctx.saved_tensors[0].t() @ grad_z,
        ),
    )


def written_into(x, w):
    z = torch.empty(len(x), w.shape[1], dtype=x.dtype)
    torch.mm(x.detach(), w.detach(), out=z)
    return z


class Flattening(nn.Module):
    """Its forward refuses an input that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        return self.linear(x.view(len(x), -1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x):
        return checkpoint(lambda h: self.linear(h).tanh(), x, use_reentrant=self.reentrant)


class KeepsAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 2), []

    def forward(self, x):
        self.kept = [self.linear(x)]
        return self.kept[0]


def called(module, x):
    module(x)
    return module


def test_an_operation_with_an_output_argument_leaves_no_mode_behind():
    wrong = function(
        written_into,
        lambda ctx, grad_z: (
            grad_z @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ grad_z / 2),
    )  # fmt: skip
    assert check_gradients(wrong, double(4, 3), double(3, 2)).causes[0].kind == "scale"
    assert not _get_current_dispatch_mode_stack()


X = double(3, 4)
IN_USE = {
    "a forward that needs contiguous inputs": (Flattening().double(), (double(4, 3, 4),)),
    "a checkpoint": (Checkpointed().double(), (X,)),
    "a checkpoint in float32": (Checkpointed(), (X.float(),)),
    "an output argument": (product(written_into), (double(4, 3), double(3, 2))),
    "a forward that asks for gradients": (
        lambda a: torch.autograd.grad((a**3).sum(), a, create_graph=True)[0], (X,)),
    "a Hessian": (torch.func.hessian(lambda a: a.sin().sum()), (double(3),)),
    "probabilities": (nn.BCELoss(), (X.sigmoid(), (X > 0).double())),
    "probabilities in float32": (nn.BCELoss(), (X.sigmoid().float(), (X > 0).float())),
    "a list of activations": (called(KeepsAList().double(), X), (X,)),
    "an array of the other endianness": (
        (lambda a: 2 * a, lambda grad, a: 2 * grad), (np.arange(3, dtype=">f8"),)),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_USE)
def test_right_gradients_in_use_pass(name):
    target, inputs = IN_USE[name]
    report = check_gradients(target, *inputs)
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("right", [True, False])
def test_a_forward_that_hides_its_dependence_in_half_precision(dtype, right):
    hidden = product(lambda x, w: x.detach() @ w.detach(), right)
    report = check_gradients(hidden, double(6, 5).to(dtype), double(5, 4).to(dtype))
    assert report.verdict == ("pass" if right else "fail"), report


def test_an_error_of_a_few_percent_in_half_precision_is_told_in_float64():
    wrong = function(
        lambda x, w: x @ w,
        lambda ctx, grad_z: (
            1.05 * grad_z @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ grad_z),
    )  # fmt: skip
    report = check_gradients(wrong, double(5, 6).bfloat16(), double(6, 7).bfloat16())
    assert (report.verdict, report.causes[0].kind) == ("fail", "scale"), report


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off_they_are_checked_all_the_same(mode):
    with mode():
        assert check_gradients(nn.Linear(4, 2), torch.ones(3, 4)).ok


def test_an_argument_may_be_called_target():
    p = X.sigmoid()
    assert check_gradients(nn.BCELoss(), p, target=(X > 0).double()).ok


def test_the_callers_module_keeps_its_own_parameters():
    module = Checkpointed()
    before = list(module.parameters())
    check_gradients(module, X.float())
    check_gradients(module, X.float(), reference=lambda x: module.linear(x).tanh())
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in before)


def test_a_reentrant_checkpoint_is_inconclusive():
    report = check_gradients(Checkpointed(reentrant=True), X.float())
    assert report.verdict == "inconclusive"
    assert "use_reentrant" in report.reason


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.lock = threading.Lock()


REFUSED = {
    "a lock": (Locked(), (X.float(),), {}, "cannot be copied"),
    "a lazy module": (nn.LazyLinear(3), (X.float(),), {}, "call the lazy module once"),
    "a sparse gradient": (
        nn.Embedding(5, 3, sparse=True), (torch.tensor([1, 2]),), {}, "sparse=False"),
    "objects": ((np.sin, np.cos), (np.array([1, "a"], dtype=object),), {}, "array of object"),
    "long doubles": ((np.sin, np.cos), (np.ones(3, np.longdouble),), {}, "64 bits or fewer"),
    "arrays in a list": ((sum, sum), ([np.ones(3), np.ones(3)],), {}, "one by one"),
    "eight bits": (torch.sin, (X.to(torch.float8_e5m2),), {}, "float8_e5m2"),
    "a number for a loss": (torch.sin, (X,), {"loss": 3}, "loss is an int"),
    "a negative seed": (torch.sin, (X,), {"seed": -1}, "seed is -1"),
    "no seed": (torch.sin, (X,), {"seed": None}, "seed is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_said_in_a_sentence(name):
    target, inputs, kwargs, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        check_gradients(target, *inputs, **kwargs)


def test_two_calls_differ_in_where_their_maxima_are():
    class KeepsPlaces(nn.Module):
        def forward(self, x):
            values, self.places = x.max(1)
            take = function(
                lambda x: values.clone(),
                lambda ctx, grad_z: F.one_hot(self.places, x.shape[1]) * grad_z[:, None],
            )
            return take.apply(x)

    report = check_gradients(KeepsPlaces(), X, reference=lambda x: x.amax(1))
    assert [cause.kind for cause in report.causes] == ["stale-state"], report


def test_a_comparison_takes_no_powers_of_two_for_coarse_numbers():
    w = 2.0 ** np.arange(-6.0, 6.0)
    assert compare_gradients({"w": w * 1.1}, {"w": w}).verdict == "fail"


def test_what_coarse_numbers_have_in_common_is_no_rounding():
    w = double(100)
    coarse = {"w": w.bfloat16().double()}
    assert compare_gradients({"w": w}, coarse).ok
    report = compare_gradients({"w": 1.1 * w}, coarse)
    assert (report.verdict, report.causes[0].kind) == ("fail", "scale")
