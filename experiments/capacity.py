"""How many random labels does a network of so many parameters store, in labels and in bits?

    python experiments/capacity.py            # MNIST and noise, tens of minutes on two cores
    python experiments/capacity.py --smoke    # the embedded digits, seconds

The first n training images get labels drawn evenly from ten classes, which can only be learnt by
heart. A network that ends with the share e of them wrong has stored

    I(n) = n (log2 10 − H2(e) − e log2 9) bits,   H2(e) = −e log2 e − (1 − e) log2(1 − e),

what its answers tell of the labels if one wrong class is as likely as another. Its capacity is the
largest I(n) of all n that were tried; divided by log2 10, it is a number of labels. Only training
images are read, and of them nothing but e, when the training has ended. Labels, first weights and
the order of the images are the seed's own; the images are the same for all seeds.

- **Capacity.** `happy` is 784-16-16-10 with sigmoids and the squared error; `ReLU` has the same
  sizes, ReLUs and the cross-entropy. At one bit a parameter, 13,002 parameters would store 3,914
  labels, at two 7,828. Two is what a neuron stores of two-class labels (Cover 1965; MacKay 2003,
  chapter 40); recurrent networks were found to store about five (Collins, Sohl-Dickstein & Sussillo
  2017).
- **Least network.** The least h with which 784-h-10, of tanh units and with the cross-entropy, ends
  with at most 1 % of n labels wrong (our threshold), found by doubling and bisecting, the networks
  of all seeds trained together. It does with h and does not with h − 1; whether a still smaller
  one would is not asked. Tanh, since ReLUs die, and few are left: with 1,000 validation images and
  5 units, e was 0.13, and 0.21 with ReLUs.
- **Construction.** The network of Zhang et al. 2017, theorem 1, of 2n + d numbers in float64: built
  and not trained. Its output is the number of the class.

All is done with the images and with as many Gaussian ones that have their mean and covariance; and
twice, with some epochs and with twice as many at the same rate: how far does the figure depend on
the budget? Adam, one cycle of the rate, batches of n/20 images, but from 25 to 100.

The rate must last: at 0.005 the loss of a network that had nearly all labels right could jump in
mid-cycle from some 0.01 to 3 or 4, where even guesses cost 2.3, and not all labels were learnt
again. Of 784-9-10 and 500 images neither a larger ε (1e-5, 1e-3) nor a longer second moment (β2 =
0.99999) kept all seeds from it; smaller rates did. So each rate, the same for both budgets, is the
one with the least e where labels are many, of those tried that left none wrong where they are few.
This was asked of 1,200 epochs, validation images and random labels, of one to four networks each:

    happy, n = 5,000     0.0015 29.2 %     0.003 25.9 %    0.006 28.8 %
    ReLU, n = 5,000      0.00125 11.5 %    0.0025 7.6 %    0.0035 6.1 %     0.005 5.8 %
        n = 2,000        0                 0               0                0.4 %
    tanh 13, n = 2,000   0.00125 0.40 %    0.0025 0.13 %                    0.005 0.58 %
        9, n = 500       0                 0               0.00355 0.07 %   0.005 3.7 %

Some pixels are the same in all n images. Normalisation subtracts one mean from all pixels, so such
a pixel is some number c in each image. Its weight w adds w c to the z of each, as the bias does:
there is nothing that it can do and the bias cannot. These weights are not counted among the
parameters `in use`. Hardly any others are idle where the images are many: of 4,000 validation
images 654 pixels varied, and the rank of the images, with a column of ones, was 645. Where there
are fewer images than pixels the rank is at most n, which is not counted.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.stats import linregress
from torch import Tensor

from nn_backprop import figures
from nn_backprop.data import ImageData, gaussian_images, load, random_labels
from nn_backprop.data.images import mean_and_std
from nn_backprop.models import MLP, memorise
from nn_backprop.studies import old_study as study
from nn_backprop.studies.evidence import Claim, between, interval, judged, spread
from nn_backprop.training import evaluate_many, fit_many

CLASSES, PIXELS = 10, 784
LABEL = math.log2(CLASSES)  # bits


class Kind(NamedTuple):
    """How a network is trained, whatever its widths."""

    activation: str
    loss: str
    lr: float


KINDS = {
    "happy": Kind("sigmoid", "squared_error", 3e-3),
    "ReLU": Kind("relu", "cross_entropy", 3.5e-3),
    "tanh": Kind("tanh", "cross_entropy", 2.5e-3),
}
COMPARED = ("happy", "ReLU")  # of these widths
HIDDEN = (16, 16)
PARAMETERS = 13_002
INPUTS = ("images", "Gaussian")


class Plan(NamedTuple):
    """Numbers of labels for each kind of network, and epochs of the shorter training."""

    labels: dict[str, tuple[int, ...]]
    epochs: int


FULL = Plan(
    {
        "happy": (6_000, 10_000, 14_000, 20_000),
        "ReLU": (2_000, 4_000, 5_000, 6_000, 8_000),
        "tanh": (100, 250, 500, 1_000, 2_000),
    },
    epochs=600,
)
SMOKE = Plan({"happy": (50, 150), "ReLU": (50, 150), "tanh": (10, 25, 50)}, epochs=100)
THRESHOLD = 0.01  # of the labels may be wrong
WIDEST = 1_024
R_SQUARED, CHANGE = 0.9, 10  # our bars; of the second, %


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Random labels: stored bits, the least network that stores them, and one that is built."""


class Job(NamedTuple):
    """All seeds of one contestant: a training, a search of several, or a construction."""

    network: str
    inputs: str
    n: int
    epochs: int
    options: Options


def conduct(under_way: study.Study, options: Options) -> None:
    plan = SMOKE if options.smoke else FULL
    _data("images", 1, options)  # so that a missing MNIST ends the study here

    def jobs(network: str) -> list[Job]:
        return [
            Job(network, inputs, n, epochs, options)
            for epochs in (2 * plan.epochs, plan.epochs)  # the longest first
            for n in reversed(plan.labels[network])
            for inputs in INPUTS
        ]

    def shown(row: study.Row) -> dict[str, float]:
        values = row["least"] if "least" in row else _bits(row)
        return {"{network}/{inputs} {epochs}".format(**row): statistics.fmean(values)}

    under_way.carry_out(capacity, [job for network in COMPARED for job in jobs(network)], shown)
    under_way.carry_out(least, jobs("tanh"), shown)
    under_way.carry_out(
        construction,
        [
            Job("construction", inputs, n, 0, options)
            for inputs in INPUTS
            for n in plan.labels["tanh"]
        ],
    )
    rows = under_way.rows
    under_way.finish(_tables(rows), _claims(rows), _picture(rows))


# --- The jobs -----------------------------------------------------------------------------------


def capacity(job: Job) -> study.Row:
    """Networks of the happy one's widths, one a seed: how many labels each has wrong at the end."""
    began = time.perf_counter()
    wrong = _wrong(job, HIDDEN)
    return {**_about(job), "wrong": wrong, "seconds": time.perf_counter() - began}


def least(job: Job) -> study.Row:
    """The least width that stores n labels, for each seed; and how many each width had wrong."""
    began = time.perf_counter()
    wrong: dict[int, list[int]] = {}

    def stored(width: int) -> list[bool]:
        if width > WIDEST:
            raise study.StudyError(f"no width up to {WIDEST} stores {job.n} labels: {job}")
        wrong[width] = _wrong(job, (width,))
        return [count <= THRESHOLD * job.n for count in wrong[width]]

    at_a_bit_each = math.ceil(job.n * LABEL / (PIXELS + 1 + CLASSES))
    return {
        **_about(job),
        "least": least_widths(stored, at_a_bit_each),
        "tried": [{"width": width, "wrong": wrong[width]} for width in sorted(wrong)],
        "seconds": time.perf_counter() - began,
    }


def least_widths(stored: Callable[[int], Sequence[bool]], first: int) -> list[int]:
    """For each network the least width that stores its labels, as far as widths are asked for.

    stored(width) says it of every network, and is asked once a width: `first`, its doubles until
    all of them store their labels, and then for each network whatever halves what is left. The
    answer is a width that does; one less does not, or is zero.
    """
    stored = functools.cache(stored)
    widest = first
    while not all(stored(widest)):
        widest *= 2
    found = []
    for network in range(len(stored(widest))):
        too_few, enough = 0, widest
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if stored(middle)[network]:
                enough = middle
            else:
                too_few = middle
        found.append(enough)
    return found


def construction(job: Job) -> study.Row:
    """The network that is built for n labels of each seed: how many it has wrong, and how far."""
    data = _data(job.inputs, job.n, job.options)
    x = data.normalise(data.images.flatten(1), torch.float64)
    wrong, off = [], 0.0
    for seed, labels in enumerate(_labels(job)):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(PIXELS, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            output = memorise(x, labels.double(), direction)(x)
        wrong.append(int((output.round() != labels).sum()))
        off = max(off, (output - labels).abs().max().item())
    return {**_about(job), "wrong": wrong, "largest_difference": off}


def _about(job: Job) -> study.Row:
    data = _data(job.inputs, job.n, job.options)
    x = data.images.flatten(1)
    return {
        "network": job.network,
        "inputs": job.inputs,
        "n": job.n,
        "epochs": job.epochs,
        "dataset": data.name,
        "constant_pixels": int((x == x[0]).all(0).sum()),
    }


def _wrong(job: Job, hidden: Sequence[int]) -> list[int]:
    """Of n labels, after a training: for each seed, all of which are trained together."""
    data, kind = _data(job.inputs, job.n, job.options), KINDS[job.network]
    labels, seeds, models = _labels(job), range(job.options.seeds), []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(MLP((PIXELS, *hidden, CLASSES), kind.activation, kind.loss))
    batch_size = min(100, max(25, job.n // 20))
    losses = fit_many(models, data, seeds=seeds, lrs=kind.lr, labels=labels,
                      epochs=job.epochs, batch_size=batch_size)  # fmt: skip
    if not losses.isfinite().all():
        raise study.StudyError(f"a training diverged, {job}")
    accuracy = evaluate_many(models, data, data.train, labels).accuracy
    return [job.n - round(job.n * share) for share in accuracy.tolist()]


def _labels(job: Job) -> Tensor:
    """Of each seed, (seeds, n); of fewer images they are the first of those of more."""
    data = _inputs(job.inputs, job.options)
    drawn = [random_labels(data, 1.0, seed).labels for seed in range(job.options.seeds)]
    return torch.stack(drawn)[:, : job.n]


def _data(inputs: str, n: int, options: Options) -> ImageData:
    """The first n training images, or n Gaussian ones, and no others at all."""
    data = _inputs(inputs, options)
    images = data.images[:n]
    mean, std = mean_and_std(images)
    return replace(data, images=images, labels=data.labels[:n], train=torch.arange(n), mean=mean,
                   std=std)  # fmt: skip


@functools.cache
def _inputs(inputs: str, options: Options) -> ImageData:
    """The training images that the study uses, or as many Gaussian ones; validation, test empty."""
    data = load("digits" if options.smoke else "mnist", options.data_root, say=lambda line: None)
    most = max(map(max, (SMOKE if options.smoke else FULL).labels.values()))
    used, none = data.train[:most], data.train[:0]
    images = data.images[used]
    if inputs == "Gaussian":
        images = gaussian_images(images, seed=0)
    return replace(data, images=images, labels=data.labels[used], train=torch.arange(most),
                   validation=none, test=none)  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def stored_bits(n: int, wrong: int) -> float:
    """I(n), with e = wrong / n."""
    e = wrong / n
    uncertain = sum(-p * math.log2(p) for p in (e, 1 - e) if p > 0)
    return n * (LABEL - uncertain - e * math.log2(CLASSES - 1))


class Capacity(NamedTuple):
    """Of one network: the most bits, at which n, and of how many parameters in use."""

    bits: float
    n: int
    in_use: int


class Line(NamedTuple):
    """parameters = first + slope · n, through the least networks of one seed."""

    slope: float
    first: float
    r_squared: float


def _claims(rows: Sequence[study.Row]) -> list[Claim]:
    """Of the doubled budget, where not said otherwise: it is closer to what the network could."""
    claims = []
    for inputs in INPUTS:
        for network in COMPARED:
            claims += _of_capacity(rows, network, inputs)
    for inputs in INPUTS:
        claims += _of_least(rows, inputs)
    for inputs in INPUTS:
        built = _of(rows, "construction", inputs)
        count = sum(sum(row["wrong"]) for row in built)
        claim = (
            f"2n + {PIXELS} numbers fit n {_named(rows, inputs)} images without error, "
            f"n up to {built[-1]['n']:,}: labels wrong, all seeds"
        )
        claims.append(judged(claim, 0, count, (count, count), 0, 0))
    return claims


def _of_capacity(rows: Sequence[study.Row], network: str, inputs: str) -> list[Claim]:
    shorter, longer = (_capacities(rows, network, inputs, epochs) for epochs in _epochs(rows))
    low, high = PARAMETERS / LABEL, 2 * PARAMETERS / LABEL
    name = f"{network}, {_named(rows, inputs)}"
    return [
        between(
            f"{name}: capacity in labels, from one to two bits a parameter",
            f"{low:,.0f} to {high:,.0f} (counting)",
            [capacity.bits / LABEL for capacity in longer], low, high,
        ),
        between(
            f"{name}: bits a parameter in use, at most 2", "2 (one neuron: Cover 1965)",
            [capacity.bits / capacity.in_use for capacity in longer], high=2,
        ),
        _changed(
            f"{name}: twice the epochs change the capacity",
            [capacity.bits for capacity in shorter], [capacity.bits for capacity in longer],
        ),
    ]  # fmt: skip


def _of_least(rows: Sequence[study.Row], inputs: str) -> list[Claim]:
    shorter, longer = (_of(rows, "tanh", inputs, epochs)[-1] for epochs in _epochs(rows))
    lines = _lines(rows, inputs, longer["epochs"])
    before, after = ([*map(parameters, row["least"])] for row in (shorter, longer))
    name = f"784-h-10, {_named(rows, inputs)}"
    return [
        between(
            f"{name}: least parameters against labels are a line, R² {R_SQUARED} or more (our bar)",
            None, [line.r_squared for line in lines], low=R_SQUARED,
        ),
        between(
            f"{name}: parameters a further label, from two bits to one a parameter",
            f"{LABEL / 2:.2f} to {LABEL:.2f} (counting)",
            [line.slope for line in lines], LABEL / 2, LABEL,
        ),
        _changed(
            f"{name}: twice the epochs change the parameters for {longer['n']:,} labels",
            before, after,
        ),
    ]  # fmt: skip


def _changed(claim: str, before: Sequence[float], after: Sequence[float]) -> Claim:
    changes = [100 * (b / a - 1) for a, b in zip(before, after, strict=True)]
    bar = f", in %: by at most {CHANGE} up or down (our bar)"
    return between(claim + bar, None, changes, -CHANGE, CHANGE)


def _tables(rows: Sequence[study.Row]) -> dict[str, list[study.Row]]:
    seeds = len(rows[0]["wrong"])
    tables = {
        f"{network}: of n random labels stored, {seeds} seeds": _stored(rows, network)
        for network in COMPARED
    }
    low, high = (f"{bits * PARAMETERS / LABEL:,.0f}" for bits in (1, 2))
    title = f"Capacity of {PARAMETERS:,} parameters (95 % interval of the mean); by counting"
    tables[f"{title} {low} labels at one bit a parameter, {high} at two"] = [
        _largest(rows, network, inputs, epochs)
        for network in COMPARED
        for inputs in INPUTS
        for epochs in _epochs(rows)
    ]
    searches = [
        row for inputs in INPUTS for e in _epochs(rows) for row in _of(rows, "tanh", inputs, e)
    ]
    tables[f"The least 784-h-10 with at most {100 * THRESHOLD:g} % of n labels wrong"] = [
        {
            "inputs": _named(rows, row["inputs"]),
            "epochs": f"{row['epochs']:,}",
            "n": f"{row['n']:,}",
            "least h of each seed": ", ".join(f"{width}" for width in row["least"]),
            "parameters": _mean([parameters(width) for width in row["least"]]),
            "in use": _mean([_in_use(row, width) for width in row["least"]]),
            "bits a parameter": spread([row["n"] * LABEL / parameters(w) for w in row["least"]]),
            "numbers of the construction": f"{2 * row['n'] + PIXELS:,}",
        }
        for row in searches
    ]
    tables["A line through the least networks (95 % interval of the mean)"] = [
        {
            "inputs": _named(rows, inputs),
            "epochs": f"{epochs:,}",
            "parameters a further label": _mean([line.slope for line in lines], ".2f"),
            "parameters at n = 0": _mean([line.first for line in lines]),
            "R²": _mean([line.r_squared for line in lines], ".3f"),
        }
        for inputs in INPUTS
        for epochs in _epochs(rows)
        for lines in [_lines(rows, inputs, epochs)]
    ]
    tables[f"The network of 2n + {PIXELS} numbers that is built, float64"] = [
        {
            "inputs": _named(rows, row["inputs"]),
            "n": f"{row['n']:,}",
            "numbers": f"{2 * row['n'] + PIXELS:,}",
            "labels wrong, all seeds": sum(row["wrong"]),
            "largest difference from a label": f"{row['largest_difference']:.1e}",
        }
        for inputs in INPUTS
        for row in _of(rows, "construction", inputs)
    ]
    return tables


def _stored(rows: Sequence[study.Row], network: str) -> list[study.Row]:
    return [
        {
            "inputs": _named(rows, inputs),
            "epochs": f"{epochs:,}",
            "n": f"{row['n']:,}",
            "constant pixels": row["constant_pixels"],
            "wrong, %": spread([100 * count / row["n"] for count in row["wrong"]]),
            "bits stored": _mean(_bits(row)),
            "bits of all labels": f"{row['n'] * LABEL:,.0f}",
        }
        for inputs in INPUTS
        for epochs in _epochs(rows)
        for row in _of(rows, network, inputs, epochs)
    ]


def _largest(rows: Sequence[study.Row], network: str, inputs: str, epochs: int) -> study.Row:
    found = _capacities(rows, network, inputs, epochs)
    last = _of(rows, network, inputs, epochs)[-1]["n"]
    places = sorted({c.n for c in found})
    return {
        "network": network,
        "inputs": _named(rows, inputs),
        "epochs": f"{epochs:,}",
        "at n =": ", ".join(f"{n:,}" + " (the last)" * (n == last) for n in places),
        "bits": _mean([c.bits for c in found]),
        "labels": _mean([c.bits / LABEL for c in found]),
        "bits a parameter": _mean([c.bits / PARAMETERS for c in found], ".2f"),
        "bits a parameter in use": _mean([c.bits / c.in_use for c in found], ".2f"),
    }


def _picture(rows: Sequence[study.Row]) -> figures.Figure:
    shorter, longer = _epochs(rows)
    levels = {"1 bit a parameter": PARAMETERS / 1000, "2 bits a parameter": PARAMETERS / 500}
    parts = []
    for inputs in INPUTS:
        lines: dict[str, list[tuple[float | str, float, float]]] = {
            f"{network}, {epochs:,} epochs": [
                figures.point(row["n"], [bits / 1000 for bits in _bits(row)])
                for row in _of(rows, network, inputs, epochs)
            ]
            for network in COMPARED
            for epochs in (shorter, longer)
        }
        lines["all of the labels"] = [
            (row["n"], row["n"] * LABEL / 1000, 0.0) for row in _of(rows, "ReLU", inputs, longer)
        ]
        title = f"{PARAMETERS:,} parameters, {_named(rows, inputs)}"
        parts.append(
            figures.Panel(title, "random labels, n", "thousand bits stored", lines, levels=levels)
        )
    lines = {
        f"{_named(rows, inputs)}, {longer:,} epochs": [
            figures.point(row["n"], [parameters(width) / 1000 for width in row["least"]])
            for row in _of(rows, "tanh", inputs, longer)
        ]
        for inputs in INPUTS
    }
    sizes = [row["n"] for row in _of(rows, "construction", INPUTS[0])]
    for name, numbers in (
        ("1 bit a parameter", lambda n: n * LABEL),
        ("2 bits a parameter", lambda n: n * LABEL / 2),
        ("built: 2n + 784", lambda n: 2 * n + PIXELS),
    ):
        lines[name] = [(n, numbers(n) / 1000, 0.0) for n in sizes]
    parts.append(
        figures.Panel(
            f"The least 784-h-10, at most {100 * THRESHOLD:g} % wrong", "random labels, n",
            "thousand parameters", lines,
        )
    )  # fmt: skip
    return figures.side_by_side(
        parts, "Random labels, learnt by heart: mean ± standard deviation over seeds"
    )


# --- Of rows and numbers ------------------------------------------------------------------------


def _bits(row: study.Row) -> list[float]:
    return [stored_bits(row["n"], wrong) for wrong in row["wrong"]]


def _capacities(
    rows: Sequence[study.Row], network: str, inputs: str, epochs: int
) -> list[Capacity]:
    """In the order of the seeds."""
    curve = _of(rows, network, inputs, epochs)
    found = []
    for of_seed in zip(*map(_bits, curve), strict=True):
        bits, row = max(zip(of_seed, curve, strict=True), key=lambda pair: pair[0])
        in_use = PARAMETERS - HIDDEN[0] * row["constant_pixels"]
        found.append(Capacity(bits, row["n"], in_use))
    return found


def _lines(rows: Sequence[study.Row], inputs: str, epochs: int) -> list[Line]:
    """In the order of the seeds."""
    searches = _of(rows, "tanh", inputs, epochs)
    found = []
    for widths in zip(*(row["least"] for row in searches), strict=True):
        fit = linregress([row["n"] for row in searches], [parameters(width) for width in widths])
        found.append(Line(fit.slope, fit.intercept, fit.rvalue**2))
    return found


def parameters(width: int) -> int:
    """Of 784-width-10."""
    return (PIXELS + 1) * width + (width + 1) * CLASSES


def _in_use(row: study.Row, width: int) -> int:
    return parameters(width) - width * row["constant_pixels"]


def _mean(values: Sequence[float], form: str = ",.0f") -> str:
    low, high = interval(values)
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


def _named(rows: Sequence[study.Row], inputs: str) -> str:
    """The images have the name of the data set."""
    return rows[0]["dataset"] if inputs == "images" else inputs


def _of(rows: Sequence[study.Row], network: str, inputs: str, epochs: int = 0) -> list[study.Row]:
    """The rows of one contestant, n rising."""
    wanted = (network, inputs, epochs)
    chosen = [row for row in rows if (row["network"], row["inputs"], row["epochs"]) == wanted]
    return sorted(chosen, key=lambda row: row["n"])


def _epochs(rows: Sequence[study.Row]) -> tuple[int, int]:
    """The two budgets."""
    shorter, longer = sorted({row["epochs"] for row in rows} - {0})
    return shorter, longer


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
