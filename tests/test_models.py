"""The networks: how many parameters, what they refuse, what their losses and confidences mean."""

import torch
import torch.nn.functional as F
from properties import refuses
from torch.testing import assert_close

from nn_backprop import models
from nn_backprop.models import counting
from nn_backprop.models.norm_cnn import Stage


def test_the_networks_have_the_parameters_that_they_say():
    # Of fast and accurate, each convolution and its norm: (C P² + 2) O; blocks on 14 × 14 pixels.
    fast = (4 * 9 + 2) * 32 + (32 * 9 + 2) * 64 + (64 * 4 * 4 + 2) * 64 + 65 * 10
    accurate = (25 + 2) * 32 + (32 * 9 + 2) * 64 + (64 * 9 + 2) * 64 + (64 * 9 + 2) * 128
    accurate += (128 * 3 * 3 + 1) * 10
    assert (fast, accurate) == (86_090, 141_930)
    for make, parameters in (
        (models.happy, 13_002),
        (models.MLP, 784 * 128 + 128 + 128 * 10 + 10),
        (models.CNN, 416 + 12_832 + 5_130),  # conv1, conv2, output
        (models.KernelNetwork, 256 * 4 * 4 * 10 + 10),  # the last layer alone
        (models.GeluMLP, 335_114),
        (models.fast_cnn, fast),
        (models.accurate_cnn, accurate),
    ):
        model = make()
        assert counting.parameters(model) == parameters, make
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    for side, kernel in ((13, 3), (28, 5), (17, 2), (13, 4)):
        model = models.CNN((5, 7), kernel, side, classes=3)
        left = ((side - kernel + 1) // 2 - kernel + 1) // 2
        k = kernel * kernel
        by_hand = (5 * k + 5) + (7 * 5 * k + 7) + (3 * 7 * left * left + 3)
        assert counting.parameters(model) == by_hand, (side, kernel)
        assert model(torch.randn(2, 1, side, side)).shape == (2, 3)


def test_an_mlp_takes_images_as_they_are():
    x = torch.randn(11, 1, 3, 5)
    for loss in ("cross_entropy", "squared_error"):
        model = models.MLP((3 * 5, 7, 2), loss=loss)
        assert_close(model(x), model(x.reshape(11, 15)))
        assert model(x).shape == (11, 2)


def test_what_the_networks_refuse_is_named():
    for wrong, named in (
        ({"sizes": (7,)}, r"\(7,\)"),
        ({"sizes": (7, 0, 3)}, r"\(7, 0, 3\)"),
        ({"activation": "swish"}, "swish"),
        ({"loss": "hinge"}, "hinge"),
    ):
        refuses(named, models.MLP, **wrong)
    for wrong in ({"channels": (0, 3)}, {"kernel_size": 0}, {"classes": -1}):
        refuses("must be at least 1", models.CNN, **wrong)
    refuses("15 pixels a side is too small", models.CNN, image_size=15)
    models.CNN(image_size=16)
    blocks, pools = [Stage(2, 3)], [Stage(2, 3, pool=2), Stage(2, 3)]
    sentence = "5 pixels a side are not whole blocks of 2"
    refuses(sentence, models.NormCNN, blocks, block=2, image_size=5)
    refuses("too small", models.NormCNN, pools, image_size=5)


def test_squared_error_is_a_sum_over_activated_outputs_and_a_mean_over_examples():
    output = torch.tensor([[0.5, 0.25, 1.0], [0.0, 2.0, -1.0]])
    # example 0, class 2: 0.25 + 0.0625 + 0; example 1, class 0: 1 + 4 + 1
    model, x = models.MLP((5, 3), "sigmoid", "squared_error"), torch.randn(7, 5)
    assert model.loss(output, torch.tensor([2, 0])).item() == (0.3125 + 6.0) / 2
    assert_close(model(x), torch.sigmoid(model.layers[0](x)))
    plain = models.MLP((5, 3))
    assert_close(plain(x), plain.layers[0](x))


def test_probabilities():
    output = torch.randn(101, 3, dtype=torch.float64)
    assert (output < 0).all(1).any(), "no row without a positive output was drawn"
    for loss in ("cross_entropy", "squared_error"):
        p = models.MLP((5, 3), "tanh", loss).probabilities(output)
        assert (p >= 0).all()
        assert_close(p.sum(1), torch.ones(101, dtype=torch.float64))
        assert torch.equal(p.argmax(1), output.argmax(1)), loss
    p = models.MLP((5, 3), loss="squared_error").probabilities(
        torch.tensor([[0.5, -2.0, 1.5], [0.0, 0.0, 0.0]])
    )
    assert_close(p, torch.tensor([[0.25, 0.0, 0.75], [1 / 3, 1 / 3, 1 / 3]]))
    logits = torch.tensor([[0.0, 0.0, 2.0]]).log1p()  # e^logits = 1, 1, 3
    assert_close(models.CNN().probabilities(logits), torch.tensor([[0.2, 0.2, 0.6]]))


def test_a_norm_cnn_cuts_the_image_into_blocks():
    """Pixel (i, j) of a block becomes channel 2 i + j."""
    model = models.NormCNN([Stage(1, 1)], block=2, image_size=4, classes=3).eval()
    seen = []
    model.convs[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.arange(16.0).view(1, 1, 4, 4)
    model(image)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(seen[0][0, 2 * i + j], image[0, 0, i::2, j::2])


def test_a_norm_cnn_smooths_the_labels_in_training_alone():
    model = models.NormCNN([Stage(2, 3)], image_size=5, classes=4, label_smoothing=0.2)
    output, targets = torch.randn(3, 4), torch.tensor([0, 3, 1])
    log_p = output.log_softmax(1)
    shares = 0.8 * F.one_hot(targets, 4) + 0.2 / 4
    assert_close(model.loss(output, targets), -(shares * log_p).sum(1).mean())
    model.eval()
    assert_close(model.loss(output, targets), F.nll_loss(log_p, targets))


def test_the_gelu_mlp_starts_and_computes_as_published():
    model = models.GeluMLP()
    a = (x := torch.randn(3, 1, 28, 28)).flatten(1)
    for layer, square in zip(model.layers, (1.425, 0.85, 0.85, 1.425), strict=True):
        lengths = layer.weight.norm(dim=1)
        assert_close(lengths, torch.full_like(lengths, square**-0.5))
        assert not layer.bias.any()
        z = a @ layer.weight.T
        a = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    assert_close(model(x), z, atol=1e-4, rtol=0)
