"""`experiments/tied_depth.py`: run with --smoke; its claims, of made-up rows; its counts."""

import sys
from pathlib import Path

import pytest
import torch
from pytest import approx
from scipy.stats import t
from test_studies import smoke

from nn_backprop.engines import ENGINES
from nn_backprop.models import tied_network, untied_network

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import tied_depth as study

DEPTHS = (1, 2, 4, 8, 16)
KINDS = [(True, 1), *((tied, depth) for depth in DEPTHS[1:] for tied in (True, False))]
SCALARS = 8  # bytes: what torch may keep beside tensors, such as the sum of the examples' weights


def kept(N, in_features, width, depth, classes):
    """x and h_0 … h_L, the logarithms of the probabilities, and the labels, 8 bytes each."""
    return 4 * N * (in_features + (depth + 1) * width + classes) + 8 * N


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("tied_depth", tmp_path)
    rows = results["rows"]
    assert [(row["tied"], row["depth"], row["lr"], row["seed"]) for row in rows] == [
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
    counts, found = results["claims"][:6], results["claims"][6:]
    assert [claim["measured"] for claim in counts[:3]] == [0, 0, 0]
    tied, untied = 12_986, 12_986 + 15 * 256
    memory = kept(128, 784, W, 16, 10)
    saved = 1 - (16 * tied + memory) / (16 * untied + memory)
    assert [claim["measured"] for claim in counts[3:]] == approx(
        [100 * (1 - tied / untied), 100 * saved, 0], rel=1e-4
    )
    verdicts = [claim["verdict"] for claim in counts]
    assert verdicts == 5 * ["reproduced"] + ["not reproduced"]
    assert counts[5]["published"] == "computational efficiency"
    assert len(found) == 6 and all("not MNIST" in claim["claim"] for claim in found)
    by_hand = []
    for kind in ((True, 16), (False, 16)):
        of_kind = [row for row in rows if (row["tied"], row["depth"]) == kind]
        by_rate = [[row for row in of_kind if row["lr"] == lr] for lr in study.LRS]
        best = max(by_rate, key=lambda rows: sum(row["validation_accuracy"] for row in rows))
        by_hand.append(100 * sum(row["test_accuracy"] for row in best) / 2)
    assert "tied depth 16 less that of untied" in found[5]["claim"]
    assert found[5]["measured"] == approx(by_hand[0] - by_hand[1])


@pytest.mark.parametrize("make", [tied_network, untied_network])
def test_what_is_kept_for_the_backward_pass(make):
    N, in_features, width, depth, classes = 11, 13, 7, 5, 3
    model = make(width, depth, in_features, classes)
    inputs, targets = torch.randn(N, in_features), torch.randint(classes, (N,))
    by_hand = kept(N, in_features, width, depth, classes)
    assert study._kept_bytes(model, inputs, targets) == approx(by_hand, abs=SCALARS)


@pytest.mark.parametrize("make, squares", [(tied_network, 1), (untied_network, 5)])
def test_parameters_gradients_and_moments(make, squares):
    model = make(7, 5, 13, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    ENGINES["autograd"](model, torch.randn(11, 13), torch.randint(3, (11,)))
    optimizer.step()
    numbers = 13 * 7 + 7 + squares * 7 * 7 + 7 * 3 + 3
    assert study._trained_bytes(model, optimizer) == 4 * 4 * numbers


# --- the claims, on rows made up for them ---


def counted(wrong=None):
    """Two rows of each kind: 300 parameters and 100 more for a layer beyond the first, untied."""
    by = {}
    for tied, depth in KINDS:
        row = {
            "parameters": 300 if tied else 200 + 100 * depth,
            "multiply_adds": 200 + 100 * depth,
            "trained_bytes": 4800 if tied else 3200 + 1600 * depth,
            "kept_bytes": 6400 + 1000 * depth,
        }
        row |= (wrong or {}).get((tied, depth), {})
        by[study.Kind(tied, depth)] = [row, dict(row)]
    return by


# Of 1800 parameters 1500; of 28,800 + 22,400 bytes 24,000; of 1800 multiply-adds none.
RIGHT = [0, 0, 0, 100 * 1500 / 1800, 100 * 24_000 / 51_200, 0]


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
    claims = study._counts(counted(wrong))
    expected = [measured.get(number, value) for number, value in enumerate(RIGHT)]
    assert [claim.measured for claim in claims] == approx(expected)
    words = {"R": "reproduced", "N": "not reproduced"}
    assert [claim.verdict for claim in claims] == [words[letter] for letter in verdicts]
    assert all(claim.interval == (claim.measured, claim.measured) for claim in claims)
    assert [claim.published for claim in claims] == 5 * [None] + ["computational efficiency"]


def trained(**percent):
    """Three seeds of each kind, by name, T4 is tied depth 4; who is not named gets 1 %."""
    by = {}
    for tied, depth in KINDS:
        shares = percent.get(f"{'T' if tied else 'U'}{depth}", [1, 1, 1])
        by[study.Kind(tied, depth)] = [{"test_accuracy": share / 100} for share in shares]
    return by


def test_the_differences_of_accuracy_have_the_right_sign():
    # Seeds differ by 2 points, contestants by their own: paired, hardly any spread is left.
    by = trained(T1=[90, 92, 94.03], T4=[91, 93, 95], U4=[93, 95, 97.03], T16=[95, 97.03, 99],
                 U16=[94, 96, 98])  # fmt: skip
    claims = study._found(by)
    assert [claim.claim.partition(" is")[0] for claim in claims[:4]] == [
        "untied depth 4", "untied depth 16", "tied depth 4", "tied depth 16"
    ]  # fmt: skip
    assert [claim.measured for claim in claims] == approx([3, 3.99, 0.99, 5, -2.01, 1.01])
    assert [claim.verdict for claim in claims] == [
        *4 * ["reproduced"], "not reproduced", "reproduced"
    ]  # fmt: skip
    worse = {kind: [{"test_accuracy": 1 - row["test_accuracy"]} for row in rows]
             for kind, rows in by.items()}  # fmt: skip
    claims = study._found(worse)
    assert [claim.measured for claim in claims] == approx([-3, -3.99, -0.99, -5, 2.01, -1.01])
    assert [claim.verdict for claim in claims] == [
        *4 * ["not reproduced"], "reproduced", "not reproduced"
    ]  # fmt: skip


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
    claims = study._found(trained(U16=[97, 98, 99], T16=tied))
    claim = claims[-1]
    assert "tied depth 16 less that of untied depth 16" in claim.claim and "our bar" in claim.claim
    assert claim.published is None and claim.verdict == verdict
    width = t.ppf(0.975, 2) * deviation / 3**0.5
    assert claim.measured == approx(measured)
    assert claim.interval == approx((measured - width, measured + width), rel=1e-4)
    assert "depth 4 less" in claims[-2].claim and claims[-2].measured == 0  # the other depth's own
