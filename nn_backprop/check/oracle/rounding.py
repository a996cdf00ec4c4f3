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
constant stands for √K (`oracle.HALF`).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SAFETY = 16.0


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
