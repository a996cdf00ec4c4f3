"""What a threshold on the confidence costs and promises, by how it was chosen.

It is chosen on the answers to validation images; the answers to test images say what it does.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from scipy.special import expit, logit

from nn_backprop.layers import learn_gate
from nn_backprop.studies import rejection
from nn_backprop.studies.answers import Answers, cost
from nn_backprop.studies.jobs import Row

PLAIN, CALIBRATED, SWEPT, LEARNT = WAYS = ("1 − λ", "1 − λ, calibrated", "swept", "learnt")


def costs(
    validation: Answers, test: Answers, prices: Sequence[float], temperature: float
) -> Iterator[Row]:
    """By price λ and way of choosing τ, which is told as a confidence, not calibrated."""
    scores, errors, _ = validation
    a, b = rejection.calibration(scores, errors)
    for price in prices:
        least = rejection.best_threshold(test.scores, test.errors, price)[1]
        thresholds = {
            PLAIN: float(logit(1 - price)),
            CALIBRATED: float((logit(1 - price) - b) / a),
            SWEPT: rejection.best_threshold(scores, errors, price)[0],
            LEARNT: learn_gate(scores, errors, price, temperature).threshold.item(),
        }
        for way, threshold in thresholds.items():
            yield {
                "price": price, "way": way, "threshold": float(expit(threshold)),
                "validation": cost(validation, threshold, price),
                "test": cost(test, threshold, price), "least": least,  # in hindsight
                "rejected": 1 - rejection.at_threshold(test.scores, test.errors, threshold)[0],
            }  # fmt: skip


def promises(
    validation: Answers, test: Answers, risk: float, delta: float, draws: int, seed: int
) -> Iterator[Row]:
    """Without a bound (δ is None) and with it: what the τ of the validation answers does in test,
    and how often that of as many answers drawn from the test answers breaks its promise."""
    rng = np.random.default_rng(seed)
    scores, errors, _ = test
    drawn = [rng.integers(len(scores), size=len(validation.scores)) for _ in range(draws)]
    ways: dict[float | None, Callable[[np.ndarray, np.ndarray], float]] = {
        None: partial(rejection.lowest_threshold, risk=risk),
        delta: partial(rejection.promised_threshold, risk=risk, delta=delta),
    }
    for bound, choose in ways.items():
        threshold = choose(validation.scores, validation.errors)
        kept, rest = rejection.at_threshold(scores, errors, threshold)
        true = [rejection.at_threshold(scores, errors, choose(scores[n], errors[n])) for n in drawn]
        yield {
            "risk": risk, "delta": bound, "draws": draws,
            "rejected": 1 - kept, "rest": rest if kept else None,
            # the risk of no answers is NaN, which is not above: who is silent breaks no promise
            "broken": sum(above > risk for _, above in true),
            "rejected_in_draws": 1 - statistics.fmean(coverage for coverage, _ in true),
        }  # fmt: skip
