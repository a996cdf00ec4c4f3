"""How far rounding alone may move a gradient.

A gradient is right if it differs from the true one by no more than rounding explains. How much
that is depends on what cancels on the way, so it is measured, by Monte Carlo arithmetic (Parker
1997): the same computation in float64, with the result of every operation moved at random by as
much as rounding in the target's precision might have moved it. What the gradient then moves by is
its *noise*.

A sum of K terms is rounded K times, in an order that is the author's business. Its error grows as
√K with high probability (Higham and Mary 2019, A new approach to probabilistic rounding error
analysis), unless it is accumulated in a higher precision, as half-precision sums are. The bound is
therefore  SAFETY · √K · noise,  K being the longest sum in the computation; for half precision, a
constant stands for √K (`HALF`).
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nn_backprop.check.target.target import ForwardRaised, Target, Tensors, largest

SAFETY = 16.0
RUNS = 2
# Of the noise in half precision, whose sums are accumulated in a higher one: SAFETY times the full
# spacing at every operation would leave nothing of eight bits.
HALF = 0.375


class Rounding(TorchDispatchMode):
    """Inside, the result of every operation moves at random by up to `share` of dtype's spacing.

    With `keep_ties`, equal numbers move equally, so that ties stay ties and zeros zeros: at a kink
    of the function, to break a tie is not rounding but another branch. `terms` is the longest sum
    met.
    """

    def __init__(self, dtype: torch.dtype, seed: int, keep_ties: bool, share: float = 1.0):
        super().__init__()
        info = torch.finfo(dtype)
        self.unit = share * info.eps
        self.least = share * info.smallest_normal * info.eps
        self.keep_ties = keep_ties
        self.draws = torch.Generator().manual_seed(seed)
        self.salt = seed
        self.terms = 1.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(not alias.is_write for alias in aliases):
            return output  # a view: nothing was computed anew
        sizes = sorted(t.numel() for t in tree_leaves(args) if _floating(t))
        for z in tree_leaves(output):
            if _floating(z) and sizes:
                product = sizes[-1] * (sizes[-2] if len(sizes) > 1 else sizes[-1])
                # A contraction of two operands, such as (n, k) with (k, m), sums over k; that is
                # √(nk · km / nm). A sum of one operand has its size over the result's.
                self.terms = max(self.terms, math.sqrt(product / z.numel()), sizes[-1] / z.numel())
        if aliases:  # in place
            for z in tree_leaves(output):
                if _floating(z):
                    z.copy_(self.moved(z))
            return output
        return tree_map(self.moved, output)

    def moved(self, t: Any) -> Any:
        if not _floating(t) or t.dtype not in (torch.float64, torch.float32):
            return t
        if t._is_zerotensor():  # without memory, of jvp: torch crashes in its `view`
            return t
        if self.keep_ties:
            self.salt += 1
            bits = t.to(torch.float64).view(torch.int64) + self.salt
            draw = ((bits * 6364136223846793005) >> 40) / 2.0**23
        else:
            draw = 2 * torch.rand(t.shape, generator=self.draws, dtype=torch.float64) - 1
            draw = draw.to(t.device)
        size = t.abs().nan_to_num(posinf=0.0)  # −∞ of a mask stays what it is
        return t + (draw * (size * self.unit + self.least * (t != 0))).to(t.dtype)


def _floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 0


@dataclass
class Noise:
    """What rounding may do to each gradient."""

    by_name: dict[str, float]
    across: set[str] = field(default_factory=set)
    """Names whose gradient rounding moves across a kink: not noise, but another branch."""
    terms: float = 1.0  # the longest sum met


def noise_of(
    source: Target, dtype: torch.dtype, plain: Tensors, upstream: list[Tensor], others: bool
) -> Noise:
    """What rounding in `dtype` may do to each gradient of `source`.

    plain: the gradients by its plain forward, if there are some; then this has to be called with
        the forwards differentiated. Else those of the target's own backward are moved, since only
        the size matters here.
    others: whether the target's own backward may have other formulas than autograd's.
    """
    base = plain
    if source.dtype != torch.float64:  # too coarse to be moved by its own spacing
        with suppress(Exception):  # a target for one precision only
            wide, wide_upstream = source.cast(torch.float64), [u.double() for u in upstream]
            base = wide.filled(wide.gradients(wide_upstream))
            source, upstream = wide, wide_upstream
    noise = Noise(dict.fromkeys(source.values, 0.0))
    if not plain:
        noise.terms = float(max(v.numel() for v in (*source.values.values(), *upstream)))
        try:
            base = source.filled(source.gradients(upstream))
        except Exception:  # it is the backward that raises, as will be found
            return noise
        base = {n: g for n, g in base.items() if g.isfinite().all()}
    sizes = {n: largest(g) for n, g in base.items()}
    # The other way in float64, of whose spacing there is no part.
    share = 2.0**6 if dtype == torch.float64 else 2.0**-6
    largest_move = dict.fromkeys(base, 0.0)

    def moves(keep_ties: bool, share: float = 1.0) -> dict[str, float]:
        """The largest move of each gradient by `share` of the spacing."""
        most = dict.fromkeys(base, 0.0)
        for run in range(RUNS):
            # The mode's salt grows by one with each operation: seeds far apart do not meet.
            mode = Rounding(dtype, 1 + 100_003 * run, keep_ties, share)
            moved = source.with_values({n: mode.moved(v) for n, v in source.values.items()})
            moved_upstream = [mode.moved(u) for u in upstream]
            # Attention in its separate operations, since only these can be moved; a forward that
            # raises is outside the function's domain, as just above 1.
            with suppress(ForwardRaised):
                with sdpa_kernel(SDPBackend.MATH), mode:
                    grads = moved.gradients(moved_upstream)
                noise.terms = max(noise.terms, mode.terms)
                for name, grad in source.filled(grads).items():
                    if name in base:
                        most[name] = max(most[name], largest(grad - base[name]))
        return most

    for keep_ties in (True, False):
        found = moves(keep_ties)
        # A move out of all proportion may come from a kink: there it is as large however far is
        # moved, and another branch is not rounding.
        large = [n for n in base if found[n] > 1e-3 * sizes[n]]
        again = moves(keep_ties, share) if large else {}
        for name in base:
            pair = sorted((found[name], again.get(name, 0.0)))
            if name not in large or pair[1] >= 8 * pair[0]:
                largest_move[name] = max(largest_move[name], found[name])
            else:
                noise.across.add(name)
    info = torch.finfo(dtype)
    half = info.bits < 32
    growth = HALF if half else math.sqrt(noise.terms)
    # Another backward may work with the rounded outputs: y(1 − y) is 0 where a sigmoid has come
    # within rounding of 1. So what changes ⟨u, z⟩ by less than the rounding of a z up to 1, over
    # the range of the smallest x, or of 1, the scale of exp and its kin, is not seen.
    outputs = source.outputs({n: v.clone() for n, v in source.values.items()})
    pairs = zip(outputs, upstream, strict=True)
    size_of_z = sum((z.clamp(-1, 1) * u).square().sum().item() for z, u in pairs)
    size_of_z = math.sqrt(size_of_z) * others
    spacing = info.eps * info.smallest_normal
    # Products on the way may have lost digits below the smallest normal number.
    underflow = 0.0 if half else 2.0**20 * spacing
    # The same of outputs that are all below it: another backward may divide them.
    largest_z = max(map(largest, outputs), default=0.0)
    lost = min(1.0, spacing / largest_z) if largest_z else 0.0
    for name, size in sizes.items():
        smallest = source.values[name].abs().min().item() if size else 1.0
        smallest = 1.0 if source.is_numpy else smallest  # whose operations are not seen
        least = info.eps * size_of_z / max(1.0, smallest)
        move = max(largest_move[name], info.eps * size, lost * size)
        noise.by_name[name] = max(growth * move, least, underflow)
    return noise
