"""`experiments/threshold.py`: run with --smoke; what chooses and what is told; claims; counts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.special import expit, logit
from scipy.stats import beta, t
from test_studies import smoke_rows

from nn_backprop.data import load
from nn_backprop.layers import SoftGate
from nn_backprop.models import MLP
from nn_backprop.studies import Rows
from nn_backprop.studies.answers import Answers, answers_of, cost, quality, selector
from nn_backprop.studies.rejection import (
    at_threshold,
    auroc,
    best_threshold,
    calibration,
    confidence,
    lowest_threshold,
    promised_threshold,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import threshold as study

PARAMETERS = {
    "happy": 13_002,
    "MLP": 784 * 256 + 256 + 2 * (256 * 256 + 256) + 256 * 10 + 10,
    "CNN": 16 * 26 + 32 * (16 * 25 + 1) + 512 * 10 + 10,
}
PRICES = (0.01, 0.03, 0.1, 0.3)
WAYS = ("1 − λ", "1 − λ, calibrated", "swept", "learnt")


def by_price(costs):
    """Of each price one cost of each way."""
    return zip(*(costs[k :: len(WAYS)] for k in range(len(WAYS))), strict=True)


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("threshold", tmp_path)
    assert [(row["network"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("CNN", "MLP", "happy") for seed in (0, 1)
    ]
    for row in rows:
        assert row["dataset"] == "digits" and row["parameters"] == PARAMETERS[row["network"]]
        assert 0 < row["error"] < 0.6  # chance is .9
        assert 0.7 < row["auroc"] < 1 and 0 < row["validation_error"] < 0.6
        assert 0 < row["selector_aurc"] < row["error"]
        assert 0 < row["aurc"] < row["error"] < row["average_precision"] < 1
        assert 0 < row["rejected"] < 1 and 0 < row["rejected_in_hindsight"] < 1
        assert row["risk_curve"][0] == row["error"] > row["risk_curve"][-1]  # none, a fifth
        assert 1 >= max(row["precision_curve"]) >= row["precision_curve"][-1] >= row["error"]
        assert [(c["price"], c["way"]) for c in row["costs"]] == [
            (price, way) for price in PRICES for way in WAYS
        ]
        for plain, calibrated, swept, learnt in by_price(row["costs"]):
            assert plain["threshold"] == approx(1 - plain["price"])
            assert calibrated["threshold"] != plain["threshold"]
            for one in (plain, calibrated, swept, learnt):
                assert swept["validation"] <= one["validation"]
                assert 0 < one["least"] <= one["test"] + 1e-12 and 0 <= one["rejected"] <= 1
        naive, bounded = row["promises"]
        assert [p["delta"] for p in row["promises"]] == [None, 0.05]
        assert naive["risk"] == {"happy": 0.02, "MLP": 0.01, "CNN": 0.005}[row["network"]]
        for what in ("rejected", "rejected_in_draws"):
            assert 0 <= naive[what] <= bounded[what] <= 1
        assert bounded["broken"] <= naive["broken"] <= naive["draws"] == 20
    assert len(claims) == 3 * 7 + 3
    (claim,) = (of for words, of in claims.items() if words.startswith("MLP: AUROC"))
    by_hand = rows.where(network="MLP").values("auroc", 100)
    assert claim["measured"] == approx(by_hand.mean()) and claim["published"] == 97.83


# --- what chooses, and what is told ---


def test_no_split_has_an_image_of_another(monkeypatch):
    """What trains is data.train; what answers, in this order, validation and test."""
    trained, asked, chosen = [], [], []
    train = study.studies.train_network

    def watched_training(model, data, **how):
        trained.append(data)
        return train(model, data, **how | {"epochs": 1})

    def watched(model, data, indices):
        asked.append(indices)
        return answers_of(model, data, indices)

    monkeypatch.setattr(study.studies, "train_network", watched_training)
    monkeypatch.setattr(study, "answers_of", watched)
    for name in ("quality", "costs", "promises"):
        monkeypatch.setattr(study, name, lambda v, t, *_: chosen.append((v, t)) or {})
    study.train(study.Job("happy", 0, study.Options(smoke=True)))
    (data,) = trained
    assert torch.equal(asked[0], data.validation) and torch.equal(asked[1], data.test)
    assert [(len(v.scores), len(t.scores)) for v, t in chosen] == 3 * [(300, 300)]
    assert not np.array_equal(chosen[0][0].scores, chosen[0][1].scores)
    parts = [set(part.tolist()) for part in (data.train, *asked)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1_797


def some_answers(seed, n=2_000, factor=1):
    """Confidences s, even from ½ to 1; each answer is wrong with probability factor (1 − s)."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.5, 1, n)
    errors = (rng.random(n) < factor * (1 - s)).astype(int)
    return Answers(logit(s), errors, np.sort(rng.normal(size=(n, 3)), axis=1))


def test_the_test_answers_choose_nothing():
    validation, test, other = some_answers(0), some_answers(1), some_answers(2, factor=2)
    here, there, elsewhere = (
        list(study.costs(*pair))
        for pair in ((validation, test), (validation, other), (other, test))
    )
    assert [c["threshold"] for c in here] == [c["threshold"] for c in there]
    assert [c["validation"] for c in here] == [c["validation"] for c in there]
    assert all(a["test"] != b["test"] for a, b in zip(here, there, strict=True))
    for a, b in zip(here, elsewhere, strict=True):
        assert (a["threshold"] == b["threshold"]) == (a["way"] == "1 − λ")
    swept = [c for c in here if c["way"] == "swept"]
    for c in swept:
        scores, errors, _ = validation
        assert c["threshold"] == approx(expit(best_threshold(scores, errors, c["price"])[0]))
    found = quality(validation, test, study.REJECTED, study.RECALLS)
    assert found["rejected"] == approx(
        (test.scores <= lowest_threshold(validation.scores, validation.errors, 0.01)).mean()
    )


def test_the_learnt_threshold_is_near_the_swept_one_and_chows():
    """The confidence is calibrated: all four cost alike."""
    costs = list(study.costs(some_answers(0), some_answers(1)))
    for plain, calibrated, swept, learnt in by_price(costs):
        if plain["price"] > 0.05:  # below, τ is among the last few answers
            assert calibrated["threshold"] == approx(plain["threshold"], abs=0.03)
            assert learnt["threshold"] == approx(plain["threshold"], abs=0.05)
            assert learnt["validation"] == approx(swept["validation"], rel=0.05)
            assert learnt["test"] == approx(plain["test"], rel=0.05)
            assert calibrated["test"] == approx(plain["test"], rel=0.05)


def test_calibration_undoes_a_stretch_and_a_shift(monkeypatch):
    """By its own account, too: where the likelihood is greatest, its slopes are zero."""
    monkeypatch.setattr(study, "learn_gate", lambda *_: SoftGate(0, 1))  # slow, of so many
    some = some_answers(0, 20_000)
    bent = some._replace(scores=2 * some.scores + 1)
    a, b = calibration(bent.scores, bent.errors)
    assert (a, b) == approx((0.5, -0.5), abs=0.1)
    surplus = 1 - bent.errors - expit(a * bent.scores + b)
    assert [surplus.mean(), (surplus * bent.scores).mean()] == approx([0, 0], abs=1e-4)
    straight, plain, calibrated = (
        [c for c in study.costs(answers, answers) if c["way"] == way]
        for answers, way in ((some, WAYS[1]), (bent, WAYS[0]), (bent, WAYS[1]))
    )
    for one, other, two in zip(straight, plain, calibrated, strict=True):
        assert one["test"] == approx(two["test"], rel=1e-2)
        if one["price"] < 0.3:  # the bent confidence is too sure
            assert two["test"] < 0.99 * other["test"] and two["rejected"] > other["rejected"]


def test_the_selector_learns_from_the_validation_answers_alone():
    """Where the outputs know what the confidence does not, it finds it."""
    rng = np.random.default_rng(0)

    def known():
        errors = rng.integers(0, 2, 500)
        outputs = rng.normal(size=(500, 3))
        outputs[:, 1] += 5 * errors
        return Answers(rng.normal(size=500), errors, outputs)

    validation, test = known(), known()
    scores = selector(validation, test)
    assert auroc(test.scores, test.errors) < 0.6 < 0.98 < auroc(scores, test.errors)
    assert np.array_equal(scores, selector(validation, test._replace(errors=None)))
    wrong = validation._replace(errors=1 - validation.errors)
    assert auroc(selector(wrong, test), test.errors) < 0.02


# --- what is counted ---


def test_the_answers_of_either_kind_of_network():
    data, some = load("digits"), torch.tensor([3, 1_000, 40, 7, 99])
    labels = data.labels[some].numpy()
    inputs = data.batch(some, torch.float64)[0]
    for loss in ("cross_entropy", "squared_error"):
        torch.manual_seed(0)
        model = MLP((784, 5, 10), "sigmoid", loss)
        found = answers_of(model, data, some)
        outputs = model(inputs).detach().numpy()
        sure = confidence(outputs) if loss == "cross_entropy" else outputs.max(axis=1)
        assert expit(found.scores) == approx(sure, rel=1e-12)
        assert found.errors.tolist() == (outputs.argmax(axis=1) != labels).tolist()
        plain = outputs if loss == "cross_entropy" else logit(outputs)
        assert found.outputs == approx(np.sort(plain, axis=1))


def test_sure_answers_have_finite_scores():
    torch.manual_seed(0)
    data, model = load("digits"), MLP((784, 10))
    with torch.no_grad():
        model.layers[0].weight.mul_(1_000)
    scores = answers_of(model, data, data.test).scores
    assert np.isfinite(scores).all() and scores.max() > 100  # there 1 − p is below 1e−43


def test_sigmoids_at_their_ends_have_finite_scores():
    torch.manual_seed(0)
    data, model = load("digits"), MLP((784, 10), "sigmoid", "squared_error")
    with torch.no_grad():
        model.layers[0].weight.mul_(10_000)
    sigmoids = model.double()(data.batch(data.test, torch.float64)[0])
    assert sigmoids.min() == 0 and sigmoids.max() == 1
    found = answers_of(model, data, data.test)
    assert np.isfinite(found.scores).all() and np.isfinite(found.outputs).all()
    assert found.outputs.max() == -found.outputs.min() == logit(1 - 2**-53)


def test_the_lowest_threshold_and_the_cost_by_hand():
    scores, errors = np.array([0.1, 0.4, 0.6, 0.9]), np.array([1, 0, 1, 0])
    assert lowest_threshold(scores, errors, 0.5) == -np.inf
    assert lowest_threshold(scores, errors, 0.4) == 0.1  # one of three
    assert lowest_threshold(scores, errors, 0.3) == 0.6
    assert lowest_threshold(scores, 1 - errors, 0.3) == np.inf  # the best is wrong
    some = Answers(scores, errors, scores[:, None])
    assert cost(some, 0.4, 0.3) == approx((2 * 0.3 + 1) / 4)
    assert cost(some, np.inf, 0.3) == approx(0.3)


def test_what_is_told_of_the_confidence_by_hand():
    scores = np.arange(200.0)
    errors = np.zeros(200, int)
    errors[[0, 1, 2, 40]] = 1  # of the least sure, three of the first three
    some = Answers(scores, errors, np.column_stack([scores, scores]))
    found = quality(some, some, study.REJECTED, study.RECALLS)
    assert found["error"] == 0.02 and found["auroc"] == approx(1 - 37 / (4 * 196))
    assert found["rejected"] == found["rejected_in_hindsight"] == approx(3 / 200)
    assert found["rest"] == 1 / 197 < 0.01 < 2 / 198
    assert found["risk_curve"][:4] == [4 / 200, 3 / 199, 2 / 198, 1 / 196]  # 0, ½, 1 and 2 %
    assert found["precision_curve"] == approx(8 * [1] + 3 * [4 / 41])  # to ¾, and all
    assert found["average_precision"] == approx((3 + 4 / 41) / 4)


def test_no_threshold_for_1_percent_leaves_no_rest():
    some = some_answers(0, 50)
    sure = some.scores.argmax()
    wrong = some._replace(errors=np.where(np.arange(50) == sure, 1, some.errors))
    found = quality(wrong, some, study.REJECTED, study.RECALLS)
    assert found["rejected"] == 1 and found["rest"] is None
    assert found["validation_error"] == wrong.errors.mean() != some.errors.mean() == found["error"]


def test_broken_promises_are_counted():
    """By another road: one draw after another, the risk by the mean of what is accepted."""
    validation, test = some_answers(0, 1_000), some_answers(1, 2_000)
    risk, draws = 0.15, 30
    found = list(study.promises(validation, test, risk, draws, seed=7))
    scores, errors, _ = test
    for row in found:
        delta = row["delta"]

        def choose(s, e, delta=delta):
            if delta is None:
                return lowest_threshold(s, e, risk)
            return promised_threshold(s, e, risk, delta)

        rng = np.random.default_rng(7)
        broken = rejected = 0
        for _ in range(draws):
            some = rng.integers(2_000, size=1_000)
            threshold = choose(scores[some], errors[some])
            accepted = errors[scores > threshold]
            broken += len(accepted) > 0 and accepted.mean() > risk
            rejected += 1 - len(accepted) / 2_000
        assert (row["risk"], row["draws"], row["broken"]) == (risk, draws, broken)
        assert row["rejected_in_draws"] == approx(rejected / draws)
        kept, rest = at_threshold(scores, errors, choose(validation.scores, validation.errors))
        assert row["rejected"] == 1 - kept and row["rest"] == (rest if kept else None)
    naive, bounded = found
    assert naive["broken"] > 8 > 2 >= bounded["broken"]
    assert naive["rejected_in_draws"] < bounded["rejected_in_draws"]


def test_nothing_accepted_breaks_no_promise():
    wrong = some_answers(0, 50)._replace(errors=np.ones(50, int))
    for row in study.promises(wrong, wrong, 0.1, 5, seed=0):
        assert row["rejected"] == row["rejected_in_draws"] == 1
        assert row["rest"] is None and row["broken"] == 0


# --- the claims, on rows made up for them ---


def made(learnt=(1, 1), plain=(1, 1), calibrated=(1, 1), broken=(500, 0), name="MLP", **values):
    """Two seeds. The swept τ costs 100 times the price plus the seed; the others, by seed, so many
    times more. Broken: of 1,000 draws of a seed without a bound, and with δ = 5 %."""
    rows = []
    for seed in (0, 1):
        rows.append({"network": name, "seed": seed, "costs": [], "promises": []})
        for price in PRICES:
            ratios = (plain[seed], calibrated[seed], 1, learnt[seed])
            for way, ratio in zip(WAYS, ratios, strict=True):
                costs = dict.fromkeys(("validation", "test"), ratio * (100 * price + seed))
                rows[-1]["costs"].append({"price": price, "way": way, **costs})
        for delta, number in zip((None, 0.05), broken, strict=True):
            rows[-1]["promises"].append({"delta": delta, "draws": 1_000, "broken": number})
        told = {"rejected": 0.05, "rest": 0.01, "rejected_in_hindsight": 0.04, "auroc": 0.98,
                "average_precision": 0.5, "aurc": 0.001, "selector_aurc": 0.001}  # fmt: skip
        rows[-1] |= told | {what: both[seed] for what, both in values.items()}
    return Rows(rows)


def claimed(rows, beginning):
    (claim,) = (c for c in study.claims(rows) if c.claim.startswith(beginning))
    return claim


def test_the_claims_and_what_is_published():
    claims = study.claims(Rows(row for name in ("happy", "MLP", "CNN") for row in made(name=name)))
    of = {
        name: [claim for claim in claims if claim.claim.startswith(f"{name}: ")]
        for name in ("happy", "MLP", "CNN")
    }
    each = [None, None, None, None, "at most 5", None]
    for name, own in (("happy", ["about 9"]), ("MLP", [97.83, 43.88]), ("CNN", [])):
        assert [claim.published for claim in of[name]] == [*each, *own, "no gain"]
    assert len(claims) == sum(map(len, of.values())) == 24
    for claim in of["MLP"][:4]:
        assert "mean over λ = 0.01, 0.03, 0.1, 0.3: " in claim.claim
    assert "a risk of 2 %" in of["happy"][4].claim and "a risk of 0.5 %" in of["CNN"][5].claim
    assert "error of the rest 1.00 %; in hindsight 4.00 %" in of["happy"][6].claim


def test_a_seed_that_rejects_all_has_no_rest_to_count():
    for rest, told in (((0.02, None), "2.00"), ((None, None), "–")):
        claim = claimed(made(name="happy", rest=rest), "happy: rejected")
        assert f"error of the rest {told} %" in claim.claim


@pytest.mark.parametrize(
    "learnt, measured, verdict",
    [
        ((1.02, 1.021), 2.05, "reproduced"),
        ((1.02, 1.04), 3, "undecided"),
        ((1.08, 1.081), 8.05, "not reproduced"),
    ],
)
def test_what_the_learnt_threshold_costs(learnt, measured, verdict):
    for split in ("validation", "test"):
        claim = claimed(made(learnt), f"MLP: the learnt τ costs, on the {split} images, more than "
                        "the swept")  # fmt: skip
        assert claim.measured == approx(measured) and claim.verdict == verdict
        half = t.ppf(0.975, 1) * 100 * abs(learnt[1] - learnt[0]) / 2
        assert claim.interval == approx((measured - half, measured + half), rel=1e-4)


@pytest.mark.parametrize("way, told", [("plain", ","), ("calibrated", " after calibration,")])
@pytest.mark.parametrize(
    "ratios, verdict",
    [
        ((1.25, 1.26), "reproduced"),
        ((0.9, 1.2), "undecided"),
        ((0.8, 0.81), "not reproduced"),
    ],
)
def test_learnt_against_chows(way, told, ratios, verdict):
    rows = made(**{way: ratios})
    claim = claimed(rows, f"MLP: the learnt τ costs, on the test images, more than 1 − λ{told}")
    assert claim.measured == approx(50 / ratios[0] + 50 / ratios[1] - 100)
    assert claim.verdict == verdict


def test_the_excess_is_the_mean_over_prices():
    rows = made()
    for row in rows:
        for one in row["costs"]:
            if one["way"] == "learnt":
                one["test"] *= 1 + one["price"]
    assert study.excess(rows, "learnt") == approx(2 * [100 * sum(PRICES) / 4])
    assert study.excess(rows, "learnt", prices=[0.3]) == approx([30, 30])
    assert study.excess(rows, "learnt", "validation") == approx([0, 0])


@pytest.mark.parametrize(
    "broken, verdicts",
    [
        ((500, 30), ("reproduced", "reproduced")),
        ((400, 50), ("undecided", "undecided")),
        ((700, 80), ("not reproduced", "not reproduced")),
        ((200, 0), ("not reproduced", "reproduced")),
    ],
)
def test_broken_promises_against_delta_and_a_half(broken, verdicts):
    rows = made(broken=broken)
    of = [
        claimed(rows, beginning)
        for beginning in (
            "MLP: draws that end above a risk of 1 % without a bound, in %: from 40 to 60",
            "MLP: draws that break the promise of a risk of 1 %, in %: at most δ = 5",
        )
    ]
    assert tuple(claim.verdict for claim in of) == verdicts
    k, n = 2 * broken[1], 2_000
    low, high = (beta.ppf(0.025, k, n - k + 1) if k else 0), beta.ppf(0.975, k + 1, n - k)
    assert of[1].measured == approx(100 * k / n)
    assert of[1].interval == approx((100 * low, 100 * high))


@pytest.mark.parametrize(
    "beginning, good, bad",
    [
        ("happy: rejected", {"rejected": (0.03, 0.031)}, {"rejected": (0.17, 0.171)}),
        ("MLP: AUROC", {"auroc": (0.978, 0.9784)}, {"auroc": (0.98, 0.9801)}),
        (
            "MLP: average precision",
            {"average_precision": (0.43, 0.44)},
            {"average_precision": (0.5, 0.501)},  # better is as far from theirs as worse
        ),
        (
            "MLP: AURC of the learnt selector",
            {"selector_aurc": (0.001, 0.002), "aurc": (0.0008, 0.00181)},
            {"selector_aurc": (0.0008, 0.00181), "aurc": (0.001, 0.002)},
        ),
    ],
)
def test_the_other_bars(beginning, good, bad):
    name, _, _ = beginning.partition(":")
    assert claimed(made(name=name, **good), beginning).verdict == "reproduced"
    assert claimed(made(name=name, **bad), beginning).verdict == "not reproduced"
    if "aurc" in good:  # paired: the seeds differ by five times as much as the scores
        assert claimed(made(**good), beginning).measured == approx(0.195)
