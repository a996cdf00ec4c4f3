"""Fields with weights of their own, fields with shared ones, and the networks made of them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from properties import EITHER, engines_agree, passes_the_checker, product, refuses
from torch.testing import assert_close

from nn_backprop import as_function, backprop, check_gradients, models, rules
from nn_backprop.layers import LocallyConnected2d, UnitBiasConv2d
from nn_backprop.models import counting
from nn_backprop.rules.locally_connected import locally_connected2d

KINDS = [LocallyConnected2d, UnitBiasConv2d]
every_geometry = pytest.mark.parametrize(
    "size, kernel, stride, padding",
    [((5, 7), (2, 3), 1, 0), ((7, 5), 3, 2, 1),
     ((7, 11), (3, 2), (2, 3), (1, 0)), ((11, 7), (5, 3), 4, 2)],  # rows and columns left unread
)  # fmt: skip


@every_geometry
def test_with_equal_weights_everywhere_it_is_a_convolution(size, kernel, stride, padding):
    """Forward; and the shared gradient is the sum of the unshared ones, of both our rules: one sums
    over h and w before it is asked, the other does not."""
    layer = LocallyConnected2d(3, 5, size, kernel, stride, padding).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    shared, bias = torch.randn(5, 3, *layer.kernel_size).double(), torch.randn(5).double()
    with torch.no_grad():
        layer.weight.copy_(shared.expand_as(layer.weight))
        layer.bias.copy_(bias[:, None, None].expand_as(layer.bias))
    assert_close(layer(image), F.conv2d(image, shared, bias, stride, padding))
    assert_close(layer(image[0]), layer(image)[0])

    local, conv = rules.TABLE[locally_connected2d], rules.TABLE[F.conv2d]
    z, saved = conv.forward(image, shared, None, stride, padding)
    z_own, saved_own = local.forward(image, shared.expand_as(layer.weight), None, stride, padding)
    assert_close(z_own, z)
    grad_z = torch.randn_like(z)
    grad_x, grad_shared, _ = conv.backward(grad_z, saved, (True, True, False))
    grad_x_own, grad_own, _ = local.backward(grad_z, saved_own, (True, True, False))
    assert_close(grad_own.sum((0, 1)), grad_shared, rtol=1e-12, atol=1e-12)
    assert_close(grad_x_own, grad_x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", EITHER)
def test_the_gradients_pass_the_checker(dtype):
    """The layers', and those of our own backward against torch's through the plain forward."""
    torch.manual_seed(0)
    rule = as_function(rules.TABLE[locally_connected2d])
    for kind in KINDS:
        layer = kind(3, 5, (7, 11), (2, 3), (2, 3), (1, 0), dtype=dtype)
        passes_the_checker(layer, torch.randn(2, 3, 7, 11, dtype=dtype), case=kind)
    shapes = (2, 3, 5, 7), (4, 5, 2, 3, 2, 3), (2, 4, 5)
    operands = [torch.randn(shape, dtype=dtype) for shape in shapes]
    passes_the_checker(rule, *operands, reference=locally_connected2d)


def test_the_checker_refuses_a_spoilt_backward():
    class Spoilt(as_function(rules.TABLE[locally_connected2d])):
        @staticmethod
        def backward(ctx, grad_z):
            grad_x, grad_weight, *rest = super(Spoilt, Spoilt).backward(ctx, grad_z)
            return grad_x, grad_weight.mean((0, 1), keepdim=True).expand_as(grad_weight), *rest

    image, weight = torch.randn(2, 3, 5, 7).double(), torch.randn(4, 5, 2, 3, 2, 3).double()
    report = check_gradients(Spoilt, image, weight, reference=locally_connected2d)
    assert report.verdict == "fail"


def test_all_engines_agree_on_the_networks():
    torch.manual_seed(0)
    for make in models.NETS.values():
        engines_agree(make(), 2 * torch.rand(7, 1, 16, 16) - 1, torch.randint(10, (7,)))
    images, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 9])
    engines_agree(models.fully_connected(), images, y, ["tape", "by-hand"])
    for make in (models.locally_connected, models.shared_weights):
        engines_agree(make(), images, y)


def test_backprop_names_the_gradients_of_a_layer():
    layer, image = LocallyConnected2d(2, 3, 5, 3), torch.randn(2, 2, 5, 5)
    _, grads = backprop(layer, product, image, torch.randn(2, 3, 3, 3))
    shapes = {name: grad.shape for name, grad in grads.items()}
    assert shapes == {"weight": (3, 3, 3, 2, 3, 3), "bias": (3, 3, 3)}


# --- counts ---


@every_geometry
def test_weights_and_links_are_as_many_as_the_formulas_say(size, kernel, stride, padding):
    local, shared = (kind(3, 5, size, kernel, stride, padding) for kind in KINDS)
    image = torch.randn(1, 3, *size)
    P, Q = local.kernel_size
    _, _, h, w = local(image).shape
    units = 5 * h * w
    assert shared(image).shape == (1, 5, h, w)
    assert counting.multiply_adds(local, image) == units * 3 * P * Q
    assert counting.links(local, image) == counting.links(shared, image) == units * (3 * P * Q + 1)
    assert counting.parameters(local) == units * (3 * P * Q + 1)
    assert counting.parameters(shared) == 5 * 3 * P * Q + units


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


def test_the_loss_of_1989_is_a_sum_of_squares():
    model = models.NETS["net1"]()
    output = torch.full((2, 10), -1.0)
    output[0, 3] = 0.5
    # example 0, class 3: 0.25; example 1, class 7: (−1 − 1)²
    assert model.loss(output, torch.tensor([3, 7])).item() == (0.25 + 4) / 2
    p = model.probabilities(output)
    assert_close(p.sum(1), torch.ones(2))
    assert p[0].argmax() == 3 and p[0, 3] > 0.99


# --- what is refused ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_refuses_and_how_it_is_shown(kind):
    right = {"in_channels": 2, "out_channels": 3, "input_size": (5, 7), "kernel_size": 3}
    kind(**right)
    for wrong, sentence in (
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, not 0"),
        ({"out_channels": -1}, "out_channels must be an integer of at least 1, not -1"),
        (
            {"input_size": (5, 0)},
            r"input_size must be .* two, each at least 1, not \(5, 0\)",
        ),
        ({"kernel_size": 0}, "kernel_size must be an integer, or two, each at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"in_channels": 4.0}, "in_channels must be an integer of at least 1, not 4.0"),
        ({"padding": -1}, "padding must not be negative"),
        ({"padding": "full"}, "'valid', 'same' or a number, not 'full'"),
        ({"padding": "same", "stride": 2}, "'same' needs stride 1"),
        ({"kernel_size": (3, 8)}, "3 × 8 pixels does not fit into an image of 5 × 7"),
    ):
        refuses(sentence, kind, **(right | wrong))
    refuses("images of 5 × 5 pixels, not 5 × 7", kind(2, 3, 5, 3), torch.randn(1, 2, 5, 7))
    shown = repr(kind(2, 3, (5, 7), 3, 2, 1))
    for part in ("2, 3, input_size=(5, 7)", "kernel_size=(3, 3)", "stride=2", "padding=1"):
        assert part in shown


def test_the_function_refuses_strides_and_paddings_that_cannot_be():
    image, weight = torch.zeros(1, 3, 5, 7), torch.zeros(4, 5, 2, 3, 2, 3)
    refuses("stride must be at least 1", locally_connected2d, image, weight, stride=0)
    refuses("must not be negative", locally_connected2d, image, weight, padding=-1)
    refuses("not 'full'", locally_connected2d, image, weight, padding="full")
    same = {"padding": "same", "stride": 2}
    refuses("'same' needs stride 1", locally_connected2d, image, weight, **same)


def test_the_function_refuses_shapes_that_do_not_fit():
    """In a process without the tests' own check of shapes, which would speak first."""
    code = """if True:
        import torch
        from nn_backprop.rules.locally_connected import locally_connected2d
        for image, bias in [((1, 3, 5, 8), None), ((1, 2, 5, 7), None), ((5, 7), None),
                            ((1, 1, 3, 5, 7), None), ((1, 3, 5, 7), torch.zeros(2))]:
            try:
                locally_connected2d(torch.zeros(image), torch.zeros(4, 5, 2, 3, 2, 3), bias)
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    others = ((1, 2, 5, 7), (5, 7), (1, 1, 3, 5, 7))
    assert done.stdout.splitlines() == [
        "the weights are for 4 × 5 places, but a 2 × 3 field with stride 1 and padding 0 has "
        "4 × 6 on 5 × 8 pixels",
        *(f"the weights are for (N, 3, H, W) or (3, H, W), not {shape}" for shape in others),
        "the bias must be (2, 4, 5), one for each unit, not (2,)",
    ], done.stderr
