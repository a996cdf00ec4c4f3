"""What does a lift by a kernel buy, and what does pooling after it?

    python experiments/kernel_pooling.py              # MNIST, tens of minutes on two cores
    python experiments/kernel_pooling.py --smoke      # the embedded digits, seconds

What is compared, and what came out: results/kernel_pooling/README.md.
"""

import functools
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from nn_backprop import data as images_of
from nn_backprop import figures, studies
from nn_backprop.models.kernel_machines import kernel_errors, share_right
from nn_backprop.studies import Claim, Row, Rows
from nn_backprop.studies.kernel_contestants import EXACT, SHIFTS, VARIANTS, fitted

# Held against one another in questions 4 and 5; and against no pooling, at equal lift.
POOLED = "patches, 4×4 Gaussian"
UNPOOLED, SAME_LIFT = "patches, no pooling", "no pooling's filters, 4×4 Gaussian"
RIVALS = ("vectors", POOLED, "CNN")
EXAMPLES = "examples.npy"  # digits of every variant, one picture
OWN = (("mean error", "mean_error"), ("largest", "largest_error"),
       ("root mean square", "root_mean_square"), ("derived", "derived"))  # fmt: skip


@dataclass(frozen=True)
class Options(studies.Options):
    """Error, tolerance to shifts, need of data and limits of random kernel features."""


class Size(NamedTuple):  # of the study
    dimensions: tuple[int, ...]  # of vectors; the last but one is that of the other questions, too
    pairs_of: tuple[int, ...]  # dimensions at which the kernel's own error is measured
    small: int  # training digits of the exact machines
    middle: int  # of the questions about shifts and harder digits
    counts: tuple[int, ...]  # of the learning curve; all of them come on top


FULL = Size((256, 1024, 4096, 8192), tuple(2**k for k in range(6, 15)), 5_000, 10_000,
            (100, 1_000, 10_000))  # fmt: skip
SMOKE = Size((32, 144, 288), (64, 256, 1024), 200, 300, (100, 300))


class Job(NamedTuple):  # one contestant, fitted to n digits; or "kernel", the error of its own
    contestant: str
    seed: int
    n: int
    options: Options
    variant: str = "plain"
    features: int = 0  # of a vector, or of a patch
    grid: int = 0
    pooling: str = ""


def collect(run: studies.StudyRun, options: Options) -> None:
    everything, size = studies.load_data(options), SMOKE if options.smoke else FULL
    n, seeds = len(everything.train), range(options.seeds)
    pairs = [Job("kernel", seed, n, options, features=d) for seed in seeds for d in size.pairs_of]
    run.train_all(contest, pairs + contests(size, n, options), tagged)
    digits = everything.images[everything.train[:400]]
    rows = [torch.cat(list(make(digits, 0)[:5, 0]), 1) for make in VARIANTS.values()]
    np.save(run.folder / EXAMPLES, torch.cat(rows, 0).numpy())


def contests(size: Size, n: int, options: Options) -> list[Job]:
    by_name, make, both = ways(size), functools.partial(Job, options=options), (n, size.small)
    jobs: list[Job] = []
    for seed in range(options.seeds):
        jobs += [make("vectors", seed, m, features=d) for d in size.dimensions for m in both]
        jobs += [make("pixels", seed, m) for m in both]
        jobs += [make(exact, seed, size.small) for exact in EXACT.values()]
        jobs += [make(seed=seed, n=size.middle, **way) for way in by_name.values()]
        jobs += [make(seed=seed, n=m, **by_name[k]) for m in (*size.counts, n) for k in RIVALS]
        jobs += [make(seed=seed, n=size.middle, variant=v, **by_name[k])
                 for v in VARIANTS for k in RIVALS]  # fmt: skip
    # What several questions ask is fitted once; the longest first, so that all end together.
    return sorted(dict.fromkeys(jobs), key=lambda job: -job.n * (1 + job.features * job.grid**2))


def tagged(row: Row) -> dict[str, float]:  # for TensorBoard: only the seeds share a name
    if row["contestant"] == "kernel":
        return {f"kernel error/D {row['features']}": row["mean_error"]}
    kind = " ".join(str(row[k]) for k in ("contestant", "features", "grid", "pooling") if row[k])
    return {f"accuracy of {kind}/n {row['n']} {row['variant']}": row["accuracy"]}


def ways(size: Size) -> dict[str, dict[str, Any]]:
    """What is compared under shifts: about D numbers an image, but for SAME_LIFT and the CNN."""
    D = size.dimensions[-2]
    best = {"contestant": "patches", "features": D // 16, "grid": 4, "pooling": "gaussian"}
    return {
        "vectors": {"contestant": "vectors", "features": D},
        UNPOOLED: best | {"features": D // 144, "grid": 12, "pooling": "average"},
        SAME_LIFT: best | {"features": D // 144},
        "patches, 4×4 average": best | {"pooling": "average"},
        "patches, 2×2 average": best | {"features": D // 4, "grid": 2, "pooling": "average"},
        POOLED: best,
        "network": best | {"contestant": "network"},
        "CNN": {"contestant": "CNN"},
    }


def contest(job: Job) -> Row:
    """Fits the contestant and reads the test split once: plain, and for some questions shifted."""
    data, size = studies.load_data(job.options), SMOKE if job.options.smoke else FULL
    if job.contestant == "kernel":  # over pairs of training digits
        found = kernel_errors(data, job.features, job.seed)
        return {"contestant": "kernel", "seed": job.seed, "features": job.features, **found}
    data = images_of.subset(data, job.n, job.seed)  # as many of each class
    if job.variant != "plain":
        data = images_of.varied(data, VARIANTS[job.variant], job.seed)
    began = time.perf_counter()
    with torch.no_grad():
        how = job.features, job.grid, job.pooling, job.options.smoke
        predict, about = fitted(job.contestant, data, job.seed, *how)
        row = job._asdict() | about | {
            "seconds": time.perf_counter() - began,
            "validation_accuracy": share_right(predict, data, data.validation),
            "accuracy": share_right(predict, data, data.test),
        }  # fmt: skip
        del row["options"]
        if job.n == size.middle and job.variant == "plain":
            for d in (0, *SHIFTS):
                moved = images_of.quarter_shifted(data, d)
                row[f"accuracy_shift_{d}"] = share_right(predict, moved, data.test[::4])
    return row


# --- What the rows come to ----------------------------------------------------------------------


class Found:
    """The rows, and how to ask them. Errors are shares, of each seed."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.n = rows, max(row["n"] for row in rows.having("n"))
        self.size = FULL if self.n > FULL.middle else SMOKE
        kernel = rows.where(contestant="kernel").by("features")
        ds, ns, small = self.size.dimensions, (*self.size.counts, self.n), self.size.small
        self.ways: dict[Any, dict[str, Any]] = {**ways(self.size)}
        self.ways |= {kind: {"contestant": kind} for kind in ("pixels", *EXACT.values())}
        self.ways |= {d: {"contestant": "vectors", "features": d} for d in ds}
        self.own = {name: {d: of.values(key) for d, of in kernel.items()} for name, key in OWN}
        sizes = {"vectors": self.n, f"vectors, n = {small:,}": small}
        self.by_d = {name: {d: self.errors(d, m) for d in ds} for name, m in sizes.items()}
        self.moved = {k: {d: self.errors(k, key=f"accuracy_shift_{d}") for d in (0, *SHIFTS)}
                      for k in ways(self.size)}  # fmt: skip
        self.counts = {k: {m: self.errors(k, m) for m in ns} for k in RIVALS}
        self.behind = {f"{k}: points more than the CNN": {m: self.gap(k, m) for m in ns}
                       for k in RIVALS[:2]}  # fmt: skip
        self.harder = {k: {v: self.errors(k, variant=v) for v in VARIANTS} for k in RIVALS}

    def errors(self, way: Any, n: int = 0, variant: str = "plain", *, key: str = "") -> np.ndarray:
        """Of a name of `ways`, of an exact machine, or of so many features of vectors."""
        wanted = {"features": 0, "grid": 0, "pooling": "", "variant": variant, **self.ways[way]}
        own = self.rows.where(n=n or self.size.middle, **wanted)
        return own.values(lambda row: 1 - row[key or "accuracy"])

    def loss(self, name: str, d: int) -> np.ndarray:  # what a shift by d pixels adds
        return self.moved[name][d] - self.moved[name][0]

    def gap(self, name: str, n: int = 0, variant: str = "plain") -> np.ndarray:  # to the CNN
        return self.errors(name, n, variant) - self.errors("CNN", n, variant)


def claims(rows: Rows) -> list[Claim]:
    found, between = Found(rows), studies.between
    size, n, small = found.size, found.n, found.size.small
    (first, *_, last), (fewest, *_) = size.dimensions, size.counts
    exact, own = found.errors("kernel ridge", small), found.own
    near, far = (100 * (found.errors(d, small) - exact) for d in (last, first))
    root, logs = math.sqrt(first / last), [math.log(d) for d in size.pairs_of]
    # In Python's own arithmetic: that of a matrix library differs by machine.
    slopes = [statistics.linear_regression(logs, [math.log(error) for error in errors]).slope
              for errors in zip(*own["mean error"].values(), strict=True)]  # fmt: skip
    of_d = (own["root mean square"][d] / own["derived"][d] for d in size.pairs_of)
    ratios = [statistics.fmean(of_seed) for of_seed in zip(*of_d, strict=True)]
    lift = f"equal lift, the same filters ({found.ways[UNPOOLED]['features']})"
    pooled = f"equal pooled dimension (about {size.dimensions[-2]:,}), unequal lift"

    def gain(claim: str, shares: np.ndarray) -> Claim:
        return between(claim, None, 100 * shares, 0)

    judged = [
        gain(f"error falls with D: points gained from D = {first:,} to {last:,}, n = {n:,}",
             found.errors(first, n) - found.errors(last, n)),
        between(f"error % at D = {last:,}, n = {n:,}, is 1.7 to 2.5 (our expectation of ridge on "
                "about 10,000 features)", None, 100 * found.errors(last, n), 1.7, 2.5),
        between(f"of the distance to exact kernel ridge, the share that is left from D = {first:,} "
                f"to {last:,}, n = {small:,}, is at most √({first}/{last}) = {root:.3f} (our "
                "bar; it would follow only if the excess error were linear in the kernel's error)",
                None, near / far, high=root),
        between(f"error at D = {last:,}, n = {small:,}, is at most ½ point above exact kernel "
                "ridge's (our bar)", None, near, high=0.5),
        between("mean error of the kernel falls as D to the power", -0.5, slopes, -0.55, -0.45),
        between("root mean square error of the kernel / the derived deviation", 1.0, ratios,
                0.9, 1.1),
        *[gain(f"{equal}: shifted by {d} px, points that {name} loses less than {other}",
               found.loss(other, d) - found.loss(name, d))
          for equal, name, other in [(lift, SAME_LIFT, UNPOOLED), (pooled, POOLED, "vectors"),
                                     (pooled, POOLED, UNPOOLED)]
          for d in (2, 4)],
        gain(f"needs much data: points that {POOLED} is farther behind the CNN at n = "
             f"{fewest:,} than at {n:,}", found.gap(POOLED, fewest) - found.gap(POOLED, n)),
        *[gain(f"struggles: points that the distance of {POOLED} to the CNN grows, {variant}",
               found.gap(POOLED, variant=variant) - found.gap(POOLED))
          for variant in list(VARIANTS)[1:]],
        gain(f"on clutter, points that {POOLED} errs less than vectors",
             found.harder["vectors"]["on clutter"] - found.harder[POOLED]["on clutter"]),
    ]  # fmt: skip
    return judged if size is FULL else [replace(claim, published=None) for claim in judged]


def tables(rows: Rows) -> dict[str, studies.Table]:
    found = Found(rows)
    size, n, small = found.size, found.n, found.size.small

    def line(head: str, name: str, errors: dict[str, np.ndarray], **more: Any) -> Row:
        cells = {f"error %, {at}": studies.mean_sd(100 * of) for at, of in errors.items()}
        return {head: name, **more, **cells}

    ds: dict[Any, str] = {d: f"vectors, D = {d:,}" for d in size.dimensions}
    dimension = [line("features", name, {f"n = {m:,}": found.errors(way, m) for m in (n, small)})
                 for way, name in [("pixels", "the pixels themselves"), *ds.items()]]  # fmt: skip
    missing = {f"error %, n = {n:,}": "–"}
    dimension += [line("features", f"exact kernel {name}",
                       {f"n = {small:,}": found.errors(way, small)}, **missing)
                  for name, way in EXACT.items()]  # fmt: skip
    kernel = [{"D": d} | {name: f"{statistics.fmean(by[d]):.4f}" for name, by in found.own.items()}
              for d in size.pairs_of]  # fmt: skip
    shifts = []
    for name, by_d in found.moved.items():
        seen = {k: rows.where(**found.ways[name])[0].get(k, "–") for k in ("lifted", "pooled")}
        shifts.append(line("contestant", name, {f"{d} px": of for d, of in by_d.items()}, **seen))
    data = [line("contestant", name, {f"n = {m:,}": of for m, of in errors.items()})
            for name, errors in (found.counts | found.behind).items()]  # fmt: skip
    return {
        "1. Error against the dimension": dimension,
        "2. The kernel's own error": kernel,
        f"3. A quarter of the test digits, shifted, n = {size.middle:,}": shifts,
        "4. Error against the number of training digits": data,
        f"5. Harder digits, n = {size.middle:,}":
            [line("contestant", name, errors) for name, errors in found.harder.items()],
    }  # fmt: skip


def picture(rows: Rows) -> figures.Figure | None:
    if rows.folder is None or not (rows.folder / EXAMPLES).exists():
        return None
    found = Found(rows)
    size, n, small = found.size, found.n, found.size.small
    panel = functools.partial(figures.Panel, y="test error", percent=True)
    flat = {f"pixels, n = {n:,}": statistics.fmean(found.errors("pixels", n))}
    flat |= {f"exact {name}, n = {small:,}": statistics.fmean(found.errors(way, small))
             for name, way in EXACT.items()}  # fmt: skip
    kernel = {name: found.own[name] for name in ("root mean square", "derived")}
    by_d, own, moved, counts, harder = (
        {name: [figures.point(x, values) for x, values in by.items()] for name, by in of.items()}
        for of in (found.by_d, kernel, found.moved, found.counts, found.harder)
    )
    del moved["network"]
    D, middle = "features D", f"(n = {size.middle:,})"
    what = f"{'mnist' if size is FULL else 'digits'}, {len(found.errors('CNN'))} seeds, mean ± sd"
    return figures.side_by_side(
        [
            panel("More features: towards the exact kernel", D, lines=by_d, log="xy", levels=flat),
            panel("The kernel's own error falls as D$^{−½}$", D, y="|z·z' − k|", lines=own,
                  log="xy", percent=False),
            panel(f"Tolerance to shifts {middle}", "shift, pixels", lines=moved, log="y"),
            panel("How much data it needs", "training digits", lines=counts, log="xy"),
            panel(f"Harder digits {middle}", lines=harder, log="y"),
            panel("Plain, rotated, on noise, on clutter", image=np.load(rows.folder / EXAMPLES)),
        ],
        f"Lift by a kernel, then pool: {what}",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
