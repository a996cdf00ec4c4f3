"""Networks, as plain `nn.Module`s that know nothing of how their gradients are computed."""

from collections.abc import Callable

from torch import nn

from nn_backprop.models.cnn import CNN
from nn_backprop.models.kernel import KernelNetwork
from nn_backprop.models.mlp import MLP, happy
from nn_backprop.models.norm_cnn import NormCNN, accurate_cnn, fast_cnn

__all__ = ["CNN", "MLP", "MODELS", "KernelNetwork", "NormCNN", "accurate_cnn", "fast_cnn", "happy"]

# By name, as the command line takes them: each makes the network in its default size.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": CNN,
    "mlp": MLP,
    "happy": happy,
    "fast-cnn": fast_cnn,
    "accurate-cnn": accurate_cnn,
    "kernel": KernelNetwork,
}
