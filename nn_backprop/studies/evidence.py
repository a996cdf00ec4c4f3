"""What a study found: claims with verdicts and intervals, and the cells of its tables."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["reproduced", "not reproduced", "undecided"]


@dataclass(frozen=True)
class Claim:
    """A statement, published or promised, and what we measured of it."""

    claim: str
    published: float | str | None
    measured: float
    interval: tuple[float, float]  # 95 %, of the mean over seeds or of what else is measured
    verdict: Verdict


def at_least(claim: str, published: float, values: Collection[float]) -> Claim:
    """The claim that the mean of what `values` were drawn from is `published` or more."""
    return between(claim, published, values, low=published)


def between(
    claim: str,
    published: float | str | None,
    values: Collection[float],
    low: float = -math.inf,
    high: float = math.inf,
) -> Claim:
    """The claim that the mean of what `values` were drawn from lies from `low` to `high`.

    Reproduced if the whole 95 % interval of the mean lies there, not reproduced if none of it does,
    else undecided. For a claim about two groups, `values` are the differences of each seed.
    """
    return judged(claim, published, statistics.fmean(values), interval(values), low, high)


def median_between(
    claim: str,
    published: float | str | None,
    values: Collection[float],
    low: float = -math.inf,
    high: float = math.inf,
) -> Claim:
    """The same of the median, for ratios of times; of at least six values."""
    middle = statistics.median(values)
    return judged(claim, published, middle, median_interval(values), low, high)


def counted(
    claim: str,
    published: float | str | None,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> Claim:
    """The same of a count, which has no spread: its interval is one number."""
    return judged(claim, published, value, (value, value), low, high)


def judged(
    claim: str,
    published: float | str | None,
    measured: float,
    interval: tuple[float, float],
    low: float = -math.inf,
    high: float = math.inf,
) -> Claim:
    """The same of anything that comes with an interval of its own."""
    least, most = interval
    verdict: Verdict = "undecided"
    if low <= least and most <= high:
        verdict = "reproduced"
    elif most < low or high < least:
        verdict = "not reproduced"
    return Claim(claim, published, measured, interval, verdict)


def one_of(claim: str, published: float, values: Collection[float]) -> Claim:
    """The claim that `published`, found once, could be one more of what `values` were drawn from.

    For a figure that is not a mean. The interval is the 95 % prediction interval of one more value,
    mean ± t s √(1 + 1/n), wider than `interval` by √(n + 1). Reproduced if it holds `published`,
    else not reproduced: the fewer and the more scattered our values, the easier.
    """
    mean = statistics.fmean(values)
    half = (interval(values)[1] - mean) * (len(values) + 1) ** 0.5
    verdict: Verdict = "reproduced" if abs(published - mean) <= half else "not reproduced"
    return Claim(claim, published, mean, (mean - half, mean + half), verdict)


def interval(values: Collection[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two or more normally distributed values.

    mean ± t s/√n, with the standard deviation s (of n − 1) and the quantile t of n − 1 degrees.
    Raises ValueError for fewer than two values.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs two values or more, not {n}")
    # As t.interval, which rounds in another order: committed claims are equal to the last digit.
    mean, quantile = statistics.fmean(values), float(t.ppf(0.975, n - 1))
    half = quantile * statistics.stdev(values) / n**0.5
    return mean - half, mean + half


def median_interval(values: Collection[float]) -> tuple[float, float]:
    """A 95 % interval of the median of what independent values, at least six, were drawn from.

    From the k-th smallest to the k-th largest, whatever the distribution: a value is below the
    median with probability ½, and the k-th smallest misses it only if fewer than k values are; k is
    the largest for which that happens in at most 2.5 % of all cases. Likewise at the other end.
    Raises ValueError for fewer values: all five are on one side in 6 % of all cases.
    """
    from scipy.stats import quantile_test

    if len(values) < 6:
        raise ValueError(f"an interval of a median needs six values or more, not {len(values)}")
    low, high = quantile_test(list(values)).confidence_interval(0.95)
    return float(low), float(high)


def bootstrap_interval(
    statistic: Callable[..., Any], *samples: Collection[float]
) -> tuple[float, float]:
    """A 95 % interval of what is neither a mean nor a median: a spread, a correlation, a ratio.

    `samples` have the same seeds in the same order, and `statistic` takes arrays (..., n) of them
    and gives (...). n of the n seeds are drawn with replacement, the same ones from each sample,
    10,000 times; the interval holds the middle 95 % of the statistics. Of few values it is too
    narrow: raises ValueError for fewer than 20, or if the samples are not equally many.

    Source: Efron & Tibshirani 1993, An introduction to the bootstrap, chapter 13 (percentiles).
    """
    import numpy as np
    from scipy.stats import bootstrap

    n = len(samples[0])
    if n < 20 or any(len(sample) != n for sample in samples):
        sizes = ", ".join(str(len(sample)) for sample in samples)
        raise ValueError(f"a bootstrap needs 20 values or more, equally many each, not {sizes}")
    drawn = bootstrap(
        samples, lambda *drawn, axis: statistic(*drawn), n_resamples=10_000, paired=True,
        vectorized=True, method="percentile", rng=np.random.default_rng(0),
    ).bootstrap_distribution  # fmt: skip
    # The quantiles are taken here: scipy's own differ in the last digit of a float64.
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


# --- Cells of a table ---------------------------------------------------------------------------


def mean_sd(values: Collection[float], sign: str = "", digits: int = 2) -> str:
    """Mean ± standard deviation of two or more values; sign "+" shows a plus, too."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:{sign}.{digits}f} ± {deviation:.{digits}f}"


def mean_interval(values: Collection[float], form: str = ",.0f") -> str:
    """The mean, and in brackets its 95 % interval."""
    low, high = interval(values)
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


def quartiles(values: Collection[float]) -> str:
    """The median, and in brackets the quartiles."""
    low, middle, high = quartile_values(values)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def quartile_values(values: Collection[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third of two or more values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, all with the keys of the first, as a Markdown table; values as `str` shows them."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
