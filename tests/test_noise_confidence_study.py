"""`experiments/noise_confidence.py`: run with --smoke; how it trains; claims, of made-up rows."""

import math
from itertools import product

import pytest
import torch
from pytest import approx
from test_studies import smoke_rows

import noise_confidence as study
import train
from nn_backprop.data import half_digits
from nn_backprop.studies import Rows, hendrycks

SOURCE, HERE, BASELINE, FILTERS = study.KINDS
OPTIONS = study.Options(smoke=True)
SHOWN = ("Gaussian noise, uncut", *study.MADE)


@pytest.mark.slow
def test_the_study(tmp_path):
    found, claims = smoke_rows("noise_confidence", tmp_path)
    by = found.having("network").by("network", "seed")
    assert set(by) == {(name, seed) for name in study.KINDS for seed in (0, 1)}
    for (name, _), (row,) in by.items():
        assert 60 < row["test_accuracy"] <= 100  # chance is 10
        whats = ("confidence", "share") if name in study.HAPPY else ("confidence",)
        assert [what for what in ("confidence", "share") if what in row] == [*whats]
        for what in whats:
            assert list(row[what]) == ["test digits", *SHOWN]
            least = 0 if name in study.HAPPY and what == "confidence" else 10
            assert all(least < value <= 100 for value in row[what].values())
            for key in (f"{what} auroc", f"{what} as sure"):
                assert list(row[key]) == list(SHOWN)
                assert all(0 <= value <= 100 for value in row[key].values())
        sure = row["drawn_confidence"]
        assert len(sure) == 10 and all(0 < value <= 100 for value in sure)
        assert name in study.HAPPY or sum(sure) / 10 > 60  # its own digits, to itself
        assert row["recognised"] in range(0, 101, 10) and -1 <= row["correlation"] <= 1
    (judged,) = found.having("right")
    assert len(found) == len(by) + 1 and judged["right"] > 0.6
    assert 1 > judged["of_digits"] > 0.5 > judged["of_noise"] > 0
    for number in range(4):
        drawn = torch.load(found.folder / f"drawn-{number}-0.pt")
        assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
        assert drawn.flatten(1).amax(1).min() > 0
    # Of the published figures, the five that need no file; of each network, two, or three, and one.
    assert len(claims) == 4 * 2 + 2 + 5 + 4


# --- what is learnt, and what is shown ---


def test_what_a_network_learns_is_not_what_it_is_tested_on_or_shown():
    for name in study.KINDS:
        data = study.data_for(name, OPTIONS)
        splits = [set(split.tolist()) for split in (data.train, data.validation, data.test)]
        assert sum(map(len, splits)) == len(set.union(*splits)) == len(data.images)
        assert (data.mean, data.std) == (0, 1) if name in (SOURCE, BASELINE) else data.mean > 0.1
    sets = study.sets_for(study.MADE, OPTIONS)
    digits = data.images[data.test]
    assert list(sets) == ["test digits", *SHOWN] and sets["test digits"].equal(digits)
    assert sets["half digits"].equal(half_digits(digits, study.DRAWN_WITH))
    assert all(images.shape == digits.shape for images in sets.values())
    uncut = sets["Gaussian noise, uncut"]
    assert uncut.dtype == torch.float32 and uncut.min() < -255 and uncut.max() > 510
    assert uncut.std().item() == approx(255, rel=0.01)
    assert hendrycks.CENTRED not in sets  # without the file
    # A network learns of data.train alone; no image of that split is in a set, changed or not.
    known = {image.numpy().tobytes() for image in data.images[data.train]}
    for images in sets.values():
        assert not known & {image.numpy().tobytes() for image in images}
    assert not set(study.MADE + study.FILES) & {"Omniglot 1"}


def test_the_baseline_is_trained_as_published(monkeypatch, tmp_path):
    """Full steps of 0.001 to two thirds of the epochs, then a tenth; weights decay but the last."""
    seen = []

    def fit(model, engine, optimizer, schedule, data, *, epochs, batch_size, seed):
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {names[id(p)]: group["weight_decay"]
                  for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
        assert decays == {f"layers.{k}.{what}": 1e-5 if what == "weight" and k < 3 else 0
                          for k in range(4) for what in ("weight", "bias")}  # fmt: skip
        assert type(optimizer) is torch.optim.Adam and batch_size == 128 and seed == 3
        per_epoch = math.ceil(len(data.train) / 128)
        for step in range(epochs * per_epoch):
            if step % per_epoch == 0:
                seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()

    monkeypatch.setattr(hendrycks, "fit", fit)
    job = study.Job(BASELINE, 3, study.MADE, OPTIONS, tmp_path)
    study.trained(job, study.data_for(BASELINE, OPTIONS))
    assert seen == approx([1e-3] * 4 + [1e-4] * 2)
    assert study.KINDS[BASELINE].epochs[0] == 30


def test_the_others_are_trained_as_the_source_or_train_py_does(monkeypatch, tmp_path):
    asked = {}

    def fit(model, data, **how):
        (model,) = model if isinstance(model, list) else [model]
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        asked[name] = how | {"starts_with": [len(start), start.mean().item(), start.std().item()]}
        return torch.zeros(1, 1)

    monkeypatch.setattr(study, "fit_many", fit)
    monkeypatch.setattr(study.studies, "train_network", fit)
    for name in (SOURCE, HERE, FILTERS):
        job = study.Job(name, 7, (), study.Options(), tmp_path)
        study.trained(job, study.data_for(name, OPTIONS))
    starts = {name: how.pop("starts_with") for name, how in asked.items()}
    assert starts[SOURCE] == [13_002, approx(0, abs=0.03), approx(1, abs=0.02)]
    assert starts[HERE][0] == 13_002 and starts[HERE][2] < 0.1  # torch's
    happy, cnn = train.DEFAULTS["happy"], train.DEFAULTS["cnn"]
    assert asked == {
        SOURCE: {"seeds": [7], "lrs": 1.5, "epochs": 30, "batch_size": 10, "optimizer": "sgd",
                 "schedule": "constant"},
        HERE: {"seeds": [7], "lrs": happy["lr"], "epochs": happy["epochs"],
               "batch_size": happy["batch_size"], "weight_decays": happy["weight_decay"]},
        FILTERS: {"seed": 7, "lr": cnn["lr"], "epochs": cnn["epochs"],
                  "batch_size": cnn["batch_size"], "decay": cnn["weight_decay"]},
    }  # fmt: skip


# --- the claims, on rows made up for them ---


def made(sets=(*SHOWN, "notMNIST", hendrycks.CENTRED), **changed):
    """Three seeds of each network, of which all is reproduced; `changed` by name of the network."""
    rows, published = Rows(), study.PUBLISHED
    for name, seed in product(study.KINDS, range(3)):
        values, wobble = changed.get(name, {}), 0.1 * (seed - 1)
        means, apart = dict.fromkeys(sets, 50.0), dict.fromkeys(sets, 50.0)
        means |= {"test digits": 95.0, "uniform noise": 91.0}
        if name == BASELINE:
            means |= {of: x for of, x in published["confidence"].items() if of in means}
            apart |= {of: x for of, x in published["confidence auroc"].items() if of in apart}
        means = {of: x + values.get(of, 0) + wobble for of, x in means.items()}
        means["test digits"] += wobble
        apart = {of: x + values.get(f"auroc {of}", 0) + wobble for of, x in apart.items()}
        row = {"network": name, "seed": seed, "confidence": means, "confidence auroc": apart,
               "recognised": 8 + values.get("recognised", 0) + wobble}  # fmt: skip
        if name in study.HAPPY:
            row["share"] = {"uniform noise": 80 + values.get("share", 0) + wobble}
        rows.append(row)
    return rows


# Of the happy ones three claims about noise, two of the others; published: four confidences, three
# AUROCs; of each network's drawings one. The MLP's noise, as published, is less sure than digits.
CASES = [
    ({}, "RRR RRR RN RR RRRR RRR RRRR"),
    ({SOURCE: {"uniform noise": -51}}, "NRN RRR RN RR RRRR RRR RRRR"),
    ({HERE: {"uniform noise": -31}}, "RRR RRN RN RR RRRR RRR RRRR"),
    ({HERE: {"share": -31}}, "RRR RNR RN RR RRRR RRR RRRR"),
    ({FILTERS: {"uniform noise": -41, "test digits": -40}}, "RRR RRR RN UR RRRR RRR RRRR"),
    ({BASELINE: {"test digits": 1.0}}, "RRR RRR RN RR NRRR RRR RRRR"),
    ({BASELINE: {"test digits": -0.98}}, "RRR RRR RN RR RRRR RRR RRRR"),
    ({BASELINE: {"Gaussian noise, uncut": -0.51}}, "RRR RRR RN RR RNRR RRR RRRR"),
    ({BASELINE: {"auroc uniform noise": 3}}, "RRR RRR RN RR RRRR RNR RRRR"),
    ({BASELINE: {"uniform noise": 3}}, "RRR RRR RR RR RRNR RRR RRRR"),
    ({HERE: {"recognised": 2.3}, FILTERS: {"recognised": 2.1}}, "RRR RRR RN RR RRRR RRR RNRU"),
]


def test_each_claim_can_fail():
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    for changed, expected in CASES:
        claims = study.claims(made(**changed))
        found = "".join(short[claim.verdict] for claim in claims)
        assert found == expected.replace(" ", ""), changed
    names = [claim.claim for claim in study.claims(made(SHOWN))]  # a set that is missing is in none
    assert len(names) == 10 + 3 + 2 + 4 and not any("notMNIST" in name for name in names)
