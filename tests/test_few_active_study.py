"""`experiments/few_active.py`: run with --smoke; what is read when; its rates; its claims."""

from dataclasses import replace

import pytest
import torch
from pytest import approx
from test_studies import smoke_rows, splits_of, verdicts
from torch import nn

import few_active as study
from nn_backprop.data import load
from nn_backprop.layers import KWinners
from nn_backprop.models import dense_cnn
from nn_backprop.studies import Rows
from nn_backprop.studies.robustness import order_of_pixels

C = study.Contestant
LEVELS = ("0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5")
UNITS = {study.MLP: 128, study.CNN: 8 + 16 + 128}
WON = {  # of each layer's outputs, the standard share
    study.MLP: [(128, 1 / 8)],
    study.CNN: [(1152, 400 / 4608), (256, 300 / 1024), (128, 100 / 700)],
    study.PAPER: [(4608, 400 / 4608), (1024, 300 / 1024), (700, 100 / 700)],
}


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("few_active", tmp_path)
    assert len(claims) == 9 + 11 + 11
    expected = []
    for of in study.contestants(study.SMOKE):
        lrs = study.SMOKE[of.network].lrs
        if of.way == study.UNBOOSTED:  # the rate of their twins; of equal ones the first
            tried = rows.where(**of._replace(way=study.WINNERS)._asdict()).by("lr")
            lrs = [max(lrs, key=lambda lr: tried[lr].values("validation_accuracy").sum())]
        expected += [(*of, seed, lr) for seed in (0, 1) for lr in lrs]
    keys = (*C._fields, "seed", "lr")
    assert sorted(rows.by(*keys)) == sorted(expected) and len(rows) == len(expected)
    for row in rows:
        right = [row[f"test {level}"] for level in LEVELS]
        assert row["test_accuracy"] == right[0] > 0.2  # chance is 0.1
        assert row["noise_score"] == approx(10_000 * sum(right))
        assert 10_000 * row["validation_accuracy"] < row["validation_noise_score"] < 110_000
        network, way, times = row["network"], row["way"], row["amount"]
        paper = 30 + 30 + 1000 if way == study.DENSE else 32 + 64 + 700
        assert 0 <= row["dead"] < row["units"] == UNITS.get(network, paper)
        assert network != study.MLP or right[0] > max(0.6, right[-1])
        assert len(row["active_by_layer"]) == len(WON[network])
        if way.startswith("ReLU"):
            assert 0 < row["active"] < 0.9
        else:  # 1.5 k, in evaluation
            won = [round(1.5 * max(1, round(times * share * n))) / n for n, share in WON[network]]
            assert row["active_by_layer"] == approx(won)


def test_what_the_networks_of_a_seed_have_in_common():
    models = {}
    for of in study.contestants(study.PLANS):
        torch.manual_seed(3)
        models[of] = study.build(of)
    torch.manual_seed(3)
    dense = dense_cnn((30, 30), 1000)
    for (network, way, amount), model in models.items():
        inner = model.network if way == study.PRICE else model
        layers = [layer for layer in inner if isinstance(layer, (nn.ReLU, KWinners))]
        assert len(layers) == len(WON[network]) and (inner is model or model.weight == amount)
        if way.startswith("ReLU"):
            assert all(isinstance(layer, nn.ReLU) for layer in layers)
        else:
            boost = 1.5 if way == study.WINNERS else 0
            assert {(of.boost, of.evaluation_factor) for of in layers} == {(boost, 1.5)}
        other = dense if way == study.DENSE else models[C(network, study.RELU, 0)]
        for name, parameter in inner.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), (network, way, name)


def test_the_test_images_choose_nothing(monkeypatch):
    digits, asked = load("digits"), []
    splits_of(digits)
    job = study.Job(C("MLP", "k winners", 1), 4e-3, 1, study.Options(seeds=2, smoke=True))
    blank = digits.images.clone()
    blank[digits.test] = 0
    rows = []
    for data in (digits, replace(digits, images=blank)):
        monkeypatch.setattr(study.studies, "load_data", lambda _, data=data: data)
        rows.append(study.train(job))
    tested = {key for key in rows[0] if key.startswith("test")} | {"noise_score", "seconds"}
    assert {key for key in rows[0] if rows[0][key] != rows[1][key]} == tested

    def watched(model, data, indices, levels, order, colour):
        asked.append((indices, order))
        assert colour == round(255 * (digits.mean + 2 * digits.std))
        return [len(asked) / 100] * 11

    monkeypatch.setattr(study.studies, "load_data", lambda _: digits)
    monkeypatch.setattr(study, "under_noise", watched)
    row = study.train(job)
    assert row["validation_noise_score"] == approx(1_100) and row["noise_score"] == approx(2_200)
    orders = order_of_pixels(300, 28, 1).split(150)  # of different images
    for found, *own in zip(
        asked, (digits.validation[:150], digits.test[:150]), orders, strict=True
    ):
        assert all(map(torch.equal, found, own))


# --- rates and claims, on rows made up for them ---


def made(noisy=None, **changed):
    """Three seeds, a contestant's rows at each rate that it has in a run.

    Seeds differ by 5 points and 500 answers; of a contestant the deviation is small. The first
    rate is best for accuracy and the last for noise, on validation images; test images prefer
    others. What is `changed` at the first, by network, way and amount, joined by _, is `noisy` at
    the last.
    """
    rows = Rows()
    for of in reversed(study.contestants(study.PLANS)):
        lrs = study.PLANS[of.network].lrs
        for seed, lr in ((seed, lr) for seed in (2, 0, 1) for lr in lrs):
            late, between = lr == lrs[-1], lr not in (lrs[0], lrs[-1])
            if (seed == 2 and between) or (late and of.way == study.UNBOOSTED):
                continue
            name = f"{of.network}_{of.way}_{of.amount:g}"
            values = {"accuracy": 0.0, "score": 0.0, "active": 0.2, "dead": 0}
            values |= ((noisy or {}) if late else changed).get(name, {})
            jitter = (10 if values.get("wide") else 0.01) * (seed - 1)
            accuracy, score = values["accuracy"] + jitter, values["score"] + 100 * jitter
            rows.append({
                **of._asdict(), "seed": seed, "lr": lr, "dataset": "mnist", "n": 7, "epochs": 3,
                "units": 9, "active": values["active"], "active_by_layer": [0.1, 0.3],
                "dead": values["dead"], **{f"test {level}": 0.5 for level in LEVELS},
                "validation_accuracy": 0.9 - 0.2 * (lr - lrs[0]) / lrs[-1] + 0.01 * seed,
                "validation_noise_score": 90_000 + 100 * (lr - lrs[-1]) / lrs[-1] + 1000 * seed,
                "test_accuracy": 0.9 + 0.05 * seed + accuracy / 100 + 0.3 * between,
                "noise_score": 90_000 + 500 * seed + score + 27_000 * between,
            })  # fmt: skip
    return rows


def claims_of(network, **changed):
    claims = study.claims(made(**changed))
    return [claim for claim in claims if claim.claim.startswith((f"{network}:", f"{network},"))]


def test_cost_and_gain_at_either_rate_and_fewer_are_active():
    """Less ReLU, in points and thousands, at least −0.44 and 3.362; of 20 % a smaller share."""
    for accuracy, score, wide, share, expected, against_dense, fewer in (
        (-0.4, 3_400, False, 0.19, "rr", "nr", "r"),  # −0.4 − 0.2 is below the bar
        (0.3, 9_000, False, 0.2, "rr", "rr", "n"),
        (-0.5, 3_300, False, 0.3, "nn", "nn", "n"),
        (-0.4, -6_724, False, 0.1, "rn", "nn", "r"),
        (0, 3_000, True, 0.1, "uu", "uu", "r"),  # a spread between the seeds that is not common
    ):
        sparse = {"accuracy": accuracy, "score": score, "wide": wide, "active": share}
        changed = {f"{of}_k winners_1": sparse for of in study.PLANS}
        changed[f"{study.PAPER}_{study.DENSE}_0"] = {"accuracy": 0.2, "score": -50}
        for network in study.PLANS:
            rivals = 1 + (network == study.PAPER)
            both, same = (expected + against_dense)[: 2 * rivals], "rn" * rivals
            for at, wanted in ((changed, both + same + fewer), ({"noisy": changed}, same + both)):
                found = claims_of(network, **at)[: len(wanted)]
                assert verdicts(found) == wanted, (network, accuracy, score)


def test_the_rivals_at_the_rates_best_for_noise():
    for score, verdict in ((3_400, "r"), (-3_400, "n")):
        for network in (study.CNN, study.MLP):
            price, *others = study.PLANS[network].amounts[study.PRICE]
            noisy = {f"{network}_{study.PRICE}_{other:g}": {"score": 9_999, "active": 0.9}
                     for other in others}  # fmt: skip
            noisy[f"{network}_{study.PRICE}_{price:g}"] = {"score": 100, "active": 0.19}
            noisy[f"{network}_k winners_1"] = {"score": score}
            *_, rivals = (c for c in claims_of(network, noisy=noisy) if "best for val" in c.claim)
            assert rivals.measured == approx(score / 1000 - 0.1) and verdicts([rivals]) == verdict
            assert f"L1 {price:g} (19 % active)" in rivals.claim


def test_what_may_explain_it():
    for network in (study.CNN, study.MLP):
        amounts = study.PLANS[network].amounts
        first, *between, last = amounts[study.PRICE]
        fewest, *_, most = amounts[study.WINNERS]
        changed = {
            f"{network}_k winners_1": {"score": 500, "active": 0.2},
            f"{network}_k winners_{fewest:g}": {"score": 700, "dead": 3, "active": 0.05},
            f"{network}_k winners_{most:g}": {"score": 400, "active": 0.75},
            f"{network}_{study.UNBOOSTED}_1": {"score": 450},
            f"{network}_{study.UNBOOSTED}_{fewest:g}": {"dead": 8},
            f"{network}_{study.PRICE}_{first:g}": {"score": 200, "active": 0.12},  # 1.67 times
            f"{network}_{study.PRICE}_{last:g}": {"score": 8_888, "active": 0.35},  # 1.75 times
        }
        for price in between:
            changed[f"{network}_{study.PRICE}_{price:g}"] = {"score": 9_999, "active": 0.9}
        for sign, verdict in ((1, "r"), (-1, "n")):
            turned = {name: of | {key: sign * of[key] for key in of if key != "active"}
                      for name, of in changed.items()}  # fmt: skip
            found = claims_of(network, noisy=turned, **turned)[5:]
            measured = [sign * claim.measured for claim in found]
            assert measured == approx([0.2, 0.3, 0.3, 0.3, 0.05, 5])
            assert verdicts(found) == 6 * verdict
        assert verdicts(claims_of(network)[-1:]) == "n"  # none dead either way: none fewer


def test_the_rates(monkeypatch):
    """All rates on two seeds; then the two best of each, but the other winners one, and those
    without a boost that of their twins. The test prefers other rates."""
    jobs, everything = [], made()

    class Run:
        def train_all(self, train, given, tag):
            jobs.extend(given)
            wanted = [{**of._asdict(), "lr": lr, "seed": seed} for of, lr, seed, _ in given]
            return Rows(row for of in wanted for row in everything.where(**of))

    monkeypatch.setattr(study.studies, "load_data", lambda options: None)
    study.collect(Run(), study.Options(seeds=4))
    assert len(jobs) == len(set(jobs))
    for of in study.contestants(study.PLANS):
        first, *_, last = lrs = study.PLANS[of.network].lrs
        tried = [(job.seed, job.lr) for job in jobs if job.contestant == of]
        if of.way == study.UNBOOSTED:
            assert tried == [(seed, first) for seed in range(4)]
            continue
        late = (first, last) if of.way != study.WINNERS or of.amount == 1 else (first,)
        expected = [(seed, lr) for seed in (0, 1) for lr in lrs]
        assert tried == expected + [(seed, lr) for seed in (2, 3) for lr in late]
