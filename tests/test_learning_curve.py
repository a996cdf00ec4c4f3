"""`studies.learning_curve`: how a curve falls, which epochs are seen, the peak."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from properties import refuses
from pytest import approx

from nn_backprop.data import load, subset
from nn_backprop.models import MLP, happy
from nn_backprop.studies import Recipe, StudyError, learning_curve
from nn_backprop.studies.learning_curve import (
    Watch,
    best_constant,
    epochs_seen,
    fall,
    train_watched,
)


def curve(left, epochs, highest=2.0, last=0.5):
    times = np.arange(epochs + 1) / epochs
    return [last + (highest - last) * left(u) for u in times]


def test_a_line_a_sigmoid_and_an_exponential():
    line, left = fall(curve(lambda u: 1 - u, 50), 2.0, 21)
    assert (line["start"], line["end"], line["share"]) == approx((5, 45, 0.8))
    assert line["line"] == approx(1) and line["sigmoid"] < 0.999
    assert left == approx(np.linspace(1, 0.1, 21).tolist())
    assert line["first"] == approx(1 / 9)

    sigmoid, _ = fall(curve(lambda u: 1 / (1 + np.exp((u - 0.4) / 0.03)), 500), 2.0, 21)
    late = 0.03 * math.log(9)  # 10 % and 90 % are so far from the middle
    expected = (500 * (0.4 - late), 500 * (0.4 + late), 2 * late, (0.4 - late) / (0.4 + late))
    found = [sigmoid[name] for name in ("start", "end", "share", "first")]
    assert found == approx(expected, rel=1e-3)
    assert sigmoid["sigmoid"] > 0.9999 > 0.9 > sigmoid["line"]

    exponential, _ = fall(curve(lambda u: math.exp(-20 * u), 2_000), 2.0, 21)
    first = math.log(1 / 0.9) / math.log(10)  # it fiddles less than a line
    assert exponential["first"] == approx(first, rel=1e-2) and first < 1 / 9


def test_what_is_above_the_best_constant_counts_as_that():
    plain = fall([2, 2, 2, 1, 0], 2.0, 21)
    assert (plain[0]["start"], plain[0]["end"]) == approx((2.2, 3.8))
    assert fall([9, 2.5, 2, 1, 0], 2.0, 21) == plain != fall([2, 2, 2, 1, 0], 1.0, 21)
    refuses("not below", fall, [3, 1, 2], 2.0, 21)


def test_the_best_constant():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 5])
    shares = torch.tensor([0.3, 0.2, 0.4, 0, 0, 0.1, 0, 0, 0, 0])
    for squared, model, output in (
        (True, happy(), shares),
        (False, MLP((784, 10)), shares.clamp(min=1e-12).log()),
    ):
        loss, error = best_constant(labels, squared)
        assert loss == approx(model.loss(output.expand(10, 10), labels).item(), rel=1e-5)
        assert error == approx(0.6)


def test_a_training_that_diverges_is_an_error():
    data, recipe = subset(load("digits"), 20, 0), Recipe((3,), 4, 1e30, 5, optimizer="sgd")
    with pytest.raises(StudyError, match=r"diverged, seeds \[0, 0\]: Recipe"):
        train_watched(recipe, [data, data], 0, [{}, {}])


def test_epochs_that_are_seen():
    assert epochs_seen(3) == (1, 2, 3)
    many = epochs_seen(1_500)
    assert many[:7] == (1, 2, 3, 4, 5, 6, 9) and many[-1] == 1_500
    assert all(6 < b <= 1.5 * a for a, b in pairwise(many[5:]))


def test_the_network_at_the_peak_is_kept(monkeypatch):
    """The accuracies of validation are made up; the second look has the highest."""
    data = subset(load("digits"), 100, 0)
    first = {"first": lambda model: model.layers[0].bias[0].item()}
    watch = Watch(Recipe((5,), 30, 1e-3, 10), 0, data, first)
    assert watch.grid[:4] == (1, 2, 3, 4) and len(data.validation) == 300
    right = [torch.arange(300) < correct for correct in (90, 120, 60, 120)]
    judge, biases = learning_curve.judge, []

    def made_up(model, inputs, labels):
        if len(inputs) == 300:  # validation
            biases.append(model.layers[0].bias[0].item())
            return 1.0, right.pop(0)
        return judge(model, inputs, labels)

    monkeypatch.setattr(learning_curve, "judge", made_up)
    for epoch in range(5):
        with torch.no_grad():
            for parameter in watch.model.parameters():
                parameter.add_(1)
        watch.look(epoch)
    assert watch.seen["validation_accuracy"] == approx([0.3, 0.4, 0.2, 0.4])
    assert watch.peak == 1 and watch.at_peak.layers[0].bias[0].item() == biases[1]
    assert len(watch.losses) == 5 and len(biases) == 4
    found, accuracies = watch.numbers(), watch.accuracies
    assert (found["first"], found["first_at_peak"]) == (biases[3], biases[1])
    assert found["peak_epoch"] == 2 and found["train_loss"] == watch.losses[-1]
    names = ("train_accuracy", "train_accuracy_at_peak")
    assert [found[name] for name in names] == [accuracies[4], accuracies[2]]
