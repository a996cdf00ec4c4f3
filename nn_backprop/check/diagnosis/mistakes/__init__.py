"""Mistakes in the chain rule of a recorded forward."""

from nn_backprop.check.diagnosis.mistakes import (
    alternatives,
    scales,
    statistics,
    steps,
    substitutions,
    uses,
    windows,
)
from nn_backprop.check.diagnosis.search import Families

FAMILIES = Families(
    of_zero=(scales.multiplied,),
    several_steps=(
        uses.other_values, uses.overwritten, uses.slices_exchanged,
        statistics.reduced, uses.shared_rows, uses.not_undone, alternatives.constants,
        alternatives.exchanged, alternatives.delayed,
    ),
    one_step=(
        steps.skipped, steps.edge_turned, steps.upstream_changed, steps.operands_exchanged,
        windows.moved, steps.branches_exchanged, windows.convolved, windows.uncropped,
        steps.forwards, steps.maximum_spread, windows.options_ignored, substitutions.other_index,
    ),
    of_several_outputs=(steps.parts_exchanged, windows.pooled),
    with_sweeps=(statistics.taken_for_constants, alternatives.other_forwards),
    other_tensors=(
        substitutions.other_operand, substitutions.other_derivative, substitutions.factor,
    ),
    other_shapes=(statistics.not_reduced,),
)  # fmt: skip
