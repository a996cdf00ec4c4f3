"""How sure are networks of noise, and of what else is no digit? Can they draw one?

    python experiments/noise_confidence.py              # MNIST, 4 networks × 10 seeds
    python experiments/noise_confidence.py --smoke      # the embedded digits, seconds

3Blue1Brown 2017, Gradient descent, how neural networks learn, of 784-16-16-10 (sigmoids, squared
error): shown a random image it does not feel uncertain, "maybe not really activating any" output
"or activating them all evenly", but "confidently gives you some nonsense answer, as if it feels as
sure" as of a digit; it "can recognize digits pretty well" and "has no idea how to draw them".

- `happy, as in the source`: this network by the source's code, Nielsen's (2015, Neural networks and
  deep learning, chapter 1). Weights and biases start from the normal distribution of deviation 1;
  inputs are 0 to 1; plain SGD in batches of 10, rate 3 for half the squared error, 1.5 for ours;
- `happy, as in train.py`: the same network as train.py trains it: small weights at first,
  normalised inputs, Adam with weight decay;
- `softmax MLP`: 784-256-256-256-10 of Hendrycks & Gimpel 2017, A baseline for detecting
  misclassified and out-of-distribution examples in neural networks, trained as their code has it;
- `CNN`: two stages of convolution and pooling, as train.py trains it.

The confidence of a softmax is its largest probability. Sigmoids have two: the largest output, low
if none is active, and the largest share, output divided by the sum of all, low if all are alike.
Claims are about the first; the tables have both. AUROC: the chance that a test digit gets more
confidence than an image of the other kind.

The published figures are of one softmax MLP: what its code printed, beside which it is kept
(github.com/hendrycks/error-detection, Vision/MNIST_Softmax_Stats.ipynb). Their Gaussian noise is
standard normal for inputs of 0 to 1, not cut off there: uncut. That of a picture is, and is a set
of its own here. They train on 60,000 images, we on 55,000, for the validation split is kept apart.
Their Omniglot is of other alphabets, prepared otherwise, and not held against ours.

All sets are made of test digits, or files of which no network has seen anything: nothing is trained
or chosen on images that are no digits. EMNIST's letters (562 MB) are left out.

**Drawing.** From a black image, 500 steps up the slope of the log of the confidence in each of the
ten digits, brought back to 0 to 255 after each. Where white is 1, the first step has the length
0.1, the last 0, and a digit of MNIST about 9. What a network says of its own drawing is the worst
case of confidence. The drawing may be faint: stretched, so that its brightest pixel is white, it is
shown to the networks of the next seed, and compared with the training images of its digit. Likeness
is the correlation of the pixels with those of the most alike of these, on a scale where uniform
noise has 0 and test digits have 1. "No idea" is taken as: the CNN takes at most half of the
drawings for what they were to be; and they get at most half of the way from noise to digits.

These bars are our own, as those of the claims about noise: at least ½, and at most 0.1 less than of
test digits, for Gaussian or uniform noise, whichever a network is less sure of. Bars and steps were
set after a training of each network, of a seed that is not reported, by validation digits and noise
made from them. Test images are read when a training has ended.
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

from nn_backprop import figures, study
from nn_backprop.data import (
    ImageData,
    channels_last,
    load,
    uniform_noise,
    unknown_sets,
)
from nn_backprop.engines import autograd
from nn_backprop.evidence import Claim, between, differences, spread
from nn_backprop.models import CNN, MLP, happy
from nn_backprop.rejection import auroc, confidence
from nn_backprop.training import evaluate, fit, fit_many, make_optimizer, make_schedule
from nn_backprop.training import steps_per_epoch as steps_of

DIGITS, UNCUT = "test digits", "Gaussian noise, uncut"
NOISES = ("Gaussian noise", "uniform noise")
MADE = (*NOISES, "random pixels", "Gaussian digits", "half digits")
FILES = ("Omniglot 2", "notMNIST", "Fashion-MNIST", "KMNIST")
DRAWN_WITH = 10_000  # the seed of what is made, for all networks the same

PUBLISHED = {DIGITS: 0.995, UNCUT: 0.917, "uniform noise": 0.881, "notMNIST": 0.938}
# Of the same output; 93.7, there, is of CIFAR-10 in grey, which is not shown here.
PUBLISHED_AUROC = {UNCUT: 88.3, "uniform noise": 97.9, "notMNIST": 82.9}
# Our own bars.
NEAR, NEAR_DIGITS, NEAR_AUROC = 0.05, 0.005, 5.0
SURE, AS_SURE = 0.5, 0.1
RECOGNISED, ALIKE = 0.5, 0.5

STEPS, SMOKE_STEPS, LENGTH = 500, 100, 0.1
COMPARED = 1_000  # test digits and images of noise, for the two ends of the scale of likeness


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
    epochs: int
    smoke_epochs: int
    as_they_are: bool  # inputs from 0 to 1; else normalised


SOURCE, HERE, BASELINE, FILTERS = (
    "happy, as in the source",
    "happy, as in train.py",
    "softmax MLP",
    "CNN",
)
KINDS = {
    SOURCE: Kind(happy, 1.5, 10, 30, 20, True),
    HERE: Kind(happy, 1e-2, 32, 40, 60, False),
    BASELINE: Kind(Baseline, 1e-3, 128, 30, 6, True),
    FILTERS: Kind(CNN, 6e-3, 128, 10, 5, False),
}
HAPPY = (SOURCE, HERE)


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
    folder: Path  # for the network and its drawings


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
        train, jobs, lambda row: {f"uniform noise/{row['network']}": _of(row, NOISES[1])}
    )
    by = {name: [row for row in rows if row["network"] == name] for name in KINDS}
    ends = judge(by, under_way.folder, options)
    claims = _claims(by)
    if options.smoke:
        claims = [replace(claim, claim=f"{claim.claim} (smoke: not MNIST)") for claim in claims]
    under_way.finish(_tables(by, ends), claims, _picture(by, under_way.folder))


def train(job: Job) -> study.Row:
    """One network, trained, tested, shown what is no digit, and asked to draw."""
    data = data_for(job.name, job.options)
    began = time.perf_counter()
    model = trained(job, data)
    seconds = time.perf_counter() - began
    torch.save(model.state_dict(), _file(job.folder, "network", job.name, job.seed))
    drawn = draw(model, data, SMOKE_STEPS if job.options.smoke else STEPS)
    torch.save(drawn, _file(job.folder, "drawn", job.name, job.seed))
    sure = next(iter(confidences(job.name, outputs(model, data, drawn)).values()))

    shown = {
        name: confidences(job.name, outputs(model, data, images))
        for name, images in sets_for(job.sets, job.options).items()
    }
    means: dict[str, dict[str, float]] = {}
    apart: dict[str, dict[str, float]] = {}
    for kind, of_digits in shown[DIGITS].items():
        means[kind] = {name: float(values[kind].mean()) for name, values in shown.items()}
        apart[kind] = {
            name: 100 * told_apart(of_digits, values[kind])
            for name, values in shown.items()
            if name != DIGITS
        }
    return {
        "network": job.name,
        "seed": job.seed,
        "dataset": data.name,
        "test_accuracy": evaluate(model, data, data.test).accuracy,
        "confidence": means,
        "auroc": apart,
        "drawn_confidence": sure.tolist(),
        "train_seconds": seconds,
    }


def trained(job: Job, data: ImageData) -> nn.Module:
    """The network of the job, after its training."""
    kind, seed = KINDS[job.name], job.seed
    epochs = kind.smoke_epochs if job.options.smoke else kind.epochs
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
    uncut = 255 * torch.randn(digits.shape, generator=generator)
    unknown = unknown_sets(names, digits, DRAWN_WITH, options.data_root, lambda line: None)
    return {DIGITS: digits, UNCUT: uncut, **unknown}


# --- What is measured ---------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, data: ImageData, images: Tensor) -> np.ndarray:
    """What the network gives for images (n, 1, H, W), white is 255: float64 (n, K)."""
    parts = [model(channels_last(data.normalise(part))) for part in images.split(1000)]
    return torch.cat(parts).double().numpy()


def confidences(name: str, given: np.ndarray) -> dict[str, np.ndarray]:
    """The confidence (n,) in the first answer, from what a network gives (n, K); two of a happy."""
    if name not in HAPPY:
        return {"probability": confidence(given)}
    largest = given.max(1)
    return {"largest output": largest, "largest share": largest / given.sum(1)}


def told_apart(digits: np.ndarray, others: np.ndarray) -> float:
    """AUROC: the probability that a digit has more confidence than another image; equal is ½."""
    unknown = np.repeat([0, 1], [len(digits), len(others)])
    return auroc(np.concatenate([digits, others]), unknown)


def draw(model: nn.Module, data: ImageData, steps: int) -> Tensor:
    """Ten images, uint8 (10, 1, 28, 28): to the network, ever more of the digits 0 to 9.

    x ← clip(x + η_t s / ‖s‖) in float64, from x = 0, with s = ∂ log p_k / ∂x for digit k, where p
    are the outputs, after softmax if they are logits, and η_t = LENGTH · (1 − t/steps), t = 0, 1, …
    The slope is divided by its length because it vanishes as p_k nears 1; if it is 0, x stays.
    """
    model = copy.deepcopy(model).double()
    wanted = torch.arange(10)
    x = torch.zeros(10, 1, 28, 28, dtype=torch.float64)
    for t in range(steps):
        x.requires_grad_()
        given = model(data.normalise(x, torch.float64))
        log_p = given.log_softmax(1) if model.loss_name == "cross_entropy" else given.log()
        (slope,) = torch.autograd.grad(log_p[wanted, wanted].sum(), x)
        step = 255 * LENGTH * (1 - t / steps) * F.normalize(slope.flatten(1)).view_as(x)
        x = (x.detach() + step).clamp_(0, 255)
    return x.round().to(torch.uint8)


def stretched(images: Tensor) -> Tensor:
    """uint8 images (n, 1, H, W), each made so bright that its brightest pixel is 255."""
    brightest = images.flatten(1).amax(1).clamp(min=1)
    return (images * (255 / brightest)[:, None, None, None]).round().to(torch.uint8)


def likeness(images: Tensor, digits: Tensor, data: ImageData) -> Tensor:
    """Of each image (n, 1, H, W), how much it is like its digit, int64 (n,): −1 to 1, (n,).

    The correlation of its pixels with those of the training image of that digit for which it is
    largest. Neither brightness nor contrast matter; an image without contrast has 0.
    """

    def centred(some: Tensor) -> Tensor:
        pixels = some.flatten(1).float()
        return F.normalize(pixels - pixels.mean(1, keepdim=True))

    found = torch.zeros(len(images))
    labels = data.labels[data.train]
    for digit in digits.unique():
        of_digit = centred(data.images[data.train[labels == digit]])
        found[digits == digit] = (centred(images[digits == digit]) @ of_digit.T).amax(1)
    return found


def judge(by: Rows, folder: Path, options: Options) -> dict[str, float]:
    """Adds to each row what the networks of the next seed take its drawings for, and its likeness.

    `taken_by`: by kind of the judge, the share of the ten that is taken for the wanted digit.
    `likeness`: mean over the ten; `nearness`: the same where noise is 0 and test digits are 1.
    Returns the likeness of these two.
    """
    data, wanted = _data(options), torch.arange(10)
    tested = data.test[:COMPARED]
    digits = likeness(data.images[tested], data.labels[tested], data).mean().item()
    noise = uniform_noise(data.images[tested], DRAWN_WITH)
    of_noise = likeness(noise, torch.arange(len(noise)) % 10, data).mean().item()
    for name, rows in by.items():
        for row in rows:
            drawn = stretched(_read(_file(folder, "drawn", name, row["seed"])))
            after = (row["seed"] + 1) % len(rows)
            row["taken_by"] = {}
            for other in KINDS:
                model = KINDS[other].make()
                model.load_state_dict(_read(_file(folder, "network", other, after)))
                answers = outputs(model, data_for(other, options), drawn).argmax(1)
                row["taken_by"][other] = float((answers == wanted.numpy()).mean())
            row["likeness"] = likeness(drawn, wanted, data).mean().item()
            row["nearness"] = (row["likeness"] - of_noise) / (digits - of_noise)
    return {NOISES[1]: of_noise, DIGITS: digits}


def _file(folder: Path, what: str, name: str, seed: int) -> Path:
    return folder / f"{what}-{list(KINDS).index(name)}-{seed}.pt"


def _read(file: Path) -> Any:
    return torch.load(file, weights_only=True)


@functools.cache
def _data(options: Options) -> ImageData:
    return load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)


# --- What the rows come to ----------------------------------------------------------------------


def _first(row: study.Row, what: str) -> Any:
    """Under `what`, of the first of the network's confidences."""
    return next(iter(row[what].values()))


def _of(row: study.Row, name: str) -> float:
    return _first(row, "confidence")[name]


def _claims(by: Rows) -> list[Claim]:
    """Of noise and of drawings, by network; and the published figures, of sets that are there."""
    claims = []
    for name, rows in by.items():
        happy = name in HAPPY
        digits = [_of(row, DIGITS) for row in rows]
        noise = [min(_of(row, noise) for noise in NOISES) for row in rows]
        claim = f"{name}: mean confidence on noise, of Gaussian and uniform the lower"
        said = "confidently" if happy else None
        claims.append(between(f"{claim}: {SURE:g} or more (our bar)", said, noise, low=SURE))
        claim += f", less that on test digits: −{AS_SURE:g} or more (our bar)"
        said = "as sure" if happy else None
        claims.append(between(claim, said, differences(noise, digits), low=-AS_SURE))
    for what, named, published in (
        ("confidence", "mean confidence on", PUBLISHED),
        ("auroc", "AUROC, %, against", PUBLISHED_AUROC),
    ):
        for name, figure in published.items():
            if name in _first(by[BASELINE][0], "confidence"):
                near = NEAR_AUROC if what == "auroc" else NEAR_DIGITS if name == DIGITS else NEAR
                claim = f"{BASELINE}: {named} {name}: within {near:g} of the published (our bar)"
                values = [_first(row, what)[name] for row in by[BASELINE]]
                claims.append(between(claim, figure, values, figure - near, figure + near))
    for name, rows in by.items():
        said = "no idea how to draw" if name in HAPPY else None
        own = [statistics.fmean(row["drawn_confidence"]) for row in rows]
        gains = differences(own, [_of(row, DIGITS) for row in rows])
        claim = f"{name}: mean confidence in its own drawings less that on test digits: 0 or more"
        claims.append(between(claim, None, gains, low=0))
        taken = [row["taken_by"][FILTERS] for row in rows]
        claim = f"{name}: share of its drawings that the CNN of the next seed takes for the digit"
        claim += f": at most {RECOGNISED:g} (our bar)"
        claims.append(between(claim, said, taken, high=RECOGNISED))
        claim = f"{name}: likeness of its drawings, noise 0, test digits 1"
        nearness = [row["nearness"] for row in rows]
        claims.append(between(f"{claim}: at most {ALIKE:g} (our bar)", said, nearness, high=ALIKE))
    return claims


def _tables(by: Rows, ends: Mapping[str, float]) -> dict[str, list[study.Row]]:
    first = by[BASELINE][0]
    seeds = f"{len(by[BASELINE])} seeds"

    def of_sets(what: str, published: Mapping[str, float]) -> list[study.Row]:
        return [
            {
                "images": name,
                **{
                    f"{network}: {kind}": _spread([row[what][kind][name] for row in rows], what)
                    for network, rows in by.items()
                    for kind in rows[0][what]
                },
                "published, softmax MLP": f"{published[name]:g}" if name in published else "–",
            }
            for name in _first(first, what)
        ]

    drawings: list[study.Row] = []
    for name, rows in by.items():
        own = [row["drawn_confidence"] for row in rows]
        drawings.append(
            {
                "network": name,
                "test accuracy, %": spread([100 * row["test_accuracy"] for row in rows]),
                "confidence in its drawings": _spread([statistics.fmean(ten) for ten in own]),
                "in the worst of ten": _spread([min(ten) for ten in own]),
                **{
                    f"taken for the digit by {judge}, %": spread(
                        [100 * row["taken_by"][judge] for row in rows]
                    )
                    for judge in KINDS
                },
                "likeness": _spread([row["likeness"] for row in rows]),
                "noise 0, digits 1": _spread([row["nearness"] for row in rows]),
                "training, s": f"{statistics.median(row['train_seconds'] for row in rows):.1f}",
            }
        )
    likeness = ", ".join(f"{name} {value:.3f}" for name, value in ends.items())
    return {
        f"Mean top confidence, {first['dataset']}, {seeds}": of_sets("confidence", PUBLISHED),
        f"AUROC of the confidence, test digits against other images, %, {seeds}": of_sets(
            "auroc", PUBLISHED_AUROC
        ),
        f"Ten digits drawn by each network, judged by networks of the next seed; likeness of "
        f"{likeness}": drawings,
    }


def _spread(values: Sequence[float], what: str = "") -> str:
    if what == "auroc":
        return spread(values)
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def _picture(by: Rows, folder: Path) -> figures.Figure:
    first = by[BASELINE][0]

    def lines(what: str, published: Mapping[str, float]) -> dict[str, list[figures.Point]]:
        names = list(_first(first, what))
        of_networks: dict[str, list[figures.Point]] = {
            network: [figures.point(name, [_first(row, what)[name] for row in rows])
                      for name in names]
            for network, rows in by.items()
        }  # fmt: skip
        told: list[figures.Point] = [(name, published[name], 0.0) for name in names
                                     if name in published]  # fmt: skip
        return {**of_networks, f"published, {BASELINE}": told}

    sure, apart = lines("confidence", PUBLISHED), lines("auroc", PUBLISHED_AUROC)
    least = {"our bar for noise": SURE, "least of a softmax": 0.1}
    title = "Told from test digits by confidence"
    parts = [
        figures.Panel("How sure of its answer", "", "mean top confidence", sure, levels=least),
        figures.Panel(title, "", "AUROC, %", apart, levels={"not at all": 50}),
    ]
    for name, rows in by.items():
        drawn = stretched(_read(_file(folder, "drawn", name, rows[0]["seed"])))
        taken = 100 * statistics.fmean(row["taken_by"][FILTERS] for row in rows)
        own = statistics.fmean(statistics.fmean(row["drawn_confidence"]) for row in rows)
        title = f"0 to 9, drawn by: {name}\nsure to {own:.2f}; a CNN takes {taken:.0f} % for it"
        parts.append(figures.Panel(title, image=_sheet(drawn[:, 0])))
    return figures.panels(
        parts,
        f"Noise, other images that are no digits, and digits drawn, {first['dataset']}: mean ± "
        f"standard deviation over {len(by[BASELINE])} seeds; drawings of the first",
    )


def _sheet(images: Tensor) -> Tensor:
    """Ten images (10, H, W) in two rows of five, a grey line around each."""
    framed = F.pad(images, (1, 1, 1, 1), value=64)
    _, H, W = framed.shape
    return framed.view(2, 5, H, W).transpose(1, 2).reshape(2 * H, 5 * W)


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
