"""Diagnosis by confusion: is it the gradient of a function easily taken for the one in the forward?

The exact GELU and its tanh form, a convolution and the transposed one, a mask and no mask: their
values may be close, and their derivatives get exchanged. So the forward runs once more for each
such sibling g of one function f in it, with the value of f and the derivative of g,

    g(x) + stop(f(x) − g(x)),

and where autograd then gives the wrong gradient, the sibling is the diagnosis. So is, last of all,
an input that is turned, mirrored, moved, or another one in its place.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from nn_backprop.check.diagnosis.arithmetic import exchanges
from nn_backprop.check.diagnosis.autograd import Forward, gradient_of
from nn_backprop.check.diagnosis.guard import guarded
from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause
from nn_backprop.check.target.target import ForwardRaised

EXACT = 1e-6  # the residual below which a sibling explains a gradient
MOST_TRIALS = 400
BITS = 12.0  # after any single mistake in the chain rule itself
UNFIT = (RuntimeError, TypeError, ValueError, IndexError, KeyError)  # another number of axes, say

Siblings = Iterator[tuple[str, Tensor]]  # their names, and what they give


def each(size: Any, dims: int) -> list[int]:
    """A size for each of so many axes, of one that may hold for all."""
    return list(size) if isinstance(size, (tuple, list)) else [size] * dims


class Families(NamedTuple):
    by_name: dict[str, Callable[..., Siblings]]
    """The siblings of a function of that name, called with its arguments."""
    of_any: Callable[[Callable, tuple, dict[str, Any]], Siblings]
    """Those of any function, its arguments and keyword arguments."""
    kinds: dict[str, str]
    """What a sibling means, where it is not that the derivative of another function was taken."""


class _Trial(NamedTuple):
    kind: str
    text: str
    mode: AbstractContextManager
    """In which the derivative is another one, …"""
    inputs: dict[str, Tensor]
    """… and where it is taken."""


def explain(
    m: Mismatch, forward: Forward, families: Families, failures: list[str]
) -> list[Hypothesis]:
    """The siblings that give exactly the wrong gradient. What cannot be run in the place of another
    is no sibling."""
    found: dict[str, Hypothesis] = {}
    if m.actual.shape != m.expected.shape:
        return []
    error = (m.actual - m.expected).norm().item()
    # A forward that cannot be run with gradients has no siblings.
    with guarded("siblings", failures), suppress(ForwardRaised):
        trials = list(itertools.islice(_trials(m, forward, families), MOST_TRIALS))
        for kind, text, mode, inputs in trials:
            with suppress(*UNFIT):
                wrong = gradient_of(m.name, forward, inputs, mode)(m.upstream)
                left = (m.actual - wrong).norm().item() / error
                if left <= EXACT and kind not in found:
                    bits = BITS + math.log2(len(trials))
                    evidence = f"the forward with that derivative reproduces it to {left:.1g}"
                    cause = Cause(kind, f"grad_{m.name} {text}", evidence, left)
                    found[kind] = Hypothesis(bits, cause)
    return list(found.values())


def _trials(m: Mismatch, forward: Forward, families: Families) -> Iterator[_Trial]:
    calls: dict[int, tuple[str, list[str]]] = {}  # those that have siblings, by number

    def noted(number: int, func: Callable, z: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if texts := [text for text, _ in _alternatives(families, func, z, args, kwargs)]:
            calls[number] = func.__name__.strip("_"), texts
        return z

    try:
        gradient_of(m.name, forward, m.inputs, _Calls(noted))(m.upstream)
    except UNFIT:  # not for autograd
        return
    text = "counts what a mask leaves out: it is not multiplied by the mask"
    yield _Trial("missing-factor", text, _Unmasked(), m.inputs)
    alike: dict[str, list[int]] = {}  # the places of each function
    for number, (name, _) in calls.items():
        alike.setdefault(name, []).append(number)
    alone = [([number], "") for number in calls]
    together = [(numbers, ", each time") for numbers in alike.values() if len(numbers) > 1]
    for numbers, often in together + alone:
        name, texts = calls[numbers[0]]
        for text in texts:
            kind = families.kinds.get(text, "wrong-operand")
            said = f"has the derivative of {text} where that of {name} belongs{often}"
            yield _Trial(kind, said, _in_its_place(families, numbers, text), m.inputs)
    for name in m.inputs:
        for kind, text, value in _other_inputs(m, name):
            said = f"has the derivative at {text}, where {name} belongs"
            yield _Trial(kind, said, nullcontext(), {**m.inputs, name: value})


def _other_inputs(m: Mismatch, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """An input turned, mirrored, moved, or another one in its place."""
    t = m.inputs[name]
    yield "wrong-operand", f"−{name}", -t
    for a, b, turn in exchanges(t):
        yield "wrong-operand", f"{name} with the axes {a} and {b} exchanged", turn(t)
    for d, n in enumerate(t.shape):
        if n > 1:
            yield "flipped", f"{name} mirrored along axis {d}", t.flip(d)
        for by in (1, -1) if n > 2 else ():
            yield "shifted", f"{name} rolled by {by} along axis {d}", t.roll(by, d)
    known = {**m.inputs, **{f"output {k}": z for k, z in enumerate(m.outputs)}}
    for other, value in known.items():
        if other != name and value.shape == t.shape:
            yield "wrong-operand", other, value


def _alternatives(
    families: Families, func: Callable, z: Any, args: tuple, kwargs: dict[str, Any]
) -> Siblings:
    """The siblings of a call that give another output of the same shape."""
    name = getattr(func, "__name__", "").strip("_").removesuffix("_with_indices")
    z = z[0] if isinstance(z, tuple) and z else z
    if not isinstance(z, Tensor) or not z.requires_grad or not args:
        return
    own = families.by_name[name](*args, **kwargs) if name in families.by_name else ()
    for siblings in (own, families.of_any(func, args, kwargs)):
        with suppress(*UNFIT):
            for text, g in siblings:
                if g.shape == z.shape and not torch.equal(g, z):
                    yield text, g


class _Calls(TorchFunctionMode):
    """Each call gives what `visit` makes of it: of its number, the function, what that gave, and
    the arguments."""

    def __init__(self, visit: Callable[[int, Callable, Any, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.visit, self.calls = visit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        z = func(*args, **(kwargs or {}))
        return self.visit(self.calls - 1, func, z, args, kwargs or {})


def _in_its_place(families: Families, numbers: list[int], text: str) -> _Calls:
    """The calls of these numbers take the derivative of the sibling of that name."""

    def replaced(number: int, func: Callable, z: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if number not in numbers:
            return z
        siblings = _alternatives(families, func, z, args, kwargs)
        g = next((g for other, g in siblings if other == text), None)
        if g is None:
            return z
        if isinstance(z, tuple):  # and the places of the maxima
            return (g + (z[0] - g).detach(), *z[1:])
        return g + (z - g).detach()

    return _Calls(replaced)


class _Unmasked(TorchFunctionMode):
    """In the derivative, every mask that is not itself computed from another is all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shadows: dict[int, tuple[Tensor, Tensor]] = {}  # of constants: without the mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        flat, spec = tree_flatten((args, kwargs or {}))
        others = [self.shadow(a) if isinstance(a, Tensor) else a for a in flat]
        if all(a is b for a, b in zip(flat, others, strict=True)) or not isinstance(z, Tensor):
            return z
        more_args, more_kwargs = tree_unflatten(others, spec)
        g = func(*more_args, **more_kwargs)
        if z.requires_grad:
            return g + (z - g).detach()
        self.shadows[id(z)] = (z, g)
        return z

    def shadow(self, t: Tensor) -> Tensor:
        if id(t) not in self.shadows:
            may_be = not t.requires_grad and (t.dtype == torch.bool or t.is_floating_point())
            if not may_be or t.unique().tolist() != [0, 1]:
                return t
            self.shadows[id(t)] = (t, torch.ones_like(t))
        return self.shadows[id(t)][1]
