"""Directions in which a value may move, and how far a step means something to it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def units(value: Tensor) -> Iterator[Tensor]:
    """Each element by itself."""
    for i in range(value.numel()):
        unit = torch.zeros(value.numel(), dtype=torch.float64)
        unit[i] = 1
        yield unit.reshape(value.shape)


def signs(value: Tensor, seed: int) -> Tensor:
    """±1 at random."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, value.shape, generator=draws).double() * 2 - 1


def random_direction(value: Tensor, seed: int) -> Tensor:
    """Normal, each element in proportion to its own size and that of the others."""
    draws = torch.Generator().manual_seed(seed)
    direction = torch.randn(value.shape, generator=draws, dtype=torch.float64)
    return direction * (value.detach().cpu().double().abs() + typical(value)) / 2


def typical(value: Tensor) -> float:
    """A step that means something to these numbers: their root mean square, or 1 if all are 0."""
    size = value.double().square().mean().sqrt().item() if value.numel() else 0.0
    return size if size > 0 and math.isfinite(size) else 1.0
