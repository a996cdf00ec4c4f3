"""Factors: a function of a known tensor is missing, there twice, or another one."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    adds_up,
    is_close,
    sample,
)
from nn_backprop.check.diagnosis.case import FACTORS, Case, Function
from nn_backprop.check.diagnosis.guesses import Guess

MASKS: dict[str, Function] = {
    "[{} > 0]": lambda t: (t > 0).double(),
    "[{} < 0]": lambda t: (t < 0).double(),
    "sign({})": torch.sign,
}


def factors(case: Case) -> Iterator[Guess]:
    """A function of a known tensor is missing or there twice."""
    actual, expected = case.actual, case.expected
    if expected.numel() < 3:
        return
    for name, view in case.views if expected.any() else ():
        some = sample(view, expected)
        for k, (label, function) in enumerate(FACTORS.items()):
            text, values = label.format(name, name), function(some)
            if is_close(sample(actual, expected) * values, sample(expected), case.tolerance):
                kind, detail = "missing-factor", f"lacks the factor {text}"
                if text in case.drivers:
                    kind, detail = "ignores-upstream", "lacks the upstream gradient as a factor"
                formula, product = f"{case.name} × {text} = expected", actual * function(view)
                yield Guess(kind, 1.5 + k / 4, detail, expected, formula, product)
            if is_close(sample(actual, expected), sample(expected) * values, case.tolerance):
                detail, formula = f"has the factor {text} once too often", f"expected × {text}"
                predicted = expected * function(view)
                yield Guess("missing-factor", 2 + k / 4, detail, predicted, formula)
    ones = torch.ones((1,) * expected.ndim, dtype=expected.dtype)
    for driver in [("", ones), *(item for item in case.views if item[0] in case.drivers)]:
        yield from _products(case, *driver)


def _products(case: Case, driver: str, base: Tensor) -> Iterator[Guess]:
    """The upstream gradient, or 1, times the wrong function of the wrong tensor."""
    right, found = [], []
    functions: dict[str, Function] = {"1": torch.ones_like, **FACTORS, **MASKS}
    for (name, view), (label, function) in itertools.product(case.views, functions.items()):
        if not driver and (label == "1" or name in case.drivers):
            continue
        values = sample(base, case.expected) * function(sample(view, case.expected))
        if is_close(values, sample(case.expected), case.tolerance):
            right.append((label, label.format(name, name)))
        if is_close(values, sample(case.actual), case.tolerance):
            found.append((label, name, view, function))
    instead = right[0][1] if right else ""
    whole = instead or (case.recognised[0][0].text if case.recognised else "")
    for label, name, view, function in found:
        predicted = (base * function(view)).expand_as(case.expected)
        text = label.format(name, name)
        formula = f"{driver} × {text}" if driver else text
        shares = any(adds_up(view.expand_as(case.expected), axis) for axis in range(view.ndim))
        if label == "1":
            detail = "is the upstream gradient itself" + (
                f" where {whole} belongs" if whole else ""
            )
            if not case.expected.any():
                detail += ", where the derivative is 0 throughout: a straight-through estimator?"
            yield Guess("missing-factor", 2 if whole else 6, detail, predicted, driver)
        elif any(label == other for other, _ in right):
            detail = f"has {text} where {instead} belongs"
            yield Guess("wrong-operand", 3, detail, predicted, formula)
        elif shares and label in ("{}(1 − {})", "{}"):
            detail = "lacks the terms off the diagonal of the Jacobian matrix"
            yield Guess("missing-term", 3, detail, predicted, formula)
        elif right:
            detail = f"has the factor {text} where {instead} belongs"
            part = any(text in other and text != other for _, other in right)
            yield Guess("missing-factor", 6 if part else 6.5, detail, predicted, formula)
            yield Guess("wrong-operand", 6.5 if part else 6, detail, predicted, formula)
        elif len(case.drivers) == 1:
            detail = f"is {formula}, which it should not be"
            bits = 8 if driver else 4
            yield Guess("wrong-operand", bits, detail, predicted, formula)
