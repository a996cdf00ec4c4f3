"""`experiments/minima.py`: a smoke run; what it measures; its claims, of made-up rows."""

import copy

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke_rows, splits_of, verdicts

import minima as study
from nn_backprop.engines import by_hand
from nn_backprop.models import MLP
from nn_backprop.studies import Rows

TRUE, RANDOM = study.LABELS
CHANCE = 2.302585  # ln 10: the loss of who guesses


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("minima", tmp_path)
    assert len(rows) == 10 and len(claims) == 7
    by = rows.by("labels", "width")
    assert set(by) == {(labels, width) for labels in study.LABELS for width in study.WIDTHS}
    for (labels, _), (row,) in by.items():
        assert row["examples"] == 500 and row["seeds"] == list(range(20))
        for name in (*study.NUMBERS, "gradient_at_the_start", "gradient_at_the_end"):
            assert len(set(row[name])) > 5 and len(row[name]) == 20  # seeds differ
            assert min(row[name]) >= 0
        means = {name: np.mean(row[name]) for name in study.NUMBERS}
        assert means["train_loss"] < CHANCE
        if labels == TRUE:
            assert means["test_loss"] < CHANCE and means["test_accuracy"] > 0.4  # chance is 0.1
        else:
            assert means["test_loss"] > 0.9 * CHANCE and means["test_accuracy"] < 0.25


def test_no_test_image_is_learnt_and_only_training_labels_are_random():
    true, noise = (study.data_of(study.Options(smoke=True), labels) for labels in study.LABELS)
    assert true.images.shape[1:] == (1, 10, 10)
    train, _, _ = splits_of(true)
    assert len(train) == 500
    assert noise.train.equal(true.train) and noise.test.equal(true.test)
    changed = (noise.labels != true.labels).nonzero().flatten().tolist()
    assert set(changed) <= train and 0.8 < len(changed) / 500 < 0.98  # nine in ten


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


# --- the claims, on rows made up for them ---

SEEDS = 40


def made(spreads=None, correlations=None, gradients=None):
    """Test losses of the given spread by labels and width, else 1; the training loss is what makes
    them `correlations` alike. Rows of half of the seeds each, the last first."""
    generator, rows = np.random.default_rng(0), Rows()
    for kind in ((labels, width) for labels in study.LABELS for width in study.WIDTHS):
        a, b = generator.normal(size=(2, SEEDS))
        r = (correlations or {}).get(kind[1], 0.5)
        numbers = {
            "seeds": np.arange(SEEDS),
            "train_loss": r * a + (1 - r * r) ** 0.5 * b,
            "test_loss": 5 + (spreads or {}).get(kind, 1) * a,
            "gradient_at_the_start": np.full(SEEDS, 2.0),
            "gradient_at_the_end": 2 * np.resize((gradients or {}).get(kind, 0.01), SEEDS),
            "train_accuracy": np.ones(SEEDS), "test_accuracy": np.ones(SEEDS),
        }  # fmt: skip
        for half in (slice(SEEDS // 2, None), slice(SEEDS // 2)):
            lists = {name: values[half].tolist() for name, values in numbers.items()}
            rows.append({"labels": kind[0], "width": kind[1], **lists})
    return rows


def test_each_claim_can_fail():
    """Of the spreads, of the correlation, of the gradients."""
    for changed, expected in (
        ({}, "uuuu u rr"),
        ({"spreads": {(TRUE, 500): 0.2, (RANDOM, 500): 5}}, "rrnn u rr"),
        ({"spreads": {(TRUE, 25): 0.2, (RANDOM, 25): 5}}, "nnrr u rr"),
        ({"spreads": {(TRUE, 50): 0.01, (RANDOM, 250): 0.01}}, "uuuu u rr"),  # others' widths
        ({"correlations": {25: 0.95, 500: 0.1}}, "uuuu r rr"),
        ({"correlations": {25: 0.1, 500: 0.95}}, "uuuu n rr"),
        ({"correlations": {50: 0.95, 100: -0.9}}, "uuuu u rr"),
        # The worst width of a seed: either mean is 0.06, and one of them is always 0.11.
        ({"gradients": {(TRUE, 50): [0.01, 0.11], (TRUE, 250): [0.11, 0.01]}}, "uuuu u nr"),
        ({"gradients": {(RANDOM, 25): [0.099, 0.105]}}, "uuuu u rn"),
        ({"gradients": {(RANDOM, 25): [0.05, 0.151]}}, "uuuu u ru"),
    ):
        assert verdicts(study.claims(made(**changed))) == expected.replace(" ", ""), changed
