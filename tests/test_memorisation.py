"""Data without meaning, critical samples, how examples differ, how much is stored in what width."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pytest import approx
from test_studies import splits_of

from nn_backprop.data import ImageData, load
from nn_backprop.data.meaningless import FALSE_LABELS, KINDS, meaningless
from nn_backprop.models import MLP
from nn_backprop.studies import Recipe, StudyError
from nn_backprop.studies.memorisation import (
    Starts,
    critical_share,
    difficulty,
    least_widths,
    stored_bits,
)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load("digits")


def test_every_kind_of_data(data):
    plain, before = meaningless(data, "true", 100, 3), data
    greys = {}
    for kind in KINDS:
        made = meaningless(data, kind, 100, 3)
        parts, wholes = splits_of(made), splits_of(data)
        assert [len(part) for part in parts] == [100, 300, 300], kind
        assert all(part <= whole for part, whole in zip(parts, wholes, strict=True)), kind
        assert torch.equal(made.train, plain.train), kind
        for held_out in (made.validation, made.test):
            assert torch.equal(made.labels[held_out], data.labels[held_out]), kind
        greys[kind] = made.images.flatten(1)[made.train]
        shares = greys[kind].numpy() / 255
        assert (made.mean, made.std) == approx((shares.mean(), shares.std())), kind
        false = made.labels != data.labels
        share = FALSE_LABELS.get(kind, 0)
        assert 80 * share <= false[made.train].sum() <= 100 * share  # one in ten gets its own again
        if kind in FALSE_LABELS:
            assert torch.equal(made.images, data.images), kind
            kept = before.labels != data.labels  # more noise keeps the false labels of less
            assert torch.equal(made.labels[kept], before.labels[kept]), kind
            before = made
        else:
            for part in (made.train, made.validation, made.test):
                assert (made.images[part] != data.images[part]).flatten(1).any(1).all(), kind
    assert [*FALSE_LABELS.values()] == [0, 0.2, 0.4, 0.6, 0.8, 1] and len(KINDS) == 6 + 3
    # One order for all: pixels that are alike in the digits stay so, as columns.
    columns = [{tuple(column) for column in greys[kind].T.tolist()}
               for kind in ("true", "shuffled pixels", "random pixels")]  # fmt: skip
    assert columns[0] == columns[1] != columns[2]
    other = meaningless(data, "random labels", 100, 4)
    assert not torch.equal(before.train, other.train)
    assert not torch.equal(before.labels[before.train], other.labels[other.train])


def test_critical_samples_of_a_linear_network(data):
    """Its margin falls by at most r ‖∂margin/∂x‖₁ in the box: then the class changes."""
    model = MLP((784, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.layers[0].weight[0] = torch.where(torch.arange(784) % 2 == 0, 1.0, -1.0)
    images, place = data.images.clone(), data.validation[:4]
    images[place] = 0
    images[place, 0, 0, ::2] = torch.tensor([[3], [20], [200], [255]], dtype=torch.uint8)
    # In greys the margins are 14 × the grey: 42, 280, 2,800 and 3,570; and ‖·‖₁ is 784.
    made = replace(data, images=images)

    for which, factor, expected in (
        (slice(0, 1), 1, 1), (slice(1, 2), 1, 0), (slice(2, 3), 1, 0),  # by .3 × 784 = 235.2
        (slice(1, 2), 10, 1), (slice(2, 3), 10, 0), (slice(0, 4), 10, 0.5),  # by 2,352
    ):  # fmt: skip
        with torch.set_grad_enabled(factor == 1):
            noise = torch.Generator().manual_seed(0)
            assert critical_share(model, made, place[which], factor, noise) == expected, which
    assert all(p.grad is None for p in model.parameters())


def test_how_examples_differ():
    right = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    mean, deviation, binomial = difficulty(right)
    assert (mean, deviation) == approx((0.5, np.std([1, 2 / 3, 0, 1 / 3], ddof=1)))
    assert binomial == approx((0.25 / 3) ** 0.5)


def test_half_are_right_in_the_epoch_that_counts(data):
    def numbers(epochs):
        recipe = Recipe((8,), epochs, 3e-3, 10, schedule="constant")
        made = meaningless(data, "true", 100, 1)
        starts = Starts([recipe.network(seed) for seed in range(5)], made)
        recipe.train(starts.models, made, range(5), on_epoch=starts.look)
        return starts.numbers()

    found = numbers(40)
    assert found["half_reached"] == 5 and found["one_mean"] < 0.5 <= found["half_mean"] < 0.7
    short = numbers(1)
    assert short["half_reached"] == 0 and short["half_mean"] == short["one_mean"]


def test_stored_bits_are_the_mutual_information_of_labels_and_answers():
    assert stored_bits(700, 0) == approx(700 * math.log2(10))
    for wrong in (1, 30, 350, 630, 699):
        e = wrong / 700
        joint = torch.full((10, 10), e / 90, dtype=torch.float64)  # label, answer
        joint.fill_diagonal_((1 - e) / 10)
        apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        information = (joint * (joint / apart).log2()).sum().item()
        assert stored_bits(700, wrong) == approx(700 * information, abs=1e-9), wrong
    assert stored_bits(700, 700) == approx(700 * math.log2(10 / 9))


@given(least=st.lists(st.integers(1, 70), min_size=1, max_size=5), first=st.integers(1, 40))
@example(least=[1, 5, 2], first=4)
def test_the_search_finds_each_least_width_and_asks_once(least, first):
    asked = []

    def wrong(width):
        asked.append(width)
        return [of_one - width for of_one in least]

    found, tried = least_widths(wrong, 0, first, 10**6)
    assert found == least and set(tried) == set(asked)
    assert len(asked) == len(set(asked)) and max(asked) < 2 * max(first, *least)


def test_a_search_may_jump_must_end_and_allows_some_to_be_wrong():
    def wrong(width):  # more units are not always better
        return [0 if width in (2, 3, 6, 7) or width > 8 else 5]

    ((found,), _) = least_widths(wrong, 4, 1, 1_000)
    assert wrong(found) == [0] and wrong(found - 1) == [5]
    assert least_widths(wrong, 5, 1, 1_000)[0] == [1]
    with pytest.raises(StudyError, match="no width up to 1024 has at most"):
        least_widths(lambda width: [30, 30], 0.3, 1, 1_024)
