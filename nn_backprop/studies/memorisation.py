"""Learning by heart: critical samples, examples' difficulty, how much is stored in what width.

Source of the first two: Arpit et al. 2017, A closer look at memorization in deep networks,
sections 3.1 and 4.1.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from nn_backprop.data import ImageData
from nn_backprop.models import MLP
from nn_backprop.studies.jobs import StudyError
from nn_backprop.studies.learning_curve import Measures, judge
from nn_backprop.studies.training import Recipe
from nn_backprop.training import evaluate_many

RADIUS, STEP, NOISE = 0.3, 0.25, 0.2  # the authors' r, α and β, in grey values of 0 to 255
SEARCH_STEPS = 5  # the authors take up to 100, which find as many or more


def critical_share(
    model: MLP, data: ImageData, indices: Tensor, factor: float, noise: torch.Generator
) -> float:
    """The share of the images at `indices` for which a search finds a critical sample, 0 to 1.

    That is one with another predicted class, within ±r of each pixel. A step of the search is
    α sign(∂C/∂x) + β η, then back into the box, with C the loss of the class predicted at first and
    η normal, drawn from `noise`. `factor` multiplies r, α and β. As in the authors' code, the
    gradient is that of the loss, taken at each point. Parameters get no gradients.
    """
    radius = factor * RADIUS
    greys = data.images[indices].float()
    moved = greys
    with torch.enable_grad():  # asked in the midst of `fit_many`, which has it off
        predicted = model(data.normalise(greys)).argmax(1)
        found = torch.zeros_like(predicted, dtype=torch.bool)
        for _ in range(SEARCH_STEPS):
            moved = moved.detach().requires_grad_()
            loss = model.loss(model(data.normalise(moved)), predicted)
            (grad_moved,) = torch.autograd.grad(loss, moved)
            random = torch.randn(greys.shape, generator=noise)
            moved = moved.detach() + factor * (STEP * grad_moved.sign() + NOISE * random)
            moved = greys + (moved - greys).clamp(-radius, radius)
            found |= model(data.normalise(moved)).argmax(1) != predicted
    return found.double().mean().item()


def critical_measures(data: ImageData, indices: Tensor, seed: int) -> Measures:
    """For a `Watch`: "critical", the share in the authors' box, "critical_10" in ten times that."""
    noise = torch.Generator().manual_seed(seed)
    search = partial(critical_share, data=data, indices=indices, noise=noise)
    return {"critical": partial(search, factor=1), "critical_10": partial(search, factor=10)}


class Starts:
    """Networks that learn the same data: which examples each has right early on.

    `look` must be called after each epoch, as `fit_many` does. `right` has for each network a
    tensor an epoch, bool (n,), up to the first epoch in which half of its examples are right.
    """

    def __init__(self, models: Sequence[MLP], data: ImageData) -> None:
        self.models, self._examples = models, data.batch(data.train)
        self.right: list[list[Tensor]] = [[] for _ in models]

    def look(self, networks: slice, epochs: int) -> None:
        for model, seen in zip(self.models[networks], self.right[networks], strict=True):
            if not _half(seen):
                seen.append(judge(model, *self._examples)[1])

    def numbers(self) -> dict[str, float]:
        """Of the first epoch, "one_", and of that in which half are right, "half_", or the last if
        there is none: mean, spread and binomial as `difficulty` gives them; and half_reached, how
        many networks had half of them right."""
        found: dict[str, float] = {"half_reached": sum(map(_half, self.right))}
        for moment, place in (("one", 0), ("half", -1)):
            right = torch.stack([seen[place] for seen in self.right])
            for name, number in zip(("mean", "spread", "binomial"), difficulty(right), strict=True):
                found[f"{moment}_{name}"] = number
        return found


def _half(seen: Sequence[Tensor]) -> bool:
    return bool(seen) and seen[-1].double().mean().item() >= 0.5


def difficulty(right: Tensor) -> tuple[float, float, float]:
    """Of the shares of the networks that have an example right, right bool (networks, examples).

    Their mean, their standard deviation, and that of a binomial with this mean: of examples that
    are all alike.
    """
    shares = right.double().mean(0)
    mean = shares.mean().item()
    return mean, shares.std().item(), math.sqrt(mean * (1 - mean) / len(right))


def stored_bits(n: int, wrong: int, classes: int = 10) -> float:
    """What a network tells of n random labels of which it has so many wrong: n I(e), e = wrong / n.

    I(e) = log2 K − H2(e) − e log2(K − 1), H2(e) = −e log2 e − (1 − e) log2(1 − e), K the classes:
    the mutual information of label and answer, if one wrong class is as likely as another.
    """
    e = wrong / n
    uncertain = sum(-p * math.log2(p) for p in (e, 1 - e) if p > 0)
    return n * (math.log2(classes) - uncertain - e * math.log2(classes - 1))


def labels_wrong(
    recipe: Recipe, data: ImageData, labels: Tensor, seeds: Sequence[int]
) -> list[int]:
    """How many of its labels, int64 (seeds, n), each seed's network has wrong after the training.

    All examples are those of the training split. Raises StudyError if a loss is not finite.
    """
    models = [recipe.network(seed) for seed in seeds]
    recipe.train(models, data, seeds, labels)
    accuracy = evaluate_many(models, data, data.train, labels).accuracy
    n = labels.shape[1]
    return [n - round(n * share) for share in accuracy.tolist()]


def least_widths(
    wrong: Callable[[int], Sequence[int]], allowed: float, first: int, widest: int
) -> tuple[list[int], dict[int, Sequence[int]]]:
    """For each network the least width that has at most `allowed` wrong, as far as is asked for.

    wrong(width) says how many each network has, and is asked once a width: `first`, its doubles
    until no network has more than allowed, and then for each network whatever halves what is left.
    The answer is a width that does; one less does not, or is zero. And what was asked for, by
    width. Raises StudyError if it would have to be wider than `widest`.
    """
    tried: dict[int, Sequence[int]] = {}

    def enough(width: int) -> list[bool]:
        if width > widest:
            raise StudyError(f"no width up to {widest} has at most {allowed:g} wrong")
        if width not in tried:
            tried[width] = wrong(width)
        return [count <= allowed for count in tried[width]]

    last = first
    while not all(enough(last)):
        last *= 2
    found = []
    for network in range(len(tried[last])):
        low, high = 0, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle)[network] else (middle, high)
        found.append(high)
    return found, tried
