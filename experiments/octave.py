"""What does it cost to keep a fraction α of the maps at half the resolution, and what does it save?

    python experiments/octave.py                  # MNIST, 5 fractions × 5 seeds
    python experiments/octave.py --smoke          # the embedded digits, seconds

`OctaveCNN` with α = 0 (a plain convolutional network), ⅛, ¼, ½ and ¾, with equal parameters, data,
epochs and rates: the test accuracy, the multiply-adds and the numbers in the maps, of the inner
layer and of the whole network. They are held against the formulas of Chen et al. 2019 for an inner
layer, 1 − ¾ α (2 − α) for the multiply-adds (82, 67, 44 and 30 %) and 1 − ¾ α for the memory. Chen
et al. have no figure for MNIST: that half of the maps may be low at the price of at most 0.1
percentage points is our own bar, set before the first run. The rate was chosen on the validation
split, in trainings of 2 epochs, among 0.005, 0.01 and 0.02. Afterwards, with nothing beside it, a
step forward and backward is timed on one thread, on small and on large maps: a round has every
fraction once, several steps in a row, in an order drawn anew.
"""

import functools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, channels_last, load
from nn_backprop.engines import ENGINES
from nn_backprop.layers import OctaveConv2d
from nn_backprop.layers.octave import cost_ratio, memory_ratio
from nn_backprop.models import OctaveCNN
from nn_backprop.models.counting import multiply_adds, parameters
from nn_backprop.studies import study
from nn_backprop.studies.evidence import (
    Claim,
    between,
    differences,
    judged,
    median_interval,
    spread,
)
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch

ALPHAS = (0.0, 0.125, 0.25, 0.5, 0.75)
PUBLISHED = {0.125: 0.82, 0.25: 0.67, 0.5: 0.44, 0.75: 0.30}  # Chen et al. 2019
EPOCHS, SMOKE_EPOCHS, BATCH, LR, DECAY = 4, 1, 128, 2e-2, 0.05
CHANNELS, SMOKE_CHANNELS = (16, 32, 32), (8, 16, 16)
MARGIN = 0.1  # percentage points
STEPS = 5  # timed together


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Octave convolution: accuracy, multiply-adds, memory and time by the fraction of low maps."""

    rounds: int = 30
    """Timings of each step; at least 6, for the interval of a median."""


class Job(NamedTuple):
    """One training."""

    alpha: float
    seed: int
    options: Options


def conduct(under_way: study.Study, options: Options) -> None:
    if options.rounds < 6:
        raise study.UsageError(f"--rounds must be 6 or more, not {options.rounds}")
    _data(options)  # so that a missing MNIST ends the study here
    jobs = [Job(alpha, seed, options) for seed in range(options.seeds) for alpha in ALPHAS]
    rows = under_way.carry_out(
        train, jobs, lambda row: {f"accuracy/alpha {row['alpha']:g}": row["test_accuracy"]}
    )
    timings = _timings(options)
    under_way.rows += timings
    by_alpha = {alpha: [row for row in rows if row["alpha"] == alpha] for alpha in ALPHAS}
    by_step: dict[str, dict[float, list[study.Row]]] = {}
    for row in timings:
        by_step.setdefault(row["step"], {}).setdefault(row["alpha"], []).append(row)
    tables = {
        f"Accuracy and cost, {options.seeds} seeds": [
            _summary(alpha, found, by_alpha[0.0]) for alpha, found in by_alpha.items()
        ],
        "Time of a step as a multiple of that with α = 0: median (quartiles); in square brackets, "
        "of the multiply-adds": [
            {"step": step, **{f"α = {a:g}": _quartiles(by[a]) for a in ALPHAS if a > 0}}
            for step, by in by_step.items()
        ],
    }  # fmt: skip
    claims = _costs(by_alpha) + _found(by_alpha, by_step)
    under_way.finish(tables, claims, _picture(by_alpha, by_step))


def train(job: Job) -> study.Row:
    """One network, trained and tested."""
    data = _data(job.options)
    torch.manual_seed(job.seed)
    model = OctaveCNN(_channels(job.options), job.alpha)
    optimizer = make_optimizer("adam", model.parameters(), LR, DECAY)
    epochs = SMOKE_EPOCHS if job.options.smoke else EPOCHS
    steps = epochs * steps_per_epoch(len(data.train), BATCH)
    schedule = make_schedule("one-cycle", optimizer, LR, steps)
    began = time.perf_counter()
    fit(model, ENGINES["autograd"], optimizer, schedule, data,
        epochs=epochs, batch_size=BATCH, seed=job.seed)  # fmt: skip
    seconds = time.perf_counter() - began
    validation = evaluate(model, data, data.validation)
    test = evaluate(model, data, data.test)  # the only time that the test split is read
    image = data.batch(data.train[:1])[0]
    seen = _seen(model, image)
    return {
        "alpha": job.alpha,
        "seed": job.seed,
        "dataset": data.name,
        "epochs": epochs,
        "parameters": parameters(model),
        "test_accuracy": test.accuracy,
        "validation_accuracy": validation.accuracy,
        "multiply_adds_inner": multiply_adds(model.conv2, seen[1].maps),
        "multiply_adds_network": multiply_adds(model, image),
        "numbers_inner": seen[1].numbers,
        "numbers_network": sum(layer.numbers for layer in seen),
        "train_seconds": seconds,
    }


class Seen(NamedTuple):
    """What one layer was handed, and how many numbers its own maps hold."""

    maps: Tensor | tuple[Tensor, Tensor]
    numbers: int


@torch.no_grad()
def _seen(model: nn.Module, image: Tensor) -> list[Seen]:
    """Of the octave layers, in their order."""
    seen: list[Seen] = []

    def look(layer: nn.Module, inputs: tuple, output: Any) -> None:
        own = output if isinstance(output, tuple) else (output,)
        seen.append(Seen(inputs[0], sum(maps.numel() for maps in own)))

    layers = [layer for layer in model.modules() if isinstance(layer, OctaveConv2d)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    model(image)
    for handle in handles:
        handle.remove()
    return seen


def _timings(options: Options) -> list[study.Row]:
    """Steps timed on one thread: a round has every fraction once, in any order, and the ratios are
    those of a round, which are free of the machine's drift."""
    rounds, batch, large = (6, 8, 42) if options.smoke else (options.rounds, BATCH, 112)
    order = random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    channels = _channels(options)
    before, after, _ = channels  # of the inner layer
    rows = []
    for name, make in {
        "training, 28×28 pixels": lambda alpha: _network_step(channels, alpha, batch),
        f"{before} → {after} maps, 14×14": lambda alpha: _layer_step(
            before, after, alpha, 14, batch
        ),
        f"{before} → {after} maps, {large}×{large}": lambda alpha: _layer_step(
            before, after, alpha, large, -(-batch // 64)
        ),
        f"{4 * before} → {4 * after} maps, 28×28": lambda alpha: _layer_step(
            4 * before, 4 * after, alpha, 28, -(-batch // 8)
        ),
    }.items():
        steps = {alpha: make(alpha) for alpha in ALPHAS}
        plain = steps[0.0].multiply_adds
        for number in range(-1, rounds):  # the first does not count
            shuffled = order.sample(ALPHAS, len(ALPHAS))
            seconds = {alpha: _seconds(steps[alpha].carry_out) for alpha in shuffled}
            rows += [
                {
                    "step": name,
                    "alpha": alpha,
                    "round": number,
                    "seconds": seconds[alpha],
                    "ratio": seconds[alpha] / seconds[0.0],
                    "multiply_adds_share": step.multiply_adds / plain,
                }
                for alpha, step in steps.items()
                if number >= 0
            ]
    torch.set_num_threads(threads)
    return rows


class Step(NamedTuple):
    """A step that can be timed, and the multiply-adds of its forward pass."""

    carry_out: Callable[[], object]
    multiply_adds: int


def _network_step(channels: tuple[int, int, int], alpha: float, batch: int) -> Step:
    """Gradients and an update, as the loop has them."""
    torch.manual_seed(0)
    model, targets = OctaveCNN(channels, alpha), torch.randint(10, (batch,))
    images = channels_last(torch.randn(batch, 1, 28, 28))
    optimizer = make_optimizer("adam", model.parameters(), LR, DECAY)

    def carry_out() -> None:
        ENGINES["autograd"](model, images, targets)
        optimizer.step()

    return Step(carry_out, multiply_adds(model, images))


def _layer_step(in_channels: int, out_channels: int, alpha: float, side: int, batch: int) -> Step:
    """Forward and backward of an inner layer, the gradients of weights and maps."""
    torch.manual_seed(0)
    layer, low = OctaveConv2d(in_channels, out_channels, 3, alpha, alpha), int(alpha * in_channels)
    shapes = [(batch, in_channels - low, side, side), (batch, low, side // 2, side // 2)][
        : 2 if low else 1
    ]
    maps = [channels_last(torch.randn(shape)).requires_grad_() for shape in shapes]
    handed = (maps[0], maps[1]) if low else maps[0]
    leaves = [*maps, *layer.parameters()]
    with torch.no_grad():
        output = layer(handed)
    upstream = [torch.randn_like(z) for z in (output if low else (output,))]

    def carry_out() -> None:
        output = layer(handed)
        torch.autograd.grad(output if low else (output,), leaves, upstream)

    return Step(carry_out, multiply_adds(layer, handed))


def _channels(options: Options) -> tuple[int, int, int]:
    return SMOKE_CHANNELS if options.smoke else CHANNELS


def _seconds(work: Callable[[], object]) -> float:
    """Of one of STEPS in a row. One before them does not count: memory is another's until then."""
    work()
    began = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - began) / STEPS


def _costs(by_alpha: Mapping[float, Sequence[study.Row]]) -> list[Claim]:
    """What is counted, on any data. A count has no spread: its interval is one number."""

    def share(alpha: float, what: str) -> float:  # the same for every seed
        (share,) = {row[what] / by_alpha[0.0][0][what] for row in by_alpha[alpha]}
        return share

    def counted(
        claim: str, published: float | None, value: float, low: float, high: float
    ) -> Claim:
        return judged(claim, published, value, (value, value), low, high)

    claims = [
        counted(
            f"inner layer, α = {alpha:g}: multiply-adds left (Chen et al. 2019)", published,
            share(alpha, "multiply_adds_inner"), published - 0.005, published + 0.005,
        )
        for alpha, published in PUBLISHED.items()
    ]  # fmt: skip
    for what, formula, named in (
        ("multiply_adds_inner", cost_ratio, "multiply-adds: 1 − ¾ α (2 − α)"),
        ("numbers_inner", memory_ratio, "numbers in its maps: 1 − ¾ α"),
    ):
        off = max(abs(share(alpha, what) - formula(alpha)) for alpha in PUBLISHED)
        claims.append(counted(f"inner layer, {named}, off by at most", 0, off, 0, 0))
    more = min(share(alpha, "multiply_adds_network") - cost_ratio(alpha) for alpha in PUBLISHED)
    claims.append(
        counted(
            "the whole network keeps more than the formula, by at least", None, more, 1e-9, math.inf
        )
    )
    return claims


def _found(
    by_alpha: Mapping[float, Sequence[study.Row]],
    by_step: Mapping[str, Mapping[float, Sequence[study.Row]]],
) -> list[Claim]:
    """What training and timing found."""
    points = differences(_percent(by_alpha[0.5]), _percent(by_alpha[0.0]))
    claims = [
        between(
            f"test accuracy with α = ½ less that with α = 0, percentage points: −{MARGIN:g} or "
            "more (our bar)", None, points, -MARGIN,
        )
    ]  # fmt: skip
    for step, by in by_step.items():
        ratios = _ratios(by[0.5])
        claims.append(
            judged(
                f"{step}, α = ½: the median ratio of a step's time to that with α = 0 is below 1",
                None, statistics.median(ratios), median_interval(ratios), -math.inf, 1,
            )
        )  # fmt: skip
    return claims


def _summary(
    alpha: float, found: Sequence[study.Row], plain: Sequence[study.Row]
) -> dict[str, str]:
    points = differences(_percent(found), _percent(plain))

    def share(what: str) -> str:
        return f"{100 * found[0][what] / plain[0][what]:.1f}"

    return {
        "α": f"{alpha:g}",
        "test accuracy, %": spread(_percent(found)),
        "against α = 0, points": spread(points, "+") if alpha else "–",
        "multiply-adds left in the inner layer, % (by the formula)":
            f"{share('multiply_adds_inner')} ({100 * cost_ratio(alpha):.1f})",
        "in the network": share("multiply_adds_network"),
        "numbers left in the inner layer's maps, % (by the formula)":
            f"{share('numbers_inner')} ({100 * memory_ratio(alpha):.1f})",
        "in all maps": share("numbers_network"),
        "parameters": f"{found[0]['parameters']:,}",
        "training, s": f"{statistics.median(row['train_seconds'] for row in found):.0f}",
    }  # fmt: skip


def _picture(
    by_alpha: Mapping[float, Sequence[study.Row]],
    by_step: Mapping[str, Mapping[float, Sequence[study.Row]]],
) -> figures.Figure:
    """What a network reaches for its multiply-adds, and what time they take."""
    reached = {}
    for alpha, found in by_alpha.items():
        million = found[0]["multiply_adds_network"] / 1e6
        reached[f"α = {alpha:g}"] = [figures.point(million, _percent(found))]
    times = {}
    for step, by in by_step.items():
        points = []
        for found in by.values():
            low, middle, high = statistics.quantiles(_ratios(found), n=4, method="inclusive")
            points.append((found[0]["multiply_adds_share"], middle, (high - low) / 2))
        times[step] = points
    shares = sorted({share for points in times.values() for share, *_ in points})
    times["as the multiply-adds"] = [(share, share, 0.0) for share in shares]
    return figures.side_by_side(
        [
            figures.Panel(
                "Accuracy, mean ± sd", "million multiply-adds of an image, whole network",
                "test accuracy, %", reached,
            ),
            figures.Panel(
                "Time, median ± half the interquartile range",
                "multiply-adds left, of a plain one's", "time of a step, of a plain one's", times,
                levels={"a plain one's": 1.0},
            ),
        ],
        "Octave convolution on "
        f"{by_alpha[0.0][0]['dataset']}: a fraction α of the maps at half the size",
    )  # fmt: skip


def _quartiles(rows: Sequence[study.Row]) -> str:
    low, middle, high = statistics.quantiles(_ratios(rows), n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f}) [{rows[0]['multiply_adds_share']:.2f}]"


def _percent(rows: Sequence[study.Row]) -> list[float]:
    return [100 * row["test_accuracy"] for row in rows]


def _ratios(rows: Sequence[study.Row]) -> list[float]:
    return [row["ratio"] for row in rows]


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
