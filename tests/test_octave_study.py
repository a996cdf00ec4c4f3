"""`experiments/octave.py`: a smoke run; its claims, of made-up rows, worked out by hand."""

import sys
from pathlib import Path

import pytest
from pytest import approx
from scipy.stats import t
from test_studies import smoke_rows

from nn_backprop.studies import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import octave

SHARES = {0.0: 1, 0.125: 0.82421875, 0.25: 0.671875, 0.5: 0.4375, 0.75: 0.296875}


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("octave", tmp_path)
    trained, timed = rows.having("seed"), rows.having("round")
    assert list(trained.by("seed", "alpha")) == [(s, alpha) for s in (0, 1) for alpha in SHARES]
    for row in trained:
        share = SHARES[row["alpha"]]
        assert 0.2 < row["test_accuracy"] <= 1 and 0 <= row["validation_accuracy"] <= 1
        assert row["parameters"] == (9 + 1) * 8 + (8 * 9 + 1) * 16 + (16 * 9 + 1) * 16 + 257 * 10
        assert row["multiply_adds_inner"] == 14 * 14 * 9 * 8 * 16 * share
        assert row["multiply_adds_network"] >= trained[0]["multiply_adds_network"] * share
        assert row["numbers_inner"] == 14 * 14 * 16 * (1 - 3 / 4 * row["alpha"])
        assert row["numbers_network"] > row["numbers_inner"]
    assert len(timed) == 4 * 6 * 5 and len(timed.by("step", "alpha")) == 4 * 5
    for row in timed:
        assert row["seconds"] > 0 and row["ratio"] > 0 and 0 < row["multiply_adds_share"] <= 1
        assert row["ratio"] == 1 or row["alpha"] > 0
    verdicts = [claim["verdict"] for claim in claims.values()]
    assert verdicts[:7] == 7 * ["reproduced"] and len(verdicts) == 7 + 1 + 4


def rows_of(accuracies=None, wrong=None, ratios=None):
    """Of 6400 multiply-adds and 800 numbers in the inner layer with α = 0; `wrong` by α."""
    rows = Rows()
    for alpha, share in SHARES.items():
        counts = {
            "multiply_adds_inner": 6400 * share,
            "multiply_adds_network": 10_000 * (share + 0.05 + alpha) if alpha else 10_000,
            "numbers_inner": 800 - 600 * alpha,
        }
        for seed, percent in enumerate((accuracies or {}).get(alpha, [1, 2])):
            about = {"alpha": alpha, "seed": seed, "test_accuracy": percent / 100}
            rows.append(about | counts | (wrong or {}).get(alpha, {}))
    for step, of in (ratios or {}).items():
        for alpha, found in of.items():
            rows += [{"step": step, "alpha": alpha, "round": n, "ratio": ratio}
                     for n, ratio in enumerate(found)]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    "wrong, measured",
    [
        ({}, {}),
        ({0.5: {"multiply_adds_inner": 6400 * 0.43}}, {2: 0.43, 4: 0.0075}),
        ({0.75: {"multiply_adds_inner": 6400 * 0.31}}, {3: 0.31, 4: 0.013125}),
        ({0.125: {"multiply_adds_inner": 5274}}, {0: 0.8240625, 4: 0.00015625}),
        ({0.25: {"numbers_inner": 649}}, {5: 0.00125}),
        ({0.75: {"numbers_inner": 360}}, {5: 0.0125}),
        ({0.25: {"multiply_adds_network": 6000}}, {6: -0.071875}),
    ],
)
def test_a_wrong_count_refutes_its_claims(wrong, measured):
    claims = octave.claims(rows_of(wrong=wrong))[:7]
    right = dict(enumerate((0.82421875, 0.671875, 0.4375, 0.296875, 0, 0, 0.05 + 0.125)))
    assert [claim.measured for claim in claims] == approx(
        list((right | measured).values()), abs=1e-9
    )
    refuted = [n for n in measured if n != 0]  # 0.824 is within the published 0.82, too
    assert [claim.verdict for claim in claims] == [
        "not reproduced" if number in refuted else "reproduced" for number in right
    ]
    assert [claim.published for claim in claims] == [0.82, 0.67, 0.44, 0.3, 0, 0, None]
    assert all(claim.interval == (claim.measured, claim.measured) for claim in claims)


@pytest.mark.parametrize(
    "half, measured, deviation, verdict",
    [
        ([97.01, 98.02, 99.03], 0.02, 0.01, "reproduced"),
        ([96.90, 97.91, 98.86], -0.11, 0.0264575, "undecided"),
        ([98.01, 98.02, 97.03], -0.31333333, 1.51769, "undecided"),  # the first's, mixed up
        ([96.59, 97.58, 98.57], -0.42, 0.01, "not reproduced"),
    ],
)
def test_the_price_of_low_maps_in_percentage_points(half, measured, deviation, verdict):
    claim = octave.claims(rows_of({0.0: [97, 98, 99], 0.5: half, 0.75: [10] * 3}))[7]
    assert "percentage points: −0.1 or more" in claim.claim and claim.published is None
    assert claim.measured == approx(measured) and claim.verdict == verdict
    width = t.ppf(0.975, 2) * deviation / 3**0.5
    assert claim.interval == approx((measured - width, measured + width), rel=1e-4)


RATIOS = [0.5 + k / 100 for k in range(30)]


@pytest.mark.parametrize(
    "ratios, measured, interval, verdict",
    [
        (RATIOS, 0.645, (0.59, 0.7), "reproduced"),  # the 10th of 30 from either end
        ([*RATIOS[:29], 100.0], 0.645, (0.59, 0.7), "reproduced"),  # one round was disturbed
        ([ratio + 0.31 for ratio in RATIOS], 0.955, (0.9, 1.01), "undecided"),
        ([ratio + 0.42 for ratio in RATIOS], 1.065, (1.01, 1.12), "not reproduced"),
    ],
)
def test_a_step_takes_less_time_by_the_median(ratios, measured, interval, verdict):
    plain = [1.0] * len(ratios)
    steps = {"one": {0.0: plain, 0.5: ratios[::-1], 0.75: plain}, "two": {0.0: ratios, 0.5: plain}}
    one, two = octave.claims(rows_of(ratios=steps))[8:]
    assert one.claim.startswith("one, α = ½: the median ratio") and two.claim.startswith("two,")
    assert one.measured == approx(measured) and one.interval == approx(interval)
    assert one.verdict == verdict and two.measured == 1


def test_the_timings_are_shared_out_by_step_and_fraction(monkeypatch):
    def step(*sizes):
        return lambda: None, 1000 - int(1000 * sizes[-1])

    monkeypatch.setattr(octave, "network_step", step)
    monkeypatch.setattr(octave, "layer_step", step)
    options = octave.Options(smoke=True, rounds=6)
    by_step = Rows(octave.timings(options)).by("step")
    assert next(iter(by_step)) == "training, 28×28 pixels" and len(by_step) == 4
    for rows in by_step.values():
        assert [(row["round"], row["alpha"]) for row in rows] == [
            (number, alpha) for number in range(6) for alpha in octave.ALPHAS
        ]
        assert all(row["multiply_adds_share"] == 1 - row["alpha"] for row in rows)
