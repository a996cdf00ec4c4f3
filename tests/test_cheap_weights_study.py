"""`experiments/cheap_weights.py`: its networks counted by hand, its claims of made-up rows."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.stats import t
from test_studies import smoke
from torch.testing import assert_close

from nn_backprop.models import LeNet5, counting, lenet_300_100
from nn_backprop.studies import old_study as study
from nn_backprop.training import make_permanent, parameters_left, prune_smallest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import cheap_weights

LEFT = {2: 133_336, 4: 66_663, 12: 22_186, 30: 8_896}  # parameters of the pruned networks
SETTINGS = [
    ("LeNet-300-100", contestant, factor)
    for factor in (2, 12)
    for contestant in ("pruned", "low rank", "small dense")
]
SETTINGS += [("LeNet-5", "pruned", 12)]
SETTINGS += [
    (net, kind, 1) for net in ("LeNet-300-100", "LeNet-5") for kind in ("dense", "dense, longer")
]


@pytest.mark.slow
def test_cheap_weights(tmp_path):
    results = smoke("cheap_weights", tmp_path)
    trained = [row for row in results["rows"] if "seed" in row]
    timed = [row for row in results["rows"] if "round" in row]
    names = [(row["network"], row["contestant"], row["factor"], row["seed"]) for row in trained]
    assert sorted(names) == sorted((*of, seed) for of in SETTINGS for seed in (0, 1))

    # parameters, multiply-adds as run, multiply-adds of the weights that are left
    dense, convolutional = 784 * 300 + 300 * 100 + 100 * 10, 24**2 * 500 + 8**2 * 25_000 + 405_000
    counts = {
        ("LeNet-300-100", "dense", 1): (266_610, dense, dense),
        ("LeNet-300-100", "dense, longer", 1): (266_610, dense, dense),
        ("LeNet-300-100", "pruned", 2): (133_336, dense, 133_336 - 410),
        ("LeNet-300-100", "pruned", 12): (22_186, dense, 18_816 + 2_700 + 260),
        ("LeNet-300-100", "low rank", 2): (133_306, 132_896, 132_896),
        ("LeNet-300-100", "low rank", 12): (22_186, 21_776, 21_776),
        ("LeNet-300-100", "small dense", 2): (132_997, 132_776, 132_776),
        ("LeNet-300-100", "small dense", 12): (22_193, 22_130, 22_130),
        ("LeNet-5", "dense", 1): (431_080, convolutional, convolutional),
        ("LeNet-5", "dense, longer", 1): (431_080, convolutional, convolutional),
        ("LeNet-5", "pruned", 12): (
            330 + 3_000 + 32_000 + 950 + 580,
            convolutional,
            24**2 * 330 + 8**2 * 3_000 + 32_000 + 950,
        ),
    }
    (folder,) = tmp_path.glob("runs/cheap_weights/*/networks")
    for row, name in zip(trained, names, strict=True):
        found = row["parameters"], row["multiply_adds"], row["multiply_adds_left"]
        assert found == counts[name[:3]]
        assert row["epochs"] == (2 if row["contestant"] == "dense" else 2 + 2 * 1)
        assert 0 < row["test_error"] < 0.5 < row["validation_accuracy"] <= 1
        assert (row["lr"], row["decay"]) == (
            3e-4 if row["contestant"] == "dense, longer" else 3e-3,
            0.3,
        )
        of = (*name[:3], row["lr"], row["decay"], row["seed"])
        job = cheap_weights.Job(*of, folder, cheap_weights.Options(smoke=True))
        assert row["bytes"] == job.file.stat().st_size
        # Numbers after training hardly shrink; of zeros little is left, and less when packed.
        assert 0.9 < row["bytes_packed"] / (4 * row["parameters"]) < 1.3
        if row["contestant"] == "pruned":
            assert row["bytes_packed"] < row["bytes"] < 3 * row["bytes_packed"]
            with np.load(job.file) as arrays:
                for layer, share in cheap_weights.KEPT[row["network"]].items():
                    weight = arrays[f"{layer}.weight"]
                    power = {2: 0.277, 12: 1}[row["factor"]]
                    assert np.count_nonzero(weight) == round(share**power * weight.size)
        else:
            assert row["bytes_packed"] == row["bytes"]

    rounds = {(row["timed"], row["factor"], row["batch"], row["round"]) for row in timed}
    assert len(rounds) == len(timed) == (1 + 2 * 4) * 2 * 6
    for row in timed:
        assert row["seconds"] > 0 and row["ratio"] > 0
        assert row["ratio"] == 1 or row["timed"] != "dense"

    claims = results["claims"]
    assert len(claims) == 2 + 4 + 2 + 1 + 6
    assert [claim["verdict"] for claim in claims[:2]] == ["reproduced"] * 2
    assert all("not MNIST" in claim["claim"] for claim in claims)
    file = claims[8]
    packed = {(*name[1:],): row["bytes_packed"] for row, name in zip(trained, names, strict=True)
              if name[0] == "LeNet-300-100"}  # fmt: skip
    ratios = [packed["pruned", 12, seed] / packed["small dense", 12, seed] for seed in (0, 1)]
    assert "packed file" in file["claim"] and file["measured"] == approx(sum(ratios) / 2)
    assert file["verdict"] == "not reproduced"  # the places must be stored too


# --- the networks ---


@pytest.mark.parametrize("factor", [2, 4, 12, 30])
def test_the_contestants_of_a_factor_have_equally_many_parameters(factor):
    wanted = LEFT[factor]
    assert abs(wanted / (266_610 / factor) - 1) < 0.002
    pruned = lenet_300_100()
    power = cheap_weights.SIZES[factor].power
    kept = {name: share**power for name, share in cheap_weights.KEPT["LeNet-300-100"].items()}
    prune_smallest(pruned, kept)
    assert parameters_left(pruned) == wanted
    for contestant in ("low rank", "small dense"):
        count = counting.parameters(cheap_weights._made("LeNet-300-100", contestant, factor))
        assert abs(count / wanted - 1) < 0.01
    first, second = cheap_weights.SIZES[factor].widths
    assert count == 785 * first + (first + 1) * second + (second + 1) * 10
    assert 10 <= second <= first


def test_a_low_rank_contestant_starts_from_the_dense_one(tmp_path):
    dense = lenet_300_100()
    file = tmp_path / "dense.npz"
    np.savez(file, **{name: value.numpy() for name, value in dense.state_dict().items()})
    cut = cheap_weights._made("LeNet-300-100", "low rank", 4, file)
    for layer, whole, rank in zip(cut.layers, dense.layers, (44, 44, None), strict=True):
        assert_close(layer.bias, whole.bias, rtol=0, atol=0)
        if rank is None:
            assert_close(layer.weight, whole.weight, rtol=0, atol=0)
        else:
            left = torch.linalg.svdvals(whole.weight.detach().double())[rank:]
            error = (layer.up @ layer.down - whole.weight).double().square().sum()
            assert_close(error, left.square().sum(), rtol=1e-4, atol=0)


def test_packed_arrays_restore_the_weights():
    generator = np.random.default_rng(0)
    sparse = generator.normal(size=(7, 5)) * (generator.random((7, 5)) < 0.3)
    bias = generator.normal(size=3)
    packed = cheap_weights._packed({"weight": sparse, "bias": bias})
    assert set(packed) == {"weight", "weight there", "bias"} and packed["bias"] is bias
    assert packed["weight there"].nbytes == 5  # 35 bits
    restored = np.zeros(35)
    restored[np.unpackbits(packed["weight there"], count=35) == 1] = packed["weight"]
    np.testing.assert_array_equal(restored.reshape(7, 5), sparse)


def pruned_mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    model = lenet_300_100()
    prune_smallest(model, {"layers.0": 0.05, "layers.1": 0.1, "layers.2": 0.5})
    make_permanent(model)
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_rows_compute_what_the_network_does(batch):
    model, images = pruned_mlp(), torch.randn(batch, 1, 28, 28)
    with torch.inference_mode():
        assert_close(cheap_weights._with_csr(model)(images), model(images))


def test_multiply_adds_of_the_weights_that_are_left():
    image = torch.randn(1, 1, 28, 28)
    assert cheap_weights._multiply_adds_left(pruned_mlp(), image) == 11_760 + 3_000 + 500
    model = LeNet5()
    for kernel in (model.conv1.weight, model.conv2.weight):
        with torch.no_grad():
            kernel[3:] = 0
    whole = 24**2 * 3 * 25 + 8**2 * 3 * 20 * 25 + 800 * 500 + 5_000
    assert cheap_weights._multiply_adds_left(model, image) == whole


# --- the claims ---


def rows(errors: dict[tuple[str, str, int], list[float]], packed: dict[str, list[int]]) -> list:
    """Rows whose order says nothing about their seeds; others, at 2×, are to be left aside."""
    made = [
        {"network": net, "contestant": kind, "factor": factor, "seed": seed,
         "test_error": error / 100, "bytes_packed": packed.get(kind, [1, 1, 1])[seed]}
        for (net, kind, factor), of in errors.items() for seed, error in enumerate(of)
    ]  # fmt: skip
    aside = [row | {"factor": 2, "test_error": 0.5, "bytes_packed": 9} for row in made]
    return random.Random(0).sample(made + aside, 2 * len(made))


ERRORS = {
    ("LeNet-300-100", "dense", 1): [1.6, 1.7, 1.8],
    ("LeNet-300-100", "dense, longer", 1): [1.5, 1.6, 1.7],
    ("LeNet-300-100", "pruned", 12): [1.55, 1.66, 1.74],
    ("LeNet-300-100", "low rank", 12): [2.4, 2.7, 3.0],
    ("LeNet-300-100", "small dense", 12): [3.0, 2.5, 3.2],
    ("LeNet-5", "dense", 1): [0.8, 0.9, 1.0],
    ("LeNet-5", "dense, longer", 1): [0.7, 0.9, 1.1],
    ("LeNet-5", "pruned", 12): [0.9, 1.01, 1.1],
}
PACKED = {"pruned": [90, 110, 88], "small dense": [100, 100, 80]}
R, N, U = "reproduced", "not reproduced", "undecided"


def test_the_claims_about_errors_and_files():
    claims = cheap_weights._found(rows(ERRORS, PACKED))
    expected = [
        ("LeNet-300-100: test error pruned 12× less that of “dense”,", "−0.05", -0.05, R),
        ("LeNet-300-100: test error pruned 12× less that of “dense, longer”,", None, 0.05, N),
        ("LeNet-5: test error pruned 12× less that of “dense”,", "−0.03", 0.31 / 3, N),
        ("LeNet-5: test error pruned 12× less that of “dense, longer”,", None, 0.31 / 3, U),
        ("LeNet-300-100: test error of “pruned” 12× less that of “small", None, -1.25, R),
        ("LeNet-300-100: test error of “low rank” 12× less that of “small", None, -0.2, U),
        ("LeNet-300-100: packed file of “pruned” 12× as a multiple", None, 3.1 / 3, U),
    ]
    for claim, (told, published, measured, verdict) in zip(claims, expected, strict=True):
        assert claim.claim.startswith(told) and claim.published == published
        assert claim.measured == approx(measured) and claim.verdict == verdict
    # of the differences of each seed, −0.05, −0.04 and −0.06
    half = t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert claims[0].interval == approx((-0.05 - half, -0.05 + half))


def test_the_claims_about_errors_and_files_the_other_way_round():
    errors = {of: [5 - error for error in found] for of, found in ERRORS.items()}
    claims = cheap_weights._found(rows(errors, {"pruned": [90, 91, 88], "small dense": [100] * 3}))
    assert [claim.verdict for claim in claims] == [N, R, R, U, N, U, R]
    claims = cheap_weights._found(
        rows(errors, {"pruned": [102, 103, 103], "small dense": [99] * 3})
    )
    assert claims[6].verdict == N and claims[6].measured == approx(308 / 297)


RATIOS = [0.6 + k / 100 for k in range(30)]  # the median's interval: from the 10th, 0.69, to 0.8


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(
    "more, as_is, faster", [(0, N, R), (0.2, U, R), (0.25, U, U), (0.26, R, U), (0.32, R, N)]
)
def test_the_claims_about_times(batch, more, as_is, faster):
    others = (0.1, 1.3)  # the first would be faster, the second not
    timings = [
        {"timed": timed, "factor": factor, "batch": size, "ratio": round(ratio, 9)}
        for timed in ("pruned, dense kernel", "pruned, CSR", "low rank", "small dense", "dense")
        for factor in (2, 12, 30)
        for size in (1, 128)
        for ratio in (
            [ratio + more for ratio in RATIOS]
            if (factor, size) == (12, batch) and timed != "small dense"
            else others * 10
        )
    ]
    claims = [
        claim
        for claim in cheap_weights._faster(timings)
        if claim.claim.startswith(f"batch of {batch},")
    ]
    assert [claim.verdict for claim in claims] == [as_is, faster, faster]
    assert "“pruned, dense kernel” 12×" in claims[0].claim and "0.95 or more" in claims[0].claim
    assert "“pruned, CSR” 12×" in claims[1].claim and "“low rank” 12×" in claims[2].claim
    for claim in claims:
        assert claim.measured == approx(0.745 + more)
        assert claim.interval == approx((0.69 + more, 0.8 + more))


def test_the_break_even_is_counted():
    wide, narrow = cheap_weights._counts()
    assert "784 × 300" in wide.claim and "216.97" in wide.claim
    assert "300 × 100" in narrow.claim and "75.00" in narrow.claim
    assert wide.measured == narrow.measured == 0 and wide.verdict == narrow.verdict == R


@pytest.mark.parametrize("bound, wrong", [(217, 0), (218, 1), (216, 1), (200, 17)])
def test_another_break_even_is_refuted(bound, wrong, monkeypatch):
    monkeypatch.setattr(cheap_weights, "break_even", lambda m, n: bound)
    wide, _ = cheap_weights._counts()  # 216 is the last rank that pays
    assert wide.measured == wrong and wide.verdict == (N if wrong else R)


def test_what_is_tuned_in_the_full_study():
    full, smoke = cheap_weights.Options(), cheap_weights.Options(smoke=True)
    tried = [(lr, decay) for lr in (3e-3, 1e-2) for decay in (0.05, 0.3)]
    for contestant in ("dense", "pruned", "low rank", "small dense"):
        assert cheap_weights._settings("LeNet-300-100", contestant, full) == tried
        assert cheap_weights._settings("LeNet-300-100", contestant, smoke) == [(3e-3, 0.3)]
    longer = [lr for lr, _ in cheap_weights._settings("LeNet-300-100", "dense, longer", full)]
    assert longer == [3e-4, 3e-4, 1e-3, 1e-3]
    assert cheap_weights._settings("LeNet-5", "dense, longer", full) == [(3e-4, 0.3)]


# --- the times ---


def test_a_round_times_every_network_once_and_has_its_own_ratios(monkeypatch, tmp_path):
    """A pass of a network takes 1 + what it is numbered, and twice as long in every round."""
    numbers, called = {}, []

    def seconds(forward, images, passes):
        called.append((numbers.setdefault(id(forward), len(numbers)), len(images), passes))
        return (1 + called[-1][0]) * 2 ** ((len(called) - 1) // 9)

    monkeypatch.setattr(cheap_weights, "_seconds", seconds)
    read = []
    monkeypatch.setattr(cheap_weights, "_read", lambda model, file: read.append(file.name))
    trained = [
        {"network": network, "contestant": contestant, "factor": factor, "lr": 0.01, "decay": 0.05,
         "seed": 0}
        for network, contestant, factor in SETTINGS
    ]  # fmt: skip
    found = cheap_weights._timings(trained, tmp_path, cheap_weights.Options(smoke=True))
    assert len(read) == 7 and "lenet-300-100-low-rank-12-0.01-0.05-0.npz" in read
    orders = [tuple(number for number, *_ in called[k : k + 9]) for k in range(0, len(called), 9)]
    assert len(orders) == 2 * 7 and len(set(orders)) > 12  # with one round that does not count
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert [of[1:] for of in called] == [(1, 100)] * 63 + [(128, 10)] * 63
    assert len(found) == 2 * 6 * 9
    networks = {}
    for row in found:
        networks.setdefault((row["timed"], row["factor"]), set()).add(row["ratio"])
    assert len(networks) == 9 and networks["dense", 1] == {1}
    assert all(len(ratios) == 1 for ratios in networks.values())
    assert len(set.union(*networks.values())) == 9


def test_too_few_timings_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--rounds", "5", "--smoke"]
    code = study.command(cheap_weights.Options, "", cheap_weights.conduct, arguments)
    assert code == 2 and list(tmp_path.iterdir()) == []
    expected = "cheap_weights.py: --rounds must be 6 or more, not 5"
    assert capsys.readouterr().err.startswith(expected)


def test_all_go_on_where_the_dense_network_stopped_each_at_its_rate(tmp_path, monkeypatch):
    """The batches of an epoch follow from the seed and the number of steps done before it."""
    fitted, rates = [], []
    make = cheap_weights.make_optimizer

    def record(*arguments, epochs, done, seed, **more):
        fitted.append((seed, done, epochs))

    def made(name, parameters, lr, decay):
        rates.append((lr, decay))
        return make(name, parameters, lr, decay)

    monkeypatch.setattr(cheap_weights, "fit", record)
    monkeypatch.setattr(cheap_weights, "make_optimizer", made)
    options = cheap_weights.Options(smoke=True)
    per_epoch = -(-len(cheap_weights._data(options).train) // 128)

    def trained(contestant, factor, lr, decay):
        fitted.clear(), rates.clear()
        of = "LeNet-300-100", contestant, factor, lr, decay, 7
        cheap_weights.train(cheap_weights.Job(*of, tmp_path, options))
        return list(fitted), set(rates)

    assert trained("dense", 1, 0.003, 0.3) == ([(7, 0, 2)], {(0.003, 0.3)})
    more = [(7, 2 * per_epoch, 3), (7, 3 * per_epoch, 4)]
    for contestant in ("dense, longer", "pruned", "low rank"):
        assert trained(contestant, 12, 0.01, 0.05) == (more, {(0.01, 0.05)})
    assert trained("small dense", 12, 0.01, 0.05) == ([(7, 0, 4)], {(0.01, 0.05)})
