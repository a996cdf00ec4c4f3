"""Comparisons of tensors, slips that are made with them, and axes in words."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TINY = 1e-300  # keeps a division by an empty sum finite

Axes = tuple[int, ...]


def nearest_ratio(left: Tensor, right: Tensor) -> float:
    """The number that comes nearest to left / right."""
    return float((left * right).sum() / (right * right).sum().clamp(min=TINY))


def is_close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Equal up to rounding."""
    limit = max(1e-6 * float(right.norm()), 3 * tolerance * math.sqrt(max(right.numel(), 1)))
    return right.numel() > 0 and float((left - right).norm()) <= limit


def alignments(tensor: Tensor, shape: torch.Size) -> list[Tensor]:
    """The tensor with axes of size 1 added such that it broadcasts to the shape, in every way."""
    found = []
    for start in range(len(shape) - tensor.ndim + 1) if tensor.numel() > 1 else ():
        padded = (1,) * start + tuple(tensor.shape) + (1,) * (len(shape) - tensor.ndim - start)
        if all(size in (1, full) for size, full in zip(padded, shape, strict=True)):
            found.append(tensor.reshape(padded))
    return found


def normalised_axes(shape: torch.Size) -> list[tuple[tuple[int, ...], Axes]]:
    """Shapes to see a tensor in, with the axes over which a normalisation may reduce there."""
    rank, full = len(shape), tuple(shape)
    sets = [(axis,) for axis in range(rank)] + [tuple(range(k, rank)) for k in range(rank)]
    sets += [tuple(axis for axis in range(rank) if axis != 1)] if rank >= 2 else []
    views = [(full, axes) for axes in dict.fromkeys(sets)]
    for groups in range(2, min(shape[1], 33)) if rank >= 3 else ():
        if shape[1] % groups == 0:
            grouped = (shape[0], groups, shape[1] // groups, *shape[2:])
            views.append((grouped, tuple(range(2, rank + 1))))
    return [(view, axes) for view, axes in views if math.prod(view[axis] for axis in axes) >= 3]


def adds_up(tensor: Tensor, axis: int) -> bool:
    """Whether the entries along the axis are shares of 1."""
    return tensor.shape[axis] > 1 and bool((tensor.sum(axis) - 1).abs().max() <= 1e-5)


def in_words(axes: Axes) -> str:
    text = ", ".join(map(str, axes[:-1]))
    return f"axes {text} and {axes[-1]}" if text else f"axis {axes[0]}"


def first_few(numbers: Tensor) -> str:
    return ", ".join(f"{n:.4g}" for n in numbers[:8].tolist()) + (", …" if len(numbers) > 8 else "")


Change = Callable[[Tensor], Tensor]


def only_range(*ranges: tuple[int, int, int]) -> Change:
    """Zero but for a range of an axis, or of each of several: axis, start, end."""

    def kept(t: Tensor) -> Tensor:
        place = [slice(None)] * t.dim()
        for dim, start, end in ranges:
            place[dim] = slice(start, end)
        only = torch.zeros_like(t)
        only[*place] = t[*place]
        return only

    return kept


def _rolled(dim: int, by: int, then: Change) -> Change:
    return lambda t: then(t.roll(by, dim))


def exchanges(t: Tensor) -> Iterator[tuple[int, int, Change]]:
    """The pairs of axes that can be exchanged."""
    for a, b in itertools.combinations(range(t.dim()), 2):
        if t.shape[a] == t.shape[b] > 1:
            yield a, b, operator.methodcaller("transpose", a, b)


def offsets(t: Tensor) -> Iterator[tuple[tuple, str, Change]]:
    """Off by one along an axis: going round, or with a zero coming in."""
    for d, n in enumerate(t.shape):
        for by in (1, -1) if n > 2 else ():
            only = only_range((d, 1, n) if by > 0 else (d, 0, n - 1))
            text = f"off by one along axis {d}"
            yield ("roll", d, by), text, operator.methodcaller("roll", by, d)
            yield ("shift", d, by), text, _rolled(d, by, only)
