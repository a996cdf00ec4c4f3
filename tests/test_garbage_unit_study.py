"""`experiments/garbage_unit.py`: run with --smoke; what trains, chooses and tests is disjoint; its
measures; its claims, of made-up rows."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from properties import refuses
from pytest import approx
from test_studies import smoke_rows

import garbage_unit as study
from nn_backprop import data
from nn_backprop.studies import Rows, UsageError, rubbish

FULL, SMOKE = study.Options(seeds=3), study.Options(smoke=True)
DIGITS = data.load("digits")
METHODS = ("garbage class", "entropic", "Objectosphere")


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("garbage_unit", tmp_path)
    kinds = [("softmax", "none")]
    kinds += [(method, of) for of in ("shuffled digits", "uniform noise") for method in METHODS]
    assert list(rows.by("seed", "method", "source")) == [(s, *k) for s in (0, 1) for k in kinds]
    for row in rows:
        assert 0.8 < row["accuracy"] <= 1  # chance is 0.1
        assert row["taken_for_rubbish"] < (0.1 if row["method"] == "garbage class" else 1e-9)
        assert set(row["scores"]) == {"confidence", "confidence × length"}  # for every method
        for found in row["scores"].values():
            assert 0.5 < found["validation"] <= 1 and tuple(found["sets"]) == study.ASKED["digits"]
            for name, measures in found["sets"].items():
                easy = name in ("random pixels", "Gaussian noise")
                assert (0.9 if easy else 0.2) < measures["AUROC"] <= 1  # chance is 0.5
                correct = [measures[f"CCR at {rate} %"] for rate in (1, 3, 10, 30, 100)]
                assert correct == sorted(correct)
                assert correct[-1] == approx(row["accuracy"])  # where all rubbish passes
    assert len(claims) == 2 * 3 + 2 * 3 + 4 + 2 * 3


# --- what trains, what chooses and what tests ---


def test_no_source_is_trained_on_and_tested_on_and_kin_are_not_foreign():
    assert set(study.ASKED["mnist"]) | {"EMNIST letters"} == set(data.UNKNOWN_FOR_TESTING)
    for dataset, letters, kin in (("mnist", "Omniglot 1", "Omniglot 2"),
                                  ("digits", "shuffled digits", "random pixels")):  # fmt: skip
        asked = study.ASKED[dataset]
        assert not {letters, "uniform noise"} & set(asked)
        assert kin in asked and study.KIN[letters] == (kin,)  # settings are chosen by letters
        for source in (letters, "uniform noise"):
            foreign = study.foreign(source, asked)
            near = {kin} if source == letters else {kin, "Gaussian noise", "random pixels"}
            assert set(foreign) == set(asked) - near and len(foreign) > 1


@pytest.fixture
def archive(monkeypatch):
    """Of a full run on the digits: what the archives of letters hold, by name, and what is asked
    for; nothing of this is remembered."""
    held, asked = {}, []

    def sets(names, digits, seed, root):
        asked.append(tuple(names))
        return {name: held[name] for name in names if name in held}

    monkeypatch.setattr(study.studies, "load_data", lambda options: replace(DIGITS, name="mnist"))
    monkeypatch.setattr(study.data, "unknown_sets", sets)
    for name in ("rubbish", "rubbish_to_test_on"):
        monkeypatch.setattr(study, name, getattr(study, name).__wrapped__)
    return held, asked


def test_letters_to_train_on_and_to_choose_by_are_disjoint_and_noise_is_as_much(archive):
    held, asked = archive
    refuses("Omniglot 1 is what networks are trained on", study.collect, None, FULL,
            error=UsageError)  # fmt: skip
    numbers = torch.arange(1720).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    tested = study.ASKED["mnist"]
    held |= {"Omniglot 1": numbers} | {name: numbers for name in tested if name != "KMNIST"}
    by_source, chosen_by = study.rubbish(FULL)
    letters, noise = by_source["Omniglot 1"], by_source["uniform noise"]
    assert torch.equal(chosen_by, numbers[480:920])
    assert torch.equal(torch.cat([letters[:480], chosen_by, letters[480:]]), numbers)
    assert noise.shape == (1280, 1, 28, 28) and 120 < noise.double().mean() < 135

    class Run:
        def train_all(self, train, jobs, tag):
            self.jobs = jobs

    run = Run()
    asked.clear()
    study.collect(run, FULL)
    assert asked == [("Omniglot 1",), tested]  # KMNIST is missing, and not asked for again
    assert {job.sets for job in run.jobs} == {tuple(name for name in tested if name != "KMNIST")}
    assert len(set(run.jobs)) == len(run.jobs) == 3 * (1 + 2 * 9)


def test_test_rubbish_is_made_of_test_digits_and_the_rest_of_none():
    def greys(images):
        """A set of images, each as its greys in order: pixels in any order are the same."""
        return {image.numpy().tobytes() for image in images.flatten(1).sort(1).values}

    sets = study.rubbish_to_test_on(study.ASKED["digits"], SMOKE)
    halves, digits = sets["half digits"], DIGITS.images[DIGITS.test]
    assert ((halves == digits) | (halves == 0)).all()
    by_source, chosen_by = study.rubbish(SMOKE)
    assert set(by_source) == {"shuffled digits", "uniform noise"}
    for images, split in ((sets["random pixels"], DIGITS.test), (chosen_by, DIGITS.validation),
                          (by_source["shuffled digits"], DIGITS.train)):  # fmt: skip
        assert greys(images) == greys(DIGITS.images[split])


# --- a training ---


def test_rubbish_stands_beside_the_digits_of_a_batch(monkeypatch):
    images = (200 + torch.arange(5)).to(torch.uint8).view(5, 1, 1, 1).expand(5, 1, 28, 28)
    seen = []
    monkeypatch.setattr(rubbish, "autograd", lambda model, *batch: seen.append(batch))
    inputs, targets = DIGITS.batch(DIGITS.train[:42])
    for seed in (3, 3, 4):
        compute = rubbish.beside(images, DIGITS, 4, seed)
        compute(None, inputs, targets)
        compute(None, inputs, targets)
    for both, labels in seen:
        assert torch.equal(both[:42], inputs) and torch.equal(labels[:42], targets)
        assert labels[42:].tolist() == 10 * [-1] and len(both) == 52
        greys = both[42:].flatten(1) * DIGITS.std * 255 + DIGITS.mean * 255
        assert (greys - greys[:, :1]).abs().max() < 1e-3  # one image of the five each
        assert greys.min() > 199.9 and greys.max() < 204.1
    drawn = [both[42:] for both, _ in seen]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])  # by the seed
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[4])


def test_the_losses_and_the_weight_of_rubbish():
    torch.manual_seed(0)
    logits, features = torch.randn(7, 11), torch.randn(7, 64)
    y = torch.tensor([0, 4, 2, 9, -1, -1, -1])

    def loss(method, setting, z, n=7):
        network = rubbish.Network(10, *study.SETTINGS[method][setting])
        assert network.output.bias is None
        return network.loss((z[:n], features[:n]), y[:n]).item()

    # torch's weights of the classes say the same
    expected = F.cross_entropy(logits, y.where(y >= 0, 10), torch.tensor(10 * [1.0] + [1.6]))
    assert loss("garbage class", "weight 1.6", logits) == approx(expected.item(), rel=1e-6)
    minus_log = -F.log_softmax(ten := logits[:, :10], 1)
    known, unknown = minus_log[range(4), y[:4]].sum(), minus_log[4:].mean(1).sum()
    for weight in (0.1, 1.6):
        expected = ((known + weight * unknown) / (4 + 3 * weight)).item()
        assert loss("entropic", f"weight {weight}", ten) == approx(expected, rel=1e-6)
    lengths = features.norm(dim=1)
    spheres = ((10 - lengths[:4]).relu() ** 2).sum() + 0.4 * (lengths[4:] ** 2).sum()
    expected = np.log(10) + 0.01 * spheres.item() / (4 + 3 * 0.4)
    found = loss("Objectosphere", "ξ = 10, λ = 0.01", torch.zeros(7, 10))
    assert found == approx(expected, rel=1e-6)
    for method in ("softmax", "garbage class", "entropic"):  # a small last batch has no rubbish
        for setting in study.SETTINGS[method]:
            expected = F.cross_entropy(logits[:4], y[:4]).item()
            assert loss(method, setting, logits, 4) == approx(expected, rel=1e-6)


class Fixed(torch.nn.Module):
    """Of an image the number in its pixels says which logits and features are made of it.

    The logits are those of a probability for digit 0, the rest being the garbage class's.
    """

    def __init__(self, probabilities, lengths):
        super().__init__()
        rest = 1 - torch.tensor(probabilities)
        shares = torch.tensor([[p] + 9 * [1e-15] for p in probabilities])
        self.logits = torch.cat([shares, rest[:, None]], 1).double().log()
        self.features = torch.tensor(lengths)[:, None] * torch.tensor([0.6, 0.8])

    def forward(self, x):
        which = (x[:, 0, 0, 0] * DIGITS.std * 255 + DIGITS.mean * 255).round().long()
        return self.logits[which], self.features[which]


def test_the_measures_by_hand_and_the_garbage_class_is_no_answer():
    known, unknown = [0.9, 0.5, 0.95, 0.3], [0.1, 0.6, 0.2, 0.5, *6 * [0.001]]
    images = torch.arange(14, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    four = replace(DIGITS, images=images, labels=torch.tensor([0, 0, 1, 0]))
    # confidence × length turns the order of the known about, and leaves all above the unknown
    model = Fixed(known + unknown, [4.0, 20.0, 1.0, 30.0, *10 * [1.0]])
    found, about = rubbish.tested(model, four, torch.arange(4), {"some": images[4:]})
    assert about == {"accuracy": 0.75, "taken_for_rubbish": 0.25}  # 0.3; at 0.5 the digit is first
    measures = found["confidence"]["some"]
    assert measures["AUROC"] == approx((10 + 8.5 + 10 + 8) / 40)  # equal scores count ½
    assert measures["CCR at 1 %"] == 0.25  # above 0.6 one is right, one is wrong
    assert measures["CCR at 10 %"] == 0.25  # 0.5 is not to be had without 2 of 10
    assert measures["CCR at 30 %"] == 0.75 == measures["CCR at 100 %"]
    assert found["confidence × length"]["some"] == {
        "AUROC": 1, **{f"CCR at {rate} %": 0.75 for rate in (1, 3, 10, 30, 100)}
    }  # fmt: skip
    logits, scores = rubbish.answers(model, four, images)
    assert logits.shape == (14, 11) and scores["confidence"] == approx(known + unknown)
    assert scores["confidence × length"][:4] == approx([3.6, 10, 0.95, 9])


# --- the claims, on rows made up for them ---

KIN = ("Omniglot 2", "Gaussian noise", "random pixels")
FACTORS = {"softmax": (0, 0), "garbage class": (1, 2), "entropic": (1, 3), "Objectosphere": (1, 3)}


def made_up(points, accuracy, sets=("notMNIST", "half digits", *KIN)):
    """Three seeds: of each method so many points more, or 2 or 3 times as many on what is kin."""
    rows = Rows()
    kinds = [(method, source) for source in ("Omniglot 1", "uniform noise") for method in METHODS]
    for (method, source), seed in product([("softmax", "none"), *kinds], (2, 0, 1)):
        more = {name: 0.5 + (2 * seed + FACTORS[method][name in KIN] * points[seed]) / 100
                for name in sets}  # fmt: skip
        measures = {name: {"AUROC": value, "CCR at 10 %": value} for name, value in more.items()}
        rows.append({
            "method": method, "source": source, "setting": "only", "seed": seed,
            "accuracy": 0.9 + (seed + accuracy[seed] * (method != "softmax")) / 100,
            "scores": {"confidence": {"validation": 0.8, "sets": measures}},
        })  # fmt: skip
    return rows


def test_each_claim_can_fail():
    short = {"reproduced": "R", "not reproduced": "N", "undecided": "U"}
    better, torn, accurate = [1.0, 1.1, 0.9], [9.0, -8.0, 5.0], [-0.05, -0.06, -0.04]
    for points, accuracy, verdicts in (  # on what is foreign, kin, letters, in AUROC; accuracy
        (better, accurate, 18 * "R" + 6 * "R"),
        ([-x for x in better], [4 * x for x in accurate], 18 * "N" + 6 * "N"),
        ([0.0, 0.0, 0.0], better, 18 * "N" + 6 * "R"),  # no difference is not better
        (torn, torn, 18 * "U" + 6 * "U"),
    ):
        claims = study.claims(made_up(points, accuracy))
        assert "".join(short[claim.verdict] for claim in claims) == verdicts, points
    without = study.claims(made_up(better, accurate, ("notMNIST", *KIN[1:])))  # none of letters
    assert len(without) == 6 + 3 + 2 + 6 and not any(KIN[0] in claim.claim for claim in without)
