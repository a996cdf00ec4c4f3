"""`experiments/tied_depth.py`: a smoke run; its counts; its claims, of made-up rows."""

import sys
from pathlib import Path

import pytest
import torch
from pytest import approx
from scipy.stats import t
from test_studies import smoke_rows

from nn_backprop.engines import autograd
from nn_backprop.models import tied_network, untied_network
from nn_backprop.studies import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import tied_depth as study

KINDS = [(True, 1), *((tied, depth) for depth in (2, 4, 8, 16) for tied in (True, False))]
SCALARS = 8  # bytes: what torch may keep beside tensors, such as the sum of the examples' weights
WORDS = {"R": "reproduced", "N": "not reproduced", "U": "undecided"}


def kept(N, in_features, width, depth, classes):
    """x and h_0 … h_L, the logarithms of the probabilities, and the labels, 8 bytes each."""
    return 4 * N * (in_features + (depth + 1) * width + classes) + 8 * N


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("tied_depth", tmp_path)
    assert list(rows.by("tied", "depth", "lr", "seed")) == [
        (*kind, lr, seed) for seed in (0, 1) for kind in KINDS for lr in (0.0025, 0.005, 0.01)
    ]
    W = 16
    for row in rows:
        depth, squares = row["depth"], 1 if row["tied"] else row["depth"]
        assert (row["dataset"], row["width"]) == ("digits", W)
        assert row["parameters"] == 784 * W + W + squares * W * W + 10 * W + 10
        assert row["multiply_adds"] == 784 * W + depth * W * W + 10 * W
        assert row["trained_bytes"] == 4 * 4 * row["parameters"]
        assert row["kept_bytes"] == approx(kept(128, 784, W, depth, 10), abs=SCALARS)
        for part in ("train", "validation", "test"):
            assert 0.6 < row[f"{part}_accuracy"] <= 1  # chance is 0.1
        assert row["train_seconds"] > 0
    found = [claim["verdict"] for claim in claims.values()]
    assert found[:6] == [*5 * ["reproduced"], "not reproduced"] and len(found) == 12
    by_hand = []
    for tied in (True, False):
        by_rate = [rows.where(tied=tied, depth=16, lr=lr) for lr in study.LRS]
        best = max(by_rate, key=lambda of: sum(of.values("validation_accuracy")))
        by_hand.append(best.values("test_accuracy", 100).mean())
    (last,) = (c for words, c in claims.items() if "tied depth 16 less that of untied" in words)
    assert last["measured"] == approx(by_hand[0] - by_hand[1])


@pytest.mark.parametrize("make, squares", [(tied_network, 1), (untied_network, 5)])
def test_what_is_counted_of_memory(make, squares):
    N, in_features, width, depth, classes = 11, 13, 7, 5, 3
    model = make(width, depth, in_features, classes)
    inputs, targets = torch.randn(N, in_features), torch.randint(classes, (N,))
    by_hand = kept(N, in_features, width, depth, classes)
    assert study.kept_bytes(model, inputs, targets) == approx(by_hand, abs=SCALARS)
    optimizer = torch.optim.AdamW(model.parameters())
    autograd(model, inputs, targets)
    optimizer.step()
    numbers = 13 * 7 + 7 + squares * 7 * 7 + 7 * 3 + 3
    assert study.trained_bytes(model, optimizer) == 4 * 4 * numbers


# --- the claims, on rows made up for them ---


def rows_of(wrong=None, **percent):
    """300 parameters, and 100 more for a further layer, untied; accuracies as T4=[…], else 1 %.

    Of another rate, which validation likes less, stands nonsense.
    """
    rows = Rows()
    for tied, depth in KINDS:
        counts = {
            "parameters": 300 if tied else 200 + 100 * depth,
            "multiply_adds": 200 + 100 * depth,
            "trained_bytes": 4800 if tied else 3200 + 1600 * depth,
            "kept_bytes": 6400 + 1000 * depth,
        }
        for seed, share in enumerate(percent.get(f"{'T' if tied else 'U'}{depth}", [1, 1, 1])):
            about = {"tied": tied, "depth": depth, "seed": seed, **counts}
            about |= (wrong or {}).get((tied, depth), {})
            rows.append({**about, "lr": 1, "test_accuracy": 50 * seed, "validation_accuracy": 0.1})
            rows.append(
                {**about, "lr": 2, "test_accuracy": share / 100, "validation_accuracy": 0.2}
            )
    return rows


# Of 1800 parameters 1500; of 28,800 + 22,400 bytes 24,000; of 1800 multiply-adds none.
RIGHT = dict(enumerate([0, 0, 0, 100 * 1500 / 1800, 100 * 24_000 / 51_200, 0]))


@pytest.mark.parametrize(
    "wrong, measured, verdicts",
    [
        ({}, {}, "RRRRRN"),
        ({(True, 4): {"parameters": 303}}, {0: 3}, "NRRRRN"),
        ({(True, 2): {"parameters": 299}}, {0: 1}, "NRRRRN"),
        ({(False, 8): {"multiply_adds": 990}}, {1: 10}, "RNRRRN"),
        ({(True, 2): {"multiply_adds": 399}}, {1: 1}, "RNRRRN"),
        ({(False, 4): {"kept_bytes": 10_404}}, {2: 4}, "RRNRRN"),
        ({(True, 16): {"multiply_adds": 900}}, {1: 900, 5: 50}, "RNRRRR"),
        ({(True, 16): {"multiply_adds": 2700}}, {1: 900, 5: -50}, "RNRRRN"),
        ({(False, 16): {"parameters": 300}}, {3: 0}, "RRRNRN"),
        ({(False, 16): {"trained_bytes": 4800}}, {4: 0}, "RRRRNN"),
        ({(True, 16): {"kept_bytes": 56_000}}, {2: 33_600, 4: -18.75}, "RRNRNN"),
    ],
)
def test_what_is_counted(wrong, measured, verdicts):
    claims = study.claims(rows_of(wrong))[:6]
    assert [claim.measured for claim in claims] == approx(list((RIGHT | measured).values()))
    assert [claim.verdict for claim in claims] == [WORDS[letter] for letter in verdicts]
    assert all(claim.interval == (claim.measured, claim.measured) for claim in claims)
    assert [claim.published for claim in claims] == 5 * [None] + ["computational efficiency"]


# Seeds differ by 2 points, contestants by their own: paired, hardly any spread is left.
UP = {"T1": [90, 92, 94.03], "T4": [91, 93, 95], "U4": [93, 95, 97.03], "T16": [95, 97.03, 99],
      "U16": [94, 96, 98]}  # fmt: skip


@pytest.mark.parametrize(
    "percent, sign, verdicts",
    [(UP, 1, "RRRRNR"), ({k: [100 - x for x in of] for k, of in UP.items()}, -1, "NNNNRN")],
)
def test_the_differences_of_accuracy_have_the_right_sign(percent, sign, verdicts):
    claims = study.claims(rows_of(**percent))[6:]
    assert [claim.claim.partition(" is")[0] for claim in claims[:4]] == [
        "untied depth 4", "untied depth 16", "tied depth 4", "tied depth 16"
    ]  # fmt: skip
    measured = [sign * points for points in (3, 3.99, 0.99, 5, -2.01, 1.01)]
    assert [claim.measured for claim in claims] == approx(measured)
    assert [claim.verdict for claim in claims] == [WORDS[letter] for letter in verdicts]


@pytest.mark.parametrize(
    "tied, measured, deviation, verdict",
    [
        ([96.91, 97.92, 98.93], -0.08, 0.01, "undecided"),  # −0.1048 to −0.0552
        ([96.94, 97.95, 98.96], -0.05, 0.01, "reproduced"),
        ([96.81, 97.82, 98.83], -0.18, 0.01, "not reproduced"),
        ([98.96, 97.95, 96.94], -0.05, 2.01, "undecided"),  # the second, with other seeds
    ],
)
def test_the_price_of_one_weight_against_our_bar(tied, measured, deviation, verdict):
    *_, other, claim = study.claims(rows_of(U16=[97, 98, 99], T16=tied))
    assert "tied depth 16 less that of untied depth 16" in claim.claim and "our bar" in claim.claim
    assert claim.published is None and claim.verdict == verdict
    width = t.ppf(0.975, 2) * deviation / 3**0.5
    assert claim.measured == approx(measured)
    assert claim.interval == approx((measured - width, measured + width), rel=1e-4)
    assert "depth 4 less" in other.claim and other.measured == 0  # the other depth's own
