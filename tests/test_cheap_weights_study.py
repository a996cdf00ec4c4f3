"""`experiments/cheap_weights.py`: its networks counted by hand, its claims of made-up rows."""

import random

import numpy as np
import pytest
import torch
from test_studies import smoke_rows

import cheap_weights as study
from nn_backprop.layers import LowRankLinear
from nn_backprop.models import counting, lenet_300_100
from nn_backprop.studies import Rows
from nn_backprop.training import parameters_left, prune_smallest

LENET = "LeNet-300-100"
DENSE, CONVOLUTIONS = 784 * 300 + 300 * 100 + 100 * 10, 24**2 * 500 + 8**2 * 25_000 + 405_000
# Of a smoke run: parameters, multiply-adds as run, multiply-adds of the weights that are left.
COUNTS = {
    ("LeNet-5", "dense", 1): (431_080, CONVOLUTIONS, CONVOLUTIONS),
    (LENET, "dense", 1): (266_610, DENSE, DENSE),
    ("LeNet-5", "pruned", 12): (330 + 3_000 + 32_000 + 950 + 580, CONVOLUTIONS,
                                24**2 * 330 + 8**2 * 3_000 + 32_000 + 950),
    (LENET, "dense, longer", 1): (266_610, DENSE, DENSE),
    ("LeNet-5", "dense, longer", 1): (431_080, CONVOLUTIONS, CONVOLUTIONS),
    (LENET, "pruned", 2): (133_336, DENSE, 133_336 - 410),
    (LENET, "pruned", 12): (22_186, DENSE, 18_816 + 2_700 + 260),
    (LENET, "low rank", 2): (133_306, 132_896, 132_896),
    (LENET, "low rank", 12): (22_186, 21_776, 21_776),
    (LENET, "small dense", 2): (132_997, 132_776, 132_776),
    (LENET, "small dense", 12): (22_193, 22_130, 22_130),
}  # fmt: skip


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("cheap_weights", tmp_path)
    trained, timed = rows.having("seed"), rows.having("round")
    by = trained.by("network", "contestant", "factor")
    assert list(by) == list(COUNTS) and len(trained) == 2 * len(COUNTS)
    (folder,) = tmp_path.glob("runs/cheap_weights/*/networks")
    for (net, kind, factor), of in by.items():
        rate = 3e-4 if kind == "dense, longer" else 3e-3
        for row in of:
            found = row["parameters"], row["multiply_adds"], row["multiply_adds_left"]
            assert found == COUNTS[net, kind, factor]
            assert row["epochs"] == (2 if kind == "dense" else 2 + 2 * 1)
            assert 0 < row["test_error"] < 0.5 < row["validation_accuracy"] <= 1
            job = study.Job(net, kind, factor, rate, 0.3, row["seed"], folder, study.Options())
            assert row["bytes"] == job.file.stat().st_size
            # Numbers after training hardly shrink; of zeros little is left, and less when packed.
            assert 0.9 < row["bytes_packed"] / (4 * row["parameters"]) < 1.3
            assert (row["bytes_packed"] < row["bytes"]) is (kind == "pruned")
    assert len(timed.by("timed", "factor", "batch", "round")) == len(timed) == (1 + 2 * 4) * 2 * 6
    assert set(timed.where(timed="dense").values("ratio")) == {1}
    assert len(claims) == 2 + 4 + 2 + 1 + 6
    (packed,) = (claim for words, claim in claims.items() if "packed file" in words)
    assert packed["verdict"] == "not reproduced"  # the places must be stored too


def test_the_contestants_of_a_factor_have_equally_many_parameters():
    for factor, wanted in {2: 133_336, 4: 66_663, 12: 22_186, 30: 8_896}.items():
        assert abs(wanted / (266_610 / factor) - 1) < 0.002
        pruned, power = lenet_300_100(), study.POWERS[factor]
        prune_smallest(pruned, {name: share**power for name, share in study.KEPT[LENET].items()})
        assert parameters_left(pruned) == wanted
        for contestant in ("low rank", "small dense"):
            count = counting.parameters(study.made(LENET, contestant, factor))
            assert abs(count / wanted - 1) < 0.01, (factor, contestant)


def test_a_low_rank_contestant_starts_from_the_dense_one(tmp_path):
    dense, file = lenet_300_100(), tmp_path / "dense.npz"
    np.savez(file, **{name: value.numpy() for name, value in dense.state_dict().items()})
    cut = study.made(LENET, "low rank", 4, file)
    for layer, whole, rank in zip(cut.layers, dense.layers, (44, 44, None), strict=True):
        wanted = LowRankLinear.from_linear(whole, rank) if rank else whole
        assert all(map(torch.equal, layer.parameters(), wanted.parameters()))


def test_all_go_on_where_the_dense_network_stopped_each_at_its_rate(tmp_path, monkeypatch):
    """The batches of an epoch follow from the seed and the number of epochs done before it."""
    fitted = []

    def train_network(model, data, *, lr, decay, epochs, batch_size, seed, done):
        fitted.append((lr, decay, epochs, batch_size, seed, done))
        return study.studies.Trained(None, 0.0)

    monkeypatch.setattr(study.studies, "train_network", train_network)
    again = [(0.01, 0.05, 1, 128, 7, done) for done in (2, 3)]
    for contestant, factor, lr, decay, wanted in (
        ("dense", 1, 0.003, 0.3, [(0.003, 0.3, 2, 128, 7, 0)]),
        ("dense, longer", 1, 0.01, 0.05, again),
        ("pruned", 12, 0.01, 0.05, again),
        ("low rank", 12, 0.01, 0.05, again),
        ("small dense", 12, 0.01, 0.05, [(0.01, 0.05, 4, 128, 7, 0)]),
    ):
        fitted.clear()
        of = LENET, contestant, factor, lr, decay, 7, tmp_path, study.Options(smoke=True)
        study.train(study.Job(*of))
        assert fitted == wanted, contestant


ERRORS = {
    (LENET, "dense", 1): [1.6, 1.7, 1.8],
    (LENET, "dense, longer", 1): [1.5, 1.6, 1.7],
    (LENET, "pruned", 12): [1.55, 1.66, 1.74],
    (LENET, "low rank", 12): [2.4, 2.7, 3.0],
    (LENET, "small dense", 12): [3.0, 2.5, 3.2],
    ("LeNet-5", "dense", 1): [0.8, 0.9, 1.0],
    ("LeNet-5", "dense, longer", 1): [0.7, 0.9, 1.1],
    ("LeNet-5", "pruned", 12): [0.9, 1.01, 1.1],
}
R, N, U = "reproduced", "not reproduced", "undecided"


def test_the_claims_about_errors_and_files():
    """At 2×, and with a rate that validation likes less, stands nonsense."""
    turned = {of: [5 - error for error in found] for of, found in ERRORS.items()}
    for errors, packed, verdicts in (
        (ERRORS, {"pruned": [90, 110, 88], "small dense": [100, 100, 80]}, [R, N, N, U, R, U, U]),
        (turned, {"pruned": [90, 91, 88], "small dense": [100] * 3}, [N, R, R, U, N, U, R]),
        (turned, {"pruned": [102, 103, 103], "small dense": [99] * 3}, [N, R, R, U, N, U, N]),
    ):
        made = [
            {"network": net, "contestant": kind, "factor": factor, "seed": seed, "lr": 1,
             "decay": 1, "validation_accuracy": 0.9, "test_error": error / 100,
             "bytes_packed": packed.get(kind, [1, 1, 1])[seed]}
            for (net, kind, factor), of in errors.items() for seed, error in enumerate(of)
        ]  # fmt: skip
        aside = [row | {"factor": 2, "test_error": 0.5, "bytes_packed": 9} for row in made]
        worse = [row | {"lr": 2, "validation_accuracy": 0.8, "test_error": 0.0} for row in made]
        rows = Rows(random.Random(0).sample(made + aside + worse, 3 * len(made)))
        claims = study.differences(study.best(rows))
        assert [claim.verdict for claim in claims] == verdicts
    assert [claim.published for claim in claims] == ["−0.05", None, "−0.03", *[None] * 4]


def test_the_claims_about_times():
    """Of other factors, and of what nothing is claimed of, half the ratios are fast."""
    for more, as_is, faster in ((0, N, R), (0.2, U, R), (0.25, U, U), (0.26, R, U), (0.32, R, N)):
        ratios = [0.6 + more + k / 100 for k in range(30)]  # the 10th and 20th: 0.69, 0.8
        timings = Rows(
            {"timed": timed, "factor": factor, "batch": batch, "ratio": ratio}
            for timed in (study.AS_IS, study.CSR, "low rank", "small dense", "dense")
            for factor in (2, 12, 30) for batch in (1, 128)
            for ratio in (ratios if factor == 12 and timed != "small dense" else (0.1, 1.3) * 10)
        )  # fmt: skip
        claims = study.faster(timings)
        assert [claim.verdict for claim in claims] == [as_is, faster, faster] * 2, more


def test_the_break_even_is_counted(monkeypatch):
    for bound, wrong in ((217, 0), (218, 1), (200, 17)):  # 216 is the last that pays
        monkeypatch.setattr(study, "break_even", lambda m, n, bound=bound: bound)
        wide, _ = study.counts()
        assert wide.measured == wrong and wide.verdict == (N if wrong else R)
