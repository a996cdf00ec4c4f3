"""The multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
LOSSES = ("cross_entropy", "squared_error")


class MLP(nn.Module):
    """Layers of neurons, each fed by all neurons of the layer below: a^l = σ(W^l a^(l−1) + b^l).

    `sizes` are the widths from the input to the output. With `loss="cross_entropy"` the output
    layer has no activation: it gives logits, and softmax is part of the loss. With
    `loss="squared_error"` it is activated like every other, and the loss is the sum over the
    outputs of the squared difference from the one-hot target, averaged over the examples.

    Shapes: inputs (N, ...) with ∏ ... = sizes[0]; output (N, sizes[-1]).
    Raises ValueError for fewer than two sizes, a size below 1, an unknown activation or loss.

    Source: Rumelhart, Hinton & Williams 1986; the notation is Nielsen's, chapter 2.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 128, 10),
        activation: str = "relu",
        loss: str = "cross_entropy",
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be at least two positive widths, not {tuple(sizes)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, not {activation!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {list(LOSSES)}, not {loss!r}")
        self.activation, self.loss_name = activation, loss
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(1)
        for layer in self.layers[:-1]:
            a = ACTIVATIONS[self.activation](layer(a))
        z = self.layers[-1](a)
        return z if self.loss_name == "cross_entropy" else ACTIVATIONS[self.activation](z)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch: output (N, K) as `forward` gives it, targets (N,) in 0..K−1."""
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(output, targets)
        wanted = F.one_hot(targets, output.shape[1]).to(output.dtype)
        return F.mse_loss(output, wanted, reduction="sum") / len(output)

    def probabilities(self, output: Tensor) -> Tensor:
        """The confidence in each class, (N, K), from what `forward` gives.

        Softmax of the logits; for squared error, whose outputs are no logits, the outputs
        themselves, negative ones counted as 0, divided by their sum (softmax if none is positive).
        """
        if self.loss_name == "cross_entropy":
            return output.softmax(1)
        positive = output.clamp(min=0)
        total = positive.sum(1, keepdim=True)
        return torch.where(total > 0, positive / total, output.softmax(1))


def happy() -> MLP:
    """784-16-16-10, sigmoid, squared error: 13,002 weights and biases.

    Source: 3Blue1Brown 2017, But what is a neural network?, chapter 1.
    """
    model = MLP((784, 16, 16, 10), activation="sigmoid", loss="squared_error")
    assert sum(p.numel() for p in model.parameters()) == 13_002
    return model


class GeluMLP(MLP):
    """784-256-256-256-10 with the tanh form of GELU: the network of Hendrycks & Gimpel 2017.

    The weights of a unit start as a random direction, of a length that keeps the variance.

    Source: A baseline for detecting misclassified and out-of-distribution examples, its code.
    """

    def __init__(self) -> None:
        super().__init__((784, 256, 256, 256, 10))
        with torch.no_grad():
            for layer, square in zip(self.layers, (1.425, 0.85, 0.85, 1.425), strict=True):
                weight, bias = layer.parameters()
                weight.copy_(F.normalize(torch.randn_like(weight)) / square**0.5)
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(1)
        for layer in self.layers[:-1]:
            a = F.gelu(layer(a), approximate="tanh")
        return self.layers[-1](a)
