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
from nn_backprop.studies.old_study import UsageError

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
    for seed in (0, 1):
        trained = [(row["method"], row["source"]) for row in rows if row["seed"] == seed]
        assert trained.count(("softmax", "none")) == 1 and len(trained) == 7
        for source in ("shuffled digits", "uniform noise"):
            for method in ("garbage class", "entropic", "Objectosphere"):
                assert trained.count((method, source)) == 1
    for row in rows:
        assert row["dataset"] == "digits" and row["train_seconds"] > 0
        assert 0.8 < row["accuracy"] <= 1  # chance is 0.1
        assert row["taken_for_rubbish"] < (0.1 if row["method"] == "garbage class" else 1e-9)
        assert set(row["scores"]) == {"confidence", "confidence × length"}  # for every method
        for found in row["scores"].values():
            assert 0.5 < found["validation"] <= 1
            assert set(found["sets"]) == set(study.SMOKE_TESTED)
            for name, measures in found["sets"].items():
                easy = name in ("random pixels", "Gaussian noise")
                assert (0.9 if easy else 0.2) < measures["AUROC"] <= 1  # chance is 0.5
                correct = [measures[f"CCR at {rate} %"] for rate in (1, 3, 10, 30, 100)]
                assert correct == sorted(correct)
                assert correct[-1] == approx(row["accuracy"])  # where all rubbish passes
    claims = results["claims"]
    assert len(claims) == 2 * 3 + 2 * 3 + 4 + 2 * 3
    assert all("not MNIST" in claim["claim"] for claim in claims)

    def best(method, source):
        """The measures with the score of the best validation."""
        of = [row for row in rows if (row["method"], row["source"]) == (method, source)]
        score = max(of[0]["scores"], key=lambda s: sum(r["scores"][s]["validation"] for r in of))
        return [row["scores"][score]["sets"] for row in of]

    unseen = ("half digits", "Gaussian digits", "Gaussian noise")
    entropic, plain = (
        sum(sets[name]["CCR at 10 %"] for sets in best(*kind) for name in unseen) / 6
        for kind in (("entropic", "shuffled digits"), ("softmax", "none"))
    )
    assert (
        "shuffled digits: entropic classifies more digits correctly than softmax"
        in (claims[1]["claim"])
    )
    assert claims[1]["measured"] == approx(100 * (entropic - plain))


# --- what trains, what chooses and what tests ---


RIGHT = ["notMNIST", "Fashion-MNIST", "KMNIST", "half digits"]
GAUSSIAN = ["Gaussian digits", "Gaussian noise"]


def test_no_source_is_trained_on_and_tested_on():
    for options in (study.Options(), SMOKE):
        tested = study.SMOKE_TESTED if options.smoke else study.TESTED
        assert not set(study.sources(options)) & set(tested)
        assert set(study.KIN) >= set(study.sources(options))
        for source in study.sources(options):
            assert 0 < len(study.foreign(source, tested)) < len(tested)  # it has kin and others
    assert study.foreign("Omniglot 1", study.TESTED) == [*RIGHT, "random pixels", *GAUSSIAN]
    assert study.foreign("uniform noise", study.TESTED) == [*RIGHT, "Gaussian digits"]
    assert set(study.TESTED) | {"EMNIST letters"} == set(data.UNKNOWN_FOR_TESTING)


def test_kin_of_what_settings_are_chosen_by_are_foreign_to_no_network():
    for options, tested, kin in (
        (study.Options(), study.TESTED, "Omniglot 2"),
        (SMOKE, study.SMOKE_TESTED, "random pixels"),
    ):
        letters, _ = study.sources(options)  # settings are chosen by others of their kind
        assert kin in tested and study.KIN[letters] == (kin,)
        assert all(kin not in study.foreign(source, tested) for source in study.sources(options))


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
    sets = study._tested(study.SMOKE_TESTED, SMOKE)
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
    assert [len(study.SETTINGS[method]) for method in study.LEARNERS] == 3 * [3]
    assert len(set(jobs)) == len(jobs) == 3 * (1 + 2 * 9)


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


DIGITS_FIRST = torch.tensor([0, 4, 2, 9, -1, -1, -1])


def test_the_garbage_class_is_towards_one_on_rubbish_and_zero_on_digits():
    torch.manual_seed(0)
    logits = torch.randn(7, 11)
    loss = study.SETTINGS["garbage class"]["weight 1.6"](logits, logits, DIGITS_FIRST)
    eleven = torch.where(DIGITS_FIRST < 0, 10, DIGITS_FIRST)
    weight = torch.tensor(10 * [1.0] + [1.6])  # torch's weights of the classes say the same
    assert loss.item() == approx(F.cross_entropy(logits, eleven, weight).item(), rel=1e-6)


@pytest.mark.parametrize("weight", [0.1, 1.6])
def test_rubbish_has_a_weight_in_the_entropic_loss(weight):
    torch.manual_seed(0)
    logits = torch.randn(7, 10)
    loss = study.SETTINGS["entropic"][f"weight {weight}"](logits, logits, DIGITS_FIRST)
    total = 0.0
    for z, y in zip(logits, DIGITS_FIRST.tolist(), strict=True):
        minus_log = -F.log_softmax(z, 0)
        total += minus_log[y].item() if y >= 0 else weight * minus_log.mean().item()
    assert loss.item() == approx(total / (4 + 3 * weight), rel=1e-6)


def test_the_weight_of_rubbish_holds_for_its_features_too():
    torch.manual_seed(0)
    logits, features = torch.zeros(7, 10), torch.randn(7, 64)
    loss = study.SETTINGS["Objectosphere"]["ξ = 10, λ = 0.01"](logits, features, DIGITS_FIRST)
    lengths = features.norm(dim=1)
    spheres = ((10 - lengths[:4]).relu() ** 2).sum() + 0.4 * (lengths[4:] ** 2).sum()
    expected = np.log(10) + 0.01 * spheres.item() / (4 + 3 * 0.4)
    assert loss.item() == approx(expected, rel=1e-6)


def test_without_rubbish_every_loss_is_a_plain_mean():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 11), DIGITS_FIRST[:4]
    for method in ("softmax", "garbage class", "entropic"):  # a small last batch has none
        for loss in study.SETTINGS[method].values():
            expected = F.cross_entropy(logits, targets).item()
            assert loss(logits, logits, targets).item() == approx(expected, rel=1e-6)


def test_all_methods_have_one_network_but_for_the_eleventh_output():
    def parameters(outputs):
        torch.manual_seed(1)
        return study.Network(outputs, study.ENTROPY).state_dict()

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
    found = study._scores(logits, np.array([3.0, 4.0]))
    assert found["confidence"] == approx([0.2, 0.01])
    assert found["confidence × length"] == approx([0.6, 0.04])
    assert study._scores(logits[:, :10], np.ones(2))["confidence"] == approx([0.2 / 0.65, 0.1])
    assert study._errors((logits, np.ones(2)), torch.tensor([0, 1])).tolist() == [False, True]


def test_the_measures_by_hand():
    known, errors = np.array([0.9, 0.5, 0.95, 0.3]), np.array([0, 0, 1, 0])
    unknown = np.array([0.1, 0.6, 0.2, 0.5, *6 * [0.0]])
    found = study._measures(known, errors, unknown)
    assert found["AUROC"] == approx((10 + 8.5 + 10 + 8) / 40)  # equal scores count ½
    assert found["CCR at 1 %"] == 0.25  # above 0.6 one is right, one is wrong
    assert found["CCR at 10 %"] == 0.25  # 0.5 is not to be had without 2 of 10
    assert found["CCR at 30 %"] == 0.75 == found["CCR at 100 %"]


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
                    name: {
                        "AUROC": value(f"area {name}", seed),
                        "CCR at 1 %": value(f"strict {name}", seed),
                        "CCR at 10 %": value(name, seed),
                    }
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


SHIFT, BACK = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9]
UNSEEN, LESS, SCRIPT, RISE = slice(6), slice(6, 12), slice(12, 16), slice(16, 18)


def test_there_are_no_more_claims_than_can_be_read():
    claims = study._claims(made_up(), TESTED)
    assert len(claims) == 24 and len({claim.claim for claim in claims}) == len(claims)


def test_better_is_better_on_what_is_foreign():
    by = made_up(
        LE={"notMNIST": SHIFT, "half digits": SHIFT, "Omniglot 2": -90},  # the kin do not count
        LO={"notMNIST": BACK},
        NG={"notMNIST": SHIFT, "Omniglot 2": -90, "Gaussian noise": -90, "random pixels": -90},
        NE={"strict notMNIST": 30},  # that is at another rate
    )
    claims = study._claims(by, TESTED)[UNSEEN]
    # Of letters the means are over four sets, of noise over two.
    assert [claim.measured for claim in claims] == approx([0, 0.5, -0.25, 0.5, 0, 0], abs=1e-9)
    assert verdicts(claims) == "NRNRNN"  # no difference at all is not better
    names = 2 * ("garbage class", "entropic", "Objectosphere")
    for number, (claim, name) in enumerate(zip(claims, names, strict=True)):
        assert f"{name} classifies more digits correctly than softmax" in claim.claim
        assert claim.published is None and "at 10 % false positives" in claim.claim
        sets = "notMNIST, half digits, Gaussian noise, random pixels"
        told = ("Omniglot 1", sets) if number < 3 else ("uniform noise", "notMNIST, half digits")
        assert claim.claim.startswith(f"trained on {told[0]}: ")
        assert f"mean over {told[1]}, in points" in claim.claim


def test_another_kind_is_known_less_well_if_the_gain_on_kin_is_larger():
    by = made_up(
        LS={"Omniglot 2": 1},
        LG={"Omniglot 2": [2.0, 2.1, 1.9], "notMNIST": 4},  # over four sets 1, too
        LE={"Omniglot 2": 3, "notMNIST": SHIFT},
        LO={"Omniglot 2": BACK},
        NG={"Gaussian noise": SHIFT, "random pixels": SHIFT, "Omniglot 2": 90},
        NE={"half digits": SHIFT},
        NO={"Gaussian noise": [3.0, -2.0, 0.0]},
    )
    claims = study._claims(by, TESTED)[LESS]
    measured = [claim.measured for claim in claims]
    assert measured == approx([0, 1.75, -2, 1, -0.5, 1 / 6], abs=1e-9)
    assert verdicts(claims) == "URNRNU"
    assert all("knows another kind less well" in claim.claim for claim in claims)
    assert "kin (Omniglot 2) than on notMNIST, half digits," in claims[0].claim
    assert "kin (Gaussian noise, random pixels) than on notMNIST, half" in claims[3].claim


def test_what_was_published_of_another_script_stands_beside_omniglot_2():
    by = made_up(LE={"Omniglot 2": SHIFT, "notMNIST": -90}, LG={"Omniglot 2": [0.0, 0.2, 0.1]},
                 LO={"Omniglot 2": BACK})  # fmt: skip
    claims = study._claims(by, TESTED)[SCRIPT]
    assert [claim.measured for claim in claims] == approx([1, 0.9, -1, -1.1])
    assert verdicts(claims) == "RRNN"
    for claim, other in zip(claims, 2 * ("softmax", "garbage class"), strict=True):
        assert f"than {other} at 10 % false positives of Omniglot 2" in claim.claim
        assert claim.published == "significantly better (Dhamija et al. 2018)"
    told = [claim for claim in study._claims(by, TESTED) if "Dhamija" in str(claim.published)]
    assert told == claims


def test_without_the_kin_there_is_no_claim_about_them():
    claims = study._claims(made_up(), TESTED[1:])
    assert len(claims) == 6 + 3 + 2 + 6
    assert not any("Omniglot 2" in claim.claim for claim in claims)


def test_better_by_chance_is_undecided():
    by = made_up(LE={"notMNIST": [9.0, -8.0, 1.0]})
    assert study._claims(by, TESTED)[UNSEEN][1].verdict == "undecided"


@pytest.mark.parametrize(
    "points, verdict", [(SHIFT, "R"), (BACK, "N"), ([0.0, 1.0, -1.1], "U"), ([0.0] * 3, "N")]
)
def test_the_gain_in_auroc_beside_what_was_published(points, verdict):
    by = made_up(
        LE={"area notMNIST": SHIFT, "area Gaussian noise": -30, "area Omniglot 2": -30},
        NE={"area notMNIST": points},
        LG={"area notMNIST": -30}, NO={"area notMNIST": -30},
    )  # fmt: skip
    claims = study._claims(by, TESTED)[RISE]
    assert [claim.claim.partition(", in points")[0] for claim in claims] == [
        "trained on Omniglot 1, entropic: AUROC of notMNIST rises",
        "trained on uniform noise, entropic: AUROC of notMNIST rises",
    ]
    assert [claim.measured for claim in claims] == approx([1, sum(points) / 3], abs=1e-9)
    assert verdicts(claims) == "R" + verdict
    assert all(claim.published.startswith("96.04 → 98.37 %") for claim in claims)


@pytest.mark.parametrize(
    "points, verdict", [([-0.05, -0.06, -0.04], "R"), ([-0.2, -0.21, -0.19], "N"),
                        ([-0.1, -0.2, 0.1], "U"), ([2.0, 2.1, 2.2], "R")]
)  # fmt: skip
def test_the_price_in_accuracy_against_our_bar(points, verdict):
    claims = study._claims(made_up(NO={"accuracy": points}), TESTED)[-6:]
    assert verdicts(claims) == "RRRRR" + verdict
    assert claims[-1].measured == approx(sum(points) / 3)
    assert "uniform noise: test accuracy of Objectosphere, all digits answered" in claims[-1].claim
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


def test_a_set_that_is_missing_is_told_and_enters_no_mean(monkeypatch):
    monkeypatch.setattr(study, "_settings", lambda by, rows: [])
    names = (*TESTED[:2], "KMNIST", *TESTED[2:])
    tables = study._tables(made_up(LG={"half digits": 4}), names, TESTED, [])
    _, letters, noise = tables.values()
    missing = [row for row in letters if row["rubbish"] == "KMNIST"]
    assert [list(row.values()) for row in missing] == [["KMNIST", "not at hand", *4 * "–"]]
    assert len(letters) == len(noise) == 3 * 5 + 1 + 3
    means = {row["measure"]: row for row in letters if row["rubbish"] == "mean, without kin"}
    assert list(means) == ["AUROC", "CCR at 1 %", "CCR at 10 %"]
    assert means["CCR at 10 %"]["garbage class"] == "53.00 ± 2.00"  # 4 points over four sets
    kin = {row["rubbish"] for row in noise if "(kin)" in row["rubbish"]}
    assert kin == {"Omniglot 2 (kin)", "Gaussian noise (kin)", "random pixels (kin)"}
