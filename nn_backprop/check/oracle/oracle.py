"""The right gradient, from sources that share nothing with the backward under test.

In this order, each where it applies:

1. *plain forward*: autograd through the reference or, where the target calls custom Functions,
   through their own forwards; element by element.
2. *forward mode*: where there is no such forward, ⟨J v, u⟩ = ⟨v, Jᵀ u⟩ for the upstream gradient u,
   with J v from dual numbers, exact to rounding; v runs over the unit vectors, or over random
   directions where the elements are too many.
3. *differences*: for what torch cannot differentiate, central differences of falling step.

The first two are themselves held against a difference along one random direction for each
gradient, so that a forward which hides a dependence (by `detach`, `no_grad`, a foreign library) is
not taken for one that has none. Where autograd finds no way from an output to a value at all, it is
enough that the outputs move with it.
"""

import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nn_backprop.check.oracle import directions
from nn_backprop.check.oracle.differences import Differences
from nn_backprop.check.oracle.directions import normal, random_direction, signs, typical, unit
from nn_backprop.check.oracle.rounding import noise_of
from nn_backprop.check.target.arguments import Unsuitable
from nn_backprop.check.target.custom_functions import differentiated_forwards
from nn_backprop.check.target.target import (
    ForwardRaised,
    Gradients,
    Target,
    Tensors,
    Upstream,
    largest,
)

# More elements than these are checked along random directions instead, at first.
ELEMENTWISE = 3000
DIRECTIONS = 8
FEW_DIRECTIONS = 2  # in one of several checks
# What an extrapolated difference is trusted to at best, relative to the gradient's largest entry.
DIFFERENCE_FLOOR = 1e-9


@dataclass
class Expected:
    """One gradient as an oracle has it."""

    oracle: str
    uncertainty: float
    """Absolute: what rounding, or the oracle's own error, may account for in one entry."""
    value: Tensor | None = None  # float64; None if only products with `directions` are known
    directions: list[Tensor] = field(default_factory=list)
    products: list[tuple[float, float]] = field(default_factory=list)
    """⟨direction, gradient⟩ and its own error."""
    unknown: str = ""  # why there is no expected gradient, if there is none


class Oracle:
    """Right gradients of a target at any upstream gradient.

    `target` is the target in float64 (or in its own precision if it takes no other), `source` what
    the plain forward is taken from: the target or the reference.
    """

    def __init__(
        self, target: Target, source: Target, dtype: torch.dtype, given: bool,
        most: int = ELEMENTWISE,
    ):  # fmt: skip
        self.target, self.source, self.dtype, self.given = target, source, dtype, given
        self.most = most  # elements found one by one
        self.directions = DIRECTIONS if most == ELEMENTWISE else FEW_DIRECTIONS
        self.plain: set[str] = set()  # names whose gradient the plain forward is trusted with
        self.terms = 1.0  # the longest sum met in the computation
        self.noise: dict[str, float] = {}  # what rounding may do to each gradient
        self.across: set[str] = set()
        """Names whose gradient rounding moves across a kink: not noise, but another branch."""
        self.differences = Differences(target)

    def prepare(self, upstream: list[Tensor]) -> dict[str, Expected]:
        """Chooses the source of each gradient, and gives the gradients for this upstream."""
        called: set = set()
        plain: Tensors = {}
        try:
            if self.given or not self.target.is_numpy:
                plain = self.source.filled(self.source.plain_gradients(upstream, called))
        except Unsuitable:
            raise
        except Exception:  # what torch cannot differentiate has to be differenced
            pass
        # Where autograd plays other formulas than the target's own backward, or plays none.
        others = self.given or self.target.is_numpy or bool(called)
        self._measure_noise(plain, upstream, others)
        by_forward_mode = not (self.given or called)
        trusted = self._trusted(upstream, by_forward_mode) if plain else set()
        if not by_forward_mode:
            self.plain = set(trusted)
        rest = [name for name in self.target.values if name not in self.plain]
        if rest and plain and not by_forward_mode:  # it is not the plain forward that is derived
            before = self.noise
            self._measure_noise({}, upstream, others)
            self.noise = {n: max(v, self.noise[n]) if n in rest else v for n, v in before.items()}
        elementwise = sum(self.target.values[n].numel() for n in rest) <= self.most
        kind = "reference" if self.given else "plain forward"
        result = {}
        for name in self.target.values:
            if name in self.plain:
                result[name] = Expected(kind, self.noise[name], plain[name])
                continue
            find = self.by_forward_mode if name in trusted else self.by_differences
            try:
                result[name] = find(name, upstream, elementwise)
            except ForwardRaised as raised:
                why = f"cannot be differenced: beside the given values the forward raises {raised}"
                result[name] = Expected("none", 0.0, unknown=why)
        return result

    def at(self, upstream: Upstream) -> dict[str, Tensor]:
        """The gradients that the plain forward is trusted with, at another upstream gradient."""
        grads = self.source.filled(self.source.plain_gradients(upstream))
        return {n: g for n, g in grads.items() if n in self.plain}

    def branch_of(self, name: str, upstream: list[Tensor]) -> Tensor | None:
        """The plain gradient in the target's own precision, where rounding may decide the branch;
        None if no such gradient is found."""
        if name not in self.across:
            return None
        low = self.source.cast(self.dtype)
        with suppress(Exception):  # no plain forward in that precision
            grad = low.plain_gradients([u.to(self.dtype) for u in upstream])[name]
            return None if grad is None else grad.detach().double().cpu()
        return None

    def by_forward_mode(self, name: str, upstream: list[Tensor], elementwise: bool) -> Expected:
        """One gradient by dual numbers: its elements, or its products with random directions."""
        value = self.target.values[name]
        along = self._directions(value, elementwise)
        products = [directions.product(self.target, name, v, upstream) for v in along]
        if elementwise:
            gradient = torch.tensor(products, dtype=torch.float64).reshape(value.shape)
            return Expected("forward mode", self.noise[name], gradient)
        exact = [(product, 0.0) for product in products]
        return Expected("forward-mode products", self.noise[name], None, along, exact)

    def by_differences(self, name: str, upstream: list[Tensor], elementwise: bool) -> Expected:
        """The same by differences of the outputs."""
        value = self.target.values[name]
        along = self._directions(value, elementwise)
        pairs = self.differences.slopes(name, along, upstream)
        if not elementwise:
            return Expected("difference products", self.noise[name], None, along, pairs)
        gradient = torch.tensor([s for s, _ in pairs], dtype=torch.float64).reshape(value.shape)
        worst = max((e for _, e in pairs), default=0.0)
        uncertainty = max(worst, DIFFERENCE_FLOOR * largest(gradient), self.noise[name])
        return Expected("differences", uncertainty, gradient)

    def _directions(self, value: Tensor, elementwise: bool) -> list[Tensor]:
        if elementwise:
            return [unit(value, i) for i in range(value.numel())]
        return [signs(value, seed) for seed in range(self.directions)]

    def _measure_noise(self, plain: Tensors, upstream: list[Tensor], others: bool) -> None:
        with differentiated_forwards() if plain else nullcontext():
            found = noise_of(self.source, self.dtype, plain, upstream, others)
        self.noise, self.terms = found.by_name, found.terms
        self.across |= found.across

    def _trusted(self, upstream: list[Tensor], by_forward_mode: bool) -> set[str]:
        """The names whose derivative by the plain forward, or by forward mode, agrees with a
        difference along a random direction; if that cannot tell, it is trusted.

        Seen from a point nearby, where the function has its kinks only by bad luck: what is
        in question is whether a dependence is hidden, not what the derivative is here.
        """
        nearby = self._nearby()
        if nearby is None:
            return set(self.target.values)
        source, target = self.source.with_values(nearby), self.target.with_values(nearby)
        differences = Differences(target)
        names = set(target.values)
        found: Gradients = {}
        try:
            if not by_forward_mode:
                found = source.plain_gradients(upstream)
        except Exception:
            return set()
        plain = source.filled(found)
        for name, value in nearby.items():
            if not value.numel():
                continue
            direction = random_direction(value, seed=7)
            if not self.given and name in found and found[name] is None:
                with suppress(ForwardRaised):
                    if differences.move(name, direction):
                        names.discard(name)
                continue
            try:
                if by_forward_mode:
                    product = directions.product(target, name, direction, upstream)
                else:
                    product = (direction * plain[name]).sum().item()
            except Exception:  # no forward-mode formula
                names.discard(name)
                continue
            if not math.isfinite(product):
                continue
            # Of the target's own precision, where here is computed in another.
            allowed = 20 * self.noise[name] * direction.abs().sum().item()
            allowed *= torch.finfo(value.dtype).eps / torch.finfo(self.dtype).eps
            with suppress(ForwardRaised):  # outside the function's domain
                if differences.contradict(name, direction, product, upstream, allowed):
                    names.discard(name)
        return names

    def _nearby(self) -> Tensors | None:
        """A point nearby; nearer to 0 if the function is not defined on all sides; or None."""
        draws = torch.Generator().manual_seed(5)
        for inwards in (False, True):
            nearby = {}
            for name, value in self.source.values.items():
                move = normal(value, draws).to(value)
                size = torch.where(value == 0, typical(value), value.abs())
                nearby[name] = value + 2.0**-6 * move * size
                if inwards:
                    nearby[name] = value * (1 - 2.0**-6 * move.abs())
            with suppress(ForwardRaised):
                copies = {n: v.clone() for n, v in nearby.items()}
                self.source.with_values(nearby).outputs(copies)
                return nearby
        return None
