"""A rule as a torch.autograd.Function, for use inside PyTorch's own graph."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nn_backprop.rules import Rule


@cache
def as_function(rule: Rule) -> type[Function]:
    """A Function whose ``.apply`` takes the torch callable's positional arguments.

    Its derivatives of any order are those of the rule. A first derivative uses what the forward
    saved. For a second one, autograd differentiates the backward in its turn, which is right only
    if all that it uses is connected to the inputs: inputs and outputs are, but a saved intermediate
    is a constant to autograd. Where the rule saved one, the forward is run again with the graph on.
    What then depends on the inputs takes the place of what was saved; what does not, such as a
    copy of the running statistics or a random mask, stays as the first run left it.

    ``.apply`` raises NotImplementedError for the in-place form of an operation, and TypeError for a
    tensor that requires grad in a place that the rule does not read. The backward raises
    NotImplementedError if the rule has no derivative for a tensor that requires grad.
    """

    class RuleFunction(Function):
        @staticmethod
        def forward(ctx: Any, *args):
            arguments, in_place = rule.arguments(args, {})
            if in_place:
                raise NotImplementedError(f"{rule.name} as a Function is never in place")
            z, saved = rule.forward(*arguments)
            ctx.places = _places(rule, args, arguments)
            ctx.saved, tensors = _pack(saved)
            ctx.arguments, inputs = _pack(arguments, only_if_grad=True)
            connected = {id(tensor) for tensor in (*inputs, z)}
            ctx.run_again = any(
                tensor.is_floating_point() and id(tensor) not in connected for tensor in tensors
            )
            ctx.count = len(tensors)
            ctx.save_for_backward(*tensors, *inputs)
            return z

        @staticmethod
        def backward(ctx: Any, grad_z: Tensor):
            tensors, inputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
            if torch.is_grad_enabled() and ctx.run_again:
                _, again = rule.forward(*_unpack(ctx.arguments, inputs))
                pairs = zip(_pack(again)[1], tensors, strict=True)
                tensors = [new if new.requires_grad else old for new, old in pairs]
            saved = _unpack(ctx.saved, tensors)
            wanted = ctx.needs_input_grad
            needs = tuple(place is not None and wanted[place] for place in ctx.places)
            result: list[Tensor | None] = [None] * len(wanted)
            for place, grad in zip(ctx.places, rule.backward(grad_z, saved, needs), strict=True):
                if place is not None:
                    if wanted[place] and grad is None:
                        raise NotImplementedError(
                            f"{rule.name} has no derivative for its argument {place}"
                        )
                    result[place] = grad
            return tuple(result)

    RuleFunction.__name__ = RuleFunction.__qualname__ = rule.name
    return RuleFunction


def _places(rule: Rule, args: tuple, arguments: tuple) -> list[int | None]:
    """For each tensor argument of the forward, its place among the torch callable's arguments."""
    free = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    places: list[int | None] = []
    for i in rule.tensors.values():
        operand = arguments[i] if i < len(arguments) else None
        place = next((j for j in free if args[j] is operand), None)
        if place is not None:
            free.remove(place)
        places.append(place)
    for j in free:
        if args[j].requires_grad:
            raise TypeError(f"{rule.name} has no rule for the gradient of its argument {j}")
    return places


class _Place(int):
    """Stands for the tensor of that number while autograd keeps the tensor itself."""


def _pack(nested: tuple, only_if_grad: bool = False) -> tuple[Any, list[Tensor]]:
    """The tuple with places instead of its tensors, at any depth of tuples and lists, and the
    tensors."""
    tensors: list[Tensor] = []

    def pack(item):
        if isinstance(item, Tensor) and (item.requires_grad or not only_if_grad):
            tensors.append(item)
            return _Place(len(tensors) - 1)
        return type(item)(map(pack, item)) if type(item) in (tuple, list) else item

    return pack(nested), tensors


def _unpack(nested: Any, tensors) -> Any:
    """The inverse of `_pack`. A tensor left in place is copied: it may be a buffer, such as a
    running mean, which a second run of the forward must not move again."""
    if isinstance(nested, _Place):
        return tensors[nested]
    if isinstance(nested, Tensor):
        return nested.clone()
    if type(nested) in (tuple, list):
        return type(nested)(_unpack(item, tensors) for item in nested)
    return nested
