"""The backward passes that reuse their buffers: what `by_hand` gives, at every call anew."""

import copy
from itertools import product

import pytest
import torch
from comparison import about, close
from torch import nn

from nn_backprop import models
from nn_backprop.engines import by_hand
from nn_backprop.engines.by_hand_fast import CNNBackprop, MLPBackprop, flat_parameter

MLP_SIZES = [(7, 3), (13, 5, 3), (17, 2, 13, 5, 3)]
CNN_SIZES = [((2, 3), 3, 14), ((3, 2), 3, 13), ((2, 5), 1, 11), ((7, 2), 5, 19), ((1, 1), 3, 14)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def equal_to_by_hand(fast, plain, model: nn.Module, *shape: int) -> None:
    """On three batches in a row, with other parameters at each: nothing may be left over."""
    for _ in range(3):
        # Small whole numbers, so that pixels of a window tie.
        inputs = torch.randint(-2, 3, shape).double()
        targets = torch.randint(3, shape[:1])
        before = inputs.clone(), [p.clone() for p in model.parameters()]
        loss = fast(inputs, targets)
        expected_loss, expected = plain(model, inputs, targets)
        assert loss.shape == () and not loss.requires_grad
        close(loss, expected_loss)
        for name, parameter in model.named_parameters():
            close(parameter.grad, expected[name])
        assert torch.equal(inputs, before[0])
        assert all(map(torch.equal, model.parameters(), before[1]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_the_mlp():
    for sizes, *which, n in product(
        MLP_SIZES, ["relu", "sigmoid", "tanh"], ["cross_entropy", "squared_error"], [1, 19]
    ):
        with about(sizes, *which, n):
            model = models.MLP(sizes, *which).double()
            fast = MLPBackprop(model, torch.empty(n, sizes[0]).double())
            equal_to_by_hand(fast, by_hand.mlp_backprop, model, n, sizes[0])


def test_the_cnn():
    for (channels, kernel, side), n in product(CNN_SIZES, [1, 11]):
        with about(channels, kernel, side, n):
            model = models.CNN(channels, kernel, side, classes=3).double()
            fast = CNNBackprop(model, torch.empty(n, 1, side, side).double())
            equal_to_by_hand(fast, by_hand.cnn_backprop, model, n, 1, side, side)


def test_a_frozen_parameter_gets_no_gradient():
    model = models.MLP((7, 5, 3)).double()
    model.layers[0].weight.requires_grad_(False)
    fast = MLPBackprop(model, torch.empty(2, 7).double())
    fast(torch.randn(2, 7).double(), torch.tensor([0, 2]))
    assert model.layers[0].weight.grad is None
    assert model.layers[0].bias.grad is not None


def test_a_class_that_does_not_exist_raises():
    for loss, target in product(["cross_entropy", "squared_error"], [3, -1]):
        fast = MLPBackprop(models.MLP((7, 3), "sigmoid", loss), torch.empty(2, 7))
        with about(loss, target), pytest.raises((IndexError, RuntimeError)):
            fast(torch.randn(2, 7), torch.tensor([0, target]))


def test_fits_notices_another_model_shape_and_type_and_moved_parameters():
    model, inputs, targets = models.MLP((7, 3)), torch.randn(2, 7), torch.tensor([0, 2])
    fast = MLPBackprop(model, inputs)
    assert fast.fits(model, inputs, targets)
    assert not fast.fits(copy.deepcopy(model), inputs, targets)
    assert not fast.fits(model, inputs[:1], targets[:1])
    assert not fast.fits(model, inputs.double(), targets)
    model.double()
    assert not fast.fits(model, inputs, targets)


def test_flat_parameter_holds_values_and_gradients_of_all_that_are_not_frozen():
    model = models.MLP((7, 5, 3))
    model.layers[1].bias.requires_grad_(False)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = flat_parameter(model)
    assert flat.numel() == 7 * 5 + 5 + 5 * 3
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        flat.add_(1)
        flat.grad.fill_(2)
    for name, parameter in model.named_parameters():
        moved = name != "layers.1.bias"
        assert torch.equal(parameter, values[name] + moved)
        assert parameter.grad is None if not moved else (parameter.grad == 2).all()


def test_flat_parameter_refuses_what_does_not_fit_in_one_buffer():
    model = models.MLP((7, 5, 3))
    model.layers[0].double()
    with pytest.raises(ValueError, match="one dtype and one device"):
        flat_parameter(model)
    with pytest.raises(ValueError, match="one dtype and one device"):
        flat_parameter(nn.Identity())
