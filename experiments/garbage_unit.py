"""Does a unit for rubbish, trained on one kind of rubbish, know another kind when it sees it?

    python experiments/garbage_unit.py              # MNIST, 2 kinds of rubbish × 5 seeds
    python experiments/garbage_unit.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/garbage_unit/README.md.
"""

import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop import data, figures, studies
from nn_backprop.engines import autograd
from nn_backprop.layers import ObjectosphereLoss
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.studies.rubbish import AREA, CLASSES, CORRECT, Loss, Network, beside, tested

EPOCHS, BATCH, SMOKE_EPOCHS, SMOKE_BATCH, LR = 3, 128, 2, 32, 5e-3
EVERY = 4  # digits to an image of rubbish
COMPARED, AT = "CCR at 10 %", "at 10 % false positives"  # to choose by, too
SHOWN = (AREA, "CCR at 1 %", COMPARED)
MARGIN, MORE = 0.1, 1e-9  # percentage points; than 0
LETTERS, NOISE = data.UNKNOWN_FOR_TRAINING
SMOKE_LETTERS = "shuffled digits"  # in the place of the letters, for which one needs a file
HELD_OUT = slice(480, 920)  # of Omniglot 1: Early Aramaic
ASKED = {  # sets to test on
    "mnist": tuple(name for name in data.UNKNOWN_FOR_TESTING if name != "EMNIST letters"),
    "digits": ("half digits", "random pixels", "Gaussian digits", "Gaussian noise"),
}
KIN = {  # what is next of kin to a source, be it trained on or chosen by
    LETTERS: ("Omniglot 2",), SMOKE_LETTERS: ("random pixels",),
    NOISE: ("Gaussian noise", "random pixels"),
}  # fmt: skip
PUBLISHED = {"Fashion-MNIST": "99.31 → 99.90 %", "notMNIST": "96.04 → 98.37 %"}  # AUROC

SOFTMAX, GARBAGE, ENTROPIC, SPHERE = "softmax", "garbage class", "entropic", "Objectosphere"
LEARNERS = (GARBAGE, ENTROPIC, SPHERE)  # which are shown rubbish; softmax is shown NONE
NONE = "none"
ENTROPY = ObjectosphereLoss(0, 0)  # alone; of digits, cross-entropy
WEIGHTS = (0.1, 0.4, 1.6)  # of rubbish
# The settings that each method may choose from, with the weight of rubbish. At 0.4 all rubbish
# weighs as much as one class of digits, as in the code of Dhamija et al., which has ξ = 50 and
# λ = 0.0001, too. On validation digits larger λ (ξ = 50, λ = 0.001; ξ = 10, λ = 0.1) cost accuracy.
SETTINGS: dict[str, dict[str, tuple[float, Loss]]] = {
    SOFTMAX: {"–": (0, ENTROPY)},
    GARBAGE: {  # cross-entropy with an eleventh class
        f"weight {weight:g}": (weight, lambda z, _, y: F.cross_entropy(z, y.where(y >= 0, CLASSES)))
        for weight in WEIGHTS},
    ENTROPIC: {f"weight {weight:g}": (weight, ENTROPY) for weight in WEIGHTS},
    SPHERE: {f"ξ = {radius:g}, λ = {factor:g}": (0.4, ObjectosphereLoss(radius, factor))
             for radius, factor in ((10, 1e-3), (10, 1e-2), (50, 1e-4))},
}  # fmt: skip


@dataclass(frozen=True)
class Options(studies.Options):
    """Rubbish of one kind for training, of others for the test: four ways to refuse it."""


class Job(NamedTuple):
    """One training."""

    method: str
    source: str  # of the rubbish that it is trained on
    setting: str
    seed: int
    sets: tuple[str, ...]  # to test on, of those that are at hand
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    (train_on, _), name = rubbish(options), studies.load_data(options).name
    sets = tuple(rubbish_to_test_on(ASKED[name], options))
    kinds = [(SOFTMAX, NONE), *((method, source) for source in train_on for method in LEARNERS)]
    jobs = [
        Job(method, source, setting, seed, sets, options)
        for seed in range(options.seeds)
        for method, source in kinds
        for setting in list(SETTINGS[method])[: 1 if options.smoke else None]
    ]
    run.train_all(
        train, jobs, lambda row: {f"accuracy/{row['method']}, {row['source']}": row["accuracy"]}
    )


@functools.cache
def rubbish(options: Options) -> tuple[dict[str, Tensor], Tensor]:
    """Images uint8 (n, 1, 28, 28): to train on, by source, as many of either; and to choose by."""
    digits, source = studies.load_data(options), SMOKE_LETTERS if options.smoke else LETTERS
    train, validation = digits.images[digits.train], digits.images[digits.validation]
    if options.smoke:
        letters, held_out = data.shuffled_pixels(train, 0), data.shuffled_pixels(validation, 1)
    else:
        found = data.unknown_sets([source], train, 0, options.data_root)
        if not found:
            raise studies.UsageError(f"{source} is what networks are trained on, and is missing")
        images = found[source]
        letters = torch.cat([images[: HELD_OUT.start], images[HELD_OUT.stop :]])
        held_out = images[HELD_OUT]
    return {source: letters, NOISE: data.uniform_noise(letters, 1)}, held_out


@functools.cache
def rubbish_to_test_on(names: tuple[str, ...], options: Options) -> dict[str, Tensor]:
    """Made from the test digits, or of files that hold nothing of training or validation."""
    digits = studies.load_data(options)
    return data.unknown_sets(names, digits.images[digits.test], 0, options.data_root)


def train(job: Job) -> Row:
    """One network, trained and tested."""
    digits, (train_on, held_out) = studies.load_data(job.options), rubbish(job.options)
    epochs, batch = (SMOKE_EPOCHS, SMOKE_BATCH) if job.options.smoke else (EPOCHS, BATCH)
    torch.manual_seed(job.seed)
    model = Network(CLASSES + (job.method == GARBAGE), *SETTINGS[job.method][job.setting])
    shown = train_on.get(job.source)
    engine = autograd if shown is None else beside(shown, digits, EVERY, job.seed)
    trained = studies.train_network(
        model, digits, lr=LR, epochs=epochs, batch_size=batch, seed=job.seed, engine=engine
    )
    chosen_by, _ = tested(model, digits, digits.validation, {"": held_out})
    sets = rubbish_to_test_on(job.sets, job.options)
    found, about = tested(model, digits, digits.test, sets)  # the test images, here alone
    return {
        "method": job.method, "source": job.source, "setting": job.setting, "seed": job.seed,
        "dataset": digits.name, "epochs": epochs, "train_seconds": trained.seconds, **about,
        "scores": {score: {"validation": chosen_by[score][""][COMPARED], "sets": measures}
                   for score, measures in found.items()},
    }  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def scored(rows: Rows) -> Rows:
    """A row for each score of a training."""
    return Rows(
        {**row, "score": score, **found} for row in rows for score, found in row["scores"].items()
    )


def by_source(rows: Rows) -> dict[str, dict[str, Rows]]:
    """By source of rubbish and method, softmax beside either; of the best setting and score."""
    best = scored(rows).best(("method", "source"), ("setting", "score"), "validation").by("source")
    plain = best.pop(NONE)
    return {source: {SOFTMAX: plain} | found.by("method") for source, found in best.items()}


def at_hand(rows: Rows) -> list[str]:
    """The sets that all were tested on."""
    return [*scored(rows)[0]["sets"]]


def foreign(source: str, names: Sequence[str]) -> list[str]:
    """The sets that are next of kin neither to what was trained on nor to what was chosen by."""
    return [name for name in names if name not in (*KIN[source], *KIN[LETTERS])]


def percent(rows: Rows, names: Sequence[str], what: str) -> np.ndarray:
    """A measure, of each seed; the mean over the named sets."""
    return rows.values(lambda row: statistics.fmean(row["sets"][at][what] for at in names), 100)


def gain(one: Rows, other: Rows, names: Sequence[str], what: str = COMPARED) -> np.ndarray:
    return percent(one, names, what) - percent(other, names, what)


def claims(rows: Rows) -> list[Claim]:
    theirs, logs = "significantly better (Dhamija et al. 2018)", "(Hendrycks et al. 2019)"
    unseen, less, script, rise, cost = [], [], [], [], []
    names, between = at_hand(rows), studies.between
    for source, of in by_source(rows).items():
        trained, plain, apart = f"trained on {source}", of[SOFTMAX], foreign(source, names)
        kin = [name for name in KIN[source] if name in names]
        near, far = ", ".join(kin), ", ".join(apart)
        for method in LEARNERS:
            gained = gain(of[method], plain, apart)
            claim = f"{trained}: {method} classifies more digits correctly than {SOFTMAX} {AT}, "
            unseen.append(between(f"{claim}mean over {far}, in points", None, gained, MORE))
            if kin:
                claim = f"{trained}: {method} knows another kind less well: its gain {AT} over "
                claim += f"{SOFTMAX} is larger on kin ({near}) than on {far}, in points"
                less.append(between(claim, None, gain(of[method], plain, kin) - gained, MORE))
            claim = f"{trained}: test accuracy of {method}, all digits answered, less that of "
            claim += f"{SOFTMAX}, in points: −{MARGIN:g} or more (our bar)"
            points = 100 * (of[method].values("accuracy") - plain.values("accuracy"))
            published = f"99.06 → 99.08 % {logs}" if method == ENTROPIC else None
            cost.append(between(claim, published, points, low=-MARGIN))
        for one in (ENTROPIC, SPHERE) if kin and source != NOISE else ():
            for other in (SOFTMAX, GARBAGE):
                claim = f"{trained}: {one} classifies more digits correctly than {other} {AT} of "
                points = gain(of[one], of[other], kin)
                script.append(between(f"{claim}{near}, in points", theirs, points, MORE))
        for name in filter(PUBLISHED.get, apart):
            claim = f"{trained}, {ENTROPIC}: AUROC of {name} rises, in points"
            points = gain(of[ENTROPIC], plain, [name], AREA)
            rise.append(between(claim, f"{PUBLISHED[name]}, photographs {logs}", points, MORE))
    return unseen + less + script + rise + cost


def tables(rows: Rows) -> dict[str, studies.Table]:
    by, asked, spread = by_source(rows), ASKED[rows.one("dataset")], studies.mean_sd
    names = at_hand(rows)
    chosen = [row for of in by.values() for found in of.values() for row in found]
    tried = []
    for at, found in scored(rows).by("method", "source", "setting", "score").items():
        method, source, setting, score = at
        mark, taken = "**" if found[0] in chosen else "", found.values("taken_for_rubbish", 100)
        tried.append({
            "method": method, "trained on": source,
            "setting; score": f"{mark}{setting}; {score}{mark}",
            "chosen by, %": spread(found.values("validation", 100)),
            "test accuracy, all answered, %": spread(found.values("accuracy", 100)),
            "digits taken for rubbish, %": spread(taken) if method == GARBAGE else "–",
        })  # fmt: skip
    made: dict[str, studies.Table] = {
        "Settings and scores tried; in bold, what was chosen by validation digits classified "
        f"correctly {AT} of letters": tried
    }
    for source, of in by.items():
        apart = foreign(source, asked)
        sets = {name if name in apart else f"{name} (kin)": [name] for name in asked}
        sets["mean, without kin"] = foreign(source, names)
        made[
            f"Trained on {source}: AUROC, and CCR, the digits classified correctly, at 1 and 10 % "
            "false positives, in percent; kin: to what was trained on or chosen by"
        ] = [
            {"rubbish": title, "measure": what, **{
                method: spread(percent(found, over, what)) if what in SHOWN else "–"
                for method, found in of.items()
            }}
            for title, over in sets.items()
            for what in (SHOWN if set(over) <= set(names) else ("not at hand",))
        ]  # fmt: skip
    return made


def picture(rows: Rows) -> figures.Figure:
    parts, names, correct = [], at_hand(rows), "digits classified correctly, %"
    curve = "notMNIST" if "notMNIST" in names else names[0]
    for source, of in by_source(rows).items():
        title = f"Trained on {source}"
        kin = [name for name in names if name not in foreign(source, names)]
        across = f"rubbish of the test; kin:\n{', '.join(kin)}"
        area, at_10 = (lines(of, {name: (name, what) for name in names})
                       for what in (AREA, COMPARED))  # fmt: skip
        by_rate = lines(of, {100 * rate: (curve, what) for what, rate in CORRECT.items()})
        parts += [
            figures.Panel(title, across, "AUROC, %", area),
            figures.Panel(f"{title}: {AT}", across, correct, at_10),
            figures.Panel(f"{title}: {curve}", "false positives, %", correct, by_rate, "x"),
        ]
    title = f"Four ways to refuse what is no digit ({rows.one('dataset').upper()})"
    return figures.side_by_side(parts, f"{title}: mean ± standard deviation over seeds")


def lines(of: dict[str, Rows], at: dict[Any, tuple[str, str]]) -> dict[str, list[figures.Point]]:
    """Of each method points, at x a measure of a set of rubbish."""
    return {
        method: [figures.point(x, percent(found, [name], what)) for x, (name, what) in at.items()]
        for method, found in of.items()
    }


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
