"""What is seen of a network while it learns, and the shape in which its loss falls."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nn_backprop.data import ImageData
from nn_backprop.models import MLP
from nn_backprop.models.counting import parameters
from nn_backprop.studies.jobs import Row
from nn_backprop.studies.training import Recipe
from nn_backprop.training import evaluate

Measures = Mapping[str, Callable[[MLP], float]]  # by name


class Watch:
    """The learning curves of a network; `look` must be called before training and after each epoch.

    `losses` and `accuracies` are of the training examples, from epoch 0 on. `seen` has, by name, a
    value for each epoch of `grid`: train_accuracy, validation_loss, validation_accuracy, and what
    the `measures` make of the network. `peak` is the place in `grid` where the accuracy on the
    validation split was highest, the first of equals, and `at_peak` the network then.
    """

    def __init__(self, recipe: Recipe, seed: int, data: ImageData, measures: Measures) -> None:
        self.recipe, self.data, self.model = recipe, data, recipe.network(seed)
        self.grid = epochs_seen(recipe.epochs)
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.seen: dict[str, list[float]] = defaultdict(list)
        self.peak, self.at_peak = 0, self.model
        self._measures = measures
        self._train, self._validation = data.batch(data.train), data.batch(data.validation)

    def look(self, epochs: int) -> None:
        """After so many epochs."""
        loss, right = judge(self.model, *self._train)
        self.losses.append(loss)
        self.accuracies.append(right.double().mean().item())
        if epochs not in self.grid:
            return
        loss, right = judge(self.model, *self._validation)
        accuracy, before = right.double().mean().item(), self.seen["validation_accuracy"]
        if accuracy > max(before, default=-1):
            self.peak, self.at_peak = len(before), copy.deepcopy(self.model)
        self.seen["train_accuracy"].append(self.accuracies[-1])
        self.seen["validation_loss"].append(loss)
        before.append(accuracy)
        for name, measure in self._measures.items():
            self.seen[name].append(measure(self.model))

    def numbers(self) -> dict[str, float]:
        """Of all that is seen the last value, and under "<name>_at_peak" that of the peak."""
        found = {"train_loss": self.losses[-1], "peak_epoch": self.grid[self.peak]}
        for name, values in self.seen.items():
            found |= {name: values[-1], f"{name}_at_peak": values[self.peak]}
        return found

    def row(self) -> Row:
        """Once it is trained: the only time that the test split is read.

        "curves" has all that is seen, at the epochs "grid"; and "every_train_loss" and
        "every_train_accuracy", at all epochs.
        """
        recipe, data = self.recipe, self.data
        return {
            "dataset": data.name, "n": len(data.train), "epochs": recipe.epochs,
            "parameters": parameters(self.model),
            "optimizer": recipe.optimizer, "lr": recipe.lr, **self.numbers(),
            "test_accuracy": evaluate(self.model, data, data.test).accuracy,
            "test_accuracy_at_peak": evaluate(self.at_peak, data, data.test).accuracy,
            "curves": {"grid": self.grid, **self.seen, "every_train_loss": self.losses,
                       "every_train_accuracy": self.accuracies},
        }  # fmt: skip

    def falls(self, points: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """How the training loss, "loss_", and the share of errors, "error_", fall from those of the
        best constant: numbers, and curves "loss_left" and "error_left", as `fall` gives them."""
        numbers: dict[str, float] = {}
        left: dict[str, list[float]] = {}
        errors = [1 - accuracy for accuracy in self.accuracies]
        highest = best_constant(self._train[1], self.recipe.loss == "squared_error")
        for name, curve, high in zip(
            ("loss", "error"), (self.losses, errors), highest, strict=True
        ):
            of_curve, left[f"{name}_left"] = fall(curve, high, points)
            numbers |= {f"{name}_{what}": number for what, number in of_curve.items()}
        return numbers, left


def train_watched(
    recipe: Recipe, sets: Sequence[ImageData], seed: int, measures: Sequence[Measures]
) -> list[Watch]:
    """Networks from one start, each of which learns the labels of its set; all at once.

    The images are those of the first set. Raises StudyError if a loss is not finite.
    """
    watches = [Watch(recipe, seed, data, of) for data, of in zip(sets, measures, strict=True)]

    def look(networks: slice, epochs: int) -> None:
        for watch in watches[networks]:
            watch.look(epochs)

    look(slice(None), 0)
    labels = torch.stack([data.labels for data in sets])
    models = [watch.model for watch in watches]
    recipe.train(models, sets[0], [seed] * len(sets), labels, look)
    return watches


def epochs_seen(epochs: int) -> tuple[int, ...]:
    """The first six epochs, and 20 more up to the last, each the same multiple of the one before.

    As far as they are whole numbers, and different ones.
    """
    early = range(1, min(6, epochs) + 1)
    return tuple(sorted({*early, *(round(epochs ** (k / 20)) for k in range(21))}))


@torch.no_grad()
def judge(model: MLP, inputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The mean loss, and which examples are right, bool (n,)."""
    output = model(inputs)
    return model.loss(output, labels).item(), output.argmax(1) == labels


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
