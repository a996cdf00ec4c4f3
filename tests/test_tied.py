"""One layer applied many times: its gradients, against untied layers, by hand; its networks."""

from itertools import pairwise
from itertools import product as every

import torch
from properties import about, same, same_gradients
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import models
from nn_backprop.layers import TiedStack, UntiedStack
from nn_backprop.models import counting

DEPTH = 3
LAYERS = {
    "linear": (lambda **to: nn.Linear(7, 7, bias=False, **to), (5, 7)),
    "affine, more axes": (lambda **to: nn.Linear(7, 7, **to), (2, 5, 7)),
    "conv2d": (lambda **to: nn.Conv2d(3, 3, (3, 5), padding=(1, 2), **to), (2, 3, 5, 7)),
}
SLOPES = {torch.tanh: lambda z: 1 - torch.tanh(z) ** 2, torch.relu: lambda z: (z > 0).to(z.dtype)}


def made(layer: str, activation, depth: int = DEPTH):
    """A stack and an input for it, with weights large enough for every step to matter."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    stack = TiedStack(make(dtype=torch.float64), depth, activation)
    return stack, torch.randn(shape, dtype=torch.float64)


def test_the_stack_is_its_equations():
    for layer, activation, depth in every(LAYERS, SLOPES, (1, 2, 5)):
        stack, u = made(layer, activation, depth)
        h = activation(u)  # h_0
        for _ in range(depth):
            h = activation(stack.layer(h) + u)
        with about(layer, activation, depth):
            assert_close([stack(u), stack.untied()(u)], [h, h])


# --- gradients ---


def test_the_tied_gradient_is_the_sum_of_the_untied_ones():
    for layer, activation in every(LAYERS, SLOPES):
        stack, u = made(layer, activation)
        untied, upstream, v = stack.untied(), torch.randn_like(u), u.requires_grad_()
        grad_u, grads = zip(
            *(gradients(each, v, upstream) for each in (stack, untied)), strict=True
        )
        with about(layer, activation):
            assert_close(*grad_u, rtol=1e-12, atol=1e-12)
            for name, _ in stack.layer.named_parameters():
                steps = [grads[1][f"layers.{t}.{name}"] for t in range(DEPTH)]
                assert all(not torch.allclose(a, b) for a, b in pairwise(steps))
                assert_close(grads[0][f"layer.{name}"], sum(steps), rtol=1e-12, atol=1e-12)


def gradients(stack: nn.Module, u: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names, parameters = zip(*stack.named_parameters(), strict=True)
    grad_u, *grads = torch.autograd.grad(stack(u), (u, *parameters), upstream)
    return grad_u, dict(zip(names, grads, strict=True))


def by_the_docstring(W: Tensor, u: Tensor, depth: int, phi, slope, grad_h: Tensor):
    """Its equations, letter by letter: grad_W, grad_u, and what each step adds to grad_W."""
    z, h = [u], [phi(u)]
    for _ in range(depth):
        z.append(torch.einsum("ni,oi->no", h[-1], W) + u)
        h.append(phi(z[-1]))
    grad_u, steps = torch.zeros_like(u), {}
    for t in reversed(range(depth + 1)):  # t = L … 0
        grad_z = grad_h * slope(z[t])
        grad_u += grad_z
        if t > 0:
            steps[t] = torch.einsum("no,ni->oi", grad_z, h[t - 1])
            grad_h = torch.einsum("no,oi->ni", grad_z, W)
    return sum(steps.values()), grad_u, steps


def test_the_gradients_are_those_of_the_derivation():
    for (activation, slope), depth in every(SLOPES.items(), (1, 2, 5)):
        stack, u = made("linear", activation, depth)
        grad_h, W = torch.randn_like(u), stack.layer.weight.detach()
        grad_W, grad_u, steps = by_the_docstring(W, u, depth, activation, slope, grad_h)
        u.requires_grad_()
        found_u, found = gradients(stack, u, grad_h)
        untied_u, untied = gradients(stack.untied(), u, grad_h)
        found = [found_u, untied_u, *found.values(), *untied.values()]
        wanted = [grad_u, grad_u, grad_W, *(steps[t] for t in range(1, depth + 1))]
        assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# --- copies, cost, refusals ---


def test_the_untied_layers_are_copies():
    stack = TiedStack(nn.Linear(7, 7), 5, nn.PReLU())
    stack.layer.bias.requires_grad_(False)
    untied = stack.untied()
    assert isinstance(untied, UntiedStack) and len(untied.layers) == 5
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    for layer in untied.layers:
        assert torch.equal(layer.weight, stack.layer.weight) and not layer.bias.requires_grad
    with torch.no_grad():
        for parameter in untied.parameters():
            parameter.mul_(torch.randn(()))
    assert len({layer.weight[0, 0].item() for layer in untied.layers}) == 5
    assert same(dict(stack.state_dict()), before)


def test_parameters_cost_and_memory():
    """The parameters are those of one layer, the cost that of all; memory grows with the depth."""
    for layer, activation in every(LAYERS, SLOPES):
        stack, u = made(layer, activation)
        one, untied = counting.parameters(stack.layer), stack.untied()
        assert counting.parameters(stack) == one
        assert counting.parameters(untied) == DEPTH * one
        cost = DEPTH * counting.multiply_adds(stack.layer, u)
        assert counting.multiply_adds(stack, u) == counting.multiply_adds(untied, u) == cost > 0
        deeper, _ = made(layer, activation, DEPTH + 2)
        u.requires_grad_()
        for each, depth in ((stack, DEPTH), (untied, DEPTH), (deeper, DEPTH + 2)):  # h_0 … h_L
            kept = counting.kept_bytes(each, lambda each=each, u=u: each(u))
            assert kept == 8 * (depth + 1) * u.numel(), (layer, activation)


def test_an_activation_in_place_changes_neither_the_input_nor_the_output():
    torch.manual_seed(0)
    layer, u = nn.Linear(5, 5, bias=False), torch.randn(3, 5)
    before = u.clone()
    assert_close(TiedStack(layer, 2, nn.ReLU(inplace=True))(u), TiedStack(layer, 2)(before))
    assert torch.equal(u, before)


# --- the networks ---

TIED = 784 * 128 + 128 + 128**2 + 128 * 10 + 10
BOTH = (models.tied_network, models.untied_network)


def test_parameters_and_cost_of_the_networks():
    images = torch.randn(3, 1, 28, 28)
    for depth in (1, 2, 3, 4, 7):
        tied, untied = (make(depth=depth) for make in BOTH)
        assert counting.parameters(tied) == TIED == 118_154
        assert counting.parameters(untied) == TIED + (depth - 1) * 128**2
        cost = 3 * (784 * 128 + depth * 128**2 + 128 * 10)
        found = [counting.multiply_adds(model, images) for model in (tied, untied)]
        assert found == [cost, cost], depth
    sizes = {"width": 7, "depth": 5, "in_features": 11, "classes": 3}
    small = 11 * 7 + 7 + 7 * 7 + 7 * 3 + 3
    assert [counting.parameters(make(**sizes)) for make in BOTH] == [small, small + 4 * 7 * 7]
    assert models.tied_network(**sizes)(torch.randn(2, 1, 1, 11)).shape == (2, 3)
    assert models.MODELS["tied"] is models.tied_network


def test_the_network_is_its_equations():
    model = models.tied_network(7, 2, 11, 3)
    x, y = torch.randn(5, 11), torch.tensor([0, 2, 1, 1, 0])
    u = x @ model.input.weight.T + model.input.bias
    h, W = u.clamp(min=0), model.stack.layer.weight
    for _ in range(2):
        h = (h @ W.T + u).clamp(min=0)
    logits = h @ model.output.weight.T + model.output.bias
    assert_close(model(x), logits)
    assert_close(model.probabilities(logits), logits.softmax(1))
    assert_close(model.loss(logits, y), -logits.log_softmax(1)[torch.arange(5), y].mean())
    images, labels = torch.randn(5, 1, 28, 28).double(), torch.randint(10, (5,))
    untied = models.untied_network(depth=3).double()
    grads = same_gradients(untied, untied.loss, images, labels)
    assert all(grad.any() for grad in grads.values())
    pair = []  # of depth 1 they are the same
    for make in BOTH:
        torch.manual_seed(1)
        pair.append(make(depth=1)(torch.ones(3, 1, 28, 28)))
    assert torch.equal(*pair)
