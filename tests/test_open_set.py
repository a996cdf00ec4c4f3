"""Losses for what is unknown: values by hand, where they are least, gradients by every way."""

import math
from itertools import product as every

import pytest
import torch
import torch.nn.functional as F
from properties import DTYPES, names_checked, passes_the_checker, refuses, same_gradients
from test_replay import same_on_batches
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import check_gradients
from nn_backprop.layers import EntropicOpenSetLoss, ObjectosphereLoss

N, K, D = 7, 5, 3
TARGETS = torch.tensor([0, -1, 4, -1, 2, 3, -7])  # any negative number says "unknown"
RADIUS, WEIGHT = 1.5, 0.7


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits(dtype=torch.float64) -> Tensor:
    return drawn(N, K, seed=1).to(dtype)


def features(dtype=torch.float64) -> Tensor:
    """Of the known, 0 is inside the sphere, 2 outside, 4 on it, 5 at 0; 6 is unknown, at 0 too."""
    lengths = torch.tensor([0.4, 2.0, 2.5, 0.3, RADIUS, 0.0, 0.0], dtype=torch.float64)
    return (F.normalize(drawn(N, D, seed=2)) * lengths[:, None]).to(dtype)


def garbage(z: Tensor, y: Tensor) -> Tensor:
    """The recipe of the module's docstring, with a weight for each of K + 1 classes."""
    weight = torch.linspace(0.5, 2, K + 1, dtype=z.dtype)
    return F.cross_entropy(z, torch.where(y < 0, K, y), weight)


# --- values and gradients ---


def test_the_losses_and_their_gradients_are_those_of_the_derivation():
    z, f, entropic, sphere = logits().requires_grad_(), features().requires_grad_(), 0.0, 0.0
    value = EntropicOpenSetLoss()(z, TARGETS).item()
    both = ObjectosphereLoss(RADIUS, WEIGHT)(z, f, TARGETS)
    both.backward()
    for n, y in enumerate(TARGETS.tolist()):
        exps = [math.exp(x) for x in z[n].tolist()]
        S = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
        q = torch.full_like(S, 1 / K) if y < 0 else torch.eye(K, dtype=S.dtype)[y]
        entropic -= sum(q[k] * math.log(S[k]) for k in range(K)).item()
        assert_close(z.grad[n], (S - q) / N, rtol=1e-12, atol=1e-15)
        r = math.sqrt(sum(x**2 for x in f[n].tolist()))
        sphere += max(RADIUS - r, 0) ** 2 if y >= 0 else r**2
        slope = 1 if y < 0 else -max(RADIUS - r, 0) / r if r else 0  # 0 outside, and at 0
        assert_close(f.grad[n], 2 * WEIGHT / N * slope * f[n].detach(), rtol=1e-12, atol=1e-12)
    assert f.grad[0].norm() > 0.1 and f.grad[2].abs().max() == 0  # inside, outside
    assert value == pytest.approx(entropic / N, rel=1e-12)
    assert both.item() - value == pytest.approx(WEIGHT * sphere / N, rel=1e-12)
    known = TARGETS.clamp(min=0)  # without unknowns it is cross entropy
    assert_close(EntropicOpenSetLoss()(z, known), F.cross_entropy(z, known))
    # the garbage class is cross entropy of K + 1 classes
    z, weight = drawn(N, K + 1, seed=4), [0.5 + 1.5 * k / K for k in range(K + 1)]
    classes = [int(y) if y >= 0 else K for y in TARGETS]
    each = [-weight[c] * math.log(z[n].softmax(0)[c]) for n, c in enumerate(classes)]
    expected = sum(each) / sum(weight[c] for c in classes)
    assert garbage(z, TARGETS).item() == pytest.approx(expected, rel=1e-12)


def test_equal_logits_are_best_for_the_unknown():
    loss, unknown = EntropicOpenSetLoss(), torch.tensor([-1])
    equal = torch.full((1, K), 3.7, dtype=torch.float64, requires_grad=True)
    least = loss(equal, unknown)
    assert least.item() == pytest.approx(math.log(K), rel=1e-14)
    least.backward()
    assert equal.grad.abs().max() < 1e-15
    for step in (1e-3, 0.1, 1.0, 30.0):
        assert loss(equal.detach() + step * drawn(1, K, seed=3), unknown) > least, step


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_pass_the_checker(dtype):
    sphere = ObjectosphereLoss(RADIUS, WEIGHT)  # which has the entropic loss in it
    for target, *inputs in (
        (sphere, logits(dtype), features(dtype)),
        (garbage, torch.cat([logits(dtype), logits(dtype)[:, :1]], 1)),
    ):
        report = passes_the_checker(target, *inputs, TARGETS, case=target)
        assert len(names_checked(report)) == len(inputs)
    f = features(dtype)
    f[4:6] = f[:2]  # no kink, so that there are second derivatives
    assert check_gradients(sphere, logits(dtype), f, TARGETS, second_order=True).ok


def test_however_short_or_long_the_features():
    loss, y = ObjectosphereLoss(RADIUS, WEIGHT), torch.tensor([0, -1])
    for dtype, length in every(DTYPES, (0.0, 1e-300, 1e-160, 1e-25, 1e-21, 1e-12, 1e-6, 1e20)):
        f = torch.full((2, D), length / math.sqrt(D), dtype=dtype, requires_grad=True)
        loss(torch.zeros(2, K, dtype=dtype), f, y).backward()
        assert f.grad.isfinite().all(), (dtype, length)
        assert f.grad[0].norm() <= WEIGHT * RADIUS * 1.1  # 2 λ ξ / N, N = 2; not of a subnormal r²
        if length in (1e-12, 1e-6):
            assert f.grad[0].norm().item() == pytest.approx(WEIGHT * RADIUS, rel=1e-5)
            assert (f.grad[0] < 0).all()  # a step against it makes them longer
    z = torch.zeros(2, K)
    for length in (1e20, 1e38):  # whose squares a float32 does not hold; of the known they cost 0
        f = torch.full((2, D), length)
        assert loss(z, f, torch.tensor([0, 1])).item() == pytest.approx(math.log(K))
        f[1] = 1.0  # an unknown example beside it
        assert loss(z, f, y).item() == pytest.approx(math.log(K) + WEIGHT * D / 2)
        assert loss(z, f.flip(0), y).item() == math.inf


class Deep(nn.Module):
    """A network that hands out its features beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, D), nn.Linear(D, K, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.relu(self.first(x))  # some of length 0
        return self.last(f), f


def test_tape_autograd_and_replay_agree():
    torch.manual_seed(5)
    model, loss = Deep().double(), ObjectosphereLoss(RADIUS, WEIGHT)
    nn.init.constant_(model.first.bias, -0.3)

    def loss_fn(output, y):
        return loss(*output, y)

    x, other = torch.randn(2, N, 4, dtype=torch.float64)
    x[5] = other[2] = 0  # then all features are 0
    assert (model(x)[1][5] == 0).all() and (model(x)[1].norm(dim=1) > 0).any()
    grads = same_gradients(model, loss_fn, x, TARGETS, atol=1e-14)
    assert all(grad.abs().max() > 1e-3 for grad in grads.values())
    for each, its_loss in (
        (model, loss_fn), (nn.Linear(4, K).double(), EntropicOpenSetLoss()),
        (nn.Linear(4, K + 1).double(), garbage),
    ):  # fmt: skip
        same_on_batches(each, its_loss, (x, TARGETS), (other, TARGETS.flip(0)))


# --- what is refused ---


def test_what_the_losses_refuse_is_named_and_how_they_are_shown():
    z, f, y = logits(), features(), TARGETS
    loss, sphere = EntropicOpenSetLoss(), ObjectosphereLoss(1, 1)
    for bad_z, bad_y in ((z[0], y[:1]), (z, y[:3]), (z, y[:, None]), (z, y.double())):
        sentence = r"logits must be \(N, K\) and targets int64 \(N,\)"
        refuses(sentence, loss, bad_z, bad_y)
        refuses(sentence, sphere, bad_z, f, bad_y)
    for bad_f in (f[:3], f[:, 0], f[None]):
        refuses(r"features must be \(N, D\) for logits \(7, 5\)", sphere, z, bad_f, y)
    for wrong in (-1.0, math.inf, math.nan):
        refuses("radius must be finite and not negative", ObjectosphereLoss, wrong, 1)
        refuses("weight must be finite and not negative", ObjectosphereLoss, 1, wrong)
    refuses("smaller than num_classes", loss, z, y + 1, error=RuntimeError)
    assert "ObjectosphereLoss(\n  radius=50, weight=0.0001" in repr(ObjectosphereLoss(50, 1e-4))
