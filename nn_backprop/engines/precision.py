"""An engine that computes in another precision than that of the parameters."""

import copy

import torch
from torch import Tensor, nn

from nn_backprop.engines.engine import Engine
from nn_backprop.layers import KWinners


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
