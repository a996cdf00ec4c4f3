"""`experiments/capacity.py`: a smoke run; its data; its claims, of made-up rows."""

import pytest
import torch
from pytest import approx
from test_studies import smoke_rows, splits_of, verdicts

import capacity as study
from nn_backprop.data import load
from nn_backprop.models import MLP, counting, happy
from nn_backprop.studies import Rows

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
        for row in of:
            assert 0 <= row["constant_pixels"] < 784 and row.get("seconds", 1) > 0
            assert len(row.get("least") or row["wrong"]) == 2
            if network == "construction":
                assert row["wrong"] == [0, 0] and row["largest_difference"] < 1e-6
            elif network == "ReLU":
                assert sum(row["wrong"]) / (2 * row["n"]) < 0.3  # guesses are 0.9
    assert len(claims) == 4 * 3 + 2 * 3 + 2


def test_the_parameters():
    counted = [counting.parameters(MLP((784, width, 10))) for width in (1, 7, 31)]
    assert study.parameters({"least": [1, 7, 31]}).tolist() == counted
    model = MLP((784, *study.HIDDEN, 10))
    assert study.PARAMETERS == counting.parameters(model) == counting.parameters(happy())


def test_one_label_of_a_hundred_may_be_wrong(monkeypatch):
    """Widths 1, 2, 3 leave 2, 1, 0 wrong of n; the second network needs one more unit."""
    monkeypatch.setattr(study, "wrong_labels", lambda job, hidden: [3 - hidden[0], 4 - hidden[0]])
    for n, expected in ((100, [2, 3]), (60, [3, 4])):
        row = study.least(JOB._replace(network="tanh", n=n))
        assert row["least"] == expected and (row["n"], row["network"]) == (n, "tanh")
        assert {one["width"]: one["wrong"] for one in row["tried"]}[2] == [1, 2]


def test_only_training_images_are_read_or_gaussian_ones():
    job, whole = JOB._replace(n=40), load("digits")
    data, _ = study.data_of(job)
    train, _, _ = splits_of(whole)
    assert data.images.equal(whole.images[whole.train[:40]]) and len(train) > 40
    assert data.train.equal(torch.arange(40)) and len(data.validation) == len(data.test) == 0
    pixels = data.images.double() / 255
    assert (data.mean, data.std) == approx((pixels.mean().item(), pixels.std(correction=0).item()))
    constant = (data.images.amax(0) == data.images.amin(0)).sum().item()
    assert study.about(job)["constant_pixels"] == constant > 10
    noise = study.data_of(job._replace(inputs="Gaussian"))[0].images
    assert not (noise[:, None] == data.images).flatten(2).all(2).any()


def test_the_labels_are_the_seeds_and_nested():
    _, labels = study.data_of(JOB)
    assert labels.shape == (3, 150) and labels[:, :40].equal(study.data_of(JOB._replace(n=40))[1])
    counts = torch.stack([row.bincount(minlength=10) for row in labels])
    assert counts.shape == (3, 10) and (counts > 2).all() and (counts < 35).all()
    true = load("digits").labels[load("digits").train[:150]]
    for row in [*(labels == true), labels[0] == labels[1], labels[0] == labels[2]]:
        assert 0 < row.double().mean() < 0.25  # one in ten by chance


# --- the claims, on rows made up for them ---


FEW, MANY = [0, 0, 0], [10_000, 10_100, 10_200]  # wrong of 4,000 and of 12,000


def made(happy=None, relu=None, least=None, built=0):
    """Three seeds, the same for both inputs; by (epochs, n) how many are wrong, or least widths."""
    rows = Rows()
    usual = {(epochs, n): wrong for epochs in (1, 2) for n, wrong in ((4_000, FEW), (12_000, MANY))}
    widths = {(e, n): [n // 100 + k for k in (1, 2, 3)] for e in (1, 2) for n in (100, 500, 1_000)}
    for inputs in ("images", "Gaussian"):
        found = [("happy", *key, {"wrong": of}) for key, of in (usual | (happy or {})).items()]
        found += [("ReLU", *key, {"wrong": of}) for key, of in (usual | (relu or {})).items()]
        found += [("tanh", *key, {"least": of}) for key, of in (widths | (least or {})).items()]
        found += [("construction", 0, n, {"wrong": [0, built, 0]}) for n in (100, 500, 1_000)]
        for network, epochs, n, more in found:
            about = {"network": network, "inputs": inputs, "n": n, "epochs": epochs}
            rows.append(about | {"dataset": "mnist", "constant_pixels": 100 + n // 100} | more)
    return Rows(rows[::-1])


def test_each_claim_can_fail():
    """The capacity: from one to two bits, at most two in use, doubled; a line, its slope, doubled;
    what is built."""
    usual = {"happy": "rrr", "relu": "rrr", "least": "rnr", "built": "r"}
    for name, changed, expected in (
        ("built", 0, "r"),
        ("built", 1, "n"),
        *(
            (network, wrong, expected)
            for network in ("happy", "relu")
            for wrong, expected in (
                ({(2, 4_000): [100, 110, 120]}, "nrr"),
                ({(2, 4_000): [0, 0, 100]}, "uru"),
                ({(2, 12_000): [0, 0, 0], (1, 12_000): [0, 0, 0]}, "nnr"),
                # Each seed's largest, at an n of its own.
                ({(2, 12_000): [12_000 // 5, 12_000, 12_000]}, "uuu"),
                # The shorter training counts only for how much was gained, 10 % and more, or lost.
                ({(1, 4_000): [400, 410, 420]}, "rrn"),
                ({(2, 4_000): [400, 410, 420]}, "nrn"),
                ({(1, 4_000): [100, 101, 102]}, "rrr"),
            )
        ),
        ("least", {(2, n): [n // 500 + k for k in (1, 2, 3)] for n in (100, 500, 1_000)}, "rrn"),
        ("least", {(2, 500): [20, 21, 22]}, "nnr"),  # not a line: 2, 20, 11
        ("least", {(2, 1_000): [10, 11, 12]}, "rnu"),  # one unit of eleven to thirteen is some 8 %
        ("least", {(2, 1_000): [9, 10, 11]}, "rnn"),  # two are 17 %
        ("least", {(1, 1_000): [9, 10, 11]}, "rnn"),  # the doubled budget needs two units more
    ):
        happy, relu, least, built = (usual | {name: expected}).values()
        found = verdicts(study.claims(made(**{name: changed})))
        assert found == 2 * (happy + relu) + 2 * least + 2 * built, (name, changed)
