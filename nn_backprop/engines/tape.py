"""Reverse mode: record the rules that a forward pass uses, then play them backwards."""

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import unserializable_hook

from nn_backprop.rules import TABLE, Rule
from nn_backprop.rules.rule import name_of


class MissingRuleError(NotImplementedError):
    """A differentiable operation was met for which the table has no rule."""


@dataclass(slots=True, eq=False)
class Leaf:
    """A tensor that requires grad and was there before: a parameter, an input."""

    tensor: Tensor


@dataclass(slots=True, eq=False)
class Step:
    """One operation of the record, and with it the tensor that it made."""

    made: weakref.ref[Tensor]
    version: int  # of that tensor
    rule: Rule
    saved: tuple
    versions: list[tuple[Tensor, int]]  # of the saved tensors, as the forward left them
    needs: tuple[bool, ...]
    sources: list["Step | Leaf | None"]  # of each operand; None if it needs no gradient


# To torch, what the tape made is a leaf. On a leaf these do nothing, or cut off what lies below.
_FOR_LEAVES = {
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
    Tensor.requires_grad_,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.autograd.grad,
}
_numbers = itertools.count()  # of the steps of all tapes: which step made a tensor
_this_thread = threading.local()  # .recording: whether a tape is open; only one can see a call


class Tape(TorchFunctionMode):
    """Records every torch call made while it is open, whoever makes it, and differentiates it.

    Inside ``with Tape() as tape:`` each call is looked up in `rules.TABLE`, run by its rule without
    autograd, and recorded. `backward` then fills ``.grad`` of the leaves that require grad, as
    ``loss.backward()`` does; `gradients` returns gradients and changes nothing.

    What is recorded has ``requires_grad`` set and no ``grad_fn``: to torch it looks like a leaf, so
    that any operation which slips past the table gives itself away by building a graph. Such a
    tensor, or a call without a rule whose result depends on a recorded one, raises
    `MissingRuleError`; no gradient is ever dropped silently. Calls under ``torch.no_grad()`` and
    those whose result is not differentiable (``argmax``, ``detach``, ``shape``) pass through.
    In-place operations work as in autograd: the result takes its operand's place. A tensor that was
    overwritten while a rule still needed its old value raises RuntimeError, and so does autograd
    that reaches a recorded tensor, inside or after the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._record: dict[int, Step] = {}
        self._leaves: dict[int, Leaf] = {}  # by id; a leaf keeps its tensor, so ids stay unique
        self._spent = False

    def __enter__(self) -> "Tape":
        if getattr(_this_thread, "recording", False):
            raise RuntimeError("another Tape is recording; close it before you open a second one")
        if self._leaves or self._spent:
            raise RuntimeError("this Tape has recorded already; make a new one for each pass")
        _this_thread.recording = True
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        _this_thread.recording = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to ``.grad`` of every leaf that requires grad.

        Raises ValueError if `loss` is not a scalar made on this tape, RuntimeError if the tape was
        played already or a tensor that is needed was overwritten.
        """
        found = self._play(loss, self._last_step(loss), wanted=set())
        with torch.no_grad():
            for source, grad in zip(found, owned(found.values()), strict=True):
                if isinstance(source, Leaf) and grad is not None:
                    leaf = source.tensor
                    if grad.stride() != leaf.stride():  # which torch's fused optimizers misread
                        grad = torch.empty_like(leaf).copy_(grad)
                    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)

    def gradients(self, loss: Tensor, tensors: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient of `loss`, a scalar, for each of `tensors`; None where it has no influence.

        Each tensor is a leaf that requires grad, or was made on this tape; another raises
        ValueError, as does a `loss` that is not a scalar made on this tape. RuntimeError as for
        `backward`.
        """
        last, tensors = self._last_step(loss), tuple(tensors)
        sources = [self._source(tensor) for tensor in tensors]
        for i, (tensor, source) in enumerate(zip(tensors, sources, strict=True)):
            if source is None and not (tensor.requires_grad and _is_leaf(tensor)):
                raise ValueError(
                    f"tensor {i} of shape {tuple(tensor.shape)} is neither a leaf that requires "
                    "grad (call requires_grad_() on it before the forward pass) nor made on this "
                    "tape"
                )
        found = self._play(loss, last, wanted=set(sources))
        return tuple(owned(None if source is None else found.get(source) for source in sources))

    def _last_step(self, loss: Tensor) -> Step:
        if self._spent:
            raise RuntimeError("this Tape was played already; record the forward pass again")
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a scalar, a tensor of shape (), not {what}")
        last = self._source(loss)
        if not isinstance(last, Step):
            raise ValueError(
                "the loss was not made on this tape from anything that requires grad: compute it "
                "inside `with Tape()`, not under no_grad, by operations that have a rule"
            )
        if loss._version != last.version:
            raise RuntimeError("the loss has been overwritten since by an in-place operation")
        return last

    def _play(self, loss: Tensor, last: Step, wanted: set) -> dict[Step | Leaf, Tensor]:
        """The gradients of the leaves that influence the loss, and of the steps `wanted`.

        What a step saved, and its gradient, are let go as soon as it is played.
        """
        self._spent = True
        grads: dict[Step | Leaf, Tensor] = {last: torch.ones_like(loss)}
        with torch.no_grad():
            while self._record:
                _, step = self._record.popitem()
                if step not in grads:
                    continue
                _check_versions(step)
                grad_z = grads[step] if step in wanted else grads.pop(step)
                for source, grad in zip(
                    step.sources, step.rule.backward(grad_z, step.saved, step.needs), strict=True
                ):
                    if source is None:
                        continue
                    if grad is None:
                        raise MissingRuleError(
                            f"{step.rule.name} has no rule for the gradient of one of its tensors "
                            "that require grad: detach() it to make it a constant"
                        )
                    grads[source] = grads[source] + grad if source in grads else grad
        self._leaves.clear()
        return grads

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        rule = TABLE.get(func)
        if rule is None or not torch.is_grad_enabled() or not _requires_grad(args, kwargs):
            return self._pass_through(func, args, kwargs)
        try:
            arguments, in_place = rule.arguments(args, kwargs)
        except (NotImplementedError, TypeError) as error:
            raise _missing(
                func, f"is called in a way that its rule does not cover: {error}"
            ) from None
        if torch._C._is_any_autocast_enabled():
            raise _missing(func, "runs under torch.autocast, which no rule covers")
        needs, sources = self._sources(func, rule, arguments)
        with torch.no_grad():
            if in_place:
                target = self._overwritable(func, arguments[0])
                arguments = (target.clone(), *arguments[1:])  # the rule may save the old value
            z, saved = rule.forward(*arguments)
            if z.is_complex():
                raise _missing(func, "gives complex numbers, which no rule covers")
            if not z.is_floating_point():
                return z  # not differentiable: x.to(torch.long)
            versions = [(t, t._version) for t in _tensors(saved)]
            if in_place:
                z = target.copy_(z)
            else:
                z = z.detach().requires_grad_()
                z.register_hook(_not_by_autograd)
        z._made_by = number = next(_numbers)
        self._record[number] = Step(
            weakref.ref(z), z._version, rule, saved, versions, needs, sources
        )
        return z

    def _sources(self, func: Callable, rule: Rule, arguments: tuple) -> tuple[tuple, list]:
        """Which of the rule's tensor arguments need a gradient, and what made them."""
        places = rule.tensors.values()
        needs, sources = [], []
        for place in places:
            operand = arguments[place] if place < len(arguments) else None
            source = None
            if isinstance(operand, Tensor) and operand.requires_grad:
                source = self._source(operand) or self._new_leaf(func, operand)
                if isinstance(source, Step) and operand._version != source.version:
                    raise RuntimeError(
                        f"{name_of(func)} was handed the result of {source.rule.name}, which has "
                        "since been overwritten by an in-place operation on it or on a view of it"
                    )
            needs.append(source is not None)
            sources.append(source)
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.requires_grad and place not in places:
                raise _missing(func, f"has no rule for the gradient of its argument {place}")
        return tuple(needs), sources

    def _new_leaf(self, func: Callable, tensor: Tensor) -> Leaf:
        if tensor.grad_fn is not None:
            raise _missing(
                func,
                f"was handed a tensor made by autograd ({tensor.grad_fn.name()}), not by the tape: "
                "by a scripted module, a custom Function, or before the tape was opened",
            )
        if not _is_leaf(tensor):
            raise _missing(
                func, "was handed a tensor made on another tape; detach() it to make it a constant"
            )
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            raise _missing(func, "was handed a tensor with a hook, which the tape would not run")
        leaf = self._leaves[id(tensor)] = Leaf(tensor)
        return leaf

    def _pass_through(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in _FOR_LEAVES and not all(map(_is_leaf, _tensors(args))):
            raise _missing(
                func, "has no effect on what the tape made: use tape.gradients, or detach()"
            )
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise _missing(
                    func, "overwrites a tensor that requires grad, and has no rule"
                ) from None
            raise
        if torch.is_grad_enabled():
            for tensor in _tensors(result):
                if tensor.grad_fn is not None:
                    raise _missing(func, "has no rule")
        return result

    def _overwritable(self, func: Callable, target: Tensor) -> Tensor:
        storages = {leaf.tensor.untyped_storage().data_ptr() for leaf in self._leaves.values()}
        if not target.requires_grad or target.untyped_storage().data_ptr() in storages:
            raise _missing(
                func,
                "overwrites a tensor that the tape did not make, or a view of one: "
                "use the operation that returns a new tensor",
            )
        return target

    def _source(self, tensor: Tensor) -> Step | Leaf | None:
        """The step of this tape that made the tensor, or the leaf that it is; None if unknown."""
        if _is_leaf(tensor):
            return self._leaves.get(id(tensor))
        step = self._record.get(getattr(tensor, "_made_by", -1))
        return step if step is not None and step.made() is tensor else None


def backprop(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    targets: Any,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss and the gradient of every parameter, without autograd.

    Computes ``loss_fn(model(*inputs), targets)``, a scalar, on a `Tape`. Returns the loss,
    detached, and ``{name: gradient}`` for the parameters that require grad, by their names in
    ``model.named_parameters()``: a tied weight stands there once, with the sum over its uses; a
    parameter that does not influence the loss has None. ``.grad`` is untouched.

    Raises `MissingRuleError` where an operation has no rule, ValueError if the loss is not a scalar
    or depends on no parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad(), Tape() as tape:
        loss = loss_fn(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)
    grads = tape.gradients(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, grads, strict=True))


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from _tensors(item)


def _requires_grad(args: tuple, kwargs: dict) -> bool:
    return any(tensor.requires_grad for tensor in _tensors((args, tuple(kwargs.values()))))


def _is_leaf(tensor: Tensor) -> bool:
    """Whether the user made the tensor, and neither a tape nor autograd did."""
    return tensor.grad_fn is None and not hasattr(tensor, "_made_by")


@unserializable_hook  # so that torch.save does not warn of it
def _not_by_autograd(_: Tensor) -> None:
    raise RuntimeError(
        "autograd reached a tensor made on a Tape: call tape.backward(loss), not loss.backward(); "
        "to use such a tensor as a constant, detach() it"
    )


def owned(grads: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """The same gradients, each contiguous and in memory of its own: rules share and hand on."""
    taken: set[int] = set()
    for grad in grads:
        if grad is not None:
            storage = grad.untyped_storage().data_ptr()
            if storage in taken or not grad.is_contiguous():
                grad = grad.clone(memory_format=torch.contiguous_format)
            taken.add(storage)
        yield grad


def _check_versions(step: Step) -> None:
    for tensor, version in step.versions:
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {step.rule.name} saved for its "
                "backward has been overwritten since by an in-place operation"
            )


def _missing(func: Callable, what: str) -> MissingRuleError:
    return MissingRuleError(f"{name_of(func)} {what}{_caller()}")


def _caller() -> str:
    """The module in whose forward we are, from the stack: ', called by <path> (<class>)'."""
    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return ""
    inner, root = modules[0], modules[-1]
    path = next((name for name, module in root.named_modules() if module is inner), "")
    return f"; called by {f'{path!r}, a ' if path else ''}{type(inner).__name__}"
