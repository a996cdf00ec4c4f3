"""`experiments/random_labels.py`: a smoke run; what is read when; its claims, of made-up rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke_rows, verdicts

import random_labels as study
from nn_backprop.data import load
from nn_backprop.studies import Recipe, Rows

ADAM = ["1×4096", "1×512, n = 5,000", "1×512", "happy", "happy, n = 5,000", "16-16 ReLU",
        "16-16 ReLU, n = 5,000"]  # fmt: skip
KINDS = ("true", *study.NOISY, "random labels", "shuffled pixels", "random pixels", "Gaussian")


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("random_labels", tmp_path)
    trained, begun = rows.where(what="training"), rows.where(what="starts")
    assert len(claims) == 7 + 2 + 2 * 5 + 2 * 4 + 3 * 3
    two = ("true", "random labels")
    assert set(trained.by("setting", "kind", "seed")) == {
        (name, kind, seed)
        for name in [*ADAM, "1×512, SGD", "happy, SGD"]
        for kind in (KINDS if name in ("happy", "1×512") else two)
        for seed in (0, 1)
    }
    assert list(begun.by("setting", "kind", "seed")) == [
        (name, kind, seed)
        for name in ("happy", "16-16 ReLU")
        for kind in (*two, "Gaussian")
        for seed in (0, 1)
    ]
    for row in trained:
        name, kind, true = row["setting"], row["kind"], row["kind"] == "true"
        assert row["n"] == (200 if "5,000" in name else 100) and "curves" not in row
        assert ("critical" in row) == (name in ("happy", "1×512") and kind in KINDS[:6])
        assert ("loss_start" in row) == (kind in two)
        if kind in two:
            assert all(0 <= row[f"{of}_start"] < row[f"{of}_end"] for of in ("loss", "error"))
            assert row["test_accuracy"] > 0.6 if true else row["test_accuracy"] < 0.3
    for of, row in zip(Rows.read(rows.folder, "curves.jsonl"), trained, strict=True):
        assert all(of[key] == row[key] for key in ("setting", "kind", "seed"))
        assert len(of["every_train_loss"]) == row["epochs"] + 1  # the first is that of epoch 0
        assert of["every_train_accuracy"][row["peak_epoch"]] == row["train_accuracy_at_peak"]


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
        assert all(map(torch.equal, found, (validation[chosen], validation[searched])))
    (made,) = study.made(study.Job(TINY, ("true",), 1, OPTIONS))
    assert torch.equal(made.validation, data.validation[:270])


def test_together_is_as_alone_and_the_test_split_chooses_nothing(monkeypatch):
    kinds, data = ("true", "40 % noise", "random labels"), load("digits")
    together = study.train(study.Job(TINY, kinds, 1, OPTIONS))
    labels = data.labels.clone()
    labels[data.test] = (labels[data.test] + 1) % 10
    for kind, row in zip(kinds, together, strict=True):
        job = study.Job(TINY, (kind,), 1, OPTIONS)
        (alone,) = study.train(job)
        assert (row["kind"], row["seed"], row["peak_epoch"]) == (kind, 1, alone["peak_epoch"])
        losses, others = (of["curves"]["every_train_loss"] for of in (row, alone))
        assert losses == approx(others, rel=1e-3)
    assert len({row["train_loss"] for row in together}) == 3
    monkeypatch.setattr(study.studies, "load_data", lambda _: replace(data, labels=labels))
    (other,) = study.train(job)
    changed = {"test_accuracy", "test_accuracy_at_peak"}
    assert {name for name in alone if alone[name] != other[name]} == changed


# --- the claims, on rows made up for them ---


def rows_of(**columns):
    """One row a seed, the numbers by name; of accuracies and critical samples, in percent."""
    shares = ("accuracy", "critical", "spread", "binomial")
    scaled = {
        name: np.broadcast_to(values, 3) / (100 if any(word in name for word in shares) else 1)
        for name, values in columns.items()
    }
    return Rows(
        {"seed": seed} | {name: float(values[seed]) for name, values in scaled.items()}
        for seed in (2, 0, 1)
    )


NEAR = np.array([-0.1, 0, 0.1])


def test_the_same_training_accuracy_and_chance():
    """Of all networks by Adam 99, 98 and 97 % with all labels, and 10 % of the test images."""
    for name, learnt, test, expected in (
        ("happy", [95.2, 94.1, 93.3], 10 + NEAR, "rrrnrrr u r"),
        ("happy", [98.5, 97.6, 96.5], 10 + NEAR, "rrrrrrr u r"),  # seeds differ, pairs hardly
        ("1×512, n = 5,000", [99.5, 99.6, 99.7], 17 + NEAR, "rurrrrr r u"),  # (6 × 10 + 17) / 7
        ("1×512, n = 5,000", [99.0, 99.1, 98.9], 24 + NEAR, "rurrrrr n n"),
    ):
        by = {}
        for of in ADAM:
            by[of, "true"] = rows_of(train_accuracy=[99, 98, 97], test_accuracy=80)
            by[of, "random labels"] = rows_of(
                train_accuracy=learnt if of == name else [99, 98, 97],
                test_accuracy=test if of == name else 10 + NEAR,
            )
        assert verdicts(study.memorised(by)) == expected.replace(" ", ""), (name, learnt)


def test_the_shape_of_the_fall():
    """From 10 to 90 % it takes 10, 20 and 30 epochs, with random labels `times` as many."""
    for first, line, random_first, random_line, times, expected in (
        (0.3, 0.8, 0.1, 0.99, [4, 4.1, 3.9], "rrrnr"),
        (0.05, 0.99, 0.6, 0.8, [0.4, 0.41, 0.39], "nnnrn"),
        (1 / 9, 0.9, 0.5, 0.95, [1, 1.1, 0.9], "uuruu"),
    ):
        took, near, by = np.array([10, 20, 30]), NEAR / 100, {}
        for name in ("happy, SGD", "1×512, SGD"):
            by[name, "true"] = rows_of(
                loss_first=first + near, loss_line=line + near, loss_start=5, loss_end=5 + took
            )
            by[name, "random labels"] = rows_of(
                loss_first=random_first + near, loss_line=random_line + 2 * near, loss_start=5,
                loss_end=5 + took * times,
            )  # fmt: skip
        assert verdicts(study.fallen(by)) == 2 * expected


def test_the_peak():
    """At 40 % noise the test accuracy falls least, at 20 % most have been learnt at the peak, and
    at 60 % the critical samples rise least; at 80 % there are more of them than at 20 %."""
    for fall, high, rise, more, expected in (
        (5, 70, 4, 6, "rrrr"),
        (-1, 95, -1, -6, "nnnn"),
        (0, 90, 0, 0, "uuuu"),
        (-1, 70, 4, 6, "nrrr"),  # at the other levels it falls by 2
    ):
        by, end = {}, np.array([60, 70, 80])
        for name in ("happy", "1×512"):
            for number, kind in enumerate(study.NOISY):
                last = end - 50 + (more + NEAR) * (kind == "80 % noise") + NEAR
                by[name, kind] = rows_of(
                    test_accuracy=end, train_accuracy_at_peak=high - 10 * number + NEAR,
                    test_accuracy_at_peak=end + fall + 3 * (kind != "40 % noise") + NEAR,
                    critical=last, critical_at_peak=last - rise - 2 * (kind != "60 % noise") + NEAR,
                )  # fmt: skip
        claims = [*study.peaked(by)]
        assert verdicts(claims) == 2 * expected
        for claim, level in zip(claims[:3], ("40 %", "20 %", "60 %"), strict=True):
            assert f"at {level} noise" in claim.claim


def test_easy_and_hard_examples():
    """Standard deviations after one epoch and when half are right, in %; a binomial's is 10 %."""
    for spreads, expected in (
        (((30, 20), (11, 25), (10, 15)), "rrr nrn nrn"),
        (((10, 25), (9, 10), (15, 11)), "rnn ruu ruu"),
    ):
        by = {
            (name, kind): rows_of(
                one_spread=one + NEAR, half_spread=half + NEAR, one_binomial=10, half_binomial=10
            )
            for name in ("happy", "16-16 ReLU")
            for kind, (one, half) in zip(study.SEVERAL, spreads, strict=True)
        }
        assert verdicts(study.alike(by)) == expected.replace(" ", "")
