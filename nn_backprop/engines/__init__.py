"""Ways to the gradients of a model: the tape, its replay, a rule as a Function, the pass by hand.

An engine computes one model's gradients; `ENGINES` has the three of them by name.
"""

from nn_backprop.engines.disagreement import disagreements
from nn_backprop.engines.engine import ENGINES, Engine, autograd, for_training, written_out
from nn_backprop.engines.precision import has_bfloat16, in_precision

__all__ = [
    "ENGINES",
    "Engine",
    "autograd",
    "disagreements",
    "for_training",
    "has_bfloat16",
    "in_precision",
    "written_out",
]
