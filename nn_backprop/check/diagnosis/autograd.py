"""What autograd makes of the forward, run once, for any upstream gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Forward = Callable[[dict[str, Tensor]], list[Tensor]]
"""From the inputs, by name, to the outputs."""


def gradient_of(
    name: str,
    forward: Forward,
    inputs: dict[str, Tensor],
    mode: AbstractContextManager | None = None,
) -> Callable[[list[Tensor]], Tensor]:
    """The gradient of one input as a function of the upstream gradient; the forward runs in a
    mode, if one is given. Raises what the forward raises."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), mode or nullcontext():
        leaves = {n: v.clone().requires_grad_(n == name) for n, v in inputs.items()}
        outputs = forward(leaves)

    def gradient(upstream: list[Tensor]) -> Tensor:
        pairs = [(z, u) for z, u in zip(outputs, upstream, strict=True) if z.requires_grad]
        (grad,) = torch.autograd.grad(
            [z for z, _ in pairs], [leaves[name]], [u for _, u in pairs],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        return torch.zeros_like(inputs[name]) if grad is None else grad

    return gradient
