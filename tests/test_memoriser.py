"""The network that is built to fit any points: what it gives, how large it is, what it refuses."""

import torch
from properties import refuses
from pytest import approx
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
    assert model.bias.tolist() == approx([-1.0, 1.25, 2.5])
    assert model.weight.tolist() == approx(expected)
    between = model(torch.tensor([[1.1], [2.2]], dtype=torch.float64))
    assert between.tolist() == approx([3.15, 4.8 + 0.95 * 2 / 3])


def test_it_fits_any_points_with_2n_plus_d_parameters():
    for n, shape, scale in (
        (1, (5,), 1), (2, (1,), 1), (31, (7,), 1), (53, (1, 3, 5), 1), (31, (7,), 1e-12),
        (31, (7,), 1e12),
    ):  # fmt: skip
        points, targets = scale * drawn(n, *shape), drawn(n, seed=1)
        direction = drawn(*shape, seed=2).flatten()
        model = memorise(points, targets, direction)
        assert_close(model(points).data, targets, rtol=0, atol=1e-9)
        assert parameters(model) == 2 * n + direction.numel(), (n, shape, scale)
        projections = (points.flatten(1) @ direction).sort().values
        assert (model.bias < projections).all() and (model.bias[1:] > projections[:-1]).all()


def test_many_labels_are_right_and_past_the_middle_none_would_be(monkeypatch):
    points, direction = drawn(2_000, 11), drawn(11, seed=2)
    labels = torch.randint(10, (2_000,), generator=torch.Generator().manual_seed(1)).double()
    for place, fits in ((module.PLACE, True), (0.75, False)):
        monkeypatch.setattr(module, "PLACE", place)
        off = (memorise(points, labels, direction)(points) - labels).abs().max().item()
        assert (off < 1e-3) == fits  # past the middle it is not a number


def test_what_it_refuses_is_named():
    for points, targets, direction, named in (
        (drawn(5, 3).float(), drawn(5), drawn(3), "must be float64"),
        (drawn(5, 3), drawn(5).long(), drawn(3), "must be float64"),
        (drawn(5, 3), drawn(5), drawn(3).float(), "must be float64"),
        (drawn(0, 3), drawn(0), drawn(3), "n at least 1"),
        (drawn(5, 3), drawn(7), drawn(3), r"not \(5, 3\), \(7,\) and \(3,\)"),
        (drawn(5, 3), drawn(5), drawn(2), r"not \(5, 3\), \(5,\) and \(2,\)"),
    ):
        refuses(named, memorise, points, targets, direction)
    # Two points that are equal, and two of one projection.
    points, targets, direction = drawn(500, 784), drawn(500, seed=1), drawn(784, seed=2)
    points[317] = points[41]
    refuses(
        r"points (41 and 317|317 and 41) .*the same point", memorise, points, targets, direction
    )
    points[317, 3] += 1e-3
    assert_close(memorise(points, targets, direction)(points).data, targets, rtol=0, atol=1e-6)
    points = torch.tensor([[1.0, 5.0], [2.0, 3.0], [1.0, 7.0]], dtype=torch.float64)
    targets, (across, slanted) = drawn(3), torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
    sentence = r"points (0 and 2|2 and 0) .*try another direction"
    refuses(sentence, memorise, points, targets, across)
    assert_close(memorise(points, targets, slanted)(points).data, targets)
