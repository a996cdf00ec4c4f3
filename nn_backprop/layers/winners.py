"""Few active units: those of an example that compete best, with a handicap for frequent winners."""

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from nn_backprop.layers.arguments import require_integers
from nn_backprop.rules.winners import k_winners


class KWinners(nn.Module):
    """Passes on the k largest activations of each example and sets the others to 0.

    It takes the place of a ReLU. Of U units k win: of all units of a vector, or of the U = C·H·W of
    all maps together. Those that have won often get a handicap, so that none is left out for good:

        score[n,c,h,w] = x[n,c,h,w] exp(−β duty[c])
        z[n,c,h,w]     = x[n,c,h,w] if its score is among the k largest of example n, else 0

    (The paper's boost is exp(β (k/U − duty[c])). Its factor exp(β k/U), the same for all, changes
    no choice.) The duty cycle of channel c is the share of its units that are active, that is, not
    0 in z, averaged over places and examples; a unit of a vector is a channel of one place. In
    training mode it is updated after the choice: with m[c] the mean of a batch of N examples,

        duty[c] ← duty[c] + N/T (m[c] − duty[c]),  T = max(N, min(period, examples seen)),

    with the examples seen, this batch included. That is about the plain mean over the first
    `period` examples, and from then on a running one; an empty batch changes nothing. β starts at
    `boost`; `decay_boosts`, called after each epoch, multiplies it by `decay`. Duty cycle, β and
    the number of examples seen are buffers, and so in the state dict.

    In evaluation mode nothing is updated. The handicap stays in the choice, as it was while the
    later layers learnt; and k is multiplied by `evaluation_factor` (1.5 in the authors'
    experiments) and rounded; a half goes to the even number, where their Python 2.7 goes up.

    Gradient: through the winners alone, grad_x = grad_z [wins]; none to the duty cycle, which is a
    constant (`rules.winners`, where ties and NaN are settled too). If k ≥ U, all pass as they are.
    Activations need not be positive: a negative one passes if fewer than k others are larger; and
    of two negative ones, the handicap brings the frequent winner nearer to 0, and so favours it.

    Shapes: x (N, channels, ...), z the same; duty_cycle (channels,).
    Parameters: none. `k` is a number, or the share of the units, between 0 and 1, of which at least
    one unit is left.
    Raises ValueError for a size that is no integer of at least 1, a share that is not between 0 and
    1, a boost that is negative or not finite, a decay that is not from 0 to 1, an evaluation_factor
    below 1; in the forward, for activations of another number of channels.

    Source: Ahmad & Scheinkman 2019, How can we be so dense? The benefits of using highly sparse
    representations; their code (numenta/htmpapers) for k in evaluation, for β's decay of 0.85 and
    for the period. Unlike there, a negative winner counts as active; and if k ≥ U all pass, where
    their code has a ReLU.
    """

    duty_cycle: Tensor
    strength: Tensor
    examples: Tensor

    def __init__(
        self,
        channels: int,
        k: int | float,
        boost: float = 1.5,
        decay: float = 0.85,
        period: int = 1000,
        evaluation_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integers(channels=channels, period=period)
        if isinstance(k, Integral):
            require_integers(k=k)
        elif not 0 < k < 1:
            raise ValueError(
                f"k must be an integer of at least 1 or a share within 0 and 1, not {k}"
            )
        if not 0 <= boost < math.inf:
            raise ValueError(f"boost must be finite and not negative, not {boost}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, not {decay}")
        if not 1 <= evaluation_factor < math.inf:
            raise ValueError(f"evaluation_factor must be at least 1, not {evaluation_factor}")
        self.channels, self.k, self.boost, self.decay = channels, k, boost, decay
        self.period, self.evaluation_factor = period, evaluation_factor
        self.register_buffer("duty_cycle", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("strength", torch.tensor(float(boost), device=device, dtype=dtype))
        self.register_buffer("examples", torch.tensor(0, device=device))

    def winners(self, units: int) -> int:
        """How many of so many units win in the present mode; that or more if all do."""
        k = int(self.k) if isinstance(self.k, Integral) else max(1, round(self.k * units))
        return k if self.training else round(k * self.evaluation_factor)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"the layer takes (N, {self.channels}, ...), not {(*x.shape,)}")
        boost = torch.exp(-self.strength * self.duty_cycle).view(-1, *(1 for _ in x.shape[2:]))
        z = k_winners(x, self.winners(x.shape[1:].numel()), boost)
        if self.training:
            self._count(z.detach())
        return z

    def _count(self, z: Tensor) -> None:
        """Updates the duty cycle: in tensors alone, so that a recorded pass does it as well."""
        N = len(z)
        if N == 0:  # has no mean
            return
        self.examples.add_(N)
        window = self.examples.clamp(max=max(self.period, N)).to(self.duty_cycle.dtype)
        others = [axis for axis in range(z.dim()) if axis != 1]
        active = (z != 0).to(self.duty_cycle.dtype).mean(others)
        self.duty_cycle.add_((active - self.duty_cycle) * (N / window))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, k={self.k}, boost={self.boost:g}, decay={self.decay:g}, "
            f"period={self.period}, evaluation_factor={self.evaluation_factor:g}"
        )


def decay_boosts(model: nn.Module) -> None:
    """Multiplies the boost strength β of every KWinners in the model by its `decay`.

    To be called after each epoch.
    """
    for layer in model.modules():
        if isinstance(layer, KWinners):
            layer.strength.mul_(layer.decay)
