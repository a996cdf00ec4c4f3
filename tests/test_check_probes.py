"""Every probe: a backward with that one mistake of protocol is found by that probe alone."""

import random

import pytest
import torch
from suspects import Square, double, elementwise, function
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nn_backprop import check_gradients
from nn_backprop.check.probes import PROBES

X = double(3, 5)


def square(backward) -> type[Function]:
    """x² with this backward, of the upstream gradient and x."""
    return function(torch.square, lambda ctx, grad_z: backward(grad_z, *ctx.saved_tensors))


def in_memory(grad_z: Tensor, strides: tuple[int, ...], offset: int | None = None) -> Tensor:
    """What is read from the memory of grad_z in these steps."""
    return torch.as_strided(grad_z, grad_z.shape, strides, offset)


def assumes_unit_stride(grad_z, x):
    outer, inner = grad_z.stride()
    return 2 * x * in_memory(grad_z, (outer, 1 if inner == 2 else inner))


def assumes_rows_follow_one_another(grad_z, x):
    inner = grad_z.stride(1)
    return 2 * x * in_memory(grad_z, (inner * grad_z.shape[1], inner))


def takes_stride_0_for_1(grad_z, x):
    return 2 * x * in_memory(grad_z, tuple(stride or 1 for stride in grad_z.stride()))


def reads_from_the_start_of_the_storage(grad_z, x):
    return 2 * x * in_memory(grad_z, grad_z.stride(), 0)


def wrong_if_strided(x, grad):
    return grad if x.is_contiguous() else grad * 2


def works_in_place_on_its_upstream(grad_z, x):
    return grad_z.contiguous().mul_(2 * x)


def works_in_place_on_its_input(grad_z, x):
    grad = 2 * x * grad_z
    x.data.mul_(2)
    return grad


def takes_a_sum_of_two_for_another(grad_z, x):
    """autograd adds the gradients of two uses in place, which a version counter shows."""
    summed = grad_z._version > 0 and grad_z.storage_offset() == 0
    return 2 * x * grad_z * (2 if summed else 1)


def adds_where_the_upstream_is_zero(grad_z, x):
    return 2 * x * grad_z if grad_z.any() else x


def clips_its_upstream(grad_z, x):
    return 2 * x * grad_z.clamp(-20, 20)


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


def product(gradients) -> type[Function]:
    """a·b·c, by which of the three are wanted and the right gradients."""

    def backward(ctx, grad_z):
        a, b, c = ctx.saved_tensors
        right = [grad_z * b * c, grad_z * a * c, grad_z * a * b]
        return tuple(gradients(right, ctx.needs_input_grad))

    return function(lambda a, b, c: a * b * c, backward)


def wrong_if_alone(right, needs):
    return [2 * g for g in right] if sum(needs) == 1 else right


def wrong_if_one_is_left_out(right, needs):
    return [2 * g for g in right] if sum(needs) == 2 else right


def two_outputs(grads) -> type[Function]:
    """sin x and x³, their upstream gradients None where nothing uses them."""

    class Two(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x.sin(), x**3

        @staticmethod
        def backward(ctx, grad_sine, grad_cube):
            (x,) = ctx.saved_tensors
            return grads(grad_sine, grad_cube, x.cos(), 3 * x**2)

    return Two


def each_if_there(grad_sine, grad_cube, cosine, square):
    parts = [(grad_sine, cosine), (grad_cube, square)]
    return sum(grad * slope for grad, slope in parts if grad is not None)


def only_if_both(grad_sine, grad_cube, cosine, square):
    if grad_sine is None or grad_cube is None:
        return None
    return grad_sine * cosine + grad_cube * square


def only_if_the_first(grad_sine, grad_cube, cosine, square):
    if grad_sine is None:
        return None
    return each_if_there(grad_sine, grad_cube, cosine, square)


def shifted(grad_bias) -> type[Function]:
    return function(lambda x, bias: x + bias, lambda ctx, grad_z: (grad_z, grad_bias(grad_z)))


THREE = (double(3, 5), double(3, 5, seed=1), double(3, 5, seed=2))
ROWS = (double(3, 5), double(5, seed=1))
RIGHT = {
    "square": (Square, (X,)),
    "product": (product(lambda right, needs: right), THREE),
    "two outputs": (two_outputs(each_if_there), (X,)),
    "bias": (shifted(lambda grad_z: grad_z.sum(0)), ROWS),
}
# probe: kind, what is wrong, its inputs
WRONG = {
    "strided upstream": ("assumes-contiguous", square(assumes_unit_stride), (X,)),
    "transposed upstream": (
        "assumes-contiguous", square(assumes_rows_follow_one_another), (X,),
    ),
    "expanded upstream": ("assumes-contiguous", square(takes_stride_0_for_1), (X,)),
    "upstream with an offset": (
        "assumes-contiguous", square(reads_from_the_start_of_the_storage), (X,),
    ),
    "inputs not contiguous": (
        "assumes-contiguous",
        square(lambda grad_z, x: wrong_if_strided(x, 2 * x * grad_z)), (X,),
    ),
    "inputs and upstream unchanged": (
        "mutates-input", square(works_in_place_on_its_upstream), (X,),
    ),
    "two consumers": ("mutates-input", square(takes_a_sum_of_two_for_another), (X,)),
    "two calls, then two backwards": ("stale-state", KeepsOnTheClass, (X,)),
    "backward twice": ("stale-state", SpendsItsCache, (X,)),
    "each input alone needs a gradient": ("needs-input-grad", product(wrong_if_alone), THREE),
    "each input needs none": ("needs-input-grad", product(wrong_if_one_is_left_out), THREE),
    "each output alone": ("detached", two_outputs(only_if_both), (X,)),
    "zero upstream": ("extra-term", square(adds_where_the_upstream_is_zero), (X,)),
    "linear in the upstream": ("nonlinear-in-upstream", square(clips_its_upstream), (X,)),
    "shapes of the raw backward": ("wrong-reduction", shifted(lambda grad_z: grad_z), ROWS),
}  # fmt: skip


def failed(report) -> list[str]:
    return [probe.name for probe in report.probes if probe.outcome == "fail"]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_function_passes_every_probe(name):
    target, inputs = RIGHT[name]
    report = check_gradients(target, *inputs, second_order=True)
    assert report.ok and not failed(report), report
    assert set(PROBES) <= {probe.name for probe in report.probes}


def test_every_probe_is_passed_by_something_right():
    reports = [check_gradients(target, *inputs) for target, inputs in RIGHT.values()]
    passed = {p.name for r in reports for p in r.probes if p.outcome == "pass"}
    assert set(PROBES) <= passed


@pytest.mark.parametrize("probe", WRONG)
def test_a_mistake_is_found_by_its_probe_alone(probe):
    kind, target, inputs = WRONG[probe]
    report = check_gradients(target, *inputs)
    assert [entry.verdict for entry in report.tensors] == ["pass"] * len(inputs)
    assert report.verdict == "fail"
    assert failed(report) == [probe], report
    assert [cause.kind for cause in report.causes] == [kind]
    assert probe in report.reason


def test_every_probe_has_its_mistake():
    assert set(WRONG) | {"the same call twice"} == set(PROBES)


@pytest.mark.parametrize(
    ("target", "probe", "kind"),
    [
        (square(works_in_place_on_its_input), "inputs and upstream unchanged", "mutates-input"),
        (two_outputs(only_if_the_first), "each output alone", "detached"),
        (square(lambda grad_z, x: 2 * x), "linear in the upstream", "ignores-upstream"),
        (square(lambda grad_z, x: 2 * x * grad_z.abs()), "linear in the upstream",
         "nonlinear-in-upstream"),
        (square(lambda grad_z, x: 2 * x * grad_z * torch.rand(x.shape)), "backward twice",
         "nondeterministic"),
        (square(lambda grad_z, x: 2 * x * grad_z * random.SystemRandom().random()),
         "the same call twice", "nondeterministic"),
        (square(lambda grad_z, x: 2 * x * grad_z + 1), "zero upstream", "extra-term"),
    ],
)  # fmt: skip
def test_other_mistakes_are_found_by_a_probe_and_named(target, probe, kind):
    report = check_gradients(target, X)
    assert report.verdict == "fail"
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


@pytest.mark.parametrize("target", [Once, Intermediate])
def test_a_second_derivative_is_checked_if_asked_for(target):
    assert check_gradients(target, X).ok
    report = check_gradients(target, X, second_order=True)
    assert report.verdict == "fail" and failed(report) == ["second derivative"]
    assert [cause.kind for cause in report.causes] == ["detached"]


def test_a_second_derivative_without_an_oracle_is_skipped():
    report = check_gradients(torch.sin, X, second_order=True)
    assert report.ok
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


@pytest.mark.parametrize("training", [True, False])
def test_the_other_mode_is_checked_too(training):
    module = OnlyRightIn(training).train(training)
    report = check_gradients(module, X)
    assert failed(report) == ["evaluation mode" if training else "training mode"]
    assert [cause.kind for cause in report.causes] == ["wrong-branch"]
    assert module.training == training


@pytest.mark.parametrize(
    ("derivative", "probe", "kind"),
    [
        (lambda x: 2 * x * (1.01 if x.dtype == torch.float32 else 1), "float32", "wrong-precision"),
        (lambda x: 2 * x.sign() * x.abs().clamp(max=4), "other ranges", "wrong-branch"),
        (lambda x: 2 * x * (x.abs().max() > 0.1), "other ranges", "wrong-branch"),
    ],
)
def test_other_precisions_and_ranges_are_checked_too(derivative, probe, kind):
    report = check_gradients(elementwise(torch.square, derivative), X)
    assert [entry.verdict for entry in report.tensors] == ["pass"]
    assert failed(report) == [probe], report
    assert [cause.kind for cause in report.causes] == [kind]


def test_a_negative_branch_is_reached_from_positive_inputs():
    slope = elementwise(torch.abs, lambda x: torch.ones_like(x))
    assert failed(check_gradients(slope, X.abs() + 0.1)) == ["other ranges"]


def test_where_float32_overflows_its_gradient_is_not_asked_for():
    """x² of 10³⁰ is infinite in float32, and 1/(1 + x²) zero, beside a term of size 1."""

    def forward(x):
        return 1 / (1 + (1e30 * x) ** 2 * 1e-60) + 0 * x

    report = check_gradients(forward, double(5))
    assert report.verdict == "pass", report
    (probe,) = (p for p in report.probes if p.name == "float32")
    assert probe.outcome == "skipped"
    assert "overflows" in probe.reason
