"""`backprop` against autograd on networks that are built unusually; its promises and errors."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from comparison import about, backprop_agrees, spoilt
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nn_backprop.engines.tape
from nn_backprop import MissingRuleError, Tape, backprop, models
from nn_backprop.rules import TABLE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    """A loss for outputs of any shape, whose gradient differs from one entry to the next."""
    return (output * output * targets).sum()


def test_a_rule_that_is_wrong_by_a_thousandth_is_noticed(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LayerNorm(27), nn.GELU())
    model = model.append(nn.Linear(27, 5)).double()
    case = model, F.cross_entropy, randn(7, 2, 5, 5), torch.randint(5, (7,))
    backprop_agrees(*case)
    places = {F.linear: 1, F.conv2d: 1, F.layer_norm: 0, F.gelu: 0, F.cross_entropy: 0}
    for function, place in places.items():
        rule = TABLE[function]
        wrong = {**TABLE, function: spoilt(rule, list(rule.tensors)[place])}
        monkeypatch.setattr(nn_backprop.engines.tape, "TABLE", wrong)
        with about(function), pytest.raises(AssertionError, match="not close"):
            backprop_agrees(*case)


# --- networks that are built unusually ------------------------------------------------------------


class Calls(nn.Module):
    """Layers under their names, and a function of them and the inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Block(nn.Module):
    """A residual block as torchvision writes it, with everything in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True)
        self.leaky = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        out = self.relu(self.dropout(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        out += x
        return self.leaky(out)


def test_a_residual_network_with_everything_in_place():
    for training in (True, False):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), Block(), Block(), nn.Flatten(), nn.Linear(75, 5))
        model = model.double().train(training)
        backprop_agrees(model, F.cross_entropy, randn(11, 1, 7, 7), torch.randint(5, (11,)))
        assert model[1].bn1.num_batches_tracked == int(training)


def one_module_in_several_places():
    shared = nn.Linear(5, 5)
    return nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.GELU()), shared)


def with_forward_hooks():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    return model


def checkpointed_without_reentry():
    inner = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))
    return Calls(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=inner)


def with_a_symmetric_weight():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    symmetric = Calls(lambda m, weight: weight + weight.T)
    parametrize.register_parametrization(model[0], "weight", symmetric)
    return model


def copied_after_use():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    backprop(model, squares, randn(7, 5), randn(7, 5))
    return copy.deepcopy(model)


def with_no_rule_where_nothing_is_differentiated():
    def forward(model, x):
        x = torch.cat([x, x.clamp(0)], out=torch.empty(14, 5, dtype=torch.float64))
        return model.linear(F.softplus(x))

    return Calls(forward, linear=nn.Linear(5, 5))


def test_networks_that_are_built_unusually():
    for make in (one_module_in_several_places, with_forward_hooks, checkpointed_without_reentry,
                 with_a_symmetric_weight, copied_after_use):  # fmt: skip
        with about(make.__name__):
            backprop_agrees(make().double(), squares, randn(7, 5), randn(7, 5))
    augmented = with_no_rule_where_nothing_is_differentiated().double()
    backprop_agrees(augmented, squares, randn(7, 5), randn(14, 5))
    two = Calls(lambda m, x, y: m.a(x) * m.b(y), a=nn.Linear(5, 3), b=nn.Linear(2, 3))
    backprop_agrees(two.double(), squares, (randn(7, 5), randn(7, 2)), randn(7, 3))


def test_tied_weights_are_named_once_and_get_the_sum():
    """An autoencoder whose decoder is the encoder transposed, and a head that shares a weight."""

    def forward(model, x):
        x = F.linear(torch.tanh(model.encoder(x)), model.encoder.weight.T)
        return model.first(x) + 2 * model.second(torch.sigmoid(x))

    layers = {"encoder": nn.Linear(5, 3), "first": nn.Linear(5, 7), "second": nn.Linear(5, 7)}
    layers["second"].weight = layers["first"].weight
    model = Calls(forward, **layers).double()
    backprop_agrees(model, squares, randn(11, 5), randn(11, 7))
    _, grads = backprop(model, squares, randn(11, 5), randn(11, 7))
    assert "first.weight" in grads and "second.weight" not in grads


def test_unused_parameters_get_none_and_frozen_ones_nothing():
    def forward(model, x):
        x = model.used(x)
        x.argmax(1), x.dim(), x.size(0)
        with torch.no_grad():
            weight = model.cut(x).softmax(1)
        return model.frozen(x) * weight + model.cut(x).detach()

    frozen = nn.Linear(3, 3).requires_grad_(False)
    model = Calls(forward, used=nn.Linear(5, 3), unused=nn.Linear(5, 2), frozen=frozen,
                  cut=nn.Linear(3, 3)).double()  # fmt: skip
    backprop_agrees(model, squares, randn(7, 5), randn(7, 3))
    _, grads = backprop(model, squares, randn(7, 5), randn(7, 3))
    none = {"unused.weight", "unused.bias", "cut.weight", "cut.bias"}
    assert {name for name, grad in grads.items() if grad is None} == none
    assert not any(name.startswith("frozen") for name in grads)
    with pytest.raises(ValueError, match="from anything that requires grad"):
        backprop(frozen, squares, randn(7, 3), randn(7, 3))


def test_inputs_and_grad_are_left_alone():
    model, x = nn.Linear(5, 3).double(), randn(7, 5).requires_grad_()
    backprop_agrees(model, squares, x, randn(7, 3))
    assert x.grad is None
    model = Calls(lambda m, x: x + (m.a + m.b), a=nn.Parameter(randn(3)), b=nn.Parameter(randn(3)))
    model.a.grad = randn(3)
    before = model.a.grad.clone()
    _, grads = backprop(model, lambda z, y: (z * y).sum(), randn(3), randn(3))
    assert torch.equal(model.a.grad, before) and model.b.grad is None
    assert all(grad.is_contiguous() for grad in grads.values())
    grads["a"].zero_()  # the gradients share no memory
    assert grads["b"].abs().min() > 0


def test_it_works_where_autograd_is_switched_off():
    model, x, y = nn.Linear(5, 3).double(), randn(7, 5), randn(7, 3)
    _, expected = backprop(model, squares, x, y)
    with torch.no_grad():
        _, grads = backprop(model, squares, x, y)
    assert torch.equal(grads["weight"], expected["weight"])


def test_types_are_kept_and_gradients_as_exact_as_the_type():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, x, y = model.to(dtype), randn(11, 1, 7, 7).to(dtype), torch.randint(3, (11,))
        exact = copy.deepcopy(model).double()
        exact_loss = F.cross_entropy(exact(x.double()), y)
        expected = torch.autograd.grad(exact_loss, list(exact.parameters()))
        loss, grads = backprop(model, F.cross_entropy, x, y)
        assert {t.dtype for t in (loss, *grads.values())} == {dtype}
        # What the forward rounds, several layers deep, grows to some hundred times the rounding.
        error = 20 * torch.finfo(dtype).eps * max(g.abs().max().item() for g in expected)
        for (name, grad), wanted in zip(grads.items(), expected, strict=True):
            with about(dtype, name):
                assert_close(grad.double(), wanted, rtol=0.0, atol=error)


# --- no graph, and clear errors -------------------------------------------------------------------


def test_autograd_builds_no_graph_while_the_tape_runs():
    for model, *shape in [
        (models.happy(), 784), (models.MLP(), 784), (models.CNN(), 1, 28, 28), (Block(), 3, 7, 7)
    ]:  # fmt: skip
        x, seen, saved = torch.randn(5, *shape), [], []
        for module in model.modules():
            module.register_forward_hook(lambda _, args, out, to=seen: to.append(out.grad_fn))

        def square(output, _):
            return (output * output).mean()

        with about(type(model)), torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=saved: to.append(t), lambda t: t
        ):  # fmt: skip
            loss, _ = backprop(model, square, x, None)
            assert seen and not any(seen) and not saved and loss.grad_fn is None
            square(model(x), None)
            assert any(seen) and saved  # what was asserted above can fail


def test_a_missing_rule_names_the_operation_and_the_module():
    for layer, operation in [
        (nn.Softplus(), "torch.nn.functional.softplus"),
        (nn.LSTM(3, 2), "torch.lstm"),
        (nn.ReflectionPad1d(1), "torch.nn.functional.pad"),
        (parametrizations.weight_norm(nn.Linear(3, 2)), "torch._weight_norm"),
        (parametrizations.spectral_norm(nn.Linear(3, 2)), "torch.mv"),
        (Calls(lambda m, x: x[0]), "torch.Tensor.__getitem__"),
        (Calls(lambda m, x: torch.cat([x, x])), "torch.cat"),
        (Calls(lambda m, x: 2**x), "torch.Tensor.__rpow__"),
        (Calls(lambda m, x: x**x), "torch.Tensor.__pow__"),
        (Calls(lambda m, x: x * torch.tensor(1j)), "torch.Tensor.mul"),
        (Calls(lambda m, x: x.clamp_(0)), "torch.Tensor.clamp_"),
        (Calls(lambda m, x: torch.einsum("ni->in", x)), "torch.functional.einsum"),
    ]:
        inner = nn.Sequential(nn.Identity(), layer)
        head = nn.ModuleList([nn.Linear(5, 3), inner])
        model = Calls(lambda m, x: m.head[1](m.head[0](x)), head=head).double()
        with about(operation), pytest.raises(MissingRuleError) as raised:
            backprop(model, squares, randn(7, 5), randn(7, 2))
        message = str(raised.value)
        assert message.startswith(f"{operation} ") and "\n" not in message
        assert "; called by 'head.1.1" in message
    model = nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.ELU())).double()
    with pytest.raises(MissingRuleError, match=r"functional.elu has no rule.*'1.0', a ELU"):
        backprop(model, squares, randn(7, 5), randn(7, 3))
    with Tape(), pytest.raises(MissingRuleError) as raised:
        nn.Parameter(randn(3)).cumsum(0)  # without a module, the operation alone
    assert str(raised.value) == "torch.Tensor.cumsum has no rule"


def test_the_signature_is_the_public_one():
    assert list(inspect.signature(backprop).parameters) == ["model", "loss_fn", "inputs", "targets"]
