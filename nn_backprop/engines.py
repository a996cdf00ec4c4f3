"""Three ways to the same gradients: PyTorch's autograd, our tape, and the chain rule by hand.

An engine is a function of (model, inputs, targets) that returns the loss, detached, and leaves the
gradient of every parameter in its ``.grad``. The model is one of `models`: it has a `loss`.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nn_backprop import by_hand
from nn_backprop.models import CNN, MLP
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


def in_precision(engine: Engine, dtype: torch.dtype) -> Engine:
    """The engine, computing in `dtype` for parameters of another.

    For bfloat16 the parameters themselves stay in float32: with 8 bits, w + Δw = w as soon as Δw is
    smaller than about w/256, and training would stop. Each call copies them to a `dtype` model,
    lets that one compute, and copies its gradients back (Micikevicius et al. 2018, section 3.1).
    """
    low: nn.Module | None = None  # buffers and mode are those of the model of the first call

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal low
        if low is None:
            low = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            for mine, theirs in zip(low.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        loss = engine(low, inputs.to(dtype), targets)
        for mine, theirs in zip(low.parameters(), model.parameters(), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.to(theirs.dtype)
        return loss

    return compute


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
        exact.zero_grad()
        engine(exact, inputs, targets)
        grads[name] = {k: p.grad for k, p in exact.named_parameters() if p.grad is not None}
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
