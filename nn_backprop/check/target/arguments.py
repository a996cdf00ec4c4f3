"""The arguments of a target, sorted into values, which have names, and constants."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_unflatten

from nn_backprop.check.target.refusals import Unsuitable, refuse_unsupported


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
        positional = part.idx == 0  # type: ignore[attr-defined]
        name = (names[place.idx] if positional else place.key) + keystr(tuple(rest))  # type: ignore[attr-defined]
        if isinstance(leaf, np.ndarray):
            leaf = _tensor(name, leaf)
        if isinstance(leaf, Tensor):
            refuse_unsupported(name, leaf)
            leaf = leaf.detach().clone(memory_format=torch.preserve_format)
            kept = positional and place.idx in constant  # type: ignore[attr-defined]
            if leaf.is_floating_point() and not kept:
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


def _tensor(name: str, array: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
    except TypeError:
        raise Unsuitable(
            f"{name} is an array of {array.dtype}, of which there is no tensor: hand over numbers "
            "of 64 bits or fewer"
        ) from None
