"""Data sets made from another."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from properties import refuses

from nn_backprop import data
from nn_backprop.data.images import mean_and_std


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_a_shifted_pixel_stands_where_it_was_moved_to():
    image = torch.arange(1, 5 * 7 + 1, dtype=torch.uint8).view(1, 1, 5, 7)
    for down, right in [(0, 0), (2, 0), (-1, 0), (0, 3), (0, -2), (-4, 1), (5, 0), (0, -8)]:
        moved = data.shift(image.expand(2, 1, 5, 7), down, right)
        for i, j in product(range(5), range(7)):
            inside = 0 <= i - down < 5 and 0 <= j - right < 7
            expected = image[0, 0, i - down, j - right] if inside else 0
            assert (moved[:, 0, i, j] == expected).all(), (down, right)


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
    assert len(digits.labels[part.train[:20]].unique()) > 5  # not one class after the other
    assert torch.equal(part.train, data.subset(digits, 50, seed=3).train)
    assert not torch.equal(part.train, data.subset(digits, 50, seed=4).train)
    assert data.subset(digits, len(digits.train), seed=0) is digits
    for n in (0, -5):
        refuses("an example or more", data.subset, digits, n, seed=0)
    refuses("training examples, not 1000", data.subset, digits, 10_000, seed=0)


def test_data_take_the_form_that_a_model_was_specified_for(digits):
    plain = data.suited(digits, SimpleNamespace())
    assert torch.equal(plain.images, digits.images) and plain.mean == digits.mean
    small = data.suited(digits, SimpleNamespace(image_size=16, normalisation=(0.5, 0.5)))
    inputs, _ = small.batch(small.train)
    assert inputs.shape[1:] == (1, 16, 16)
    assert inputs.min() == -1 and inputs.max() <= 1


# --- harder ones ---


def test_a_variant_is_new_uint8_and_depends_on_the_seed_alone(digits):
    images = digits.images[:50]
    before = images.clone()
    for variant in (data.rotated, data.on_noise, data.on_clutter, data.shuffled_pixels,
                    data.random_pixels):  # fmt: skip
        made = variant(images, 3)
        assert made.dtype == torch.uint8 and made.shape == images.shape
        assert torch.equal(images, before) and not torch.equal(made, images), variant
        torch.manual_seed(11)
        assert torch.equal(made, variant(images, 3)), variant
        assert not torch.equal(made, variant(images, 4)), variant


def test_rotated_images_are_turned_about_their_middle(monkeypatch):
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 0, 1], image[0, 0, 2, 2] = 100, 200
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.25))
    turned = data.rotated(image, 0)
    quarters = [torch.rot90(image, k, (2, 3)) for k in (1, 3)]
    assert any(torch.equal(turned, quarter) for quarter in quarters)


def test_rotation_keeps_a_disc_and_draws_all_angles(digits):
    i, j = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    disc = (250 * torch.exp(-(i**2 + j**2) / 50)).to(torch.uint8).expand(400, 1, 28, 28)
    assert (data.rotated(disc, 0).int() - disc.int()).abs().max() <= 4
    # A dot to the right of the middle ends as often in each quarter of the plane.
    dot = torch.zeros(4000, 1, 29, 29, dtype=torch.uint8)
    dot[:, :, 14, 22:25] = 255
    turned = data.rotated(dot, 0).float()
    lower, right = turned[..., 15:, :].sum((1, 2, 3)), turned[..., 15:].sum((1, 2, 3))
    below = lower > turned[..., :14, :].sum((1, 2, 3))
    beside = right > turned[..., :14].sum((1, 2, 3))
    for quarter in (below & beside, below & ~beside, ~below & beside, ~below & ~beside):
        assert 0.22 < quarter.float().mean() < 0.28


def test_noise_lies_behind_the_digit(digits):
    images = digits.images[:200]
    noisy = data.on_noise(images, 0)
    assert (noisy >= images).all()
    assert (noisy[images == 255] == 255).all()
    background = noisy[images == 0].double()
    assert abs(background.mean() - 127.5) < 1 and abs(background.std() - 73.9) < 1
    assert background.min() == 0 and background.max() == 255


def test_clutter_is_pieces_of_the_other_images(digits):
    """Each image has a grey value of its own, so that every pixel tells where it came from."""
    images = torch.arange(1, 12, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 1, 9, 7)
    for seed in range(20):
        seen = data.on_clutter(images, seed, pieces=1, side=3)
        for n, image in enumerate(seen[:, 0]):
            strewn = image != n + 1
            assert (image[strewn] > n + 1).all()  # the brightest is seen
            if strewn.any():
                i, j = strewn.nonzero(as_tuple=True)
                assert len(i) == 9 and i.max() - i.min() == j.max() - j.min() == 2
                assert len(image[strewn].unique()) == 1
    places = (data.on_clutter(images.contiguous(), 0, pieces=400, side=3)[0, 0] == 11).sum()
    assert places == 63  # every place is reached, and the brightest other image too
    images = digits.images[:300]  # clutter adds up
    few, many = (data.on_clutter(images, 0, pieces=n).float().mean() for n in (2, 12))
    assert images.float().mean() < few < many
    for side in (0, 29):
        refuses("side must be from 1 to 28", data.on_clutter, images, 0, side=side)
    refuses("only one", data.on_clutter, images[:1], 0)


# --- noise ---


def test_shuffled_pixels_are_one_permutation_and_random_ones_one_for_each_image(digits):
    positions = torch.arange(77, dtype=torch.uint8).view(1, 1, 7, 11)
    order = data.shuffled_pixels(positions, 3).flatten().long()
    assert sorted(order.tolist()) == list(range(77))
    again = data.shuffled_pixels((2 * positions).expand(5, 1, 7, 11), 3)
    assert torch.equal(again.flatten(1), (2 * order).to(torch.uint8).expand(5, 77))
    images = digits.images[:50]
    random = data.random_pixels(images, 3)
    assert torch.equal(random.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    orders = data.random_pixels(positions.expand(50, 1, 7, 11), 3).flatten(1)
    assert len(orders.unique(dim=0)) == 50


def test_gaussian_images_have_mean_and_covariance_up_to_one_affine_map():
    torch.manual_seed(0)
    mixed = torch.randn(20_000, 6) @ torch.randn(6, 6)  # correlated
    bytes_ = (mixed * 12 + 120).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 2, 3)
    of = torch.arange(0, 20_000, 2)
    drawn = data.gaussian_images(bytes_, 5, of)
    assert drawn.shape == bytes_.shape and drawn.dtype == torch.uint8
    assert (drawn.min(), drawn.max()) == (0, 255)
    wanted, got = (x.flatten(1).double() for x in (bytes_[of], drawn))
    scale = (got.var(0).sum() / wanted.var(0).sum()).sqrt()
    # A variance is off by √(2/10,000) = 1.4 %, a mean by 1 % of a deviation; five times that.
    assert torch.allclose(got.T.cov(), wanted.T.cov() * scale**2, atol=0.07 * got.var(0).max())
    moved = got.mean(0) - wanted.mean(0) * scale
    assert (moved - moved.mean()).abs().max() < 0.05 * got.std(0).max()
    for one in drawn.flatten(1).T:  # normal: 31.7 % of it is beyond one deviation
        z = (one.double() - one.double().mean()) / one.double().std()
        assert abs((z.abs() > 1).double().mean() - 0.317) < 0.03
    assert torch.equal(drawn, data.gaussian_images(bytes_, 5, of))
    assert not torch.equal(drawn, data.gaussian_images(bytes_, 6, of))


def test_random_labels_are_drawn_for_a_share_of_the_training_examples(digits):
    n = len(digits.train)
    for share in (0, 0.2, 1):
        noisy = data.random_labels(digits, share, 3)
        assert torch.equal(noisy.images, digits.images) and torch.equal(noisy.train, digits.train)
        for split in (digits.validation, digits.test):
            assert torch.equal(noisy.labels[split], digits.labels[split])
        changed = (noisy.labels != digits.labels)[digits.train].float().mean()
        assert abs(changed - 0.9 * share) < 4 * (0.09 * max(share, 0.01) / n) ** 0.5, share
        assert torch.equal(noisy.labels, data.random_labels(digits, share, 3).labels)
        other = data.random_labels(digits, share, 4)
        assert torch.equal(noisy.labels, other.labels) == (share == 0)
    # with a share of 1, what is drawn says nothing of the true class
    places = digits.labels[digits.train], noisy.labels[digits.train]
    counts = torch.zeros(10, 10).index_put_(places, torch.ones(n), True)
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 140  # of 81 degrees: below 113, 99 %
    for share in (-0.1, 1.1, float("nan")):
        refuses("share must be from 0 to 1", data.random_labels, digits, share, 0)
