"""One layer applied many times: its gradients, against untied layers, by hand; its networks."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import as_function, backprop, check_gradients, models, rules
from nn_backprop.engines import disagreements
from nn_backprop.layers import TiedStack, UntiedStack
from nn_backprop.models import counting

DEPTH = 3
LAYERS = {
    "linear": (lambda **to: nn.Linear(7, 7, bias=False, **to), (5, 7)),
    "affine, more axes": (lambda **to: nn.Linear(7, 7, **to), (2, 5, 7)),
    "conv2d": (lambda **to: nn.Conv2d(3, 3, (3, 5), padding=(1, 2), **to), (2, 3, 5, 7)),
}
ACTIVATIONS = [torch.tanh, torch.relu]
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=["tanh", "relu"])


def made(layer: str, activation, depth: int = DEPTH, dtype=torch.float64):
    """A stack and an input for it, with weights large enough for every step to matter."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    stack = TiedStack(make(dtype=dtype), depth, activation)
    return stack, torch.randn(shape, dtype=dtype)


def product(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradient is y."""
    return (z * y).sum()


# --- what it computes ---


@every_layer
@every_activation
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_stack_is_its_equations(layer, activation, depth):
    stack, u = made(layer, activation, depth)
    h = activation(u)  # h_0
    for _ in range(depth):
        h = activation(stack.layer(h) + u)
    assert_close(stack(u), h)
    assert_close(stack.untied()(u), h)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_it_is_torchs_recurrent_network_with_an_input_that_stands_still(name):
    """From h = 0, its first step is our φ(u), so it takes one step more."""
    torch.manual_seed(0)
    rnn = nn.RNN(5, 7, nonlinearity=name, batch_first=True, dtype=torch.float64)
    layer = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(rnn.weight_hh_l0)
    stack, x = TiedStack(layer, DEPTH, getattr(torch, name)), torch.randn(11, 5).double()
    h, _ = rnn(x[:, None].expand(-1, DEPTH + 1, -1))
    u = x @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0
    assert_close(stack(u), h[:, -1])
    upstream = torch.randn(11, 7).double()
    (h[:, -1] * upstream).sum().backward()
    (stack(u.detach()) * upstream).sum().backward()
    assert_close(layer.weight.grad, rnn.weight_hh_l0.grad)


# --- gradients ---


@every_layer
@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradients_pass_the_checker(layer, activation, dtype):
    stack, u = made(layer, activation, dtype=dtype)
    for target in (stack, stack.untied()):
        report = check_gradients(target, u, second_order=True)
        assert report.ok and not [p for p in report.probes if p.outcome == "fail"], report
        names = {name for name, _ in target.named_parameters()}
        assert {entry.name for entry in report.tensors} == names | {"u"}


def test_the_checker_refuses_a_gradient_of_one_step_only():
    class Forgetful(TiedStack):
        def forward(self, u):
            others = range(self.depth - 1)
            frozen = [copy.deepcopy(self.layer).requires_grad_(False) for _ in others]
            return UntiedStack([*frozen, self.layer], self.activation)(u)

    stack, u = made("linear", torch.tanh)
    report = check_gradients(Forgetful(stack.layer, DEPTH, torch.tanh), u, reference=stack)
    assert report.verdict == "fail"


@every_layer
@every_activation
def test_the_tied_gradient_is_the_sum_of_the_untied_ones(layer, activation):
    stack, u = made(layer, activation)
    untied, upstream = stack.untied(), torch.randn_like(u)
    grad_u = []
    for each in (stack, untied):
        v = u.clone().requires_grad_()
        product(each(v), upstream).backward()
        grad_u.append(v.grad)
    assert_close(*grad_u, rtol=1e-12, atol=1e-12)
    _, by_tape = backprop(stack, product, u, upstream)
    _, by_tape_untied = backprop(untied, product, u, upstream)
    for name, parameter in stack.layer.named_parameters():
        steps = [each.get_parameter(name).grad for each in untied.layers]
        assert all(not torch.allclose(a, b) for a, b in pairwise(steps))
        assert_close(parameter.grad, sum(steps), rtol=1e-12, atol=1e-12)
        of_tape = sum(by_tape_untied[f"layers.{t}.{name}"] for t in range(DEPTH))
        assert_close(by_tape[f"layer.{name}"], of_tape, rtol=1e-12, atol=1e-12)
        assert_close(by_tape[f"layer.{name}"], parameter.grad, rtol=1e-12, atol=1e-12)


def by_the_docstring(W: Tensor, u: Tensor, depth: int, phi, slope, grad_h: Tensor):
    """Its equations, letter by letter: grad_W, grad_u, and what each step adds to grad_W."""
    z, h = [u], [phi(u)]
    for _ in range(depth):
        z.append(torch.einsum("ni,oi->no", h[-1], W) + u)
        h.append(phi(z[-1]))
    grad_W, grad_u, steps = torch.zeros_like(W), torch.zeros_like(u), {}
    for t in reversed(range(depth + 1)):  # t = L … 0
        grad_z = grad_h * slope(z[t])
        grad_u += grad_z
        if t > 0:
            steps[t] = torch.einsum("no,ni->oi", grad_z, h[t - 1])
            grad_W += steps[t]
            grad_h = torch.einsum("no,oi->ni", grad_z, W)
    return h[-1], grad_W, grad_u, steps


SLOPES = {
    torch.tanh: lambda z: 1 - torch.tanh(z) ** 2,
    torch.relu: lambda z: (z > 0).to(z.dtype),
}


@every_activation
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_gradients_are_those_of_the_derivation(activation, depth):
    stack, u = made("linear", activation, depth)
    grad_h, W = torch.randn_like(u), stack.layer.weight.detach()
    out, grad_W, grad_u, steps = by_the_docstring(
        W, u, depth, activation, SLOPES[activation], grad_h
    )
    v = u.clone().requires_grad_()
    z = stack(v)
    product(z, grad_h).backward()
    assert_close(z.detach(), out)
    assert_close(stack.layer.weight.grad, grad_W, rtol=1e-12, atol=1e-12)
    assert_close(v.grad, grad_u, rtol=1e-12, atol=1e-12)
    untied = stack.untied()
    product(untied(u), grad_h).backward()
    for t, layer in enumerate(untied.layers, 1):
        assert_close(layer.weight.grad, steps[t], rtol=1e-12, atol=1e-12)


def test_our_own_backward_serves_it_too():
    """The rules as Functions, in torch's graph: no backward of torch's takes part but the sums."""
    stack, u = made("linear", torch.tanh)
    linear, tanh = (as_function(rules.TABLE[f]) for f in (torch.nn.functional.linear, torch.tanh))
    w, v = stack.layer.weight.detach().requires_grad_(), u.clone().requires_grad_()
    h = tanh.apply(v)
    for _ in range(DEPTH):
        h = tanh.apply(linear.apply(h, w, None) + v)
    upstream = torch.randn_like(u)
    found = torch.autograd.grad(h, (w, v), upstream)
    x = u.clone().requires_grad_()
    wanted = torch.autograd.grad(stack(x), (stack.layer.weight, x), upstream)
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
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


@every_layer
def test_the_parameters_are_those_of_one_layer_and_the_cost_is_that_of_all(layer):
    stack, u = made(layer, torch.relu)
    one, untied = counting.parameters(stack.layer), stack.untied()
    assert counting.parameters(stack) == one
    assert counting.parameters(untied) == DEPTH * one
    cost = counting.multiply_adds(stack.layer, u)
    assert counting.multiply_adds(stack, u) == counting.multiply_adds(untied, u) == DEPTH * cost > 0


@every_layer
@every_activation
def test_the_backward_pass_needs_as_much_of_either(layer, activation):
    """Numbers kept for it, each once, the parameters left out: they grow with the depth."""

    def kept(stack) -> int:
        seen = {}
        own = {p.untyped_storage().data_ptr() for p in stack.parameters()}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(u)
        return sum(tensor.numel() for place, tensor in seen.items() if place not in own)

    stack, u = made(layer, activation)
    deeper, _ = made(layer, activation, DEPTH + 2)
    u.requires_grad_()
    assert kept(stack) == kept(stack.untied()) == (DEPTH + 1) * u.numel()  # h_0 … h_L
    assert kept(deeper) == (DEPTH + 3) * u.numel()


@pytest.mark.parametrize("depth", [0, -2, 2.0, "3", None])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be an integer of at least 1, not {depth!r}"):
        TiedStack(nn.Linear(7, 7), depth)


def test_a_stack_without_layers_is_refused():
    with pytest.raises(ValueError, match="a stack needs one layer or more"):
        UntiedStack([])


@pytest.mark.parametrize(
    "layer, shape, made_of_it",
    [
        (nn.Linear(7, 1), (5, 7), (5, 1)),  # the sum would broadcast
        (nn.Linear(7, 11), (5, 7), (5, 11)),
        (nn.Conv2d(3, 3, 3), (2, 3, 5, 7), (2, 3, 3, 5)),
    ],
)
def test_a_layer_that_changes_the_shape_is_refused(layer, shape, made_of_it):
    for stack in (TiedStack(layer, 2), UntiedStack([nn.Identity(), layer])):
        with pytest.raises(ValueError) as raised:
            stack(torch.randn(shape))
        assert str(raised.value) == (
            f"the layer makes {made_of_it} of {shape}: a layer of a stack must keep the shape"
        )


def test_how_it_is_shown():
    assert "depth=5" in repr(TiedStack(nn.Linear(7, 7), 5))


# --- the networks ---

TIED = 784 * 128 + 128 + 128**2 + 128 * 10 + 10


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
def test_parameters_and_cost_of_the_networks(depth):
    tied, untied = models.tied_network(depth=depth), models.untied_network(depth=depth)
    assert counting.parameters(tied) == TIED == 118_154
    assert counting.parameters(untied) == TIED + (depth - 1) * 128**2
    images = torch.randn(3, 1, 28, 28)
    cost = 3 * (784 * 128 + depth * 128**2 + 128 * 10)
    assert counting.multiply_adds(tied, images) == counting.multiply_adds(untied, images) == cost


def test_parameters_of_a_network_of_other_sizes():
    sizes = {"width": 7, "depth": 5, "in_features": 11, "classes": 3}
    tied = 11 * 7 + 7 + 7 * 7 + 7 * 3 + 3
    assert counting.parameters(models.tied_network(**sizes)) == tied
    assert counting.parameters(models.untied_network(**sizes)) == tied + 4 * 7 * 7
    assert models.tied_network(**sizes)(torch.randn(2, 1, 1, 11)).shape == (2, 3)
    assert models.MODELS["tied"] is models.tied_network


@pytest.mark.parametrize("make", [models.tied_network, models.untied_network])
def test_the_tape_has_autograds_gradients(make):
    torch.manual_seed(0)
    model, x, y = make(depth=3), torch.randn(5, 1, 28, 28), torch.randint(10, (5,))
    found = disagreements(model, x, y)
    assert set(found) == {"tape"} and max(found["tape"].values()) < 1e-13
    model, x = model.double(), x.double()
    loss, grads = backprop(model, model.loss, x, y)
    expected = model.loss(model(x), y)
    expected.backward()
    assert_close(loss, expected.detach())
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad.any()
        assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_network_is_its_equations():
    model = models.tied_network(7, 2, 11, 3)
    x = torch.randn(5, 11)
    u = x @ model.input.weight.T + model.input.bias
    h, W = u.clamp(min=0), model.stack.layer.weight
    for _ in range(2):
        h = (h @ W.T + u).clamp(min=0)
    logits = h @ model.output.weight.T + model.output.bias
    assert_close(model(x), logits)
    assert_close(model.probabilities(logits), logits.exp() / logits.exp().sum(1, keepdim=True))
    y = torch.tensor([0, 2, 1, 1, 0])
    log_p = logits.log_softmax(1)
    assert_close(model.loss(logits, y), -log_p[torch.arange(5), y].mean())


def test_of_depth_1_they_are_the_same():
    torch.manual_seed(1)
    tied = models.tied_network(depth=1)
    torch.manual_seed(1)
    untied = models.untied_network(depth=1)
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(tied(x), untied(x))


@pytest.mark.parametrize("make", [models.tied_network, models.untied_network])
@pytest.mark.parametrize("name", ["width", "depth", "in_features", "classes"])
@pytest.mark.parametrize("wrong", [0, -1, 2.0, "7"])
def test_what_the_networks_refuse(make, name, wrong):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, not {wrong!r}"):
        make(**{name: wrong})


def test_an_activation_in_place_changes_neither_the_input_nor_the_output():
    torch.manual_seed(0)
    layer, u = nn.Linear(5, 5, bias=False), torch.randn(3, 5)
    before = u.clone()
    assert_close(TiedStack(layer, 2, nn.ReLU(inplace=True))(u), TiedStack(layer, 2)(before))
    assert torch.equal(u, before)
