"""Networks in which few units are active: by k winners, or by a price on activity."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from nn_backprop.layers import KWinners
from nn_backprop.models.classifier import Classifier


class LayerNetwork(Classifier, nn.Sequential):
    """Layers, one after another, of which the last gives the logits.

    Shapes: inputs as the first layer takes them; output (N, classes), logits.
    """


class ActivityPenalty(nn.Module):
    """A network whose loss in training mode has a price on activity: + weight · Σ_layers mean |a|.

    The layers are the network's nn.ReLUs; their outputs are not negative, so that |a| is a. The
    mean is over examples and units. A layer of U units adds weight / (N U) to the gradient of each
    of its outputs: the same for all, so that small activations vanish and large ones stay.

    Shapes: inputs as the network's; output a pair, its logits (N, classes) and Σ_layers mean |a|.
    Raises ValueError if the network has no nn.ReLU.
    """

    loss_name = "cross_entropy"

    def __init__(self, network: LayerNetwork, weight: float) -> None:
        super().__init__()
        if not any(isinstance(layer, nn.ReLU) for layer in network):
            raise ValueError("the network has no nn.ReLU whose activity could be priced")
        self.network, self.weight = network, weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = []
        for layer in self.network:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                means.append(x.mean())
        return x, sum(means[1:], start=means[0])

    def loss(self, output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The network's, and in training mode the price: targets (N,) in 0..K−1."""
        logits, activity = output
        loss = self.network.loss(logits, targets)
        return loss + self.weight * activity if self.training else loss

    def probabilities(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """The network's."""
        return self.network.probabilities(output[0])


def sparse_mlp(width: int = 128, k: int | float = 0.125, boost: float = 1.5) -> LayerNetwork:
    """784-width-10 with k winners in place of ReLUs; with the defaults 16 of 128."""
    return LayerNetwork(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(784, width),
            active=KWinners(width, k, boost, evaluation_factor=1.5),
            output=nn.Linear(width, 10),
        )
    )


def sparse_cnn(
    channels: tuple[int, int] = (32, 64),
    hidden: int = 700,
    k: Sequence[int | float] = (400, 300, 100),
    boost: float = 1.5,
) -> LayerNetwork:
    """Two convolutions and a hidden layer with k winners each: 776,606 parameters.

    With the defaults 400 of 4,608 units win in the first layer, 300 of 1,024 in the second and 100
    of 700 in the third, half as many more in evaluation. Only the activations are sparse: in the
    paper's network, 30 % of the hidden layer's weights were left as well, chosen at random.

    Source: Sparse CNN-2 of Ahmad & Scheinkman 2019, How can we be so dense?; sizes and k as in
    their code (numenta/htmpapers).
    """
    sizes = (*channels, hidden)
    winners = [
        KWinners(size, each, boost, evaluation_factor=1.5)
        for size, each in zip(sizes, k, strict=True)
    ]
    return _cnn(channels, hidden, winners)


def dense_cnn(channels: tuple[int, int] = (30, 30), hidden: int = 1000) -> LayerNetwork:
    """The same with ReLUs: 514,320 parameters.

    Source: Dense CNN-2, as above.
    """
    return _cnn(channels, hidden, [nn.ReLU() for _ in range(3)])


def _cnn(channels: tuple[int, int], hidden: int, activations: Sequence[nn.Module]) -> LayerNetwork:
    first, second = channels
    return LayerNetwork(
        OrderedDict(
            conv1=nn.Conv2d(1, first, 5),
            pool1=nn.MaxPool2d(2),
            active1=activations[0],
            conv2=nn.Conv2d(first, second, 5),
            pool2=nn.MaxPool2d(2),
            active2=activations[1],
            flatten=nn.Flatten(),
            hidden=nn.Linear(second * 4 * 4, hidden),
            active3=activations[2],
            output=nn.Linear(hidden, 10),
        )
    )
