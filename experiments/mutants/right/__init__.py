"""Right configurations drawn at random: number i is drawn from the seed i alone.

Sizes, options, four precisions, scales from 1e-12 to 1e12, layouts; and data with kinks and ties.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mutants.equivalents import EQUIVALENTS
from mutants.right.arguments import rule
from mutants.right.draw import Call, Draw
from mutants.right.modules import module, network
from mutants.right.pairs import numpy_pair
from mutants.right.plain import torch_call
from nn_backprop.check.target.state import seeded
from nn_backprop.check.target.target import ForwardRaised, Target

__all__ = ["Call", "configuration"]

# The exponents of ten of the scales; where the forward is not finite, the next is tried.
REACHES = (12.0, 6.0, 3.0, 1.0, 0.0)


def configuration(seed: int) -> Call:
    """The configuration of that number: of the scales tried, the largest with a gradient to check.
    Where there is none at any scale, as of a softmax over one class, others are drawn."""
    while True:
        for reach in REACHES:
            draw = Draw(seed, reach)
            kind = draw.pick(*["rule"] * 5, *["torch"] * 5, *["module"] * 5, "numpy",
                             "equivalent", "network")  # fmt: skip
            call = KINDS_OF_CALL[kind](draw)
            call.kind, call.seed = kind, draw.random.randrange(1000)
            call.precision = str(draw.dtype).removeprefix("torch.")
            if _has_gradient(call):
                return call
        seed += 10**9


def _has_gradient(call: Call) -> bool:
    """Whether outputs and gradients are finite, and a change of some value, by its own size or by
    1, moves the outputs by clearly more than their rounding, which grows as √K in sums of K."""
    target = Target(call.target, call.args, call.kwargs, seed=call.seed)
    try:
        with seeded(call.seed):
            outputs = [z.detach() for z in target.forward(target.leaves_of()[1])]
            upstream = [torch.randn_like(z) for z in outputs]
            grads = {name: g for name, g in target.gradients(upstream).items() if g is not None}
    except ForwardRaised:  # torch has no cdist, say, in half precision
        return False
    if not all(t.isfinite().all() for t in (*outputs, *grads.values())):
        return False
    rounding = max(
        torch.finfo(z.dtype).eps * (z * u).abs().max().item() if z.numel() else 0.0
        for z, u in zip(outputs, upstream, strict=True)
    )
    moves = [
        g.abs().max().item() * max(1.0, target.values[name].abs().max().item())
        for name, g in grads.items()
    ]
    half = target.dtype in (torch.bfloat16, torch.float16)  # summed in float32
    terms = 1 if half else max(t.numel() for t in (*outputs, *target.values.values()))
    return max(moves, default=0.0) > 32 * math.sqrt(terms) * rounding


def _equivalent(d: Draw) -> Call:
    """Its own data, since some are about a kink there; in other types, layouts and scales."""
    chosen = d.pick(*EQUIVALENTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, inputs = chosen.make()
    if d.dtype in (torch.bfloat16, torch.float16):
        d.dtype = torch.float32
    scale = 2.0 ** d.random.randint(-10, 10) if chosen.family in ("linear", "pooling") else 1.0
    layouts = "plain", "transposed", "every second"  # those that keep every value
    moved = tuple(
        d.laid_out(x * scale, *layouts) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    return Call(chosen.name, target, moved)


KINDS_OF_CALL: dict[str, Callable[[Draw], Call]] = {
    "rule": rule,
    "torch": torch_call,
    "module": module,
    "numpy": numpy_pair,
    "equivalent": _equivalent,
    "network": network,
}
