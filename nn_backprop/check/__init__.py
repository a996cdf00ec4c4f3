"""Is this gradient right, and if not, why?"""

from nn_backprop.check.checker import assert_gradients, check_gradients
from nn_backprop.check.comparison import compare_gradients
from nn_backprop.check.report import KINDS, Cause, Entry, GradientMismatch, Probe, Report

__all__ = [
    "KINDS",
    "Cause",
    "Entry",
    "GradientMismatch",
    "Probe",
    "Report",
    "assert_gradients",
    "check_gradients",
    "compare_gradients",
]
