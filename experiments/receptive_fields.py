"""What do local receptive fields gain, and what does sharing their weights gain on top?

    python experiments/receptive_fields.py                # MNIST, tens of minutes on two cores
    python experiments/receptive_fields.py --smoke        # the embedded digits, seconds

**1989.** LeCun's Net-1 to Net-5 learn 320 digits of 16 × 16 pixels. Their 480 digits were twelve
drawings of each class by one person, each in four horizontal places, and 320 of them were drawn at
random for training: for most test digits, the same drawing a pixel aside had been learnt. The
networks train here both ways: so (`leaky`: twelve MNIST digits of each class, made 16 × 13, in four
places, split at random), and with 320 whole MNIST digits for training and MNIST's own 10,000 for
testing (`clean`). Beside the five stands Net-5 without sharing: as many units and links, each link
with a weight of its own. Published test accuracies: 80.0, 87.0, 88.5, 94.0, 98.4 % (LeCun 1989, as
retold by Hastie, Tibshirani & Friedman 2009, section 11.7).

**28 × 28.** Three networks with the same units and ReLUs: each unit fed by all units below, by a
5 × 5 field with weights of its own, by a field whose weights all places share. Accuracy against the
number of training examples, and, with the most, against a shift of the test images.

All contestants of a comparison see the same examples, in the same order and equally often. Each
network's learning rate was chosen from 0.001 to 0.03 on MNIST's validation split, with other seeds
(at n = 320, or 300 and 55,000). The test images are read when a training has ended, as they are
and moved, and nothing is chosen by them.
"""

import functools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from nn_backprop import figures
from nn_backprop.data import ImageData, load, resize, shift, subset, suited
from nn_backprop.engines import autograd
from nn_backprop.models import MODELS, counting
from nn_backprop.studies.evidence import Claim, between, differences, spread
from nn_backprop.studies.old_study import Row, Study, StudyOptions, UsageError, command
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch

PUBLISHED = {"net1": 80.0, "net2": 87.0, "net3": 88.5, "net4": 94.0, "net5": 98.4}  # %
LRS = {
    "net1": 1e-3, "net2": 3e-3, "net3": 1e-2, "net4": 3e-3, "net5": 1e-2, "net5-unshared": 3e-3,
    "fully-connected": 3e-3, "locally-connected": 1e-2, "shared-weights": 2e-2,
}  # fmt: skip
NETS = ("net1", "net2", "net3", "net4", "net5", "net5-unshared")
FAMILIES = ("fully-connected", "locally-connected", "shared-weights")
DRAWINGS, PLACES, LEARNT = 12, 4, 32  # a class: drawings, places of each, examples for training
SIZES = (100, 300, 1_000, 10_000, 55_000)
SHIFTS = (1, 2, 3, 4, 6)  # pixels, each up, down, left and right


@dataclass(frozen=True)
class Options(StudyOptions):
    """Net-1 to Net-5, and three ways to link the same units."""

    draws: int = 20
    """Repetitions of 1989's experiment, each with other digits and another start; at least 2."""


@dataclass(frozen=True)
class Job:
    """A network to train."""

    data: str
    root: Path | None
    protocol: str  # leaky, clean, or 28 × 28
    model: str
    n: int  # training examples
    seed: int
    epochs: int
    batch_size: int
    shifts: tuple[int, ...] = ()


def conduct(study: Study, options: Options) -> None:
    if options.draws < 2:
        raise UsageError(f"--draws must be 2 or more, not {options.draws}")
    name, root = "digits" if options.smoke else "mnist", options.data_root
    load(name, root)
    jobs = [
        Job(name, root, protocol, net, 10 * LEARNT, seed, 1 if options.smoke else 60, 10)
        for seed in range(2 if options.smoke else options.draws)
        for protocol in ("leaky", "clean")
        for net in NETS
    ]
    sizes = (100, 1_000) if options.smoke else SIZES
    for n in reversed(sizes):  # the longest first
        batch_size = min(n, 128)
        epochs = 4 if options.smoke else -(-2_000 // steps_per_epoch(n, batch_size))
        shifts = SHIFTS if n == max(sizes) else ()
        jobs += [
            Job(name, root, "28 × 28", family, n, seed, epochs, batch_size, shifts)
            for seed in range(options.seeds)
            for family in FAMILIES
        ]
    study.carry_out(train, jobs, lambda row: {f"{row['model']}/{row['n']}": row["test"]})
    study.finish(_tables(study.rows), _claims(study.rows, sizes), _figure(study.rows))


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> Row:
    """Trains a network; accuracies are shares, 0 to 1."""
    torch.manual_seed(job.seed)
    model = MODELS[job.model]()
    data = _data(job.data, job.root, getattr(model, "image_size", 28))
    if job.protocol == "leaky":
        data = _as_in_1989(_data(job.data, job.root, 28), job.seed)
    else:
        data = subset(data, job.n, job.seed)
    data = suited(data, model)
    lr = LRS[job.model]
    optimizer = make_optimizer("adam", model.parameters(), lr, 0.0)
    steps = job.epochs * steps_per_epoch(job.n, job.batch_size)
    schedule = make_schedule("one-cycle", optimizer, lr, steps)
    began = time.perf_counter()
    fit(
        model, autograd, optimizer, schedule, data,
        epochs=job.epochs, batch_size=job.batch_size, seed=job.seed,
    )  # fmt: skip
    row = {
        "protocol": job.protocol, "model": job.model, "n": job.n, "seed": job.seed,
        "parameters": counting.parameters(model),
        "links": counting.links(model, data.batch(data.test[:1])[0]),
        "seconds": time.perf_counter() - began,
        "train": evaluate(model, data, data.train).accuracy,
        "test": evaluate(model, data, data.test).accuracy,
    }  # fmt: skip
    for pixels in job.shifts:
        moves = ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels))
        moved = [_test_images_moved(data, down, right) for down, right in moves]
        row[f"shift {pixels}"] = statistics.fmean(
            evaluate(model, images, images.test).accuracy for images in moved
        )
    return row


@functools.cache
def _data(name: str, root: Path | None, side: int) -> ImageData:
    data = load(name, root, say=lambda line: None)
    return replace(data, images=resize(data.images, side))


def _as_in_1989(data: ImageData, seed: int) -> ImageData:
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


def _test_images_moved(data: ImageData, down: int, right: int) -> ImageData:
    images = shift(data.images[data.test], down, right)
    return replace(
        data, images=images, labels=data.labels[data.test], test=torch.arange(len(images))
    )


# --- What the rows come to ----------------------------------------------------------------------


def _of(rows: Sequence[Row], value: str = "test", **wanted: object) -> list[float]:
    """One value of the rows that have what is wanted, in the order of the seeds; in percent."""
    chosen = [row for row in rows if all(row[key] == wanted[key] for key in wanted)]
    return [100 * row[value] for row in sorted(chosen, key=lambda row: row["seed"])]


def _tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    nets: list[Row] = []
    for net in NETS:
        of = next(row for row in rows if row["model"] == net)
        nets.append(
            {
                "network": net,
                "links": f"{of['links']:,}",
                "weights": f"{of['parameters']:,}",
                "published, %": PUBLISHED.get(net, "–"),
                "leaky, %": spread(_of(rows, model=net, protocol="leaky")),
                "clean, %": spread(_of(rows, model=net, protocol="clean")),
                "clean, on its training images, %": spread(
                    _of(rows, "train", model=net, protocol="clean")
                ),
            }
        )
    sizes = sorted({row["n"] for row in rows if row["protocol"] == "28 × 28"})
    by_size: list[Row] = [
        {
            "28 × 28": family,
            "weights": f"{next(r for r in rows if r['model'] == family)['parameters']:,}",
            **{f"n = {n:,}": spread(_of(rows, model=family, n=n)) for n in sizes},
        }
        for family in FAMILIES
    ]
    by_shift: list[Row] = [
        {
            f"n = {sizes[-1]:,}, moved by": family,
            **{
                f"{s} px": spread(_of(rows, f"shift {s}", model=family, n=sizes[-1]))
                for s in SHIFTS
            },
        }
        for family in FAMILIES
    ]
    draws, seeds = (
        len({row["seed"] for row in rows if row["protocol"] == protocol})
        for protocol in ("clean", "28 × 28")
    )
    return {
        f"1989's networks, {draws} draws: test accuracy": nets,
        f"Test accuracy by training examples, {seeds} seeds, %": by_size,
        f"Test accuracy on moved images, {seeds} seeds, %": by_shift,
    }


def _claims(rows: Sequence[Row], sizes: Sequence[int]) -> list[Claim]:
    claims = []
    for protocol in ("leaky", "clean"):
        of = {net: _of(rows, model=net, protocol=protocol) for net in NETS}
        steps = {}
        for before, after in pairwise(PUBLISHED):
            steps[after] = differences(of[after], of[before])
            published = f"+{PUBLISHED[after] - PUBLISHED[before]:.1f}"
            what = f"{protocol}: {after} is more accurate than {before}, in points"
            claims.append(between(what, published, steps[after], low=0))
        for jump in ("net4", "net5"):
            what = f"{protocol}: the step to {jump} is larger than the step to net3, by points"
            published = f"+{PUBLISHED[jump] - {'net4': 88.5, 'net5': 94.0}[jump] - 1.5:.1f}"
            claims.append(between(what, published, differences(steps[jump], steps["net3"]), low=0))
        what = f"{protocol}: sharing, not size: net5 is more accurate than net5-unshared, in points"
        claims.append(between(what, None, differences(of["net5"], of["net5-unshared"]), low=0))
    least, most = min(sizes), max(sizes)
    for other in ("locally-connected", "fully-connected"):
        gains = {
            n: differences(_of(rows, model="shared-weights", n=n), _of(rows, model=other, n=n))
            for n in sizes
        }
        what = f"shared-weights gains more on {other} at n = {least:,} than at {most:,}, in points"
        claims.append(between(what, None, differences(gains[least], gains[most]), low=0))
        pixels = 2
        losses = [
            differences(
                _of(rows, model=family, n=most), _of(rows, f"shift {pixels}", model=family, n=most)
            )
            for family in (other, "shared-weights")
        ]
        what = f"moved by {pixels} px, shared-weights loses less than {other}, in points"
        claims.append(between(what, None, differences(*losses), low=0))
    return claims


def _figure(rows: Sequence[Row]) -> figures.Figure:
    sizes = sorted({row["n"] for row in rows if row["protocol"] == "28 × 28"})
    nets = {
        f"{protocol} split": [
            figures.point(k, _of(rows, model=net, protocol=protocol))
            for k, net in enumerate(PUBLISHED, start=1)
        ]
        for protocol in ("leaky", "clean")
    }
    nets["published, 1989"] = [(k, v, 0.0) for k, v in enumerate(PUBLISHED.values(), start=1)]
    for protocol in ("leaky", "clean"):
        unshared = _of(rows, model="net5-unshared", protocol=protocol)
        nets[f"Net-5 unshared, {protocol}"] = [figures.point(5, unshared)]
    by_size = {
        f: [figures.point(n, [100 - share for share in _of(rows, model=f, n=n)]) for n in sizes]
        for f in FAMILIES
    }
    by_shift = {
        f: [
            figures.point(s, _of(rows, f"shift {s}" if s else "test", model=f, n=sizes[-1]))
            for s in (0, *SHIFTS)
        ]
        for f in FAMILIES
    }
    accuracy = "test accuracy, %"
    return figures.side_by_side(
        [
            figures.Panel("320 digits of 16 × 16", "Net-1 to Net-5", accuracy, nets),
            figures.Panel(
                "The same units, 28 × 28", "training examples", "test error, %", by_size, "xy"
            ),
            figures.Panel(
                f"Moved test images, n = {sizes[-1]:,}", "moved by, pixels", accuracy, by_shift
            ),
        ],
        "Local fields and shared weights: mean ± standard deviation over seeds",
    )


if __name__ == "__main__":
    sys.exit(command(Options, __doc__, conduct))
