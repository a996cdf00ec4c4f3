"""Does the network that classifies digits memorise labels without meaning just as well?

    python experiments/random_labels.py           # MNIST, 20 to 30 minutes on two cores
    python experiments/random_labels.py --smoke   # the embedded digits, seconds

What is compared, and what came out: results/random_labels/README.md.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from statistics import fmean
from typing import NamedTuple

import numpy as np
from torch import Tensor

from nn_backprop import figures, studies
from nn_backprop.data import ImageData
from nn_backprop.data.meaningless import FALSE_LABELS, KINDS, meaningless
from nn_backprop.studies import Claim, Row, Rows, at_least, between, mean_sd, page
from nn_backprop.studies.learning_curve import train_watched
from nn_backprop.studies.memorisation import RADIUS, Starts, critical_measures

EXTREMES = ("true", "random labels")
NOISY = ("20 % noise", "40 % noise", "60 % noise", "80 % noise")
DRAWN = ("true", "20 % noise", "60 % noise", "random labels")  # more lines hide each other
VALIDATION, SEARCHED = 2_000, 300  # images
STARTS, SMOKE_STARTS = 20, 5
CURVES, LEFT = "curves.jsonl", 21  # too large to commit; the points at which a fall is drawn
PUBLISHED_TRAIN, PUBLISHED_TEST = 99.34, "10.61"  # %, Zhang et al. 2017, table 1, random labels
# Our own bars: percentage points, R², % of the training examples, times a binomial's spread.
SAME, LINEAR, HIGH, ALIKE = 1.0, 0.95, 90.0, 1.1
By = Mapping[tuple[str, str], Rows]  # setting and kind


@dataclass(frozen=True)
class Options(studies.Options):
    """True, noisy and random labels, shuffled and random pixels: what is learnt, and how."""

    seeds: int = 10
    """Number of seeds, from 0."""


class Setting(NamedTuple):
    """A network and how it is trained, on n examples of kinds of data."""

    name: str
    recipe: studies.Recipe
    n: int = 1_000
    kinds: tuple[str, ...] = EXTREMES

    def together(self) -> list[tuple[str, ...]]:
        """The kinds with the same images, which differ in their labels alone; each other kind."""
        groups = groupby(self.kinds, lambda kind: kind in FALSE_LABELS or kind)
        return [tuple(kinds) for _, kinds in groups]

    def smaller(self) -> "Setting":
        """For the smoke run: it learns something, in no time."""
        happy, how = self.name.startswith("happy"), self.recipe
        hidden, fewer = tuple(min(width, 32) for width in how.hidden), 20 if happy else 5
        small = how._replace(hidden=hidden, batch_size=10, epochs=-(-how.epochs // fewer))
        small = small._replace(**{"optimizer": "sgd", "lr": 2.0} if happy else {"lr": 2 * how.lr})
        return self._replace(recipe=small, n=max(100, self.n // 25))


# At a constant rate: a schedule has a shape of its own, which the fall of the loss would take on.
relu = partial(studies.Recipe, batch_size=50, schedule="constant")
happy = partial(relu, (16, 16), activation="sigmoid", loss="squared_error")
SEVERAL = (*EXTREMES, "Gaussian")
SETTINGS = (
    Setting("1×4096", relu((4096,), 40, 2e-4)),
    Setting("1×512, n = 5,000", relu((512,), 90, 5e-4), 5_000),
    Setting("1×512", relu((512,), 100, 2e-4), kinds=KINDS),
    Setting("1×512, SGD", relu((512,), 120, 2e-2, optimizer="sgd")),
    Setting("happy", happy(1_500, 1e-3), kinds=KINDS),
    Setting("happy, SGD", happy(1_500, 0.5, optimizer="sgd")),
    Setting("happy, n = 5,000", happy(400, 1e-3), 5_000),
    Setting("16-16 ReLU", relu((16, 16), 300, 1e-3)),
    Setting("16-16 ReLU, n = 5,000", relu((16, 16), 300, 1e-3), 5_000),
)
STARTED = [  # from many starts, with enough epochs for half of the examples
    Setting(name, recipe, kinds=(kind,))
    for name, recipe in (("happy", happy(300, 1e-3)), ("16-16 ReLU", relu((16, 16), 80, 1e-3)))
    for kind in SEVERAL
]
MEMORISING = tuple(setting.name for setting in SETTINGS if setting.recipe.optimizer == "adam")
FALLING = ("happy, SGD", "1×512, SGD")  # gradient descent, as in the sources
WITH_NOISE = ("happy", "1×512")


class Job(NamedTuple):
    """Trainings that share a seed."""

    setting: Setting
    kinds: tuple[str, ...]  # with the same images
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    trained = run.train_all(train, jobs(SETTINGS, options), lambda row: {
        f"train/{row['setting']}/{row['kind']}": row["train_accuracy"]})  # fmt: skip
    about = ("setting", "kind", "seed")
    curves = [{key: row[key] for key in about} | row.pop("curves") for row in trained]
    page.write_rows(run.folder, curves, CURVES)
    run.train_all(start, jobs(STARTED, options))


def jobs(settings: Iterable[Setting], options: Options) -> list[Job]:
    settings = [setting.smaller() if options.smoke else setting for setting in settings]
    return [Job(setting, kinds, seed, options) for setting in settings
            for kinds in setting.together() for seed in range(options.seeds)]  # fmt: skip


def held_out(data: ImageData) -> tuple[Tensor, Tensor]:
    """Of the validation split: images that choose the peak, and others, for critical samples."""
    nine_tenths = 9 * len(data.validation) // 10
    return data.validation[:nine_tenths][:VALIDATION], data.validation[nine_tenths:][:SEARCHED]


def made(job: Job) -> list[ImageData]:
    """The kinds of data of a job; of validation, without the images for critical samples."""
    data = studies.load_data(job.options)
    data = replace(data, validation=held_out(data)[0])
    return [meaningless(data, kind, job.setting.n, job.seed) for kind in job.kinds]


def train(job: Job) -> list[Row]:
    """Networks from one start, of which each learns a kind of data: a row each."""
    (name, recipe, *_), kinds, seed, options = job
    _, searched = held_out(studies.load_data(options))
    sets, rows = made(job), []
    measures = [critical_measures(data, searched, seed)
                if name in WITH_NOISE and kind in FALSE_LABELS else {}
                for kind, data in zip(kinds, sets, strict=True)]  # fmt: skip
    for kind, watch in zip(kinds, train_watched(recipe, sets, seed, measures), strict=True):
        row = {"what": "training", "setting": name, "kind": kind, "seed": seed, **watch.row()}
        if kind in EXTREMES:
            falls, left = watch.falls(LEFT)
            row = {**row, **falls, "curves": row["curves"] | left}
        rows.append(row)
    return rows


def start(job: Job) -> Row:
    """One data set from many starts: how the examples differ in being learnt."""
    (name, recipe, n, _), (data,) = job.setting, made(job)
    count = SMOKE_STARTS if job.options.smoke else STARTS
    seeds = [count * job.seed + number for number in range(count)]
    starts = Starts([recipe.network(seed) for seed in seeds], data)
    recipe.train(starts.models, data, seeds, on_epoch=starts.look)
    return {"what": "starts", "setting": name, "kind": job.kinds[0], "seed": job.seed,
            "dataset": data.name, "n": n, "starts": count, **starts.numbers()}  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def claims(rows: Rows) -> list[Claim]:
    by = rows_of(rows, "training")
    return [*memorised(by), *fallen(by), *peaked(by), *alike(rows_of(rows, "starts"))]


def rows_of(rows: Rows, what: str) -> By:
    return rows.where(what=what).by("setting", "kind")


def numbers(rows: Rows, what: str) -> np.ndarray:
    """Of each seed: shares of examples in percent; of a fall, and epochs, as they are."""
    return rows.values(what, 1 if what.startswith(("loss", "error", "peak")) else 100)


def times_binomial(rows: Rows, moment: str) -> np.ndarray:
    return rows.values(f"{moment}_spread") / rows.values(f"{moment}_binomial")


# fmt: off
def memorised(by: By) -> Iterator[Claim]:
    """The same training accuracy with random labels, and chance on what was not trained on."""
    for name in MEMORISING:
        true, random = (numbers(by[name, kind], "train_accuracy") for kind in EXTREMES)
        yield between(f"{name}: training accuracy with random labels less that with true ones, in "
                      f"points: −{SAME:g} or more (our bar)", "the same (3Blue1Brown)",
                      random - true, low=-SAME)
    reached = numbers(by["1×512, n = 5,000", "random labels"], "train_accuracy")
    yield at_least("1×512, n = 5,000, random labels: training accuracy, %, the published or more",
                   PUBLISHED_TRAIN, reached)
    # The networks of a seed share labels, and so their luck: their mean is one value.
    each = [numbers(by[name, "random labels"], "test_accuracy") for name in MEMORISING]
    yield between("random labels, mean of the networks by Adam: test accuracy, %, from 9 to 11 "
                  "(our bar)", PUBLISHED_TEST, [*map(fmean, zip(*each, strict=True))], 9, 11)


def fallen(by: By) -> Iterator[Claim]:
    """Of the loss: a fiddling start and a drop with true labels, a line with random ones."""
    late, line = "share of the time up to 90 % before 10 %", "R² of a line"
    for name in FALLING:
        true, random = ({what: numbers(by[name, kind], f"loss_{what}")
                         for what in ("start", "end", "first", "line")} for kind in EXTREMES)
        yield between(f"{name}, true labels: {late}, more than a line's",
                      "fiddles around", true["first"], low=1 / 9)
        yield between(f"{name}, random labels: {line} up to 90 %, {LINEAR:g} or more (our bar)",
                      "almost linearly", random["line"], low=LINEAR)
        yield between(f"{name}: {line}, higher with random labels than with true ones",
                      "almost linearly", random["line"] - true["line"], low=0)
        yield between(f"{name}, random labels: {late}, over half (our bar)",
                      "converges quickly", random["first"], low=0.5)
        times = (random["end"] - random["start"]) / (true["end"] - true["start"])
        yield between(f"{name}: from 10 to 90 %, times as many epochs with random labels as with "
                      "true", "slowly", times, low=1)


def peaked(by: By) -> Iterator[Claim]:
    """With noise: of the four shares the one that speaks most against it."""
    for name in WITH_NOISE:
        of = {kind: partial(numbers, by[name, kind]) for kind in NOISY}
        lost = {k: get("test_accuracy_at_peak") - get("test_accuracy") for k, get in of.items()}
        risen = {k: get("critical") - get("critical_at_peak") for k, get in of.items()}
        reached = {k: get("train_accuracy_at_peak") for k, get in of.items()}
        least, slow = (min(of, key=lambda kind: fmean(x[kind])) for x in (lost, risen))
        most = max(of, key=lambda kind: fmean(reached[kind]))
        more = of["80 % noise"]("critical") - of["20 % noise"]("critical")
        every, samples = f"{name}, 20 to 80 % noise", "critical samples at the end"
        yield between(f"{every}: test accuracy at the peak of validation's less the last, at "
                      f"{least}, points", "falls", lost[least], low=0)
        yield between(f"{every}: training accuracy at the peak, at {most}, %, below {HIGH:g} (our "
                      "bar)", "not yet high", reached[most], high=HIGH)
        yield between(f"{every}: {samples} less those at the peak, at {slow}, points",
                      "rises", risen[slow], low=0)
        yield between(f"{name}: {samples}, more with 80 % noise than with 20 %, points", "higher",
                      more, low=0)


def alike(by: By) -> Iterator[Claim]:
    """True labels have easy and hard examples, random ones are all alike."""
    for name, moment, when in (("16-16 ReLU", "one", "after one epoch"),
                               ("16-16 ReLU", "half", "when half are right"),
                               ("happy", "half", "when half are right")):
        true, random, noise = (times_binomial(by[name, kind], moment) for kind in SEVERAL)
        what = f"{name}, {when}: spread of the examples as a multiple of a binomial's"
        yield between(f"{what}: more with true labels than with random",
                      "much more variable", true - random, low=0)
        yield between(f"{what}, random labels: more than 1", "not quite alike", random, low=1)
        yield between(f"{what}, Gaussian: {ALIKE:g} at most (our bar)", "alike", noise, high=ALIKE)


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = rows_of(rows, "training")
    falls = {"10 % after epochs": "loss_start", "90 % after": "loss_end",
             "first 10 %, share of the time": "loss_first", "R² of a line": "loss_line",
             "of a sigmoid": "loss_sigmoid", "errors: the share": "error_first",
             "of a line": "error_line"}
    noise = {"training": "train_accuracy", "at the peak": "train_accuracy_at_peak",
             "peak after epochs": "peak_epoch", "test at the peak": "test_accuracy_at_peak",
             "at the end": "test_accuracy"}
    critical = {"at the peak": "critical_at_peak", "at the end": "critical",
                "±3: at the peak": "critical_10_at_peak", "±3: at the end": "critical_10"}
    begun = {"after an epoch: mean": "one_mean", "standard deviation": "one_spread",
             "of a binomial": "one_binomial", "when half are right: mean": "half_mean",
             "deviation": "half_spread", "binomial": "half_binomial"}

    def cells(of: Rows, columns: Mapping[str, str]) -> Row:
        return {heading: mean_sd(numbers(of, what)) for heading, what in columns.items()}

    def reached(name: str) -> Row:
        of = by[name, "true"]
        (true, test), (random, chance) = ([numbers(by[name, kind], f"{split}_accuracy")
                                           for split in ("train", "test")] for kind in EXTREMES)
        return {"network": name, "weights": f"{of.one('parameters'):,}",
                "images": f"{of.one('n'):,}", "epochs": f"{of.one('epochs'):,}",
                "rate": f"{of.one('lr'):g}", "training, true labels, %": mean_sd(true),
                "random": mean_sd(random), "less, points": mean_sd(random - true, "+"),
                "test, true labels, %": mean_sd(test), "random, %": mean_sd(chance)}

    right = {kind: f"{100 - 90 * share:.0f}" for kind, share in FALSE_LABELS.items()}
    names = [name for name, *_ in SETTINGS]
    return {
        f"Training and test accuracy, {len(by['happy', 'true'])} seeds": [*map(reached, names)],
        "How the training loss falls (a line has 0.11 of the time before 10 %)": [
            {"network": name, "labels": kind} | cells(by[name, kind], falls)
            for name in names for kind in EXTREMES],
        **{f"{name}: all kinds of data, accuracy, %": [
            {"data": kind, "right by true labels": right.get(kind, "–")}
            | cells(by[name, kind], noise) for kind in KINDS] for name in WITH_NOISE},
        "Critical validation images, %, in a box of ±0.3 grey values, and of ±3": [
            {"network": name, "data": kind} | cells(by[name, kind], critical)
            for name in WITH_NOISE for kind in FALSE_LABELS],
        "How the examples differ: percent of the starts with which one is right": [
            {"network": name, "data": kind, "starts": of.one("starts"), **cells(of, begun),
             "times": mean_sd(times_binomial(of, "half"))}
            for (name, kind), of in rows_of(rows, "starts").items()],
    }
# fmt: on


def picture(rows: Rows) -> figures.Figure | None:
    """A row for each network with noise, then how the loss falls, and who memorises."""
    if rows.folder is None or not (rows.folder / CURVES).exists():
        return None
    curves, by = Rows.read(rows.folder, CURVES).by("setting", "kind"), rows_of(rows, "training")

    def drawn(what: str, x: Sequence[float], scale: float, *of: str) -> dict[str, list]:
        name, *kinds = of
        values = {kind: np.transpose([row[what] for row in curves[name, kind]]) for kind in kinds}
        return {kind: [*map(figures.point, x, scale * values[kind])] for kind in kinds}

    parts = []
    shown = {"train_accuracy": "training accuracy", "validation_accuracy": "validation accuracy",
             "critical": f"critical images, ±{RADIUS:g} of 255 greys"}  # fmt: skip
    for name in WITH_NOISE:
        grid = curves[name, "true"].one("grid")
        for what, title in shown.items():
            of = drawn(what, grid, 100, name, *DRAWN)
            parts.append(figures.Panel(f"{name}: {title}", "epochs", f"{title}, %", of, "x"))
    across, up = "share of the time until 90 % are done", "fall still to come"
    for name in FALLING:
        lines = drawn("loss_left", np.linspace(0, 1, LEFT).tolist(), 1, name, *EXTREMES)
        lines["a line"] = [(0, 1, 0), (1, 0.1, 0)]
        parts.append(figures.Panel(f"{name}: the training loss falls", across, up, lines))
    lines = {kind: [] for kind in EXTREMES}
    for name, kind in product(MEMORISING, EXTREMES):
        label = name.replace(", n = ", "\n").replace(" ", "\n")
        lines[kind].append(figures.point(label, numbers(by[name, kind], "train_accuracy")))
    across, up = "network; images if not 1,000", "training accuracy, %"
    parts.append(figures.Panel("Memorised at the end", across, up, lines))
    title = f"True, noisy and random labels, {rows.one('dataset')}: mean ± standard deviation over "
    title += "seeds\nhappy: 784-16-16-10, sigmoid and squared error; the others: ReLU and "
    return figures.side_by_side(parts, title + "cross-entropy, 1×512 is 784-512-10")


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
