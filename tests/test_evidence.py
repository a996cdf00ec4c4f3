"""Intervals and verdicts, and the results of the experiments' smoke runs."""

import math
import random

import numpy as np
import pytest
from properties import refuses
from scipy.stats import t
from test_studies import smoke_rows

from nn_backprop.studies.evidence import (
    at_least,
    between,
    bootstrap_interval,
    counted,
    interval,
    markdown_table,
    mean_interval,
    mean_sd,
    median_between,
    median_interval,
    one_of,
    quartiles,
)


def test_too_few_values_have_no_interval():
    refuses("two values", interval, [0.5])
    refuses("six values or more, not 5", median_interval, [1.0] * 5)
    for sizes, told in (((19,), "not 19"), ((30, 29), "not 30, 29")):
        samples = [[0.5] * n for n in sizes]
        refuses(told, bootstrap_interval, lambda *drawn: drawn[0].mean(-1), *samples)


def test_the_interval_of_a_median_misses_it_at_each_end_in_at_most_2_5_percent():
    for n in range(6, 45):
        values = [1.5**k for k in range(n)]
        low, high = median_interval(random.Random(0).sample(values, n))
        below, above = values.index(low), n - 1 - values.index(high)
        # The median lies beyond: at most so many heads of n.
        missed = [sum(math.comb(n, k) for k in range(below + 1 + more)) / 2**n for more in (0, 1)]
        assert below == above
        assert missed[0] <= 0.025 < missed[1]  # the narrowest such interval


def test_the_bootstrap_interval_holds_the_middle_of_10_000_draws_the_same_of_each_sample():
    one = np.random.default_rng(1).exponential(size=60)
    drawn = one[np.random.default_rng(0).integers(60, size=(10_000, 60))]
    by_hand = np.quantile(drawn.std(-1, ddof=1), (0.025, 0.975))
    assert bootstrap_interval(lambda a: a.std(-1, ddof=1), one.tolist()) == tuple(by_hand)
    # Each difference is 3, whatever is drawn, as long as the same is drawn from both.
    low, high = bootstrap_interval(lambda a, b: (a - b).mean(-1), one + 3, one)
    assert low == pytest.approx(3) and high == pytest.approx(3)


def test_a_claim_of_a_range_is_judged_by_the_whole_interval():
    values = [0.94, 0.95, 0.96]
    for low, high, verdict in (
        (0.9, 1.0, "reproduced"),
        (0.95, 1.0, "undecided"),
        (0.0, 0.95, "undecided"),
        (0.945, 0.955, "undecided"),  # the interval is wider
        (0.99, 1.0, "not reproduced"),
        (0.0, 0.9, "not reproduced"),
    ):
        claim = between("accuracy", None, values, low, high)
        assert (claim.verdict, claim.measured) == (verdict, pytest.approx(0.95)), (low, high)
        assert high < 1 or at_least("accuracy", low, values).verdict == verdict


def test_one_published_value_is_judged_as_one_more_of_ours():
    # mean 4, s = 2, n = 4: 4 ± t(0.975, 3) · 2 · √(1 + 1/4) with t = 3.182446 from a table, far
    # outside the interval of the mean, 4 ± 3.182
    for far, verdict in ((7.115, "reproduced"), (7.118, "not reproduced")):
        for published in (4 + far, 4 - far):
            claim = one_of("accuracy", published, [4 - 6**0.5, 4.0, 4.0, 4 + 6**0.5])
            assert (claim.published, claim.measured) == (published, pytest.approx(4))
            assert claim.interval == pytest.approx((4 - 7.11617, 4 + 7.11617), abs=1e-4)
            assert claim.verdict == verdict


def test_the_intervals_of_the_mean_and_of_one_more_are_students():
    for n in (2, 5, 10):
        values = np.random.default_rng(n).normal(size=n)
        error = values.std(ddof=1) / n**0.5
        ours, one_more = interval(values), one_of("accuracy", 0.0, values.tolist()).interval
        assert ours == pytest.approx(t.interval(0.95, n - 1, values.mean(), error))
        wider = t.interval(0.95, n - 1, values.mean(), error * (n + 1) ** 0.5)
        assert one_more == pytest.approx(wider)


@pytest.mark.slow
def test_accuracy_and_feeding_smoke(tmp_path):
    rows, claims = smoke_rows("accuracy", tmp_path)
    assert [(row["model"], row["seed"]) for row in rows] == [
        (model, seed) for model in ("happy", "mlp", "cnn") for seed in (0, 1)
    ]
    assert {row["parameters"] for row in rows} == {13_002, 101_770, 18_378}
    assert all(0 < row["test_accuracy"] < 1 and row["train_seconds"] > 0 for row in rows)
    # two epochs; chance is 0.1
    assert rows.where(model="mlp").values("validation_accuracy").mean() > 0.7
    assert len(claims) == 3
    (row,), claims = smoke_rows("feeding", tmp_path)
    assert row["data_loader"] > 0 and row["one_tensor"] > 0 and not claims


def test_cells_of_a_table():
    assert mean_sd([1.0, 2.0, 6.0]) == "3.00 ± 2.65"  # deviation √((4 + 1 + 9)/2)
    assert mean_sd([0.0, 1.0], "+", digits=1) == "+0.5 ± 0.7"
    assert mean_interval([2.0, 4.0, 6.0], ".1f") == "4.0 (-1.0 to 9.0)"  # 4.3027 · 2/√3 = 4.97
    assert quartiles([1.0, 2.0, 3.0, 4.0, 105.0]) == "3.00 (2.00–4.00)"
    table = "| model | accuracy |\n| --- | --- |\n| mlp | 0.5 |\n"
    assert markdown_table([{"model": "mlp", "accuracy": 0.5}]) == table


def test_a_median_and_a_count_are_judged_as_a_mean():
    values = [1.0, 2, 3, 4, 5, 6]  # the interval is from the first to the last
    for high, verdict in ((6, "reproduced"), (5, "undecided"), (0.5, "not reproduced")):
        claim = median_between("time", None, values, high=high)
        assert (claim.measured, claim.interval, claim.verdict) == (3.5, (1, 6), verdict)
        assert median_between("time", None, [-x for x in values], low=-high).verdict == verdict
    for value, verdict in ((3, "reproduced"), (4, "reproduced"), (5, "not reproduced")):
        claim = counted("count", 3, value, 3, 4)
        assert (claim.interval, claim.verdict) == ((value, value), verdict)
