"""The softmax baseline as those who published it trained it; what they showed it and found.

Source: Hendrycks & Gimpel 2017, A baseline for detecting misclassified and out-of-distribution
examples in neural networks, the code to it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nn_backprop.data import ImageData, unknown_sets
from nn_backprop.engines import autograd
from nn_backprop.models import GeluMLP
from nn_backprop.training import fit, steps_per_epoch

DIGITS, UNCUT, UNIFORM = "test digits", "Gaussian noise, uncut", "uniform noise"
CENTRED = "notMNIST, −½ to ½"

# In percent; the output of their code, and the paper's table 2.
PUBLISHED = {
    "confidence": {DIGITS: 99.53, UNCUT: 91.74, UNIFORM: 88.12, CENTRED: 93.84},
    "confidence auroc": {UNCUT: 88.29, UNIFORM: 97.89, CENTRED: 82.87},
}
PAPER: dict[str, dict[str, float]] = {
    "confidence": {UNCUT: 91, UNIFORM: 83, CENTRED: 92, "Omniglot 2": 86},
    "confidence auroc": {UNCUT: 90, UNIFORM: 99, CENTRED: 85, "Omniglot 2": 96},
}


def shown(names: Sequence[str], digits: Tensor, seed: int, root: Path | None) -> dict[str, Tensor]:
    """The digits, noise that is not cut off (float32, white is 255), and the named sets."""
    generator = torch.Generator().manual_seed(seed)
    sets = {DIGITS: digits, UNCUT: 255 * torch.randn(digits.shape, generator=generator)}
    sets |= unknown_sets(names, digits, seed, root, lambda line: None)
    if "notMNIST" in sets:
        sets[CENTRED] = sets["notMNIST"] - 127.5
    return sets


def train_as_published(
    model: GeluMLP, data: ImageData, *, lr: float, epochs: int, batch_size: int, seed: int
) -> None:
    """By Adam: two thirds of the epochs at lr, the rest at a tenth.

    Their 1e−5 · ½‖weight‖² is part of the loss, so this is not AdamW. It matters for noise: where
    there is no other gradient, Adam makes full steps of it, and the weights of pixels that are
    always black do not stay as they started, but go to 0. Neither biases nor the last layer decay.
    """
    steps = steps_per_epoch(len(data.train), batch_size)
    *hidden, weight, bias = model.parameters()
    decayed: Any = {"params": hidden[::2], "weight_decay": 1e-5}
    others: Any = {"params": [*hidden[1::2], weight, bias]}
    optimizer = torch.optim.Adam([decayed, others], lr, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * 2 // 3 * steps])
    fit(model, autograd, optimizer, schedule, data, epochs=epochs, batch_size=batch_size, seed=seed)
