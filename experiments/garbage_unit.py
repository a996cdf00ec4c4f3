"""Does a unit for rubbish, trained on one kind of rubbish, know another kind when it sees it?

    python experiments/garbage_unit.py              # MNIST, 2 kinds of rubbish × 5 seeds
    python experiments/garbage_unit.py --smoke      # the embedded digits, seconds

One small convolutional network learns the same batches of digits in four ways. *Softmax* sees
digits alone; it answers always, or, with a threshold, where its confidence is high. The others see
an image of rubbish beside every four digits: as an eleventh class, the *garbage class*, with a
weight of its own; with the target ⅒ for every digit, the *entropic* open-set loss; or with this and
features that shall be short for rubbish and long for digits, the *Objectosphere* (both Dhamija,
Günther & Boult 2018; no bias at the logits, as theirs).

**Rubbish to train on** is of one source: letters of two alphabets (Omniglot 1: Balinese, Korean),
or uniform noise, as many images of either. **Rubbish to choose by** are the letters of a third
alphabet (Early Aramaic), which no network is trained on: of its settings, a method gets those with
the most correct classifications of validation digits at 10 % false positives, the mean over the
seeds. For the Objectosphere the score, too, is chosen: confidence, or, as its authors propose,
confidence × length of the features. **Rubbish to test on** is of other sources. Some of them are
next of kin to what was trained on (Omniglot 2: other alphabets; Gaussian noise and shuffled pixels:
noise), so means over the unseen, and claims, leave these out. EMNIST's letters are not asked for: a
download of 562 MB. The test images are read once for each training, when it has ended. One rate is
for all; in trainings of 2 epochs, twice the rate was better for one method and worse for another.

**Measures**, of all test digits and each set of rubbish: AUROC, the probability that a digit scores
above rubbish; and CCR, the share of digits classified correctly with a score above the threshold
that lets 0.1, 1 or 10 % of the rubbish pass. The score is the largest probability of a digit.

**Published.** Dhamija et al. find thresholded softmax and a background class both helpful, but
insufficient for unseen classes, and their losses significantly better. The code of Hendrycks,
Mazeika & Dietterich 2019 comes with their logs for MNIST, before and after fine-tuning on grey
photographs with what is, but for its weight, the entropic loss: AUROC of Gaussian noise 99.96 and
100, Fashion-MNIST 99.31 and 99.90, notMNIST 96.04 and 98.37, Omniglot 96.23 and 95.94; test error
0.94 and 0.92 %. Photographs are neither of our sources: the direction is compared, not the size.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop import figures, study
from nn_backprop.data import (
    UNKNOWN_FOR_TESTING,
    UNKNOWN_FOR_TRAINING,
    ImageData,
    channels_last,
    load,
    shuffled_pixels,
    uniform_noise,
    unknown_sets,
)
from nn_backprop.engines import Engine, autograd
from nn_backprop.evidence import Claim, between, differences, spread, tuned
from nn_backprop.layers import EntropicOpenSetLoss, ObjectosphereLoss
from nn_backprop.rejection import auroc, confidence, correct_at_false_positives
from nn_backprop.training import fit, make_optimizer, make_schedule, steps_per_epoch

CLASSES, FEATURES = 10, 64
EPOCHS, BATCH, SMOKE_EPOCHS, SMOKE_BATCH, LR = 3, 128, 2, 32, 5e-3
EVERY = 4  # digits to an image of rubbish
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of false positives
TOLD, COMPARED, CHOSEN_BY = (0.001, 0.01, 0.1), 0.01, 0.1
MARGIN = 0.1  # percentage points
MORE = 1e-9  # than 0

LETTERS, NOISE = UNKNOWN_FOR_TRAINING
SMOKE_LETTERS = "shuffled digits"  # in the place of the letters, for which one needs a file
HELD_OUT = slice(480, 920)  # of Omniglot 1: Early Aramaic
TESTED = tuple(name for name in UNKNOWN_FOR_TESTING if name != "EMNIST letters")
MADE = ("half digits", "random pixels", "Gaussian digits", "Gaussian noise")
KIN = {
    LETTERS: ("Omniglot 2",),
    NOISE: ("Gaussian noise", "random pixels"),
    SMOKE_LETTERS: ("random pixels",),
}
PUBLISHED = {  # AUROC before and after, in percent; Hendrycks et al. 2019
    "Gaussian noise": (99.96, 100.0),
    "Fashion-MNIST": (99.31, 99.90),
    "notMNIST": (96.04, 98.37),
    "Omniglot 2": (96.23, 95.94),
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, features and targets


def _plain(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _garbage(weight: float) -> Loss:
    """An eleventh class; a digit weighs 1."""

    def loss(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        weights = logits.new_tensor([1.0] * CLASSES + [weight])
        return F.cross_entropy(logits, torch.where(targets < 0, CLASSES, targets), weights)

    return loss


def _entropic(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    return EntropicOpenSetLoss()(logits, targets)


SOFTMAX, GARBAGE, ENTROPIC, SPHERE = "softmax", "garbage class", "entropic", "Objectosphere"
# The settings that each method may choose from. At weight 0.4 all rubbish weighs as much as one
# class of digits, as in the code of Dhamija et al., which has ξ = 50 and λ = 0.0001, too. At more
# than either, ξ = 50 with λ = 0.001 or ξ = 10 with λ = 0.1, shorter trainings were less accurate.
SETTINGS: dict[str, dict[str, Loss]] = {
    SOFTMAX: {"–": _plain},
    GARBAGE: {f"weight {weight:g}": _garbage(weight) for weight in (0.1, 0.4, 1.6)},
    ENTROPIC: {"–": _entropic},
    SPHERE: {
        f"ξ = {radius:g}, λ = {weight:g}": ObjectosphereLoss(radius, weight)
        for radius, weight in ((10, 1e-3), (10, 1e-2), (50, 1e-4))
    },
}
LEARNERS = (GARBAGE, ENTROPIC, SPHERE)  # which are shown rubbish
PROBABILITY, SCALED = "confidence", "confidence × length"
NONE = "none"


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Rubbish of one kind for training, of others for the test: four ways to refuse it."""


class Kind(NamedTuple):
    """One contestant."""

    method: str
    source: str  # of the rubbish that it is trained on


PLAIN = Kind(SOFTMAX, NONE)  # shown no rubbish, and trained once
Rows = Mapping[Kind, Sequence[study.Row]]  # in the order of the seeds


class Job(NamedTuple):
    """One training."""

    kind: Kind
    setting: str
    seed: int
    tested: tuple[str, ...]
    options: Options


class Network(nn.Module):
    """Two stages of convolution, ReLU and 2×2 max-pooling; features; logits without a bias.

    Shapes: inputs (N, 1, 28, 28); output: logits (N, outputs) and features (N, FEATURES).
    """

    def __init__(self, outputs: int, loss: Loss) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.features = nn.Linear(32 * 4 * 4, FEATURES)
        self.output = nn.Linear(FEATURES, outputs, bias=False)
        self._loss = loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        features = self.features(x.flatten(1))
        return self.output(features), features

    def loss(self, output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return self._loss(*output, targets)


def conduct(under_way: study.Study, options: Options) -> None:
    data = _data(options)  # so that a missing MNIST ends the study here
    validation_rubbish(options)
    names = MADE if options.smoke else TESTED
    tested = tuple(unknown_sets(names, data.images[data.test], 0, options.data_root))
    jobs = [
        Job(kind, setting, seed, tested, options)
        for seed in range(options.seeds)
        for kind in contestants(*sources(options))
        for setting in list(SETTINGS[kind.method])[: 2 if options.smoke else None]
    ]
    rows = under_way.carry_out(
        train, jobs, lambda row: {f"accuracy/{row['method']}, {row['source']}": row["accuracy"]}
    )
    by = by_kind(rows, sources(options))
    claims = _claims(by, tested)
    if options.smoke:
        claims = [replace(claim, claim=f"{claim.claim} (smoke: not MNIST)") for claim in claims]
    under_way.finish(_tables(by, tested, rows), claims, _picture(by, tested))


def sources(options: Options) -> tuple[str, str]:
    """Of the rubbish to train on."""
    return (SMOKE_LETTERS if options.smoke else LETTERS, NOISE)


def contestants(*sources: str) -> list[Kind]:
    """Those that are shown no rubbish, or that of the sources."""
    return [PLAIN, *(Kind(method, source) for source in sources for method in LEARNERS)]


def by_kind(rows: Sequence[study.Row], sources: Sequence[str]) -> dict[Kind, list[study.Row]]:
    """Of each contestant the rows with its best setting and score, in the order of the seeds."""
    best = tuned(_scored(rows), ("method", "source"), ("setting", "score"), "validation")
    return {
        kind: [row for row in best if (row["method"], row["source"]) == kind]
        for kind in contestants(*sources)
    }


def _scored(rows: Sequence[study.Row]) -> list[study.Row]:
    """A row for each score of a training."""
    return [
        {**row, "score": score, **found} for row in rows for score, found in row["scores"].items()
    ]


# --- Rubbish ------------------------------------------------------------------------------------


def training_rubbish(source: str, options: Options) -> Tensor:
    """Images uint8 (n, 1, 28, 28), as many of one source as of the other."""
    letters, _ = _letters(options)
    return uniform_noise(letters, 1) if source == NOISE else letters


def validation_rubbish(options: Options) -> Tensor:
    """What settings are chosen by, whatever the network is trained on: uint8 (n, 1, 28, 28)."""
    return _letters(options)[1]


@functools.cache
def _letters(options: Options) -> tuple[Tensor, Tensor]:
    """To train on, and of an alphabet of their own to choose by."""
    data = _data(options)
    if options.smoke:
        train, validation = data.images[data.train], data.images[data.validation]
        return shuffled_pixels(train, 0), shuffled_pixels(validation, 1)
    found = unknown_sets([LETTERS], data.images[data.train], 0, options.data_root)
    if not found:
        raise study.UsageError(f"{LETTERS} is what the networks are trained on, and is missing")
    images = found[LETTERS]
    return torch.cat([images[: HELD_OUT.start], images[HELD_OUT.stop :]]), images[HELD_OUT]


@functools.cache
def _tested(names: tuple[str, ...], options: Options) -> dict[str, Tensor]:
    """Made from the test digits, or of files that hold nothing of training or validation."""
    data = _data(options)
    return unknown_sets(names, data.images[data.test], 0, options.data_root)


def _beside(rubbish: Tensor, data: ImageData, seed: int) -> Engine:
    """autograd, with an image of rubbish for every EVERY digits of the batch, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        n = len(targets) // EVERY
        drawn = data.normalise(rubbish[torch.randint(len(rubbish), (n,), generator=generator)])
        both = channels_last(torch.cat([inputs, drawn]))
        return autograd(model, both, torch.cat([targets, targets.new_full((n,), -1)]))

    return compute


# --- One training -------------------------------------------------------------------------------


def train(job: Job) -> study.Row:
    """One network, trained and tested."""
    data, (method, source) = _data(job.options), job.kind
    epochs, batch = (SMOKE_EPOCHS, SMOKE_BATCH) if job.options.smoke else (EPOCHS, BATCH)
    torch.manual_seed(job.seed)
    model = Network(CLASSES + (method == GARBAGE), SETTINGS[method][job.setting])
    engine: Engine = autograd
    if source != NONE:
        engine = _beside(training_rubbish(source, job.options), data, job.seed)
    optimizer = make_optimizer("adam", model.parameters(), LR, 0.0)
    steps = epochs * steps_per_epoch(len(data.train), batch)
    began = time.perf_counter()
    fit(model, engine, optimizer, make_schedule("one-cycle", optimizer, LR, steps), data,
        epochs=epochs, batch_size=batch, seed=job.seed)  # fmt: skip
    seconds = time.perf_counter() - began

    def judged(digits: Tensor, sets: Mapping[str, Tensor]) -> tuple[float, float, dict[str, dict]]:
        """Accuracy; share of digits taken for rubbish; by score and set, AUROC and CCR by rate."""
        logits, lengths = _output(model, data, data.images[digits])
        errors = logits[:, :CLASSES].argmax(1) != data.labels[digits].numpy()
        known = _scores(method, logits, lengths)
        found: dict[str, dict] = {score: {} for score in known}
        for name, images in sets.items():
            for score, unknown in _scores(method, *_output(model, data, images)).items():
                of = known[score], errors, unknown
                found[score][name] = {
                    "auroc": _auroc_of(known[score], unknown),
                    "ccr": [correct_at_false_positives(*of, rate) for rate in RATES],
                }
        refused = float((logits.argmax(1) == CLASSES).mean())
        return 1 - float(errors.mean()), refused, found

    _, _, chosen_by = judged(data.validation, {"": validation_rubbish(job.options)})
    accuracy, refused, found = judged(data.test, _tested(job.tested, job.options))  # here alone
    return {
        "method": method, "source": source, "setting": job.setting, "seed": job.seed,
        "dataset": data.name, "epochs": epochs, "train_seconds": seconds,
        "accuracy": accuracy, "taken_for_rubbish": refused,
        "scores": {
            score: {"validation": chosen_by[score][""]["ccr"][RATES.index(CHOSEN_BY)], "sets": sets}
            for score, sets in found.items()
        },
    }  # fmt: skip


@torch.no_grad()
def _output(model: Network, data: ImageData, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The logits (N, outputs), and the lengths (N,) of the features, of uint8 images."""
    parts = [model(channels_last(data.normalise(part))) for part in images.split(1000)]
    logits, features = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits.numpy(), features.double().norm(dim=1).numpy()


def _scores(method: str, logits: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) by the name of the score: the largest probability of a digit is one for all."""
    probability = confidence(logits, CLASSES)
    scores = {PROBABILITY: probability}
    return scores | {SCALED: probability * lengths} if method == SPHERE else scores


def _auroc_of(known: np.ndarray, unknown: np.ndarray) -> float:
    is_unknown = np.repeat([0, 1], [len(known), len(unknown)])
    return auroc(np.concatenate([known, unknown]), is_unknown)


# --- What the rows come to ----------------------------------------------------------------------


def trained_on(by: Rows) -> list[str]:
    """The sources of rubbish, in their order."""
    return list(dict.fromkeys(kind.source for kind in by if kind != PLAIN))


def foreign(source: str, tested: Sequence[str]) -> list[str]:
    """The sets that are no next of kin to what was trained on."""
    return [name for name in tested if name not in KIN[source]]


def _claims(by: Rows, tested: Sequence[str]) -> list[Claim]:
    better, published = "significantly better (Dhamija et al. 2018)", "(Hendrycks et al. 2019)"
    refuse, gain, cost = [], [], []
    for source in trained_on(by):
        of = {kind.method: kind for kind in contestants(source)}
        unseen = foreign(source, tested)
        for one, other, told in (
            (GARBAGE, SOFTMAX, "helps (Dhamija et al. 2018)"),
            (ENTROPIC, SOFTMAX, better),
            (SPHERE, SOFTMAX, better),
            (ENTROPIC, GARBAGE, better),
            (SPHERE, GARBAGE, better),
        ):
            points = differences(_ccr(by, of[one], unseen), _ccr(by, of[other], unseen))
            claim = (
                f"trained on {source}: {one} classifies more digits correctly than {other}, at "
                f"{100 * COMPARED:g} % false positives, mean over unseen sets, in points"
            )
            refuse.append(between(claim, told, points, MORE))
        for name in unseen:
            if name in PUBLISHED:
                before, after = PUBLISHED[name]
                points = differences(_auroc(by, of[ENTROPIC], [name]), _auroc(by, PLAIN, [name]))
                word, low, high = ("does not rise", -math.inf, 0.0)
                if after > before:
                    word, low, high = ("rises", MORE, math.inf)
                claim = f"trained on {source}, entropic: AUROC of {name} {word}, in points"
                told = f"{before:g} → {after:g} %, photographs {published}"
                gain.append(between(claim, told, points, low, high))
        for method in LEARNERS:
            points = differences(_accuracy(by, of[method]), _accuracy(by, PLAIN))
            claim = (
                f"trained on {source}: test accuracy of {method} less that of softmax, in points: "
                f"−{MARGIN:g} or more (our bar)"
            )
            theirs = f"99.06 → 99.08 % {published}" if method == ENTROPIC else None
            cost.append(between(claim, theirs, points, low=-MARGIN))
    return refuse + gain + cost


def _tables(
    by: Rows, tested: Sequence[str], rows: Sequence[study.Row]
) -> dict[str, list[study.Row]]:
    tables = {
        "Settings and scores tried; in bold, what was chosen by validation digits classified "
        f"correctly at {100 * CHOSEN_BY:g} % false positives of letters": _settings(by, rows)
    }
    cells: dict[str, Callable[[Kind, Sequence[str]], str]] = {
        "AUROC, %": lambda kind, names: spread(_auroc(by, kind, names)),
        f"Digits classified correctly, %, at {', '.join(f'{100 * rate:g}' for rate in TOLD)} % "
        "false positives": lambda kind, names: "; ".join(
            f"{statistics.fmean(_ccr(by, kind, names, rate)):.1f}" for rate in TOLD
        ),
    }
    for source in trained_on(by):
        for what, cell in cells.items():
            tables[f"{what}, trained on {source}"] = [
                {"rubbish": f"{title} (kin)" if title in KIN[source] else title}
                | {kind.method: cell(kind, names) for kind in contestants(source)}
                for title, names in {
                    **{name: [name] for name in tested},
                    "mean, without kin": foreign(source, tested),
                }.items()
            ]
    return tables


def _settings(by: Rows, rows: Sequence[study.Row]) -> list[study.Row]:
    """Each method with each setting and score, on each source."""
    groups: dict[tuple[str, ...], list[study.Row]] = {}
    for row in _scored(rows):
        key = (row["method"], row["source"], row["setting"], row["score"])
        groups.setdefault(key, []).append(row)
    table = []
    for (method, source, setting, score), found in groups.items():
        chosen = by[Kind(method, source)][0]
        mark = "**" if (setting, score) == (chosen["setting"], chosen["score"]) else ""
        accuracy = [100 * row["accuracy"] for row in found]
        taken = [100 * row["taken_for_rubbish"] for row in found]
        table.append(
            {
                "method": method,
                "trained on": source,
                "setting; score": f"{mark}{setting}; {score}{mark}",
                "chosen by, %": spread([100 * row["validation"] for row in found]),
                "test accuracy, all answered, %": spread(accuracy),
                "less softmax, points": "–"
                if source == NONE
                else spread(differences(accuracy, _accuracy(by, PLAIN)), "+"),
                "digits taken for rubbish, %": spread(taken) if method == GARBAGE else "–",
                "training, s": f"{statistics.median(row['train_seconds'] for row in found):.1f}",
            }
        )
    return table


def _picture(by: Rows, tested: Sequence[str]) -> figures.Figure:
    parts = []
    curve = "notMNIST" if "notMNIST" in tested else tested[0]
    correct = "digits classified correctly, %"
    for source in trained_on(by):
        areas, at_rate, by_rate = {}, {}, {}
        for kind in contestants(source):
            name = kind.method
            areas[name] = [figures.point(of, _auroc(by, kind, [of])) for of in tested]
            at_rate[name] = [figures.point(of, _ccr(by, kind, [of])) for of in tested]
            by_rate[name] = [
                figures.point(100 * rate, _ccr(by, kind, [curve], rate)) for rate in RATES
            ]
        title = f"Trained on {source}"
        across = "rubbish of the test; kin: " + ", ".join(n for n in tested if n in KIN[source])
        at = f"{title}: {100 * COMPARED:g} % let pass"
        parts += [
            figures.Panel(title, across, "AUROC, %", areas),
            figures.Panel(at, across, correct, at_rate),
            figures.Panel(f"{title}: {curve}", f"{curve} let pass, %", correct, by_rate, "x"),
        ]
    return figures.panels(
        parts,
        f"Four ways to refuse what is no digit ({by[PLAIN][0]['dataset']}), trained on one kind of "
        "rubbish: mean ± standard deviation over seeds",
    )


def _accuracy(by: Rows, kind: Kind) -> list[float]:
    return [100 * row["accuracy"] for row in by[kind]]


def _auroc(by: Rows, kind: Kind, names: Sequence[str]) -> list[float]:
    """In percent, of each seed; the mean over the named sets."""
    return [
        100 * statistics.fmean(row["sets"][name]["auroc"] for name in names) for row in by[kind]
    ]


def _ccr(by: Rows, kind: Kind, names: Sequence[str], rate: float = COMPARED) -> list[float]:
    """In percent, of each seed, at this rate of false positives; the mean over the named sets."""
    place = RATES.index(rate)
    return [
        100 * statistics.fmean(row["sets"][name]["ccr"][place] for name in names)
        for row in by[kind]
    ]


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
