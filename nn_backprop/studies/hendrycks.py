"""The softmax baseline, trained as those who published it did.

Source: Hendrycks & Gimpel 2017, A baseline for detecting misclassified and out-of-distribution
examples in neural networks, the code to it.
"""

from typing import Any

import torch

from nn_backprop.data import ImageData
from nn_backprop.engines import autograd
from nn_backprop.models import GeluMLP
from nn_backprop.training import fit, steps_per_epoch


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
