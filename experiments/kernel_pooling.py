"""What does a lift by a kernel buy, and what does pooling after it?

    python experiments/kernel_pooling.py              # MNIST, tens of minutes on two cores
    python experiments/kernel_pooling.py --smoke      # the embedded digits, seconds

Random Fourier features of whole images ("vectors") and of patches of 5 × 5 pixels, pooled to a
grid ("patches"), each with a linear layer on top that is fitted by ridge regression, in closed
form. σ is half of the median distance between training images, or patches that are not constant; on
the validation split half was better than the whole and than a quarter. Five questions:

1. Does the error fall with the dimension D towards that of the exact kernel? On all training
   digits; and on a subset, where the exact machines can be had beside it: kernel ridge regression
   (the limit of D → ∞, with a strength of its own) and scikit-learn's Gaussian-kernel SVM.
   Ridge on pixels is the other bracket. (On 60,000 digits, a linear classifier errs by 12.0 % and a
   polynomial SVM by 1.1 % in LeCun et al. 1998, a Gaussian-kernel SVM by 1.4 % on the MNIST
   database's web page.)
2. Does the kernel's own error, |z·z' − k| over random pairs of digits, fall as D^−½?
3. What does pooling buy when the test digits are shifted? What is judged is what each contestant
   loses, its error on a quarter of the test digits, shifted up, down, left or right, less that on
   the same digits in their place. Pooling is held against no pooling twice: at equal lift, the same
   filters with and without; and at equal pooled dimension, from no pooling to a grid of 2 × 2.
4. How much data does it need? Against the small CNN, which gets the same digits and at least STEPS
   updates with the settings that `train.py` has for it.
5. Does it struggle with rotated digits, digits on noise and on clutter? Again against the CNN.

"network" is the kernel network of `models` on the same patches, trained by gradient like the CNN.

No contestant is tuned for a question: the ridge's strength, the SVM's C, learning rates and weight
decay are constants of its kind, chosen once on the validation split, and the same for every number
of digits, variant and seed. The strengths are the best powers of ten, from 10⁻⁴, for 10,000 plain
digits (5,000 for the exact kernel) and a seed, 100, that is not reported.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop import data as images_of
from nn_backprop import figures, models
from nn_backprop.data import ImageData
from nn_backprop.data.images import mean_and_std
from nn_backprop.engines import ENGINES
from nn_backprop.layers import (
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    median_distance,
    random_patches,
)
from nn_backprop.studies import evidence
from nn_backprop.studies import old_study as study
from nn_backprop.training import fit, make_optimizer, make_schedule, steps_per_epoch

# Of the ridge, in units of the mean square of an example's features.
STRENGTHS = {"pixels": 10.0, "vectors": 0.1, "patches": 1e-3, "kernel ridge": 1e-4}
COST = 10.0  # of the SVM, C; of 1, 10 and 100 the best on the validation split
PATCH, STRIDE = 5, 2  # 12 × 12 patches an image
STEPS, EPOCHS, BATCH = 500, 3, 128  # of what is trained by gradient: at least so many of both
RATES = {"CNN": (6e-3, 0.1), "network": (0.1, 0.0)}  # learning rate, weight decay
SHIFTS = (1, 2, 3, 4, 6)
VARIANTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "plain": lambda images, seed: images,
    "rotated": images_of.rotated,
    "on noise": images_of.on_noise,
    "on clutter": images_of.on_clutter,
}
PAIRS = 1000  # of digits, for the kernel's own error


@dataclass(frozen=True)
class Options(study.StudyOptions):
    """Error, tolerance to shifts, need of data and limits of random kernel features."""


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    data: str
    dimensions: tuple[int, ...]  # of vectors; the last but one is that of the other questions, too
    pairs_of: tuple[int, ...]  # dimensions at which the kernel's own error is measured
    small: int  # training digits of the exact machines
    middle: int  # of the questions about shifts and harder digits
    counts: tuple[int, ...]  # of the learning curve; all of them come on top


FULL = Size("mnist", (256, 1024, 4096, 8192), tuple(2**k for k in range(6, 15)),
            5_000, 10_000, (100, 1_000, 10_000))  # fmt: skip
SMOKE = Size("digits", (32, 144, 288), (64, 256, 1024), 200, 300, (100, 300))


@dataclass(frozen=True)
class Job:
    """One contestant, fitted to n digits."""

    contestant: str
    seed: int
    n: int
    options: Options
    variant: str = "plain"
    features: int = 0  # of a vector, or of a patch
    grid: int = 0
    pooling: str = ""


Predict = Callable[[Tensor], Tensor]  # normalised images (n, 1, H, W) to scores (n, 10)


def conduct(under_way: study.Study, options: Options) -> None:
    size = SMOKE if options.smoke else FULL
    everything = _loaded(size.data, options.data_root)
    n = len(everything.train)
    pairs = [Job("kernel", seed, n, options, features=d) for seed in range(options.seeds)
             for d in size.pairs_of]  # fmt: skip
    kernel_rows = under_way.carry_out(kernel_error, pairs, _tagged)
    rows = under_way.carry_out(contest, _contests(size, n, options), _tagged)
    found = Found(rows, kernel_rows, size, n, options.seeds)
    pictures = _examples(everything)
    under_way.finish(_tables(found), _claims(found), _picture(found, pictures, size.data))


def _contests(size: Size, n: int, options: Options) -> list[Job]:
    ways = _ways(size.dimensions[-2])
    make = functools.partial(Job, options=options)
    jobs: list[Job] = []
    for seed in range(options.seeds):
        for d in size.dimensions:
            jobs += [make("vectors", seed, m, features=d) for m in (n, size.small)]
        jobs += [make("pixels", seed, m) for m in (n, size.small)]
        jobs += [make(exact, seed, size.small) for exact in ("kernel ridge", "SVM")]
        for way in ways.values():
            jobs.append(make(seed=seed, n=size.middle, **way))
        for m in (*size.counts, n):
            jobs += [make(seed=seed, n=m, **ways[name]) for name in RIVALS]
        for variant in VARIANTS:
            jobs += [make(seed=seed, n=size.middle, variant=variant, **ways[k]) for k in RIVALS]
    # What several questions ask is fitted once; the longest first, so that all end together.
    return sorted(dict.fromkeys(jobs), key=lambda job: -job.n * (1 + job.features * job.grid**2))


def _tagged(row: study.Row) -> dict[str, float]:
    """For TensorBoard: what is measured, under a name that only the seeds share."""
    if row["contestant"] == "kernel":
        return {f"kernel error/D {row['features']}": row["mean_error"]}
    kind = " ".join(str(row[key]) for key in ("contestant", "features", "grid", "pooling")
                    if row[key])  # fmt: skip
    return {f"accuracy of {kind}/n {row['n']} {row['variant']}": row["accuracy"]}


# The contestants that are held against one another in questions 4 and 5.
POOLED = "patches, 4×4 Gaussian"
UNPOOLED, SAME_LIFT = "patches, no pooling", "no pooling's filters, 4×4 Gaussian"
RIVALS = ("vectors", POOLED, "CNN")


def _ways(D: int) -> dict[str, dict[str, Any]]:
    """What is compared under shifts: about D numbers an image, but for SAME_LIFT and the CNN."""

    def patches(grid: int, pooling: str, features: int = 0) -> dict[str, Any]:
        return {"contestant": "patches", "features": features or D // grid**2, "grid": grid,
                "pooling": pooling}  # fmt: skip

    return {
        "vectors": {"contestant": "vectors", "features": D},
        UNPOOLED: patches(12, "average"),
        SAME_LIFT: patches(4, "gaussian", D // 12**2),
        "patches, 4×4 average": patches(4, "average"),
        "patches, 2×2 average": patches(2, "average"),
        POOLED: patches(4, "gaussian"),
        "network": {"contestant": "network", "features": D // 16, "grid": 4, "pooling": "gaussian"},
        "CNN": {"contestant": "CNN"},
    }


# --- one contestant, one row ---


def contest(job: Job) -> study.Row:
    """Fits the contestant and reads the test split once: plain, and for some questions shifted."""
    data = _data(job)
    began = time.perf_counter()
    with torch.no_grad():
        predict, about = CONTESTANTS[job.contestant](job, data)
        seconds = time.perf_counter() - began
        row = {
            "contestant": job.contestant, "seed": job.seed, "n": len(data.train),
            "variant": job.variant, "features": job.features, "grid": job.grid,
            "pooling": job.pooling, **about, "seconds": seconds,
            "validation_accuracy": _accuracy(predict, data, data.validation),
            "accuracy": _accuracy(predict, data, data.test),
        }  # fmt: skip
        size = SMOKE if job.options.smoke else FULL
        if job.n == size.middle and job.variant == "plain":
            for d in (0, *SHIFTS):
                row[f"accuracy_shift_{d}"] = _accuracy(predict, _shifted(data, d), data.test[::4])
    return row


def _pixels(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    return _ridge(lambda x: x.flatten(1), data, STRENGTHS["pixels"]), {}


def _vectors(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    sigma = _sigma_of_vectors(data, job.seed)
    lift = RandomFourierFeatures(data.images[0].numel(), job.features, sigma, job.seed)
    predict = _ridge(lambda x: lift(x.flatten(1)), data, STRENGTHS["vectors"])
    return predict, {"sigma": sigma, "lifted": job.features, "pooled": job.features}


def _patches(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    lift = RandomFourierFeatures2d(
        1, job.features, data.images.shape[-1], PATCH, _sigma_of_patches(data, job.seed), STRIDE,
        grid=job.grid, pooling=job.pooling, seed=job.seed,
    )  # fmt: skip
    predict = _ridge(lambda x: lift(x).flatten(1), data, STRENGTHS["patches"])
    return predict, {"sigma": lift.sigma, "lifted": lift.lifted, "pooled": lift.pooled}


def _kernel_ridge(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    """The limit of `_vectors` for D → ∞: (K + λ I) α = Y, with k + 1 for features and constant."""
    sigma = _sigma_of_vectors(data, job.seed)
    x, y = data.batch(data.train, torch.float64)
    x = x.flatten(1)

    def kernel(other: Tensor) -> Tensor:
        distances = torch.cdist(other.flatten(1).double(), x)
        return torch.exp(-(distances**2) / (2 * sigma**2)) + 1

    # An example's features are of mean square 2: k(x, x) + 1.
    return _solved(kernel, kernel(x), _targets(y), 2 * STRENGTHS[job.contestant]), {"sigma": sigma}


def _svm(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    from sklearn.svm import SVC

    sigma = _sigma_of_vectors(data, job.seed)
    x, y = data.batch(data.train)
    machine = SVC(C=COST, gamma=1 / (2 * sigma**2)).fit(x.flatten(1).numpy(), y.numpy())

    def predict(images: Tensor) -> Tensor:
        return F.one_hot(torch.from_numpy(machine.predict(images.flatten(1).numpy())), 10)

    return predict, {"sigma": sigma}


def _trained(job: Job, data: ImageData) -> tuple[Predict, dict[str, Any]]:
    """By gradient: the CNN, or the kernel network."""
    torch.manual_seed(job.seed)
    about: dict[str, Any] = {}
    model: Any = models.CNN()
    if job.contestant == "network":
        sigma = _sigma_of_patches(data, job.seed)
        model = models.KernelNetwork(job.features, PATCH, STRIDE, job.grid, job.pooling, sigma,
                                     job.seed)  # fmt: skip
        about = {"sigma": sigma, "lifted": model.features.lifted, "pooled": model.features.pooled}
    lr, decay = RATES[job.contestant]
    per_epoch = steps_per_epoch(len(data.train), BATCH)
    epochs = 1 if job.options.smoke else max(EPOCHS, math.ceil(STEPS / per_epoch))
    optimizer = make_optimizer("adam", model.parameters(), lr, decay)
    schedule = make_schedule("one-cycle", optimizer, lr, epochs * per_epoch)
    with torch.enable_grad():
        fit(model, ENGINES["autograd"], optimizer, schedule, data,
            epochs=epochs, batch_size=BATCH, seed=job.seed)  # fmt: skip
    return model.eval(), about | {"epochs": epochs}


CONTESTANTS: dict[str, Callable[[Job, ImageData], tuple[Predict, dict[str, Any]]]] = {
    "pixels": _pixels, "vectors": _vectors, "patches": _patches,
    "kernel ridge": _kernel_ridge, "SVM": _svm, "CNN": _trained, "network": _trained,
}  # fmt: skip


# --- ridge regression ---


def _ridge(lift: Predict, data: ImageData, strength: float) -> Predict:
    """Least squares from the features, and a constant, to the one-hot labels: closed form.

    Products of blocks in float32, sums and solution in float64; of the symmetric Gram matrix only
    the lower triangle, which is what a Cholesky decomposition reads.
    """

    def features(images: Tensor) -> Tensor:
        z = torch.cat([lift(part) for part in images.split(100)])  # what fits in a core's cache
        return torch.cat([z, z.new_ones(len(z), 1)], 1)

    gram = cross = torch.zeros(0)
    for indices in data.train.split(4000):
        images, labels = data.batch(indices)
        z, y = features(images), _targets(labels)
        if not len(gram):
            gram, cross = (
                torch.zeros(z.shape[1], k, dtype=torch.float64) for k in (z.shape[1], 10)
            )
        for first in range(0, len(gram), 1024):
            gram[first:, first : first + 1024] += z[:, first:].T @ z[:, first : first + 1024]
        cross += z.double().T @ y
    unit = gram.trace().item() / len(data.train)
    return _solved(features, gram, cross, strength * unit)


def _solved(features: Predict, gram: Tensor, cross: Tensor, ridge: float) -> Predict:
    """The prediction features · weight, with (gram + ridge I) weight = cross."""
    gram.diagonal().add_(ridge)
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))

    def predict(images: Tensor) -> Tensor:
        z = features(images)
        return z @ weight.to(z.dtype)

    return predict


def _targets(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 10).double() - 0.1


# --- data ---


@functools.cache
def _loaded(name: str, root: Path | None) -> ImageData:
    return images_of.load(name, root, say=lambda line: None)


def _data(job: Job) -> ImageData:
    """n digits for training, as many of each class if not all; every split in the variant."""
    data = _loaded((SMOKE if job.options.smoke else FULL).data, job.options.data_root)
    if job.n < len(data.train):
        data = images_of.subset(data, job.n, job.seed)
    if job.variant == "plain":
        return data
    images = data.images.clone()
    for number, split in enumerate((data.train, data.validation, data.test)):
        # Apart, so that no piece of a test digit lies beside a training digit.
        images[split] = VARIANTS[job.variant](images[split], 3 * job.seed + number)
    mean, std = mean_and_std(images[data.train])
    return replace(data, images=images, mean=mean, std=std)


def _shifted(data: ImageData, d: int) -> ImageData:
    """Every fourth test digit moved by d pixels, up, down, left or right."""
    images = data.images.clone()
    for number, (down, right) in enumerate([(-d, 0), (d, 0), (0, -d), (0, d)]):
        part = data.test[4 * number :: 16]
        images[part] = images_of.shift(images[part], down, right)
    return replace(data, images=images)


def _accuracy(predict: Predict, data: ImageData, indices: Tensor) -> float:
    right = 0
    for part in indices.split(1000):
        images, labels = data.batch(part)
        right += int((predict(images).argmax(1) == labels).sum())
    return right / len(indices)


def _sigma_of_vectors(data: ImageData, seed: int) -> float:
    return median_distance(_some(data, seed), seed=seed) / 2


def _sigma_of_patches(data: ImageData, seed: int) -> float:
    return median_distance(random_patches(_some(data, seed), PATCH, 20_000, seed), seed=seed) / 2


def _some(data: ImageData, seed: int) -> Tensor:
    """5,000 random training digits, or all; the training split may be in any order."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return data.batch(data.train[order[:5000]])[0]


# --- the kernel's own error ---


def kernel_error(job: Job) -> study.Row:
    """How far z·z' is from the kernel, over pairs of training digits."""
    data = _data(job)
    sigma = _sigma_of_vectors(data, job.seed)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(job.seed))
    pairs = min(PAIRS, len(order) // 2)
    x, y = (data.batch(data.train[part], torch.float64)[0].flatten(1)
            for part in (order[:pairs], order[pairs : 2 * pairs]))  # fmt: skip
    lift = RandomFourierFeatures(x.shape[1], job.features, sigma, job.seed, dtype=torch.float64)
    k = torch.exp(-((x - y) ** 2).sum(1) / (2 * sigma**2))
    error = ((lift(x) * lift(y)).sum(1) - k).abs()
    derived = (1 + k**4 / 2 - k**2) / job.features
    return {
        "contestant": "kernel", "seed": job.seed, "features": job.features, "sigma": sigma,
        "pairs": pairs, "mean_error": error.mean().item(), "largest_error": error.max().item(),
        "root_mean_square": error.square().mean().sqrt().item(),
        "derived": derived.mean().sqrt().item(),
    }  # fmt: skip


# --- what the rows come to ---


@dataclass(frozen=True)
class Found:
    """The rows, and how to ask them."""

    rows: list[study.Row]
    kernel_rows: list[study.Row]
    size: Size
    n: int
    seeds: int

    @property
    def ways(self) -> dict[str, dict[str, Any]]:
        return _ways(self.size.dimensions[-2])

    def errors(
        self, way: dict[str, Any], n: int, variant: str = "plain", shift: int | None = None
    ) -> list[float]:
        """The error of every seed, in the order of the seeds; of a quarter if there is a shift."""
        wanted = {"features": 0, "grid": 0, "pooling": "", **way, "n": n, "variant": variant}
        rows = [row for row in self.rows if all(row[key] == wanted[key] for key in wanted)]
        assert [row["seed"] for row in sorted(rows, key=lambda row: row["seed"])] == list(
            range(self.seeds)
        )
        key = "accuracy" if shift is None else f"accuracy_shift_{shift}"
        return [1 - row[key] for row in sorted(rows, key=lambda row: row["seed"])]

    def vectors(self, d: int, n: int) -> list[float]:
        return self.errors({"contestant": "vectors", "features": d}, n)

    def shifted(self, name: str, d: int) -> list[float]:
        return self.errors(self.ways[name], self.size.middle, shift=d)

    def loss(self, name: str, d: int) -> list[float]:
        """What a shift by d pixels adds to the error."""
        return evidence.differences(self.shifted(name, d), self.shifted(name, 0))

    def gap(self, name: str, n: int, variant: str = "plain") -> list[float]:
        """How much more it errs than the CNN."""
        own, cnn = (self.errors(self.ways[k], n, variant) for k in (name, "CNN"))
        return evidence.differences(own, cnn)

    def of_kernel(self, d: int, key: str) -> list[float]:
        rows = [row for row in self.kernel_rows if row["features"] == d]
        return [row[key] for row in sorted(rows, key=lambda row: row["seed"])]

    def ratios(self) -> list[float]:
        """Of the root mean square error to the derived deviation: the mean over D, every seed."""
        by_dimension = [
            [rms / derived for rms, derived in zip(self.of_kernel(d, "root_mean_square"),
                                                   self.of_kernel(d, "derived"), strict=True)]
            for d in self.size.pairs_of
        ]  # fmt: skip
        return [statistics.fmean(ratios) for ratios in zip(*by_dimension, strict=True)]

    def slopes(self) -> list[float]:
        """Of log mean error against log D, for every seed."""
        by_seed = zip(*(self.of_kernel(d, "mean_error") for d in self.size.pairs_of), strict=True)
        return [float(np.polyfit(np.log(self.size.pairs_of), np.log(errors), 1)[0])
                for errors in by_seed]  # fmt: skip


def _told(errors: Sequence[float]) -> str:
    return evidence.spread([100 * error for error in errors])


def _tables(found: Found) -> dict[str, list[dict[str, Any]]]:
    size, n, ways = found.size, found.n, found.ways
    exact = {"exact kernel ridge": "kernel ridge", "exact kernel SVM": "SVM"}
    dimension = [
        {"features": "the pixels themselves",
         **{f"error %, n = {m:,}": _told(found.errors({"contestant": "pixels"}, m))
            for m in (n, size.small)}},
        *[{"features": f"vectors, D = {d:,}",
           **{f"error %, n = {m:,}": _told(found.vectors(d, m)) for m in (n, size.small)}}
          for d in size.dimensions],
        *[{"features": name, f"error %, n = {n:,}": "–",
           f"error %, n = {size.small:,}": _told(found.errors({"contestant": key}, size.small))}
          for name, key in exact.items()],
    ]  # fmt: skip
    kernel = [
        {"D": d, **{name: f"{statistics.fmean(found.of_kernel(d, key)):.4f}" for name, key in
                    [("mean error", "mean_error"), ("largest", "largest_error"),
                     ("root mean square", "root_mean_square"), ("derived", "derived")]}}
        for d in size.pairs_of
    ]  # fmt: skip
    shifts = []
    for name, way in ways.items():
        row = next(r for r in found.rows if all(r[key] == way[key] for key in way))
        shifts.append({
            "contestant": name, "lifted": row.get("lifted", "–"), "pooled": row.get("pooled", "–"),
            **{f"error %, {d} px": _told(found.shifted(name, d)) for d in (0, *SHIFTS)},
        })  # fmt: skip
    data = [
        {"contestant": name,
         **{f"error %, n = {m:,}": _told(found.errors(ways[name], m)) for m in (*size.counts, n)}}
        for name in RIVALS
    ] + [
        {"contestant": f"{name}: points more than the CNN",
         **{f"error %, n = {m:,}": _told(found.gap(name, m)) for m in (*size.counts, n)}}
        for name in RIVALS[:2]
    ]  # fmt: skip
    harder = [
        {"contestant": name, **{f"error %, {v}": _told(found.errors(ways[name], size.middle, v))
                                for v in VARIANTS}}
        for name in RIVALS
    ]  # fmt: skip
    return {
        "1. Error against the dimension": dimension,
        "2. The kernel's own error": kernel,
        f"3. A quarter of the test digits, shifted, n = {size.middle:,}": shifts,
        "4. Error against the number of training digits": data,
        f"5. Harder digits, n = {size.middle:,}": harder,
    }


def _claims(found: Found) -> list[evidence.Claim]:
    size, n, ways = found.size, found.n, found.ways
    first, *_, last = size.dimensions
    least, most, between = min(size.counts), n, evidence.between

    def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
        """Points that a is less than b, for every seed."""
        return [100 * x for x in evidence.differences(b, a)]

    exact = found.errors({"contestant": "kernel ridge"}, size.small)
    near, far = (less(exact, found.vectors(d, size.small)) for d in (last, first))
    left, root = [a / b for a, b in zip(near, far, strict=True)], math.sqrt(first / last)
    claims = [
        between(f"error falls with D: points gained from D = {first:,} to {last:,}, n = {n:,}",
                None, less(found.vectors(last, n), found.vectors(first, n)), 0),
        between(f"error % at D = {last:,}, n = {n:,}, is 1.7 to 2.5 (our expectation of ridge on "
                "about 10,000 features)",
                None, [100 * error for error in found.vectors(last, n)], 1.7, 2.5),
        between(f"of the distance to exact kernel ridge, the share that is left from D = {first:,} "
                f"to {last:,}, n = {size.small:,}, is at most √({first}/{last}) = {root:.3f} (our "
                "bar; it would follow only if the excess error were linear in the kernel's error)",
                None, left, high=root),
        between(f"error at D = {last:,}, n = {size.small:,}, is at most ½ point above exact kernel "
                "ridge's (our bar)", None, near, high=0.5),
        between("mean error of the kernel falls as D to the power", -0.5, found.slopes(),
                -0.55, -0.45),
        between("root mean square error of the kernel / the derived deviation", 1.0, found.ratios(),
                0.9, 1.1),
    ]  # fmt: skip
    lift = f"equal lift, the same filters ({ways[UNPOOLED]['features']})"
    pooled = f"equal pooled dimension (about {size.dimensions[-2]:,}), unequal lift"
    claims += [
        between(f"{equal}: shifted by {d} px, points that {name} loses less than {other}",
                None, less(found.loss(name, d), found.loss(other, d)), 0)
        for equal, name, other in [(lift, SAME_LIFT, UNPOOLED), (pooled, POOLED, "vectors"),
                                   (pooled, POOLED, UNPOOLED)]
        for d in (2, 4)
    ]  # fmt: skip
    claims.append(
        between(f"needs much data: points that {POOLED} is farther behind the CNN at n = "
                f"{least:,} than at {most:,}", None,
                less(found.gap(POOLED, most), found.gap(POOLED, least)), 0)
    )  # fmt: skip
    claims += [
        between(f"struggles: points that the distance of {POOLED} to the CNN grows, {variant}",
                None, less(found.gap(POOLED, size.middle), found.gap(POOLED, size.middle, variant)),
                0)
        for variant in list(VARIANTS)[1:]
    ]  # fmt: skip
    claims.append(
        between(f"on clutter, points that {POOLED} errs less than vectors", None,
                less(*(found.errors(ways[k], size.middle, "on clutter")
                       for k in (POOLED, "vectors"))), 0)
    )  # fmt: skip
    if size is SMOKE:
        claims = [replace(claim, published=None) for claim in claims]
    return claims


def _examples(data: ImageData) -> Tensor:
    """A row of five digits for every variant, in one image."""
    digits = data.images[data.train[:400]]
    rows = [torch.cat(list(make(digits, 0)[:5, 0]), 1) for make in VARIANTS.values()]
    return torch.cat(rows, 0)


def _picture(found: Found, pictures: Tensor, name: str) -> figures.Figure:
    size, n, ways = found.size, found.n, found.ways

    def line(points: dict[Any, list]) -> list[tuple[Any, float, float]]:
        return [figures.point(x, values) for x, values in points.items()]

    panel = functools.partial(figures.Panel, y="test error", percent=True)
    levels = {
        f"{label}, n = {m:,}": statistics.fmean(found.errors({"contestant": key}, m))
        for label, key, m in [("pixels", "pixels", n), ("exact ridge", "kernel ridge", size.small),
                              ("exact SVM", "SVM", size.small)]
    }  # fmt: skip
    dimension = {
        label: line({d: found.vectors(d, m) for d in size.dimensions})
        for label, m in [("vectors", n), (f"vectors, n = {size.small:,}", size.small)]
    }
    kernel = {
        label: line({d: found.of_kernel(d, key) for d in size.pairs_of})
        for label, key in [("root mean square", "root_mean_square"), ("derived", "derived")]
    }  # fmt: skip
    shifted = {
        name: line({d: found.shifted(name, d) for d in (0, *SHIFTS)})
        for name in ways if name != "network"
    }  # fmt: skip
    counts = {k: line({m: found.errors(ways[k], m) for m in (*size.counts, n)}) for k in RIVALS}
    harder = {k: line({v: found.errors(ways[k], size.middle, v) for v in VARIANTS}) for k in RIVALS}
    return figures.side_by_side(
        [
            panel("More features: towards the exact kernel", "features D", lines=dimension,
                  log="xy", levels=levels),
            panel("The kernel's own error falls as D$^{−½}$", "features D", y="|z·z' − k|",
                  lines=kernel, log="xy", percent=False),
            panel(f"Tolerance to shifts (n = {size.middle:,})", "shift, pixels", lines=shifted,
                  log="y"),
            panel("How much data it needs", "training digits", lines=counts, log="xy"),
            panel(f"Harder digits (n = {size.middle:,})", lines=harder, log="y"),
            panel("Plain, rotated, on noise, on clutter", image=pictures),
        ],
        f"Lift by a kernel, then pool: {name}, {found.seeds} seeds, mean ± sd",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(study.command(Options, __doc__, conduct))
