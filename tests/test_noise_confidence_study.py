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
        assert row["dataset"] == "digits" and 0.6 < row["test_accuracy"] <= 1  # chance is 0.1
        named = ["largest output", "largest share"] if name in study.HAPPY else ["probability"]
        assert list(row["confidence"]) == list(row["auroc"]) == named
        for what in named:
            assert list(row["confidence"][what]) == ["test digits", *SHOWN]
            assert list(row["auroc"][what]) == list(SHOWN)
            least = 0 if what == "largest output" else 0.1
            assert all(least < value <= 1 for value in row["confidence"][what].values())
            assert all(0 <= value <= 100 for value in row["auroc"][what].values())
        assert len(row["drawn_confidence"]) == 10
        assert all(0 < value <= 1 for value in row["drawn_confidence"])
        assert list(row["taken_by"]) == list(study.KINDS)
        assert all(10 * share == approx(round(10 * share)) for share in row["taken_by"].values())
        assert -1 <= row["likeness"] <= 1 and row["train_seconds"] > 0
        if name in (BASELINE, FILTERS):  # its own digits, to itself
            assert sum(row["drawn_confidence"]) / 10 > 0.6
    (folder,) = tmp_path.glob("runs/noise_confidence/*-smoke")
    for number in range(4):
        drawn = torch.load(folder / f"drawn-{number}-0.pt")
        assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
        assert drawn.flatten(1).amax(1).min() > 0
    # Of the published figures, the four that need no file; of each network, two and three claims.
    claims = results["claims"]
    assert len(claims) == 4 * 2 + (3 + 2) + 4 * 3
    assert all("not MNIST" in claim["claim"] for claim in claims)
    by_hand = [
        min(rows[FILTERS, seed]["confidence"]["probability"][noise] for noise in study.NOISES)
        for seed in (0, 1)
    ]
    wanted = "CNN: mean confidence on noise, of Gaussian and uniform the lower: "
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
    assert study.KINDS[BASELINE].epochs == 30


# --- what is measured ---


def test_the_confidences_of_sigmoids_and_of_a_softmax():
    given = np.array([[0.2, 0.9, 0.4], [0.01, 0.01, 0.02]])
    for name in study.HAPPY:
        found = study.confidences(name, given)
        assert found["largest output"] == approx(np.array([0.9, 0.02]))
        assert found["largest share"] == approx(np.array([0.6, 0.5]))
    logits = np.log([[1.0, 2, 7], [3, 3, 4]])
    (found,) = study.confidences(FILTERS, logits).values()
    assert found == approx(np.array([0.7, 0.4]))


def test_told_apart_is_the_share_of_pairs_in_which_the_digit_has_more():
    digits, others = np.array([0.9, 0.5]), np.array([0.5, 0.1, 0.95])
    assert study.told_apart(digits, others) == approx((1 + 1 + 0 + 0.5 + 1 + 0) / 6)


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


@pytest.mark.parametrize("loss_name", ["cross_entropy", "squared_error"])
def test_a_step_has_its_length_and_the_direction_of_the_slope(loss_name):
    drawn = study.draw(Pixels(loss_name), NO_DATA, 1)
    assert drawn.dtype == torch.uint8 and drawn.shape == (10, 1, 28, 28)
    # log softmax, at equal logits: 0.9 at the pixel, −0.1 at nine others, of a length of √0.9;
    # log σ: the pixel alone
    share = 0.9 / 0.9**0.5 if loss_name == "cross_entropy" else 1
    pixels = drawn.flatten(1)
    assert pixels.sum(1).equal(pixels.amax(1)) and pixels.argmax(1).equal(torch.arange(10))
    assert pixels.amax(1).tolist() == approx([255 * 0.1 * share] * 10, abs=0.5)


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


def test_likeness_is_the_best_correlation_with_training_images_of_the_digit():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    data = data_of(images, labels, torch.arange(24))
    shown = torch.cat(
        [images[4:5] // 2 + 9, images[4:5], images[25:26], torch.full_like(images[:1], 7)]
    )
    digits = torch.tensor([1, 2, 1, 0])  # 4 is of 1; 25, too, but it is no training image
    found = study.likeness(shown, digits, data).tolist()

    def best(image, digit):
        of_digit = [images[n] for n in range(24) if labels[n] == digit]
        return max(np.corrcoef(image.flatten(), other.flatten())[0, 1] for other in of_digit)

    assert found[0] == approx(1, abs=1e-3)
    assert found[1] == approx(best(images[4], 2), abs=1e-5) and found[1] < 0.2
    assert found[2] == approx(best(images[25], 1), abs=1e-5) and found[2] < 0.2
    assert found[3] == 0


def test_drawings_are_judged_by_networks_of_the_next_seed(tmp_path, monkeypatch):
    """Network k of seed s is right about the first 2k + s + 1 of ten images, and of no other."""

    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.right = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            digits = torch.arange(len(x))
            says = torch.where(digits < self.right, digits, (digits + 1) % 10)
            return nn.functional.one_hot(says, 10).float()

    kinds = {name: kind._replace(make=Says) for name, kind in study.KINDS.items()}
    monkeypatch.setattr(study, "KINDS", kinds)
    data = study.data_for(FILTERS, OPTIONS)
    labels = data.labels[data.train]
    drawn = torch.stack([data.images[data.train[labels == k][0]] for k in range(10)])
    drawn[:4] = 0
    for k, name in enumerate(kinds):
        for seed in range(3):
            right = {"right": torch.tensor(2.0 * k + seed + 1)}
            torch.save(right, study._file(tmp_path, "network", name, seed))
            torch.save(drawn // 2 if seed else drawn, study._file(tmp_path, "drawn", name, seed))
    by = {name: [{"seed": seed} for seed in range(3)] for name in kinds}
    ends = study.judge(by, tmp_path, OPTIONS)
    assert list(ends) == ["uniform noise", "test digits"]
    noise, digits = ends.values()
    assert 0 < noise < 0.2 < 0.8 < digits < 1
    for rows in by.values():
        for row, after in zip(rows, (1, 2, 0), strict=True):
            assert row["taken_by"] == {
                name: approx((2 * k + after + 1) / 10) for k, name in enumerate(kinds)
            }
            assert row["likeness"] == approx(0.6, abs=2e-3)  # six are training images
            assert row["nearness"] == approx((row["likeness"] - noise) / (digits - noise))


def test_the_sheet_has_two_rows_of_five():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None].expand(10, 4, 3)
    sheet = study._sheet(images)
    assert sheet.shape == (2 * 6, 5 * 5)
    assert sheet[2::6, 2::5].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


# --- the claims, on rows made up for them ---


def made(sets=(*SHOWN, "notMNIST"), **changed):
    """Three seeds of each network, of which all is reproduced; `changed` by name of the network."""
    by = {}
    for name in study.KINDS:
        values = {"digits": 0.95, "noise": 0.9, "uniform": 0.91, "drawn": 0.97, "taken": 0.3,
                  "nearness": 0.2, "published": 0.0, "auroc": 0.0}  # fmt: skip
        values |= changed.get(name, {})
        by[name] = []
        for seed in range(3):
            wobble = 0.001 * (seed - 1)
            of_digits = wobble / 10 if name == BASELINE else 2 * wobble
            means = dict.fromkeys(sets, 0.5) | {
                "Gaussian noise": values["noise"] + wobble,
                "uniform noise": values["uniform"] + wobble,
                "test digits": values["digits"] + of_digits,
            }
            apart = dict.fromkeys(sets, 50.0)
            if name == BASELINE:
                for of, figure in study.PUBLISHED.items():
                    if of in sets and of != "uniform noise":
                        means[of] = figure + values["published"] + wobble
                means["test digits"] = values.get("own digits", 0.995) + of_digits
                for of, figure in study.PUBLISHED_AUROC.items():
                    if of in sets:
                        apart[of] = figure + values["auroc"] + wobble
            row = {
                "network": name, "seed": seed,
                "confidence": {"first": means, "second": dict.fromkeys(means, 0.0)},
                "auroc": {"first": apart, "second": dict.fromkeys(apart, 0.0)},
                "drawn_confidence": [values["drawn"] + of_digits + 0.02] * 9
                                    + [values["drawn"] + of_digits - 0.18],
                "taken_by": dict.fromkeys(study.KINDS, 0.99) | {FILTERS: values["taken"] + wobble},
                "nearness": values["nearness"] + wobble,
            }  # fmt: skip
            by[name].append(row)
    return by


# Two claims about noise of each network; four and three published figures; three about drawings.
RIGHT = "RR RR RR RR RRRR RRR RRR RRR RRR RRR"


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({BASELINE: {"drawn": 0.999}}, RIGHT),
        ({SOURCE: {"noise": 0.4}}, "NN RR RR RR RRRR RRR RRR RRR RRR RRR"),
        ({HERE: {"uniform": 0.6}}, "RR RN RR RR RRRR RRR RRR RRR RRR RRR"),
        ({FILTERS: {"noise": 0.84}}, "RR RR RR RN RRRR RRR RRR RRR RRR RRR"),
        ({FILTERS: {"noise": 0.5, "digits": 0.55}}, "RR RR RR UR RRRR RRR RRR RRR RRR RRR"),
        ({BASELINE: {"own digits": 0.98}}, "RR RR RR RR NRRR RRR RRR RRR RRR RRR"),
        ({BASELINE: {"published": 0.06}}, "RR RR RR RR RNRN RRR RRR RRR RRR RRR"),
        ({BASELINE: {"published": -0.06}}, "RR RR RR RR RNRN RRR RRR RRR RRR RRR"),
        ({BASELINE: {"uniform": 0.94}}, "RR RR RR RR RRNR RRR RRR RRR RRR RRR"),
        ({BASELINE: {"auroc": -5.1}}, "RR RR RR RR RRRR NNN RRR RRR RRR RRR"),
        ({SOURCE: {"drawn": 0.9}}, "RR RR RR RR RRRR RRR NRR RRR RRR RRR"),
        ({HERE: {"taken": 0.6}}, "RR RR RR RR RRRR RRR RRR RNR RRR RRR"),
        ({FILTERS: {"nearness": 0.6}}, "RR RR RR RR RRRR RRR RRR RRR RRR RRN"),
    ],
)
def test_each_claim_can_fail(changed, expected):
    changed = {BASELINE: {"drawn": 0.999}, **changed}
    changed[BASELINE] = {"drawn": 0.999, **changed[BASELINE]}
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    claims = study._claims(made(**changed))
    assert "".join(short[claim.verdict] for claim in claims) == expected.replace(" ", "")


def test_what_the_claims_measure_and_whose_word_they_are():
    claims = study._claims(made(**{SOURCE: {"noise": 0.7, "drawn": 0.99}}))
    assert [claim.measured for claim in claims[:2]] == approx([0.7, -0.25])
    assert [claim.published for claim in claims[:8]] == 2 * ["confidently", "as sure"] + 4 * [None]
    published = [0.995, 0.917, 0.881, 0.938, 88.3, 97.9, 82.9]
    assert [claim.published for claim in claims[8:15]] == published
    first = claims[15:18]
    assert [claim.measured for claim in first] == approx([0.04, 0.3, 0.2])  # the CNN's share, 0.3
    said = "no idea how to draw"
    assert [claim.published for claim in claims[15:]] == (
        2 * [None, said, said] + 6 * [None]
    )  # fmt: skip
    bars = [claim for claim in claims if "our bar" in claim.claim]
    assert len(bars) == len(claims) - 4  # all but "as sure of its own drawings as of digits"


def test_a_set_that_is_missing_is_in_no_claim():
    names = [claim.claim for claim in study._claims(made(sets=SHOWN))]
    assert len(names) == 8 + 3 + 2 + 12 and not any("notMNIST" in name for name in names)
