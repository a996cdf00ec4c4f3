"""A network whose hidden layers all have one weight, and the same with a weight each."""

from torch import Tensor, nn

from nn_backprop.layers import TiedStack, UntiedStack
from nn_backprop.layers.arguments import require_integers
from nn_backprop.models.classifier import Classifier


class StackNetwork(Classifier):
    """u = U x + b, a stack of layers with u at every step, then one affine layer.

        h_0 = ReLU(u),   h_t = ReLU(W_t h_{t−1} + u)  t = 1 … L,   output = V h_L + c

    Shapes: inputs (N, ...) with ∏ ... = in_features; output (N, classes), logits.
    Raises ValueError, as do the functions below, for a size that is no integer of at least 1.
    """

    def __init__(
        self, width: int, stack: TiedStack | UntiedStack, in_features: int, classes: int
    ) -> None:
        super().__init__()
        require_integers(width=width, in_features=in_features, classes=classes)
        self.input = nn.Linear(in_features, width)
        self.stack = stack
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.stack(self.input(x.flatten(1))))


def tied_network(
    width: int = 128, depth: int = 4, in_features: int = 784, classes: int = 10
) -> StackNetwork:
    """One W for all steps: with the defaults 118,154 parameters, whatever the depth."""
    require_integers(width=width, depth=depth)
    layer = nn.Linear(width, width, bias=False)
    return StackNetwork(width, TiedStack(layer, depth), in_features, classes)


def untied_network(
    width: int = 128, depth: int = 4, in_features: int = 784, classes: int = 10
) -> StackNetwork:
    """A W for each step: width² more parameters a step. Of depth 1, it is the tied network."""
    require_integers(width=width, depth=depth)
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    return StackNetwork(width, UntiedStack(layers), in_features, classes)
