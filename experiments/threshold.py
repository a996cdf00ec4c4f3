"""When should a network keep silent? Thresholds on its confidence: learnt, swept, promised.

    python experiments/threshold.py               # MNIST, 3 networks × 10 seeds
    python experiments/threshold.py --smoke       # the embedded digits, seconds

What is compared, and what came out: results/threshold/README.md.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit, logit
from scipy.stats import binomtest
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.layers import learn_gate
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.models.counting import parameters
from nn_backprop.studies import Claim, Row, Rows, rejection
from nn_backprop.studies.answers import Answers, answers_of, cost, quality

PRICES = (0.01, 0.03, 0.1, 0.3)
TEMPERATURE = 0.25
MARGIN = 5  # percent that the learnt τ may cost more than the swept one
PLAIN, CALIBRATED, SWEPT, LEARNT = WAYS = ("1 − λ", "1 − λ, calibrated", "swept", "learnt")
DELTA = 0.05
LEAST, MOST = 40, 60  # percent of the draws that may end above the risk without a bound
DRAWS, SMOKE_DRAWS = 2_000, 20  # of each network and seed
REJECTED_1989 = 9.0  # percent
PUBLISHED_2017 = {
    "auroc": ("AUROC of right against wrong", 97.83),
    "average_precision": ("average precision for errors", 43.88),
}
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
class Options(studies.Options):
    """Thresholds on the confidence: learnt against swept, promised risks, what is rejected."""

    seeds: int = 10
    """Number of seeds, from 0."""


class Job(NamedTuple):
    """One training."""

    network: str
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    names = reversed(NETWORKS)  # the longest first
    jobs = [Job(name, seed, options) for name in names for seed in range(options.seeds)]
    run.train_all(train, jobs, lambda row: {f"error/{row['network']}": row["error"]})


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """One network, trained; its thresholds, chosen on validation answers; what they do in test."""
    data, how = studies.load_data(job.options), NETWORKS[job.network]
    epochs = how.smoke_epochs if job.options.smoke else how.epochs
    draws = SMOKE_DRAWS if job.options.smoke else DRAWS
    torch.manual_seed(job.seed)
    model = how.build()
    trained = studies.train_network(
        model, data, lr=how.lr, decay=how.decay, epochs=epochs, batch_size=how.batch_size,
        seed=job.seed,
    )  # fmt: skip
    validation = answers_of(model, data, data.validation)
    test = answers_of(model, data, data.test)  # read here alone
    return {
        "network": job.network, "seed": job.seed, "dataset": data.name,
        "parameters": parameters(model), "epochs": epochs, "train_seconds": trained.seconds,
        **quality(validation, test, REJECTED, RECALLS),
        "costs": list(costs(validation, test)),
        "promises": list(promises(validation, test, how.promised, draws, job.seed)),
    }  # fmt: skip


def costs(validation: Answers, test: Answers) -> Iterator[Row]:
    """By price and way of choosing τ, which is told as a confidence, not calibrated."""
    scores, errors, _ = validation
    a, b = rejection.calibration(scores, errors)
    for price in PRICES:
        least = rejection.best_threshold(test.scores, test.errors, price)[1]
        thresholds = {
            PLAIN: float(logit(1 - price)),
            CALIBRATED: float((logit(1 - price) - b) / a),
            SWEPT: rejection.best_threshold(scores, errors, price)[0],
            LEARNT: learn_gate(scores, errors, price, TEMPERATURE).threshold.item(),
        }
        for way, threshold in thresholds.items():
            yield {
                "price": price, "way": way, "threshold": float(expit(threshold)),
                "validation": cost(validation, threshold, price),
                "test": cost(test, threshold, price), "least": least,  # in hindsight
                "rejected": 1 - rejection.at_threshold(test.scores, test.errors, threshold)[0],
            }  # fmt: skip


def promises(
    validation: Answers, test: Answers, risk: float, draws: int, seed: int
) -> Iterator[Row]:
    """By δ, which is None for no bound: what the τ of the validation answers does in test, and how
    often that of as many answers drawn from the test answers breaks its promise."""
    rng = np.random.default_rng(seed)
    scores, errors, _ = test
    drawn = [rng.integers(len(scores), size=len(validation.scores)) for _ in range(draws)]
    ways: dict[float | None, Callable[[np.ndarray, np.ndarray], float]] = {
        None: partial(rejection.lowest_threshold, risk=risk),
        DELTA: partial(rejection.promised_threshold, risk=risk, delta=DELTA),
    }
    for delta, choose in ways.items():
        threshold = choose(validation.scores, validation.errors)
        kept, rest = rejection.at_threshold(scores, errors, threshold)
        true = [rejection.at_threshold(scores, errors, choose(scores[n], errors[n])) for n in drawn]
        yield {
            "risk": risk, "delta": delta, "draws": draws,
            "rejected": 1 - kept, "rest": rest if kept else None,
            # the risk of no answers is NaN, which is not above: who is silent breaks no promise
            "broken": sum(above > risk for _, above in true),
            "rejected_in_draws": 1 - statistics.fmean(coverage for coverage, _ in true),
        }  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def by_network(rows: Rows) -> dict[str, Rows]:
    by = rows.by("network")
    return {name: by[name] for name in NETWORKS if name in by}


def percent(rows: Sequence[Row], what: str, scale: float = 100) -> list[float]:
    """A share of each row that has it, in percent unless another scale is given."""
    return [scale * row[what] for row in rows if row[what] is not None]


def parts(rows: Rows, what: str, **at: object) -> list[Row]:
    """Of each seed the costs or promises that have these values."""
    return [part for row in rows for part in row[what] if at.items() <= part.items()]


def excess(rows: Rows, way: str, split: str = "test", over: str = SWEPT,
           prices: Sequence[float] = PRICES) -> list[float]:  # fmt: skip
    """By how many percent a way costs more than another: of each seed, the mean over prices."""
    one, two = (
        np.array([[c[split] for c in parts(rows, "costs", price=p, way=w)] for p in prices])
        for w in (way, over)
    )
    return (100 * (one / two - 1)).mean(axis=0).tolist()


def broken(rows: Rows, delta: float | None) -> tuple[float, tuple[float, float]]:
    """The percentage of all seeds' draws that broke a promise, with its exact 95 % interval.

    If the chance to break it differs between the seeds, the number of broken ones spreads less than
    a binomial one of the same mean: then the interval is wider than it need be.
    """
    found = parts(rows, "promises", delta=delta)
    test = binomtest(sum(p["broken"] for p in found), sum(p["draws"] for p in found))
    low, high = test.proportion_ci(0.95, method="exact")
    return 100 * test.statistic, (100 * low, 100 * high)


def claims(rows: Rows) -> list[Claim]:
    return [
        replace(claim, claim=f"{name}: {claim.claim}")
        for name, of_one in by_network(rows).items()
        for claim in claims_about(name, of_one)
    ]


def claims_about(name: str, rows: Rows) -> Iterator[Claim]:
    over = f"in %, mean over λ = {', '.join(f'{price:g}' for price in PRICES)}"
    for split in ("validation", "test"):
        claim = f"the learnt τ costs, on the {split} images, more than the swept one, {over}: "
        claim += f"at most {MARGIN} (our bar)"
        yield studies.between(claim, None, excess(rows, LEARNT, split), high=MARGIN)
    for way, when in ((PLAIN, ""), (CALIBRATED, " after calibration")):
        claim = f"the learnt τ costs, on the test images, more than 1 − λ{when}, {over}: below 0"
        yield studies.between(claim, None, excess(rows, LEARNT, over=way), high=0)
    risk, most = f"a risk of {100 * NETWORKS[name].promised:g} %", 100 * DELTA
    claim = f"draws that break the promise of {risk}, in %: at most δ = {most:g}"
    yield studies.judged(claim, f"at most {most:g}", *broken(rows, DELTA), high=most)
    claim = f"draws that end above {risk} without a bound, in %: from {LEAST} to {MOST} "
    claim += "(our bar; a half is expected)"
    yield studies.judged(claim, None, *broken(rows, None), LEAST, MOST)
    if name == "happy":
        rest, hindsight = (mean(rows, what) for what in ("rest", "rejected_in_hindsight"))
        claim = "rejected by the τ of 1 % error on the validation images (error of the rest "
        claim += f"{rest} %; in hindsight {hindsight} %), in %: at most {REJECTED_1989:g}"
        found = percent(rows, "rejected")
        yield studies.between(claim, f"about {REJECTED_1989:g}", found, high=REJECTED_1989)
    if name == "MLP":
        within = ", in %: theirs, of one training, within the interval of one more of ours"
        for key, (what, published) in PUBLISHED_2017.items():
            yield studies.one_of(f"{what}{within}", published, percent(rows, key))
    less = rows.values("selector_aurc", 1000) - rows.values("aurc", 1000)
    claim = "AURC of the learnt selector less that of the confidence, ‰: 0 or more"
    yield studies.between(claim, "no gain", less, low=0)


def tables(rows: Rows) -> dict[str, studies.Table]:
    def spread(rows: Sequence[Row], what: str, scale: float = 100) -> str:
        return studies.mean_sd(percent(rows, what, scale))

    by = by_network(rows)
    seeds = len(by["happy"])
    draws = sum(p["draws"] for p in parts(by["happy"], "promises", delta=DELTA))
    telling, prices, promised = [], [], []
    for name, of_one in by.items():
        telling.append({
            "network": name,
            "parameters": f"{of_one.one('parameters'):,}",
            "error, validation, %": spread(of_one, "validation_error"),
            "error, test, %": spread(of_one, "error"),
            "AUROC, %": spread(of_one, "auroc"),
            "AURC, ‰": spread(of_one, "aurc", 1000),
            "selector: AURC, ‰": spread(of_one, "selector_aurc", 1000),
            "average precision for errors, %": spread(of_one, "average_precision"),
            "rejected for 1 % error, %": spread(of_one, "rejected"),
            "error of the rest, %": mean(of_one, "rest"),
            "rejected in hindsight, %": spread(of_one, "rejected_in_hindsight"),
            "training, s": f"{statistics.median(of_one.values('train_seconds')):.1f}",
        })  # fmt: skip
        for price in PRICES:
            ways = {way: parts(of_one, "costs", price=price, way=way) for way in WAYS}
            prices.append({
                "network": name,
                "λ": f"{price:g}",
                "accept all": spread(of_one, "error", 1000),
                "reject all": f"{1000 * price:g}",
                **{way: spread(found, "test", 1000) for way, found in ways.items()},
                "least, in hindsight": spread(ways[SWEPT], "least", 1000),
                **{f"{way}: τ / rejected": f"{mean(found, 'threshold', 4, 1)} / "
                   f"{mean(found, 'rejected', 1)} %" for way, found in ways.items()},
            })  # fmt: skip
        for delta in (None, DELTA):
            made = parts(of_one, "promises", delta=delta)
            share, (low, high) = broken(of_one, delta)
            risk = 100 * made[0]["risk"]
            promised.append({
                "network": name,
                "risk, %": f"{risk:g}",
                "δ, %": "no bound" if delta is None else f"{100 * delta:g}",
                "broken, % of the draws": f"{share:.2f} ({low:.2f} to {high:.2f})",
                "broken, worst seed, %": f"{max(100 * p['broken'] / p['draws'] for p in made):.2f}",
                "rejected, %": mean(made, "rejected_in_draws"),
                "validation τ in test: rejected, %": mean(made, "rejected"),
                "validation τ in test: error of the rest, %": mean(made, "rest"),
                "validation τ in test: seeds above the risk":
                    sum(rest > risk for rest in percent(made, "rest")),
            })  # fmt: skip
    return {
        f"How well the confidence tells errors, {seeds} seeds; the τ of 1 % error is that of the "
        "validation images": telling,
        "Cost of 1,000 test images, an accepted error 1, a rejection λ; τ as a confidence": prices,
        f"Promised risks: {draws:,} draws per network from the test answers; the τ of the "
        "validation images in test is no evidence for the promise, for those are harder": promised,
    }


def mean(rows: Sequence[Row], what: str, digits: int = 2, scale: float = 100) -> str:
    values = percent(rows, what, scale)
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


def picture(rows: Rows) -> figures.Figure:
    by = by_network(rows)

    def above(of_one: Rows, price: float, way: str) -> figures.Point:
        values = excess(of_one, way, prices=[price])
        (low, high), middle = studies.interval(values), statistics.fmean(values)
        return f"{price:g}", middle, (middle - low, high - middle)  # words: side by side

    def curves(shares: Sequence[float], what: str) -> dict[str, list[figures.Point]]:
        return {name: [figures.point(100 * share, [100 * row[what][k] for row in of_one])
                       for k, share in enumerate(shares)]
                for name, of_one in by.items()}  # fmt: skip

    def above_risk(delta: float | None) -> Iterator[figures.Point]:
        for name, of_one in by.items():
            share, (low, high) = broken(of_one, delta)
            yield f"{name}: {100 * NETWORKS[name].promised:g} %", share, (share - low, high - share)

    risks = curves(REJECTED, "risk_curve")
    risks["LeCun et al. 1989, zip codes"] = [(REJECTED_1989, 1.0, 0.0)]
    panels = [
        figures.Panel(
            f"{name}, in test; bar: 95 % interval", "price of a rejection, λ",
            "cost above that of the swept τ, %",
            {way: [above(of_one, p, way) for p in PRICES] for way in WAYS if way != SWEPT},
            levels={SWEPT: 0},
        )
        for name, of_one in by.items()
    ] + [
        figures.Panel("Errors left when the least sure are rejected", "rejected, %",
                      "error of the rest, %", risks, levels={"1 %": 1}),
        figures.Panel("Errors found among the least sure", "share of all errors that is found, %",
                      "errors among those looked at, %", curves(RECALLS, "precision_curve")),
        figures.Panel(
            "A promised risk; bar: 95 % interval", "network and risk", "draws above the risk, %",
            {"no bound": [*above_risk(None)], "with the bound": [*above_risk(DELTA)]},
            log="y", levels={f"δ = {100 * DELTA:g} %": 100 * DELTA},
        ),
    ]  # fmt: skip
    dataset, seeds = rows.one("dataset").replace("mnist", "MNIST"), len(by["happy"])
    title = f"Thresholds on the confidence of three networks: {dataset}, {seeds} seeds; "
    return figures.side_by_side(panels, title + "bars: standard deviation but where they say else")


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
