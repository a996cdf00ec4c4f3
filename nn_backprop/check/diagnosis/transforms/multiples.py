"""Multiples: zero, the negative, a constant, another one for each channel, or a factor that is
missing, there twice, or another one."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    TINY,
    Axes,
    adds_up,
    alignments,
    first_few,
    in_words,
    nearest_ratio,
)
from nn_backprop.check.diagnosis.case import FACTORS, Case, Function
from nn_backprop.check.diagnosis.guesses import FITTED, Guess

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


def constants(case: Case) -> Iterator[Guess]:
    """Zero, the negative, a multiple."""
    actual, expected = case.actual, case.expected
    if float(actual.abs().max()) <= case.tolerance:
        formula = f"0 everywhere; expected has entries up to {float(expected.abs().max()):.3g}"
        yield Guess("detached", 0.5, "is zero or missing", torch.zeros_like(actual), formula)
        return
    yield Guess("sign", 1, "has the wrong sign", -expected, "−expected")
    ratio = nearest_ratio(actual, expected)
    slack = min(1e-5, max(1e-9, case.tolerance / (float(expected.abs().mean()) + TINY)))
    names = [hit for hit in _known_numbers(case) if abs(hit[0] - abs(ratio)) <= slack * abs(ratio)]
    if abs(ratio + 1) < 1e-9 or not ratio:
        return
    if names:
        sign, number = "−" if ratio < 0 else "", math.copysign(names[0][0], ratio)
        said = [(f"({name})" if sign and " − " in name else name) + more for _, name, more in names]
        text = ", or ".join(said[:2])
        formula = f"{number:.4f} × expected; {abs(number):.4g} = {names[0][1]}"
        yield Guess("scale", 2, f"is multiplied by {sign}{text}", number * expected, formula)
    if expected.numel() >= 3:
        detail, formula = f"is {ratio:.4g} times what it should be", f"{ratio:.6g} × expected"
        yield Guess("scale", FITTED, detail, ratio * expected, formula)


def _known_numbers(case: Case) -> list[tuple[float, str, str]]:
    """Numbers that mistakes multiply by, with their names and what those mean; likely first."""
    found = [(2.0, "2", ""), (0.5, "½", "")]
    for size, symbol, text in _sizes(case):
        for form, multiple in MULTIPLES.items():
            found.append((multiple(size), form.replace("{}", symbol), f" with {text}"))
    for name, tensor in case.known.items():
        if tensor.numel() == 1 and (number := float(tensor)):
            found += [(number, name, ""), (1 / number, f"1/{name}", "")]
    for k in (2, 3, 4, 5):
        found += [(k**-2, "1/k²", f" with k = {k}"), (k**2, "k²", f" with k = {k}")]
    for p in (0.5, 0.1, 0.2, 0.25, 0.3, 0.4):
        text = f" with p = {p}"
        found += [(1 - p, "1 − p", text), (1 / (1 - p), "1/(1 − p)", text)]
    return [*found, (3.0, "3", "")]


def _sizes(case: Case) -> Iterator[tuple[int, str, str]]:
    """The sizes that the shapes speak of: of an axis, of adjacent axes, of all axes but one."""
    seen = {0, 1}
    for name, tensor in {**case.known, case.name: case.expected}.items():
        letters, axes = ["", "D", "ND", "NTD", "NCHW"][min(tensor.ndim, 4)], range(tensor.ndim)
        groups = [tuple(axes[i:j]) for j in axes[1:] for i in range(j)]
        groups += [tuple(axes[i:]) for i in axes]
        groups += [tuple(j for j in axes if j != i) for i in axes[1:-1]]
        for group in sorted(groups, key=_plain_first) if tensor.ndim <= 4 else []:
            size = math.prod(tensor.shape[axis] for axis in group)
            if size not in seen:
                seen.add(size)
                symbol = "·".join(letters[axis] for axis in group if tensor.shape[axis] > 1)
                text = f"{symbol} = {size}, the size of {in_words(group)} of {name}"
                yield size, f"({symbol})" if "·" in symbol else symbol, text
    for name, labels in case.labels.items():
        valid = int((labels >= 0).sum())
        if valid not in seen and labels.dtype != torch.bool:
            text = f"N = {valid}, the count of labels in {name} that are not negative"
            yield valid, "N", text


def _plain_first(group: Axes) -> tuple[int, int]:
    """The order of groups of axes: few first; single ones from the left, others from the right."""
    return len(group), group[0] if len(group) == 1 else -group[0]


def channels(case: Case) -> Iterator[Guess]:
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
        alike = float(ratios.max() - ratios.min()) <= 1e-5 * float(ratios.abs().max())
        if alike or bool((ratios[changed].abs() < 1e-9).all()):
            continue  # one multiple for all, or a subset
        if text := _statistic(case, ratios, kept):
            detail, formula = f"is multiplied by {text}", f"{text} × expected"
            yield Guess("missing-factor", 5, detail, ratios * expected, formula)
            yield Guess("per-channel-scale", 6, detail, ratios * expected, formula)
            return
        if text := _other_divisor(case, ratios, kept):
            formula = "expected × the ratio of the two"
            yield Guess("wrong-operand", 5, f"has {text}", ratios * expected, formula)
            return
        where = in_words(kept)
        detail = f"is a multiple of what it should be, another one at every index of {where}"
        formula = f"c × expected; c = {first_few(ratios.flatten())}"
        bits = FITTED * min(6, int(changed.sum()))
        yield Guess("per-channel-scale", bits, detail, ratios * expected, formula)


def _statistic(case: Case, ratios: Tensor, kept: Axes) -> str:
    """The name of ratios that are a power of a variance plus ε, maybe times a known tensor."""
    partners = [("", ratios)]
    for name, view in case.views:
        if all(view.shape[axis] == 1 or axis in kept for axis in range(view.ndim)):
            partners += [(f" × {name}", ratios / view), (f" / {name}", ratios * view)]
    counted = {n: t.double() for n, t in case.labels.items() if t.dtype != torch.bool}
    for name, tensor in {**case.known, **counted}.items():
        for view in alignments(tensor, case.expected.shape):
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
                    return f"{text} of {name} over {in_words(others)}{partner}"
    return ""


def _other_divisor(case: Case, ratios: Tensor, kept: Axes) -> str:
    """Whether 1/σ, of √(v + ε), is that of a variance v divided by n − 1, or the reverse:
    ratios r = √((v + ε)/(cv + ε)) of c = n/(n − 1), or its inverse, give all the same ε."""
    for name, tensor in case.known.items():
        others = tuple(axis for axis in range(tensor.ndim) if axis not in kept)
        n = math.prod(tensor.shape[axis] for axis in others)
        if tensor.shape != case.expected.shape or n < 2:
            continue
        v = tensor.var(others, correction=0, keepdim=True)
        texts = {n / (n - 1): f"{n - 1} instead of {n}", (n - 1) / n: f"{n} instead of {n - 1}"}
        for c, text in texts.items():
            epsilon = v * (1 - c * ratios**2) / (ratios**2 - 1)
            same = (epsilon - epsilon.mean()).abs().max() <= 1e-6 * v.max()
            if same and 0 <= epsilon.mean() <= 0.1:
                over = in_words(others)
                return f"a 1/σ of {name} over {over} whose variance is divided by {text}"
    return ""


MASKS: dict[str, Function] = {
    "[{} > 0]": lambda t: (t > 0).double(),
    "[{} < 0]": lambda t: (t < 0).double(),
    "sign({})": torch.sign,
}


def _sample(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Some 400 entries of the tensor, broadcast to the shape of another one."""
    flat = tensor.expand_as(tensor if like is None else like).reshape(-1)
    return flat[:: max(1, flat.numel() // 400)]


def factors(case: Case) -> Iterator[Guess]:
    """A function of a known tensor is missing or there twice."""
    actual, expected = case.actual, case.expected
    if expected.numel() < 3:
        return
    for name, view in case.views if expected.any() else ():
        some = _sample(view, expected)
        for k, (label, function) in enumerate(FACTORS.items()):
            text, values = label.format(name, name), function(some)
            if case.close(_sample(actual, expected) * values, _sample(expected)):
                kind, detail = "missing-factor", f"lacks the factor {text}"
                if text in case.drivers:
                    kind, detail = "ignores-upstream", "lacks the upstream gradient as a factor"
                formula, product = f"{case.name} × {text} = expected", actual * function(view)
                yield Guess(kind, 1.5 + k / 4, detail, expected, formula, product)
            if case.close(_sample(actual, expected), _sample(expected) * values):
                detail, formula = f"has the factor {text} once too often", f"expected × {text}"
                predicted = expected * function(view)
                yield Guess("missing-factor", 2 + k / 4, detail, predicted, formula)
    ones = torch.ones((1,) * expected.ndim, dtype=expected.dtype)
    for driver in [("", ones), *(item for item in case.views if item[0] in case.drivers)]:
        yield from _products(case, *driver)


def _products(case: Case, driver: str, base: Tensor) -> Iterator[Guess]:
    """The upstream gradient, or 1, times the wrong function of the wrong tensor."""
    right, found = [], []
    functions: dict[str, Function] = {"1": torch.ones_like, **FACTORS, **MASKS}
    for (name, view), (label, function) in itertools.product(case.views, functions.items()):
        if not driver and (label == "1" or name in case.drivers):
            continue
        values = _sample(base, case.expected) * function(_sample(view, case.expected))
        if case.close(values, _sample(case.expected)):
            right.append((label, label.format(name, name)))
        if case.close(values, _sample(case.actual)):
            found.append((label, name, view, function))
    instead = right[0][1] if right else ""
    whole = instead or (case.recognised[0][0].text if case.recognised else "")
    for label, name, view, function in found:
        predicted = (base * function(view)).expand_as(case.expected)
        text = label.format(name, name)
        formula = f"{driver} × {text}" if driver else text
        shares = any(adds_up(view.expand_as(case.expected), axis) for axis in range(view.ndim))
        if label == "1":
            detail = "is the upstream gradient itself"
            detail += f" where {whole} belongs" if whole else ""
            if not case.expected.any():
                detail += ", where the derivative is 0 throughout: a straight-through estimator?"
            yield Guess("missing-factor", 2 if whole else 6, detail, predicted, driver)
        elif any(label == other for other, _ in right):
            detail = f"has {text} where {instead} belongs"
            yield Guess("wrong-operand", 3, detail, predicted, formula)
        elif shares and label in ("{}(1 − {})", "{}"):
            detail = "lacks the terms off the diagonal of the Jacobian matrix"
            yield Guess("missing-term", 3, detail, predicted, formula)
        elif right:
            detail = f"has the factor {text} where {instead} belongs"
            part = any(text in other and text != other for _, other in right)
            yield Guess("missing-factor", 6 if part else 6.5, detail, predicted, formula)
            yield Guess("wrong-operand", 6.5 if part else 6, detail, predicted, formula)
        elif len(case.drivers) == 1:
            detail = f"is {formula}, which it should not be"
            bits = 8 if driver else 4
            yield Guess("wrong-operand", bits, detail, predicted, formula)
