"""Few active units: a small cost in accuracy, much robustness to noise?

    python experiments/few_active.py              # MNIST, 25 networks, 6 seeds
    python experiments/few_active.py --smoke      # the embedded digits, seconds

**The claim.** Ahmad & Scheinkman 2019, How can we be so dense?, table 1, MNIST, ten seeds: a CNN of
whose three hidden layers only the k largest activations stay (Sparse CNN-2) has 99.09 ± 0.05 %
right and a noise score of 103,764 ± 1,125; one with ReLUs (Dense CNN-2) 99.31 ± 0.06 % and 97,040 ±
2,853. So few active units cost 0.22 points and gain 6,724 answers of 110,000. The two differ in
more than that: in the number of units, in the weights of the third layer, of which the sparse one
has 30 %, and, by the code (numenta/htmpapers), in learning rate, momentum, epochs and the size of
the first epoch's batches. With all its weights, and the dense one's momentum, learning rate and
batches (Sparse CNN-2 W1), the sparse one has 98.20 ± 0.19 % and 100,322 ± 2,082: 1.11 points less,
3,282 answers more. The table takes, of each
seed, the epoch with the best *test* accuracy, and its noise score (test_score_table.py). No images
are kept for validation (experiments_paper.cfg).

**The noise score** is the number of right answers on the 10,000 test images at eleven levels, 0,
0.05, … 0.5; here it is told in thousands. At level ν, int(784 ν) pixels of each image, drawn at
random, become white, which is the mean plus twice the standard deviation of the training pixels:
190 of 255. So does the authors' code, although its comment says that each pixel becomes white with
that probability. Here the seed gives the pixels of each image an order, and the first int(784 ν)
are taken: every network of a seed meets the same noise, and a higher level adds to a lower one.

**The contest.** In a 784-128-10 and in a small CNN (8 and 16 maps, 128 units) nothing differs but
what follows the hidden layers, and the rate that suits it: ReLUs; ReLUs with a price on their mean
activity, at several weights (L1); k winners; k winners chosen without a boost. k runs from a
quarter of a standard share to four times it in the MLP, to twice it in the CNN. The standard is 1/8
for the MLP, and for the CNN those of the paper's three layers, 8.7, 29.3 and 14.3 %. In evaluation
1.5 k win, as in the paper. Winners may be negative: a layer through which most pass is nearly
linear. The third pair has the paper's sizes, but all weights, one optimizer, fewer examples and few
epochs, so that Sparse CNN-2 W1 is its model as much as Sparse CNN-2. Its ReLUs have the sizes of
the winners, 32 and 64 maps and 700 units; those of Dense CNN-2, 30, 30 and 1000, are a rival of
their own.

The boost's strength β is multiplied by 0.85 after each epoch, from 1.5 to 0.78 after 4 epochs and
0.57 after 6; the paper's 10 epochs leave 0.30. What is left of it takes part in the choice in
evaluation, too.

How many units are active is measured on the validation images: the share of a layer's outputs that
is not 0, and the mean over the layers. A unit that is never active there counts as dead; all places
of a map are one unit. The L1 network that is held against the standard winners is the one whose
active share is nearest to theirs: in that mean and in evaluation, not in each layer or in training,
where winners have 2/3 of it.

**The rates.** Each contestant has its own: several are tried with two seeds, which count among the
six, and the one with the best mean accuracy on the validation images, as if no one knew of noise,
goes on to the other seeds. Winners without a boost train at the rate of their boosted twins. But a
rate moves the noise score as well; so the standard winners, the ReLUs and the L1 networks compete
once more, each at the rate with the best noise score on the validation images. What all rates mean
for these two is in tables of their own. Within a run the test images choose nothing:
they are read once for each training, at its end. But the grids got one or two lower rates after a
run in which the noise score of the CNNs' winners was best at the lowest, on validation and on test
images. "Small" and "much" are bars of our own, set before the first full run: at most twice the
published cost, at least half of the published gain.

**Limits.** No smaller network with ReLUs, no weight decay and no dropout are among the rivals. An
L1 price can be dodged: by small activations, and large weights behind them.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, load, subset
from nn_backprop.engines import autograd
from nn_backprop.layers import KWinners, decay_boosts
from nn_backprop.models import ActivityPenalty, dense_cnn, sparse_cnn, sparse_mlp
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, differences, spread, tuned
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch

RELU, PRICE, WINNERS, UNBOOSTED = "ReLU", "ReLU, L1 price", "k winners", "k winners, no boost"
DENSE = "ReLU, 30/30/1000"  # Dense CNN-2
MLP, CNN, PAPER = "MLP", "CNN", "the paper's CNN"
LEVELS = [k / 20 for k in range(11)]
SEARCHED = 2  # seeds that try every rate
BATCH, HIDDEN = 128, 128
SIZES = {CNN: ((8, 16), HIDDEN), PAPER: ((32, 64), 700)}
BARS = {  # a name, its scale; published of Sparse CNN-2 and of W1, less Dense CNN-2; our bar
    "test_accuracy": ("test accuracy, in points", 100, "−0.22", "−1.11", -0.44),
    "noise_score": ("noise score, in thousands", 1e-3, "+6.724", "+3.282", 3.362),
}
PUBLISHED = {
    DENSE: ("99.31 ± 0.06", "97.04 ± 2.85"),
    WINNERS: (
        "99.09 ± 0.05 (30 % of weights), 98.20 ± 0.19 (all)",
        "103.76 ± 1.13 (30 % of weights), 100.32 ± 2.08 (all)",
    ),
}


class Plan(NamedTuple):
    """What is trained of a network, and how."""

    n: int  # training examples
    epochs: int
    shares: tuple[float, ...]  # of each hidden layer's units, the standard share of winners
    amounts: Mapping[str, tuple[float, ...]]  # of each way
    lrs: tuple[float, ...]


PAPER_SHARES = (400 / 4608, 300 / 1024, 100 / 700)
PLANS = {  # the longest trainings first
    PAPER: Plan(
        30_000, 4, PAPER_SHARES, {RELU: (0,), DENSE: (0,), WINNERS: (1,)},
        (1e-3, 2e-3, 5e-3, 1e-2),
    ),
    CNN: Plan(
        10_000, 10, PAPER_SHARES,
        {RELU: (0,), PRICE: (0.1, 0.3, 1), WINNERS: (0.25, 0.5, 1, 2), UNBOOSTED: (0.25, 1)},
        (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    ),
    MLP: Plan(
        55_000, 6, (1 / 8,),
        {RELU: (0,), PRICE: (0.01, 0.03, 0.1, 1), WINNERS: (0.25, 0.5, 1, 2, 4),
         UNBOOSTED: (0.25, 1)},
        (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
}  # fmt: skip
SMOKE = {  # few examples, and only what the claims need
    PAPER: PLANS[PAPER]._replace(n=300, epochs=2, lrs=(5e-3,)),
    CNN: PLANS[CNN]._replace(
        n=300, epochs=4, lrs=(2e-2,),
        amounts={RELU: (0,), PRICE: (0.3,), WINNERS: (0.25, 1, 2), UNBOOSTED: (0.25, 1)},
    ),
    MLP: PLANS[MLP]._replace(
        n=1_000, epochs=5, lrs=(4e-3, 8e-3),
        amounts={RELU: (0,), PRICE: (0.01, 0.03), WINNERS: (0.25, 1, 4), UNBOOSTED: (0.25, 1)},
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


def plans_of(options: Options) -> Mapping[str, Plan]:
    return SMOKE if options.smoke else PLANS


def contestants(plans: Mapping[str, Plan]) -> list[Contestant]:
    return [
        Contestant(network, way, amount)
        for network, plan in plans.items()
        for way, amounts in plan.amounts.items()
        for amount in amounts
    ]


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here
    plans = plans_of(options)
    everyone = contestants(plans)

    def trained(rates: Mapping[Contestant, Sequence[float]], seeds: range) -> list[study.Row]:
        jobs = [
            Job(contestant, lr, seed, options)
            for seed in seeds
            for contestant, lrs in rates.items()
            for lr in lrs
        ]
        return under_way.carry_out(train, jobs, _tag)

    searching = {of: plans[of.network].lrs for of in everyone if of.way != UNBOOSTED}
    tried = trained(searching, range(SEARCHED))
    twins = [of for of in everyone if of.way == UNBOOSTED]
    best = best_rates(tried, "validation_accuracy")
    best |= {of: best[of._replace(way=WINNERS)] for of in twins}
    robust = {
        of: lr
        for of, lr in best_rates(tried, "validation_noise_score").items()
        if of.way != WINNERS or of.amount == 1
    }
    both = {of: tuple(dict.fromkeys((best[of], robust.get(of, best[of])))) for of in everyone}
    rows = tried + trained({of: both[of] for of in twins}, range(SEARCHED))
    rows += trained(both, range(SEARCHED, options.seeds))
    by, again = at_rates(rows, best), at_rates(rows, robust)
    claims = _claims(by, again)
    tables = _tables(by, again, plans) | _rates(tried)
    under_way.finish(tables, claims, _picture(by))


def best_rates(tried: Sequence[study.Row], score: str) -> dict[Contestant, float]:
    """The rate of each contestant that has the best mean score."""
    best = by_contestant(tuned(tried, KEYS, ("lr",), score))
    return {contestant: rows[0]["lr"] for contestant, rows in best.items()}


def at_rates(rows: Sequence[study.Row], rates: Mapping[Contestant, float]) -> By:
    """Of the contestants that are named, the rows at their rates."""
    by = by_contestant(rows)
    return {of: [row for row in by[of] if row["lr"] == lr] for of, lr in rates.items()}


def by_contestant(rows: Sequence[study.Row]) -> dict[Contestant, list[study.Row]]:
    """Sorted: by network and way, from the least amount to the largest; the rows by seed."""
    by: dict[Contestant, list[study.Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by.setdefault(Contestant(*(row[key] for key in KEYS)), []).append(row)
    return dict(sorted(by.items()))


def _tag(row: study.Row) -> dict[str, float]:
    of = f"{row['network']}, {row['way']}, {row['amount']:g}"
    return {f"validation/{of}": row["validation_accuracy"], f"noise score/{of}": row["noise_score"]}


# --- One training -------------------------------------------------------------------------------


def build(contestant: Contestant) -> nn.Module:
    """The network. With the same torch seed, those of one shape start from the same weights."""
    network, way, amount = contestant
    if way == DENSE:
        return dense_cnn()
    dense = way in (RELU, PRICE)
    shares = [(1 if dense else amount) * share for share in PLANS[network].shares]
    boost = 0.0 if way == UNBOOSTED else 1.5
    if network == MLP:
        model = sparse_mlp(HIDDEN, shares[0], boost)
    else:
        model = sparse_cnn(*SIZES[network], shares, boost)
    if dense:
        for name, layer in model.named_children():
            if isinstance(layer, KWinners):
                setattr(model, name, nn.ReLU())
    return ActivityPenalty(model, amount) if way == PRICE else model


def train(job: Job) -> study.Row:
    """One network, trained and tested; accuracies and shares from 0 to 1."""
    contestant, lr, seed, options = job
    plan = plans_of(options)[contestant.network]
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
    sizes = len(data.validation), len(data.test)
    orders = _order(sum(sizes), whole.images.shape[-1], seed).split(sizes)  # of different images
    white = round(255 * (whole.mean + 2 * whole.std))
    validated = under_noise(model, data, data.validation, orders[0], white)
    right = under_noise(model, data, data.test, orders[1], white)  # the test images, here alone
    return {
        **contestant._asdict(),
        "lr": lr,
        "seed": seed,
        "dataset": data.name,
        "n": plan.n,
        "epochs": plan.epochs,
        "validation_accuracy": validated[0],
        "validation_noise_score": 10_000 * sum(validated),  # in the unit of the noise score
        "active": fmean(active),
        "active_by_layer": active,
        "dead": dead,
        "units": units,
        "test_accuracy": right[0],
        "noise_score": 10_000 * sum(right),  # with as many test images, the number of right answers
        **{f"test {level:g}": share for level, share in zip(LEVELS, right, strict=True)},
        "seconds": seconds,
    }


@torch.no_grad()
def activity(model: nn.Module, data: ImageData, indices: Tensor) -> tuple[list[float], int, int]:
    """In evaluation mode: each hidden layer's share of active units; dead units, all units.

    The share is the part of a layer's outputs that is not 0. Dead is a unit that is 0 for all
    images; all places of a map are one unit, and units are counted likewise.
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
    return [each.mean().item() for each in found], dead, units


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
    if not options.smoke:
        return data
    return replace(data, validation=data.validation[:150], test=data.test[:150])


# --- What the rows come to ----------------------------------------------------------------------


def _claims(by: By, robust: By) -> list[Claim]:
    """`by` at the rates best for validation accuracy, `robust` at those for validation noise."""
    claims = []
    for network in PLANS:
        dense, standard = Contestant(network, RELU, 0), Contestant(network, WINNERS, 1)
        accurate = f"{network}, each at the rate best for accuracy"
        noisy = f"{network}, each at the rate best for validation noise"
        rivals = [dense, dense._replace(way=DENSE)] if network == PAPER else [dense]
        held = [
            (at, where, rival, what)
            for at, where in ((by, accurate), (robust, noisy))
            for rival in rivals
            for what in BARS
        ]
        for at, where, rival, what in held:
            name, scale, published, all_weights, low = BARS[what]
            bar = f"{low:g}".replace("-", "−")
            claim = f"{where}: {name}, k winners less {rival.way}: {bar} or more (our bar)"
            paper = f"{published} (CNN-2)"
            if rival.way == DENSE:
                paper = f"{published} (30 % of weights), {all_weights} (all)"
            values = _differences(at, standard, rival, what, scale)
            claims.append(between(claim, paper, values, low=low))
        claim = f"{accurate}: active units, in points, k winners less ReLU: below 0"
        fewer = _differences(by, standard, dense, "active", 100)
        claims.append(between(claim, None, fewer, high=-1e-9))
        if network == PAPER:
            continue
        price, other_price = nearest(by, network), nearest(robust, network)
        plain = standard._replace(way=UNBOOSTED)
        fewest, *_, most = _amounts(by, network, WINNERS)
        for at, where, one, other, ours, theirs in (
            (by, accurate, price, dense, _active(by, price), "ReLUs"),
            (by, accurate, standard, price, _active(by, standard), _active(by, price)),
            (robust, noisy, standard, other_price,
             _active(robust, standard), _active(robust, other_price)),
            (by, accurate, fewest, most, _active(by, fewest), _active(by, most)),
            (by, network, standard, plain, "k winners with a boost", "without, at the same rate"),
        ):  # fmt: skip
            claim = f"{where}: {ours} have a higher noise score than {theirs}, in thousands, by"
            claims.append(between(claim, None, _differences(at, one, other), low=0))
        saved = _differences(by, fewest._replace(way=UNBOOSTED), fewest, "dead", 1)
        claim = f"{network}: of × {fewest.amount:g} winners a boost leaves fewer units dead, by"
        claims.append(between(claim, None, saved, low=1e-9))
    return claims


def _active(by: By, contestant: Contestant) -> str:
    amount = f"{contestant.amount:g}"
    name = f"× {amount} winners" if contestant.way == WINNERS else f"ReLUs with L1 {amount}"
    return f"{name} ({fmean(_values(by[contestant], 'active', 100)):.0f} % active)"


def nearest(by: By, network: str) -> Contestant:
    """The priced network whose active share is nearest, in proportion, to the standard winners'."""
    wanted = fmean(_values(by[Contestant(network, WINNERS, 1)], "active"))

    def off(price: Contestant) -> float:
        share = fmean(_values(by[price], "active"))
        return max(share / wanted, wanted / share)

    return min(_amounts(by, network, PRICE), key=off)


def _tables(by: By, robust: By, plans: Mapping[str, Plan]) -> dict[str, list[study.Row]]:
    tables: dict[str, list[study.Row]] = {}
    for at, best in ((by, "accuracy"), (robust, "validation noise")):
        for contestant, rows in at.items():
            network, way, amount = contestant
            plan, lr = plans[network], rows[0]["lr"]
            layers = "/".join(
                f"{100 * fmean(shares):.0f}"
                for shares in zip(*(row["active_by_layer"] for row in rows), strict=True)
            )
            row = {
                "after the hidden layers": way,
                "times the standard share; weight": f"{amount:g}",
                "rate": f"{lr:g}" + (" (edge)" if lr in (plan.lrs[0], plan.lrs[-1]) else ""),
                "active in evaluation, %": f"{spread(_values(rows, 'active', 100))} ({layers})",
                "dead units": f"{spread(_values(rows, 'dead'))} of {rows[0]['units']}",
                "test accuracy, %": spread(_values(rows, "test_accuracy", 100)),
                "at noise 0.2": spread(_values(rows, "test 0.2", 100)),
                "at noise 0.5": spread(_values(rows, "test 0.5", 100)),
                "noise score, thousands": spread(_values(rows, "noise_score", 1e-3)),
            }
            if network == PAPER:
                accuracy, score = PUBLISHED.get(way, ("–", "–"))
                row |= {"published accuracy, %": accuracy, "published score": score}
            title = (
                f"{network}, each at the rate best for {best}, of "
                f"{', '.join(f'{lr:g}' for lr in plan.lrs)}; {plan.n:,} training examples, "
                f"{plan.epochs} epochs, {len(rows)} seeds; standard share of winners: "
                f"{', '.join(f'{100 * share:.1f}' for share in plan.shares)} %"
            )
            tables.setdefault(title, []).append(row)
    return tables


def _rates(tried: Sequence[study.Row]) -> dict[str, list[study.Row]]:
    """How accuracy and noise score depend on the rate: of the seeds that tried all."""
    tables: dict[str, list[study.Row]] = {}
    for contestant, rows in by_contestant(tried).items():
        dense = Contestant(contestant.network, RELU, 0)
        row = {"after the hidden layers": contestant.way, "times; weight": contestant.amount}
        gain = {
            "after the hidden layers": "k winners: noise score less that of ReLU",
            "times; weight": 1,
        }
        for lr in sorted({row["lr"] for row in rows}):
            at = at_rates(tried, {dense: lr, contestant: lr})
            accuracy = fmean(_values(at[contestant], "validation_accuracy", 100))
            score = fmean(_values(at[contestant], "validation_noise_score", 1e-3))
            row[f"rate {lr:g}"] = f"{accuracy:.2f}; {score:.2f}"
            more = _differences(at, contestant, dense, "validation_noise_score")
            gain[f"rate {lr:g}"] = spread(more, "+")
        title = (
            f"{contestant.network} at each rate, {SEARCHED} seeds: "
            "accuracy, %; noise score, thousands; both of validation images"
        )
        standard = contestant[1:] == (WINNERS, 1)
        tables.setdefault(title, []).extend([row, gain] if standard else [row])
    return tables


def _picture(by: By) -> figures.Figure:
    parts = []
    for network in (MLP, CNN):
        for what, scale, label in (
            ("test_accuracy", 100, "test accuracy, %"),
            ("noise_score", 1e-3, "noise score, thousands of 110"),
        ):
            lines = {
                way: [
                    figures.point(
                        fmean(_values(by[each], "active", 100)), _values(by[each], what, scale)
                    )
                    for each in _amounts(by, network, way)
                ]
                for way in (RELU, PRICE, WINNERS, UNBOOSTED)
            }
            axes = "active units, %, logarithmic", label
            parts.append(figures.Panel(f"{network}: {label.split(',')[0]}", *axes, lines, "x"))
        price = nearest(by, network)
        lines = {
            each.way: [
                figures.point(level, _values(by[each], f"test {level:g}", 100)) for level in LEVELS
            ]
            for each in (Contestant(network, RELU, 0), price, Contestant(network, WINNERS, 1))
        }
        title = f"{network}: winners × 1, L1 price {price.amount:g}, ReLU"
        parts.append(figures.Panel(title, "share of pixels made white", "test accuracy, %", lines))
    (dataset,) = {row["dataset"] for rows in by.values() for row in rows}
    return figures.side_by_side(
        parts,
        f"Few active units and noise, {dataset.upper()}, each at the rate best for accuracy: "
        "mean ± standard deviation over seeds",
    )


def _amounts(by: By, network: str, way: str) -> list[Contestant]:
    """In the order of `by`."""
    return [contestant for contestant in by if contestant[:2] == (network, way)]


def _values(rows: Sequence[study.Row], what: str, scale: float = 1) -> list[float]:
    return [scale * row[what] for row in rows]


def _differences(
    by: By, one: Contestant, other: Contestant, what: str = "noise_score", scale: float = 1e-3
) -> list[float]:
    """one − other, of each seed."""
    return differences(_values(by[one], what, scale), _values(by[other], what, scale))


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
