"""What the networks that give logits have in common: their loss, and their confidence."""

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network whose output (N, K) are logits: softmax is part of the loss."""

    loss_name = "cross_entropy"

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of a batch: output (N, K) logits, targets (N,) in 0..K−1."""
        return F.cross_entropy(output, targets)

    def probabilities(self, output: Tensor) -> Tensor:
        """The confidence in each class, (N, K): softmax of the logits."""
        return output.softmax(1)
