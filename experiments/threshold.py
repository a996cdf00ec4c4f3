"""When should a network keep silent? Thresholds on its confidence: learnt, swept, promised.

    python experiments/threshold.py               # MNIST, 3 networks × 10 seeds
    python experiments/threshold.py --smoke       # the embedded digits, seconds

An answer is accepted if its confidence exceeds τ. The network is trained first and then frozen; τ
is learnt afterwards. **Networks**: 784-16-16-10 with sigmoids and squared error ("happy");
784-256-256-256-10 with ReLUs, in the sizes of Hendrycks & Gimpel 2017 ("MLP"); the small CNN. The
confidence of the last two is their largest softmax probability. The happy one has no softmax; its
confidence is its largest output, not normalised: squared error, too, is least where an output is
the probability of its class. Thresholds are learnt in log-odds, since confidences crowd near 1; the
order of the answers is the same.

**Prices.** An accepted error costs 1, a rejection λ. Chow 1970: of a calibrated confidence the best
τ is 1 − λ. It is taken plainly, and after a calibration by two numbers on the validation answers;
beside them stand the best τ there by exhaustive sweep, and the one that `learn_gate` learns there
by gradient descent. All are judged on the test answers; the best τ there, in hindsight, is the
least that any could cost. If the learnt τ is cheaper than 1 − λ, but not after calibration, its
gain is one of calibration. The gate's temperature, 0.25, was chosen with another seed among 0.1,
0.25, 0.5 and 1, on halves of the validation split: the images of the claim about validation, too.
Our bar of 5 % was set before the full run, after pilots.

**A learnt selector** orders the answers anew. Feng et al. 2023, Towards better selective
classification, find that the classifier's own scores select better than heads trained with it. Ours
is no test of those heads: it is post hoc and untuned, a logistic regression of right against wrong
on the log-odds of the confidence and the ten sorted outputs (logits, or log-odds), of the
validation answers.

**Promises.** How often does the true risk, the share of errors among the accepted, end above the
one that `promised_threshold` promised? The test answers of a trained network are taken for the
whole population: as many as there are for validation are drawn from it with replacement, so
independently, τ is chosen on the draw and used for nothing else, and the true risk above it counted
over the population. Beside it: the lowest τ whose risk in the draw is at most that, without a
bound. The risks, 2, 1 and 0.5 %, are 40 to 70 % of what a network errs, so that it takes a
threshold. The exact binomial interval is for these networks and images alone. What the τ of the
validation images does in test is no evidence for the promise: those images are the harder ones
(error on seed 0: happy 5.90 against 4.85 %, MLP 1.86 against 1.53 %).

**Published.** 1 % error at about 9 % rejected, of zip code digits: LeCun et al., Handwritten digit
recognition with a back-propagation network, NIPS 1989; a bar for the happy network alone, since the
others err less than about 1.5 % to begin with. AUROC of right against wrong 97.83 %, average
precision for errors 43.88 %, at 1.48 % error: Vision/MNIST_Softmax_Stats.ipynb in the code of
Hendrycks & Gimpel 2017, A baseline for detecting misclassified and out-of-distribution examples.
That is one training, to be found where one more of our MLP would be. Theirs had GELUs, 30 epochs, a
rate that falls to a tenth after 20 of them, and all 60,000 images.

Rates, decays and batches are those of train.py for happy and CNN, and for its lenet-300-100 in the
MLP; epochs are fewer than there. Intervals over seeds are for these images: they do not tell what
other images, for validation or test, would change.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, logit, logsumexp
from scipy.stats import binomtest
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load
from nn_backprop.engines import autograd
from nn_backprop.layers import learn_gate
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.models.counting import parameters
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import (
    Claim,
    between,
    differences,
    interval,
    judged,
    one_of,
    spread,
)
from nn_backprop.studies.rejection import (
    area_under_risk_coverage,
    at_threshold,
    auroc,
    best_threshold,
    coverage_at_risk,
    promised_threshold,
    risk_coverage,
)
from nn_backprop.training import fit, make_optimizer, make_schedule, steps_per_epoch

PRICES = (0.01, 0.03, 0.1, 0.3)
TEMPERATURE = 0.25
MARGIN = 5  # percent that the learnt τ may cost more than the swept one
PLAIN, CALIBRATED, SWEPT, LEARNT = WAYS = ("1 − λ", "1 − λ, calibrated", "swept", "learnt")
DELTA = 0.05
LEAST, MOST = 40, 60  # percent of the draws that may end above the risk without a bound
DRAWS, SMOKE_DRAWS = 2_000, 20  # of each network and seed
REJECTED_1989, AUROC_2017, PRECISION_2017 = 9.0, 97.83, 43.88  # percent
REJECTED = (0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)  # shares at which we look
RECALLS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Network(NamedTuple):
    """How a network is built and trained."""

    build: Callable[[], nn.Module]
    epochs: int
    smoke_epochs: int
    batch_size: int
    lr: float
    decay: float
    promised: float  # a risk


NETWORKS = {
    "happy": Network(happy, 20, 30, 32, 1e-2, 0.03, 0.02),
    "MLP": Network(lambda: MLP((784, 256, 256, 256, 10)), 10, 3, 128, 3e-3, 0.3, 0.01),
    "CNN": Network(CNN, 4, 2, 128, 6e-3, 0.1, 0.005),
}


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Thresholds on the confidence: learnt against swept, promised risks, what is rejected."""

    seeds: int = 10
    """Number of seeds, from 0; at least 2."""


class Job(NamedTuple):
    """One training."""

    network: str
    seed: int
    options: Options


class Answers(NamedTuple):
    """What a network says of N images."""

    scores: np.ndarray  # (N,), log-odds of the confidence
    errors: np.ndarray  # (N,), 1 if wrong, 0 if right
    outputs: np.ndarray  # (N, K), logits, or log-odds of sigmoid outputs; each row ascending


Rows = Mapping[str, Sequence[study.Row]]  # by network, in the order of the seeds


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here
    names = reversed(NETWORKS)  # the longest first
    jobs = [Job(name, seed, options) for name in names for seed in range(options.seeds)]
    rows = under_way.carry_out(train, jobs, lambda row: {f"error/{row['network']}": row["error"]})
    by = {name: [row for row in rows if row["network"] == name] for name in NETWORKS}
    under_way.finish(_tables(by), _claims(by), _picture(by))


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> study.Row:
    """One network, trained; its thresholds, chosen on validation answers; what they do in test."""
    data, how = _data(job.options), NETWORKS[job.network]
    epochs = how.smoke_epochs if job.options.smoke else how.epochs
    draws = SMOKE_DRAWS if job.options.smoke else DRAWS
    torch.manual_seed(job.seed)
    model = how.build()
    optimizer = make_optimizer("adam", model.parameters(), how.lr, how.decay)
    steps = epochs * steps_per_epoch(len(data.train), how.batch_size)
    schedule = make_schedule("one-cycle", optimizer, how.lr, steps)
    began = time.perf_counter()
    fit(model, autograd, optimizer, schedule, data,
        epochs=epochs, batch_size=how.batch_size, seed=job.seed)  # fmt: skip
    seconds = time.perf_counter() - began
    validation = answers(model, data, data.validation)
    test = answers(model, data, data.test)  # read here alone
    return {
        "network": job.network,
        "seed": job.seed,
        "dataset": data.name,
        "parameters": parameters(model),
        "epochs": epochs,
        "train_seconds": seconds,
        **quality(validation, test),
        "costs": list(costs(validation, test)),
        "promises": list(promises(validation, test, how.promised, draws, job.seed)),
    }


@torch.no_grad()
def answers(model: nn.Module, data: ImageData, indices: Tensor) -> Answers:
    """In float64, since in float32 the largest sigmoids and softmax probabilities are 1."""
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


def quality(validation: Answers, test: Answers) -> study.Row:
    """How well the confidence tells errors from right answers, and what 1 % of errors takes."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    scores, errors = test.scores, test.errors
    _, coverage, risk = risk_coverage(scores, errors)
    precision, recall, _ = precision_recall_curve(errors, -scores)
    kept, rest = at_threshold(scores, errors, lowest(validation.scores, validation.errors, 0.01))
    return {
        "error": float(errors.mean()),
        "validation_error": float(validation.errors.mean()),
        "auroc": auroc(scores, errors),
        "aurc": area_under_risk_coverage(scores, errors),
        "average_precision": float(average_precision_score(errors, -scores)),
        "selector_aurc": area_under_risk_coverage(selector(validation, test), errors),
        "rejected": 1 - kept,
        "rest": rest if kept else None,
        "rejected_in_hindsight": 1 - coverage_at_risk(scores, errors, 0.01),
        # what is nearest to each share, and not beyond it; coverage and recall fall
        "risk_curve": [float(risk[coverage >= 1 - share][-1]) for share in REJECTED],
        "precision_curve": [float(precision[recall >= share][-1]) for share in RECALLS],
    }


def selector(validation: Answers, test: Answers) -> np.ndarray:
    """Scores (N,) of the test answers, by a logistic regression that has seen the validation's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen, new = (np.column_stack([part.scores, part.outputs]) for part in (validation, test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(seen, 1 - validation.errors).decision_function(new)


def lowest(scores: np.ndarray, errors: np.ndarray, risk: float) -> float:
    """The lowest τ above which these very answers have at most that risk; ∞ if none has."""
    thresholds, _, risks = risk_coverage(scores, errors)
    return float(next(iter(thresholds[risks <= risk]), math.inf))


def cost(some: Answers, threshold: float, price: float) -> float:
    """Mean over the answers: 1 for an accepted error, the price for a rejection."""
    return float(np.where(some.scores > threshold, some.errors, price).mean())


def calibration(some: Answers) -> tuple[float, float]:
    """(a, b) of the likeliest σ(a s + b), the probability that an answer of score s is right.

    C = 1e9 weighs the answers' losses against half of a²: no regularisation to speak of.

    Source: Platt 1999, Probabilistic outputs for support vector machines.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e9, max_iter=1000)
    model.fit(some.scores[:, None], 1 - some.errors)
    return model.coef_.item(), model.intercept_.item()


def costs(validation: Answers, test: Answers) -> Iterator[study.Row]:
    """By price and way of choosing τ, which is told as a confidence, not calibrated."""
    scores, errors, _ = validation
    a, b = calibration(validation)
    for price in PRICES:
        least = best_threshold(test.scores, test.errors, price)[1]
        thresholds = {
            PLAIN: float(logit(1 - price)),
            CALIBRATED: float((logit(1 - price) - b) / a),
            SWEPT: best_threshold(scores, errors, price)[0],
            LEARNT: learn_gate(scores, errors, price, TEMPERATURE).threshold.item(),
        }
        for way, threshold in thresholds.items():
            yield {
                "price": price,
                "way": way,
                "threshold": float(expit(threshold)),
                "validation": cost(validation, threshold, price),
                "test": cost(test, threshold, price),
                "least": least,  # in hindsight
                "rejected": 1 - at_threshold(test.scores, test.errors, threshold)[0],
            }


def promises(
    validation: Answers, test: Answers, risk: float, draws: int, seed: int
) -> Iterator[study.Row]:
    """By δ, which is None for no bound: what the τ of the validation answers does in test, and how
    often that of as many answers drawn from the test answers breaks its promise."""
    rng = np.random.default_rng(seed)
    scores, errors, _ = test
    drawn = [rng.integers(len(scores), size=len(validation.scores)) for _ in range(draws)]
    ways: dict[float | None, Callable[[np.ndarray, np.ndarray], float]] = {
        None: partial(lowest, risk=risk),
        DELTA: partial(promised_threshold, risk=risk, delta=DELTA),
    }
    for delta, choose in ways.items():
        kept, rest = at_threshold(scores, errors, choose(validation.scores, validation.errors))
        true = [at_threshold(scores, errors, choose(scores[n], errors[n])) for n in drawn]
        yield {
            "risk": risk,
            "delta": delta,
            "rejected": 1 - kept,
            "rest": rest if kept else None,
            "draws": draws,
            # the risk of no answers is NaN, which is not above: who is silent breaks no promise
            "broken": sum(above > risk for _, above in true),
            "rejected_in_draws": 1 - statistics.fmean(coverage for coverage, _ in true),
        }


@cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


# --- What the rows come to ----------------------------------------------------------------------


def _of(rows: Sequence[study.Row], what: str, scale: float = 100) -> list[float]:
    """A share of each row that has it, in percent unless another scale is given."""
    return [scale * row[what] for row in rows if row[what] is not None]


def _parts(rows: Sequence[study.Row], what: str, **at: object) -> list[study.Row]:
    """Of each seed the costs or promises that have these values."""
    return [part for row in rows for part in row[what] if at.items() <= part.items()]


def _excess(
    rows: Sequence[study.Row], way: str, other: str, split: str = "test", prices: Any = PRICES
) -> list[float]:
    """By how many percent one way costs more than another: of each seed, the mean over prices."""
    one, two = (
        np.array([[c[split] for c in _parts(rows, "costs", price=p, way=w)] for p in prices])
        for w in (way, other)
    )
    return (100 * (one / two - 1)).mean(axis=0).tolist()


def _broken(rows: Sequence[study.Row], delta: float | None) -> tuple[float, tuple[float, float]]:
    """The percentage of all seeds' draws that broke a promise, with its exact 95 % interval.

    If the chance to break it differs between the seeds, the number of broken ones spreads less than
    a binomial one of the same mean: then the interval is wider than it need be.
    """
    found = _parts(rows, "promises", delta=delta)
    test = binomtest(sum(p["broken"] for p in found), sum(p["draws"] for p in found))
    low, high = test.proportion_ci(0.95, method="exact")
    return 100 * test.statistic, (100 * low, 100 * high)


def _claims(by: Rows) -> list[Claim]:
    return [
        replace(claim, claim=f"{name}: {claim.claim}")
        for name, rows in by.items()
        for claim in _claims_of(name, rows)
    ]


def _claims_of(name: str, rows: Sequence[study.Row]) -> Iterator[Claim]:
    over = f"in %, mean over λ = {', '.join(f'{price:g}' for price in PRICES)}"
    for split in ("validation", "test"):
        claim = f"the learnt τ costs, on the {split} images, more than the swept one, {over}: "
        claim += f"at most {MARGIN} (our bar)"
        yield between(claim, None, _excess(rows, LEARNT, SWEPT, split), high=MARGIN)
    for way, told in ((PLAIN, ""), (CALIBRATED, " after calibration")):
        claim = f"the learnt τ costs, on the test images, more than 1 − λ{told}, {over}: below 0"
        yield between(claim, None, _excess(rows, LEARNT, way), high=0)
    risk, most = f"a risk of {100 * NETWORKS[name].promised:g} %", 100 * DELTA
    claim = f"draws that break the promise of {risk}, in %: at most δ = {most:g}"
    yield judged(claim, f"at most {most:g}", *_broken(rows, DELTA), high=most)
    claim = f"draws that end above {risk} without a bound, in %: from {LEAST} to {MOST} "
    claim += "(our bar; a half is expected)"
    yield judged(claim, None, *_broken(rows, None), LEAST, MOST)
    if name == "happy":
        rest, hindsight = (_mean(_of(rows, k)) for k in ("rest", "rejected_in_hindsight"))
        claim = "rejected by the τ of 1 % error on the validation images (error of the rest "
        claim += f"{rest} %; in hindsight {hindsight} %), in %: at most {REJECTED_1989:g}"
        of = _of(rows, "rejected")
        yield between(claim, f"about {REJECTED_1989:g}", of, high=REJECTED_1989)
    if name == "MLP":
        within = ", in %: theirs, of one training, within the interval of one more of ours"
        yield one_of(f"AUROC of right against wrong{within}", AUROC_2017, _of(rows, "auroc"))
        found = _of(rows, "average_precision")
        yield one_of(f"average precision for errors{within}", PRECISION_2017, found)
    less = differences(_of(rows, "selector_aurc", 1000), _of(rows, "aurc", 1000))
    claim = "AURC of the learnt selector less that of the confidence, ‰: 0 or more"
    yield between(claim, "no gain", less, low=0)


def _tables(by: Rows) -> dict[str, list[study.Row]]:
    seeds = len(by["happy"])
    draws = sum(p["draws"] for p in _parts(by["happy"], "promises", delta=DELTA))
    telling, prices, promised = [], [], []
    for name, rows in by.items():
        telling.append({
            "network": name,
            "parameters": f"{rows[0]['parameters']:,}",
            "error, validation, %": spread(_of(rows, "validation_error")),
            "error, test, %": spread(_of(rows, "error")),
            "AUROC, %": spread(_of(rows, "auroc")),
            "AURC, ‰": spread(_of(rows, "aurc", 1000)),
            "selector: AURC, ‰": spread(_of(rows, "selector_aurc", 1000)),
            "average precision for errors, %": spread(_of(rows, "average_precision")),
            "rejected for 1 % error, %": spread(_of(rows, "rejected")),
            "error of the rest, %": _mean(_of(rows, "rest")),
            "rejected in hindsight, %": spread(_of(rows, "rejected_in_hindsight")),
            "training, s": f"{statistics.median(_of(rows, 'train_seconds', 1)):.1f}",
        })  # fmt: skip
        for price in PRICES:
            ways = {way: _parts(rows, "costs", price=price, way=way) for way in WAYS}
            prices.append({
                "network": name,
                "λ": f"{price:g}",
                "accept all": spread(_of(rows, "error", 1000)),
                "reject all": f"{1000 * price:g}",
                **{way: spread(_of(found, "test", 1000)) for way, found in ways.items()},
                "least, in hindsight": spread(_of(ways[SWEPT], "least", 1000)),
                **{f"{way}: τ / rejected": f"{_mean(_of(found, 'threshold', 1), 4)} / "
                   f"{_mean(_of(found, 'rejected'), 1)} %" for way, found in ways.items()},
            })  # fmt: skip
        for delta in (None, DELTA):
            made = _parts(rows, "promises", delta=delta)
            share, (low, high) = _broken(rows, delta)
            risk, rest = 100 * made[0]["risk"], _of(made, "rest")
            promised.append({
                "network": name,
                "risk, %": f"{risk:g}",
                "δ, %": "no bound" if delta is None else f"{100 * delta:g}",
                "broken, % of the draws": f"{share:.2f} ({low:.2f} to {high:.2f})",
                "broken, worst seed, %": f"{max(100 * p['broken'] / p['draws'] for p in made):.2f}",
                "rejected, %": _mean(_of(made, "rejected_in_draws")),
                "validation τ in test: rejected, %": _mean(_of(made, "rejected")),
                "validation τ in test: error of the rest, %": _mean(rest),
                "validation τ in test: seeds above the risk": sum(r > risk for r in rest),
            })  # fmt: skip
    return {
        f"How well the confidence tells errors, {seeds} seeds; the τ of 1 % error is that of the "
        "validation images": telling,
        "Cost of 1,000 test images, an accepted error 1, a rejection λ; τ as a confidence": prices,
        f"Promised risks: {draws:,} draws per network from the test answers; the τ of the "
        "validation images in test is no evidence for the promise, for those are harder": promised,
    }


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


def _picture(by: Rows) -> figures.Figure:
    def excess(rows: Sequence[study.Row], price: float, way: str) -> figures.Point:
        values = _excess(rows, way, SWEPT, prices=[price])
        (low, high), mean = interval(values), statistics.fmean(values)
        return f"{price:g}", mean, (mean - low, high - mean)  # of words, ways stand side by side

    def curves(shares: Sequence[float], what: str) -> dict[str, list[figures.Point]]:
        return {
            name: [
                figures.point(100 * share, [100 * row[what][k] for row in rows])
                for k, share in enumerate(shares)
            ]
            for name, rows in by.items()
        }

    def broken(delta: float | None) -> Iterator[figures.Point]:
        for name, rows in by.items():
            share, (low, high) = _broken(rows, delta)
            yield f"{name}: {100 * NETWORKS[name].promised:g} %", share, (share - low, high - share)

    risks = curves(REJECTED, "risk_curve")
    risks["LeCun et al. 1989, zip codes"] = [(REJECTED_1989, 1.0, 0.0)]
    parts = [
        figures.Panel(
            f"{name}, in test; bar: 95 % interval", "price of a rejection, λ",
            "cost above that of the swept τ, %",
            {way: [excess(rows, p, way) for p in PRICES] for way in WAYS if way != SWEPT},
            levels={SWEPT: 0},
        )
        for name, rows in by.items()
    ] + [
        figures.Panel(
            "Errors left when the least sure are rejected", "rejected, %", "error of the rest, %",
            risks, levels={"1 %": 1},
        ),
        figures.Panel(
            "Errors found among the least sure", "share of all errors that is found, %",
            "errors among those looked at, %", curves(RECALLS, "precision_curve"),
        ),
        figures.Panel(
            "A promised risk; bar: 95 % interval", "network and risk",
            "draws above the risk, %",
            {"no bound": [*broken(None)], "with the bound": [*broken(DELTA)]},
            log="y", levels={f"δ = {100 * DELTA:g} %": 100 * DELTA},
        ),
    ]  # fmt: skip
    dataset, seeds = by["happy"][0]["dataset"].replace("mnist", "MNIST"), len(by["happy"])
    title = f"Thresholds on the confidence of three networks: {dataset}, {seeds} seeds; "
    return figures.side_by_side(
        parts, title + "bars: standard deviation where nothing else is told"
    )


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
