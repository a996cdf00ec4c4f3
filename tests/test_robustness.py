"""`studies.robustness`: white pixels and active units, counted by hand."""

from dataclasses import replace

import torch
from pytest import approx
from torch import nn

from nn_backprop.data import load
from nn_backprop.models import LayerNetwork
from nn_backprop.studies.robustness import activity, order_of_pixels, under_noise


class Onlooker(LayerNetwork):
    """Keeps the images that it is shown, and takes each for a 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 10).float()


DIGITS = load("digits")


def test_the_noise():
    order = order_of_pixels(7, 28, 5)
    assert order.shape == (7, 1, 28, 28)
    assert (order.flatten(1).sort(1).values == torch.arange(784)).all()
    assert not torch.equal(order[0], order[1])
    order_of_pixels.cache_clear()
    assert torch.equal(order_of_pixels(7, 28, 5), order)  # the same for every network of a seed
    assert not torch.equal(order_of_pixels(7, 28, 6), order)

    indices, model = DIGITS.test[:7], Onlooker()
    digits = replace(DIGITS, images=DIGITS.images.masked_fill(DIGITS.images == 190, 191))
    right = under_noise(model, digits, indices, [k / 20 for k in range(11)], order, 190)
    assert right == approx(11 * [(digits.labels[indices] == 0).double().mean().item()])
    plain = digits.normalise(digits.images[indices])
    white = digits.normalise(torch.tensor(190, dtype=torch.uint8))
    before = torch.zeros(7, 1, 28, 28, dtype=torch.bool)
    # int(784 ν): 39.2, 78.4, 117.6, 156.8, 196, 235.2, 274.4, 313.6, 352.8, 392
    expected = (0, 39, 78, 117, 156, 196, 235, 274, 313, 352, 392)
    for seen, count in zip(model.seen, expected, strict=True):
        noise = seen == white
        assert torch.equal(seen[~noise], plain[~noise])
        assert not (before & ~noise).any()  # what is white stays white
        before = noise
        assert noise.flatten(1).sum(1).tolist() == 7 * [count]


def test_activity():
    class Fixed(LayerNetwork):
        def forward(self, x):
            return super().forward(self.features[: len(x)])

    model = Fixed(nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))
    # 2 images, 3 maps of 2 × 2: 3 and 2 places are active, none of map 1
    model.features = torch.full((2, 3, 2, 2), -1.0)
    model.features[0, 0, 0, :] = 1
    model.features[0, 2, 1, 1] = 1
    model.features[1, 0, :, 1] = 1
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1.0, -1, 0, 1, -1]))  # 2 of 5 units, always the same
    active, dead, units = activity(model, DIGITS, DIGITS.validation[:2])
    assert active == approx([5 / 24, 2 / 5])
    assert (dead, units) == (1 + 3, 3 + 5)
    assert not any(layer._forward_hooks for layer in model)
