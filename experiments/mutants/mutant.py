"""How a mistake is written: a right layer, and what is changed in its backward.

A layer is a plain forward(*inputs) -> z, so that autograd through it is the truth (where a module
cuts its own graph, finite differences are), and a backward(grad_z, z, *inputs), written out by
hand, that returns a gradient for each input: `layer_of` joins the two. A mistake replaces pieces of
the backward's source, each of which stands there exactly once, or some of its gradients. All values
are tensors or None, and float64 but in the few mistakes that are of float32. Of several outputs, z
and grad_z are tuples.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nn_backprop.check.report import KINDS


@dataclass(frozen=True)
class Mutant:
    """A layer with one mistake (or, among the equivalents, with none)."""

    name: str
    """"family/what is wrong"."""
    kinds: tuple[str, ...]
    """The one or two words of `KINDS` that name it rightly; none for an equivalent."""
    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    """A fresh target and the inputs on which the mistake shows."""
    hides: Callable[[], tuple[Any, tuple[Any, ...]]] | None = None
    """The same mistake with inputs on which the gradient comes out right."""
    second_order: bool = False
    """Shows in the second derivative only."""

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def __post_init__(self) -> None:
        if not set(self.kinds) <= set(KINDS) or len(self.kinds) > 2:
            raise ValueError(f"{self.name}: {self.kinds} are not one or two kinds of cause")


class Case(NamedTuple):
    """A layer and its data: forward(*inputs) -> z, backward(grad_z, z, *inputs) -> gradients."""

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]
    shapes: tuple[tuple[int, ...], ...]
    made_of: Callable[..., Any] | None = None
    """What makes the inputs of normal numbers of these shapes; by default they are the inputs."""

    def data(self) -> tuple[Any, ...]:
        drawn = numbers(*self.shapes)
        inputs = self.made_of(*drawn) if self.made_of else drawn
        return inputs if isinstance(inputs, tuple) else (inputs,)

    def of(self, *shapes: tuple[int, ...]) -> "Case":
        """The same layer on numbers of other shapes."""
        return self._replace(shapes=shapes)

    def on(self, made_of: Callable[..., Any]) -> "Case":
        """The same layer on what else is made of the numbers."""
        return self._replace(made_of=made_of)


def layer(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Any, ...]],
    classic: bool = False,
) -> type[Function]:
    """A Function out of two pure ones, in torch's classic style or in that of `setup_context`.

    Several outputs reach `backward` as a tuple, and so do their gradients. One that has an argument
    `asked` is told which inputs need a gradient.
    """
    guarded = "asked" in inspect.signature(backward).parameters
    parameters = list(inspect.signature(forward).parameters.values())
    count = len(parameters)

    def save(ctx: Any, inputs: Any, z: Any) -> None:
        ctx.save_for_backward(*inputs, *(z if isinstance(z, tuple) else (z,)))

    def play(ctx: Any, *grad_z: Any) -> tuple[Any, ...]:
        inputs, z = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if len(z) == 1:
            z, grad_z = z[0], grad_z[0]
        asked = {"asked": ctx.needs_input_grad} if guarded else {}
        return tuple(backward(grad_z, z, *inputs, **asked))

    def forward_and_save(ctx: Any, *inputs: Any) -> Any:
        z = forward(*inputs)
        save(ctx, inputs, z)
        return z

    ctx_first = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    cast(Any, forward_and_save).__signature__ = inspect.Signature([ctx_first, *parameters])
    members: dict[str, Any] = {"forward": staticmethod(forward_and_save)}
    if not classic:
        set_up: Any = save
        members = {"forward": staticmethod(forward), "setup_context": staticmethod(set_up)}
    members["backward"] = staticmethod(play)
    return cast(type[Function], type(name, (Function,), members))


def layer_of(
    forward: Callable[..., Any],
    *shapes: tuple[int, ...],
    data: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Case]:
    """Decorates the right backward of `forward`, which is given normal numbers of these shapes, or
    what `data` makes of them."""
    return lambda backward: Case(forward, backward, shapes, data)


def changed(function: Callable[..., Any], changes: dict[str, str]) -> Callable[..., Any]:
    """The function with pieces of its source replaced, each of which it must hold exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index(f"def {function.__name__}(") :]
    for old, new in changes.items():
        if source.count(old) != 1:
            raise ValueError(f"{function.__name__} holds {source.count(old)} times: {old}")
        source = source.replace(old, new)
    outer = inspect.getclosurevars(function).nonlocals
    scope: dict[str, Any] = {**function.__globals__, **outer}
    exec(compile(source, f"<{function.__name__} changed>", "exec"), scope)
    return scope[function.__name__]


def mutant(
    name: str,
    kinds: str,
    shows: Case,
    hides: Case | None = None,
    *,
    change: dict[str, str] | None = None,
    classic: bool = False,
    second_order: bool = False,
    given: int = 0,
    **wrong: Callable[[Any], Any],
) -> Mutant:
    """The layer of `shows` with one mistake: a change of its backward, or some gradients replaced.

    `change={right: wrong}` replaces pieces of source. `weight=lambda at: …` replaces grad_weight;
    `at` holds grad_z, z, the inputs by name, and the right gradients as grad_x, grad_weight, ….
    With `given` it is a module, which is given so many inputs and holds the others as parameters.
    """

    def build(case: Case) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
        names = list(inspect.signature(case.forward).parameters)
        right = changed(case.backward, change) if change else case.backward

        def backward(grad_z: Any, z: Any, *inputs: Any) -> tuple[Any, ...]:
            gradients = dict(zip(names, right(grad_z, z, *inputs), strict=True))
            at = SimpleNamespace(grad_z=grad_z, z=z, **dict(zip(names, inputs, strict=True)))
            at.__dict__.update({f"grad_{name}": gradients[name] for name in names})
            return tuple(wrong[name](at) if name in wrong else gradients[name] for name in names)

        title, played = name.partition("/")[0].title(), backward if wrong else right

        def make() -> tuple[Any, tuple[Any, ...]]:
            step, inputs = layer(title, case.forward, played, classic), case.data()
            if not given:
                return step, inputs
            held = zip(names[given:], inputs[given:], strict=True)
            return Holding(step, dict(held)), inputs[:given]

        return make

    return Mutant(
        name, tuple(kinds.split()), build(shows), build(hides) if hides else None, second_order
    )


def written_out(
    name: str,
    kinds: str,
    build: Callable[[], Any],
    *shapes: tuple[int, ...],
    second_order: bool = False,
) -> Mutant:
    """A mutant that is a module, or a Function of its own, made afresh; its inputs are normal."""
    return Mutant(
        name, tuple(kinds.split()), lambda: (build(), numbers(*shapes)), None, second_order
    )


class Holding(nn.Module):
    """A layer that holds, as parameters, what its step takes after the inputs."""

    def __init__(self, step: type[Function], parameters: dict[str, Any]) -> None:
        super().__init__()
        self.step = step
        for name, value in parameters.items():
            ready = isinstance(value, nn.Parameter)  # perhaps frozen
            self.register_parameter(name, value if ready else nn.Parameter(value))

    def forward(self, *inputs: Any) -> Any:
        return self.step.apply(*inputs, *self.parameters())


def numbers(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal numbers of these shapes, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
