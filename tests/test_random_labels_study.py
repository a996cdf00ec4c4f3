"""`experiments/random_labels.py`: a smoke run; what is read when; its claims, of made-up rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.stats import t
from test_studies import smoke_rows

from nn_backprop.data import load
from nn_backprop.studies import Recipe, Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import random_labels as study

LABELS = ["true", "20 % noise", "40 % noise", "60 % noise", "80 % noise", "random labels"]
KINDS = [*LABELS, "shuffled pixels", "random pixels", "Gaussian"]
ADAM = ["1×4096", "1×512, n = 5,000", "1×512", "happy", "happy, n = 5,000", "16-16 ReLU",
        "16-16 ReLU, n = 5,000"]  # fmt: skip
WORDS = {"R": "reproduced", "N": "not reproduced", "U": "undecided"}
NEAR = np.array([-0.1, 0, 0.1])


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("random_labels", tmp_path)
    trained, begun = rows.where(what="training"), rows.where(what="starts")
    by = trained.by("setting", "kind", "seed")
    assert set(by) == {
        (name, kind, seed)
        for name in [*ADAM, "1×512, SGD", "happy, SGD"]
        for kind in (KINDS if name in ("happy", "1×512") else ["true", "random labels"])
        for seed in (0, 1)
    } and len(trained) == len(by)  # fmt: skip
    for row in trained:
        small = row["setting"].startswith(("happy", "16-16"))
        weights = 784 * 16 + 16 * 16 + 16 * 10 + 42 if small else 785 * 32 + 33 * 10
        assert row["dataset"] == "digits" and row["parameters"] == weights
        assert row["n"] == (200 if "5,000" in row["setting"] else 100)
        assert 1 <= row["peak_epoch"] <= row["epochs"] and "curves" not in row
        assert row["validation_accuracy_at_peak"] >= row["validation_accuracy"]
        for what, share in row.items():
            assert 0 <= share <= 1 if "accuracy" in what or "critical" in what else True
        assert ("critical" in row) == (
            row["setting"] in ("happy", "1×512") and row["kind"] in LABELS
        )
        assert ("loss_start" in row) == (row["kind"] in ("true", "random labels"))
        if "loss_start" in row:
            for curve in ("loss", "error"):
                assert 0 <= row[f"{curve}_start"] < row[f"{curve}_end"] <= row["epochs"]
                assert row[f"{curve}_line"] <= 1 and row[f"{curve}_sigmoid"] <= 1
            assert row["test_accuracy"] > 0.6 or row["kind"] != "true"  # chance is 0.1
            assert row["test_accuracy"] < 0.3 or row["kind"] == "true"
    assert list(begun.by("setting", "kind", "seed")) == [
        (name, kind, seed)
        for name in ("happy", "16-16 ReLU")
        for kind in ("true", "random labels", "Gaussian")
        for seed in (0, 1)
    ]
    for row in begun:
        assert row["starts"] == 5 and 0 <= row["half_reached"] <= 5
        for moment in ("one", "half"):
            mean = row[f"{moment}_mean"]
            assert 0 < mean < 1 and 0 < row[f"{moment}_spread"] <= 0.5 * (100 / 99) ** 0.5
            assert row[f"{moment}_binomial"] == approx((mean * (1 - mean) / 5) ** 0.5)

    curves = [json.loads(line) for line in (rows.folder / "curves.jsonl").read_text().splitlines()]
    assert len(curves) == len(trained)
    for of, row in zip(curves, trained, strict=True):
        assert all(of[key] == row[key] for key in ("setting", "kind", "seed"))
        assert len(of["every_train_loss"]) == row["epochs"] + 1  # the first is that of epoch 0
        assert of["every_train_accuracy"][-1] == row["train_accuracy"]
        assert of["every_train_accuracy"][row["peak_epoch"]] == row["train_accuracy_at_peak"]
        peak, held_out = of["grid"].index(row["peak_epoch"]), of["validation_accuracy"]
        assert held_out[peak] == max(held_out) > max([0, *held_out[:peak]])

    assert len(claims) == 7 + 2 + 2 * 5 + 2 * 4 + 3 * 3
    (claim,) = (c for words, c in claims.items() if words.startswith("happy: training accuracy"))
    random, true = (
        trained.where(setting="happy", kind=kind).values("train_accuracy").mean()
        for kind in ("random labels", "true")
    )
    assert claim["measured"] == approx(100 * (random - true))


# --- the data and a training ---


TINY = study.Setting("tiny", Recipe((16,), 30, 5e-3, 10, schedule="constant"), 100)
OPTIONS = study.Options(smoke=True)


def test_other_images_choose_the_peak_than_are_searched():
    """Of MNIST's 5,000 the first 2,000, and 300 from 4,500 on; of the digits' 300, 270 and 30."""
    data = load("digits")
    for validation, chosen, searched in (
        (data.validation, slice(270), slice(270, 300)),
        (torch.arange(5_000), slice(2_000), slice(4_500, 4_800)),
    ):
        found = study.held_out(replace(data, validation=validation))
        assert [part.tolist() for part in found] == [
            validation[part].tolist() for part in (chosen, searched)
        ]
    (made,) = study.made(study.Job(TINY, ("true",), 1, OPTIONS))
    assert torch.equal(made.validation, data.validation[:270])


def test_together_is_as_alone():
    kinds = ("true", "40 % noise", "random labels")
    together = study.train(study.Job(TINY, kinds, 1, OPTIONS))
    for kind, row in zip(kinds, together, strict=True):
        (alone,) = study.train(study.Job(TINY, (kind,), 1, OPTIONS))
        assert (row["kind"], row["seed"], row["peak_epoch"]) == (kind, 1, alone["peak_epoch"])
        losses, others = (of["curves"]["every_train_loss"] for of in (row, alone))
        assert losses == approx(others, rel=1e-3)
    assert len({row["train_loss"] for row in together}) == 3


def test_the_test_split_chooses_nothing(monkeypatch):
    job, data = study.Job(TINY, ("true",), 1, OPTIONS), load("digits")
    (row,) = study.train(job)
    labels = data.labels.clone()
    labels[data.test] = (labels[data.test] + 1) % 10
    monkeypatch.setattr(study.studies, "load_data", lambda _: replace(data, labels=labels))
    (other,) = study.train(job)
    changed = {"test_accuracy", "test_accuracy_at_peak"}
    assert {name for name in row if row[name] != other[name]} == changed


# --- the claims, on rows made up for them ---


def rows_of(**columns):
    """One row a seed, the numbers by name; of accuracies and critical samples, in percent."""
    shares = ("accuracy", "critical", "spread", "binomial")
    scaled = {
        name: np.array(values) / (100 if any(word in name for word in shares) else 1)
        for name, values in columns.items()
    }
    return Rows(
        {"seed": seed} | {name: float(values[seed]) for name, values in scaled.items()}
        for seed in (2, 0, 1)
    )


def learnt(random=None, test=None):
    """All networks by Adam, 99, 98 and 97 % with all labels, but for some with random ones."""
    by = {}
    for name in ADAM:
        kept = [99, 98, 97], [10, 10.1, 9.9]
        by[name, "true"] = rows_of(train_accuracy=kept[0], test_accuracy=[80, 81, 82])
        by[name, "random labels"] = rows_of(
            train_accuracy=(random or {}).get(name, kept[0]),
            test_accuracy=(test or {}).get(name, kept[1]),
        )
    return by


def test_the_same_training_accuracy():
    low = [95.2, 94.1, 93.3]
    claims = [*study.memorised(learnt({"happy": low, "happy, n = 5,000": low}))]
    assert [claim.claim.partition(":")[0] for claim in claims[:7]] == ADAM
    assert [claim.measured for claim in claims[:7]] == approx([0, 0, 0, -3.8, -3.8, 0, 0])
    assert [claim.verdict for claim in claims[:7]] == [WORDS[letter] for letter in "RRRNNRR"]
    assert "−1 or more (our bar)" in claims[3].claim
    # Seeds differ by 2 points, pairs hardly.
    claim = [*study.memorised(learnt({"happy": [98.1, 97.2, 96.1]}))][3]
    assert claim.measured == approx(-13 / 15) and claim.verdict == "undecided"
    assert [*study.memorised(learnt({"happy": [98.5, 97.6, 96.5]}))][3].verdict == "reproduced"
    for reached, verdict in (
        ([99.5, 99.6, 99.7], "R"), ([99.0, 99.1, 98.9], "N"), ([99.3, 99.4, 99.5], "U")
    ):  # fmt: skip
        claim = [*study.memorised(learnt({"1×512, n = 5,000": reached}))][7]
        assert claim.measured == approx(sum(reached) / 3)
        assert (claim.published, claim.verdict) == (99.34, WORDS[verdict])


def test_chance():
    for test, measured, verdict in (
        ([10, 10.1, 9.9], 10, "R"),
        ([17, 17.1, 16.9], 11, "U"),  # (6 × 10 + 17) / 7, the others' own ± 0.1
        ([24, 24.1, 23.9], 12, "N"),
        ([3, 3.1, 2.9], 9, "U"),
        ([10, 2, 18], 10, "U"),
    ):
        claim = [*study.memorised(learnt(test={"happy": test}))][8]
        assert claim.published == "10.61" and "from 9 to 11" in claim.claim
        assert claim.measured == approx(measured) and claim.verdict == WORDS[verdict]
        means = (60 + 6 * np.array([0, 0.1, -0.1]) + test) / 7
        half = t.ppf(0.975, 2) * means.std(ddof=1) / 3**0.5
        assert claim.interval == approx((measured - half, measured + half), rel=1e-4)


def test_the_shape_of_the_fall():
    """From 10 to 90 % it takes 10, 20 and 30 epochs, with random labels `times` as many."""
    for first, line, random_first, random_line, times, measured, letters in (
        (0.3, 0.8, 0.1, 0.99, [4, 4.1, 3.9], [0.3, 0.99, 0.19, 0.1, 4], "RRRNR"),
        (0.05, 0.99, 0.6, 0.8, [0.4, 0.41, 0.39], [0.05, 0.8, -0.19, 0.6, 0.4], "NNNRN"),
        (1 / 9, 0.9, 0.5, 0.95, [1, 1.1, 0.9], [1 / 9, 0.95, 0.05, 0.5, 1], "UURUU"),
    ):
        took, near, by = np.array([10, 20, 30]), NEAR / 100, {}
        for name in ("happy, SGD", "1×512, SGD"):
            by[name, "true"] = rows_of(
                loss_first=first + near, loss_line=line + near, loss_start=3 * [5],
                loss_end=5 + took,
            )  # fmt: skip
            by[name, "random labels"] = rows_of(
                loss_first=random_first + near, loss_line=random_line + 2 * near,
                loss_start=3 * [5], loss_end=5 + took * times,
            )  # fmt: skip
        claims = [*study.fallen(by)]
        assert [c.claim.startswith("happy, SGD") for c in claims] == 5 * [True] + 5 * [False]
        assert [claim.measured for claim in claims] == approx(2 * measured)
        assert [claim.verdict for claim in claims] == [WORDS[letter] for letter in 2 * letters]
        assert [claim.published for claim in claims[:5]] == [
            "fiddles around", "almost linearly", "almost linearly", "converges quickly", "slowly"
        ]  # fmt: skip


def test_the_peak():
    """At 40 % noise the test accuracy falls least, at 20 % most have been learnt at the peak, and
    at 60 % the critical samples rise least; at 80 % there are more of them than at 20 %."""
    for fall, high, rise, more, letters in (
        (5, 70, 4, 6, "RRRR"),
        (-1, 95, -1, -6, "NNNN"),
        (0, 90, 0, 0, "UUUU"),
        (-1, 70, 4, 6, "NRRR"),  # at the other levels it falls by 2
        (5, 70, -1, 6, "RRNR"),
    ):
        by, end = {}, np.array([60, 70, 80])
        for name in ("happy", "1×512"):
            for number, kind in enumerate(LABELS[1:5]):
                last = end - 50 + (more + NEAR) * (kind == "80 % noise") + NEAR
                by[name, kind] = rows_of(
                    test_accuracy=end, train_accuracy_at_peak=high - 10 * number + NEAR,
                    test_accuracy_at_peak=end + fall + 3 * (kind != "40 % noise") + NEAR,
                    critical=last, critical_at_peak=last - rise - 2 * (kind != "60 % noise") + NEAR,
                )  # fmt: skip
        claims = [*study.peaked(by)]
        assert [claim.measured for claim in claims] == approx(
            2 * [fall, high, rise, more], abs=1e-9
        )
        assert [claim.verdict for claim in claims] == [WORDS[letter] for letter in 2 * letters]
        for claim, level in zip(claims[:3], ("40 %", "20 %", "60 %"), strict=True):
            assert f"at {level} noise" in claim.claim
        assert claims[4].claim.startswith("1×512")


def test_easy_and_hard_examples():
    """Standard deviations after one epoch and when half are right, in %; a binomial's is 10 %."""
    for true, random, gaussian, measured, letters in (
        ((30, 20), (11, 25), (10, 15), [1.9, 1.1, 1, -0.5, 2.5, 1.5], "RRRNRN"),
        ((10, 25), (9, 10), (15, 11), [0.1, 0.9, 1.5, 1.5, 1, 1.1], "RNNRUU"),
    ):
        by, kinds = {}, ("true", "random labels", "Gaussian")
        for name in ("happy", "16-16 ReLU"):
            for kind, (one, half) in zip(kinds, (true, random, gaussian), strict=True):
                by[name, kind] = rows_of(
                    one_spread=one + NEAR, half_spread=half + NEAR,
                    one_binomial=[10, 10, 10], half_binomial=[10, 10, 10],
                )  # fmt: skip
        claims = [*study.alike(by)]
        named = [claim.claim.partition(",")[0] for claim in claims]
        assert named == [*6 * ["16-16 ReLU"], *3 * ["happy"]]
        assert [claim.measured for claim in claims] == approx(measured + measured[3:], abs=1e-9)
        assert [c.verdict for c in claims] == [WORDS[letter] for letter in letters + letters[3:]]
        assert "after one epoch" in claims[0].claim and "half are right" in claims[3].claim
