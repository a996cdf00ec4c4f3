"""`models.kernel_machines`, and the two variants that its study makes of a whole data set."""

import pytest
import torch
from properties import same
from torch.testing import assert_close

from nn_backprop.data import ImageData, quarter_shifted, varied
from nn_backprop.data.images import mean_and_std
from nn_backprop.layers import median_distance, random_patches
from nn_backprop.models.kernel_machines import (
    half_median_distance,
    kernel_ridge,
    kernel_svm,
    ridge,
    share_right,
)


def grouped(n=32):
    """Random images of 5 × 7 pixels, brighter by class, with the splits in the order of classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 100, (3 * n, 1, 5, 7), generator=generator)
    labels = torch.arange(n).mul(10).div(n, rounding_mode="floor").repeat(3)
    images += 15 * labels[:, None, None, None]
    splits = torch.arange(3 * n).split(n)
    return ImageData("made up", "", images.to(torch.uint8), labels, *splits, 0.4, 0.3)


def test_a_quarter_of_the_test_digits_moves_in_all_directions():
    data = grouped()
    assert torch.equal(quarter_shifted(data, 0).images, data.images)
    moved = quarter_shifted(data, 2).images
    before, after = data.images[data.test, 0], moved[data.test, 0]
    assert torch.equal(after[0, :3], before[0, 2:]) and torch.equal(after[4, 2:], before[4, :3])
    assert torch.equal(after[8, :, :5], before[8, :, 2:])
    assert torch.equal(after[12, :, 2:], before[12, :, :5])
    changed = (moved != data.images).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, data.test[::4])


def test_sigma_is_that_of_digits_of_all_classes():
    data = grouped(20_000)
    images, _ = data.batch(data.train)
    of_all = median_distance(images) / 2
    assert half_median_distance(data, 0) == pytest.approx(of_all, rel=0.03)
    assert median_distance(images[:5000]) / 2 < 0.9 * of_all  # three classes
    patches = random_patches(images, 5, 20_000)
    of_all = median_distance(patches) / 2
    assert half_median_distance(data, 0, 5) == pytest.approx(of_all, rel=0.03)


def test_the_ridge_solves_its_equations():
    data = grouped(50)
    images, labels = data.batch(data.train, torch.float64)
    z = torch.cat([images.flatten(1), torch.ones(50, 1, dtype=torch.float64)], 1)
    y = torch.eye(10, dtype=torch.float64)[labels] - 0.1
    for strength in (1e-3, 10.0):
        # |z w − y|² + s |w|², where s is `strength` times the mean of |z|²: s as rows of their own.
        root = (strength * z.square().sum(1).mean()).sqrt() * torch.eye(36).double()
        equations = torch.cat([z, root]), torch.cat([y, y.new_zeros(36, 10)])
        expected = z @ torch.linalg.lstsq(*equations).solution
        found = ridge(lambda x: x.flatten(1), data, strength)(images.float())
        assert_close(found.double(), expected, rtol=1e-3, atol=1e-4, msg=f"{strength}: ".__add__)


def test_the_exact_kernel_machines():
    """With hardly any ridge, or at a high cost, a narrow kernel knows its training images."""
    data = grouped(50)
    sigma = half_median_distance(data, 0) / 4
    x, labels = data.batch(data.train, torch.float64)
    scores = kernel_ridge(data, sigma, 1e-9)(x)
    assert_close(scores, torch.eye(10).double()[labels] - 0.1, rtol=0, atol=1e-4)
    # (K + λ I) α = Y, with λ = 2 s
    k = torch.exp(-(torch.cdist(x.flatten(1), x.flatten(1)) ** 2) / (2 * sigma**2)) + 1
    alpha = torch.linalg.solve(k + 0.6 * torch.eye(50), torch.eye(10).double()[labels] - 0.1)
    assert_close(kernel_ridge(data, sigma, 0.3)(x), k @ alpha, rtol=1e-6, atol=1e-6)
    svm = kernel_svm(data, sigma, 1e3)
    assert torch.equal(svm(x.float()).argmax(1), labels)
    assert share_right(svm, data, data.train) == 1
    assert share_right(lambda x: torch.eye(10)[[3] * len(x)], data, data.train) == 0.1


def test_every_split_is_varied_apart():
    data, seen = grouped(), []

    def make(images, seed):
        seen.append((images, seed))
        return 255 - images

    made = varied(data, make, 7)
    assert torch.equal(made.images, 255 - data.images) and made.labels is data.labels
    splits = (data.train, data.validation, data.test)
    assert same(seen, [(data.images[of], 21 + k) for k, of in enumerate(splits)])
    assert (made.mean, made.std) == mean_and_std(made.images[data.train])
