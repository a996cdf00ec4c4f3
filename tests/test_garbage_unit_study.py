"""`experiments/garbage_unit.py`: run with --smoke; what trains, chooses and tests is disjoint; its
measures; its claims, of made-up rows."""

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from test_studies import smoke

from nn_backprop import data
from nn_backprop.study import UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import garbage_unit as study

SMOKE = study.Options(smoke=True)
DIGITS = data.load("digits")
REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
ARCHIVE = "unknown/omniglot_images_background_small1.zip"


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("garbage_unit", tmp_path)
    rows = results["rows"]
    of_source = {"garbage class": 2, "entropic": 1, "Objectosphere": 2}
    for seed in (0, 1):
        trained = [(row["method"], row["source"]) for row in rows if row["seed"] == seed]
        assert trained.count(("softmax", "none")) == 1 and len(trained) == 11
        for source in ("shuffled digits", "uniform noise"):
            for method, settings in of_source.items():
                assert trained.count((method, source)) == settings
    for row in rows:
        assert row["dataset"] == "digits" and row["train_seconds"] > 0
        assert 0.8 < row["accuracy"] <= 1  # chance is 0.1
        assert row["taken_for_rubbish"] < (0.1 if row["method"] == "garbage class" else 1e-9)
        assert len(row["scores"]) == (2 if row["method"] == "Objectosphere" else 1)
        for found in row["scores"].values():
            assert 0.5 < found["validation"] <= 1
            assert set(found["sets"]) == set(study.MADE)
            for name, measures in found["sets"].items():
                easy = name in ("random pixels", "Gaussian noise")
                assert (0.9 if easy else 0.2) < measures["auroc"] <= 1  # chance is 0.5
                assert measures["ccr"] == sorted(measures["ccr"])
                assert measures["ccr"][-1] == approx(row["accuracy"])  # where all rubbish passes
    claims = results["claims"]
    assert len(claims) == 2 * 5 + 1 + 2 * 3
    assert all("not MNIST" in claim["claim"] for claim in claims)

    def best(method, source):
        """Accuracies of the setting with the best validation, and CCR at 1 % without the kin."""
        of = [row for row in rows if (row["method"], row["source"]) == (method, source)]
        tried = [(row["setting"], score) for row in of for score in row["scores"]]
        chosen, score = max(
            tried,
            key=lambda at: sum(
                r["scores"][at[1]]["validation"] for r in of if r["setting"] == at[0]
            ),
        )
        return [row["scores"][score]["sets"] for row in of if row["setting"] == chosen]

    unseen = ("half digits", "Gaussian digits", "Gaussian noise")
    entropic, plain = (
        sum(sets[name]["ccr"][2] for sets in best(*kind) for name in unseen) / 6
        for kind in (("entropic", "shuffled digits"), ("softmax", "none"))
    )
    assert (
        "shuffled digits: entropic classifies more digits correctly than softmax"
        in (claims[1]["claim"])
    )
    assert claims[1]["measured"] == approx(100 * (entropic - plain))


# --- what trains, what chooses and what tests ---


def test_no_source_is_trained_on_and_tested_on():
    for options in (study.Options(), SMOKE):
        tested = study.MADE if options.smoke else study.TESTED
        assert not set(study.sources(options)) & set(tested)
        assert set(study.KIN) >= set(study.sources(options))
        for source in study.sources(options):
            assert 0 < len(study.foreign(source, tested)) < len(tested)  # it has kin and others
    assert set(study.TESTED) | {"EMNIST letters"} == set(data.UNKNOWN_FOR_TESTING)


def archive(monkeypatch, images):
    """The first archive of letters holds these."""

    def sets(names, digits, seed, root):
        assert list(names) == ["Omniglot 1"]
        return {} if images is None else {"Omniglot 1": images}

    monkeypatch.setattr(study, "_data", lambda options: DIGITS)
    monkeypatch.setattr(study, "unknown_sets", sets)
    study._letters.cache_clear()
    study._tested.cache_clear()


def test_letters_to_train_on_and_to_choose_by_are_disjoint(monkeypatch):
    numbers = torch.arange(1720)
    archive(monkeypatch, numbers)
    train = study.training_rubbish("Omniglot 1", study.Options())
    chosen_by = study.validation_rubbish(study.Options())
    assert chosen_by.tolist() == list(range(480, 920))
    assert torch.equal(torch.cat([train, chosen_by]).sort().values, numbers)
    study._letters.cache_clear()


def test_noise_is_as_many_images_as_letters_and_chosen_by_the_same(monkeypatch):
    letters = torch.zeros(1720, 1, 28, 28, dtype=torch.uint8)
    archive(monkeypatch, letters)
    noise = study.training_rubbish("uniform noise", study.Options())
    assert noise.shape == (1280, 1, 28, 28) and 120 < noise.double().mean() < 135
    assert not study.validation_rubbish(study.Options()).any()  # letters, black ones
    study._letters.cache_clear()


def test_without_the_letters_there_is_no_study(monkeypatch):
    archive(monkeypatch, None)
    with pytest.raises(UsageError, match="Omniglot 1 is what the networks are trained on"):
        study.validation_rubbish(study.Options())


@pytest.mark.skipif(
    REAL_ROOT is None or not (Path(REAL_ROOT) / ARCHIVE).exists(), reason="needs Omniglot 1"
)
def test_the_alphabet_held_out_is_one_whole_alphabet():
    with zipfile.ZipFile(Path(REAL_ROOT) / ARCHIVE) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
    alphabets = [name.split("/")[1] for name in names]
    kept = [name for name in alphabets if name not in ("Greek", "Latin")]
    assert set(kept[study.HELD_OUT]) == {"Early_Aramaic"} and kept.count("Early_Aramaic") == 440


def test_test_rubbish_is_made_of_test_digits_and_the_rest_of_none(monkeypatch):
    study._letters.cache_clear()
    study._tested.cache_clear()
    sets = study._tested(study.MADE, SMOKE)
    test, train, validation = (
        {image.numpy().tobytes() for image in DIGITS.images[split].flatten(1).sort(1).values}
        for split in (DIGITS.test, DIGITS.train, DIGITS.validation)
    )

    def greys(images):
        """A set of images, each as its greys in order: pixels in any order are the same."""
        return {image.numpy().tobytes() for image in images.flatten(1).sort(1).values}

    assert greys(sets["random pixels"]) == test
    halves = sets["half digits"]
    digits = DIGITS.images[DIGITS.test]
    assert ((halves == digits) | (halves == 0)).all()
    assert greys(study.training_rubbish("shuffled digits", SMOKE)) == train
    assert greys(study.validation_rubbish(SMOKE)) == validation


def test_a_set_that_is_missing_is_not_asked_for_again(monkeypatch, tmp_path):
    asked = []

    def sets(names, digits, seed, root):
        asked.append(tuple(names))
        return {name: digits for name in names if name != "KMNIST"}

    jobs = []

    class UnderWay:
        def carry_out(self, function, given, tag):
            jobs.extend(given)
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "_data", lambda options: DIGITS)
    monkeypatch.setattr(study, "unknown_sets", sets)
    monkeypatch.setattr(study, "validation_rubbish", lambda options: None)
    with pytest.raises(KeyboardInterrupt):
        study.conduct(UnderWay(), study.Options(seeds=3))
    assert asked == [study.TESTED] and "KMNIST" in study.TESTED
    without = tuple(name for name in study.TESTED if name != "KMNIST")
    assert {job.tested for job in jobs} == {without}
    settings = sum(len(study.SETTINGS[method]) for method in study.LEARNERS)
    assert len(set(jobs)) == len(jobs) == 3 * (1 + 2 * settings)


# --- a training ---


def test_rubbish_stands_beside_the_digits_of_a_batch(monkeypatch):
    rubbish = torch.full((5, 1, 28, 28), 200, dtype=torch.uint8) + torch.arange(5).view(5, 1, 1, 1)
    rubbish = rubbish.to(torch.uint8)
    seen = []

    def spy(model, inputs, targets):
        seen.append((inputs, targets))
        return torch.zeros(())

    monkeypatch.setattr(study, "autograd", spy)
    inputs, targets = DIGITS.batch(DIGITS.train[:42])
    for seed in (3, 3, 4):
        compute = study._beside(rubbish, DIGITS, seed)
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


def test_the_garbage_class_is_towards_one_on_rubbish_and_zero_on_digits():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11), torch.tensor([0, -1, 4, -1, 2, 3, 9])
    loss = study._garbage(0.4)(logits, None, targets)
    minus_log = [
        -F.log_softmax(z, 0)[y if y >= 0 else 10]
        for z, y in zip(logits, targets.tolist(), strict=True)
    ]
    weights = [0.4 if y < 0 else 1.0 for y in targets.tolist()]
    expected = sum(w * each for w, each in zip(weights, minus_log, strict=True)) / sum(weights)
    assert loss.item() == approx(expected.item())


def test_all_methods_have_one_network_but_for_the_eleventh_output():
    def parameters(outputs):
        torch.manual_seed(1)
        return study.Network(outputs, study._plain).state_dict()

    ten, eleven = parameters(10), parameters(11)
    assert list(ten) == list(eleven)
    for name in ten:
        if name != "output.weight":
            assert torch.equal(ten[name], eleven[name])
    assert ten["output.weight"].shape == (10, 64) and eleven["output.weight"].shape == (11, 64)
    numbers = 16 * 25 + 16 + 32 * 16 * 25 + 32 + 512 * 64 + 64 + 64 * 10
    assert sum(tensor.numel() for tensor in ten.values()) == numbers


def test_the_garbage_class_is_no_answer():
    logits = np.log([[0.2] + 9 * [0.05] + [0.35], [0.01] + 9 * [0.01] + [0.9]])
    found = study._scores("garbage class", logits, np.array([3.0, 4.0]))
    assert list(found) == ["confidence"] and found["confidence"] == approx([0.2, 0.01])
    found = study._scores("Objectosphere", logits[:, :10], np.array([3.0, 4.0]))
    assert found["confidence × length"] == approx(found["confidence"] * [3.0, 4.0])
    assert found["confidence"] == approx([0.2 / 0.65, 0.1])


def test_the_area_is_that_of_digits_above_rubbish():
    assert study._auroc_of(np.array([0.9, 0.5]), np.array([0.1, 0.6, 0.2])) == approx(5 / 6)


# --- the claims, on rows made up for them ---

TESTED = ("Omniglot 2", "notMNIST", "half digits", "Gaussian noise", "random pixels")
SOURCES = ("Omniglot 1", "uniform noise")


def made_up(**points):
    """Three seeds of each contestant: CCR, AUROC and accuracy are 50 % and more by the seed.

    `points` are added, by contestant, L for letters or N for noise and the method's first letter,
    and by measure or set: a number, or one for each seed.
    """
    by = {}
    for kind in study.contestants(*SOURCES):
        letter = kind.method[0].upper()
        extra = points.get(f"{'N' if kind.source == SOURCES[1] else 'L'}{letter}", {})

        def value(name, seed, extra=extra):
            added = extra.get(name, 0)
            return 0.5 + 0.02 * seed + (added[seed] if isinstance(added, list) else added) / 100

        by[kind] = [
            {
                "accuracy": value("accuracy", seed),
                "sets": {
                    name: {"auroc": value(f"area {name}", seed), "ccr": 7 * [value(name, seed)]}
                    for name in TESTED
                },
            }
            for seed in range(3)
        ]
    return by


WORDS = {"R": "reproduced", "N": "not reproduced", "U": "undecided"}


def verdicts(claims):
    short = {word: letter for letter, word in WORDS.items()}
    return "".join(short[claim.verdict] for claim in claims)


def test_better_is_better_on_what_is_unseen_and_no_kin():
    shift = [1.0, 1.1, 0.9]
    by = made_up(
        LE={"notMNIST": shift, "half digits": shift, "Omniglot 2": -90},  # the kin do not count
        LO={"notMNIST": [-1.0, -1.1, -0.9]},
        NG={"Omniglot 2": shift, "Gaussian noise": -90, "random pixels": -90},
    )
    claims = study._claims(by, TESTED)[:10]
    # Of letters the means are over four sets, of noise over three.
    expected = [0, 0.5, -0.25, 0.5, -0.25, 1 / 3, 0, 0, -1 / 3, -1 / 3]
    assert [claim.measured for claim in claims] == approx(expected, abs=1e-9)
    assert verdicts(claims) == "NRNRN" + "RNNNN"  # no difference at all is not better
    names = ("garbage class", "entropic", "Objectosphere", "entropic", "Objectosphere")
    against = 3 * ["softmax"] + 2 * ["garbage class"]
    for claim, one, other in zip(claims, 2 * names, 2 * against, strict=True):
        assert f"{one} classifies more digits correctly than {other}" in claim.claim
    assert ["uniform noise" in claim.claim for claim in claims] == 5 * [False] + 5 * [True]


def test_better_by_chance_is_undecided():
    by = made_up(LE={"notMNIST": [9.0, -8.0, 1.0]})
    assert study._claims(by, TESTED)[1].verdict == "undecided"


def test_the_gain_in_auroc_beside_what_was_published():
    by = made_up(
        LE={"area notMNIST": [1.0, 1.1, 0.9], "area Gaussian noise": [-1.0, -1.1, -0.9],
            "area Omniglot 2": 30},
        NE={"area notMNIST": [0.0, 1.0, -1.1], "area Omniglot 2": [1.0, 1.1, 0.9]},
        LG={"area notMNIST": -30}, NO={"area notMNIST": -30},
    )  # fmt: skip
    claims = study._claims(by, TESTED)[10:-6]
    told = [claim.claim.partition(", in points")[0] for claim in claims]
    assert told == [
        "trained on Omniglot 1, entropic: AUROC of notMNIST rises",
        "trained on Omniglot 1, entropic: AUROC of Gaussian noise rises",
        "trained on uniform noise, entropic: AUROC of Omniglot 2 does not rise",
        "trained on uniform noise, entropic: AUROC of notMNIST rises",
    ]
    assert [claim.measured for claim in claims] == approx([1, -1, 1, -0.1 / 3])
    assert verdicts(claims) == "RNNU"
    assert claims[0].published.startswith("96.04 → 98.37 %")


@pytest.mark.parametrize(
    "points, verdict", [([-0.05, -0.06, -0.04], "R"), ([-0.2, -0.21, -0.19], "N"),
                        ([-0.1, -0.2, 0.1], "U"), ([2.0, 2.1, 2.2], "R")]
)  # fmt: skip
def test_the_price_in_accuracy_against_our_bar(points, verdict):
    claims = study._claims(made_up(NO={"accuracy": points}), TESTED)[-6:]
    assert verdicts(claims) == "RRRRR" + verdict
    assert claims[-1].measured == approx(sum(points) / 3)
    assert "uniform noise: test accuracy of Objectosphere" in claims[-1].claim
    assert all("our bar" in claim.claim for claim in claims)
    assert [claim.published is None for claim in claims] == 2 * [True, False, True]


def test_what_a_method_is_chosen_by_is_validation():
    def row(kind, setting, seed, validation, test):
        return {
            "method": kind.method, "source": kind.source, "setting": setting, "seed": seed,
            "accuracy": test,
            "scores": {
                score: {"validation": value, "sets": score} for score, value in validation.items()
            },
        }  # fmt: skip

    sphere = study.Kind("Objectosphere", "uniform noise")
    plain, scaled = study.PROBABILITY, study.SCALED
    values = {("a", plain): (0.5, 0.9), ("a", scaled): (0.8, 0.7),
              ("b", plain): (0.6, 0.7), ("b", scaled): (0.7, 0.7)}  # fmt: skip
    rows = [
        row(
            kind, setting, seed,
            {score: value[seed] for (of, score), value in values.items() if of == setting},
            0.9 if setting == "b" else 0.1,
        )
        for seed in (0, 1)
        for kind in (sphere, *(k for k in study.contestants(*SOURCES) if k != sphere))
        for setting in "ab"
    ]  # fmt: skip
    by = study.by_kind(rows, SOURCES)
    assert list(by) == study.contestants(*SOURCES)
    assert [(found["setting"], found["score"], found["seed"]) for found in by[sphere]] == [
        ("a", "confidence × length", 0), ("a", "confidence × length", 1)
    ]  # fmt: skip
    assert by[sphere][0]["sets"] == "confidence × length"
