"""`experiments/compare_structures.py`: budget, smoke run, and claims on made-up rows."""

import random
import sys
from pathlib import Path

import pytest
import torch
from test_studies import smoke

from nn_backprop.data import load
from nn_backprop.layers import LowRankLinear
from nn_backprop.models.counting import multiply_adds, parameters
from nn_backprop.studies.evidence import tuned
from nn_backprop.training import parameters_left, prune_smallest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import compare_structures as study

LENET = 784 * 300 + 300 * 100 + 100 * 10
# Each (parameters, multiply-adds of an image), from the sizes that the script's docstring gives.
COUNTS = {
    "plain": (784 * 25 + 25 + 250 + 10, 784 * 25 + 250),
    "locally connected": (
        2 * 196 * 26 + 3 * 49 * 51 + 147 * 10 + 10,
        2 * 196 * 25 + 3 * 49 * 50 + 1470,
    ),
    "shared weights": (
        10 * 26 + 26 * 251 + 26 * 49 * 10 + 10,
        10 * 196 * 25 + 26 * 49 * 250 + 26 * 490,
    ),
    "octave": (19_178, None),
    "kernel + pooling": (124 * 16 * 10 + 10, 124 * (144 * 25 + 4 * (144 + 48)) + 19_840),
    "tied": (784 * 24 + 24 + 24 * 24 + 250, 784 * 24 + 4 * 24 * 24 + 240),
    "low rank": (14 * 1084 + 8 * 400 + 1000 + 410, 14 * 1084 + 8 * 400 + 1000),
    "pruned": (round(0.899 * 18_816) + round(0.899 * 2_700) + round(0.899 * 260) + 410, LENET),
}


def test_every_structure_keeps_to_the_budget():
    for name, structure in study.STRUCTURES.items():
        model = structure.build(3)
        if structure.cut == "pruned":
            prune_smallest(model, study.KEPT)
        elif structure.cut:
            for k, rank in enumerate(study.RANKS):
                model.layers[k] = LowRankLinear.from_linear(model.layers[k], rank)
        count, products = COUNTS[name]
        assert parameters_left(model) == count
        assert 0.95 * study.BUDGET <= count <= study.BUDGET, name
        if products is not None:
            assert multiply_adds(model, torch.zeros(1, 1, 28, 28)) == products
        if structure.cut:
            assert parameters(structure.build(3)) == LENET + 410
    assert study.STRUCTURES.keys() == COUNTS.keys()


@pytest.mark.slow
def test_compare_structures(tmp_path):
    results = smoke("compare_structures", tmp_path)
    rows = results["rows"]
    most = len(load("digits").train)
    settings = [(row["structure"], row["n"], row["lr"], row["seed"]) for row in rows]
    assert sorted(settings) == sorted(
        (s, n, how.lrs[n == most], seed)
        for s, how in study.STRUCTURES.items()
        for n in (300, most)
        for seed in (0, 1)
    )
    for row in rows:
        count, products = COUNTS[row["structure"]]
        assert row["parameters"] == count and row["seconds"] > 0
        assert products in (None, row["multiply_adds"])
        zeros = row["multiply_adds"] - row["multiply_adds_without_zeros"]
        assert zeros == (LENET + 410 - count if row["structure"] == "pruned" else 0)
        assert 0.2 < row["test"] <= 1 and 0 <= row["validation"] <= 1
        assert row["train"] > 0.2  # chance is 0.1
    assert len(results["claims"]) == 2 * 7
    (claim,) = (c for c in results["claims"] if c["claim"].startswith("n = 300: octave is more"))
    test = {(row["structure"], row["n"], row["seed"]): row["test"] for row in rows}
    differences = [test["octave", 300, seed] - test["plain", 300, seed] for seed in (0, 1)]
    assert claim["measured"] == pytest.approx(100 * sum(differences) / 2)


def test_what_is_pruned_stays_pruned_and_what_is_cut_is_of_low_rank():
    most = len(load("digits").train)
    for name, zeros in (("pruned", LENET + 410 - COUNTS["pruned"][0]), ("low rank", 0)):
        row = study.train(
            study.Job("digits", None, name, most, 7, 1e-2, 0)
        )  # 7: 3 epochs, then 1, 1, 2
        assert row["multiply_adds"] - row["multiply_adds_without_zeros"] == zeros
        assert (row["parameters"], row["multiply_adds"]) == COUNTS[name]
        assert row["train"] > 0.8


@pytest.mark.parametrize("better, verdict", [(1, "reproduced"), (-1, "not reproduced")])
def test_the_claims_have_the_right_sign(better, verdict):
    rows = [
        {"structure": structure, "n": n, "seed": seed,
         "test": 0.5 + better * (0 if structure == "plain" else (k + 1) / 100) + seed / 10}
        for k, structure in enumerate(study.STRUCTURES)
        for n in (1_000, 55_000)
        for seed in (0, 1, 2)
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    claims = study._claims(rows)
    # The luck of a seed is ten times what tells two structures apart: paired, it cancels.
    assert all(high - low < 1e-6 for low, high in (claim.interval for claim in claims))
    assert len(claims) == 14 and {claim.verdict for claim in claims} == {verdict}
    octave = [claim for claim in claims if ": octave is more accurate" in claim.claim]
    assert [round(claim.measured, 9) for claim in octave] == [better * 4, better * 4]
    assert [claim.claim[:12] for claim in octave] == ["n = 1,000: o", "n = 55,000: "]


def test_the_rate_that_validation_prefers_is_shown_and_compared():
    rows = [
        {"structure": structure, "n": n, "seed": seed, "lr": times * how.lrs[n == 55_000],
         "validation": 0.5 - abs(times - wanted) / 10 + seed / 10, "test": times / 10,
         "parameters": 1, "multiply_adds": 1, "multiply_adds_without_zeros": 1, "seconds": times}
        for structure, how in study.STRUCTURES.items()
        for n, wanted in ((1_000, 0.5), (55_000, 1 if structure == "plain" else 2))
        for times in (0.5, 1, 2)
        for seed in (0, 1)
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    best = tuned(rows, ("structure", "n"), ("lr",), "validation")
    assert len(best) == 8 * 2 * 2
    claims = {claim.claim: claim.measured for claim in study._claims(best)}
    assert claims["n = 55,000: octave is more accurate than plain, in points"] == pytest.approx(10)
    assert claims["n = 1,000: octave is more accurate than plain, in points"] == 0
    ((table),) = study._tables(best).values()
    rates = {
        row["structure"]: [row[f"n = {n}: rate"] for n in ("1,000", "55,000")] for row in table
    }
    assert rates["plain"] == ["0.015", "0.01"] and rates["octave"] == ["0.005", "0.04"]
    beyond = study.beyond(rows, best)  # where the best is the least or the largest that was tried
    assert len(beyond) == 15 and ("plain", 55_000) not in beyond
    assert beyond["octave", 1_000] == [0.0025] and beyond["octave", 55_000] == [0.08]


def test_another_seed_has_other_random_filters():
    build = study.STRUCTURES["kernel + pooling"].build
    first, same, other = (build(seed).features.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
