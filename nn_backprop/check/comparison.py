"""Is this gradient right? For arrays from anywhere: a port to C, NumPy or JAX, or a file.

Nothing is computed here but differences, so how far rounding may have moved a gradient cannot be
measured as `rounding` does. The bound is

    tolerance = SAFETY · eps · √K · (largest expected entry),

eps being that of the coarser of the two arrays, and K the size of the largest array known, which
no sum in the computation is likely to exceed. For half precision K is 1, since its sums are
accumulated in a higher one. The precision of an array is that of its values: those of a float64
array are float32 numbers if float32 is what they were computed in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nn_backprop.check.arrays import WORDS, flat_context, split_context
from nn_backprop.check.diagnosis.diagnose import diagnose
from nn_backprop.check.diagnosis.mismatch import Mismatch
from nn_backprop.check.judge import POWER, find_worst
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Cause, Entry, Report, dtype_name

LEAST_TERMS = 1e4  # K is at least this
FLOAT64, FLOAT32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
# A lower precision, and more bits than whole numbers or simple fractions take, as which values in
# that precision would otherwise pass.
PRECISIONS = {torch.bfloat16: 10, torch.float16: 13, torch.float32: 16}
FEW = 64  # numbers whose precision is judged together with that of the others


def compare_gradients(
    actual: Mapping[str, Any], expected: Mapping[str, Any], context: Mapping[str, Any] | None = None
) -> Report:
    """Whether the gradients `actual` are those `expected` and, if not, why.

    actual, expected: arrays by name (of NumPy, torch, JAX, or nested lists), each of its operand's
        shape; None is a gradient of 0. A name that one of them lacks is a failure. Either may be in
        the flat layout of `python -m nn_backprop export`, with keys such as grad/weight.
    context: helps to say why a gradient is wrong: `inputs` and `parameters` and `labels` by name,
        `upstream` and `outputs` as an array, a list of arrays, or arrays by name; or the flat
        layout, with keys such as input/x and upstream/0.

    The report is that of `check_gradients`, with "given" as the oracle. Where the expected gradient
    is not finite, or is 0 throughout, it is inconclusive. Raises ValueError, in one sentence, for
    what is not a mapping of arrays, and where neither holds a gradient.
    """
    ours, our_context = split_context(actual, "actual")
    theirs, their_context = split_context(expected, "expected")
    if not ours and not theirs:
        raise ValueError("there is nothing to compare: neither side holds a gradient")
    known = our_context | their_context | flat_context(context or {})
    return _Comparison(ours, theirs, known).run()


@dataclass
class _Comparison:
    ours: dict[str, Tensor | None]
    theirs: dict[str, Tensor | None]
    context: dict[str, Tensor]

    def run(self) -> Report:
        given = [t for side in (self.ours, self.theirs) for t in side.values() if t is not None]
        sizes = [t.numel() for t in (*given, *self.context.values())]
        self.terms = max([LEAST_TERMS, *sizes])
        self.our_eps, self.their_eps = _precisions_of(self.ours), _precisions_of(self.theirs)
        self.scale = max((_largest(t) for t in self.theirs.values() if t is not None), default=0.0)
        self.report = Report("the given gradients", "pass")
        self.mismatches: list[Mismatch] = []
        self.plain_causes: list[Cause] = []
        for name in self.theirs | self.ours:
            grad, right = self.ours.get(name), self.theirs.get(name)
            like = grad if right is None else right
            if like is None:
                continue  # nothing on either side
            alone = name not in self.ours or name not in self.theirs
            entry = self._lonely(name, like) if alone else self._entry(name, grad, right, like)
            self.report.tensors.append(entry)
        self._judge()
        return self.report

    def _entry(self, name: str, grad: Tensor | None, right: Tensor | None, like: Tensor) -> Entry:
        """The comparison of a gradient that both sides have."""
        expected = torch.zeros_like(like).double() if right is None else right.double()
        actual = torch.zeros_like(expected) if grad is None else grad.double()
        eps, size = max(self.our_eps[name], self.their_eps[name]), _largest(expected)
        uncertainty = eps * (math.sqrt(self.terms) if eps <= FLOAT32 else 1.0) * size
        tolerance = SAFETY * uncertainty
        entry = Entry(name, tuple(like.shape), "given", smallest_visible=tolerance)
        if not expected.isfinite().all():
            return entry.judged("inconclusive", "the expected gradient is not finite")
        if actual.shape != expected.shape:
            entry.error = entry.relative_error = entry.units = math.inf
            self._mismatch(name, actual, expected, tolerance)
            return entry.judged("fail", f"the given one has shape {tuple(actual.shape)}")
        if not expected.numel():
            return entry.judged("pass", "empty")
        find_worst(entry, actual, expected, uncertainty)
        if not entry.error <= tolerance:
            # Both may be so small beside the other gradients that they are nothing but what is left
            # over when larger terms cancel, such as the gradient of a bias before a batch norm.
            trifle, their_trifle = (
                SAFETY * min(e, FLOAT32) * self.scale for e in (eps, self.their_eps[name])
            )
            if size <= their_trifle and _largest(actual) <= trifle:
                note = "zero to rounding on both sides, beside the largest of the gradients"
                unsure = self.their_eps[name] > FLOAT64  # as small as this, it may be a gradient
                return entry.judged("inconclusive" if unsure else "pass", note)
            self._mismatch(name, actual, expected, tolerance)
            return entry.judged("fail", "given as None" if grad is None else "")
        if factor := _common_factor(actual, expected, eps):
            detail = f"grad_{name} is about {factor:.3g} times what it should be"
            fits = f"{factor:.5g} × expected fits best"
            evidence = f"{fits}; rounding would leave no factor in common"
            self.plain_causes.append(Cause("scale", detail, evidence))
            return entry.judged("fail", "")
        if size == 0:
            return entry.judged("pass", "expected to be 0 throughout: only a zero could be checked")
        if tolerance > POWER * size:
            share = f"{100 * tolerance / size:.0f} % of the largest entry"
            note = f"with numbers as coarse as these, rounding may account for {share}"
            return entry.judged("inconclusive", note)
        return entry.judged("pass", self._coarse(name))

    def _coarse(self, name: str) -> str:
        """A note on a precision that is not the type's."""
        notes = []
        for side, precisions, arrays in (("given", self.our_eps, self.ours),
                                         ("expected", self.their_eps, self.theirs)):  # fmt: skip
            array = arrays[name]
            if array is not None and precisions[name] > _eps_of(array):
                precision = next(d for d in PRECISIONS if torch.finfo(d).eps == precisions[name])
                notes.append(f"the {side} one's values are {dtype_name(precision)} numbers")
        return "; ".join(notes)

    def _lonely(self, name: str, array: Tensor) -> Entry:
        """A gradient that one side does not have."""
        missing = name in self.theirs
        return Entry(
            name, tuple(array.shape), "given", "fail", _largest(array),
            relative_error=1.0 if missing else math.inf, units=math.inf,
            note="missing" if missing else "nobody expected it",
        )  # fmt: skip

    def _mismatch(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        bad = (~actual.isfinite()).nonzero()
        if len(bad):
            where = f", first at {tuple(bad[0].tolist())}" if actual.dim() else ""
            evidence = f"{len(bad)} of {actual.numel()} entries{where}; expected is finite"
            detail = f"grad_{name} is not finite: it holds NaN or Inf"
            self.plain_causes.append(Cause("unknown", detail, evidence, 1.0))
            return
        tensors = {prefix: self._known(prefix) for prefix in WORDS.values()}
        inputs = tensors["input"]
        for key, tensor in tensors["parameter"].items():
            inputs[f"parameter {key}" if key in inputs else key] = tensor
        labels = {k: t for k, t in inputs.items() if not t.is_floating_point()}
        floating = {k: t.double() for k, t in inputs.items() if k not in labels}
        upstream, outputs = (
            [t.double() for t in tensors[word].values()] for word in ("upstream", "output")
        )
        labels = tensors["label"] | labels
        self.mismatches.append(
            Mismatch(name, actual, expected, tolerance, floating, upstream, outputs, labels)
        )

    def _known(self, prefix: str) -> dict[str, Tensor]:
        """What the context holds under this word; numbered ones in order."""
        keys = [key for key in self.context if key.startswith(f"{prefix}/")]
        found = {key.partition("/")[2]: self.context[key] for key in keys}
        order = sorted(found, key=int) if all(name.isdecimal() for name in found) else list(found)
        return {name: found[name] for name in order}

    def _judge(self) -> None:
        report, reasons = self.report, []
        names = [entry.name for entry in report.tensors]
        missing = [name for name in names if name not in self.ours]
        surplus = [name for name in names if name not in self.theirs]
        if missing:
            reasons.append(f"{_grads(missing)} missing")
            sizes = [f"{n} has entries up to {_largest(self.theirs[n]):.3g}" for n in missing]
            evidence = f"expected {'; '.join(sizes)}"
            if surplus:
                evidence += f"; of names that nobody expected there are: {', '.join(surplus)}"
            report.causes.append(Cause("detached", f"{_grads(missing)} missing", evidence, 1.0))
        alone = {*missing, *surplus}
        wrong = [e for e in report.tensors if e.verdict == "fail" and e.name not in alone]
        if wrong:
            worst = max(wrong, key=lambda e: e.relative_error).relative_error
            by = f", by up to {worst:.3g} of the largest entry" if math.isfinite(worst) else ""
            reasons.append(f"{_grads([e.name for e in wrong])} wrong{by}")
            failures: list[str] = []
            if self.mismatches:
                report.causes += diagnose(self.mismatches, failures=failures)
            report.failed_hypotheses = len(failures)
            report.causes += self.plain_causes
        if surplus:
            reasons.append(f"{_grads(surplus)} given, but not expected")
            detail = f"{_grads(surplus)} given, but nobody expected it"
            evidence = f"expected are {', '.join(self.theirs) or 'none at all'}"
            report.causes.append(Cause("unknown", detail, evidence, 1.0))
        unsure = [e for e in report.tensors if e.verdict == "inconclusive"]
        if reasons:
            report.verdict, report.reason = "fail", "; ".join(reasons)
        elif unsure or not self.scale:
            report.verdict = "inconclusive"
            report.reason = (
                "no power: every expected gradient is 0 or empty, so that only a zero could be "
                "checked; choose inputs on which the outputs depend"
            )
            if unsure:
                report.reason = f"grad_{unsure[0].name}: {unsure[0].note}"


def _common_factor(actual: Tensor, expected: Tensor, eps: float) -> float:
    """The factor by which numbers too coarse for the bound on each are all off, or 0: rounding
    errors differ in sign, and cancel in what is common to them."""
    if eps <= FLOAT32 or actual.numel() < FEW:
        return 0.0
    factor = float((actual * expected).sum() / expected.square().sum().clamp(min=1e-300))
    rest = float((actual - factor * expected).norm() / expected.norm().clamp(min=1e-300))
    return factor if abs(factor - 1) > 4 * eps + 4 * rest else 0.0


def _largest(array: Tensor | None) -> float:
    """The largest finite |entry|."""
    if array is None or not array.numel():
        return 0.0
    values = array.double().abs()
    return values[values.isfinite()].max().item() if values.isfinite().any() else 0.0


def _grads(names: list[str]) -> str:
    return f"{', '.join(f'grad_{n}' for n in names)} {'is' if len(names) == 1 else 'are'}"


def _precisions_of(arrays: dict[str, Tensor | None]) -> dict[str, float]:
    """The eps of each array: that of its type, or of a lower precision that its values have."""
    parts = [t.double().flatten() for t in arrays.values() if t is not None]
    together = torch.cat(parts) if parts else torch.empty(0)
    found = {}
    for name, array in arrays.items():
        if array is None:
            found[name] = 0.0
            continue
        values = together if array.numel() < FEW else array.double().flatten()
        some = values[:: max(1, values.numel() // 4096)]
        bits = _bits(some)
        found[name] = _eps_of(array)
        for dtype, least in PRECISIONS.items():
            eps = torch.finfo(dtype).eps
            fits = bits > least and _last_bits(some, eps) and _fits(some, dtype)
            if eps > found[name] and fits and _fits(values, dtype):
                found[name] = eps
                break
    return found


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).double().nan_to_num(), values.nan_to_num())


def _eps_of(array: Tensor) -> float:
    return torch.finfo(array.dtype).eps if array.is_floating_point() else FLOAT64


def _last_bits(values: Tensor, eps: float) -> bool:
    """Whether these numbers of that precision use its last bit, as about half of any do, but not
    powers of two."""
    values = values[values.isfinite() & (values != 0)]
    last = (torch.frexp(values).mantissa * 2 / eps).long() & 1
    return last.double().sum().item() > len(values) / 8


def _bits(values: Tensor) -> float:
    """How many bits the values take as multiples of one unit."""
    values = values[values.isfinite() & (values != 0)]
    if not values.numel():
        return 0.0
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa * 2.0**53).long()
    lowest = exponent - 53 + torch.log2((whole & -whole).double())
    return float(exponent.max() - lowest.min())
