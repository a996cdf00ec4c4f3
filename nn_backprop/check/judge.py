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
from nn_backprop.check.target.target import filled

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
    actual = filled(grad, value).cpu()
    tolerance = SAFETY * expected.uncertainty
    entry = Entry(name, tuple(value.shape), expected.oracle, smallest_visible=tolerance)
    if expected.unknown:
        entry.smallest_visible = math.inf
        return entry.judged("inconclusive", expected.unknown)
    if expected.value is None:
        _judge_products(entry, actual, expected)
        if entry.verdict == "fail" and _resolve(oracle, name, expected, upstream):
            return judge(oracle, name, grad, expected, upstream)
        return entry
    right = expected.value.double().cpu()
    if not value.numel():
        return entry.judged("pass", "empty")
    if not right.isfinite().all():
        return entry.judged("inconclusive", "the expected gradient is not finite here")
    precision, size = dtype_name(oracle.dtype), right.abs().max().item()
    if size > torch.finfo(oracle.dtype).max:
        return entry.judged("inconclusive", f"beyond the largest number of {precision}")
    find_worst(entry, actual, right, expected.uncertainty)
    if entry.error <= tolerance:
        return _judge_power(entry, size, tolerance, precision)
    given = (oracle, name, actual, right, tolerance, upstream)
    if kink := kinks.accepted(*given):
        return entry.judged("pass", kink)
    branch = None if grad is None else oracle.branch_of(name, upstream)
    if branch is not None and not (actual - branch).abs().max() > 2 * tolerance:
        return entry.judged(
            "pass" if name in oracle.plain else "inconclusive",
            f"at a kink to rounding in {precision}, where autograd through the plain forward takes "
            "the same branch",
        )
    if entry.oracle == "differences" and kinks.unseen(*given):
        why = "the differences are unsure: shorter steps contradict longer ones"
        return entry.judged("inconclusive", why)
    return entry.judged("fail", "the backward gives no gradient at all" if grad is None else "")


def _judge_power(entry: Entry, size: float, tolerance: float, precision: str) -> Entry:
    """Whether a gradient that agrees with one of this size means anything."""
    if size == 0:
        return entry.judged("pass", "no output depends on it here: only a zero could be checked")
    if tolerance <= POWER * size:
        return entry
    if size <= tolerance / 4:
        return entry.judged("pass", "zero to rounding: larger terms cancel")
    share = f"may account for {100 * tolerance / size:.0f} % of its largest entry"
    return entry.judged("inconclusive", f"ill-conditioned: rounding in {precision} {share}")


def find_worst(entry: Entry, actual: Tensor, expected: Tensor, uncertainty: float) -> None:
    """Fills in where two finite gradients differ most, and by how much."""
    error = (actual - expected).abs().nan_to_num(nan=math.inf)
    i = int(error.argmax())
    entry.worst_index = tuple(int(j) for j in np.unravel_index(i, error.shape))
    entry.actual, entry.expected = actual.flatten()[i].item(), expected.flatten()[i].item()
    entry.error = error.flatten()[i].item()
    entry.relative_error = _ratio(entry.error, expected.abs().max().item())
    entry.units = _ratio(entry.error, uncertainty)


def _judge_products(worst: Entry, actual: Tensor, expected: Expected) -> None:
    """Where the expected gradient is known along random directions of ±1 only."""
    scale = 2 * math.sqrt(max(1, actual.numel()))
    worst.smallest_visible = 0.0
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
        why = "the oracle is too uncertain here: its own error is as large as what it says"
        worst.judged("inconclusive", why)


def _resolve(oracle: Oracle, name: str, expected: Expected, upstream: list[Tensor]) -> bool:
    """Fills in the elements of a gradient known along random directions only, if few enough."""
    dual = expected.oracle == "forward-mode products"
    if oracle.target.values[name].numel() > (RESOLVED if dual else ELEMENTWISE):
        return False
    find = oracle.by_forward_mode if dual else oracle.by_differences
    full = find(name, upstream, elementwise=True)
    expected.value, expected.oracle = full.value, full.oracle
    expected.uncertainty = full.uncertainty
    return True


def _ratio(error: float, of: float) -> float:
    return error / of if of else (math.inf if error else 0.0)
