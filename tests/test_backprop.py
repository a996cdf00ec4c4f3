"""`backprop` against autograd, on networks drawn at random and on some that are built unusually."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from comparison import RTOL, spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
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


# --- the comparison, the same for every network ---------------------------------------------------


def agree(model, loss_fn, inputs, targets, rtol: float = RTOL) -> None:
    """Loss, gradients and buffers as autograd has them, from the same seed on a copy.

    The absolute tolerance is relative to the largest entry of all gradients: before a batch norm a
    bias has gradient 0, of which both sides give only rounding errors.
    """
    reference = copy.deepcopy(model)
    parameters = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    output = reference(*inputs) if isinstance(inputs, tuple) else reference(inputs)
    expected_loss = loss_fn(output, targets)
    expected = torch.autograd.grad(expected_loss, list(parameters.values()), allow_unused=True)
    torch.manual_seed(3)
    loss, grads = backprop(model, loss_fn, inputs, targets)

    assert loss.shape == () and not loss.requires_grad and not hasattr(loss, "_made_by")
    assert_close(loss, expected_loss.detach(), rtol=rtol, atol=rtol)
    assert list(grads) == list(parameters)
    largest = max((g.abs().max().item() for g in expected if g is not None), default=0.0)
    for (name, grad), wanted in zip(grads.items(), expected, strict=True):
        assert (grad is None) == (wanted is None), name
        if grad is not None:
            assert_close(grad, wanted, rtol=rtol, atol=rtol * largest)
    for (name, buffer), wanted in zip(
        model.named_buffers(), reference.buffers(), strict=True
    ):  # running statistics, moved once
        assert torch.equal(buffer, wanted), name
    assert all(p.grad is None for p in model.parameters())


# --- random networks ------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def conv(draw, shape):
    channels = shape[1]
    groups = draw(st.sampled_from([1, channels]))
    out = groups * draw(st.integers(1, 2)) if groups > 1 else draw(st.sampled_from([2, 3, 5]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    kernel = tuple(min(k, side) for k, side in zip(kernel, shape[2:], strict=True))
    same, bias = draw(st.booleans()), draw(st.booleans())
    dilation = draw(st.integers(1, 2)) if same else 1
    stride, padding = (1, "same") if same else (draw(st.integers(1, 2)), draw(st.integers(0, 2)))
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)


def dilated_conv(draw, shape):
    size = min(shape[2:])
    return nn.Conv2d(shape[1], 3, 2, dilation=draw(st.integers(1, max(1, size - 1))), padding=1)


def max_pool(draw, shape):
    size = draw(st.integers(1, min(3, *shape[2:])))
    return nn.MaxPool2d(size, draw(st.integers(1, 3)), padding=size // 2, ceil_mode=True)


def avg_pool(draw, shape):
    size = draw(st.integers(1, min(3, *shape[2:])))
    return nn.AvgPool2d(
        size, draw(st.integers(1, 3)), size // 2, draw(st.booleans()), draw(st.booleans())
    )


def batch_norm(draw, shape):
    options = {
        "momentum": draw(st.sampled_from([0.1, 0.7, None])),
        "affine": draw(st.booleans()),
        "track_running_stats": draw(st.booleans()),
    }
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], **options)
    if norm.track_running_stats:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def layer_norm(draw, shape):
    axes = draw(st.integers(1, len(shape) - 1))
    return nn.LayerNorm(shape[-axes:], elementwise_affine=draw(st.booleans()))


def same_shape(draw, shape):
    """A layer that a residual branch, or a second use, can go through."""
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[1], 3, padding="same")
    return nn.Linear(shape[1], shape[1])


ANY = {
    "relu": lambda draw, shape: nn.ReLU(),
    "leaky_relu": lambda draw, shape: nn.LeakyReLU(draw(st.sampled_from([0.01, 0.3]))),
    "sigmoid": lambda draw, shape: nn.Sigmoid(),
    "tanh": lambda draw, shape: nn.Tanh(),
    "gelu": lambda draw, shape: nn.GELU(draw(st.sampled_from(["none", "tanh"]))),
    "softmax": lambda draw, shape: nn.Softmax(draw(st.integers(1, len(shape) - 1))),
    "log_softmax": lambda draw, shape: nn.LogSoftmax(draw(st.integers(1, len(shape) - 1))),
    "dropout": lambda draw, shape: nn.Dropout(draw(st.sampled_from([0.0, 0.3, 0.5]))),
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "residual": lambda draw, shape: Residual(same_shape(draw, shape)),
    "twice": lambda draw, shape: Twice(same_shape(draw, shape)),
}
IMAGE = {"conv": conv, "dilated_conv": dilated_conv, "max_pool": max_pool, "avg_pool": avg_pool}
VECTOR = {"linear": lambda draw, s: nn.Linear(s[1], draw(st.sampled_from([2, 3, 5, 7])))}


def build(draw, kinds: list[str], shape: tuple[int, ...]) -> nn.Sequential:
    """The layers of these kinds, each made for what the one before it gives."""
    layers = nn.Sequential()
    for kind in kinds:
        if kind in VECTOR and len(shape) == 4:
            layers.append(nn.Flatten())
            shape = (shape[0], shape[1] * shape[2] * shape[3])
        if kind in IMAGE and len(shape) == 2:
            continue
        layer = {**ANY, **IMAGE, **VECTOR}[kind](draw, shape)
        with torch.no_grad():
            shape = tuple(copy.deepcopy(layer).eval()(torch.zeros(shape)).shape)
        layers.append(layer)
    return layers.append(nn.Flatten()).double()


def cross_entropy(draw, n: int, classes: int):
    options = {
        "weight": draw(st.sampled_from([None, torch.rand(classes).double() + 0.5])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
    }
    if draw(st.booleans()):
        return nn.CrossEntropyLoss(**options), randn(n, classes).softmax(1)
    targets = torch.randint(classes, (n,))
    targets[1] = (targets[0] + 1) % classes  # so that not all are ignored
    return nn.CrossEntropyLoss(**options, ignore_index=targets[0].item() if n > 3 else -1), targets


def nll(draw, n: int, classes: int):
    loss = nn.NLLLoss(weight=draw(st.sampled_from([None, torch.rand(classes).double() + 0.5])))
    return lambda output, y: loss(F.log_softmax(output, 1), y), torch.randint(classes, (n,))


def mse(draw, n: int, classes: int):
    return nn.MSELoss(reduction=draw(st.sampled_from(["mean", "sum"]))), randn(n, classes)


LOSSES = {"cross_entropy": cross_entropy, "nll": nll, "mse": mse}


def try_network(draw, kinds: list[str], loss: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = build(draw, kinds, shape).train(draw(st.booleans()))
    inputs = randn(*shape)
    width = copy.deepcopy(model).eval()(inputs).shape[1]
    targets: Tensor
    head = nn.Linear(width, 3).double()
    loss_fn, targets = LOSSES[loss](draw, shape[0], 3)
    agree(nn.Sequential(model, head), loss_fn, inputs, targets)


# At least 3 examples, since of 2 values batch norm makes ±1, with a gradient of rounding errors.
shapes = st.tuples(
    st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]), st.integers(5, 7), st.integers(4, 7)
)
quiet = settings(deadline=None, derandomize=True, database=None)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel costs a copy
@pytest.mark.parametrize("kind", [*ANY, *IMAGE, *VECTOR])
@settings(quiet, max_examples=10)
@given(st.data())
def test_each_kind_of_layer_agrees_with_autograd(kind, data):
    kinds = data.draw(st.sampled_from([["conv", kind], ["linear", kind]]))
    try_network(data.draw, kinds, "cross_entropy", data.draw(shapes))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("loss", LOSSES)
@settings(quiet, max_examples=100)
@given(st.data())
def test_random_networks_agree_with_autograd(loss, data):
    images = data.draw(st.lists(st.sampled_from([*ANY, *IMAGE]), max_size=4))
    vectors = data.draw(st.lists(st.sampled_from([*ANY, *VECTOR]), max_size=3))
    try_network(data.draw, ["conv", *images, "linear", *vectors], loss, data.draw(shapes))


@pytest.mark.parametrize("function", [F.linear, F.conv2d, F.layer_norm, F.gelu, F.cross_entropy])
def test_a_rule_that_is_wrong_by_a_thousandth_is_noticed(function, monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LayerNorm(27), nn.GELU())
    model = model.append(nn.Linear(27, 5)).double()
    case = model, F.cross_entropy, randn(7, 2, 5, 5), torch.randint(5, (7,))
    agree(*case)
    rule = TABLE[function]
    wrong = spoilt(rule, "weight" if function is F.linear else next(iter(rule.tensors)))
    monkeypatch.setattr(nn_backprop.engines.tape, "TABLE", {**TABLE, function: wrong})
    if function is F.conv2d:  # the gradient of the image is not asked for
        agree(*case)
        wrong = spoilt(rule, "weight")
        monkeypatch.setattr(nn_backprop.engines.tape, "TABLE", {**TABLE, function: wrong})
    with pytest.raises(AssertionError, match="not close"):
        agree(*case)


# --- networks that are built unusually ------------------------------------------------------------


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


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_network_with_everything_in_place(training):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), Block(), Block(), nn.Flatten(), nn.Linear(75, 5))
    model = model.double().train(training)
    agree(model, F.cross_entropy, randn(11, 1, 7, 7), torch.randint(5, (11,)))
    assert model[1].bn1.num_batches_tracked == int(training)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed, and a head that shares a weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 7), nn.Linear(5, 7)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)
        return self.first(x) + 2 * self.second(torch.sigmoid(x))


def test_tied_weights_are_named_once_and_get_the_sum():
    model = Tied().double()
    agree(model, squares, randn(11, 5), randn(11, 7))
    _, grads = backprop(model, squares, randn(11, 5), randn(11, 7))
    assert "first.weight" in grads and "second.weight" not in grads


def test_one_module_in_several_places_of_a_sequence():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.GELU()), shared).double()
    agree(model, squares, randn(7, 5), randn(7, 5))


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(3, 3)
        self.cut = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.used(x)
        x.argmax(1), x.dim(), x.size(0)
        with torch.no_grad():
            weight = self.cut(x).softmax(1)
        return self.frozen(x) * weight + self.cut(x).detach()


def test_unused_parameters_get_none_and_frozen_ones_nothing():
    model = Partly().double()
    agree(model, squares, randn(7, 5), randn(7, 3))
    _, grads = backprop(model, squares, randn(7, 5), randn(7, 3))
    assert {name for name, grad in grads.items() if grad is None} == {
        "unused.weight", "unused.bias", "cut.weight", "cut.bias",
    }  # fmt: skip
    assert not any(name.startswith("frozen") for name in grads)


def test_a_network_that_is_frozen_to_the_end_has_no_loss_to_differentiate():
    model = nn.Linear(5, 3).double().requires_grad_(False)
    with pytest.raises(ValueError, match="from anything that requires grad"):
        backprop(model, squares, randn(7, 5), randn(7, 3))


def test_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(2, 3)

        def forward(self, x, y):
            return self.a(x) * self.b(y)

    agree(Sum().double(), squares, (randn(7, 5), randn(7, 2)), randn(7, 3))


def test_inputs_that_require_grad_are_left_alone():
    model, x = nn.Linear(5, 3).double(), randn(7, 5).requires_grad_()
    agree(model, squares, x, randn(7, 3))
    assert x.grad is None


def test_grad_is_untouched_and_the_gradients_share_no_memory():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(randn(3)), nn.Parameter(randn(3))

        def forward(self, x):
            return x + (self.a + self.b)

    model = Shift()
    model.a.grad = randn(3)
    before = model.a.grad.clone()
    _, grads = backprop(model, lambda z, y: (z * y).sum(), randn(3), randn(3))
    assert torch.equal(model.a.grad, before) and model.b.grad is None
    assert all(grad.is_contiguous() for grad in grads.values())
    grads["a"].zero_()
    assert grads["b"].abs().min() > 0


def test_it_works_where_autograd_is_switched_off():
    model, x, y = nn.Linear(5, 3).double(), randn(7, 5), randn(7, 3)
    _, expected = backprop(model, squares, x, y)
    with torch.no_grad():
        _, grads = backprop(model, squares, x, y)
    assert torch.equal(grads["weight"], expected["weight"])


def test_a_copied_model_has_gradients_of_its_own():
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double()
    backprop(model, squares, randn(7, 5), randn(7, 3))
    agree(copy.deepcopy(model), squares, randn(7, 5), randn(7, 3))


def test_forward_hooks_run():
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double()
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    agree(model, squares, randn(7, 5), randn(7, 3))


def test_checkpointing_without_reentry_changes_nothing():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    agree(model, squares, randn(7, 5), randn(7, 2))


def test_a_parametrisation_made_of_known_operations():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight + weight.T

    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    agree(model, squares, randn(7, 5), randn(7, 5))


def test_dropout_draws_the_mask_that_torch_draws():
    x = randn(101, 7)
    for model in (nn.Dropout(0.3), nn.Dropout(0.3, inplace=True)):
        torch.manual_seed(11)
        expected = model(x.clone())
        torch.manual_seed(11)
        with Tape():
            z = model(x.clone().requires_grad_() * 1)
        assert torch.equal(z.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_types_are_kept_and_gradients_as_exact_as_the_type(dtype):
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip
    x, y = randn(11, 1, 7, 7).to(dtype), torch.randint(3, (11,))
    exact = copy.deepcopy(model).double()
    expected = torch.autograd.grad(F.cross_entropy(exact(x.double()), y), list(exact.parameters()))
    loss, grads = backprop(model, F.cross_entropy, x, y)
    assert loss.dtype == dtype
    # What the forward pass rounds, several layers deep, grows to some hundred times the rounding.
    largest = max(g.abs().max().item() for g in expected)
    for grad, wanted in zip(grads.values(), expected, strict=True):
        assert grad.dtype == dtype
        error = 20 * torch.finfo(dtype).eps * largest
        assert_close(grad.double(), wanted, rtol=0.0, atol=error)


# --- no graph, and clear errors -------------------------------------------------------------------


@pytest.mark.parametrize("make", [models.happy, models.MLP, models.CNN, lambda: Block().double()])
def test_autograd_builds_no_graph_while_the_tape_runs(make):
    model = make()
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, 3, 7, 7, dtype=dtype) if isinstance(model, Block) else torch.randn(5, 784)
    x = x.reshape(5, 1, 28, 28) if isinstance(model, models.CNN) else x
    seen, saved = [], []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(output.grad_fn))

    def square(output, _):
        return (output * output).mean()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        loss, _ = backprop(model, square, x, None)
    assert seen and not any(seen) and not saved and loss.grad_fn is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        square(model(x), None)
    assert any(seen) and saved  # what was asserted above can fail


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "layer, operation",
    [
        (nn.Softplus(), "torch.nn.functional.softplus"),
        (nn.LSTM(3, 2), "torch.lstm"),
        (nn.ReflectionPad1d(1), "torch.nn.functional.pad"),
        (parametrizations.weight_norm(nn.Linear(3, 2)), "torch._weight_norm"),
        (parametrizations.spectral_norm(nn.Linear(3, 2)), "torch.mv"),
        (Calls(lambda x: x[0]), "torch.Tensor.__getitem__"),
        (Calls(lambda x: torch.cat([x, x])), "torch.cat"),
        (Calls(lambda x: 2**x), "torch.Tensor.__rpow__"),
        (Calls(lambda x: x**x), "torch.Tensor.__pow__"),
        (Calls(lambda x: x * torch.tensor(1j)), "torch.Tensor.mul"),
        (Calls(lambda x: x.clamp_(0)), "torch.Tensor.clamp_"),
        (Calls(lambda x: torch.einsum("ni->in", x)), "torch.functional.einsum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_rule_names_the_operation_and_the_module(layer, operation):
    inner = nn.Sequential(nn.Identity(), layer)
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(5, 3), inner)}).double()
    model.forward = lambda x: model["head"](x)
    with pytest.raises(MissingRuleError) as raised:
        backprop(model, squares, randn(7, 5), randn(7, 2))
    message = str(raised.value)
    assert message.startswith(f"{operation} ")
    assert "; called by 'head.1.1" in message
    assert "\n" not in message


def test_the_path_starts_at_the_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([nn.Linear(5, 3), nn.Sequential(nn.ELU())])

        def forward(self, x):
            return self.body[1](self.body[0](x))

    with pytest.raises(MissingRuleError, match=r"functional.elu has no rule.*'body.1.0', a ELU"):
        backprop(Net().double(), squares, randn(7, 5), randn(7, 3))


def test_without_a_module_the_message_is_the_operation_alone():
    w = nn.Parameter(randn(3))
    with Tape(), pytest.raises(MissingRuleError) as raised:
        w.cumsum(0)
    assert str(raised.value) == "torch.Tensor.cumsum has no rule"


def test_a_missing_rule_is_no_obstacle_where_nothing_is_differentiated():
    class Augment(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            x = torch.cat([x, x.clamp(0)], out=torch.empty(14, 5, dtype=torch.float64))
            return self.linear(F.softplus(x))

    agree(Augment().double(), squares, randn(7, 5), randn(14, 3))


@pytest.mark.parametrize(
    "loss_fn, what",
    [
        (lambda z, y: z, r"shape \(\), not \(7, 3\)"),
        (lambda z, y: 3.0, "not float"),
        (lambda z, y: z.sum().item(), "not float"),
        (lambda z, y: z.detach().sum(), "not made on this tape"),
    ],
)
def test_a_loss_that_is_none(loss_fn, what):
    with pytest.raises(ValueError, match=what):
        backprop(nn.Linear(5, 3).double(), loss_fn, randn(7, 5), None)


def test_the_signature_is_the_public_one():
    assert list(inspect.signature(backprop).parameters) == ["model", "loss_fn", "inputs", "targets"]
