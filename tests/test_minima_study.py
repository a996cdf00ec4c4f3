"""`experiments/minima.py`: a smoke run; what it measures; its claims, of made-up rows."""

import copy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.stats import pearsonr
from test_studies import smoke_rows

from nn_backprop.engines import by_hand
from nn_backprop.models import MLP
from nn_backprop.studies import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import minima as study

TRUE, RANDOM = study.LABELS
CHANCE = 2.302585  # ln 10: the loss of who guesses
LISTS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "gradient_at_the_start",
         "gradient_at_the_end")  # fmt: skip


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("minima", tmp_path)
    assert len(rows) == 10 and len(claims) == 7
    by = {key: of[0] for key, of in rows.by("labels", "width").items()}
    assert set(by) == {(labels, width) for labels in study.LABELS for width in study.WIDTHS}
    for (labels, _), row in by.items():
        assert row["dataset"] == "digits" and row["examples"] == 500
        assert row["seeds"] == list(range(20))
        for name in LISTS:
            assert len(set(row[name])) > 5 and len(row[name]) == 20  # seeds differ
            assert min(row[name]) >= 0
        for part in ("train", "test"):
            accuracy, loss = (np.mean(row[f"{part}_{what}"]) for what in ("accuracy", "loss"))
            if labels == TRUE:
                assert accuracy > 0.4 and loss < CHANCE  # chance is 0.1
            elif part == "test":
                assert accuracy < 0.25 and loss > 0.9 * CHANCE
            else:
                assert loss < CHANCE


def test_no_test_image_is_learnt_and_only_training_labels_are_random():
    true, noise = (study.data_of(study.Options(smoke=True), labels) for labels in study.LABELS)
    assert true.images.shape[1:] == (1, 10, 10)
    splits = [set(split.tolist()) for split in (true.train, true.validation, true.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) and len(splits[0]) == 500
    assert noise.train.equal(true.train) and noise.test.equal(true.test)
    changed = (noise.labels != true.labels).nonzero().flatten().tolist()
    assert set(changed) <= splits[0]
    assert 0.8 < len(changed) / 500 < 0.98  # nine in ten


def test_the_gradient_is_that_of_all_training_images():
    data = study.data_of(study.Options(smoke=True), RANDOM)
    torch.manual_seed(0)
    models = [MLP((100, 7, 10)) for _ in range(3)]
    inputs, targets = data.batch(data.train, torch.float64)
    by_chain_rule = []
    for model in models:
        _, grads = by_hand.mlp_backprop(copy.deepcopy(model).double(), inputs, targets)
        by_chain_rule.append(sum(grad.square().sum().item() for grad in grads.values()) ** 0.5)
    assert study.gradient_norms(models, data) == approx(by_chain_rule, rel=1e-4)
    assert all(p.grad is None for model in models for p in model.parameters())


def test_spreads_and_correlations():
    values = np.array([[4.0, 1.0, 3.0, 2.0, 10.0], [1.0, 1.0, 1.0, 1.0, 2.0]])
    # mean 4, deviations 0, −3, −1, −2, 6: squares add up to 50
    deviations = np.array([(50 / 4) ** 0.5, 0.2**0.5])
    assert study.deviation(values) == approx(deviations)
    assert study.relative_deviation(values) == approx(100 * deviations / [4, 1.2])
    assert study.interquartile(values) == approx([4 - 2, 0])
    one, other = np.random.default_rng(0).normal(size=(2, 3, 11))
    by_scipy = [pearsonr(a, b).statistic for a, b in zip(one, other, strict=True)]
    assert study.correlation(one, other) == approx(by_scipy)


def test_the_rows_of_a_kind_are_joined_in_the_order_of_the_seeds():
    rows = Rows()
    for width in study.WIDTHS:
        for first in (2, 0):  # done in another order
            row = {name: [width + first, width + first + 1] for name in LISTS}
            row["gradient_at_the_end"] = [first, first + 1]
            rows.append({"labels": RANDOM, "width": width, "seeds": [first, first + 1], **row})
    group = study.gathered(rows)[RANDOM, 50]
    assert list(group.test_loss) == list(group.train_loss) == [50, 51, 52, 53]
    assert group.gradient == approx([0, 1 / 51, 2 / 52, 3 / 53])


# --- the claims, on rows made up for them ---

SEEDS = 40


def rows_of(spreads=None, correlations=None, gradients=None):
    """Test losses that have the given spread by width, 1 unless given.

    The training loss is what makes the test loss `correlations` alike.
    """
    generator, rows = np.random.default_rng(0), Rows()
    for labels in study.LABELS:
        for width in study.WIDTHS:
            a, b = generator.normal(size=(2, SEEDS))
            r = (correlations or {}).get(width, 0.5)
            rows.append({
                "labels": labels, "width": width, "seeds": list(range(SEEDS)),
                "train_loss": list(r * a + (1 - r * r) ** 0.5 * b),
                "test_loss": list(5 + (spreads or {}).get((labels, width), 1) * a),
                "gradient_at_the_start": [2.0] * SEEDS,
                "gradient_at_the_end": [
                    2 * share for share in (gradients or {}).get((labels, width), [0.01] * SEEDS)
                ],
                "train_accuracy": [0.9] * SEEDS, "test_accuracy": [0.8] * SEEDS,
            })  # fmt: skip
    return rows


def verdicts(claims):
    return "".join(claim.verdict[0] for claim in claims)  # reproduced, not, undecided


@pytest.mark.parametrize(
    "spreads, expected",
    [
        ({(TRUE, 500): 0.2, (RANDOM, 500): 5}, "rrnn"),
        ({(TRUE, 25): 0.2, (RANDOM, 25): 5}, "nnrr"),
        ({(TRUE, 50): 0.01, (RANDOM, 250): 0.01}, "uuuu"),  # not of these widths
    ],
)
def test_the_spread_at_500_against_that_at_25(spreads, expected):
    rows = rows_of(spreads)
    claims = study.claims(rows)
    assert verdicts(claims[:4]) == expected
    assert [claim.published for claim in claims[:4]] == 2 * ["shrinks with width"] + 2 * [None]
    of = rows.where(labels=TRUE).by("width")
    wide, narrow = (of[width][0]["test_loss"] for width in (500, 25))
    assert claims[0].measured == approx(statistics.stdev(wide) / statistics.stdev(narrow))
    quartiles = [statistics.quantiles(v, n=4, method="inclusive") for v in (wide, narrow)]
    ranges = [third - first for first, _, third in quartiles]
    assert claims[1].measured == approx(ranges[0] / ranges[1])


@pytest.mark.parametrize(
    "correlations, expected",
    [({25: 0.95, 500: 0.1}, "r"), ({25: 0.1, 500: 0.95}, "n"), ({50: 0.95, 100: -0.9}, "u")],
)
def test_the_correlation_at_500_against_that_at_25(correlations, expected):
    rows = rows_of(correlations=correlations)
    claim = study.claims(rows)[4]
    assert verdicts([claim]) == expected
    (wide,), (narrow,) = (rows.where(labels=TRUE, width=width) for width in (500, 25))
    by_hand = [pearsonr(row["train_loss"], row["test_loss"]).statistic for row in (wide, narrow)]
    assert claim.measured == approx(by_hand[0] - by_hand[1])


def test_the_gradient_of_the_worst_width_counts():
    odd = [0.3 if seed % 2 else 0.02 for seed in range(SEEDS)]
    even = [0.02 if seed % 2 else 0.3 for seed in range(SEEDS)]
    # Either has the mean 0.16, and one of them is always 0.3.
    *_, true, random = study.claims(rows_of(gradients={(TRUE, 50): odd, (TRUE, 250): even}))
    assert (true.measured, true.verdict) == (approx(0.3), "not reproduced")
    assert (random.measured, random.verdict) == (approx(0.01), "reproduced")
    assert "at most 0.1 (our bar)" in true.claim and true.claim.startswith("true labels")
    for shares, expected in (([0.099, 0.105], "n"), ([0.05, 0.151], "u")):
        rows = rows_of(gradients={(RANDOM, 25): shares * (SEEDS // 2)})
        assert verdicts(study.claims(rows)[-2:]) == "r" + expected


def test_too_few_seeds_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.STUDY.main(["--seeds", "19"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "minima.py: --seeds must be 20 or more, not 19\n"
