"""What is handed over: sorted into values, which have names, and constants; or refused, with a
sentence that says what to hand over instead."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_unflatten

from nn_backprop.check.report import dtype_name


class Unsuitable(ValueError):
    """What was handed over cannot be checked; the message says what to hand over instead."""


def refuse_unsupported(name: str, tensor: Tensor) -> None:
    """Raises Unsuitable for a tensor that is not dense, real and made of numbers."""
    if isinstance(tensor, nn.UninitializedParameter):
        raise Unsuitable(f"{name} has no values yet: call the lazy module once before the check")
    if tensor.is_meta:
        raise Unsuitable(f"{name} is a meta tensor, without numbers: hand over one on a device")
    if tensor.is_nested or (tensor.is_floating_point() and tensor.itemsize < 2):
        what = "nested" if tensor.is_nested else dtype_name(tensor.dtype)
        raise Unsuitable(f"{name} is a tensor of kind {what}, which the checker does not support")
    no = "which the checker does not support: hand"
    if tensor.is_complex():
        parts = "its real and imaginary parts (torch.view_as_real) to a target that puts them"
        raise Unsuitable(f"{name} is complex, {no} {parts} together")
    if tensor.layout != torch.strided:
        raise Unsuitable(f"{name} is a sparse tensor, {no} over its values")


def hint_at_dataclasses(leaves: list[Any]) -> str:
    """A hint at objects that tensors may be in, which are not looked into."""
    kinds = {type(x).__name__ for x in leaves if is_dataclass(x)}
    hint = "; tensors inside a {} are not seen: hand over a dict or tuple"
    return hint.format(kinds.pop()) if kinds else ""


def described(value: Any) -> str:
    """Its type with an article, such as "an int" or "the class Linear"."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Named:
    """Stands for a value among the arguments."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """The leaves of nested arguments, in which a value is represented by its name."""

    leaves: list[Any]
    spec: TreeSpec

    def filled(self, values: dict[str, Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The positional and the keyword arguments with these values."""
        leaves = [values[x.name] if isinstance(x, Named) else x for x in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def by_name(self, grads: Iterable[Any]) -> dict[str, Any]:
        """What a backward returned, one thing for each argument, for the values alone."""
        pairs = zip(self.leaves, grads, strict=False)
        return {leaf.name: grad for leaf, grad in pairs if isinstance(leaf, Named)}


def arrange(
    inputs: tuple, kwargs: dict[str, Any], names: list[str], constant: Sequence[int], flat: bool
) -> tuple[dict[str, Tensor], Arguments]:
    """The values by name, and the rest; all are copies. Each floating tensor is a value, except at
    the places in `constant`.

    names: of the positional arguments; a part of a nested one is called state[0], say.
    flat: no value may be inside a list or dict.
    """
    leaves, spec = tree_flatten_with_path((inputs, kwargs))
    values: dict[str, Tensor] = {}
    sorted_leaves: list[Any] = []
    for path, leaf in leaves:
        part, place, *rest = path
        at = place.idx if part.idx == 0 else None  # type: ignore[attr-defined]
        name = (place.key if at is None else names[at]) + keystr(tuple(rest))  # type: ignore[attr-defined]
        if isinstance(leaf, np.ndarray):
            try:
                leaf = torch.from_numpy(np.array(leaf, leaf.dtype.newbyteorder("=")))
            except TypeError:
                raise Unsuitable(
                    f"{name} is an array of {leaf.dtype}, of which there is no tensor: hand over "
                    "numbers of 64 bits or fewer"
                ) from None
        if isinstance(leaf, Tensor):
            refuse_unsupported(name, leaf)
            leaf = leaf.detach().clone(memory_format=torch.preserve_format)
            if leaf.is_floating_point() and at not in constant:
                if flat and rest:
                    raise Unsuitable(
                        f"{name} is inside a list or dict, where the arrays of a pair of NumPy "
                        "functions are not found: hand them over one by one"
                    )
                values[name] = leaf
                leaf = Named(name)
        sorted_leaves.append(leaf)
    return values, Arguments(sorted_leaves, spec)


def argument_names(function: Any, skip_first: bool, count: int) -> list[str]:
    """The function's names of `count` positional arguments; input0, … where it has none."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip_first:]
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"input{i}" for i in range(count)]
