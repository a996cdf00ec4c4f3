"""The tape in the user's own code: in-place work, views, threads, memory. Right, or an error."""

import copy
import gc
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from comparison import RTOL, about, close, each_close
from torch import Tensor, nn

from nn_backprop import MissingRuleError, Tape


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def agrees(function: Callable[..., Tensor], *leaves: Tensor, rtol: float = RTOL) -> None:
    """The gradients of Σ function(*leaves)² are autograd's."""
    expected = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, allow_unused=True)
    with Tape() as tape:
        loss = function(*leaves).pow(2).sum()
    each_close(tape.gradients(loss, leaves), expected, rtol=rtol)


# --- operands ---


SPELLINGS = [
    lambda x, y: x * x + y.T,
    lambda x, y: x + x,
    lambda x, y: x @ x.T @ x,
    lambda x, y: x * y.T - y.T * x.detach(),
    lambda x, y: F.linear(F.linear(x, y.T).tanh(), y),
    lambda x, y: x * x.detach()[0] + y.sum(1),
    lambda x, y: x * y.T.detach().sum(0).expand(3, 5),
    lambda x, y: 2 - x + 3 / (y.T * y.T + 1) - (x - 1) / 5,
    lambda x, y: x * torch.arange(5) + True,
    lambda x, y: torch.tensor(2.5) * x + y.T * torch.tensor(3),
    lambda x, y: torch.add(input=x, other=y.T, alpha=3),
    lambda x, y: F.linear(input=torch.mul(x, other=x), weight=y.T),
    lambda x, y: F.mse_loss(input=x, target=y.T) + F.relu(input=x).sum(axis=1).sum(),
    lambda x, y: torch.Tensor.mul(x, y.T).view(size=(5, 3)),
]


def test_operands_in_every_spelling():
    for i, function in enumerate(SPELLINGS):
        with about("spelling", i):
            agrees(function, leaf(3, 5), leaf(5, 3))


def test_operands_of_two_types():
    for shape in ((), (5,)):
        low = leaf(*shape, dtype=torch.float32)
        agrees(lambda x, y: (x * y).tanh() + y, leaf(3, 5), low, rtol=1e-5)


def test_what_is_not_differentiable_passes_through():
    def function(x):
        index = x.argmax(1)
        assert x.dim() == 2 and x.shape == (3, 5) and index.tolist() and x.sum().item()
        weight = F.one_hot(index, 5) * (x > 0) + x.to(torch.long) + x.long()
        return x * weight + x.detach() if bool(x.isfinite().all()) else x

    agrees(function, leaf(3, 5))


def test_no_grad_and_leaves_made_inside():
    def function(x):
        with torch.no_grad():
            constant = torch.cat([x, x]).cumsum(0)[:3]
        with torch.enable_grad():
            own = torch.ones(3, 5, dtype=torch.float64).requires_grad_()
        return x * constant + own * x

    agrees(function, leaf(3, 5))


def test_gradients_of_intermediate_tensors():
    x = leaf(3, 5)
    h = (x * x).tanh()
    (expected,) = torch.autograd.grad((h * h * x).sum(), h)
    with Tape() as tape:
        h = (x * x).tanh()
        loss = (h * h * x).sum()
    grad_h, grad_loss, grad_x = tape.gradients(loss, [h, loss, x])
    close(grad_h, expected)
    assert grad_loss.item() == 1 and grad_x.shape == x.shape


# --- in place ---


def sequence(*steps: Callable) -> Callable:
    """The steps one after the other on b = 2x; the result is that of the last."""

    def function(x):
        b = x * 2
        return [step(b) for step in steps][-1]

    return function


IN_PLACE = [
    sequence(lambda b: b.relu_(), lambda b: b * b),
    sequence(lambda b: F.relu(b, inplace=True), lambda b: b + 1),
    sequence(lambda b: F.leaky_relu(b, 0.3, inplace=True)),
    sequence(lambda b: b.sigmoid_().tanh()),
    sequence(lambda b: b.add_(b), lambda b: b.mul_(3), lambda b: b.sub_(1, alpha=5)),
    sequence(lambda b: b.__iadd__(b.view(5, 3).reshape(3, 5)), lambda b: b.div_(7)),
    sequence(lambda b: b.flatten().relu_()),
    sequence(lambda b: b.view(5, 3).T.mul_(5)),
    sequence(lambda b: b.detach_(), lambda b: b.tanh()),
    sequence(lambda b: b.detach().add_(1) * 0 + 1),
    lambda x: (x * 2).view(-1).add_(x.reshape(-1)).relu_(),
]
IN_PLACE_ON_WHAT_IS_SHARED = [
    sequence(lambda b: b.flatten().mul_(3), lambda b: b * b),
    sequence(lambda b: b.squeeze().T.sigmoid_(), lambda b: b.exp()),
    sequence(lambda b: b.view(5, 3), lambda b: b.relu_()),
    sequence(lambda b: b.to(torch.float64).add_(1), lambda b: b * b),
    sequence(lambda b: b.contiguous().add_(1), lambda b: b * b),
    sequence(lambda b: F.dropout(b, training=False).add_(1), lambda b: b * b),
    sequence(lambda b: F.dropout(b, 0.0).add_(1), lambda b: b * b),
    lambda x: (lambda total: [total.sum().add_(1), total][-1])((x * 2).sum()),
    lambda x: (lambda total: [total.mean().add_(1), total][-1])((x * 2).mean()),
    lambda x: (lambda v, b: [b.sigmoid_(), v * v][-1])(*(lambda b: (b.view(-1), b))(x * 2)),
    lambda x: (lambda v, b: [v.mul_(3), b.tanh()][-1])(*(lambda b: (b.view(-1), b))(x * 2)),
    lambda x: (lambda a: [a * a, a.add_(1)][0])(x * 2),
    lambda x: (lambda a: [a.tanh(), a.tanh().add_(1)][1])(x * 2),
    lambda x: (lambda a: a.mul_(a))(x * 2),
    lambda x: (lambda a: a.mul_(a.T.T))(x * 2),
]


def test_in_place_operations_agree_or_raise():
    """With autograd; on what is shared, some raise."""
    for i, function in enumerate(IN_PLACE):
        with about("in place", i):
            agrees(lambda x, y, function=function: function(x) + y.sum(), leaf(3, 5), leaf(2))
    for i, function in enumerate(IN_PLACE_ON_WHAT_IS_SHARED):
        with about("shared", i):
            try:
                agrees(function, leaf(3, 5))
            except RuntimeError as error:
                assert re.search("overwritten|modified by an inplace operation", str(error))


def test_what_torch_copies_may_be_overwritten():
    for copied in (Tensor.sum, Tensor.mean, Tensor.clone, lambda b: b.to(b, copy=True)):
        with Tape():
            b = leaf() * 2
            before = b.item()
            try:
                copied(b).add_(1)
            except MissingRuleError as error:
                assert "copy" in str(error)
        assert b.item() == before, copied


def test_a_tensor_into_which_a_recorded_one_was_written():
    x, buffer, total = leaf(3, 5), torch.zeros(2, 5).double(), torch.zeros(()).double()
    with Tape() as tape:
        buffer[0] = x.sum(0)
        buffer.argmax(), buffer.detach().max()  # no gradient is asked for
        with pytest.raises(MissingRuleError, match=r"made by autograd .*CopySlices"):
            buffer * 2
        with pytest.raises(MissingRuleError, match="did not make"):
            total += (x * x).sum()
    with pytest.raises(ValueError, match="not made on this tape"):
        tape.gradients(buffer.sum(), [x])


# --- what comes out ---


def test_backward_fills_grad_as_autograd_does():
    model, x = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double(), leaf(7, 5)
    model[2].bias.requires_grad_(False)
    grads = []
    for by_tape in (True, False):
        model.zero_grad()
        x.grad = None
        for _ in range(3):  # accumulates
            with Tape() if by_tape else nullcontext() as tape:
                loss = model(x).pow(2).sum()
            (tape or torch.autograd).backward(loss)
        grads.append([t.grad for t in (x, *model.parameters())])
    each_close(*grads)


def test_gradients_have_memory_of_their_own():
    a, b, c, s = leaf(3, 5), leaf(3, 5), leaf(5, 3), leaf()
    leaves = [a, b, c, s]
    for take in (
        lambda tape, loss: tape.gradients(loss, [*leaves, a, loss]),
        lambda tape, loss: [tape.backward(loss), *[t.grad for t in leaves]][1:],
    ):
        with Tape() as tape:
            loss = (a + b + c.T.clone().view(3, 5)).sum() + s
        grads = take(tape, loss)
        assert all(grad.is_contiguous() for grad in grads)
        others = [*leaves, loss, *grads]
        places = [t.untyped_storage().data_ptr() for t in others]
        assert len(set(places)) == len(places)


# --- the block ---


def test_a_tape_is_opened_and_played_once_and_alone():
    x = leaf(3)
    with Tape() as tape:
        for other in (Tape(), tape):
            with pytest.raises(RuntimeError, match="another Tape is recording"), other:
                pass
        h = x * x
        loss = h.sum()
    with pytest.raises(RuntimeError, match="recorded already"), tape:
        pass
    close(tape.gradients(loss, [h])[0], torch.ones(3).double())
    for again in (lambda: tape.backward(loss), lambda: tape.gradients(loss, [x, h])):
        with pytest.raises(RuntimeError, match="played already"):
            again()
    with pytest.raises(RuntimeError, match="recorded already"), tape:
        pass
    assert x.grad is None


def test_after_an_exception_the_mode_is_gone():
    x = leaf(3)
    with pytest.raises(ZeroDivisionError), Tape():
        h = x * 2
        raise ZeroDivisionError
    assert (x * 2).grad_fn is not None and h.grad_fn is None
    agrees(torch.tanh, x)


def test_a_missing_rule_that_is_caught_leaves_the_tape_usable():
    x = leaf(3)
    with Tape() as tape:
        h = x * 2
        try:
            h = h.cumsum(0)
        except MissingRuleError:
            h = h.tanh()
        loss = h.sum()
    close(tape.gradients(loss, [x])[0], 2 * (1 - torch.tanh(2 * x.detach()) ** 2))


def test_a_whole_training_step_inside_the_block():
    model, x, weights = nn.Linear(5, 3).double(), torch.randn(7, 5).double(), []
    for by_tape in (True, False):
        network = copy.deepcopy(model)
        step = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        with Tape() if by_tape else nullcontext() as tape:
            loss = network(x).pow(2).sum()
            (tape or torch.autograd).backward(loss)
            step.step()
            if by_tape:
                with pytest.raises(MissingRuleError, match="another tape"):
                    loss * 2
        weights.append(network.weight.detach())
    close(*weights)


def test_under_another_mode():
    with torch.device("cpu"):
        agrees(lambda x: x * torch.ones(5).double(), leaf(3, 5))
    x = leaf(3, 5)
    with Tape() as tape, torch.device("cpu"):
        loss = (x * torch.ones(5).double()).sum()
    close(tape.gradients(loss, [x])[0], torch.ones(3, 5).double())


def test_tapes_in_two_threads():
    both_open = threading.Barrier(2, timeout=20)

    def work(factor: int) -> list[float]:
        x = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
        with Tape() as tape:
            both_open.wait()
            loss = (x * factor).sum()
            both_open.wait()
        return tape.gradients(loss, [x])[0].tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (2, 3))) == [[2.0] * 3, [3.0] * 3]


# --- memory ---


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.fixture
def no_collector():
    """What is freed is freed by counting references: a cycle would wait for the collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_nothing_outlives_the_tape_and_the_loss():
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for played in (True, False):
        x = leaf(7, 5)
        with Tape() as tape:
            h = model[1](model[0](x * 1))
            loss = model[2](h).pow(2).sum()
        recorded = weakref.ref(h), weakref.ref(x)
        if played:
            tape.gradients(loss, model.parameters())
        del h, x
        if not played:
            assert all(reference() is not None for reference in recorded)
            del tape, loss
        assert not any(reference() is not None for reference in recorded)  # played: tape is there


@pytest.mark.usefixtures("no_collector")
def test_nothing_grows_over_200_steps():
    model, x = nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), leaf(7, 5)
    model, losses, counts = model.double(), [], []
    for i in range(200):
        with Tape() as tape:
            loss = model(x).pow(2).sum()
        if i % 2:  # every other pass is given up
            tape.backward(loss)
            losses.append(loss)
        del tape, loss
        if i in (9, 199):
            counts.append(live_tensors() - len(losses))
    assert counts[0] == counts[1]


def test_a_gradient_lies_in_memory_as_its_leaf_does():
    """torch's fused optimizers take that for granted, and silently misread any other layout."""
    conv = nn.Conv2d(2, 3, 5).to(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    with Tape() as tape:
        loss = (conv(torch.randn(2, 2, 7, 7)) ** 2).mean()
    tape.backward(loss)
    assert conv.weight.grad.stride() == conv.weight.stride()
