"""One slip in the chain rule of a forward: found again in the gradient, and named."""

import pytest
import torch
import torch.nn.functional as F
from suspects import double, expect, function

from nn_backprop import check_gradients, compare_gradients
from nn_backprop.check.diagnosis import guard
from nn_backprop.check.diagnosis.diagnose import diagnose
from nn_backprop.check.diagnosis.mismatch import Mismatch

ANGLE = torch.arange(1.0, 6.0).double()[:, None] * torch.tensor([1.0, 0.1, 0.01]).double()
COS, SIN = ANGLE.cos(), ANGLE.sin()
SHARE = torch.tensor([0.1, 0.7, 0.4]).double()
ENDS, ROWS = torch.tensor([2, 4, 1]), torch.arange(3)


def turned(x, sin=SIN):
    a, b = x.chunk(2, -1)
    return torch.cat([a * COS - b * sin, a * sin + b * COS], -1)


def heads(x):
    return x.unflatten(2, (3, 7)).transpose(1, 2)


def shuffled(x):
    return x.unflatten(1, (2, 5)).transpose(1, 2).flatten(1, 2)


def between(x):
    return x[:, :-1] * SHARE + x[:, 1:] * (1 - SHARE)


def between_backward(grad_z, x):
    return F.pad(grad_z * (1 - SHARE), (0, 1)) + F.pad(grad_z * SHARE, (1, 0))


def scaled_norm(x, gain):
    return (x - x.mean(1, keepdim=True)) * gain.expand_as(x)


def scaled_norm_backward(grad_z, x, gain):
    centred = x - x.mean(1, keepdim=True)
    return (grad_z - grad_z.mean(1, keepdim=True)) * gain, (grad_z * centred).sum(0)


def last_states(x):
    return x.cumsum(1)[ROWS, ENDS]


def last_states_backward(grad_z, x):
    return grad_z[:, None].expand_as(x).clone()


def causal(x):
    return F.pad(x, (2, 0)).unfold(2, 3, 1).sin().sum(3)


def causal_backward(grad_z, x):
    around = F.pad(x, (2, 0))
    grad = torch.zeros_like(around)
    for p in range(3):
        grad[..., p : p + x.shape[2]] += grad_z * around[..., p : p + x.shape[2]].cos()
    return grad[..., : x.shape[2]].clone()


def shared_keys(x):
    return x[:, :, None].expand(2, 3, 2, 5).reshape(2, 6, 5).sin()


def shared_keys_backward(grad_z, x):
    grad = grad_z * x[:, :, None].expand(2, 3, 2, 5).reshape(2, 6, 5).cos()
    return grad.unflatten(1, (2, 3)).sum(1)


def recurrent(x, weight):
    h, states = torch.zeros(3, 4).double(), []
    for t in range(6):
        h = torch.tanh(x[:, t] + h @ weight)
        states.append(h)
    return torch.stack(states, 1)


def recurrent_backward(grad_z, x, weight):
    h = recurrent(x, weight)
    grad_x, grad_weight, carry = torch.zeros_like(x), torch.zeros_like(weight), 0.0
    for t in range(5, -1, -1):
        grad_x[:, t] = (grad_z[:, t] + carry) * (1 - h[:, t] ** 2)
        before = h[:, t - 1] if t else torch.zeros_like(h[:, 0])
        grad_weight += before.t() @ grad_x[:, t]
        carry = grad_x[:, t] @ weight.t() if t % 2 else 0.0
    return grad_x, grad_weight


def spread(x):
    return x - x.mean(1, keepdim=True).sin()


def spread_backward(grad_z, x):
    slope = x.mean(1, keepdim=True).cos()
    return grad_z - (grad_z.sum(1, keepdim=True) * slope).expand_as(x)


MISTAKES = {  # forward, backward, inputs, the kind of cause
    "an angle not turned back": (
        turned, lambda grad_z, x: turned(grad_z, SIN), [double(2, 5, 6)], "wrong-operand"),
    "heads merged without the transpose": (
        lambda x: heads(x).square(), lambda grad_z, x: (2 * grad_z * heads(x)).reshape(x.shape),
        [double(2, 5, 21)], "permuted"),
    "channels shuffled again": (
        lambda x: shuffled(x).sin(), lambda grad_z, x: shuffled(grad_z * shuffled(x).cos()),
        [double(2, 10, 7)], "permuted"),
    "the weights of two neighbours exchanged": (
        between, between_backward, [double(5, 4)], "wrong-operand"),
    "a gain taken at the end": (
        scaled_norm, scaled_norm_backward, [double(5, 7), double(7, seed=1)], "wrong-operand"),
    "the last place for the end of each row": (
        last_states, last_states_backward, [double(3, 7, 5)], "wrong-operand"),
    "padding cut off at the wrong end": (
        causal, causal_backward, [double(2, 3, 11)], "shifted"),
    "other heads added up than those that share a key": (
        shared_keys, shared_keys_backward, [double(2, 3, 5)], "permuted"),
    "a carry cut at every second step": (
        recurrent, recurrent_backward, [double(3, 6, 4), double(4, 4, seed=1)], "missing-term"),
    "a mean's gradient summed": (
        spread, spread_backward, [double(5, 7)], "wrong-reduction"),
    "a bilinear form's weight turned": (
        lambda x, w: torch.einsum("ni,oij,nj->no", x, w, ANGLE.t()[:3, :5]),
        lambda grad_z, x, w: (
            torch.einsum("no,oji,nj->ni", grad_z, w, ANGLE.t()[:3, :5]),
            torch.einsum("no,ni,nj->oij", grad_z, x, ANGLE.t()[:3, :5])),
        [double(3, 5), double(7, 5, 5, seed=1)], "wrong-operand"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_named(name):
    forward, backward, inputs, kind = MISTAKES[name]
    report = expect("fail", function(forward, backward), *inputs)
    assert kind in [cause.kind for cause in report.causes[:2]], report


def test_of_a_gradient_with_many_entries_products_tell_what_they_can():
    x, w = double(16, 80).numpy(), double(80, 60, seed=1).numpy()
    for grad_w, kind in (
        (lambda g, x: x.T @ g / 16, "scale"),
        (lambda g, x: -x.T @ g, "sign"),
        (lambda g, x: 0 * w, "detached"),
        (lambda g, x: x[-1:].T @ g[-1:], "unknown"),
    ):
        pair = (lambda x, w: x @ w, lambda g, x, w, grad_w=grad_w: (g @ w.T, grad_w(g, x)))
        report = expect("fail", pair, x, w, kind=kind)
        assert "product with a random direction" in report.reason


class RootMeanSquare(torch.autograd.Function):
    """Declares the second output as not differentiable."""

    @staticmethod
    def forward(ctx, x):
        inverse = torch.rsqrt(x.square().mean(-1) + 1e-6)
        ctx.save_for_backward(x, inverse)
        ctx.mark_non_differentiable(inverse)
        return x * inverse[:, None], inverse

    @staticmethod
    def backward(ctx, grad_z, _):
        x, inverse = ctx.saved_tensors
        y = x * inverse[:, None]
        return inverse[:, None] * (grad_z - y * (grad_z * y).mean(-1, keepdim=True))


def test_an_output_declared_as_not_differentiable_gets_no_gradient():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for target in (RootMeanSquare, lambda x: RootMeanSquare.apply(x)[0]):
            expect("pass", target, double(5, 4).to(dtype))


def test_a_number_without_a_name_does_not_explain_a_single_entry():
    wrong = function(lambda x, t: x / t, lambda g, x, t: (g / t, (g * x).sin().sum()))
    report = check_gradients(wrong, double(5, 3), torch.tensor(1.7).double())
    assert "scale" not in [cause.kind for cause in report.causes]


def test_a_multiple_and_its_sign():
    for by, words in ((-0.7, "by −(1 − p) with p = 0.3"), (0.7, "by 1 − p with p = 0.3")):
        wrong = function(torch.clone, lambda grad_z, x, by=by: by * grad_z)
        assert words in check_gradients(wrong, double(5, 3)).causes[0].detail


def test_a_straight_through_estimator_is_called_one():
    report = check_gradients(function(torch.sign, lambda grad_z, x: grad_z), double(5, 3))
    assert "where 0 is expected throughout" in report.reason
    assert "straight-through" in report.causes[0].detail


def test_the_right_numbers_in_another_shape():
    w = double(5, 7)
    report = compare_gradients({"w": w.flatten()}, {"w": w})
    assert report.causes[0].kind == "wrong-reduction"
    assert "(35,) instead of (5, 7)" in report.causes[0].detail


def test_a_family_that_raises_costs_the_others_nothing_and_is_written_down(monkeypatch):
    def fails(*_):
        raise ArithmeticError("not today")

    x, grad_z = double(5, 3), double(5, 3, seed=1)
    wrong = Mismatch("x", -grad_z, grad_z, 1e-12, {"x": x}, [grad_z], [x], gradient=fails)
    with pytest.raises(ArithmeticError):
        diagnose([wrong])
    monkeypatch.setattr(guard, "STRICT", False)
    failures = []
    assert diagnose([wrong], fails, failures)[0].kind == "sign"
    for family in ("responses", "subsets", "the recorded graph"):
        assert f"{family}: ArithmeticError: not today" in failures
    assert diagnose([wrong], fails)[0].kind == "sign"


def test_a_computation_too_long_to_be_recorded_is_no_failure():
    def long(inputs):
        return [sum([inputs["x"]] * 2000)]

    x, grad_z, failures = double(5, 3), double(5, 3, seed=1), []
    wrong = Mismatch("x", -2000 * grad_z, 2000 * grad_z, 1e-12, {"x": x}, [grad_z], [2000 * x])
    assert diagnose([wrong], long, failures)[0].kind == "sign" and not failures
