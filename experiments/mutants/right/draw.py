"""What a random configuration is made of: numbers, sizes, types, layouts and scales."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LAYOUTS = ("plain", "plain", "transposed", "every second", "expanded", "offset")


@dataclass
class Call:
    """A target whose gradient is right, and what it is called with."""

    name: str
    target: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    seed: int = 0
    second_order: bool = False
    precision: str = ""

    @property
    def description(self) -> str:
        words = [_looks(a) for a in self.args]
        words += [f"{k}={_looks(v)}" for k, v in self.kwargs.items()]
        what = f"{self.target} " if isinstance(self.target, nn.Module) else ""
        mode = ""
        if isinstance(self.target, nn.Module):
            mode = ", training" if self.target.training else ", evaluation"
        more = ", second order" if self.second_order else ""
        return (
            f"{self.kind} {self.name}: {' '.join(what.split())}({', '.join(words)}), "
            f"seed {self.seed}{mode}{more}"
        )


def _looks(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_looks, x))}]"
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        return repr(x)
    kind = str(x.dtype).removeprefix("torch.")
    if not x.is_floating_point() or not x.numel():
        return f"{kind}{list(x.shape)}"
    strides = "" if x.is_contiguous() else f" strides {x.stride()}"
    return f"{kind}{list(x.shape)}{strides} |≤{x.abs().max().item():.2g}|"


@dataclass
class Constant:
    """A tensor argument that has no gradient: the target holds it rather than being handed it."""

    value: Tensor


def holding(function: Callable, args: tuple) -> tuple[Callable, tuple]:
    """The function of those arguments alone that are not constants."""
    if not any(isinstance(a, Constant) for a in args):
        return function, args

    def held(*free: Any) -> Any:
        rest = iter(free)
        return function(*(a.value if isinstance(a, Constant) else next(rest) for a in args))

    held.__name__ = getattr(function, "__name__", "held")
    return held, tuple(a for a in args if not isinstance(a, Constant))


class Draw:
    """Random numbers, sizes, types and tensors of one configuration."""

    def __init__(self, seed: int, reach: float):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.reach = reach
        self.dtype = self.pick(
            *[torch.float64] * 48, *[torch.float32] * 44, *[torch.bfloat16] * 4,
            *[torch.float16] * 4,
        )  # fmt: skip
        if self.dtype == torch.float16:
            self.reach = min(reach, 3.0)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, *choices: int) -> int:
        return self.pick(*(choices or (1, 2, 3, 4, 5, 7)))

    def shape(self, *ranks: int) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.pick(*(ranks or (1, 2, 3)))))

    def scale(self) -> float:
        reach = self.reach * self.random.uniform(-1, 1)
        return 10**reach if self.chance(0.6) else 1.0

    def values(self, shape: tuple[int, ...]) -> Tensor:
        """Of size about 1: normal; small integers, many of them equal or 0; half of them 0; all
        the same; close together far from 0."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.random.random()
        if kind < 0.20:
            x = (1.5 * x).round()
        elif kind < 0.28:
            x = x * (x > 0)
        elif kind < 0.32:
            x = torch.full(shape, x.flatten()[0].item() if x.numel() else 0.0, dtype=torch.float64)
        elif kind < 0.37:
            x = 10 + x
        return x

    def x(self, *shape: int) -> Tensor:
        return self.laid_out(self.values(shape) * self.scale())

    def tensor(self) -> Tensor:
        return self.x(*self.shape(0, 1, 2, 3))

    def unit(self, *shape: int) -> Tensor:
        """Of size about 1, whatever the scale of the rest."""
        return self.laid_out(self.values(shape))

    def positive(self, *shape: int) -> Tensor:
        return self.laid_out((0.1 + self.values(shape).abs()) * self.scale())

    def signed(self, *shape: int) -> Tensor:
        """Away from 0, of either sign."""
        x = self.positive(*shape)
        sign = torch.randint(2, x.shape, generator=self.generator) * 2 - 1
        return x * sign.to(x.dtype)

    def share(self, *shape: int) -> Tensor:
        """Between 0.05 and 0.95."""
        return self.laid_out(
            0.05 + 0.9 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        )

    def small(self, *shape: int) -> Tensor:
        """Of size about 1 or smaller."""
        return self.laid_out(self.values(shape) * min(1.0, self.scale()))

    def labels(self, *shape: int, classes: int, ignored: int | None = None) -> Tensor:
        y = torch.randint(classes, shape, generator=self.generator)
        if ignored is not None and y.numel() > 1:
            y.view(-1)[0] = ignored
        return y

    def index(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def laid_out(self, x: Tensor, *layouts: str) -> Tensor:
        """In the configuration's type, in one of these layouts, or of all there are."""
        x = x.to(self.dtype)
        how = self.pick(*(layouts or LAYOUTS))
        if how == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "every second" and x.dim():
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if how == "expanded" and x.dim() and x.numel():
            axis = self.random.randrange(x.dim())
            return x.narrow(axis, 0, 1).expand(x.shape)
        if how == "offset":
            return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
        return x
