"""Rubbish, which is no digit: shown to a network in training, and told from digits in a test.

A network here makes of images a pair: logits (N, 10), or (N, 11) with a class for rubbish, and the
features (N, D) that they are made of. The target of rubbish is −1.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData, channels_last
from nn_backprop.engines import Engine, autograd
from nn_backprop.studies.jobs import Row
from nn_backprop.studies.rejection import confidence, correct_at_false_positives, told_apart

CLASSES = 10
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, features and targets
AREA = "AUROC"
CORRECT = {f"CCR at {100 * rate:g} %": rate for rate in (0.01, 0.03, 0.1, 0.3, 1.0)}


class Network(nn.Module):
    """Convolutions; features (N, 64); without a bias, logits (N, outputs).

    In its loss, an example of rubbish weighs `weight`, and a digit 1.
    """

    def __init__(self, outputs: int, weight: float, loss: Loss) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 64),
        )  # fmt: skip
        self.output = nn.Linear(64, outputs, bias=False)
        self._weight, self._loss = weight, loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.output(features), features

    def loss(self, output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The weighted mean over all examples; digits come first."""
        (logits, features), n = output, int((targets >= 0).sum())
        digits = self._loss(logits[:n], features[:n], targets[:n])
        if n == len(targets):
            return digits
        rubbish = self._loss(logits[n:], features[n:], targets[n:])
        weighs = self._weight * (len(targets) - n)
        return (n * digits + weighs * rubbish) / (n + weighs)


def beside(rubbish: Tensor, digits: ImageData, every: int, seed: int) -> Engine:
    """autograd, with an image of rubbish for so many digits of a batch, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        n = len(targets) // every
        drawn = digits.normalise(rubbish[torch.randint(len(rubbish), (n,), generator=generator)])
        both = channels_last(torch.cat([inputs, drawn]))
        return autograd(model, both, torch.cat([targets, targets.new_full((n,), -1)]))

    return compute


def tested(
    model: nn.Module, digits: ImageData, indices: Tensor, sets: Mapping[str, Tensor]
) -> tuple[dict[str, Row], Row]:
    """By score and set of rubbish, AUROC and every CCR beside these digits; and of the digits."""
    logits, known = answers(model, digits, digits.images[indices])
    wrong = logits[:, :CLASSES].argmax(1) != digits.labels[indices].numpy()  # a digit
    found: dict[str, Row] = {score: {} for score in known}
    for name, images in sets.items():
        for score, unknown in answers(model, digits, images)[1].items():
            found[score][name] = {AREA: told_apart(known[score], unknown)} | {
                what: correct_at_false_positives(known[score], wrong, unknown, rate)
                for what, rate in CORRECT.items()
            }
    taken = float((logits.argmax(1) == CLASSES).mean())
    return found, {"accuracy": 1 - float(wrong.mean()), "taken_for_rubbish": taken}


@torch.no_grad()
def answers(
    model: nn.Module, digits: ImageData, images: Tensor
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of uint8 images the logits (N, outputs), and by name the two scores (N,) of every method."""
    parts = [model(channels_last(digits.normalise(part))) for part in images.split(1000)]
    logits, features = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    probability = confidence(logits.numpy(), CLASSES)
    scaled = probability * features.double().norm(dim=1).numpy()
    return logits.numpy(), {"confidence": probability, "confidence × length": scaled}
