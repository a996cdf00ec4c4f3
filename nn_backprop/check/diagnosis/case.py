"""A wrong gradient, with what several families of hypotheses want to know about it."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.arithmetic import (
    alignments,
    in_words,
    is_close,
    nearest_ratio,
    normalised_axes,
)
from nn_backprop.check.diagnosis.mismatch import Mismatch

CALLS = 160  # of the function that computes other gradients, at most

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


class Contraction(NamedTuple):
    """A sum of the upstream gradient over axes, with an operand or without, or a product."""

    rule: str
    operand: str
    text: str
    value: Tensor


class Case:
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

    def close(self, left: Tensor, right: Tensor) -> bool:
        """Equal up to rounding, for a first look; every guess gets another one."""
        return is_close(left, right, self.tolerance)

    @cached_property
    def alike(self) -> dict[str, Tensor]:
        """The known tensors of the gradient's shape that are not upstream gradients."""
        known = {name: t for name, t in self.known.items() if name not in self.drivers}
        return {name: t for name, t in known.items() if t.shape == self.expected.shape}

    @cached_property
    def wrong(self) -> Tensor:
        """Where the gradient is wrong."""
        return (self.actual - self.expected).abs() > self.tolerance

    @cached_property
    def right(self) -> Tensor:
        """Where it is right, and not because most mistakes leave a zero a zero."""
        return ~self.wrong & (self.expected.abs() > self.tolerance)

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
        alike = contractions(self, upstream[0], self.expected.shape, used.operand)
        return factor * next(found.value for found in alike if found[:3] == used[:3])

    @cached_property
    def recognised(self) -> list[tuple[Contraction, float]]:
        """Contractions of the upstream gradient that the expected one is a multiple of."""
        found = []
        for upstream in self.upstream if len(self.upstream) == 1 else []:
            for contraction in contractions(self, upstream, self.expected.shape):
                value = contraction.value
                factor = nearest_ratio(self.expected, value)
                factor = 1.0 if abs(factor - 1) < 1e-6 or value.numel() < 4 else factor
                if self.close(factor * value, self.expected):
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
            for other, tensor in self.known.items():
                if tensor.ndim == 1 and int(labels.max()) < tensor.numel():
                    tensors.append((f"{other}[{name}]", tensor[labels.long()]))
            if shape and int(labels.max()) < shape[0]:
                counts = torch.bincount(labels.flatten().long(), minlength=shape[0]).clamp(min=1)
                tensors.append((f"count({name})", counts.double()))
        return [(name, view) for name, tensor in tensors for view in alignments(tensor, shape)]


def contractions(
    case: Case, upstream: Tensor, shape: torch.Size, only: str | None = None
) -> Iterator[Contraction]:
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
            yield Contraction(f"@ {turned, swapped}", name, " @ ".join(texts), left @ right)
    counts, rank = range(1, upstream.ndim + 1), range(upstream.ndim)
    sums = [axes for count in counts for axes in itertools.combinations(rank, count)]
    sums = [a for a in sums if [upstream.shape[k] for k in rank if k not in a] == list(shape)]
    for name, tensor in [item for item in operands if sums and item[1].shape == upstream.shape]:
        for grouped, axes in normalised_axes(tensor.shape):
            if grouped == tuple(tensor.shape):
                variance, mean = torch.var_mean(tensor, axes, correction=0, keepdim=True)
                operands.append((f"normalised {name}", (tensor - mean) / (variance + 1e-5).sqrt()))
    for axes in sums:
        rule, over = f"Σ over {axes}", f"over {in_words(axes)}"
        yield Contraction(rule, "", f"Σ upstream {over}", upstream.sum(axes))
        for name, tensor in operands if only != "" else []:
            for view in alignments(tensor, upstream.shape):
                value = (upstream * view).sum(axes)
                yield Contraction(rule, name, f"Σ upstream × {name} {over}", value)


def _numbered(word: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The tensors with names, which have numbers if there are several."""
    return {f"{word} {k}" if len(tensors) > 1 else word: t for k, t in enumerate(tensors)}
