"""Two sets of gradients from anywhere, one against the other."""

import numpy as np
import pytest

from nn_backprop import compare_gradients

EXPECTED = {"weight": np.random.default_rng(0).normal(size=(5, 3))}


def test_equal_gradients_pass_in_either_precision():
    assert compare_gradients(EXPECTED, EXPECTED).ok
    assert compare_gradients({"weight": EXPECTED["weight"].astype(np.float32)}, EXPECTED).ok


@pytest.mark.parametrize(
    "actual, kind",
    [
        (2 * EXPECTED["weight"], "scale"),
        (-EXPECTED["weight"], "sign"),
        (EXPECTED["weight"].T, "transposed"),
        (EXPECTED["weight"][::-1], "flipped"),
        (0 * EXPECTED["weight"], "detached"),
    ],
)
def test_a_wrong_one_fails_and_its_cause_is_named(actual, kind):
    report = compare_gradients({"weight": actual}, EXPECTED)
    assert report.verdict == "fail"
    assert kind in [cause.kind for cause in report.causes[:3]], report


def test_a_missing_one_fails():
    report = compare_gradients({}, EXPECTED)
    assert (report.verdict, report.causes[0].kind) == ("fail", "detached")
