"""Multiples: zero, the negative, a constant, another one for each channel."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    TINY,
    Axes,
    alignments,
    first_few,
    in_words,
    nearest_ratio,
)
from nn_backprop.check.diagnosis.case import Case
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
