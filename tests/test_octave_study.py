"""`experiments/octave.py`: a smoke run; its claims, of made-up rows, worked out by hand."""

import pytest
from test_studies import smoke_rows

import octave
from nn_backprop.studies import Rows

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


RATIOS = [0.5 + k / 100 for k in range(30)]


def rows_of(half, ratios):
    """Of 6400 multiply-adds and 800 numbers in the inner layer with α = 0."""
    rows = Rows()
    for alpha, share in SHARES.items():
        counts = {
            "multiply_adds_inner": 6400 * share,
            "multiply_adds_network": 10_000 * (share + 0.05 + alpha) if alpha else 10_000,
            "numbers_inner": 800 - 600 * alpha,
        }
        for seed, percent in enumerate({0.0: [97, 98, 99], 0.5: half}.get(alpha, [10] * 3)):
            rows.append({"alpha": alpha, "seed": seed, "test_accuracy": percent / 100, **counts})
        taken = ratios if alpha == 0.5 else [1.0] * 30
        rows += [{"step": "one", "alpha": alpha, "round": n, "ratio": ratio}
                 for n, ratio in enumerate(taken)]  # fmt: skip
    return rows


def test_the_sign_of_each_claim():
    for half, ratios, verdicts in (
        ([97.01, 98.02, 99.03], RATIOS, "RR"),
        ([96.90, 97.91, 98.86], [*RATIOS[:29], 100.0], "UR"),  # one round was disturbed
        ([98.01, 98.02, 97.03], [ratio + 0.31 for ratio in RATIOS], "UU"),  # the first's, mixed up
        ([96.59, 97.58, 98.57], [ratio + 0.42 for ratio in RATIOS], "NN"),
    ):
        claims = octave.claims(rows_of(half, ratios))
        assert "".join(claim.verdict[0].upper() for claim in claims[7:]) == verdicts, half
        assert {claim.verdict for claim in claims[:7]} == {"reproduced"}


def test_a_wrong_count_refutes_its_claims():
    for alpha, wrong, refuted in (
        (0.5, {"multiply_adds_inner": 6400 * 0.43}, {2, 4}),
        (0.75, {"multiply_adds_inner": 6400 * 0.31}, {3, 4}),
        (0.125, {"multiply_adds_inner": 5274}, {4}),  # 0.824 is within the published 0.82, too
        (0.25, {"numbers_inner": 649}, {5}),
        (0.75, {"numbers_inner": 360}, {5}),
        (0.25, {"multiply_adds_network": 6000}, {6}),
    ):
        rows = rows_of([97, 98, 99], RATIOS)
        for row in rows.where(alpha=alpha).having("seed"):
            row.update(wrong)
        verdicts = [claim.verdict for claim in octave.claims(rows)[:7]]
        assert {k for k, v in enumerate(verdicts) if v == "not reproduced"} == refuted, wrong
