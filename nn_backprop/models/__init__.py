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
from nn_backprop.models.lenet import LeNet5, lenet_300_100
from nn_backprop.models.memoriser import Memoriser, memorise
from nn_backprop.models.mlp import MLP, GeluMLP, happy
from nn_backprop.models.norm_cnn import NormCNN, accurate_cnn, fast_cnn
from nn_backprop.models.octave_cnn import OctaveCNN
from nn_backprop.models.sparse import (
    ActivityPenalty,
    LayerNetwork,
    dense_cnn,
    sparse_cnn,
    sparse_mlp,
)
from nn_backprop.models.tied import StackNetwork, tied_network, untied_network

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "NETS",
    "ActivityPenalty",
    "FieldNetwork",
    "GeluMLP",
    "KernelNetwork",
    "LayerNetwork",
    "LeCun1989",
    "LeNet5",
    "Memoriser",
    "NormCNN",
    "OctaveCNN",
    "StackNetwork",
    "accurate_cnn",
    "dense_cnn",
    "fast_cnn",
    "fully_connected",
    "happy",
    "lenet_300_100",
    "locally_connected",
    "memorise",
    "shared_weights",
    "sparse_cnn",
    "sparse_mlp",
    "tied_network",
    "untied_network",
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
    "tied": tied_network,
    "lenet-300-100": lenet_300_100,
    "lenet-5": LeNet5,
    "sparse-cnn": sparse_cnn,
}
