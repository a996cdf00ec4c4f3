"""Rounded to a shorter type."""

from collections.abc import Iterator

import torch

from nn_backprop.check.diagnosis.arithmetic import TINY
from nn_backprop.check.diagnosis.case import Case
from nn_backprop.check.diagnosis.guesses import Guess


def precision(case: Case) -> Iterator[Guess]:
    """Rounded to a shorter type, or off by no more than that."""
    actual, expected, size = case.actual, case.expected, float(case.expected.abs().max())
    live = expected != 0
    relative = ((actual - expected).abs() / expected.abs())[live]
    cosine = float((actual - expected).flatten() @ expected.flatten())
    cosine /= case.error * float(expected.norm()) + TINY
    random = len(relative) >= 16 and abs(cosine) < 2.5 / len(relative) ** 0.5
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        unit = torch.finfo(dtype).eps / 2
        coarse = int((expected.to(dtype).double() != expected).sum()) >= 3
        fits = coarse and bool((actual.to(dtype).double() == actual).all())
        worst = float((actual - expected).abs().max()) / size
        rounded = random and float(relative.median()) >= 0.1 * unit
        bound = 4 * size if dtype == torch.float32 else 1.1 * expected.abs()
        rounded &= bool(((actual - expected).abs() <= unit * bound).all())
        if unit / 4 <= worst <= 64 * unit and (fits or rounded):
            why = f"every entry fits {dtype}" if fits else "the errors look like rounding"
            formula = f"expected to {worst:.0e} of its largest entry; {why}"
            detail = f"is right to the precision of {str(dtype).removeprefix('torch.')} only"
            yield Guess("wrong-precision", 3, detail, actual, formula)
            return
