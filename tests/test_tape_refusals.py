"""What the tape refuses, since a gradient would be dropped or the wrong one returned."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from comparison import about, close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nn_backprop import MissingRuleError, Tape


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# --- what would drop a gradient ---------------------------------------------------------------


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # which torch has deprecated
def test_what_autograd_made_is_refused_every_time():
    for function in (torch.jit.script(nn.Linear(5, 3).double()), Double.apply):
        x = leaf(3, 5)
        with about(function), Tape() as tape:
            h = function(x * 3)
            assert h.grad_fn is not None
            for _ in range(2):  # the first refusal must not make a leaf of it
                with pytest.raises(MissingRuleError, match="made by autograd"):
                    h * 2
            with pytest.raises(MissingRuleError, match="cumsum has no rule"):
                h.cumsum(0)
            loss = x.sum()
        assert tape.gradients(loss, [x])[0] is not None


def test_a_tensor_made_before_the_tape_was_opened():
    w = leaf(5)
    h = w * 2
    with Tape() as tape:
        with pytest.raises(MissingRuleError, match="before the tape was opened"):
            h * 3
        loss = w.sum()
    with pytest.raises(ValueError, match="neither a leaf that requires grad"):
        tape.gradients(loss, [h])


def test_a_tensor_made_on_another_tape():
    x = leaf(3, 5)
    with Tape() as first:
        h = x * 2
        loss = h.sum()
    first.backward(loss)
    with Tape() as second:
        with pytest.raises(MissingRuleError, match=r"another tape; detach\(\)"):
            h * x
        loss = (h.detach() * x).sum()
    with pytest.raises(ValueError, match="nor made on this tape"):
        second.gradients(loss, [h])
    close(second.gradients(loss, [x])[0], h.detach())


def test_a_copy_of_a_recorded_tensor():
    x = leaf(3, 5)
    for copied in (copy.copy, copy.deepcopy):
        with Tape(), pytest.raises(MissingRuleError, match="another tape"):
            copied(x * 2) * 3


def test_what_takes_a_recorded_tensor_for_a_leaf():
    x = leaf(3, 5)
    with Tape() as tape:
        h = x * 2
        for i, function in enumerate([
            lambda h: h.requires_grad_(False),
            lambda h: setattr(h, "requires_grad", False),
            lambda h: h.register_hook(lambda grad: 2 * grad),
            lambda h: h.retain_grad(),
            lambda h: torch.autograd.grad(h.sum(), h, allow_unused=True),
        ]):  # fmt: skip
            with about(i), pytest.raises(MissingRuleError, match="no effect on what the tape made"):
                function(h)
        loss = h.sum()
    assert tape.gradients(loss, [x])[0] is not None


def test_hooks_on_gradients_are_refused():
    hooked, accumulated = leaf(3), leaf(3)
    hooked.register_hook(lambda grad: 2 * grad)
    accumulated.register_post_accumulate_grad_hook(lambda tensor: None)
    for x in (hooked, accumulated):
        with Tape(), pytest.raises(MissingRuleError, match="with a hook"):
            x * 2
    module = nn.Linear(3, 2).double()
    module.register_full_backward_hook(lambda module, grad_x, grad_z: None)
    with Tape(), pytest.raises(MissingRuleError, match="made by autograd"):
        module(leaf(5, 3))


def test_an_argument_and_a_tensor_for_whose_gradient_there_is_no_rule():
    with Tape(), pytest.raises(MissingRuleError, match="gradient of its argument 1"):
        F.leaky_relu(leaf(3), leaf())
    x, weight = torch.randn(5, 3, requires_grad=True), torch.rand(3, requires_grad=True)
    with Tape() as tape:
        loss = F.nll_loss(x, torch.tensor([0, 2, 1, 1, 0]), weight)
    with pytest.raises(MissingRuleError, match="nll_loss has no rule for the gradient of one"):
        tape.backward(loss)
    assert x.grad is None


def test_reentrant_checkpointing_is_refused():
    with Tape(), pytest.raises(MissingRuleError, match="CheckpointFunction"):
        checkpoint(torch.tanh, leaf(3), use_reentrant=True) * 2


def test_autocast_is_refused():
    with Tape(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(MissingRuleError, match=r"torch\.autocast"):
            nn.Linear(5, 3)(torch.randn(2, 5))
        h = torch.randn(2, 5).requires_grad_().argmax(1)  # nothing to differentiate
    assert h.shape == (2,)


def test_a_worker_thread_is_seen_by_no_tape():
    x, made = leaf(3, 5), []
    with Tape():
        h = x * 2
        worker = threading.Thread(target=lambda: made.append(h * 3))
        worker.start()
        worker.join()
        with pytest.raises(MissingRuleError, match="made by autograd"):
            made[0] * 2


# --- loss.backward() by mistake -----------------------------------------------------------------


def test_autograd_that_reaches_the_tape_raises():
    for backward in (Tensor.backward, torch.autograd.backward):
        x = leaf(3, 5)
        with Tape() as tape:
            loss = (x * x).sum()
            with pytest.raises(RuntimeError, match=r"call tape.backward\(loss\)"):
                backward(loss)
        with pytest.raises(RuntimeError, match=r"call tape.backward\(loss\)"):
            backward(loss)
        tape.backward(loss)
        close(x.grad, 2 * x.detach())


def test_what_was_recorded_can_be_saved(tmp_path):
    x = leaf(3, 5)
    with Tape() as tape:
        loss = (x * x).sum()
    tape.backward(loss)
    torch.save({"loss": loss}, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["loss"].item() == loss.item()


def test_a_loss_that_is_half_on_the_tape():
    w = leaf(5)
    with Tape() as tape:
        loss = (w * w).sum()
    total = loss + w.abs().sum()
    with pytest.raises(RuntimeError, match="autograd reached a tensor made on a Tape"):
        total.backward()
    with pytest.raises(ValueError, match="not made on this tape"):
        tape.backward(total)


# --- which loss, which tensors ------------------------------------------------------------------


def test_losses_that_are_none():
    x, w = leaf(3, 5), leaf()
    with Tape() as tape:
        h = x * w
        constant = x.detach().sum()
        with torch.no_grad():
            quiet = h.sum()
        loss = h.sum()
    for wrong, what in [
        (h, r"not \(3, 5\)"),
        (3.0, "not float"),
        (w, "not made on this tape"),
        (constant, "not made on this tape"),
        (quiet, "not made on this tape"),
        (torch.tensor(2.0, requires_grad=True), "not made on this tape"),
        (Tape, "not type"),
    ]:
        with pytest.raises(ValueError, match=what):
            tape.backward(wrong)
        with pytest.raises(ValueError, match=what):
            tape.gradients(wrong, [x])
    tape.backward(loss)  # none of these used the tape up


def test_a_loss_that_was_changed_afterwards():
    x = leaf(3, 5)
    with Tape() as tape:
        loss = (x * x).sum()
    with torch.no_grad():
        loss.mul_(2)
    with pytest.raises(RuntimeError, match="the loss has been overwritten"):
        tape.backward(loss)


def test_tensors_that_have_no_gradient():
    x, unused, constant = leaf(3, 5), leaf(2), torch.randn(3)
    with Tape() as tape:
        detached = (x * 2).detach()
        loss = (x * detached).sum()
    for wrong in ([x, constant], [x, detached], x):
        with pytest.raises(ValueError, match="nor made on this tape"):
            tape.gradients(loss, wrong)
    grad_x, none = tape.gradients(loss, [x, unused])
    close(grad_x, detached)
    assert none is None and x.grad is None
