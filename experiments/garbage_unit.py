"""Does a unit for rubbish, trained on one kind of rubbish, know another kind when it sees it?

    python experiments/garbage_unit.py              # MNIST, 2 kinds of rubbish × 5 seeds
    python experiments/garbage_unit.py --smoke      # the embedded digits, seconds

One small convolutional network learns the same batches of digits in four ways. *Softmax* sees
digits alone; it answers always, or, with a threshold, where its score is high. The others see an
image of rubbish beside every four digits: as an eleventh class, the *garbage class*; with the
target ⅒ for every digit, the *entropic* open-set loss; or with this and features that shall be
short for rubbish and long for digits, the *Objectosphere* (both Dhamija, Günther & Boult 2018; no
bias at the logits, as theirs).

**Rubbish to train on** is of one source: letters of two alphabets (Omniglot 1: Balinese, Korean),
or uniform noise, as many images of either. **Rubbish to choose by** are the letters of a third
alphabet (Early Aramaic), which no network is trained on: of three settings × two scores (softmax:
one × two), a method gets those with the most correct classifications of validation digits at 10 %
false positives, the mean over the seeds. The scores are the confidence, which is the largest
probability of a digit, and, as proposed for the Objectosphere, confidence × length of the features.
**Rubbish to test on** is of other sources. Some are next of kin to what was trained on (Omniglot 2:
other alphabets; Gaussian noise and shuffled pixels: noise) or, for every network, chosen by
(Omniglot 2); the rest is *foreign*. Some halves of digits are digits still, which no method can
refuse. EMNIST's letters are not asked for: a download of 562 MB. The test images are read once for
each training, when it has ended.

The rate, one for all, the 3 epochs (Dhamija et al.: 70) and the settings were chosen on validation
digits in pilots. In trainings of 2 epochs, twice the rate was better for one method and worse for
another.

**Measures**, of all test digits and each set of rubbish, with the score that was chosen: AUROC, the
probability that a digit scores above rubbish, ties counting ½; and CCR, the share of digits
classified correctly with a score above the threshold that lets 1 or 10 % of the rubbish pass. What
is chosen and what is claimed is at 10 %: 44 of the 440 letters to choose by. That was fixed before
the run.

**Published.** Dhamija et al. find thresholded softmax and a background class both helpful, but
insufficient for unseen classes, and their losses significantly better. They train on letters and
test, among others, on another script, Devanagari: nearest to it is Omniglot 2 for networks trained
on letters, so what they published stands beside these claims alone; notMNIST, which they name, too,
is foreign here, although its images are letters, printed ones. The code of Hendrycks, Mazeika
& Dietterich 2019 comes with their logs for MNIST, before and after fine-tuning on grey photographs
with what is, but for its weight, the entropic loss: AUROC of Gaussian noise 99.96 and 100,
Fashion-MNIST 99.31 and 99.90, notMNIST 96.04 and 98.37, Omniglot 96.23 and 95.94; test error 0.94
and 0.92 %. Photographs are neither of our sources: the direction is compared, not the size, and
only for Fashion-MNIST and notMNIST. Their Gaussian noise is N(½, ½) cut off, ours N(0, 1), of
inputs from 0 to 1, and leaves nothing to gain; their Omniglot is whole pictures of other alphabets
scaled to 28 × 28, not thickened, and ours is kin to the letters chosen by. What stands beside no
published result is a question of our own.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop import figures
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
from nn_backprop.layers import ObjectosphereLoss
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, differences, spread, tuned
from nn_backprop.studies.rejection import confidence, correct_at_false_positives, told_apart
from nn_backprop.training import fit, make_optimizer, make_schedule, steps_per_epoch

CLASSES, FEATURES = 10, 64
EPOCHS, BATCH, SMOKE_EPOCHS, SMOKE_BATCH, LR = 3, 128, 2, 32, 5e-3
EVERY = 4  # digits to an image of rubbish
AREA = "AUROC"
CORRECT = {f"CCR at {100 * rate:g} %": rate for rate in (0.01, 0.03, 0.1, 0.3, 1.0)}
COMPARED, AT = "CCR at 10 %", "at 10 % false positives"  # to choose by, too
TOLD = (AREA, "CCR at 1 %", COMPARED)
MARGIN = 0.1  # percentage points
MORE = 1e-9  # than 0

LETTERS, NOISE = UNKNOWN_FOR_TRAINING
SMOKE_LETTERS = "shuffled digits"  # in the place of the letters, for which one needs a file
HELD_OUT = slice(480, 920)  # of Omniglot 1: Early Aramaic
TESTED = tuple(name for name in UNKNOWN_FOR_TESTING if name != "EMNIST letters")
SMOKE_TESTED = ("half digits", "random pixels", "Gaussian digits", "Gaussian noise")
KIN = {  # what is next of kin to a source, be it trained on or chosen by
    LETTERS: ("Omniglot 2",),
    NOISE: ("Gaussian noise", "random pixels"),
    SMOKE_LETTERS: ("random pixels",),
}
PUBLISHED = {"Fashion-MNIST": "99.31 → 99.90 %", "notMNIST": "96.04 → 98.37 %"}  # AUROC

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, features and targets
Output = tuple[np.ndarray, np.ndarray]  # logits (N, outputs), lengths (N,) of the features


def weighted(weight: float, loss: Loss) -> Loss:
    """The mean over all examples where a digit weighs 1 and rubbish `weight`.

    (Σ_digits + weight · Σ_rubbish) / (N_digits + weight · N_rubbish), of a mean loss, for a batch
    in which the digits come first.
    """

    def mean(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        n = int((targets >= 0).sum())
        digits = loss(logits[:n], features[:n], targets[:n])
        if n == len(targets):
            return digits
        rubbish, weighs = loss(logits[n:], features[n:], targets[n:]), weight * (len(targets) - n)
        return (n * digits + weighs * rubbish) / (n + weighs)

    return mean


def garbage(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with an eleventh class."""
    return F.cross_entropy(logits, torch.where(targets < 0, CLASSES, targets))


SOFTMAX, GARBAGE, ENTROPIC, SPHERE = "softmax", "garbage class", "entropic", "Objectosphere"
LEARNERS = (GARBAGE, ENTROPIC, SPHERE)  # which are shown rubbish
ENTROPY: Loss = ObjectosphereLoss(0, 0)  # alone; of digits, cross-entropy
WEIGHTS = (0.1, 0.4, 1.6)  # of rubbish
# The settings that each method may choose from. At 0.4 all rubbish weighs as much as one class of
# digits, as in the code of Dhamija et al., which has ξ = 50 and λ = 0.0001, too. On validation
# digits larger λ (ξ = 50, λ = 0.001; ξ = 10, λ = 0.1) cost accuracy.
SETTINGS: dict[str, dict[str, Loss]] = {
    SOFTMAX: {"–": ENTROPY},
    GARBAGE: {f"weight {weight:g}": weighted(weight, garbage) for weight in WEIGHTS},
    ENTROPIC: {f"weight {weight:g}": weighted(weight, ENTROPY) for weight in WEIGHTS},
    SPHERE: {
        f"ξ = {radius:g}, λ = {factor:g}": weighted(0.4, ObjectosphereLoss(radius, factor))
        for radius, factor in ((10, 1e-3), (10, 1e-2), (50, 1e-4))
    },
}
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
    validation_rubbish(options)  # so that a missing MNIST, or letters, end the study here
    names = SMOKE_TESTED if options.smoke else TESTED
    tested = tuple(_tested(names, options))
    jobs = [
        Job(kind, setting, seed, tested, options)
        for seed in range(options.seeds)
        for kind in contestants(*sources(options))
        for setting in list(SETTINGS[kind.method])[: 1 if options.smoke else None]
    ]
    rows = under_way.carry_out(
        train, jobs, lambda row: {f"accuracy/{row['method']}, {row['source']}": row["accuracy"]}
    )
    by = by_kind(rows, sources(options))
    under_way.finish(_tables(by, names, tested, rows), _claims(by, tested), _picture(by, tested))


def sources(options: Options) -> tuple[str, str]:
    """The two kinds of rubbish to train on."""
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

    def judged(output: Output, digits: Tensor, sets: Mapping[str, Tensor]) -> dict[str, dict]:
        """The measures, by score and set, beside these digits and what the network made of them."""
        known, errors = _scores(*output), _errors(output, data.labels[digits])
        found: dict[str, dict] = {score: {} for score in known}
        for name, images in sets.items():
            for score, unknown in _scores(*_output(model, data, images)).items():
                found[score][name] = _measures(known[score], errors, unknown)
        return found

    output = _output(model, data, data.images[data.validation])
    chosen_by = judged(output, data.validation, {"": validation_rubbish(job.options)})
    output = _output(model, data, data.images[data.test])  # here alone
    found = judged(output, data.test, _tested(job.tested, job.options))
    return {
        "method": method, "source": source, "setting": job.setting, "seed": job.seed,
        "dataset": data.name, "epochs": epochs, "train_seconds": seconds,
        "accuracy": 1 - float(_errors(output, data.labels[data.test]).mean()),
        "taken_for_rubbish": float((output[0].argmax(1) == CLASSES).mean()),
        "scores": {
            score: {"validation": chosen_by[score][""][COMPARED], "sets": sets}
            for score, sets in found.items()
        },
    }  # fmt: skip


@torch.no_grad()
def _output(model: Network, data: ImageData, images: Tensor) -> Output:
    """The logits (N, outputs), and the lengths (N,) of the features, of uint8 images."""
    parts = [model(channels_last(data.normalise(part))) for part in images.split(1000)]
    logits, features = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits.numpy(), features.double().norm(dim=1).numpy()


def _errors(output: Output, labels: Tensor) -> np.ndarray:
    """Where the most probable digit is wrong (N,); an eleventh output is left aside."""
    return output[0][:, :CLASSES].argmax(1) != labels.numpy()


def _scores(logits: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) by the name of the score, the same two for every method."""
    probability = confidence(logits, CLASSES)
    return {PROBABILITY: probability, SCALED: probability * lengths}


def _measures(known: np.ndarray, errors: np.ndarray, unknown: np.ndarray) -> dict:
    """AUROC and every CCR, of the scores of digits and of a set of rubbish."""
    correct = {
        name: correct_at_false_positives(known, errors, unknown, rate)
        for name, rate in CORRECT.items()
    }
    return {AREA: told_apart(known, unknown), **correct}


# --- What the rows come to ----------------------------------------------------------------------


def trained_on(by: Rows) -> list[str]:
    """The sources of rubbish, in their order."""
    return list(dict.fromkeys(kind.source for kind in by if kind != PLAIN))


def foreign(source: str, tested: Sequence[str]) -> list[str]:
    """The sets that are next of kin neither to what was trained on nor to what was chosen by."""
    return [name for name in tested if name not in (*KIN[source], *KIN[LETTERS])]


def _claims(by: Rows, tested: Sequence[str]) -> list[Claim]:
    theirs, logs = "significantly better (Dhamija et al. 2018)", "(Hendrycks et al. 2019)"
    unseen, less, script, rise, cost = [], [], [], [], []
    for source in trained_on(by):
        of, trained = {kind.method: kind for kind in contestants(source)}, f"trained on {source}"
        kin, apart = [name for name in KIN[source] if name in tested], foreign(source, tested)
        near, far = ", ".join(kin), ", ".join(apart)

        def gain(one: str, other: str, names: Sequence[str], what: str, of: dict = of) -> list:
            return differences(*(_percent(by, of[method], names, what) for method in (one, other)))

        for method in LEARNERS:
            claim = f"{trained}: {method} classifies more digits correctly than {SOFTMAX} {AT}, "
            gained = gain(method, SOFTMAX, apart, COMPARED)
            unseen.append(between(f"{claim}mean over {far}, in points", None, gained, MORE))
            if kin:
                claim = f"{trained}: {method} knows another kind less well: its gain {AT} over "
                claim += f"{SOFTMAX} is larger on kin ({near}) than on {far}, in points"
                points = differences(gain(method, SOFTMAX, kin, COMPARED), gained)
                less.append(between(claim, None, points, MORE))
            claim = f"{trained}: test accuracy of {method}, all digits answered, less that of "
            claim += f"{SOFTMAX}, in points: −{MARGIN:g} or more (our bar)"
            points = [
                100 * (one["accuracy"] - plain["accuracy"])
                for one, plain in zip(by[of[method]], by[PLAIN], strict=True)
            ]
            errors = f"99.06 → 99.08 % {logs}" if method == ENTROPIC else None
            cost.append(between(claim, errors, points, low=-MARGIN))
        for one in (ENTROPIC, SPHERE) if kin and source != NOISE else ():
            for other in (SOFTMAX, GARBAGE):
                claim = f"{trained}: {one} classifies more digits correctly than {other} {AT} of "
                points = gain(one, other, kin, COMPARED)
                script.append(between(f"{claim}{near}, in points", theirs, points, MORE))
        for name in (name for name in apart if name in PUBLISHED):
            claim = f"{trained}, {ENTROPIC}: AUROC of {name} rises, in points"
            points = gain(ENTROPIC, SOFTMAX, [name], AREA)
            rise.append(between(claim, f"{PUBLISHED[name]}, photographs {logs}", points, MORE))
    return unseen + less + script + rise + cost


def _tables(
    by: Rows, names: Sequence[str], tested: Sequence[str], rows: Sequence[study.Row]
) -> dict[str, list[study.Row]]:
    """`names` are the sets that were asked for, `tested` those that are at hand."""
    tables = {
        "Settings and scores tried; in bold, what was chosen by validation digits classified "
        f"correctly {AT} of letters": _settings(by, rows)
    }
    for source in trained_on(by):
        table = tables[
            f"Trained on {source}: AUROC, and CCR, the digits classified correctly, at 1 and 10 % "
            "false positives, in percent; kin: to what was trained on or chosen by"
        ] = []
        apart = foreign(source, names)
        sets = {name if name in apart else f"{name} (kin)": [name] for name in names}
        for title, over in {**sets, "mean, without kin": foreign(source, tested)}.items():
            for what in TOLD if set(over) <= set(tested) else ("not at hand",):
                cells = {
                    kind.method: spread(_percent(by, kind, over, what)) if what in TOLD else "–"
                    for kind in contestants(source)
                }
                table.append({"rubbish": title, "measure": what, **cells})
    return tables


def _settings(by: Rows, rows: Sequence[study.Row]) -> list[study.Row]:
    """Each method with each setting and score, on each source."""
    groups: dict[tuple[str, ...], list[study.Row]] = {}
    for row in _scored(rows):
        key = (row["method"], row["source"], row["setting"], row["score"])
        groups.setdefault(key, []).append(row)
    table = []
    for (method, source, setting, score), found in groups.items():
        mark = "**" if found[0] in by[Kind(method, source)] else ""
        taken = spread([100 * row["taken_for_rubbish"] for row in found])
        table.append({
            "method": method,
            "trained on": source,
            "setting; score": f"{mark}{setting}; {score}{mark}",
            "chosen by, %": spread([100 * row["validation"] for row in found]),
            "test accuracy, all answered, %": spread([100 * row["accuracy"] for row in found]),
            "digits taken for rubbish, %": taken if method == GARBAGE else "–",
        })  # fmt: skip
    return table


def _picture(by: Rows, tested: Sequence[str]) -> figures.Figure:
    parts = []
    curve = "notMNIST" if "notMNIST" in tested else tested[0]
    correct = "digits classified correctly, %"
    for source in trained_on(by):
        areas, at_rate, by_rate = {}, {}, {}
        for kind in contestants(source):
            percent, name = functools.partial(_percent, by, kind), kind.method
            areas[name] = [figures.point(of, percent([of], AREA)) for of in tested]
            at_rate[name] = [figures.point(of, percent([of], COMPARED)) for of in tested]
            by_rate[name] = [
                figures.point(100 * rate, percent([curve], what)) for what, rate in CORRECT.items()
            ]
        title = f"Trained on {source}"
        kin = [name for name in tested if name not in foreign(source, tested)]
        across = f"rubbish of the test; kin:\n{', '.join(kin)}"
        parts += [
            figures.Panel(title, across, "AUROC, %", areas),
            figures.Panel(f"{title}: {AT}", across, correct, at_rate),
            figures.Panel(f"{title}: {curve}", "false positives, %", correct, by_rate, "x"),
        ]
    title = f"Four ways to refuse what is no digit ({by[PLAIN][0]['dataset'].upper()})"
    return figures.side_by_side(parts, f"{title}: mean ± standard deviation over seeds")


def _percent(by: Rows, kind: Kind, names: Sequence[str], what: str) -> list[float]:
    """A measure, of each seed; the mean over the named sets."""
    return [100 * statistics.fmean(row["sets"][name][what] for name in names) for row in by[kind]]


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
