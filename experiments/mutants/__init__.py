"""The mistakes that measure the checker: right layers, each with one mistake in its gradient.

Each comes with data on which it shows and, where there is such a thing, with data on which it
cannot (a batch of one, a symmetric kernel, γ = 1, no ties), and with the one or two kinds of cause
that would be a right name for it. Those were decided from the mistake and the wording of `KINDS`,
before any diagnosis of it was seen. Beside the mutants stand the equivalents, right gradients that
look unusual, and right configurations drawn at random (`mutants.right`).
"""

from mutants.catalogue import CATALOGUE, EQUIVALENTS, fit, held_out
from mutants.mutant import Mutant
from mutants.unseen import UNSEEN

__all__ = ["CATALOGUE", "EQUIVALENTS", "MUTANTS", "UNSEEN", "Mutant", "fit", "held_out"]

MUTANTS: tuple[Mutant, ...] = (*CATALOGUE, *UNSEEN)
