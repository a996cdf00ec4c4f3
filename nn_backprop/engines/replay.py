"""A recorded pass as a straight program: the tape without the recording.

In a training loop the same operations follow one another at every step, on other numbers. So one
pass is recorded by the tape, and written down as a Python function: the forwards of the rules that
were met, line by line, and their backwards in reverse. Calling it costs no look-up, no check and no
bookkeeping; printing it shows the backward pass of the network as one would write it by hand.

This is right only as long as nothing but the numbers changes. What a recording can see of that it
refuses: a number that the model reads from a tensor to decide by it (``.item()``, ``if x.any()``),
and operations in place. What it cannot see must not be there: a hook, a counter in Python, a
parameter that is replaced by another, frozen or unfrozen later. That is why only our own training
loop replays; `backprop` and `Tape` record every pass anew.
"""

import keyword
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.engines.tape import Leaf, Step, Tape, owned
from nn_backprop.rules.rule import name_of

# What these say of a tensor depends on its shape and type alone, not on its numbers.
_OF_SHAPE_AND_TYPE = {
    Tensor.size, Tensor.dim, Tensor.__len__, Tensor.numel, Tensor.stride, Tensor.is_floating_point,
    Tensor.is_contiguous, torch.is_floating_point, torch.numel,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda",
                                                 "is_leaf", "requires_grad", "is_sparse")),
}  # fmt: skip
# The program's own names.
_LOCAL = re.compile(r"(z|saved|more)\d+|grad_\w+|inputs|targets|step|_")


class NotReplayableError(ValueError):
    """The pass may go another way on other data."""


class _Recorder(Tape):
    """A tape that keeps the calls themselves too: function, arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Tensor, Step | None]] = []

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        recorded = len(self._record)
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self._record) > recorded:
            step = next(reversed(self._record.values()))
            arguments, in_place = step.rule.arguments(args, kwargs)
            if in_place:
                raise NotReplayableError(f"{name_of(func)} overwrites its operand")
            self.calls.append((step.rule.forward, arguments, {}, result, step))
        elif isinstance(result, Tensor):
            self.calls.append((func, args, kwargs, result, None))
        elif func not in _OF_SHAPE_AND_TYPE:
            raise NotReplayableError(f"{name_of(func)} may depend on the data")
        return result


class Replay:
    """A pass over one batch, for all batches of the same shapes and types.

    ``Replay(model, loss_fn, inputs, targets)`` records it. Called with inputs and targets, the
    object returns the loss and leaves new gradients in ``.grad``, as an engine does. `source` is
    the program. It holds for the parameters that the model has now, whatever their values will be,
    and for the mode that it is in, training or evaluation: see `fits`.

    Raises NotReplayableError if the pass could go another way on other data, and what `backprop`
    raises.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        self._model, self._key = model, _key(model, inputs, targets)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
                self._record(model, loss_fn, inputs, targets)
        finally:
            for buffer, before in buffers:  # running statistics have not seen a batch by this
                buffer.copy_(before)

    def _record(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        tape = _Recorder()
        with torch.enable_grad(), tape:
            loss = loss_fn(model(inputs), targets)
        program = _Program(model, inputs, targets)
        for call in tape.calls:
            program.add_forward(*call)
        program.add_backwards(tape._last_step(loss))
        self.source, self._step = program.compile()
        self._parameters = program.parameters
        expected = tape.gradients(loss, self._parameters)  # raises as `backprop` does

        # Which gradients share their memory, or lie in it otherwise than their parameters, is the
        # same at every call.
        with torch.no_grad():
            _, *grads = self._step(inputs, targets)
        assert [grad is None for grad in grads] == [grad is None for grad in expected]
        self._copied = [
            i
            for i, (grad, own) in enumerate(zip(grads, owned(grads), strict=True))
            if grad is not None
            and own is not None
            and (own is not grad or grad.stride() != self._parameters[i].stride())
        ]

    def fits(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> bool:
        """Whether this is the pass of the model, in its present mode, on batches like these."""
        return model is self._model and self._key == _key(model, inputs, targets)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None  # so that the old gradients do not lie beside the new ones
        with torch.no_grad():
            loss, *grads = self._step(inputs, targets)
            for i in self._copied:
                grads[i] = torch.empty_like(self._parameters[i]).copy_(grads[i])
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad
        return loss


def _key(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple:
    batch = (inputs.shape, inputs.stride(), inputs.dtype, inputs.device)
    return (model.training, *batch, targets.shape, targets.dtype)


class _Program:
    """The text of the program, and what its names stand for."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.lines: list[str] = []
        self.meaning: dict[str, Any] = {}
        self.tensors = {id(inputs): "inputs", id(targets): "targets"}  # names, by id
        self.kept = [inputs, targets]  # so that no id is given twice
        self.steps: list[tuple[Step, str]] = []
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        for name, p in named:
            self.tensors[id(p)] = self._constant(name, p)

    def add_forward(
        self, function: Callable, args: tuple, kwargs: dict, result: Tensor, step: Step | None
    ) -> None:
        """As in ``z3, saved3 = linear_forward(z2, layers_0_weight, layers_0_bias)``."""
        taken = [self._written(a) for a in args]
        taken += [f"{name}={self._written(a)}" for name, a in kwargs.items()]
        n = len(self.lines)
        name = f"{step.rule.name}_forward" if step else getattr(function, "__name__", "call")
        left = f"z{n}, saved{n}" if step else f"z{n}"
        self.lines.append(f"{left} = {self._constant(name, function)}({', '.join(taken)})")
        self.tensors[id(result)] = f"z{n}"
        self.kept.append(result)
        if step:
            self.steps.append((step, f"{n}"))

    def add_backwards(self, last: Step) -> None:
        """As in ``grad_z2, grad_layers_0_weight, _ = linear_backward(grad_z3, saved3, needs)``."""
        names: dict[Step | Leaf | None, str] = {step: f"grad_z{n}" for step, n in self.steps}
        loss = names[last].removeprefix("grad_")
        self.meaning["ones_like"] = torch.ones_like
        self.lines.append(f"{names[last]} = ones_like({loss})")
        reached: set[Step | Leaf] = {last}
        for step, n in reversed(self.steps):
            if step not in reached:
                continue
            left: list[str] = []
            sums: list[str] = []
            for source in step.sources:
                if isinstance(source, Leaf):
                    names[source] = f"grad_{self._written(source.tensor)}"
                name = "_" if source is None else names[source]
                if source in reached:
                    sums.append(f"{name} = {name} + more{len(left)}")
                    name = f"more{len(left)}"
                if source is not None:
                    reached.add(source)
                left.append(name)
            function = self._constant(f"{step.rule.name}_backward", step.rule.backward)
            right = f"{function}(grad_z{n}, saved{n}, {step.needs})"
            self.lines += [f"{', '.join(left)}, = {right}", *sums, f"del grad_z{n}, saved{n}"]
        written = {f"grad_{self._written(p)}" for p in self.parameters}
        unused = written - {names[source] for source in reached}
        self.lines += [f"{name} = None" for name in sorted(unused)]
        returned = [loss, *(f"grad_{self._written(p)}" for p in self.parameters)]
        self.lines.append(f"return {', '.join(returned)}")

    def compile(self) -> tuple[str, Callable]:
        source = "\n    ".join(["def step(inputs, targets):", *self.lines]) + "\n"
        namespace = dict(self.meaning)
        exec(source, namespace)  # every name in it is a key of `meaning`
        return source, namespace["step"]

    def _written(self, value: Any) -> str:
        if isinstance(value, Tensor):
            known = self.tensors.get(id(value))
            return known or self._constant("tensor", value)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list, torch.Size):
            items = [self._written(item) for item in value]
            return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)},)"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        return self._constant("constant", value)

    def _constant(self, name: str, value: Any) -> str:
        """A name for the value: the one asked for, or a longer one if that is taken."""
        name = re.sub(r"\W", "_", name)
        if not name.isidentifier() or keyword.iskeyword(name) or _LOCAL.fullmatch(name):
            name = f"_{name}"
        while self.meaning.setdefault(name, value) is not value:
            name += "_"
        return name
