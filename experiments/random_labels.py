"""Does the network that classifies digits memorise labels without meaning just as well?

    python experiments/random_labels.py           # MNIST, 20 to 30 minutes on two cores
    python experiments/random_labels.py --smoke   # the embedded digits, seconds

What is compared, and what came out: results/random_labels/README.md.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nn_backprop import figures, studies
from nn_backprop.data import ImageData
from nn_backprop.data.meaningless import FALSE_LABELS, KINDS, meaningless
from nn_backprop.models import MLP
from nn_backprop.models.counting import parameters
from nn_backprop.studies import Claim, Row, Rows, between, mean_sd
from nn_backprop.studies.learning_curve import Watch
from nn_backprop.studies.memorisation import RADIUS, Starts, critical_share
from nn_backprop.training import evaluate, fit_many

EXTREMES = ("true", "random labels")
NOISY = ("20 % noise", "40 % noise", "60 % noise", "80 % noise")
DRAWN = ("true", "20 % noise", "60 % noise", "random labels")  # more lines hide each other
SEARCHES = {"critical": 1, "critical_10": 10}  # times the published box
VALIDATION, SEARCHED = 2_000, 300  # images
STARTS, SMOKE_STARTS = 20, 5
LEFT = 21  # points at which the fall of the loss is drawn
PUBLISHED_TRAIN, PUBLISHED_TEST = 99.34, "10.61"  # %, Zhang et al. 2017, table 1, random labels
# Our own bars: percentage points, R², % of the training examples, times a binomial's spread.
SAME, LINEAR, HIGH, ALIKE = 1.0, 0.95, 90.0, 1.1


@dataclass(frozen=True)
class Options(studies.Options):
    """True, noisy and random labels, shuffled and random pixels: what is learnt, and how."""

    seeds: int = 10
    """Number of seeds, from 0."""


class Setting(NamedTuple):
    """A network and how it is trained."""

    name: str
    widths: tuple[int, ...]  # of the hidden layers
    n: int  # training examples
    epochs: int
    lr: float
    kinds: tuple[str, ...] = EXTREMES
    optimizer: str = "adam"
    happy: bool = False  # sigmoid and squared error; else ReLU and cross-entropy
    batch: int = 50

    def network(self, seed: int) -> MLP:
        torch.manual_seed(seed)
        how = ("sigmoid", "squared_error") if self.happy else ("relu", "cross_entropy")
        return MLP((784, *self.widths, 10), *how)

    def fit(
        self, models: Sequence[MLP], sets: Sequence[ImageData], seeds: Sequence[int],
        look: Callable[[slice, int], None],
    ) -> None:  # fmt: skip
        """All at once, on the images of the first set and the labels of each. At a constant rate: a
        schedule has a shape of its own, which the fall of the loss would take on."""
        losses = fit_many(
            models, sets[0], seeds=seeds, lrs=self.lr, optimizer=self.optimizer,
            labels=torch.stack([data.labels for data in sets]), schedule="constant",
            epochs=self.epochs, batch_size=self.batch, on_epoch=look,
        )  # fmt: skip
        if not losses.isfinite().all():
            raise studies.StudyError(f"a training diverged: {self.name}, seeds {seeds}")

    def smaller(self) -> "Setting":
        """For the smoke run: it learns something, in no time."""
        widths, n = tuple(min(width, 32) for width in self.widths), self.n // 25
        epochs = -(-self.epochs // (20 if self.happy else 5))
        small = self._replace(widths=widths, n=max(100, n), epochs=epochs, batch=10)
        happy = {"optimizer": "sgd", "lr": 2.0}
        return small._replace(**(happy if self.happy else {"lr": 2 * self.lr}))


SMALL, SEVERAL = (16, 16), (*EXTREMES, "Gaussian")
SETTINGS = (
    Setting("1×4096", (4096,), 1_000, 40, 2e-4),
    Setting("1×512, n = 5,000", (512,), 5_000, 90, 5e-4),
    Setting("1×512", (512,), 1_000, 100, 2e-4, KINDS),
    Setting("1×512, SGD", (512,), 1_000, 120, 2e-2, optimizer="sgd"),
    Setting("happy", SMALL, 1_000, 1_500, 1e-3, KINDS, happy=True),
    Setting("happy, SGD", SMALL, 1_000, 1_500, 0.5, optimizer="sgd", happy=True),
    Setting("happy, n = 5,000", SMALL, 5_000, 400, 1e-3, happy=True),
    Setting("16-16 ReLU", SMALL, 1_000, 300, 1e-3),
    Setting("16-16 ReLU, n = 5,000", SMALL, 5_000, 300, 1e-3),
)
MEMORISING = tuple(setting.name for setting in SETTINGS if setting.optimizer == "adam")
FALLING = ("happy, SGD", "1×512, SGD")  # gradient descent, as in the sources
WITH_NOISE = ("happy", "1×512")
STARTED = (  # from many starts, with enough epochs for half of the examples
    Setting("happy", SMALL, 1_000, 300, 1e-3, SEVERAL, happy=True),
    Setting("16-16 ReLU", SMALL, 1_000, 80, 1e-3, SEVERAL),
)


class Job(NamedTuple):
    """Trainings that share a seed."""

    setting: Setting
    kinds: tuple[str, ...]  # with the same images
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)

    def tag(row: Row) -> dict[str, float]:
        return {f"train/{row['setting']}/{row['kind']}": row["train_accuracy"]}

    trained = run.train_all(train, jobs(SETTINGS, options), tag)
    with open(run.folder / "curves.jsonl", "w", encoding="utf-8") as file:
        for row in trained:  # the curves are thrice as large as all else
            about = {key: row[key] for key in ("setting", "kind", "seed")}
            file.write(json.dumps(about | row.pop("curves"), ensure_ascii=False) + "\n")
    run.train_all(start, jobs(STARTED, options))


def jobs(settings: Sequence[Setting], options: Options) -> list[Job]:
    """Of every setting, kind and seed. Small networks on the same images are trained in one job.

    Of large networks, several at once are no faster, and their jobs are shared out better singly.
    """
    found = []
    for setting in settings:
        setting = setting.smaller() if options.smoke else setting
        groups: list[tuple[str, ...]] = [(kind,) for kind in setting.kinds]
        if max(setting.widths) <= 64 and settings is SETTINGS:  # else a kind is many networks
            labels = tuple(kind for kind in setting.kinds if kind in FALSE_LABELS)
            groups = [labels, *groups[len(labels) :]]
        found += [Job(setting, kinds, s, options) for kinds in groups for s in range(options.seeds)]
    return found


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
    setting, kinds, seed, options = job
    _, searched = held_out(studies.load_data(options))
    sets, watches = made(job), []
    for kind, data in zip(kinds, sets, strict=True):
        noise, measures = torch.Generator().manual_seed(seed), {}
        if setting.name in WITH_NOISE and kind in FALSE_LABELS:  # the images are as they were
            for name, factor in SEARCHES.items():
                measures[name] = partial(
                    critical_share, data=data, indices=searched, factor=factor, noise=noise
                )
        watches.append(Watch(setting.network(seed), data, setting.epochs, measures))

    def look(networks: slice, epochs: int) -> None:
        for watch in watches[networks]:
            watch.look(epochs)

    look(slice(None), 0)
    setting.fit([watch.model for watch in watches], sets, [seed] * len(sets), look)
    rows = []
    for kind, data, watch in zip(kinds, sets, watches, strict=True):
        row = {
            "what": "training", "setting": setting.name, "kind": kind, "seed": seed,
            "dataset": data.name, "n": setting.n, "epochs": setting.epochs,
            "parameters": parameters(watch.model),
            "optimizer": setting.optimizer, "lr": setting.lr, **watch.numbers(),
            "test_accuracy": evaluate(watch.model, data, data.test).accuracy,
            "test_accuracy_at_peak": evaluate(watch.at_peak, data, data.test).accuracy,
            "curves": watch.curves(),
        }  # fmt: skip
        if kind in EXTREMES:
            falls, left = watch.falls(setting.happy, LEFT)
            row = {**row, **falls, "curves": {**watch.curves(), **left}}
        rows.append(row)
    return rows


def start(job: Job) -> Row:
    """One data set from many starts: how the examples differ in being learnt."""
    setting, (data,) = job.setting, made(job)
    count = SMOKE_STARTS if job.options.smoke else STARTS
    seeds = [count * job.seed + number for number in range(count)]
    starts = Starts([setting.network(seed) for seed in seeds], data)
    setting.fit(starts.models, [data] * count, seeds, starts.look)
    return {"what": "starts", "setting": setting.name, "kind": job.kinds[0], "seed": job.seed,
            "dataset": data.name, "n": setting.n, "starts": count, **starts.numbers()}  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------

By = Mapping[tuple[str, str], Rows]  # setting and kind


def claims(rows: Rows) -> list[Claim]:
    by = rows_of(rows, "training")
    return memorised(by) + fallen(by) + peaked(by) + alike(rows_of(rows, "starts"))


def rows_of(rows: Rows, what: str) -> By:
    return rows.where(what=what).by("setting", "kind")


def numbers(rows: Rows, what: str) -> np.ndarray:
    """Of each seed: shares of examples in percent; of a fall, and epochs, as they are."""
    return rows.values(what, 1 if what.startswith(("loss", "error", "peak")) else 100)


def more(one: Rows, other: Rows, what: str) -> np.ndarray:
    return numbers(one, what) - numbers(other, what)


def times_binomial(rows: Rows, moment: str) -> np.ndarray:
    return rows.values(f"{moment}_spread") / rows.values(f"{moment}_binomial")


def memorised(by: By) -> list[Claim]:
    """The same training accuracy with random labels, and chance on what was not trained on."""
    bar = f"in points: −{SAME:g} or more (our bar)"
    found = [
        between(f"{name}: training accuracy with random labels less that with true ones, {bar}",
                "the same (3Blue1Brown)",
                more(by[name, "random labels"], by[name, "true"], "train_accuracy"), low=-SAME)
        for name in MEMORISING
    ]  # fmt: skip
    claim = "1×512, n = 5,000, random labels: training accuracy, %, the published or more"
    reached = numbers(by["1×512, n = 5,000", "random labels"], "train_accuracy")
    found.append(studies.at_least(claim, PUBLISHED_TRAIN, reached))
    # The networks of a seed share labels, and so their luck: their mean is one value.
    each = [numbers(by[name, "random labels"], "test_accuracy") for name in MEMORISING]
    means = [fmean(of_seed) for of_seed in zip(*each, strict=True)]
    claim = "random labels, mean of the networks by Adam: test accuracy, %, from 9 to 11 (our bar)"
    return [*found, between(claim, PUBLISHED_TEST, means, low=9, high=11)]


def fallen(by: By) -> list[Claim]:
    """Of the loss: a fiddling start and a drop with true labels, a line with random ones."""
    found, late = [], "share of the time up to 90 % before 10 %"
    for name in FALLING:
        true, random = (by[name, kind] for kind in EXTREMES)
        short, long = (numbers(of, "loss_end") - numbers(of, "loss_start") for of in (true, random))
        found += [
            between(f"{name}, true labels: {late}, more than a line's",
                    "fiddles around", numbers(true, "loss_first"), low=1 / 9),
            between(f"{name}, random labels: R² of a line up to 90 %, {LINEAR:g} or more (our bar)",
                    "almost linearly", numbers(random, "loss_line"), low=LINEAR),
            between(f"{name}: R² of a line, higher with random labels than with true ones",
                    "almost linearly", more(random, true, "loss_line"), low=0),
            between(f"{name}, random labels: {late}, over half (our bar)",
                    "converges quickly", numbers(random, "loss_first"), low=0.5),
            between(f"{name}: from 10 to 90 %, times as many epochs with random labels as with true",
                    "slowly", long / short, low=1),
        ]  # fmt: skip
    return found


def peaked(by: By) -> list[Claim]:
    """With noise: of the four shares the one that speaks most against it."""
    found = []
    for name in WITH_NOISE:
        of = {kind: by[name, kind] for kind in NOISY}

        def gain(what: str, before: str, after: str, of: Mapping = of) -> dict[str, np.ndarray]:
            return {
                kind: numbers(of[kind], what + after) - numbers(of[kind], what + before)
                for kind in NOISY
            }

        lost, risen = gain("test_accuracy", "", "_at_peak"), gain("critical", "_at_peak", "")
        reached = {kind: numbers(of[kind], "train_accuracy_at_peak") for kind in NOISY}
        least, slow = (min(NOISY, key=lambda kind: fmean(x[kind])) for x in (lost, risen))
        most = max(NOISY, key=lambda kind: fmean(reached[kind]))
        every, critical = f"{name}, 20 to 80 % noise", "critical samples at the end"
        found += [
            between(f"{every}: test accuracy at the peak of validation's less the last, at {least},"
                    " points", "falls", lost[least], low=0),
            between(f"{every}: training accuracy at the peak, at {most}, %, below {HIGH:g} (our bar)",
                    "not yet high", reached[most], high=HIGH),
            between(f"{every}: {critical} less those at the peak, at {slow}, points",
                    "rises", risen[slow], low=0),
            between(f"{name}: {critical}, more with 80 % noise than with 20 %, points",
                    "higher", more(of[NOISY[-1]], of[NOISY[0]], "critical"), low=0),
        ]  # fmt: skip
    return found


def alike(by: By) -> list[Claim]:
    """True labels have easy and hard examples, random ones are all alike."""
    found = []
    for name, moment, when in (
        ("16-16 ReLU", "one", "after one epoch"),
        ("16-16 ReLU", "half", "when half are right"),
        ("happy", "half", "when half are right"),
    ):
        true, random, gaussian = (times_binomial(by[name, kind], moment) for kind in SEVERAL)
        what = f"{name}, {when}: spread of the examples as a multiple of a binomial's"
        found += [
            between(f"{what}: more with true labels than with random",
                    "much more variable", true - random, low=0),
            between(f"{what}, random labels: more than 1", "not quite alike", random, low=1),
            between(f"{what}, Gaussian: {ALIKE:g} at most (our bar)", "alike", gaussian, high=ALIKE),
        ]  # fmt: skip
    return found


def tables(rows: Rows) -> dict[str, studies.Table]:
    def cells(of: Rows, columns: Mapping[str, str]) -> Row:
        return {heading: mean_sd(numbers(of, what)) for heading, what in columns.items()}

    by = rows_of(rows, "training")
    fall_columns = {
        "10 % after epochs": "loss_start", "90 % after": "loss_end",
        "first 10 %, share of the time": "loss_first", "R² of a line": "loss_line",
        "of a sigmoid": "loss_sigmoid", "errors: the share": "error_first",
        "of a line": "error_line",
    }  # fmt: skip
    noise_columns = {
        "training": "train_accuracy", "at the peak": "train_accuracy_at_peak",
        "peak after epochs": "peak_epoch", "test at the peak": "test_accuracy_at_peak",
        "at the end": "test_accuracy",
    }  # fmt: skip
    critical_columns = {
        "at the peak": "critical_at_peak", "at the end": "critical",
        "±3: at the peak": "critical_10_at_peak", "±3: at the end": "critical_10",
    }  # fmt: skip
    start_columns = {
        "after an epoch: mean": "one_mean", "standard deviation": "one_spread",
        "of a binomial": "one_binomial", "when half are right: mean": "half_mean",
        "deviation": "half_spread", "binomial": "half_binomial",
    }  # fmt: skip
    return {
        f"Training and test accuracy, {len(by['happy', 'true'])} seeds": [
            {
                "network": name, "weights": f"{true.one('parameters'):,}",
                "images": f"{true.one('n'):,}", "epochs": f"{true.one('epochs'):,}",
                "rate": f"{true.one('lr'):g}",
                **cells(true, {"training, true labels, %": "train_accuracy"}),
                **cells(random, {"random": "train_accuracy"}),
                "less, points": mean_sd(more(random, true, "train_accuracy"), "+"),
                **cells(true, {"test, true labels, %": "test_accuracy"}),
                **cells(random, {"random, %": "test_accuracy"}),
            }
            for name, *_ in SETTINGS
            for true, random in [(by[name, "true"], by[name, "random labels"])]
        ],
        "How the training loss falls (a line has 0.11 of the time before 10 %)": [
            {"network": name, "labels": kind} | cells(by[name, kind], fall_columns)
            for name, *_ in SETTINGS
            for kind in EXTREMES
        ],
        **{
            f"{name}: all kinds of data, accuracy, %": [
                {"data": kind, "right by true labels": f"{100 - 90 * FALSE_LABELS[kind]:.0f}"
                 if kind in FALSE_LABELS else "–", **cells(by[name, kind], noise_columns)}
                for kind in KINDS
            ]
            for name in WITH_NOISE
        },
        "Critical validation images, %, in a box of ±0.3 grey values, and of ±3": [
            {"network": name, "data": kind} | cells(by[name, kind], critical_columns)
            for name in WITH_NOISE
            for kind in FALSE_LABELS
        ],
        "How the examples differ: percent of the starts with which one is right": [
            {"network": name, "data": kind, "starts": of.one("starts"),
             **cells(of, start_columns), "times": mean_sd(times_binomial(of, "half"))}
            for (name, kind), of in rows_of(rows, "starts").items()
        ],
    }  # fmt: skip


def picture(rows: Rows) -> figures.Figure | None:
    """A row for each network with noise, then how the loss falls, and who memorises."""
    assert rows.folder is not None
    file = rows.folder / "curves.jsonl"
    if not file.exists():  # it is too large to commit
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    curves, by = Rows(map(json.loads, lines)).by("setting", "kind"), rows_of(rows, "training")

    def drawn(key: tuple[str, str], what: str, places: Sequence[float], scale: float = 1) -> list:
        values = scale * np.array([row[what] for row in curves[key]])  # seeds, places
        return [figures.point(x, at) for x, at in zip(places, values.T, strict=True)]

    parts = []
    for name in WITH_NOISE:
        grid = curves[name, "true"].one("grid")
        for title, what in (
            ("training accuracy", "train_accuracy"),
            ("validation accuracy", "validation_accuracy"),
            (f"critical images, ±{RADIUS:g} of 255 greys", "critical"),
        ):
            of = {kind: drawn((name, kind), what, grid, 100) for kind in DRAWN}
            parts.append(figures.Panel(f"{name}: {title}", "epochs", f"{title}, %", of, "x"))
    times, across = np.linspace(0, 1, LEFT).tolist(), "share of the time until 90 % are done"
    for name in FALLING:
        of = {kind: drawn((name, kind), "loss_left", times) for kind in EXTREMES}
        of["a line"] = [(0, 1, 0), (1, 0.1, 0)]
        title = f"{name}: the training loss falls"
        parts.append(figures.Panel(title, across, "fall still to come", of))
    shown = {name: name.replace(", n = ", "\n").replace(" ", "\n") for name in MEMORISING}
    of = {
        kind: [figures.point(shown[name], numbers(by[name, kind], "train_accuracy"))
               for name in MEMORISING]
        for kind in EXTREMES
    }  # fmt: skip
    across, up = "network; images if not 1,000", "training accuracy, %"
    return figures.side_by_side(
        [*parts, figures.Panel("Memorised at the end", across, up, of)],
        f"True, noisy and random labels, {rows.one('dataset')}: mean ± standard deviation over "
        "seeds\nhappy: 784-16-16-10, sigmoid and squared error; the others: ReLU and "
        "cross-entropy, 1×512 is 784-512-10",
    )


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
