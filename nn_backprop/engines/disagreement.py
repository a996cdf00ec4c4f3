"""How far apart the gradients of the engines are."""

import copy
import math

from torch import Tensor, nn

from nn_backprop.engines.engine import ENGINES
from nn_backprop.models import CNN, MLP


def disagreements(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
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
