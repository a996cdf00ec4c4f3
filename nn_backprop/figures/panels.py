"""Figures of several panels, as the studies draw them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nn_backprop.figures.style import LINES, MARKS, SIGNS, as_array, blank, legend, log_ticks, tiled

Point = tuple[float | str, float, float | tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One of `side_by_side`: a line a name through its points (x, mean, deviation), or an image.

    A deviation may be two numbers, how far an interval reaches below and above y. An x may be a
    word; then the points of different names stand beside one another and are not joined, and more
    than three words are slanted, unless some have two lines. `log` names the logarithmic axes: "x",
    "y" or "xy". With `percent`, y is a share. `levels` are horizontal lines to be held against.
    `image` (H, W) is uint8.
    """

    title: str
    x: str = ""
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    log: str = ""
    percent: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    image: Any = None


def point(x: float | str, values: Collection[float]) -> tuple[float | str, float, float]:
    """A point of a Panel: mean and standard deviation of two or more values."""
    return x, statistics.fmean(values), statistics.stdev(values)


def side_by_side(parts: Sequence[Panel], title: str) -> Figure:
    """Up to three panels a row. A name has the same colour and mark wherever it occurs."""
    rows, columns = math.ceil(len(parts) / 3), min(3, len(parts))
    figure = blank(5 * columns, 0.5 + 4 * rows, title)
    draw_panels(figure.subplots(rows, columns, squeeze=False).ravel(), parts)
    return figure


def weights_over_time(
    rows: Mapping[str, Mapping[str, Any]], parts: Sequence[Panel], title: str
) -> Figure:
    """The weights of several networks at several moments, as images; below, one to three panels.

    `rows` gives each network its weights (units, H, W), at most 64 units, by the moment's name; the
    moments are the same for all. White is zero; each picture has a scale of its own, written below
    it, for weights grow.
    """
    moments = list(next(iter(rows.values())))
    figure = blank(2.7 * len(moments) + 0.6, 2.2 * len(rows) + 4.7, title)
    above, below = figure.subfigures(2, 1, False, height_ratios=(2.2 * len(rows), 4))[:, 0]
    pictures = above.subplots(len(rows), len(moments), squeeze=False)
    shades = SIGNS.resampled(15)  # of 256, noise would make a file half as large again
    for line, (name, by_moment) in zip(pictures, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axes, weight in zip(line, by_moment.values(), strict=True):
            grid, largest = tiled(as_array(weight).astype(float))
            axes.imshow(grid, cmap=shades, vmin=-largest, vmax=largest, interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=f"± {largest:.2g}")
            axes.spines[:].set_visible(False)
    for axes, moment in zip(pictures[0], moments, strict=True):
        axes.set_title(moment)
    draw_panels(below.subplots(1, len(parts), squeeze=False).ravel(), parts)
    return figure


def draw_panels(grid: np.ndarray, parts: Sequence[Panel]) -> None:
    """Draws each part in its axes; axes that are left over stay empty."""
    names = list(dict.fromkeys(name for part in parts for name in part.lines))
    for axes in grid[len(parts) :]:
        axes.set_axis_off()
    for axes, part in zip(grid, parts, strict=False):
        axes.set(title=part.title, xlabel=part.x, ylabel=part.y)
        if part.image is not None:
            axes.imshow(as_array(part.image), cmap="gray_r", vmin=0, vmax=255)
            axes.set_axis_off()
            continue
        words = list(dict.fromkeys(
            x for points in part.lines.values() for x, *_ in points if isinstance(x, str)
        ))  # fmt: skip
        for place, (name, points) in enumerate(part.lines.items(), 1):
            places, means, deviations = zip(*points, strict=True)
            number = names.index(name) % len(LINES)
            if words:  # marks beside one another, lest they hide each other
                shift = 0.6 * (place / (len(part.lines) + 1) - 0.5)
                places = tuple(words.index(word) + shift for word in places)
            axes.errorbar(places, means, np.transpose(deviations), color=LINES[number], capsize=3,
                          marker=MARKS[number], markersize=5,
                          linestyle="none" if words else "-", label=name)  # fmt: skip
        if words:
            two_lines = any("\n" in word for word in words)
            slope, end = (30, "right") if len(words) > 3 and not two_lines else (0, "center")
            axes.set_xticks(range(len(words)), words, rotation=slope, ha=end)
        for number, (name, level) in enumerate(part.levels.items()):
            style = ("--", ":", "-.")[number % 3]
            axes.axhline(level, color="0.3", linestyle=style, linewidth=1, label=name)
        if "x" in part.log:
            axes.set_xscale("log")
            marked = sorted({float(x) for points in part.lines.values() for x, *_ in points})
            crowded = len(marked) > 10 or any(b < 1.2 * a for a, b in pairwise(marked))
            measured = any(x != float(f"{x:.4g}") and x % 1 for x in marked)
            axes.tick_params("x", rotation=30 * (crowded or len(marked) > 5))
            if crowded or measured:
                log_ticks(axes.xaxis)
            else:
                axes.set_xticks(marked, [f"{x:,.12g}" for x in marked])
                axes.xaxis.set_minor_formatter(NullFormatter())
        if "y" in part.log:
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        scale, unit = (100, " %") if part.percent else (1, "")
        axes.yaxis.set_major_formatter(lambda y, _, s=scale, u=unit: f"{s * y:g}{u}")
        axes.margins(x=0.08)
        legend(axes)
