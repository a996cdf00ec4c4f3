"""`experiments/first_layer.py`: run with --smoke; Moran's I by hand; claims, of made-up rows."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke_rows

from nn_backprop.data import load
from nn_backprop.models import CNN, happy
from nn_backprop.studies import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import first_layer as study

SOURCE, ALL, FEW, RANDOM, FILTERS = study.KINDS
PASSES = 4


@pytest.mark.slow
def test_the_study(tmp_path):
    found, claims = smoke_rows("first_layer", tmp_path)
    by = found.by("kind", "seed")
    assert set(by) == {(kind, seed) for kind in study.KINDS for seed in (0, 1)}
    for (kind, _), (row,) in by.items():
        assert row["dataset"] == "digits"
        assert row["examples"] == (399 if kind in (FEW, RANDOM) else 1197)
        assert 0 <= row["train_accuracy"] <= 1 and 0 <= row["test_accuracy"] <= 1
        if kind in (SOURCE, FILTERS):
            assert row["test_accuracy"] > 0.6  # chance is 0.1
        assert len(row["morans_i"]) == 1 + PASSES and max(map(abs, row["morans_i"])) < 1.1
        assert abs(row["morans_i"][0]) < (0.2 if kind == FILTERS else 0.05)  # noise
        N = 25 if kind == FILTERS else row["area_pixels"]
        assert row["morans_i_shuffled"] == approx(-1 / (N - 1), abs=0.01)
        assert 0 <= row["beyond_all_shuffles"] <= 1 and 0.5 < row["digits_i"] < 1
        assert ("energy" in row) == (kind != FILTERS)
        for energy in ("energy", "energy_in_area"):
            if kind != FILTERS:
                assert len(row[energy]) == 1 + PASSES and 0.8 < row[energy][0] < 1.2
    assert len(claims) == 13
    (last,) = (claim for words, claim in claims.items() if words.startswith("few images"))
    few, random = ([by[kind, seed].one("morans_i")[-1] for seed in (0, 1)]
                   for kind in (FEW, RANDOM))  # fmt: skip
    assert last["measured"] == approx((sum(few) - sum(random)) / 2)
    # What the page says of pixels that are black in all training images.
    data = load("digits", say=lambda line: None)
    black = (data.images[data.train, 0] == 0).all(0).numpy()
    assert black.sum() > 5
    source, ours = (np.load(found.folder / f"weights-{number}.npy") for number in (0, 1))
    assert source.shape == ours.shape == (1 + PASSES, 16, 28, 28)
    assert (source[0] == source[-1])[:, black].all() and np.abs(source[-1] - source[0]).max() > 0.1
    moved = (ours[-1] - ours[0])[:, black]
    assert np.abs(moved).max() > 0.01
    assert np.ptp(moved, axis=1) == approx(np.zeros(16), abs=1e-4)


def test_what_each_network_learns_is_not_what_it_is_tested_on(tmp_path):
    data = {name: study.data_for(study.Job(name, 3, study.Options(smoke=True), tmp_path))
            for name in study.KINDS}  # fmt: skip
    for name, of in data.items():
        splits = [set(split.tolist()) for split in (of.train, of.validation, of.test)]
        assert sum(map(len, splits)) == len(set.union(*splits))
        assert (of.mean, of.std) == (0, 1) if name == SOURCE else of.mean > 0.1
    few, random, whole = data[FEW], data[RANDOM], data[ALL]
    assert few.train.equal(random.train) and few.images is random.images
    changed = (random.labels != whole.labels).nonzero().flatten()
    assert set(changed.tolist()) <= set(few.train.tolist())
    assert 0.8 < len(changed) / len(few.train) < 0.98
    assert few.labels.equal(whole.labels)


def test_the_first_layer_as_images_is_a_copy():
    for model, shape in ((happy(), (16, 28, 28)), (CNN(), (16, 5, 5))):
        weights = study.first_weights(model)
        assert weights.shape == shape
        first = next(model.parameters())
        assert weights.flatten().equal(first.flatten())
        with torch.no_grad():
            first.add_(1)
        assert not weights.flatten().equal(first.flatten())
    weights = study.first_weights(model := happy())
    assert weights[3, 2, 5] == model.layers[0].weight[3, 2 * 28 + 5]


# --- Moran's I ---


def morans_i(values, area=None):
    images = torch.tensor(values, dtype=torch.float32)[None]
    area = torch.ones(images.shape[1:]) if area is None else torch.tensor(area)
    return study.morans_i(images, area.bool()).item()


def test_morans_i_by_hand():
    assert morans_i([[1, -1], [-1, 1]]) == approx(-1)  # a chessboard: 4/8 · 2·(−4) / 4
    # deviations −3, −1, 1, 3: pairs 3 − 1 + 3 = 5, 4/6 · 2·5 / 20
    assert morans_i([[2, 4, 6, 8]]) == approx(1 / 3)
    # 4 · · / 0 5 9, without the dots: mean 4.5, deviations −.5, −4.5, .5, 4.5; pairs 4–0, 0–5, 5–9
    # give 2.25 − 2.25 + 2.25, 4/6 · 2·2.25 / 41
    corner = [[4, 77, -7], [0, 5, 9]], [[1, 0, 0], [1, 1, 1]]
    assert morans_i(*corner) == approx(4 / 6 * 4.5 / 41)


def test_morans_i_as_the_formula_says_pair_by_pair():
    images = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    area = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    places = area.nonzero()
    w = ((places[:, None] - places).abs().sum(2) == 1).double()
    x = images[:, area].double()
    x -= x.mean(1, keepdim=True)
    expected = len(places) / w.sum() * (x @ w * x).sum(1) / x.square().sum(1)
    assert study.morans_i(images, area).numpy() == approx(expected.numpy())
    assert study.morans_i(5 - 3 * images, area).numpy() == approx(expected.numpy())


def test_a_shuffle_keeps_what_is_inside_and_leaves_the_rest():
    images = torch.arange(2 * 60.0).view(2, 6, 10)
    area = torch.zeros(6, 10).bool()
    area[1:5, 2:9] = True
    mixed = study.shuffled(images, area, seed=0)
    assert mixed[:, ~area].equal(images[:, ~area])
    assert mixed[:, area].sort().values.equal(images[:, area])
    assert not (mixed[1] - 60).equal(mixed[0])  # each in an order of its own
    assert not study.shuffled(images, area, seed=1).equal(mixed)


def test_the_area_and_its_middle():
    images = torch.zeros(200, 28, 28, dtype=torch.uint8)
    images[0, 0, 0] = 255  # 0.5 %
    images[:2, 3, 4] = 1  # 1 %
    images[:, 9, 9] = 7
    assert study.digits_area(images).nonzero().tolist() == [[3, 4], [9, 9]]
    middle = study.middle_of(torch.zeros(28, 28).bool())
    assert middle[7:21, 7:21].all() and middle.sum() == 14 * 14


def test_the_energy_of_the_middle_by_hand():
    weight, inside = torch.ones(3, 28, 28), torch.ones(28, 28).bool()
    weight[:, 7:21, 7:21] = 3  # 9 against 1
    middle = study.middle_of(inside)
    assert study.energy_ratio(weight, middle, inside) == approx(9)
    weight[:, :7] = 50
    inside[:7] = False
    assert study.energy_ratio(weight, middle, inside) == approx(9)
    weight[0] *= -2  # 4 of it: the mean of 36, 9, 9 against that of 4, 1, 1
    weight[:, 7:21, 7:21] *= 2
    assert study.energy_ratio(weight, middle, inside) == approx(36)


# --- the claims, on rows made up for them ---


def made(**changed):
    """Three seeds of each kind; `end`, `start`, `shuffled`, `middle` and `inside` by kind."""
    values = {name: dict.fromkeys(study.KINDS, 0.0) for name in ("start", "shuffled")}
    values |= {name: dict.fromkeys(study.KINDS, 2.0) for name in ("middle", "inside")}
    values["end"] = {SOURCE: 0.3, ALL: 0.3, FEW: 0.6, RANDOM: 0.4, FILTERS: 0.2}
    for name, by_kind in changed.items():
        values[name] |= by_kind

    def row(kind, seed):
        of = {name: by_kind[kind] for name, by_kind in values.items()}
        # The seeds differ by 0.1, whatever is subtracted differs with them.
        wobble = 0.1 * seed + 0.001 * (seed == 1)
        energy = {"energy": [1.0, of["middle"] + 0.001 * seed],
                  "energy_in_area": [1.0, of["inside"] + 0.001 * seed]}  # fmt: skip
        return {
            "kind": kind, "seed": seed, "digits_i": 0.8 + 8 / 3 * wobble,
            "morans_i": [of["start"] + 0.1 * seed, 9.0, of["end"] + wobble],
            "morans_i_shuffled": of["shuffled"] + 0.1 * seed,
            **({} if kind == FILTERS else energy),
        }  # fmt: skip

    return Rows(row(kind, seed) for seed in range(3) for kind in study.KINDS)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "RRRRR RRRRR RR R"),
        ({"start": {SOURCE: 0.5}}, "NRRRR RRRRR RR R"),
        ({"shuffled": {ALL: 0.5}}, "RRRRR RNRRR RR R"),
        ({"start": {FILTERS: 0.2}, "shuffled": {FILTERS: 0.3}}, "RRRRR RRRRR UN R"),
        ({"end": {SOURCE: 1.2}}, "RRNRR RRRRR RR R"),
        ({"middle": {ALL: 0.9}}, "RRRRR RRRNR RR R"),
        ({"inside": {SOURCE: 0.9}}, "RRRRN RRRRR RR R"),
        ({"end": {RANDOM: 0.7}}, "RRRRR RRRRR RR N"),
    ],
)
def test_each_claim_can_fail(changed, expected):
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    claims = study.claims(made(**changed))
    assert "".join(short[claim.verdict] for claim in claims) == expected.replace(" ", "")


def test_what_the_claims_measure():
    claims = study.claims(made())
    start, shuffled, likeness, energy, inside = claims[:5]
    assert all(claim.claim.startswith("as in the source") for claim in claims[:5])
    assert start.measured == approx(0.3 + 0.001 / 3) == shuffled.measured
    assert likeness.measured == approx(0.3 / 0.8) and "our bar" in likeness.claim
    assert energy.measured == inside.measured == approx(2.001)
    assert [claim.published for claim in claims[:5]] == [
        "loose patterns", "loose patterns", "almost random", "in the middle", "in the middle"
    ]  # fmt: skip
    assert not any(claim.published for claim in claims[5:])
    assert claims[10].claim.startswith("CNN") and claims[10].measured == approx(0.2 + 0.001 / 3)
    assert claims[-1].measured == approx(0.2)
