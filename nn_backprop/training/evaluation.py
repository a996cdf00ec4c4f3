"""What a model makes of a split."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss, and the probabilities that the model gives to the classes, on n images."""

    loss: float  # mean over the images
    labels: Tensor  # int64 (n,), on the CPU
    probabilities: Tensor  # float (n, K), on the CPU

    @property
    def predictions(self) -> Tensor:
        """The most probable class of each image, int64 (n,)."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share that is right, 0 to 1."""
        return (self.predictions == self.labels).double().mean().item()

    @property
    def confusion(self) -> Tensor:
        """Counts, int64 (K, K): row = true class, column = predicted class."""
        K = self.probabilities.shape[1]
        return torch.bincount(self.labels * K + self.predictions, minlength=K * K).view(K, K)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, indices: Tensor, batch_size: int = 1000
) -> Evaluation:
    """Runs the model in evaluation mode on data[indices]; its mode is as before afterwards."""
    was_training = model.training
    model.eval()
    dtype = next(model.parameters()).dtype
    total = 0.0
    labels, probabilities = [], []
    for part in indices.split(batch_size):
        inputs, targets = data.batch(part, dtype)
        output = model(inputs)
        total += model.loss(output, targets).item() * len(part)  # type: ignore[operator]
        labels.append(targets)
        probabilities.append(model.probabilities(output))  # type: ignore[operator]
    model.train(was_training)
    return Evaluation(total / len(indices), torch.cat(labels).cpu(), torch.cat(probabilities).cpu())
