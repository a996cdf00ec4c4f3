"""A training step by each engine: gradients, then SGD with momentum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.common import Work
from nn_backprop import engines
from nn_backprop.data import channels_last
from nn_backprop.engines.by_hand_fast import flat_parameter
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.training import LeanSGD

LR, MOMENTUM = 1e-6, 0.9  # so small that the networks stay what they are while they are timed


@dataclass(frozen=True)
class Case:
    """A network and a batch size, and how many times as fast as autograd an engine should be."""

    make: Callable[[], nn.Module]
    batch: int
    wanted: Mapping[str, float] = field(default_factory=dict)


CASES = {
    "784-16-16-10, batch 32": Case(partial(MLP, (784, 16, 16, 10)), 32, {"by-hand": 2.7}),
    "784-30-10, batch 10": Case(partial(MLP, (784, 30, 10)), 10, {"by-hand": 2.7}),
    "784-128-10, batch 64": Case(partial(MLP, (784, 128, 10)), 64, {"by-hand": 1.4}),
    "784-512-256-10, batch 256": Case(partial(MLP, (784, 512, 256, 10)), 256, {"by-hand": 1.1}),
    "happy, batch 32": Case(happy, 32),
    "CNN, batch 128": Case(CNN, 128, {"by-hand": 0.8}),
}
SMOKE_CASES = ("784-16-16-10, batch 32",)
FIRST = "autograd, channels first"
TORCHS = "by-hand, torch's SGD"


def step(name: str, make: Callable[[], nn.Module], batch: int, device: str = "cpu") -> Work:
    """A training step of a new network on one batch: gradients by `name`, then SGD."""
    torch.manual_seed(0)
    model = make().to(device)
    inputs = channels_last(torch.randn(batch, 1, 28, 28, device=device))
    targets = torch.randint(10, (batch,), device=device)
    compute, parameters = engine_for("by-hand" if name == TORCHS else name, model)
    if name == FIRST:
        inputs = inputs.flatten(1).view(batch, 1, 28, 28)
    optimizer_of = LeanSGD if name == "by-hand" else SGD
    optimizer = optimizer_of(parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def work() -> None:
        compute(model, inputs, targets)
        optimizer.step()

    return work


def engine_for(name: str, model: nn.Module) -> tuple[engines.Engine, list[nn.Parameter]]:
    """An engine that may keep its buffers between calls, and what its optimizer updates.

    autograd and torch.compile are written here, as they are usually used.
    """

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return model.loss(model(inputs), targets)  # type: ignore[operator]

    def as_usual(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(inputs, targets)
        loss.backward()
        return loss.detach()

    parameters = list(model.parameters())
    if name == "torch.compile":
        loss_of = torch.compile(loss_of)
    if name in ("autograd", FIRST, "torch.compile"):
        return as_usual, parameters
    if name == "by-hand":
        parameters = [flat_parameter(model)]
    return engines.for_training(name), parameters
