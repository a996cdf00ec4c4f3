"""`experiments/threshold.py`: run with --smoke; what chooses and what is told; counts; claims."""

import numpy as np
import pytest
import torch
from properties import about
from pytest import approx
from scipy.special import expit, logit
from test_studies import smoke_rows

import threshold as study
from nn_backprop.data import load
from nn_backprop.layers import SoftGate
from nn_backprop.models import MLP
from nn_backprop.studies import Rows, Trained, answers, rejection
from nn_backprop.studies.answers import WAYS, Answers, answers_of, costs, promises, quality

PRICES = (0.01, 0.03, 0.1, 0.3)


def by_way(found):
    """Of each way the costs at every price."""
    return {way: [c for c in found if c["way"] == way] for way in WAYS}


@pytest.mark.slow
def test_the_study(tmp_path):
    rows, claims = smoke_rows("threshold", tmp_path)
    networks = ("CNN", "MLP", "happy")
    assert [*rows.by("network", "seed")] == [(name, seed) for name in networks for seed in (0, 1)]
    for row in rows:
        assert 0 < row["aurc"] < row["error"] < 0.6 < 0.7 < row["auroc"] < 1  # chance is .9
        assert 0 < row["selector_aurc"] < row["error"] < row["average_precision"] < 1
        assert row["risk_curve"][0] == row["error"] > row["risk_curve"][-1]  # none, a fifth
        assert 1 >= max(row["precision_curve"]) >= row["precision_curve"][-1] >= row["error"]
        for of in by_way(row["costs"]).values():
            assert [c["price"] for c in of] == [*PRICES]
            for c, swept in zip(of, by_way(row["costs"])["swept"], strict=True):
                assert swept["validation"] <= c["validation"] and 0 <= c["rejected"] <= 1
                assert 0 < c["least"] <= c["test"] + 1e-12
        naive, bounded = row["promises"]
        assert (naive["delta"], bounded["delta"]) == (None, 0.05)
        assert naive["risk"] == {"happy": 0.02, "MLP": 0.01, "CNN": 0.005}[row["network"]]
        for what in ("rejected", "rejected_in_draws"):
            assert 0 <= naive[what] <= bounded[what] <= 1
        assert bounded["broken"] <= naive["broken"] <= naive["draws"] == 20
    assert len(claims) == 3 * 7 + 3


# --- what chooses, and what is told ---


def test_no_split_has_an_image_of_another(monkeypatch):
    """What trains is data.train; what answers, in this order, validation and test."""
    trained, asked, given, chosen = [], [], [], []

    def train(model, data, **how):
        trained.append(data)
        return Trained(None, 0.0)

    def asks(model, data, indices):
        asked.append(indices)
        given.append(answers_of(model, data, indices))
        return given[-1]

    monkeypatch.setattr(study.studies, "train_network", train)
    monkeypatch.setattr(study, "answers_of", asks)
    for name in ("quality", "costs", "promises"):
        monkeypatch.setattr(study, name, lambda v, t, *_: chosen.append((v, t)) or {})
    study.train(study.Job("happy", 0, study.Options(smoke=True)))
    (data,) = trained
    assert torch.equal(asked[0], data.validation) and torch.equal(asked[1], data.test)
    assert all(v is given[0] and t is given[1] for v, t in chosen) and len(chosen) == 3
    parts = [set(part.tolist()) for part in (data.train, *asked)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1_797


def some_answers(seed, n=2_000, factor=1):
    """Confidences s, even from ½ to 1; each answer is wrong with probability factor (1 − s)."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.5, 1, n)
    errors = (rng.random(n) < factor * (1 - s)).astype(int)
    return Answers(logit(s), errors, np.sort(rng.normal(size=(n, 3)), axis=1))


def test_the_test_answers_choose_nothing_and_calibrated_confidences_cost_alike():
    prices = (0.1,)  # at a lower price, τ is among the last few answers
    validation, test, other = some_answers(0), some_answers(1), some_answers(2, factor=2)
    here, there = ([*costs(validation, of, prices, 0.25)] for of in (test, other))
    for a, b in zip(here, there, strict=True):
        assert a["threshold"] == b["threshold"] and a["validation"] == b["validation"]
        assert a["test"] != b["test"]
    scores, errors, _ = validation
    for plain, calibrated, swept, learnt in zip(*by_way(here).values(), strict=True):
        price, (best, _) = plain["price"], rejection.best_threshold(scores, errors, plain["price"])
        assert plain["threshold"] == approx(1 - price)
        assert swept["threshold"] == approx(expit(best))
        assert calibrated["threshold"] == approx(1 - price, abs=0.03)
        assert learnt["threshold"] == approx(1 - price, abs=0.05)
        assert learnt["validation"] == approx(swept["validation"], rel=0.05)
        for one in (calibrated, learnt):
            assert one["test"] == approx(plain["test"], rel=0.05)
    found = quality(validation, test, study.REJECTED, study.RECALLS)
    rejected = test.scores <= rejection.lowest_threshold(scores, errors, 0.01)
    assert found["rejected"] == approx(rejected.mean())


def test_calibration_undoes_a_stretch_and_a_shift(monkeypatch):
    """By its own account, too: where the likelihood is greatest, its slopes are zero."""
    monkeypatch.setattr(answers, "learn_gate", lambda *_: SoftGate(0, 1))  # slow, of so many
    some = some_answers(0, 20_000)
    bent = some._replace(scores=2 * some.scores + 1)
    a, b = rejection.calibration(bent.scores, bent.errors)
    assert (a, b) == approx((0.5, -0.5), abs=0.1)
    surplus = 1 - bent.errors - expit(a * bent.scores + b)
    assert [surplus.mean(), (surplus * bent.scores).mean()] == approx([0, 0], abs=1e-4)
    (_, straight, *_), (plain, calibrated, *_) = (
        by_way([*costs(given, given, PRICES, 0.25)]).values() for given in (some, bent)
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
    blind = test._replace(errors=None)
    wrong = validation._replace(errors=1 - validation.errors)
    given = (test.scores, answers.selector(validation, blind), answers.selector(wrong, blind))
    plain, right, reversed_ = (rejection.auroc(scores, test.errors) for scores in given)
    assert reversed_ < 0.02 < plain < 0.6 < 0.98 < right


# --- what is counted ---


def test_the_answers_of_either_kind_of_network_and_scores_that_are_finite():
    data, some = load("digits"), torch.tensor([3, 1_000, 40, 7, 99])
    labels = data.labels[some].numpy()
    for loss in ("cross_entropy", "squared_error"):
        torch.manual_seed(0)
        model = MLP((784, 5, 10), "sigmoid", loss)
        found = answers_of(model, data, some)
        outputs = model(data.batch(some, torch.float64)[0]).detach().numpy()
        sure = rejection.confidence(outputs) if loss == "cross_entropy" else outputs.max(axis=1)
        assert expit(found.scores) == approx(sure, rel=1e-12), loss
        assert found.errors.tolist() == (outputs.argmax(axis=1) != labels).tolist(), loss
        plain = outputs if loss == "cross_entropy" else logit(outputs)
        assert found.outputs == approx(np.sort(plain, axis=1)), loss

        torch.manual_seed(0)
        model = MLP((784, 10), "sigmoid", loss)
        with torch.no_grad():  # 1 − p is below 1e−43, or sigmoids are 0 and 1
            model.layers[0].weight.mul_(1_000 if loss == "cross_entropy" else 10_000)
        found = answers_of(model, data, data.test)
        assert np.isfinite(found.scores).all() and np.isfinite(found.outputs).all(), loss
        if loss == "cross_entropy":
            assert found.scores.max() > 100
        else:
            assert found.outputs.max() == -found.outputs.min() == logit(1 - 2**-53)


def test_what_is_told_of_the_confidence_by_hand():
    scores, errors = np.array([0.1, 0.4, 0.6, 0.9]), np.array([1, 0, 1, 0])
    # At 0.4, one wrong of three; of the reverse, the best is wrong.
    for risk, threshold in ((0.5, -np.inf), (0.4, 0.1), (0.3, 0.6)):
        assert rejection.lowest_threshold(scores, errors, risk) == threshold
    assert rejection.lowest_threshold(scores, 1 - errors, 0.3) == np.inf
    some = Answers(scores, errors, scores[:, None])
    assert answers.cost(some, 0.4, 0.3) == approx((2 * 0.3 + 1) / 4)
    assert answers.cost(some, np.inf, 0.3) == approx(0.3)

    scores, errors = np.arange(200.0), np.zeros(200, int)
    errors[[0, 1, 2, 40]] = 1  # of the least sure, three of the first three
    some = Answers(scores, errors, np.column_stack([scores, scores]))
    found = quality(some, some, study.REJECTED, study.RECALLS)
    assert found["error"] == 0.02 and found["auroc"] == approx(1 - 37 / (4 * 196))
    assert found["rejected"] == found["rejected_in_hindsight"] == approx(3 / 200)
    assert found["rest"] == 1 / 197 < 0.01 < 2 / 198
    assert found["risk_curve"][:4] == [4 / 200, 3 / 199, 2 / 198, 1 / 196]  # 0, ½, 1 and 2 %
    assert found["precision_curve"] == approx(8 * [1] + 3 * [4 / 41])  # to ¾, and all
    assert found["average_precision"] == approx((3 + 4 / 41) / 4)
    wrong = some._replace(errors=1 - errors)  # the surest, too: no rest for 1 %
    found = quality(wrong, some, study.REJECTED, study.RECALLS)
    assert found["rejected"] == 1 and found["rest"] is None
    assert (found["validation_error"], found["error"]) == (0.98, 0.02)


def test_broken_promises_are_counted():
    """By another road: one draw after another, the risk by the mean of what is accepted."""
    validation, (scores, errors, _) = some_answers(0, 1_000), some_answers(1, 2_000)
    risk, draws = 0.15, 30
    ways = {None: lambda s, e: rejection.lowest_threshold(s, e, risk),
            0.05: lambda s, e: rejection.promised_threshold(s, e, risk, 0.05)}  # fmt: skip
    found = list(promises(validation, some_answers(1, 2_000), risk, 0.05, draws, seed=7))
    for row, (delta, choose) in zip(found, ways.items(), strict=True):
        rng = np.random.default_rng(7)
        broken = rejected = 0
        for _ in range(draws):
            some = rng.integers(2_000, size=1_000)
            accepted = errors[scores > choose(scores[some], errors[some])]
            broken += len(accepted) > 0 and accepted.mean() > risk
            rejected += 1 - len(accepted) / 2_000
        assert (row["delta"], row["draws"], row["broken"]) == (delta, draws, broken)
        assert row["rejected_in_draws"] == approx(rejected / draws)
        kept = errors[scores > choose(*validation[:2])]
        assert [row["rejected"], row["rest"]] == approx([1 - len(kept) / 2_000, kept.mean()])
    naive, bounded = found
    assert naive["broken"] > 8 > 2 >= bounded["broken"]
    assert naive["rejected_in_draws"] < bounded["rejected_in_draws"]
    wrong = some_answers(0, 50)._replace(errors=np.ones(50, int))
    for row in promises(wrong, wrong, 0.1, 0.05, 5, seed=0):  # nothing accepted breaks none
        assert row["rejected"] == row["rejected_in_draws"] == 1
        assert row["rest"] is None and row["broken"] == 0


# --- the claims, on rows made up for them ---


def made(name, plain=(1, 1), calibrated=(1, 1), learnt=(1, 1), broken=(500, 0), **values):
    """Two seeds. The swept τ costs 100 times the price plus the seed; the others, by seed, so many
    times more. Broken: of 1,000 draws of a seed without a bound, and with δ = 5 %."""
    rows = Rows()
    for seed in (0, 1):
        ratios = dict(zip(WAYS, (plain[seed], calibrated[seed], 1, learnt[seed]), strict=True))
        paid = [
            {"price": price, "way": way, **dict.fromkeys(("validation", "test"), ratio * cost)}
            for price, cost in ((price, 100 * price + seed) for price in PRICES)
            for way, ratio in ratios.items()
        ]
        promised = [{"delta": delta, "draws": 1_000, "broken": number}
                    for delta, number in zip((None, 0.05), broken, strict=True)]  # fmt: skip
        told = {"rejected": 0.05, "rest": 0.01, "rejected_in_hindsight": 0.04, "auroc": 0.98,
                "average_precision": 0.5, "aurc": 0.001, "selector_aurc": 0.001}  # fmt: skip
        told |= {what: both[seed] for what, both in values.items()}
        rows.append({"network": name, "seed": seed, "costs": paid, "promises": promised, **told})
    return rows


# How a claim begins, what is made up, and what makes it reproduced, not reproduced, undecided.
COSTS, CHOW = "MLP: the learnt τ costs, on the ", "MLP: the learnt τ costs, on the test images, "
OVER_SWEPT = ("learnt", (1.02, 1.021), (1.08, 1.081), (1.02, 1.04))
OVER_CHOW = ((1.25, 1.26), (0.8, 0.81), (0.9, 1.2))
VERDICTS = ("reproduced", "not reproduced", "undecided")
BARS = [
    (COSTS + "validation images, more than the swept", *OVER_SWEPT),
    (COSTS + "test images, more than the swept", *OVER_SWEPT),
    (CHOW + "more than 1 − λ,", "plain", *OVER_CHOW),
    (CHOW + "more than 1 − λ after calibration,", "calibrated", *OVER_CHOW),
    ("MLP: draws that break", "broken", (200, 0), (700, 80), (400, 50)),
    ("MLP: draws that end above", "broken", (500, 80), (200, 0), (400, 50)),
    ("happy: rejected", "rejected", (0.03, 0.031), (0.17, 0.171), (0.03, 0.15)),
    ("MLP: AUROC", "auroc", (0.978, 0.9784), (0.98, 0.9801)),
    # Better is as far from theirs as worse.
    ("MLP: average precision", "average_precision", (0.43, 0.44), (0.5, 0.501)),
    ("MLP: AURC of the learnt", "selector_aurc", (1.1e-3, 1.11e-3), (9e-4, 9.1e-4), (5e-4, 2e-3)),
]


def test_each_claim_can_fail():
    for beginning, what, *cases in BARS:
        for values, verdict in zip(cases, VERDICTS, strict=False):
            with about(beginning, values):
                claims = study.claims(made(beginning.partition(":")[0], **{what: values}))
                (claim,) = (c for c in claims if c.claim.startswith(beginning))
                assert claim.verdict == verdict
    for rest, told in (((0.02, None), "2.00"), ((None, None), "–")):  # a seed that rejects all
        words = [claim.claim for claim in study.claims(made("happy", rest=rest))]
        assert any(f"error of the rest {told} %" in claim for claim in words)
