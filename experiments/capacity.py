"""How many random labels does a network of so many parameters store, in labels and in bits?

    python experiments/capacity.py            # MNIST and noise, tens of minutes on two cores
    python experiments/capacity.py --smoke    # the embedded digits, seconds

What is compared, and what came out: results/capacity/README.md.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import linregress
from torch import Tensor

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, gaussian_images, random_labels, training_only
from nn_backprop.models import memorise
from nn_backprop.studies import Claim, Recipe, Row, Rows, between, mean_interval, mean_sd
from nn_backprop.studies.memorisation import labels_wrong, least_widths, stored_bits

CLASSES, PIXELS = 10, 784
LABEL = math.log2(CLASSES)  # bits
# A rate must last: the page tells how they were chosen.
KINDS = {
    "happy": partial(Recipe, lr=3e-3, activation="sigmoid", loss="squared_error"),
    "ReLU": partial(Recipe, lr=3.5e-3),
    "tanh": partial(Recipe, lr=2.5e-3, activation="tanh"),  # ReLUs die, and few are left
}
COMPARED = ("happy", "ReLU")  # of these widths
HIDDEN, PARAMETERS = (16, 16), 13_002
A_BIT_EACH = PARAMETERS / LABEL, 2 * PARAMETERS / LABEL  # labels, at one bit a parameter and at two
INPUTS = ("images", "Gaussian")
LABELS = {
    "happy": (6_000, 10_000, 14_000, 20_000),
    "ReLU": (2_000, 4_000, 5_000, 6_000, 8_000),
    "tanh": (100, 250, 500, 1_000, 2_000),
}
SMOKE_LABELS = {"happy": (50, 150), "ReLU": (50, 150), "tanh": (10, 25, 50)}
EPOCHS, SMOKE_EPOCHS = 600, 100  # and twice as many
THRESHOLD, WIDEST = 0.01, 1_024  # of the labels may be wrong; units
R_SQUARED, CHANGE = 0.9, 10  # our bars; of the second, %


@dataclass(frozen=True)
class Options(studies.Options):
    """Random labels: stored bits, the least network that stores them, and one that is built."""

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        return SMOKE_LABELS if self.smoke else LABELS


class Job(NamedTuple):
    """All seeds of one contestant: a training, a search of several, or a construction."""

    network: str
    inputs: str
    n: int
    epochs: int
    options: Options


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    labels, epochs = options.labels, SMOKE_EPOCHS if options.smoke else EPOCHS

    def jobs(network: str) -> list[Job]:  # the longest first
        all_of = product((2 * epochs, epochs), reversed(labels[network]), INPUTS)
        return [Job(network, inputs, n, budget, options) for budget, n, inputs in all_of]

    def tag(row: Row) -> dict[str, float]:
        return {"{network}/{inputs} {epochs}".format(**row): fmean(row.get("least") or bits(row))}

    run.train_all(capacity, [*jobs("happy"), *jobs("ReLU")], tag)
    run.train_all(least, jobs("tanh"), tag)
    sizes = product(INPUTS, labels["tanh"])
    run.train_all(construction, [Job("construction", *size, 0, options) for size in sizes])


def capacity(job: Job) -> Row:
    """Networks of the happy one's widths, one a seed: how many labels each has wrong at the end."""
    began = time.perf_counter()
    wrong = wrong_labels(job, HIDDEN)
    return {**about(job), "wrong": wrong, "seconds": time.perf_counter() - began}


def least(job: Job) -> Row:
    """The least width that stores n labels, for each seed; and how many each width had wrong."""
    began = time.perf_counter()
    at_a_bit_each = math.ceil(job.n * LABEL / (PIXELS + 1 + CLASSES))
    found, tried = least_widths(
        lambda width: wrong_labels(job, (width,)), THRESHOLD * job.n, at_a_bit_each, WIDEST
    )
    tries = [{"width": width, "wrong": wrong} for width, wrong in sorted(tried.items())]
    took = time.perf_counter() - began
    return {**about(job), "least": found, "tried": tries, "seconds": took}


def construction(job: Job) -> Row:
    """The network that is built for n labels of each seed: how many it has wrong, and how far."""
    data, labels = data_of(job)
    x = data.normalise(data.images.flatten(1), torch.float64)
    wrong, off = [], 0.0
    for seed, wanted in enumerate(labels):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(PIXELS, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            output = memorise(x, wanted.double(), direction)(x)
        wrong.append(int((output.round() != wanted).sum()))
        off = max(off, (output - wanted).abs().max().item())
    return {**about(job), "wrong": wrong, "largest_difference": off}


def about(job: Job) -> Row:
    data, _ = data_of(job)
    constant = int((data.images == data.images[0]).all(0).sum())
    return {"network": job.network, "inputs": job.inputs, "n": job.n, "epochs": job.epochs,
            "dataset": data.name, "constant_pixels": constant}  # fmt: skip


def wrong_labels(job: Job, hidden: tuple[int, ...]) -> list[int]:
    """Of n labels, after a training: for each seed, all of which are trained together."""
    batch_size = min(100, max(25, job.n // 20))
    recipe = KINDS[job.network](hidden=hidden, epochs=job.epochs, batch_size=batch_size)
    return labels_wrong(recipe, *data_of(job), range(job.options.seeds))


def data_of(job: Job) -> tuple[ImageData, Tensor]:
    """The first n inputs, and no others at all; the first n labels of each seed, (seeds, n)."""
    data, labels = all_data(job.inputs, job.options)
    return training_only(data, job.n), labels[:, : job.n]


@cache
def all_data(inputs: str, options: Options) -> tuple[ImageData, Tensor]:
    """The training images that the study uses, or as many Gaussian ones; labels (seeds, n)."""
    data = training_only(studies.load_data(options), max(map(max, options.labels.values())))
    labels = [random_labels(data, 1.0, seed).labels for seed in range(options.seeds)]
    if inputs != "images":
        data = replace(data, images=gaussian_images(data.images, seed=0))
    return data, torch.stack(labels)


# --- What the rows come to ----------------------------------------------------------------------


# fmt: off
def claims(rows: Rows) -> list[Claim]:
    """Of the doubled budget, where not said otherwise: it is closer to what the network could."""
    return [*(claim for contest in product(INPUTS, COMPARED) for claim in stored(rows, *contest)),
            *(claim for inputs in INPUTS for claim in needed(rows, inputs)),
            *(fitted(rows, inputs) for inputs in INPUTS)]


def stored(rows: Rows, inputs: str, network: str) -> Iterator[Claim]:
    (before, *_), (most, _, in_use) = (
        capacities(rows, network, inputs, epochs) for epochs in budgets(rows))
    low, high = A_BIT_EACH
    name = f"{network}, {named(rows, inputs)}"
    yield between(f"{name}: capacity in labels, from one to two bits a parameter",
                  f"{low:,.0f} to {high:,.0f} (counting)", most / LABEL, low, high)
    yield between(f"{name}: bits a parameter in use, at most 2", "2 (one neuron: Cover 1965)",
                  most / in_use, high=2)
    yield changed(f"{name}: twice the epochs change the capacity", before, most)


def needed(rows: Rows, inputs: str) -> Iterator[Claim]:
    before, after = (of(rows, "tanh", inputs, epochs)[-1] for epochs in budgets(rows))
    slope, _, r_squared = lines(rows, inputs, after["epochs"])
    name = f"784-h-10, {named(rows, inputs)}"
    yield between(f"{name}: least parameters against labels are a line, R² {R_SQUARED} or more "
                  "(our bar)", None, r_squared, low=R_SQUARED)
    yield between(f"{name}: parameters a further label, from two bits to one a parameter",
                  f"{LABEL / 2:.2f} to {LABEL:.2f} (counting)", slope, LABEL / 2, LABEL)
    yield changed(f"{name}: twice the epochs change the parameters for {after['n']:,} labels",
                  parameters(before), parameters(after))


def fitted(rows: Rows, inputs: str) -> Claim:
    built = of(rows, "construction", inputs)
    claim = f"2n + {PIXELS} numbers fit n {named(rows, inputs)} images without error, n up to "
    claim += f"{built[-1]['n']:,}: labels wrong, all seeds"
    return studies.counted(claim, 0, sum(sum(row["wrong"]) for row in built), 0, 0)


def changed(claim: str, before: np.ndarray, after: np.ndarray) -> Claim:
    return between(f"{claim}, in %: by at most {CHANGE} up or down (our bar)", None,
                   100 * (after / before - 1), -CHANGE, CHANGE)


def tables(rows: Rows) -> dict[str, studies.Table]:
    contests = list(product(INPUTS, budgets(rows)))

    def which(inputs: str, epochs: int) -> Row:
        return {"inputs": named(rows, inputs), "epochs": f"{epochs:,}"}

    def largest(network: str, contest: tuple[str, int]) -> Row:
        most, places, in_use = capacities(rows, network, *contest)
        last = of(rows, network, *contest)[-1]["n"]
        shown = (f"{n:,}" + " (the last)" * (n == last) for n in sorted({*places.tolist()}))
        return {"network": network, **which(*contest), "at n =": ", ".join(shown),
                "bits": mean_interval(most), "labels": mean_interval(most / LABEL),
                "bits a parameter": mean_interval(most / PARAMETERS, ".2f"),
                "bits a parameter in use": mean_interval(most / in_use, ".2f")}

    def search(row: Row) -> Row:
        used = parameters(row) - np.array(row["least"]) * row["constant_pixels"]
        return {"n": f"{row['n']:,}", "least h of each seed": ", ".join(map(str, row["least"])),
                "parameters": mean_interval(parameters(row)),
                "in use": mean_interval(used),
                "bits a parameter": mean_sd(row["n"] * LABEL / parameters(row)),
                "numbers of the construction": f"{2 * row['n'] + PIXELS:,}"}

    seeds, (low, high) = len(rows[0]["wrong"]), A_BIT_EACH
    return {
        **{f"{network}: of n random labels stored, {seeds} seeds": [
            {**which(*contest), "n": f"{row['n']:,}", "constant pixels": row["constant_pixels"],
             "wrong, %": mean_sd(100 * np.array(row["wrong"]) / row["n"]),
             "bits stored": mean_interval(bits(row)),
             "bits of all labels": f"{row['n'] * LABEL:,.0f}"}
            for contest in contests for row in of(rows, network, *contest)]
           for network in COMPARED},
        f"Capacity of {PARAMETERS:,} parameters (95 % interval of the mean); by counting "
        f"{low:,.0f} labels at one bit a parameter, {high:,.0f} at two": [
            largest(network, contest) for network, contest in product(COMPARED, contests)],
        f"The least 784-h-10 with at most {100 * THRESHOLD:g} % of n labels wrong": [
            {**which(*contest), **search(row)}
            for contest in contests for row in of(rows, "tanh", *contest)],
        "A line through the least networks (95 % interval of the mean)": [
            {**which(*contest), "parameters a further label": mean_interval(slope, ".2f"),
             "parameters at n = 0": mean_interval(first), "R²": mean_interval(r_squared, ".3f")}
            for contest in contests for slope, first, r_squared in [lines(rows, *contest)]],
        f"The network of 2n + {PIXELS} numbers that is built, float64": [
            {"inputs": named(rows, inputs), "n": f"{row['n']:,}",
             "numbers": f"{2 * row['n'] + PIXELS:,}", "labels wrong, all seeds": sum(row["wrong"]),
             "largest difference from a label": f"{row['largest_difference']:.1e}"}
            for inputs in INPUTS for row in of(rows, "construction", inputs)],
    }
# fmt: on


def picture(rows: Rows) -> figures.Figure:
    (_, twice), across = budgets(rows), "random labels, n"
    levels = {"1 bit a parameter": PARAMETERS / 1000, "2 bits a parameter": PARAMETERS / 500}

    def measured(values: Callable[[Row], Any], *contest: Any) -> list[figures.Point]:
        return [figures.point(row["n"], np.array(values(row)) / 1000) for row in of(rows, *contest)]

    def line(like: list[Row], each: float, first: float = 0) -> list[figures.Point]:
        return [(row["n"], (each * row["n"] + first) / 1000, 0.0) for row in like]

    parts = []
    for inputs in INPUTS:
        curves = {
            f"{network}, {budget:,} epochs": measured(bits, network, inputs, budget)
            for network, budget in product(COMPARED, budgets(rows))
        }
        curves["all of the labels"] = line(of(rows, "ReLU", inputs, twice), LABEL)
        title = f"{PARAMETERS:,} parameters, {named(rows, inputs)}"
        parts.append(figures.Panel(title, across, "thousand bits stored", curves, levels=levels))
    built = of(rows, "construction", INPUTS[0])
    curves = {
        f"{named(rows, inputs)}, {twice:,} epochs": measured(parameters, "tanh", inputs, twice)
        for inputs in INPUTS
    }
    curves |= {
        "1 bit a parameter": line(built, LABEL),
        "2 bits a parameter": line(built, LABEL / 2),
        "built: 2n + 784": line(built, 2, PIXELS),
    }
    title = f"The least 784-h-10, at most {100 * THRESHOLD:g} % wrong"
    return figures.side_by_side(
        [*parts, figures.Panel(title, across, "thousand parameters", curves)],
        "Random labels, learnt by heart: mean ± standard deviation over seeds",
    )


def bits(row: Row) -> list[float]:
    """That each seed's network has stored."""
    return [stored_bits(row["n"], wrong) for wrong in row["wrong"]]


def capacities(rows: Rows, network: str, inputs: str, epochs: int) -> tuple[np.ndarray, ...]:
    """Of each seed the most bits, at which n, and how many parameters are in use there."""
    curve = of(rows, network, inputs, epochs)
    stored = np.array([bits(row) for row in curve])  # sizes, seeds
    place = stored.argmax(0)
    n, constant = (np.array([row[key] for row in curve]) for key in ("n", "constant_pixels"))
    return stored.max(0), n[place], PARAMETERS - HIDDEN[0] * constant[place]


def lines(rows: Rows, inputs: str, epochs: int) -> tuple[np.ndarray, ...]:
    """parameters = first + slope · n through each seed's least networks: slope, first, and R²."""
    searches = of(rows, "tanh", inputs, epochs)
    n, least = [row["n"] for row in searches], [*map(parameters, searches)]
    fits = [linregress(n, of_seed) for of_seed in np.transpose(least)]
    return tuple(np.transpose([(fit.slope, fit.intercept, fit.rvalue**2) for fit in fits]))


def parameters(row: Row) -> np.ndarray:
    """Of each seed's least 784-h-10."""
    return (PIXELS + 1 + CLASSES) * np.array(row["least"], dtype=float) + CLASSES


def named(rows: Rows, inputs: str) -> str:
    """The images have the name of the data set."""
    return f"{rows.one('dataset')}" if inputs == "images" else inputs


def of(rows: Rows, network: str, inputs: str, epochs: int = 0) -> list[Row]:
    """The rows of one contestant, n rising."""
    chosen = rows.where(network=network, inputs=inputs, epochs=epochs)
    return sorted(chosen, key=lambda row: row["n"])


def budgets(rows: Rows) -> tuple[int, ...]:
    """The two numbers of epochs."""
    return tuple(sorted({row["epochs"] for row in rows} - {0}))


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
