"""The right gradient, but for another upstream gradient, or for some of its indices only."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import Axes, first_few, in_words, is_close
from nn_backprop.check.diagnosis.case import FACTORS, Case
from nn_backprop.check.diagnosis.guesses import FITTED, Guess


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


def subsets(case: Case) -> Iterator[Guess]:
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


def _selections(case: Case, parts: Tensor, axes: Axes) -> Iterator[Guess]:
    """Guesses from what each index contributes; all of them add up to the expected gradient."""
    count, total, where = len(parts), parts.sum(0), in_words(axes)
    base = case.expected - total  # from other outputs
    for which, index in (("last", -1), ("first", 0)):
        detail = f"counts only the {which} index of {where}"
        yield Guess("subset", 3, detail, base + parts[index])
        detail = f"counts all but the {which} index of {where}"
        yield Guess("subset", 3.5, detail, base + total - parts[index])
    present = parts != 0
    several = int((present.sum(0) > 1).sum()) >= 2
    orders = {"last": range(count), "first": range(count - 1, -1, -1)}
    for which, indices in orders.items() if several else ():
        kept = torch.zeros_like(total)
        for index in indices:
            kept = torch.where(present[index], parts[index], kept)
        detail = f"kept the {which} contribution along {where} where several add up"
        yield Guess("overwritten", 4, detail, base + kept)
    if len(axes) == 1 and axes[0] < total.ndim and total.shape[axes[0]] == count:
        diagonal = torch.diagonal(parts, dim1=0, dim2=axes[0] + 1).movedim(-1, axes[0])
        detail = f"lacks the cross terms between the indices of {where}"
        yield Guess("missing-term", 3.5, detail, base + diagonal)


def _weighted(case: Case, parts: Tensor, axes: Axes) -> Iterator[Guess]:
    """The contributions with fitted weights."""
    count, flat, where = len(parts), parts.reshape(len(parts), -1), in_words(axes)
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
    listed = first_few(weights.round(decimals=6) + 0.0)
    formula = f"Σ c × what every index of {where} contributes; c = {listed}"
    if bool(((weights - whole).abs() < 1e-5).all()) and whole.min() >= 0:
        if whole.max() == 1:
            detail = f"counts only the indices {first_few(whole.nonzero().flatten())} of {where}"
            yield Guess("subset", bits, detail, predicted, formula)
        elif whole.min() >= 1 and whole.max() > whole.min():
            detail = f"counts some indices of {where} more than once"
            yield Guess("extra-term", bits, detail, predicted, formula)
    elif len(used) >= 2 * count + 3 and float(weights.max() - weights.min()) > 1e-5:
        for name, tensor in [*case.known.items(), *case.views]:
            for text, values in ((name, tensor), (f"1/{name}", 1 / tensor)):
                if tensor.numel() == count and is_close(values.flatten(), weights, 1e-9):
                    detail = f"weighs the indices of {where} by {text}"
                    yield Guess("missing-factor", 5, detail, predicted, formula)
        detail, bits = f"weighs the indices of {where} differently", FITTED * min(6, len(unequal))
        yield Guess("per-channel-scale", bits, detail, predicted, formula)
