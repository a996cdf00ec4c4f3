"""One check, as far as it has come: what its stages hand on to one another."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nn_backprop.check.oracle.oracle import Expected, Oracle
from nn_backprop.check.report import Cause, Entry, Probe, Report
from nn_backprop.check.target.target import Gradients, Target, largest

# Just the verdict on the gradients; with the probes and the diagnosis too; with the search in a
# network as well.
Depth = Literal["verdict", "alone", "whole"]

# A check of another target, as a stage asks for one without knowing the checker; its arguments are
# (subject, original, reference=None, second_order=False, depth="whole").
Check = Callable[..., Report]


@dataclass
class Findings:
    """The target of one check, and what has been found about it."""

    subject: Target
    original: Any  # what the subject was made from
    reference: Any
    second_order: bool
    depth: Depth
    check: Check
    report: Report
    outputs: list[Tensor] = field(init=False)
    upstream: list[Tensor] = field(init=False)
    wide: Target = field(init=False)
    """The subject in float64, or as it is if it takes no other precision."""
    wide_upstream: list[Tensor] = field(init=False)
    oracle: Oracle = field(init=False)
    expected: dict[str, Expected] = field(init=False)
    actual: Gradients = field(init=False)  # the gradients under test, in their own precision
    causes: list[Cause] = field(default_factory=list)  # what the probes have shown

    @property
    def wrong(self) -> list[Entry]:
        return [e for e in self.report.tensors if e.verdict == "fail"]

    def size(self, name: str) -> float:
        """The largest entry of an expected gradient, or product with a random direction."""
        expected = self.expected[name]
        if expected.value is not None:
            return largest(expected.value)
        return max((abs(p) for p, _ in expected.products), default=0.0)

    def check_again(self, subject: Target, depth: Depth = "verdict") -> Report:
        """A check of the same target elsewhere."""
        return self.check(subject, self.original, self.reference, depth=depth)

    def add(self, probe: Probe, *causes: Cause | None) -> None:
        self.report.probes.append(probe)
        self.causes += filter(None, causes)

    def add_from(self, where: str, report: Report) -> None:
        """The causes found in a part of the target."""
        self.report.failed_hypotheses += report.failed_hypotheses
        self.causes += [replace(c, detail=f"{where}: {c.detail}") for c in report.causes]


def agree(wide: Tensor, low: Tensor) -> bool:
    """Whether the output in float64 is that of the lower precision, but for underflow; a random
    mask, say, need not be the same in both."""
    if wide.dtype != torch.float64 or wide.shape != low.shape:
        return False
    info = torch.finfo(low.dtype)
    slack = info.eps**0.4 * largest(wide) + info.smallest_normal
    return bool(((wide - low.double()).abs() <= slack).all())
