"""The same gradients elsewhere: in another precision, in the other mode, in other ranges."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from nn_backprop.check.findings import Findings, agree
from nn_backprop.check.report import Cause, Entry, Probe
from nn_backprop.check.target.arguments import Unsuitable
from nn_backprop.check.target.target import Target

# The inputs times these: branches that only large, small or negative inputs take.
RANGES = (2.0**-7, 2.0**5, 2.0**10, -1.0)
# A relative error that is too small for a wrong branch.
TRIFLE = 1e-6

Variants = list[tuple[str, Target]]


def look_elsewhere(found: Findings, right: bool, ranges: bool) -> None:
    """Adds a probe for each place, and the causes that show there.

    right: whether the gradients are right as given, and the same twice; else nothing is looked at.
    ranges: whether to look at other ranges of the inputs.
    """
    _look(found, "float32", "wrong-precision", in_float32, right)
    if right:
        in_float64(found)
    module = found.subject.module
    if module is not None:
        mode = "evaluation" if module.training else "training"
        _look(found, f"{mode} mode", "wrong-branch", in_other_mode, right)
    if ranges:
        _look(found, "other ranges", "wrong-branch", in_ranges, right)


def in_float32(found: Findings) -> Variants:
    if found.subject.dtype != torch.float64:
        return []
    low = found.subject.cast(torch.float32)
    try:
        outputs = low.run()
    except Exception:  # as the check will say
        return [("in float32", low)]
    same = all(agree(z, other) for z, other in zip(found.outputs, outputs, strict=True))
    if not same and not found.subject.draws():
        raise Unsuitable("in float32: the forward gives other values, as where it overflows")
    return [("in float32", low)]


def in_float64(found: Findings) -> None:
    """What half precision would hide: the same backward in float64, where an error larger than its
    numbers are coarse is no rounding."""
    info = torch.finfo(found.subject.dtype)
    if info.bits >= 32 or found.wide is found.subject:
        return
    report = found.check_again(found.wide)
    if report.error is not None:
        found.add(Probe("float64", "skipped", report.reason))
    elif any(e.verdict == "fail" and e.relative_error > 4 * info.eps for e in report.tensors):
        report = found.check_again(found.wide, "alone")
        found.report.failed_hypotheses += report.failed_hypotheses
        found.add(Probe("float64", "fail", f"in float64, {report.reason}"), *report.causes)
    else:
        found.add(Probe("float64", "pass"))


def in_other_mode(found: Findings) -> Variants:
    """Nowhere, if the mode makes no difference here, nor to the outputs nearby."""
    subject = found.subject
    assert subject.module is not None
    mode = "evaluation" if subject.module.training else "training"
    other = subject.fresh(not subject.module.training)
    with suppress(Exception):  # as the check will say
        ours, theirs = (_answers(target, found.upstream) for target in (subject, other))
        if len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)):
            return []
    return [(f"in {mode} mode", other)]


def _answers(target: Target, upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients at the target's values, and outputs nearby."""
    nearby = target.with_values({name: 0.875 * v for name, v in target.values.items()})
    grads = target.gradients([u.clone() for u in upstream])
    return [*target.run(), *target.filled(grads).values(), *nearby.run()]


def in_ranges(found: Findings) -> Variants:
    subject, variants = found.subject, []
    limit = torch.finfo(subject.dtype).max ** 0.25
    for factor in RANGES:
        values = {n: v * factor if n in subject.inputs else v for n, v in subject.values.items()}
        if all(v.abs().max() < limit for v in values.values() if v.numel()):
            variants.append((f"with the inputs times {factor:g}", subject.with_values(values)))
    return variants


def _look(
    found: Findings, name: str, kind: str, variants: Callable[[Findings], Variants], right: bool
) -> None:
    try:
        if not right:
            raise Unsuitable("the gradient is wrong to begin with, or not the same twice")
        places = variants(found)
    except Unsuitable as why_not:
        found.add(Probe(name, "skipped", str(why_not)))
        return
    reasons = []
    for where, variant in places:
        try:
            if variant.module is found.subject.module:
                variant = variant.fresh()
            report = found.check_again(variant)
        except ValueError as error:
            reasons.append(str(error))
            continue
        wrong = [e for e in report.tensors if e.verdict == "fail"]
        if wrong and all(_is_trifling(found, entry) for entry in wrong):
            reasons.append(f"{where}: {report.reason}, too little to be a branch")
        elif report.verdict == "fail":
            reason = f"{where}, {report.reason}"
            if wrong:
                e = max(wrong, key=lambda e: e.units)
                reason += f": grad_{e.name} is {e.actual:.5g} instead of {e.expected:.5g}"
            detail = f"the gradient is right at the given inputs, but wrong {where}"
            found.add(Probe(name, "fail", reason), Cause(kind, detail, reason))
            return
        elif report.verdict == "inconclusive":
            reasons.append(f"{where}: {report.reason}")
    nowhere = reasons and len(reasons) == len(places)
    found.add(Probe(name, "skipped", reasons[0]) if nowhere else Probe(name, "pass"))


def _is_trifling(found: Findings, entry: Entry) -> bool:
    """Whether an error elsewhere is so small that it may be meant, as softplus is linear above 20,
    or that it belongs to a gradient that has all but vanished there."""
    vanished = torch.finfo(found.oracle.dtype).eps ** 0.6 * found.size(entry.name)
    return entry.relative_error <= TRIFLE or entry.error <= vanished
