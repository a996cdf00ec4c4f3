"""The wrong gradient as a transformation of what is known, one family a file."""

from nn_backprop.check.diagnosis.guesses import Families
from nn_backprop.check.diagnosis.transforms import (
    factors,
    masks,
    multiples,
    precision,
    rearrangements,
    responses,
    subsets,
    sums,
    terms,
)

FAMILIES = Families(
    of_zero=(multiples.constants,),
    other_shapes=(rearrangements.rearranged, sums.reductions),
    usual=(
        multiples.constants,
        rearrangements.rearranged,
        rearrangements.shifted,
        multiples.channels,
        factors.factors,
        masks.masks,
        masks.branches,
        terms.terms,
        terms.invariants,
        terms.own_statistics,
        terms.targets,
        terms.softmax_over_another_axis,
        responses.responses,
        responses.mirrored_kernel,
        subsets.subsets,
        sums.operands,
        sums.scattered,
        masks.other_mask,
        masks.drawn_mask,
        rearrangements.repeated,
        precision.precision,
    ),
)
