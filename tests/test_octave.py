"""Octave convolution: the layer, its gradients and its cost; the network made of it."""

from itertools import product as every

import torch
import torch.nn.functional as F
from properties import refuses, same_gradients
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.testing import assert_close

from nn_backprop import models
from nn_backprop.data import load, suited
from nn_backprop.layers import OctaveConv2d
from nn_backprop.layers.octave import cost_ratio, memory_ratio
from nn_backprop.models import counting

ALPHAS = [0.125, 0.25, 0.5, 0.75]


def maps(H: int, W: int) -> tuple[Tensor, Tensor]:
    shapes = (2, 3, H, W), (2, 2, -(-H // 2), -(-W // 2))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


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
            for c, p, q in every(*map(range, weight.shape[1:]))
        )

    pooled = high.new_zeros(N, high.shape[1], h_low, w_low)
    for n, c, i, j in every(*map(range, pooled.shape)):
        pooled[n, c, i, j] = high[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
    z_high = layer.bias_h.view(-1, 1, 1).repeat(N, 1, H, W)
    for n, o, h, w in every(*map(range, z_high.shape)):
        z_high[n, o, h, w] += f(high, layer.weight_hh, n, o, h, w)
        z_high[n, o, h, w] += f(low, layer.weight_lh, n, o, h // 2, w // 2)
    z_low = layer.bias_l.view(-1, 1, 1).repeat(N, 1, h_low, w_low)
    for n, o, h, w in every(*map(range, z_low.shape)):
        z_low[n, o, h, w] += f(low, layer.weight_ll, n, o, h, w)
        z_low[n, o, h, w] += f(pooled, layer.weight_hl, n, o, h, w)
    return z_high, z_low


def test_the_layer_is_its_equations():
    for kernel, (H, W) in every((3, (1, 5)), ((4, 6), (5, 7), (5, 4), (1, 3))):
        layer = OctaveConv2d(5, 7, kernel, 0.4, 0.6, dtype=torch.float64)
        high, low = maps(H, W)
        z_high, z_low = layer((high, low))
        assert z_high.shape == (2, 3, H, W) and z_low.shape == (2, 4, -(-H // 2), -(-W // 2))
        with torch.no_grad():
            said = f"{kernel}, {H} × {W}: "
            assert_close((z_high, z_low), plain(layer, high, low), msg=said.__add__)
    first, last = OctaveConv2d(3, 7, 3, 0, 0.3), OctaveConv2d(7, 5, 3, 0.3, 0)  # of one kind
    high, low = first(torch.randn(2, 3, 5, 7))
    assert high.shape == (2, 5, 5, 7) and low.shape == (2, 2, 3, 4)
    assert last((high, low)).shape == (2, 5, 5, 7)
    assert first.weight_lh is first.weight_ll is None
    assert last.weight_hl is last.weight_ll is last.bias_l is None
    x = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)  # pairs may be spelt as in torch
    for one, three in ((1, 3), ((1,), (3,)), ([1, 1], [3, 3]), ((1, 1), (3, 3)), ("same", 3)):
        layer = OctaveConv2d(8, 2, three, stride=1 if one == "same" else one, padding=one)
        assert layer.padding == (1, 1) and layer.kernel_size == (3, 3)
        assert layer(x)[0].shape == (1, 1, 5, 5)


def test_parameters_are_those_of_a_plain_convolution():
    alphas = [(0, 0), (0, 0.5), (0.5, 0), (0.3, 0.75), (0.29, 0.1)]
    for (alpha_in, alpha_out), bias in every(alphas, (True, False)):
        layer = OctaveConv2d(100, 10, (3, 5), alpha_in, alpha_out, bias=bias)
        conv, low = nn.Conv2d(100, 10, (3, 5), bias=bias), round(100 * alpha_in)
        assert counting.parameters(layer) == counting.parameters(conv), (alpha_in, alpha_out, bias)
        assert layer.channels_in == (100 - low, low)
        bound = (100 * 3 * 5) ** -0.5
        for parameter in layer.parameters():
            assert parameter.abs().max() <= bound
            assert parameter.numel() < 100 or parameter.abs().max() > 0.9 * bound


def test_cost_and_memory_are_the_formulas_and_the_published_ones():
    conv, x = nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 6, 10)
    for alpha in ALPHAS:
        layer, low = OctaveConv2d(8, 16, 3, alpha, alpha), int(8 * alpha)
        octave = x[:, low:], F.avg_pool2d(x[:, :low], 2)
        ratio = counting.multiply_adds(layer, octave) / counting.multiply_adds(conv, x)
        assert ratio == cost_ratio(alpha)
        assert sum(part.numel() for part in octave) / x.numel() == memory_ratio(alpha)
        assert sum(part.numel() for part in layer(octave)) / conv(x).numel() == memory_ratio(alpha)
    assert [f"{100 * cost_ratio(alpha):.0f}" for alpha in ALPHAS] == ["82", "67", "44", "30"]
    assert cost_ratio(0) == memory_ratio(0) == 1
    first = OctaveConv2d(2, 8, 3, 0, 0.25)  # whose docstring says what it costs
    assert counting.multiply_adds(first, torch.randn(1, 2, 6, 10)) == (2 * 6 + 2 * 2 / 4) * 9 * 60


def test_the_gradients_are_those_of_the_derivation():
    """Even sizes, where pool₂ᵀ = ¼ up₂ and up₂ᵀ = 4 pool₂."""
    layer = OctaveConv2d(5, 7, 3, 0.4, 0.6, dtype=torch.float64)
    high, low = (part.requires_grad_() for part in maps(4, 6))
    z = layer((high, low))
    grad_high, grad_low = (torch.randn_like(part) for part in z)
    torch.autograd.backward(z, (grad_high, grad_low))

    def to_image(image, weight, grad):
        return conv2d_input(image.shape, weight, grad, padding=1)

    pooled, gathered = F.avg_pool2d(high.detach(), 2), 4 * F.avg_pool2d(grad_high, 2)
    hh, lh, hl, ll = layer.weight_hh, layer.weight_lh, layer.weight_hl, layer.weight_ll
    for weight, image, grad in (
        (hh, high, grad_high), (lh, low, gathered), (ll, low, grad_low), (hl, pooled, grad_low),
    ):  # fmt: skip
        assert_close(weight.grad, conv2d_weight(image.detach(), weight.shape, grad, padding=1))
    from_pooled = F.interpolate(to_image(pooled, hl, grad_low), scale_factor=2) / 4
    assert_close(high.grad, to_image(high, hh, grad_high) + from_pooled)
    assert_close(low.grad, to_image(low, ll, grad_low) + to_image(low, lh, gathered))


# --- the network ---


def test_the_network_has_as_many_parameters_with_any_alpha_and_costs_more_than_an_inner_layer():
    by_hand = (9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 32 + (32 * 4 * 4 + 1) * 10
    x, costs = torch.randn(1, 1, 28, 28), {}
    for alpha in (0, *ALPHAS):
        model = models.OctaveCNN(alpha=alpha)
        assert counting.parameters(model) == by_hand == 19_178, alpha
        assert model(x.expand(2, -1, -1, -1)).shape == (2, 10)
        costs[alpha] = counting.multiply_adds(model, x)
    dense = costs[0]
    assert dense == (784 * 16 + 196 * 16 * 32 + 49 * 32 * 32) * 9 + 32 * 16 * 10
    assert all(costs[alpha] / dense > cost_ratio(alpha) for alpha in ALPHAS)
    assert [*costs.values()] == sorted(costs.values(), reverse=True) and costs[0.125] < dense


def test_without_low_maps_layer_and_network_are_plain_ones_with_the_same_numbers():
    torch.manual_seed(2)
    layer = OctaveConv2d(3, 11, 3, 0, 0)
    network = models.OctaveCNN((3, 5, 7), alpha=0, image_size=11, classes=2)
    torch.manual_seed(2)
    conv, layers = nn.Conv2d(3, 11, 3, padding=1), []
    for c, o in ((1, 3), (3, 5), (5, 7)):
        layers += [nn.Conv2d(c, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 2 * 2, 2))
    x = torch.randn(2, 3, 5, 7)
    assert_close(layer(x), conv(x))
    images = torch.randn(2, 1, 11, 11)
    assert_close(network(images), plain(images))


def test_the_network_takes_images_of_any_size():
    for side in (1, 2, 5, 7, 13, 28):
        model = models.OctaveCNN((2, 3, 5), 0.5, image_size=side, classes=3).double()
        x = torch.randn(2, 1, side, side, dtype=torch.float64)
        same_gradients(model, model.loss, x, torch.tensor([0, 2]), side)
    model = models.OctaveCNN((2, 2, 2), image_size=16)  # and the data take its size
    data = suited(load("digits"), model)
    assert model(data.batch(data.test[:3])[0]).shape == (3, 10)
    for wrong in ({"image_size": 0}, {"classes": 0}, {"channels": (0, 2, 2)}):
        refuses(r"must be .*at least 1", models.OctaveCNN, **wrong)
