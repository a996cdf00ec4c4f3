"""Everything drawn with matplotlib.

Each function takes tensors or arrays and returns a Figure of its own, without pyplot and its global
state.
"""

from nn_backprop.figures.comparisons import (
    log_lines,
    rates_by_group,
    ratio_dots,
    seed_dots,
    speed_ratios,
    time_against_accuracy,
)
from nn_backprop.figures.of_a_run import (
    confusion_matrix,
    learning_curves,
    mistakes,
    precision_recall,
    weight_images,
    weight_pixels,
)
from nn_backprop.figures.panels import Panel, Point, point, side_by_side, weights_over_time
from nn_backprop.figures.style import Figure, save

__all__ = [
    "Figure",
    "Panel",
    "Point",
    "confusion_matrix",
    "learning_curves",
    "log_lines",
    "mistakes",
    "point",
    "precision_recall",
    "rates_by_group",
    "ratio_dots",
    "save",
    "seed_dots",
    "side_by_side",
    "speed_ratios",
    "time_against_accuracy",
    "weight_images",
    "weight_pixels",
    "weights_over_time",
]
