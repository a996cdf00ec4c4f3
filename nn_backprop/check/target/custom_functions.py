"""Custom Functions from outside: which were called, what autograd makes of their forwards; and a
pair of NumPy functions as such a Function.

A `torch.autograd.Function` has two halves that its author wrote: `forward`, and `backward`. Where
the forward is torch code, autograd can differentiate it, and what comes out shares no line with the
backward. That is the first oracle. The classes are changed for the time of a call, rather than
their `apply`, since `apply` is often taken hold of beforehand: ``relu = ReLU.apply``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass(frozen=True)
class Call:
    """One use of a custom Function in a forward pass."""

    function: type[Function]
    args: tuple
    needs_grad: tuple[bool, ...]
    """Which of the arguments required grad; the others are constants of this call."""
    where: str  # the innermost module that it happened in, by its dotted name


def has_ctx(function: type[Function]) -> bool:
    """Whether its forward takes a context: else the class has a `setup_context`."""
    return function.setup_context is Function.setup_context


def forward_of(function: type[Function], args: tuple) -> tuple[Any, Any]:
    """What its forward returns when it is called as a plain function, and the context."""
    ctx: Any = FunctionCtx()
    ctx.needs_input_grad = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in args)
    if has_ctx(function):
        return function.forward(ctx, *args), ctx
    output = function.forward(*args)
    function.setup_context(ctx, args, output)
    return output, ctx


@contextmanager
def differentiated_forwards() -> Iterator[set[type[Function]]]:
    """Inside, the backward of every custom Function is autograd's, through the Function's own
    forward; the set tells which were called. Works for derivatives of any order."""
    called: set[type[Function]] = set()
    with _changed({f: _plain(f, called) for f in _custom_functions()}):
        yield called


@contextmanager
def recorded_calls(module: torch.nn.Module | None = None) -> Iterator[list[Call]]:
    """Inside, every call of a custom Function is noted, in order; one within another's forward is
    a part of that one."""
    calls: list[Call] = []
    names = {} if module is None else {m: name for name, m in module.named_modules()}
    stack: list[str] = [""]
    inside: list[type[Function]] = []

    def recording(function: type[Function]) -> dict[str, Any]:
        forward = function.forward

        def recorded(*args):
            operands = args[1:] if has_ctx(function) else args
            if not inside and not any(map(_is_wrapped, operands)):
                kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in operands)
                needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in operands)
                calls.append(Call(function, kept, needs, stack[-1]))
            inside.append(function)
            try:
                return forward(*args)
            finally:
                inside.pop()

        return {"forward": staticmethod(recorded)}

    def entering(m: torch.nn.Module, args: Any) -> None:
        stack.append(names.get(m, stack[-1]))

    def leaving(m: torch.nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    enter = register_module_forward_pre_hook(entering)
    leave = register_module_forward_hook(leaving, always_call=True)
    with enter, leave, _changed({f: recording(f) for f in _custom_functions()}):
        yield calls


@contextmanager
def marked_outputs() -> Iterator[list[Tensor]]:
    """Inside, the tensors that Functions declare as not differentiable are noted."""
    marked: list[Tensor] = []
    mark = FunctionCtx.mark_non_differentiable

    def noted(ctx: Any, *tensors: Tensor) -> None:
        marked.extend(tensors)
        mark(ctx, *tensors)

    with _changed({FunctionCtx: {"mark_non_differentiable": noted}}):
        yield marked


@contextmanager
def returned_gradients(function: type[Function], returned: list[tuple]) -> Iterator[None]:
    """Inside, what the backward of this Function returns is added to `returned` as it is:
    autograd's engine sums and casts it in silence, or refuses it."""
    name = "backward" if function.vjp is Function.vjp else "vjp"
    original = getattr(function, name)

    def noted(ctx, *upstream):
        result = original(ctx, *upstream)
        returned.append(tuple(result) if isinstance(result, tuple | list) else (result,))
        return result

    with _changed({function: {name: staticmethod(noted)}}):
        yield


def _is_wrapped(operand: Any) -> bool:
    """Whether it is one of vmap's or jvp's tensors, which mean nothing outside."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return isinstance(operand, Tensor) and is_wrapped(operand)


def _plain(function: type[Function], called: set[type[Function]]) -> dict[str, Any]:
    """The attributes that make autograd through the forward the backward of this Function."""
    # As the class was, for `forward_of`.
    original: Any = SimpleNamespace(forward=function.forward, setup_context=function.setup_context)

    def play(args: tuple) -> tuple[Any, Any]:
        copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # may be in place
        return forward_of(original, copies)

    def forward(ctx, *args):
        called.add(function)
        ctx.rng = torch.get_rng_state()
        ctx.others = [None if isinstance(a, Tensor) else a for a in args]
        ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        ctx.set_materialize_grads(False)
        output, seen = play(args)
        ctx.mark_non_differentiable(*getattr(seen, "non_differentiable", ()))
        return output

    def backward(ctx, *upstream):
        args = list(ctx.others)
        higher = torch.is_grad_enabled()
        for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            # An alias of its own for each place, since a tensor may stand in two.
            wanted = ctx.needs_input_grad[i]
            args[i] = tensor.view_as(tensor) if higher else tensor.detach().requires_grad_(wanted)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.rng)
            output, seen = play(tuple(args))
        frozen = {id(t) for t in getattr(seen, "non_differentiable", ())}
        pairs = zip(output if isinstance(output, tuple) else (output,), upstream, strict=True)
        kept = [
            (z, u) for z, u in pairs if u is not None and z.requires_grad and id(z) not in frozen
        ]
        wanted = [i for i in ctx.places if ctx.needs_input_grad[i]]
        if not kept or not wanted:
            return (None,) * len(args)
        grads = torch.autograd.grad(
            [z for z, _ in kept], [args[i] for i in wanted], [u for _, u in kept],
            create_graph=higher, allow_unused=True,
        )  # fmt: skip
        by_place = dict(zip(wanted, grads, strict=True))
        return tuple(by_place.get(i) for i in range(len(args)))

    return {
        "forward": staticmethod(forward), "backward": staticmethod(backward),
        "vjp": Function.vjp, "setup_context": Function.setup_context,
    }  # fmt: skip


def _custom_functions() -> list[type[Function]]:
    """Every Function that is not torch's own."""
    found: list[type[Function]] = [Function]
    for function in found:  # grows on the way
        found += function.__subclasses__()
    return [f for f in found if not f.__module__.startswith("torch.")]


@contextmanager
def _changed(changes: Mapping[type, dict[str, Any]]) -> Iterator[None]:
    """Inside, these classes have other attributes. A process may have hundreds of Functions, and a
    check comes here dozens of times: so without an ExitStack, which takes 30 times as long."""
    kept = {c: {n: vars(c).get(n, _MISSING) for n in new} for c, new in changes.items()}
    try:
        _set(changes)
        yield
    finally:
        _set(kept)


_MISSING = object()


def _set(attributes: Mapping[type, Mapping[str, Any]]) -> None:
    for changed, values in attributes.items():
        for name, value in values.items():
            if value is not _MISSING:
                setattr(changed, name, value)
            elif name in vars(changed):
                delattr(changed, name)


def numpy_pair(forward: Callable, backward: Callable) -> type[Function]:
    """A Function around NumPy functions ``forward(*inputs)`` and ``backward(grad, *inputs)``.

    Several outputs are a tuple, and then so is `grad`. The backward returns one array for each
    input, or for each floating one.
    """

    class NumpyPair(Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in args]
            tensors = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
            ctx.floating = [i for i, a in tensors if a.is_floating_point()]
            output = forward(*ctx.arrays)
            ctx.single = not isinstance(output, tuple | list)
            outputs = [output] if ctx.single else output
            # Copies, since what is returned may share memory with an input.
            outputs = tuple(torch.from_numpy(np.array(z)) for z in outputs)
            return outputs[0] if ctx.single else outputs

        @staticmethod
        def backward(ctx, *upstream):
            arrays = tuple(grad_z.detach().numpy() for grad_z in upstream)
            grads = backward(arrays[0] if ctx.single else arrays, *ctx.arrays)
            grads = grads if isinstance(grads, tuple | list) else (grads,)
            tensors = [None if g is None else torch.from_numpy(np.array(g)) for g in grads]
            if len(tensors) == len(ctx.arrays):
                return tuple(tensors)
            if len(tensors) != len(ctx.floating):
                raise ValueError(
                    f"backward returned {len(tensors)} gradients for {len(ctx.arrays)} inputs, "
                    f"{len(ctx.floating)} of them floating"
                )
            by_place = dict(zip(ctx.floating, tensors, strict=True))
            return tuple(by_place.get(i) for i in range(len(ctx.arrays)))

    return NumpyPair
