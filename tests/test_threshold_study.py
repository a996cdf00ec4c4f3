"""`experiments/threshold.py`: run with --smoke; what chooses and what is told; claims; counts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.special import expit, logit
from scipy.stats import beta, t
from test_studies import smoke

from nn_backprop.data import load
from nn_backprop.models import MLP
from nn_backprop.rejection import (
    at_threshold,
    auroc,
    best_threshold,
    confidence,
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


@pytest.mark.slow
def test_the_study(tmp_path):
    results = smoke("threshold", tmp_path)
    rows = results["rows"]
    assert [(row["network"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("CNN", "MLP", "happy") for seed in (0, 1)
    ]
    for row in rows:
        assert row["dataset"] == "digits" and row["parameters"] == PARAMETERS[row["network"]]
        assert 0 < row["error"] < 0.6  # chance is .9
        assert 0.7 < row["auroc"] < 1 and 0.7 < row["selector_auroc"] < 1
        assert 0 < row["aurc"] < row["error"] < row["average_precision"] < 1
        assert 0 < row["rejected"] < 1 and 0 < row["rejected_in_hindsight"] < 1
        assert row["risk_curve"][0] == row["error"] > row["risk_curve"][-1]  # none, a fifth
        assert 1 >= max(row["precision_curve"]) >= row["precision_curve"][-1] >= row["error"]
        assert [(c["price"], c["way"]) for c in row["costs"]] == [
            (price, way) for price in PRICES for way in ("= 1 − λ", "swept", "learnt")
        ]
        for plain, swept, learnt in zip(*(row["costs"][k::3] for k in range(3)), strict=True):
            assert plain["threshold"] == approx(1 - plain["price"])
            assert swept["validation"] <= min(plain["validation"], learnt["validation"])
            for cost in (plain, swept, learnt):
                assert 0 < cost["least"] <= cost["test"] and 0 <= cost["rejected"] <= 1
        naive, loose, strict = row["promises"]
        assert [p["delta"] for p in row["promises"]] == [None, 0.05, 0.001]
        assert naive["risk"] == {"happy": 0.02, "MLP": 0.01, "CNN": 0.005}[row["network"]]
        for what in ("rejected", "rejected_in_draws"):
            assert 0 <= naive[what] <= loose[what] <= strict[what] <= 1
        assert strict["broken"] <= loose["broken"] <= naive["broken"] <= naive["draws"] == 20
    claims = results["claims"]
    assert len(claims) == 3 * 9 + 1 and all("not MNIST" in claim["claim"] for claim in claims)
    (claim,) = (c for c in claims if c["claim"].startswith("MLP: AUROC"))
    by_hand = [100 * row["auroc"] for row in rows if row["network"] == "MLP"]
    assert claim["measured"] == approx(sum(by_hand) / 2) and claim["published"] == 97.83


# --- what chooses, and what is told ---


def test_no_split_has_an_image_of_another(monkeypatch):
    """What trains is data.train; what answers, in this order, validation and test."""
    trained, asked = [], []
    monkeypatch.setattr(study, "fit", lambda *args, **_: trained.append(args[4]))
    answers = study.answers

    def watched(model, data, indices):
        asked.append(indices)
        return answers(model, data, indices)

    chosen = []
    monkeypatch.setattr(study, "answers", watched)
    for name in ("quality", "costs", "promises"):
        monkeypatch.setattr(study, name, lambda v, t, *_: chosen.append((v, t)) or {})
    study.train(study.Job("happy", 0, study.Options(smoke=True)))
    (data,) = trained
    assert torch.equal(asked[0], data.validation) and torch.equal(asked[1], data.test)
    assert [(len(v.scores), len(t.scores)) for v, t in chosen] == 3 * [(300, 300)]
    assert not np.array_equal(chosen[0][0].scores, chosen[0][1].scores)
    parts = [set(part.tolist()) for part in (data.train, *asked)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1_797


def some_answers(seed, n=2_000, error=0.5):
    """Confidences, even from ½ to 1, of which 1 − s are wrong, twice as often if error is 1."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.5, 1, n)
    errors = (rng.random(n) < 2 * error * (1 - s)).astype(int)
    return study.Answers(logit(s), errors, np.sort(rng.normal(size=(n, 3)), axis=1))


def test_the_test_answers_choose_nothing():
    validation, test, other = some_answers(0), some_answers(1), some_answers(2, error=1)
    here, there, elsewhere = (
        list(study.costs(*pair))
        for pair in ((validation, test), (validation, other), (other, test))
    )
    assert [c["threshold"] for c in here] == [c["threshold"] for c in there]
    assert [c["validation"] for c in here] == [c["validation"] for c in there]
    assert all(a["test"] != b["test"] for a, b in zip(here, there, strict=True))
    for way, same in (("= 1 − λ", True), ("swept", False), ("learnt", False)):
        for a, b in zip(here, elsewhere, strict=True):
            assert a["way"] != way or (a["threshold"] == b["threshold"]) == same
    swept = [c for c in here if c["way"] == "swept"]
    for c in swept:
        scores, errors, _ = validation
        assert c["threshold"] == approx(expit(best_threshold(scores, errors, c["price"])[0]))
    found = study.quality(validation, test)
    assert found["rejected"] == approx(
        (test.scores <= study.lowest(validation.scores, validation.errors, 0.01)).mean()
    )


def test_the_learnt_threshold_is_near_the_swept_one_and_chows():
    """The confidence is calibrated: all three cost alike."""
    for plain, swept, learnt in zip(
        *(list(study.costs(some_answers(0), some_answers(1)))[k::3] for k in range(3)), strict=True
    ):
        if plain["price"] > 0.05:  # below, τ is among the last few answers
            assert learnt["threshold"] == approx(plain["threshold"], abs=0.05)
            assert learnt["validation"] == approx(swept["validation"], rel=0.05)
            assert learnt["test"] == approx(plain["test"], rel=0.05)


def test_the_selector_learns_from_the_validation_answers_alone():
    """Where the outputs know what the confidence does not, it finds it."""
    rng = np.random.default_rng(0)

    def known():
        errors = rng.integers(0, 2, 500)
        outputs = rng.normal(size=(500, 3))
        outputs[:, 1] += 5 * errors
        return study.Answers(rng.normal(size=500), errors, outputs)

    validation, test = known(), known()
    scores = study.selector(validation, test)
    assert auroc(test.scores, test.errors) < 0.6 < 0.98 < auroc(scores, test.errors)
    assert np.array_equal(scores, study.selector(validation, test._replace(errors=None)))
    wrong = validation._replace(errors=1 - validation.errors)
    assert auroc(study.selector(wrong, test), test.errors) < 0.02


# --- what is counted ---


def test_the_answers_of_either_kind_of_network():
    data, some = load("digits"), torch.tensor([3, 1_000, 40, 7, 99])
    labels = data.labels[some].numpy()
    inputs = data.batch(some, torch.float64)[0]
    for loss in ("cross_entropy", "squared_error"):
        torch.manual_seed(0)
        model = MLP((784, 5, 10), "sigmoid", loss)
        found = study.answers(model, data, some)
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
    scores = study.answers(model, data, data.test).scores
    assert np.isfinite(scores).all() and scores.max() > 100  # there 1 − p is below 1e−43


def test_the_lowest_threshold_and_the_cost_by_hand():
    scores, errors = np.array([0.1, 0.4, 0.6, 0.9]), np.array([1, 0, 1, 0])
    assert study.lowest(scores, errors, 0.5) == -np.inf
    assert study.lowest(scores, errors, 0.4) == 0.1  # one of three
    assert study.lowest(scores, errors, 0.3) == 0.6
    assert study.lowest(scores, 1 - errors, 0.3) == np.inf  # the best is wrong
    some = study.Answers(scores, errors, scores[:, None])
    assert study.cost(some, 0.4, 0.3) == approx((2 * 0.3 + 1) / 4)
    assert study.cost(some, np.inf, 0.3) == approx(0.3)


def test_what_is_told_of_the_confidence_by_hand():
    scores = np.arange(200.0)
    errors = np.zeros(200, int)
    errors[[0, 1, 2, 40]] = 1  # of the least sure, three of the first three
    some = study.Answers(scores, errors, np.column_stack([scores, scores]))
    found = study.quality(some, some)
    assert found["error"] == 0.02 and found["auroc"] == approx(1 - 37 / (4 * 196))
    assert found["rejected"] == found["rejected_in_hindsight"] == approx(3 / 200)
    assert found["rest"] == 1 / 197 < 0.01 < 2 / 198
    assert found["risk_curve"][:4] == [4 / 200, 3 / 199, 2 / 198, 1 / 196]  # 0, ½, 1 and 2 %
    assert found["precision_curve"] == approx(8 * [1] + 3 * [4 / 41])  # to ¾, and all
    assert found["average_precision"] == approx((3 + 4 / 41) / 4)


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
                return study.lowest(s, e, risk)
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
    naive, loose, strict = found
    assert naive["broken"] > 8 > 2 >= loose["broken"] >= strict["broken"]
    assert naive["rejected_in_draws"] < loose["rejected_in_draws"] < strict["rejected_in_draws"]


def test_nothing_accepted_breaks_no_promise():
    wrong = some_answers(0, 50)._replace(errors=np.ones(50, int))
    for row in study.promises(wrong, wrong, 0.1, 5, seed=0):
        assert row["rejected"] == row["rejected_in_draws"] == 1
        assert row["rest"] is None and row["broken"] == 0


# --- the claims, on rows made up for them ---


def made(learnt=(1, 1), plain=(1, 1), broken=(0, 0, 0), name="MLP", **values):
    """Two seeds. The swept τ costs 100 times the price plus the seed; the others, by seed, so many
    times more. Broken: of 1,000 draws of a seed without a bound, with δ = 5 and with 0.1 %."""
    rows = []
    for seed in (0, 1):
        rows.append({"network": name, "seed": seed, "costs": [], "promises": []})
        for price in PRICES:
            for way, ratio in (("= 1 − λ", plain[seed]), ("swept", 1), ("learnt", learnt[seed])):
                costs = dict.fromkeys(("validation", "test"), ratio * (100 * price + seed))
                rows[-1]["costs"].append({"price": price, "way": way, **costs})
        for delta, number in zip((None, 0.05, 0.001), broken, strict=True):
            rows[-1]["promises"].append({"delta": delta, "draws": 1_000, "broken": number})
        told = {"rejected": 0.05, "rest": 0.01, "auroc": 0.98, "average_precision": 0.5,
                "aurc": 0.001, "selector_aurc": 0.001}  # fmt: skip
        rows[-1] |= told | {what: both[seed] for what, both in values.items()}
    return rows


def claimed(rows, beginning, name="MLP"):
    (claim,) = (c for c in study._claims({name: rows}) if c.claim.startswith(beginning))
    return claim


def test_the_claims_and_what_is_published():
    claims = study._claims({name: made(name=name) for name in ("happy", "MLP", "CNN")})
    assert len(claims) == 28
    of_mlp = [claim for claim in claims if claim.claim.startswith("MLP: ")]
    assert [claim.published for claim in of_mlp] == [
        None, None, None, "at most 5", "at most 0.1", None, "about 9", 97.83, 43.88, "no gain"
    ]  # fmt: skip
    assert sum("average precision" in claim.claim for claim in claims) == 1
    assert "a risk of 2 %" in claims[3].claim and "a risk of 0.5 %" in claims[-5].claim
    assert "error of the rest 1.00 %" in claims[6].claim


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


@pytest.mark.parametrize(
    "plain, verdict", [((1.25, 1.26), "reproduced"), ((0.8, 0.81), "not reproduced")]
)
def test_learnt_against_chows(plain, verdict):
    claim = claimed(made(plain=plain), "MLP: the learnt τ costs, on the test images, more than 1")
    assert claim.measured == approx(50 / plain[0] + 50 / plain[1] - 100)
    assert claim.verdict == verdict


def test_the_excess_is_the_mean_over_prices():
    rows = made()
    for row in rows:
        for cost in row["costs"]:
            if cost["way"] == "learnt":
                cost["test"] *= 1 + cost["price"]
    assert study._excess(rows, "learnt", "swept") == approx(2 * [100 * sum(PRICES) / 4])
    assert study._excess(rows, "learnt", "swept", "validation") == approx([0, 0])


@pytest.mark.parametrize(
    "broken, verdicts",
    [
        ((500, 30, 0), ("reproduced", "undecided", "reproduced")),
        ((500, 80, 9), ("not reproduced", "not reproduced", "reproduced")),
        ((20, 50, 1), ("undecided", "undecided", "not reproduced")),
    ],
)
def test_broken_promises_against_delta(broken, verdicts):
    rows = made(broken=broken)
    of = [
        claimed(rows, beginning)
        for beginning in (
            "MLP: draws that break the promise of a risk of 1 %, in %: at most δ = 5",
            "MLP: draws that break the promise of a risk of 1 %, in %: at most δ = 0.1",
            "MLP: draws that end above a risk of 1 % without a bound",
        )
    ]
    assert tuple(claim.verdict for claim in of) == verdicts
    k, n = 2 * broken[1], 2_000
    low, high = beta.ppf(0.025, k, n - k + 1), beta.ppf(0.975, k + 1, n - k)
    assert of[0].measured == approx(100 * k / n)
    assert of[0].interval == approx((100 * low, 100 * high))


@pytest.mark.parametrize(
    "beginning, good, bad",
    [
        ("MLP: rejected", {"rejected": (0.03, 0.031)}, {"rejected": (0.17, 0.171)}),
        ("MLP: AUROC", {"auroc": (0.98, 0.9801)}, {"auroc": (0.97, 0.9701)}),
        (
            "MLP: average precision",
            {"average_precision": (0.5, 0.501)},
            {"average_precision": (0.3, 0.301)},
        ),
        (
            "MLP: AURC of the learnt selector",
            {"selector_aurc": (0.0008, 0.00181), "aurc": (0.001, 0.002)},
            {"selector_aurc": (0.001, 0.002), "aurc": (0.0008, 0.00181)},
        ),
    ],
)
def test_the_other_bars(beginning, good, bad):
    assert claimed(made(**good), beginning).verdict == "reproduced"
    assert claimed(made(**bad), beginning).verdict == "not reproduced"
    if "aurc" in good:  # paired: the seeds differ by five times as much as the scores
        assert claimed(made(**good), beginning).measured == approx(-0.195)
