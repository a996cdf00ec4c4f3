"""How sure are networks of noise, and of what else is no digit? Can they draw one?

    python experiments/noise_confidence.py              # MNIST, 4 networks × 10 seeds
    python experiments/noise_confidence.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/noise_confidence/README.md.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, unknown_sets
from nn_backprop.models import CNN, GeluMLP, happy
from nn_backprop.studies import Claim, Row, Rows, hendrycks
from nn_backprop.studies.answers import compared, probabilities
from nn_backprop.studies.drawing import draw, judged, nearest, sheet, stretched
from nn_backprop.studies.hendrycks import DIGITS, PUBLISHED, UNIFORM
from nn_backprop.training import fit_many

MADE = ("Gaussian noise", UNIFORM, "random pixels", "Gaussian digits", "half digits")
FILES = ("Omniglot 2", "notMNIST", "Fashion-MNIST", "KMNIST")
DRAWN_WITH = 10_000  # the seed of what is made, for all networks the same

SURE, AS_SURE = 50.0, 10.0  # our own bars, in percent and points
CHANCE = 10.0
STEPS, SMOKE_STEPS = 500, 100
PEOPLE = "people.pt"  # digits that people wrote, in a run's folder
JUDGED = 1_000  # test digits, and images of noise, that are shown to the judge of drawings


class Kind(NamedTuple):
    """A network and how it is trained."""

    make: Callable[[], nn.Module]
    lr: float
    batch_size: int
    epochs: tuple[int, int]  # of a full run, of a smoke test
    as_they_are: bool  # inputs from 0 to 1; else normalised


SOURCE, HERE = HAPPY = ("happy, as in the source", "happy, as in train.py")
BASELINE, FILTERS = "softmax MLP", "CNN"
THEIRS = f"published, {BASELINE}"
KNOWN = {THEIRS: PUBLISHED, "in the paper": hendrycks.PAPER}
KINDS = {
    SOURCE: Kind(happy, 1.5, 10, (30, 20), True),
    HERE: Kind(happy, 1e-2, 32, (40, 60), False),
    BASELINE: Kind(GeluMLP, 1e-3, 128, (30, 6), True),
    FILTERS: Kind(CNN, 6e-3, 128, (10, 5), False),
}


@dataclass(frozen=True)
class Options(studies.Options):
    """Confidence on noise and on other images that are no digits; digits drawn by networks."""

    seeds: int = 10
    """Number of seeds, from 0."""


class Job(NamedTuple):
    """One training."""

    name: str  # of the kind
    seed: int
    sets: tuple[str, ...]  # what it is shown beside digits and noise that is not cut off
    options: Options
    folder: Path  # for its drawings


def collect(run: studies.StudyRun, options: Options) -> None:
    data = studies.load_data(options)
    names = MADE if options.smoke else (*MADE, *FILES)
    sets = tuple(unknown_sets(names, data.images[:2], DRAWN_WITH, options.data_root))  # or says so
    jobs = [
        Job(name, seed, sets, options, run.folder)
        for name in (BASELINE, FILTERS, SOURCE, HERE)  # the longest first
        for seed in range(options.seeds)
    ]
    tag = "uniform noise/{network}"
    run.train_all(train, jobs, lambda row: {tag.format(**row): row["confidence"][UNIFORM]})
    run.add([judged(data.test[:JUDGED], data, DRAWN_WITH)])
    labels = data.labels[data.test]
    people = torch.stack([data.images[data.test[labels == digit][0]] for digit in range(10)])
    torch.save(people, run.folder / PEOPLE)


def train(job: Job) -> Row:
    """One network, trained, tested, shown what is no digit, and asked to draw; in percent."""
    data = data_for(job.name, job.options)
    began = time.perf_counter()
    model = trained(job, data)
    seconds = time.perf_counter() - began
    drawn = draw(model, data, SMOKE_STEPS if job.options.smoke else STEPS)
    torch.save(drawn, job.folder / file_of(job.name, job.seed))
    digit, correlation = nearest(drawn, data)
    wanted = np.arange(10)

    row: Row = {
        "network": job.name, "seed": job.seed, "dataset": data.name,
        "test_accuracy": 100 * studies.accuracies(model, data, ("test",))["test_accuracy"],
        "drawn_confidence": (100 * probabilities(model, data, drawn)[wanted, wanted]).tolist(),
        "recognised": 100 * float((digit.numpy() == wanted).mean()),
        "correlation": correlation.mean().item(), "train_seconds": seconds,
    }  # fmt: skip
    sets = sets_for(job.sets, job.options)
    given = {name: probabilities(model, data, images) for name, images in sets.items()}
    row |= compared({name: p.max(1) for name, p in given.items()}, "confidence")
    if job.name in HAPPY:
        row |= compared({name: p.max(1) / p.sum(1) for name, p in given.items()}, "share")
    return row


def trained(job: Job, data: ImageData) -> nn.Module:
    """The network of the job, after its training."""
    kind, seed = KINDS[job.name], job.seed
    how: dict[str, Any] = {"epochs": kind.epochs[job.options.smoke], "batch_size": kind.batch_size}
    torch.manual_seed(seed)
    model = kind.make()
    if isinstance(model, GeluMLP):
        hendrycks.train_as_published(model, data, lr=kind.lr, seed=seed, **how)
    elif job.name == FILTERS:
        studies.train_network(model, data, lr=kind.lr, decay=0.1, seed=seed, **how)
    else:
        if job.name == HERE:
            how["weight_decays"] = 0.03
        else:
            how |= {"optimizer": "sgd", "schedule": "constant"}
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        losses = fit_many([model], data, seeds=[seed], lrs=kind.lr, **how)
        if not losses.isfinite().all():
            raise studies.StudyError(f"a training diverged, {job}")
    return model


def data_for(name: str, options: Options) -> ImageData:
    """The data as the network of this kind takes its inputs."""
    data = studies.load_data(options)
    return replace(data, mean=0.0, std=1.0) if KINDS[name].as_they_are else data


@functools.cache
def sets_for(names: tuple[str, ...], options: Options) -> dict[str, Tensor]:
    """The test digits, noise that is not cut off, and the named sets."""
    data = studies.load_data(options)
    return hendrycks.shown(names, data.images[data.test], DRAWN_WITH, options.data_root)


def file_of(name: str, seed: int) -> str:
    return f"drawn-{list(KINDS).index(name)}-{seed}.pt"


# --- What the rows come to ----------------------------------------------------------------------


def by_network(rows: Rows) -> dict[str, Rows]:
    by = rows.having("network").by("network")
    return {name: by[name] for name in KINDS}


def of_set(rows: Rows, what: str, name: str) -> np.ndarray:
    """What was measured of a set, of each seed."""
    return rows.values(lambda row: row[what][name])


def claims(rows: Rows) -> list[Claim]:
    """Of uniform noise and of drawings, by network; published figures, of sets that are there."""
    by, found = by_network(rows), []
    for name, of in by.items():  # the happy ones' words are judged
        words = ("confidently", "not evenly", "as sure") if name in HAPPY else (None, None, None)
        noise, on = of_set(of, "confidence", UNIFORM), f"on {UNIFORM}"
        bar = f"%: {SURE:g} or more (our bar)"
        claim = f"{name}: mean confidence {on}"
        found.append(studies.between(f"{claim}, {bar}", words[0], noise, low=SURE))
        if name in HAPPY:
            share = f"{name}: mean share of the largest output {on}, {bar}"
            shares = of_set(of, "share", UNIFORM)
            found.append(studies.between(share, words[1], shares, low=SURE))
        less = noise - of_set(of, "confidence", DIGITS)
        claim += f" less that on test digits, points: −{AS_SURE:g} or more (our bar)"
        found.append(studies.between(claim, words[2], less, low=-AS_SURE))
    for key, what in (("confidence", "mean confidence on"), ("confidence auroc", "AUROC against")):
        for name, figure in PUBLISHED[key].items():
            if name in by[BASELINE][0][key]:
                claim = f"{BASELINE}: {what} {name}, %: the published is like one more of ours"
                found.append(studies.one_of(claim, figure, of_set(by[BASELINE], key, name)))
    for name, of in by.items():
        claim = f"{name}: recognised of its drawings, %: at most {CHANCE:g}, chance"
        word = "no idea how to draw" if name in HAPPY else None
        found.append(studies.between(claim, word, of.values("recognised"), high=CHANCE))
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    by, cell = by_network(rows), studies.mean_sd

    def of_sets(key: str) -> studies.Table:
        """A row for each set: what every network's kinds of confidence come to."""
        own = f"confidence{key}"
        known = {title: of[own] for title, of in KNOWN.items() if own in of}
        return [
            {
                "images": name,
                **{f"{network}{which}": cell(of_set(of, f"{what}{key}", name))
                   for network, of in by.items()
                   for what, which in (("confidence", ""), ("share", ": share")) if what in of[0]},
                **{title: f"{of[name]:g}" if name in of else "–" for title, of in known.items()},
            }
            for name in by[BASELINE][0][own]
        ]  # fmt: skip

    drawings = [
        {
            "network": name,
            "test accuracy, %": cell(of.values("test_accuracy")),
            "confidence in its drawings, %":
                cell(of.values(lambda row: statistics.fmean(row["drawn_confidence"]))),
            "in the worst of ten, %": cell(of.values(lambda row: min(row["drawn_confidence"]))),
            "recognised, %": cell(of.values("recognised")),
            "correlation": cell(of.values("correlation")),
            "training, s": f"{statistics.median(of.values('train_seconds')):.1f}",
        }
        for name, of in by.items()
    ]  # fmt: skip
    (judge,) = rows.having("right")
    seeds = f"{by[BASELINE].one('dataset')}, {len(by[BASELINE])} seeds"
    return {
        f"Mean confidence, %, {seeds}; sigmoids: largest output, and its share of the sum of all":
            of_sets(""),
        f"AUROC of the confidence, test digits against other images, %, {seeds}": of_sets(" auroc"),
        f"Images at least as sure as the median test digit, %, {seeds}": of_sets(" as sure"),
        "Ten digits drawn by each network; recognised by the training image that correlates most: "
        f"of test digits {100 * judge['right']:.1f} %, correlation {judge['of_digits']:.3f}; of "
        f"uniform noise {judge['of_noise']:.3f}": drawings,
    }  # fmt: skip


def picture(rows: Rows) -> figures.Figure | None:
    by, folder = by_network(rows), rows.folder
    if folder is None or not (folder / PEOPLE).exists():
        return None

    def lines(key: str) -> dict[str, list[figures.Point]]:
        names = list(by[BASELINE][0][f"confidence{key}"])
        found: dict[str, list[figures.Point]] = {
            network: [figures.point(name, of_set(of, f"confidence{key}", name)) for name in names]
            for network, of in by.items()
        }
        known = PUBLISHED[f"confidence{key}"]
        found[THEIRS] = [(name, known[name], 0.0) for name in names if name in known]
        return found

    drawn = [torch.load(folder / file_of(name, 0), weights_only=True) for name in by]
    people = torch.load(folder / PEOPLE, weights_only=True)
    panels = [
        figures.Panel("Confidence in the answer", "", "mean largest output or probability, %",
                      lines(""), levels={"our bar for noise": SURE, "least of a softmax": 10}),
        figures.Panel("Digits against other images, by confidence", "", "AUROC, %",
                      lines(" auroc"), levels={"chance": 50}),
        figures.Panel("Drawn, from the top: by happy, as in the source;\n"
                      "as in train.py; by the softmax MLP; the CNN; people",
                      image=sheet(torch.stack([*map(stretched, drawn), people])[:, :, 0])),
    ]  # fmt: skip
    about = f"{by[BASELINE].one('dataset').upper()}: mean ± standard deviation over "
    about += f"{len(by[BASELINE])} seeds; drawings of seed 0, inverted"
    title = f"Noise, other images that are no digits, and digits drawn, {about}"
    return figures.side_by_side(panels, title)


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
