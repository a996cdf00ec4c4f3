"""Neural networks and backpropagation: every derivative derived by hand, proved, and put to work.

The notation, the same in every derivation, einsum string and comment:

    x                 input of a layer             weight, bias    its parameters
    z                 affine output                a               after the activation
    logits, y, loss   prediction, target, cost     patches         of x under a kernel
    grad_q            gradient of the loss with respect to q; always of q's shape

    [condition]       1 where the condition holds, else 0

    n  batch          i  in-feature                o  out-feature or out-channel
    c  in-channel     h w  output position         p q  kernel offset            t  time

With these letters a gradient is the forward's rearranged: the gradient of an operand is the other
operand times grad_z, summed over every letter that the operand lacks.
"""

from nn_backprop import layers, models, rules
from nn_backprop.check import (
    Cause,
    GradientMismatch,
    Report,
    assert_gradients,
    check_gradients,
    compare_gradients,
)
from nn_backprop.engines import by_hand
from nn_backprop.engines.function import as_function
from nn_backprop.engines.tape import MissingRuleError, Tape, backprop

__all__ = [
    "Cause",
    "GradientMismatch",
    "MissingRuleError",
    "Report",
    "Tape",
    "as_function",
    "assert_gradients",
    "backprop",
    "by_hand",
    "check_gradients",
    "compare_gradients",
    "layers",
    "models",
    "rules",
]
