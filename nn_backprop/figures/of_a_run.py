"""Pictures of one run: its weights, its mistakes, its learning curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nn_backprop.figures.style import (
    LINES,
    PERCENT,
    SIGNS,
    as_array,
    blank,
    first_of,
    legend,
    log_if_wide,
    tiled,
)


def weight_images(weight: Any, title: str) -> Figure:
    """The incoming weights of each unit as an image; white is zero, one scale for all.

    `weight` (units, H, W). At most 64 units are drawn; the title says so where some are left out.
    """
    weight, title = first_of(as_array(weight).astype(float), 64, title)
    grid, largest = tiled(weight)
    figure = blank(7, 6.2)
    axes = figure.subplots()
    drawn = axes.imshow(grid, cmap=SIGNS, vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="weight", shrink=0.85)
    return figure


def weight_pixels(weight: Any, zoom: int = 3) -> np.ndarray:
    """What `weight_images` shows, as bare pixels: uint8 (height, width, 3), in about 2 ms.

    For pictures that are made often, such as one an epoch. `zoom` is the pixels to a weight.
    """
    weight, _ = first_of(as_array(weight).astype(float), 64, "")
    grid, largest = tiled(weight)
    pixels = SIGNS((grid / largest + 1) / 2, bytes=True)[..., :3]
    return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)


def confusion_matrix(counts: Any, class_names: Sequence[str]) -> Figure:
    """What was predicted for each true class.

    `counts` (K, K) integers, row = true class, column = predicted. The colour is the share of the
    row on a logarithmic scale, so that one mistake in a thousand shows; at the right of each row is
    the share that was right.
    """
    counts = as_array(counts)
    classes = range(len(counts))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right, total = int(np.trace(counts)), int(counts.sum())

    side = 1.2 + 0.52 * len(counts)
    figure = blank(side + 2, side)
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
    images, title = first_of(as_array(images), 25, title)
    rows = max(1, math.ceil(len(images) / 5))
    figure = blank(8, 0.6 + 1.75 * rows)
    figure.suptitle(title if len(images) else f"{title}: none")
    grid = figure.subplots(rows, 5, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    captions = zip(as_array(labels), as_array(predictions), as_array(confidences), strict=True)
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
    figure = blank(5.2 * panels, 4.2)
    loss, accuracy, *rest = figure.subplots(1, panels)
    _lines(loss, curves, ["loss/validation", "loss/train"])
    log_if_wide(loss)
    loss.set(title="Loss", ylabel="mean loss of an example")
    _lines(accuracy, curves, ["accuracy/validation"])
    trained = [value for step, value in curves.get("accuracy/validation", []) if step > 0]
    if trained:
        margin = 0.05 * (max(trained) - min(trained)) + 0.001
        accuracy.set_ylim(min(trained) - margin, max(trained) + margin)
    accuracy.set(title="Accuracy", ylabel="right")
    accuracy.yaxis.set_major_formatter(PERCENT)
    for axes in rest:
        _lines(axes, curves, norms)
        log_if_wide(axes)
        axes.set(title="Gradient", ylabel="norm")
    return figure


def precision_recall(is_class: Any, probability: Any) -> Figure:
    """Precision against recall for each class, zoomed in on the corner where the curves bend.

    `is_class` (n, K) bool, `probability` (n, K) in 0 to 1. The legend gives the average precision
    (AP) of each; a class without an example has no curve.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure = blank(7.5, 5.5)
    axes = figure.subplots()
    axes.set_prop_cycle(color=LINES, linestyle=["-", "--"] * 5)
    lowest = 0.99
    for k, (truth, score) in enumerate(
        zip(as_array(is_class).T, as_array(probability).T, strict=True)
    ):
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
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    legend(axes)
    return figure


def _lines(axes: Axes, curves: Mapping[str, list[tuple[float, float]]], tags: list[str]) -> None:
    axes.set_prop_cycle(color=LINES)
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
    legend(axes)
