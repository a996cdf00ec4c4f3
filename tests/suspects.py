"""Functions, right and wrong, for the checker to judge."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from nn_backprop import check_gradients
from nn_backprop.check import Report


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expect(verdict: str, target, /, *inputs, kind: str = "", says: str = "", **options) -> Report:
    """The report on a target, which has to have this verdict, this first kind of cause if one is
    given, and these words."""
    report = check_gradients(target, *inputs, **options)
    assert report.verdict == verdict, report
    assert not kind or report.causes[0].kind == kind, report
    assert says in " ".join(str(report).split()), report
    return report


def failed(report: Report) -> list[str]:
    """The probes that failed."""
    return [probe.name for probe in report.probes if probe.outcome == "fail"]


def names(report: Report) -> list[str]:
    """What gradients were checked."""
    return [entry.name for entry in report.tensors]


def oracles(report: Report) -> set[str]:
    return {entry.oracle for entry in report.tensors}


def function(forward: Callable, backward: Callable) -> type[Function]:
    """A Function from ``forward(*inputs)`` and ``backward(*upstream, *inputs)``."""

    class Suspect(Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *upstream):
            return backward(*upstream, *ctx.saved_tensors)

    return Suspect


def square(backward: Callable) -> type[Function]:
    """x² with this backward, of the upstream gradient and x."""
    return function(torch.square, backward)


def elementwise(forward: Callable, derivative: Callable) -> type[Function]:
    """A Function of one input, by its derivative there."""
    return function(forward, lambda grad_z, x: grad_z * derivative(x))


def cancels(x: Tensor) -> Tensor:
    """Far from 0, the subtraction leaves few digits."""
    return (x - x.mean()).sigmoid()


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        return 2 * x * grad_z


class Doubled(Square):
    """Wrong by a factor 2."""

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        return 4 * x * grad_z
