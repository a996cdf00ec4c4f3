"""Sums and matrix products: of other tensors, over other axes, of another shape."""

import itertools
from collections.abc import Iterator

import torch

from nn_backprop.check.diagnosis.arithmetic import in_words
from nn_backprop.check.diagnosis.case import Case, contractions
from nn_backprop.check.diagnosis.guesses import Guess


def operands(case: Case) -> Iterator[Guess]:
    """Sums and matrix products of known tensors where others belong."""
    right = case.recognised
    instead = f" where {right[0][0].text} belongs" if right else ""
    shapes = [upstream.shape for upstream in case.upstream]
    for driver, tensor in [item for item in case.known.items() if item[1].shape in shapes]:
        for contraction in contractions(case, tensor, case.actual.shape):
            predicted = contraction.value
            if driver in case.drivers and contraction[:3] in [other[:3] for other, _ in right]:
                continue
            if right and not case.close(predicted, case.actual):
                predicted = right[0][1] * predicted
            if not case.close(predicted, case.actual):
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
            yield Guess(kind, bits, detail, predicted, text)
    if right and right[0][0].rule.startswith("Σ"):
        share = case.expected.numel() / case.upstream[0].numel()
        formula = f"the mean instead of {right[0][0].text}"
        detail = "is averaged instead of summed"
        yield Guess("wrong-reduction", 1.5, detail, case.expected * share, formula)


def scattered(case: Case) -> Iterator[Guess]:
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
            yield Guess("overwritten", 2, detail, kept.reshape(shape))
        for kind, bits in (("missing-factor", 3), ("extra-term", 4)):
            detail = f"counts an index of {name} that should be left out, such as padding"
            yield Guess(kind, bits, detail, sums, f"upstream added up over equal {name}")


def reductions(case: Case) -> Iterator[Guess]:
    """Of another shape: not summed, summed too far, an axis of size 1 left over, not cropped."""
    actual, expected, shape = case.actual, case.expected, tuple(case.actual.shape)
    if actual.squeeze().shape == expected.squeeze().shape or actual.numel() == expected.numel():
        detail = f"has the shape {shape} instead of {tuple(expected.shape)}"
        formula = f"{case.name} in the right shape = expected"
        observed = actual.reshape(expected.shape)
        yield Guess("wrong-reduction", 2, detail, expected, formula, observed)
    pairs = ((actual, expected), (expected, actual))
    for large, small in pairs if actual.numel() != expected.numel() else ():
        ranks = range(large.ndim)
        for axes in [a for n in ranks for a in itertools.combinations(ranks, n + 1)]:
            for how, reduced in (("summed", large.sum(axes)), ("averaged", large.mean(axes))):
                if reduced.squeeze().shape != small.squeeze().shape:
                    continue
                over, reduced = f"{how} over {in_words(axes)}", reduced.reshape(small.shape)
                if large is actual:
                    detail, formula = f"is not {over}: its shape is {shape}", f"{case.name} {over}"
                    formula += " = expected"
                    yield Guess("wrong-reduction", 2.5, detail, expected, formula, reduced)
                else:
                    detail = f"is {over}, which it should not be"
                    yield Guess("wrong-reduction", 2.5, detail, reduced, f"expected {over}")
    if actual.ndim == expected.ndim:
        middle = actual
        for axis, size in enumerate(expected.shape):
            border = max(actual.shape[axis] - size, 0) // 2
            middle = middle.narrow(axis, border, min(size, actual.shape[axis]))
        formula = f"{case.name} without its border = expected"
        detail = f"still has the padding: its shape is {shape}"
        yield Guess("shifted", 3, detail, expected, formula, middle)
