"""Images that a network draws, by hand; and what it says of images."""

import numpy as np
import torch
from pytest import approx
from torch import nn

from nn_backprop.data import ImageData
from nn_backprop.studies.answers import probabilities
from nn_backprop.studies.drawing import draw, nearest, sheet, stretched


class Pixels(nn.Module):
    """Ten pixels, from 0 to 1, and a third of ten more, as logits or, in `squared_error`, squashed.

    With `add`, which is added to each.
    """

    def __init__(self, loss_name, scale=1, add=0):
        super().__init__()
        self.loss_name, self.add = loss_name, add
        self.scale = nn.Parameter(torch.full((1,), float(scale)))

    def forward(self, x):
        first, second = x.flatten(1)[:, :20].split(10, 1)
        z = self.scale * (first + second / 3) + self.add
        return z if self.loss_name == "cross_entropy" else z.sigmoid()


def data_of(images, labels, train):
    none = torch.arange(0)
    return ImageData("made", "", images, labels, train, none, none, 0.0, 1.0)


NO_DATA = data_of(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1).long(),
                  torch.arange(1))  # fmt: skip


def test_what_a_network_says_are_probabilities_of_a_softmax_or_the_outputs():
    image = torch.arange(784).remainder(200).to(torch.uint8).view(1, 1, 28, 28)
    z = (np.arange(10) + np.arange(10, 20) / 3) / 255
    for loss_name, expected in (
        ("cross_entropy", np.exp(z) / np.exp(z).sum()),
        ("squared_error", 1 / (1 + np.exp(-z))),
    ):
        p = probabilities(Pixels(loss_name), NO_DATA, image.expand(1003, 1, 28, 28))
        assert p.dtype == np.float64 and p.shape == (1003, 10)
        assert p[1002] == approx(expected), loss_name


def test_a_step_has_its_length_and_the_direction_of_the_slope():
    """Of its own two pixels; of logits the others' slopes are below 0, and those are black. It has
    its length also where the probability is e⁻⁴⁰: that of all digits, or that of a 0."""
    for loss_name, add in (
        ("cross_entropy", 0), ("cross_entropy", -40 * (torch.arange(10) == 0)),
        ("squared_error", 0), ("squared_error", -40),
    ):  # fmt: skip
        drawn = draw(Pixels(loss_name, add=add), NO_DATA, 1)
        assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
        first, second, rest = drawn.flatten(1).double().split((10, 10, 764), 1)
        for part, length in ((first, 0.9**0.5), (second, 0.1**0.5)):
            assert part.diagonal().tolist() == approx([25.5 * length] * 10, abs=0.5)
        assert (first.count_nonzero(), second.count_nonzero(), rest.sum()) == (10, 10, 0)
    drawn = draw(Pixels("cross_entropy", scale=-1), NO_DATA, 1).flatten(1).double()
    # log softmax of −x: −0.9 at its pixel, which is black, and 0.1 at each of the nine others
    assert not drawn.diagonal().any() and drawn.norm(dim=1).tolist() == approx([25.5] * 10, abs=2)


def test_steps_become_shorter_and_stay_in_the_box():
    model = Pixels("squared_error")
    for steps, first, second in (
        (4, 2.5 * 0.9**0.5, 2.5 * 0.1**0.5),  # 1, ¾, ½, ¼
        (23, 10, 4.63),  # 16 of 23 steps have a part 0.1 ** 0.5 for the second, then it has all
        (500, 10, 10),
    ):
        pixels = draw(model, NO_DATA, steps).flatten(1).double()
        assert pixels.diagonal().tolist() == approx([25.5 * first] * 10, abs=0.5), steps
        assert pixels[:, 10:].diagonal().tolist() == approx([25.5 * second] * 10, abs=0.5), steps
        assert pixels.count_nonzero() == 20
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


def test_a_drawing_is_stretched_to_white_and_drawings_stand_in_a_grey_frame():
    images = torch.tensor([[0, 3, 13], [0, 0, 0], [255, 100, 3]], dtype=torch.uint8)
    found = stretched(images.view(3, 1, 1, 3))
    assert found.dtype == torch.uint8  # 3 · 255 / 13 is 58.8
    assert found.view(3, 3).tolist() == [[0, 59, 255], [0, 0, 0], [255, 100, 3]]
    images = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1).expand(2, 3, 4, 5)
    found = sheet(images).view(2, 6, 3, 7)
    assert found[:, 2, :, 3].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found[:, [0, 5]] == 64).all() and (found[..., [0, 6]] == 64).all()
