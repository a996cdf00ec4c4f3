"""Octave convolution: the layer, its gradients and its cost; the network made of it."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.testing import assert_close

from nn_backprop import backprop, check_gradients, models
from nn_backprop.data import load, suited
from nn_backprop.layers import OctaveConv2d
from nn_backprop.layers.octave import cost_ratio, memory_ratio
from nn_backprop.models import counting

ALPHAS = [0.125, 0.25, 0.5, 0.75]


def maps(H: int, W: int, high: int = 3, low: int = 2, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    shapes = (2, high, H, W), (2, low, -(-H // 2), -(-W // 2))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def plain(layer: OctaveConv2d, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The equations once more, number by number."""
    (N, _, H, W), (_, _, h_low, w_low) = high.shape, low.shape
    P, Q = layer.kernel_size

    def pixel(image, n, c, i, j):
        inside = 0 <= i < image.shape[2] and 0 <= j < image.shape[3]
        return image[n, c, i, j].item() if inside else 0.0

    def f(image, weight, n, o, h, w):
        return sum(
            pixel(image, n, c, h + p - P // 2, w + q - Q // 2) * weight[o, c, p, q].item()
            for c, p, q in product(*map(range, weight.shape[1:]))
        )

    pooled = torch.zeros(N, high.shape[1], h_low, w_low, dtype=high.dtype)
    for n, c, i, j in product(*map(range, pooled.shape)):
        pooled[n, c, i, j] = high[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
    z_high = high.new_zeros(N, len(layer.bias_h), H, W)
    for n, o, h, w in product(*map(range, z_high.shape)):
        z_high[n, o, h, w] = layer.bias_h[o].item() + f(high, layer.weight_hh, n, o, h, w)
        z_high[n, o, h, w] += f(low, layer.weight_lh, n, o, h // 2, w // 2)
    z_low = high.new_zeros(N, len(layer.bias_l), h_low, w_low)
    for n, o, h, w in product(*map(range, z_low.shape)):
        z_low[n, o, h, w] = layer.bias_l[o].item() + f(low, layer.weight_ll, n, o, h, w)
        z_low[n, o, h, w] += f(pooled, layer.weight_hl, n, o, h, w)
    return z_high, z_low


@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (5, 4), (1, 3)])
@pytest.mark.parametrize("kernel", [3, (1, 5)])
def test_the_layer_is_its_equations(kernel, H, W):
    layer = OctaveConv2d(5, 7, kernel, 0.4, 0.6, dtype=torch.float64)
    high, low = maps(H, W)
    z_high, z_low = layer((high, low))
    assert z_high.shape == (2, 3, H, W) and z_low.shape == (2, 4, -(-H // 2), -(-W // 2))
    with torch.no_grad():
        assert_close((z_high, z_low), plain(layer, high, low))


def test_without_low_maps_it_is_a_plain_convolution_with_the_same_numbers():
    x = torch.randn(2, 3, 5, 7)
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 11, 3, padding=1)
    torch.manual_seed(1)
    layer = OctaveConv2d(3, 11, 3, 0, 0)
    assert_close(layer(x), conv(x))


def test_first_and_last_layers_have_one_kind_on_one_side():
    first, last = OctaveConv2d(3, 7, 3, 0, 0.3), OctaveConv2d(7, 5, 3, 0.3, 0)
    high, low = first(torch.randn(2, 3, 5, 7))
    assert high.shape == (2, 5, 5, 7) and low.shape == (2, 2, 3, 4)
    assert last((high, low)).shape == (2, 5, 5, 7)
    assert first.weight_lh is None and first.weight_ll is None
    assert last.weight_hl is None and last.weight_ll is None and last.bias_l is None


@pytest.mark.parametrize("alphas", [(0, 0), (0, 0.5), (0.5, 0), (0.3, 0.75), (0.29, 0.1)])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_a_plain_convolution(alphas, bias):
    layer = OctaveConv2d(100, 10, (3, 5), *alphas, bias=bias)
    assert counting.parameters(layer) == counting.parameters(nn.Conv2d(100, 10, (3, 5), bias=bias))
    assert layer.channels_in == (100 - round(100 * alphas[0]), round(100 * alphas[0]))
    bound = (100 * 3 * 5) ** -0.5
    for parameter in layer.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.numel() < 100 or parameter.abs().max() > 0.9 * bound


@pytest.mark.parametrize("alpha", ALPHAS)
def test_cost_and_memory_are_the_formulas(alpha):
    plain, layer = nn.Conv2d(8, 16, 3, padding=1), OctaveConv2d(8, 16, 3, alpha, alpha)
    x = torch.randn(2, 8, 6, 10)
    low = int(8 * alpha)
    octave = x[:, low:], F.avg_pool2d(x[:, :low], 2)
    ratio = counting.multiply_adds(layer, octave) / counting.multiply_adds(plain, x)
    assert ratio == cost_ratio(alpha)
    assert sum(part.numel() for part in octave) / x.numel() == memory_ratio(alpha)
    assert sum(part.numel() for part in layer(octave)) / plain(x).numel() == memory_ratio(alpha)


def test_the_published_costs():
    assert [f"{100 * cost_ratio(alpha):.0f}" for alpha in ALPHAS] == ["82", "67", "44", "30"]
    assert cost_ratio(0) == memory_ratio(0) == 1


def test_a_first_layer_costs_what_its_docstring_says():
    first = OctaveConv2d(2, 8, 3, 0, 0.25)
    assert counting.multiply_adds(first, torch.randn(1, 2, 6, 10)) == (2 * 6 + 2 * 2 / 4) * 9 * 60


# --- gradients ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alphas", [(0.4, 0.6), (0, 0.6), (0.4, 0), (0, 0)])
def test_the_gradients_are_right(dtype, alphas):
    layer = OctaveConv2d(5, 7, 3, *alphas, dtype=dtype)
    x = maps(5, 7, dtype=dtype) if alphas[0] else torch.randn(2, 5, 5, 7, dtype=dtype)
    report = check_gradients(layer, x)
    assert report.ok, report


@pytest.mark.parametrize("H, W", [(5, 7), (4, 6)])
def test_the_tape_and_autograd_agree(H, W):
    layer = OctaveConv2d(5, 7, 3, 0.4, 0.6, dtype=torch.float64)
    x, targets = maps(H, W), maps(H, W, 3, 4)

    def loss_fn(z, y):
        return sum(F.mse_loss(*pair) for pair in zip(z, y, strict=True))

    loss, grads = backprop(layer, loss_fn, (x,), targets)
    loss_fn(layer(x), targets).backward()
    assert loss > 0 and grads.keys() == {name for name, _ in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_gradients_are_those_of_the_derivation():
    """Even sizes, where pool₂ᵀ = ¼ up₂ and up₂ᵀ = 4 pool₂."""
    layer = OctaveConv2d(5, 7, 3, 0.4, 0.6, dtype=torch.float64)
    high, low = (part.requires_grad_() for part in maps(4, 6))
    z = layer((high, low))
    grad_high, grad_low = (torch.randn_like(part) for part in z)
    torch.autograd.backward(z, (grad_high, grad_low))

    def up(image):
        return image.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def to_weight(image, grad, weight):
        return conv2d_weight(image, weight.shape, grad, padding=1)

    def to_image(image, weight, grad):
        return conv2d_input(image.shape, weight, grad, padding=1)

    pooled, gathered = F.avg_pool2d(high.detach(), 2), 4 * F.avg_pool2d(grad_high, 2)
    hh, lh, hl, ll = layer.weight_hh, layer.weight_lh, layer.weight_hl, layer.weight_ll
    assert_close(hh.grad, to_weight(high.detach(), grad_high, hh))
    assert_close(lh.grad, to_weight(low.detach(), gathered, lh))
    assert_close(ll.grad, to_weight(low.detach(), grad_low, ll))
    assert_close(hl.grad, to_weight(pooled, grad_low, hl))
    grad_pooled = to_image(pooled, hl, grad_low)
    assert_close(high.grad, to_image(high, hh, grad_high) + up(grad_pooled) / 4)
    assert_close(low.grad, to_image(low, ll, grad_low) + to_image(low, lh, gathered))


# --- what is refused ---


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, not 0"),
        ({"out_channels": 2.0}, "out_channels must be an integer of at least 1, not 2.0"),
        ({"in_channels": "5"}, "in_channels must be an integer of at least 1, not '5'"),
        (
            {"kernel_size": (3, 0)},
            r"kernel_size must be an integer, or two, each at least 1, not \(3, 0\)",
        ),
        ({"kernel_size": 3.0}, "kernel_size must be an integer, or two, each at least 1, not 3.0"),
        (
            {"kernel_size": (3, 3, 3)},
            "kernel_size must be an integer, or two, each at least 1, not",
        ),
        ({"kernel_size": ()}, "kernel_size must be an integer, or two, each at least 1, not"),
        ({"stride": "1"}, "stride must be an integer, or two, each at least 1, not '1'"),
        ({"padding": None}, "padding must be an integer, or two, each at least 0, not None"),
        ({"padding": "valid"}, "keep the size of the maps, 'same' or .*, not 'valid'"),
        ({"kernel_size": 4}, "kernel_size must be odd, to have a middle, not 4"),
        ({"stride": 2}, "stride must be 1, not 2"),
        ({"stride": [1, 2]}, r"stride must be 1, not \[1, 2\]"),
        ({"padding": 0}, r"keep the size of the maps, 'same' or \(1, 1\), not 0"),
        ({"alpha_in": 1}, "alpha_in must be from 0 to below 1, not 1"),
        ({"alpha_out": -0.5}, "alpha_out must be from 0 to below 1, not -0.5"),
        ({"alpha_in": 0.1}, "alpha_in = 0.1 makes 0 of 5 channels low"),
        ({"alpha_out": 0.1}, "alpha_out = 0.1 makes 0 of 7 channels low"),
    ],
)
def test_what_the_layer_refuses_is_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        OctaveConv2d(**{"in_channels": 5, "out_channels": 7, "kernel_size": 3, **wrong})


def test_maps_that_do_not_fit_are_refused():
    layer, (high, low) = OctaveConv2d(5, 7, 3, 0.4, 0.6), maps(5, 7, dtype=torch.float32)
    wrong = [high, (high,), (low, high), (high, low[..., :3]), (high[0], low[0]), (high, low[:1])]
    wrong += [(), [], "high", ("high", "low"), (high, None), None, (high, low, low)]
    for x in wrong:
        with pytest.raises(ValueError, match=r"takes a pair of \(N, 3, H, W\) and \(N, 2, ⌈H/2⌉"):
            layer(x)
    with pytest.raises(ValueError, match=r"takes \(N, 5, H, W\), not \(2, 3, 5, 7\) and"):
        OctaveConv2d(5, 7, 3, 0, 0.6)((high, low))
    with pytest.raises(ValueError, match=r"takes \(N, 5, H, W\), not nothing"):
        OctaveConv2d(5, 7, 3, 0, 0.6)(())


def test_pairs_may_be_spelt_as_in_torch():
    x = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)
    for one, three in ((1, 3), ((1,), (3,)), ([1, 1], [3, 3]), ((1, 1), (3, 3)), ("same", 3)):
        stride = 1 if one == "same" else one
        layer = OctaveConv2d(8, 2, three, stride=stride, padding=one)
        assert layer.padding == (1, 1) and layer.kernel_size == (3, 3)
        assert layer(x)[0].shape == (1, 1, 5, 5)


def test_how_it_is_shown():
    shown = "(5, 7, kernel_size=(3, 3), alpha_in=0.4, alpha_out=0, bias=False)"
    assert repr(OctaveConv2d(5, 7, 3, 0.4, 0, bias=False)).endswith(shown)


# --- the network ---


@pytest.mark.parametrize("alpha", [0, *ALPHAS])
def test_the_network_has_as_many_parameters_with_any_alpha(alpha):
    model = models.OctaveCNN(alpha=alpha)
    by_hand = (9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 32 + (32 * 4 * 4 + 1) * 10
    assert counting.parameters(model) == by_hand == 19_178
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_network_without_low_maps_is_a_plain_one():
    torch.manual_seed(2)
    model = models.OctaveCNN((3, 5, 7), alpha=0, image_size=11, classes=2)
    torch.manual_seed(2)
    layers = []
    for c, o in ((1, 3), (3, 5), (5, 7)):
        layers += [nn.Conv2d(c, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 2 * 2, 2))
    x = torch.randn(2, 1, 11, 11)
    assert_close(model(x), plain(x))


@pytest.mark.parametrize("side", [1, 2, 5, 7, 13, 28])
def test_the_network_takes_images_of_any_size(side):
    model = models.OctaveCNN((2, 3, 5), 0.5, image_size=side, classes=3).double()
    x, y = torch.randn(2, 1, side, side, dtype=torch.float64), torch.tensor([0, 2])
    _, grads = backprop(model, model.loss, x, y)
    model.loss(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_whole_network_costs_more_than_an_inner_layer():
    x = torch.randn(1, 1, 28, 28)
    dense = counting.multiply_adds(models.OctaveCNN(alpha=0), x)
    assert dense == (784 * 16 + 196 * 16 * 32 + 49 * 32 * 32) * 9 + 32 * 16 * 10
    costs = [counting.multiply_adds(models.OctaveCNN(alpha=alpha), x) for alpha in ALPHAS]
    assert all(cost / dense > cost_ratio(alpha) for cost, alpha in zip(costs, ALPHAS, strict=True))
    assert costs == sorted(costs, reverse=True) and costs[0] < dense


def test_the_data_take_the_size_of_the_networks_images():
    model = models.OctaveCNN((2, 2, 2), image_size=16)
    data = suited(load("digits"), model)
    assert model(data.batch(data.test[:3])[0]).shape == (3, 10)


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"classes": 0}, {"channels": (0, 2, 2)}])
def test_what_the_network_refuses(wrong):
    with pytest.raises(ValueError, match=r"must be .*at least 1"):
        models.OctaveCNN(**wrong)
