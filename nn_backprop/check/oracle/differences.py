"""Derivatives along a direction, by central differences: for what torch cannot differentiate.

The step falls, the slopes are extrapolated to step 0, and their changes estimate the error (Ridders
1982; Richardson 1911). Here, ⟨u, f⟩ is the sum of the outputs times the upstream gradient.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from nn_backprop.check.oracle.directions import PaddingStays, typical
from nn_backprop.check.oracle.rounding import Rounding
from nn_backprop.check.target.target import ForwardRaised, Target, largest

Outputs = Callable[[float], list[Tensor]]


class Differences:
    """The outputs of a target beside its values."""

    def __init__(self, target: Target):
        self.target = target

    @cached_property
    def noise(self) -> list[Tensor]:
        """How far rounding may move each entry of the outputs: its own rounding, and what becomes
        of a rounding of the values."""
        values, dtype = self.target.values, self.target.dtype
        outputs = self.target.outputs({n: v.clone() for n, v in values.items()})
        eps = [max(torch.finfo(d).eps for d in (dtype, z.dtype)) for z in outputs]
        here = [z.double().clone() for z in outputs]
        noise = [z.abs() * e for z, e in zip(here, eps, strict=True)]
        for run in range(2):
            mode = Rounding(dtype, seed=1 + run, keep_ties=False)
            with suppress(ForwardRaised):  # outside the function's domain
                moved = self.target.outputs({n: mode.moved(v).clone() for n, v in values.items()})
                for i, z in enumerate(moved):
                    noise[i] = torch.maximum(noise[i], (z.double() - here[i]).abs())
        return noise

    def rounding(self, upstream: list[Tensor]) -> float:
        """How far rounding may move ⟨u, f⟩."""
        return _size(self.noise, [u.double() for u in upstream])

    def along(self, name: str, direction: Tensor) -> tuple[Outputs, list[float]]:
        """The outputs as a function of a step along a direction of one value, and steps that are
        long: for the entries that move, for the whole value, and for exp and its kin."""
        value = self.target.values[name]
        along = direction.to(value)

        def outputs(step: float) -> list[Tensor]:
            handed = {n: v.clone() for n, v in self.target.values.items()}
            handed[name] = value + step * along
            with PaddingStays(handed, self.target.values):
                return [z.detach().double().clone() for z in self.target.outputs(handed)]

        unit = along.abs().max().item() or 1.0
        scales = {typical(value[along != 0]): None, typical(value): None, 1.0: None}
        return outputs, [scale / unit for scale in scales]

    def slopes(
        self, name: str, directions: list[Tensor], upstream: list[Tensor]
    ) -> list[tuple[float, float]]:
        """The derivative of ⟨u, f⟩ along each direction of one value, and the estimated error of
        that. Longer steps are taken only where the shorter could not tell."""
        eps = torch.finfo(self.target.values[name].dtype).eps
        found = [(math.nan, math.inf)] * len(directions)
        for longer in range(3):
            most = max((abs(s) for s, e in found if e < 0.1 * abs(s)), default=0.0)
            for i, direction in enumerate(directions):
                slope, error = found[i]
                if error <= 1e-6 * max(most, abs(slope)):
                    continue
                outputs, scales = self.along(name, direction)
                if longer < len(scales):
                    again = extrapolated(outputs, upstream, scales[longer], eps, self.noise)
                    found[i] = again if again[1] < error else found[i]
        return found

    def move(self, name: str, direction: Tensor) -> bool:
        """Whether a short step along a direction moves an output by more than rounding does."""
        eps = torch.finfo(self.target.values[name].dtype).eps
        outputs, scales = self.along(name, direction)
        for step in (scale * eps**0.4 for scale in scales):
            ends = zip(outputs(step), outputs(-step), self.noise, strict=True)
            if any(bool(((p - q).abs() > 4 * noise).any()) for p, q, noise in ends):
                return True
        return False

    def contradict(
        self, name: str, direction: Tensor, product: float, upstream: list[Tensor], noise: float
    ) -> bool:
        """Whether the slope along a direction is clearly another than `product`, `noise` apart: by
        steps of each length at which rounding does not hide either, and of one at least. The steps
        are short, so that no kink lies between; a large network has many."""
        eps = torch.finfo(self.target.values[name].dtype).eps
        outputs, scales = self.along(name, direction)
        size = self.rounding(upstream)

        def apart(one: float, other: float, step: float) -> bool:
            return abs(one - other) > (eps**0.3 * max(abs(one), abs(other)) + size / step + noise)

        spacing = eps * largest(self.target.values[name]) / (largest(direction) or 1.0)
        tells = False
        for scale in scales:
            if scale * eps**0.45 < 4 * spacing:
                continue
            slopes: list[tuple[float, float]] = []
            # Where rounding makes a staircase of the function, a short step may not leave a tread.
            for step in (scale * eps**power for power in (0.45, 0.4, 0.25, 0.12)):
                ahead, behind = outputs(step), outputs(-step)
                if not all(map(torch.equal, ahead, behind)):
                    slopes.append((_dot(ahead, behind, upstream) / (2 * step), step))
                if len(slopes) == 2:
                    break
            if slopes and slopes[0][1] > scale * eps**0.4:
                return False
            if any(2 * size / step > max(abs(slope), abs(product)) for slope, step in slopes):
                continue
            tells = True
            if not all(apart(slope, product, step) for slope, step in slopes):
                return False
            # Two that do not agree have not converged, and tell nothing.
            if len(slopes) == 2 and apart(slopes[0][0], slopes[1][0], slopes[0][1]):
                return False
        return tells


def extrapolated(
    outputs: Outputs, upstream: list[Tensor], scale: float, eps: float, noise: list[Tensor]
) -> tuple[float, float]:
    """d/dh ⟨u, f(h)⟩ at 0, by Ridders' extrapolation of central differences

        D₀(h) = (f(h) − f(−h)) / 2h,     D_{m+1}(h) = (4^{m+1} D_m(h/2) − D_m(h)) / (4^{m+1} − 1)

    and its error: the least change between neighbours in the table, and what the `noise` of f
    leaves. The steps fall by halves from scale/16, until the error of what is known falls no more.
    """
    best, error, resolved, has_moved = math.nan, math.inf, False, False
    before: list[float] = []
    step, since = scale / 16, 0
    while step > scale * max(eps**0.6, 1e-10):
        ahead, behind = outputs(step), outputs(-step)
        row = [_dot(ahead, behind, upstream) / (2 * step)]
        # Outputs that did not move are exact, unless none did: then noise may have hidden it.
        moved = [p != q for p, q in zip(ahead, behind, strict=True)]
        still = not any(m.any() for m in moved)
        if still and has_moved:  # a staircase: the step no longer leaves its tread
            break
        has_moved = not still
        # ... or unless noise is not small beside what the others moved by.
        pairs = zip(ahead, behind, strict=True)
        furthest = max((p - q).abs().max().item() for p, q in pairs if p.numel())
        unseen = [
            torch.maximum(n, eps * p.abs()) * (m | still | (n > 1e-6 * furthest))
            for n, p, m in zip(noise, ahead, moved, strict=True)
        ]
        rounding = _size(unseen, upstream) / step
        since += 1
        for m, coarser in enumerate(before):
            power = 4.0 ** (m + 1)
            row.append((power * row[m] - coarser) / (power - 1))
            change = max(abs(row[m + 1] - row[m]), abs(row[m + 1] - coarser)) + rounding
            # What is known to a tenth is better than what is not, however small that error is:
            # far from a bend, a step too long sees a slope that is small and wrong.
            known = change < 0.1 * abs(row[m + 1])
            if (known, -change) > (resolved, -error):
                best, error, resolved, since = row[m + 1], change, known, 0
        before = row if all(map(math.isfinite, row)) else []
        step /= 2
        if since > 5 and (resolved or still):
            break
    if not has_moved and best == 0:  # below the rounding of outputs of size 1, nothing is seen
        error = max(error, eps * max(map(largest, upstream), default=0.0) / max(1.0, scale))
    # Steps longer than a period of the function, or beyond a kink, may agree with one another by
    # accident: the slope counts if the shortest steps agree.
    size = _size(noise, upstream)
    step = scale * eps**0.3
    flat = all(map(torch.equal, outputs(step), outputs(-step)))
    if flat and abs(best) * step > size + error * step:
        return 0.0, size / step
    short = []
    for step in (scale * eps**0.45, scale * eps**0.5):
        ahead, behind = outputs(step), outputs(-step)
        if all(map(torch.equal, ahead, behind)):
            return best, error
        short.append((_dot(ahead, behind, upstream) / (2 * step), size / step))
    (longer, unsure), (shorter, more_unsure) = short
    if not abs(longer - shorter) <= unsure + more_unsure + 1e-3 * max(abs(longer), abs(shorter)):
        return best, math.inf
    if abs(best - longer) <= error + unsure + 1e-3 * abs(longer):
        return best, error
    return longer, abs(longer - shorter) + unsure


def _dot(ahead: list[Tensor], behind: list[Tensor], upstream: list[Tensor]) -> float:
    pairs = zip(ahead, behind, upstream, strict=True)
    return sum(((p - q) * u).sum().item() for p, q, u in pairs)


def _size(noise: list[Tensor], upstream: list[Tensor]) -> float:
    """How far ⟨u, f⟩ may move if each entry of f moves by its noise."""
    return sum((n * u).abs().sum().item() for n, u in zip(noise, upstream, strict=True))
