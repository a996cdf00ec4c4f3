"""A gate that lets answers pass if their confidence exceeds a threshold, and learns the threshold.

An answer that passes costs 1 if it is wrong; one that is rejected costs λ, the price of a
rejection. `nn_backprop.studies.rejection` has the hard gate, its best threshold by a full sweep.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class SoftGate(nn.Module):
    """g = σ((s − τ) / T): near 1 where the score s exceeds the threshold τ, near 0 below.

    The cost of N answers with errors e[n] in {0, 1} (right: 0, wrong: 1) and the price λ is
        R = (1/N) Σ_n (g[n] e[n] + (1 − g[n]) λ).

    Gradient: R has the slope (e[n] − λ) / N in g[n], and σ' = σ (1 − σ), so with
    k[n] = g[n] (1 − g[n]) / T, a bump of area 1 about τ (as a function of s),
        grad_s[n] = (1/N) k[n] (e[n] − λ)
        grad_τ = (1/N) Σ_n k[n] (λ − e[n]).
    Answers near τ alone count: each wrong one pushes τ up by 1 − λ, each right one down by λ.

    Where it ends: grad_τ = 0 reads Σ_n k[n] e[n] / Σ_n k[n] = λ. The left side estimates the error
    rate at the score τ, from the answers within a few T of it. So τ is where that rate falls to λ,
    which is Chow's rule: accept if and only if P(wrong | s) < λ. If s is a calibrated confidence,
    P(wrong | s) = 1 − s, then τ = 1 − λ.

    T is set, not learnt. σ(u) is the probability that u exceeds a number ε of the logistic
    distribution, so g is that of s > τ + T ε, and R the mean over ε of what the hard gates at
    τ + T ε cost: never less than the best of them costs. Learning T would lead to T → 0, that best
    hard gate, where the gradient is 0 almost everywhere. A small T looks at few answers, a large
    one blurs: it should be small against the distance over which the error rate, or the density of
    the scores, changes much. Where confidences crowd near 1, their log-odds are a better score.

    Shapes: s and g of any, the same, shape; τ `threshold` ().
    Raises ValueError for a temperature that is not positive and finite.

    Source: Chow 1970, On optimum recognition error and reject tradeoff, for the cost and the rule.
    """

    def __init__(
        self,
        threshold: float,
        temperature: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {temperature}")
        self.threshold = nn.Parameter(torch.tensor(float(threshold), device=device, dtype=dtype))
        self.temperature = temperature

    def forward(self, scores: Tensor) -> Tensor:
        return torch.sigmoid((scores - self.threshold) / self.temperature)

    def cost(self, scores: Tensor, errors: Tensor, price: float) -> Tensor:
        """R, from scores and errors of the same shape."""
        gates = self(scores)
        return (gates * errors + (1 - gates) * price).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


def learn_gate(scores: Any, errors: Any, price: float, temperature: float) -> SoftGate:
    """The gate of that temperature whose threshold costs least, by gradient descent (Adam).

    Every step uses all scores. At a small T the cost has many shallow minima, at a large one few,
    so T starts at the scores' deviation or up to twice as much and is halved until it is
    `temperature`; at each T, τ goes on from where it was, by 200 steps of at most about T/10. That
    finds a good minimum, not for certain the lowest. τ stays within 4T of the scores, where no
    gradient has vanished yet: if no answer is wrong it ends below them all, if all are, above.

    scores, errors: tensors or arrays (N,), N at least 1; errors 0 or 1. The gate is made in float64
    on the CPU. Raises ValueError for other shapes, scores or errors that are not finite, a price
    that is not from 0 to 1, or a temperature that is not positive and finite.
    """
    scores, errors = (
        torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
        for values in (scores, errors)
    )
    if scores.dim() != 1 or scores.shape != errors.shape or not len(scores):
        raise ValueError(
            "scores and errors must be (N,), of one or more answers, not "
            f"{tuple(scores.shape)} and {tuple(errors.shape)}"
        )
    if not (scores.isfinite().all() and errors.isfinite().all()):
        raise ValueError("scores or errors have entries that are NaN or infinite")
    if not 0 <= price <= 1:
        raise ValueError(f"price must be from 0 to 1, what an error costs, not {price}")
    gate = SoftGate(scores.mean().item(), temperature, "cpu", torch.float64)
    spread = max(scores.std(correction=0).item(), temperature)
    for k in range(math.ceil(math.log2(spread / temperature)), -1, -1):
        T = temperature * 2**k
        gate = SoftGate(gate.threshold.item(), T, "cpu", torch.float64)
        optimizer = torch.optim.Adam(gate.parameters(), lr=T / 10)
        for _ in range(200):
            with torch.enable_grad():
                cost = gate.cost(scores, errors, price)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            with torch.no_grad():
                gate.threshold.clamp_(scores.min() - 4 * T, scores.max() + 4 * T)
    return gate
