"""Three ways to the same gradients: PyTorch's autograd, our tape, and the chain rule by hand.

An engine is a function of (model, inputs, targets) that returns the loss, detached, and leaves the
gradient of every parameter in its ``.grad``. The model is one of `models`: it has a `loss`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop import by_hand
from nn_backprop.by_hand_fast import CNNBackprop, MLPBackprop
from nn_backprop.layers import KWinners
from nn_backprop.models import CNN, MLP
from nn_backprop.replay import NotReplayableError, Replay
from nn_backprop.tape import backprop

Engine = Callable[[nn.Module, Tensor, Tensor], Tensor]


def autograd(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own."""
    model.zero_grad()
    loss = model.loss(model(inputs), targets)  # type: ignore[operator]
    loss.backward()
    return loss.detach()


def tape(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
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


ENGINES: dict[str, Engine] = {"autograd": autograd, "tape": tape, "by-hand": written_out}


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


def in_precision(engine: Engine, dtype: torch.dtype) -> Engine:
    """The engine, computing in `dtype` for parameters of another.

    For bfloat16 the parameters themselves stay in float32: with 8 bits, w + Δw = w as soon as Δw is
    smaller than about w/256, and training would stop. Each call copies them to a `dtype` model,
    lets that one compute, and copies its gradients back (Micikevicius et al. 2018, section 3.1).
    """
    known: nn.Module | None = None
    low = nn.Module()
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal known, low
        if model is not known:
            known, low = model, _lowered(model, dtype)
            both = zip(low.parameters(), model.parameters(), strict=True)
            pairs[:] = [(mine, theirs) for mine, theirs in both if mine is not theirs]
        if low.training != model.training:
            low.train(model.training)
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)
        loss = engine(low, inputs.to(dtype), targets)
        for mine, theirs in pairs:
            theirs.grad = None if mine.grad is None else mine.grad.to(theirs.dtype)
        return loss

    return compute


def _lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in `dtype`; but its batch norms and k winners are the model's own.

    Means and variances are sums over many numbers; and what runs along during training, statistics
    and duty cycles, has to arrive in the model.
    """
    low = copy.deepcopy(model).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, KWinners)):
            owner, _, attribute = name.rpartition(".")
            setattr(low.get_submodule(owner), attribute, module)
    return low


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, and does not just imitate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def disagreement(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
    """How far the other engines' gradients are from autograd's, by engine and parameter.

    The measure is ‖g − g_autograd‖∞ / ‖g_autograd‖∞, on a copy of the model and the batch in
    float64 (0/0 counts as 0, NaN as infinite): a dimensionless number, about 1e-15 for two right
    ones.
    """
    if inputs.device.type == "mps":  # which has no float64
        model, inputs, targets = copy.deepcopy(model).cpu(), inputs.cpu(), targets.cpu()
    exact, inputs = copy.deepcopy(model).double(), inputs.double()
    grads: dict[str, dict[str, Tensor]] = {}
    for name, engine in ENGINES.items():
        if name == "by-hand" and not isinstance(exact, (MLP, CNN)):
            continue
        own = copy.deepcopy(exact)  # what one engine counts in a buffer must not reach the next
        engine(own, inputs, targets)
        grads[name] = {k: p.grad for k, p in own.named_parameters() if p.grad is not None}
    expected = grads.pop("autograd")
    return {
        name: {key: _distance(got[key], expected[key]) for key in expected}
        for name, got in grads.items()
    }


def _distance(actual: Tensor, expected: Tensor) -> float:
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def _hand_over(model: nn.Module, result: tuple[Tensor, dict[str, Tensor | None]]) -> Tensor:
    loss, grads = result
    for name, parameter in model.named_parameters():
        grad = grads.get(name)
        if grad is not None and grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)  # fused optimizers misread other strides
        parameter.grad = grad
    return loss
