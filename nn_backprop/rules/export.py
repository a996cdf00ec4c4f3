"""What a port to another language has something to compare with: an example of a rule, in a file.

The keys are those that `check.compare_gradients` reads. Sizes are distinct primes where they can
be, so that no transposition, and no 1/N for 1/C, can hide; a stride leaves a remainder.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nn_backprop.rules import Rule


class Draw:
    """Random operands, real ones in float64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def positive(self, *shape: int) -> Tensor:
        """From ½ to 1½: far enough from 0 to divide by."""
        return 0.5 + torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def labels(self, count: int, classes: int) -> Tensor:
        return torch.randint(classes, (count,), generator=self.generator)


def _binary(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(3, 5), "y": draw.normal(5)}  # broadcast: grad_y is a sum


def _pooled(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(2, 3, 11, 13), "kernel_size": 5, "stride": 3, "padding": 1}


def _reduced(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(2, 3, 5), "dim": 1}


# The arguments of a rule's forward. A rule that is not here takes tensors of one shape, (3, 5).
EXAMPLES: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "linear": lambda draw: {
        "x": draw.normal(3, 5), "weight": draw.normal(7, 5), "bias": draw.normal(7)},
    "matmul": lambda draw: {"x": draw.normal(3, 5), "y": draw.normal(5, 7)},
    "conv2d": lambda draw: {
        "x": draw.normal(2, 3, 17, 19), "weight": draw.normal(11, 3, 7, 5),
        "bias": draw.normal(11), "stride": 3, "padding": 1},
    "locally_connected2d": lambda draw: {
        "x": draw.normal(2, 3, 13, 7), "weight": draw.normal(4, 3, 5, 3, 7, 4),
        "bias": draw.normal(5, 4, 3), "stride": 3, "padding": 2},
    "k_winners": lambda draw: {"x": draw.normal(2, 3, 5, 7), "k": 11},
    "max_pool2d": _pooled,
    "avg_pool2d": _pooled,
    "upsample_nearest": lambda draw: {"x": draw.normal(2, 3, 5, 7), "size": (11, 13)},
    "softmax": lambda draw: {"z": draw.normal(3, 5), "dim": 1},
    "log_softmax": lambda draw: {"z": draw.normal(3, 5), "dim": 1},
    "cross_entropy": lambda draw: {"logits": draw.normal(7, 5), "y": draw.labels(7, 5)},
    "nll_loss": lambda draw: {"x": draw.normal(7, 5).log_softmax(1), "y": draw.labels(7, 5)},
    "batch_norm": lambda draw: {
        "x": draw.normal(5, 3, 2, 7), "weight": draw.positive(3), "bias": draw.normal(3),
        "training": True},
    "layer_norm": lambda draw: {
        "x": draw.normal(2, 3, 5), "normalized_shape": (5,), "weight": draw.positive(5),
        "bias": draw.normal(5)},
    "dropout": lambda draw: {"x": draw.normal(7, 11), "p": 0.3},  # the output shows the mask
    "add": _binary,
    "sub": _binary,
    "mul": _binary,
    "div": lambda draw: {"x": draw.normal(3, 5), "y": draw.positive(5)},
    "pow": lambda draw: {"z": draw.normal(3, 5), "exponent": 3},
    "log": lambda draw: {"z": draw.positive(3, 5)},
    "reshape": lambda draw: {"x": draw.normal(2, 3, 5), "shape": (5, 6)},
    "pad": lambda draw: {"x": draw.normal(2, 3, 5), "pad": (1, 2, -1, 3), "value": -1.0},
    "permute": lambda draw: {"x": draw.normal(2, 3, 5), "dims": (2, 0, 1)},
    "cast": lambda draw: {"x": draw.normal(3, 5), "dtype": torch.float32},
    "sum": _reduced,
    "mean": _reduced,
}  # fmt: skip


def example(rule: Rule, seed: int = 0) -> dict[str, np.ndarray]:
    """The rule applied to operands drawn from `seed`: arrays by the keys of a file.

    input/NAME, parameter/NAME, label/NAME (class numbers), option/NAME (what else the forward was
    given), upstream/0 (random), output/0, and grad/NAME, the gradient by the rule. Real numbers
    are float64.
    """
    draw = Draw(seed)
    arguments = EXAMPLES[rule.name](draw) if rule.name in EXAMPLES else _plain(rule, draw)
    bound = _signature(rule).bind(**arguments)
    bound.apply_defaults()  # else .args ends at the first argument that was left out
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z, saved = rule.forward(*bound.args)
        upstream = draw.normal(*z.shape).to(z.dtype)
        needs = tuple(_is_real(arguments.get(name)) for name in rule.tensors)
        grads = rule.backward(upstream, saved, needs)
    arrays: dict[str, Any] = {f"{_word(n, a)}/{n}": a for n, a in arguments.items()}
    arrays |= {"upstream/0": upstream, "output/0": z}
    named = zip(rule.tensors, grads, strict=True)
    arrays |= {f"grad/{name}": grad for name, grad in named if grad is not None}
    return {key: _numpy(value) for key, value in arrays.items()}


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz file, whole or not at all. Raises ValueError, in one sentence."""
    if path.suffix != ".npz":
        raise ValueError(f"{path} is not written: its name has to end in .npz")
    if not path.parent.is_dir():
        raise ValueError(f"{path} is not written: there is no folder {path.parent}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} is not written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _plain(rule: Rule, draw: Draw) -> dict[str, Any]:
    """Operands of one shape for every tensor argument without a default."""
    parameters = _signature(rule).parameters
    required = [n for n in rule.tensors if parameters[n].default is inspect.Parameter.empty]
    return {name: draw.normal(3, 5) for name in required}


def _signature(rule: Rule) -> inspect.Signature:
    return inspect.signature(rule.forward)


def _word(name: str, argument: Any) -> str:
    if not isinstance(argument, Tensor):
        return "option"
    if not _is_real(argument):
        return "label"
    return "parameter" if name in ("weight", "bias") else "input"


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return (value.double() if _is_real(value) else value).numpy()
    return np.array(str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


def _is_real(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()
