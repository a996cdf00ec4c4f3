"""The catalogue: the mistakes that people make in hand-written backward passes, and equivalents.

They are those of public issues; the layers around them are written here. The hypotheses of the
checker were written with the mutants of `fit()`, every second of a family, and the names first
scored on the others, `held_out()`. Their misses have been read since, so that names are scored on
`mutants.unseen` now.
"""

from mutants.catalogue.convolution import CONVOLUTION
from mutants.catalogue.dense import ACTIVATION, BIAS, LINEAR
from mutants.catalogue.equivalents import EQUIVALENTS
from mutants.catalogue.lookups import ATTENTION, EMBEDDING
from mutants.catalogue.losses import LOSS
from mutants.catalogue.normalization import DROPOUT, NORMALIZATION
from mutants.catalogue.pooling import POOLING
from mutants.catalogue.protocol import PROTOCOL
from mutants.catalogue.recurrent import RECURRENT
from mutants.mutant import Mutant

__all__ = ["CATALOGUE", "EQUIVALENTS", "fit", "held_out"]

FAMILIES = (
    LINEAR, BIAS, ACTIVATION, LOSS, CONVOLUTION, POOLING, NORMALIZATION, DROPOUT, RECURRENT,
    EMBEDDING, ATTENTION, PROTOCOL,
)  # fmt: skip
CATALOGUE: tuple[Mutant, ...] = sum(FAMILIES, ())


def fit() -> tuple[Mutant, ...]:
    """The half that hypotheses may be fitted to: the even places in each family."""
    return tuple(mutant for family in FAMILIES for mutant in family[::2])


def held_out() -> tuple[Mutant, ...]:
    """The half that the first score counted on: the odd places in each family."""
    return tuple(mutant for family in FAMILIES for mutant in family[1::2])
