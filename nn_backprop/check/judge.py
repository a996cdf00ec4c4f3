"""The comparison: how far a gradient is from the expected one, and whether that is too far.

Errors are measured in units of what the oracle itself is uncertain by, rounding included, so that
neither the size of the gradient nor that of its arrays changes a verdict.
"""

import math

import numpy as np
import torch
from torch import Tensor

from nn_backprop.check.oracle import kinks
from nn_backprop.check.oracle.oracle import ELEMENTWISE, Expected, Oracle
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Entry, dtype_name

# Where rounding may account for more than this share of the largest entry, nothing can be said.
POWER = 0.5
# A wrong gradient of up to this many entries, known along random directions only, is then found
# element by element; of fewer by differences, each of which takes dozens of forwards.
RESOLVED = 12_000


def judge(
    oracle: Oracle, name: str, grad: Tensor | None, expected: Expected, upstream: list[Tensor]
) -> Entry:
    """Whether a gradient is the expected one; `upstream` is what the oracle was asked with."""
    value = oracle.target.values[name]
    missing = grad is None
    actual = torch.zeros(value.shape, dtype=torch.float64) if grad is None else grad.detach()
    actual = actual.double().cpu()
    if expected.unknown:
        return Entry(name, tuple(value.shape), "none", "inconclusive", 0.0, 0.0, 0.0, math.inf,
                     note=expected.unknown)  # fmt: skip
    if expected.value is None:
        entry = _judge_products(name, actual, expected)
        if entry.verdict == "fail" and _resolve(oracle, name, expected, upstream):
            return judge(oracle, name, grad, expected, upstream)
        return entry
    right = expected.value.double().cpu()
    entry = Entry(
        name, tuple(value.shape), expected.oracle, "pass", 0.0, 0.0, 0.0,
        SAFETY * expected.uncertainty,
    )  # fmt: skip
    if not value.numel():
        entry.note = "empty"
        return entry
    if not right.isfinite().all():
        entry.verdict, entry.note = "inconclusive", "the expected gradient is not finite here"
        return entry
    precision = dtype_name(oracle.dtype)
    size = right.abs().max().item()
    if size > torch.finfo(oracle.dtype).max:
        entry.verdict, entry.note = "inconclusive", f"beyond the largest number of {precision}"
        return entry
    find_worst(entry, actual, right, expected.uncertainty)
    tolerance = SAFETY * expected.uncertainty
    if not entry.error <= tolerance:
        entry.verdict = "fail"
        kink = kinks.accepted(oracle, name, actual, right, tolerance, upstream)
        branch = oracle.branch_of(name, upstream) if not (kink or missing) else None
        if kink:
            entry.verdict, entry.note = "pass", kink
        elif branch is not None and not (actual - branch).abs().max() > 2 * tolerance:
            entry.verdict = "pass" if name in oracle.plain else "inconclusive"
            entry.note = (
                f"at a kink to rounding in {precision}, where autograd through the plain "
                "forward takes the same branch"
            )
        elif entry.oracle == "differences" and kinks.unseen(
            oracle, name, actual, right, tolerance, upstream
        ):
            entry.verdict = "inconclusive"
            entry.note = "the differences are unsure: shorter steps contradict longer ones"
        elif missing:
            entry.note = "the backward gives no gradient at all"
    elif size == 0:
        entry.note = "no output depends on it here: only a zero could be checked"
    elif tolerance > POWER * size:
        if size <= tolerance / 4:
            entry.note = "zero to rounding: larger terms cancel"
        else:
            entry.verdict = "inconclusive"
            entry.note = (
                f"ill-conditioned: rounding in {precision} "
                f"may account for {100 * tolerance / size:.0f} % of its largest entry"
            )
    return entry


def find_worst(entry: Entry, actual: Tensor, expected: Tensor, uncertainty: float) -> None:
    """Fills in where two finite gradients differ most, and by how much."""
    error = (actual - expected).abs().nan_to_num(nan=math.inf)
    i = int(error.argmax())
    entry.worst_index = tuple(int(j) for j in np.unravel_index(i, error.shape))
    entry.actual, entry.expected = actual.flatten()[i].item(), expected.flatten()[i].item()
    entry.error = error.flatten()[i].item()
    entry.relative_error = _ratio(entry.error, expected.abs().max().item())
    entry.units = _ratio(entry.error, uncertainty)


def _judge_products(name: str, actual: Tensor, expected: Expected) -> Entry:
    """Where the expected gradient is known along random directions of ±1 only."""
    scale = 2 * math.sqrt(max(1, actual.numel()))
    worst = Entry(name, tuple(actual.shape), expected.oracle, "pass", 0.0, 0.0, 0.0, 0.0)
    size = max((abs(p) for p, _ in expected.products), default=0.0)
    for direction, (product, own_error) in zip(expected.directions, expected.products, strict=True):
        floor = 1e-9 * abs(product) if own_error else 0.0
        uncertainty = max(own_error, floor, scale * expected.uncertainty)
        found = (actual * direction).sum().item()
        error = abs(found - product)
        units = _ratio(error, uncertainty)
        if not units <= worst.units or worst.actual is None:
            worst.units, worst.error = units, error
            worst.actual, worst.expected = found, product
            worst.relative_error = _ratio(error, size)
        worst.smallest_visible = max(worst.smallest_visible, SAFETY * uncertainty)
    worst.note = "actual and expected are products with a random direction of ±1"
    if not worst.units <= SAFETY:
        worst.verdict = "fail"
    elif worst.smallest_visible > POWER * size > 0:
        worst.verdict = "inconclusive"
        worst.note = "the oracle is too uncertain here: its own error is as large as what it says"
    return worst


def _resolve(oracle: Oracle, name: str, expected: Expected, upstream: list[Tensor]) -> bool:
    """Fills in the elements of a gradient known along random directions only, if few enough."""
    dual = expected.oracle == "forward-mode products"
    if oracle.target.values[name].numel() > (RESOLVED if dual else ELEMENTWISE):
        return False
    if dual:
        full = oracle.by_forward_mode(name, upstream, elementwise=True)
    else:
        full = oracle.by_differences(name, upstream, elementwise=True)
    expected.value, expected.oracle = full.value, full.oracle
    expected.uncertainty = full.uncertainty
    return True


def _ratio(error: float, of: float) -> float:
    return error / of if of else (math.inf if error else 0.0)
