"""The backward passes written out by hand: equal to autograd, sharing no code with the rules."""

import ast
import inspect
from itertools import product

import pytest
import torch
from comparison import about, all_close, close
from torch import nn

from nn_backprop import models
from nn_backprop.engines import by_hand

MLP_SIZES = [(7, 3), (13, 5, 3), (11, 7, 5, 3), (17, 2, 13, 3, 5)]
# Channels, kernel size and image size. In all but the first, both poolings leave a row over, as in
# 13 -> 11 -> 5 -> 3 -> 1.
CNN_SIZES = [((2, 3), 3, 14), ((3, 2), 3, 13), ((5, 7), 3, 17), ((2, 5), 1, 11), ((7, 2), 5, 19)]


def by_autograd(model, inputs, targets):
    loss = model.loss(model(inputs), targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def batch(n: int, shape: tuple[int, ...], classes: int):
    return torch.randn(n, *shape, dtype=torch.float64), torch.randint(classes, (n,))


def agree(function, model: nn.Module, inputs, targets) -> None:
    loss, grads = function(model, inputs, targets)
    expected_loss, expected = by_autograd(model, inputs, targets)
    assert loss.shape == () and not loss.requires_grad
    close(loss, expected_loss)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    all_close(grads, expected)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def test_the_mlp_agrees_with_autograd():
    for sizes, *which, n in product(
        MLP_SIZES, ["relu", "sigmoid", "tanh"], ["cross_entropy", "squared_error"], [1, 19]
    ):
        with about(sizes, *which, n):
            model = models.MLP(sizes, *which).double()
            agree(by_hand.mlp_backprop, model, *batch(n, sizes[:1], sizes[-1]))


def test_the_cnn_agrees_with_autograd():
    for (channels, kernel, side), n in product(CNN_SIZES, [1, 11]):
        with about(channels, kernel, side, n):
            model = models.CNN(channels, kernel, side, classes=3).double()
            agree(by_hand.cnn_backprop, model, *batch(n, (1, side, side), 3))


def test_gradients_lie_in_memory_as_their_parameters_do():
    """A fused optimizer takes that for granted, and silently misreads any other layout."""
    for model in (models.happy(), models.MLP(), models.CNN()):
        backward = by_hand.cnn_backprop if isinstance(model, models.CNN) else by_hand.mlp_backprop
        _, grads = backward(model, torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 7]))
        assert all(t.is_contiguous() for t in [*model.parameters(), *grads.values()])


def test_large_logits_do_not_overflow():
    model = models.MLP((7, 3)).double()
    inputs, targets = batch(5, (7,), 3)
    agree(by_hand.mlp_backprop, model, 1e4 * inputs, targets)


def test_the_model_and_the_batch_are_left_as_they_were():
    model = models.CNN((2, 3), 3, 14, classes=5).double()
    inputs, targets = batch(7, (1, 14, 14), 5)
    before = [t.clone() for t in (inputs, targets, *model.parameters())]
    by_hand.cnn_backprop(model, inputs, targets)
    assert all(map(torch.equal, before, (inputs, targets, *model.parameters())))
    assert all(p.grad is None for p in model.parameters())


def test_it_uses_no_engine_no_rule_and_no_autograd():
    tree = ast.parse(inspect.getsource(by_hand))
    imported = {
        alias.name if isinstance(node, ast.Import) else f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported == {"typing", "torch", "torch.nn.functional"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"autograd", "backward", "grad", "requires_grad_"}


def test_a_class_that_does_not_exist_is_refused():
    model = models.MLP((6, 10)).double()
    for wrong in (-1, 10):
        with pytest.raises(RuntimeError, match="Class values must be"):
            by_hand.mlp_backprop(model, torch.randn(2, 6).double(), torch.tensor([3, wrong]))
