"""The time of check_gradients against torch.autograd.gradcheck, on right gradients.

gradcheck is given the same data in float64, which it needs; a module's parameters are inputs to it,
too. It compares derivatives with differences once. check_gradients also probes strides, repeated
calls, precisions and ranges.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, gradcheck
from torch.func import functional_call
from tqdm import tqdm

from benchmarks import common
from nn_backprop import check_gradients
from nn_backprop.studies import StudyRun

FAST = "gradcheck, fast mode"


@dataclass(frozen=True, kw_only=True)
class CheckerOptions(common.Options):
    """The time of check_gradients against torch.autograd.gradcheck, on right gradients."""

    rounds: int = 6


class Affine(Function):
    """z = x weightᵀ + bias, with its gradients by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_z,), (x, weight) = grads, ctx.saved_tensors
        return grad_z @ weight, grad_z.T @ x, grad_z.sum(0)


def _lenet(side: int, channels: tuple[int, int], widths: tuple[int, int]) -> nn.Module:
    """LeNet-5's layers, in float64; 32, (6, 16), (120, 84) are its sizes: 61,706 parameters."""
    last = (side // 2 - 2) // 2 - 2  # pixels a side after the second pool
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels[0], 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(*channels, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(channels[1] * last**2, widths[0]), nn.Tanh(),
        nn.Linear(*widths), nn.Tanh(), nn.Linear(widths[1], 10),
    ).double()  # fmt: skip


def targets() -> dict[str, tuple[Any, tuple[Tensor, ...], bool]]:
    """By name: target, inputs, and whether gradcheck's slow mode ends in reasonable time.

    At LeNet-5 it does not: it runs the network twice for each of its 63,754 inputs.
    """
    torch.manual_seed(0)
    small, full = _lenet(16, (2, 3), (7, 5)), _lenet(32, (6, 16), (120, 84))
    assert [sum(p.numel() for p in net.parameters()) for net in (small, full)] == [333, 61_706]
    return {
        "linear Function by hand": (
            Affine,
            (torch.randn(5, 7).double(), torch.randn(3, 7).double(), torch.randn(3).double()),
            True,
        ),
        "conv2d, float32": (nn.Conv2d(3, 5, 3), (torch.randn(2, 3, 7, 7),), True),
        "LeNet-5's layers, 333 parameters": (small, (torch.randn(2, 1, 16, 16).double(),), True),
        "LeNet-5, 61,706 parameters": (full, (torch.randn(2, 1, 32, 32).double(),), False),
    }


def collect(run: StudyRun, options: CheckerOptions) -> None:
    options.begin()
    cases = list(targets().items())
    for name, (target, inputs, slow) in tqdm(cases[:1] if options.smoke else cases, unit="case"):
        if not check_gradients(target, *inputs).ok:
            raise RuntimeError(f"check_gradients called {name} wrong")
        contestants: dict[str, common.Work] = {FAST: gradcheck_of(target, inputs, True)}
        if slow:
            contestants["gradcheck"] = gradcheck_of(target, inputs, False)
        contestants["check_gradients"] = partial(check_gradients, target, *inputs)
        run.add(common.compared(name, common.in_turn(contestants, options), FAST))


def gradcheck_of(target: Any, inputs: tuple[Tensor, ...], fast: bool) -> common.Work:
    given = [x.detach().double().requires_grad_() for x in inputs]
    if not isinstance(target, nn.Module):
        return lambda: gradcheck(target.apply, given, fast_mode=fast)
    module, count = copy.deepcopy(target).double(), len(given)
    names = [name for name, _ in module.named_parameters()]
    given += [p.detach().clone().requires_grad_() for p in module.parameters()]

    def call(*args: Tensor) -> Any:
        values = dict(zip(names, args[count:], strict=True))
        return functional_call(module, values, args[:count])

    return lambda: gradcheck(call, given, fast_mode=fast)


STUDY = common.Benchmark(
    CheckerOptions,
    collect,
    claims=lambda rows: [],
    tables=lambda rows: {"A check": common.times_table(rows, "check")},
    picture=lambda rows: common.ratios_picture(rows, "A check against gradcheck in fast mode"),
)
