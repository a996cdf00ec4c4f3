"""`experiments/capacity.py`: a smoke run; its data; its claims, of made-up rows."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke_rows

from nn_backprop.data import load
from nn_backprop.models import MLP, counting, happy
from nn_backprop.studies import Rows
from nn_backprop.studies.memorisation import stored_bits

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import capacity as study

LABEL = math.log2(10)
JOB = study.Job("ReLU", "images", 150, 1, study.Options(seeds=3, smoke=True))


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("capacity", tmp_path)
    few, many = 100, 200
    for network, sizes, budgets in (
        ("happy", (50, 150), (few, many)), ("ReLU", (50, 150), (few, many)),
        ("tanh", (10, 25, 50), (few, many)), ("construction", (10, 25, 50), (0,)),
    ):  # fmt: skip
        of = rows.where(network=network)
        expected = {(i, n, e) for i in ("images", "Gaussian") for n in sizes for e in budgets}
        assert len(of) == len(expected) and set(of.by("inputs", "n", "epochs")) == expected
        assert of.one("dataset") == "digits"
        for row in of:
            n = row["n"]
            assert 0 <= row["constant_pixels"] < 784 and row.get("seconds", 1) > 0
            if network == "construction":
                assert row["wrong"] == [0, 0] and row["largest_difference"] < 1e-6
            elif network == "tanh":
                tried = {one["width"]: one["wrong"] for one in row["tried"]}
                assert len(row["least"]) == 2
                for seed, width in enumerate(row["least"]):
                    assert tried[width][seed] <= 0.01 * n
                    assert width == 1 or tried[width - 1][seed] > 0.01 * n
            else:
                assert len(row["wrong"]) == 2 and all(0 <= wrong <= n for wrong in row["wrong"])
                assert network == "happy" or sum(row["wrong"]) / (2 * n) < 0.3  # guesses are 0.9
    found = list(claims.values())
    assert len(found) == 4 * 3 + 2 * 3 + 2
    assert [(c["measured"], c["verdict"]) for c in found[-2:]] == 2 * [(0, "reproduced")]
    curve = rows.where(network="ReLU", inputs="images", epochs=many)
    by_hand = [max(stored_bits(r["n"], r["wrong"][k]) for r in curve) / LABEL for k in (0, 1)]
    assert found[3]["claim"].startswith("ReLU, digits: capacity in labels")
    assert found[3]["measured"] == approx(sum(by_hand) / 2)


def test_the_parameters():
    for width in (1, 7, 31):
        assert study.parameters(width) == counting.parameters(MLP((784, width, 10)))
    model = MLP((784, *study.HIDDEN, 10))
    assert study.PARAMETERS == counting.parameters(model) == counting.parameters(happy())


def test_one_label_of_a_hundred_may_be_wrong(monkeypatch):
    """Widths 1, 2, 3 leave 2, 1, 0 wrong of n; the second network needs one more unit."""
    monkeypatch.setattr(study, "wrong_labels", lambda job, hidden: [3 - hidden[0], 4 - hidden[0]])
    for n, expected in ((100, [2, 3]), (60, [3, 4])):
        row = study.least(JOB._replace(network="tanh", n=n))
        assert row["least"] == expected and (row["n"], row["network"]) == (n, "tanh")
        assert {one["width"]: one["wrong"] for one in row["tried"]}[2] == [1, 2]


# --- the data ---


def test_only_training_images_are_read():
    whole, data = load("digits"), study.inputs_of(JOB._replace(n=40))
    assert data.images.equal(whole.images[whole.train[:40]])
    assert data.train.equal(torch.arange(40)) and len(data.validation) == len(data.test) == 0
    splits = [set(part.tolist()) for part in (whole.train, whole.validation, whole.test)]
    assert len(set.union(*splits)) == sum(map(len, splits))  # disjoint
    pixels = data.images.double() / 255
    assert (data.mean, data.std) == approx((pixels.mean().item(), pixels.std(correction=0).item()))


def test_gaussian_images_are_no_others_and_vary_where_the_images_do():
    images, noise = (study.inputs_of(JOB._replace(inputs=i)).images for i in study.INPUTS)
    assert noise.shape == images.shape
    assert not (noise[:, None] == images).flatten(2).all(2).any()
    deviations = [of.flatten(1).double().std(0) for of in (images, noise)]
    assert torch.corrcoef(torch.stack(deviations))[0, 1] > 0.9


def test_the_labels_are_the_seeds_and_nested():
    labels = study.labels_of(JOB)
    assert labels.shape == (3, 150) and labels.dtype == torch.int64
    assert labels[:, :40].equal(study.labels_of(JOB._replace(n=40)))
    counts = torch.stack([row.bincount(minlength=10) for row in labels])
    assert counts.shape == (3, 10) and (counts > 2).all() and (counts < 35).all()
    true = load("digits").labels[load("digits").train[:150]]
    for row in [*(labels == true), labels[0] == labels[1], labels[0] == labels[2]]:
        assert 0 < row.double().mean() < 0.25  # one in ten by chance


def test_a_constant_pixel_can_do_nothing_that_the_bias_cannot():
    job = JOB._replace(n=30)
    data = study.inputs_of(job)
    x = data.normalise(data.images, torch.float64).flatten(1)
    constant = (x == x[0]).all(0)
    assert study.about(job)["constant_pixels"] == int(constant.sum()) > 10
    model = MLP((784, 7, 10)).double()
    before, first = model(x), model.layers[0]
    with torch.no_grad():
        first.weight[:, constant] += 3
        assert not torch.allclose(model(x), before)
        first.bias -= 3 * x[0, constant].sum()
    torch.testing.assert_close(model(x), before)


# --- the claims, on rows made up for them ---


FEW, MANY = [0, 0, 0], [10_000, 10_100, 10_200]  # wrong of 4,000 and of 12,000


def made(happy=None, relu=None, least=None, built=0):
    """Rows of three seeds. `happy`, `relu`: wrong of n by (epochs, n); least: widths by the same.

    The same for both kinds of images.
    """
    rows = Rows()
    usual = {(epochs, n): wrong for epochs in (1, 2) for n, wrong in ((4_000, FEW), (12_000, MANY))}
    widths = {(e, n): [n // 100 + k for k in (1, 2, 3)] for e in (1, 2) for n in (100, 500, 1_000)}
    for inputs in ("images", "Gaussian"):
        found = [("happy", *key, {"wrong": of}) for key, of in (usual | (happy or {})).items()]
        found += [("ReLU", *key, {"wrong": of}) for key, of in (usual | (relu or {})).items()]
        found += [("tanh", *key, {"least": of}) for key, of in (widths | (least or {})).items()]
        right = {"wrong": [0, built, 0], "largest_difference": 1e-9}
        found += [("construction", 0, n, right) for n in (100, 500, 1_000)]
        for network, epochs, n, more in found:
            about = {"network": network, "inputs": inputs, "n": n, "epochs": epochs}
            rows.append(about | {"dataset": "mnist", "constant_pixels": 100 + n // 100} | more)
    return Rows(rows[::-1])


def verdicts(claims):
    return "".join(claim.verdict[0].upper() for claim in claims)


def test_the_claims_stand_in_their_order():
    claims = study.claims(made())
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
    assert "2n + 784 numbers fit n mnist images without error, n up to 1,000" in claims[18].claim
    for wrong, verdict in ((0, "RR"), (1, "NN")):
        built = study.claims(made(built=wrong))[18:]
        assert verdicts(built) == verdict
        assert (built[0].measured, built[0].published) == (3 * wrong, 0)  # of three sizes


@pytest.mark.parametrize("name, place", [("happy", 0), ("relu", 3)])
def test_what_is_claimed_of_the_capacity(name, place):
    for wrong, verdict in (
        ({(2, 4_000): [100, 110, 120]}, "NRR"),
        ({(2, 4_000): [0, 0, 100]}, "URU"),
        ({(2, 12_000): [0, 0, 0], (1, 12_000): [0, 0, 0]}, "NNR"),
        # Each seed's largest, at n of its own; what the shorter training reached is no matter ...
        ({(2, 12_000): [12_000 // 5, 12_000, 12_000]}, "UUU"),
        # ... but for how much was gained, 10 % and more, or lost.
        ({(1, 4_000): [400, 410, 420]}, "RRN"),
        ({(2, 4_000): [400, 410, 420]}, "NRN"),
        ({(1, 4_000): [100, 101, 102]}, "RRR"),
        ({(1, 4_000): [400, 500, 600], (2, 4_000): [0, 100, 200]}, "URN"),
        ({(2, 4_000): [400, 500, 600], (1, 4_000): [0, 100, 200]}, "NRN"),
    ):
        claims = study.claims(made(**{name: wrong}))
        assert verdicts(claims[place : place + 3]) == verdict
        assert verdicts(claims[place + 6 : place + 9]) == verdict
        assert verdicts(claims[3 - place : 6 - place]) == "RRR"
        before, after = (
            np.max([[stored_bits(n, k) for k in wrong.get((epochs, n), usual)]
                    for n, usual in ((4_000, FEW), (12_000, MANY))], axis=0)
            for epochs in (1, 2)
        )  # fmt: skip
        assert claims[place].measured == approx(np.mean(after) / LABEL)
        assert claims[place + 2].measured == approx(np.mean(100 * (after / before - 1)))
        change = "twice the epochs change the capacity, in %: by at most 10 up or down"
        assert change in claims[place + 2].claim


def test_what_is_claimed_of_the_least_networks():
    # With x = 100, 500, 1000, 3 Sxx = 1,220,000. By hand of h = 1 + k, 2 + k, 3 + k:
    # 3 Sxy = 2,700 units of 795 parameters each, 3 Syy = 6.
    for least, xy, yy, changed, verdict in (
        ({(2, n): [n // 500 + k for k in (1, 2, 3)] for n in (100, 500, 1_000)}, 2_700, 6,
         [2395 / 8755 - 1, 3190 / 9550 - 1, 3985 / 10_345 - 1], "RRN"),
        # Not a line: 2, 20, 11.
        ({(2, 500): [20, 21, 22]}, 10_800, 486, [0, 0, 0], "NNR"),
        # One unit of eleven, twelve, thirteen is some 8 %: too near to the bar. 2, 6, 10.
        ({(2, 1_000): [10, 11, 12]}, 10_800, 96, [-795 / h for h in (8755, 9550, 10_345)], "RNU"),
        # Two units are 17 %. 2, 6, 9.
        ({(2, 1_000): [9, 10, 11]}, 9_400, 74, [-1590 / h for h in (8755, 9550, 10_345)], "RNN"),
        # The doubled budget needs two units more: 20 to 22 %. 2, 6, 11.
        ({(1, 1_000): [9, 10, 11]}, 12_200, 122, [1590 / h for h in (7165, 7960, 8755)], "RNN"),
    ):  # fmt: skip
        claims = study.claims(made(least=least))
        assert verdicts(claims[12:15]) == verdicts(claims[15:18]) == verdict
        expected = [xy**2 / 1_220_000 / yy, 795 * xy / 1_220_000, 100 * sum(changed) / 3]
        assert [claim.measured for claim in claims[12:15]] == approx(expected, abs=1e-12)


def test_the_tables_say_where_the_largest_is_and_when_it_is_the_last():
    tables = study.tables(made(relu={(2, 12_000): [0, 12_000 // 5, 12_000]}))
    (largest,) = (rows for title, rows in tables.items() if title.startswith("Capacity of 13,002"))
    assert [row["at n ="] for row in largest if row["network"] == "happy"] == 4 * ["4,000"]
    assert [row["at n ="] for row in largest if row["network"] == "ReLU"] == 2 * [
        "4,000", "4,000, 12,000 (the last)"
    ]  # fmt: skip
    (line,) = (rows for title, rows in tables.items() if title.startswith("A line"))
    assert [row["parameters a further label"] for row in line] == 4 * ["7.95 (7.95 to 7.95)"]
