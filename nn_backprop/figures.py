"""Everything drawn with matplotlib.

Each function takes tensors or arrays and returns a Figure of its own, without pyplot and its global
state. Colours are told apart by colour-blind readers: blue against red through white for signs, one
hue for amounts, and for lines the ten colours of Petroff, "Accessible Color Sequences for Data
Visualization" (2021).
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

_DPI = 110
_LINES = [
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
]
_SIGNS = colormaps["RdBu_r"].with_extremes(bad="0.8")
_PERCENT = PercentFormatter(xmax=1, symbol=" %")


def weight_images(weight: Any, title: str) -> Figure:
    """The incoming weights of each unit as an image; white is zero, one scale for all.

    `weight` (units, H, W). At most 64 units are drawn; the title says so where some are left out.
    """
    weight, title = _first(_array(weight).astype(float), 64, title)
    grid, largest = _tiled(weight)
    figure = Figure(figsize=(7, 6.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(grid, cmap=_SIGNS, vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="weight", shrink=0.85)
    return figure


def weight_pixels(weight: Any, zoom: int = 3) -> np.ndarray:
    """What `weight_images` shows, as bare pixels: uint8 (height, width, 3), in about 2 ms.

    For pictures that are made often, such as one an epoch. `zoom` is the pixels to a weight.
    """
    weight, _ = _first(_array(weight).astype(float), 64, "")
    grid, largest = _tiled(weight)
    pixels = _SIGNS((grid / largest + 1) / 2, bytes=True)[..., :3]
    return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)


def confusion_matrix(counts: Any, class_names: Sequence[str]) -> Figure:
    """What was predicted for each true class.

    `counts` (K, K) integers, row = true class, column = predicted. The colour is the share of the
    row on a logarithmic scale, so that one mistake in a thousand shows; at the right of each row is
    the share that was right.
    """
    counts = _array(counts)
    classes = range(len(counts))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right, total = int(np.trace(counts)), int(counts.sum())

    side = 1.2 + 0.52 * len(counts)
    figure = Figure(figsize=(side + 2, side), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    scale = LogNorm(1e-4, 1, clip=True)
    drawn = axes.imshow(
        np.ma.masked_equal(share, 0), cmap=colormaps["Blues"].with_extremes(bad="white"), norm=scale
    )
    for row in classes:
        for column in classes:
            count, dark = int(counts[row, column]), share[row, column] > 0.02
            colour = "white" if dark else "black" if count else "0.75"
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(
        title=f"Confusion matrix: {right} of {total} right, {100 * right / max(total, 1):.2f} %",
        xlabel="predicted class",
        ylabel="true class",
    )
    axes.set_xticks(classes, class_names)
    axes.set_yticks(classes, class_names)
    margin = axes.secondary_yaxis("right")
    recalls = [f"{100 * share[k, k]:.1f} %" if counts[k].any() else "–" for k in classes]
    margin.set_yticks(classes, recalls)
    margin.set_ylabel("right, of the true class")
    margin.tick_params(length=0)
    bar = figure.colorbar(drawn, ax=axes, label="share of the true class (logarithmic)", shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    return figure


def mistakes(images: Any, labels: Any, predictions: Any, confidences: Any, title: str) -> Figure:
    """Images with what they are, what they were taken for, and how sure the model was.

    `images` (n, H, W) uint8, `labels` and `predictions` (n,) integers, `confidences` (n,) in 0 to
    1. At most 25 are drawn, in the order given; the title says so where some are left out.
    """
    images, title = _first(_array(images), 25, title)
    rows = max(1, math.ceil(len(images) / 5))
    figure = Figure(figsize=(8, 0.6 + 1.75 * rows), dpi=_DPI, layout="constrained")
    figure.suptitle(title if len(images) else f"{title}: none")
    grid = figure.subplots(rows, 5, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    captions = zip(_array(labels), _array(predictions), _array(confidences), strict=True)
    for axes, image, (label, prediction, confidence) in zip(grid, images, captions, strict=False):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{label} taken for {prediction} · {100 * confidence:.1f} %", fontsize=9)
    return figure


def learning_curves(records: Iterable[Mapping[str, float]]) -> Figure:
    """The loss, the validation accuracy and, if logged, the gradient norms over the steps.

    `records` are those of metrics.jsonl: `step`, and under the tags loss/train, loss/validation,
    accuracy/validation (0 to 1) and gradient_norm/* what was logged then. Losses and norms that
    span more than a factor of ten get a logarithmic axis; that of the accuracy begins at the lowest
    after step 0. Of a curve with more than 200 points the mean of each hundredth is drawn, and the
    points themselves, of the losses, in a pale shade.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for tag, value in record.items():
            curves.setdefault(tag, []).append((record["step"], value))
    norms = sorted(tag for tag in curves if tag.startswith("gradient_norm/"))

    panels = 3 if norms else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), dpi=_DPI, layout="constrained")
    loss, accuracy, *rest = figure.subplots(1, panels)
    _lines(loss, curves, ["loss/validation", "loss/train"])
    _log_if_wide(loss)
    loss.set(title="Loss", ylabel="mean loss of an example")
    _lines(accuracy, curves, ["accuracy/validation"])
    trained = [value for step, value in curves.get("accuracy/validation", []) if step > 0]
    if trained:
        margin = 0.05 * (max(trained) - min(trained)) + 0.001
        accuracy.set_ylim(min(trained) - margin, max(trained) + margin)
    accuracy.set(title="Accuracy", ylabel="right")
    accuracy.yaxis.set_major_formatter(_PERCENT)
    for axes in rest:
        _lines(axes, curves, norms)
        _log_if_wide(axes)
        axes.set(title="Gradient", ylabel="norm")
    return figure


def precision_recall(is_class: Any, probability: Any) -> Figure:
    """Precision against recall for each class, zoomed in on the corner where the curves bend.

    `is_class` (n, K) bool, `probability` (n, K) in 0 to 1. The legend gives the average precision
    (AP) of each; a class without an example has no curve.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure = Figure(figsize=(7.5, 5.5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=_LINES, linestyle=["-", "--"] * 5)
    lowest = 0.99
    for k, (truth, score) in enumerate(zip(_array(is_class).T, _array(probability).T, strict=True)):
        if not truth.any():
            continue
        precision, recall, _ = precision_recall_curve(truth, score)
        lowest = min(lowest, np.minimum(precision, recall).max())
        label = f"{k} · AP {average_precision_score(truth, score):.4f}"
        axes.plot(recall, precision, label=label, drawstyle="steps-post")
    low = max(0.0, 1 - 4 * (1 - lowest))  # four times as deep as where the worst curve bends
    margin = 0.02 * (1 - low)
    axes.set(
        title="Precision and recall of each class",
        xlabel="recall (share of the class that is found)",
        ylabel="precision (share of the found that is right)",
        xlim=(low, 1 + margin),
        ylim=(low, 1 + margin),
    )
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _legend(axes)
    return figure


def seed_dots(
    values: Mapping[str, Sequence[float]], published: Mapping[int, float], title: str
) -> Figure:
    """One column a group, one dot a seed, with the mean and its standard deviation beside them.

    `values` are shares (0 to 1) by group; `published` gives some groups, by their number from 0, a
    line to be held against. Each group has an axis of its own, since their scales differ.
    """
    figure = Figure(figsize=(3 * len(values), 4), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    for number, (axes, (name, seeds)) in enumerate(
        zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True)
    ):
        points = np.asarray(seeds, dtype=float)
        axes.plot(np.linspace(-0.1, 0.1, len(points)), points, "o", color=_LINES[0], label="seeds")
        spread = points.std(ddof=1) if len(points) > 1 else 0.0
        axes.errorbar(
            0.25, points.mean(), spread, fmt="s", color=_LINES[2], capsize=4, label="mean ± sd"
        )
        if number in published:
            axes.axhline(published[number], color="0.4", linestyle="--", label="claimed")
        axes.set(title=name, xlim=(-0.35, 0.5), xticks=[])
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=2, symbol=" %"))
        _legend(axes)
    return figure


def ratio_dots(ratios: Mapping[str, Sequence[float]], title: str) -> Figure:
    """One row a pair of timings: every ratio a dot, their median a bar, on a logarithmic axis."""
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(ratios)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    rows = range(len(ratios))
    for row, values in zip(rows, ratios.values(), strict=True):
        median = float(np.median(values))
        axes.plot(values, [row] * len(values), "o", color=_LINES[0], alpha=0.7)
        axes.plot([median], [row], "|", color=_LINES[2], markersize=22, markeredgewidth=2)
        axes.annotate(f"{median:.3g}", (median, row), (0, 13), textcoords="offset points")
    axes.axvline(1, color="0.4", linestyle="--")
    axes.set(title=title, xscale="log", xlabel="ratio of the times (logarithmic); bar: median")
    axes.set_yticks(rows, list(ratios))
    axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.grid(alpha=0.3, axis="x")
    return figure


def rates_by_group(
    rates: Mapping[str, Mapping[str, float]],
    parts: Mapping[str, Mapping[str, Mapping[str, int]]],
    order: Sequence[str],
    title: str,
) -> Figure:
    """One row a group: on the left the rates of several contestants, beside them what a whole is
    made of, one panel for each of `parts`.

    `rates` are shares (0 to 1) by group and contestant. `parts` are counts by panel, group and
    part; the parts are stacked in `order`, as shares of the group, with the counts written in.
    """
    groups = list(rates)
    figure = Figure(figsize=(6 + 4 * len(parts), 2 + 0.42 * len(groups)), dpi=_DPI,
                    layout="constrained")  # fmt: skip
    figure.suptitle(title)
    left, *rest = figure.subplots(1, 1 + len(parts), sharey=True)
    rows = np.arange(len(groups))

    contestants = list(next(iter(rates.values())))
    for number, name in enumerate(contestants):
        shares = [rates[group][name] for group in groups]
        shift = 0.26 * (number - (len(contestants) - 1) / 2)
        left.barh(rows + shift, shares, 0.24, color=_LINES[number], label=name)
    left.set(title="caught", xlim=(0, 1))
    left.set_yticks(rows, groups)
    left.invert_yaxis()

    colours = dict(zip(order, (_LINES[0], _LINES[9], "0.8", _LINES[2], "0.45"), strict=False))
    for axes, (panel, counts) in zip(rest, parts.items(), strict=True):
        ends = np.zeros(len(groups))
        totals = np.array([max(1, sum(counts.get(group, {}).values())) for group in groups])
        for part in order:
            numbers = np.array([counts.get(group, {}).get(part, 0) for group in groups])
            bars = axes.barh(rows, numbers / totals, 0.72, ends, color=colours[part], label=part)
            axes.bar_label(bars, [f"{n}" if n else "" for n in numbers], label_type="center",
                           fontsize=8)  # fmt: skip
            ends += numbers / totals
        axes.set(title=panel, xlim=(0, 1))
    for axes in (left, *rest[:1]):
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06),
                    ncols=3)  # fmt: skip
    for axes in (left, *rest):
        axes.set_xticks([0, 0.25, 0.5, 0.75], labels=["0", "25 %", "50 %", "75 %"])
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        axes.margins(y=0.02)
    for axes in rest:
        axes.tick_params(left=False)
    return figure


def speed_ratios(
    ratios: Mapping[str, Mapping[str, Sequence[float]]],
    wanted: Mapping[tuple[str, str], float],
    title: str,
    label: str,
) -> Figure:
    """One row a case: every ratio of a contestant a pale dot, their median a bar, on a logarithmic
    axis with `label`.

    `ratios` are by case and contestant. `wanted` gives some (case, contestant) the ratio that is to
    be reached, drawn as a triangle.
    """
    contestants = list(dict.fromkeys(name for by_name in ratios.values() for name in by_name))
    step = 0.8 / max(1, len(contestants))
    height = 1.7 + len(ratios) * (0.3 + 0.25 * len(contestants))
    figure = Figure(figsize=(8.5, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="0.4", linestyle="--", zorder=0)
    reached = None
    for number, name in enumerate(contestants):
        colour = _LINES[number % len(_LINES)]
        axes.plot([], [], "o", color=colour, label=name)
        for case, by_name in enumerate(ratios.values()):
            if name not in by_name:
                continue
            row = case + step * (number - (len(contestants) - 1) / 2)
            values = by_name[name]
            median = float(np.median(values))
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.3, markersize=5)
            axes.plot([median], [row], "|", color=colour, markersize=13, markeredgewidth=2.5)
            axes.annotate(f"{median:.3g}", (max(values), row), (7, 0), va="center", fontsize=8,
                          textcoords="offset points")  # fmt: skip
            bar = wanted.get((list(ratios)[case], name))
            if bar is not None:
                (reached,) = axes.plot([bar], [row], ">", color="black", markersize=5)
    if reached is not None:
        reached.set_label("to be reached")
    figure.suptitle(title, fontsize=11)
    axes.set_xlabel(f"{label} (logarithmic); bar: median", fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    low, high = axes.dataLim.intervalx
    widened = max(1.4, 2 / math.sqrt(high / low))  # at least a factor of four in all
    axes.set_xlim(low / widened, high * widened)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, loc="outside lower center", ncols=5)
    return figure


def time_against_accuracy(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], target: float, title: str
) -> Figure:
    """Each run's seconds of training, on a logarithmic axis, and its validation accuracy.

    `runs` gives each contestant's seconds and accuracies (0 to 1), by seed. The large mark is the
    median time and the mean accuracy; the dashed line is the `target`.
    """
    figure = Figure(figsize=(8.5, 5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(target, color="0.4", linestyle="--", label=f"target, {100 * target:g} %")
    for number, (name, (seconds, accuracies)) in enumerate(runs.items()):
        colour, marker = _LINES[number % len(_LINES)], "os^Dv<>pP*"[number % 10]
        axes.plot(seconds, accuracies, marker, color=colour, alpha=0.35, markersize=5)
        middle = float(np.median(seconds)), float(np.mean(accuracies))
        axes.plot(*middle, marker, color=colour, markersize=10, markeredgecolor="black", label=name)
    axes.set(
        title=title,
        xscale="log",
        xlabel="training, seconds (logarithmic); large: median time, mean accuracy",
        ylabel="validation accuracy",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1, symbol=" %"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return figure


def log_lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], label: str, title: str
) -> Figure:
    """One panel a quantity, both axes logarithmic: a line a contestant through its points (x, y).

    The keys of `panels` are the names of their x axes, `label` is that of y.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.4), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                   panels.items(), strict=True):  # fmt: skip
        for number, (contestant, points) in enumerate(lines.items()):
            axes.plot(*np.array(points).T, "o-", color=_LINES[number], label=contestant)
        places = sorted({x for points in lines.values() for x, _ in points})
        axes.set(xscale="log", yscale="log", xlabel=f"{name}, logarithmic", ylabel=label)
        axes.set_xticks(places, [f"{x:g}" for x in places], rotation=45 if len(places) > 8 else 0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        _legend(axes)
    return figure


Point = tuple[float | str, float, float | tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One of `panels`: a line a name through its points (x, mean, deviation), or an image.

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


def point(x: float | str, values: Sequence[float]) -> tuple[float | str, float, float]:
    """A point of a Panel: mean and standard deviation of two or more values."""
    return x, statistics.fmean(values), statistics.stdev(values)


def panels(parts: Sequence[Panel], title: str) -> Figure:
    """Up to three panels a row. A name has the same colour and mark wherever it occurs."""
    rows, columns = math.ceil(len(parts) / 3), min(3, len(parts))
    figure = Figure(figsize=(5 * columns, 0.5 + 4 * rows), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    _panels(figure.subplots(rows, columns, squeeze=False).ravel(), parts)
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
    size = 2.7 * len(moments) + 0.6, 2.2 * len(rows) + 4.7
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, False, height_ratios=(2.2 * len(rows), 4))[:, 0]
    pictures = above.subplots(len(rows), len(moments), squeeze=False)
    shades = _SIGNS.resampled(15)  # of 256, noise would make a file half as large again
    for line, (name, by_moment) in zip(pictures, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axes, weight in zip(line, by_moment.values(), strict=True):
            grid, largest = _tiled(_array(weight).astype(float))
            axes.imshow(grid, cmap=shades, vmin=-largest, vmax=largest, interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=f"± {largest:.2g}")
            axes.spines[:].set_visible(False)
    for axes, moment in zip(pictures[0], moments, strict=True):
        axes.set_title(moment)
    _panels(below.subplots(1, len(parts), squeeze=False).ravel(), parts)
    return figure


def _panels(grid: np.ndarray, parts: Sequence[Panel]) -> None:
    """Draws each part in its axes; axes that are left over stay empty."""
    names = list(dict.fromkeys(name for part in parts for name in part.lines))
    for axes in grid[len(parts) :]:
        axes.set_axis_off()
    for axes, part in zip(grid, parts, strict=False):
        axes.set(title=part.title, xlabel=part.x, ylabel=part.y)
        if part.image is not None:
            axes.imshow(_array(part.image), cmap="gray_r", vmin=0, vmax=255)
            axes.set_axis_off()
            continue
        words = list(dict.fromkeys(
            x for points in part.lines.values() for x, *_ in points if isinstance(x, str)
        ))  # fmt: skip
        for place, (name, points) in enumerate(part.lines.items(), 1):
            places, means, deviations = zip(*points, strict=True)
            number = names.index(name) % len(_LINES)
            if words:  # marks beside one another, lest they hide each other
                shift = 0.6 * (place / (len(part.lines) + 1) - 0.5)
                places = tuple(words.index(word) + shift for word in places)
            axes.errorbar(places, means, np.transpose(deviations), color=_LINES[number], capsize=3,
                          marker="os^Dv<>pP*"[number], markersize=5,
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
            if not crowded and not measured:
                axes.set_xticks(marked, [f"{x:,.12g}" for x in marked])
            else:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.12g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if "y" in part.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        scale, unit = (100, " %") if part.percent else (1, "")
        axes.yaxis.set_major_formatter(lambda y, _, s=scale, u=unit: f"{s * y:g}{u}")
        axes.margins(x=0.08)
        _legend(axes)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, in one step: a reader finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _first(items: np.ndarray, limit: int, title: str) -> tuple[np.ndarray, str]:
    if len(items) <= limit:
        return items, title
    return items[:limit], f"{title} · first {limit} of {len(items)}"


def _tiled(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Images (units, H, W) side by side in one array, NaN between them; and the largest |weight|.

    One array, since axes of its own for each of 64 would take seconds to lay out.
    """
    units, height, width = weight.shape
    columns = math.ceil(math.sqrt(units))
    rows = math.ceil(units / columns)
    tiles = np.full((rows * columns, height + 1, width + 1), np.nan)
    tiles[:units, :height, :width] = weight
    grid = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]
    return grid, np.abs(weight[np.isfinite(weight)]).max(initial=0.0) or 1.0


def _lines(axes: Axes, curves: Mapping[str, list[tuple[float, float]]], tags: list[str]) -> None:
    axes.set_prop_cycle(color=_LINES)
    axes.set_xlabel("step")
    for tag in tags:
        if tag not in curves:
            continue
        points = np.array(curves[tag], dtype=float)
        parts = np.array_split(points, 100 if len(points) > 200 else len(points))
        means = np.array([part.mean(axis=0) for part in parts])
        (line,) = axes.plot(*means.T, label=tag.partition("/")[2], linewidth=1.6)
        if len(tags) <= 2:  # more would hide each other
            axes.plot(*points.T, color=line.get_color(), linewidth=0.6, alpha=0.25, zorder=1)
    _legend(axes)


def _log_if_wide(axes: Axes) -> None:
    values = np.concatenate([[], *(line.get_ydata() for line in axes.lines)])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and values.max() > 10 * values.min():
        axes.set_yscale("log", nonpositive="mask")


def _legend(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
