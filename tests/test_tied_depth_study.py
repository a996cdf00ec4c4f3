"""`experiments/tied_depth.py`: a smoke run; its counts; its claims, of made-up rows."""

import pytest
import torch
from pytest import approx
from test_studies import smoke_rows

import tied_depth as study
from nn_backprop.engines import autograd
from nn_backprop.models import tied_network, untied_network
from nn_backprop.studies import Rows

KINDS = [(True, 1), *((tied, depth) for depth in (2, 4, 8, 16) for tied in (True, False))]
SCALARS = 8  # bytes: what torch may keep beside tensors, such as the sum of the examples' weights


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


def test_what_is_counted_of_memory():
    N, in_features, width, depth, classes = 11, 13, 7, 5, 3
    inputs, targets = torch.randn(N, in_features), torch.randint(classes, (N,))
    for make, squares in ((tied_network, 1), (untied_network, 5)):
        model = make(width, depth, in_features, classes)
        by_hand = kept(N, in_features, width, depth, classes)
        found = study.kept_bytes(model, lambda m=model: m.loss(m(inputs), targets))
        assert found == approx(by_hand, abs=SCALARS)
        optimizer = torch.optim.AdamW(model.parameters())
        autograd(model, inputs, targets)
        optimizer.step()
        numbers = 13 * 7 + 7 + squares * 7 * 7 + 7 * 3 + 3
        assert study.trained_bytes(model, optimizer) == 4 * 4 * numbers


def rows_of(percent):
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
            nonsense = {"lr": 1, "test_accuracy": 50 * seed, "validation_accuracy": 0.1}
            right = {"lr": 2, "test_accuracy": share / 100, "validation_accuracy": 0.2}
            rows += [about | nonsense, about | right]
    return rows


def verdicts(rows):
    return "".join(claim.verdict[0].upper() for claim in study.claims(rows))


def test_a_wrong_count_changes_its_verdict():
    for kind, wrong, expected in (
        ((True, 4), {}, "RRRRRN"),
        ((True, 4), {"parameters": 303}, "NRRRRN"),
        ((True, 2), {"parameters": 299}, "NRRRRN"),
        ((False, 8), {"multiply_adds": 990}, "RNRRRN"),
        ((True, 2), {"multiply_adds": 399}, "RNRRRN"),
        ((False, 4), {"kept_bytes": 10_404}, "RRNRRN"),
        ((True, 16), {"multiply_adds": 900}, "RNRRRR"),
        ((True, 16), {"multiply_adds": 2700}, "RNRRRN"),
        ((False, 16), {"parameters": 300}, "RRRNRN"),
        ((False, 16), {"trained_bytes": 4800}, "RRRRNN"),
        ((True, 16), {"kept_bytes": 56_000}, "RRNRNN"),
    ):
        rows = rows_of({})
        for row in rows.where(tied=kind[0], depth=kind[1]):
            row.update(wrong)
        assert verdicts(rows)[:6] == expected, (kind, wrong)


def test_the_differences_of_accuracy_have_the_right_sign():
    """Seeds differ by 2 points, contestants by their own: paired, hardly any spread is left."""
    up = {"T1": [90, 92, 94.03], "T4": [91, 93, 95], "U4": [93, 95, 97.03], "T16": [95, 97.03, 99],
          "U16": [94, 96, 98]}  # fmt: skip
    down = {kind: [100 - x for x in of] for kind, of in up.items()}
    assert verdicts(rows_of(up))[6:] == "RRRRNR" and verdicts(rows_of(down))[6:] == "NNNNRN"
    for tied, expected in (  # against our bar, −0.1
        ([96.91, 97.92, 98.93], "U"),  # −0.1048 to −0.0552
        ([96.94, 97.95, 98.96], "R"),
        ([96.81, 97.82, 98.83], "N"),
        ([98.96, 97.95, 96.94], "U"),  # the second, with other seeds
    ):
        assert verdicts(rows_of({"U16": [97, 98, 99], "T16": tied}))[-2:] == "R" + expected, tied
