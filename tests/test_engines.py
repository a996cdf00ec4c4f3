"""Autograd, the tape and the chain rule by hand: the same gradients, and how a difference shows."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nn_backprop import engines
from nn_backprop.engines import ENGINES, disagreement, in_precision
from nn_backprop.models import MODELS

N = 7


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    model = MODELS[name]().to(dtype)
    return model, torch.randn(N, 1, 28, 28, dtype=dtype), torch.randint(10, (N,))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


def test_an_engine_gives_the_loss_and_the_gradients(name, engine):
    model, inputs, targets = made(name)
    expected_loss = model.loss(model(inputs), targets)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(expected_loss, list(parameters.values()))

    inputs_before = inputs.clone()
    for _ in range(2):  # the second call starts anew, it does not add to .grad
        loss = ENGINES[engine](model, inputs, targets)
        assert loss.shape == () and not loss.requires_grad and loss.grad_fn is None
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
        for grad, want in zip(gradients(model).values(), expected, strict=True):
            largest = want.abs().max().item()
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10 * largest)
    assert torch.equal(inputs, inputs_before)


def test_what_an_engine_returned_stays_as_it_is(name, engine):
    """`fit` reads the losses of many steps at once, later: an engine must not reuse them."""
    model, inputs, targets = made(name)
    loss = ENGINES[engine](model, inputs, targets)
    kept, value = gradients(model), loss.item()
    values = {key: grad.clone() for key, grad in kept.items()}
    for parameter in model.parameters():
        parameter.grad = None
    ENGINES[engine](model, 2 * inputs, targets.flip(0))
    assert loss.item() == value
    assert all(torch.equal(kept[key], values[key]) for key in kept)


def test_by_hand_refuses_a_network_that_nobody_has_written_out():
    model = nn.Sequential(nn.Linear(3, 5))
    model.loss = nn.functional.cross_entropy
    inputs, targets = torch.randn(2, 3), torch.tensor([0, 4])
    sentence = "^by-hand gradients are written out for MLP and CNN, not for Sequential: use the eng"
    with pytest.raises(ValueError, match=sentence):
        ENGINES["by-hand"](model, inputs, targets)
    for other in ("autograd", "tape"):
        ENGINES[other](model, inputs, targets)
        assert model[0].weight.grad.any()


def test_in_precision_keeps_the_parameters_and_computes_as_a_low_copy_does(name, engine):
    model, inputs, targets = made(name, torch.float32)
    compute = in_precision(ENGINES[engine], torch.bfloat16)
    for step in range(3):  # the parameters change in between
        low = copy.deepcopy(model).bfloat16()
        expected = ENGINES[engine](low, inputs.bfloat16(), targets)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        loss = compute(model, inputs.bfloat16() if step else inputs, targets)
        assert loss.dtype == torch.bfloat16 and torch.equal(loss, expected)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for key, parameter in model.named_parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, low.get_parameter(key).grad.float())
        with torch.no_grad():
            for parameter in model.parameters():
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


def test_the_engines_agree_and_nothing_is_touched(name):
    model, inputs, targets = made(name, torch.float32)
    ENGINES["autograd"](model, inputs, targets)
    state = copy.deepcopy(model.state_dict())
    grads = {key: grad.clone() for key, grad in gradients(model).items()}
    found = disagreement(model, inputs, targets)
    assert found.keys() == {"tape", "by-hand"}
    for distances in found.values():
        assert distances.keys() == grads.keys()
        assert max(distances.values()) < 1e-12  # in float64, though the model is in float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(grad, grads[key]) for key, grad in gradients(model).items())


def spoilt(parameter: str, change):
    """The tape, with one parameter's gradient changed."""

    def engine(model, inputs, targets):
        loss = engines.tape(model, inputs, targets)
        weight = model.get_parameter(parameter)
        weight.grad = change(weight.grad)
        return loss

    return engine


def test_a_gradient_wrong_by_a_thousandth_shows(monkeypatch, name):
    model, inputs, targets = made(name)
    for wrong in dict(model.named_parameters()):
        monkeypatch.setitem(ENGINES, "tape", spoilt(wrong, lambda grad: 1.001 * grad))
        distances = disagreement(model, inputs, targets)["tape"]
        assert distances.pop(wrong) == pytest.approx(1e-3, rel=1e-6)
        assert max(distances.values()) < 1e-12


def test_one_wrong_entry_shows(monkeypatch):
    def change(grad: Tensor) -> Tensor:
        grad[3, 5] += 0.25 * grad.abs().max()
        return grad

    monkeypatch.setitem(ENGINES, "tape", spoilt("layers.1.weight", change))
    distances = disagreement(*made("mlp"))["tape"]
    assert distances["layers.1.weight"] == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_infinitely_far(monkeypatch, value):
    def change(grad: Tensor) -> Tensor:
        grad[0] = value
        return grad

    monkeypatch.setitem(ENGINES, "tape", spoilt("layers.0.bias", change))
    distances = disagreement(*made("mlp"))["tape"]
    assert distances["layers.0.bias"] == math.inf


def test_where_autograd_says_zero(monkeypatch):
    model, inputs, targets = made("mlp")
    with torch.no_grad():
        model.layers[0].bias.fill_(-1e3)  # no unit fires: nothing reaches the first layer
    distances = disagreement(model, inputs, targets)["tape"]
    assert distances["layers.0.weight"] == distances["layers.0.bias"] == 0
    monkeypatch.setitem(ENGINES, "tape", spoilt("layers.0.bias", lambda grad: grad + 1e-9))
    assert disagreement(model, inputs, targets)["tape"]["layers.0.bias"] == math.inf
