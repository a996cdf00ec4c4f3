"""Contestants side by side: seeds, ratios of times, rates, time against accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from nn_backprop.figures.style import LINES, MARKS, blank, legend, log_ticks


def seed_dots(
    values: Mapping[str, Sequence[float]], published: Mapping[int, float], title: str
) -> Figure:
    """One column a group, one dot a seed, with the mean and its standard deviation beside them.

    `values` are shares (0 to 1) by group; `published` gives some groups, by their number from 0, a
    line to be held against. Each group has an axis of its own, since their scales differ.
    """
    figure = blank(3 * len(values), 4, title)
    for number, (axes, (name, seeds)) in enumerate(
        zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True)
    ):
        points = np.asarray(seeds, dtype=float)
        axes.plot(np.linspace(-0.1, 0.1, len(points)), points, "o", color=LINES[0], label="seeds")
        spread = points.std(ddof=1) if len(points) > 1 else 0.0
        axes.errorbar(
            0.25, points.mean(), spread, fmt="s", color=LINES[2], capsize=4, label="mean ± sd"
        )
        if number in published:
            axes.axhline(published[number], color="0.4", linestyle="--", label="claimed")
        axes.set(title=name, xlim=(-0.35, 0.5), xticks=[])
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=2, symbol=" %"))
        legend(axes)
    return figure


def ratio_dots(ratios: Mapping[str, Sequence[float]], title: str) -> Figure:
    """One row a pair of timings: every ratio a dot, their median a bar, on a logarithmic axis."""
    by_case = {case: {"a round": values} for case, values in ratios.items()}
    return speed_ratios(by_case, {}, title, "ratio of the times")


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
    figure = blank(6 + 4 * len(parts), 2 + 0.42 * len(groups), title)
    left, *rest = figure.subplots(1, 1 + len(parts), sharey=True)
    rows = np.arange(len(groups))

    contestants = list(next(iter(rates.values())))
    for number, name in enumerate(contestants):
        shares = [rates[group][name] for group in groups]
        shift = 0.26 * (number - (len(contestants) - 1) / 2)
        left.barh(rows + shift, shares, 0.24, color=LINES[number], label=name)
    left.set(title="caught", xlim=(0, 1))
    left.set_yticks(rows, groups)
    left.invert_yaxis()

    colours = dict(zip(order, (LINES[0], LINES[9], "0.8", LINES[2], "0.45"), strict=False))
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
    figure = blank(8.5, height)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.axvline(1, color="0.4", linestyle="--", zorder=0)
    reached = None
    for number, name in enumerate(contestants):
        colour = LINES[number % len(LINES)]
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
    axes.set_xlabel(f"{label} (logarithmic); bar: median", fontsize=9)
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
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
    figure = blank(8.5, 5)
    axes = figure.subplots()
    axes.axhline(target, color="0.4", linestyle="--", label=f"target, {100 * target:g} %")
    for number, (name, (seconds, accuracies)) in enumerate(runs.items()):
        colour, marker = LINES[number % len(LINES)], MARKS[number % len(MARKS)]
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
    log_ticks(axes.xaxis)
    legend(axes)
    return figure


def log_lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], label: str, title: str
) -> Figure:
    """One panel a quantity, both axes logarithmic: a line a contestant through its points (x, y).

    The keys of `panels` are the names of their x axes, `label` is that of y.
    """
    figure = blank(4.6 * len(panels), 4.4, title)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, lines) in zip(grid, panels.items(), strict=True):
        for number, (contestant, points) in enumerate(lines.items()):
            axes.plot(*np.array(points).T, "o-", color=LINES[number], label=contestant)
        places = sorted({x for points in lines.values() for x, _ in points})
        axes.set(xscale="log", yscale="log", xlabel=f"{name}, logarithmic", ylabel=label)
        axes.set_xticks(places, [f"{x:g}" for x in places], rotation=45 if len(places) > 8 else 0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        legend(axes)
    return figure
