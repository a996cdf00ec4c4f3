"""Every probe: a backward with that one mistake of protocol is found by that probe alone."""

import random

import torch
from suspects import Square, double, elementwise, expect, failed, function, square
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nn_backprop.check.probes import PROBES

X = double(3, 5)


def in_memory(grad_z: Tensor, strides: tuple[int, ...], offset: int | None = None) -> Tensor:
    """What is read from the memory of grad_z in these steps."""
    return torch.as_strided(grad_z, grad_z.shape, strides, offset)


def assumes_unit_stride(grad_z, x):
    outer, inner = grad_z.stride()
    return 2 * x * in_memory(grad_z, (outer, 1 if inner == 2 else inner))


def assumes_rows_follow_one_another(grad_z, x):
    inner = grad_z.stride(1)
    return 2 * x * in_memory(grad_z, (inner * grad_z.shape[1], inner))


def works_in_place_on_its_input(grad_z, x):
    grad = 2 * x * grad_z
    x.data.mul_(2)
    return grad


def takes_a_sum_of_two_for_another(grad_z, x):
    """autograd adds the gradients of two uses in place, which a version counter shows."""
    summed = grad_z._version > 0 and grad_z.storage_offset() == 0
    return 2 * x * grad_z * (2 if summed else 1)


class KeepsOnTheClass(Function):
    """The second call overwrites what the first one kept."""

    @staticmethod
    def forward(ctx, x):
        KeepsOnTheClass.x = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, grad_z):
        return 2 * KeepsOnTheClass.x * grad_z


class SpendsItsCache(Square):
    """The second backward over one graph finds something else."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = 2
        return Square.forward(ctx, x)

    @staticmethod
    def backward(ctx, grad_z):
        (x,) = ctx.saved_tensors
        ctx.factor += 1
        return (ctx.factor - 1) * x * grad_z


def product(wrong_if_wanted: int = 0) -> type[Function]:
    """a·b·c, its gradients doubled where so many of the three are wanted."""

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return a * b * c

        @staticmethod
        def backward(ctx, grad_z):
            a, b, c = ctx.saved_tensors
            grad_z = grad_z * (2 if sum(ctx.needs_input_grad) == wrong_if_wanted else 1)
            return grad_z * b * c, grad_z * a * c, grad_z * a * b

    return Product


def two_outputs(without: str = "") -> type[Function]:
    """sin x and x³, their upstream gradients None where nothing uses them; without the one (0), or
    without either (01), there is no gradient at all."""

    class Two(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x.sin(), x**3

        @staticmethod
        def backward(ctx, *upstream):
            (x,) = ctx.saved_tensors
            if any(upstream[int(k)] is None for k in without):
                return None
            slopes = (x.cos(), 3 * x**2)
            return sum(g * s for g, s in zip(upstream, slopes, strict=True) if g is not None)

    return Two


def shifted(grad_bias) -> type[Function]:
    return function(lambda x, bias: x + bias, lambda grad_z, *_: (grad_z, grad_bias(grad_z)))


THREE = (double(3, 5), double(3, 5, seed=1), double(3, 5, seed=2))
ROWS = (double(3, 5), double(5, seed=1))
RIGHT = {
    "square": (Square, (X,)),
    "product": (product(), THREE),
    "two outputs": (two_outputs(), (X,)),
    "bias": (shifted(lambda grad_z: grad_z.sum(0)), ROWS),
}
CONTIGUOUS = "assumes-contiguous"
# probe: kind, what is wrong, its inputs
WRONG = {
    "strided upstream": (CONTIGUOUS, square(assumes_unit_stride), (X,)),
    "transposed upstream": (CONTIGUOUS, square(assumes_rows_follow_one_another), (X,)),
    "expanded upstream": (CONTIGUOUS, square(  # a stride of 0 taken for 1
        lambda g, x: 2 * x * in_memory(g, tuple(stride or 1 for stride in g.stride()))), (X,)),
    "upstream with an offset": (CONTIGUOUS, square(
        lambda g, x: 2 * x * in_memory(g, g.stride(), 0)), (X,)),
    "inputs not contiguous": (CONTIGUOUS, square(
        lambda g, x: 2 * x * g * (1 if x.is_contiguous() else 2)), (X,)),
    "inputs and upstream unchanged": (
        "mutates-input", square(lambda g, x: g.contiguous().mul_(2 * x)), (X,)),
    "two consumers": ("mutates-input", square(takes_a_sum_of_two_for_another), (X,)),
    "two calls, then two backwards": ("stale-state", KeepsOnTheClass, (X,)),
    "backward twice": ("stale-state", SpendsItsCache, (X,)),
    "each input alone needs a gradient": ("needs-input-grad", product(wrong_if_wanted=1), THREE),
    "each input needs none": ("needs-input-grad", product(wrong_if_wanted=2), THREE),
    "each output alone": ("detached", two_outputs(without="01"), (X,)),
    "zero upstream": ("extra-term", square(lambda g, x: 2 * x * g if g.any() else x), (X,)),
    "linear in the upstream": (
        "nonlinear-in-upstream", square(lambda g, x: 2 * x * g.clamp(-20, 20)), (X,)),
    "shapes of the raw backward": ("wrong-reduction", shifted(lambda grad_z: grad_z), ROWS),
}  # fmt: skip


def test_a_right_function_passes_every_probe_that_applies():
    passed = set()
    for target, inputs in RIGHT.values():
        report = expect("pass", target, *inputs, second_order=True)
        assert not failed(report) and set(PROBES) <= {probe.name for probe in report.probes}
        passed |= {probe.name for probe in report.probes if probe.outcome == "pass"}
    assert set(PROBES) <= passed


def test_a_mistake_is_found_by_its_probe_alone():
    assert set(WRONG) | {"the same call twice"} == set(PROBES)
    for probe, (kind, target, inputs) in WRONG.items():
        report = expect("fail", target, *inputs)
        assert [entry.verdict for entry in report.tensors] == ["pass"] * len(inputs)
        assert failed(report) == [probe], report
        assert [cause.kind for cause in report.causes] == [kind]
        assert probe in report.reason


def test_other_mistakes_are_found_by_a_probe_and_named():
    for kind, probe, target in [
        ("mutates-input", "inputs and upstream unchanged", square(works_in_place_on_its_input)),
        ("detached", "each output alone", two_outputs(without="0")),
        ("ignores-upstream", "linear in the upstream", square(lambda g, x: 2 * x)),
        ("nonlinear-in-upstream", "linear in the upstream", square(lambda g, x: 2 * x * g.abs())),
        ("nondeterministic", "backward twice",
         square(lambda g, x: 2 * x * g * torch.rand(x.shape))),
        ("nondeterministic", "the same call twice",
         square(lambda g, x: 2 * x * g * random.SystemRandom().random())),
        ("extra-term", "zero upstream", square(lambda g, x: 2 * x * g + 1)),
        (CONTIGUOUS, "strided upstream",
         square(lambda g, x: 2 * x * g * (1 if g.is_contiguous() else 1 + 1e-6))),
    ]:  # fmt: skip
        report = expect("fail", target, X)
        assert probe in failed(report), report
        assert kind in [cause.kind for cause in report.causes]


# --- second derivatives ---


class Once(Square):
    backward = staticmethod(once_differentiable(Square.backward))


class Intermediate(Function):
    """Saves 2x, which is a constant to autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x.square()

    @staticmethod
    def backward(ctx, grad_z):
        return ctx.saved_tensors[0] * grad_z


def test_a_second_derivative_is_checked_if_asked_for():
    for target in (Once, Intermediate):
        expect("pass", target, X)
        report = expect("fail", target, X, second_order=True)
        assert failed(report) == ["second derivative"]
        assert [cause.kind for cause in report.causes] == ["detached"]


def test_a_second_derivative_without_an_oracle_is_skipped():
    report = expect("pass", torch.sin, X, second_order=True)
    assert {p.name: p.outcome for p in report.probes}["second derivative"] == "skipped"


# --- elsewhere: modes, precisions, ranges ---


class OnlyRightIn(nn.Module):
    def __init__(self, training: bool):
        super().__init__()
        self.right = training

    def forward(self, x):
        z = x * 1
        if z.requires_grad and self.training != self.right:
            z.register_hook(lambda grad: 2 * grad)
        return z.sin()


def test_the_other_mode_is_checked_too():
    for training, other in [(True, "evaluation mode"), (False, "training mode")]:
        module = OnlyRightIn(training).train(training)
        report = expect("fail", module, X)
        assert failed(report) == [other]
        assert [cause.kind for cause in report.causes] == ["wrong-branch"]
        assert module.training == training


def test_other_precisions_and_ranges_are_checked_too():
    for forward, derivative, x, probe, kind in [
        (torch.square, lambda x: 2 * x * (1.01 if x.dtype == torch.float32 else 1), X,
         "float32", "wrong-precision"),
        (torch.square, lambda x: 2 * x.sign() * x.abs().clamp(max=4), X,
         "other ranges", "wrong-branch"),
        (torch.square, lambda x: 2 * x * (x.abs().max() > 0.1), X, "other ranges", "wrong-branch"),
        (torch.abs, torch.ones_like, X.abs() + 0.1, "other ranges", "wrong-branch"),
    ]:  # fmt: skip
        report = expect("fail", elementwise(forward, derivative), x)
        assert [entry.verdict for entry in report.tensors] == ["pass"]
        assert failed(report) == [probe], report
        assert [cause.kind for cause in report.causes] == [kind]


def test_where_float32_overflows_its_gradient_is_not_asked_for():
    """x² of 10³⁰ is infinite in float32, and 1/(1 + x²) zero, beside a term of size 1."""

    def forward(x):
        return 1 / (1 + (1e30 * x) ** 2 * 1e-60) + 0 * x

    (probe,) = (p for p in expect("pass", forward, double(5)).probes if p.name == "float32")
    assert probe.outcome == "skipped" and "overflows" in probe.reason
