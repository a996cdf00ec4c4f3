"""The backward passes written out by hand, plain and with buffers used again: equal to autograd,
sharing no code with the rules."""

import ast
import copy
import inspect
from itertools import product

import pytest
import torch
from comparison import about, all_close, close
from torch import nn

from nn_backprop import models
from nn_backprop.engines import by_hand
from nn_backprop.engines.by_hand_fast import CNNBackprop, MLPBackprop, flat_parameter

MLP_SIZES = [(7, 3), (13, 5, 3), (11, 7, 5, 3), (17, 2, 13, 3, 5)]
# Channels, kernel size and image size. In most, both poolings leave a row over, as in
# 13 -> 11 -> 5 -> 3 -> 1.
CNN_SIZES = [((2, 3), 3, 14), ((3, 2), 3, 13), ((5, 7), 3, 17), ((2, 5), 1, 11), ((7, 2), 5, 19),
             ((1, 1), 3, 14)]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def agree(model: nn.Module, *shape: int, classes: int, scale: float = 1.0) -> None:
    """On three batches in a row, with other parameters at each: nothing may be left over."""
    cnn = isinstance(model, models.CNN)
    plain = by_hand.cnn_backprop if cnn else by_hand.mlp_backprop
    fast = (CNNBackprop if cnn else MLPBackprop)(model, torch.empty(shape).double())
    names, parameters = zip(*model.named_parameters(), strict=True)

    def fast_by_name(*batch):
        return fast(*batch), {name: p.grad for name, p in model.named_parameters()}

    for pixels_tie in (True, False, True):
        inputs = (torch.randint(-2, 3, shape) if pixels_tie else torch.randn(shape)).double()
        inputs, targets = scale * inputs, torch.randint(classes, shape[:1])
        expected_loss = model.loss(model(inputs), targets)
        expected = torch.autograd.grad(expected_loss, parameters)
        before = [t.clone() for t in (inputs, targets, *parameters)]
        for p in parameters:
            p.grad = None
        for backward in (lambda *batch: plain(model, *batch), fast_by_name):
            assert all(p.grad is None for p in parameters)  # the plain one leaves them alone
            loss, grads = backward(inputs, targets)
            assert loss.shape == () and not loss.requires_grad
            close(loss, expected_loss.detach())
            assert tuple(grads) == names
            all_close(grads, dict(zip(names, expected, strict=True)))
            assert all(map(torch.equal, before, (inputs, targets, *parameters)))
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p), alpha=0.1)


def test_the_mlp_agrees_with_autograd():
    for sizes, *which, n in product(
        MLP_SIZES, ["relu", "sigmoid", "tanh"], ["cross_entropy", "squared_error"], [1, 19]
    ):
        with about(sizes, *which, n):
            agree(models.MLP(sizes, *which).double(), n, sizes[0], classes=sizes[-1])


def test_the_cnn_agrees_with_autograd():
    for (channels, kernel, side), n in product(CNN_SIZES, [1, 11]):
        with about(channels, kernel, side, n):
            model = models.CNN(channels, kernel, side, classes=3).double()
            agree(model, n, 1, side, side, classes=3)


def test_large_logits_do_not_overflow():
    agree(models.MLP((7, 3)).double(), 5, 7, classes=3, scale=1e4)


def test_gradients_lie_in_memory_as_their_parameters_do():
    """A fused optimizer takes that for granted, and silently misreads any other layout."""
    for model in (models.happy(), models.MLP(), models.CNN()):
        backward = by_hand.cnn_backprop if isinstance(model, models.CNN) else by_hand.mlp_backprop
        _, grads = backward(model, torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 7]))
        assert all(t.is_contiguous() for t in [*model.parameters(), *grads.values()])


def test_it_uses_no_engine_no_rule_and_no_autograd():
    nodes = list(ast.walk(ast.parse(inspect.getsource(by_hand))))
    imported = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"typing", "torch", "torch.nn.functional"}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not attributes & {"autograd", "backward", "grad", "requires_grad_"}


def test_a_class_that_does_not_exist_is_refused():
    for loss, wrong in product(["cross_entropy", "squared_error"], [-1, 3]):
        model, inputs = models.MLP((7, 3), "sigmoid", loss), torch.randn(2, 7)
        targets = torch.tensor([0, wrong])
        with about(loss, wrong):
            with pytest.raises(RuntimeError, match="Class values must be"):
                by_hand.mlp_backprop(model, inputs, targets)
            with pytest.raises((IndexError, RuntimeError)):
                MLPBackprop(model, inputs)(inputs, targets)


# --- the buffers of the fast ones ---


def test_a_frozen_parameter_gets_no_gradient():
    model = models.MLP((7, 5, 3))
    model.layers[0].weight.requires_grad_(False)
    MLPBackprop(model, torch.empty(2, 7))(torch.randn(2, 7), torch.tensor([0, 2]))
    assert model.layers[0].weight.grad is None
    assert model.layers[0].bias.grad is not None


def test_fits_notices_another_model_shape_and_type_and_moved_parameters():
    model, inputs, targets = models.MLP((7, 3)), torch.randn(2, 7), torch.tensor([0, 2])
    fast = MLPBackprop(model, inputs)
    assert fast.fits(model, inputs, targets)
    assert not fast.fits(copy.deepcopy(model), inputs, targets)
    assert not fast.fits(model, inputs[:1], targets[:1])
    assert not fast.fits(model, inputs.double(), targets)
    assert not fast.fits(model.double(), inputs, targets)


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
    for unfit in (model, nn.Identity()):
        with pytest.raises(ValueError, match="one dtype and one device"):
            flat_parameter(unfit)
