"""Directions in which a value may move, how far a step means something to it, and the derivative
along one by dual numbers: exact to rounding, without a step."""

import math
import warnings
from contextlib import suppress
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nn_backprop.check.target.target import Target


def unit(value: Tensor, i: int) -> Tensor:
    """The i-th element by itself."""
    direction = torch.zeros(value.numel(), dtype=torch.float64)
    direction[i] = 1
    return direction.reshape(value.shape)


def normal(value: Tensor, draws: torch.Generator) -> Tensor:
    """Independent normal numbers."""
    return torch.randn(value.shape, generator=draws, dtype=torch.float64)


def signs(value: Tensor, seed: int) -> Tensor:
    """±1 at random."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, value.shape, generator=draws).double() * 2 - 1


def random_direction(value: Tensor, seed: int) -> Tensor:
    """Normal, each element in proportion to its own size and that of the others."""
    direction = normal(value, torch.Generator().manual_seed(seed))
    return direction * (value.detach().cpu().double().abs() + typical(value)) / 2


def typical(value: Tensor) -> float:
    """A step that means something to these numbers: their root mean square, or 1 if all are 0."""
    size = value.double().square().mean().sqrt().item() if value.numel() else 0.0
    return size if size > 0 and math.isfinite(size) else 1.0


class PaddingStays(TorchFunctionMode):
    """Inside, the row of an embedding at its `padding_idx` is a constant, as autograd takes it.

    handed: what the forward is called with; values: the same before anything in it moved.
    """

    def __init__(self, handed: dict[str, Tensor], values: dict[str, Tensor]):
        super().__init__()
        self.original = {id(t): values[name] for name, t in handed.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.embedding:
            x, weight, *rest = args if len(args) > 1 else (*args, kwargs.pop("weight"))
            row = rest[0] if rest else kwargs.get("padding_idx")
            if row is not None and id(weight) in self.original:
                padding = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
                padding[row] = True
                weight = torch.where(padding, self.original[id(weight)], weight)
            args = (x, weight, *rest)
        return func(*args, **kwargs)


def product(target: Target, name: str, direction: Tensor, upstream: list[Tensor]) -> float:
    """⟨J v, u⟩, v being a direction of one value and u the upstream gradient."""
    # Torch adds a zero tangent several times as fast as one that is missing; but at a pole of the
    # function, 0 · ∞ is no number, and there may be no formula for the other values.
    with suppress(Exception):
        found = _product(target, name, direction, upstream, zeros=True)
        if math.isfinite(found):
            return found
    return _product(target, name, direction, upstream, zeros=False)


def _product(
    target: Target, name: str, direction: Tensor, upstream: list[Tensor], zeros: bool
) -> float:
    math_only = sdpa_kernel(SDPBackend.MATH)  # which has a forward-mode formula
    with warnings.catch_warnings(), forward_ad.dual_level(), math_only:
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on first use
        handed = {n: v.clone() for n, v in target.values.items()}
        for n, value in handed.items():
            if zeros or n == name:
                tangent = direction.to(value) if n == name else torch.zeros_like(value)
                handed[n] = forward_ad.make_dual(value, tangent)
        with PaddingStays(handed, target.values):
            outputs = target.forward(handed)
        tangents = [forward_ad.unpack_dual(z).tangent for z in outputs]
        pairs = zip(tangents, upstream, strict=True)
        return sum((t.double() * u).sum().item() for t, u in pairs if t is not None)
