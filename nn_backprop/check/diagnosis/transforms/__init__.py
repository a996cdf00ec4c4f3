"""The wrong gradient as a transformation of what is known."""

from nn_backprop.check.diagnosis.guesses import Families
from nn_backprop.check.diagnosis.transforms import (
    masks,
    multiples,
    rearrangements,
    responses,
    sums,
    terms,
)

FAMILIES = Families(
    of_zero=(multiples.constants,),
    other_shapes=(rearrangements.rearranged, sums.reductions),
    usual=(
        multiples.constants, rearrangements.rearranged, rearrangements.shifted, multiples.channels,
        multiples.factors, masks.masks, masks.branches, terms.terms, terms.invariants,
        terms.own_statistics, terms.targets, terms.softmax_over_another_axis, responses.responses,
        responses.mirrored_kernel, responses.subsets, sums.operands, sums.scattered,
        masks.other_mask, masks.drawn_mask, rearrangements.repeated, terms.precision,
    ),
)  # fmt: skip
