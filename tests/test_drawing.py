"""Images that a network draws, by hand; and what it says of images."""

import numpy as np
import torch
from pytest import approx
from torch import nn

from nn_backprop.data import ImageData
from nn_backprop.studies.answers import probabilities
from nn_backprop.studies.drawing import draw, nearest, sheet, stretched


class Pixels(nn.Module):
    """The first ten pixels, from 0 to 1, as logits or, in `squared_error`, squashed."""

    def __init__(self, loss_name, scale=1):
        super().__init__()
        self.loss_name = loss_name
        self.scale = nn.Parameter(torch.full((1,), float(scale)))

    def forward(self, x):
        z = self.scale * x.flatten(1)[:, :10]
        return z if self.loss_name == "cross_entropy" else z.sigmoid()


def data_of(images, labels, train):
    none = torch.arange(0)
    return ImageData("made", "", images, labels, train, none, none, 0.0, 1.0)


NO_DATA = data_of(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1).long(),
                  torch.arange(1))  # fmt: skip


def test_what_a_network_says_are_probabilities_of_a_softmax_or_the_outputs():
    image = torch.arange(784).remainder(200).to(torch.uint8).view(1, 1, 28, 28)
    images, pixels = image.expand(1003, 1, 28, 28), np.arange(10) / 255
    p = probabilities(Pixels("cross_entropy"), NO_DATA, images)
    assert p.dtype == np.float64 and p.shape == (1003, 10)
    assert p[1002] == approx(np.exp(pixels) / np.exp(pixels).sum())
    outputs = probabilities(Pixels("squared_error"), NO_DATA, images)
    assert outputs[0] == approx(1 / (1 + np.exp(-pixels)))


def test_a_step_has_its_length_and_the_direction_of_the_slope():
    # log softmax, at equal logits: 0.9 at the pixel, −0.1 at nine others, which are black;
    # log σ: the pixel alone
    for loss_name in ("cross_entropy", "squared_error"):
        drawn = draw(Pixels(loss_name), NO_DATA, 1)
        assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
        pixels = drawn.flatten(1)
        assert pixels.sum(1).equal(pixels.amax(1)) and pixels.argmax(1).equal(torch.arange(10))
        assert pixels.amax(1).tolist() == approx([255 * 0.1] * 10, abs=0.5)


def test_a_slope_that_points_beyond_black_is_left_out():
    drawn = draw(Pixels("cross_entropy", scale=-1), NO_DATA, 1).flatten(1).float()
    # log softmax of −x: −0.9 at the pixel, which is black, and 0.1 at the nine others
    assert not drawn.diagonal().any()
    assert drawn.norm(dim=1).tolist() == approx([25.5] * 10, abs=2)


def test_steps_become_shorter_and_stay_in_the_box():
    model = Pixels("squared_error")
    pixels = draw(model, NO_DATA, 4).flatten(1)  # 1, ¾, ½, ¼
    assert pixels.diagonal().tolist() == approx([25.5 * 2.5] * 10, abs=0.5)
    pixels = draw(model, NO_DATA, 500).flatten(1)
    assert pixels.diagonal().tolist() == [255] * 10 and pixels.sum() == 2550
    assert model.scale.dtype == torch.float32 and model.scale.grad is None  # as it was


def test_a_drawing_is_judged_by_the_training_image_that_correlates_most():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    shown = torch.cat([images[4:5] // 2 + 9, 255 - images[5:6], images[25:26]])
    digits, correlation = nearest(shown, data_of(images, labels, torch.arange(2, 24)))

    of_all = [[np.corrcoef(image.flatten(), images[n].flatten())[0, 1] for n in range(2, 24)]
              for image in shown]  # fmt: skip
    assert digits.equal(labels[2 + np.argmax(of_all, axis=1)])
    assert correlation.tolist() == approx(np.max(of_all, axis=1), abs=1e-5)
    assert digits[0] == 1 and correlation[0] == approx(1, abs=1e-3)
    assert correlation[1:].max() < 0.2  # 5 is as unlike as can be; 25 is no training image


def test_a_drawing_is_stretched_to_white():
    images = torch.tensor([[0, 20, 51], [0, 0, 0], [255, 100, 3]], dtype=torch.uint8)
    found = stretched(images.view(3, 1, 1, 3))
    assert found.dtype == torch.uint8
    assert found.view(3, 3).tolist() == [[0, 100, 255], [0, 0, 0], [255, 100, 3]]


def test_the_sheet_has_its_rows_and_columns():
    images = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1).expand(2, 3, 4, 5)
    found = sheet(images)
    assert found.shape == (2 * 6, 3 * 7)
    assert found[2::6, 3::7].tolist() == [[0, 1, 2], [3, 4, 5]]
