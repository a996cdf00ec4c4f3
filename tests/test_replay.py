"""A recorded pass, played on other data: what `backprop` gives, or a refusal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import about
from torch import Tensor, nn

from nn_backprop import MissingRuleError, backprop
from nn_backprop.engines.replay import NotReplayableError, Replay
from nn_backprop.models import MODELS


def same_as_backprop(model: nn.Module, loss_fn, first: tuple, second: tuple) -> Replay:
    """Records on the first batch, plays the second; so no number can come from the recording."""
    replay = Replay(model, loss_fn, *first)
    for batch in (second, first):
        twin = copy.deepcopy(model)  # what one pass counts in a buffer must not reach the other
        loss = replay(*batch)
        expected_loss, expected = backprop(twin, loss_fn, *batch)
        for buffer, counted in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, counted, rtol=1e-12, atol=1e-12)
        assert torch.equal(loss, expected_loss)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert (parameter.grad is None) == (expected[name] is None), name
                if parameter.grad is not None:
                    assert parameter.grad.stride() == parameter.stride()
                    torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=0)
    return replay


def batch(seed: int, *shape: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(classes, shape[:1], generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_each_model(name):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    side = getattr(model, "image_size", 28)
    same_as_backprop(model, model.loss, batch(2, 7, 1, side, side), batch(3, 7, 1, side, side))


def test_parameters_may_change_between_the_calls():
    model = MODELS["mlp"]().double()
    replay = Replay(model, model.loss, *batch(2, 7, 784))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    loss = replay(*batch(3, 7, 784))
    assert torch.equal(loss, backprop(model, model.loss, *batch(3, 7, 784))[0])


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
    replay = same_as_backprop(
        model, F.cross_entropy, batch(2, 7, 5, classes=5), batch(3, 7, 5, classes=5)
    )
    assert model.unused.grad is None and model.frozen.grad is None
    assert "linear_backward" in replay.source


def test_a_parameter_in_another_memory_format_gets_its_gradient_in_that():
    model = MODELS["cnn"]().double().to(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()
    same_as_backprop(model, model.loss, batch(2, 3, 1, 28, 28), batch(3, 3, 1, 28, 28))


class Deciding(nn.Linear):
    def __init__(self, how: str) -> None:
        super().__init__(5, 5, dtype=torch.float64)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if self.how == "if":
            return z if z.sum() > 0 else -z
        if self.how == "item":
            return z * x.abs().max().item()
        if self.how == "list":
            return z * x[0].tolist()[0]
        return z.relu_()


def test_refuses_what_depends_on_the_data_and_what_overwrites():
    for how in ("if", "item", "list", "in place"):
        with about(how), pytest.raises(NotReplayableError):
            Replay(Deciding(how), F.cross_entropy, *batch(2, 7, 5, classes=5))


def test_fits_only_the_same_model_shapes_types_and_mode():
    model, (inputs, targets) = MODELS["mlp"]().double(), batch(2, 7, 784)
    replay = Replay(model, model.loss, inputs, targets)
    assert replay.fits(model, inputs + 1, targets)
    assert not replay.fits(MODELS["mlp"]().double(), inputs, targets)
    assert not replay.fits(model, inputs[:3], targets[:3])
    assert not replay.fits(model, inputs.float(), targets)
    model.eval()
    assert not replay.fits(model, inputs, targets)


def test_dropout_draws_anew_at_each_call():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 5)).double()
    inputs, targets = batch(2, 7, 5, classes=5)
    replay = Replay(model, F.cross_entropy, inputs, targets)
    assert replay(inputs, targets) != replay(inputs, targets)


def test_a_refused_recording_leaves_the_running_statistics_alone():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)).double()
    before = model[1].running_mean.clone()
    with pytest.raises(NotReplayableError):
        Replay(model, F.cross_entropy, *batch(2, 7, 5, classes=5))
    assert torch.equal(model[1].running_mean, before) and model[1].num_batches_tracked == 0


def test_a_gradient_that_no_rule_gives_is_missed_as_by_backprop():
    class Weighted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 5, dtype=torch.float64)
            self.each = nn.Parameter(torch.ones(5, dtype=torch.float64))

    model = Weighted()
    with pytest.raises(MissingRuleError):
        Replay(model, lambda z, y: F.cross_entropy(z, y, model.each), *batch(2, 7, 5, classes=5))
