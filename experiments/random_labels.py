"""Does the network that classifies digits memorise labels without meaning just as well?

    python experiments/random_labels.py           # MNIST, 20 to 30 minutes on two cores
    python experiments/random_labels.py --smoke   # the embedded digits, seconds

A seed draws n training images, their false labels, a start and an order; all kinds of data of a
seed share them. `true` keeps the labels; of 20 to 80 % noise, that share of them is drawn anew,
evenly from all ten classes and once for all epochs (one in ten gets its own again), and of `random
labels` all. `shuffled pixels`: one order of the pixels for all images; `random pixels`: an order
for each; `Gaussian`: images with the mean and the covariance of these n, each with the label of the
digit in whose place it stands. These three change the validation and test images too. No weight
decay, no augmentation, and a constant rate: a schedule has a shape of its own, which the fall of
the loss would take on.

The networks: the happy one, 784-16-16-10 with sigmoid and squared error; one of its size with ReLU
and cross-entropy; with these also 784-512-10, as wide as Zhang's, and 784-4096-10. Rates and epochs
were chosen with one seed that is not reported, by the training accuracy with random labels: the
happy network reached 96.0, 96.1 and 95.5 % with Adam's rate .0005, .001 and .002 in 2,000 epochs,
and 94.7, 91.2 and 84.9 % with SGD's rate .5 in 1,500 and 1 and 3 in 1,000. Those of 512 memorised
at all rates tried; small ones were taken, which give the fall more epochs.

**How the loss falls**, from that of the best constant output (it knows the shares of the classes
and no image) to the last: after how many epochs are 10 and 90 % of the fall done? The training
images are judged after every epoch; in between, the loss is taken to be linear. Up to 90 % are
fitted to it a line, and a sigmoid from the first height to the last, with two parameters each. A
line takes 1/9 of the time for the first 10 %; more means that it fiddles around first, and more
than ½ that it takes longer to start than to fall (Zhang et al.: "once the fitting starts, it
converges quickly"). The talk at the end of 3Blue1Brown's second chapter has it that true labels
fiddle around and then drop, and that random ones fall slowly, almost linearly.

**With noise**, the accuracy on validation's true labels peaks. The peak is chosen there, among some
20 epochs; how much accuracy is lost from it to the end, is told of the test split.

**Critical samples** are validation images (300, of which none chose the peak) that have another
predicted class somewhere within ±r of each pixel. The search is that of Arpit et al.: a step
α sign(∂C/∂x) + β η, then back into the box, with C the loss of the class predicted at first and η
normal; here 5 steps, which find no more than the authors' 100. x are grey values of 0 to 255, with
r = .3, α = .25, β = .2, as published; a table has all three ten times as large, too.

**Are some examples easier?** Of 20 starts with orders of their own and the same data: the share
that gets an example right, and the standard deviation of this share over the examples. Were all
examples alike, it would be that of a binomial with their mean, so it is told in multiples of that;
examples with random labels are not quite alike in the paper of Arpit et al., and Gaussian ones are.
It is taken after one epoch, as there, and of each start in the first epoch in which half of its
examples are right, since after one epoch random labels are hardly learnt at all.

Sources: 3Blue1Brown 2017, Gradient descent, how neural networks learn; Zhang, Bengio, Hardt, Recht
& Vinyals 2017, Understanding deep learning requires rethinking generalization (section 2, table 1;
their data are 50,000 small colour images); Arpit et al. 2017, A closer look at memorization in deep
networks (sections 3.1, 4.1 and 4.2).
"""

import copy
import functools
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

from nn_backprop import figures
from nn_backprop.data import (
    ImageData,
    gaussian_images,
    load,
    random_labels,
    random_pixels,
    shuffled_pixels,
    subset,
)
from nn_backprop.models import MLP
from nn_backprop.models.counting import parameters
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, at_least, between, differences, spread
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
RADIUS, STEP, NOISE = 0.3, 0.25, 0.2  # of Arpit et al.: r, α and β, in grey values of 0 to 255
SEARCHES = {"critical": 1, "critical_10": 10}  # times these
SEARCH_STEPS = 5
STARTS = 20
LEFT = 21  # points at which the fall of the loss is drawn

PUBLISHED_TRAIN, PUBLISHED_TEST = 99.34, 10.61  # %, Zhang et al., table 1, 1×512, random labels
# Our own bars.
SAME = 1.0  # percentage points
LINEAR = 0.95  # R²
HIGH = 90.0  # % of the training examples right
ALIKE = 1.1  # times the spread of a binomial


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """True, noisy and random labels, shuffled and random pixels: what is learnt, and how."""

    seeds: int = 10
    """Number of seeds, from 0; at least 2."""


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

By = Mapping[tuple[str, str], Sequence[study.Row]]  # setting and kind: rows in order of the seeds


class Job(NamedTuple):
    """Trainings that share a seed."""

    setting: Setting
    kinds: tuple[str, ...]  # with the same images
    seed: int
    options: Options


def conduct(under_way: study.Study, options: Options) -> None:
    _data(options)  # so that a missing MNIST ends the study here
    results = under_way.carry_out(
        train, _jobs(SETTINGS, options),
        lambda result: {
            f"train/{row['setting']}/{row['kind']}": row["train_accuracy"] for row in result["rows"]
        },
    )  # fmt: skip
    trained = [row for result in results for row in result["rows"]]
    begun = under_way.carry_out(start, _jobs(STARTED, options))
    plain = [{name: row[name] for name in row if name != "curves"} for row in trained]
    under_way.rows[:] = plain + begun  # the curves stay in rows.jsonl
    by, by_start = _by(trained), _by(begun)
    claims = _memorised(by) + _fallen(by) + _peaked(by) + _alike(by_start)
    under_way.finish(_tables(by, by_start), claims, _picture(by))


def _jobs(settings: Sequence[Setting], options: Options) -> list[Job]:
    """Of every setting, kind and seed. Small networks on the same images are trained in one job.

    Of large networks, several at once are no faster, and their jobs are shared out better singly.
    """
    jobs = []
    for setting in map(_smaller, settings) if options.smoke else settings:
        groups: list[tuple[str, ...]] = [(kind,) for kind in setting.kinds]
        if max(setting.widths) <= 64 and settings is SETTINGS:  # else a kind is many networks
            labels = tuple(kind for kind in setting.kinds if kind in SHARES)
            groups = [labels, *groups[len(labels) :]]
        jobs += [
            Job(setting, kinds, seed, options) for kinds in groups for seed in range(options.seeds)
        ]
    return jobs


def _smaller(setting: Setting) -> Setting:
    """For the smoke run: it learns something, in no time."""
    small = setting._replace(
        widths=tuple(min(width, 32) for width in setting.widths),
        n=100 if setting.n == 1_000 else 200, batch=10,
        epochs=-(-setting.epochs // (20 if setting.happy else 5)), lr=2 * setting.lr,
    )  # fmt: skip
    return small._replace(optimizer="sgd", lr=2.0) if setting.happy else small


def _by(rows: Sequence[study.Row]) -> dict[tuple[str, str], list[study.Row]]:
    by: dict[tuple[str, str], list[study.Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by.setdefault((row["setting"], row["kind"]), []).append(row)
    return by


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
    chosen = subset(data, n, seed)
    if kind in SHARES:
        return random_labels(chosen, SHARES[kind], 10_000 + seed)  # not the seed that chose the n
    changes: dict[str, Callable[[Tensor, int], Tensor]] = {
        "shuffled pixels": shuffled_pixels, "random pixels": random_pixels,
        # Of all images that are read, the first n are for training.
        "Gaussian": functools.partial(gaussian_images, of=torch.arange(n)),
    }  # fmt: skip
    images, read = data.images.clone(), torch.cat([chosen.train, data.validation, data.test])
    images[read] = changes[kind](images[read], seed)
    return subset(replace(data, images=images), n, seed)  # the same n, with their own mean


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


# --- A training ---------------------------------------------------------------------------------


def train(job: Job) -> study.Row:
    """Networks from one start, of which each learns a kind of data: a row each, under "rows"."""
    setting, seed = job.setting, job.seed
    sets = [made(_data(job.options), kind, setting.n, seed) for kind in job.kinds]
    _, searched = held_out(_data(job.options))
    watches = [
        Watch(setting, kind, seed, data, searched)
        for kind, data in zip(job.kinds, sets, strict=True)
    ]

    def look(networks: slice, epochs: int) -> None:
        for watch in watches[networks]:
            watch.look(epochs)

    look(slice(None), 0)
    losses = _fit([watch.model for watch in watches], sets, setting, [seed] * len(sets), look)
    if not losses.isfinite().all():
        raise study.StudyError(f"a training diverged: {setting.name}, seed {seed}, {job.kinds}")
    return {"rows": [watch.row() for watch in watches]}


def _fit(
    models: Sequence[MLP], sets: Sequence[ImageData], setting: Setting, seeds: Sequence[int],
    look: Callable[[slice, int], None],
) -> Tensor:  # fmt: skip
    """All at once, on the images of the first set and the labels of each."""
    return fit_many(
        models, sets[0], seeds=seeds, lrs=setting.lr, optimizer=setting.optimizer,
        labels=torch.stack([data.labels for data in sets]), schedule="constant",
        epochs=setting.epochs, batch_size=setting.batch, on_epoch=look,
    )  # fmt: skip


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
        found = {
            "train_accuracy": self.accuracies[-1],
            "validation_loss": loss, "validation_accuracy": accuracy,
        }  # fmt: skip
        if self.setting.name in WITH_NOISE and self.kind in SHARES:
            for name, factor in SEARCHES.items():
                found[name] = critical_share(
                    self.model, self.data, self._searched, factor, self._noise
                )
        for name, value in found.items():
            self.seen[name].append(value)

    def row(self) -> study.Row:
        """Once it is trained: the only time that the test split is read."""
        setting, data = self.setting, self.data
        row: study.Row = {
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
            highest = of_constant(self._train[1], setting.happy)
            for name, curve, high in zip(
                ("loss", "error"), (self.losses, errors), highest, strict=True
            ):
                numbers, row["curves"][f"{name}_left"] = fall(curve, high)
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


def critical_share(
    model: MLP, data: ImageData, indices: Tensor, factor: float, noise: torch.Generator
) -> float:
    """The share of the images for which a search finds a critical sample, 0 to 1.

    `factor` multiplies the three constants. Source: Arpit et al. 2017, algorithm 1; as in the
    authors' code (100 steps at most), the gradient is that of the loss, taken anew at each point.
    """
    radius = factor * RADIUS
    greys = data.images[indices].float()
    moved = greys
    with torch.enable_grad():  # looked at in the midst of `fit_many`, which has it off
        predicted = model(data.normalise(greys)).argmax(1)
        found = torch.zeros_like(predicted, dtype=torch.bool)
        for _ in range(SEARCH_STEPS):
            moved = moved.detach().requires_grad_()
            loss = model.loss(model(data.normalise(moved)), predicted)
            (grad_moved,) = torch.autograd.grad(loss, moved)
            random = torch.randn(greys.shape, generator=noise)
            moved = moved.detach() + factor * (STEP * grad_moved.sign() + NOISE * random)
            moved = greys + (moved - greys).clamp(-radius, radius)
            found |= model(data.normalise(moved)).argmax(1) != predicted
    return found.double().mean().item()


# --- The shape of a fall ------------------------------------------------------------------------


def of_constant(labels: Tensor, squared: bool) -> tuple[float, float]:
    """The loss, squared or cross-entropy, and the share of errors of the best constant output.

    It knows the shares p_k of the classes: 1 − Σ p_k² or −Σ p_k ln p_k, and 1 − max p_k.
    """
    shares = torch.bincount(labels).double() / len(labels)
    loss = 1 - (shares**2).sum() if squared else -torch.xlogy(shares, shares).sum()
    return loss.item(), 1 - shares.max().item()


def fall(curve: Sequence[float], highest: float) -> tuple[dict[str, float], list[float]]:
    """How a curve (epochs + 1,) comes down from its first value to its last, as numbers by name.

    start and end: the epochs when 10 and 90 % of the fall are done; share: of the whole run from
    start to end; first: of the time up to 90 %, that of the first 10 %; line and sigmoid: R² of
    these up to 90 %. And what is left of the fall, at LEFT times evenly from 0 to the end.

    What is above `highest` counts as `highest`. Raises ValueError if the curve does not come to lie
    below that.
    """
    values = np.minimum(np.asarray(curve, dtype=float), highest)
    if not values[-1] < highest:
        raise ValueError(f"the curve ends at {curve[-1]}, not below {highest}")
    left = (values - values[-1]) / (highest - values[-1])
    start, end = _reached(left, 0.9), _reached(left, 0.1)

    def read(points: int) -> np.ndarray:
        return np.interp(np.linspace(0, end, points), np.arange(len(left)), left)

    line, sigmoid = _fits(read(101))
    numbers = {
        "start": start, "end": end, "share": (end - start) / (len(left) - 1),
        "first": start / end, "line": line, "sigmoid": sigmoid,
    }  # fmt: skip
    return numbers, read(LEFT).tolist()


def _reached(left: np.ndarray, level: float) -> float:
    """When the curve first comes down to the level, linear between the epochs."""
    k = int(np.argmax(left <= level))
    if k == 0:
        return 0.0
    return float(k - 1 + (left[k - 1] - level) / (left[k - 1] - left[k]))


def _fits(left: np.ndarray) -> tuple[float, float]:
    """R² of a line a + b t and of a sigmoid 1 / (1 + exp((t − m) / s)), at times even in 0 to 1."""
    from scipy.optimize import curve_fit

    t = np.linspace(0, 1, len(left))

    def sigmoid(t: np.ndarray, m: float, s: float) -> np.ndarray:
        return 1 / (1 + np.exp((t - m) / s))

    (m, s), _ = curve_fit(sigmoid, t, left, p0=(0.5, 0.1), bounds=([-5, 0.01], [5, 10]))
    fitted = np.polyval(np.polyfit(t, left, 1), t), sigmoid(t, m, s)
    total = ((left - left.mean()) ** 2).sum()
    line, curve = (float(1 - ((left - values) ** 2).sum() / total) for values in fitted)
    return line, curve


# --- Many starts --------------------------------------------------------------------------------


def start(job: Job) -> study.Row:
    """One data set from many starts: how the examples differ in being learnt.

    "half" is of a start's first epoch in which half are right, or its last if there is none.
    """
    setting, (kind,) = job.setting, job.kinds
    data = made(_data(job.options), kind, setting.n, job.seed)
    count = 5 if job.options.smoke else STARTS
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

    _fit(models, [data] * count, setting, seeds, look)
    row: study.Row = {
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


def _of(rows: Sequence[study.Row], what: str) -> list[float]:
    """A number of each seed: shares of examples in percent; of a fall, and epochs, as they are."""
    scale = 1 if what.startswith(("loss", "error", "peak")) else 100
    return [scale * row[what] for row in rows]


def _more(one: Sequence[study.Row], other: Sequence[study.Row], what: str) -> list[float]:
    return differences(_of(one, what), _of(other, what))


def _times_binomial(rows: Sequence[study.Row], moment: str) -> list[float]:
    return [row[f"{moment}_spread"] / row[f"{moment}_binomial"] for row in rows]


def _memorised(by: By) -> list[Claim]:
    """Claim 1: the same training accuracy, and chance on what was not trained on."""
    claims = []
    for name in MEMORISING:
        lost = _more(by[name, "random labels"], by[name, "true"], "train_accuracy")
        what = (
            f"{name}: training accuracy with random labels less that with true ones, in points: "
            f"−{SAME:g} or more (our bar)"
        )
        claims.append(between(what, "the same (3Blue1Brown)", lost, low=-SAME))
    what = "1×512, n = 5,000, random labels: training accuracy, %, the published or more"
    reached = _of(by["1×512, n = 5,000", "random labels"], "train_accuracy")
    claims.append(at_least(what, PUBLISHED_TRAIN, reached))
    # The networks of a seed share labels, and so their luck: their mean is one value.
    each = [_of(by[name, "random labels"], "test_accuracy") for name in MEMORISING]
    means = [statistics.fmean(of_seed) for of_seed in zip(*each, strict=True)]
    what = "random labels, mean of the networks by Adam: test accuracy, %, from 9 to 11 (our bar)"
    return [*claims, between(what, f"{PUBLISHED_TEST}", means, low=9, high=11)]


def _fallen(by: By) -> list[Claim]:
    """Claim 2, of the loss: a fiddling start and a drop with true labels, a line with random."""
    claims = []
    for name in FALLING:
        true, random = (by[name, kind] for kind in EXTREMES)
        what = f"{name}, true labels: share of the time up to 90 % before 10 %, more than a line's"
        claims.append(between(what, "fiddles around", _of(true, "loss_first"), low=1 / 9))
        what = f"{name}, random labels: R² of a line up to 90 %, {LINEAR:g} or more (our bar)"
        claims.append(between(what, "almost linearly", _of(random, "loss_line"), low=LINEAR))
        what = f"{name}: R² of a line, higher with random labels than with true ones"
        claims.append(between(what, "almost linearly", _more(random, true, "loss_line"), low=0))
        what = (
            f"{name}, random labels: share of the time up to 90 % before 10 %, over half (our bar)"
        )
        claims.append(between(what, "converges quickly", _of(random, "loss_first"), low=0.5))
        slower = [
            (long["loss_end"] - long["loss_start"]) / (short["loss_end"] - short["loss_start"])
            for short, long in zip(true, random, strict=True)
        ]
        what = f"{name}: from 10 to 90 %, times as many epochs with random labels as with true"
        claims.append(between(what, "slowly", slower, low=1))
    return claims


def _peaked(by: By) -> list[Claim]:
    """Claim 2, with noise: of the four shares the one that speaks most against it."""
    claims = []
    for name in WITH_NOISE:
        lost, reached, risen = {}, {}, {}
        for kind in NOISY:
            rows = by[name, kind]
            lost[kind] = differences(_of(rows, "test_accuracy_at_peak"), _of(rows, "test_accuracy"))
            reached[kind] = _of(rows, "train_accuracy_at_peak")
            risen[kind] = differences(_of(rows, "critical"), _of(rows, "critical_at_peak"))
        least, slow = (min(of, key=lambda kind: statistics.fmean(of[kind])) for of in (lost, risen))
        most = max(reached, key=lambda kind: statistics.fmean(reached[kind]))
        every = f"{name}, 20 to 80 % noise"
        what = (
            f"{every}: test accuracy at the peak of validation's less the last, at {least}, points"
        )
        claims.append(between(what, "falls", lost[least], low=0))
        what = f"{every}: training accuracy at the peak, at {most}, %, below {HIGH:g} (our bar)"
        claims.append(between(what, "not yet high", reached[most], high=HIGH))
        what = f"{every}: critical samples at the end less those at the peak, at {slow}, points"
        claims.append(between(what, "rises", risen[slow], low=0))
        what = f"{name}: critical samples at the end, more with 80 % noise than with 20 %, points"
        more = _more(by[name, "80 % noise"], by[name, "20 % noise"], "critical")
        claims.append(between(what, "higher", more, low=0))
    return claims


def _alike(by: By) -> list[Claim]:
    """True labels have easy and hard examples, random ones are all alike."""
    claims = []
    for name, moment, when in (
        ("16-16 ReLU", "one", "after one epoch"),
        ("16-16 ReLU", "half", "when half are right"),
        ("happy", "half", "when half are right"),
    ):
        true, random, gaussian = (
            _times_binomial(by[name, kind], moment) for kind in (*EXTREMES, "Gaussian")
        )
        what = f"{name}, {when}: spread of the examples as a multiple of a binomial's"
        more = differences(true, random)
        claims += [
            between(f"{what}: more with true labels than with random", "much more variable",
                    more, low=0),
            between(f"{what}, random labels: more than 1", "not quite alike", random, low=1),
            between(f"{what}, Gaussian: {ALIKE:g} at most (our bar)", "alike", gaussian,
                    high=ALIKE),
        ]  # fmt: skip
    return claims


def _told(rows: Sequence[study.Row], columns: Mapping[str, str]) -> study.Row:
    """The cells of a table, by heading; `columns` says which number of the rows each tells."""
    return {heading: spread(_of(rows, what)) for heading, what in columns.items()}


def _tables(by: By, by_start: By) -> dict[str, list[study.Row]]:
    reached: list[study.Row] = []
    fallen: list[study.Row] = []
    fall_columns = {
        "10 % after epochs": "loss_start", "90 % after": "loss_end",
        "first 10 %, share of the time": "loss_first", "R² of a line": "loss_line",
        "of a sigmoid": "loss_sigmoid", "errors: the share": "error_first",
        "of a line": "error_line",
    }  # fmt: skip
    for name in (setting.name for setting in SETTINGS):
        true, random = (by[name, kind] for kind in EXTREMES)
        first = true[0]
        reached.append(
            {
                "network": name, "weights": f"{first['parameters']:,}", "images": f"{first['n']:,}",
                "epochs": f"{first['epochs']:,}", "rate": f"{first['lr']:g}",
                **_told(true, {"training, true labels, %": "train_accuracy"}),
                **_told(random, {"random": "train_accuracy"}),
                "less, points": spread(_more(random, true, "train_accuracy"), "+"),
                **_told(true, {"test, true labels, %": "test_accuracy"}),
                **_told(random, {"random, %": "test_accuracy"}),
            }
        )  # fmt: skip
        fallen += [
            {"network": name, "labels": kind} | _told(by[name, kind], fall_columns)
            for kind in EXTREMES
        ]
    tables = {
        f"Training and test accuracy, {len(true)} seeds": reached,
        "How the training loss falls (a line has 0.11 of the time before 10 %)": fallen,
    }
    columns = {
        "training": "train_accuracy", "at the peak": "train_accuracy_at_peak",
        "peak after epochs": "peak_epoch", "test at the peak": "test_accuracy_at_peak",
        "at the end": "test_accuracy",
    }  # fmt: skip
    for name in WITH_NOISE:
        tables[f"{name}: all kinds of data, accuracy, %"] = [
            {
                "data": kind,
                "right by true labels": f"{100 - 90 * SHARES[kind]:.0f}" if kind in SHARES else "–",
                **_told(by[name, kind], columns),
            }
            for kind in KINDS
        ]
    columns = {
        "at the peak": "critical_at_peak", "at the end": "critical",
        "±3: at the peak": "critical_10_at_peak", "±3: at the end": "critical_10",
    }  # fmt: skip
    tables["Critical validation images, %, in a box of ±0.3 grey values, and of ±3"] = [
        {"network": name, "data": kind} | _told(by[name, kind], columns)
        for name in WITH_NOISE
        for kind in SHARES
    ]
    columns = {
        "after an epoch: mean": "one_mean", "standard deviation": "one_spread",
        "of a binomial": "one_binomial", "when half are right: mean": "half_mean",
        "deviation": "half_spread", "binomial": "half_binomial",
    }  # fmt: skip
    tables["How the examples differ: percent of the starts with which one is right"] = [
        {
            "network": name, "data": kind, "starts": rows[0]["starts"],
            **_told(rows, columns), "times": spread(_times_binomial(rows, "half")),
        }
        for (name, kind), rows in by_start.items()
    ]  # fmt: skip
    return tables


def _picture(by: By) -> figures.Figure:
    """A row for each network with noise, then how the loss falls, and who memorises."""
    parts = []
    for name in WITH_NOISE:
        grid = by[name, "true"][0]["curves"]["grid"]
        for title, what in (
            ("training accuracy", "train_accuracy"),
            ("validation accuracy", "validation_accuracy"),
            (f"critical images, ±{RADIUS:g} of 255 greys", "critical"),
        ):
            lines = {kind: _curve(by[name, kind], what, grid, 100) for kind in DRAWN}
            parts.append(figures.Panel(f"{name}: {title}", "epochs", f"{title}, %", lines, "x"))
    across = "share of the time until 90 % are done"
    times = [k / (LEFT - 1) for k in range(LEFT)]
    for name in FALLING:
        lines = {kind: _curve(by[name, kind], "loss_left", times) for kind in EXTREMES}
        lines["a line"] = [(0, 1, 0), (1, 0.1, 0)]
        title = f"{name}: the training loss falls"
        parts.append(figures.Panel(title, across, "fall still to come", lines))
    across, up = "network; images if not 1,000", "training accuracy, %"
    names = {name: name.replace(", n = ", "\n").replace(" ", "\n") for name in MEMORISING}
    lines = {
        kind: [
            figures.point(shown, _of(by[name, kind], "train_accuracy"))
            for name, shown in names.items()
        ]
        for kind in EXTREMES
    }
    parts.append(figures.Panel("Memorised at the end", across, up, lines))
    dataset = by["happy", "true"][0]["dataset"]
    return figures.side_by_side(
        parts,
        f"True, noisy and random labels, {dataset}: mean ± standard deviation over seeds\n"
        "happy: 784-16-16-10, sigmoid and squared error; the others: ReLU and cross-entropy, "
        "1×512 is 784-512-10",
    )


def _curve(
    rows: Sequence[study.Row], what: str, places: Sequence[float], scale: float = 1
) -> list[tuple[float | str, float, float]]:
    """A curve of each seed, drawn over the places."""
    values = zip(*(row["curves"][what] for row in rows), strict=True)
    return [
        figures.point(place, [scale * value for value in of_place])
        for place, of_place in zip(places, values, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
