"""`experiments/capacity.py`: run with --smoke; its bits, its search, its data; its claims."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pytest import approx
from test_studies import smoke

from nn_backprop.data import load
from nn_backprop.models import MLP, counting, happy

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import capacity as study

LABEL = math.log2(10)
OPTIONS = study.Options(seeds=3, smoke=True)


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("capacity", tmp_path)
    rows, (few, many) = results["rows"], (100, 200)
    of = {}
    for row in rows:
        of.setdefault(row["network"], []).append(row)
        assert row["dataset"] == "digits" and 0 <= row["constant_pixels"] < 784
    for network in ("happy", "ReLU"):
        assert {(row["inputs"], row["n"], row["epochs"]) for row in of[network]} == {
            (inputs, n, epochs)
            for inputs in ("images", "Gaussian") for n in (50, 150) for epochs in (few, many)
        }  # fmt: skip
        assert len(of[network]) == 8
    for row in of["happy"] + of["ReLU"]:
        assert len(row["wrong"]) == 2 and all(0 <= w <= row["n"] for w in row["wrong"])
        assert row["seconds"] > 0
    for row in of["ReLU"]:
        assert sum(row["wrong"]) / (2 * row["n"]) < 0.3  # guesses are 0.9
    assert len(of["tanh"]) == 2 * 3 * 2
    for row in of["tanh"]:
        n, tried = row["n"], {one["width"]: one["wrong"] for one in row["tried"]}
        assert n in (10, 25, 50) and len(row["least"]) == 2
        for seed, width in enumerate(row["least"]):
            assert tried[width][seed] <= 0.01 * n
            assert width == 1 or tried[width - 1][seed] > 0.01 * n
    assert len(of["construction"]) == 2 * 3
    for row in of["construction"]:
        assert row["wrong"] == [0, 0] and row["largest_difference"] < 1e-6
    claims = results["claims"]
    assert len(claims) == 4 * 3 + 2 * 3 + 2
    assert all(claim["claim"].endswith("(smoke: not MNIST)") for claim in claims)
    assert [claim["measured"] for claim in claims[-2:]] == [0, 0]
    assert {claim["verdict"] for claim in claims[-2:]} == {"reproduced"}
    by_hand = [
        max(study.stored_bits(row["n"], row["wrong"][seed]) for row in of["ReLU"]
            if row["inputs"] == "images" and row["epochs"] == many) / LABEL
        for seed in (0, 1)
    ]  # fmt: skip
    assert claims[3]["claim"].startswith("ReLU, digits: capacity in labels")
    assert claims[3]["measured"] == approx(sum(by_hand) / 2)


# --- bits and sizes ---


def test_what_is_stored_when_none_half_and_chance_are_wrong():
    assert study.stored_bits(700, 0) == approx(700 * LABEL)
    assert study.stored_bits(700, 350) == approx(700 * (LABEL - 1 - math.log2(9) / 2))
    assert study.stored_bits(700, 630) == approx(0, abs=1e-9)
    assert study.stored_bits(700, 700) == approx(700 * math.log2(10 / 9))


@pytest.mark.parametrize("wrong", [1, 30, 99, 350, 600])
def test_it_is_the_mutual_information_of_labels_and_answers(wrong):
    e = wrong / 700
    joint = torch.full((10, 10), e / 90, dtype=torch.float64)  # label, answer
    joint.fill_diagonal_((1 - e) / 10)
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    information = (joint * (joint / apart).log2()).sum().item()
    assert study.stored_bits(700, wrong) == approx(700 * information)


@pytest.mark.parametrize("width", [1, 7, 31])
def test_the_parameters_of_a_width(width):
    assert study.parameters(width) == counting.parameters(MLP((784, width, 10)))


def test_the_parameters_of_the_happy_network():
    model = MLP((784, *study.HIDDEN, 10))
    assert study.PARAMETERS == counting.parameters(model) == counting.parameters(happy())


# --- the search ---


@given(least=st.lists(st.integers(1, 70), min_size=1, max_size=5), first=st.integers(1, 40))
@example(least=[1, 5, 2], first=4)
def test_the_search_finds_each_least_width_and_asks_once(least, first):
    asked = []

    def stored(width):
        asked.append(width)
        return [width >= of_one for of_one in least]

    assert study.least_widths(stored, first) == least
    assert len(asked) == len(set(asked)) and max(asked) < 2 * max(first, *least)


def test_the_search_where_more_units_are_not_always_better():
    def stored(width):
        return [width in (2, 3, 6, 7) or width > 8]

    (found,) = study.least_widths(stored, 1)
    assert stored(found) == [True] and stored(found - 1) == [False]


def test_a_search_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(study, "_wrong", lambda job, hidden: [job.n, job.n])
    job = study.Job("tanh", "images", 30, 1, OPTIONS)
    with pytest.raises(study.study.StudyError, match="no width up to 1024 stores 30 labels"):
        study.least(job)


def test_one_label_of_a_hundred_may_be_wrong(monkeypatch):
    """Widths 1, 2, 3 leave 2, 1, 0 wrong of n; the second network needs one more unit."""
    monkeypatch.setattr(study, "_wrong", lambda job, hidden: [3 - hidden[0], 4 - hidden[0]])
    for n, expected in ((100, [2, 3]), (60, [3, 4])):
        row = study.least(study.Job("tanh", "images", n, 1, OPTIONS))
        assert row["least"] == expected and (row["n"], row["network"]) == (n, "tanh")
        assert {one["width"]: one["wrong"] for one in row["tried"]}[2] == [1, 2]


# --- the data ---


def test_only_training_images_are_read():
    whole, n = load("digits"), 40
    data = study._data("images", n, OPTIONS)
    assert data.images.equal(whole.images[whole.train[:n]]) and data.train.equal(torch.arange(n))
    assert len(data.validation) == len(data.test) == 0
    splits = [set(part.tolist()) for part in (whole.train, whole.validation, whole.test)]
    assert len(set.union(*splits)) == sum(map(len, splits))  # disjoint
    pixels = data.images.double() / 255
    assert (data.mean, data.std) == approx((pixels.mean().item(), pixels.std(correction=0).item()))


def test_gaussian_images_are_no_others_and_vary_where_the_images_do():
    images, noise = (study._data(inputs, 150, OPTIONS) for inputs in study.INPUTS)
    assert noise.images.shape == images.images.shape
    assert not (noise.images[:, None] == images.images).flatten(2).all(2).any()
    x, z = (study._data(inputs, 150, OPTIONS).images.flatten(1).double() for inputs in study.INPUTS)
    common = torch.corrcoef(torch.stack([x.std(0), z.std(0)]))[0, 1]
    assert common > 0.9


def test_the_labels_are_the_seeds_and_nested():
    job = study.Job("ReLU", "images", 150, 1, OPTIONS)
    labels = study._labels(job)
    assert labels.shape == (3, 150) and labels.dtype == torch.int64
    assert labels[:, :40].equal(study._labels(job._replace(n=40)))
    counts = torch.stack([row.bincount(minlength=10) for row in labels])
    assert counts.shape == (3, 10) and (counts > 2).all() and (counts < 35).all()
    true = load("digits").labels[load("digits").train[:150]]
    for row in [*(labels == true), labels[0] == labels[1], labels[0] == labels[2]]:
        assert 0 < row.double().mean() < 0.25  # one in ten by chance


def test_a_constant_pixel_can_do_nothing_that_the_bias_cannot():
    job = study.Job("ReLU", "images", 30, 1, OPTIONS)
    data = study._data("images", 30, OPTIONS)
    x = data.normalise(data.images, torch.float64).flatten(1)
    constant = (x == x[0]).all(0)
    assert study._about(job)["constant_pixels"] == int(constant.sum()) > 10
    model = MLP((784, 7, 10)).double()
    before, first = model(x), model.layers[0]
    with torch.no_grad():
        first.weight[:, constant] += 3
        assert not torch.allclose(model(x), before)
        first.bias -= 3 * x[0, constant].sum()
    torch.testing.assert_close(model(x), before)


# --- the claims, on rows made up for them ---


def made(happy=None, relu=None, least=None, built=0):
    """Rows of three seeds. `happy`, `relu`: wrong of n by (epochs, n); least: widths likewise.

    The same for both kinds of images.
    """
    rows = []

    def add(network, inputs, n, epochs, **more):
        rows.append({"network": network, "inputs": inputs, "n": n, "epochs": epochs,
                     "dataset": "mnist", "constant_pixels": 100 + n // 100, **more})  # fmt: skip

    few, many = [0, 0, 0], [10_000, 10_100, 10_200]
    usual = {(1, 4_000): few, (2, 4_000): few, (1, 12_000): many, (2, 12_000): many}
    widths = {(e, n): [n // 100 + k for k in (1, 2, 3)] for e in (1, 2) for n in (100, 500, 1_000)}
    for inputs in ("images", "Gaussian"):
        for network, changed in (("happy", happy), ("ReLU", relu)):
            for (epochs, n), wrong in {**usual, **(changed or {})}.items():
                add(network, inputs, n, epochs, wrong=wrong)
        for (epochs, n), of_seeds in {**widths, **(least or {})}.items():
            add("tanh", inputs, n, epochs, least=of_seeds)
        for n in (100, 500, 1_000):
            add("construction", inputs, n, 0, wrong=[0, built, 0], largest_difference=1e-9)
    return rows[::-1]


def verdicts(claims):
    return "".join({"r": "R", "n": "N", "u": "U"}[claim.verdict[0]] for claim in claims)


def test_the_claims_stand_in_their_order():
    claims = study._claims(made())
    heads = [claim.claim.split(":")[0] for claim in claims]
    assert heads[:12:3] == ["happy, mnist", "ReLU, mnist", "happy, Gaussian", "ReLU, Gaussian"]
    assert heads[12:18:3] == ["784-h-10, mnist", "784-h-10, Gaussian"]
    assert verdicts(claims) == 4 * "RRR" + 2 * "RNR" + "RR"
    # 4,000 labels without error; 140 constant pixels of 16 weights each are not in use.
    expected = [4_000, 4_000 * LABEL / (13_002 - 16 * 140), 0]
    assert [claim.measured for claim in claims[:3]] == approx(expected)
    # One unit more for 100 labels more: 7.95 parameters a label.
    assert [claim.measured for claim in claims[12:15]] == approx([1, 7.95, 0])
    assert claims[0].published == "3,914 to 7,828 (counting)"
    assert claims[13].published == "1.66 to 3.32 (counting)"


@pytest.mark.parametrize(
    "wrong, labels, verdict",
    [
        ({(2, 4_000): [100, 110, 120]}, None, "NRR"),
        ({(2, 4_000): [0, 0, 100]}, None, "URU"),
        ({(2, 12_000): [0, 0, 0], (1, 12_000): [0, 0, 0]}, [12_000] * 3, "NNR"),
        # Each seed's largest, at n of its own; what the shorter training reached is no matter ...
        ({(2, 12_000): [12_000 // 5, 12_000, 12_000]}, None, "UUU"),
        # ... but for how much was gained, 10 % and more, or lost.
        ({(1, 4_000): [400, 410, 420]}, [4_000] * 3, "RRN"),
        ({(2, 4_000): [400, 410, 420]}, None, "NRN"),
        ({(1, 4_000): [100, 101, 102]}, [4_000] * 3, "RRR"),
    ],
)
def test_what_is_claimed_of_the_capacity(wrong, labels, verdict):
    for name, place in (("happy", 0), ("relu", 3)):
        claims = study._claims(made(**{name: wrong}))
        assert verdicts(claims[place : place + 3]) == verdict
        assert verdicts(claims[place + 6 : place + 9]) == verdict
        assert verdicts(claims[3 - place : 6 - place]) == "RRR"
        by_hand = labels or [
            max(study.stored_bits(n, wrong.get((2, n), usual)[k]) / LABEL
                for n, usual in ((4_000, [0, 0, 0]), (12_000, [10_000, 10_100, 10_200])))
            for k in range(3)
        ]  # fmt: skip
        assert claims[place].measured == approx(sum(by_hand) / 3)


@pytest.mark.parametrize("budgets", [(1, 2), (2, 1)])
def test_the_change_with_the_doubled_budget_is_of_each_seed(budgets):
    wrong = dict(zip(budgets, ([400, 500, 600], [0, 100, 200]), strict=True))  # by budget
    claims = study._claims(made(relu={(budget, 4_000): wrong[budget] for budget in (1, 2)}))
    changes = [
        100 * (study.stored_bits(4_000, b) / study.stored_bits(4_000, a) - 1)
        for a, b in zip(wrong[1], wrong[2], strict=True)
    ]
    assert "twice the epochs change the capacity, in %: by at most 10 up or down" in claims[5].claim
    assert claims[5].measured == approx(sum(changes) / 3) and claims[5].verdict == "not reproduced"


@pytest.mark.parametrize(
    "least, r_squared, slope, changed, verdict",
    [
        # With x = 100, 500, 1000, 3 Sxx = 1,220,000. By hand of h = 1 + k, 2 + k, 3 + k:
        # 3 Sxy = 2,700 units of 795 parameters each, 3 Syy = 6.
        ({(2, n): [n // 500 + k for k in (1, 2, 3)] for n in (100, 500, 1_000)},
         2_700**2 / 1_220_000 / 6, 795 * 2_700 / 1_220_000,
         [2395 / 8755 - 1, 3190 / 9550 - 1, 3985 / 10_345 - 1], "RRN"),
        # Not a line: 2, 20, 11.
        ({(2, 500): [20, 21, 22]},
         10_800**2 / 1_220_000 / 486, 795 * 10_800 / 1_220_000, [0, 0, 0], "NNR"),
        # One unit of eleven, twelve, thirteen is some 8 %: too near to the bar. 2, 6, 10.
        ({(2, 1_000): [10, 11, 12]},
         10_800**2 / 1_220_000 / 96, 795 * 10_800 / 1_220_000,
         [-795 / 8755, -795 / 9550, -795 / 10_345], "RNU"),
        # Two units are 17 %. 2, 6, 9.
        ({(2, 1_000): [9, 10, 11]},
         9_400**2 / 1_220_000 / 74, 795 * 9_400 / 1_220_000,
         [-1590 / 8755, -1590 / 9550, -1590 / 10_345], "RNN"),
        # The doubled budget needs two units more: 20 to 22 %.
        ({(1, 1_000): [9, 10, 11]},
         1, 795 / 100, [1590 / 7165, 1590 / 7960, 1590 / 8755], "RNN"),
    ],
)  # fmt: skip
def test_what_is_claimed_of_the_least_networks(least, r_squared, slope, changed, verdict):
    claims = study._claims(made(least=least))
    assert verdicts(claims[12:15]) == verdicts(claims[15:18]) == verdict
    expected = [r_squared, slope, 100 * sum(changed) / 3]
    assert [claim.measured for claim in claims[12:15]] == approx(expected, abs=1e-12)


@pytest.mark.parametrize("wrong, verdict", [(0, "R"), (1, "N")])
def test_what_is_claimed_of_the_construction(wrong, verdict):
    claims = study._claims(made(built=wrong))
    assert "2n + 784 numbers fit n mnist images without error, n up to 1,000" in claims[18].claim
    assert verdicts(claims[18:]) == 2 * verdict
    assert claims[18].measured == 3 * wrong and claims[18].published == 0  # of three sizes


def test_the_tables_say_where_the_largest_is_and_when_it_is_the_last():
    tables = study._tables(made(relu={(2, 12_000): [0, 12_000 // 5, 12_000]}))
    (largest,) = (rows for title, rows in tables.items() if title.startswith("Capacity of 13,002"))
    assert [row["at n ="] for row in largest if row["network"] == "happy"] == 4 * ["4,000"]
    assert [row["at n ="] for row in largest if row["network"] == "ReLU"] == 2 * [
        "4,000", "4,000, 12,000 (the last)"
    ]  # fmt: skip
    (line,) = (rows for title, rows in tables.items() if title.startswith("A line"))
    assert [row["parameters a further label"] for row in line] == 4 * ["7.95 (7.95 to 7.95)"]
