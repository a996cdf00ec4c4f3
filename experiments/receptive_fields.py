"""What do local receptive fields gain, and what does sharing their weights gain on top?

    python experiments/receptive_fields.py                # MNIST, ten minutes on two cores
    python experiments/receptive_fields.py --smoke        # the embedded digits, seconds

What is compared, and what came out: results/receptive_fields/README.md.
"""

import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, resize, shift, subset, suited
from nn_backprop.models import MODELS, counting
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.training import evaluate, steps_per_epoch

PUBLISHED = {"net1": 80.0, "net2": 87.0, "net3": 88.5, "net4": 94.0, "net5": 98.4}  # %
LRS = {
    "net1": 1e-3, "net2": 3e-3, "net3": 1e-2, "net4": 3e-3, "net5": 1e-2, "net5-unshared": 3e-3,
    "fully-connected": 3e-3, "locally-connected": 1e-2, "shared-weights": 2e-2,
}  # fmt: skip
NETS = (*PUBLISHED, "net5-unshared")
FULL, LOCAL, SHARED = FAMILIES = ("fully-connected", "locally-connected", "shared-weights")
LEAKY, CLEAN, LARGE = "leaky", "clean", "28 × 28"
DRAWINGS, PLACES, LEARNT = 12, 4, 32  # a class: drawings, places of each, examples for training
SIZES = (100, 300, 1_000, 10_000, 55_000)
SHIFTS = (1, 2, 3, 4, 6)  # pixels, each up, down, left and right
COMPARED = 2  # pixels


@dataclass(frozen=True)
class Options(studies.Options):
    """Net-1 to Net-5, and three ways to link the same units."""

    least: ClassVar[dict[str, int]] = {**studies.Options.least, "draws": 2}
    draws: int = 20
    """Repetitions of 1989's experiment, each with other digits and another start."""


class Job(NamedTuple):
    """A network to train."""

    protocol: str
    model: str
    n: int  # training examples
    seed: int
    epochs: int
    batch_size: int
    shifts: Sequence[int]
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    jobs = [
        Job(protocol, net, 10 * LEARNT, seed, 1 if options.smoke else 60, 10, (), options)
        for seed in range(options.draws)
        for protocol in (LEAKY, CLEAN)
        for net in NETS
    ]
    sizes = (100, 1_000) if options.smoke else SIZES
    for n in reversed(sizes):  # the longest first
        batch_size = min(n, 128)
        epochs = 4 if options.smoke else -(-2_000 // steps_per_epoch(n, batch_size))
        shifts = SHIFTS if n == max(sizes) else ()
        jobs += [
            Job(LARGE, family, n, seed, epochs, batch_size, shifts, options)
            for seed in range(options.seeds)
            for family in FAMILIES
        ]
    run.train_all(train, jobs, lambda row: {"{model}/{n}".format(**row): row["test"]})


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """Trains a network; accuracies are shares, 0 to 1."""
    torch.manual_seed(job.seed)
    model = MODELS[job.model]()
    if job.protocol == LEAKY:
        data = as_in_1989(studies.load_data(job.options), job.seed)
    else:
        data = subset(resized(job.options, getattr(model, "image_size", 28)), job.n, job.seed)
    data = suited(data, model)
    trained = studies.train_network(
        model, data, lr=LRS[job.model], epochs=job.epochs, batch_size=job.batch_size, seed=job.seed
    )
    row = {
        "protocol": job.protocol, "model": job.model, "n": job.n, "seed": job.seed,
        "parameters": counting.parameters(model),
        "links": counting.links(model, data.batch(data.test[:1])[0]),
        "seconds": trained.seconds,
        "train": evaluate(model, data, data.train).accuracy,
        "test": evaluate(model, data, data.test).accuracy,
    }  # fmt: skip
    for pixels in job.shifts:
        moved = (
            replace(data, images=shift(data.images, down, right))
            for down, right in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels))
        )
        row[f"shift {pixels}"] = statistics.fmean(
            evaluate(model, images, data.test).accuracy for images in moved
        )
    return row


@functools.cache
def resized(options: Options, side: int) -> ImageData:
    data = studies.load_data(options)
    return replace(data, images=resize(data.images, side))


def as_in_1989(data: ImageData, seed: int) -> ImageData:
    """480 images of 16 × 16: of each class, 12 digits in 4 places; 32 of these 48 for training.

    The middle of an MNIST image, which holds the digit, is made 16 × 13, and stands at the left
    edge or one, two or three pixels further right. There is no validation split.
    """
    chosen = subset(data, 10 * DRAWINGS, seed).train
    small = resize(data.images[chosen][..., 2:26, 4:24], 16, 13)
    images = torch.zeros(len(chosen), PLACES, 1, 16, 16, dtype=torch.uint8)
    for place in range(PLACES):
        images[:, place, :, :, place : place + 13] = small
    labels = data.labels[chosen].repeat_interleave(PLACES)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for k in range(10):
        members = (labels == k).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        train.append(members[:LEARNT])
        test.append(members[LEARNT:])
    return replace(
        data, images=images.flatten(0, 1), labels=labels,
        train=torch.cat(train), validation=torch.zeros(0, dtype=torch.int64), test=torch.cat(test),
    )  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def claims(rows: Rows) -> list[Claim]:
    return of_1989(rows, LEAKY) + of_1989(rows, CLEAN) + of_28_by_28(rows)


def of_1989(rows: Rows, protocol: str) -> list[Claim]:
    of = {net: percent(rows, model=net, protocol=protocol) for net in NETS}
    found, steps = [], {}
    for before, after in pairwise(PUBLISHED):
        steps[after] = of[after] - of[before]
        published = f"+{PUBLISHED[after] - PUBLISHED[before]:.1f}"
        claim = f"{protocol}: {after} is more accurate than {before}, in points"
        found.append(studies.between(claim, published, steps[after], low=0))
    for jump, published in (("net4", "+4.0"), ("net5", "+2.9")):
        claim = f"{protocol}: the step to {jump} is larger than the step to net3, by points"
        found.append(studies.between(claim, published, steps[jump] - steps["net3"], low=0))
    claim = f"{protocol}: sharing, not size: net5 is more accurate than net5-unshared, in points"
    return [*found, studies.between(claim, None, of["net5"] - of["net5-unshared"], low=0)]


def of_28_by_28(rows: Rows) -> list[Claim]:
    found = []
    least, *_, most = sizes(rows)
    for other in (LOCAL, FULL):
        gains = [percent(rows, model=SHARED, n=n) - percent(rows, model=other, n=n)
                 for n in (least, most)]  # fmt: skip
        claim = f"{SHARED} gains more on {other} at n = {least:,} than at {most:,}, in points"
        found.append(studies.between(claim, None, gains[0] - gains[1], low=0))
        losses = [
            percent(rows, model=family, n=most)
            - percent(rows, f"shift {COMPARED}", model=family, n=most)
            for family in (other, SHARED)
        ]
        claim = f"moved by {COMPARED} px, {SHARED} loses less than {other}, in points"
        found.append(studies.between(claim, None, losses[0] - losses[1], low=0))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by_model = rows.by("model")

    def cell(value: str = "test", **wanted: object) -> str:
        return studies.mean_sd(percent(rows, value, **wanted))

    nets = [
        {
            "network": net,
            "links": f"{by_model[net].one('links'):,}",
            "weights": f"{by_model[net].one('parameters'):,}",
            "published, %": PUBLISHED.get(net, "–"),
            "leaky, %": cell(model=net, protocol=LEAKY),
            "clean, %": cell(model=net, protocol=CLEAN),
            "clean, on its training images, %": cell("train", model=net, protocol=CLEAN),
        }
        for net in NETS
    ]
    *_, most = sizes(rows)
    by_size = [
        {
            LARGE: family,
            "weights": f"{by_model[family].one('parameters'):,}",
            **{f"n = {n:,}": cell(model=family, n=n) for n in sizes(rows)},
        }
        for family in FAMILIES
    ]
    by_shift = [
        {
            f"n = {most:,}, moved by": family,
            **{f"{s} px": cell(f"shift {s}", model=family, n=most) for s in SHIFTS},
        }
        for family in FAMILIES
    ]
    draws, seeds = (len(rows.where(protocol=of).by("seed")) for of in (CLEAN, LARGE))
    return {
        f"1989's networks, {draws} draws: test accuracy": nets,
        f"Test accuracy by training examples, {seeds} seeds, %": by_size,
        f"Test accuracy on moved images, {seeds} seeds, %": by_shift,
    }


def picture(rows: Rows) -> figures.Figure:
    nets: dict[str, list[figures.Point]] = {
        f"{protocol} split": [
            figures.point(k, percent(rows, model=net, protocol=protocol))
            for k, net in enumerate(PUBLISHED, start=1)
        ]
        for protocol in (LEAKY, CLEAN)
    }
    nets["published, 1989"] = [(k, v, 0.0) for k, v in enumerate(PUBLISHED.values(), start=1)]
    for protocol in (LEAKY, CLEAN):
        unshared = percent(rows, model="net5-unshared", protocol=protocol)
        nets[f"Net-5 unshared, {protocol}"] = [figures.point(5, unshared)]
    *_, most = sizes(rows)
    by_size = {
        f: [figures.point(n, 100 - percent(rows, model=f, n=n)) for n in sizes(rows)]
        for f in FAMILIES
    }
    by_shift = {
        f: [
            figures.point(s, percent(rows, f"shift {s}" if s else "test", model=f, n=most))
            for s in (0, *SHIFTS)
        ]
        for f in FAMILIES
    }
    accuracy, error = "test accuracy, %", "test error, %"
    title = f"Moved test images, n = {most:,}"
    return figures.side_by_side(
        [
            figures.Panel("320 digits of 16 × 16", "Net-1 to Net-5", accuracy, nets),
            figures.Panel("The same units, 28 × 28", "training examples", error, by_size, "xy"),
            figures.Panel(title, "moved by, pixels", accuracy, by_shift),
        ],
        "Local fields and shared weights: mean ± standard deviation over seeds",
    )


def percent(rows: Rows, value: str = "test", **wanted: object) -> np.ndarray:
    """A share of the rows that have what is wanted, in percent, of each seed."""
    return rows.where(**wanted).values(value, 100)


def sizes(rows: Rows) -> list[int]:
    """Numbers of training examples, rising."""
    return sorted(rows.where(protocol=LARGE).by("n"))


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
