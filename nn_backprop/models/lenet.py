"""The two networks of digits that Han et al. pruned: LeNet-300-100 and a wide LeNet-5."""

import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.models.classifier import Classifier
from nn_backprop.models.mlp import MLP

# The share of its weights that each layer keeps in Han et al. 2015, tables 3 and 4.
KEPT = {
    "LeNet-300-100": {"layers.0": 0.08, "layers.1": 0.09, "layers.2": 0.26},
    "LeNet-5": {"conv1": 0.66, "conv2": 0.12, "hidden": 0.08, "output": 0.19},
}


def lenet_300_100() -> MLP:
    """784-300-100-10 with ReLUs: 266,610 weights and biases.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition, for the
    sizes. The ReLUs are ours.
    """
    model = MLP((784, 300, 100, 10))
    assert sum(p.numel() for p in model.parameters()) == 266_610
    return model


class LeNet5(Classifier):
    """20 and 50 maps of 5 × 5 fields, each stage with a 2 × 2 max-pool, then 500 ReLUs: 431,080.

    Not LeCun's own of 1998, which has 60,000 parameters, but Caffe's, whose sizes are those of the
    one that Han et al. pruned. As in Caffe, the convolutions have no activation but the pool.

    Shapes: inputs (N, 1, 28, 28); output (N, 10), logits.

    Sources: Caffe's examples/mnist/lenet_train_test.prototxt; Han et al. 2015, Learning both
    weights and connections for efficient neural networks, tables 1 and 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.hidden, self.output = nn.Linear(50 * 4 * 4, 500), nn.Linear(500, 10)
        assert sum(p.numel() for p in self.parameters()) == 431_080

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(self.hidden(x.flatten(1)))
        return self.output(x)
