"""Why is it wrong? Hypotheses are fitted to each wrong gradient; those that explain it are ranked.

A hypothesis has to reproduce the wrong gradient, to rounding. Of several that do, the simplest is
the best: the one that takes the fewest bits to single out (Rissanen 1978, minimum description
length). Where none does, the answer is `unknown`.
"""

import math
from contextlib import suppress
from dataclasses import replace

import torch

from nn_backprop.check.diagnosis import confusions, guesses, mistakes, search, siblings, transforms
from nn_backprop.check.diagnosis.autograd import Forward, gradient_of
from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause

MOST = 5  # causes in a report
MOST_SEARCHED = 3  # gradients, the largest ones, that the forward is searched for the mistake in


def diagnose(
    mismatches: list[Mismatch],
    forward: Forward | None = None,
    failures: list[str] | None = None,
) -> list[Cause]:
    """The causes of the wrong gradients, best first. One that explains several of them comes
    before one that explains a single one; `forward` is the plain forward, if there is one. A family
    of hypotheses that raises explains nothing, and adds a line to `failures`."""
    failures = [] if failures is None else failures
    found = [
        guesses.explain(_with_gradient(m, forward), transforms.FAMILIES, failures)
        for m in mismatches
    ]
    if forward is not None:
        known = [k for k, m in enumerate(mismatches) if not m.products]
        searched = sorted(known, key=lambda k: -mismatches[k].actual.numel())[:MOST_SEARCHED]
        for k in searched:
            found[k] += search.explain(mismatches[k], forward, mistakes.FAMILIES, failures)
        if not _convincing([found[k] for k in searched]):
            for k in searched:
                found[k] += confusions.explain(mismatches[k], forward, siblings.FAMILIES, failures)
    by_kind: dict[str, list[tuple[str, Hypothesis]]] = {}
    for mismatch, hypotheses in zip(mismatches, found, strict=True):
        for kind, hypothesis in _simplest(hypotheses).items():
            by_kind.setdefault(kind, []).append((mismatch.name, hypothesis))
    ranked = sorted(by_kind.values(), key=lambda hits: (-len(hits), min(h.bits for _, h in hits)))
    causes = []
    for hits in ranked[:MOST]:
        _, simplest = min(hits, key=lambda hit: hit[1].bits)
        cause = simplest.cause
        others = [f"grad_{name}" for name, h in hits if h is not simplest]
        if others:
            cause = replace(cause, detail=f"{cause.detail}; the same of {', '.join(others)}")
        causes.append(cause)
    return causes or [_unknown(mismatches)]


def _with_gradient(m: Mismatch, forward: Forward | None) -> Mismatch:
    """The same, where the forward need not run again for each upstream gradient."""
    if forward is not None and m.gradient is not None:
        with suppress(Exception):  # a stranger's forward may do anything
            gradient = gradient_of(m.name, forward, m.inputs)
            if torch.equal(gradient(m.upstream), m.expected):
                return replace(m, gradient=gradient)
    return m


def _convincing(found: list[list[Hypothesis]]) -> bool:
    """Whether the gradients are explained simply: each by few bits, or several by one kind."""
    kinds = [_simplest(hypotheses) for hypotheses in found]
    if not kinds or (len(kinds) > 1 and set.intersection(*map(set, kinds))):
        return True
    return all(min((h.bits for h in best.values()), default=math.inf) <= confusions.BITS
               for best in kinds)  # fmt: skip


def _simplest(hypotheses: list[Hypothesis]) -> dict[str, Hypothesis]:
    """The simplest of each kind."""
    best: dict[str, Hypothesis] = {}
    for hypothesis in sorted(hypotheses, key=lambda h: h.bits):
        best.setdefault(hypothesis.cause.kind, hypothesis)
    return best


def _unknown(mismatches: list[Mismatch]) -> Cause:
    names = ", ".join(f"grad_{m.name}" for m in mismatches) or "the gradient"
    detail = f"{names}: wrong, and none of the known mistakes explains it"
    return Cause("unknown", detail, "; ".join(map(_fact, mismatches)), 1.0)


def _fact(m: Mismatch) -> str:
    """What can be told of a gradient that no hypothesis explains."""
    if m.actual.shape != m.expected.shape:
        return f"grad_{m.name} has shape {tuple(m.actual.shape)} for {tuple(m.expected.shape)}"
    if m.products:
        return f"grad_{m.name} has too many entries to be known one by one: check smaller ones"
    wrong = int((~((m.actual - m.expected).abs() <= m.tolerance)).sum())
    return f"{wrong} of {m.actual.numel()} entries of grad_{m.name} differ"
