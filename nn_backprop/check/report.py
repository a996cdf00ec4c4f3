"""What a check found: the verdict, the cause, and the figures behind them."""

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive"]
WIDTH = 100  # of a line on the terminal

# The kinds of cause. Each completes the sentence "the gradient …".
KINDS = {
    "sign": "is the negative",
    "scale": "is a constant multiple",
    "per-channel-scale": "is a multiple that differs by channel",
    "transposed": "has two axes exchanged",
    "flipped": "has a kernel mirrored in space",
    "shifted": "is rolled along an axis",
    "permuted": "has channels, gates, heads or samples exchanged",
    "subset": "counts only some samples, steps, channels, groups or positions",
    "overwritten": "kept one contribution where several should add up",
    "missing-term": "lacks a term",
    "extra-term": "has a term too many",
    "missing-factor": "lacks a factor or has it twice",
    "wrong-operand": "is computed from the wrong quantity",
    "wrong-reduction": "is summed over the wrong axis, not summed, or averaged instead of summed",
    "ignores-upstream": "does not depend on the upstream gradient as it should",
    "detached": "is zero or missing",
    "stale-state": "depends on another call",
    "mutates-input": "comes from a call that changed what it was handed",
    "assumes-contiguous": "is right only for a contiguous upstream gradient",
    "needs-input-grad": "depends on which other inputs need a gradient",
    "wrong-precision": "is right in float64 only",
    "nondeterministic": "differs between two equal calls",
    "nonlinear-in-upstream": "is not linear in the upstream gradient",
    "wrong-branch": "is wrong only in part of the input's range",
    "unknown": "is wrong, and no hypothesis explains it",
}


@dataclass(frozen=True)
class Cause:
    """Why a gradient is wrong."""

    kind: str  # a word of `KINDS`
    detail: str  # a sentence that names the gradient and the mistake
    evidence: str  # what was measured
    residual: float = 0.0
    """What the hypothesis leaves unexplained: ‖actual − hypothesis‖ / ‖actual − expected‖."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of cause; there are {', '.join(KINDS)}")


@dataclass
class Entry:
    """One checked gradient."""

    name: str
    shape: tuple[int, ...]
    oracle: str  # where the expected gradient comes from
    verdict: Verdict = "pass"
    error: float = 0.0  # largest |actual − expected|
    relative_error: float = 0.0  # the same over the largest |expected|
    units: float = 0.0  # the same over what the oracle itself is uncertain by, rounding included
    smallest_visible: float = 0.0
    """The smallest |actual − expected| of one entry that would have been called an error."""
    worst_index: tuple[int, ...] | None = None
    actual: float | None = None  # at the worst index
    expected: float | None = None  # at the worst index
    note: str = ""  # what is special: a kink, a gradient that is zero, why nothing can be said

    def judged(self, verdict: Verdict, note: str) -> "Entry":
        """This entry, with that verdict and note from here on."""
        self.verdict, self.note = verdict, note
        return self


@dataclass
class Probe:
    """One way of calling the backward that must not change what it gives."""

    name: str
    outcome: Literal["pass", "fail", "skipped"]
    reason: str = ""


@dataclass
class Report:
    """What `check_gradients` and `compare_gradients` found; `str` of it is for reading."""

    target: str
    verdict: Verdict
    reason: str = ""  # why it is not a pass, in a sentence; empty if it is
    tensors: list[Entry] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)  # best first; of a failure, at least one
    where: str = ""  # in a network, the submodule or Function whose own backward is wrong
    error: BaseException | None = None  # what the target raised, if it could not be run
    failed_hypotheses: int = 0
    """How many families of hypotheses raised an error: a mistake of the checker's own, for which a
    cause may be missing."""

    @property
    def ok(self) -> bool:
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a number that is not finite is a string."""
        result = {k: v for k, v in vars(self).items() if k != "error"}
        result["ok"] = self.ok
        for key in ("tensors", "probes", "causes"):
            result[key] = [asdict(item) for item in result[key]]
        result["error"] = None if self.error is None else in_one_line(self.error)
        return _plain(result)

    def __str__(self) -> str:
        head = f"{self.verdict.upper()}  {self.target}"
        lines = _wrapped(f"{head}: {self.reason}" if self.reason else head)
        for rank, cause in enumerate(self.causes):
            detail = f": {cause.detail}" if cause.detail else ""
            lines += _wrapped(f"{'or' if rank else 'cause'}: {cause.kind}{detail}")
            lines += _wrapped(cause.evidence, start="    ")
        if self.failed_hypotheses:
            raised = f"{self.failed_hypotheses} families of hypotheses raised an error"
            lines.append(f"{raised}: a cause may be missing")
        if self.tensors:
            lines += ["", *_table(self.tensors)]
        if self.probes:
            failed = [p for p in self.probes if p.outcome == "fail"]
            skipped = [p for p in self.probes if p.outcome == "skipped"]
            passed = len(self.probes) - len(failed) - len(skipped)
            lines += ["", f"probes: {passed} passed, {len(failed)} failed, {len(skipped)} skipped"]
            for probe in (*failed, *skipped):
                lines += _wrapped(f"{probe.outcome}: {probe.name}: {probe.reason}", start="  ")
        return "\n".join(lines)


class GradientMismatch(AssertionError):
    """A gradient is not what it has to be; `report` says what was found."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report


def _wrapped(text: str, start: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent="    ")


def _table(entries: list[Entry]) -> list[str]:
    head = ("gradient", "shape", "verdict", "rel. error", "units", "worst at", "actual",
            "expected", "could see", "oracle")  # fmt: skip
    rows = [head] + [
        (e.name, "×".join(map(str, e.shape)) or "scalar", e.verdict, _number(e.relative_error, 2),
         _number(e.units, 2), "" if e.worst_index is None else ",".join(map(str, e.worst_index)),
         _number(e.actual, 5), _number(e.expected, 5), _number(e.smallest_visible, 2), e.oracle)
        for e in entries
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row, note in zip(rows, ["", *(e.note for e in entries)], strict=True):
        lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        lines += _wrapped(note, start="    ")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def dtype_name(dtype: object) -> str:
    """Such as float32, of torch.float32."""
    return str(dtype).removeprefix("torch.")


def in_one_line(error: BaseException) -> str:
    """Its type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
