"""Multiples: zero, the negative, a constant, another one for each channel, or a factor that is
missing, there twice, or another one."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    TINY,
    Axes,
    adds_up,
    alignments,
    first_few,
    in_words,
    is_close,
    nearest_ratio,
    sample,
)
from nn_backprop.check.diagnosis.case import FACTORS, Case, Function
from nn_backprop.check.diagnosis.guesses import FITTED, Guess


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
    names = [hit for hit in case.constants if abs(hit[0] - abs(ratio)) <= slack * abs(ratio)]
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
        if float(ratios.max() - ratios.min()) <= 1e-5 * float(ratios.abs().max()) or bool(
            (ratios[changed].abs() < 1e-9).all()
        ):
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
        detail = (
            f"is a multiple of what it should be, another one at every index of {in_words(kept)}"
        )
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
        for c, text in (
            (n / (n - 1), f"{n - 1} instead of {n}"),
            ((n - 1) / n, f"{n} instead of {n - 1}"),
        ):
            epsilon = v * (1 - c * ratios**2) / (ratios**2 - 1)
            same = (epsilon - epsilon.mean()).abs().max() <= 1e-6 * v.max()
            if same and 0 <= epsilon.mean() <= 0.1:
                return (
                    f"a 1/σ of {name} over {in_words(others)} whose variance is divided by {text}"
                )
    return ""


MASKS: dict[str, Function] = {
    "[{} > 0]": lambda t: (t > 0).double(),
    "[{} < 0]": lambda t: (t < 0).double(),
    "sign({})": torch.sign,
}


def factors(case: Case) -> Iterator[Guess]:
    """A function of a known tensor is missing or there twice."""
    actual, expected = case.actual, case.expected
    if expected.numel() < 3:
        return
    for name, view in case.views if expected.any() else ():
        some = sample(view, expected)
        for k, (label, function) in enumerate(FACTORS.items()):
            text, values = label.format(name, name), function(some)
            if is_close(sample(actual, expected) * values, sample(expected), case.tolerance):
                kind, detail = "missing-factor", f"lacks the factor {text}"
                if text in case.drivers:
                    kind, detail = "ignores-upstream", "lacks the upstream gradient as a factor"
                formula, product = f"{case.name} × {text} = expected", actual * function(view)
                yield Guess(kind, 1.5 + k / 4, detail, expected, formula, product)
            if is_close(sample(actual, expected), sample(expected) * values, case.tolerance):
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
        values = sample(base, case.expected) * function(sample(view, case.expected))
        if is_close(values, sample(case.expected), case.tolerance):
            right.append((label, label.format(name, name)))
        if is_close(values, sample(case.actual), case.tolerance):
            found.append((label, name, view, function))
    instead = right[0][1] if right else ""
    whole = instead or (case.recognised[0][0].text if case.recognised else "")
    for label, name, view, function in found:
        predicted = (base * function(view)).expand_as(case.expected)
        text = label.format(name, name)
        formula = f"{driver} × {text}" if driver else text
        shares = any(adds_up(view.expand_as(case.expected), axis) for axis in range(view.ndim))
        if label == "1":
            detail = "is the upstream gradient itself" + (
                f" where {whole} belongs" if whole else ""
            )
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
