"""What a lift by a kernel is compared with, how each contestant is fitted, and to what digits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData, on_clutter, on_noise, rotated
from nn_backprop.layers import RandomFourierFeatures, RandomFourierFeatures2d
from nn_backprop.models import CNN, KernelNetwork
from nn_backprop.models.kernel_machines import (
    Predict,
    half_median_distance,
    kernel_ridge,
    kernel_svm,
    ridge,
)
from nn_backprop.studies.training import train_network
from nn_backprop.training import steps_per_epoch

# Of the ridge, in units of the mean square of an example's features.
STRENGTHS = {"pixels": 10.0, "vectors": 0.1, "patches": 1e-3, "kernel ridge": 1e-4}
COST = 10.0  # of the SVM, C; of 1, 10 and 100 the best on the validation split
EXACT = {"ridge": "kernel ridge", "SVM": "SVM"}  # machines, by a short name
PATCH, STRIDE = 5, 2  # 12 × 12 patches an image
STEPS, EPOCHS, BATCH = 500, 3, 128  # of what is trained by gradient: at least so many of both
RATES = {"CNN": (6e-3, 0.1), "network": (0.1, 0.0)}  # learning rate, weight decay
SHIFTS = (1, 2, 3, 4, 6)  # pixels
VARIANTS: dict[str, Callable[[Tensor, int], Tensor]] = {  # of digits
    "plain": lambda images, seed: images,
    "rotated": rotated,
    "on noise": on_noise,
    "on clutter": on_clutter,
}


def fitted(
    kind: str, data: ImageData, seed: int, features: int, grid: int, pooling: str, smoke: bool
) -> tuple[Predict, dict[str, Any]]:
    """What predicts a digit's scores, and what is to be known of it.

    The kinds are those of STRENGTHS and RATES, and "SVM". "vectors" have so many random features of
    an image; "patches" and "network" so many of each patch, pooled to grid × grid. In a smoke test
    what learns by gradient has one epoch.
    """
    if kind in RATES:
        return trained(kind, data, seed, features, grid, pooling, smoke)
    if kind == "pixels":
        return ridge(nn.Flatten(), data, STRENGTHS[kind]), {}
    sigma = half_median_distance(data, seed, PATCH if kind == "patches" else None)
    about: dict[str, Any] = {"sigma": sigma}
    if kind == "SVM":
        return kernel_svm(data, sigma, COST), about
    if kind == "kernel ridge":
        return kernel_ridge(data, sigma, STRENGTHS[kind]), about
    if kind == "vectors":
        of_image = RandomFourierFeatures(data.images[0].numel(), features, sigma, seed)
        about |= {"lifted": features, "pooled": features}
        return ridge(nn.Sequential(nn.Flatten(), of_image), data, STRENGTHS[kind]), about
    lift = RandomFourierFeatures2d(1, features, data.images.shape[-1], PATCH, sigma, STRIDE,
                                   grid=grid, pooling=pooling, seed=seed)  # fmt: skip
    about |= {"lifted": lift.lifted, "pooled": lift.pooled}
    return ridge(lift, data, STRENGTHS[kind]), about


def trained(
    kind: str, data: ImageData, seed: int, features: int, grid: int, pooling: str, smoke: bool
) -> tuple[Predict, dict[str, Any]]:
    """The same of what learns by gradient."""
    enough = max(EPOCHS, math.ceil(STEPS / steps_per_epoch(len(data.train), BATCH)))
    about: dict[str, Any] = {"epochs": 1 if smoke else enough}
    torch.manual_seed(seed)
    model: Any = CNN()
    if kind == "network":
        sigma = half_median_distance(data, seed, PATCH)
        model = KernelNetwork(features, PATCH, STRIDE, grid, pooling, sigma, seed)
        about |= {"sigma": sigma, "lifted": model.features.lifted, "pooled": model.features.pooled}
    lr, decay = RATES[kind]
    with torch.enable_grad():
        train_network(model, data, lr=lr, decay=decay, batch_size=BATCH, seed=seed,
                      epochs=about["epochs"])  # fmt: skip
    return model.eval(), about
