"""How sure are networks of noise, and of what else is no digit? Can they draw one?

    python experiments/noise_confidence.py              # MNIST, 4 networks × 10 seeds
    python experiments/noise_confidence.py --smoke      # the embedded digits, seconds

3Blue1Brown 2017, Gradient descent, how neural networks learn, of 784-16-16-10 (sigmoids, squared
error): shown a random image it does not feel uncertain, "maybe not really activating any" output
"or activating them all evenly", but "confidently gives you some nonsense answer, as if it feels as
sure" as of a digit; it "can recognize digits pretty well" and "has no idea how to draw them".

- `happy, as in the source`: this network by the source's code (3b1b/manim, nn/network.py), which is
  Nielsen's (2015, Neural networks and deep learning, chapter 1). Weights and biases start from the
  normal distribution of deviation 1; inputs are 0 to 1; 30 epochs of plain SGD in batches of 10,
  rate 3 for half the squared error, 1.5 for ours;
- `happy, as in train.py`: the same network as train.py trains it: small weights at first,
  normalised inputs, Adam with weight decay;
- `softmax MLP`: 784-256-256-256-10 of Hendrycks & Gimpel 2017, A baseline for detecting
  misclassified and out-of-distribution examples in neural networks, trained as their code has it;
- `CNN`: two stages of convolution and pooling, as train.py trains it.

They differ in their training as much as in their structure: nothing is claimed about the latter.

The confidence of a softmax is its largest probability. Sigmoids have two: the largest output, low
if none is active, and the largest share, output divided by the sum of all, low if all are alike.
AUROC: the chance that a test digit gets more confidence than an image of the other kind, equal
counting ½. The source shows uniform noise, and so it is by this that its words are judged: "sure"
is a mean confidence of at least 50 %, "as sure" at most 10 points less than of test digits. These
bars are our own, set after a training of each, of a seed that is not reported, and noise of the
same kind. All sets are made of test digits, or are files of which no network has seen anything: no
network is trained or chosen on images that are no digits. EMNIST's letters (562 MB) are left out.

**Published** are two trainings of one softmax MLP: that which the authors' code printed, beside
which it is kept (github.com/hendrycks/error-detection, Vision/MNIST_Softmax_Stats.ipynb), and that
of the paper's table. The former is held against ours: is it where 95 % of further trainings of ours
would be? They train on 60,000 images, we on 55,000, since the validation split is kept apart. Their
Gaussian noise is standard normal for inputs of 0 to 1, not cut off there; ours is shown so, and as
a picture, cut off at black and white. Their notMNIST is read from a file that is commonly made with
pixels from −½ to ½, not 0 to 1; we have not seen it, and show both. Their Omniglot is of other
alphabets, prepared otherwise: its figures are in the table alone.

**Drawing.** From a black image, 500 steps up the slope of the log of the output that is wanted,
one for each of the ten digits. A pixel that is black or white already is left out where the slope
points beyond. Where white is 1, the first step has the length 0.1, and they fall to 0; a digit of
MNIST has about 9. Of the network's own confidence this is a lower bound of the worst case. "No
idea" is taken as chance: of the drawings, 10 % are recognised. The judge is no network: the
training image with which a drawing's pixels correlate most says which digit it is. That a drawing
is recognised does not say that it looks drawn: see the picture, and the correlation in the table.
(The judge was changed after a first run, in which a CNN recognised 35 and 44 % of the drawings of
the happy networks, and other networks of their own kind 75 % and more.)
"""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop import figures
from nn_backprop.data import ImageData, channels_last, load, uniform_noise, unknown_sets
from nn_backprop.engines import autograd
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, differences, one_of, spread
from nn_backprop.studies.rejection import told_apart
from nn_backprop.training import evaluate, fit, fit_many, make_optimizer, make_schedule
from nn_backprop.training import steps_per_epoch as steps_of

DIGITS, UNCUT, UNIFORM = "test digits", "Gaussian noise, uncut", "uniform noise"
MADE = ("Gaussian noise", UNIFORM, "random pixels", "Gaussian digits", "half digits")
FILES = ("Omniglot 2", "notMNIST", "Fashion-MNIST", "KMNIST")
CENTRED = "notMNIST, −½ to ½"
DRAWN_WITH = 10_000  # the seed of what is made, for all networks the same

# In percent; the output of their code, and the paper's table 2.
PUBLISHED = {
    "confidence": {DIGITS: 99.53, UNCUT: 91.74, UNIFORM: 88.12, CENTRED: 93.84},
    "auroc": {UNCUT: 88.29, UNIFORM: 97.89, CENTRED: 82.87},
}
PAPER = {
    "confidence": {UNCUT: 91, UNIFORM: 83, CENTRED: 92, "Omniglot 2": 86},
    "auroc": {UNCUT: 90, UNIFORM: 99, CENTRED: 85, "Omniglot 2": 96},
}
SURE, AS_SURE = 50.0, 10.0  # our own bars, in percent and points
CHANCE = 10.0
STEPS, SMOKE_STEPS, LENGTH = 500, 100, 0.1
COMPARED = 1_000  # test digits, and images of noise, that are shown to the judge of drawings


class Baseline(MLP):
    """784-256-256-256-10 with the tanh form of GELU.

    The weights of a unit start as a random direction, of a length that keeps the variance.
    """

    def __init__(self) -> None:
        super().__init__((784, 256, 256, 256, 10))
        with torch.no_grad():
            for layer, square in zip(self.layers, (1.425, 0.85, 0.85, 1.425), strict=True):
                weight, bias = layer.parameters()
                weight.copy_(F.normalize(torch.randn_like(weight)) / square**0.5)
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(1)
        for layer in self.layers[:-1]:
            a = F.gelu(layer(a), approximate="tanh")
        return self.layers[-1](a)


class Kind(NamedTuple):
    """A network and how it is trained."""

    make: Callable[[], nn.Module]
    lr: float
    batch_size: int
    epochs: tuple[int, int]  # of a full run, of a smoke test
    as_they_are: bool  # inputs from 0 to 1; else normalised


SOURCE, HERE = HAPPY = ("happy, as in the source", "happy, as in train.py")
BASELINE, FILTERS = "softmax MLP", "CNN"
KINDS = {
    SOURCE: Kind(happy, 1.5, 10, (30, 20), True),
    HERE: Kind(happy, 1e-2, 32, (40, 60), False),
    BASELINE: Kind(Baseline, 1e-3, 128, (30, 6), True),
    FILTERS: Kind(CNN, 6e-3, 128, (10, 5), False),
}


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Confidence on noise and on other images that are no digits; digits drawn by networks."""

    seeds: int = 10
    """Number of seeds, from 0; at least 2."""


class Job(NamedTuple):
    """One training."""

    name: str  # of the kind
    seed: int
    sets: tuple[str, ...]  # what it is shown beside digits and noise that is not cut off
    options: Options
    folder: Path  # for its drawings


Rows = Mapping[str, Sequence[study.Row]]  # by kind, in the order of the seeds


def conduct(under_way: study.Study, options: Options) -> None:
    few = _data(options).images[:2]
    names = MADE if options.smoke else (*MADE, *FILES)
    sets = tuple(unknown_sets(names, few, DRAWN_WITH, options.data_root))  # says what is missing
    jobs = [
        Job(name, seed, sets, options, under_way.folder)
        for name in (BASELINE, FILTERS, SOURCE, HERE)  # the longest first
        for seed in range(options.seeds)
    ]
    rows = under_way.carry_out(
        train, jobs, lambda row: {f"uniform noise/{row['network']}": row["confidence"][UNIFORM]}
    )
    by = {name: [row for row in rows if row["network"] == name] for name in KINDS}
    under_way.finish(_tables(by, options), _claims(by), _picture(by, under_way.folder, options))


def train(job: Job) -> study.Row:
    """One network, trained, tested, shown what is no digit, and asked to draw; in percent."""
    data = data_for(job.name, job.options)
    began = time.perf_counter()
    model = trained(job, data)
    seconds = time.perf_counter() - began
    drawn = draw(model, data, SMOKE_STEPS if job.options.smoke else STEPS)
    torch.save(drawn, _file(job.folder, job.name, job.seed))
    digit, correlation = nearest(drawn, job.options)
    wanted = np.arange(10)

    row: study.Row = {
        "network": job.name,
        "seed": job.seed,
        "dataset": data.name,
        "test_accuracy": 100 * evaluate(model, data, data.test).accuracy,
        "drawn_confidence": (100 * answers(model, data, drawn)[wanted, wanted]).tolist(),
        "recognised": 100 * float((digit.numpy() == wanted).mean()),
        "correlation": correlation.mean().item(),
        "train_seconds": seconds,
    }
    sets = sets_for(job.sets, job.options)
    given = {name: answers(model, data, images) for name, images in sets.items()}
    sure = {"confidence": {name: p.max(1) for name, p in given.items()}}
    if job.name in HAPPY:
        sure["share"] = {name: p.max(1) / p.sum(1) for name, p in given.items()}
    for what, values in sure.items():
        digits = values[DIGITS]
        others = {name: each for name, each in values.items() if name != DIGITS}
        row[what] = {name: 100 * float(each.mean()) for name, each in values.items()}
        row[f"{what} auroc"] = {name: 100 * told_apart(digits, of) for name, of in others.items()}
        median = np.median(digits)
        row[f"{what} as sure"] = {
            name: 100 * float((each >= median).mean()) for name, each in others.items()
        }
    return row


def trained(job: Job, data: ImageData) -> nn.Module:
    """The network of the job, after its training."""
    kind, seed = KINDS[job.name], job.seed
    epochs = kind.epochs[job.options.smoke]
    steps = steps_of(len(data.train), kind.batch_size)
    torch.manual_seed(seed)
    model = kind.make()
    if job.name in HAPPY:
        how: dict[str, Any] = {"weight_decays": 0.03}
        if job.name == SOURCE:
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            how = {"optimizer": "sgd", "schedule": "constant"}
        losses = fit_many(
            [model], data, seeds=[seed], lrs=kind.lr, epochs=epochs, batch_size=kind.batch_size,
            **how,
        )  # fmt: skip
        if not losses.isfinite().all():
            raise study.StudyError(f"a training diverged, {job}")
        return model
    if isinstance(model, Baseline):
        # Their 1e−5 · ½‖weight‖² is part of the loss, so this is not AdamW. It matters for noise:
        # where there is no other gradient, Adam makes full steps of it, and the weights of pixels
        # that are always black do not stay as they started, but go to 0.
        *hidden, weight, bias = model.parameters()
        decayed: Any = {"params": hidden[::2], "weight_decay": 1e-5}
        others: Any = {"params": [*hidden[1::2], weight, bias]}
        optimizer: torch.optim.Optimizer = torch.optim.Adam([decayed, others], kind.lr, fused=True)
        schedule: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * 2 // 3 * steps])
    else:
        optimizer = make_optimizer("adam", model.parameters(), kind.lr, 0.1)
        schedule = make_schedule("one-cycle", optimizer, kind.lr, epochs * steps)
    fit(model, autograd, optimizer, schedule, data,
        epochs=epochs, batch_size=kind.batch_size, seed=seed)  # fmt: skip
    return model


def data_for(name: str, options: Options) -> ImageData:
    """The data as the network of this kind takes its inputs."""
    data = _data(options)
    return replace(data, mean=0.0, std=1.0) if KINDS[name].as_they_are else data


@functools.cache
def sets_for(names: tuple[str, ...], options: Options) -> dict[str, Tensor]:
    """The test digits, noise that is not cut off (float32, white is 255), and the named sets."""
    data = _data(options)
    digits = data.images[data.test]
    generator = torch.Generator().manual_seed(DRAWN_WITH)
    sets = {DIGITS: digits, UNCUT: 255 * torch.randn(digits.shape, generator=generator)}
    sets |= unknown_sets(names, digits, DRAWN_WITH, options.data_root, lambda line: None)
    if "notMNIST" in sets:
        sets[CENTRED] = sets["notMNIST"] - 127.5
    return sets


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


def _file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"drawn-{list(KINDS).index(name)}-{seed}.pt"


# --- What is measured ---------------------------------------------------------------------------


@torch.no_grad()
def answers(model: nn.Module, data: ImageData, images: Tensor) -> np.ndarray:
    """Float64 (n, K), the sigmoids' outputs or softmax, of images (n, 1, H, W), white is 255."""
    parts = [model(channels_last(data.normalise(part))) for part in images.split(1000)]
    given = torch.cat(parts).double()  # before the softmax, lest many be 1
    return (given.softmax(1) if model.loss_name == "cross_entropy" else given).numpy()


def draw(model: nn.Module, data: ImageData, steps: int) -> Tensor:
    """Ten images, uint8 (10, 1, 28, 28): to the network, ever more of the digits 0 to 9.

    x ← clip(x + η_t s / ‖s‖) in float64, from x = 0, where white is 1, with s = ∂ log p_k / ∂x for
    digit k, but 0 where x is 0 and s < 0 or x is 1 and s > 0; p are the outputs, after softmax if
    they are logits, and η_t = LENGTH · (1 − t/steps), t = 0, 1, …  The slope is divided by its
    length because it vanishes as p_k nears 1; if it is 0, x stays.
    """
    model = copy.deepcopy(model).double()
    wanted = torch.arange(10)
    x = torch.zeros(10, 1, 28, 28, dtype=torch.float64)
    for t in range(steps):
        x.requires_grad_()
        given = model(data.normalise(x, torch.float64))
        log_p = given.log_softmax(1) if model.loss_name == "cross_entropy" else given.log()
        (slope,) = torch.autograd.grad(log_p[wanted, wanted].sum(), x)
        x = x.detach()
        free = torch.where(slope < 0, x > 0, x < 255)
        step = F.normalize((slope * free).flatten(1)).view_as(x)
        x = (x + 255 * LENGTH * (1 - t / steps) * step).clamp_(0, 255)
    return x.round().to(torch.uint8)


def nearest(images: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The label of the training image that correlates most with each of (n, 1, H, W): (n,), (n,).

    Of their pixels, so that neither brightness nor contrast matter; then the correlation itself.
    """
    data = _data(options)
    correlation, place = (_centred(images) @ _learnt(options).T).max(1)
    return data.labels[data.train[place]], correlation


@functools.cache
def _learnt(options: Options) -> Tensor:
    data = _data(options)
    return _centred(data.images[data.train])


def _centred(images: Tensor) -> Tensor:
    """Each image's pixels less their mean, of length 1; 0 if it has no contrast: (n, HW)."""
    pixels = images.flatten(1).float()
    return F.normalize(pixels - pixels.mean(1, keepdim=True))


# --- What the rows come to ----------------------------------------------------------------------


def _claims(by: Rows) -> list[Claim]:
    """Of uniform noise and of drawings, by network; published figures, of sets that are there."""
    claims = []
    for name, rows in by.items():
        its = name in HAPPY  # whose words are judged
        noise = [row["confidence"][UNIFORM] for row in rows]
        claim = f"{name}: mean confidence on {UNIFORM}"
        bar = f"%: {SURE:g} or more (our bar)"
        claims.append(between(f"{claim}, {bar}", "confidently" if its else None, noise, low=SURE))
        if its:
            shares = [row["share"][UNIFORM] for row in rows]
            claim_of_share = f"{name}: mean share of the largest output on {UNIFORM}, {bar}"
            claims.append(between(claim_of_share, "not evenly", shares, low=SURE))
        less = differences(noise, [row["confidence"][DIGITS] for row in rows])
        claim += f" less that on test digits, points: −{AS_SURE:g} or more (our bar)"
        claims.append(between(claim, "as sure" if its else None, less, low=-AS_SURE))
    for what, key in (("mean confidence on", "confidence"), ("AUROC against", "auroc")):
        for name, figure in PUBLISHED[key].items():
            found = _of(by[BASELINE], "confidence auroc" if key == "auroc" else key, name)
            if found:
                claim = f"{BASELINE}: {what} {name}, %: the published is like one more of ours"
                claims.append(one_of(claim, figure, found))
    for name, rows in by.items():
        claim = f"{name}: recognised of its drawings, %: at most {CHANCE:g}, chance"
        said = "no idea how to draw" if name in HAPPY else None
        claims.append(between(claim, said, [row["recognised"] for row in rows], high=CHANCE))
    return claims


def _of(rows: Sequence[study.Row], what: str, name: str) -> list[float]:
    """What was measured of a set, of each seed; nothing if the set was not there."""
    return [row[what][name] for row in rows if name in row[what]]


def _tables(by: Rows, options: Options) -> dict[str, list[study.Row]]:
    first = by[BASELINE][0]

    def of_sets(key: str) -> list[study.Row]:
        """A row for each set: what every network's kinds of confidence come to."""
        return [
            {
                "images": name,
                **{
                    network if what == "confidence" else f"{network}: share":
                        spread(_of(rows, f"{what}{key}", name))
                    for network, rows in by.items()
                    for what in ("confidence", "share")
                    if what in rows[0]
                },
                **{
                    title: f"{known[name]:g}" if name in known else "–"
                    for title, known in _published(key).items()
                },
            }
            for name in first[f"confidence{key}"]
        ]  # fmt: skip

    drawings: list[study.Row] = [
        {
            "network": name,
            "test accuracy, %": spread([row["test_accuracy"] for row in rows]),
            "confidence in its drawings, %": spread(
                [statistics.fmean(row["drawn_confidence"]) for row in rows]
            ),
            "in the worst of ten, %": spread([min(row["drawn_confidence"]) for row in rows]),
            "recognised, %": spread([row["recognised"] for row in rows]),
            "correlation": spread([row["correlation"] for row in rows]),
            "training, s": f"{statistics.median(row['train_seconds'] for row in rows):.1f}",
        }
        for name, rows in by.items()
    ]
    data = _data(options)
    tested = data.test[:COMPARED]
    digit, digits = nearest(data.images[tested], options)
    right = (digit == data.labels[tested]).double().mean().item()
    _, noise = nearest(uniform_noise(data.images[tested], DRAWN_WITH), options)
    seeds = f"{first['dataset']}, {len(by[BASELINE])} seeds"
    return {
        f"Mean confidence, %, {seeds}; sigmoids: largest output, and its share of the sum of all":
            of_sets(""),
        f"AUROC of the confidence, test digits against other images, %, {seeds}": of_sets(" auroc"),
        f"Images at least as sure as the median test digit, %, {seeds}": of_sets(" as sure"),
        "Ten digits drawn by each network; recognised by the training image that correlates most: "
        f"of test digits {100 * right:.1f} %, correlation {digits.mean():.3f}; of uniform noise "
        f"{noise.mean():.3f}": drawings,
    }  # fmt: skip


def _published(key: str) -> dict[str, Mapping[str, float]]:
    what = {"": "confidence", " auroc": "auroc"}.get(key)
    if what is None:
        return {}
    return {f"published, {BASELINE}": PUBLISHED[what], "in the paper": PAPER[what]}


def _picture(by: Rows, folder: Path, options: Options) -> figures.Figure:
    first = by[BASELINE][0]

    def lines(key: str) -> dict[str, list[figures.Point]]:
        names = list(first[f"confidence{key}"])
        found: dict[str, list[figures.Point]] = {
            network: [figures.point(name, _of(rows, f"confidence{key}", name)) for name in names]
            for network, rows in by.items()
        }
        title, known = next(iter(_published(key).items()))
        found[title] = [(name, known[name], 0.0) for name in names if name in known]
        return found

    data = _data(options)
    labels = data.labels[data.test]
    real = torch.stack([data.images[data.test[labels == digit][0]] for digit in range(10)])
    drawn = [torch.load(_file(folder, name, by[name][0]["seed"]), weights_only=True) for name in by]
    parts = [
        figures.Panel(
            "Confidence in the answer", "", "mean largest output or probability, %", lines(""),
            levels={"our bar for noise": SURE, "least of a softmax": 10},
        ),
        figures.Panel(
            "Digits against other images, by confidence", "", "AUROC, %", lines(" auroc"),
            levels={"chance": 50},
        ),
        figures.Panel(
            "Drawn, from the top: by happy, as in the source;\n"
            "as in train.py; by the softmax MLP; the CNN; people",
            image=_sheet(torch.stack([*map(stretched, drawn), real])[:, :, 0]),
        ),
    ]  # fmt: skip
    return figures.side_by_side(
        parts,
        f"Noise, other images that are no digits, and digits drawn, {first['dataset'].upper()}: "
        f"mean ± standard deviation over {len(by[BASELINE])} seeds; drawings of seed 0, inverted",
    )


def stretched(images: Tensor) -> Tensor:
    """uint8 images (n, 1, H, W), each made so bright that its brightest pixel is 255."""
    brightest = images.flatten(1).amax(1).clamp(min=1)
    return (images * (255 / brightest)[:, None, None, None]).round().to(torch.uint8)


def _sheet(images: Tensor) -> Tensor:
    """Images (rows, columns, H, W) side by side in one, a grey line around each."""
    framed = F.pad(images, (1, 1, 1, 1), value=64)
    rows, columns, H, W = framed.shape
    return framed.transpose(1, 2).reshape(rows * H, columns * W)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
