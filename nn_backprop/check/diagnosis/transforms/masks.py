"""Masks and branches: zero in the wrong places, or wrong on one side of a threshold."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    TINY,
    alignments,
    first_few,
    is_close,
    nearest_ratio,
)
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guesses import Guess


def masks(case: Case) -> Iterator[Guess]:
    """Zero where it should not be, or not zero where it should: in slices or on a condition."""
    wrong, right = case.wrong, case.right
    lost = bool((case.actual[wrong].abs() <= case.tolerance).all())
    spared = bool((case.expected[wrong].abs() <= case.tolerance).all())
    if not (lost or spared) or not right.any():
        return
    predicted = torch.where(wrong, case.actual, case.expected)
    if lost and (box := _box(wrong, right)):
        yield Guess("subset", box[0], f"is there only {box[1]}, and zero elsewhere", predicted)
    found = "has a mask too many: it is 0" if lost else "lacks a mask: it is not 0"
    for where, view, arbitrary in _regions(case):
        region = view.expand(case.expected.shape)
        if (wrong & ~region).any() or (right & region).any():
            continue
        if int((wrong & region).sum()) < int(region.sum()) / 2 and not lost:
            continue
        if not arbitrary or _surprise(wrong, right) >= 8:
            detail, formula = f"{found} where {where}", "expected everywhere else"
            chance = max(0, 8 - view.numel()) if arbitrary else 0  # few entries: easily met
            yield Guess("missing-factor", 3 + chance, detail, predicted, formula)
            if view.shape == case.expected.shape:  # a mask that is not in the forward is a branch
                bits = (2.5 if lost and not spared else 3.5) + chance
                detail = f"is {'0' if lost else 'not 0'} where {where}, and right elsewhere"
                yield Guess("wrong-branch", bits, detail, predicted, formula)


def other_mask(case: Case) -> Iterator[Guess]:
    """The upstream gradient times another mask than that of the expected gradient."""
    for driver in case.drivers.values():
        live = driver.abs() > 1e-9
        if driver.shape != case.expected.shape or int(live.sum()) < 8:
            continue
        expected, actual = (t[live] / driver[live] for t in (case.expected, case.actual))
        value = float(expected.abs().max())
        drawn = actual.abs() > value / 2
        lost, gained = drawn < (expected.abs() > value / 2), drawn > (expected.abs() > value / 2)
        masked = is_close(expected * (expected - value), 0 * expected, 1e-9 * value**2)
        if masked and bool(lost.any()) and bool(gained.any()):
            keep = (case.actual / torch.where(live, driver, 1.0)).abs() > value / 2
            detail = "is the upstream gradient times another mask than it should be"
            formula = f"{value:.4g} × upstream in other places than expected"
            yield Guess("wrong-operand", 6, detail, value * driver * keep, formula)


def drawn_mask(case: Case) -> Iterator[Guess]:
    """0 at some entries, which no condition tells apart, and one multiple at all others."""
    ratio = case.actual / torch.where(case.expected == 0, TINY, case.expected)
    live = case.expected.abs() > case.tolerance
    kept = live & (case.actual.abs() > case.tolerance)
    if min(int(kept.sum()), int((live & ~kept).sum())) < 3 or _surprise(live & ~kept, kept) < 12:
        return
    multiple = float(ratio[kept].median())
    text = "a mask too many" + (f", of 0 and {multiple:.4g}" if abs(multiple - 1) > 1e-6 else "")
    detail = f"has {text}, as of a dropout that is not in the forward"
    predicted = multiple * case.expected * kept
    yield Guess("missing-factor", 24, detail, predicted, f"{multiple:.4g} × expected, or 0")


def branches(case: Case) -> Iterator[Guess]:
    """Wrong on one side of a threshold only; or a multiple that differs on the sides of zero."""
    wrong, right, expected = case.wrong, case.right, case.expected
    for name, view in case.views:
        if view.shape != expected.shape:
            continue
        sides = {f"{name} >": view, f"{name} <": -view, f"|{name}| >": view.abs()}
        sides[f"|{name}| <"] = -view.abs()
        for text, values in sides.items() if min(int(wrong.sum()), int(right.sum())) >= 3 else []:
            last, first = float(values[right].max()), float(values[wrong].min())
            if last < first and _surprise(wrong, right) >= 14:
                turn = -1 if text.endswith("<") else 1
                edge = turn * _roundest(last, first)
                formula = f"expected everywhere else; it begins to be wrong at {turn * first:.4g}"
                predicted = torch.where(wrong, case.actual, expected)
                yield Guess("wrong-branch", 9, f"is wrong only where {text} {edge:g}", predicted,
                             formula)  # fmt: skip
                if not expected[wrong].any():
                    detail = f"lacks a mask: it is not 0 where {text} {edge:g}"
                    yield Guess("missing-factor", 9.5, detail, predicted, formula)
        above, below = view > 0, view <= 0
        if min(int(((wrong | right) & side).sum()) for side in (above, below)) >= 4:
            over, under = (nearest_ratio(case.actual[s], expected[s]) for s in (above, below))
            text = f"{over:.4g} where {name} > 0 and by {under:.4g} elsewhere"
            predicted = torch.where(above, over, under) * expected
            if abs(over - under) > 1e-4:
                yield Guess("missing-factor", 7, f"is multiplied by {text}", predicted)


def _regions(case: Case) -> Iterator[tuple[str, Tensor, bool]]:
    """Conditions on known tensors, in shapes that expand to the gradient's; and whether chance
    could have met one of them easily."""
    for name, view in case.views:
        conditions = {">": view > 0, "≤": view <= 0, "<": view < 0, "≥": view >= 0, "=": view == 0}
        for symbol, region in conditions.items():
            yield f"{name} {symbol} 0", region, True
    for name, labels in case.labels.items():
        for value in labels.unique()[:16].tolist():
            for view in alignments(labels == value, case.expected.shape):
                yield f"{name} = {value}", view, False


def _box(wrong: Tensor, right: Tensor) -> tuple[float, str] | None:
    """The indices of every axis outside which everything is wrong and inside which nothing is."""
    bits, texts, inside = 3.0, [], torch.ones_like(wrong)
    for axis, size in enumerate(wrong.shape):
        rest = [k for k in range(wrong.ndim) if k != axis]
        kept, touched = (t.any(rest) if rest else t for t in (right, right | wrong))
        if bool((kept == touched).all()):
            continue
        places = kept.nonzero().flatten()
        regular = len(places.diff().unique()) <= 1
        if not regular and wrong.ndim == 1:
            return None
        bits += math.log2(size) if regular else size
        texts.append(f"at {first_few(places)} of axis {axis} (size {size})")
        inside &= kept.view(-1, *[1] * (wrong.ndim - axis - 1))
    return (bits, " and ".join(texts)) if texts and not (wrong & inside).any() else None


def _surprise(wrong: Tensor, right: Tensor) -> float:
    """The bits that it takes to say which entries are wrong, if chance chose them."""
    bad, good = int(wrong.sum()), int(right.sum())
    ways = math.lgamma(bad + good + 1) - math.lgamma(bad + 1) - math.lgamma(good + 1)
    return ways / math.log(2)


def _roundest(low: float, high: float) -> float:
    """The number of fewest decimals from low to high."""
    digits = range(-3, 17)
    return next((x for d in digits if low <= (x := round((low + high) / 2, d)) <= high), high)
