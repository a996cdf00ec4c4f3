"""Intervals and verdicts, and the results of the experiments' smoke runs."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from nn_backprop.studies.evidence import (
    at_least,
    between,
    bootstrap_interval,
    differences,
    interval,
    markdown_table,
    median_interval,
    one_of,
    spread,
    tuned,
    write_results,
)

ROOT = Path(__file__).parents[1]


def test_the_interval_is_students():
    # mean 4, s = 2, n = 4: 4 ± t(0.975, 3) · 2/√4 with t = 3.182446 from a table
    values = [4 - 6**0.5, 4.0, 4.0, 4 + 6**0.5]
    low, high = interval(values)
    assert low == pytest.approx(4 - 3.182446 * 2 / 2, abs=1e-5)
    assert high == pytest.approx(4 + 3.182446 * 2 / 2, abs=1e-5)


def test_what_is_tuned_has_the_settings_of_the_highest_mean_score_of_its_group():
    scores = {
        ("a", 1, 0): [0.1, 0.9], ("a", 2, 0): [0.62, 0.62], ("a", 2, 1): [0.55, 0.55],
        ("b", 1, 0): [0.7, 0.7], ("b", 2, 1): [1.0, 0.1],
    }  # fmt: skip
    rows = [
        {"who": who, "lr": lr, "decay": decay, "validation": score, "test": 1 - score}
        for (who, lr, decay), found in scores.items()
        for score in found
    ]
    random.Random(0).shuffle(rows)

    def kept(*of):
        return [row for row in rows if (row["who"], row["lr"], row["decay"]) in of]

    settings = ["lr", "decay"]
    assert tuned(rows, ["who"], settings, "validation") == kept(("a", 2, 0), ("b", 1, 0))
    assert tuned(rows, ["who"], settings, "test") == kept(("a", 1, 0), ("b", 2, 1))
    assert tuned(rows, [], settings, "validation") == kept(("a", 2, 0))


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="two values"):
        interval([0.5])


@pytest.mark.parametrize("n", range(6, 45))
def test_the_interval_of_a_median_misses_it_at_each_end_in_at_most_2_5_percent(n):
    values = [1.5**k for k in range(n)]
    low, high = median_interval(random.Random(0).sample(values, n))
    below, above = values.index(low), n - 1 - values.index(high)

    def missed(outside: int) -> float:  # the median lies beyond: at most so many heads of n
        return sum(math.comb(n, heads) for heads in range(outside + 1)) / 2**n

    assert below == above
    assert missed(below) <= 0.025 < missed(below + 1)  # the narrowest such interval


def test_five_values_have_no_interval_of_a_median():
    with pytest.raises(ValueError, match="six values or more, not 5"):
        median_interval([1.0] * 5)


def test_the_bootstrap_draws_the_same_seeds_from_each_sample():
    generator = np.random.default_rng(1)
    one = generator.normal(size=50)
    # Each difference is 3, whatever is drawn, as long as the same is drawn from both.
    low, high = bootstrap_interval(lambda a, b: (a - b).mean(-1), one + 3, one)
    assert low == pytest.approx(3) and high == pytest.approx(3)


def test_the_bootstrap_interval_is_scipys():
    one = np.random.default_rng(1).exponential(size=60)
    found = bootstrap_interval(lambda a: a.std(-1, ddof=1), one.tolist())
    theirs = bootstrap(
        (one,), lambda a, axis: a.std(axis, ddof=1), n_resamples=10_000, method="percentile"
    ).confidence_interval
    assert found == pytest.approx(tuple(theirs), rel=0.03)  # theirs is drawn otherwise
    assert found == bootstrap_interval(lambda a: a.std(-1, ddof=1), one)


@pytest.mark.parametrize("sizes, told", [((19,), "not 19"), ((30, 29), "not 30, 29")])
def test_a_bootstrap_needs_enough_values_equally_many(sizes, told):
    with pytest.raises(ValueError, match=told):
        bootstrap_interval(lambda *samples: samples[0].mean(-1), *([0.5] * n for n in sizes))


@pytest.mark.parametrize(
    ("published", "verdict"), [(0.90, "reproduced"), (0.95, "undecided"), (0.99, "not reproduced")]
)
def test_a_verdict_follows_from_the_whole_interval(published, verdict):
    claim = at_least("accuracy", published, [0.94, 0.95, 0.96])
    assert claim.verdict == verdict
    assert claim.measured == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.0, "reproduced"),
        (0.95, 1.0, "undecided"),
        (0.0, 0.95, "undecided"),
        (0.945, 0.955, "undecided"),  # the interval is wider
        (0.99, 1.0, "not reproduced"),
        (0.0, 0.9, "not reproduced"),
    ],
)
def test_a_claim_of_a_range_is_judged_by_the_whole_interval(low, high, verdict):
    assert between("accuracy", None, [0.94, 0.95, 0.96], low, high).verdict == verdict


@pytest.mark.parametrize(
    ("published", "verdict"),
    [
        (4 + 7.115, "reproduced"),  # far outside the interval of the mean, 4 ± 3.182
        (4 - 7.115, "reproduced"),
        (4 + 7.118, "not reproduced"),
        (4 - 7.118, "not reproduced"),
    ],
)
def test_one_published_value_is_judged_as_one_more_of_ours(published, verdict):
    # mean 4, s = 2, n = 4: 4 ± t(0.975, 3) · 2 · √(1 + 1/4) with t = 3.182446 from a table
    claim = one_of("accuracy", published, [4 - 6**0.5, 4.0, 4.0, 4 + 6**0.5])
    assert (claim.published, claim.measured) == (published, pytest.approx(4))
    assert claim.interval == pytest.approx((4 - 7.11617, 4 + 7.11617), abs=1e-4)
    assert claim.verdict == verdict


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_interval_of_one_more_is_students(n):
    values = np.random.default_rng(n).normal(size=n)
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) * (1 + 1 / n) ** 0.5
    interval = one_of("accuracy", 0.0, values.tolist()).interval
    assert interval == pytest.approx((values.mean() - half, values.mean() + half))


def test_results_are_written_whole(tmp_path):
    rows = [{"model": "mlp", "accuracy": 0.5}]
    claim = at_least("accuracy", 0.4, [0.5, 0.6])
    write_results(tmp_path / "results.json", "name", {"seeds": 2}, rows, [claim], {}, 1.5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"experiment", "config", "rows", "claims", "machine", "seconds"}
    assert set(results["claims"][0]) == {"claim", "published", "measured", "interval", "verdict"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert markdown_table(rows) == "| model | accuracy |\n| --- | --- |\n| mlp | 0.5 |\n"


@pytest.mark.slow
def test_accuracy_smoke(tmp_path):
    results = _smoke("accuracy", tmp_path)
    assert [row["model"] for row in results["rows"]] == ["happy", "mlp", "cnn"]
    assert [row["parameters"] for row in results["rows"]] == [13_002, 101_770, 18_378]
    for row in results["rows"]:
        mean, deviation = map(float, row["test accuracy, %"].split(" ± "))
        assert 0 < float(row["lowest, %"]) <= mean < 100
        assert deviation < 30
    assert float(results["rows"][1]["validation, %"]) > 70  # two epochs of the MLP, chance is 10
    assert results["claims"] == []  # they speak of MNIST


def test_feeding_smoke(tmp_path):
    results = _smoke("feeding", tmp_path)
    assert len(results["config"]["pairs"]) == 2
    assert all(slow > 0 and fast > 0 for slow, fast in results["config"]["pairs"])


def _smoke(name: str, folder: Path) -> dict:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (results,) = folder.glob(f"runs/{name}/*/results.json")
    assert {"results.md", "results.png"} <= {path.name for path in results.parent.iterdir()}
    return json.loads(results.read_text())


@pytest.mark.parametrize("script", ["accuracy --seeds 1", "feeding --repeats 0"])
def test_a_bad_count_is_one_sentence_and_exit_code_2(script, tmp_path):
    name, *options = script.split()
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert options[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_differences_are_those_of_each_seed_and_a_spread_is_mean_and_deviation():
    assert differences([3.0, 5.0], [1.0, 7.0]) == [2.0, -2.0]
    with pytest.raises(ValueError):
        differences([1.0, 2.0], [1.0])
    assert spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65"  # deviation √((4 + 1 + 9)/2)
    assert spread([0.0, 1.0], "+") == "+0.50 ± 0.71"
