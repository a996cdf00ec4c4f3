"""What the tape refuses, since a gradient would be dropped or the wrong one returned."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import about, close, each_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nn_backprop import MissingRuleError, Tape


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def hooked(register: str) -> Tensor:
    x = leaf(3)
    getattr(x, register)(lambda tensor: None)
    return x


def with_a_hook() -> nn.Module:
    module = nn.Linear(5, 2).double()
    module.register_full_backward_hook(lambda module, grad_x, grad_z: None)
    return module


def on_another_thread(function: Callable, x: Tensor) -> Tensor:
    made: list[Tensor] = []
    worker = threading.Thread(target=lambda: made.append(function(x)))
    worker.start()
    worker.join()
    return made[0]


# Of x, a leaf of shape (3, 5), or h = 2x.
OWN, CHANGED = "did not make, or a view of one", "overwrites a tensor that requires grad"
WITHOUT_EFFECT = "no effect on what the tape made"
REFUSED: list[tuple[str, Callable[[Tensor, Tensor], object]]] = [
    # in place, on what the tape did not make
    (OWN, lambda x, h: x.view(-1).relu_()),
    (OWN, lambda x, h: x.to(torch.float64).add_(1)),
    (OWN, lambda x, h: x.T.mul_(2)),
    (OWN, lambda x, h: x.relu_()),
    (OWN, lambda x, h: x.mul_(2)),
    (OWN, lambda x, h: zeros(3, 5).add_(x)),
    (OWN, lambda x, h: h.detach_().add_(x)),
    (CHANGED, lambda x, h: h.clamp_(0)),
    (CHANGED, lambda x, h: h.unsqueeze_(0)),
    ("copy_ has no rule", lambda x, h: zeros(3, 5).copy_(x)),
    # what takes a recorded tensor for a leaf
    (WITHOUT_EFFECT, lambda x, h: h.requires_grad_(False)),
    (WITHOUT_EFFECT, lambda x, h: setattr(h, "requires_grad", False)),
    (WITHOUT_EFFECT, lambda x, h: h.register_hook(lambda grad: 2 * grad)),
    (WITHOUT_EFFECT, lambda x, h: h.retain_grad()),
    (WITHOUT_EFFECT, lambda x, h: torch.autograd.grad(h.sum(), h, allow_unused=True)),
    ("another tape", lambda x, h: copy.copy(h) * 3),
    ("another tape", lambda x, h: copy.deepcopy(h) * 3),
    # hooks on gradients, which would not be called
    ("with a hook", lambda x, h: hooked("register_hook") * 2),
    ("with a hook", lambda x, h: hooked("register_post_accumulate_grad_hook") * 2),
    ("made by autograd", lambda x, h: with_a_hook()(x)),
    # what autograd makes meanwhile
    ("CheckpointFunction", lambda x, h: checkpoint(torch.tanh, x, use_reentrant=True) * 2),
    ("made by autograd", lambda x, h: on_another_thread(lambda h: h * 3, h) * 2),
    ("gradient of its argument 1", lambda x, h: F.leaky_relu(x, leaf())),
]


def test_what_would_drop_a_gradient_is_refused_and_the_tape_stays_usable():
    for i, (error, function) in enumerate(REFUSED):
        x = leaf(3, 5)
        before = x.detach().clone()
        with about(i, error), Tape() as tape:
            with pytest.raises(MissingRuleError, match=error):
                function(x, x * 2)
            assert torch.equal(x, before)
            loss = (x * 3).sum()
        close(tape.gradients(loss, [x])[0], 3 + zeros(3, 5))


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


def test_out_is_refused_by_torch_or_by_the_tape():
    for factor, out in ((leaf(3, 5), zeros(3, 5)), (zeros(3, 5), leaf(3, 5))):
        with Tape(), pytest.raises((MissingRuleError, RuntimeError), match="out"):
            torch.mul(factor, 2, out=out * 1)


def test_autocast_is_refused():
    with Tape(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(MissingRuleError, match=r"torch\.autocast"):
            nn.Linear(5, 3)(torch.randn(2, 5))
        h = torch.randn(2, 5).requires_grad_().argmax(1)  # nothing to differentiate
    assert h.shape == (2,)


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


# --- when the tape is played ---


def test_an_operand_for_whose_gradient_there_is_no_rule():
    x, weight = leaf(5, 3), torch.rand(3).double().requires_grad_()
    with Tape() as tape:
        loss = F.nll_loss(x, torch.tensor([0, 2, 1, 1, 0]), weight)
    with pytest.raises(MissingRuleError, match="nll_loss has no rule for the gradient of one"):
        tape.backward(loss)
    assert x.grad is None


def test_a_saved_tensor_or_a_loss_that_was_overwritten():
    for of, what in ((0, "that mul saved for its backward"), (1, "the loss")):
        x, w = leaf(3, 5), leaf(5)
        with Tape() as tape:
            loss = (x * w).sum()
        with torch.no_grad():
            (w, loss)[of].mul_(2)
        with pytest.raises(RuntimeError, match=f"{what} has been overwritten"):
            tape.backward(loss)
        assert x.grad is None


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


def test_losses_that_are_none():
    x, w = leaf(3, 5), leaf()
    with Tape() as tape:
        h = x * w
        constant = x.detach().sum()
        with torch.no_grad():
            quiet = h.sum()
        loss = h.sum()
    half = loss + w.abs()
    with pytest.raises(RuntimeError, match="autograd reached a tensor made on a Tape"):
        half.backward()
    for wrong, what in [
        (h, r"not \(3, 5\)"),
        (3.0, "not float"),
        (Tape, "not type"),
        *[(t, "not made on this tape") for t in (w, constant, quiet, half, leaf())],
    ]:
        for play in (tape.backward, lambda wrong: tape.gradients(wrong, [x])):
            with pytest.raises(ValueError, match=what):
                play(wrong)
    tape.backward(loss)  # none of these used the tape up


def test_tensors_that_have_no_gradient():
    x, unused, constant = leaf(3, 5), leaf(2), torch.randn(3)
    with Tape() as tape:
        detached = (x * 2).detach()
        loss = (x * detached).sum()
    for wrong in ([x, constant], [x, detached], x):
        with pytest.raises(ValueError, match="nor made on this tape"):
            tape.gradients(loss, wrong)
    each_close(tape.gradients(loss, [x, unused]), [detached, None])
    assert x.grad is None
