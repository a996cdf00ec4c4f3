"""Few active units: a small cost in accuracy, much robustness to noise?

    python experiments/few_active.py              # MNIST, 24 networks, 6 seeds
    python experiments/few_active.py --smoke      # the embedded digits, seconds

**The claim.** Ahmad & Scheinkman 2019, How can we be so dense?, table 1, MNIST, ten seeds: a CNN of
whose three hidden layers only the k largest activations stay (Sparse CNN-2) has 99.09 ± 0.05 %
right and a noise score of 103,764 ± 1,125; one with ReLUs (Dense CNN-2) 99.31 ± 0.06 % and 97,040 ±
2,853. So few active units cost 0.22 points and gain 6,724 answers of 110,000. The two differ in
more than that: in the number of units, in the weights of the third layer, of which the sparse one
has 30 %, and, by the code (numenta/htmpapers), in learning rate, momentum, epochs and the size of
the first epoch's batches. For the sparse one with all its weights, and momentum (Sparse CNN-2 W1),
the table has 98.20 ± 0.19 % and 100,322 ± 2,082.

**The noise score** is the number of right answers on the 10,000 test images at eleven levels, 0,
0.05, … 0.5. At level ν, int(784 ν) pixels of each image, drawn at random, become white, which is
the mean plus twice the standard deviation of the training pixels: 190 of 255. So does the authors'
code, although its comment says that each pixel becomes white with that probability. Here the seed
gives the pixels of each image an order, and the first int(784 ν) are taken: every network of a seed
meets the same noise, and a higher level adds to a lower one.

**The contest.** In a 784-128-10 and in a small CNN (8 and 16 maps, 128 units) nothing differs but
what follows the hidden layers: ReLUs; ReLUs with a price on their mean activity, at several weights
(L1); k winners; k winners chosen without a boost. k runs from a quarter of a standard share
upwards: 1/8 for the MLP, and for the CNN those of the paper's three layers, 8.7, 29.3 and 14.3 %.
In evaluation 1.5 k win, as in the paper. The third pair has the paper's sizes, but all weights, one
optimizer for both, and few epochs.

How many units are active is measured on the validation images: the share of a layer's outputs that
is not 0, and the mean over the layers. A unit that is never active there counts as dead; all places
of a map are one unit. The L1 network that is held against the standard winners is the one whose
active share is nearest to theirs.

**The rates** of the first two networks are chosen for each contestant, as if no one knew of noise:
three or four are tried with two seeds, and the one with the best mean accuracy on the validation
images is the only one for the other seeds. What the others would have meant for the noise score is
in tables of their own. The third pair has one rate: of 0.001, 0.002, 0.005 and 0.01, in two epochs
of 20,000 examples, the one that was best on validation images for either. The test images are read
once for each training, at its end. "Small" and "much" are bars of our own, set before the first
full run: at most twice the published cost, at least half of the published gain.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nn_backprop import figures, study
from nn_backprop.data import ImageData, load, subset
from nn_backprop.engines import autograd
from nn_backprop.evidence import Claim, between, differences, spread, tuned
from nn_backprop.layers import KWinners, decay_boosts
from nn_backprop.models import ActivityPenalty, dense_cnn, sparse_cnn, sparse_mlp
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch

RELU, PRICE, WINNERS, UNBOOSTED = "ReLU", "ReLU, L1 price", "k winners", "k winners, no boost"
MLP, CNN, PAPER = "MLP", "CNN", "the paper's CNN"
LEVELS = [k / 20 for k in range(11)]
SEARCHED = 2  # seeds that try every rate
BATCH = 128
CHANNELS, HIDDEN = (8, 16), 128
PUBLISHED = {RELU: ("99.31 ± 0.06", "97,040 ± 2,853"), WINNERS: ("99.09 ± 0.05", "103,764 ± 1,125")}
COST, GAIN = 0.22, 6_724  # of Sparse CNN-2 against Dense CNN-2: points; right answers


class Plan(NamedTuple):
    """What is trained of a network, and how."""

    n: int  # training examples
    epochs: int
    shares: tuple[float, ...]  # of each hidden layer's units, the standard share of winners
    times: tuple[float, ...]  # the shares that are tried, in terms of these
    unboosted: tuple[float, ...]  # of them, those that are tried without a boost, too
    prices: tuple[float, ...]  # on activity
    lrs: tuple[float, ...]


PAPER_SHARES = (400 / 4608, 300 / 1024, 100 / 700)
PLANS = {
    PAPER: Plan(55_000, 4, PAPER_SHARES, (1,), (), (), (5e-3,)),  # the longest first
    CNN: Plan(
        10_000, 10, PAPER_SHARES, (0.25, 0.5, 1, 2), (0.25, 1), (0.1, 0.3, 1), (5e-3, 1e-2, 2e-2)
    ),
    MLP: Plan(
        55_000, 6, (1 / 8,), (0.25, 0.5, 1, 2, 4), (0.25, 1), (0.01, 0.03, 0.1, 1),
        (2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Networks in which few units are active: accuracy, and what noise leaves of it."""

    seeds: int = 6
    """Number of seeds, from 0; at least 2."""


class Contestant(NamedTuple):
    """One network."""

    network: str
    way: str
    amount: float  # of winners, times the standard share; of the price; 0 for a plain ReLU


KEYS = Contestant._fields
By = Mapping[Contestant, Sequence[study.Row]]  # in the order of the seeds


class Job(NamedTuple):
    """One training."""

    contestant: Contestant
    lr: float
    seed: int
    options: Options


def plan_of(network: str, smoke: bool) -> Plan:
    """The plan; a smoke test takes fewer examples and only what the claims need."""
    plan = PLANS[network]
    if not smoke:
        return plan
    few = {PAPER: (300, 2), CNN: (300, 6), MLP: (1_000, 5)}
    n, epochs = few[network]
    middle = plan.lrs[len(plan.lrs) // 2]
    times = tuple(dict.fromkeys((plan.times[0], 1, plan.times[-1])))
    return plan._replace(n=n, epochs=epochs, times=times, prices=plan.prices[:2], lrs=(middle,))


def contestants(smoke: bool) -> list[Contestant]:
    found = []
    for network in PLANS:
        plan = plan_of(network, smoke)
        found += [
            Contestant(network, way, amount)
            for way, amounts in (
                (RELU, (0,)), (PRICE, plan.prices), (WINNERS, plan.times),
                (UNBOOSTED, plan.unboosted),
            )
            for amount in amounts
        ]  # fmt: skip
    return found


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here

    def trained(rates: Mapping[Contestant, Sequence[float]], seeds: range) -> list[study.Row]:
        jobs = [
            Job(contestant, lr, seed, options)
            for seed in seeds
            for contestant, lrs in rates.items()
            for lr in lrs
        ]
        return under_way.carry_out(train, jobs, _tag)

    rates = {of: plan_of(of.network, options.smoke).lrs for of in contestants(options.smoke)}
    tried = trained(rates, range(SEARCHED))
    rows = tuned(tried, KEYS, ("lr",), "validation_accuracy")
    best = {contestant: (of[0]["lr"],) for contestant, of in by_contestant(rows).items()}
    by = by_contestant(rows + trained(best, range(SEARCHED, options.seeds)))
    claims = _claims(by)
    if options.smoke:
        claims = [replace(claim, claim=f"{claim.claim} (smoke: not MNIST)") for claim in claims]
    under_way.finish({**_tables(by), **_rates(by_contestant(tried))}, claims, _picture(by))


def by_contestant(rows: Sequence[study.Row]) -> dict[Contestant, list[study.Row]]:
    by: dict[Contestant, list[study.Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by.setdefault(Contestant(*(row[key] for key in KEYS)), []).append(row)
    return by


def _tag(row: study.Row) -> dict[str, float]:
    of = f"{row['network']}, {row['way']}, {row['amount']:g}"
    return {f"validation/{of}": row["validation_accuracy"], f"noise score/{of}": row["noise_score"]}


# --- One training -------------------------------------------------------------------------------


def build(contestant: Contestant) -> nn.Module:
    """The network. Of one seed of torch, all of one shape begin with the same weights."""
    network, way, amount = contestant
    dense = way in (RELU, PRICE)
    boost = 0.0 if way == UNBOOSTED else 1.5
    shares = [amount * share for share in PLANS[network].shares]
    if network == MLP:
        model = sparse_mlp(HIDDEN, 0.5 if dense else shares[0], boost)
        if dense:
            model.active = nn.ReLU()
    elif network == CNN:
        model = (
            dense_cnn(CHANNELS, HIDDEN) if dense else sparse_cnn(CHANNELS, HIDDEN, shares, boost)
        )
    else:
        model = dense_cnn() if dense else sparse_cnn()
    return ActivityPenalty(model, amount) if way == PRICE else model


def train(job: Job) -> study.Row:
    """One network, trained and tested; accuracies and shares from 0 to 1."""
    contestant, lr, seed, options = job
    plan = plan_of(contestant.network, options.smoke)
    whole = _data(options)
    data = subset(whole, plan.n, seed)
    torch.manual_seed(seed)
    model = build(contestant)
    optimizer = make_optimizer("adam", model.parameters(), lr, 0.0)
    steps = plan.epochs * steps_per_epoch(plan.n, BATCH)
    schedule = make_schedule("one-cycle", optimizer, lr, steps)
    began = time.perf_counter()
    fit(model, autograd, optimizer, schedule, data, epochs=plan.epochs, batch_size=BATCH, seed=seed,
        on_epoch=lambda steps, epochs: decay_boosts(model))  # fmt: skip
    seconds = time.perf_counter() - began
    active, dead, units = activity(model, data, data.validation)
    order = _order(len(data.test), whole.images.shape[-1], seed)
    white = round(255 * (whole.mean + 2 * whole.std))
    right = under_noise(model, data, data.test, order, white)  # the test images, here alone
    return {
        **contestant._asdict(),
        "lr": lr,
        "seed": seed,
        "dataset": data.name,
        "n": plan.n,
        "epochs": plan.epochs,
        "validation_accuracy": evaluate(model, data, data.validation).accuracy,
        "active": active,
        "dead": dead,
        "units": units,
        "test_accuracy": right[0],
        "noise_score": 10_000 * sum(right),  # with as many test images, the number of right answers
        **{f"test {level:g}": share for level, share in zip(LEVELS, right, strict=True)},
        "seconds": seconds,
    }


@torch.no_grad()
def activity(model: nn.Module, data: ImageData, indices: Tensor) -> tuple[float, int, int]:
    """Of the hidden layers, in evaluation mode: share of active units, dead units, all units.

    The share is the mean over the layers of the part of their outputs that is not 0. Dead is a unit
    that is 0 for all images; all places of a map are one unit, and units are counted likewise.
    """
    active: dict[nn.Module, list[Tensor]] = {}  # of each channel: active places of each image

    def look(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        active.setdefault(layer, []).append(
            (output != 0).reshape(*output.shape[:2], -1).double().mean(2)
        )

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.ReLU, KWinners))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    evaluate(model, data, indices)
    for hook in hooks:
        hook.remove()
    found = [torch.cat(parts) for parts in active.values()]
    dead = sum(int((each == 0).all(0).sum()) for each in found)
    units = sum(each.shape[1] for each in found)
    return fmean(each.mean().item() for each in found), dead, units


def under_noise(
    model: nn.Module, data: ImageData, indices: Tensor, order: Tensor, white: int
) -> list[float]:
    """The accuracy on data[indices] at each of LEVELS.

    order (n, 1, H, W) holds the numbers 0 … HW − 1 for each image; at level ν, the pixels with a
    number below int(HW ν) become white.
    """
    images, labels = data.images[indices], data.labels[indices]
    found = []
    for level in LEVELS:
        noisy = images.masked_fill(order < int(level * images[0].numel()), white)
        tested = replace(data, images=noisy, labels=labels)
        found.append(evaluate(model, tested, torch.arange(len(labels))).accuracy)
    return found


@functools.lru_cache(1)
def _order(n: int, side: int, seed: int) -> Tensor:
    """A random order of the pixels of each of n images, int16 (n, 1, side, side)."""
    keys = torch.rand((n, side * side), generator=torch.Generator().manual_seed(seed))
    return keys.argsort(1).to(torch.int16).view(n, 1, side, side)


@functools.cache
def _data(options: Options) -> ImageData:
    data = load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)
    return replace(data, test=data.test[:150]) if options.smoke else data


# --- What the rows come to ----------------------------------------------------------------------


def _claims(by: By) -> list[Claim]:
    claims = []
    for network in PLANS:
        dense, standard = Contestant(network, RELU, 0), Contestant(network, WINNERS, 1)
        claim = (
            f"{network}: test accuracy of k winners less that of ReLUs, in points: "
            f"−{2 * COST:g} or more (our bar)"
        )
        costs = _differences(by, standard, dense, "test_accuracy", 100)
        claims.append(between(claim, f"−{COST:g}", costs, low=-2 * COST))
        claim = (
            f"{network}: noise score of k winners less that of ReLUs: "
            f"{GAIN / 2:,.0f} or more (our bar)"
        )
        gains = _differences(by, standard, dense)
        claims.append(between(claim, f"+{GAIN:,}", gains, low=GAIN / 2))
        if network == PAPER:
            continue
        price, plain = nearest(by, network), standard._replace(way=UNBOOSTED)
        fewest, *_, most = _amounts(by, network, WINNERS)
        few = f"× {fewest.amount:g} winners"
        for one, other, ours, theirs in (
            (price, dense, _active(by, price), "ReLUs"),
            (standard, price, _active(by, standard), _active(by, price)),
            (fewest, most, few, f"× {most.amount:g}"),
            (standard, plain, "k winners with a boost", "without"),
        ):
            claim = f"{network}: {ours} have a higher noise score than {theirs}, by"
            claims.append(between(claim, None, _differences(by, one, other), low=0))
        saved = _differences(by, fewest._replace(way=UNBOOSTED), fewest, "dead")
        claim = f"{network}: of {few} a boost leaves fewer units dead, by"
        claims.append(between(claim, None, saved, low=1e-9))
    return claims


def _active(by: By, contestant: Contestant) -> str:
    name = "k winners" if contestant.way == WINNERS else f"ReLUs with L1 {contestant.amount:g}"
    return f"{name} ({_percent(by[contestant], 'active'):.0f} % active)"


def nearest(by: By, network: str) -> Contestant:
    """The priced network whose active share is nearest, in proportion, to the standard winners'."""
    wanted = _percent(by[Contestant(network, WINNERS, 1)], "active")

    def off(price: Contestant) -> float:
        share = _percent(by[price], "active")
        return max(share / wanted, wanted / share)

    return min(_amounts(by, network, PRICE), key=off)


def _tables(by: By) -> dict[str, list[study.Row]]:
    tables = {}
    for network, plan in PLANS.items():
        first, *others = by[Contestant(network, RELU, 0)]
        seeds = 1 + len(others)
        table: list[study.Row] = []
        for contestant, rows in _of(by, network).items():
            row = {
                "after the hidden layers": contestant.way,
                "times the standard share; weight": f"{contestant.amount:g}",
                "rate": f"{rows[0]['lr']:g}",
                "active in evaluation, %": spread(_values(rows, "active", 100)),
                "dead units": f"{spread(_values(rows, 'dead'))} of {rows[0]['units']}",
                "test accuracy, %": spread(_values(rows, "test_accuracy", 100)),
                "at noise 0.2": spread(_values(rows, "test 0.2", 100)),
                "at noise 0.5": spread(_values(rows, "test 0.5", 100)),
                "noise score": _score(rows),
            }
            if network == PAPER:
                accuracy, score = PUBLISHED[contestant.way]
                row |= {"published accuracy, %": accuracy, "published score": score}
            table.append(row)
        shares = ", ".join(f"{100 * share:.1f}" for share in plan.shares)
        title = (
            f"{network}, {first['n']:,} training examples, {first['epochs']} epochs, "
            f"{seeds} seeds; standard share of winners: {shares} %; "
            f"rates tried: {', '.join(f'{lr:g}' for lr in plan.lrs)}"
        )
        tables[title] = table
    return tables


def _rates(tried: By) -> dict[str, list[study.Row]]:
    """How accuracy and noise score depend on the rate: means of the seeds that tried all."""
    tables = {}
    for network in (CNN, MLP):
        table: list[study.Row] = []
        for contestant, rows in _of(tried, network).items():
            row = {"after the hidden layers": contestant.way, "times; weight": contestant.amount}
            for lr in sorted({row["lr"] for row in rows}):
                of_rate = [row for row in rows if row["lr"] == lr]
                accuracy = _percent(of_rate, "validation_accuracy")
                row[f"rate {lr:g}"] = (
                    f"{accuracy:.2f}; {fmean(_values(of_rate, 'noise_score')):,.0f}"
                )
            table.append(row)
        title = f"{network} at each rate, {SEARCHED} seeds: validation accuracy, %; noise score"
        tables[title] = table
    return tables


def _picture(by: By) -> figures.Figure:
    parts = []
    for network in (MLP, CNN):
        dense, standard = Contestant(network, RELU, 0), Contestant(network, WINNERS, 1)
        for what, scale, name, unit in (
            ("test_accuracy", 100, "test accuracy", "%"),
            ("noise_score", 1, "noise score", "right answers of 110,000"),
        ):
            lines = {
                way: [
                    figures.point(_percent(by[each], "active"), _values(by[each], what, scale))
                    for each in _amounts(by, network, way)
                ]
                for way in (RELU, PRICE, WINNERS, UNBOOSTED)
            }
            axes = "active units, %, logarithmic", f"{name}, {unit}"
            parts.append(figures.Panel(f"{network}: {name}", *axes, lines, "x"))
        price = nearest(by, network)
        lines = {
            each.way: [
                figures.point(level, _values(by[each], f"test {level:g}", 100)) for level in LEVELS
            ]
            for each in (dense, price, standard)
        }
        title = f"{network}: winners × 1, L1 × {price.amount:g}, ReLU"
        parts.append(figures.Panel(title, "share of pixels made white", "test accuracy, %", lines))
    return figures.panels(
        parts,
        f"Few active units and noise, {by[dense][0]['dataset']}: "
        "mean ± standard deviation over seeds",
    )


def _of(by: By, network: str) -> dict[Contestant, Sequence[study.Row]]:
    return {contestant: rows for contestant, rows in by.items() if contestant.network == network}


def _amounts(by: By, network: str, way: str) -> list[Contestant]:
    """From the least amount to the largest."""
    return sorted(contestant for contestant in _of(by, network) if contestant.way == way)


def _values(rows: Sequence[study.Row], what: str, scale: float = 1) -> list[float]:
    return [scale * row[what] for row in rows]


def _percent(rows: Sequence[study.Row], what: str) -> float:
    """The mean of a share, in percent."""
    return fmean(_values(rows, what, 100))


def _score(rows: Sequence[study.Row]) -> str:
    scores = _values(rows, "noise_score")
    return f"{fmean(scores):,.0f} ± {stdev(scores):,.0f}"


def _differences(
    by: By, one: Contestant, other: Contestant, what: str = "noise_score", scale: float = 1
) -> list[float]:
    """one − other, of each seed."""
    return differences(_values(by[one], what, scale), _values(by[other], what, scale))


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
