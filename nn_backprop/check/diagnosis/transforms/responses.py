"""The right gradient, but for another upstream gradient."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    in_words,
)
from nn_backprop.check.diagnosis.case import FACTORS, Case
from nn_backprop.check.diagnosis.guesses import Guess


def responses(case: Case) -> Iterator[Guess]:
    """Right, but for another upstream gradient: all ones, rolled, averaged, without one output."""
    if not case.upstream:
        return
    value = float(case.upstream[0].flatten()[0])
    if value not in (0.0, 1.0) and all(bool((u == value).all()) for u in case.upstream):
        detail, predicted = f"ignores the upstream gradient, {value:.4g}", case.expected / value
        yield Guess("ignores-upstream", 1.5, detail, predicted, "expected / upstream")
    for kind, bits, text, upstreams in _replacements(case):
        response = case.respond(upstreams)
        if case.calls < 0:
            return
        if response is not None:
            detail = f"is right for another upstream gradient: {text}"
            yield Guess(kind, bits, detail, response, "the gradient for that")


def _replacements(case: Case) -> Iterator[tuple[str, float, str, list[Tensor]]]:
    """Other upstream gradients."""
    ones = [torch.ones_like(upstream) for upstream in case.upstream]
    yield "ignores-upstream", 1.5, "all ones", ones
    for k, (name, upstream) in enumerate(case.drivers.items()):
        for kind, bits, text, changed in _changes(case, name, upstream):
            yield kind, bits, text, case.replaced(k, changed)


def _changes(case: Case, name: str, upstream: Tensor) -> Iterator[tuple[str, float, str, Tensor]]:
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


def mirrored_kernel(case: Case) -> Iterator[Guess]:
    """A convolution with a mirrored kernel: it answers a mirror image with a mirror image."""
    for k, upstream in enumerate(case.upstream):
        for first in {2, upstream.ndim - 1} if case.expected.ndim == upstream.ndim >= 3 else ():
            axes = tuple(range(first, upstream.ndim))
            response = case.respond(case.replaced(k, upstream.flip(axes)))
            if response is not None:
                detail = f"is computed with a kernel mirrored along {in_words(axes)}"
                formula = "the mirrored gradient for the mirrored upstream gradient"
                yield Guess("flipped", 3, detail, response.flip(axes), formula)
