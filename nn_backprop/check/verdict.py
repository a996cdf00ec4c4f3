"""The verdict on the gradients: the forward is run, an oracle asked, each gradient compared."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from nn_backprop.check.findings import Findings, agree
from nn_backprop.check.judge import POWER, judge
from nn_backprop.check.oracle.directions import normal
from nn_backprop.check.oracle.oracle import ELEMENTWISE, Oracle
from nn_backprop.check.report import Cause, Entry, Verdict, dtype_name, in_one_line
from nn_backprop.check.target.arguments import Unsuitable
from nn_backprop.check.target.custom_functions import returned_gradients
from nn_backprop.check.target.target import ForwardRaised, Target, largest

# A check of the verdict alone, as the probes make several, knows of fewer elements one by one.
FEW = 30


class Stopped(Exception):
    """The check ends here: the report has its verdict."""


class BackwardRaised(Stopped):
    """The backward raised `error`, perhaps after it returned gradients that were refused."""

    def __init__(self, error: Exception, returned: list[tuple]):
        super().__init__(str(error))
        self.error, self.returned = error, returned


def give_verdict(found: Findings) -> None:
    """Fills in the findings and the report's verdict, or raises Stopped once that is certain."""
    found.outputs = _run_forward(found)
    _find_expected(found)
    found.actual = _run_backward(found)
    for name, expected in found.expected.items():
        entry = judge(found.oracle, name, found.actual[name], expected, found.wide_upstream)
        found.report.tensors.append(entry)
    entries = found.report.tensors
    powerless = [e for e in entries if e.verdict == "inconclusive"]
    if found.wrong:
        found.report.verdict, found.report.reason = "fail", _what_is_wrong(found.wrong)
    elif powerless:
        _decide_in_float64(found, powerless, f"grad_{powerless[0].name}: {powerless[0].note}")
    elif not any(found.size(e.name) > e.smallest_visible for e in entries):
        reason = (
            "no power: every expected gradient is 0 at these inputs, or too small to be told from "
            "it; choose inputs on which the outputs depend"
        )
        _decide_in_float64(found, [e for e in entries if found.size(e.name) > 0], reason)


def _stop(found: Findings, verdict: Verdict, reason: str, *causes: Cause) -> None:
    found.report.verdict, found.report.reason = verdict, reason
    found.report.causes += causes
    raise Stopped


def _run_forward(found: Findings) -> list[Tensor]:
    """The outputs, which have to be finite and the same in equal calls."""
    subject, runs = found.subject, []
    for _ in range(3):
        try:
            subject.look_for_declared()
            runs.append([z.detach().clone() for z in subject.run()])
        except ForwardRaised as raised:
            found.report.error = raised.error
            _stop(found, "inconclusive", f"the target could not be run: {raised}")
    for name, z, *others in zip(subject.output_names, *runs, strict=True):
        if not z.isfinite().all():
            what = "NaN" if z.isnan().any() else "Inf"
            reason = f"the forward gives {what} in {name}, where there is no gradient to check"
            _stop(found, "inconclusive", reason)
        if any(z.shape != other.shape or not torch.equal(z, other) for other in others):
            reason = (
                f"the target changes its answer: {name} differs between calls that are equal, "
                "random seed included; make it a function of its inputs, or let it draw from "
                "the global generator of torch, NumPy or Python"
            )
            _stop(found, "inconclusive", reason)
    for what, tensors in (("input", subject.values.values()), ("output", runs[0])):
        if not any(t.numel() for t in tensors):
            _stop(found, "inconclusive", f"every {what} is empty: there is no gradient to check")
    return runs[0]


def _find_expected(found: Findings) -> None:
    """The upstream gradient, the target in float64, and an oracle's gradients for it."""
    subject = found.subject
    draws = torch.Generator().manual_seed(subject.seed + 1)
    found.upstream = [normal(z, draws).to(z) for z in found.outputs]
    found.wide = subject.cast(torch.float64)
    found.wide_upstream = [u.double() for u in found.upstream]
    try:
        outputs = found.wide.run()
        usable = all(agree(z, low) for z, low in zip(outputs, found.outputs, strict=True))
    except Exception:  # a target for one precision only
        usable = False
    if not usable:
        found.wide = subject
    source, given = found.wide, found.reference is not None
    if given:
        source = found.wide.as_computed_by(found.reference, found.original)
        _compare_forwards(found, source)
    dtypes = [subject.dtype, *(z.dtype for z in found.outputs)]
    dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
    most = FEW if found.depth == "verdict" else ELEMENTWISE
    found.oracle = Oracle(found.wide, source, dtype, given, most)
    found.expected = found.oracle.prepare(found.wide_upstream)


def _compare_forwards(found: Findings, source: Target) -> None:
    ours = found.wide.run()
    try:
        theirs = source.run()
    except ForwardRaised as raised:
        raise Unsuitable(f"the reference could not be run: {raised}") from raised.error
    how = ""
    shape, their_shape = ([tuple(z.shape) for z in outputs] for outputs in (ours, theirs))
    if shape != their_shape:
        how = f"its outputs have shapes {shape}, the reference's {their_shape}"
    else:
        for name, z, other in zip(found.wide.output_names, ours, theirs, strict=True):
            apart, size = largest(z - other), largest(other)
            if not apart <= torch.finfo(z.dtype).eps ** 0.6 * size:
                how = f"{name} differs by up to {apart:.3g}, of {size:.3g}"
    if how:
        cause = Cause("unknown", "the forward is not the reference's", how, 1.0)
        _stop(found, "fail", f"the forward itself is not the reference's: {how}", cause)


def _run_backward(found: Findings) -> dict[str, Tensor | None]:
    function = found.subject.function
    returned: list[tuple] = []
    try:
        with nullcontext() if function is None else returned_gradients(function, returned):
            return found.subject.gradients([u.clone() for u in found.upstream])
    except Unsuitable:
        raise
    except Exception as error:
        found.report.error = error
        line = in_one_line(error)
        if "incompatible with .grad()" in str(error):  # a reentrant checkpoint
            _stop(found, "inconclusive", f"torch refuses to run this backward here: {line}")
        found.report.verdict = "fail"
        found.report.reason = f"the backward raised {line}"
        raise BackwardRaised(error, returned) from error


def _what_is_wrong(wrong: list[Entry]) -> str:
    worst = max(wrong, key=lambda e: e.relative_error)
    names = ", ".join(f"grad_{e.name}" for e in wrong)
    which = f"{names} {'is' if len(wrong) == 1 else 'are'} wrong"
    if math.isinf(worst.relative_error) and worst.expected == 0:
        return f"{which}, where 0 is expected throughout"
    of = "entry" if worst.worst_index is not None else "product with a random direction"
    return f"{which}, by up to {worst.relative_error:.3g} of the largest {of}"


def _decide_in_float64(found: Findings, powerless: list[Entry], reason: str) -> None:
    """Inconclusive for that reason, unless the same backward in float64, where less is rounded, is
    right, and what it gives in the target's precision is near the truth all the same."""
    name = dtype_name(found.oracle.dtype)
    near = all(e.expected is not None and e.relative_error <= POWER for e in powerless)
    finer = found.wide is not found.subject and name != "float64"
    worth_it = powerless and near and finer and found.depth != "verdict"
    if worth_it and found.check_again(found.wide).verdict == "pass":
        for entry in powerless:
            entry.judged("pass", f"ill-conditioned in {name}: told in float64, where it is right")
        return
    found.report.verdict, found.report.reason = "inconclusive", reason
