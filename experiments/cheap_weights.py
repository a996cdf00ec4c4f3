"""A weight matrix made cheaper, by low rank or by pruning: better than a smaller dense network?

    python experiments/cheap_weights.py           # MNIST, half an hour on two cores
    python experiments/cheap_weights.py --smoke   # the embedded digits, seconds

What is compared, and what came out: results/cheap_weights/README.md.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures, studies
from nn_backprop.layers.low_rank import LowRankLinear, break_even, cut_to_rank
from nn_backprop.models import MLP, LeNet5, lenet_300_100
from nn_backprop.models.counting import multiply_adds, multiply_adds_left, parameters
from nn_backprop.models.lenet import KEPT
from nn_backprop.models.without_zeros import in_sparse_rows, read_arrays, write_arrays
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.training import make_permanent, parameters_left, prune_smallest, shares_kept

LENET, REDUCED = "LeNet-300-100", ("pruned", "low rank", "small dense")
CELL = ("network", "contestant", "factor", "lr", "decay", "seed")  # of a training
# Han et al. 2015: the test error in % before and after.
PUBLISHED = {LENET: (1.64, 1.59), "LeNet-5": (0.80, 0.77)}
HAN = 12
# What leaves LeNet-300-100 one in so many of its parameters, within 1 %: of pruning, the power of
# Han's shares; of products, the ranks of the first layers; of a smaller one, the widths.
POWERS = {2: 0.277, 4: 0.555, HAN: 1.0, 30: 1.378}
RANKS = {2: (94,), 4: (44, 44), HAN: (14, 14), 30: (5, 5)}
WIDTHS = {2: (158, 53), 4: (82, 27), HAN: (27, 26), 30: (11, 11)}
# Epochs of the dense network; how often it is pruned, and the epochs after each time.
PLANS = {LENET: (12, 4, 4), "LeNet-5": (6, 3, 2)}
SMOKE_PLAN, SMOKE_FACTORS, BATCH = (2, 2, 1), (2, HAN), 128
LR, DECAY = 3e-3, 0.3  # of what is not tuned, and of what others start from
LRS, LRS_LONGER, DECAYS = (LR, 1e-2), (3e-4, 1e-3), (0.05, DECAY)
PASSES = {1: 100, 128: 10}  # how many are timed together, by the images in a batch
AS_IS, CSR = "pruned, dense kernel", "pruned, CSR"
BAR = 0.95  # of the dense network's time


@dataclass(frozen=True)
class Options(studies.Options):
    """Low rank and pruning against smaller dense networks: error, bytes, multiply-adds, time."""

    least: ClassVar[dict[str, int]] = {**studies.Options.least, "rounds": 6}
    rounds: int = 30
    """Timings of each forward pass."""


class Job(NamedTuple):
    """One training. Every network is left in a file in `folder`: some start from another's."""

    network: str
    contestant: str
    factor: int
    lr: float
    decay: float
    seed: int
    folder: Path
    options: Options

    @property
    def file(self) -> Path:
        return self.folder / f"{'-'.join(map(str, self[: len(CELL)]))}.npz"


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    folder = run.opened.path / "networks"
    folder.mkdir()
    factors = SMOKE_FACTORS if options.smoke else tuple(POWERS)
    dense = [("LeNet-5", "dense", 1), (LENET, "dense", 1)]
    others = [("LeNet-5", "pruned", HAN)]
    others += [(network, "dense, longer", 1) for network in PUBLISHED]
    others += [(LENET, who, factor) for who in REDUCED for factor in factors]
    tag = "{network}/{contestant} {factor}"
    for contestants in (dense, others):  # one after the other: these start from those
        jobs = [
            Job(*of, lr, decay, seed, folder, options)
            for of in contestants
            for lr, decay in settings(*of[:2], options)
            for seed in range(options.seeds)
        ]
        run.train_all(train, jobs, lambda row: {tag.format(**row): row["validation_accuracy"]})
    first = best(Rows(run.rows)).where(seed=0, network=LENET)
    timed = [Job(**{k: row[k] for k in CELL}, folder=folder, options=options) for row in first]
    run.add(timings(timed))


def settings(network: str, contestant: str, options: Options) -> list[tuple[float, float]]:
    """Rates and decays to train with; one pair where nothing is tuned."""
    lrs = LRS_LONGER if contestant == "dense, longer" else LRS
    if network == "LeNet-5" or options.smoke:
        return [(lrs[0], DECAY)]
    return [(lr, decay) for lr in lrs for decay in DECAYS]


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """Trains a network, tests it and leaves it in its file; errors are shares, 0 to 1."""
    data = studies.load_data(job.options)
    first, prunings, retraining = SMOKE_PLAN if job.options.smoke else PLANS[job.network]
    own = {"dense": first, "small dense": first + prunings * retraining}.get(job.contestant)
    torch.manual_seed(job.seed)
    if own:
        model, stretches, done = made(*job[:3]), [own], 0
    else:
        dense = job._replace(contestant="dense", factor=1, lr=LR, decay=DECAY)
        model, stretches, done = made(*job[:3], dense.file), [retraining] * prunings, first
    shares = KEPT[job.network] if job.contestant == "pruned" else {}
    kept, seconds = {name: share ** POWERS[job.factor] for name, share in shares.items()}, 0.0
    for epochs, keep in zip(stretches, shares_kept(kept, len(stretches)), strict=True):
        prune_smallest(model, keep)
        seconds += studies.train_network(
            model, data, lr=job.lr, decay=job.decay, epochs=epochs, batch_size=BATCH,
            seed=job.seed, done=done,
        ).seconds  # fmt: skip
        done += epochs
    left = parameters_left(model)
    make_permanent(model)
    image = data.batch(data.train[:1])[0]
    reached = studies.accuracies(model, data, ("validation", "test"))
    return {
        **dict(zip(CELL, job, strict=False)), "dataset": data.name, "epochs": done,
        "parameters": left, "multiply_adds": multiply_adds(model, image),
        "multiply_adds_left": multiply_adds_left(model, image),
        **write_arrays(model, job.file),
        "validation_accuracy": reached["validation_accuracy"],
        "test_error": 1 - reached["test_accuracy"], "train_seconds": seconds,
    }  # fmt: skip


def made(network: str, contestant: str, factor: int, dense: Path | None = None) -> nn.Module:
    """A contestant before its training, made of the dense network in a file, or of a new one."""
    if contestant == "small dense":
        return MLP((784, *WIDTHS[factor], 10))
    model = LeNet5() if network == "LeNet-5" else lenet_300_100()
    if dense is not None:
        read_arrays(model, dense)
    if contestant == "low rank":
        cut_to_rank(model, {f"layers.{k}": rank for k, rank in enumerate(RANKS[factor])})
    return model


# --- Time ---------------------------------------------------------------------------------------


@torch.inference_mode()
def timings(jobs: Sequence[Job]) -> list[Row]:
    """Forward passes of one seed's networks on one thread, and their ratios in a round."""
    forward: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
    for job in sorted(jobs, key=lambda job: job.factor):
        model = made(job.network, job.contestant, job.factor)
        read_arrays(model, job.file)
        if job.contestant == "pruned":
            forward[AS_IS, job.factor], forward[CSR, job.factor] = model, in_sparse_rows(model)
        elif job.contestant != "dense, longer":
            forward[job.contestant, job.factor] = model
    rows, order = [], random.Random(0)
    for batch, passes in PASSES.items():
        images = torch.randn(batch, 1, 28, 28)
        work = {who: partial(run, images) for who, run in forward.items()}
        rounds = studies.timed_rounds(work, ("dense", 1), jobs[0].options.rounds, passes, order)
        for (who, factor), number, seconds, ratio in rounds:
            rows.append({"timed": who, "factor": factor, "batch": batch, "round": number,
                         "seconds": seconds, "ratio": ratio})  # fmt: skip
    return rows


# --- What the rows come to ----------------------------------------------------------------------


def best(rows: Rows) -> Rows:
    """Of each contestant the trainings with its best rate and decay."""
    group, tuned = ("network", "contestant", "factor"), ("lr", "decay")
    return rows.having("seed").best(group, tuned, "validation_accuracy")


def claims(rows: Rows) -> list[Claim]:
    return counts() + differences(best(rows)) + faster(rows.having("round"))


def counts() -> list[Claim]:
    """What is counted, on any data."""
    found = []
    for m, n in ((784, 300), (300, 100)):
        x, bound, wrong = torch.empty(1, m, device="meta"), break_even(m, n), 0
        for rank in range(1, min(m, n) + 1):
            layer = LowRankLinear(m, n, rank, bias=False, device="meta")
            saves = [parameters(layer) < m * n, multiply_adds(layer, x) < m * n]
            wrong += saves != [rank < bound] * 2
        claim = (
            f"{m} × {n}: a product saves weights and multiply-adds if and only if its rank is "
            f"below mn/(m + n) = {bound:.2f}; ranks that contradict"
        )
        found.append(studies.counted(claim, 0, wrong, 0, 0))
    return found


def differences(rows: Rows) -> list[Claim]:
    """What the trainings found, in differences or ratios of each seed."""
    by, found = rows.by("network", "contestant", "factor"), []
    for network, (before, after) in PUBLISHED.items():
        for other, published in (("dense", f"−{before - after:.2f}"), ("dense, longer", None)):
            claim = f"{network}: test error pruned {HAN}× less that of “{other}”, percentage points"
            more = points(by[network, "pruned", HAN], by[network, other, 1])
            found.append(studies.between(f"{claim}: 0 or less", published, more, high=0))
    small, as_many = by[LENET, "small dense", HAN], "that of “small dense” with as many parameters"
    for who in ("pruned", "low rank"):
        claim = f"{LENET}: test error of “{who}” {HAN}× less {as_many}, percentage points: below 0"
        found.append(studies.between(claim, None, points(by[LENET, who, HAN], small), high=0))
    ratios = by[LENET, "pruned", HAN].values("bytes_packed") / small.values("bytes_packed")
    claim = f"{LENET}: packed file of “pruned” {HAN}× as a multiple of {as_many}: 1 or less"
    return [*found, studies.between(claim, None, ratios, high=1)]


def faster(timed: Rows) -> list[Claim]:
    """What the timings found, in ratios of each round."""
    found, below = [], (-math.inf, 1, "below 1: faster")
    not_faster = (BAR, math.inf, f"{BAR} or more (our bar): not faster")
    for batch in PASSES:
        for who, (low, high, bar) in {AS_IS: not_faster, CSR: below, "low rank": below}.items():
            claim = f"batch of {batch}, “{who}” {HAN}×: median of a forward pass's time"
            claim = f"{claim} as a multiple of the dense network's: {bar}"
            ratios = timed.where(timed=who, factor=HAN, batch=batch).values("ratio")
            found.append(studies.median_between(claim, None, ratios, low, high))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    trained, found = best(rows), dict[str, studies.Table]()
    for network, (before, after) in PUBLISHED.items():
        title = f"{network}, {len(trained.by('seed'))} seeds"
        published = f"(published: {before:.2f} % dense, {after:.2f} % pruned {HAN}×)"
        found[f"{title} {published}"] = summary(trained.where(network=network))
    title = "Time of a forward pass of LeNet-300-100 as a multiple of the dense network's: median "
    found[f"{title}(quartiles)"] = times(rows.having("round"))
    return found


def summary(rows: Rows) -> list[Row]:
    """A line for each contestant of a network."""
    groups, lines = rows.by("contestant", "factor"), []
    for contestant, factor in sorted(groups, key=lambda at: at[1]):
        own, less = groups[contestant, factor], {}
        for rival, at in (("dense", 1), ("small dense", factor)):
            if rival in rows.by("contestant"):
                both = (rival, at) in groups and rival != contestant
                cell = studies.mean_sd(points(own, groups[rival, at]), "+") if both else "–"
                less[f"less that of “{rival}”, points"] = cell
        lines.append({
            "network": f"{contestant} {factor}×" if factor > 1 else contestant,
            "rate, decay": f"{own.one('lr'):g}, {own.one('decay'):g}",
            "epochs": own.one("epochs"),
            "parameters": f"{own.one('parameters'):,}",
            "test error, %": studies.mean_sd(own.values("test_error", 100)),
            **less,
            "multiply-adds as run": f"{own.one('multiply_adds'):,}",
            "of weights left": f"{own.one('multiply_adds_left'):,}",
            "file, kB": f"{own.values('bytes').mean() / 1000:.1f}",
            "packed": f"{own.values('bytes_packed').mean() / 1000:.1f}",
        })  # fmt: skip
    return lines


def times(timed: Rows) -> list[Row]:
    """A line for each network that was timed."""
    lines = []
    for (who, factor), own in timed.by("timed", "factor").items():
        line = {"network": f"{who} {factor}×" if factor > 1 else who}
        for batch, found in own.by("batch").items():
            line[f"batch of {batch}, µs"] = f"{1e6 * np.median(found.values('seconds')):.0f}"
            line[f"batch of {batch}, ratio"] = studies.quartiles(found.values("ratio"))
        lines.append(line)
    return lines


def picture(rows: Rows) -> figures.Figure:
    by = best(rows).where(network=LENET).by("contestant", "factor")
    timed = rows.having("round").by("batch", "timed", "factor")
    left = {factor: own.one("parameters") for (who, factor), own in by.items() if who == "pruned"}
    errors = {
        who: [figures.point(x, by[who, factor].values("test_error")) for factor, x in left.items()]
        for who in REDUCED
    }
    dense = {who: by[who, 1].values("test_error").mean() for who in ("dense", "dense, longer")}
    across, title = "parameters left, within 1 %", "Error: mean ± standard deviation"
    parts = [figures.Panel(title, across, "test error", errors, "xy", True, dense)]
    for batch in PASSES:
        title = f"{batch} image{'s' * (batch > 1)}: median ± ½ interquartile range"
        ratios = {
            who: [studies.median_point(x, timed[batch, who, factor].values("ratio"))
                  for factor, x in left.items()]
            for who in (AS_IS, CSR, "low rank", "small dense")
        }  # fmt: skip
        time = "time of a forward pass, of the dense one's"
        parts.append(figures.Panel(title, across, time, ratios, "xy", levels={"dense": 1.0}))
    data = by["dense", 1].one("dataset")
    return figures.side_by_side(parts, f"{LENET} on {data}: 266,610 parameters made fewer")


def points(one: Rows, other: Rows) -> np.ndarray:
    """Test error of one less that of the other, of each seed."""
    return 100 * (one.values("test_error") - other.values("test_error"))


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
