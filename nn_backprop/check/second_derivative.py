"""The second derivative: is the backward itself differentiable, and rightly so?"""

import torch
from torch import Tensor

from nn_backprop.check.oracle.directions import normal
from nn_backprop.check.oracle.oracle import Oracle
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import Cause, Probe, in_one_line
from nn_backprop.check.target.custom_functions import differentiated_forwards
from nn_backprop.check.target.target import Target, Tensors, backward, filled, largest

NAME = "second derivative"
# Two derivatives cost more rounding than one.
LARGER = 1e3


def second_derivative(oracle: Oracle, upstream: list[Tensor]) -> tuple[Probe, Cause | None]:
    """⟨v, gradient⟩, for a random v, differentiated by the inputs and by the upstream gradient:
    once through the target's own backward, once through the plain forward."""
    try:
        with differentiated_forwards() as called:
            expected, sizes = _derivative(oracle.source, upstream)
    except Exception as error:
        return Probe(NAME, "skipped", f"the plain forward has none: {in_one_line(error)}"), None
    if not (called or oracle.given):
        return Probe(NAME, "skipped", "there is no plain forward to compare with"), None
    try:
        actual, _ = _derivative(oracle.target, upstream)
    except Exception as error:
        reason = f"the backward cannot be differentiated: {in_one_line(error)}"
        return Probe(NAME, "fail", reason), Cause("detached", "no second derivative", reason)
    # What rounding does to a gradient, it does to the derivative of that gradient as well.
    noise = max([oracle.noise[n] / size for n, size in sizes.items() if size > 0], default=0.0)
    eps = torch.finfo(oracle.dtype).eps
    share = min(0.1, LARGER * SAFETY * max(eps * oracle.terms, noise))
    for name, right in expected.items():
        apart = (actual[name] - right).abs()
        if apart.numel() and not apart.max() <= share * max(largest(right), *sizes.values()):
            i = int(apart.argmax())
            ours, theirs = (t.flatten()[i].item() for t in (actual[name], right))
            reason = (
                f"the derivative of ⟨v, gradient⟩ by {name} is {ours:.5g} instead of {theirs:.5g}"
            )
            part = "a part of the backward" if actual[name].any() else "the backward"
            detail = f"second derivative: {part} is not connected to what it was computed from"
            return Probe(NAME, "fail", reason), Cause("detached", detail, reason)
    return Probe(NAME, "pass"), None


def _derivative(target: Target, upstream: list[Tensor]) -> tuple[Tensors, dict[str, float]]:
    """The derivatives, zeros for None; the largest entry of each gradient: its rounding enters."""
    draws = torch.Generator().manual_seed(3)
    leaves, handed = target.leaves_of()
    weights = {n: normal(leaf, draws).to(leaf) for n, leaf in leaves.items()}
    upstream = [u.clone().requires_grad_() for u in upstream]
    first = backward(target.forward(handed), leaves, upstream, create_graph=True)
    everything = leaves | {f"upstream gradient {i}": u for i, u in enumerate(upstream)}
    parts = [(g * weights[n]).sum() for n, g in first.items() if g is not None]
    product = torch.stack(parts).sum() if parts else torch.zeros(())
    sizes = {n: largest(g) for n, g in first.items()}
    grads: tuple[Tensor | None, ...] = (None,) * len(everything)
    if product.requires_grad:
        grads = torch.autograd.grad(product, list(everything.values()), allow_unused=True)
    pairs = zip(everything.items(), grads, strict=True)
    return {name: filled(grad, value) for (name, value), grad in pairs}, sizes
