"""Networks, as plain `nn.Module`s that know nothing of how their gradients are computed."""

from collections.abc import Callable

from torch import nn

from nn_backprop.models.cnn import CNN
from nn_backprop.models.fields import (
    FieldNetwork,
    fully_connected,
    locally_connected,
    shared_weights,
)
from nn_backprop.models.kernel import KernelNetwork
from nn_backprop.models.lecun1989 import NETS, LeCun1989
from nn_backprop.models.mlp import MLP, happy
from nn_backprop.models.norm_cnn import NormCNN, accurate_cnn, fast_cnn
from nn_backprop.models.octave_cnn import OctaveCNN

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "NETS",
    "FieldNetwork",
    "KernelNetwork",
    "LeCun1989",
    "NormCNN",
    "OctaveCNN",
    "accurate_cnn",
    "fast_cnn",
    "fully_connected",
    "happy",
    "locally_connected",
    "shared_weights",
]

# By name, as the command line takes them: each makes the network in its default size.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": CNN,
    "mlp": MLP,
    "happy": happy,
    "fast-cnn": fast_cnn,
    "accurate-cnn": accurate_cnn,
    **NETS,
    "fully-connected": fully_connected,
    "locally-connected": locally_connected,
    "shared-weights": shared_weights,
    "octave-cnn": OctaveCNN,
    "kernel": KernelNetwork,
}
