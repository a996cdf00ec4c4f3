"""placeholder"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nn_backprop.data import ImageData, load, on_clutter, on_noise, rotated, shift, subset
from nn_backprop.layers import (
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    median_distance,
    random_patches,
)

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
BLOCK, COLUMNS = 100, 1024

Lift = Callable[[Tensor], Tensor]


def _lifted(lift: Lift, data: ImageData, indices: Tensor) -> Tensor:
    parts = [lift(data.batch(part)[0]).flatten(1) for part in indices.split(BLOCK)]
    z = torch.cat(parts)
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def _targets(data: ImageData, indices: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(data.labels[indices], 10).double() - 0.1


def _accuracy(scores: Tensor, data: ImageData, indices: Tensor) -> float:
    return (scores.argmax(1) == data.labels[indices]).double().mean().item()


@torch.no_grad()
def ridge(lift: Lift, data: ImageData) -> tuple[Tensor, float, float]:
    gram: Any = 0
    cross: Any = 0
    for indices in data.train.split(4000):
        z = _lifted(lift, data, indices)
        d = z.shape[1]
        if isinstance(gram, int):
            gram = torch.zeros(d, d, dtype=torch.float64)
        for a in range(0, d, COLUMNS):
            gram[a:, a : a + COLUMNS] += z[:, a:].T @ z[:, a : a + COLUMNS]
        cross = cross + z.double().T @ _targets(data, indices)
    scale = gram.trace().item() / len(data.train)
    z = _lifted(lift, data, data.validation)
    best = (None, -1.0, 0.0)
    diagonal = gram.diagonal().clone()
    for strength in RIDGES:
        gram.diagonal().copy_(diagonal + strength * scale)
        try:
            factor = torch.linalg.cholesky(gram)
        except torch.linalg.LinAlgError:
            print("not pd", strength)
            continue
        weight = torch.cholesky_solve(cross, factor).float()
        accuracy = _accuracy(z @ weight, data, data.validation)
        print("   ", strength, round(100 - 100 * accuracy, 2))
        if accuracy > best[1]:
            best = (weight, accuracy, strength)
    return best
