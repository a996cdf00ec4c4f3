"""The shape of a learning curve: when it begins to fall, when it has, and how far it is a line."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def best_constant(labels: Tensor, squared: bool) -> tuple[float, float]:
    """The loss, squared or cross-entropy, and the share of errors of the best constant output.

    It knows the shares p_k of the classes and no image: 1 − Σ p_k² or −Σ p_k ln p_k, and
    1 − max p_k. A network that has learnt anything is below.
    """
    shares = torch.bincount(labels).double() / len(labels)
    loss = 1 - (shares**2).sum() if squared else -torch.xlogy(shares, shares).sum()
    return loss.item(), 1 - shares.max().item()


def fall(
    curve: Sequence[float], highest: float, points: int
) -> tuple[dict[str, float], list[float]]:
    """How a curve (epochs + 1,) comes down from its first value to its last, as numbers by name.

    start and end: the epochs when 10 and 90 % of the fall are done, linear in between; share: of
    the whole run from start to end; first: of the time up to 90 %, that of the first 10 %; line and
    sigmoid: R² of these, of two parameters each, up to 90 %. And what is left of the fall, from 1
    to 0.1, at so many `points` in time, evenly from 0 to the end.

    What is above `highest` counts as `highest`. Raises ValueError if the curve does not come to lie
    below that.
    """
    values = np.minimum(np.asarray(curve, dtype=float), highest)
    if not values[-1] < highest:
        raise ValueError(f"the curve ends at {curve[-1]}, not below {highest}")
    left = (values - values[-1]) / (highest - values[-1])
    start, end = _reached(left, 0.9), _reached(left, 0.1)

    def read(times: int) -> np.ndarray:
        return np.interp(np.linspace(0, end, times), np.arange(len(left)), left)

    line, sigmoid = _fits(read(101))
    numbers = {
        "start": start, "end": end, "share": (end - start) / (len(left) - 1),
        "first": start / end, "line": line, "sigmoid": sigmoid,
    }  # fmt: skip
    return numbers, read(points).tolist()


def _reached(left: np.ndarray, level: float) -> float:
    """When the curve first comes down to the level."""
    k = int(np.argmax(left <= level))
    if k == 0:
        return 0.0
    return float(k - 1 + (left[k - 1] - level) / (left[k - 1] - left[k]))


def _fits(left: np.ndarray) -> tuple[float, float]:
    """R² of a line a + b t and of a sigmoid 1 / (1 + exp((t − m) / s)), at times even in 0 to 1."""
    from scipy.optimize import curve_fit

    t = np.linspace(0, 1, len(left))

    def sigmoid(t: np.ndarray, m: float, s: float) -> np.ndarray:
        return 1 / (1 + np.exp((t - m) / s))

    (m, s), _ = curve_fit(sigmoid, t, left, p0=(0.5, 0.1), bounds=([-5, 0.01], [5, 10]))
    fitted = np.polyval(np.polyfit(t, left, 1), t), sigmoid(t, m, s)
    total = ((left - left.mean()) ** 2).sum()
    line, curve = (float(1 - ((left - values) ** 2).sum() / total) for values in fitted)
    return line, curve
