"""Fields with weights of their own, fields with shared ones, and the networks made of them."""

import inspect
import re

import torch
import torch.nn.functional as F
from properties import about, refuses
from torch.testing import assert_close

from nn_backprop import models, rules
from nn_backprop.layers import LocallyConnected2d, UnitBiasConv2d
from nn_backprop.models import counting
from nn_backprop.rules.locally_connected import locally_connected2d, locally_connected2d_forward

GEOMETRIES = (  # size, kernel, stride, padding
    ((5, 7), (2, 3), 1, 0), ((7, 5), 3, 2, 1), ((7, 11), (3, 2), (2, 3), (1, 0)),
    ((11, 7), (5, 3), 4, 2),  # rows and columns left unread
)  # fmt: skip


def test_with_equal_weights_everywhere_it_is_a_convolution():
    """Forward; and the shared gradient is the sum of the unshared ones, of both our rules: one sums
    over h and w before it is asked, the other does not."""
    local, conv = rules.TABLE[locally_connected2d], rules.TABLE[F.conv2d]
    for size, kernel, stride, padding in GEOMETRIES:
        layer = LocallyConnected2d(3, 5, size, kernel, stride, padding).double()
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        shared, bias = torch.randn(5, 3, *layer.kernel_size).double(), torch.randn(5).double()
        with torch.no_grad():
            layer.weight.copy_(shared.expand_as(layer.weight))
            layer.bias.copy_(bias[:, None, None].expand_as(layer.bias))
        units = UnitBiasConv2d(3, 5, size, kernel, stride, padding).double()
        z, saved = conv.forward(image, shared, None, stride, padding)
        own, saved_own = local.forward(image, shared.expand_as(layer.weight), None, stride, padding)
        grad_z, needs = torch.randn_like(z), (True, True, False)
        grad_x, grad_shared, _ = conv.backward(grad_z, saved, needs)
        grad_x_own, grad_own, _ = local.backward(grad_z, saved_own, needs)
        with about(size, kernel, stride, padding):
            assert_close(layer(image), F.conv2d(image, shared, bias, stride, padding))
            assert_close(layer(image[0]), layer(image)[0])
            assert_close(own, z)
            expected = F.conv2d(image, units.weight, None, stride, padding) + units.bias
            assert_close(units(image), expected)
            assert_close(grad_own.sum((0, 1)), grad_shared, rtol=1e-12, atol=1e-12)
            assert_close(grad_x_own, grad_x, rtol=1e-12, atol=1e-12)


# --- counts ---


def test_weights_and_links_are_as_many_as_the_formulas_say_and_start_within_bounds():
    torch.manual_seed(0)
    for size, *fields in GEOMETRIES:
        local, shared = (kind(3, 5, size, *fields) for kind in (LocallyConnected2d, UnitBiasConv2d))
        image = torch.randn(1, 3, *size)
        P, Q = local.kernel_size
        _, _, h, w = local(image).shape
        units = 5 * h * w
        with about(size, *fields):
            links = units * (3 * P * Q + 1)
            assert shared(image).shape == (1, 5, h, w)
            assert counting.multiply_adds(local, image) == units * 3 * P * Q
            assert counting.links(local, image) == counting.links(shared, image) == links
            assert counting.parameters(local) == links
            assert counting.parameters(shared) == 5 * 3 * P * Q + units
            for parameter in (*local.parameters(), *shared.parameters()):  # uniform in ±1/√fan-in
                low, high = (x * (3 * P * Q) ** 0.5 for x in parameter.aminmax())
                assert -1 <= low < -0.7 and 0.7 < high <= 1


def test_the_counts_of_1989():
    found = {
        name: (counting.links(make(), torch.rand(1, 1, 16, 16)), counting.parameters(make()))
        for name, make in models.NETS.items()
    }
    assert found == {
        "net1": (2_570, 2_570), "net2": (3_214, 3_214), "net3": (1_226, 1_226),
        "net4": (2_266, 1_132), "net5": (5_194, 1_060), "net5-unshared": (5_194, 5_194),
    }  # fmt: skip


def test_the_three_families_have_the_same_units():
    image = torch.randn(1, 1, 28, 28)
    names = ("fully-connected", "locally-connected", "shared-weights")
    full, local, shared = (models.MODELS[name]() for name in names)
    links = 784 * 26 + 392 * 101 + 3_930
    assert counting.links(local, image) == counting.links(shared, image) == links
    assert counting.parameters(local) == links == 63_906
    assert counting.parameters(shared) == 4 * 26 + 8 * 101 + 3_930 == 4_842
    assert counting.links(full, image) == counting.parameters(full) == 927_090


# --- the networks of 1989 ---


def test_the_border_is_a_constant_background():
    """A unit in the corner of Net-3 sees five virtual inputs of −1 among its nine."""
    model = models.NETS["net3"]()
    image, seen = torch.rand(1, 1, 16, 16), []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(image)
    (padded,) = seen
    assert padded.shape == (1, 1, 18, 18) and padded[0, 0, :3, :3].eq(-1).sum() == 5
    assert torch.equal(padded[0, 0, 1:-1, 1:-1], image[0, 0])


def test_the_start_is_within_its_bounds():
    for net in models.NETS.values():
        for layer in net().layers:
            weight = layer.weight[0, 0, 0] if layer.weight.dim() == 6 else layer.weight[0]
            for parameter in layer.parameters():
                assert 0 < parameter.abs().max() <= 2.4 / (weight.numel() + 1)


def test_the_units_of_1989_and_their_loss():
    model, x = models.NETS["net1"](), torch.rand(5, 1, 16, 16)
    assert_close(model(x), 1.7159 * torch.tanh(2 / 3 * model.layers[0](x.flatten(1))))
    output = torch.full((2, 10), -1.0)
    output[0, 3] = 0.5
    # example 0, class 3: 0.25; example 1, class 7: (−1 − 1)²
    assert model.loss(output, torch.tensor([3, 7])).item() == (0.25 + 4) / 2
    p = model.probabilities(output)
    assert_close(p.sum(1), torch.ones(2))
    assert p[0].argmax() == 3 and p[0, 3] > 0.99


# --- what is refused ---


def test_what_the_function_refuses():
    unchecked = inspect.unwrap(locally_connected2d_forward)  # the check of shapes speaks first
    image, weight = (1, 3, 5, 7), torch.zeros(4, 5, 2, 3, 2, 3)
    units = "the weights are for"
    for sentence, shape, *rest in (
        ("^stride must be at least 1", image, None, 0),
        ("^padding must not be negative", image, None, 1, -1),
        ("not 'full'", image, None, 1, "full"),
        ("'same' needs stride 1", image, None, 2, "same"),
        (f"^{units} 4 × 5 places, but a 2 × 3 field with stride 1 and padding 0 has 4 × 6 on "
         "5 × 8 pixels$", (1, 3, 5, 8)),
        *((rf"^{units} \(N, 3, H, W\) or \(3, H, W\), not {re.escape(str(shape))}$", shape)
          for shape in ((1, 2, 5, 7), (5, 7), (1, 1, 3, 5, 7))),
        (r"^the bias must be \(2, 4, 5\), one for each unit, not \(2,\)$", image, torch.zeros(2)),
    ):  # fmt: skip
        refuses(sentence, unchecked, torch.zeros(shape), weight, *rest)
