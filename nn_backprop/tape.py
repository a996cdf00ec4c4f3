"""Reverse mode: record the rules that a forward pass uses, then play them backwards."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from nn_backprop.rules import TABLE, Rule


class MissingRuleError(NotImplementedError):
    """A differentiable operation was met for which the table has no rule."""


@dataclass(slots=True, eq=False)
class _Leaf:
    """A tensor that requires grad and was there before: a parameter, an input."""

    tensor: Tensor


@dataclass(slots=True, eq=False)
class _Step:
    """One operation of the record, and with it the tensor that it made."""

    rule: Rule
    saved: tuple
    versions: list[tuple[Tensor, int]]  # of the saved tensors, as the forward left them
    needs: tuple[bool, ...]
    sources: list["_Step | _Leaf | None"]  # of each operand; None if it needs no gradient
    version: int = 0  # of the tensor that it made


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
    In-place operations work as in autograd: the result takes its operand's place, and a tensor
    that was overwritten while a rule still needed its old value raises RuntimeError.
    """

    _open = False  # whether some tape is recording; only one can see a call

    def __init__(self) -> None:
        super().__init__()
        self._record: list[_Step] = []
        self._leaves: dict[int, _Leaf] = {}  # by id; a leaf keeps its tensor, so ids stay unique
        self._made: list[weakref.ref[Tensor]] = []
        self._spent = False

    def __enter__(self) -> "Tape":
        if Tape._open:
            raise RuntimeError("another Tape is recording; close it before you open a second one")
        if self._record or self._spent:
            raise RuntimeError("this Tape has recorded already; make a new one for each pass")
        Tape._open = True
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        Tape._open = False
        for reference in self._made:  # outside, loss.backward() must fail rather than do nothing
            if (tensor := reference()) is not None:
                tensor.requires_grad_(False)
        self._made.clear()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to ``.grad`` of every leaf that requires grad.

        Raises ValueError if `loss` is not a scalar made on this tape, RuntimeError if the tape was
        played already or a saved tensor was overwritten.
        """
        handed_out: set[int] = set()
        for source, grad in self._play(loss).items():
            if isinstance(source, _Leaf):
                leaf = source.tensor
                storage = grad.untyped_storage().data_ptr()
                if storage in handed_out or not grad.is_contiguous() or storage == loss.data_ptr():
                    grad = grad.clone(memory_format=torch.contiguous_format)
                handed_out.add(storage)
                if leaf.grad is None:
                    leaf.grad = grad
                else:
                    leaf.grad += grad

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient of `loss`, a scalar, for each of `tensors`; None where it has no influence.

        Each tensor is a leaf that requires grad, or was made on this tape; another raises
        ValueError, as does a `loss` that is not a scalar made on this tape. RuntimeError as for
        `backward`.
        """
        for i, tensor in enumerate(tensors):
            if not tensor.requires_grad and self._source(tensor) is None:
                raise ValueError(
                    f"tensor {i} of shape {tuple(tensor.shape)} does not require grad: call "
                    "requires_grad_() on it before the forward pass"
                )
        grads = self._play(loss)
        sources = [self._source(tensor) for tensor in tensors]
        return tuple(None if source is None else grads.get(source) for source in sources)

    def _play(self, loss: Tensor) -> dict[_Step | _Leaf, Tensor]:
        """The gradients of all steps and leaves that influence `loss`."""
        if self._spent:
            raise RuntimeError("this Tape was played already; record the forward pass again")
        last = self._source(loss)
        if loss.dim() != 0:
            raise ValueError(f"the loss must be a scalar; this one has shape {tuple(loss.shape)}")
        if last is None:
            raise ValueError(
                "the loss was not made on this tape from anything that requires grad: compute it "
                "inside `with Tape()`, and not under no_grad"
            )
        self._spent = True
        grads: dict[_Step | _Leaf, Tensor] = {last: torch.ones_like(loss)}
        with torch.no_grad():
            while self._record:
                step = self._record.pop()
                if step not in grads:
                    continue
                _check_versions(step)
                for source, grad in zip(
                    step.sources, step.rule.backward(grads[step], step.saved, step.needs),
                    strict=True,
                ):  # fmt: skip
                    if source is not None and grad is not None:
                        grads[source] = grads[source] + grad if source in grads else grad
        return grads

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        rule = TABLE.get(func)
        if rule is None or not torch.is_grad_enabled():
            return self._pass_through(func, args, kwargs)
        try:
            arguments, in_place = rule.arguments(args, kwargs)
        except (NotImplementedError, TypeError) as error:
            raise _missing(
                func, f"is called in a way that its rule does not cover: {error}"
            ) from None
        needs, sources = self._sources(func, rule, arguments)
        if not any(needs):
            return func(*args, **kwargs)
        with torch.no_grad():
            if in_place:
                target = self._overwritable(func, arguments[0])
                arguments = (target.clone(), *arguments[1:])  # the rule may save the old value
            z, saved = rule.forward(*arguments)
            step = _Step(rule, saved, [(t, t._version) for t in _tensors(saved)], needs, sources)
            if in_place:
                z = target.copy_(z)
            else:
                z = z.detach().requires_grad_()
                self._made.append(weakref.ref(z))
        step.version = z._version
        z._made_by = (self, step)
        self._record.append(step)
        return z

    def _sources(self, func: Callable, rule: Rule, arguments: tuple) -> tuple[tuple, list]:
        """Which of the rule's tensor arguments need a gradient, and what made them."""
        places = rule.tensors.values()
        needs, sources = [], []
        for place in places:
            operand = arguments[place] if place < len(arguments) else None
            needed = isinstance(operand, Tensor) and operand.requires_grad
            source = None
            if isinstance(operand, Tensor) and needed:
                source = self._source(operand)
                if source is None:
                    source = self._leaves[id(operand)] = _Leaf(operand)
                    if operand.grad_fn is not None:
                        raise _missing(
                            func,
                            f"was handed a tensor made by autograd ({operand.grad_fn.name()}), not "
                            "by the tape: by a scripted module, a custom Function, or before the "
                            "tape was opened",
                        )
                elif isinstance(source, _Step) and operand._version != source.version:
                    raise RuntimeError(
                        f"{_name(func)} was handed the result of {source.rule.name}, which has "
                        "since been overwritten by an in-place operation on it or on a view of it"
                    )
            needs.append(needed)
            sources.append(source)
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.requires_grad and place not in places:
                raise _missing(func, f"has no rule for the gradient of its argument {place}")
        return tuple(needs), sources

    def _pass_through(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise _missing(func, "changes a recorded tensor in place and has no rule") from None
            raise
        if torch.is_grad_enabled():
            for tensor in _tensors(result):
                if tensor.grad_fn is not None:
                    raise _missing(func, "has no rule")
        return result

    def _overwritable(self, func: Callable, target: Tensor) -> Tensor:
        if not isinstance(self._source(target), _Step):
            raise _missing(func, "overwrites a tensor that the tape did not make; write a new one")
        return target

    def _source(self, tensor: Tensor) -> _Step | _Leaf | None:
        """The step of this tape that made the tensor, or the leaf that it is; None if unknown."""
        tape, step = getattr(tensor, "_made_by", (None, None))
        return step if tape is self else self._leaves.get(id(tensor))


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


def _check_versions(step: _Step) -> None:
    for tensor, version in step.versions:
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {step.rule.name} saved for its "
                "backward has been overwritten since by an in-place operation"
            )


def _name(func: Callable) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _missing(func: Callable, what: str) -> MissingRuleError:
    return MissingRuleError(f"{_name(func)} {what}{_caller()}")


def _caller() -> str:
    """The module in whose forward we are, from the stack: ', called by <path> (<class>)'."""
    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not (modules and modules[-1] is owner):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return ""
    inner, root = modules[0], modules[-1]
    path = next((name for name, module in root.named_modules() if module is inner), "")
    return f"; called by {f'{path!r}, a ' if path else ''}{type(inner).__name__}"
