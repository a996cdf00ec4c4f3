"""Some indices of the upstream gradient count, and others do not, or more than once."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import Axes, first_few, in_words, is_close
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guesses import FITTED, Guess


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
