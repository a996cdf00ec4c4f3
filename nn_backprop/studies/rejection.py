"""Which answers to accept: thresholds on a score, what they cost and what they promise.

An answer is accepted if and only if its score exceeds a threshold τ; −∞ accepts all, ∞ none.
Answers of equal scores are thus accepted or rejected together. Its error is 1 if it is wrong, 0 if
it is right. The coverage is the share that is accepted, the risk the share of errors among those.

Everywhere, `scores` and `errors` are arrays (N,) of at least one answer, scores finite, errors 0 or
1; anything else raises ValueError. What a threshold is chosen on says nothing of its risk: choose
on validation data, then ask `at_threshold` about the test data.
"""

import math
from bisect import bisect_left
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score


def confidence(logits: Any, classes: int | None = None) -> np.ndarray:
    """The largest softmax probability of each example, float64 (N,), from logits (N, K).

    In float64, since a float32 rounds all above 1 − 3e−8 to 1, and so makes ties of the best. With
    `classes`, the largest of the first so many: a garbage class has its share, but is no answer.
    """
    return softmax(np.asarray(logits, dtype=np.float64), axis=1)[:, :classes].max(axis=1)


def at_threshold(scores: Any, errors: Any, threshold: float) -> tuple[float, float]:
    """(coverage, risk) of a threshold; the risk is NaN if nothing is accepted."""
    scores, errors = _checked(scores, errors)
    accepted = errors[scores > threshold]
    return len(accepted) / len(scores), float(accepted.mean()) if len(accepted) else math.nan


def risk_coverage(scores: Any, errors: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(thresholds, coverage, risk) of every set of answers that a threshold can accept.

    From all of them (τ = −∞) to those of the highest score; each threshold is the highest score
    that it rejects. As many entries as there are different scores.

    Source: El-Yaniv & Wiener 2010, On the foundations of noise-free selective classification.
    """
    thresholds, accepted, wrong = _sweep(scores, errors)
    return thresholds[:-1], accepted[:-1] / accepted[0], wrong[:-1] / accepted[:-1]


def area_under_risk_coverage(scores: Any, errors: Any) -> float:
    """AURC: the mean, over n = 1 … N, of the risk of the n answers of the highest scores.

    Of equal scores, where the order is open, it is the mean over all orders: each of them counts as
    the share of errors that they have together.

    Source: Geifman, Uziel & El-Yaniv 2019, Bias-reduced uncertainty estimation for deep neural
    classifiers. The treatment of ties is ours.
    """
    scores, errors = _checked(scores, errors)
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shares = (np.bincount(place, errors) / counts)[place]
    best_first = shares[np.argsort(-scores)]
    return float((np.cumsum(best_first) / np.arange(1, len(scores) + 1)).mean())


def auroc(scores: Any, errors: Any) -> float:
    """The probability that a right answer scores above a wrong one, equal scores counting ½.

    With errors that say "unknown", that a known example scores above an unknown one. NaN if all are
    right or all are wrong.
    """
    scores, errors = _checked(scores, errors)
    return float(roc_auc_score(1 - errors, scores)) if 0 < errors.mean() < 1 else math.nan


def told_apart(known: Any, unknown: Any) -> float:
    """The probability that one of `known`, scores (N,), is above one of `unknown`, (M,): an AUROC.

    Equal scores count ½.
    """
    known, unknown = _scores(known, "known"), _scores(unknown, "unknown")
    is_unknown = np.repeat([0, 1], [len(known), len(unknown)])
    return auroc(np.concatenate([known, unknown]), is_unknown)


def coverage_at_risk(scores: Any, errors: Any, risk: float) -> float:
    """The largest coverage whose risk, on these same answers, is at most `risk`; 0 if none is.

    1 − this is the share to be rejected for, say, 1 % error on the rest, in hindsight.
    """
    _, coverage, risks = risk_coverage(scores, errors)
    return float(coverage[risks <= risk].max(initial=0.0))


def lowest_threshold(scores: Any, errors: Any, risk: float) -> float:
    """The lowest τ above which these very answers have at most that risk; ∞ if none has."""
    thresholds, _, risks = risk_coverage(scores, errors)
    return float(next(iter(thresholds[risks <= risk]), math.inf))


def calibration(scores: Any, errors: Any) -> tuple[float, float]:
    """(a, b) of the likeliest σ(a s + b), the probability that an answer of score s is right.

    C = 1e9 weighs the answers' losses against half of a²: no regularisation to speak of.

    Source: Platt 1999, Probabilistic outputs for support vector machines.
    """
    model = LogisticRegression(C=1e9, max_iter=1000)
    model.fit(np.asarray(scores)[:, None], 1 - np.asarray(errors))
    return model.coef_.item(), model.intercept_.item()


def best_threshold(scores: Any, errors: Any, price: float) -> tuple[float, float]:
    """(τ, cost) of the least cost: an accepted error costs 1, a rejection `price`; mean over all.

    Tries every set of answers that a threshold can accept, none included. Of equal costs the lowest
    τ. Raises ValueError for a price that is not from 0 to 1.

    Source: Chow 1970, On optimum recognition error and reject tradeoff: where the score is a
    calibrated probability of being right, the best τ tends to 1 − price.
    """
    if not 0 <= price <= 1:
        raise ValueError(f"price must be from 0 to 1, what an error costs, not {price}")
    thresholds, accepted, wrong = _sweep(scores, errors)
    costs = (wrong + price * (accepted[0] - accepted)) / accepted[0]
    best = int(np.argmin(costs))
    return float(thresholds[best]), float(costs[best])


def risk_bound(errors: int, accepted: int, delta: float) -> float:
    """What the true risk stays below with probability 1 − delta, after that many errors.

    Of n independent answers, each wrong with probability b, at most k are wrong with a probability
    that falls as b grows. The bound is the b at which it has fallen to delta: any larger risk would
    have shown k errors or fewer with less than that. It is the quantile 1 − delta of the Beta
    distribution with parameters k + 1 and n − k; 1 if all are wrong. Raises ValueError unless
    0 ≤ errors ≤ accepted, 1 ≤ accepted and 0 < delta < 1.

    Source: Clopper & Pearson 1934, The use of confidence or fiducial limits; Geifman & El-Yaniv
    2017, Selective classification for deep neural networks, lemma 3.1.
    """
    if not (0 <= errors <= accepted and accepted >= 1):
        raise ValueError(f"there must be 0 to n errors of n ≥ 1, not {errors} of {accepted}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    return float(beta.ppf(1 - delta, errors + 1, accepted - errors)) if errors < accepted else 1.0


def promised_threshold(scores: Any, errors: Any, risk: float, delta: float = 0.001) -> float:
    """A threshold whose true risk is at most `risk` with probability 1 − delta, or ∞ for none.

    A binary search, in the order of the scores, for the lowest τ at which `risk_bound` is at most
    `risk`. Among N thresholds and none it asks at most L = ⌈log₂(N + 1)⌉ times; each time the bound
    may be too low with probability delta / L, so that all L hold with 1 − delta. Given τ, one of
    the scores, those above it are independent draws, as the bound needs. What this leaves open, in
    the paper too: the τ of a step is chosen by the errors that earlier steps have seen.

    The search takes it that above a τ which passes all pass. Where few answers are left that is not
    so, and a threshold may be missed; the promise is not touched by that.

    The probability is that of the draw of these answers. They must be independent, of the kind that
    τ is used on, and none that the network was trained on. Raises ValueError unless 0 < delta < 1.

    Source: Geifman & El-Yaniv 2017, algorithm SGR and theorem 3.2. Ours: a score has to exceed τ;
    equal scores are one step; L for their ⌈log₂ N⌉, which is 0 for one answer.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    thresholds, accepted, wrong = _sweep(scores, errors)
    share = delta / int(accepted[0]).bit_length()  # ⌈log₂(N + 1)⌉

    def kept(k: int) -> bool:
        return risk_bound(int(wrong[k]), int(accepted[k]), share) <= risk

    return float(thresholds[bisect_left(range(len(thresholds) - 1), True, key=kept)])


def open_set_rates(scores: Any, errors: Any, unknown: Any) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rate, correct classification rate) of every threshold, from lowest to ∞.

    Among `unknown`, the scores (M,) of examples of no class, the share that is accepted; among the
    known, the share that is both right and accepted. Drawn against one another: the OSCR curve.

    Source: Dhamija, Günther & Boult 2018, Reducing network agnostophobia. Here a score that equals
    the threshold is rejected in both.
    """
    scores, errors = _checked(scores, errors)
    unknown = _scores(unknown, "unknown")
    thresholds = np.unique(np.concatenate([[-np.inf], scores, unknown, [np.inf]]))

    def accepted(some: np.ndarray) -> np.ndarray:
        return len(some) - np.searchsorted(np.sort(some), thresholds, side="right")

    return accepted(unknown) / len(unknown), accepted(scores[errors == 0]) / len(scores)


def correct_at_false_positives(scores: Any, errors: Any, unknown: Any, rate: float) -> float:
    """CCR@FPR: the most that is both right and accepted while at most `rate` of the unknown is."""
    false_positives, correct = open_set_rates(scores, errors, unknown)
    return float(correct[false_positives <= rate].max())


def _sweep(scores: Any, errors: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds from −∞ to ∞, how many answers each accepts, and how many of these are wrong."""
    scores, errors = _checked(scores, errors)
    values, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    wrong = np.bincount(place, errors).astype(int)
    thresholds = np.concatenate([[-np.inf], values[:-1], [np.inf]])
    # from each score upward, and of no score
    accepted, wrong = (np.append(np.cumsum(c[::-1])[::-1], 0) for c in (counts, wrong))
    return thresholds, accepted, wrong


def _checked(scores: Any, errors: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, errors = _scores(scores, "scores"), np.asarray(errors, dtype=np.float64)
    if errors.shape != scores.shape or not np.isin(errors, (0, 1)).all():
        raise ValueError(
            f"errors must be 0 (right) or 1 (wrong), one for each of the {len(scores)} scores"
        )
    return scores, errors


def _scores(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite numbers (N,), one or more, not {values.shape}")
    return values
