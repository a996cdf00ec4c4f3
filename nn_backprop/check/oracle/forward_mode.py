"""Derivatives along a direction, by dual numbers: exact to rounding, without a step."""

import warnings

import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nn_backprop.check.oracle.padding import PaddingStays
from nn_backprop.check.target.target import Target


def product(target: Target, name: str, direction: Tensor, upstream: list[Tensor]) -> float:
    """⟨J v, u⟩, v being a direction of one value and u the upstream gradient."""
    math_only = sdpa_kernel(SDPBackend.MATH)  # which has a forward-mode formula
    with warnings.catch_warnings(), forward_ad.dual_level(), math_only:
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on first use
        handed = {n: v.clone() for n, v in target.values.items()}
        handed[name] = forward_ad.make_dual(handed[name], direction.to(handed[name]))
        with PaddingStays(handed, target.values):
            outputs = target.forward(handed)
        total = 0.0
        for z, grad_z in zip(outputs, upstream, strict=True):
            tangent = forward_ad.unpack_dual(z).tangent
            if tangent is not None:
                total += (tangent.double() * grad_z).sum().item()
    return total
