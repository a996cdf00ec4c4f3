"""What does it cost to keep a fraction α of the maps at half the resolution, and what does it save?

    python experiments/octave.py                  # MNIST, 5 fractions × 5 seeds
    python experiments/octave.py --smoke          # the embedded digits, seconds

What is compared, and what came out: results/octave/README.md.
"""

import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures, studies
from nn_backprop.data import channels_last
from nn_backprop.engines import autograd
from nn_backprop.layers import OctaveConv2d
from nn_backprop.layers.octave import cost_ratio, memory_ratio
from nn_backprop.models import OctaveCNN
from nn_backprop.models.counting import multiply_adds, parameters, watched
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.training import make_optimizer

ALPHAS = (0.0, 0.125, 0.25, 0.5, 0.75)
PUBLISHED = {0.125: 0.82, 0.25: 0.67, 0.5: 0.44, 0.75: 0.30}  # Chen et al. 2019
EPOCHS, SMOKE_EPOCHS, BATCH, LR, DECAY = 4, 1, 128, 2e-2, 0.05
CHANNELS, SMOKE_CHANNELS = (16, 32, 32), (8, 16, 16)
MARGIN = 0.1  # percentage points, our bar
CALLS = 5  # timed together
INNER = "multiply_adds_inner"


@dataclass(frozen=True)
class Options(studies.Options):
    """Octave convolution: accuracy, multiply-adds, memory and time by the fraction of low maps."""

    least: ClassVar[dict[str, int]] = {**studies.Options.least, "rounds": 6}
    rounds: int = 30
    """Timings of each step."""

    @property
    def channels(self) -> tuple[int, int, int]:
        return SMOKE_CHANNELS if self.smoke else CHANNELS


class Job(NamedTuple):
    """One training."""

    alpha: float
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    jobs = [Job(alpha, seed, options) for seed in range(options.seeds) for alpha in ALPHAS]
    tag = "accuracy/alpha {alpha:g}"
    run.train_all(train, jobs, lambda row: {tag.format(**row): row["test_accuracy"]})
    run.add(list(timings(options)))


def train(job: Job) -> Row:
    """One network, trained and tested."""
    data = studies.load_data(job.options)
    torch.manual_seed(job.seed)
    model = OctaveCNN(job.options.channels, job.alpha)
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    trained = studies.train_network(
        model, data, lr=LR, decay=DECAY, epochs=epochs, batch_size=BATCH, seed=job.seed
    )
    image = data.batch(data.train[:1])[0]
    maps, inner, network = numbers(model, image)
    return {
        "alpha": job.alpha,
        "seed": job.seed,
        "dataset": data.name,
        "epochs": epochs,
        "parameters": parameters(model),
        **studies.accuracies(model, data, ("test", "validation")),
        "multiply_adds_inner": multiply_adds(model.conv2, maps),
        "multiply_adds_network": multiply_adds(model, image),
        "numbers_inner": inner,
        "numbers_network": network,
        "train_seconds": trained.seconds,
    }


@torch.no_grad()
def numbers(model: OctaveCNN, image: Tensor) -> tuple[Any, int, int]:
    """The maps that the inner layer is handed; how many numbers its own hold, and all layers'."""
    handed, made = [], []

    def look(layer: nn.Module, inputs: tuple, output: Any) -> None:
        own = output if isinstance(output, tuple) else (output,)
        handed.append(inputs[0])
        made.append(sum(maps.numel() for maps in own))

    with watched((model.conv1, model.conv2, model.conv3), look):
        model(image)
    return handed[1], made[1], sum(made)


# --- Time ---------------------------------------------------------------------------------------


Step = tuple[Callable[[], object], int]  # to be timed; multiply-adds of its forward pass


def timings(options: Options) -> Iterator[Row]:
    """Steps of a small and a large network's layers, in rounds that have every fraction once."""
    batch, large, few = (8, 42, 1) if options.smoke else (BATCH, 112, 2)
    before, after, _ = options.channels
    inner, wide = (before, after), (4 * before, 4 * after)
    for name, make in {
        "training, 28×28 pixels": partial(network_step, options.channels, batch),
        f"{before} → {after} maps, 14×14": partial(layer_step, inner, 14, batch),
        f"{before} → {after} maps, {large}×{large}": partial(layer_step, inner, large, few),
        f"{wide[0]} → {wide[1]} maps, 28×28": partial(layer_step, wide, 28, batch // 8),
    }.items():
        steps = {alpha: make(alpha) for alpha in ALPHAS}
        work = {alpha: work for alpha, (work, _) in steps.items()}
        rounds = studies.timed_rounds(work, 0.0, options.rounds, CALLS, random.Random(0))
        for alpha, number, seconds, ratio in rounds:
            share = steps[alpha][1] / steps[0.0][1]
            yield {"step": name, "alpha": alpha, "round": number, "seconds": seconds,
                   "ratio": ratio, "multiply_adds_share": share}  # fmt: skip


def network_step(channels: tuple[int, int, int], batch: int, alpha: float) -> Step:
    """Gradients and an update, as the loop has them."""
    torch.manual_seed(0)
    model, targets = OctaveCNN(channels, alpha), torch.randint(10, (batch,))
    images = channels_last(torch.randn(batch, 1, 28, 28))
    optimizer = make_optimizer("adam", model.parameters(), LR, DECAY)

    def work() -> None:
        autograd(model, images, targets)
        optimizer.step()

    return work, multiply_adds(model, images)


def layer_step(channels: tuple[int, int], side: int, batch: int, alpha: float) -> Step:
    """Forward and backward of an inner layer, the gradients of weights and maps."""
    torch.manual_seed(0)
    layer, low = OctaveConv2d(*channels, 3, alpha, alpha), int(alpha * channels[0])
    high = channels[0] - low
    shapes = [(batch, high, side, side), (batch, low, side // 2, side // 2)]
    maps = [channels_last(torch.randn(shape)).requires_grad_() for shape in shapes if shape[1]]
    handed = (maps[0], maps[1]) if low else maps[0]
    leaves = [*maps, *layer.parameters()]
    with torch.no_grad():
        output = layer(handed)
    upstream = [torch.randn_like(z) for z in (output if low else (output,))]

    def work() -> None:
        output = layer(handed)
        torch.autograd.grad(output if low else (output,), leaves, upstream)

    return work, multiply_adds(layer, handed)


# --- What the rows come to ----------------------------------------------------------------------


def counts(rows: Rows) -> list[Claim]:
    """What is counted, on any data."""
    found = []
    for alpha, published in PUBLISHED.items():
        claim = f"inner layer, α = {alpha:g}: multiply-adds left (Chen et al. 2019)"
        left, low, high = share(rows, alpha, INNER), published - 0.005, published + 0.005
        found.append(studies.counted(claim, published, left, low, high))
    for what, formula, named in (
        (INNER, cost_ratio, "multiply-adds: 1 − ¾ α (2 − α)"),
        ("numbers_inner", memory_ratio, "numbers in its maps: 1 − ¾ α"),
    ):
        off = max(abs(share(rows, alpha, what) - formula(alpha)) for alpha in PUBLISHED)
        found.append(studies.counted(f"inner layer, {named}, off by at most", 0, off, 0, 0))
    claim = "the whole network keeps more than the formula, by at least"
    more = [share(rows, a, "multiply_adds_network") - cost_ratio(a) for a in PUBLISHED]
    return [*found, studies.counted(claim, None, min(more), 1e-9)]


def claims(rows: Rows) -> list[Claim]:
    found, points = counts(rows), percent(rows, 0.5) - percent(rows, 0)
    claim = f"test accuracy with α = ½ less that with α = 0, percentage points: −{MARGIN:g} or more"
    found.append(studies.between(f"{claim} (our bar)", None, points, low=-MARGIN))
    for step, of in timed(rows).items():
        claim = f"{step}, α = ½: the median ratio of a step's time to that with α = 0 is below 1"
        ratios = of.where(alpha=0.5).values("ratio")
        found.append(studies.median_between(claim, None, ratios, high=1))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    def left(alpha: float, what: str) -> str:
        return f"{100 * share(rows, alpha, what):.1f}"

    costs = [
        {
            "α": f"{alpha:g}",
            "test accuracy, %": studies.mean_sd(percent(rows, alpha)),
            "against α = 0, points":
                studies.mean_sd(percent(rows, alpha) - percent(rows, 0), "+") if alpha else "–",
            "multiply-adds left in the inner layer, % (by the formula)":
                f"{left(alpha, INNER)} ({100 * cost_ratio(alpha):.1f})",
            "in the network": left(alpha, "multiply_adds_network"),
            "numbers left in the inner layer's maps, % (by the formula)":
                f"{left(alpha, 'numbers_inner')} ({100 * memory_ratio(alpha):.1f})",
            "in all maps": left(alpha, "numbers_network"),
            "parameters": f"{of.one('parameters'):,}",
            "training, s": f"{statistics.median(of.values('train_seconds')):.0f}",
        }
        for alpha, of in trained(rows).items()
    ]  # fmt: skip
    times = [
        {"step": step, **{f"α = {alpha:g}": time_and_share(of.where(alpha=alpha))
                          for alpha in ALPHAS if alpha}}
        for step, of in timed(rows).items()
    ]  # fmt: skip
    return {
        f"Accuracy and cost, {len(percent(rows, 0))} seeds": costs,
        "Time of a step as a multiple of that with α = 0: median (quartiles); in square brackets, "
        "of the multiply-adds": times,
    }


def time_and_share(rows: Rows) -> str:
    return f"{studies.quartiles(rows.values('ratio'))} [{rows.one('multiply_adds_share'):.2f}]"


def picture(rows: Rows) -> figures.Figure:
    reached, times = {}, {}
    for alpha, of in trained(rows).items():
        million = of.one("multiply_adds_network") / 1e6
        reached[f"α = {alpha:g}"] = [figures.point(million, percent(rows, alpha))]
    for step, of in timed(rows).items():
        times[step] = [
            studies.median_point(by.one("multiply_adds_share"), by.values("ratio"))
            for by in of.by("alpha").values()
        ]
    shares = sorted({share for points in times.values() for share, *_ in points})
    times["as the multiply-adds"] = [(share, float(share), 0.0) for share in shares]
    across = "million multiply-adds of an image, whole network"
    accuracy = figures.Panel("Accuracy, mean ± sd", across, "test accuracy, %", reached)
    title, plain = "Time, median ± half the interquartile range", "a plain one's"
    across, up = f"multiply-adds left, of {plain}", f"time of a step, of {plain}"
    timing = figures.Panel(title, across, up, times, levels={plain: 1.0})
    data = trained(rows)[0].one("dataset")
    title = f"Octave convolution on {data}: a fraction α of the maps at half the size"
    return figures.side_by_side([accuracy, timing], title)


def share(rows: Rows, alpha: float, what: str) -> float:
    """Of a count with α = 0, the part that is left."""
    of = trained(rows)
    return of[alpha].one(what) / of[0].one(what)


def percent(rows: Rows, alpha: float) -> np.ndarray:
    """Test accuracy of each seed."""
    return trained(rows)[alpha].values("test_accuracy", 100)


def trained(rows: Rows) -> dict[float, Rows]:
    return rows.having("seed").by("alpha")


def timed(rows: Rows) -> dict[str, Rows]:
    return rows.having("round").by("step")


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
