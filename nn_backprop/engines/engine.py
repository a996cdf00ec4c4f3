"""Three ways to the same gradients: PyTorch's autograd, our tape, and the chain rule by hand.

An engine is a function of (model, inputs, targets) that returns the loss, detached, and leaves the
gradient of every parameter in its ``.grad``. The model is one of `models`: it has a `loss`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.engines import by_hand
from nn_backprop.engines.by_hand_fast import CNNBackprop, MLPBackprop
from nn_backprop.engines.replay import NotReplayableError, Replay
from nn_backprop.engines.tape import backprop
from nn_backprop.models import CNN, MLP

Engine = Callable[[nn.Module, Tensor, Tensor], Tensor]


def autograd(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own."""
    model.zero_grad()
    loss = model.loss(model(inputs), targets)  # type: ignore[operator]
    loss.backward()
    return loss.detach()


def by_tape(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Our rules, recorded and played backwards."""
    return _hand_over(model, backprop(model, model.loss, inputs, targets))  # type: ignore[arg-type]


def written_out(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The chain rule of this very network, line by line.

    Raises ValueError for a network whose backward pass nobody has written out.
    """
    for kind, backward_pass in ((MLP, by_hand.mlp_backprop), (CNN, by_hand.cnn_backprop)):
        if isinstance(model, kind):
            return _hand_over(model, backward_pass(model, inputs, targets))
    raise ValueError(
        f"by-hand gradients are written out for MLP and CNN, not for {type(model).__name__}: "
        "use the engine autograd or tape"
    )


ENGINES: dict[str, Engine] = {"autograd": autograd, "tape": by_tape, "by-hand": written_out}


def for_training(name: str) -> Engine:
    """The engine of this name, made fast for a loop: what it sets up at one step serves the next.

    autograd is as it is. The tape records one pass and plays it again (`replay`); by hand, the
    buffers stay (`by_hand_fast`). Both notice another model, shape, type or mode; see `replay` for
    what must not happen to a model in between. Unlike those of `ENGINES`, the engine by hand
    overwrites its gradients at the next call.
    """
    if name == "autograd":
        return autograd
    passes: list[Any] = []  # for the full batches and for the last, smaller one
    refused: list[nn.Module] = []

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        for ready in passes:
            if ready.fits(model, inputs, targets):
                return ready(inputs, targets)
        new = None
        if not any(model is other for other in refused):
            new = _prepared(name, model, inputs, targets)
        if new is None:
            refused[:] = [model]
            return ENGINES[name](model, inputs, targets)
        del passes[:-3]
        passes.append(new)
        return new(inputs, targets)

    return compute


def _prepared(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """A pass that can be played again for batches like this one; None if there is none."""
    if name == "tape":
        try:
            return Replay(model, model.loss, inputs, targets)  # type: ignore[arg-type]
        except NotReplayableError:
            return None
    if any(not p.is_contiguous() or p.dtype != inputs.dtype for p in model.parameters()):
        return None
    for kind, backprop_of in ((MLP, MLPBackprop), (CNN, CNNBackprop)):
        if isinstance(model, kind):
            return backprop_of(model, inputs)
    return None


def _hand_over(model: nn.Module, result: tuple[Tensor, dict[str, Tensor | None]]) -> Tensor:
    loss, grads = result
    for name, parameter in model.named_parameters():
        grad = grads.get(name)
        if grad is not None and grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)  # fused optimizers misread other strides
        parameter.grad = grad
    return loss
