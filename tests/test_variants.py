"""Data sets made from another."""

import pytest
import torch

from nn_backprop import data
from nn_backprop.data.images import mean_and_std


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (-1, 0), (0, 3), (0, -2), (-4, 1)])
def test_a_shifted_pixel_stands_where_it_was_moved_to(down, right):
    image = torch.arange(1, 5 * 7 + 1, dtype=torch.uint8).view(1, 1, 5, 7)
    moved = data.shift(image, down, right)
    for i in range(5):
        for j in range(7):
            inside = 0 <= i - down < 5 and 0 <= j - right < 7
            expected = image[0, 0, i - down, j - right] if inside else 0
            assert moved[0, 0, i, j] == expected


def test_a_shift_beyond_the_image_leaves_black():
    image = torch.full((2, 1, 5, 7), 9, dtype=torch.uint8)
    assert not data.shift(image, 5, 0).any() and not data.shift(image, 0, -8).any()


def test_a_halved_image_keeps_its_grey(digits):
    small = data.resize(digits.images[:100], 14)
    assert small.shape == (100, 1, 14, 14) and small.dtype == torch.uint8
    assert abs(small.float().mean() - digits.images[:100].float().mean()) < 0.5
    assert data.resize(digits.images, 28) is digits.images
    assert data.resize(digits.images[:3], 16, 13).shape == (3, 1, 16, 13)
    grey = torch.full((1, 1, 28, 28), 77, dtype=torch.uint8)
    assert (data.resize(grey, 16) == 77).all()


def test_a_subset_has_as_many_of_each_class(digits):
    part = data.subset(digits, 50, seed=3)
    assert torch.bincount(digits.labels[part.train]).tolist() == [5] * 10
    assert len(set(part.train.tolist())) == 50
    assert set(part.train.tolist()) <= set(digits.train.tolist())
    assert (part.mean, part.std) == mean_and_std(digits.images[part.train])
    assert torch.equal(part.test, digits.test)
    assert torch.equal(part.train, data.subset(digits, 50, seed=3).train)
    assert not torch.equal(part.train, data.subset(digits, 50, seed=4).train)
    assert data.subset(digits, len(digits.train), seed=0) is digits
    with pytest.raises(ValueError, match="training examples, not 1000"):
        data.subset(digits, 10_000, seed=0)


def test_data_take_the_form_that_a_model_was_specified_for(digits):
    class Plain:
        pass

    class Small:
        image_size, normalisation = 16, (0.5, 0.5)

    assert torch.equal(data.suited(digits, Plain()).images, digits.images)
    assert data.suited(digits, Plain()).mean == digits.mean
    small = data.suited(digits, Small())
    inputs, _ = small.batch(small.train)
    assert inputs.shape[1:] == (1, 16, 16)
    assert inputs.min() == -1 and inputs.max() <= 1
