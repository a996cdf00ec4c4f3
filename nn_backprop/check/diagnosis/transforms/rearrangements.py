"""The same numbers in other places: axes exchanged, mirrored, permuted, shifted, repeated."""

import itertools
import math
from collections.abc import Iterator

import torch

from nn_backprop.check.diagnosis.arithmetic import Axes, first_few, in_words
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guesses import Guess


def rearranged(case: Case) -> Iterator[Guess]:
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
            detail = f"has {in_words(moved)} exchanged"
            yield Guess("transposed", 2 + len(moved) / 2, detail, turned)
        else:
            detail = f"holds its numbers in another order in memory: that of axes {order}"
            yield Guess("transposed", 6, detail, turned.reshape(actual.shape))
    if not case.same_shape:
        return
    for axes in [a for n in (1, 2, 3) for a in itertools.combinations(range(rank), n)]:
        spatial = rank >= 3 and axes[0] >= max(2, rank - 3)
        if spatial or (len(axes) == 1 and expected.shape[axes[0]] >= 3):
            bits = 2 + len(axes) / 4 if spatial else 5
            yield Guess("flipped", bits, f"is mirrored along {in_words(axes)}", expected.flip(axes))
    for axis, size in enumerate(expected.shape):
        for count in range(2, min(size, 4096) + 1):
            if size % count == 0 and (count <= 16 or count == size):
                yield from _permuted(case, axis, count)


def _permuted(case: Case, axis: int, count: int) -> Iterator[Guess]:
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
    how = f"{what} {first_few(moved)} of {count} along axis {axis} exchanged"
    if len(moved) > 2:
        how = f"the {count} {what} along axis {axis} in the order {first_few(source)}"
    bits = 2 + min(math.lgamma(count + 1) / math.log(2), len(moved) * math.log2(count))
    predicted = chunks[source].reshape(first.shape).movedim(0, axis)
    yield Guess("permuted", bits, f"has {how}", predicted)


def shifted(case: Case) -> Iterator[Guess]:
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
            there = (places >= 0) & (places < len(places))
            inside &= there.view(-1, *[1] * (rank - axis - 1))
        informative = int((case.wrong & inside).sum())
        if informative < 3 or not case.close(actual[inside], rolled[inside]):
            continue
        how = " and ".join(f"by {k} along axis {a}" for a, k in zip(axes, by, strict=True))
        bits = 4 + math.log2(len(by) * max(map(abs, by)))
        if min(expected.shape[axis] for axis in axes) > 2:
            yield Guess("shifted", bits, f"is rolled {how}", rolled)
        yield Guess("shifted", bits, f"is shifted {how}, with zeros in the gap", rolled * inside)
        if informative >= 2 * int((~inside & case.wrong).sum()) and int(inside.sum()) >= 6:
            detail = f"is shifted {how}, as if padding had not been cut off"
            yield Guess("shifted", bits + 3, detail, torch.where(inside, rolled, actual))


def repeated(case: Case) -> Iterator[Guess]:
    """Summed or averaged along an axis, and repeated there."""
    for axis, size in enumerate(case.expected.shape):
        total = case.expected.sum(axis, keepdim=True).expand_as(case.expected)
        for how, predicted in (("summed", total), ("averaged", total / size)):
            detail = f"is {how} over axis {axis} and repeated along it"
            yield Guess("wrong-reduction", 3, detail, predicted)
