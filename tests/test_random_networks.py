"""`backprop` against autograd, on networks drawn at random."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import backprop_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

# torch says that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Calls(nn.Module):
    """A function of a layer and of x."""

    def __init__(self, function, inner: nn.Module):
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, x):
        return self.function(self.inner, x)


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
    size, flags = draw(st.integers(1, min(3, *shape[2:]))), st.booleans()
    return nn.AvgPool2d(size, draw(st.integers(1, 3)), size // 2, draw(flags), draw(flags))


def batch_norm(draw, shape):
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(
        shape[1], momentum=draw(st.sampled_from([0.1, 0.7, None])),
        affine=draw(st.booleans()), track_running_stats=draw(st.booleans()),
    )  # fmt: skip
    if norm.track_running_stats:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def layer_norm(draw, shape):
    axes = draw(st.integers(1, len(shape) - 1))
    return nn.LayerNorm(shape[-axes:], elementwise_affine=draw(st.booleans()))


def same_shape(shape):
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
    "residual": lambda draw, shape: Calls(lambda f, x: x + f(x), same_shape(shape)),
    "twice": lambda draw, shape: Calls(lambda f, x: f(torch.tanh(f(x))), same_shape(shape)),
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
    head = nn.Linear(copy.deepcopy(model).eval()(inputs).shape[1], 3).double()
    loss_fn, targets = LOSSES[loss](draw, shape[0], 3)
    backprop_agrees(nn.Sequential(model, head), loss_fn, inputs, targets)


# At least 3 examples, since of 2 values batch norm makes ±1, with a gradient of rounding errors.
shapes = st.tuples(
    st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]), st.integers(5, 7), st.integers(4, 7)
)


@pytest.mark.parametrize("kind", [*ANY, *IMAGE, *VECTOR])
@settings(max_examples=10)
@given(st.data())
def test_each_kind_of_layer_agrees_with_autograd(kind, data):
    kinds = data.draw(st.sampled_from([["conv", kind], ["linear", kind]]))
    try_network(data.draw, kinds, "cross_entropy", data.draw(shapes))


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=100)
@given(st.data())
def test_random_networks_agree_with_autograd(loss, data):
    images = data.draw(st.lists(st.sampled_from([*ANY, *IMAGE]), max_size=4))
    vectors = data.draw(st.lists(st.sampled_from([*ANY, *VECTOR]), max_size=3))
    try_network(data.draw, ["conv", *images, "linear", *vectors], loss, data.draw(shapes))
