"""When should a network keep silent? Thresholds on its confidence: learnt, swept, promised.

    python experiments/threshold.py               # MNIST, 3 networks × 10 seeds
    python experiments/threshold.py --smoke       # the embedded digits, seconds

What is compared, and what came out: results/threshold/README.md.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.models.counting import parameters
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.studies.answers import WAYS, answers_of, costs, promises, quality

PLAIN, CALIBRATED, SWEPT, LEARNT = WAYS
PRICES = (0.01, 0.03, 0.1, 0.3)
TEMPERATURE = 0.25
MARGIN = 5  # percent that the learnt τ may cost more than the swept one
DELTA = 0.05
LEAST, MOST = 40, 60  # percent of the draws that may end above the risk without a bound
DRAWS = (2_000, 20)  # of each network and seed; of a smoke test
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
    epochs: tuple[int, int]  # of a full run, of a smoke test
    batch_size: int
    lr: float
    decay: float
    promised: float  # a risk


NETWORKS = {
    "happy": Network(happy, (20, 30), 32, 1e-2, 0.03, 0.02),
    "MLP": Network(lambda: MLP((784, 256, 256, 256, 10)), (10, 3), 128, 3e-3, 0.3, 0.01),
    "CNN": Network(CNN, (4, 2), 128, 6e-3, 0.1, 0.005),
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


def train(job: Job) -> Row:
    """One network, trained; its thresholds, chosen on validation answers; what they do in test."""
    data, how = studies.load_data(job.options), NETWORKS[job.network]
    epochs, draws = how.epochs[job.options.smoke], DRAWS[job.options.smoke]
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
        "costs": list(costs(validation, test, PRICES, TEMPERATURE)),
        "promises": list(promises(validation, test, how.promised, DELTA, draws, job.seed)),
    }  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def by_network(rows: Rows) -> dict[str, Rows]:
    return {name: of for name in NETWORKS if (of := rows.where(network=name))}


def parts(rows: Rows, what: str, **at: object) -> Rows:
    """Of each seed the costs or promises that have these values."""
    return Rows({"seed": row["seed"], **part} for row in rows for part in row[what]).where(**at)


def excess(rows: Rows, way: str, split: str = "test", over: str = SWEPT,
           prices: Sequence[float] = PRICES) -> np.ndarray:  # fmt: skip
    """By how many percent a way costs more than another: of each seed, the mean over prices."""
    one, two = (
        np.array([parts(rows, "costs", price=price, way=w).values(split) for price in prices])
        for w in (way, over)
    )
    return (100 * (one / two - 1)).mean(axis=0)


def broken(rows: Rows, delta: float | None) -> tuple[float, tuple[float, float]]:
    """The percentage of all seeds' draws that broke a promise, with its exact 95 % interval.

    If the chance to break it differs between the seeds, the number of broken ones spreads less than
    a binomial one of the same mean: then the interval is wider than it need be.
    """
    found = parts(rows, "promises", delta=delta)
    test = binomtest(sum(p["broken"] for p in found), sum(p["draws"] for p in found))
    low, high = test.proportion_ci(0.95, method="exact")
    return 100 * test.statistic, (100 * low, 100 * high)


def mean(rows: Rows, what: str, digits: int = 2, scale: float = 100) -> str:
    """Of the rows that have it: who rejects all has no error of the rest."""
    values = [scale * row[what] for row in rows if row[what] is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


def claims(rows: Rows) -> list[Claim]:
    return [
        replace(claim, claim=f"{name}: {claim.claim}")
        for name, of in by_network(rows).items()
        for claim in claims_about(name, of)
    ]


def claims_about(name: str, rows: Rows) -> Iterator[Claim]:
    over = f"in %, mean over λ = {', '.join(f'{price:g}' for price in PRICES)}"
    for split, way, named, bar, high in (
        ("validation", SWEPT, "the swept one", f"at most {MARGIN} (our bar)", MARGIN),
        ("test", SWEPT, "the swept one", f"at most {MARGIN} (our bar)", MARGIN),
        ("test", PLAIN, "1 − λ", "below 0", 0),
        ("test", CALIBRATED, "1 − λ after calibration", "below 0", 0),
    ):
        claim = f"the learnt τ costs, on the {split} images, more than {named}, {over}: {bar}"
        yield studies.between(claim, None, excess(rows, LEARNT, split, way), high=high)
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
        found = rows.values("rejected", 100)
        yield studies.between(claim, f"about {REJECTED_1989:g}", found, high=REJECTED_1989)
    if name == "MLP":
        within = ", in %: theirs, of one training, within the interval of one more of ours"
        for key, (what, published) in PUBLISHED_2017.items():
            yield studies.one_of(f"{what}{within}", published, rows.values(key, 100))
    less = rows.values("selector_aurc", 1000) - rows.values("aurc", 1000)
    claim = "AURC of the learnt selector less that of the confidence, ‰: 0 or more"
    yield studies.between(claim, "no gain", less, low=0)


def tables(rows: Rows) -> dict[str, studies.Table]:
    def spread(rows: Rows, what: str, scale: float = 100) -> str:
        return studies.mean_sd(rows.values(what, scale))

    by = by_network(rows)
    seeds = len(by["happy"])
    draws = sum(p["draws"] for p in parts(by["happy"], "promises", delta=DELTA))
    telling, prices, promised = [], [], []
    for name, of in by.items():
        telling.append({
            "network": name,
            "parameters": f"{of.one('parameters'):,}",
            "error, validation, %": spread(of, "validation_error"),
            "error, test, %": spread(of, "error"),
            "AUROC, %": spread(of, "auroc"),
            "AURC, ‰": spread(of, "aurc", 1000),
            "selector: AURC, ‰": spread(of, "selector_aurc", 1000),
            "average precision for errors, %": spread(of, "average_precision"),
            "rejected for 1 % error, %": spread(of, "rejected"),
            "error of the rest, %": mean(of, "rest"),
            "rejected in hindsight, %": spread(of, "rejected_in_hindsight"),
            "training, s": f"{statistics.median(of.values('train_seconds')):.1f}",
        })  # fmt: skip
        for price in PRICES:
            ways = {way: parts(of, "costs", price=price, way=way) for way in WAYS}
            prices.append({
                "network": name,
                "λ": f"{price:g}",
                "accept all": spread(of, "error", 1000),
                "reject all": f"{1000 * price:g}",
                **{way: spread(found, "test", 1000) for way, found in ways.items()},
                "least, in hindsight": spread(ways[SWEPT], "least", 1000),
                **{f"{way}: τ / rejected":
                   f"{mean(found, 'threshold', 4, 1)} / {mean(found, 'rejected', 1)} %"
                   for way, found in ways.items()},
            })  # fmt: skip
        for delta in (None, DELTA):
            made = parts(of, "promises", delta=delta)
            share, (low, high) = broken(of, delta)
            risk = made.one("risk")
            promised.append({
                "network": name,
                "risk, %": f"{100 * risk:g}",
                "δ, %": "no bound" if delta is None else f"{100 * delta:g}",
                "broken, % of the draws": f"{share:.2f} ({low:.2f} to {high:.2f})",
                "broken, worst seed, %": f"{max(100 * p['broken'] / p['draws'] for p in made):.2f}",
                "rejected, %": mean(made, "rejected_in_draws"),
                "validation τ in test: rejected, %": mean(made, "rejected"),
                "validation τ in test: error of the rest, %": mean(made, "rest"),
                "validation τ in test: seeds above the risk":
                    sum(p["rest"] is not None and p["rest"] > risk for p in made),
            })  # fmt: skip
    return {
        f"How well the confidence tells errors, {seeds} seeds; the τ of 1 % error is that of the "
        "validation images": telling,
        "Cost of 1,000 test images, an accepted error 1, a rejection λ; τ as a confidence": prices,
        f"Promised risks: {draws:,} draws per network from the test answers; the τ of the "
        "validation images in test is no evidence for the promise, for those are harder": promised,
    }


def picture(rows: Rows) -> figures.Figure:
    by = by_network(rows)

    def bar(x: str, middle: float, ends: tuple[float, float]) -> figures.Point:
        return x, middle, (middle - ends[0], ends[1] - middle)  # words stand side by side

    def above(of: Rows, price: float, way: str) -> figures.Point:
        values = excess(of, way, prices=[price])
        return bar(f"{price:g}", statistics.fmean(values), studies.interval(values))

    def above_risk(delta: float | None) -> list[figures.Point]:
        return [bar(f"{name}: {100 * NETWORKS[name].promised:g} %", *broken(of, delta))
                for name, of in by.items()]  # fmt: skip

    def curves(shares: Sequence[float], what: str) -> dict[str, list[figures.Point]]:
        return {name: [figures.point(100 * share, [100 * row[what][k] for row in of])
                       for k, share in enumerate(shares)]
                for name, of in by.items()}  # fmt: skip

    risks = curves(REJECTED, "risk_curve")
    risks["LeCun et al. 1989, zip codes"] = [(REJECTED_1989, 1.0, 0.0)]
    panels = [
        figures.Panel(f"{name}, in test; bar: 95 % interval", "price of a rejection, λ",
                      "cost above that of the swept τ, %",
                      {way: [above(of, p, way) for p in PRICES] for way in WAYS if way != SWEPT},
                      levels={SWEPT: 0})
        for name, of in by.items()
    ] + [
        figures.Panel("Errors left when the least sure are rejected", "rejected, %",
                      "error of the rest, %", risks, levels={"1 %": 1}),
        figures.Panel("Errors found among the least sure", "share of all errors that is found, %",
                      "errors among those looked at, %", curves(RECALLS, "precision_curve")),
        figures.Panel("A promised risk; bar: 95 % interval", "network and risk",
                      "draws above the risk, %",
                      {"no bound": above_risk(None), "with the bound": above_risk(DELTA)},
                      log="y", levels={f"δ = {100 * DELTA:g} %": 100 * DELTA}),
    ]  # fmt: skip
    dataset, seeds = rows.one("dataset").replace("mnist", "MNIST"), len(by["happy"])
    title = f"Thresholds on the confidence of three networks: {dataset}, {seeds} seeds; "
    return figures.side_by_side(panels, title + "bars: standard deviation but where they say else")


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
