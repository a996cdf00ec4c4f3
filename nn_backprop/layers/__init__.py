"""The layers that torch.nn lacks, as `nn.Module`s: they hold parameters, the rules compute."""

from nn_backprop.layers.locally_connected import LocallyConnected2d, UnitBiasConv2d
from nn_backprop.layers.octave import OctaveConv2d

__all__ = ["LocallyConnected2d", "OctaveConv2d", "UnitBiasConv2d"]
