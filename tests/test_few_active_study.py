"""`experiments/few_active.py`: run with --smoke; its noise, its counts; its claims."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest import approx
from test_studies import smoke
from torch import nn

from nn_backprop.data import load
from nn_backprop.layers import KWinners
from nn_backprop.models import LayerNetwork

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import few_active as study

C = study.Contestant
SMOKE = study.Options(seeds=2, smoke=True)
LEVELS = ("0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5")
UNITS = {"MLP": 128, "CNN": 8 + 16 + 128}


def winners(units, share):
    """The share of units that win in evaluation."""
    return round(1.5 * max(1, round(share * units))) / units


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("few_active", tmp_path)
    rows = results["rows"]
    named = [(row["network"], row["way"], row["amount"]) for row in rows]
    assert named == 2 * [tuple(of) for of in study.contestants(smoke=True)]
    assert [row["seed"] for row in rows] == (len(rows) // 2) * [0] + (len(rows) // 2) * [1]
    for row in rows:
        assert row["dataset"] == "digits" and row["seconds"] > 0
        right = [row[f"test {level}"] for level in LEVELS]
        assert row["test_accuracy"] == right[0] > 0.2  # chance is 0.1
        assert row["noise_score"] == approx(10_000 * sum(right))
        assert 0 <= row["dead"] < row["units"] and 0.2 < row["validation_accuracy"] <= 1
        network, way, times = row["network"], row["way"], row["amount"]
        dense = way.startswith("ReLU")
        paper = 30 + 30 + 1000 if dense else 32 + 64 + 700
        assert row["units"] == UNITS.get(network, paper)
        if network == "MLP":
            assert right[0] > max(0.6, right[-1])
        if dense:
            assert 0 < row["active"] < 0.9
            continue
        layers = {
            "MLP": [(128, 1 / 8)],
            "CNN": [(1152, 400 / 4608), (256, 300 / 1024), (128, 100 / 700)],
            "the paper's CNN": [(4608, 400 / 4608), (1024, 300 / 1024), (700, 100 / 700)],
        }[network]
        shares = [winners(units, times * share) for units, share in layers]
        assert row["active"] == approx(sum(shares) / len(shares))
    by = {(*name, row["seed"]): row for name, row in zip(named, rows, strict=True)}
    assert len(results["claims"]) == 2 + 7 + 7
    for network, number in (("the paper's CNN", 0), ("CNN", 2), ("MLP", 9)):
        cost, gain = results["claims"][number : number + 2]
        for claim, what, scale in ((cost, "test_accuracy", 100), (gain, "noise_score", 1)):
            assert network in claim["claim"] and "not MNIST" in claim["claim"]
            by_hand = [
                by[network, "k winners", 1, seed][what] - by[network, "ReLU", 0, seed][what]
                for seed in (0, 1)
            ]
            assert claim["measured"] == approx(scale * sum(by_hand) / 2)


def test_what_the_networks_of_a_seed_have_in_common():
    models = {}
    for of in study.contestants(smoke=False):
        torch.manual_seed(3)
        models[of] = study.build(of)
    for of, model in models.items():
        network, way, amount = of
        inner = model.network if way == "ReLU, L1 price" else model
        layers = [layer for layer in inner if isinstance(layer, (nn.ReLU, KWinners))]
        assert len(layers) == (1 if network == "MLP" else 3)
        if way.startswith("ReLU"):
            assert all(isinstance(layer, nn.ReLU) for layer in layers)
            assert way == "ReLU" or model.weight == amount
        else:
            assert {layer.boost for layer in layers} == {1.5 if way == "k winners" else 0}
            assert {layer.evaluation_factor for layer in layers} == {1.5}
        if network == "the paper's CNN":
            continue
        other = models[C(network, "ReLU", 0)]
        for name, parameter in inner.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))


# --- noise ---


class Onlooker(LayerNetwork):
    """Keeps the images that it is shown, and takes each for a 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 10).float()


@pytest.fixture(scope="module")
def digits():
    return load("digits", say=lambda line: None)


def test_the_noise(digits):
    indices = digits.test[:7]
    digits = replace(digits, images=digits.images.masked_fill(digits.images == 190, 191))
    model = Onlooker()
    right = study.under_noise(model, digits, indices, study._order(7, 28, 5), 190)
    assert right == approx(11 * [(digits.labels[indices] == 0).double().mean().item()])
    plain = digits.normalise(digits.images[indices])
    white = digits.normalise(torch.tensor(190, dtype=torch.uint8))
    before = torch.zeros(7, 1, 28, 28, dtype=torch.bool)
    counts = []
    for seen in model.seen:
        noise = seen == white
        assert torch.equal(seen[~noise], plain[~noise])
        assert not (before & ~noise).any()  # what is white stays white
        before = noise
        counts.append(noise.flatten(1).sum(1).tolist())
    # int(784 ν): 39.2, 78.4, 117.6, 156.8, 196, 235.2, 274.4, 313.6, 352.8, 392
    expected = (0, 39, 78, 117, 156, 196, 235, 274, 313, 352, 392)
    assert counts == [7 * [count] for count in expected]


def test_the_order_of_the_pixels():
    order = study._order(7, 28, 5)
    assert order.shape == (7, 1, 28, 28)
    assert (order.flatten(1).sort(1).values == torch.arange(784)).all()
    assert not torch.equal(order[0], order[1])
    study._order.cache_clear()
    assert torch.equal(study._order(7, 28, 5), order)  # the same for every network of a seed
    assert not torch.equal(study._order(7, 28, 6), order)


def test_the_test_images_choose_nothing(digits, monkeypatch):
    job = study.Job(C("MLP", "k winners", 1), 4e-3, 1, SMOKE)
    splits = [set(split.tolist()) for split in (digits.train, digits.validation, digits.test)]
    assert sum(map(len, splits)) == len(set().union(*splits))
    monkeypatch.setattr(study, "_data", lambda options: digits)
    row = study.train(job)
    blank = digits.images.clone()
    blank[digits.test] = 0
    monkeypatch.setattr(study, "_data", lambda options: replace(digits, images=blank))
    other = study.train(job)
    tested = {key for key in row if key.startswith("test")} | {"noise_score", "seconds"}
    assert {key for key in row if row[key] != other[key]} == tested
    assert row["test_accuracy"] > 0.5 > other["test_accuracy"]


def test_activity(digits):
    class Fixed(LayerNetwork):
        def forward(self, x):
            return super().forward(self.features[: len(x)])

    model = Fixed(nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))
    # 2 images, 3 maps of 2 × 2: 3 and 2 places are active, none of map 1
    model.features = torch.full((2, 3, 2, 2), -1.0)
    model.features[0, 0, 0, :] = 1
    model.features[0, 2, 1, 1] = 1
    model.features[1, 0, :, 1] = 1
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1.0, -1, 0, 1, -1]))  # 2 of 5 units, always the same
    active, dead, units = study.activity(model, digits, digits.validation[:2])
    assert active == approx((5 / 24 + 2 / 5) / 2)
    assert (dead, units) == (1 + 3, 3 + 5)
    assert not any(layer._forward_hooks for layer in model)


# --- rates and claims, on rows made up for them ---


def made_up(network, way, amount, seed, **values):
    """Seeds differ by 5 points and 500 answers; of a contestant the deviation is small."""
    row = {"network": network, "way": way, "amount": amount, "seed": seed, "lr": 0.1, "dead": 0,
           "active": 0.2, "accuracy": 0.0, "score": 0.0, **values}  # fmt: skip
    return row | {
        "test_accuracy": 0.9 + 0.05 * seed + row["accuracy"] / 100,
        "noise_score": 90_000 + 500 * seed + row["score"],
    }


def test_the_rates():
    jobs = []

    def train(job):
        jobs.append(job)
        contestant, lr, seed, _ = job
        lrs = study.PLANS[contestant.network].lrs
        best = lrs[-1] if contestant.way == study.RELU else lrs[0]
        row = made_up(*contestant, seed, dataset="mnist", n=7, epochs=3, units=9)
        row |= {f"test {level}": 0.5 for level in LEVELS}
        return row | {"lr": lr, "validation_accuracy": 0.9 - abs(lr - best) + 0.01 * seed}

    class Study:
        def carry_out(self, function, jobs, tag):
            return [function(job) for job in jobs]

        def finish(self, tables, claims, figure):
            self.tables, self.claims = tables, claims

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", train)
        patch.setattr(study, "_data", lambda options: None)
        under_way = Study()
        study.conduct(under_way, study.Options(seeds=4))
    for of in study.contestants(smoke=False):
        lrs = study.PLANS[of.network].lrs
        tried = [(job.seed, job.lr) for job in jobs if job.contestant == of]
        best = lrs[-1] if of.way == study.RELU else lrs[0]
        assert tried == [(seed, lr) for seed in (0, 1) for lr in lrs] + [(2, best), (3, best)]
    assert len(under_way.claims) == 16
    tables = list(under_way.tables.values())
    assert [len(table) for table in tables] == [2, 10, 12, 10, 12]
    # 0.9, and 0.01 more for seed 1, but for what the rate is off: 3/4 of the largest
    assert (
        tables[3][0]["rate 0.005"] == "89.00; 90,250" and tables[3][0]["rate 0.02"][:5] == "90.50"
    )


def rows_of(jitter=0.01, **changed):
    """Three seeds of all contestants; `changed` by network, way and amount, joined by _."""
    rows = []
    for of in study.contestants(smoke=False):
        name = f"{of.network}_{of.way}_{of.amount:g}"
        for seed in range(3):
            values = dict(changed.get(name, {}))
            values["accuracy"] = values.get("accuracy", 0) + jitter * (seed - 1)
            values["score"] = values.get("score", 0) + 100 * jitter * (seed - 1)
            rows.append(made_up(*of, seed, **values))
    return rows


def claims_of(network, rows):
    mixed = random.Random(0).sample(rows, len(rows))
    claims = study._claims(study.by_contestant(mixed))
    return [claim for claim in claims if claim.claim.startswith(f"{network}:")]


@pytest.mark.parametrize("network", ["the paper's CNN", "CNN", "MLP"])
@pytest.mark.parametrize(
    "accuracy, score, verdicts",
    [
        (-0.4, 3_400, ["reproduced", "reproduced"]),
        (0.3, 9_000, ["reproduced", "reproduced"]),
        (-0.5, 3_300, ["not reproduced", "not reproduced"]),
        (-0.4, -6_724, ["reproduced", "not reproduced"]),
    ],
)
def test_cost_and_gain(network, accuracy, score, verdicts):
    sparse = {f"{network}_k winners_1": {"accuracy": accuracy, "score": score}}
    found = claims_of(network, rows_of(**sparse))
    assert [claim.measured for claim in found[:2]] == approx([accuracy, score])
    assert [claim.verdict for claim in found[:2]] == verdicts
    assert [claim.published for claim in found[:2]] == ["−0.22", "+6,724"]
    assert all("our bar" in claim.claim for claim in found[:2])
    rows = rows_of(**sparse)
    for row in rows:  # with a spread between the seeds that is no longer common
        if (row["network"], row["way"]) == (network, "k winners"):
            row["test_accuracy"] += 0.1 * (row["seed"] - 1)
            row["noise_score"] += 20_000 * (row["seed"] - 1)
    assert [c.verdict for c in claims_of(network, rows)[:2]] == ["undecided", "undecided"]


@pytest.mark.parametrize("network", ["CNN", "MLP"])
def test_what_may_explain_it(network):
    first, *_, last = study.PLANS[network].prices
    fewest, *_, most = study.PLANS[network].times
    changed = {
        f"{network}_k winners_1": {"score": 500, "active": 0.2},
        f"{network}_k winners_{fewest:g}": {"score": 700, "dead": 3},
        f"{network}_k winners_{most:g}": {"score": 400},
        f"{network}_k winners, no boost_1": {"score": 450},
        f"{network}_k winners, no boost_{fewest:g}": {"dead": 8},
    }
    for price in study.PLANS[network].prices:
        changed[f"{network}_ReLU, L1 price_{price:g}"] = {"score": 9_999, "active": 0.9}
    changed[f"{network}_ReLU, L1 price_{first:g}"] = {"score": 200, "active": 0.12}  # 1.67 times
    changed[f"{network}_ReLU, L1 price_{last:g}"] = {"score": 8_888, "active": 0.35}  # 1.75 times
    found = claims_of(network, rows_of(**changed))
    assert [claim.measured for claim in found[2:]] == approx([200, 300, 300, 50, 5])
    assert {claim.verdict for claim in found[2:]} == {"reproduced"}
    assert f"L1 {first:g} (12 % active)" in found[2].claim
    assert "k winners (20 % active)" in found[3].claim
    worse = {name: {**v, "score": -v.get("score", 0), "dead": -v.get("dead", 0)}
             for name, v in changed.items()}  # fmt: skip
    found = claims_of(network, rows_of(**worse))
    assert [claim.measured for claim in found[2:]] == approx([-200, -300, -300, -50, -5])
    assert {claim.verdict for claim in found[2:]} == {"not reproduced"}
    for name in changed:
        changed[name]["dead"] = 0  # none either way: none fewer
    assert claims_of(network, rows_of(**changed))[-1].verdict == "not reproduced"
