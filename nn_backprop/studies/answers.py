"""What a network says of images; its confidence: how well it tells errors, what thresholds cost.

The scores of `rejection` are log-odds of the confidence here: confidences crowd near 1, and the
order of the answers is the same.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, logit, logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from nn_backprop.data import ImageData, channels_last
from nn_backprop.layers import learn_gate
from nn_backprop.studies import rejection
from nn_backprop.studies.jobs import Row

PLAIN, CALIBRATED, SWEPT, LEARNT = WAYS = ("1 − λ", "1 − λ, calibrated", "swept", "learnt")


class Answers(NamedTuple):
    """What a network says of N images."""

    scores: np.ndarray
    """(N,), log-odds of the confidence."""
    errors: np.ndarray
    """(N,), 1 if wrong, 0 if right."""
    outputs: np.ndarray
    """(N, K), logits, or log-odds of sigmoid outputs; each row ascending."""


@torch.no_grad()
def answers_of(model: nn.Module, data: ImageData, indices: Tensor) -> Answers:
    """The answers of a model, which is made float64: in float32 the largest probabilities are 1."""
    model.double()
    parts = [data.batch(part, torch.float64) for part in indices.split(1000)]
    outputs = torch.cat([model(inputs) for inputs, _ in parts]).numpy()
    labels = torch.cat([targets for _, targets in parts]).numpy()
    squared = model.loss_name == "squared_error"
    if squared:
        outputs = logit(outputs.clip(2**-53, 1 - 2**-53))  # finite where a sigmoid is 0 or 1
    ordered = np.sort(outputs, axis=1)
    best = ordered[:, -1]
    scores = best if squared else best - logsumexp(ordered[:, :-1], axis=1)
    return Answers(scores, (outputs.argmax(axis=1) != labels).astype(int), ordered)


@torch.no_grad()
def probabilities(model: nn.Module, data: ImageData, images: Tensor) -> np.ndarray:
    """Float64 (n, K), the sigmoids' outputs or softmax, of images (n, 1, H, W), white is 255."""
    parts = [model(channels_last(data.normalise(part))) for part in images.split(1000)]
    given = torch.cat(parts).double()  # before the softmax, lest many be 1
    found = given.softmax(1) if model.loss_name == "cross_entropy" else given
    return found.numpy()


def compared(confidences: Mapping[str, np.ndarray], what: str) -> Row:
    """How sure a network is of sets of images, in percent; the first are those that it knows.

    Under `what`, the mean by set; of the others, under "<what> auroc", how well the known are told
    from them, and under "<what> as sure" how many are at least as sure as the median of the known.
    """
    (_, known), *others = confidences.items()
    median = np.median(known)
    return {
        what: {name: 100 * float(each.mean()) for name, each in confidences.items()},
        f"{what} auroc": {name: 100 * rejection.told_apart(known, each) for name, each in others},
        f"{what} as sure": {name: 100 * float((each >= median).mean()) for name, each in others},
    }


def cost(some: Answers, threshold: float, price: float) -> float:
    """Mean over the answers: 1 for an accepted error, the price for a rejection."""
    return float(np.where(some.scores > threshold, some.errors, price).mean())


def selector(validation: Answers, test: Answers) -> np.ndarray:
    """Scores (N,) of the test answers, by a logistic regression that has seen the validation's."""
    seen, new = (np.column_stack([part.scores, part.outputs]) for part in (validation, test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores: np.ndarray = model.fit(seen, 1 - validation.errors).decision_function(new)
    return scores


def quality(
    validation: Answers, test: Answers, rejected: Sequence[float], recalls: Sequence[float]
) -> Row:
    """How well the confidence tells errors from right answers, and what 1 % of errors takes.

    The curves are of the test answers: the risk at each share `rejected`, the precision at each
    share of the errors in `recalls`.
    """
    scores, errors, _ = test
    _, coverage, risk = rejection.risk_coverage(scores, errors)
    precision, recall, _ = precision_recall_curve(errors, -scores)
    threshold = rejection.lowest_threshold(validation.scores, validation.errors, 0.01)
    kept, rest = rejection.at_threshold(scores, errors, threshold)
    found: dict[str, Any] = {
        "error": float(errors.mean()),
        "validation_error": float(validation.errors.mean()),
        "auroc": rejection.auroc(scores, errors),
        "aurc": rejection.area_under_risk_coverage(scores, errors),
        "average_precision": float(average_precision_score(errors, -scores)),
        "selector_aurc": rejection.area_under_risk_coverage(selector(validation, test), errors),
        "rejected": 1 - kept,
        "rest": rest if kept else None,
        "rejected_in_hindsight": 1 - rejection.coverage_at_risk(scores, errors, 0.01),
        # what is nearest to each share, and not beyond it; coverage and recall fall
        "risk_curve": [float(risk[coverage >= 1 - share][-1]) for share in rejected],
        "precision_curve": [float(precision[recall >= share][-1]) for share in recalls],
    }
    return found


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
