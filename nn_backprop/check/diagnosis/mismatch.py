"""What a diagnosis starts from, and what it answers with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from nn_backprop.check.report import Cause


@dataclass(frozen=True)
class Mismatch:
    """A gradient that is wrong, and all that is known around it; in float64, detached."""

    name: str
    """Of the input or parameter whose gradient it is."""
    actual: Tensor
    """Of another shape than `expected` if that is the mistake."""
    expected: Tensor
    tolerance: float
    """Two entries that differ by less are equal."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Every floating input and parameter, by name, this one included."""
    upstream: list[Tensor] = field(default_factory=list)
    """The gradient of each output."""
    outputs: list[Tensor] = field(default_factory=list)
    labels: dict[str, Tensor] = field(default_factory=dict)
    """Every integer or boolean tensor among the inputs, such as class indices."""
    cut_off: frozenset[int] = frozenset()
    """The outputs, by number, that do not require grad."""
    products: bool = False
    """Whether `actual` and `expected` are products with random directions, of a gradient with too
    many entries to be known one by one."""
    gradient: Callable[[list[Tensor]], Tensor] | None = None
    """The expected gradient for another upstream gradient, where that can be computed."""


class Hypothesis(NamedTuple):
    """A cause, and how many bits it takes to single it out among those of its family: of two that
    explain a gradient equally well, the one that takes fewer is the better explanation."""

    bits: float
    cause: Cause
