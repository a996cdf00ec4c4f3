"""Does the network that classifies digits memorise labels without meaning just as well?

    python experiments/random_labels.py           # MNIST, 20 to 30 minutes on two cores
    python experiments/random_labels.py --smoke   # the embedded digits, seconds

What is compared, and what came out: results/random_labels/README.md.
"""

import copy
import functools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nn_backprop import data as variants
from nn_backprop import figures, studies
from nn_backprop.data import ImageData
from nn_backprop.models import MLP
from nn_backprop.models.counting import parameters
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.studies.critical_samples import RADIUS, critical_share
from nn_backprop.studies.learning_curve import best_constant, fall
from nn_backprop.training import evaluate, fit_many

SHARES = {
    "true": 0.0, "20 % noise": 0.2, "40 % noise": 0.4, "60 % noise": 0.6, "80 % noise": 0.8,
    "random labels": 1.0,
}  # fmt: skip
NOISY = tuple(kind for kind, share in SHARES.items() if 0 < share < 1)
EXTREMES = ("true", "random labels")
KINDS = (*SHARES, "shuffled pixels", "random pixels", "Gaussian")
DRAWN = ("true", "20 % noise", "60 % noise", "random labels")  # more lines hide each other

VALIDATION, SEARCHED = 2_000, 300  # images
SEARCHES = {"critical": 1, "critical_10": 10}  # times the published box
STARTS, SMOKE_STARTS = 20, 5
LEFT = 21  # points at which the fall of the loss is drawn

PUBLISHED_TRAIN, PUBLISHED_TEST = 99.34, 10.61  # %, Zhang et al. 2017, table 1, random labels
# Our own bars.
SAME = 1.0  # percentage points
LINEAR = 0.95  # R²
HIGH = 90.0  # % of the training examples right
ALIKE = 1.1  # times the spread of a binomial


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

    def smaller(self) -> "Setting":
        """For the smoke run: it learns something, in no time."""
        small = self._replace(
            widths=tuple(min(width, 32) for width in self.widths),
            n=100 if self.n == 1_000 else 200, batch=10,
            epochs=-(-self.epochs // (20 if self.happy else 5)), lr=2 * self.lr,
        )  # fmt: skip
        return small._replace(optimizer="sgd", lr=2.0) if self.happy else small

    def fit(
        self, models: Sequence[MLP], sets: Sequence[ImageData], seeds: Sequence[int],
        look: Callable[[slice, int], None],
    ) -> Tensor:  # fmt: skip
        """All at once, on the images of the first set and the labels of each. At a constant rate: a
        schedule has a shape of its own, which the fall of the loss would take on."""
        return fit_many(
            models, sets[0], seeds=seeds, lrs=self.lr, optimizer=self.optimizer,
            labels=torch.stack([data.labels for data in sets]), schedule="constant",
            epochs=self.epochs, batch_size=self.batch, on_epoch=look,
        )  # fmt: skip


SETTINGS = (
    Setting("1×4096", (4096,), 1_000, 40, 2e-4),
    Setting("1×512, n = 5,000", (512,), 5_000, 90, 5e-4),
    Setting("1×512", (512,), 1_000, 100, 2e-4, KINDS),
    Setting("1×512, SGD", (512,), 1_000, 120, 2e-2, optimizer="sgd"),
    Setting("happy", (16, 16), 1_000, 1_500, 1e-3, KINDS, happy=True),
    Setting("happy, SGD", (16, 16), 1_000, 1_500, 0.5, optimizer="sgd", happy=True),
    Setting("happy, n = 5,000", (16, 16), 5_000, 400, 1e-3, happy=True),
    Setting("16-16 ReLU", (16, 16), 1_000, 300, 1e-3),
    Setting("16-16 ReLU, n = 5,000", (16, 16), 5_000, 300, 1e-3),
)
MEMORISING = tuple(setting.name for setting in SETTINGS if setting.optimizer == "adam")
FALLING = ("happy, SGD", "1×512, SGD")  # gradient descent, as in the sources
WITH_NOISE = ("happy", "1×512")
# From many starts, with enough epochs for half of the examples.
STARTED = (
    Setting("happy", (16, 16), 1_000, 300, 1e-3, (*EXTREMES, "Gaussian"), happy=True),
    Setting("16-16 ReLU", (16, 16), 1_000, 80, 1e-3, (*EXTREMES, "Gaussian")),
)


class Job(NamedTuple):
    """Trainings that share a seed."""

    setting: Setting
    kinds: tuple[str, ...]  # with the same images
    seed: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    trained = run.train_all(
        train, jobs(SETTINGS, options),
        lambda row: {f"train/{row['setting']}/{row['kind']}": row["train_accuracy"]},
    )  # fmt: skip
    with open(run.folder / "curves.jsonl", "w", encoding="utf-8") as file:  # thrice the rows' size
        for row in trained:
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
            labels = tuple(kind for kind in setting.kinds if kind in SHARES)
            groups = [labels, *groups[len(labels) :]]
        found += [Job(setting, kinds, s, options) for kinds in groups for s in range(options.seeds)]
    return found


# --- The data -----------------------------------------------------------------------------------


def held_out(data: ImageData) -> tuple[Tensor, Tensor]:
    """Of the validation split: images that choose the peak, and others, for critical samples."""
    nine_tenths = 9 * len(data.validation) // 10
    return data.validation[:nine_tenths][:VALIDATION], data.validation[nine_tenths:][:SEARCHED]


def made(data: ImageData, kind: str, n: int, seed: int) -> ImageData:
    """n of the training examples, and some of validation's, turned into a kind of data.

    The labels of validation and test are always the true ones. The false labels of a seed are
    drawn once: those of a smaller share are among those of a larger one.
    """
    data = replace(data, validation=held_out(data)[0])
    chosen = variants.subset(data, n, seed)
    if kind in SHARES:  # not drawn with the seed that chose the n
        return variants.random_labels(chosen, SHARES[kind], 10_000 + seed)
    changes: dict[str, Callable[[Tensor, int], Tensor]] = {
        "shuffled pixels": variants.shuffled_pixels, "random pixels": variants.random_pixels,
        # Of all images that are read, the first n are for training.
        "Gaussian": functools.partial(variants.gaussian_images, of=torch.arange(n)),
    }  # fmt: skip
    images, read = data.images.clone(), torch.cat([chosen.train, data.validation, data.test])
    images[read] = changes[kind](images[read], seed)
    return variants.subset(replace(data, images=images), n, seed)  # the same n, their own mean


# --- A training ---------------------------------------------------------------------------------


def train(job: Job) -> list[Row]:
    """Networks from one start, of which each learns a kind of data: a row each."""
    whole, (setting, kinds, seed, _) = studies.load_data(job.options), job
    sets = [made(whole, kind, setting.n, seed) for kind in kinds]
    watches = [
        Watch(setting, kind, seed, data, held_out(whole)[1])
        for kind, data in zip(kinds, sets, strict=True)
    ]

    def look(networks: slice, epochs: int) -> None:
        for watch in watches[networks]:
            watch.look(epochs)

    look(slice(None), 0)
    losses = setting.fit([watch.model for watch in watches], sets, [seed] * len(sets), look)
    if not losses.isfinite().all():
        raise studies.StudyError(f"a training diverged: {setting.name}, seed {seed}, {kinds}")
    return [watch.row() for watch in watches]


class Watch:
    """What is seen of a network while it learns."""

    def __init__(
        self, setting: Setting, kind: str, seed: int, data: ImageData, searched: Tensor
    ) -> None:
        self.setting, self.kind, self.seed, self.data = setting, kind, seed, data
        self.model = setting.network(seed)
        self.grid = grid(setting.epochs)
        self.losses: list[float] = []  # of the training examples, from epoch 0 on
        self.accuracies: list[float] = []
        self.seen: dict[str, list[float]] = defaultdict(list)  # at the epochs of the grid
        self.peak, self.at_peak = 0, self.model  # the place in the grid, the network
        self._train, self._held_out = data.batch(data.train), data.batch(data.validation)
        self._searched = searched  # where a kind of labels leaves the images as they were
        self._noise = torch.Generator().manual_seed(seed)

    def look(self, epochs: int) -> None:
        """After so many epochs."""
        loss, right = judge(self.model, *self._train)
        self.losses.append(loss)
        self.accuracies.append(right.double().mean().item())
        if epochs not in self.grid:
            return
        loss, right = judge(self.model, *self._held_out)
        accuracy, before = right.double().mean().item(), self.seen["validation_accuracy"]
        if accuracy > max(before, default=-1):
            self.peak, self.at_peak = len(before), copy.deepcopy(self.model)
        self.seen["train_accuracy"].append(self.accuracies[-1])
        self.seen["validation_loss"].append(loss)
        before.append(accuracy)
        if self.setting.name in WITH_NOISE and self.kind in SHARES:
            for name, factor in SEARCHES.items():
                share = critical_share(self.model, self.data, self._searched, factor, self._noise)
                self.seen[name].append(share)

    def row(self) -> Row:
        """Once it is trained: the only time that the test split is read."""
        setting, data = self.setting, self.data
        row: Row = {
            "what": "training", "setting": setting.name, "kind": self.kind, "seed": self.seed,
            "dataset": data.name, "n": setting.n, "epochs": setting.epochs,
            "parameters": parameters(self.model),
            "optimizer": setting.optimizer, "lr": setting.lr,
            "train_loss": self.losses[-1], "peak_epoch": self.grid[self.peak],
            "test_accuracy": evaluate(self.model, data, data.test).accuracy,
            "test_accuracy_at_peak": evaluate(self.at_peak, data, data.test).accuracy,
        }  # fmt: skip
        for name, values in self.seen.items():
            row |= {name: values[-1], f"{name}_at_peak": values[self.peak]}
        row["curves"] = {
            "grid": self.grid, **self.seen,
            "every_train_loss": self.losses, "every_train_accuracy": self.accuracies,
        }  # fmt: skip
        if self.kind in EXTREMES:
            errors = [1 - accuracy for accuracy in self.accuracies]
            loss, error = best_constant(self._train[1], setting.happy)
            for name, curve, highest in (("loss", self.losses, loss), ("error", errors, error)):
                numbers, row["curves"][f"{name}_left"] = fall(curve, highest, LEFT)
                row |= {f"{name}_{what}": number for what, number in numbers.items()}
        return row


def grid(epochs: int) -> tuple[int, ...]:
    """The first six epochs, and 20 more up to the last, each the same multiple of the one before.

    As far as they are whole numbers, and different ones.
    """
    early = range(1, min(6, epochs) + 1)
    return tuple(sorted({*early, *(round(epochs ** (k / 20)) for k in range(21))}))


@torch.no_grad()
def judge(model: MLP, inputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The mean loss, and which examples are right, bool (n,)."""
    output = model(inputs)
    return model.loss(output, labels).item(), output.argmax(1) == labels


# --- Many starts --------------------------------------------------------------------------------


def start(job: Job) -> Row:
    """One data set from many starts: how the examples differ in being learnt.

    "half" is of a start's first epoch in which half are right, or its last if there is none.
    """
    setting, (kind,) = job.setting, job.kinds
    data = made(studies.load_data(job.options), kind, setting.n, job.seed)
    count = SMOKE_STARTS if job.options.smoke else STARTS
    seeds = [count * job.seed + number for number in range(count)]
    models = [setting.network(seed) for seed in seeds]
    inputs, labels = data.batch(data.train)
    one: dict[int, Tensor] = {}  # which examples are right, by start
    half: dict[int, Tensor] = {}
    reached: set[int] = set()

    def look(networks: slice, epochs: int) -> None:
        for number in range(count)[networks]:
            if number in reached:
                continue
            _, half[number] = judge(models[number], inputs, labels)
            one.setdefault(number, half[number])
            if half[number].double().mean() >= 0.5:
                reached.add(number)

    setting.fit(models, [data] * count, seeds, look)
    row: Row = {
        "what": "starts", "setting": setting.name, "kind": kind, "seed": job.seed,
        "dataset": data.name, "n": setting.n, "starts": count, "half_reached": len(reached),
    }  # fmt: skip
    for name, right in (("one", one), ("half", half)):
        mean, deviation, binomial = difficulty(torch.stack(list(right.values())))
        row |= {f"{name}_mean": mean, f"{name}_spread": deviation, f"{name}_binomial": binomial}
    return row


def difficulty(right: Tensor) -> tuple[float, float, float]:
    """Of the shares of the starts with which an example is right, right bool (starts, examples).

    Their mean, their standard deviation, and that of a binomial with this mean: of examples that
    are all alike.
    """
    shares = right.double().mean(0)
    mean = shares.mean().item()
    return mean, shares.std().item(), math.sqrt(mean * (1 - mean) / len(right))


# --- What the rows come to ----------------------------------------------------------------------

By = Mapping[tuple[str, str], Rows]  # setting and kind


def claims(rows: Rows) -> list[Claim]:
    by = of(rows, "training")
    return memorised(by) + fallen(by) + peaked(by) + alike(of(rows, "starts"))


def of(rows: Rows, what: str) -> By:
    return rows.where(what=what).by("setting", "kind")


def numbers(rows: Rows, what: str) -> np.ndarray:
    """Of each seed: shares of examples in percent; of a fall, and epochs, as they are."""
    return rows.values(what, 1 if what.startswith(("loss", "error", "peak")) else 100)


def memorised(by: By) -> list[Claim]:
    """The same training accuracy with random labels, and chance on what was not trained on."""
    found = []
    for name in MEMORISING:
        true, random = (numbers(by[name, kind], "train_accuracy") for kind in EXTREMES)
        what = (
            f"{name}: training accuracy with random labels less that with true ones, in points: "
            f"−{SAME:g} or more (our bar)"
        )
        found.append(studies.between(what, "the same (3Blue1Brown)", random - true, low=-SAME))
    what = "1×512, n = 5,000, random labels: training accuracy, %, the published or more"
    reached = numbers(by["1×512, n = 5,000", "random labels"], "train_accuracy")
    found.append(studies.at_least(what, PUBLISHED_TRAIN, reached))
    # The networks of a seed share labels, and so their luck: their mean is one value.
    each = [numbers(by[name, "random labels"], "test_accuracy") for name in MEMORISING]
    means = [statistics.fmean(of_seed) for of_seed in zip(*each, strict=True)]
    what = "random labels, mean of the networks by Adam: test accuracy, %, from 9 to 11 (our bar)"
    return [*found, studies.between(what, f"{PUBLISHED_TEST}", means, low=9, high=11)]


def fallen(by: By) -> list[Claim]:
    """Of the loss: a fiddling start and a drop with true labels, a line with random ones."""
    found = []
    for name in FALLING:
        true, random = (by[name, kind] for kind in EXTREMES)
        first, lines = numbers(random, "loss_first"), numbers(random, "loss_line")
        took = [numbers(of, "loss_end") - numbers(of, "loss_start") for of in (true, random)]
        for what, published, values, low in (
            (", true labels: share of the time up to 90 % before 10 %, more than a line's",
             "fiddles around", numbers(true, "loss_first"), 1 / 9),
            (f", random labels: R² of a line up to 90 %, {LINEAR:g} or more (our bar)",
             "almost linearly", lines, LINEAR),
            (": R² of a line, higher with random labels than with true ones",
             "almost linearly", lines - numbers(true, "loss_line"), 0),
            (", random labels: share of the time up to 90 % before 10 %, over half (our bar)",
             "converges quickly", first, 0.5),
            (": from 10 to 90 %, times as many epochs with random labels as with true",
             "slowly", took[1] / took[0], 1),
        ):  # fmt: skip
            found.append(studies.between(name + what, published, values, low))
    return found


def peaked(by: By) -> list[Claim]:
    """With noise: of the four shares the one that speaks most against it."""
    found = []
    for name in WITH_NOISE:
        lost, reached, risen = {}, {}, {}
        for kind in NOISY:
            at_peak, at_end = (
                [numbers(by[name, kind], what + when) for what in ("test_accuracy", "critical")]
                for when in ("_at_peak", "")
            )
            lost[kind], risen[kind] = at_peak[0] - at_end[0], at_end[1] - at_peak[1]
            reached[kind] = numbers(by[name, kind], "train_accuracy_at_peak")
        least, slow = (min(of, key=lambda kind: statistics.fmean(of[kind])) for of in (lost, risen))
        most = max(reached, key=lambda kind: statistics.fmean(reached[kind]))
        more = np.subtract(
            *(numbers(by[name, f"{share} % noise"], "critical") for share in (80, 20))
        )
        every = f"{name}, 20 to 80 % noise"
        for what, published, values, low, high in (
            (f"{every}: test accuracy at the peak of validation's less the last, at {least}, "
             "points", "falls", lost[least], 0, math.inf),
            (f"{every}: training accuracy at the peak, at {most}, %, below {HIGH:g} (our bar)",
             "not yet high", reached[most], -math.inf, HIGH),
            (f"{every}: critical samples at the end less those at the peak, at {slow}, points",
             "rises", risen[slow], 0, math.inf),
            (f"{name}: critical samples at the end, more with 80 % noise than with 20 %, points",
             "higher", more, 0, math.inf),
        ):  # fmt: skip
            found.append(studies.between(what, published, values, low, high))
    return found


def alike(by: By) -> list[Claim]:
    """True labels have easy and hard examples, random ones are all alike."""
    found = []
    for name, moment, when in (
        ("16-16 ReLU", "one", "after one epoch"),
        ("16-16 ReLU", "half", "when half are right"),
        ("happy", "half", "when half are right"),
    ):
        true, random, gaussian = (
            times_binomial(by[name, kind], moment) for kind in (*EXTREMES, "Gaussian")
        )
        what = f"{name}, {when}: spread of the examples as a multiple of a binomial's"
        found += [
            studies.between(f"{what}: more with true labels than with random",
                            "much more variable", true - random, low=0),
            studies.between(f"{what}, random labels: more than 1", "not quite alike", random,
                            low=1),
            studies.between(f"{what}, Gaussian: {ALIKE:g} at most (our bar)", "alike", gaussian,
                            high=ALIKE),
        ]  # fmt: skip
    return found


def times_binomial(rows: Rows, moment: str) -> np.ndarray:
    return rows.values(f"{moment}_spread") / rows.values(f"{moment}_binomial")


def cells(rows: Rows, columns: Mapping[str, str]) -> Row:
    """By heading; `columns` says which number of the rows stands there."""
    return {heading: studies.mean_sd(numbers(rows, what)) for heading, what in columns.items()}


def tables(rows: Rows) -> dict[str, studies.Table]:
    by = of(rows, "training")
    fall_columns = {
        "10 % after epochs": "loss_start", "90 % after": "loss_end",
        "first 10 %, share of the time": "loss_first", "R² of a line": "loss_line",
        "of a sigmoid": "loss_sigmoid", "errors: the share": "error_first",
        "of a line": "error_line",
    }  # fmt: skip
    reached: list[Row] = []
    for name in (setting.name for setting in SETTINGS):
        true, random = (by[name, kind] for kind in EXTREMES)
        less = numbers(random, "train_accuracy") - numbers(true, "train_accuracy")
        reached.append(
            {
                "network": name, "weights": f"{true.one('parameters'):,}",
                "images": f"{true.one('n'):,}", "epochs": f"{true.one('epochs'):,}",
                "rate": f"{true.one('lr'):g}",
                **cells(true, {"training, true labels, %": "train_accuracy"}),
                **cells(random, {"random": "train_accuracy"}),
                "less, points": studies.mean_sd(less, "+"),
                **cells(true, {"test, true labels, %": "test_accuracy"}),
                **cells(random, {"random, %": "test_accuracy"}),
            }
        )  # fmt: skip
    made: dict[str, studies.Table] = {
        f"Training and test accuracy, {len(true)} seeds": reached,
        "How the training loss falls (a line has 0.11 of the time before 10 %)": [
            {"network": setting.name, "labels": kind} | cells(by[setting.name, kind], fall_columns)
            for setting in SETTINGS
            for kind in EXTREMES
        ],
    }
    columns = {
        "training": "train_accuracy", "at the peak": "train_accuracy_at_peak",
        "peak after epochs": "peak_epoch", "test at the peak": "test_accuracy_at_peak",
        "at the end": "test_accuracy",
    }  # fmt: skip
    for name in WITH_NOISE:
        made[f"{name}: all kinds of data, accuracy, %"] = [
            {
                "data": kind,
                "right by true labels": f"{100 - 90 * SHARES[kind]:.0f}" if kind in SHARES else "–",
                **cells(by[name, kind], columns),
            }
            for kind in KINDS
        ]
    columns = {
        "at the peak": "critical_at_peak", "at the end": "critical",
        "±3: at the peak": "critical_10_at_peak", "±3: at the end": "critical_10",
    }  # fmt: skip
    made["Critical validation images, %, in a box of ±0.3 grey values, and of ±3"] = [
        {"network": name, "data": kind} | cells(by[name, kind], columns)
        for name in WITH_NOISE
        for kind in SHARES
    ]
    columns = {
        "after an epoch: mean": "one_mean", "standard deviation": "one_spread",
        "of a binomial": "one_binomial", "when half are right: mean": "half_mean",
        "deviation": "half_spread", "binomial": "half_binomial",
    }  # fmt: skip
    made["How the examples differ: percent of the starts with which one is right"] = [
        {
            "network": name, "data": kind, "starts": rows.one("starts"),
            **cells(rows, columns), "times": studies.mean_sd(times_binomial(rows, "half")),
        }
        for (name, kind), rows in of(rows, "starts").items()
    ]  # fmt: skip
    return made


def picture(rows: Rows) -> figures.Figure | None:
    """A row for each network with noise, then how the loss falls, and who memorises."""
    assert rows.folder is not None
    file = rows.folder / "curves.jsonl"
    if not file.exists():  # too large to commit
        return None
    lines_of = Rows(map(json.loads, file.read_text(encoding="utf-8").splitlines()))
    curves = lines_of.by("setting", "kind")
    parts = []
    for name in WITH_NOISE:
        grid = curves[name, "true"].one("grid")
        for title, what in (
            ("training accuracy", "train_accuracy"),
            ("validation accuracy", "validation_accuracy"),
            (f"critical images, ±{RADIUS:g} of 255 greys", "critical"),
        ):
            lines = {kind: drawn(curves[name, kind], what, grid, 100) for kind in DRAWN}
            parts.append(figures.Panel(f"{name}: {title}", "epochs", f"{title}, %", lines, "x"))
    across = "share of the time until 90 % are done"
    times = [k / (LEFT - 1) for k in range(LEFT)]
    for name in FALLING:
        lines = {kind: drawn(curves[name, kind], "loss_left", times) for kind in EXTREMES}
        lines["a line"] = [(0, 1, 0), (1, 0.1, 0)]
        title = f"{name}: the training loss falls"
        parts.append(figures.Panel(title, across, "fall still to come", lines))
    by = of(rows, "training")
    across, up = "network; images if not 1,000", "training accuracy, %"
    names = {name: name.replace(", n = ", "\n").replace(" ", "\n") for name in MEMORISING}
    lines = {
        kind: [
            figures.point(shown, numbers(by[name, kind], "train_accuracy"))
            for name, shown in names.items()
        ]
        for kind in EXTREMES
    }
    parts.append(figures.Panel("Memorised at the end", across, up, lines))
    return figures.side_by_side(
        parts,
        f"True, noisy and random labels, {rows.one('dataset')}: mean ± standard deviation over "
        "seeds\nhappy: 784-16-16-10, sigmoid and squared error; the others: ReLU and "
        "cross-entropy, 1×512 is 784-512-10",
    )


def drawn(
    rows: Rows, what: str, places: Sequence[float], scale: float = 1
) -> list[tuple[float | str, float, float]]:
    """A curve of each seed, over the places."""
    values = scale * np.array([row[what] for row in rows])
    return [figures.point(x, at) for x, at in zip(places, values.T, strict=True)]


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
