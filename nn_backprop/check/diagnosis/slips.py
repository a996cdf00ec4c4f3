"""Slips that several families of mistakes make with a tensor."""

import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def only_range(*ranges: tuple[int, int, int]) -> Change:
    """Zero but for a range of an axis, or of each of several: axis, start, end."""

    def kept(t: Tensor) -> Tensor:
        for dim, start, end in ranges:
            zeros = torch.zeros_like(t)
            zeros.narrow(dim, start, end - start).copy_(t.narrow(dim, start, end - start))
            t = zeros
        return t

    return kept


def _rolled(dim: int, by: int, then: Change) -> Change:
    return lambda t: then(t.roll(by, dim))


def offsets(t: Tensor) -> Iterator[tuple[tuple, str, Change]]:
    """Off by one along an axis: going round, or with a zero coming in."""
    for d, n in enumerate(t.shape):
        for by in (1, -1) if n > 2 else ():
            only = only_range((d, 1, n) if by > 0 else (d, 0, n - 1))
            text = f"off by one along axis {d}"
            yield ("roll", d, by), text, operator.methodcaller("roll", by, d)
            yield ("shift", d, by), text, _rolled(d, by, only)
