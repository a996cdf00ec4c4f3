"""The mistakes unseen: no hypothesis was written with them, so names are scored on them.

Their layers are others than the catalogue's, and so are the sorts of mistakes.
"""

from mutants.mutant import Mutant
from mutants.unseen.convolution import CONVOLUTION
from mutants.unseen.dense import ACTIVATION, BIAS, LINEAR
from mutants.unseen.lookups import ATTENTION, EMBEDDING
from mutants.unseen.losses import LOSS
from mutants.unseen.normalization import DROPOUT, NORMALIZATION
from mutants.unseen.pooling import POOLING
from mutants.unseen.protocol import PROTOCOL
from mutants.unseen.recurrent import RECURRENT

UNSEEN: tuple[Mutant, ...] = (
    *LINEAR, *BIAS, *ACTIVATION, *LOSS, *EMBEDDING, *ATTENTION, *PROTOCOL,
    *CONVOLUTION, *POOLING, *NORMALIZATION, *DROPOUT, *RECURRENT,
)  # fmt: skip
