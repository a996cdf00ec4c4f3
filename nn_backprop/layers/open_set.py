"""Losses that teach a classifier about what belongs to none of its classes.

Targets are class indices from 0 to K − 1; a negative one says that the example is unknown: rubbish,
a letter, anything but one of the K. The simplest answer needs no loss of its own, a garbage class:
K + 1 logits, the last for all that is unknown, and one weight a class in `weight` (K + 1,),
    F.cross_entropy(logits, torch.where(targets < 0, K, targets), weight).
It asks that everything unknown look alike. The losses here ask that it look like no class.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EntropicOpenSetLoss(nn.Module):
    """Cross-entropy of the known; of the unknown, cross-entropy with equal shares of all classes.

        S[n,c] = e^logits[n,c] / Σ_k e^logits[n,k]                               softmax
        q[n,c] = [c = y[n]] if y[n] ≥ 0, else 1/K                                what it should be
        loss = −(1/N) Σ_n Σ_c q[n,c] log S[n,c]

    Gradient: from ∂log S[n,c]/∂logits[n,j] = [c = j] − S[n,j] and Σ_c q[n,c] = 1,
        grad_logits[n,j] = −(1/N) Σ_c q[n,c] ([c = j] − S[n,j]) = (S[n,j] − q[n,j]) / N.
    What is, minus what should be; an unknown example pulls each probability towards 1/K.

    Minimum: the logarithm is concave, so for an unknown example (n is dropped)
        (1/K) Σ_c log S[c] ≤ log((1/K) Σ_c S[c]) = −log K,
    with equality if and only if all S[c] are equal. Its loss is therefore at least log K, which it
    reaches where all logits are equal, S[c] / S[j] being e^(logits[c] − logits[j]), and nowhere
    else.

    The mean is over all N examples, so the unknown weigh as much as their share of the batch.

    Shapes: logits (N, K); targets int64 (N,), below 0 for what is unknown; loss ().
    Raises ValueError for logits or targets of other shapes or another type.

    Source: Dhamija, Günther & Boult 2018, Reducing network agnostophobia, equation 1 and the lemmas
    about its minimum.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        _require_batch(logits, targets)
        K = logits.shape[1]
        unknown = (targets < 0)[:, None]
        shares = F.one_hot(targets.clamp(min=0), K).to(logits.dtype)
        return F.cross_entropy(logits, torch.where(unknown, 1 / K, shares))


class ObjectosphereLoss(nn.Module):
    """The entropic open-set loss, and a sphere that the known shall be outside, the unknown inside.

    F[n] are the deep features: what the last layer makes the logits of. With r[n] = ‖F[n]‖, the
    radius ξ of the sphere and the weight λ,
        ρ[n] = max(ξ − r[n], 0)² if y[n] ≥ 0, else r[n]²
        loss = EntropicOpenSetLoss + λ (1/N) Σ_n ρ[n].
    A last layer without bias makes equal logits of F = 0: both terms then ask the same of an
    unknown example.

    Gradient: r² = Σ_i F[i]² (n is dropped) gives 2 r dr = 2 Σ_i F[i] dF[i], so ∂r/∂F[i] = F[i] / r.
    Of a known example, dρ = −2 max(ξ − r, 0) dr; of an unknown one, dρ = 2 Σ_i F[i] dF[i]:
        grad_F[n,i] = −(2λ/N) max(ξ − r[n], 0) F[n,i] / r[n]                     known
        grad_F[n,i] = (2λ/N) F[n,i]                                              unknown
    and grad_logits is that of the entropic open-set loss. At r = ξ there is no kink: the slope is 0
    from both sides. At r = 0 a known example has one, the tip of a cone: ρ falls at the rate 2ξ in
    every direction. Opposite directions cancel, and the gradient is 0 there by
    definition: this term leaves features of length 0 where they are.

    Shapes: logits (N, K); features (N, D); targets int64 (N,), below 0 for the unknown; loss ().
    Raises ValueError for a radius or a weight that is negative or not finite; in the forward, for
    tensors of other shapes, or targets of another type.

    Source: Dhamija, Günther & Boult 2018, Reducing network agnostophobia, equation 2. The gradient
    at r = 0 is ours.
    """

    def __init__(self, radius: float, weight: float) -> None:
        super().__init__()
        for name, value in {"radius": radius, "weight": weight}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        self.radius, self.weight = radius, weight
        self.entropic = EntropicOpenSetLoss()

    def forward(self, logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        entropic = self.entropic(logits, targets)
        if features.dim() != 2 or len(features) != len(logits):
            raise ValueError(
                f"features must be (N, D) for logits {tuple(logits.shape)}, not "
                f"{tuple(features.shape)}"
            )
        squares = (features * features).sum(1)
        # √(r² + 1) − 1 where r² = 0: the length that there is, with slope 0 in place of 0/0
        zero = (squares == 0).to(features.dtype)
        lengths = (squares + zero) ** 0.5 - zero
        known = (targets >= 0).to(features.dtype)
        missing = F.relu(self.radius - lengths)
        unknown = features * (1 - known)[:, None]  # before they are squared: 0 · ∞ is NaN
        each = known * missing**2 + (unknown * unknown).sum(1)
        return entropic + self.weight * each.mean()

    def extra_repr(self) -> str:
        return f"radius={self.radius:g}, weight={self.weight:g}"


def _require_batch(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            "logits must be (N, K) and targets int64 (N,), not "
            f"{tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}"
        )
