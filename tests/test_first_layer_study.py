"""`experiments/first_layer.py`: run with --smoke; what it measures; claims, of made-up rows."""

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke_rows, splits_of, verdicts

import first_layer as study
from nn_backprop.data import load
from nn_backprop.studies import Rows

SOURCE, ALL, FEW, RANDOM, FILTERS = study.KINDS
PASSES = 4


@pytest.mark.slow
def test_the_study(tmp_path):
    found, claims = smoke_rows("first_layer", tmp_path)
    by = found.by("kind", "seed")
    assert set(by) == {(kind, seed) for kind in study.KINDS for seed in (0, 1)}
    assert len(claims) == 13
    for (kind, _), (row,) in by.items():
        assert row["examples"] == (399 if kind in (FEW, RANDOM) else 1197)
        assert row["test_accuracy"] > 0.6 or kind not in (SOURCE, FILTERS)  # chance is 0.1
        assert len(row["morans_i"]) == 1 + PASSES and max(map(abs, row["morans_i"])) < 1.1
        assert abs(row["morans_i"][0]) < (0.2 if kind == FILTERS else 0.05)  # noise
        N = 25 if kind == FILTERS else row["area_pixels"]
        assert row["morans_i_shuffled"] == approx(-1 / (N - 1), abs=0.01)
        assert 0 <= row["beyond_all_shuffles"] <= 1 and 0.5 < row["digits_i"] < 1
        energies = [row[energy] for energy in study.ENERGIES if energy in row]
        assert len(energies) == 2 * (kind != FILTERS)
        assert all(len(of) == 1 + PASSES and 0.8 < of[0] < 1.2 for of in energies)
    # What the page says of pixels that are black in all training images.
    data = load("digits")
    black = (data.images[data.train, 0] == 0).all(0).numpy()
    source, ours = (np.load(found.folder / f"weights-{number}.npy") for number in (0, 1))
    assert source.shape == ours.shape == (1 + PASSES, 16, 28, 28)
    moved = (ours[-1] - ours[0])[:, black]  # all alike, while those of the source stay
    assert (source[0] == source[-1])[:, black].all() and np.abs(source[-1] - source[0]).max() > 0.1
    assert np.abs(moved).max() > 0.01 > 1e-4 > np.ptp(moved, axis=1).max()


def test_what_each_network_learns_is_not_what_it_is_tested_on(tmp_path):
    data = {name: study.data_for(study.Job(name, 3, study.Options(smoke=True), tmp_path))
            for name in study.KINDS}  # fmt: skip
    for name, of in data.items():
        assert len(splits_of(of)[0]) == (399 if name in (FEW, RANDOM) else 1197)
        assert (of.mean, of.std) == (0, 1) if name == SOURCE else of.mean > 0.1
    few, random, whole = data[FEW], data[RANDOM], data[ALL]
    assert few.train.equal(random.train) and few.images is random.images
    changed = (random.labels != whole.labels).nonzero().flatten()
    assert set(changed.tolist()) <= set(few.train.tolist()) and few.labels.equal(whole.labels)
    assert 0.8 < len(changed) / len(few.train) < 0.98


# --- what is measured ---


def test_morans_i():
    """As the formula says, pair by pair."""
    images = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    area = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    places = area.nonzero()
    w = ((places[:, None] - places).abs().sum(2) == 1).double()
    x = images[:, area].double()
    x -= x.mean(1, keepdim=True)
    expected = len(places) / w.sum() * (x @ w * x).sum(1) / x.square().sum(1)
    for shown in (images, 5 - 3 * images):
        assert study.morans_i(shown, area).numpy() == approx(expected.numpy())
    chessboard = torch.tensor([[[1, -1], [-1, 1]]])
    assert study.morans_i(chessboard, torch.ones(2, 2).bool()).item() == approx(-1)


def test_a_shuffle_stays_inside_and_gives_each_image_an_order_of_its_own():
    images, area = torch.arange(120.0).view(2, 6, 10), torch.zeros(6, 10).bool()
    area[1:5, 2:9] = True
    mixed = study.shuffled(images, area, seed=0)
    assert mixed[:, ~area].equal(images[:, ~area])
    assert mixed[:, area].sort().values.equal(images[:, area])
    assert not (mixed[1] - 60).equal(mixed[0])
    assert not study.shuffled(images, area, seed=1).equal(mixed)


def test_the_area_and_the_energy_in_its_middle_by_hand():
    images = torch.zeros(200, 28, 28, dtype=torch.uint8)
    images[0, 0, 0] = 255  # 0.5 %
    images[:2, 3, 4] = 1  # 1 %
    images[:, 9, 9] = 7
    assert study.digits_area(images).nonzero().tolist() == [[3, 4], [9, 9]]
    weight, inside = torch.ones(3, 28, 28), torch.ones(28, 28).bool()
    weight[:, 7:21, 7:21] = 3  # 9 against 1
    assert study.energy_ratio(weight, inside) == approx(9)
    weight[:, :7] = 50
    inside[:7] = False
    assert study.energy_ratio(weight, inside) == approx(9)
    weight[0] *= -2  # 4 of it: the mean of 36, 9, 9 against that of 4, 1, 1
    weight[:, 7:21, 7:21] *= 2
    assert study.energy_ratio(weight, inside) == approx(36)


# --- the claims, on rows made up for them ---


ENDS = {SOURCE: 0.3, ALL: 0.3, FEW: 0.6, RANDOM: 0.4, FILTERS: 0.2}


def made(**changed):
    """Three seeds, which differ by 0.1, of each kind; `changed` are numbers by name and kind."""

    def row(kind, seed):
        of = {"start": 0, "end": ENDS[kind], "shuffled": 0, "middle": 2, "inside": 2}
        of |= {name: by_kind[kind] for name, by_kind in changed.items() if kind in by_kind}
        more = 0.1 * seed + 0.001 * (seed == 1)
        return {
            "kind": kind, "seed": seed, "digits_i": 0.8 + 8 / 3 * more,
            "morans_i": [of["start"] + 0.1 * seed, 9, of["end"] + more],
            "morans_i_shuffled": of["shuffled"] + 0.1 * seed,
            "energy": [1, of["middle"] + 0.001 * seed],
            "energy_in_area": [1, of["inside"] + 0.001 * seed],
        }  # fmt: skip

    return Rows(row(kind, seed) for seed in range(3) for kind in study.KINDS)


def test_each_claim_can_fail():
    for changed, expected in (
        ({}, "rrrrr rrrrr rr r"),
        ({"start": {SOURCE: 0.5}}, "nrrrr rrrrr rr r"),
        ({"shuffled": {ALL: 0.5}}, "rrrrr rnrrr rr r"),
        ({"start": {FILTERS: 0.2}, "shuffled": {FILTERS: 0.3}}, "rrrrr rrrrr un r"),
        ({"end": {SOURCE: 1.2}}, "rrnrr rrrrr rr r"),
        ({"middle": {ALL: 0.9}}, "rrrrr rrrnr rr r"),
        ({"inside": {SOURCE: 0.9}}, "rrrrn rrrrr rr r"),
        ({"end": {RANDOM: 0.7}}, "rrrrr rrrrr rr n"),
    ):
        claims = study.claims(made(**changed))
        assert verdicts(claims) == expected.replace(" ", ""), changed
    measured = [claim.measured for claim in study.claims(made())[:5]]
    assert measured == approx([0.3 + 0.001 / 3, 0.3 + 0.001 / 3, 0.3 / 0.8, 2.001, 2.001])
