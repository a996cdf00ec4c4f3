"""Terms too many or too few, such as those of a normalisation, the −1 at a target, or rounding."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    TINY,
    Axes,
    adds_up,
    in_words,
    nearest_ratio,
    normalised_axes,
)
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guesses import FITTED, Guess


def terms(case: Case) -> Iterator[Guess]:
    """A multiple of a known tensor too many, or one too few."""
    difference = case.actual - case.expected
    ones = ("1", torch.ones((1,) * difference.ndim, dtype=difference.dtype))
    for name, view in [ones, *case.views] if difference.numel() >= 5 else []:
        factor = nearest_ratio(difference, view.expand_as(difference))
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
        yield Guess(kind, bits, detail, case.expected + factor * view, formula)


def invariants(case: Case) -> Iterator[Guess]:
    """The mean or variance term of a normalisation is missing, or the sum in a softmax: expected is
    orthogonal along some axes to something that the gradient is not orthogonal to."""
    expected = case.expected
    outputs = {n: t for n, t in case.alike.items() if n.startswith("output")}
    same = {**case.alike, **{f"exp({n})": t.exp() for n, t in outputs.items()}}
    for shape, axes in normalised_axes(expected.shape):
        right, wrong = expected.reshape(shape), case.actual.reshape(shape)
        slices = expected.numel() // math.prod(shape[axis] for axis in axes)
        ones = torch.ones_like(right)
        over = f"over {in_words(axes)}" + ("" if shape == tuple(expected.shape) else " of groups")

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
                rest = rest - _multiple(rest, term, axes)
            predicted = (wrong - rest).reshape(expected.shape)
            bits += 3 + 0.2 * math.log2(slices + 1)
            formula = "expected + such a term; expected is orthogonal to it, the gradient is not"
            yield Guess("missing-term", bits, f"lacks the {text} {over}", predicted, formula)


def _multiple(rest: Tensor, term: Tensor, axes: Axes) -> Tensor:
    """The multiple of a term, another one in each slice, that comes nearest to the rest."""
    energy = (term**2).sum(axes, keepdim=True).clamp(min=TINY)
    return (rest * term).sum(axes, keepdim=True) / energy * term


def own_statistics(case: Case) -> Iterator[Guess]:
    """The terms of a normalisation too many: multiples of 1 and of x, another one in each slice."""
    rest = case.actual - case.expected
    for shape, axes in normalised_axes(rest.shape):
        slices = rest.numel() // math.prod(shape[axis] for axis in axes)
        if rest.numel() < 4 * slices + 3:
            continue
        seen = rest.reshape(shape)
        for name, tensor in case.alike.items():
            centred = tensor.reshape(shape)
            centred = centred - centred.mean(axes, keepdim=True)
            fitted = seen.mean(axes, keepdim=True) + _multiple(seen, centred, axes)
            what = f"multiples of 1 and of {name} over {in_words(axes)}"
            detail = f"has {what} too many, as of a normalisation by its own statistics"
            predicted, formula = case.expected + fitted.reshape(rest.shape), f"expected plus {what}"
            yield Guess("extra-term", 9 + 0.2 * math.log2(slices + 1), detail, predicted, formula)


def targets(case: Case) -> Iterator[Guess]:
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
                factor = nearest_ratio(gap, term)
                predicted = case.expected + factor * term.movedim(-1, axis)
                formula = f"expected + {factor:.4g} × such a term"
                yield Guess(kind, bits, detail, predicted, formula)


def softmax_over_another_axis(case: Case) -> Iterator[Guess]:
    """A softmax whose sum runs over the wrong axis."""
    drivers = [(name, t) for name, t in case.drivers.items() if t.shape == case.expected.shape]
    for (name, shares), (driver, upstream) in itertools.product(case.alike.items(), drivers):
        axes = range(shares.ndim)
        for axis in axes if any(adds_up(shares, axis) for axis in axes) else ():
            product = shares * upstream
            predicted = product - shares * product.sum(axis, keepdim=True)
            formula = f"{name} × ({driver} − Σ {name} × {driver} over axis {axis})"
            yield Guess("wrong-reduction", 3, f"sums over axis {axis}", predicted, formula)


def precision(case: Case) -> Iterator[Guess]:
    """Rounded to a shorter type, or off by no more than that."""
    actual, expected, size = case.actual, case.expected, float(case.expected.abs().max())
    if not (live := expected != 0).any():
        return
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
            yield Guess("wrong-precision", 3, detail, actual, formula)
            return
