"""The right gradient, from sources that share nothing with the backward under test.

In this order, each where it applies:

1. *plain forward*: autograd through the reference or, where the target calls custom Functions,
   through their own forwards; element by element.
2. *forward mode*: where there is no such forward, ⟨J v, u⟩ = ⟨v, Jᵀ u⟩ for the upstream gradient u,
   with J v from dual numbers, exact to rounding; v runs over the unit vectors, or over random
   directions where the elements are too many.
3. *differences*: for what torch cannot differentiate, central differences of falling step,
   extrapolated to step 0, with an estimate of their error (Ridders 1982; Richardson 1911).

The first two are themselves held against a difference along one random direction for each
gradient, so that a forward which hides a dependence (by `detach`, `no_grad`, a foreign library) is
not taken for one that has none.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nn_backprop.check.oracle.rounding import Rounding
from nn_backprop.check.target.target import (
    ForwardRaised,
    Gradients,
    Target,
    Tensors,
    Unsuitable,
    Upstream,
)

# More elements than these are checked along random directions instead, at first.
ELEMENTWISE = 3000
DIRECTIONS = 8
FEW_DIRECTIONS = 2  # in one of several checks
ROUNDING_RUNS = 2
# Of the noise in half precision, whose sums are accumulated in a higher one: SAFETY times the full
# spacing at every operation would leave nothing of eight bits.
HALF = 0.375
# What an extrapolated difference is trusted to at best, relative to the gradient's largest entry.
DIFFERENCE_FLOOR = 1e-9


@dataclass
class Expected:
    """One gradient as an oracle has it."""

    oracle: str
    uncertainty: float
    """Absolute: what rounding, or the oracle's own error, may account for in one entry."""
    value: Tensor | None = None
    """float64; None if only products with `directions` are known."""
    directions: list[Tensor] = field(default_factory=list)
    products: list[tuple[float, float]] = field(default_factory=list)
    """⟨direction, gradient⟩ and its own error."""
    unknown: str = ""
    """Why there is no expected gradient, if there is none."""


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
        self.plain: set[str] = set()
        """Names whose gradient the plain forward is trusted with."""
        self.terms = 1.0
        self.noise: dict[str, float] = {}
        self.across: set[str] = set()
        """Names whose gradient rounding moves across a kink: not noise, but another branch."""
        self.noise_of_z: list[Tensor] | None = None

    def prepare(self, upstream: list[Tensor]) -> dict[str, Expected]:
        """Chooses the source of each gradient, and gives the gradients for this upstream."""
        names = tuple(self.target.values)
        called: set = set()
        plain: Tensors = {}
        try:
            if self.given or not self.target.is_numpy:
                plain = _zero_for_none(self.source.plain_gradients(upstream, called), self.source)
        except Unsuitable:
            raise
        except Exception:  # what torch cannot differentiate has to be differenced
            plain = {}
        # Where autograd plays other formulas than the target's own backward, or plays none.
        others = self.given or self.target.is_numpy or bool(called)
        self.noise = self._noise(plain, upstream, others)
        forward_mode = not (self.given or called)
        result: dict[str, Expected] = {}
        trusted = self._trusted(upstream, forward_mode) if plain else set()
        kind = "reference" if self.given else "plain forward"
        rest = []
        for name in names:
            if name in trusted and not forward_mode:
                self.plain.add(name)
                result[name] = Expected(kind, self.noise[name], plain[name])
            else:
                rest.append(name)
        if rest and plain and not forward_mode:  # the plain forward is not what is differentiated
            own = self._noise({}, upstream, others)
            self.noise |= {n: max(self.noise[n], own[n]) for n in rest}
        elementwise = sum(self.target.values[n].numel() for n in rest) <= self.most
        for name in rest:
            expected = None
            if name in trusted:
                expected = self.by_forward_mode(name, upstream, elementwise)
            try:
                result[name] = expected or self.by_differences(name, upstream, elementwise)
            except ForwardRaised as raised:
                why = f"cannot be differenced: beside the given values the forward raises {raised}"
                result[name] = Expected("none", 0.0, unknown=why)
        return {name: result[name] for name in names}

    def at(self, upstream: Upstream) -> dict[str, Tensor]:
        """The gradients that the plain forward is trusted with, at another upstream gradient."""
        grads = self.source.plain_gradients(upstream)
        return {n: g for n, g in _zero_for_none(grads, self.source).items() if n in self.plain}

    def branch_of(self, name: str, upstream: list[Tensor]) -> Tensor | None:
        """The plain gradient in the target's own precision, where rounding may decide the branch;
        None if no such gradient is found."""
        if name not in self.across:
            return None
        low = self.source.cast(self.dtype)
        try:
            grad = low.plain_gradients([u.to(self.dtype) for u in upstream])[name]
        except Exception:  # no plain forward in that precision
            return None
        return None if grad is None else grad.detach().double().cpu()

    def _noise(self, plain: Tensors, upstream: list[Tensor], others: bool) -> dict[str, float]:
        """What rounding in the target's precision may do to each gradient; judged by the target's
        own backward if there is no plain one, since only the size matters here."""

        def gradients(target: Target, u: Upstream) -> Gradients:
            return target.plain_gradients(u) if plain else target.gradients(u)

        source, base = self.source, plain
        if self.target.dtype != torch.float64:  # too coarse to be moved by its own spacing
            with suppress(Exception):  # a target for one precision only
                wide = source.cast(torch.float64)
                base = _zero_for_none(gradients(wide, [u.double() for u in upstream]), wide)
                source, upstream = wide, [u.double() for u in upstream]
        if not plain:
            self.terms = float(max(v.numel() for v in (*source.values.values(), *upstream)))
            try:
                base = _zero_for_none(gradients(source, upstream), source)
            except Exception:  # it is the backward that raises, as will be found
                return dict.fromkeys(source.values, 0.0)
            base = {n: g for n, g in base.items() if g.isfinite().all()}

        def moves(keep_ties: bool, share: float = 1.0) -> dict[str, float]:
            """The largest move of each gradient, by `share` of the spacing."""
            largest = dict.fromkeys(base, 0.0)
            for run in range(ROUNDING_RUNS):
                # The mode's salt grows by one with each operation: seeds far apart do not meet.
                mode = Rounding(self.dtype, 1 + 100_003 * run, keep_ties, share)
                moved = source.with_values({n: mode.moved(v) for n, v in source.values.items()})
                moved_upstream = [mode.moved(u) for u in upstream]
                # Attention in its separate operations, since only these can be moved.
                try:
                    with sdpa_kernel(SDPBackend.MATH), mode:
                        grads = gradients(moved, moved_upstream)
                except ForwardRaised:  # outside the function's domain, as just above 1
                    continue
                self.terms = max(self.terms, mode.terms)
                for name, grad in _zero_for_none(grads, source).items():
                    if name in base and grad.numel():
                        move = (grad - base[name]).abs().max().item()
                        largest[name] = max(largest[name], move)
            return largest

        sizes = {n: g.abs().max().item() if g.numel() else 0.0 for n, g in base.items()}
        # The other way in float64, of whose spacing there is no part.
        share = 2.0**6 if self.dtype == torch.float64 else 2.0**-6
        largest_move = dict.fromkeys(base, 0.0)
        for keep_ties in (True, False):
            found = moves(keep_ties)
            # A move out of all proportion may come from a kink: there it is as large however far
            # is moved, and another branch is not rounding.
            large = [n for n in base if found[n] > 1e-3 * sizes[n]]
            again = moves(keep_ties, share) if large else {}
            for name in base:
                pair = sorted((found[name], again.get(name, 0.0)))
                if name not in large or pair[1] >= 8 * pair[0]:
                    largest_move[name] = max(largest_move[name], found[name])
                else:
                    self.across.add(name)
        half = torch.finfo(self.dtype).bits < 32
        growth = HALF if half else math.sqrt(self.terms)
        # Another backward may work with the rounded outputs: y(1 − y) is 0 where a sigmoid has come
        # within rounding of 1. So what changes ⟨u, z⟩ by less than the rounding of a z up to 1,
        # over the range of the smallest x, or of 1, the scale of exp and its kin, is not seen.
        outputs = source.outputs({n: v.clone() for n, v in source.values.items()})
        pairs = zip(outputs, upstream, strict=True)
        size_of_z = math.sqrt(sum((z.clamp(-1, 1) * u).square().sum().item() for z, u in pairs))
        size_of_z *= others
        eps = torch.finfo(self.dtype).eps
        # Products on the way may have lost digits below the smallest normal number.
        underflow = 0.0 if half else 2.0**20 * eps * torch.finfo(self.dtype).smallest_normal
        # The same of outputs that are all below it: another backward may divide them.
        largest_z = max((z.abs().max().item() for z in outputs if z.numel()), default=0.0)
        spacing = eps * torch.finfo(self.dtype).smallest_normal
        lost = min(1.0, spacing / largest_z) if largest_z else 0.0
        noise = {}
        for name, size in sizes.items():
            smallest = source.values[name].abs().min().item() if size else 1.0
            smallest = 1.0 if source.is_numpy else smallest  # whose operations are not seen
            least = eps * size_of_z / max(1.0, smallest)
            move = max(largest_move[name], eps * size, lost * size)
            noise[name] = max(growth * move, least, underflow)
        return dict.fromkeys(source.values, 0.0) | noise

    def _trusted(self, upstream: list[Tensor], forward_mode: bool) -> set[str]:
        """The names whose derivative by the plain forward, or by forward mode, agrees with a
        difference along a random direction; if that cannot tell, it is trusted.

        Seen from a point nearby, where the function has its kinks only by bad luck: what is
        in question is whether a dependence is hidden, not what the derivative is here.
        """
        nearby = self._nearby()
        if nearby is None:
            return set(self.target.values)
        source = self.source.with_values(nearby)
        there = Oracle(self.target.with_values(nearby), source, self.dtype, self.given)
        there.noise = self.noise
        names = set(self.target.values)
        try:
            plain = {} if forward_mode else _zero_for_none(
                source.plain_gradients(upstream), source)  # fmt: skip
        except Exception:
            return set()
        for name, value in nearby.items():
            direction = _random_direction(value, seed=7)
            if not value.numel():
                continue
            try:
                if forward_mode:
                    product = there._product(name, direction, upstream)
                else:
                    product = (direction * plain[name]).sum().item()
            except Exception:  # no forward-mode formula
                names.discard(name)
                continue
            with suppress(ForwardRaised):  # outside the function's domain
                if math.isfinite(product) and there._contradicted(
                    name, direction, product, upstream
                ):
                    names.discard(name)
        return names

    def _nearby(self) -> Tensors | None:
        """A point nearby; nearer to 0 if the function is not defined on all sides; or None."""
        draws = torch.Generator().manual_seed(5)
        for inwards in (False, True):
            nearby = {}
            for name, value in self.source.values.items():
                move = torch.randn(value.shape, generator=draws, dtype=torch.float64).to(value)
                size = torch.where(value == 0, _typical(value), value.abs())
                nearby[name] = value + 2.0**-6 * move * size
                if inwards:
                    nearby[name] = value * (1 - 2.0**-6 * move.abs())
            with suppress(ForwardRaised):
                copies = {n: v.clone() for n, v in nearby.items()}
                self.source.with_values(nearby).outputs(copies)
                return nearby
        return None

    def _contradicted(
        self, name: str, direction: Tensor, product: float, upstream: list[Tensor]
    ) -> bool:
        """Whether the slope along a direction is clearly another. The steps are short, so that no
        kink lies between; a large network has many."""
        eps = torch.finfo(self.target.values[name].dtype).eps
        noise = 20 * self.noise[name] * direction.abs().sum().item()
        noise *= eps / torch.finfo(self.dtype).eps  # as here is computed, not in the target's own
        outputs, scales = self.along(name, direction)
        pairs = zip(self.forward_noise(), upstream, strict=True)
        size = sum((noise_of_z * u).abs().sum().item() for noise_of_z, u in pairs)
        for scale in scales:
            slopes = []
            # Where rounding makes a staircase of the function, a short step may not leave a tread.
            for step in (scale * eps**power for power in (0.45, 0.4, 0.25, 0.12)):
                ahead, behind = outputs(step), outputs(-step)
                if not all(map(torch.equal, ahead, behind)):
                    slopes.append((_dot(ahead, behind, upstream) / (2 * step), step))
                if len(slopes) == 2:
                    break
            if slopes and slopes[0][1] > scale * eps**0.4:
                return False
            apart = [
                abs(slope - product)
                > eps**0.3 * max(abs(slope), abs(product)) + size / step + noise
                for slope, step in slopes
            ]
            if not all(apart):
                return False
            if len(slopes) == 2:  # two that do not agree have not converged, and tell nothing
                (first, step), (second, _) = slopes
                largest = max(abs(first), abs(second))
                if abs(first - second) > eps**0.3 * largest + size / step + noise:
                    return False
        return True

    def by_forward_mode(self, name: str, upstream: list[Tensor], elementwise: bool) -> Expected:
        value, noise = self.target.values[name], self.noise[name]
        if elementwise:
            entries = [self._product(name, e, upstream) for e in _units(value)]
            gradient = torch.tensor(entries, dtype=torch.float64).reshape(value.shape)
            return Expected("forward mode", noise, gradient)
        directions = [_signs(value, seed) for seed in range(self.directions)]
        products = [(self._product(name, v, upstream), 0.0) for v in directions]
        return Expected("forward-mode products", noise, None, directions, products)

    def _product(self, name: str, direction: Tensor, upstream: list[Tensor]) -> float:
        """⟨J v, u⟩ by dual numbers."""
        math_only = sdpa_kernel(SDPBackend.MATH)  # which has a forward-mode formula
        with warnings.catch_warnings(), forward_ad.dual_level(), math_only:
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, on first use
            value = self.target.values[name]
            handed = {n: v.clone() for n, v in self.target.values.items()}
            handed[name] = forward_ad.make_dual(value.clone(), direction.to(value))
            outputs = self._forward(handed)
            total = 0.0
            for z, grad_z in zip(outputs, upstream, strict=True):
                tangent = forward_ad.unpack_dual(z).tangent
                if tangent is not None:
                    total += (tangent.double() * grad_z).sum().item()
        return total

    def by_differences(self, name: str, upstream: list[Tensor], elementwise: bool) -> Expected:
        value = self.target.values[name]
        if not elementwise:
            directions = [_signs(value, seed) for seed in range(self.directions)]
            products = self._slopes(name, directions, upstream)
            return Expected("difference products", self.noise[name], None, directions, products)
        pairs = self._slopes(name, list(_units(value)), upstream)
        gradient = torch.tensor([s for s, _ in pairs], dtype=torch.float64).reshape(value.shape)
        worst = max((e for _, e in pairs), default=0.0)
        largest = gradient.abs().max().item() if pairs else 0.0
        uncertainty = max(worst, DIFFERENCE_FLOOR * largest, self.noise[name])
        return Expected("differences", uncertainty, gradient)

    def _slopes(
        self, name: str, directions: list[Tensor], upstream: list[Tensor]
    ) -> list[tuple[float, float]]:
        """The derivative of ⟨u, f⟩ along each direction of one value, by differences, and the
        estimated error of that. Longer steps are taken only where the shorter could not tell."""
        eps = torch.finfo(self.target.values[name].dtype).eps
        found = [(math.nan, math.inf)] * len(directions)
        for longer in range(3):
            largest = max((abs(s) for s, e in found if e < 0.1 * abs(s)), default=0.0)
            for i, direction in enumerate(directions):
                slope, error = found[i]
                if error <= 1e-6 * max(largest, abs(slope)):
                    continue
                outputs, scales = self.along(name, direction)
                if longer < len(scales):
                    again = extrapolated(
                        outputs, upstream, scales[longer], eps, self.forward_noise()
                    )
                    found[i] = again if again[1] < error else found[i]
        return found

    def forward_noise(self) -> list[Tensor]:
        """How far rounding may move each entry of the outputs: its own rounding, and what becomes
        of a rounding of the values."""
        if self.noise_of_z is None:
            values = self.target.values
            dtype = max((v.dtype for v in values.values()), key=lambda d: torch.finfo(d).eps)
            zero = self.target.outputs({n: v.clone() for n, v in values.items()})
            eps = [max(torch.finfo(d).eps for d in (dtype, z.dtype)) for z in zero]
            zero = [z.double().clone() for z in zero]
            noise = [z.abs() * e for z, e in zip(zero, eps, strict=True)]
            for run in range(2):
                mode = Rounding(dtype, seed=1 + run, keep_ties=False)
                with suppress(ForwardRaised):  # outside the function's domain
                    moved = self.target.outputs(
                        {n: mode.moved(v).clone() for n, v in values.items()}
                    )
                    for i, z in enumerate(moved):
                        noise[i] = torch.maximum(noise[i], (z.double() - zero[i]).abs())
            self.noise_of_z = noise
        return self.noise_of_z

    def along(
        self, name: str, direction: Tensor
    ) -> tuple[Callable[[float], list[Tensor]], list[float]]:
        """The outputs as a function of a step along a direction of one value, and steps that are
        long: for the entries that move, for the whole value, and for exp and its kin."""
        value = self.target.values[name]
        along = direction.to(value)

        def outputs(step: float) -> list[Tensor]:
            handed = {n: v.clone() for n, v in self.target.values.items()}
            handed[name] = value + step * along
            with _PaddingStays(handed, self.target.values):
                return [z.detach().double().clone() for z in self.target.outputs(handed)]

        unit = along.abs().max().item() or 1.0
        scales = {_typical(value[along != 0]): None, _typical(value): None, 1.0: None}
        return outputs, [scale / unit for scale in scales]

    def _forward(self, handed: Tensors) -> list[Tensor]:
        with _PaddingStays(handed, self.target.values):
            return self.target.forward(handed)


class _PaddingStays(TorchFunctionMode):
    """Inside, the row of an embedding at its `padding_idx` is a constant, as torch defines it."""

    def __init__(self, handed: Tensors, values: Tensors):
        super().__init__()
        self.original = {id(t): values[name] for name, t in handed.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.embedding:
            x, weight, *rest = args if len(args) > 1 else (*args, kwargs.pop("weight"))
            row = rest[0] if rest else kwargs.get("padding_idx")
            if row is not None and id(weight) in self.original:
                padding = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
                padding[row] = True
                weight = torch.where(padding, self.original[id(weight)], weight)
            args = (x, weight, *rest)
        return func(*args, **kwargs)


def extrapolated(
    outputs: Callable[[float], list[Tensor]], upstream: list[Tensor], scale: float, eps: float,
    noise: list[Tensor],
) -> tuple[float, float]:  # fmt: skip
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
        if still:
            moved = [torch.ones_like(m) for m in moved]
        # ... or unless noise is not small beside what the others moved by.
        furthest = max((p - q).abs().max().item() for p, q in zip(ahead, behind, strict=True)
                       if p.numel())  # fmt: skip
        moved = [m | (n > 1e-6 * furthest) for m, n in zip(moved, noise, strict=True)]
        here = [torch.maximum(n, eps * p.abs()) for n, p in zip(noise, ahead, strict=True)]
        parts = zip(here, moved, upstream, strict=True)
        rounding = sum((n * m * u).abs().sum().item() for n, m, u in parts) / step
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
        largest = max((u.abs().max().item() for u in upstream if u.numel()), default=0.0)
        error = max(error, eps * largest / max(1.0, scale))
    return _confirmed(best, error, outputs, upstream, scale, eps, noise)


def _confirmed(
    best: float, error: float, outputs: Callable[[float], list[Tensor]], upstream: list[Tensor],
    scale: float, eps: float, noise: list[Tensor],
) -> tuple[float, float]:  # fmt: skip
    """The extrapolated slope, if the shortest steps agree: steps longer than a period of the
    function, or beyond a kink, may agree with one another by accident."""
    pairs = zip(noise, upstream, strict=True)
    size = sum((n * u).abs().sum().item() for n, u in pairs)
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
    (longer, noise_of_longer), (shorter, noise_of_shorter) = short
    allowed = noise_of_longer + noise_of_shorter + 1e-3 * max(abs(longer), abs(shorter))
    if not abs(longer - shorter) <= allowed:
        return best, math.inf
    if abs(best - longer) <= error + noise_of_longer + 1e-3 * abs(longer):
        return best, error
    return longer, abs(longer - shorter) + noise_of_longer


def _dot(ahead: list[Tensor], behind: list[Tensor], upstream: list[Tensor]) -> float:
    pairs = zip(ahead, behind, upstream, strict=True)
    return sum(((p - q) * u).sum().item() for p, q, u in pairs)


def _zero_for_none(grads: Gradients, target: Target) -> Tensors:
    return {
        n: torch.zeros_like(target.values[n], dtype=torch.float64) if g is None else g.double()
        for n, g in grads.items()
    }


def _units(value: Tensor):
    for i in range(value.numel()):
        unit = torch.zeros(value.numel(), dtype=torch.float64)
        unit[i] = 1
        yield unit.reshape(value.shape)


def _random_direction(value: Tensor, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    direction = torch.randn(value.shape, generator=draws, dtype=torch.float64)
    return direction * (value.detach().cpu().double().abs() + _typical(value)) / 2


def _signs(value: Tensor, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, value.shape, generator=draws).double() * 2 - 1


def _typical(value: Tensor) -> float:
    """A step that means something to these numbers: their root mean square, or 1 if all are 0."""
    size = value.double().square().mean().sqrt().item() if value.numel() else 0.0
    return size if size > 0 and math.isfinite(size) else 1.0
