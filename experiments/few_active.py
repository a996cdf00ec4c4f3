"""Few active units: a small cost in accuracy, much robustness to noise?

    python experiments/few_active.py              # MNIST, 25 networks, 6 seeds
    python experiments/few_active.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/few_active/README.md.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from nn_backprop import figures, studies
from nn_backprop.data import subset
from nn_backprop.layers import KWinners, decay_boosts
from nn_backprop.models import ActivityPenalty, dense_cnn, sparse_cnn, sparse_mlp
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.studies.robustness import activity, order_of_pixels, under_noise

RELU, PRICE, WINNERS, UNBOOSTED = "ReLU", "ReLU, L1 price", "k winners", "k winners, no boost"
DENSE = "ReLU, 30/30/1000"  # Dense CNN-2
MLP, CNN, PAPER = "MLP", "CNN", "the paper's CNN"
LEVELS = [k / 20 for k in range(11)]
SEARCHED = 2  # seeds that try every rate
BATCH = 128
SIZES = {CNN: ((8, 16), 128), PAPER: ((32, 64), 700)}  # maps, hidden units
BARS = {  # a name, its scale; published of Sparse CNN-2 and of W1, less Dense CNN-2; our bar
    "test_accuracy": ("test accuracy, in points", 100, "−0.22", "−1.11", -0.44),
    "noise_score": ("noise score, in thousands", 1e-3, "+6.724", "+3.282", 3.362),
}
PUBLISHED = {  # accuracy, score
    DENSE: ("99.31 ± 0.06", "97.04 ± 2.85"),
    WINNERS: ("99.09 ± 0.05 (30 % of weights), 98.20 ± 0.19 (all)",
              "103.76 ± 1.13 (30 % of weights), 100.32 ± 2.08 (all)"),
}  # fmt: skip
ACCURACY, NOISE = "validation_accuracy", "validation_noise_score"  # by which rates are chosen
By = dict["Contestant", Rows]
BEST = {ACCURACY: "accuracy", NOISE: "validation noise"}


class Plan(NamedTuple):
    """What is trained of a network, and how."""

    n: int  # training examples
    epochs: int
    shares: tuple[float, ...]  # of each hidden layer's units, the standard share of winners
    amounts: Mapping[str, tuple[float, ...]]  # of each way
    lrs: tuple[float, ...]


PAPER_SHARES = (400 / 4608, 300 / 1024, 100 / 700)
PLANS = {  # the longest trainings first
    PAPER: Plan(30_000, 4, PAPER_SHARES, {RELU: (0,), DENSE: (0,), WINNERS: (1,)},
                (1e-3, 2e-3, 5e-3, 1e-2)),
    CNN: Plan(10_000, 10, PAPER_SHARES, {RELU: (0,), PRICE: (0.1, 0.3, 1),
                                         WINNERS: (0.25, 0.5, 1, 2), UNBOOSTED: (0.25, 1)},
              (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
    MLP: Plan(55_000, 6, (1 / 8,), {RELU: (0,), PRICE: (0.01, 0.03, 0.1, 1),
                                    WINNERS: (0.25, 0.5, 1, 2, 4), UNBOOSTED: (0.25, 1)},
              (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
}  # fmt: skip
SMOKE = {  # few examples, and only what the claims need
    PAPER: PLANS[PAPER]._replace(n=300, epochs=2, lrs=(5e-3,)),
    CNN: PLANS[CNN]._replace(n=300, epochs=4, lrs=(2e-2,), amounts={
        RELU: (0,), PRICE: (0.3,), WINNERS: (0.25, 1, 2), UNBOOSTED: (0.25, 1)}),
    MLP: PLANS[MLP]._replace(n=1_000, epochs=5, lrs=(4e-3, 8e-3), amounts={
        RELU: (0,), PRICE: (0.01, 0.03), WINNERS: (0.25, 1, 4), UNBOOSTED: (0.25, 1)}),
}  # fmt: skip


@dataclass(frozen=True)
class Options(studies.Options):
    """Networks in which few units are active: accuracy, and what noise leaves of it."""

    seeds: int = 6
    """Number of seeds, from 0."""


class Contestant(NamedTuple):
    """One network."""

    network: str
    way: str
    amount: float  # of winners, times the standard share; of the price; 0 for a plain ReLU


class Job(NamedTuple):
    """One training."""

    contestant: Contestant
    lr: float
    seed: int
    options: Options


def contestants(plans: Mapping[str, Plan]) -> list[Contestant]:
    return [Contestant(network, way, amount) for network, plan in plans.items()
            for way, amounts in plan.amounts.items() for amount in amounts]  # fmt: skip


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    plans = SMOKE if options.smoke else PLANS
    everyone = contestants(plans)

    def train_at(rates: Mapping[Contestant, Iterable[float]], seeds: range) -> Rows:
        jobs = [Job(of, lr, seed, options) for seed in seeds for of in rates for lr in rates[of]]
        return run.train_all(train, jobs, tag)

    searching = {of: plans[of.network].lrs for of in everyone if of.way != UNBOOSTED}
    tried = train_at(searching, range(SEARCHED))
    accurate, noisy = (best_rates(tried, score) for score in BEST)
    both = {of: dict.fromkeys((accurate[of], noisy.get(of, accurate[of]))) for of in everyone}
    train_at({of: both[of] for of in everyone if of.way == UNBOOSTED}, range(SEARCHED))
    train_at(both, range(SEARCHED, options.seeds))


def tag(row: Row) -> dict[str, float]:
    of = f"{row['network']}, {row['way']}, {row['amount']:g}"
    return {f"validation/{of}": row["validation_accuracy"], f"noise score/{of}": row["noise_score"]}


def build(contestant: Contestant) -> nn.Module:
    """The network. With the same torch seed, those of one shape start from the same weights."""
    network, way, amount = contestant
    if way == DENSE:
        return dense_cnn()
    dense = way in (RELU, PRICE)
    shares = [(1 if dense else amount) * share for share in PLANS[network].shares]
    boost, size = 0.0 if way == UNBOOSTED else 1.5, SIZES.get(network)
    model = sparse_cnn(*size, shares, boost) if size else sparse_mlp(128, shares[0], boost)
    if dense:
        for name, layer in model.named_children():
            if isinstance(layer, KWinners):
                setattr(model, name, nn.ReLU())
    return ActivityPenalty(model, amount) if way == PRICE else model


def train(job: Job) -> Row:
    """One network, trained and tested; accuracies and shares from 0 to 1."""
    contestant, lr, seed, options = job
    plan = (SMOKE if options.smoke else PLANS)[contestant.network]
    whole = studies.load_data(options)
    if options.smoke:
        whole = replace(whole, validation=whole.validation[:150], test=whole.test[:150])
    data = subset(whole, plan.n, seed)
    torch.manual_seed(seed)
    model = build(contestant)
    trained = studies.train_network(
        model, data, lr=lr, epochs=plan.epochs, batch_size=BATCH, seed=seed,
        on_epoch=lambda steps, epochs: decay_boosts(model),
    )  # fmt: skip
    active, dead, units = activity(model, data, data.validation)
    sizes = len(data.validation), len(data.test)
    orders = order_of_pixels(sum(sizes), whole.images.shape[-1], seed).split(sizes)
    white = round(255 * (whole.mean + 2 * whole.std))
    validated = under_noise(model, data, data.validation, LEVELS, orders[0], white)
    # The test images are read here alone.
    right = under_noise(model, data, data.test, LEVELS, orders[1], white)
    return {
        **contestant._asdict(), "lr": lr, "seed": seed, "dataset": data.name,
        "n": plan.n, "epochs": plan.epochs, "validation_accuracy": validated[0],
        "validation_noise_score": 10_000 * sum(validated),  # in the unit of the noise score
        "active": fmean(active), "active_by_layer": active, "dead": dead, "units": units,
        "test_accuracy": right[0],
        "noise_score": 10_000 * sum(right),  # with as many test images, the number of right answers
        **{f"test {level:g}": share for level, share in zip(LEVELS, right, strict=True)},
        "seconds": trained.seconds,
    }  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def by_contestant(rows: Rows) -> By:
    """Sorted: by network and way, from the least amount to the largest."""
    by = {Contestant(*at): found for at, found in rows.by(*Contestant._fields).items()}
    return {of: by[of] for of in sorted(by)}


def searched(rows: Rows) -> Rows:
    """Those of the seeds that try every rate."""
    return Rows(row for row in rows if row["seed"] < SEARCHED and row["way"] != UNBOOSTED)


def best_rates(rows: Rows, score: str) -> dict[Contestant, float]:
    """Who competes with rates chosen by the score, and the one of the best mean.

    By accuracy all do, winners without a boost at the rate of their boosted twins.
    """
    best = searched(rows).best(Contestant._fields, ("lr",), score)
    rates = {of: found.one("lr") for of, found in by_contestant(best).items()}
    if score == NOISE:
        return {of: lr for of, lr in rates.items() if of.way != WINNERS or of.amount == 1}
    return rates | {of._replace(way=UNBOOSTED): rates[of] for of in rates if of.way == WINNERS}


def at_best(rows: Rows, score: str) -> By:
    rates = best_rates(rows, score)
    return {of: found.where(lr=rates[of]) for of, found in by_contestant(rows).items()
            if of in rates}  # fmt: skip


def difference(by: By, one: Contestant, other: Contestant, what: str = "noise_score",
               scale: float = 1e-3) -> np.ndarray:  # fmt: skip
    """one − other, of each seed."""
    return by[one].values(what, scale) - by[other].values(what, scale)


def amounts(by: By, network: str, way: str) -> list[Contestant]:
    return [contestant for contestant in by if contestant[:2] == (network, way)]


def nearest(by: By, network: str) -> Contestant:
    """The priced network whose active share is nearest, in proportion, to the standard winners'."""
    wanted = fmean(by[Contestant(network, WINNERS, 1)].values("active"))
    shares = {price: fmean(by[price].values("active")) for price in amounts(by, network, PRICE)}
    return min(shares, key=lambda price: max(shares[price] / wanted, wanted / shares[price]))


def claims(rows: Rows) -> list[Claim]:
    by, robust = at_best(rows, ACCURACY), at_best(rows, NOISE)
    made, between = list[Claim](), studies.between
    for network in PLANS:
        dense, standard = Contestant(network, RELU, 0), Contestant(network, WINNERS, 1)
        accurate, noisy = (f"{network}, each at the rate best for {best}" for best in BEST.values())
        rivals = [dense, dense._replace(way=DENSE)] if network == PAPER else [dense]
        held = [(at, where, rival, what) for at, where in ((by, accurate), (robust, noisy))
                for rival in rivals for what in BARS]  # fmt: skip
        for at, where, rival, what in held:
            name, scale, published, all_weights, low = BARS[what]
            bar = f"{low:g}".replace("-", "−")
            claim = f"{where}: {name}, k winners less {rival.way}: {bar} or more (our bar)"
            paper = f"{published} (CNN-2)"
            if rival.way == DENSE:
                paper = f"{published} (30 % of weights), {all_weights} (all)"
            made.append(between(claim, paper, difference(at, standard, rival, what, scale), low))
        claim = f"{accurate}: active units, in points, k winners less ReLU: below 0"
        fewer = difference(by, standard, dense, "active", 100)
        made.append(between(claim, None, fewer, high=-1e-9))
        if network == PAPER:
            continue
        price, other_price = nearest(by, network), nearest(robust, network)
        plain = standard._replace(way=UNBOOSTED)
        fewest, *_, most = amounts(by, network, WINNERS)
        for at, where, one, other, ours, theirs in (
            (by, accurate, price, dense, active(by, price), "ReLUs"),
            (by, accurate, standard, price, active(by, standard), active(by, price)),
            (robust, noisy, standard, other_price,
             active(robust, standard), active(robust, other_price)),
            (by, accurate, fewest, most, active(by, fewest), active(by, most)),
            (by, network, standard, plain, "k winners with a boost", "without, at the same rate"),
        ):  # fmt: skip
            claim = f"{where}: {ours} have a higher noise score than {theirs}, in thousands, by"
            made.append(between(claim, None, difference(at, one, other), low=0))
        saved = difference(by, fewest._replace(way=UNBOOSTED), fewest, "dead", 1)
        claim = f"{network}: of × {fewest.amount:g} winners a boost leaves fewer units dead, by"
        made.append(between(claim, None, saved, low=1e-9))
    return made


def active(by: By, contestant: Contestant) -> str:
    amount = f"{contestant.amount:g}"
    name = f"× {amount} winners" if contestant.way == WINNERS else f"ReLUs with L1 {amount}"
    return f"{name} ({fmean(by[contestant].values('active', 100)):.0f} % active)"


def tables(rows: Rows) -> dict[str, studies.Table]:
    made, spread, tried = dict[str, list[Row]](), studies.mean_sd, searched(rows)
    for score, best in BEST.items():
        for (network, way, amount), found in at_best(rows, score).items():
            lr, lrs = found.one("lr"), sorted(tried.where(network=network).by("lr"))
            layers = zip(*(row["active_by_layer"] for row in found), strict=True)
            shares = "/".join(f"{100 * fmean(layer):.0f}" for layer in layers)
            line = {
                "after the hidden layers": way,
                "times the standard share; weight": f"{amount:g}",
                "rate": f"{lr:g}" + (" (edge)" if lr in (lrs[0], lrs[-1]) else ""),
                "active in evaluation, %": f"{spread(found.values('active', 100))} ({shares})",
                "dead units": f"{spread(found.values('dead'))} of {found.one('units')}",
                "test accuracy, %": spread(found.values("test_accuracy", 100)),
                "at noise 0.2": spread(found.values("test 0.2", 100)),
                "at noise 0.5": spread(found.values("test 0.5", 100)),
                "noise score, thousands": spread(found.values("noise_score", 1e-3)),
            }
            if network == PAPER:
                columns = "published accuracy, %", "published score"
                line |= zip(columns, PUBLISHED.get(way, ("–", "–")), strict=True)
            title = f"{network}, each at the rate best for {best}, of "
            title += f"{', '.join(f'{lr:g}' for lr in lrs)}; {found.one('n'):,} training examples, "
            title += f"{found.one('epochs')} epochs, {len(found)} seeds; standard share of "
            title += f"winners: {', '.join(f'{100 * x:.1f}' for x in PLANS[network].shares)} %"
            made.setdefault(title, []).append(line)
    for (network, way, amount), found in by_contestant(tried).items():
        title = f"{network} at each rate, {SEARCHED} seeds: "
        title += "accuracy, %; noise score, thousands; both of validation images"
        line, gain = {}, {}
        dense = tried.where(network=network, way=RELU).by("lr")
        for lr, at in sorted(found.by("lr").items()):
            accuracy, noise = at.values(ACCURACY, 100), at.values(NOISE, 1e-3)
            line[f"rate {lr:g}"] = f"{fmean(accuracy):.2f}; {fmean(noise):.2f}"
            gain[f"rate {lr:g}"] = spread(noise - dense[lr].values(NOISE, 1e-3), "+")
        less = "k winners: noise score less that of ReLU"
        for name, cells in ((way, line), (less, gain))[: 1 + ((way, amount) == (WINNERS, 1))]:
            about = {"after the hidden layers": name, "times; weight": amount}
            made.setdefault(title, []).append(about | cells)
    return dict(made)


def picture(rows: Rows) -> figures.Figure:
    by, parts = at_best(rows, ACCURACY), []
    for network in (MLP, CNN):
        for what, scale, label in (
            ("test_accuracy", 100, "test accuracy, %"),
            ("noise_score", 1e-3, "noise score, thousands of 110"),
        ):
            lines = {
                way: [figures.point(fmean(by[of].values("active", 100)), by[of].values(what, scale))
                      for of in amounts(by, network, way)]
                for way in (RELU, PRICE, WINNERS, UNBOOSTED)
            }  # fmt: skip
            axes = "active units, %, logarithmic", label
            parts.append(figures.Panel(f"{network}: {label.split(',')[0]}", *axes, lines, "x"))
        price = nearest(by, network)
        lines = {
            of.way: [figures.point(x, by[of].values(f"test {x:g}", 100)) for x in LEVELS]
            for of in (Contestant(network, RELU, 0), price, Contestant(network, WINNERS, 1))
        }
        title = f"{network}: winners × 1, L1 price {price.amount:g}, ReLU"
        parts.append(figures.Panel(title, "share of pixels made white", "test accuracy, %", lines))
    title = f"Few active units and noise, {rows.one('dataset').upper()}, each at the rate best "
    title += "for accuracy: mean ± standard deviation over seeds"
    return figures.side_by_side(parts, title)


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
