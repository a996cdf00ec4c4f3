"""Why the gradients are wrong: what the probes have shown, and what the diagnosis makes of them."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.diagnose import diagnose
from nn_backprop.check.diagnosis.mismatch import Mismatch
from nn_backprop.check.findings import Findings
from nn_backprop.check.judge import judge
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Cause, Entry, dtype_name, in_one_line
from nn_backprop.check.target.target import filled
from nn_backprop.check.verdict import BackwardRaised

# What a probe has shown of these comes before the diagnosis, in this order.
EXPLAINING = (
    "nondeterministic", "extra-term", "ignores-upstream", "nonlinear-in-upstream",
    "stale-state", "mutates-input",
)  # fmt: skip


def explain(found: Findings) -> None:
    """Fills in the report's causes, and the verdict where only a probe has failed."""
    report, wrong = found.report, found.wrong
    if not wrong:
        if found.causes:
            failed = next(p for p in report.probes if p.outcome == "fail")
            report.verdict = "fail"
            report.reason = f"the gradients are right as given, but not here: {failed.name}"
            report.causes = _first_of_each_kind(found.causes)
    elif report.where:
        inside = report.where.split(" ")[0]
        for entry in wrong:
            if not entry.name.startswith(f"{inside}."):
                entry.note = entry.note or f"wrong because of {report.where}, perhaps only"
        report.reason += f"; the first mistake from the loss down is in {report.where}"
        report.causes = found.causes or report.causes
    else:
        report.causes = _causes_here(found, wrong)


def explain_refusal(found: Findings, raised: BackwardRaised) -> list[Cause]:
    """The causes of a backward whose gradients the engine refused, or that raised itself."""
    returned = raised.returned[0] if raised.returned else ()
    mismatches = []
    for name, grad in found.subject.arguments.by_name(returned).items():
        if not isinstance(grad, Tensor) or name not in found.expected:
            continue
        m = _mismatch(found, name, grad, 0.0)
        if m is not None and not (
            m.actual.shape == m.expected.shape and torch.allclose(m.actual, m.expected)
        ):
            mismatches.append(m)
    if mismatches:
        return _diagnosed(found, mismatches)
    line = in_one_line(raised.error)
    return [Cause("unknown", "the backward raises an error", line, 1.0)]


def _causes_here(found: Findings, wrong: list[Entry]) -> list[Cause]:
    """The causes of gradients that are wrong in the target itself."""
    actual = found.actual
    if found.wide is not found.subject and found.subject.dtype != torch.float64:
        with suppress(Exception):  # a backward for its own precision only
            actual = found.wide.gradients([u.clone() for u in found.wide_upstream])
        judged = [
            judge(found.oracle, e.name, actual[e.name], found.expected[e.name], found.wide_upstream)
            for e in wrong
        ]
        if all(entry.verdict == "pass" for entry in judged):
            detail = f"the backward is wrong in {dtype_name(found.oracle.dtype)} only"
            evidence = f"{found.report.reason}; in float64 every gradient is right"
            return [Cause("wrong-precision", detail, evidence)]
    exact = 1e-12 if actual is not found.actual else 0.0
    mismatches = [_mismatch(found, e.name, actual[e.name], exact) for e in wrong]
    diagnosed = _diagnosed(found, [m for m in mismatches if m is not None])
    shown = found.causes
    if any(cause.kind == "wrong-precision" for cause in diagnosed):
        # coarse rounding is not linear either
        shown = [c for c in shown if c.kind != "nonlinear-in-upstream"]
    # What a probe has shown comes first; of the same kind, the diagnosis says more.
    in_more_words = {cause.kind: cause for cause in diagnosed}
    first = [c for kind in EXPLAINING for c in shown if c.kind == kind]
    first = [in_more_words.get(cause.kind, cause) for cause in first]
    rest = [c for c in shown if c.kind not in EXPLAINING]
    if [c.kind for c in diagnosed] == ["unknown"] and first + rest:
        diagnosed = []
    return _first_of_each_kind(first + diagnosed + rest)


def _diagnosed(found: Findings, mismatches: list[Mismatch]) -> list[Cause]:
    forward: Callable | None = found.oracle.source.plain_forward
    if found.subject.is_numpy and found.reference is None:
        forward = None
    failures: list[str] = []
    causes = diagnose(mismatches, forward, failures)
    found.report.failed_hypotheses += len(failures)
    return causes


def _mismatch(found: Findings, name: str, grad: Tensor | None, exact: float) -> Mismatch | None:
    """What the diagnosis starts from; None where no element, nor product, is known. Entries that
    differ by more than `exact` times the largest are not equal, if that is given."""
    expected, wide = found.expected[name], found.wide
    if expected.value is None and not expected.products:
        return None
    value = wide.values[name]
    actual = filled(grad, value).cpu()
    if expected.value is not None:
        right = expected.value.double().cpu()
    elif actual.shape == value.shape:
        right = torch.tensor([p for p, _ in expected.products], dtype=torch.float64)
        actual = torch.stack([(actual * v).sum() for v in expected.directions])
    else:
        return None
    tolerance = SAFETY * expected.uncertainty
    if exact:
        tolerance = min(tolerance, exact * right.abs().max().item())
    gradient = None
    if name in found.oracle.plain and expected.value is not None:
        gradient = lambda upstream: found.oracle.at(list(upstream))[name]  # noqa: E731
    outputs = wide.run()
    constants = enumerate(found.subject.arguments.leaves)
    return Mismatch(
        name, actual, right, tolerance,
        inputs={n: v.detach().double().cpu() for n, v in wide.values.items()},
        upstream=[u.cpu() for u in found.wide_upstream],
        outputs=[z.detach().double().cpu() for z in outputs],
        labels={f"constant{i}": leaf for i, leaf in constants if isinstance(leaf, Tensor)},
        cut_off=frozenset(k for k, z in enumerate(outputs) if not z.requires_grad),
        products=expected.value is None, gradient=gradient,
    )  # fmt: skip


def _first_of_each_kind(causes: list[Cause]) -> list[Cause]:
    first: dict[str, Cause] = {}
    for cause in causes:
        first.setdefault(cause.kind, cause)
    return list(first.values())
