"""`experiments/minima.py`: run with --smoke; its claims, of made-up groups; what it measures."""

import copy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.stats import pearsonr
from test_studies import smoke

from nn_backprop.engines import by_hand
from nn_backprop.models import MLP
from nn_backprop.studies.old_study import command

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import minima as study

LISTS = (
    "gradient_at_the_start", "gradient_at_the_end",
    "train_loss", "train_accuracy", "test_loss", "test_accuracy",
)  # fmt: skip
CHANCE = float(np.log(10))  # the loss of one who gives each class a tenth


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("minima", tmp_path)
    rows = {(row["labels"], row["width"]): row for row in results["rows"]}
    assert set(rows) == {(labels, width) for labels in ("true labels", "random labels")
                         for width in (25, 50, 100, 250, 500)}  # fmt: skip
    assert len(rows) == len(results["rows"])
    for (labels, _), row in rows.items():
        assert row["dataset"] == "digits" and row["examples"] == 500
        assert row["seeds"] == list(range(20))
        for name in LISTS:
            assert len(set(row[name])) > 5 and len(row[name]) == 20  # seeds differ
            assert min(row[name]) >= 0
        for part in ("train", "test"):
            accuracy = statistics.fmean(row[f"{part}_accuracy"])
            loss = statistics.fmean(row[f"{part}_loss"])
            if labels == "true labels":
                assert accuracy > 0.4 and loss < CHANCE  # chance is 0.1
            elif part == "test":
                assert accuracy < 0.25 and loss > 0.9 * CHANCE
            else:
                assert loss < CHANCE
    claims = results["claims"]
    assert len(claims) == 7 and all("not MNIST" in claim["claim"] for claim in claims)
    wide, narrow = (rows["true labels", width]["test_loss"] for width in (500, 25))
    assert claims[0]["claim"].startswith("true labels: standard deviation")
    assert claims[0]["measured"] == approx(statistics.stdev(wide) / statistics.stdev(narrow))
    worst = [
        max(row["gradient_at_the_end"][seed] / row["gradient_at_the_start"][seed]
            for (labels, _), row in rows.items() if labels == "random labels")
        for seed in range(20)
    ]  # fmt: skip
    assert claims[-1]["claim"].startswith("random labels: the gradient")
    assert claims[-1]["measured"] == approx(statistics.fmean(worst))


def test_no_test_image_is_learnt_and_only_training_labels_are_random():
    true, noise = (study._data(study.Options(smoke=True), labels) for labels in study.LABELS)
    assert true.images.shape[1:] == (1, 10, 10)
    splits = [set(split.tolist()) for split in (true.train, true.validation, true.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) and len(splits[0]) == 500
    assert noise.train.equal(true.train) and noise.test.equal(true.test)
    changed = (noise.labels != true.labels).nonzero().flatten().tolist()
    assert set(changed) <= splits[0]
    assert 0.8 < len(changed) / 500 < 0.98  # nine in ten


def test_the_gradient_is_that_of_all_training_images():
    data = study._data(study.Options(smoke=True), "random labels")
    torch.manual_seed(0)
    models = [MLP((100, 7, 10)) for _ in range(3)]
    inputs, targets = data.batch(data.train, torch.float64)
    by_chain_rule = []
    for model in models:
        twin = copy.deepcopy(model).double()
        _, grads = by_hand.mlp_backprop(twin, inputs, targets)
        by_chain_rule.append(sum(grad.square().sum().item() for grad in grads.values()) ** 0.5)
    assert study._gradient_norms(models, data) == approx(by_chain_rule, rel=1e-4)
    assert all(p.grad is None for model in models for p in model.parameters())


def test_spreads_and_correlations():
    values = np.array([[4.0, 1.0, 3.0, 2.0, 10.0], [1.0, 1.0, 1.0, 1.0, 2.0]])
    # mean 4, deviations 0, −3, −1, −2, 6: squares add up to 50
    assert study.deviation(values) == approx([(50 / 4) ** 0.5, 0.2**0.5])
    assert study.relative_deviation(values) == approx(
        [100 * (50 / 4) ** 0.5 / 4, 100 * 0.2**0.5 / 1.2]
    )
    assert study.interquartile(values) == approx([4 - 2, 0])
    one, other = np.random.default_rng(0).normal(size=(2, 3, 11))
    assert study.correlation(one, other) == approx(
        [pearsonr(a, b).statistic for a, b in zip(one, other, strict=True)]
    )


def test_the_rows_of_a_kind_are_joined_in_the_order_of_the_seeds():
    rows = []
    for labels in study.LABELS:
        for width in study.WIDTHS:
            for first in (2, 0):  # done in another order
                row = {name: [width + first, width + first + 1] for name in LISTS}
                row["gradient_at_the_end"] = [first, first + 1]
                rows.append({"labels": labels, "width": width, "seeds": [first, first + 1], **row})
    group = study.gathered(rows)["random labels", 50]
    assert group.test_loss == group.train_loss == [50, 51, 52, 53]
    assert group.gradient == approx([0, 1 / 51, 2 / 52, 3 / 53])


# --- the claims, on groups made up for them ---

SEEDS = 40


def made(spreads, correlations=None, gradients=None):
    """Groups whose test losses have the given spread by width, the same for both labels.

    The training loss is what makes the test loss `correlations` alike.
    """
    generator = np.random.default_rng(0)
    groups = {}
    for labels in study.LABELS:
        for width in study.WIDTHS:
            a, b = generator.normal(size=(2, SEEDS))
            r = (correlations or {}).get(width, 0.5)
            groups[labels, width] = study.Group(
                train_loss=list(r * a + (1 - r * r) ** 0.5 * b),
                test_loss=list(5 + spreads.get((labels, width), 1) * a),
                gradient=list((gradients or {}).get((labels, width), [0.01] * SEEDS)),
                train_accuracy=[0.9] * SEEDS,
                test_accuracy=[0.8] * SEEDS,
            )
    return groups


def verdicts(groups):
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    return "".join(short[claim.verdict] for claim in study._claims(groups))


TRUE, RANDOM = study.LABELS


@pytest.mark.parametrize(
    "spreads, expected",
    [
        ({(TRUE, 500): 0.2, (RANDOM, 500): 0.2}, "RRRR"),
        ({(TRUE, 500): 0.2, (RANDOM, 500): 5}, "RRNN"),
        ({(TRUE, 25): 0.2, (RANDOM, 25): 5}, "NNRR"),
        ({(TRUE, 50): 0.01, (RANDOM, 250): 0.01}, "UUUU"),  # not of these widths
    ],
)
def test_the_spread_at_500_against_that_at_25(spreads, expected):
    assert verdicts(made(spreads))[:4] == expected


def test_the_ratio_of_spreads_is_measured_as_one_would_by_hand():
    groups = made({(TRUE, 500): 0.2})
    claims = study._claims(groups)
    wide, narrow = groups[TRUE, 500].test_loss, groups[TRUE, 25].test_loss
    assert claims[0].measured == approx(statistics.stdev(wide) / statistics.stdev(narrow))
    quartiles = [statistics.quantiles(v, n=4, method="inclusive") for v in (wide, narrow)]
    ranges = [third - first for first, _, third in quartiles]
    assert claims[1].measured == approx(ranges[0] / ranges[1])
    assert [claim.published for claim in claims[:4]] == 2 * ["shrinks with width"] + 2 * [None]


@pytest.mark.parametrize(
    "correlations, expected",
    [({25: 0.95, 500: 0.1}, "R"), ({25: 0.1, 500: 0.95}, "N"), ({50: 0.95, 100: -0.9}, "U")],
)
def test_the_correlation_at_500_against_that_at_25(correlations, expected):
    groups = made({}, correlations)
    assert verdicts(groups)[4] == expected
    wide, narrow = groups[TRUE, 500], groups[TRUE, 25]
    by_hand = [pearsonr(g.train_loss, g.test_loss).statistic for g in (wide, narrow)]
    assert study._claims(groups)[4].measured == approx(by_hand[0] - by_hand[1])


def test_the_gradient_of_the_worst_width_counts():
    odd = [0.3 if seed % 2 else 0.02 for seed in range(SEEDS)]
    even = [0.02 if seed % 2 else 0.3 for seed in range(SEEDS)]
    groups = made({}, gradients={(TRUE, 50): odd, (TRUE, 250): even})  # mean 0.16, always one 0.3
    *_, true, random = study._claims(groups)
    assert (true.measured, true.verdict) == (approx(0.3), "not reproduced")
    assert (random.measured, random.verdict) == (approx(0.01), "reproduced")
    assert "at most 0.1 (our bar)" in true.claim and true.claim.startswith("true labels")
    lone = made({}, gradients={(RANDOM, 25): [0.099, 0.105] * (SEEDS // 2)})
    assert verdicts(lone)[-2:] == "RN"
    assert verdicts(made({}, gradients={(RANDOM, 25): [0.05, 0.151] * (SEEDS // 2)}))[-1] == "U"


def test_too_few_seeds_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(study.Options, "", study.conduct, ["--seeds", "19"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "minima.py: --seeds must be 20 or more, not 19\n"
