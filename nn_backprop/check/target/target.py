"""Whatever is to be checked, as one thing: named tensors in, tensors out, gradients back."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path

from nn_backprop.check.report import in_one_line
from nn_backprop.check.target import custom_functions
from nn_backprop.check.target.arguments import (
    Unsuitable,
    argument_names,
    arrange,
    described,
    hint_at_dataclasses,
    refuse_unsupported,
)
from nn_backprop.check.target.custom_functions import differentiated_forwards
from nn_backprop.check.target.state import Beside, Placing, copied, seed_generators

Tensors = dict[str, Tensor]
Gradients = Mapping[str, Tensor | None]
Upstream = Sequence[Tensor | None]
Layout = Callable[[Tensor], Tensor]
Wanted = tuple[str, ...] | None  # the names that need a gradient; None is all


class ForwardRaised(Exception):
    """The target's forward raised; `error` is what."""

    def __init__(self, error: Exception):
        super().__init__(in_one_line(error))
        self.error = error


class Target:
    """A module, Function, pair of NumPy functions or callable, applied to given inputs.

    `values` holds the floating inputs and, of a module, the parameters that require grad, each by
    its name, detached; these are what the gradients are taken with respect to. Everything else,
    such as class indices, flags and buffers, is a constant of the target. Nothing of the caller's
    is touched but the random state: a module is copied, its buffers are new at each call.
    """

    def __init__(
        self, target: Any, inputs: tuple, kwargs: dict[str, Any], loss: Callable | None = None,
        seed: int = 0, constant: Sequence[int] = (),
    ):  # fmt: skip
        """`constant` are the places of inputs whose gradient is not asked for."""
        self.seed, self.loss = seed, loss
        self.asks_for_gradients = False  # the forward itself
        self.declared: frozenset[str] | None = None  # not differentiable, once that is known
        self.placing = Placing()
        self.native: torch.dtype | None = None  # what it was cast from
        self.module: nn.Module | None = None  # a copy of `pristine`, the caller's
        self.pristine: nn.Module | None = None
        self.function: type[Function] | None = None
        bound = getattr(target, "__self__", None)
        if _is_function(bound) and getattr(target, "__name__", "") == "apply":
            target = bound
        if loss is not None and not callable(loss):
            raise Unsuitable(f"loss is {described(loss)}; it has to be a callable on the output")
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
            raise Unsuitable(f"seed is {seed!r}; it has to be a whole number from 0 to 2³² − 1")
        if isinstance(target, nn.Module):
            self.pristine, self.module = target, copied(target)
            self.call, signature_of = None, target.forward
        elif _is_function(target):
            self.function, self.call, signature_of = target, target.apply, target.forward
        elif isinstance(target, tuple) and len(target) == 2 and all(map(callable, target)):
            self.function = custom_functions.numpy_pair(*target)
            self.call, signature_of = self.function.apply, target[0]
        elif callable(target) and not isinstance(target, (Tensor, type)):
            self.call = signature_of = target
        else:
            raise Unsuitable(
                f"the target is {described(target)}; it has to be an nn.Module, an "
                "autograd.Function, a (forward, backward) pair of NumPy functions or a callable"
            )
        self.is_numpy = isinstance(target, tuple)
        named = target[0] if self.is_numpy else target
        self.label = getattr(named, "__name__", type(named).__name__)
        skip = _is_function(target) and custom_functions.has_ctx(target)
        names = argument_names(signature_of, skip, len(inputs))
        self.values, self.arguments = arrange(inputs, kwargs, names, constant, self.is_numpy)
        self.inputs = tuple(self.values)
        self.buffers: Tensors = {}
        self.keys: dict[str, str] = {}  # name of a value -> the module's name of the parameter
        nothing = "there is nothing to differentiate: none of the inputs is a floating-point tensor"
        if self.module is not None:
            nothing += ", and no parameter requires grad"
            for key, parameter in self.module.named_parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    refuse_unsupported(key, parameter)
                    name = f"parameter {key}" if key in self.inputs else key
                    self.keys[name] = key
                    self.values[name] = parameter.detach().clone()
                else:
                    self.buffers[key] = parameter.detach().clone()
            self.buffers |= {name: b.clone() for name, b in self.module.named_buffers()}
        if not self.values:
            raise Unsuitable(nothing + hint_at_dataclasses(self.arguments.leaves))

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision among the values: the one that bounds what can be expected."""
        return max((v.dtype for v in self.values.values()), key=lambda d: torch.finfo(d).eps)

    def cast(self, dtype: torch.dtype) -> "Target":
        """The same target with every floating tensor in another precision."""
        to = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        other = self.with_values({name: to(v) for name, v in self.values.items()})
        wider = torch.finfo(dtype).eps < torch.finfo(self.dtype).eps
        other.native = self.dtype if wider else None
        other.buffers = {name: to(v) for name, v in self.buffers.items()}
        other.arguments = replace(self.arguments, leaves=list(map(to, self.arguments.leaves)))
        return other

    def with_values(self, values: Tensors) -> "Target":
        other = copy.copy(self)
        other.values = values
        return other

    def fresh(self, training: bool | None = None) -> "Target":
        """The same with a module that was never called, in another mode if one is given."""
        other = copy.copy(self)
        if self.pristine is not None:
            other.module = copied(self.pristine)
            if training is not None:
                other.module.train(training)
        return other

    def as_computed_by(self, reference: Any, original: Any) -> "Target":
        """The same values in `reference`: a module, whose parameters are this one's by name or, if
        the names differ, by place; or a callable, which may use the `original` module."""
        other = copy.copy(self)
        other.function = reference if _is_function(reference) else None
        if isinstance(reference, nn.Module):
            other.module, other.pristine = copied(reference), None
            theirs = {k: p for k, p in reference.named_parameters() if p.requires_grad}
            other.keys = {n: k for n, k in self.keys.items() if k in theirs}
            if self.keys and len(other.keys) < len(self.keys):
                shapes = [tuple(self.values[n].shape) for n in self.keys]
                if [tuple(p.shape) for p in theirs.values()] != shapes:
                    raise Unsuitable(
                        "the reference's parameters match the target's neither by name nor by "
                        f"place: {', '.join(theirs) or 'none'} for {', '.join(self.keys)}"
                    )
                other.keys = dict(zip(self.keys, theirs, strict=True))
            state = (*reference.named_parameters(), *reference.named_buffers())
            taken = set(other.keys.values())
            other.buffers = {k: b.detach().clone() for k, b in state if k not in taken}
        elif callable(reference):
            other.call = reference.apply if _is_function(reference) else reference
            if isinstance(original, nn.Module):
                other.module, other.pristine = Beside(original, other.call), None
                other.keys = {name: f"original.{key}" for name, key in self.keys.items()}
                other.buffers = {f"original.{name}": b for name, b in self.buffers.items()}
        else:
            raise Unsuitable(f"the reference is {described(reference)}; it has to be a callable")
        return other

    def forward(self, values: Tensors) -> list[Tensor]:
        """The floating outputs at these values, in order. The random state starts the same each
        time; a backward draws on from where the forward has left it."""
        seed_generators(self.seed)
        with nullcontext() if self.native is None else _DefaultsOf(self.native):
            args, kwargs = self.arguments.filled(values)
            function = self.call if self.module is None else self.module
            if self.module is not None:
                state = {key: values[name] for name, key in self.keys.items()}
                state |= {name: b.clone() for name, b in self.buffers.items()}
                if isinstance(self.module, Beside):  # holds the caller's own, to be put back
                    function = partial(functional_call, self.module, state)
                    args, kwargs = (args, kwargs), {}
                else:
                    self.placing.place(self.module, state)
            try:
                output = function(*args, **kwargs)  # type: ignore[misc]
                if self.loss is not None:
                    output = self.loss(output)
            except Exception as error:
                raise ForwardRaised(error) from error
        found = tree_flatten_with_path(output)[0]
        tensors = [torch.from_numpy(z) if isinstance(z, np.ndarray) else z for _, z in found]
        self.output_names = [f"output{keystr(path)}" for path, _ in found]
        kept = [
            (name, z)
            for name, z in zip(self.output_names, tensors, strict=True)
            if isinstance(z, Tensor) and (z.is_floating_point() or z.is_complex())
            and name not in (self.declared or ())
        ]  # fmt: skip
        self.output_names = [name for name, _ in kept]
        for name, z in kept:
            refuse_unsupported(name, z)
        if not kept:
            nothing = "there is nothing to differentiate: no output is a floating tensor"
            raise Unsuitable(nothing + hint_at_dataclasses([z for _, z in found]))
        return [z for _, z in kept]

    def run(self) -> list[Tensor]:
        """The outputs at the target's own values, with a graph."""
        return self.forward(self.leaves_of()[1])

    def look_for_declared(self) -> None:
        """Finds the outputs that are marked as not differentiable, to leave them out."""
        if self.declared is not None:
            return
        with custom_functions.marked_outputs() as marked:
            outputs = self.run()
        pairs = zip(self.output_names, outputs, strict=True)
        self.declared = frozenset(name for name, z in pairs if any(z is t for t in marked))

    def outputs(self, values: Tensors) -> list[Tensor]:
        """The forward's outputs as numbers without a graph; `values` are new tensors, which it may
        work in. Where it asks for gradients itself, it is run under autograd."""
        try:
            if not self.asks_for_gradients:
                with torch.no_grad():
                    return self.forward(values)
        except ForwardRaised as raised:
            if "require grad" not in str(raised):
                raise
        self.asks_for_gradients = True
        with torch.enable_grad():
            for value in values.values():
                value.requires_grad_()
            return [z.detach() for z in self.forward(values)]

    def draws(self) -> bool:
        """Whether the forward draws from torch's generator."""
        seed_generators(self.seed)
        before = torch.get_rng_state()
        self.run()
        return not torch.equal(before, torch.get_rng_state())

    def leaves_of(self, wanted: Wanted = None, layout: Layout | None = None):
        """New leaves with the target's values, and what to hand to the forward in their place."""
        leaves, handed = {}, {}
        for name, value in self.values.items():
            leaf = value.detach().clone().requires_grad_(wanted is None or name in wanted)
            # Of an input a copy, since a forward may work in place.
            leaves[name], is_input = leaf, name in self.inputs
            handed[name] = (layout or torch.clone)(leaf) if is_input else leaf
        return leaves, handed

    def gradients(
        self, upstream: Upstream, wanted: Wanted = None, layout: Layout | None = None
    ) -> dict[str, Tensor | None]:
        """The target's own gradients, by autograd's engine; None where it gave none."""
        leaves, handed = self.leaves_of(wanted, layout)
        return backward(self.forward(handed), leaves, upstream, wanted)

    def filled(self, grads: Gradients) -> Tensors:
        """These gradients in float64, with zeros where there is none."""
        return {name: filled(grad, self.values[name]) for name, grad in grads.items()}

    def plain_forward(self, values: Tensors) -> list[Tensor]:
        """The outputs, with every custom Function's forward played as plain torch code."""
        inlined = self.with_values({n: v.clone() for n, v in values.items()})
        function = self.function
        if function is not None:
            inlined.call = lambda *args: custom_functions.forward_of(function, args)[0]
        with differentiated_forwards():
            return inlined.forward(inlined.values)

    def plain_gradients(
        self, upstream: Upstream, called: set | None = None
    ) -> dict[str, Tensor | None]:
        """Autograd's gradients through the plain forward: each custom Function's own forward."""
        with differentiated_forwards() as seen:
            grads = self.gradients(upstream)
        if called is not None:
            called |= seen
        return grads


def backward(
    outputs: list[Tensor], leaves: Tensors, upstream: Upstream, wanted: Wanted = None, **how: bool
) -> dict[str, Tensor | None]:
    """Autograd's gradients of the leaves; `how` is for torch.autograd.grad."""
    names = [n for n in leaves if wanted is None or n in wanted]
    pairs = zip(outputs, upstream, strict=True)
    kept = [(z, u) for z, u in pairs if u is not None and z.requires_grad]
    if not kept:
        return dict.fromkeys(names)
    grads = torch.autograd.grad(
        [z for z, _ in kept], [leaves[n] for n in names], [u for _, u in kept],
        allow_unused=True, **how,
    )  # fmt: skip
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and grad.layout != torch.strided:
            what = f"the gradient of {name} is a sparse tensor, which the checker does not support"
            raise Unsuitable(f"{what}: ask for a dense one, as with sparse=False")
    return dict(zip(names, grads, strict=True))


def filled(grad: Tensor | None, value: Tensor) -> Tensor:
    """A gradient of that value in float64; zeros if there is none."""
    if grad is None:
        return torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    return grad.detach().double()


def largest(t: Tensor | None) -> float:
    """The largest |entry|; 0 if there is none."""
    return t.abs().max().item() if t is not None and t.numel() else 0.0


class _DefaultsOf(TorchFunctionMode):
    """Inside, a default that depends on the precision is that of `dtype`: rms_norm's eps."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.eps = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            names = ("input", "normalized_shape", "weight", "eps")
            kwargs |= dict(zip(names, args, strict=False))
            args = ()
            kwargs["eps"] = self.eps if kwargs.get("eps") is None else kwargs["eps"]
        return func(*args, **kwargs)


def _is_function(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, Function)
