"""The layers that torch.nn lacks, as `nn.Module`s: they hold parameters, the rules compute."""

from nn_backprop.layers.kernel import (
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    median_distance,
    random_patches,
)
from nn_backprop.layers.locally_connected import LocallyConnected2d, UnitBiasConv2d
from nn_backprop.layers.low_rank import LowRankLinear
from nn_backprop.layers.octave import OctaveConv2d
from nn_backprop.layers.open_set import EntropicOpenSetLoss, ObjectosphereLoss
from nn_backprop.layers.soft_gate import SoftGate, learn_gate
from nn_backprop.layers.tied import TiedStack, UntiedStack
from nn_backprop.layers.winners import KWinners, decay_boosts

__all__ = [
    "EntropicOpenSetLoss",
    "KWinners",
    "LocallyConnected2d",
    "LowRankLinear",
    "ObjectosphereLoss",
    "OctaveConv2d",
    "RandomFourierFeatures",
    "RandomFourierFeatures2d",
    "SoftGate",
    "TiedStack",
    "UnitBiasConv2d",
    "UntiedStack",
    "decay_boosts",
    "learn_gate",
    "median_distance",
    "random_patches",
]
