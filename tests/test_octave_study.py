"""`experiments/octave.py`: its claims, of made-up rows, worked out by hand; how it takes times."""

import sys
from pathlib import Path

import pytest
from pytest import approx
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import octave

SHARES = {0.0: 1, 0.125: 0.82421875, 0.25: 0.671875, 0.5: 0.4375, 0.75: 0.296875}


def counts(**wrong: dict[float, int]) -> dict[float, list[dict]]:
    """Rows with 6400 multiply-adds and 800 numbers in the inner layer with α = 0."""
    by_alpha = {}
    for alpha, share in SHARES.items():
        row = {
            "multiply_adds_inner": 6400 * share,
            "multiply_adds_network": 10_000 * (share + 0.05 + alpha) if alpha else 10_000,
            "numbers_inner": 800 - 600 * alpha,
        }
        row |= {what: of[alpha] for what, of in wrong.items() if alpha in of}
        by_alpha[alpha] = [row, dict(row)]
    return by_alpha


def test_what_is_counted():
    *published, cost, memory, network = octave._costs(counts())
    shares = [(claim.published, claim.measured) for claim in published]
    assert shares == [(0.82, 0.82421875), (0.67, 0.671875), (0.44, 0.4375), (0.3, 0.296875)]
    assert [claim.claim.split(":")[0] for claim in published] == [
        f"inner layer, α = {alpha}" for alpha in ("0.125", "0.25", "0.5", "0.75")
    ]
    assert cost.measured == memory.measured == 0
    assert network.measured == approx(0.05 + 0.125)  # the smallest, that of ⅛
    for claim in (*published, cost, memory, network):
        assert claim.verdict == "reproduced" and claim.interval == (claim.measured, claim.measured)


@pytest.mark.parametrize(
    "what, alpha, value, refuted",
    [
        ("multiply_adds_inner", 0.5, 6400 * 0.43, {2: 0.43, 4: 0.0075}),
        ("multiply_adds_inner", 0.75, 6400 * 0.31, {3: 0.31, 4: 0.013125}),
        ("multiply_adds_inner", 0.125, 5274, {4: 0.00015625}),
        ("numbers_inner", 0.25, 649, {5: 0.00125}),
        ("numbers_inner", 0.75, 360, {5: 0.0125}),
        ("multiply_adds_network", 0.25, 6000, {6: -0.071875}),
    ],
)
def test_a_wrong_count_refutes_its_claims(what, alpha, value, refuted):
    claims = octave._costs(counts(**{what: {alpha: value}}))
    verdicts = [claim.verdict for claim in claims]
    assert verdicts == ["not reproduced" if n in refuted else "reproduced" for n in range(7)]
    assert [claims[n].measured for n in refuted] == approx(list(refuted.values()), abs=1e-9)


def trained(plain: list[float], half: list[float]) -> dict[float, list[dict]]:
    return {
        alpha: [{"test_accuracy": accuracy} for accuracy in found]
        for alpha, found in ((0.0, plain), (0.5, half), (0.75, [0.1] * len(half)))
    }


@pytest.mark.parametrize(
    "half, measured, deviation, verdict",
    [
        ([0.9701, 0.9802, 0.9903], 0.02, 0.01, "reproduced"),
        ([0.9690, 0.9791, 0.9886], -0.11, 0.0264575, "undecided"),
        (
            [0.9801, 0.9802, 0.9703],
            -0.31333333,
            1.51769,
            "undecided",
        ),  # the first, in another order
        ([0.9659, 0.9758, 0.9857], -0.42, 0.01, "not reproduced"),
    ],
)
def test_the_price_of_low_maps_in_percentage_points(half, measured, deviation, verdict):
    (claim,) = octave._found(trained([0.97, 0.98, 0.99], half), {})
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
        ([ratio + 0.3 for ratio in RATIOS], 0.945, (0.89, 1.0), "reproduced"),
        ([ratio + 0.31 for ratio in RATIOS], 0.955, (0.9, 1.01), "undecided"),
        ([ratio + 0.42 for ratio in RATIOS], 1.065, (1.01, 1.12), "not reproduced"),
        ([0.7, 0.9, 0.6, 0.8, 0.5, 0.4], 0.65, (0.4, 0.9), "reproduced"),
    ],
)
def test_a_step_takes_less_time_by_the_median(ratios, measured, interval, verdict):
    accuracies = trained([0.9, 0.8], [0.9, 0.8])
    rows = [{"ratio": round(ratio, 9)} for ratio in reversed(ratios)]
    other = [{"ratio": 1.0}] * len(rows)
    steps = {"one": {0.0: other, 0.5: rows, 0.75: other}, "two": {0.0: rows, 0.5: other}}
    _, one, two = octave._found(accuracies, steps)
    assert one.claim.startswith("one, α = ½: the median ratio") and two.claim.startswith("two,")
    assert one.measured == approx(measured) and one.interval == approx(interval)
    assert one.verdict == verdict and two.measured == 1


def test_a_round_has_every_fraction_once_and_its_own_ratios(monkeypatch):
    """A step takes 1 + α, and twice as long in every round as in the last."""
    called = []

    def seconds(work):
        called.append(work())
        return (1 + called[-1]) * 2 ** ((len(called) - 1) // 5)

    def step(*sizes):  # (channels, α, batch) or (C, O, α, side, batch)
        alpha = sizes[len(sizes) // 2]
        return octave.Step(lambda: alpha, 1000 - int(1000 * alpha))

    monkeypatch.setattr(octave, "_seconds", seconds)
    monkeypatch.setattr(octave, "_network_step", step)
    monkeypatch.setattr(octave, "_layer_step", step)
    rows = octave._timings(octave.Options(smoke=True))
    orders = [tuple(called[k : k + 5]) for k in range(0, len(called), 5)]
    assert len(orders) == 4 * 7 and len(set(orders)) > 20  # with one that does not count
    assert all(sorted(order) == list(octave.ALPHAS) for order in orders)
    assert len(rows) == 4 * 6 * 5
    for row in rows:
        assert row["ratio"] == 1 + row["alpha"] and row["multiply_adds_share"] == 1 - row["alpha"]
