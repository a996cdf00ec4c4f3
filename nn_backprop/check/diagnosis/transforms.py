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

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause

EXACT = 1e-6  # a residual below it is rounding
ROUGH = 1e-2  # and one below it is, if every entry is within ten tolerances
FITTED = 10.0  # the bits of a fitted number that has no name
CALLS = 160  # of the function that computes other gradients, at most
MOST = 8  # hypotheses in an answer
TINY = 1e-300  # keeps a division by an empty sum finite

Axes = tuple[int, ...]
Function = Callable[[Tensor], Tensor]

FACTORS: dict[str, Function] = {
    "{}": lambda t: t,
    "(1 − {}²)": lambda t: 1 - t**2,
    "{}(1 − {})": lambda t: t * (1 - t),
    "(1 − {})": lambda t: 1 - t,
    "{}²": lambda t: t**2,
    "(1 + {})": lambda t: 1 + t,
    "2{}": lambda t: 2 * t,
    "exp({})": torch.exp,
    "σ({})": torch.sigmoid,
    "σ′({})": lambda t: torch.sigmoid(t) * (1 - torch.sigmoid(t)),
    "tanh′({})": lambda t: 1 - torch.tanh(t) ** 2,
    "tanh({})": torch.tanh,
    "cos({})": torch.cos,
}
MASKS: dict[str, Function] = {
    "[{} > 0]": lambda t: (t > 0).double(),
    "[{} < 0]": lambda t: (t < 0).double(),
    "sign({})": torch.sign,
}
MULTIPLES: dict[str, Callable[[float], float]] = {
    "1/{}": lambda n: 1 / n,
    "{}": lambda n: n,
    "1/√{}": lambda n: n**-0.5,
    "√{}": lambda n: n**0.5,
    "({} − 1)/{}": lambda n: (n - 1) / n,
    "{}/({} − 1)": lambda n: n / (n - 1),
    "√(({} − 1)/{})": lambda n: ((n - 1) / n) ** 0.5,
    "2/{}": lambda n: 2 / n,
    "{}/2": lambda n: n / 2,
}


class _Guess(NamedTuple):
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


class _Contraction(NamedTuple):
    """A sum of the upstream gradient over axes, with an operand or without, or a product."""

    rule: str
    operand: str
    text: str
    value: Tensor


class _Case:
    """A mismatch, with what several families want to know about it."""

    def __init__(self, mismatch: Mismatch) -> None:
        self.own, self.name = mismatch.name, f"grad_{mismatch.name}"
        self.actual, self.expected = mismatch.actual, mismatch.expected
        self.tolerance = mismatch.tolerance
        self.upstream, self.labels = mismatch.upstream, mismatch.labels
        self.gradient = mismatch.gradient
        self.same_shape = self.actual.shape == self.expected.shape
        self.drivers = _numbered("upstream", mismatch.upstream)
        outputs = _numbered("output", mismatch.outputs)
        self.known = {**mismatch.inputs, **outputs, **self.drivers}
        work = self.expected.numel() + sum(tensor.numel() for tensor in self.upstream)
        self.budget = max(16, min(CALLS, 10_000_000 // (work + 1)))
        self.calls = self.budget  # that are left to the present family

    @cached_property
    def error(self) -> float:
        """The size of what there is to explain."""
        return float((self.actual - self.expected if self.same_shape else self.expected).norm())

    @cached_property
    def wrong(self) -> Tensor:
        """Where the gradient is wrong."""
        return (self.actual - self.expected).abs() > self.tolerance

    @cached_property
    def right(self) -> Tensor:
        """Where it is right, and not because most mistakes leave a zero a zero."""
        return ~self.wrong & (self.expected.abs() > self.tolerance)

    @cached_property
    def constants(self) -> list[tuple[float, str, str]]:
        """Numbers that mistakes multiply by, with their names and what those mean; likely first."""
        found = [(2.0, "2", ""), (0.5, "½", "")]
        for size, symbol, text in self.sizes():
            for form, multiple in MULTIPLES.items():
                found.append((multiple(size), form.replace("{}", symbol), f" with {text}"))
        for name, tensor in self.known.items():
            if tensor.numel() == 1 and (number := float(tensor)):
                found += [(number, name, ""), (1 / number, f"1/{name}", "")]
        for k in (2, 3, 4, 5):
            found += [(k**-2, "1/k²", f" with k = {k}"), (k**2, "k²", f" with k = {k}")]
        for p in (0.5, 0.1, 0.2, 0.25, 0.3, 0.4):
            text = f" with p = {p}"
            found += [(1 - p, "1 − p", text), (1 / (1 - p), "1/(1 − p)", text)]
        return [*found, (3.0, "3", "")]

    def sizes(self) -> Iterator[tuple[int, str, str]]:
        """The sizes that the shapes speak of: of an axis, of adjacent axes, of all axes but one."""
        seen = {0, 1}
        for name, tensor in {**self.known, self.name: self.expected}.items():
            letters, axes = ["", "D", "ND", "NTD", "NCHW"][min(tensor.ndim, 4)], range(tensor.ndim)
            groups = [tuple(axes[i:j]) for j in axes[1:] for i in range(j)]
            groups += [tuple(axes[i:]) for i in axes]
            groups += [tuple(j for j in axes if j != i) for i in axes[1:-1]]
            for group in sorted(groups, key=_plain_first) if tensor.ndim <= 4 else []:
                size = math.prod(tensor.shape[axis] for axis in group)
                if size not in seen:
                    seen.add(size)
                    symbol = "·".join(letters[axis] for axis in group if tensor.shape[axis] > 1)
                    text = f"{symbol} = {size}, the size of {_axes(group)} of {name}"
                    yield size, f"({symbol})" if "·" in symbol else symbol, text
        for name, labels in self.labels.items():
            valid = int((labels >= 0).sum())
            if valid not in seen and labels.dtype != torch.bool:
                yield (
                    valid,
                    "N",
                    f"N = {valid}, the count of labels in {name} that are not negative",
                )

    def respond(self, upstream: list[Tensor]) -> Tensor | None:
        """The expected gradient for another upstream gradient, as long as calls are left."""
        self.calls -= 1
        if self.calls < 0 or not (self.gradient or self.recognised):
            return None
        answer = (self.gradient or self.substitute)(upstream)
        return answer if answer.shape == self.expected.shape else None

    def replaced(self, k: int, new: Tensor, others: list[Tensor] | None = None) -> list[Tensor]:
        """The upstream gradients, with another k-th one."""
        return [new if j == k else old for j, old in enumerate(others or self.upstream)]

    def substitute(self, upstream: list[Tensor]) -> Tensor:
        """The same without a function for it, where the expected gradient is a contraction."""
        used, factor = self.recognised[0]
        shape = self.expected.shape
        return factor * next(
            found.value
            for found in _contractions(self, upstream[0], shape, used.operand)
            if found[:3] == used[:3]
        )

    @cached_property
    def recognised(self) -> list[tuple[_Contraction, float]]:
        """Contractions of the upstream gradient that the expected one is a multiple of."""
        found = []
        for upstream in self.upstream if len(self.upstream) == 1 else []:
            for contraction in _contractions(self, upstream, self.expected.shape):
                value = contraction.value
                factor = _ratio(self.expected, value)
                factor = 1.0 if abs(factor - 1) < 1e-6 or value.numel() < 4 else factor
                if _close(factor * value, self.expected, self.tolerance):
                    found.append((contraction, factor))
        return found

    @cached_property
    def views(self) -> list[tuple[str, Tensor]]:
        """Known tensors, with axes of size 1 added so that they broadcast to the gradient."""
        shape = self.expected.shape
        tensors = list(self.known.items())[:12]
        for name, labels in self.labels.items():
            if labels.dtype == torch.bool or not labels.numel() or int(labels.min()) < 0:
                continue
            tensors += [
                (f"{other}[{name}]", tensor[labels.long()])
                for other, tensor in self.known.items()
                if tensor.ndim == 1 and int(labels.max()) < tensor.numel()
            ]
            if shape and int(labels.max()) < shape[0]:
                counts = torch.bincount(labels.flatten().long(), minlength=shape[0]).clamp(min=1)
                tensors.append((f"count({name})", counts.double()))
        return [(name, view) for name, tensor in tensors for view in _alignments(tensor, shape)]


def explain(mismatch: Mismatch) -> list[Hypothesis]:
    """The hypotheses that explain a wrong gradient, shortest description first; one per kind."""
    case = _Case(mismatch)
    arrays = (case.actual, case.expected)
    if not all(array.numel() and bool(array.isfinite().all()) for array in arrays):
        return []
    if not case.error or (case.same_shape and not case.wrong.any()):
        return []
    best: dict[str, Hypothesis] = {}
    families = FAMILIES if case.same_shape else OTHER_SHAPES
    if mismatch.products or float(case.actual.abs().max()) <= case.tolerance:
        families = [_constants]  # products have no axes, and a zero fits many a thing
    for family in families:
        case.calls = case.budget
        try:
            for guess in family(case):
                found = best.get(guess.kind)
                if (found is None or guess.bits < found.bits) and (cause := _judge(case, guess)):
                    best[guess.kind] = Hypothesis(guess.bits, cause)
        except Exception:  # the context is somebody else's, and so is the function in it
            continue
    return sorted(best.values(), key=lambda hypothesis: hypothesis.bits)[:MOST]


def _judge(case: _Case, guess: _Guess) -> Cause | None:
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


# Constants


def _constants(case: _Case) -> Iterator[_Guess]:
    """Zero, the negative, a multiple."""
    actual, expected = case.actual, case.expected
    if float(actual.abs().max()) <= case.tolerance:
        formula = f"0 everywhere; expected has entries up to {float(expected.abs().max()):.3g}"
        yield _Guess("detached", 0.5, "is zero or missing", torch.zeros_like(actual), formula)
        return
    yield _Guess("sign", 1, "has the wrong sign", -expected, "−expected")
    ratio = _ratio(actual, expected)
    slack = min(1e-5, max(1e-9, case.tolerance / (float(expected.abs().mean()) + TINY)))
    names = [hit for hit in case.constants if abs(hit[0] - abs(ratio)) <= slack * abs(ratio)]
    if abs(ratio + 1) < 1e-9 or not ratio:
        return
    if names:
        sign, number = "−" if ratio < 0 else "", math.copysign(names[0][0], ratio)
        said = [(f"({name})" if sign and " − " in name else name) + more for _, name, more in names]
        text = ", or ".join(said[:2])
        formula = f"{number:.4f} × expected; {abs(number):.4g} = {names[0][1]}"
        yield _Guess("scale", 2, f"is multiplied by {sign}{text}", number * expected, formula)
    if expected.numel() >= 3:
        detail, formula = f"is {ratio:.4g} times what it should be", f"{ratio:.6g} × expected"
        yield _Guess("scale", FITTED, detail, ratio * expected, formula)


def _channels(case: _Case) -> Iterator[_Guess]:
    """A multiple that differs along one axis or two."""
    expected, rank = case.expected, case.expected.ndim
    for kept in [k for n in (1, 2) for k in itertools.combinations(range(rank), n)]:
        others = tuple(axis for axis in range(rank) if axis not in kept)
        count = math.prod(expected.shape[axis] for axis in kept)
        if not others or min(expected.shape[axis] for axis in kept) < 2:
            continue
        energy = (expected**2).sum(others, keepdim=True)
        ratios = (case.actual * expected).sum(others, keepdim=True) / energy
        ratios = torch.where(energy > 0, ratios, 1.0)
        changed = (ratios - 1).abs() > 1e-6
        entries = (expected.abs() > case.tolerance).sum(others, keepdim=True)[changed]
        if expected.numel() < 2 * count + 3 or bool((entries < 3).any()):
            continue
        if float(ratios.max() - ratios.min()) <= 1e-5 * float(ratios.abs().max()) or bool(
            (ratios[changed].abs() < 1e-9).all()
        ):
            continue  # one multiple for all, or a subset
        if text := _statistic(case, ratios, kept):
            detail, formula = f"is multiplied by {text}", f"{text} × expected"
            yield _Guess("missing-factor", 5, detail, ratios * expected, formula)
            yield _Guess("per-channel-scale", 6, detail, ratios * expected, formula)
            return
        if text := _other_divisor(case, ratios, kept):
            formula = "expected × the ratio of the two"
            yield _Guess("wrong-operand", 5, f"has {text}", ratios * expected, formula)
            return
        detail = f"is a multiple of what it should be, another one at every index of {_axes(kept)}"
        formula = f"c × expected; c = {_list(ratios.flatten())}"
        bits = FITTED * min(6, int(changed.sum()))
        yield _Guess("per-channel-scale", bits, detail, ratios * expected, formula)


def _statistic(case: _Case, ratios: Tensor, kept: Axes) -> str:
    """The name of ratios that are a power of a variance plus ε, maybe times a known tensor."""
    partners = [("", ratios)]
    for name, view in case.views:
        if all(view.shape[axis] == 1 or axis in kept for axis in range(view.ndim)):
            partners += [(f" × {name}", ratios / view), (f" / {name}", ratios * view)]
    counted = {n: t.double() for n, t in case.labels.items() if t.dtype != torch.bool}
    for name, tensor in {**case.known, **counted}.items():
        for view in _alignments(tensor, case.expected.shape):
            if tuple(view.shape) != tuple(ratios.shape) or not (view != 0).all():
                continue
            for text, quotient in ((f"{name}", ratios / view), (f"1/{name}", ratios * view)):
                number = float(quotient.mean())
                if float((quotient - number).abs().max()) <= 1e-6 * abs(number):
                    return text if abs(number - 1) < 1e-6 else f"{number:.4g} × {text}"
    shape = [case.expected.shape[axis] for axis in kept]
    for name, tensor in case.known.items():
        for group in itertools.combinations(range(tensor.ndim), len(kept)):
            others = tuple(axis for axis in range(tensor.ndim) if axis not in group)
            if [tensor.shape[axis] for axis in group] != shape or not others:
                continue
            variance = tensor.var(others, correction=0).reshape(ratios.shape)
            powers = {"1/σ": -0.5, "σ": 0.5, "1/σ²": -1, "σ²": 1}
            for (partner, ratio), (text, power) in itertools.product(partners, powers.items()):
                excess = ratio.clamp(min=0) ** (1 / power) - variance
                epsilon = excess.mean()
                uneven = ((excess - epsilon).abs() > 1e-6 * variance + 1e-9).any()
                if -1e-9 <= epsilon <= 1e-2 and not uneven:
                    return f"{text} of {name} over {_axes(others)}{partner}"
    return ""


def _other_divisor(case: _Case, ratios: Tensor, kept: Axes) -> str:
    """Whether 1/σ, of √(v + ε), is that of a variance v divided by n − 1, or the reverse:
    ratios r = √((v + ε)/(cv + ε)) of c = n/(n − 1), or its inverse, give all the same ε."""
    for name, tensor in case.known.items():
        others = tuple(axis for axis in range(tensor.ndim) if axis not in kept)
        n = math.prod(tensor.shape[axis] for axis in others)
        if tensor.shape != case.expected.shape or n < 2:
            continue
        v = tensor.var(others, correction=0, keepdim=True)
        for c, text in (
            (n / (n - 1), f"{n - 1} instead of {n}"),
            ((n - 1) / n, f"{n} instead of {n - 1}"),
        ):
            epsilon = v * (1 - c * ratios**2) / (ratios**2 - 1)
            same = (epsilon - epsilon.mean()).abs().max() <= 1e-6 * v.max()
            if same and 0 <= epsilon.mean() <= 0.1:
                return f"a 1/σ of {name} over {_axes(others)} whose variance is divided by {text}"
    return ""


# The same numbers in other places


def _rearranged(case: _Case) -> Iterator[_Guess]:
    """Axes exchanged, mirrored, slices permuted."""
    actual, expected, rank = case.actual, case.expected, case.expected.ndim
    if actual.numel() != expected.numel():
        return
    gap = (actual.flatten().sort()[0] - expected.flatten().sort()[0]).abs().max()
    if gap > max(10 * case.tolerance, 1e-9 * float(expected.abs().max())):
        return
    for order in itertools.islice(itertools.permutations(range(rank)), 1, 120):
        turned = expected.permute(order)
        moved = tuple(axis for axis in range(rank) if order[axis] != axis)
        if turned.shape == actual.shape:
            detail = f"has {_axes(moved)} exchanged"
            yield _Guess("transposed", 2 + len(moved) / 2, detail, turned)
        else:
            detail = f"holds its numbers in another order in memory: that of axes {order}"
            yield _Guess("transposed", 6, detail, turned.reshape(actual.shape))
    if not case.same_shape:
        return
    for axes in [a for n in (1, 2, 3) for a in itertools.combinations(range(rank), n)]:
        spatial = rank >= 3 and axes[0] >= max(2, rank - 3)
        if spatial or (len(axes) == 1 and expected.shape[axes[0]] >= 3):
            bits = 2 + len(axes) / 4 if spatial else 5
            yield _Guess("flipped", bits, f"is mirrored along {_axes(axes)}", expected.flip(axes))
    for axis, size in enumerate(expected.shape):
        for count in range(2, min(size, 4096) + 1):
            if size % count == 0 and (count <= 16 or count == size):
                yield from _permuted(case, axis, count)


def _permuted(case: _Case, axis: int, count: int) -> Iterator[_Guess]:
    """Slices along an axis exchanged, or chunks of slices such as the gates of a recurrence."""
    first = case.expected.movedim(axis, 0)
    chunks, found = (t.movedim(axis, 0).reshape(count, -1) for t in (case.expected, case.actual))
    weights = torch.arange(1, chunks.shape[1] + 1, dtype=chunks.dtype).cos()
    source = torch.empty(count, dtype=torch.long)
    source[(found @ weights).argsort(stable=True)] = (chunks @ weights).argsort(stable=True)
    moved = (source != torch.arange(count)).nonzero().flatten()
    if not len(moved):
        return
    what = "slices" if count == len(first) else "chunks"
    how = f"{what} {_list(moved)} of {count} along axis {axis} exchanged"
    if len(moved) > 2:
        how = f"the {count} {what} along axis {axis} in the order {_list(source)}"
    bits = 2 + min(math.lgamma(count + 1) / math.log(2), len(moved) * math.log2(count))
    predicted = chunks[source].reshape(first.shape).movedim(0, axis)
    yield _Guess("permuted", bits, f"has {how}", predicted)


def _shifted(case: _Case) -> Iterator[_Guess]:
    """Rolled along an axis or two, with the other end, zeros or anything else in the gap."""
    actual, expected, rank = case.actual, case.expected, case.expected.ndim
    steps = (1, -1, 2, -2, 3, -3)
    moves: list[tuple[Axes, Axes]] = [((axis,), (k,)) for axis in range(rank) for k in steps]
    if rank >= 2:
        moves += [((rank - 2, rank - 1), pair) for pair in itertools.product(steps, steps)]
    for axes, by in moves:
        if any(abs(k) >= expected.shape[axis] for axis, k in zip(axes, by, strict=True)):
            continue
        rolled, inside = expected.roll(by, axes), torch.ones_like(case.wrong)
        for axis, k in zip(axes, by, strict=True):
            places = torch.arange(expected.shape[axis]) - k
            inside &= _along((places >= 0) & (places < len(places)), axis, rank)
        informative = int((case.wrong & inside).sum())
        if informative < 3 or not _close(actual[inside], rolled[inside], case.tolerance):
            continue
        how = " and ".join(f"by {k} along axis {a}" for a, k in zip(axes, by, strict=True))
        bits = 4 + math.log2(len(by) * max(map(abs, by)))
        if min(expected.shape[axis] for axis in axes) > 2:
            yield _Guess("shifted", bits, f"is rolled {how}", rolled)
        yield _Guess("shifted", bits, f"is shifted {how}, with zeros in the gap", rolled * inside)
        if informative >= 2 * int((~inside & case.wrong).sum()) and int(inside.sum()) >= 6:
            detail = f"is shifted {how}, as if padding had not been cut off"
            yield _Guess("shifted", bits + 3, detail, torch.where(inside, rolled, actual))


# Factors


def _factors(case: _Case) -> Iterator[_Guess]:
    """A function of a known tensor is missing or there twice."""
    actual, expected = case.actual, case.expected
    if expected.numel() < 3:
        return
    for name, view in case.views if expected.any() else ():
        some = _sample(view, expected)
        for k, (label, function) in enumerate(FACTORS.items()):
            text, values = label.format(name, name), function(some)
            if _close(_sample(actual, expected) * values, _sample(expected), case.tolerance):
                kind, detail = "missing-factor", f"lacks the factor {text}"
                if text in case.drivers:
                    kind, detail = "ignores-upstream", "lacks the upstream gradient as a factor"
                formula, product = f"{case.name} × {text} = expected", actual * function(view)
                yield _Guess(kind, 1.5 + k / 4, detail, expected, formula, product)
            if _close(_sample(actual, expected), _sample(expected) * values, case.tolerance):
                detail, formula = f"has the factor {text} once too often", f"expected × {text}"
                predicted = expected * function(view)
                yield _Guess("missing-factor", 2 + k / 4, detail, predicted, formula)
    ones = torch.ones((1,) * expected.ndim, dtype=expected.dtype)
    for driver in [("", ones), *(item for item in case.views if item[0] in case.drivers)]:
        yield from _products(case, *driver)


def _products(case: _Case, driver: str, base: Tensor) -> Iterator[_Guess]:
    """The upstream gradient, or 1, times the wrong function of the wrong tensor."""
    right, found = [], []
    functions: dict[str, Function] = {"1": torch.ones_like, **FACTORS, **MASKS}
    for (name, view), (label, function) in itertools.product(case.views, functions.items()):
        if not driver and (label == "1" or name in case.drivers):
            continue
        values = _sample(base, case.expected) * function(_sample(view, case.expected))
        if _close(values, _sample(case.expected), case.tolerance):
            right.append((label, label.format(name, name)))
        if _close(values, _sample(case.actual), case.tolerance):
            found.append((label, name, view, function))
    instead = right[0][1] if right else ""
    whole = instead or (case.recognised[0][0].text if case.recognised else "")
    for label, name, view, function in found:
        predicted = (base * function(view)).expand_as(case.expected)
        text = label.format(name, name)
        formula = f"{driver} × {text}" if driver else text
        shares = any(_adds_up(view.expand_as(case.expected), axis) for axis in range(view.ndim))
        if label == "1":
            detail = "is the upstream gradient itself" + (
                f" where {whole} belongs" if whole else ""
            )
            if not case.expected.any():
                detail += ", where the derivative is 0 throughout: a straight-through estimator?"
            yield _Guess("missing-factor", 2 if whole else 6, detail, predicted, driver)
        elif any(label == other for other, _ in right):
            detail = f"has {text} where {instead} belongs"
            yield _Guess("wrong-operand", 3, detail, predicted, formula)
        elif shares and label in ("{}(1 − {})", "{}"):
            detail = "lacks the terms off the diagonal of the Jacobian matrix"
            yield _Guess("missing-term", 3, detail, predicted, formula)
        elif right:
            detail = f"has the factor {text} where {instead} belongs"
            part = any(text in other and text != other for _, other in right)
            yield _Guess("missing-factor", 6 if part else 6.5, detail, predicted, formula)
            yield _Guess("wrong-operand", 6.5 if part else 6, detail, predicted, formula)
        elif len(case.drivers) == 1:
            detail = f"is {formula}, which it should not be"
            bits = 8 if driver else 4
            yield _Guess("wrong-operand", bits, detail, predicted, formula)


def _masks(case: _Case) -> Iterator[_Guess]:
    """Zero where it should not be, or not zero where it should: in slices or on a condition."""
    wrong, right = case.wrong, case.right
    lost = bool((case.actual[wrong].abs() <= case.tolerance).all())
    spared = bool((case.expected[wrong].abs() <= case.tolerance).all())
    if not (lost or spared) or not right.any():
        return
    predicted = torch.where(wrong, case.actual, case.expected)
    if lost and (box := _box(wrong, right)):
        yield _Guess("subset", box[0], f"is there only {box[1]}, and zero elsewhere", predicted)
    found = "has a mask too many: it is 0" if lost else "lacks a mask: it is not 0"
    for where, view, arbitrary in _regions(case):
        region = view.expand(case.expected.shape)
        if (wrong & ~region).any() or (right & region).any():
            continue
        if int((wrong & region).sum()) < int(region.sum()) / 2 and not lost:
            continue
        if not arbitrary or _surprise(wrong, right) >= 8:
            detail, formula = f"{found} where {where}", "expected everywhere else"
            chance = max(0, 8 - view.numel()) if arbitrary else 0  # few entries: easily met
            yield _Guess("missing-factor", 3 + chance, detail, predicted, formula)
            if view.shape == case.expected.shape:  # a mask that is not in the forward is a branch
                bits = (2.5 if lost and not spared else 3.5) + chance
                detail = f"is {'0' if lost else 'not 0'} where {where}, and right elsewhere"
                yield _Guess("wrong-branch", bits, detail, predicted, formula)


def _other_mask(case: _Case) -> Iterator[_Guess]:
    """The upstream gradient times another mask than that of the expected gradient."""
    for driver in case.drivers.values():
        live = driver.abs() > 1e-9
        if driver.shape != case.expected.shape or int(live.sum()) < 8:
            continue
        expected, actual = (t[live] / driver[live] for t in (case.expected, case.actual))
        value = float(expected.abs().max())
        drawn = actual.abs() > value / 2
        lost, gained = drawn < (expected.abs() > value / 2), drawn > (expected.abs() > value / 2)
        masked = _close(expected * (expected - value), 0 * expected, 1e-9 * value**2)
        if masked and bool(lost.any()) and bool(gained.any()):
            keep = (case.actual / torch.where(live, driver, 1.0)).abs() > value / 2
            detail = "is the upstream gradient times another mask than it should be"
            formula = f"{value:.4g} × upstream in other places than expected"
            yield _Guess("wrong-operand", 6, detail, value * driver * keep, formula)


def _drawn_mask(case: _Case) -> Iterator[_Guess]:
    """0 at some entries, which no condition tells apart, and one multiple at all others."""
    ratio = case.actual / torch.where(case.expected == 0, TINY, case.expected)
    live = case.expected.abs() > case.tolerance
    kept = live & (case.actual.abs() > case.tolerance)
    if min(int(kept.sum()), int((live & ~kept).sum())) < 3 or _surprise(live & ~kept, kept) < 12:
        return
    multiple = float(ratio[kept].median())
    text = "a mask too many" + (f", of 0 and {multiple:.4g}" if abs(multiple - 1) > 1e-6 else "")
    detail = f"has {text}, as of a dropout that is not in the forward"
    predicted = multiple * case.expected * kept
    yield _Guess("missing-factor", 24, detail, predicted, f"{multiple:.4g} × expected, or 0")


def _regions(case: _Case) -> Iterator[tuple[str, Tensor, bool]]:
    """Conditions on known tensors, in shapes that expand to the gradient's; and whether chance
    could have met one of them easily."""
    for name, view in case.views:
        conditions = {">": view > 0, "≤": view <= 0, "<": view < 0, "≥": view >= 0, "=": view == 0}
        for symbol, region in conditions.items():
            yield f"{name} {symbol} 0", region, True
    for name, labels in case.labels.items():
        for value in labels.unique()[:16].tolist():
            for view in _alignments(labels == value, case.expected.shape):
                yield f"{name} = {value}", view, False


def _branches(case: _Case) -> Iterator[_Guess]:
    """Wrong on one side of a threshold only; or a multiple that differs on the sides of zero."""
    wrong, right, expected = case.wrong, case.right, case.expected
    for name, view in case.views:
        if view.shape != expected.shape:
            continue
        sides = {f"{name} >": view, f"{name} <": -view, f"|{name}| >": view.abs()}
        sides[f"|{name}| <"] = -view.abs()
        for text, values in sides.items() if min(int(wrong.sum()), int(right.sum())) >= 3 else []:
            last, first = float(values[right].max()), float(values[wrong].min())
            if last < first and _surprise(wrong, right) >= 14:
                turn = -1 if text.endswith("<") else 1
                edge = turn * _roundest(last, first)
                formula = f"expected everywhere else; it begins to be wrong at {turn * first:.4g}"
                predicted = torch.where(wrong, case.actual, expected)
                yield _Guess("wrong-branch", 9, f"is wrong only where {text} {edge:g}", predicted,
                             formula)  # fmt: skip
                if not expected[wrong].any():
                    detail = f"lacks a mask: it is not 0 where {text} {edge:g}"
                    yield _Guess("missing-factor", 9.5, detail, predicted, formula)
        above, below = view > 0, view <= 0
        if min(int(((wrong | right) & side).sum()) for side in (above, below)) >= 4:
            over, under = (_ratio(case.actual[s], expected[s]) for s in (above, below))
            text = f"{over:.4g} where {name} > 0 and by {under:.4g} elsewhere"
            predicted = torch.where(above, over, under) * expected
            if abs(over - under) > 1e-4:
                yield _Guess("missing-factor", 7, f"is multiplied by {text}", predicted)


# Terms


def _terms(case: _Case) -> Iterator[_Guess]:
    """A multiple of a known tensor too many, or one too few."""
    difference = case.actual - case.expected
    ones = ("1", torch.ones((1,) * difference.ndim, dtype=difference.dtype))
    for name, view in [ones, *case.views] if difference.numel() >= 5 else []:
        factor = _ratio(difference, view.expand_as(difference))
        common = min((1, 2, 0.5, 0.1, 0.01, 1e-3, 1e-4, 5e-4), key=lambda c: abs(c - abs(factor)))
        named = abs(common - abs(factor)) <= 1e-6 * common
        factor = math.copysign(common, factor) if named else factor
        natural = name == case.own or name in case.drivers
        bits = (3 if natural else 5) + (0 if named else FITTED / 2)
        text = f"{abs(factor):.4g}" if name == "1" else f"{abs(factor):.4g} × {name}"
        formula = f"expected {'−' if factor < 0 else '+'} {text}"
        missing = factor < 0 and natural
        kind = "missing-term" if missing else "extra-term"
        detail = f"lacks the term {text}" if missing else f"has a term too many: {text}"
        detail += " (weight decay)" if name == case.own else ""
        yield _Guess(kind, bits, detail, case.expected + factor * view, formula)


def _invariants(case: _Case) -> Iterator[_Guess]:
    """The mean or variance term of a normalisation is missing, or the sum in a softmax: expected is
    orthogonal along some axes to something that the gradient is not orthogonal to."""
    expected = case.expected
    same = {name: t for name, t in case.known.items() if t.shape == expected.shape}
    same = {name: t for name, t in same.items() if name not in case.drivers}
    same |= {f"exp({n})": t.exp() for n, t in same.items() if n.startswith("output")}
    for shape, axes in _normalised_axes(expected.shape):
        right, wrong = expected.reshape(shape), case.actual.reshape(shape)
        slices = expected.numel() // math.prod(shape[axis] for axis in axes)
        ones = torch.ones_like(right)
        over = f"over {_axes(axes)}" + ("" if shape == tuple(expected.shape) else " of groups")

        def broken(term: Tensor, a: Tensor = wrong, e: Tensor = right, axes: Axes = axes) -> bool:
            return bool((e * term).sum(axes).norm() <= 1e-3 * (a * term).sum(axes).norm())

        lost_mean = broken(ones)
        choices = [(0.0, "mean term", [ones], lost_mean)]
        both = "mean and variance terms"
        for name, tensor in same.items():
            values = tensor.reshape(shape)
            centred = values - values.mean(axes, keepdim=True)
            lost_variance = broken(centred)
            choices += [
                (1.0, f"term that is a multiple of {name}", [values], lost_mean or broken(values)),
                (0.8, f"variance term of {name}", [centred], lost_variance),
                (2.0, f"{both} of {name}", [ones, centred], lost_mean and lost_variance),
            ]
        for bits, text, basis, is_broken in choices:
            if not is_broken or expected.numel() < 2 * slices * len(basis) + 3:
                continue
            rest = wrong - right
            for term in basis:  # orthogonal to each other
                energy = (term**2).sum(axes, keepdim=True).clamp(min=TINY)
                rest = rest - (rest * term).sum(axes, keepdim=True) / energy * term
            predicted = (wrong - rest).reshape(expected.shape)
            bits += 3 + 0.2 * math.log2(slices + 1)
            formula = "expected + such a term; expected is orthogonal to it, the gradient is not"
            yield _Guess("missing-term", bits, f"lacks the {text} {over}", predicted, formula)


def _own_statistics(case: _Case) -> Iterator[_Guess]:
    """The terms of a normalisation too many: multiples of 1 and of x, another one in each slice."""
    rest = case.actual - case.expected
    same = {name: t for name, t in case.known.items() if t.shape == rest.shape}
    for shape, axes in _normalised_axes(rest.shape):
        slices = rest.numel() // math.prod(shape[axis] for axis in axes)
        if rest.numel() < 4 * slices + 3:
            continue
        seen = rest.reshape(shape)
        mean = seen.mean(axes, keepdim=True)
        for name, tensor in same.items():
            if name in case.drivers:
                continue
            values = tensor.reshape(shape)
            centred = values - values.mean(axes, keepdim=True)
            energy = centred.square().sum(axes, keepdim=True).clamp(min=TINY)
            fitted = mean + (seen * centred).sum(axes, keepdim=True) / energy * centred
            detail = (
                f"has multiples of 1 and of {name} over {_axes(axes)} too many, as of a "
                "normalisation by its own statistics"
            )
            predicted = case.expected + fitted.reshape(rest.shape)
            formula = f"expected plus multiples of 1 and of {name} over {_axes(axes)}"
            yield _Guess("extra-term", 9 + 0.2 * math.log2(slices + 1), detail, predicted, formula)


def _targets(case: _Case) -> Iterator[_Guess]:
    """In classification: the −1 at the target is missing, elsewhere, or smoothed."""
    rank = case.expected.ndim
    for axis in {1, rank - 1} if rank >= 2 else ():
        gap, right = ((t.movedim(axis, -1)) for t in (case.actual - case.expected, case.expected))
        classes, shape = right.shape[-1], right.shape[:-1]
        labels_of = {f"the class in {name}": labels for name, labels in case.labels.items()}
        places = {text: labels for text, labels in labels_of.items() if labels.shape == shape}
        hit = case.wrong.movedim(axis, -1)
        if bool((hit.sum(-1) == 1).all()) and bool((right[hit] < 0).all()):
            places["one place in every row"] = hit.long().argmax(-1)
        if classes < 3 or math.prod(shape) < 2:
            continue
        flat = [view.movedim(axis, -1)[..., 0] for _, view in case.views if view.shape[axis] == 1]
        for (place, labels), weight in itertools.product(places.items(), [torch.ones(()), *flat]):
            valid = ((labels >= 0) & (labels < classes)).unsqueeze(-1)
            index = labels.long().clamp(0, classes - 1).unsqueeze(-1)
            hot = torch.zeros_like(gap).scatter(-1, index, 1.0) * valid * weight.unsqueeze(-1)
            share = hot.sum(-1, keepdim=True) / classes
            for kind, bits, detail, term in (
                ("missing-term", 2.5, f"lacks the −1 at {place}", hot),
                ("shifted", 5.0, f"has the −1 one after {place}", hot - hot.roll(1, -1)),
                ("shifted", 5.0, f"has the −1 one before {place}", hot - hot.roll(-1, -1)),
                ("extra-term", 7.0, f"has a term too many: {place} is smoothed", hot - share),
            ):
                factor = _ratio(gap, term)
                predicted = case.expected + factor * term.movedim(-1, axis)
                formula = f"expected + {factor:.4g} × such a term"
                yield _Guess(kind, bits, detail, predicted, formula)


def _softmax(case: _Case) -> Iterator[_Guess]:
    """A softmax whose sum runs over the wrong axis."""
    same = {name: t for name, t in case.known.items() if t.shape == case.expected.shape}
    drivers = [name for name in same if name in case.drivers]
    for (name, shares), driver in itertools.product(same.items(), drivers):
        if not any(_adds_up(shares, axis) for axis in range(shares.ndim)):
            continue
        for axis in range(shares.ndim):
            product = shares * same[driver]
            predicted = product - shares * product.sum(axis, keepdim=True)
            formula = f"{name} × ({driver} − Σ {name} × {driver} over axis {axis})"
            yield _Guess("wrong-reduction", 3, f"sums over axis {axis}", predicted, formula)


# Other upstream gradients


def _responses(case: _Case) -> Iterator[_Guess]:
    """Right, but for another upstream gradient: all ones, rolled, averaged, without one output."""
    if not case.upstream:
        return
    value = float(case.upstream[0].flatten()[0])
    if value not in (0.0, 1.0) and all(bool((u == value).all()) for u in case.upstream):
        detail, predicted = f"ignores the upstream gradient, {value:.4g}", case.expected / value
        yield _Guess("ignores-upstream", 1.5, detail, predicted, "expected / upstream")
    for kind, bits, text, upstreams in _replacements(case):
        response = case.respond(upstreams)
        if case.calls < 0:
            return
        if response is not None:
            detail = f"is right for another upstream gradient: {text}"
            yield _Guess(kind, bits, detail, response, "the gradient for that")


def _replacements(case: _Case) -> Iterator[tuple[str, float, str, list[Tensor]]]:
    """Other upstream gradients."""
    ones = [torch.ones_like(upstream) for upstream in case.upstream]
    yield "ignores-upstream", 1.5, "all ones", ones
    for k, (name, upstream) in enumerate(case.drivers.items()):
        for kind, bits, text, changed in _changes(case, name, upstream):
            yield kind, bits, text, case.replaced(k, changed)


def _mirrored_kernel(case: _Case) -> Iterator[_Guess]:
    """A convolution with a mirrored kernel: it answers a mirror image with a mirror image."""
    for k, upstream in enumerate(case.upstream):
        for first in {2, upstream.ndim - 1} if case.expected.ndim == upstream.ndim >= 3 else ():
            axes = tuple(range(first, upstream.ndim))
            response = case.respond(case.replaced(k, upstream.flip(axes)))
            if response is not None:
                detail = f"is computed with a kernel mirrored along {_axes(axes)}"
                formula = "the mirrored gradient for the mirrored upstream gradient"
                yield _Guess("flipped", 3, detail, response.flip(axes), formula)


def _changes(case: _Case, name: str, upstream: Tensor) -> Iterator[tuple[str, float, str, Tensor]]:
    """What may stand in for one upstream gradient."""
    if len(case.upstream) > 1:
        zero = torch.zeros_like(upstream)
        yield "ignores-upstream", 3, f"0 for {name}", zero
        yield "subset", 3.5, f"0 for {name}", zero
        yield "ignores-upstream", 3, f"1 for {name}", torch.ones_like(upstream)
    for axis, size in enumerate(upstream.shape):
        total = upstream.sum(axis, keepdim=True).expand_as(upstream)
        if size >= 2:
            yield "wrong-reduction", 5, f"{name} summed over axis {axis}", total
            yield "wrong-reduction", 5, f"{name} averaged over axis {axis}", total / size
        if size >= 3:
            yield "flipped", 6, f"{name} mirrored along axis {axis}", upstream.flip(axis)
        for by in (1, -1) if size >= 3 else ():
            rolled = upstream.roll(by, axis)
            cut = rolled.index_fill(axis, torch.tensor([0 if by == 1 else size - 1]), 0.0)
            yield "shifted", 6, f"{name} rolled by {by} along axis {axis}", rolled
            yield "shifted", 6, f"{name} shifted by {by} along axis {axis}, zero in the gap", cut
    output = name.replace("upstream", "output")
    if output in case.known and case.known[output].shape == upstream.shape:
        for j, (label, function) in enumerate(itertools.islice(FACTORS.items(), 6)):
            factor, text = function(case.known[output]), label.format(output, output)
            many, few = f"{name} × {text}, once too often", f"{name} / {text}, a missing factor"
            yield "missing-factor", 6 + j / 4, many, upstream * factor
            if bool((factor.abs() > 1e-9).all()):
                yield "missing-factor", 6 + j / 4, few, upstream / factor


def _subsets(case: _Case) -> Iterator[_Guess]:
    """Only some indices of the upstream gradient count, or some count more than others."""
    for k, upstream in enumerate(case.upstream):
        rank = upstream.ndim
        groups: list[Axes] = [(axis,) for axis in range(rank)]
        groups += [(rank - 2, rank - 1)] if rank >= 3 else []
        groups += [(0, 1)] if rank == 3 else []
        for axes in groups:
            count = math.prod(upstream.shape[axis] for axis in axes)
            if not 2 <= count <= min(64, case.calls):
                continue
            marks = torch.arange(count).reshape([upstream.shape[axis] for axis in axes])
            for axis in range(rank):
                marks = marks if axis in axes else marks.unsqueeze(axis)
            zeros = [torch.zeros_like(other) for other in case.upstream]
            masked = [upstream * (marks == index) for index in range(count)]
            found = [case.respond(case.replaced(k, part, zeros)) for part in masked]
            parts = [part for part in found if part is not None]
            if len(parts) == count:
                yield from _selections(case, torch.stack(parts), axes)
                yield from _weighted(case, torch.stack(parts), axes)


def _selections(case: _Case, parts: Tensor, axes: Axes) -> Iterator[_Guess]:
    """Guesses from what each index contributes; all of them add up to the expected gradient."""
    count, total, where = len(parts), parts.sum(0), _axes(axes)
    base = case.expected - total  # from other outputs
    for which, index in (("last", -1), ("first", 0)):
        detail = f"counts only the {which} index of {where}"
        yield _Guess("subset", 3, detail, base + parts[index])
        detail = f"counts all but the {which} index of {where}"
        yield _Guess("subset", 3.5, detail, base + total - parts[index])
    present = parts != 0
    several = int((present.sum(0) > 1).sum()) >= 2
    orders = {"last": range(count), "first": range(count - 1, -1, -1)}
    for which, indices in orders.items() if several else ():
        kept = torch.zeros_like(total)
        for index in indices:
            kept = torch.where(present[index], parts[index], kept)
        detail = f"kept the {which} contribution along {where} where several add up"
        yield _Guess("overwritten", 4, detail, base + kept)
    if len(axes) == 1 and axes[0] < total.ndim and total.shape[axes[0]] == count:
        diagonal = torch.diagonal(parts, dim1=0, dim2=axes[0] + 1).movedim(-1, axes[0])
        detail = f"lacks the cross terms between the indices of {where}"
        yield _Guess("missing-term", 3.5, detail, base + diagonal)


def _weighted(case: _Case, parts: Tensor, axes: Axes) -> Iterator[_Guess]:
    """The contributions with fitted weights."""
    count, flat, where = len(parts), parts.reshape(len(parts), -1), _axes(axes)
    base = case.expected - parts.sum(0)
    present = flat.abs() > 1e-12 * flat.abs().max()
    used = present.any(0).nonzero().flatten()
    some = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(0))[:4000]]
    if len(some) < count:
        return
    target = (case.actual - base).flatten()[some].unsqueeze(1)
    fit = torch.linalg.lstsq(flat[:, some].T, target, driver="gelsd")
    weights, whole = fit.solution.flatten(), fit.solution.flatten().round()
    unequal = ((weights - 1).abs() > 1e-5).nonzero().flatten()
    if int(fit.rank) < count or not len(unequal) or bool((present.sum(1)[unequal] < 3).any()):
        return
    predicted = base + torch.tensordot(weights, parts, 1)
    bits = 4 + min(count, len(unequal) * math.log2(count))
    listed = _list(weights.round(decimals=6) + 0.0)
    formula = f"Σ c × what every index of {where} contributes; c = {listed}"
    if bool(((weights - whole).abs() < 1e-5).all()) and whole.min() >= 0:
        if whole.max() == 1:
            detail = f"counts only the indices {_list(whole.nonzero().flatten())} of {where}"
            yield _Guess("subset", bits, detail, predicted, formula)
        elif whole.min() >= 1 and whole.max() > whole.min():
            detail = f"counts some indices of {where} more than once"
            yield _Guess("extra-term", bits, detail, predicted, formula)
    elif len(used) >= 2 * count + 3 and float(weights.max() - weights.min()) > 1e-5:
        for name, tensor in [*case.known.items(), *case.views]:
            for text, values in ((name, tensor), (f"1/{name}", 1 / tensor)):
                if tensor.numel() == count and _close(values.flatten(), weights, 1e-9):
                    detail = f"weighs the indices of {where} by {text}"
                    yield _Guess("missing-factor", 5, detail, predicted, formula)
        detail, bits = f"weighs the indices of {where} differently", FITTED * min(6, len(unequal))
        yield _Guess("per-channel-scale", bits, detail, predicted, formula)


# Contractions and sums


def _operands(case: _Case) -> Iterator[_Guess]:
    """Sums and matrix products of known tensors where others belong."""
    right = case.recognised
    instead = f" where {right[0][0].text} belongs" if right else ""
    shapes = [upstream.shape for upstream in case.upstream]
    for driver, tensor in [item for item in case.known.items() if item[1].shape in shapes]:
        for contraction in _contractions(case, tensor, case.actual.shape):
            predicted = contraction.value
            if driver in case.drivers and contraction[:3] in [other[:3] for other, _ in right]:
                continue
            if right and not _close(predicted, case.actual, case.tolerance):
                predicted = right[0][1] * predicted
            if not _close(predicted, case.actual, case.tolerance):
                continue
            text = contraction.text.replace("upstream", driver)
            plain = not contraction.operand or (contraction.rule[0] == "@" and not right)
            operands = {other.operand for other, _ in right if other.rule != contraction.rule}
            if contraction.rule.startswith("Σ") and contraction.operand in operands:
                kind, bits, detail = "wrong-reduction", 2.5, f"is {text}{instead}"
            elif driver in case.drivers and plain:
                kind, bits = "missing-factor", 4 if right else 7
                detail = f"is {text}{instead}: a factor is missing"
            else:
                alike = any(other.rule[0] == contraction.rule[0] for other, _ in right)
                kind, bits, detail = "wrong-operand", 3 if alike else 7, f"is {text}{instead}"
            yield _Guess(kind, bits, detail, predicted, text)
    if right and right[0][0].rule.startswith("Σ"):
        share = case.expected.numel() / case.upstream[0].numel()
        formula = f"the mean instead of {right[0][0].text}"
        detail = "is averaged instead of summed"
        yield _Guess("wrong-reduction", 1.5, detail, case.expected * share, formula)


def _scattered(case: _Case) -> Iterator[_Guess]:
    """An embedding's gradient: one contribution to a row is kept, or padding is not left out."""
    width = case.expected.shape[1:].numel()
    for (name, labels), upstream in itertools.product(case.labels.items(), case.upstream):
        if labels.dtype == torch.bool or upstream.numel() != labels.numel() * width:
            continue
        index, rows = labels.flatten().long(), upstream.reshape(labels.numel(), width)
        shape = case.expected.shape
        if len(shape) < 2 or not 0 <= int(index.min()) <= int(index.max()) < shape[0]:
            continue
        zeros = torch.zeros(shape[0], width, dtype=rows.dtype)
        sums = zeros.index_add(0, index, rows).reshape(shape)
        padding = (case.expected != 0).flatten(1).any(1)
        for which, order in (("last", range(len(index))), ("first", range(len(index) - 1, -1, -1))):
            kept = zeros.clone()
            for k in order:
                kept[index[k]] = rows[k] * padding[index[k]]
            detail = f"kept the {which} contribution where an index occurs several times in {name}"
            yield _Guess("overwritten", 2, detail, kept.reshape(shape))
        for kind, bits in (("missing-factor", 3), ("extra-term", 4)):
            detail = f"counts an index of {name} that should be left out, such as padding"
            yield _Guess(kind, bits, detail, sums, f"upstream added up over equal {name}")


def _contractions(
    case: _Case, upstream: Tensor, shape: torch.Size, only: str | None = None
) -> Iterator[_Contraction]:
    """Gradients of this shape that are sums of the upstream gradient, or products with it."""
    operands = [(name, t) for name, t in case.known.items() if name not in case.drivers]
    turns = list(itertools.product((False, True), repeat=3))
    for (name, tensor), (turned, other, swapped) in itertools.product(operands, turns):
        if min(upstream.ndim, tensor.ndim, len(shape)) < 2 or only not in (None, name):
            continue
        pair = (upstream, tensor)
        if upstream.ndim > 2 == len(shape) and upstream.shape[:-1] == tensor.shape[:-1]:
            pair = (upstream.flatten(0, -2), tensor.flatten(0, -2))
        left, right = pair[0].mT if turned else pair[0], pair[1].mT if other else pair[1]
        texts = ["upstream" + "ᵀ" * turned, name + "ᵀ" * other]
        if swapped:
            left, right, texts = right, left, texts[::-1]
        batch = left.shape[:-2] or right.shape[:-2]
        fits = left.shape[-1] == right.shape[-2] and right.shape[:-2] in (batch, ())
        if fits and (*batch, left.shape[-2], right.shape[-1]) == shape:
            yield _Contraction(f"@ {turned, swapped}", name, " @ ".join(texts), left @ right)
    sums = [
        axes
        for count in range(1, upstream.ndim + 1)
        for axes in itertools.combinations(range(upstream.ndim), count)
        if [n for axis, n in enumerate(upstream.shape) if axis not in axes] == list(shape)
    ]
    for name, tensor in [item for item in operands if sums and item[1].shape == upstream.shape]:
        for grouped, axes in _normalised_axes(tensor.shape):
            if grouped == tuple(tensor.shape):
                variance, mean = torch.var_mean(tensor, axes, correction=0, keepdim=True)
                operands.append((f"normalised {name}", (tensor - mean) / (variance + 1e-5).sqrt()))
    for axes in sums:
        rule, over = f"Σ over {axes}", f"over {_axes(axes)}"
        yield _Contraction(rule, "", f"Σ upstream {over}", upstream.sum(axes))
        for name, tensor in operands if only != "" else []:
            for view in _alignments(tensor, upstream.shape):
                value = (upstream * view).sum(axes)
                yield _Contraction(rule, name, f"Σ upstream × {name} {over}", value)


def _repeated(case: _Case) -> Iterator[_Guess]:
    """Summed or averaged along an axis, and repeated there."""
    for axis, size in enumerate(case.expected.shape):
        total = case.expected.sum(axis, keepdim=True).expand_as(case.expected)
        for how, predicted in (("summed", total), ("averaged", total / size)):
            detail = f"is {how} over axis {axis} and repeated along it"
            yield _Guess("wrong-reduction", 3, detail, predicted)


def _reductions(case: _Case) -> Iterator[_Guess]:
    """Of another shape: not summed, summed too far, an axis of size 1 left over, not cropped."""
    actual, expected, shape = case.actual, case.expected, tuple(case.actual.shape)
    if _large_axes(actual) == _large_axes(expected) or actual.numel() == expected.numel():
        detail = f"has the shape {shape} instead of {tuple(expected.shape)}"
        formula = f"{case.name} in the right shape = expected"
        observed = actual.reshape(expected.shape)
        yield _Guess("wrong-reduction", 2, detail, expected, formula, observed)
    for large, small in ((actual, expected), (expected, actual)):
        ranks = range(large.ndim)
        for axes in [a for n in ranks for a in itertools.combinations(ranks, n + 1)]:
            for how, reduced in (("summed", large.sum(axes)), ("averaged", large.mean(axes))):
                if _large_axes(reduced) != _large_axes(small) or large.numel() == small.numel():
                    continue
                over, reduced = f"{how} over {_axes(axes)}", reduced.reshape(small.shape)
                if large is actual:
                    detail, formula = f"is not {over}: its shape is {shape}", f"{case.name} {over}"
                    formula += " = expected"
                    yield _Guess("wrong-reduction", 2.5, detail, expected, formula, reduced)
                else:
                    detail = f"is {over}, which it should not be"
                    yield _Guess("wrong-reduction", 2.5, detail, reduced, f"expected {over}")
    if actual.ndim == expected.ndim:
        middle = actual
        for axis, size in enumerate(expected.shape):
            border = max(actual.shape[axis] - size, 0) // 2
            middle = middle.narrow(axis, border, min(size, actual.shape[axis]))
        formula = f"{case.name} without its border = expected"
        detail = f"still has the padding: its shape is {shape}"
        yield _Guess("shifted", 3, detail, expected, formula, middle)


def _precision(case: _Case) -> Iterator[_Guess]:
    """Rounded to a shorter type, or off by no more than that."""
    actual, expected, size = case.actual, case.expected, float(case.expected.abs().max())
    live = expected != 0
    relative = ((actual - expected).abs() / expected.abs())[live]
    cosine = float((actual - expected).flatten() @ expected.flatten())
    cosine /= case.error * float(expected.norm()) + TINY
    random = len(relative) >= 16 and abs(cosine) < 2.5 / len(relative) ** 0.5
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        unit = torch.finfo(dtype).eps / 2
        coarse = int((expected.to(dtype).double() != expected).sum()) >= 3
        fits = coarse and bool((actual.to(dtype).double() == actual).all())
        worst = float((actual - expected).abs().max()) / size
        rounded = random and float(relative.median()) >= 0.1 * unit
        bound = 4 * size if dtype == torch.float32 else 1.1 * expected.abs()
        rounded &= bool(((actual - expected).abs() <= unit * bound).all())
        if unit / 4 <= worst <= 64 * unit and (fits or rounded):
            why = f"every entry fits {dtype}" if fits else "the errors look like rounding"
            formula = f"expected to {worst:.0e} of its largest entry; {why}"
            detail = f"is right to the precision of {str(dtype).removeprefix('torch.')} only"
            yield _Guess("wrong-precision", 3, detail, actual, formula)
            return


OTHER_SHAPES: list[Callable[[_Case], Iterator[_Guess]]] = [_rearranged, _reductions]
FAMILIES: list[Callable[[_Case], Iterator[_Guess]]] = [
    *(_constants, _rearranged, _shifted, _channels, _factors, _masks, _branches, _terms),
    *(_invariants, _own_statistics, _targets, _softmax, _responses, _mirrored_kernel),
    *(_subsets, _operands),
    *(_scattered, _other_mask, _drawn_mask, _repeated, _precision),
]


# Small tools


def _ratio(left: Tensor, right: Tensor) -> float:
    """The number that comes nearest to left / right."""
    return float((left * right).sum() / (right * right).sum().clamp(min=TINY))


def _close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Equal up to rounding, for a first look; `_judge` looks again."""
    limit = max(1e-6 * float(right.norm()), 3 * tolerance * math.sqrt(max(right.numel(), 1)))
    return right.numel() > 0 and float((left - right).norm()) <= limit


def _sample(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Some 400 entries of the tensor, broadcast to the shape of another one."""
    flat = tensor.expand_as(tensor if like is None else like).reshape(-1)
    return flat[:: max(1, flat.numel() // 400)]


def _alignments(tensor: Tensor, shape: torch.Size) -> list[Tensor]:
    """The tensor with axes of size 1 added such that it broadcasts to the shape, in every way."""
    found = []
    for start in range(len(shape) - tensor.ndim + 1) if tensor.numel() > 1 else ():
        padded = (1,) * start + tuple(tensor.shape) + (1,) * (len(shape) - tensor.ndim - start)
        if all(size in (1, full) for size, full in zip(padded, shape, strict=True)):
            found.append(tensor.reshape(padded))
    return found


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """The vector along one of so many axes."""
    return vector.reshape([-1 if k == axis else 1 for k in range(rank)])


def _large_axes(tensor: Tensor) -> list[int]:
    """The shape without axes of size 1."""
    return [size for size in tensor.shape if size > 1]


def _plain_first(group: Axes) -> tuple[int, int]:
    """The order of groups of axes: few first; single ones from the left, others from the right."""
    return len(group), group[0] if len(group) == 1 else -group[0]


def _numbered(word: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The tensors with names, which have numbers if there are several."""
    return {f"{word} {k}" if len(tensors) > 1 else word: t for k, t in enumerate(tensors)}


def _normalised_axes(shape: torch.Size) -> list[tuple[tuple[int, ...], Axes]]:
    """Shapes to see a tensor in, with the axes over which a normalisation may reduce there."""
    rank, full = len(shape), tuple(shape)
    sets = [(axis,) for axis in range(rank)] + [tuple(range(k, rank)) for k in range(rank)]
    sets += [tuple(axis for axis in range(rank) if axis != 1)] if rank >= 2 else []
    views = [(full, axes) for axes in dict.fromkeys(sets)]
    for groups in range(2, min(shape[1], 33)) if rank >= 3 else ():
        if shape[1] % groups == 0:
            grouped = (shape[0], groups, shape[1] // groups, *shape[2:])
            views.append((grouped, tuple(range(2, rank + 1))))
    return [(view, axes) for view, axes in views if math.prod(view[axis] for axis in axes) >= 3]


def _box(wrong: Tensor, right: Tensor) -> tuple[float, str] | None:
    """The indices of every axis outside which everything is wrong and inside which nothing is."""
    bits, texts, inside = 3.0, [], torch.ones_like(wrong)
    for axis, size in enumerate(wrong.shape):
        rest = [k for k in range(wrong.ndim) if k != axis]
        kept, touched = (t.any(rest) if rest else t for t in (right, right | wrong))
        if bool((kept == touched).all()):
            continue
        places = kept.nonzero().flatten()
        regular = len(places.diff().unique()) <= 1
        if not regular and wrong.ndim == 1:
            return None
        bits += math.log2(size) if regular else size
        texts.append(f"at {_list(places)} of axis {axis} (size {size})")
        inside &= _along(kept, axis, wrong.ndim)
    return (bits, " and ".join(texts)) if texts and not (wrong & inside).any() else None


def _surprise(wrong: Tensor, right: Tensor) -> float:
    """The bits that it takes to say which entries are wrong, if chance chose them."""
    bad, good = int(wrong.sum()), int(right.sum())
    ways = math.lgamma(bad + good + 1) - math.lgamma(bad + 1) - math.lgamma(good + 1)
    return ways / math.log(2)


def _roundest(low: float, high: float) -> float:
    """The number of fewest decimals from low to high."""
    digits = range(-3, 17)
    return next((x for d in digits if low <= (x := round((low + high) / 2, d)) <= high), high)


def _adds_up(tensor: Tensor, axis: int) -> bool:
    """Whether the entries along the axis are shares of 1."""
    return tensor.shape[axis] > 1 and bool((tensor.sum(axis) - 1).abs().max() <= 1e-5)


def _axes(axes: Axes) -> str:
    """Axes in words."""
    text = ", ".join(map(str, axes[:-1]))
    return f"axes {text} and {axes[-1]}" if text else f"axis {axes[0]}"


def _list(numbers: Tensor) -> str:
    """The first few numbers."""
    return ", ".join(f"{n:.4g}" for n in numbers[:8].tolist()) + (", …" if len(numbers) > 8 else "")
