"""The network that is built to fit any points: what it gives, how large it is, what it refuses."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nn_backprop.models import memorise
from nn_backprop.models import memoriser as module
from nn_backprop.models.counting import parameters


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_three_points_by_hand():
    points = torch.tensor([[4.0], [1.0], [2.0]], dtype=torch.float64)
    targets = torch.tensor([-1.0, 3.0, 5.0], dtype=torch.float64)
    model = memorise(points, targets, torch.ones(1, dtype=torch.float64))
    # Biases: 1 − 1 − |1|, then a quarter of the way from 1 to 2 and from 2 to 4. From the top down:
    # 2 w1 = 3; 3 w1 + 0.75 w2 = 5; 5 w1 + 2.75 w2 + 1.5 w3 = −1.
    expected = [3 / 2, 2 / 3, (-1 - 15 / 2 - 11 / 6) / (3 / 2)]
    assert_close(model.bias.data, torch.tensor([-1.0, 1.25, 2.5], dtype=torch.float64))
    assert_close(model.weight.data, torch.tensor(expected, dtype=torch.float64))
    between = model(torch.tensor([[1.1], [2.2]], dtype=torch.float64))
    assert_close(between.data, torch.tensor([3.15, 4.8 + 0.95 * 2 / 3], dtype=torch.float64))


@pytest.mark.parametrize("n, shape", [(1, (5,)), (2, (1,)), (31, (7,)), (53, (1, 3, 5))])
def test_it_fits_any_points_with_2n_plus_d_parameters(n, shape):
    points, targets, direction = drawn(n, *shape), drawn(n, seed=1), drawn(*shape, seed=2).flatten()
    model = memorise(points, targets, direction)
    assert_close(model(points).data, targets, rtol=0, atol=1e-9)
    assert parameters(model) == 2 * n + direction.numel()
    projections = (points.flatten(1) @ direction).sort().values
    assert (model.bias < projections).all() and (model.bias[1:] > projections[:-1]).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_points_does_not_matter(scale):
    points, targets = scale * drawn(31, 7), drawn(31, seed=1)
    model = memorise(points, targets, drawn(7, seed=2))
    assert_close(model(points).data, targets, rtol=0, atol=1e-9)


def test_many_labels_are_right_and_past_the_middle_none_would_be(monkeypatch):
    points, direction = drawn(2_000, 11), drawn(11, seed=2)
    labels = torch.randint(10, (2_000,), generator=torch.Generator().manual_seed(1)).double()
    model = memorise(points, labels, direction)
    assert (model(points) - labels).abs().max() < 1e-3
    monkeypatch.setattr(module, "PLACE", 0.75)
    failed = memorise(points, labels, direction)(points)
    assert not ((failed - labels).abs().max() < 1e-3)  # it is not a number


def test_equal_points_are_named():
    points = drawn(500, 784)
    points[317] = points[41]
    targets, direction = drawn(500, seed=1), drawn(784, seed=2)
    with pytest.raises(ValueError, match=r"points (41 and 317|317 and 41) .*the same point"):
        memorise(points, targets, direction)
    points[317, 3] += 1e-3
    assert_close(memorise(points, targets, direction)(points).data, targets, rtol=0, atol=1e-6)


def test_different_points_with_one_projection_are_named():
    points = torch.tensor([[1.0, 5.0], [2.0, 3.0], [1.0, 7.0]], dtype=torch.float64)
    targets = drawn(3)
    with pytest.raises(ValueError, match=r"points (0 and 2|2 and 0) .*try another direction"):
        memorise(points, targets, torch.tensor([1.0, 0.0], dtype=torch.float64))
    model = memorise(points, targets, torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert_close(model(points).data, targets)


@pytest.mark.parametrize(
    "points, targets, direction, named",
    [
        (drawn(5, 3).float(), drawn(5), drawn(3), "must be float64"),
        (drawn(5, 3), drawn(5).long(), drawn(3), "must be float64"),
        (drawn(5, 3), drawn(5), drawn(3).float(), "must be float64"),
        (drawn(0, 3), drawn(0), drawn(3), "n at least 1"),
        (drawn(5, 3), drawn(7), drawn(3), r"not \(5, 3\), \(7,\) and \(3,\)"),
        (drawn(5, 3), drawn(5), drawn(2), r"not \(5, 3\), \(5,\) and \(2,\)"),
    ],
)
def test_what_it_refuses_is_named(points, targets, direction, named):
    with pytest.raises(ValueError, match=named):
        memorise(points, targets, direction)
