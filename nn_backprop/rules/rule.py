"""What a rule is: a forward and its backward, under one name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name

# What torch calls an argument, and the place at which our forwards take it.
_PLACES = {"input": 0, "self": 0, "other": 1, "mat2": 1, "target": 1}


def name_of(function: Callable) -> str:
    """What people call a torch callable, or one of ours: torch.nn.functional.relu."""
    own = getattr(function, "__name__", repr(function))
    return resolve_name(function) or f"{getattr(function, '__module__', 'torch')}.{own}"


@dataclass(frozen=True, eq=False)
class Rule:
    """The derivative of one operation.

    ``forward(*arguments) -> (z, saved)`` computes the operation and keeps what its derivative
    needs. ``backward(grad_z, saved, needs) -> (grad, ...)`` has one entry for each tensor argument
    of the forward, in order; an entry is None where ``needs`` is False or where no derivative
    exists. Both are plain tensor arithmetic: neither calls autograd, and whether autograd watches
    is the caller's choice (`torch.no_grad`). Neither changes a tensor that it was handed, but for
    the buffers that the torch callable itself updates, such as running means.

    ``adapt`` takes the torch callable's own arguments and returns ``(arguments, in_place)``: the
    forward's arguments in the forward's order, and whether the caller wants the first of them
    overwritten by the result. Without it, the arguments are taken to be in the forward's order.
    """

    name: str
    forward: Callable[..., tuple[Any, tuple]]
    backward: Callable[[Tensor, Any, tuple[bool, ...]], tuple[Tensor | None, ...]]
    adapt: Callable[..., tuple[tuple, bool]] | None = None

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, bool]:
        """(the forward's positional arguments, in place?), from the torch callable's."""
        if self.adapt is not None:
            return self.adapt(*args, **kwargs)
        if kwargs:
            names = list(self._signature.parameters)
            ours = {names[_PLACES[k]] if k in _PLACES else k: v for k, v in kwargs.items()}
            bound = self._signature.bind(*args, **ours)
            bound.apply_defaults()  # else .args ends at the first argument that was left out
            return bound.args, False
        return args, False

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    @cached_property
    def tensors(self) -> dict[str, int]:
        """Names and positions of the forward's tensor arguments, read from its annotations."""
        parameters = self._signature.parameters.values()
        return {
            p.name: i
            for i, p in enumerate(parameters)
            if "Tensor" in inspect.formatannotation(p.annotation)
        }

    @cached_property
    def equations(self) -> str:
        """The blocks *Forward* and *Backward* of the derivation: one equation a line."""
        blocks, keep = [], False
        for line in self.derivation.splitlines():
            if line and not line.startswith(" "):
                keep = line.rstrip(":") in ("Forward", "Backward")
            elif keep and line.strip():
                blocks.append(line.strip())
        return "\n".join(blocks)

    @property
    def derivation(self) -> str:
        """The whole derivation: the forward's docstring."""
        return inspect.getdoc(self.forward) or ""
