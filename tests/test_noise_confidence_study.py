"""`experiments/noise_confidence.py`: run with --smoke; drawing by hand; claims, of made-up rows."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from test_studies import smoke
from torch import nn

from nn_backprop.data import ImageData, half_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import noise_confidence as study

SOURCE, HERE, BASELINE, FILTERS = study.KINDS
OPTIONS = study.Options(smoke=True)
SHOWN = ("Gaussian noise, uncut", *study.MADE)


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("noise_confidence", tmp_path)
    rows = {(row["network"], row["seed"]): row for row in results["rows"]}
    assert set(rows) == {(name, seed) for name in study.KINDS for seed in (0, 1)}
    assert len(rows) == len(results["rows"])
    for (name, _), row in rows.items():
        assert row["dataset"] == "digits" and 60 < row["test_accuracy"] <= 100  # chance is 10
        assert ("share" in row) == (name in study.HAPPY)
        for what in ("confidence", "share")[: 1 + (name in study.HAPPY)]:
            assert list(row[what]) == ["test digits", *SHOWN]
            assert list(row[f"{what} auroc"]) == list(row[f"{what} as sure"]) == list(SHOWN)
            least = 0 if name in study.HAPPY and what == "confidence" else 10
            assert all(least < value <= 100 for value in row[what].values())
            for key in ("auroc", "as sure"):
                assert all(0 <= value <= 100 for value in row[f"{what} {key}"].values())
        assert len(row["drawn_confidence"]) == 10
        assert all(0 < value <= 100 for value in row["drawn_confidence"])
        assert row["recognised"] in range(0, 101, 10)
        assert -1 <= row["correlation"] <= 1 and row["train_seconds"] > 0
        if name in (BASELINE, FILTERS):  # its own digits, to itself
            assert sum(row["drawn_confidence"]) / 10 > 60
    (folder,) = tmp_path.glob("runs/noise_confidence/*-smoke")
    for number in range(4):
        drawn = torch.load(folder / f"drawn-{number}-0.pt", weights_only=True)
        assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
        assert drawn.flatten(1).amax(1).min() > 0
    # Of the published figures, the five that need no file; of each network, two, or three, and one.
    claims = results["claims"]
    assert len(claims) == 4 * 2 + 2 + 5 + 4
    assert all("not MNIST" in claim["claim"] for claim in claims)
    by_hand = [rows[FILTERS, seed]["confidence"]["uniform noise"] for seed in (0, 1)]
    wanted = "CNN: mean confidence on uniform noise, %: 50"
    (claim,) = (claim for claim in claims if claim["claim"].startswith(wanted))
    assert claim["measured"] == approx(sum(by_hand) / 2)
    json.dumps(results, allow_nan=False)


# --- what is learnt, and what is shown ---


def test_what_a_network_learns_is_not_what_it_is_tested_on():
    for name in study.KINDS:
        data = study.data_for(name, OPTIONS)
        splits = [set(split.tolist()) for split in (data.train, data.validation, data.test)]
        assert sum(map(len, splits)) == len(set.union(*splits)) == len(data.images)
        assert (data.mean, data.std) == (0, 1) if name in (SOURCE, BASELINE) else data.mean > 0.1


def test_what_is_shown_is_made_of_test_digits_and_trains_no_network():
    data = study.data_for(FILTERS, OPTIONS)
    sets = study.sets_for(study.MADE, OPTIONS)
    digits = data.images[data.test]
    assert list(sets) == ["test digits", *SHOWN] and sets["test digits"].equal(digits)
    assert sets["half digits"].equal(half_digits(digits, study.DRAWN_WITH))
    assert all(images.shape == digits.shape for images in sets.values())
    uncut = sets["Gaussian noise, uncut"]
    assert uncut.dtype == torch.float32 and uncut.min() < -255 and uncut.max() > 510
    assert uncut.std().item() == approx(255, rel=0.01)
    assert study.CENTRED not in sets  # without the file
    # A network learns of data.train alone; no image of that split is in a set, changed or not.
    known = {image.numpy().tobytes() for image in data.images[data.train]}
    for images in sets.values():
        assert not known & {image.numpy().tobytes() for image in images}
    assert not set(study.MADE + study.FILES) & {"Omniglot 1"}


def test_the_baseline_starts_as_published():
    torch.manual_seed(0)
    model = study.Baseline()
    assert sum(p.numel() for p in model.parameters()) == 335_114
    for layer, square in zip(model.layers, (1.425, 0.85, 0.85, 1.425), strict=True):
        lengths = layer.weight.detach().norm(dim=1)
        assert lengths.numpy() == approx(np.full(len(lengths), square**-0.5), rel=1e-5)
        assert not layer.bias.any()
    x = torch.randn(3, 1, 28, 28)
    a = x.flatten(1).double().numpy()
    for layer in model.layers[:-1]:
        z = a @ layer.weight.detach().double().numpy().T
        a = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    logits = a @ model.layers[-1].weight.detach().double().numpy().T
    assert model(x).detach().numpy() == approx(logits, abs=1e-4)


def test_the_baseline_is_trained_as_published(monkeypatch, tmp_path):
    """Full steps of 0.001 to two thirds of the epochs, then a tenth; weights decay but the last."""
    seen = []

    def fit(model, engine, optimizer, schedule, data, *, epochs, batch_size, seed):
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {names[id(p)]: group["weight_decay"]
                  for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
        assert decays == {f"layers.{k}.{what}": 1e-5 if what == "weight" and k < 3 else 0
                          for k in range(4) for what in ("weight", "bias")}  # fmt: skip
        assert type(optimizer) is torch.optim.Adam and batch_size == 128
        per_epoch = math.ceil(len(data.train) / 128)
        for step in range(epochs * per_epoch):
            if step % per_epoch == 0:
                seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()

    monkeypatch.setattr(study, "fit", fit)
    job = study.Job(BASELINE, 0, study.MADE, OPTIONS, tmp_path)
    study.trained(job, study.data_for(BASELINE, OPTIONS))
    assert seen == approx([1e-3] * 4 + [1e-4] * 2)
    assert study.KINDS[BASELINE].epochs[0] == 30


def test_the_source_starts_and_is_trained_as_published(monkeypatch, tmp_path):
    asked = {}

    def fit_many(models, data, **how):
        asked.update(how, start=torch.cat([p.flatten() for p in models[0].parameters()]))
        return torch.zeros(1, 1)

    monkeypatch.setattr(study, "fit_many", fit_many)
    job = study.Job(SOURCE, 7, study.MADE, study.Options(), tmp_path)
    study.trained(job, study.data_for(SOURCE, OPTIONS))
    start = asked.pop("start")
    assert len(start) == 13_002
    assert start.mean().item() == approx(0, abs=0.03) and start.std().item() == approx(1, abs=0.02)
    assert asked == {"seeds": [7], "lrs": 1.5, "epochs": 30, "batch_size": 10, "optimizer": "sgd",
                     "schedule": "constant"}  # fmt: skip


@pytest.mark.parametrize("name, model", [(HERE, "happy"), (FILTERS, "cnn")])
def test_two_are_trained_as_train_py_does(name, model, monkeypatch, tmp_path):
    import train

    expected = train.DEFAULTS[model]
    kind = study.KINDS[name]
    assert kind.lr == expected["lr"] and kind.batch_size == expected["batch_size"]
    assert kind.epochs[0] == expected["epochs"] and not kind.as_they_are
    decays = []

    def make_optimizer(of, parameters, lr, weight_decay):
        decays.append(weight_decay)
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)

    def fit_many(models, data, **how):
        decays.append(how["weight_decays"])
        return torch.zeros(1, 1)

    monkeypatch.setattr(study, "make_optimizer", make_optimizer)
    monkeypatch.setattr(study, "fit_many", fit_many)
    monkeypatch.setattr(study, "fit", lambda *of, **how: None)
    study.trained(study.Job(name, 0, (), OPTIONS, tmp_path), study.data_for(name, OPTIONS))
    assert decays == [expected["weight_decay"]]


# --- what is measured ---


class Pixels(nn.Module):
    """The first ten pixels, from 0 to 1, as logits or, in `squared_error`, squashed."""

    def __init__(self, loss_name):
        super().__init__()
        self.loss_name = loss_name
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        z = self.scale * x.flatten(1)[:, :10]
        return z if self.loss_name == "cross_entropy" else z.sigmoid()


def data_of(images, labels, train):
    none = torch.arange(0)
    return ImageData("made", "", images, labels, train, none, none, 0.0, 1.0)


NO_DATA = data_of(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1).long(),
                  torch.arange(1))  # fmt: skip


def test_answers_are_probabilities_of_a_softmax_or_the_outputs():
    images = (
        torch.arange(784).remainder(200).to(torch.uint8).view(1, 1, 28, 28).expand(3, 1, 28, 28)
    )
    pixels = np.arange(10) / 255
    p = study.answers(Pixels("cross_entropy"), NO_DATA, images)
    assert p.dtype == np.float64 and p.shape == (3, 10)
    assert p[2] == approx(np.exp(pixels) / np.exp(pixels).sum())
    assert study.answers(Pixels("squared_error"), NO_DATA, images)[0] == approx(
        1 / (1 + np.exp(-pixels))
    )


def test_a_slope_that_points_beyond_black_is_left_out():
    class Less(Pixels):
        def forward(self, x):
            return -super().forward(x)

    drawn = study.draw(Less("cross_entropy"), NO_DATA, 1).flatten(1).float()
    # log softmax of −x: −0.9 at the pixel, which is black, and 0.1 at the nine others
    assert not drawn.diagonal().any()
    assert drawn.norm(dim=1).tolist() == approx([25.5] * 10, abs=2)


@pytest.mark.parametrize("loss_name", ["cross_entropy", "squared_error"])
def test_a_step_has_its_length_and_the_direction_of_the_slope(loss_name):
    drawn = study.draw(Pixels(loss_name), NO_DATA, 1)
    assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
    # log softmax, at equal logits: 0.9 at the pixel, −0.1 at nine others, which are black;
    # log σ: the pixel alone
    pixels = drawn.flatten(1)
    assert pixels.sum(1).equal(pixels.amax(1)) and pixels.argmax(1).equal(torch.arange(10))
    assert pixels.amax(1).tolist() == approx([255 * 0.1] * 10, abs=0.5)


def test_steps_become_shorter_and_stay_in_the_box():
    pixels = study.draw(Pixels("squared_error"), NO_DATA, 4).flatten(1)  # 1, ¾, ½, ¼
    assert pixels.diagonal().tolist() == approx([25.5 * 2.5] * 10, abs=0.5)
    pixels = study.draw(Pixels("squared_error"), NO_DATA, 500).flatten(1)
    assert pixels.diagonal().tolist() == [255] * 10 and pixels.sum() == 2550


def test_drawing_leaves_the_network_as_it_was():
    model = Pixels("cross_entropy")
    study.draw(model, NO_DATA, 2)
    assert model.scale.dtype == torch.float32 and model.scale.grad is None


def test_a_drawing_is_stretched_to_white():
    images = torch.tensor([[0, 20, 51], [0, 0, 0], [255, 100, 3]], dtype=torch.uint8)
    found = study.stretched(images.view(3, 1, 1, 3))
    assert found.dtype == torch.uint8
    assert found.view(3, 3).tolist() == [[0, 100, 255], [0, 0, 0], [255, 100, 3]]


def test_a_drawing_is_judged_by_the_training_image_that_correlates_most(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    data = data_of(images, labels, torch.arange(3, 24))
    monkeypatch.setattr(study, "_data", lambda options: data)
    study._learnt.cache_clear()
    shown = torch.cat([images[4:5] // 2 + 9, 255 - images[5:6], images[25:26]])
    digits, correlation = study.nearest(shown, OPTIONS)
    study._learnt.cache_clear()

    def by_hand(image):
        of_all = [np.corrcoef(image.flatten(), images[n].flatten())[0, 1] for n in range(3, 24)]
        return int(labels[3 + np.argmax(of_all)]), max(of_all)

    found = [by_hand(image) for image in shown]
    assert digits.tolist() == [digit for digit, _ in found]
    assert correlation.tolist() == approx([value for _, value in found], abs=1e-5)
    assert digits[0] == 1 and correlation[0] == approx(1, abs=1e-3)
    assert correlation[1:].max() < 0.2  # 5 is as unlike as can be; 25 is no training image


def test_the_sheet_has_its_rows_and_columns():
    images = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1).expand(2, 3, 4, 5)
    sheet = study._sheet(images)
    assert sheet.shape == (2 * 6, 3 * 7)
    assert sheet[2::6, 3::7].tolist() == [[0, 1, 2], [3, 4, 5]]


# --- the claims, on rows made up for them ---


def made(sets=(*SHOWN, "notMNIST", study.CENTRED), **changed):
    """Three seeds of each network, of which all is reproduced; `changed` by name of the network."""
    by = {}
    for name in study.KINDS:
        values = {"digits": 95.0, "uniform": 91.0, "share": 80.0, "recognised": 8.0}
        values |= {of: 0.0 for of in study.PUBLISHED["confidence"]}
        values |= {f"auroc {of}": 0.0 for of in study.PUBLISHED["auroc"]}
        values |= changed.get(name, {})
        by[name] = []
        for seed in range(3):
            wobble = 0.1 * (seed - 1)
            means = dict.fromkeys(sets, 50.0) | {
                "uniform noise": values["uniform"] + wobble,
                "test digits": values["digits"] + 2 * wobble,
            }
            apart = dict.fromkeys(sets, 50.0)
            if name == BASELINE:
                for of, figure in study.PUBLISHED["confidence"].items():
                    if of in means:
                        means[of] = figure + values[of] + wobble
                for of, figure in study.PUBLISHED["auroc"].items():
                    if of in sets:
                        apart[of] = figure + values[f"auroc {of}"] + wobble
            row = {"network": name, "seed": seed, "confidence": means, "confidence auroc": apart,
                   "recognised": values["recognised"] + wobble}  # fmt: skip
            if name in study.HAPPY:
                row["share"] = {"uniform noise": values["share"] + wobble}
            by[name].append(row)
    return by


# Of the happy ones three claims about noise, two of the others; published: four confidences, three
# AUROCs; of each network's drawings one. The MLP's noise, as published, is less sure than digits.
RIGHT = "RRR RRR RN RR RRRR RRR RRRR"


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, RIGHT),
        ({SOURCE: {"uniform": 40}}, "NRN RRR RN RR RRRR RRR RRRR"),
        ({HERE: {"uniform": 60}}, "RRR RRN RN RR RRRR RRR RRRR"),
        ({HERE: {"share": 49}}, "RRR RNR RN RR RRRR RRR RRRR"),
        ({FILTERS: {"uniform": 50, "digits": 55}}, "RRR RRR RN UR RRRR RRR RRRR"),
        ({BASELINE: {"test digits": 0.51}}, "RRR RRR RN RR NRRR RRR RRRR"),
        ({BASELINE: {"test digits": -0.49}}, "RRR RRR RN RR RRRR RRR RRRR"),
        ({BASELINE: {"Gaussian noise, uncut": -0.51}}, "RRR RRR RN RR RNRR RRR RRRR"),
        ({BASELINE: {"auroc uniform noise": 3}}, "RRR RRR RN RR RRRR RNR RRRR"),
        ({BASELINE: {"uniform noise": 3}}, "RRR RRR RR RR RRNR RRR RRRR"),
        ({HERE: {"recognised": 10.3}}, "RRR RRR RN RR RRRR RRR RNRR"),
        ({FILTERS: {"recognised": 10.1}}, "RRR RRR RN RR RRRR RRR RRRU"),
    ],
)
def test_each_claim_can_fail(changed, expected):
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    claims = study._claims(made(**changed))
    assert "".join(short[claim.verdict] for claim in claims) == expected.replace(" ", "")


def test_what_the_claims_measure_and_whose_word_they_are():
    claims = study._claims(made(**{SOURCE: {"uniform": 70.0, "recognised": 30.0}}))
    assert [claim.measured for claim in claims[:3]] == approx([70, 80, -25])
    said = ["confidently", "not evenly", "as sure"]
    assert [claim.published for claim in claims[:10]] == 2 * said + 4 * [None]
    published = [99.53, 91.74, 88.12, 93.84, 88.29, 97.89, 82.87]
    assert [claim.published for claim in claims[10:17]] == published
    assert claims[17].measured == approx(30)
    assert [claim.published for claim in claims[17:]] == 2 * ["no idea how to draw"] + 2 * [None]


def test_a_set_that_is_missing_is_in_no_claim():
    names = [claim.claim for claim in study._claims(made(sets=SHOWN))]
    assert len(names) == 10 + 3 + 2 + 4 and not any("notMNIST" in name for name in names)
