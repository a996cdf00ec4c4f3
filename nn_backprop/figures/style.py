"""Colours, formats and small pieces that every figure shares.

Colours are told apart by colour-blind readers: blue against red through white for signs, one hue
for amounts, and for lines the ten colours of Petroff, "Accessible Color Sequences for Data
Visualization" (2021).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

DPI = 110
LINES = [
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
]
MARKS = "os^Dv<>pP*"
SIGNS = colormaps["RdBu_r"].with_extremes(bad="0.8")
PERCENT = PercentFormatter(xmax=1, symbol=" %")


def blank(width: float, height: float, title: str = "") -> Figure:
    """A figure of so many inches, laid out to fit what is drawn in it."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, in one step: a reader finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def first_of(items: np.ndarray, limit: int, title: str) -> tuple[np.ndarray, str]:
    if len(items) <= limit:
        return items, title
    return items[:limit], f"{title} · first {limit} of {len(items)}"


def tiled(weight: np.ndarray) -> tuple[np.ndarray, float]:
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


def log_if_wide(axes: Axes) -> None:
    values = np.concatenate([[], *(line.get_ydata() for line in axes.lines)])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and values.max() > 10 * values.min():
        axes.set_yscale("log", nonpositive="mask")


def log_ticks(axis: Axis) -> None:
    """1, 2 and 5 of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
