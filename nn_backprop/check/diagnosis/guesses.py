"""Causes that can be told from arrays: the wrong gradient as a transformation of what is known.

A family of hypotheses yields guesses: a kind of cause, a sentence, and the gradient that this
mistake would have produced. `_judge` compares every guess with what was found. What counts is

    residual = ‖actual − predicted‖ / ‖actual − expected‖,

the share of the error that the guess leaves unexplained, and a guess is kept only if that is
nothing but rounding: an error of another sort gets no name rather than a wrong one. Of several
that explain everything, the shortest description wins. Its length is counted in bits: a few for
the family, log2 of the alternatives in it, and about ten for every number that was fitted and has
no name. Fitted numbers have to leave more than twice as many entries over that they predict;
otherwise they would explain anything.

In the code `expected` is the right gradient, `actual` the wrong one, `upstream` the gradient of the
layer's output. Sentences call tensors by the caller's names, or "upstream" and "output".
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import TINY
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guard import guarded
from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause

EXACT = 1e-6  # a residual below it is rounding
ROUGH = 1e-2  # and one below it is, if every entry is within ten tolerances
FITTED = 10.0  # the bits of a fitted number that has no name
MOST = 8  # hypotheses in an answer


class Guess(NamedTuple):
    kind: str
    bits: float
    detail: str
    """What the gradient does; its name comes before it."""
    predicted: Tensor
    formula: str = "expected with this mistake"
    """What it was found to equal."""
    observed: Tensor | None = None
    """What was compared with `predicted`, if that is not the gradient itself; then `formula` says
    so."""


Family = Callable[[Case], Iterator[Guess]]


class Families(NamedTuple):
    usual: tuple[Family, ...]
    of_zero: tuple[Family, ...]
    """The only ones of a gradient that is zero."""
    other_shapes: tuple[Family, ...]
    """The only ones of a gradient of the wrong shape."""


def explain(mismatch: Mismatch, families: Families, failures: list[str]) -> list[Hypothesis]:
    """The hypotheses that explain a wrong gradient, shortest description first; one per kind."""
    case = Case(mismatch)
    if not all(t.numel() and bool(t.isfinite().all()) for t in (case.actual, case.expected)):
        return []
    if not case.error or (case.same_shape and not case.wrong.any()):
        return []
    tried = families.usual if case.same_shape else families.other_shapes
    if mismatch.products or float(case.actual.abs().max()) <= case.tolerance:
        tried = families.of_zero  # products have no axes, and a zero fits many a thing
    best: dict[str, Hypothesis] = {}
    for family in tried:
        case.calls = case.budget
        with guarded(family.__name__, failures):
            for guess in family(case):
                found = best.get(guess.kind)
                if (found is None or guess.bits < found.bits) and (cause := _judge(case, guess)):
                    best[guess.kind] = Hypothesis(guess.bits, cause)
    return sorted(best.values(), key=lambda hypothesis: hypothesis.bits)[:MOST]


def _judge(case: Case, guess: Guess) -> Cause | None:
    """The cause, if it explains everything that was found."""
    observed = case.actual if guess.observed is None else guess.observed
    if observed.shape != guess.predicted.shape:
        return None
    rest = observed - guess.predicted
    scale = case.error if guess.observed is None else min(case.error, float(case.expected.norm()))
    residual = float(rest.norm()) / max(scale, TINY)
    within = residual <= ROUGH and float(rest.abs().max()) <= 10 * case.tolerance
    if not (residual <= EXACT or within):
        return None
    formula, _, note = guess.formula.partition("; ")
    fit = f", to {residual:.0e}" if residual else ", exactly"
    equation = formula if guess.observed is not None else f"{case.name} = {formula}"
    evidence = equation + fit + (f"; {note}" if note else "")
    return Cause(guess.kind, f"{case.name} {guess.detail}", evidence, residual)
