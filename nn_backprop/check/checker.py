"""Is this gradient right? The steps of a check, in order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nn_backprop.check import probes
from nn_backprop.check.diagnosis.mismatch import Mismatch
from nn_backprop.check.judge import POWER, judge
from nn_backprop.check.oracle.oracle import ELEMENTWISE, Oracle
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Cause, Entry, GradientMismatch, Probe, Report, Verdict, said
from nn_backprop.check.second import second_derivative
from nn_backprop.check.target.calls import recorded_calls, returned_gradients, submodule_calls
from nn_backprop.check.target.target import ForwardRaised, Gradients, Target, Unsuitable

# The inputs times these: branches that only large, small or negative inputs take.
RANGES = (2.0**-7, 2.0**5, 2.0**10, -1.0)
# A relative error that is too small for a wrong branch.
TRIFLE = 1e-6
# The same in a check without depth, as the probes make several: of fewer elements one by one.
FEW = 30


def check_gradients(
    target: Any,
    /,
    *inputs: Any,
    reference: Any = None,
    loss: Callable | None = None,
    seed: int = 0,
    second_order: bool = False,
    **kwargs: Any,
) -> Report:
    """Whether the gradients of `target` at these inputs are right and, if not, why.

    target: an nn.Module, whose parameters are checked too; a torch.autograd.Function; a pair
        ``(forward, backward)`` of NumPy functions, called as ``forward(*inputs)`` and
        ``backward(grad, *inputs)``; or any callable on tensors. It may return nested outputs.
    inputs, kwargs: what it is called with. The gradient of every floating tensor among them is
        checked, whether or not it requires grad; everything else is passed through.
    reference: a callable or module that computes the same in plain torch. Its values are compared
        first, and its gradients, by autograd, are what is expected.
    loss: applied to the target's output; the gradient is then that of the loss.
    seed: of the random upstream gradient and of whatever the target draws.
    second_order: check the derivative of the backward too.

    The caller's tensors, gradients, buffers, random state and training mode are left as they were.
    Raises ValueError, in one sentence, for what cannot be checked: nothing differentiable among
    the inputs or outputs, complex or sparse tensors. A target that raises gives an inconclusive
    report, or a failed one if it was the backward; `error` is what it raised.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # taken only where no gradient is asked for
    try:
        with torch.inference_mode(False), torch.enable_grad():
            subject = Target(target, inputs, kwargs, loss, seed)
            return _Check(subject, target, reference, second_order).run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def assert_gradients(
    target: Any, /, *inputs: Any, allow_inconclusive: bool = False, **kwargs: Any
) -> Report:
    """`check_gradients`, for a test: raises GradientMismatch unless the gradients are right."""
    report = check_gradients(target, *inputs, **kwargs)
    if report.verdict == "fail" or (report.verdict == "inconclusive" and not allow_inconclusive):
        raise GradientMismatch(report)
    return report


class _Stop(Exception):
    """The check ends here: `report` has its verdict."""


@dataclass
class _Check:
    """One check. `deep` includes the probes, the search in a network and the diagnosis; without
    it, there is just the verdict on the gradients."""

    subject: Target
    original: Any
    reference: Any = None
    second_order: bool = False
    deep: bool = True
    localise: bool = True

    def run(self) -> Report:
        self.report = Report(self.subject.label, "pass")
        try:
            self.outputs = self._run_forward()
            self._find_expected()
            self._compare()
        except _Stop:
            return self.report
        if self.deep:
            self.probe_causes: list[Cause] = []
            if all(g is None or g.isfinite().all() for g in self.actual.values()):
                self._probe()
            self._diagnose()
        return self.report

    def _stop(self, verdict: Verdict, reason: str, *causes: Cause) -> None:
        self.report.verdict, self.report.reason = verdict, reason
        self.report.causes += causes
        raise _Stop

    def _run_forward(self) -> list[Tensor]:
        """The outputs, which have to be finite and the same in equal calls."""
        runs = []
        for _ in range(3):
            try:
                self.subject.look_for_declared()
                _, handed = self.subject.leaves_of()
                runs.append([z.detach().clone() for z in self.subject.forward(handed)])
            except ForwardRaised as raised:
                self.report.error = raised.error
                self._stop("inconclusive", f"the target could not be run: {raised}")
        for name, z, *others in zip(self.subject.output_names, *runs, strict=True):
            if not z.isfinite().all():
                what = "NaN" if z.isnan().any() else "Inf"
                self._stop(
                    "inconclusive",
                    f"the forward gives {what} in {name}, where there is no gradient to check",
                )
            if any(z.shape != other.shape or not torch.equal(z, other) for other in others):
                self._stop(
                    "inconclusive",
                    f"the target changes its answer: {name} differs between calls that are equal, "
                    "random seed included; make it a function of its inputs, or let it draw from "
                    "the global generator of torch, NumPy or Python",
                )
        if not any(v.numel() for v in self.subject.values.values()):
            self._stop("inconclusive", "every input is empty: there is no gradient to check")
        if not any(z.numel() for z in runs[0]):
            self._stop("inconclusive", "every output is empty: there is no gradient to check")
        return runs[0]

    def _find_expected(self) -> None:
        """The upstream gradient, the target in float64, and an oracle's gradients for it."""
        draws = torch.Generator().manual_seed(self.subject.seed + 1)
        self.upstream = [
            torch.randn(z.shape, generator=draws, dtype=torch.float64).to(z) for z in self.outputs
        ]
        self.wide = self.subject.cast(torch.float64)
        self.wide_upstream = [u.double() for u in self.upstream]
        try:
            outputs = self.wide.forward(self.wide.leaves_of()[1])
            usable = all(_agree(z, low) for z, low in zip(outputs, self.outputs, strict=True))
        except Exception:  # a target for one precision only
            usable = False
        if not usable:
            self.wide = self.subject
        source = self.wide
        if self.reference is not None:
            source = self.wide.as_computed_by(self.reference, self.original)
            self._compare_forwards(source)
        dtypes = [self.subject.dtype, *(z.dtype for z in self.outputs)]
        dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
        given = self.reference is not None
        self.oracle = Oracle(self.wide, source, dtype, given, ELEMENTWISE if self.deep else FEW)
        self.expected = self.oracle.prepare(self.wide_upstream)

    def _compare_forwards(self, source: Target) -> None:
        ours = self.wide.forward(self.wide.leaves_of()[1])
        try:
            theirs = source.forward(source.leaves_of()[1])
        except ForwardRaised as raised:
            raise Unsuitable(f"the reference could not be run: {raised}") from raised.error
        how = ""
        shapes = [[tuple(z.shape) for z in outputs] for outputs in (ours, theirs)]
        if shapes[0] != shapes[1]:
            how = f"its outputs have shapes {shapes[0]}, the reference's {shapes[1]}"
        else:
            for name, z, other in zip(self.wide.output_names, ours, theirs, strict=True):
                apart = (z - other).abs().max().item() if z.numel() else 0.0
                size = other.abs().max().item() if z.numel() else 0.0
                if not apart <= torch.finfo(z.dtype).eps ** 0.6 * size:
                    how = f"{name} differs by up to {apart:.3g}, of {size:.3g}"
        if how:
            cause = Cause("unknown", "the forward is not the reference's", how, 1.0)
            self._stop("fail", f"the forward itself is not the reference's: {how}", cause)

    def _compare(self) -> None:
        """Every gradient against the expected one."""
        function = self.subject.function
        returned: list[tuple] = []
        try:
            if function is None:
                self.actual = self.subject.gradients([u.clone() for u in self.upstream])
            else:
                with returned_gradients(function) as returned:
                    self.actual = self.subject.gradients([u.clone() for u in self.upstream])
        except Unsuitable:
            raise
        except Exception as error:
            self.report.error = error
            if "incompatible with .grad()" in str(error):  # a reentrant checkpoint
                self._stop(
                    "inconclusive", f"torch refuses to run this backward here: {said(error)}"
                )
            causes = self._refused(returned, error) if self.deep else []
            self._stop("fail", f"the backward raised {said(error)}", *causes)
        for name, expected in self.expected.items():
            entry = judge(self.oracle, name, self.actual[name], expected, self.wide_upstream)
            self.report.tensors.append(entry)
        powerless = [e for e in self.report.tensors if e.verdict == "inconclusive"]
        wrong = [e for e in self.report.tensors if e.verdict == "fail"]
        if wrong:
            self.report.verdict = "fail"
            worst = max(wrong, key=lambda e: e.relative_error)
            names = ", ".join(f"grad_{e.name}" for e in wrong)
            self.report.reason = f"{names} {'is' if len(wrong) == 1 else 'are'} wrong, "
            if math.isinf(worst.relative_error) and worst.expected == 0:
                self.report.reason += "where 0 is expected throughout"
            else:
                self.report.reason += f"by up to {worst.relative_error:.3g} of the largest " + (
                    "entry" if worst.worst_index is not None else "product with a random direction"
                )
        elif powerless:
            self._decide_in_float64(powerless, f"grad_{powerless[0].name}: {powerless[0].note}")
        elif not any(self._size(e.name) > e.smallest_visible for e in self.report.tensors):
            self._decide_in_float64(
                [e for e in self.report.tensors if self._size(e.name) > 0],
                "no power: every expected gradient is 0 at these inputs, or too small to be "
                "told from it; choose inputs on which the outputs depend",
            )

    def _decide_in_float64(self, powerless: list[Entry], reason: str) -> None:
        """Inconclusive for that reason, unless the same backward in float64, where less is rounded,
        is right, and what it gives in the target's precision is near the truth all the same."""
        name = str(self.oracle.dtype).removeprefix("torch.")
        near = powerless and all(
            e.expected is not None and e.relative_error <= POWER for e in powerless
        )
        if near and self.deep and self.wide is not self.subject and name != "float64":
            wide = _Check(self.wide, self.original, self.reference, deep=False).run()
            if wide.verdict == "pass":
                for entry in powerless:
                    entry.verdict = "pass"
                    entry.note = f"ill-conditioned in {name}: told in float64, where it is right"
                return
        self.report.verdict, self.report.reason = "inconclusive", reason

    def _size(self, name: str) -> float:
        expected = self.expected[name]
        if expected.value is not None:
            return expected.value.abs().max().item() if expected.value.numel() else 0.0
        return max((abs(p) for p, _ in expected.products), default=0.0)

    # Probes

    def _probe(self) -> None:
        """The protocol, then the same gradients elsewhere: other precision, mode and range."""
        noise = {}
        unclear = {e.name: e.error for e in self.report.tensors if e.verdict == "inconclusive"}
        eps = torch.finfo(self.oracle.dtype).eps
        for name, grad in self.actual.items():
            largest = grad.abs().max().item() if grad is not None and grad.numel() else 0.0
            least = eps * math.sqrt(self.oracle.terms) * largest
            known = self.expected[name].value is not None
            unsure = self.expected[name].uncertainty if known else 0.0
            noise[name] = SAFETY * max(least, self.oracle.noise[name], unsure)
            noise[name] = max(noise[name], unclear.get(name, 0.0))
        probing = probes.Probing(self.subject, self.upstream, self.actual, noise)
        for probe, cause in probes.run(probing):
            self.report.probes.append(probe)
            if cause is not None:
                self.probe_causes.append(cause)
        steady = self.report.probes[0].outcome != "fail"  # the same call twice
        right = self.report.verdict != "fail" and steady
        calls = self._functions_inside()
        self._elsewhere("float32", "wrong-precision", self._in_float32, right)
        if right:
            self._in_float64()
        if self.subject.module is not None:
            other = not self.subject.module.training
            mode = "training" if other else "evaluation"
            variants = [(f"in {mode} mode", self.subject.fresh(other))]
            self._elsewhere(f"{mode} mode", "wrong-branch", lambda: variants, right)
        if not calls:
            self._elsewhere("other ranges", "wrong-branch", self._in_ranges, right)
        if self.second_order:
            probe, cause = second_derivative(self.oracle, self.wide_upstream)
            self.report.probes.append(probe)
            self.probe_causes += [cause] if cause is not None else []

    def _elsewhere(
        self, name: str, kind: str, variants: Callable[[], list[tuple[str, Target]]], right: bool
    ) -> None:
        if not right:
            why = "the gradient is wrong to begin with, or not the same twice"
            self.report.probes.append(Probe(name, "skipped", why))
            return
        reasons = []
        try:
            found = variants()
        except Unsuitable as why:
            self.report.probes.append(Probe(name, "skipped", str(why)))
            return
        for where, variant in found:
            try:
                variant = variant.fresh() if variant.module is self.subject.module else variant
                report = _Check(variant, self.original, self.reference, deep=False).run()
            except ValueError as error:
                reasons.append(str(error))
                continue
            wrong = [e for e in report.tensors if e.verdict == "fail"]
            if wrong and all(self._trifling(entry) for entry in wrong):
                reasons.append(f"{where}: {report.reason}, too little to be a branch")
            elif report.verdict == "fail":
                worst = max(wrong, key=lambda e: e.units, default=None)
                reason = f"{where}, {report.reason}"
                if worst is not None:
                    reason += (
                        f": grad_{worst.name} is {worst.actual:.5g} instead of {worst.expected:.5g}"
                    )
                self.report.probes.append(Probe(name, "fail", reason))
                detail = f"the gradient is right at the given inputs, but wrong {where}"
                self.probe_causes.append(Cause(kind, detail, reason))
                return
            elif report.verdict == "inconclusive":
                reasons.append(f"{where}: {report.reason}")
        if reasons and len(reasons) == len(found):
            self.report.probes.append(Probe(name, "skipped", reasons[0]))
        else:
            self.report.probes.append(Probe(name, "pass"))

    def _trifling(self, entry: Entry) -> bool:
        """Whether an error elsewhere is so small that it may be meant, as softplus is linear above
        20, or that it belongs to a gradient that has all but vanished there."""
        here = self._size(entry.name)
        vanished = torch.finfo(self.oracle.dtype).eps ** 0.6 * here
        return entry.relative_error <= TRIFLE or entry.error <= vanished

    def _in_float64(self) -> None:
        """What half precision would hide: the same backward in float64, where an error larger than
        its numbers are coarse is no rounding."""
        coarse = 4 * torch.finfo(self.subject.dtype).eps
        if torch.finfo(self.subject.dtype).bits >= 32 or self.wide is self.subject:
            return
        report = _Check(self.wide, self.original, self.reference, deep=False).run()
        probe = Probe("float64", "pass")
        if report.error is not None:
            probe = Probe("float64", "skipped", report.reason)
        elif any(e.verdict == "fail" and e.relative_error > coarse for e in report.tensors):
            report = _Check(self.wide, self.original, self.reference, localise=False).run()
            probe = Probe("float64", "fail", f"in float64, {report.reason}")
            self.probe_causes += report.causes
        self.report.probes.append(probe)

    def _in_float32(self) -> list[tuple[str, Target]]:
        if self.subject.dtype != torch.float64:
            return []
        low = self.subject.cast(torch.float32)
        try:
            outputs = low.forward(low.leaves_of()[1])
        except Exception:  # as the check will say
            return [("in float32", low)]
        same = all(_agree(z, other) for z, other in zip(self.outputs, outputs, strict=True))
        if not same and not self.subject.draws():
            raise Unsuitable("in float32: the forward gives other values, as where it overflows")
        return [("in float32", low)]

    def _in_ranges(self) -> list[tuple[str, Target]]:
        variants = []
        limit = torch.finfo(self.subject.dtype).max ** 0.25
        for factor in RANGES:
            values = {
                n: v * factor if n in self.subject.inputs else v
                for n, v in self.subject.values.items()
            }
            if all(v.abs().max() < limit for v in values.values() if v.numel()):
                where = f"with the inputs times {factor:g}"
                variants.append((where, self.subject.with_values(values)))
        return variants

    # In a network

    def _functions_inside(self) -> list[tuple[str, Report]]:
        """Each custom Function that the target calls, checked by itself; the last call first."""
        if self.subject.function is not None or not self.localise:
            return []
        with recorded_calls(self.subject.module) as calls:
            self.subject.forward(self.subject.leaves_of()[1])
        reports: list[tuple[str, Report]] = []
        seen = set()
        for call in reversed(calls):
            signature = (
                call.function,
                tuple((a.shape, a.dtype) if isinstance(a, Tensor) else repr(a) for a in call.args),
            )
            right = self.report.verdict != "fail"
            if right and signature in seen:
                continue
            seen.add(signature)
            name = " ".join(filter(None, [call.where, f"({call.function.__name__})"]))
            try:
                constant = [i for i, needs in enumerate(call.needs_grad) if not needs]
                seed = self.subject.seed
                local = Target(call.function, call.args, {}, None, seed, constant)
                report = _Check(
                    local, call.function, second_order=self.second_order, localise=False
                ).run()
            except ValueError:
                continue
            reports.append((name, report))
            local_probe = Probe(f"{name} by itself", "pass", report.reason)
            if report.verdict == "fail":
                local_probe.outcome = "fail"
            self.report.probes.append(local_probe)
            if report.verdict == "fail":
                self.report.where = self.report.where or name
                self.probe_causes += [
                    Cause(c.kind, f"{name}: {c.detail}", c.evidence, c.residual)
                    for c in report.causes
                ]
                if not right:
                    break
        return reports

    # Diagnosis

    EXPLAINING = (
        "nondeterministic", "extra-term", "ignores-upstream", "nonlinear-in-upstream",
        "stale-state", "mutates-input",
    )  # fmt: skip

    def _diagnose(self) -> None:
        report = self.report
        wrong = [e for e in report.tensors if e.verdict == "fail"]
        if not wrong:
            if self.probe_causes:
                report.verdict = "fail"
                failed = next(p for p in report.probes if p.outcome == "fail")
                report.reason = f"the gradients are right as given, but not here: {failed.name}"
                report.causes = _unique(self.probe_causes)
            return
        if not report.where and self.localise and self.subject.module is not None:
            self._search_submodules()
        if report.where:
            for entry in wrong:
                inside = report.where.split(" ")[0]
                if not entry.name.startswith(f"{inside}."):
                    entry.note = entry.note or f"wrong because of {report.where}, perhaps only"
            report.reason += f"; the first mistake from the loss down is in {report.where}"
            report.causes = self.probe_causes or report.causes
            return
        self._diagnose_here(wrong)

    def _diagnose_here(self, wrong: list[Entry]) -> None:
        report = self.report
        actual: Gradients = self.actual
        if self.wide is not self.subject and self.subject.dtype != torch.float64:
            try:
                actual = self.wide.gradients([u.clone() for u in self.wide_upstream])
            except Exception:  # the backward takes its own precision only
                actual = self.actual
            entries = [
                judge(self.oracle, e.name, actual[e.name], self.expected[e.name],
                      self.wide_upstream)
                for e in wrong
            ]  # fmt: skip
            if all(entry.verdict == "pass" for entry in entries):
                name = str(self.oracle.dtype).removeprefix("torch.")
                evidence = f"{report.reason}; in float64 every gradient is right"
                report.causes = [
                    Cause("wrong-precision", f"the backward is wrong in {name} only", evidence)
                ]
                return
        exact = 1e-12 if actual is not self.actual else 0.0
        mismatches = [self._mismatch(e.name, actual[e.name], exact) for e in wrong]
        found = _diagnose([m for m in mismatches if m is not None], self._plain_forward())
        if any(cause.kind == "wrong-precision" for cause in found):
            # coarse rounding is not linear either
            self.probe_causes = [c for c in self.probe_causes if c.kind != "nonlinear-in-upstream"]
        # What a probe has shown comes first; of the same kind, the diagnosis says more.
        said_more = {cause.kind: cause for cause in found}
        first = [
            said_more.get(cause.kind, cause)
            for cause in sorted(
                (c for c in self.probe_causes if c.kind in self.EXPLAINING),
                key=lambda c: self.EXPLAINING.index(c.kind),
            )
        ]
        rest = [c for c in self.probe_causes if c.kind not in self.EXPLAINING]
        if [c.kind for c in found] == ["unknown"] and first + rest:
            found = []
        report.causes = _unique(first + found + rest)

    def _mismatch(self, name: str, grad: Tensor | None, relative: float) -> Mismatch | None:
        expected = self.expected[name]
        if expected.value is None and not expected.products:
            return None
        value = self.wide.values[name]
        actual = torch.zeros_like(value) if grad is None else grad.detach()
        actual = actual.double().cpu()
        if expected.value is not None:
            right = expected.value.double().cpu()
        elif actual.shape == value.shape:
            right = torch.tensor([p for p, _ in expected.products], dtype=torch.float64)
            actual = torch.stack([(actual * v).sum() for v in expected.directions])
        else:
            return None
        tolerance = SAFETY * expected.uncertainty
        if relative:
            tolerance = min(tolerance, relative * right.abs().max().item())
        labels = {
            f"constant{i}": leaf for i, leaf in enumerate(self.subject.leaves)
            if isinstance(leaf, Tensor)
        }  # fmt: skip
        gradient = None
        if name in self.oracle.plain and expected.value is not None:
            gradient = lambda upstream: self.oracle.at(list(upstream))[name]  # noqa: E731
        outputs = self.wide.forward(self.wide.leaves_of()[1])
        cut_off = frozenset(k for k, z in enumerate(outputs) if not z.requires_grad)
        return Mismatch(
            name, actual, right, tolerance,
            {n: v.detach().double().cpu() for n, v in self.wide.values.items()},
            [u.cpu() for u in self.wide_upstream],
            [z.detach().double().cpu() for z in outputs],
            labels, cut_off, expected.value is None, gradient,
        )  # fmt: skip

    def _plain_forward(self) -> Callable | None:
        if self.subject.is_numpy and self.reference is None:
            return None
        source = self.oracle.source

        def forward(values: dict[str, Tensor]) -> list[Tensor]:
            return source.plain_forward(values)

        return forward

    def _refused(self, returned: list[tuple], error: Exception) -> list[Cause]:
        """The causes of a backward whose gradients the engine refused, or that raised itself."""
        mismatches = []
        for leaf, grad in zip(self.subject.leaves, returned[0] if returned else (), strict=False):
            name = getattr(leaf, "name", "")
            if isinstance(grad, Tensor) and name in self.expected:
                mismatch = self._mismatch(name, grad, 0.0)
                if mismatch is None:
                    continue
                same = mismatch.actual.shape == mismatch.expected.shape
                if not same or not torch.allclose(mismatch.actual, mismatch.expected):
                    mismatches.append(mismatch)
        if mismatches:
            return _diagnose(mismatches, self._plain_forward())
        return [Cause("unknown", "the backward raises an error", said(error), 1.0)]

    def _search_submodules(self) -> None:
        """The first submodule, from the loss down, whose own gradients are wrong."""
        module, path = self.subject.module, ""
        assert module is not None
        handed = self.subject.leaves_of()[1]
        calls = submodule_calls(module, lambda: self.subject.forward(handed))
        found: Report | None = None
        while True:
            children = {f"{path}.{n}".lstrip(".") for n, _ in module.named_children()}
            for name, part, args, kwargs in reversed(calls):
                if name not in children:
                    continue
                try:
                    local = Target(part, args, kwargs, None, self.subject.seed)
                    if _Check(local, part, deep=False).run().verdict != "fail":
                        continue
                    found = _Check(local, part, localise=False).run()
                except ValueError:
                    continue
                module, path = part, name
                break
            else:
                break
        if found is not None:
            self.report.where = f"{path} ({type(module).__name__})"
            self.probe_causes = [
                Cause(c.kind, f"{path}: {c.detail}", c.evidence, c.residual) for c in found.causes
            ]


def _agree(wide: Tensor, low: Tensor) -> bool:
    """Whether the output in float64 is that of the lower precision, but for underflow; a random
    mask, say, need not be the same in both."""
    if wide.dtype != torch.float64 or wide.shape != low.shape:
        return False
    size = wide.abs().max().item() if wide.numel() else 0.0
    info = torch.finfo(low.dtype)
    slack = info.eps**0.4 * size + info.smallest_normal
    return bool(((wide - low.double()).abs() <= slack).all())


def _diagnose(mismatches: list[Mismatch], forward: Callable | None) -> list[Cause]:
    from nn_backprop.check.diagnosis.diagnose import (
        diagnose,  # slow to import, and only for what is wrong
    )

    return diagnose(mismatches, forward)


def _unique(causes: list[Cause]) -> list[Cause]:
    best: dict[str, Cause] = {}
    for cause in causes:
        best.setdefault(cause.kind, cause)
    return list(best.values())
