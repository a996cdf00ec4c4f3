"""`experiments/cheap_weights.py`: its networks counted by hand, its claims of made-up rows."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.stats import t
from test_studies import smoke_rows

from nn_backprop.layers import LowRankLinear
from nn_backprop.models import counting, lenet_300_100
from nn_backprop.studies import Rows, timing
from nn_backprop.training import parameters_left, prune_smallest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import cheap_weights as study

LENET = "LeNet-300-100"
DENSE, CONVOLUTIONS = 784 * 300 + 300 * 100 + 100 * 10, 24**2 * 500 + 8**2 * 25_000 + 405_000
# Of a smoke run: parameters, multiply-adds as run, multiply-adds of the weights that are left.
COUNTS = {
    ("LeNet-5", "dense", 1): (431_080, CONVOLUTIONS, CONVOLUTIONS),
    (LENET, "dense", 1): (266_610, DENSE, DENSE),
    ("LeNet-5", "pruned", 12): (330 + 3_000 + 32_000 + 950 + 580, CONVOLUTIONS,
                                24**2 * 330 + 8**2 * 3_000 + 32_000 + 950),
    ("LeNet-5", "dense, longer", 1): (431_080, CONVOLUTIONS, CONVOLUTIONS),
    (LENET, "dense, longer", 1): (266_610, DENSE, DENSE),
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
    assert list(by) == list(COUNTS)
    (folder,) = tmp_path.glob("runs/cheap_weights/*/networks")
    for (net, kind, factor), of in by.items():
        assert [row["seed"] for row in of] == [0, 1]
        rate = 3e-4 if kind == "dense, longer" else 3e-3
        for row in of:
            found = row["parameters"], row["multiply_adds"], row["multiply_adds_left"]
            assert found == COUNTS[net, kind, factor]
            assert row["epochs"] == (2 if kind == "dense" else 2 + 2 * 1)
            assert 0 < row["test_error"] < 0.5 < row["validation_accuracy"] <= 1
            assert (row["lr"], row["decay"]) == (rate, 0.3)
            job = study.Job(net, kind, factor, rate, 0.3, row["seed"], folder, study.Options())
            assert row["bytes"] == job.file.stat().st_size
            # Numbers after training hardly shrink; of zeros little is left, and less when packed.
            assert 0.9 < row["bytes_packed"] / (4 * row["parameters"]) < 1.3
            if kind != "pruned":
                assert row["bytes_packed"] == row["bytes"]
                continue
            assert row["bytes_packed"] < row["bytes"] < 3 * row["bytes_packed"]
            with np.load(job.file) as arrays:
                for layer, share in study.KEPT[net].items():
                    weight, power = arrays[f"{layer}.weight"], {2: 0.277, 12: 1}[factor]
                    assert np.count_nonzero(weight) == round(share**power * weight.size)
    rounds = timed.by("timed", "factor", "batch", "round")
    assert len(rounds) == len(timed) == (1 + 2 * 4) * 2 * 6
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in timed)
    assert set(timed.where(timed="dense").values("ratio")) == {1}
    found = list(claims.values())
    assert len(found) == 2 + 4 + 2 + 1 + 6 and "packed file" in found[8]["claim"]
    assert [claim["verdict"] for claim in found[:2]] == ["reproduced"] * 2
    pruned, small = (by[LENET, k, 12].values("bytes_packed") for k in ("pruned", "small dense"))
    assert found[8]["measured"] == approx((pruned / small).mean())
    assert found[8]["verdict"] == "not reproduced"  # the places must be stored too


# --- the networks ---


def test_the_contestants_of_a_factor_have_equally_many_parameters():
    for factor, wanted in {2: 133_336, 4: 66_663, 12: 22_186, 30: 8_896}.items():
        assert abs(wanted / (266_610 / factor) - 1) < 0.002
        pruned, power = lenet_300_100(), study.POWERS[factor]
        prune_smallest(pruned, {name: share**power for name, share in study.KEPT[LENET].items()})
        assert parameters_left(pruned) == wanted
        for contestant in ("low rank", "small dense"):
            count = counting.parameters(study.made(LENET, contestant, factor))
            assert abs(count / wanted - 1) < 0.01
        first, second = study.WIDTHS[factor]
        assert count == 785 * first + (first + 1) * second + (second + 1) * 10
        assert 10 <= second <= first


def test_a_low_rank_contestant_starts_from_the_dense_one(tmp_path):
    dense, file = lenet_300_100(), tmp_path / "dense.npz"
    np.savez(file, **{name: value.numpy() for name, value in dense.state_dict().items()})
    cut = study.made(LENET, "low rank", 4, file)
    for layer, whole, rank in zip(cut.layers, dense.layers, (44, 44, None), strict=True):
        wanted = LowRankLinear.from_linear(whole, rank) if rank else whole
        for name, parameter in wanted.named_parameters():
            assert torch.equal(layer.get_parameter(name), parameter)


def test_all_go_on_where_the_dense_network_stopped_each_at_its_rate(tmp_path, monkeypatch):
    """The batches of an epoch follow from the seed and the number of epochs done before it."""
    fitted = []

    def train_network(model, data, *, lr, decay, epochs, batch_size, seed, done):
        fitted.append((lr, decay, epochs, batch_size, seed, done))
        return study.studies.Trained(None, 0.0)

    monkeypatch.setattr(study.studies, "train_network", train_network)

    def trained(contestant, factor, lr, decay):
        fitted.clear()
        of = LENET, contestant, factor, lr, decay, 7
        study.train(study.Job(*of, tmp_path, study.Options(smoke=True)))
        return list(fitted)

    assert trained("dense", 1, 0.003, 0.3) == [(0.003, 0.3, 2, 128, 7, 0)]
    for contestant in ("dense, longer", "pruned", "low rank"):
        again = [(0.01, 0.05, 1, 128, 7, done) for done in (2, 3)]
        assert trained(contestant, 12, 0.01, 0.05) == again
    assert trained("small dense", 12, 0.01, 0.05) == [(0.01, 0.05, 4, 128, 7, 0)]


def test_what_is_tuned_in_the_full_study():
    full, smoke = study.Options(), study.Options(smoke=True)
    tried = [(lr, decay) for lr in (3e-3, 1e-2) for decay in (0.05, 0.3)]
    for contestant in ("dense", "pruned", "low rank", "small dense"):
        assert study.settings(LENET, contestant, full) == tried
        assert study.settings(LENET, contestant, smoke) == [(3e-3, 0.3)]
    longer = [(lr, decay) for lr in (3e-4, 1e-3) for decay in (0.05, 0.3)]
    assert study.settings(LENET, "dense, longer", full) == longer
    assert study.settings("LeNet-5", "dense, longer", full) == [(3e-4, 0.3)]


def test_the_networks_that_are_timed(monkeypatch, tmp_path):
    """Each is called with so many images, so many times a round, and read from its own file."""
    calls, read = [], []
    seconds = lambda work, times: calls.append((len(work()), times)) or 1.0  # noqa: E731
    monkeypatch.setattr(timing, "seconds_of_a_call", seconds)
    monkeypatch.setattr(study, "read", lambda model, file: read.append(file.name))
    options = study.Options(smoke=True, rounds=6)
    of_lenet = [of for of in COUNTS if of[0] == LENET]
    rows = study.timings([study.Job(*of, 0.01, 0.05, 0, tmp_path, options) for of in of_lenet])
    assert len(read) == 8 and "lenet-300-100-low-rank-12-0.01-0.05-0.npz" in read
    assert calls == [(1, 100)] * 7 * 9 + [(128, 10)] * 7 * 9  # with a round that does not count
    names = [("dense", 1)]
    names += [(name, factor) for factor in (2, 12)
              for name in (study.AS_IS, study.CSR, "low rank", "small dense")]  # fmt: skip
    assert [(row["batch"], row["round"], row["timed"], row["factor"]) for row in rows] == [
        (batch, number, *name) for batch in (1, 128) for number in range(6) for name in names
    ]


# --- the claims ---


def rows_of(errors, packed):
    """Rows whose order says nothing of their seeds; at 2×, and with another rate, stands nonsense.

    The other rate is worse on the validation split.
    """
    made = [
        {"network": net, "contestant": kind, "factor": factor, "seed": seed, "lr": 1, "decay": 1,
         "validation_accuracy": 0.9, "test_error": error / 100,
         "bytes_packed": packed.get(kind, [1, 1, 1])[seed]}
        for (net, kind, factor), of in errors.items() for seed, error in enumerate(of)
    ]  # fmt: skip
    aside = [row | {"factor": 2, "test_error": 0.5, "bytes_packed": 9} for row in made]
    worse = [row | {"lr": 2, "validation_accuracy": 0.8, "test_error": 0.0} for row in made]
    return Rows(random.Random(0).sample(made + aside + worse, 3 * len(made)))


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
    packed = {"pruned": [90, 110, 88], "small dense": [100, 100, 80]}
    claims = study.differences(study.best(rows_of(ERRORS, packed)))
    expected = [
        ("LeNet-300-100: test error pruned 12× less that of “dense”,", "−0.05", -0.05, R),
        ("LeNet-300-100: test error pruned 12× less that of “dense, longer”,", None, 0.05, N),
        ("LeNet-5: test error pruned 12× less that of “dense”,", "−0.03", 0.31 / 3, N),
        ("LeNet-5: test error pruned 12× less that of “dense, longer”,", None, 0.31 / 3, U),
        ("LeNet-300-100: test error of “pruned” 12× less that of “small", None, -1.25, R),
        ("LeNet-300-100: test error of “low rank” 12× less that of “small", None, -0.2, U),
        ("LeNet-300-100: packed file of “pruned” 12× as a multiple", None, 3.1 / 3, U),
    ]
    for claim, (start, published, measured, verdict) in zip(claims, expected, strict=True):
        assert claim.claim.startswith(start) and claim.published == published
        assert claim.measured == approx(measured) and claim.verdict == verdict
    # of the differences of each seed, −0.05, −0.04 and −0.06
    half = t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert claims[0].interval == approx((-0.05 - half, -0.05 + half))

    turned = {of: [5 - error for error in found] for of, found in ERRORS.items()}
    for pruned, small, verdict in (([90, 91, 88], 100, R), ([102, 103, 103], 99, N)):
        packed = {"pruned": pruned, "small dense": [small] * 3}
        claims = study.differences(study.best(rows_of(turned, packed)))
        assert [claim.verdict for claim in claims] == [N, R, R, U, N, U, verdict]
        assert claims[6].measured == approx(sum(pruned) / 3 / small)


@pytest.mark.parametrize(
    "more, as_is, faster", [(0, N, R), (0.2, U, R), (0.25, U, U), (0.26, R, U), (0.32, R, N)]
)
def test_the_claims_about_times(more, as_is, faster):
    ratios = [round(0.6 + more + k / 100, 9) for k in range(30)]  # the 10th and 20th: 0.69, 0.8
    for batch, first in ((1, 0), (128, 3)):
        timings = Rows(
            {"timed": timed, "factor": factor, "batch": size, "ratio": ratio}
            for timed in (study.AS_IS, study.CSR, "low rank", "small dense", "dense")
            for factor in (2, 12, 30)
            for size in (1, 128)
            for ratio in (
                ratios if (factor, size) == (12, batch) and timed != "small dense"
                else (0.1, 1.3) * 10  # the first would be faster, the second not
            )
        )  # fmt: skip
        claims = study.faster(timings)[first : first + 3]
        assert [claim.verdict for claim in claims] == [as_is, faster, faster]
        names = ("pruned, dense kernel", "pruned, CSR", "low rank")
        for claim, name in zip(claims, names, strict=True):
            assert claim.claim.startswith(f"batch of {batch}, “{name}” 12×:")
            assert claim.measured == approx(0.745 + more)
            assert claim.interval == approx((0.69 + more, 0.8 + more))
        assert "0.95 or more" in claims[0].claim


def test_the_break_even_is_counted(monkeypatch):
    wide, narrow = study.counts()
    assert "784 × 300" in wide.claim and "216.97" in wide.claim
    assert "300 × 100" in narrow.claim and "75.00" in narrow.claim
    assert wide.measured == narrow.measured == 0 and wide.verdict == narrow.verdict == R
    for bound, wrong in ((217, 0), (218, 1), (216, 1), (200, 17)):  # 216 is the last that pays
        monkeypatch.setattr(study, "break_even", lambda m, n, bound=bound: bound)
        wide, _ = study.counts()
        assert wide.measured == wrong and wide.verdict == (N if wrong else R)
