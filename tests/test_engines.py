"""Autograd, the tape and the chain rule by hand: the same gradients, and how a difference shows."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from comparison import about, each_close
from torch import Tensor, nn

from nn_backprop import engines
from nn_backprop.engines import ENGINES, disagreements, for_training, has_bfloat16, in_precision
from nn_backprop.engines.by_hand_fast import flat_parameter
from nn_backprop.layers import KWinners
from nn_backprop.models import CNN, MLP, MODELS

N = 7


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    model = MODELS[name]().to(dtype)
    side = getattr(model, "image_size", 28)
    return model, torch.randn(N, 1, side, side, dtype=dtype), torch.randint(10, (N,))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def engines_of(name: str) -> list[str]:
    written_out = isinstance(MODELS[name](), (MLP, CNN))
    return [engine for engine in ENGINES if engine != "by-hand" or written_out]


def all_in_one_type(name: str) -> bool:
    """Batch norm and k winners stay in float32, and count."""
    return not any(isinstance(m, (nn.BatchNorm2d, KWinners)) for m in MODELS[name]().modules())


def gives(compute: Callable, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Loss, gradients and buffers, as autograd has them on a copy; returns the loss."""
    copied = copy.deepcopy(model)
    expected_loss = copied.loss(copied(inputs), targets)
    expected = torch.autograd.grad(expected_loss, list(copied.parameters()))
    loss = compute(model, inputs, targets)
    assert loss.shape == () and not loss.requires_grad and loss.grad_fn is None
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    each_close(gradients(model).values(), expected)
    for value, moved in zip(model.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(value, moved, rtol=1e-10, atol=1e-12)
    return loss


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_an_engine_gives_the_loss_and_the_gradients(name):
    for engine in engines_of(name):
        model, *batch = made(name)
        before = [t.clone() for t in batch]
        with about(engine):
            for _ in range(2):  # the second call starts anew, it does not add to .grad
                loss = gives(ENGINES[engine], model, *batch)
            assert all(map(torch.equal, batch, before))

            # `fit` reads the losses of many steps at once, later: an engine must not reuse them.
            kept, value = list(gradients(model).values()), loss.item()
            values = [grad.clone() for grad in kept]
            for parameter in model.parameters():
                parameter.grad = None
            ENGINES[engine](model, 2 * batch[0], batch[1].flip(0))
            assert loss.item() == value and all(map(torch.equal, kept, values))


def test_by_hand_refuses_a_network_that_nobody_has_written_out():
    model = nn.Sequential(nn.Linear(3, 5)).double()
    model.loss = nn.functional.cross_entropy
    batch = torch.randn(2, 3).double(), torch.tensor([0, 4])
    sentence = "^by-hand gradients are written out for MLP and CNN, not for Sequential: use the eng"
    with pytest.raises(ValueError, match=sentence):
        ENGINES["by-hand"](model, *batch)
    gives(ENGINES["tape"], model, *batch)


def test_in_precision_keeps_the_parameters_and_computes_as_a_low_copy_does():
    for name in filter(all_in_one_type, MODELS):
        for engine in engines_of(name):
            model, inputs, targets = made(name, torch.float32)
            compute = in_precision(ENGINES[engine], torch.bfloat16)
            for step in range(3):  # the parameters change in between
                low = copy.deepcopy(model).bfloat16()
                expected = ENGINES[engine](low, inputs.bfloat16(), targets)
                before = copy.deepcopy(model.state_dict())
                loss = compute(model, inputs.bfloat16() if step else inputs, targets)
                with about(name, engine, step), torch.no_grad():
                    assert loss.dtype == torch.bfloat16 and torch.equal(loss, expected)
                    assert all(map(torch.equal, model.state_dict().values(), before.values()))
                    for key, parameter in model.named_parameters():
                        assert parameter.dtype == parameter.grad.dtype == torch.float32
                        assert torch.equal(parameter.grad, low.get_parameter(key).grad.float())
                        parameter -= 0.1 * parameter.grad


def test_updates_too_small_for_bfloat16_add_up():
    model, inputs, targets = made("mlp", torch.float32)
    start = model.layers[0].weight.detach().clone()
    compute = in_precision(ENGINES["by-hand"], torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for _ in range(3):
        compute(model, inputs, targets)
        optimizer.step()
    weight = model.layers[0].weight.detach()
    assert (weight != start).float().mean() > 0.9
    assert (weight.bfloat16() != start.bfloat16()).float().mean() < 0.1


@each_model
def test_the_engines_agree_and_nothing_is_touched(name):
    model, *batch = made(name, torch.float32)
    ENGINES["autograd"](model, *batch)
    touched = [*model.state_dict().values(), *gradients(model).values()]
    before = [t.clone() for t in touched]
    found = disagreements(model, *batch)
    assert [*found] == engines_of(name)[1:]
    for distances in found.values():
        assert distances.keys() == gradients(model).keys()
        assert max(distances.values()) < 1e-12  # in float64, though the model is in float32
    after = [*model.state_dict().values(), *gradients(model).values()]
    assert all(map(torch.equal, after, before))
    assert all(a.dtype == b.dtype for a, b in zip(after, before, strict=True))


def spoilt(parameter: str, change):
    """The tape, with one parameter's gradient changed."""

    def engine(model, inputs, targets):
        loss = engines.engine.by_tape(model, inputs, targets)
        weight = model.get_parameter(parameter)
        weight.grad = change(weight.grad)
        return loss

    return engine


def test_a_gradient_wrong_by_a_thousandth_shows(monkeypatch):
    for name in ("mlp", "cnn", "fast-cnn"):
        model, inputs, targets = made(name)
        for wrong in dict(model.named_parameters()):
            monkeypatch.setitem(ENGINES, "tape", spoilt(wrong, lambda grad: 1.001 * grad))
            distances = disagreements(model, inputs, targets)["tape"]
            assert distances.pop(wrong) == pytest.approx(1e-3, rel=1e-6), (name, wrong)
            assert max(distances.values()) < 1e-12, (name, wrong)


def test_one_wrong_entry_shows(monkeypatch):
    for value, expected in ((None, 0.25), (math.nan, math.inf), (math.inf, math.inf)):

        def change(grad: Tensor, value=value) -> Tensor:
            grad[3, 5] = grad[3, 5] + 0.25 * grad.abs().max() if value is None else value
            return grad

        monkeypatch.setitem(ENGINES, "tape", spoilt("layers.1.weight", change))
        distances = disagreements(*made("mlp"))["tape"]
        assert distances["layers.1.weight"] == pytest.approx(expected, rel=1e-6)


def test_where_autograd_says_zero(monkeypatch):
    model, inputs, targets = made("mlp")
    with torch.no_grad():
        model.layers[0].bias.fill_(-1e3)  # no unit fires: nothing reaches the first layer
    distances = disagreements(model, inputs, targets)["tape"]
    assert distances["layers.0.weight"] == distances["layers.0.bias"] == 0
    monkeypatch.setitem(ENGINES, "tape", spoilt("layers.0.bias", lambda grad: grad + 1e-9))
    assert disagreements(model, inputs, targets)["tape"]["layers.0.bias"] == math.inf


def test_in_precision_leaves_batch_norm_to_the_model_itself():
    """In float32, and with its running statistics where an evaluation will look for them."""
    for engine in ("autograd", "tape"):
        model, *batch = made("fast-cnn", torch.float32)
        twin = copy.deepcopy(model)
        expected_loss = ENGINES[engine](twin, *batch)
        compute = in_precision(for_training(engine), torch.bfloat16)
        assert abs(compute(model, *batch) - expected_loss) < 0.05, engine
        for (key, p), expected in zip(
            model.named_parameters(), gradients(twin).values(), strict=True
        ):
            assert p.dtype == p.grad.dtype == torch.float32, (engine, key)
            error = (p.grad - expected).norm() / expected.norm()
            assert error < 0.2, (engine, key)  # 8 bits, some layers; a lost one would have 1
        means = [norm.running_mean for norm in model.norms]
        assert all(mean.dtype == torch.float32 and mean.any() for mean in means), engine
        before = [mean.clone() for mean in means]
        compute(model.eval(), *batch)
        assert all(map(torch.equal, means, before)), engine


@each_model
def test_for_training_gives_what_the_engine_gives_whatever_changes_in_between(name):
    """Another batch size, the last smaller batch, new values, another place, another model."""
    for engine in engines_of(name):
        model, inputs, targets = made(name)
        other, compute = copy.deepcopy(model), for_training(engine)
        for change in range(6):
            if change == 2:
                inputs, targets = inputs[:3], targets[:3]
            if change == 3:
                inputs = inputs * 2
            if change == 4:
                for parameter in model.parameters():  # as model.to(...) does
                    parameter.data = parameter.data.clone() * 1.5
            if change == 5:
                model = other
            with about(engine, change):
                gives(compute, model, inputs, targets)


def test_for_training_by_hand_writes_into_one_flat_parameter():
    model, inputs, targets = made("mlp")
    twin = copy.deepcopy(model)
    flat = flat_parameter(model)
    assert flat.numel() == sum(p.numel() for p in model.parameters())
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in ([flat], list(twin.parameters()))]
    compute = for_training("by-hand")
    for _ in range(3):
        compute(model, inputs, targets)
        ENGINES["autograd"](twin, inputs, targets)
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_has_bfloat16_says_what_torch_says_of_the_processor(monkeypatch):
    for capabilities, expected in (
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert has_bfloat16(torch.device("cpu")) is expected
    assert not has_bfloat16(torch.device("mps"))


def test_one_engine_serves_one_model_after_another():
    """Also where a later one is given the place in memory of one that is gone."""
    for engine, low in itertools.product(ENGINES, [False, True]):
        compute = for_training(engine)
        if low:
            compute = in_precision(compute, torch.bfloat16)
        for seed in range(4):
            torch.manual_seed(seed)
            model = MODELS["mlp"]()
            inputs, targets = torch.randn(N, 1, 28, 28), torch.randint(10, (N,))
            expected = model.loss(model(inputs), targets)
            wanted = torch.autograd.grad(expected, list(model.parameters()))
            with about(engine, low, seed):
                loss = compute(model, inputs, targets)
                torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)
                for grad, want in zip(gradients(model).values(), wanted, strict=True):
                    # In bfloat16 a unit near 0 may switch; another model's would differ by 1.
                    assert (grad - want).norm() < 0.3 * want.norm()
            del model


def test_a_model_that_cannot_be_replayed_is_recorded_at_every_step():
    class Doubtful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.linear(x))
            return z if z.sum() > -1e9 else -z

        def loss(self, output: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output, targets)

    torch.manual_seed(1)
    model, compute = Doubtful(), for_training("tape")
    twin = copy.deepcopy(model)
    for _ in range(3):
        inputs, targets = torch.randn(N, 5), torch.randint(5, (N,))
        assert compute(model, inputs, targets) == ENGINES["tape"](twin, inputs, targets)
        assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert model.norm.num_batches_tracked == 3
