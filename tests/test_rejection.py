"""Which answers to accept: by hand, by brute force, by resampling; and the gate that learns it."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from properties import DTYPES, names_checked, passes_the_checker, refuses
from scipy.stats import binom
from torch import nn

from nn_backprop import backprop
from nn_backprop.layers import SoftGate, learn_gate
from nn_backprop.studies.rejection import (
    area_under_risk_coverage,
    at_threshold,
    auroc,
    best_threshold,
    confidence,
    correct_at_false_positives,
    coverage_at_risk,
    open_set_rates,
    promised_threshold,
    risk_bound,
    risk_coverage,
    told_apart,
)

# Two pairs of equal scores: .8, right and wrong; .5, right and wrong.
SCORES = [0.9, 0.8, 0.8, 0.6, 0.5, 0.5, 0.2]
ERRORS = [0, 0, 1, 0, 1, 0, 1]

OF_ANSWERS = [  # all that is asked of scores and errors
    risk_coverage, area_under_risk_coverage, auroc, lambda s, e: at_threshold(s, e, 0.5),
    lambda s, e: coverage_at_risk(s, e, 0.1), lambda s, e: best_threshold(s, e, 0.1),
    lambda s, e: promised_threshold(s, e, 0.1), lambda s, e: open_set_rates(s, e, [0.5]),
]  # fmt: skip


def calibrated() -> tuple[np.ndarray, np.ndarray]:
    """100 answers of each confidence s = .10, .11, … .99, of which 100 (1 − s) are wrong."""
    hundredths = np.repeat(np.arange(10, 100), 100)
    return hundredths / 100, (np.tile(np.arange(100), 90) >= hundredths).astype(int)


def drawn(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores even in 0 … 1, wrong with 1 − s: the risk of all above τ is (1 − τ) / 2."""
    scores = rng.uniform(0, 1, count)
    return scores, (rng.random(count) > scores).astype(int)


# --- confidence, thresholds, curves ---


def test_confidence_is_the_largest_probability():
    logits = np.log([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])
    assert confidence(logits) == pytest.approx([0.625, 0.375])
    assert confidence(logits, classes=2) == pytest.approx([0.25, 0.375])
    assert confidence(torch.tensor(logits).float()) == pytest.approx([0.625, 0.375])
    best = torch.tensor([[20.0, 0.0], [25.0, 0.0]])  # equal in float32, but told apart
    assert len(np.unique(confidence(best))) == 2 and len(best.softmax(1).max(1)[0].unique()) == 1


def test_a_score_has_to_exceed_the_threshold_and_the_curve_by_hand():
    assert at_threshold(SCORES, ERRORS, 0.79) == (3 / 7, 1 / 3)
    coverage, risk = at_threshold(SCORES, ERRORS, 0.9)
    assert coverage == 0 and math.isnan(risk)
    thresholds, coverage, risk = risk_coverage(SCORES, ERRORS)
    assert thresholds.tolist() == [-math.inf, 0.2, 0.5, 0.6, 0.8]
    assert coverage.tolist() == [7 / 7, 6 / 7, 4 / 7, 3 / 7, 1 / 7]
    assert risk.tolist() == [3 / 7, 2 / 6, 1 / 4, 1 / 3, 0 / 1]
    for point in zip(thresholds, coverage, risk, strict=True):
        assert at_threshold(SCORES, ERRORS, point[0]) == point[1:]


def test_the_area_is_the_mean_over_all_orders_of_equal_scores():
    areas = []
    for order in permutations(range(7)):
        if all(SCORES[a] >= SCORES[b] for a, b in pairwise(order)):
            risks = [sum(ERRORS[i] for i in order[:n]) / n for n in range(1, 8)]
            areas.append(sum(risks) / 7)
    assert len(set(areas)) == 4
    for order in (slice(None), [3, 0, 5, 2, 6, 1, 4]):
        area = area_under_risk_coverage(np.array(SCORES)[order], np.array(ERRORS)[order])
        assert area == pytest.approx(sum(areas) / 4, rel=1e-12)


def test_auroc_and_told_apart_count_pairs():
    pairs = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for s, right in zip(SCORES, ERRORS, strict=True) if not right
        for t, wrong in zip(SCORES, ERRORS, strict=True) if wrong
    ]  # fmt: skip
    assert len(pairs) == 12 and 0.5 in pairs
    assert auroc(SCORES, ERRORS) == pytest.approx(sum(pairs) / 12)
    assert auroc([0.9, 0.1], [0, 1]) == 1 and auroc([0.9, 0.1], [1, 0]) == 0
    known, unknown = [0.9, 0.5], [0.5, 0.1, 0.95]
    assert told_apart(known, unknown) == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0) / 6)
    refuses("unknown", told_apart, known, [])


def test_coverage_at_a_risk_by_hand():
    expected = {0: 1 / 7, 0.2: 1 / 7, 0.25: 4 / 7, 1 / 3: 6 / 7, 3 / 7: 1, 1: 1}
    assert {risk: coverage_at_risk(SCORES, ERRORS, risk) for risk in expected} == expected
    assert coverage_at_risk([0.9, 0.8], [1, 0], 0.4) == 0  # the best answer is wrong
    # 29 errors of 100 are a risk of .29, though 100 · 0.29 is less than 29
    assert coverage_at_risk(np.arange(100), [0] * 71 + [1] * 29, 0.29) == 1


# --- the threshold of the least cost ---


def test_no_threshold_is_cheaper():
    for price in (0, 0.1, 0.25, 0.35, 0.5, 0.9, 1):

        def cost(threshold, price=price):
            pairs = zip(SCORES, ERRORS, strict=True)
            return sum(e if s > threshold else price for s, e in pairs) / 7

        threshold, least = best_threshold(SCORES, ERRORS, price)
        assert least == pytest.approx(cost(threshold), rel=1e-12), price
        for other in [-math.inf, math.inf, *np.linspace(0, 1, 101)]:
            assert cost(other) >= least - 1e-12, price
            assert cost(other) > least + 1e-12 or other >= threshold  # the lowest of equals


# --- the gate ---


class Cost(nn.Module):
    """What the gate asks of some answers, as a module: its threshold is a parameter."""

    def __init__(self, gate, errors, price):
        super().__init__()
        self.gate, self.errors, self.price = gate, errors, price

    def forward(self, scores):
        return self.gate.cost(scores, self.errors, self.price)


def gate_and_cost(dtype):
    gate = SoftGate(0.55, 0.2, dtype=dtype)
    return gate, Cost(gate, torch.tensor(ERRORS), 0.3), torch.tensor(SCORES, dtype=dtype)


def test_the_gate_and_its_gradients_are_those_of_the_derivation():
    gate, cost, scores = gate_and_cost(torch.float64)
    g = [1 / (1 + math.exp(-(s - 0.55) / 0.2)) for s in SCORES]
    assert gate(scores).tolist() == pytest.approx(g, rel=1e-12)
    mean = sum(g[n] * ERRORS[n] + (1 - g[n]) * 0.3 for n in range(7)) / 7
    assert cost(scores).item() == pytest.approx(mean, rel=1e-12)
    _, by_tape = backprop(cost, lambda value, _: value, scores, None)
    scores.requires_grad_()
    cost(scores).backward()
    slopes = [g[n] * (1 - g[n]) / 0.2 * (ERRORS[n] - 0.3) / 7 for n in range(7)]
    assert scores.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    for found in (gate.threshold.grad, by_tape["gate.threshold"]):
        assert found.item() == pytest.approx(-sum(slopes), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gates_gradients_pass_the_checker(dtype):
    _, cost, scores = gate_and_cost(dtype)
    report = passes_the_checker(cost, scores, second_order=True)
    assert len(names_checked(report)) == 2  # scores and threshold


def test_of_a_calibrated_score_the_best_and_the_learnt_threshold_are_chows():
    """An answer of confidence s is wrong with 1 − s: rejected below 1 − price. The hard gate's is
    just below that; of the soft gate, both sides count alike."""
    scores, errors = calibrated()
    for percent in (5, 10, 30, 60):
        price = (percent + 0.5) / 100
        threshold, least = best_threshold(scores, errors, price)
        assert round(100 * threshold) == 99 - percent and threshold < 1 - price < threshold + 0.01
        if percent != 10:
            continue  # learning takes time
        gate = learn_gate(scores, errors, price, temperature=0.01)
        found = gate.threshold.item()
        assert found == pytest.approx(1 - price, abs=0.005)
        assert abs(found - threshold) <= 0.01
        coverage, risk = at_threshold(scores, errors, found)
        assert coverage * risk + (1 - coverage) * price == pytest.approx(least, abs=1e-4)
        softly = gate.cost(torch.tensor(scores), torch.tensor(errors), price).item()
        assert least <= softly == pytest.approx(least, abs=1e-3)
    # At a large T all is best rejected; as T fell, the threshold came back.
    assert learn_gate(scores, errors, 0.105, temperature=0.2).threshold.item() > 1


def test_the_learnt_threshold_is_where_the_weighted_error_rate_is_the_price():
    scores, errors = drawn(np.random.default_rng(3), 2000)
    for temperature in (0.2, 0.005):
        gate = learn_gate(torch.tensor(scores).float(), torch.tensor(errors), 0.4, temperature)
        assert gate.temperature == temperature
        g = 1 / (1 + np.exp(-(scores - gate.threshold.item()) / temperature))
        assert np.average(errors, weights=g * (1 - g)) == pytest.approx(0.4, abs=2e-3)


def test_the_learnt_threshold_stays_within_reach():
    scores = np.linspace(0.2, 0.8, 31)
    for errors, price, accepted in (
        (np.zeros(31), 0.3, 1.0),  # all right
        (np.ones(31), 0.3, 0.0),  # all wrong
        (np.zeros(31), 0.0, None),  # nothing to choose, by any threshold
    ):
        found = learn_gate(scores, errors, price, temperature=0.01).threshold.item()
        assert 0.16 - 1e-9 <= found <= 0.84 + 1e-9
        assert accepted is None or at_threshold(scores, errors, found)[0] == accepted
    assert learn_gate([0.5, 0.5], [0, 1], 0.3, 0.1).threshold.item() > 0.5  # equal scores


# --- a promised risk ---


def test_the_bound_is_where_so_few_errors_have_probability_delta():
    for errors, accepted, delta in ((0, 10, 0.05), (3, 50, 0.001), (49, 50, 0.3), (7, 4000, 0.01)):
        bound = risk_bound(errors, accepted, delta)
        assert binom.cdf(errors, accepted, bound) == pytest.approx(delta, rel=1e-6)
        assert bound > errors / accepted or delta > 0.1
    assert risk_bound(0, 10, 0.05) == pytest.approx(1 - 0.05 ** (1 / 10), rel=1e-10)
    assert risk_bound(5, 5, 0.05) == 1


def test_the_promised_threshold_is_one_that_the_bound_allows():
    rng = np.random.default_rng(1)
    scores = rng.uniform(0, 1, 1000).round(2)
    errors = (rng.random(1000) > scores).astype(int)
    found = promised_threshold(scores, errors, 0.15, delta=0.05)
    share = 0.05 / 10  # ⌈log₂ 1001⌉ steps

    def bound(threshold):
        taken = errors[scores > threshold]
        return risk_bound(int(taken.sum()), len(taken), share)

    assert bound(found) <= 0.15 < bound(np.unique(scores[scores < found]).max())
    assert found > 0.7 and found in scores  # the risk of all above .7 is .15
    # a promise that is more certain, or lower, accepts less
    assert found < promised_threshold(scores, errors, 0.15, delta=1e-6)
    assert found < promised_threshold(scores, errors, 0.1, delta=0.05)


def test_promises_at_the_edges():
    scores = np.linspace(0, 1, 200)
    assert promised_threshold(scores, np.zeros(200), 0.1) == -math.inf
    assert promised_threshold(scores, np.ones(200), 0.1) == math.inf
    assert promised_threshold(scores, np.ones(200), 1.0) == -math.inf
    assert promised_threshold([0.5], [0], 0.1) == math.inf  # one right answer promises little
    assert promised_threshold([0.5], [0], 0.95, delta=0.1) == -math.inf
    # equal scores go together: the 170 right ones at .9 cannot be had without the wrong ones
    tied = [0.9] * 200 + [0.5] * 50
    assert promised_threshold(tied, [0] * 199 + [1] * 51, 0.1, 0.05) == 0.5
    assert promised_threshold(tied, [0] * 170 + [1] * 80, 0.1, 0.05) == math.inf
    # a threshold may be missed: all pass, with 4 wrong of 204, but the 4 best alone, asked
    # first, do not
    scores, errors = [0.9] * 4 + [0.5] * 200, [0] * 4 + [1] * 4 + [0] * 196
    assert risk_bound(4, 204, 0.05 / 8) < 0.1 < risk_bound(0, 4, 0.05 / 8)
    assert promised_threshold(scores, errors, 0.1, 0.05) == math.inf


# --- open sets ---


def test_the_open_set_rates_by_hand():
    unknown = [0.85, 0.5, 0.1, 0.1]
    false_positives, correct = open_set_rates(SCORES, ERRORS, unknown)
    thresholds = [-math.inf, 0.1, 0.2, 0.5, 0.6, 0.8, 0.85, 0.9, math.inf]
    for t, fp, c in zip(thresholds, false_positives, correct, strict=True):
        assert fp == sum(s > t for s in unknown) / 4
        assert c == sum(s > t and not e for s, e in zip(SCORES, ERRORS, strict=True)) / 7
    for rate, share in {0: 1 / 7, 0.2: 1 / 7, 0.25: 3 / 7, 0.5: 4 / 7, 1: 4 / 7}.items():
        assert correct_at_false_positives(SCORES, ERRORS, unknown, rate) == share, rate
    assert correct_at_false_positives([0.9, 0.8], [0, 0], [0.1], 0) == 1
    assert correct_at_false_positives([0.9, 0.8], [1, 1], [0.1], 1) == 0
    assert correct_at_false_positives([0.5, 0.5], [0, 0], [0.5], 0.99) == 0  # all or none
    refuses("unknown must be finite numbers", open_set_rates, [0.9], [0], [])


# --- edges ---


def test_all_right_all_wrong_all_equal():
    s = [0.3, 0.6, 0.9]
    for e, best in (([0, 0, 0], (-math.inf, 0)), ([1, 1, 1], (math.inf, pytest.approx(0.1)))):
        assert area_under_risk_coverage(s, e) == e[0] and math.isnan(auroc(s, e))
        assert coverage_at_risk(s, e, 0.99 * e[0]) == 1 - e[0]
        assert best_threshold(s, e, 0.1) == best
    equal, half = [0.5] * 4, [0, 1, 0, 1]
    assert [part.tolist() for part in risk_coverage(equal, half)] == [[-math.inf], [1], [0.5]]
    assert area_under_risk_coverage(equal, half) == auroc(equal, half) == 0.5
    assert best_threshold(equal, half, 0.4) == (math.inf, pytest.approx(0.4))
    assert best_threshold(equal, half, 0.6) == (-math.inf, 0.5)


def test_what_is_refused_is_named():
    for function in OF_ANSWERS:
        for scores in ([], [[0.5]], [math.nan], [math.inf]):
            sentence = r"scores must be finite numbers \(N,\), one or more"
            refuses(sentence, function, scores, np.zeros_like(scores))
        for errors in ([0], [0, 2], [0, math.nan], [[0, 1]]):
            refuses("errors must be 0", function, [0.5, 0.6], errors)
    bad_price, bad_delta, bad_temperature = (-0.1, 1.1, math.nan), (0, 1, 5), (0, -1, math.inf)
    for sentence, values, call in (
        ("price must be from 0 to 1", bad_price, lambda x: best_threshold(SCORES, ERRORS, x)),
        ("price must be from 0 to 1", bad_price, lambda x: learn_gate(SCORES, ERRORS, x, 0.1)),
        ("delta must be between", bad_delta, lambda x: promised_threshold(SCORES, ERRORS, 0.1, x)),
        ("delta must be between 0 and 1", bad_delta, lambda x: risk_bound(1, 2, x)),
        ("0 to n errors of n ≥ 1", ((-1, 3), (4, 3), (0, 0)), lambda x: risk_bound(*x, 0.1)),
        ("temperature must be positive and", bad_temperature, lambda x: SoftGate(0.5, x)),
        ("temperature must be", bad_temperature, lambda x: learn_gate(SCORES, ERRORS, 0.1, x)),
        (r"scores and errors must be \(N,\)", (([], []), ([0.5], [0, 1]), ([[0.5]], [[0]])),
         lambda x: learn_gate(*x, 0.1, 0.1)),
        ("NaN or infinite", (([math.nan], [0]), ([0.5], [math.inf])),
         lambda x: learn_gate(*x, 0.1, 0.1)),
    ):  # fmt: skip
        for value in values:
            refuses(sentence, call, value)
    assert repr(SoftGate(0.5, 0.05)) == "SoftGate(temperature=0.05)"
