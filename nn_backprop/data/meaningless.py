"""Data that can only be learnt by heart, in part or altogether: false labels, senseless pixels.

Source: Zhang, Bengio, Hardt, Recht & Vinyals 2017, Understanding deep learning requires rethinking
generalization, section 2.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nn_backprop.data.images import ImageData
from nn_backprop.data.variants import (
    gaussian_images,
    random_labels,
    random_pixels,
    shuffled_pixels,
    subset,
)

FALSE_LABELS = {
    "true": 0.0, "20 % noise": 0.2, "40 % noise": 0.4, "60 % noise": 0.6, "80 % noise": 0.8,
    "random labels": 1.0,
}  # fmt: skip
"""The share of the training labels that are drawn at random, by kind."""
KINDS = (*FALSE_LABELS, "shuffled pixels", "random pixels", "Gaussian")


def meaningless(data: ImageData, kind: str, n: int, seed: int) -> ImageData:
    """n of the training examples, turned into one of KINDS; the same n for all kinds of a seed.

    The labels of validation and test are always the true ones. The false labels of a seed are
    drawn once: those of a smaller share are among those of a larger one. Changed pixels are those
    of validation and test, too: shuffled in one order for all images, or in one for each; or
    Gaussian images with the mean and the covariance of the n, each with the label of the image in
    whose place it stands. Mean and deviation of the pixels are those of the n.
    """
    chosen = subset(data, n, seed)
    if kind in FALSE_LABELS:  # not drawn with the seed that chose the n
        return random_labels(chosen, FALSE_LABELS[kind], 10_000 + seed)
    changes: dict[str, Callable[[Tensor, int], Tensor]] = {
        "shuffled pixels": shuffled_pixels,
        "random pixels": random_pixels,
        # Of all images that are read, the first n are for training.
        "Gaussian": partial(gaussian_images, of=torch.arange(n)),
    }
    images, read = data.images.clone(), torch.cat([chosen.train, data.validation, data.test])
    images[read] = changes[kind](images[read], seed)
    return subset(replace(data, images=images), n, seed)
