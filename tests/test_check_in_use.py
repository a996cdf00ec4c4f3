"""Targets as people bring them: right ones that were once called wrong, or that once crashed."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects import double, expect, function
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from nn_backprop import check_gradients


def product(transform, by=1.0):
    """x w, by a forward that `transform` takes out of autograd's sight; grad_x times a factor."""
    return function(transform, lambda grad_z, x, w: (by * grad_z @ w.t(), x.t() @ grad_z))


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


def test_an_operation_with_an_output_argument_leaves_no_mode_behind():
    expect("fail", product(written_into, by=0.5), double(4, 3), double(3, 2), kind="scale")
    assert not _get_current_dispatch_mode_stack()


X = double(3, 4)


def test_right_gradients_in_use_pass():
    for target, *inputs in [
        (Flattening().double(), double(4, 3, 4)),  # needs contiguous inputs
        (Checkpointed().double(), X),
        (Checkpointed(), X.float()),
        (product(written_into), double(4, 3), double(3, 2)),
        (lambda a: torch.autograd.grad((a**3).sum(), a, create_graph=True)[0], X),
        (torch.func.hessian(lambda a: a.sin().sum()), double(3)),
        (nn.BCELoss(), X.sigmoid(), (X > 0).double()),
        (nn.BCELoss(), X.sigmoid().float(), (X > 0).float()),
        ((lambda a: 2 * a, lambda grad, a: 2 * grad), np.arange(3, dtype=">f8")),  # other bytes
    ]:
        expect("pass", target, *inputs)
    expect("pass", nn.BCELoss(), X.sigmoid(), target=(X > 0).double())  # a name of our own


def test_half_precision():
    """A forward may hide its dependence; an error of a few percent is told in float64."""
    for dtype in (torch.bfloat16, torch.float16):
        for by, verdict in [(1, "pass"), (0, "fail")]:
            hidden = product(lambda x, w: x.detach() @ w.detach(), by)
            expect(verdict, hidden, double(6, 5).to(dtype), double(5, 4).to(dtype))
    wrong = product(torch.mm, by=1.05)
    expect("fail", wrong, double(5, 6).bfloat16(), double(6, 7).bfloat16(), kind="scale")


def test_where_gradients_are_switched_off_they_are_checked_all_the_same():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expect("pass", nn.Linear(4, 2), torch.ones(3, 4))


def test_the_callers_module_keeps_its_own_parameters():
    module = Checkpointed()
    before = list(module.parameters())
    check_gradients(module, X.float())
    check_gradients(module, X.float(), reference=lambda x: module.linear(x).tanh())
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in before)


def test_a_reentrant_checkpoint_is_inconclusive():
    expect("inconclusive", Checkpointed(reentrant=True), X.float(), says="use_reentrant")


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.lock = threading.Lock()


def test_what_cannot_be_checked_is_said_in_a_sentence():
    numpy = (np.sin, np.cos)
    for target, inputs, options, words in [
        (Locked(), (X.float(),), {}, "cannot be copied"),
        (nn.LazyLinear(3), (X.float(),), {}, "call the lazy module once"),
        (nn.Embedding(5, 3, sparse=True), (torch.tensor([1, 2]),), {}, "sparse=False"),
        (nn.Linear(3, 2, device="meta"), (torch.ones(2, 3, device="meta"),), {}, "meta tensor"),
        (numpy, (np.array([1, "a"], dtype=object),), {}, "array of object"),
        (numpy, (np.ones(3, np.longdouble),), {}, "64 bits or fewer"),
        ((sum, sum), ([np.ones(3), np.ones(3)],), {}, "one by one"),
        (torch.sin, (X.to(torch.float8_e5m2),), {}, "float8_e5m2"),
        (torch.sin, (X,), {"loss": 3}, "loss is an int"),
        (torch.sin, (X,), {"seed": -1}, "seed is -1"),
        (torch.sin, (X,), {"seed": None}, "seed is None"),
        (lambda x: x + 1j, (X,), {}, "complex"),
        (lambda x: x.to_sparse(), (X,), {}, "sparse"),
        (nn.Flatten(), (torch.arange(3),), {}, "no parameter requires grad"),
        (lambda x: None, (X,), {}, "no output is a floating tensor"),
        (nn.Linear, (X,), {}, "the target is the class Linear"),
        (None, (X,), {}, "the target is a NoneType"),
        ((np.sin,), (X.numpy(),), {}, "the target is a tuple"),
        (X, (X,), {}, "the target is a Tensor"),
        (torch.sin, (), {}, "nothing to differentiate"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            check_gradients(target, *inputs, **options)
        assert "\n" not in str(caught.value)


def test_two_calls_differ_in_where_their_maxima_are():
    class KeepsPlaces(nn.Module):
        def forward(self, x):
            values, self.places = x.max(1)
            take = function(
                lambda x: values.clone(),
                lambda grad_z, x: F.one_hot(self.places, x.shape[1]) * grad_z[:, None],
            )
            return take.apply(x)

    report = check_gradients(KeepsPlaces(), X, reference=lambda x: x.amax(1))
    assert [cause.kind for cause in report.causes] == ["stale-state"], report
