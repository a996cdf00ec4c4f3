"""A recorded pass, played on other data: what `backprop` gives, or a refusal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import about, all_close, each_close
from torch import Tensor, nn

from nn_backprop import MissingRuleError, backprop
from nn_backprop.engines.replay import NotReplayableError, Replay
from nn_backprop.models import MODELS


def batch(seed: int, *shape: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(classes, shape[:1], generator=generator)


def same_as_backprop(model: nn.Module, loss_fn, *shape: int, classes: int = 10) -> Replay:
    first, second = batch(2, *shape, classes=classes), batch(3, *shape, classes=classes)
    return same_on_batches(model, loss_fn, first, second)


def same_on_batches(model: nn.Module, loss_fn, first: tuple, second: tuple) -> Replay:
    """Recorded on one batch, played on another, with other parameters, and on the first again; so
    no number can come from the recording."""
    replay = Replay(model, loss_fn, *first)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for of in (second, first):
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(1.1)
        twin = copy.deepcopy(model)  # what one pass counts in a buffer must not reach the other
        loss = replay(*of)
        expected_loss, expected = backprop(twin, loss_fn, *of)
        assert torch.equal(loss, expected_loss)
        each_close(model.buffers(), twin.buffers(), rtol=1e-12)
        all_close({name: p.grad for name, p in parameters.items()}, expected, rtol=1e-12)
        for p in parameters.values():
            assert p.grad is None or p.grad.stride() == p.stride()
    return replay


@pytest.mark.parametrize("name", MODELS)
def test_each_model(name):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    side = getattr(model, "image_size", 28)
    same_as_backprop(model, model.loss, 7, 1, side, side)


class Awkward(nn.Module):
    """Names that the program has too, a weight used twice, one not used, a constant, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.z0 = nn.Parameter(torch.randn(5, 5).double())
        self.inputs = nn.Parameter(torch.randn(5).double())
        self.lambda_ = nn.Parameter(torch.randn(5).double())
        self.unused = nn.Parameter(torch.randn(3).double())
        self.frozen = nn.Parameter(torch.randn(5).double(), requires_grad=False)
        self.register_buffer("scale", torch.rand(5).double())
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.0)).double()

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.arange(5) * 0.25
        a = F.linear(F.linear(x, self.z0), self.z0, self.inputs) + shift.to(x.dtype)
        return self.layers(a * self.scale * self.frozen) + self.lambda_.exp()


def test_awkward_names_shared_unused_and_frozen_weights():
    torch.manual_seed(1)
    model = Awkward()
    replay = same_as_backprop(model, F.cross_entropy, 7, 5, classes=5)
    assert model.unused.grad is None and model.frozen.grad is None
    assert "linear_backward" in replay.source


def test_a_parameter_in_another_memory_format_gets_its_gradient_in_that():
    model = MODELS["cnn"]().double().to(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()
    same_as_backprop(model, model.loss, 3, 1, 28, 28)


REFUSED = {
    "if": lambda x, z: z if z.sum() > 0 else -z,
    "item": lambda x, z: z * x.abs().max().item(),
    "list": lambda x, z: z * x[0].tolist()[0],
    "in place": lambda x, z: z.relu_(),
}


class Refused(nn.Sequential):
    def __init__(self, how: str) -> None:
        super().__init__(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.how = REFUSED[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, super().forward(x))


def test_refuses_what_depends_on_the_data_and_what_overwrites():
    """And leaves the running statistics alone."""
    for how in REFUSED:
        model = Refused(how).double()
        with about(how), pytest.raises(NotReplayableError):
            Replay(model, F.cross_entropy, *batch(2, 7, 5, classes=5))
        assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0, how


def test_fits_only_the_same_model_shapes_types_and_mode():
    model, (inputs, targets) = MODELS["mlp"]().double(), batch(2, 7, 784)
    replay = Replay(model, model.loss, inputs, targets)
    assert replay.fits(model, inputs + 1, targets)
    assert not replay.fits(MODELS["mlp"]().double(), inputs, targets)
    assert not replay.fits(model, inputs[:3], targets[:3])
    assert not replay.fits(model, inputs.float(), targets)
    assert not replay.fits(model.eval(), inputs, targets)


def test_dropout_draws_anew_at_each_call():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 5)).double()
    inputs, targets = batch(2, 7, 5, classes=5)
    replay = Replay(model, F.cross_entropy, inputs, targets)
    assert replay(inputs, targets) != replay(inputs, targets)


def test_a_gradient_that_no_rule_gives_is_missed_as_by_backprop():
    model = nn.Linear(5, 5, dtype=torch.float64)
    with pytest.raises(MissingRuleError):
        Replay(model, lambda z, y: F.cross_entropy(z, y, model.bias), *batch(2, 7, 5, classes=5))
