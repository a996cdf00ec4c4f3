"""Is this gradient right? For arrays from anywhere: a port to C, NumPy or JAX, or a file.

Nothing is computed here but differences, so how far rounding may have moved a gradient cannot be
measured as `rounding` does. The bound is

    tolerance = SAFETY · eps · √K · (largest expected entry),

eps being that of the coarser of the two arrays, and K the size of the largest array known, which
no sum in the computation is likely to exceed. For half precision K is 1, since its sums are
accumulated in a higher one. The precision of an array is that of its values: those of a float64
array are float32 numbers if float32 is what they were computed in.

Everything of an operation fits in one flat mapping, and so in one file, under these keys, of which
only the first is needed:

    grad/NAME     input/NAME  parameter/NAME  label/NAME     upstream/0 …     output/0 …

`option/NAME` may say more (a stride, an axis); it is not read.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nn_backprop.check.diagnosis.diagnose import diagnose
from nn_backprop.check.diagnosis.mismatch import Mismatch
from nn_backprop.check.judge import POWER
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Cause, Entry, Report

LEAST_TERMS = 1e4  # K is at least this
FLOAT64, FLOAT32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
# A lower precision, and more bits than whole numbers or simple fractions take, as which values in
# that precision would otherwise pass.
PRECISIONS = {torch.bfloat16: 10, torch.float16: 13, torch.float32: 16}
FEW = 64  # numbers whose precision is judged together with that of the others
WORDS = {"inputs": "input", "parameters": "parameter", "labels": "label", "upstream": "upstream",
         "outputs": "output"}  # fmt: skip


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
    ours, our_context = _sorted_out(actual, "actual")
    theirs, their_context = _sorted_out(expected, "expected")
    if not ours and not theirs:
        raise ValueError("there is nothing to compare: neither side holds a gradient")
    return _Comparison(ours, theirs, our_context | their_context | _flat(context or {})).run()


def load(path: str | Path) -> dict[str, Any]:
    """The arrays of an .npz or .safetensors file, by name.

    Nothing in the file is executed. Raises ValueError, in one sentence, for a file that is missing,
    of another kind, damaged, without arrays, or with arrays of Python objects.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} is neither an .npz nor a .safetensors file")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = ""
    try:
        arrays: dict[str, Any] = {}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            arrays = load_file(path)
        else:
            with open(path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a single array, as .npy files hold")
                for name in archive:
                    arrays[name] = archive[name]
    except Exception as error:  # damaged files fail in many ways
        if "Object arrays" in str(error):
            raise ValueError(
                f"{path} holds Python objects under {name!r}, which are not read: save numbers only"
            ) from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "allow_pickle" in reason or "pickled" in reason:  # what NumPy says of any other file
            reason = "it is not an archive of arrays"
        raise ValueError(f"{path} cannot be read as {path.suffix}: {reason}") from None
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    return arrays


@dataclass
class _Comparison:
    ours: dict[str, Tensor | None]
    theirs: dict[str, Tensor | None]
    context: dict[str, Tensor]

    def run(self) -> Report:
        given = [t for side in (self.ours, self.theirs) for t in side.values() if t is not None]
        sizes = [t.numel() for t in (*given, *self.context.values())]
        self.terms = max([LEAST_TERMS, *sizes])
        self.our_eps, self.their_eps = _precisions(self.ours), _precisions(self.theirs)
        self.scale = max((_largest(t) for t in self.theirs.values() if t is not None), default=0.0)
        self.report = Report("the given gradients", "pass")
        self.mismatches: list[Mismatch] = []
        self.plain_causes: list[Cause] = []
        shared = [n for n in self.theirs if n in self.ours]
        missing = [n for n in self.theirs if n not in self.ours]
        surplus = [n for n in self.ours if n not in self.theirs]
        for name in (*self.theirs, *surplus):
            entry = self._entry(name) if name in shared else self._lonely(name)
            if entry is not None:
                self.report.tensors.append(entry)
        self._judge(missing, surplus)
        return self.report

    def _entry(self, name: str) -> Entry | None:
        """The comparison of a gradient that both sides have; None on both is none at all."""
        grad, right = self.ours[name], self.theirs[name]
        if grad is None and right is None:
            return None
        like = right if right is not None else grad
        assert like is not None
        expected = torch.zeros_like(like).double() if right is None else right.double()
        actual = torch.zeros_like(expected) if grad is None else grad.double()
        eps, size = max(self.our_eps[name], self.their_eps[name]), _largest(expected)
        uncertainty = eps * (math.sqrt(self.terms) if eps <= FLOAT32 else 1.0) * size
        tolerance = SAFETY * uncertainty
        entry = Entry(name, tuple(like.shape), "given", "pass", 0.0, 0.0, 0.0, tolerance)
        if not expected.isfinite().all():
            entry.verdict, entry.note = "inconclusive", "the expected gradient is not finite"
            return entry
        if actual.shape != expected.shape:
            entry.verdict, entry.note = "fail", f"the given one has shape {_shape(actual)}"
            entry.error = entry.relative_error = entry.units = math.inf
            self._mismatch(name, actual, expected, tolerance)
            return entry
        if not expected.numel():
            entry.note = "empty"
            return entry
        error = (actual - expected).abs().nan_to_num(nan=math.inf)
        i = int(error.argmax())
        entry.worst_index = tuple(int(j) for j in np.unravel_index(i, error.shape))
        entry.actual, entry.expected = actual.flatten()[i].item(), expected.flatten()[i].item()
        entry.error = error.flatten()[i].item()
        entry.relative_error = _over(entry.error, size)
        entry.units = _over(entry.error, uncertainty)
        if entry.error > tolerance and self._is_rounding(actual, expected, eps, name):
            entry.note = "zero to rounding on both sides, beside the largest of the gradients"
            if self.their_eps[name] > FLOAT64:  # as small as this, it may also be a gradient
                entry.verdict = "inconclusive"
        elif not entry.error <= tolerance:
            entry.verdict = "fail"
            entry.note = "" if grad is not None else "given as None"
            self._mismatch(name, actual, expected, tolerance)
        elif factor := _common_factor(actual, expected, eps):
            entry.verdict = "fail"
            detail = f"grad_{name} is about {factor:.3g} times what it should be"
            evidence = (
                f"{factor:.5g} × expected fits best; rounding would leave no factor in common"
            )
            self.plain_causes.append(Cause("scale", detail, evidence))
        elif size == 0:
            entry.note = "expected to be 0 throughout: only a zero could be checked"
        elif tolerance > POWER * size:
            entry.verdict = "inconclusive"
            entry.note = (
                f"with numbers as coarse as these, rounding may account for "
                f"{100 * tolerance / size:.0f} % of the largest entry"
            )
        else:
            entry.note = self._coarse(name)
        return entry

    def _is_rounding(self, actual: Tensor, expected: Tensor, eps: float, name: str) -> bool:
        """Whether both are so small beside the other gradients that they are nothing but what is
        left over when larger terms cancel, such as the gradient of a bias before a batch norm."""
        unit = SAFETY * min(eps, FLOAT32) * self.scale
        return _largest(expected) <= SAFETY * min(self.their_eps[name], FLOAT32) * self.scale and (
            _largest(actual) <= unit
        )

    def _coarse(self, name: str) -> str:
        """A note on a precision that is not the type's."""
        notes = []
        for side, precisions, arrays in (("given", self.our_eps, self.ours),
                                         ("expected", self.their_eps, self.theirs)):  # fmt: skip
            array = arrays[name]
            if array is not None and precisions[name] > _eps(array):
                precision = next(d for d in PRECISIONS if torch.finfo(d).eps == precisions[name])
                notes.append(f"the {side} one's values are {_word(precision)} numbers")
        return "; ".join(notes)

    def _lonely(self, name: str) -> Entry | None:
        """A gradient that one side does not have."""
        missing = name in self.theirs
        array = (self.theirs if missing else self.ours)[name]
        if array is None:
            return None
        size = _largest(array)
        entry = Entry(name, tuple(array.shape), "given", "fail", size, math.inf, math.inf, 0.0)
        entry.note = "missing" if missing else "nobody expected it"
        entry.relative_error = 1.0 if missing else math.inf
        return entry

    def _mismatch(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        if not actual.isfinite().all():
            bad = (~actual.isfinite()).nonzero()
            where = f", first at {tuple(bad[0].tolist())}" if actual.dim() else ""
            evidence = f"{len(bad)} of {actual.numel()} entries{where}; expected is finite"
            self.plain_causes.append(
                Cause("unknown", f"grad_{name} is not finite: it holds NaN or Inf", evidence, 1.0)
            )
            return
        tensors = {prefix: self._known(prefix) for prefix in WORDS.values()}
        inputs = tensors["input"]
        for key, tensor in tensors["parameter"].items():
            inputs[f"parameter {key}" if key in inputs else key] = tensor
        labels = {k: t for k, t in inputs.items() if not t.is_floating_point()}
        self.mismatches.append(
            Mismatch(
                name, actual, expected, tolerance,
                {k: t.double() for k, t in inputs.items() if k not in labels},
                [t.double() for t in tensors["upstream"].values()],
                [t.double() for t in tensors["output"].values()],
                tensors["label"] | labels,
            )
        )  # fmt: skip

    def _known(self, prefix: str) -> dict[str, Tensor]:
        """What the context holds under this word; numbered ones in order."""
        found = {
            key.partition("/")[2]: tensor
            for key, tensor in self.context.items()
            if key.startswith(f"{prefix}/")
        }
        order = sorted(found, key=int) if all(name.isdecimal() for name in found) else list(found)
        return {name: found[name] for name in order}

    def _judge(self, missing: list[str], surplus: list[str]) -> None:
        report, reasons = self.report, []
        missing = [n for n in missing if self.theirs[n] is not None]
        surplus = [n for n in surplus if self.ours[n] is not None]
        if missing:
            reasons.append(f"{_grads(missing)} missing")
            sizes = [f"{n} has entries up to {_largest(self.theirs[n]):.3g}" for n in missing]
            evidence = f"expected {'; '.join(sizes)}"
            if surplus:
                evidence += f"; of names that nobody expected there are: {', '.join(surplus)}"
            report.causes.append(Cause("detached", f"{_grads(missing)} missing", evidence, 1.0))
        wrong = [e for e in report.tensors if e.verdict == "fail"]
        wrong = [e for e in wrong if e.name not in (*missing, *surplus)]
        if wrong:
            worst = max(wrong, key=lambda e: e.relative_error).relative_error
            by = f", by up to {worst:.3g} of the largest entry" if math.isfinite(worst) else ""
            reasons.append(f"{_grads([e.name for e in wrong])} wrong{by}")
            report.causes += diagnose(self.mismatches) if self.mismatches else []
            report.causes += self.plain_causes
        if surplus:
            reasons.append(f"{_grads(surplus)} given, but not expected")
            detail = f"{_grads(surplus)} given, but nobody expected it"
            evidence = f"expected are {', '.join(self.theirs) or 'none at all'}"
            report.causes.append(Cause("unknown", detail, evidence, 1.0))
        unsure = [e for e in report.tensors if e.verdict == "inconclusive"]
        if reasons:
            report.verdict, report.reason = "fail", "; ".join(reasons)
        elif unsure:
            report.verdict, report.reason = (
                "inconclusive",
                f"grad_{unsure[0].name}: {unsure[0].note}",
            )
        elif not self.scale:
            report.verdict = "inconclusive"
            report.reason = (
                "no power: every expected gradient is 0 or empty, so that only a zero could be "
                "checked; choose inputs on which the outputs depend"
            )


def _sorted_out(arrays: Any, who: str) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The gradients of a mapping, and its context if it is in the flat layout."""
    if not isinstance(arrays, Mapping):
        raise ValueError(
            f"{who} is a {type(arrays).__name__}; it has to be a mapping of names to arrays"
        )
    arrays = {str(name): value for name, value in arrays.items()}
    if not any(name.startswith("grad/") for name in arrays):
        return {n: _array(a, f"{who} {n!r}") for n, a in arrays.items()}, {}
    words = (*(f"{word}/" for word in WORDS.values()), "option/")
    context = {n: a for n, a in arrays.items() if n.startswith(words)}
    gradients = {n: a for n, a in arrays.items() if n not in context}
    return (
        {n.removeprefix("grad/"): _array(a, f"{who} {n!r}") for n, a in gradients.items()},
        _flat(context),
    )


def _flat(context: Any) -> dict[str, Tensor]:
    """A context in the flat layout, whichever it was in."""
    if not isinstance(context, Mapping):
        raise ValueError(f"the context is a {type(context).__name__}; it has to be a mapping")
    found: dict[str, Any] = {}
    for key, value in context.items():
        word, _, name = str(key).partition("/")
        if key in WORDS and not name:
            items: Iterable = [(0 if key in ("upstream", "outputs") else key, value)]
            if isinstance(value, Mapping):
                items = value.items()
            elif isinstance(value, list | tuple) and any(map(_has_shape, value)):
                items = enumerate(value)
            found |= {f"{WORDS[key]}/{n}": part for n, part in items}
        elif name and word in WORDS.values():
            found[str(key)] = value
        elif word not in ("grad", "option"):
            raise ValueError(
                f"the context has {key!r}; it may have {', '.join(WORDS)}, or keys such as input/x"
            )
    arrays = {key: _array(value, f"the context's {key!r}") for key, value in found.items()}
    return {key: array for key, array in arrays.items() if array is not None}


def _array(value: Any, what: str) -> Tensor | None:
    """As a tensor on the CPU; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{what} is not an array: its rows differ in length") from None
        named = getattr(torch, array.dtype.name, None)  # such as JAX's bfloat16, not of NumPy
        if array.dtype.kind in "iu":
            if array.size and array.max() > np.iinfo(np.int64).max:
                raise ValueError(
                    f"{what} holds whole numbers beyond 2⁶³ − 1, which are no gradient"
                )
            value = torch.from_numpy(array.astype(np.int64, order="C"))
        elif array.dtype.kind == "b":
            value = torch.from_numpy(array.astype(bool, order="C"))
        elif array.dtype.kind == "f" or (
            isinstance(named, torch.dtype) and named.is_floating_point
        ):
            value = torch.from_numpy(array.astype(np.float64, order="C"))
            value = value.to(named) if isinstance(named, torch.dtype) else value
        else:
            kind = (
                f"a {type(value).__name__}" if array.dtype == object else f"of type {array.dtype}"
            )
            raise ValueError(f"{what} is {kind}; it has to be an array of real numbers")
    if value.is_complex() or value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise ValueError(f"{what} is {value.dtype}, {value.layout}; it has to be dense and real")
    return value.detach().cpu()


def _has_shape(value: Any) -> bool:
    return hasattr(value, "shape") and not isinstance(value, np.generic)


def _precisions(arrays: dict[str, Tensor | None]) -> dict[str, float]:
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
        found[name] = _eps(array)
        for dtype, least in PRECISIONS.items():
            eps = torch.finfo(dtype).eps
            fits = bits > least and _last_bits(some, eps) and _fits(some, dtype)
            if eps > found[name] and fits and _fits(values, dtype):
                found[name] = eps
                break
    return found


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).double().nan_to_num(), values.nan_to_num())


def _common_factor(actual: Tensor, expected: Tensor, eps: float) -> float:
    """The factor by which numbers too coarse for the bound on each are all off, or 0: rounding
    errors differ in sign, and cancel in what is common to them."""
    if eps <= FLOAT32 or actual.numel() < FEW:
        return 0.0
    factor = float((actual * expected).sum() / expected.square().sum().clamp(min=1e-300))
    rest = float((actual - factor * expected).norm() / expected.norm().clamp(min=1e-300))
    return factor if abs(factor - 1) > 4 * eps + 4 * rest else 0.0


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


def _eps(array: Tensor) -> float:
    return torch.finfo(array.dtype).eps if array.is_floating_point() else FLOAT64


def _largest(array: Tensor | None) -> float:
    """The largest finite |entry|."""
    if array is None or not array.numel():
        return 0.0
    values = array.double().abs()
    return values[values.isfinite()].max().item() if values.isfinite().any() else 0.0


def _over(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)


def _grads(names: list[str]) -> str:
    return f"{', '.join(f'grad_{n}' for n in names)} {'is' if len(names) == 1 else 'are'}"


def _shape(array: Tensor) -> tuple[int, ...]:
    return tuple(array.shape)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
