"""The mistakes that measure the checker: right layers, each with one mistake in its gradient.

Each comes with data on which it shows and, where there is such a thing, with data on which it
cannot (a batch of one, a symmetric kernel, γ = 1, no ties), and with the one or two kinds of cause
that would be a right name for it. Those were decided from the mistake and the wording of `KINDS`,
before any diagnosis of it was seen. Beside the mutants stand the equivalents, right gradients that
look unusual, and right configurations drawn at random (`mutants.right`).

The catalogue is what people do wrong in hand-written backward passes, as seen in public issues; the
layers around it are written here. Hypotheses of the checker were written with the mutants of
`fit()`, and the misses of the others have been read since. So names are scored on those unseen: no
hypothesis was written with them, and most of their layers and sorts of mistakes are others.
"""

from mutants.activation import ACTIVATION, UNSEEN_ACTIVATION
from mutants.convolution import CONVOLUTION, UNSEEN_CONVOLUTION
from mutants.dense import BIAS, LINEAR, UNSEEN_BIAS, UNSEEN_LINEAR
from mutants.equivalents import EQUIVALENTS
from mutants.lookups import ATTENTION, EMBEDDING, UNSEEN_ATTENTION, UNSEEN_EMBEDDING
from mutants.losses import LOSS, UNSEEN_LOSS
from mutants.mutant import Mutant
from mutants.normalization import DROPOUT, NORMALIZATION, UNSEEN_DROPOUT, UNSEEN_NORMALIZATION
from mutants.pooling import POOLING, UNSEEN_POOLING
from mutants.protocol import PROTOCOL, UNSEEN_PROTOCOL
from mutants.recurrent import RECURRENT, UNSEEN_RECURRENT

__all__ = ["CATALOGUE", "EQUIVALENTS", "MUTANTS", "UNSEEN", "Mutant", "fit"]

FAMILIES = (
    LINEAR, BIAS, ACTIVATION, LOSS, CONVOLUTION, POOLING, NORMALIZATION, DROPOUT, RECURRENT,
    EMBEDDING, ATTENTION, PROTOCOL,
)  # fmt: skip
CATALOGUE: tuple[Mutant, ...] = sum(FAMILIES, ())
UNSEEN: tuple[Mutant, ...] = (
    *UNSEEN_LINEAR, *UNSEEN_BIAS, *UNSEEN_ACTIVATION, *UNSEEN_LOSS, *UNSEEN_EMBEDDING,
    *UNSEEN_ATTENTION, *UNSEEN_PROTOCOL, *UNSEEN_CONVOLUTION, *UNSEEN_POOLING,
    *UNSEEN_NORMALIZATION, *UNSEEN_DROPOUT, *UNSEEN_RECURRENT,
)  # fmt: skip
MUTANTS: tuple[Mutant, ...] = (*CATALOGUE, *UNSEEN)


def fit() -> tuple[Mutant, ...]:
    """The half that hypotheses may be fitted to: the even places in each family."""
    return tuple(mutant for family in FAMILIES for mutant in family[::2])
