"""Magnitude pruning with torch.nn.utils.prune: drop the smallest weights, train on, drop more."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import prune


def shares_kept(kept: Mapping[str, float], rounds: int) -> list[dict[str, float]]:
    """What to keep after each of so many rounds, so that each drops an equal part of what is left.

    `kept` is the share that is left in the end, from above 0 to 1, by the layer's name. With n
    rounds, k^(1/n) of a layer's weights survive each: k^(r/n) are left after the r-th.
    Raises ValueError for another share, or no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    for name, share in kept.items():
        if not 0 < share <= 1:
            raise ValueError(f"the share of {name} must be above 0 and at most 1, not {share}")
    return [
        {name: share ** (done / rounds) for name, share in kept.items()}
        for done in range(1, rounds + 1)
    ]


def prune_smallest(model: nn.Module, kept: Mapping[str, float]) -> None:
    """Holds at 0 all but the largest weights of some layers, by absolute value.

    `kept` has, by the layer's name, the share of its `weight` that stays, of all of it: a layer can
    be pruned again, to a smaller share. What is pruned gets no gradient. The parameter is
    `weight_orig` from now on, the same object as before, and `weight` its product with the mask
    `weight_mask` (see torch.nn.utils.prune); `make_permanent` ends that.
    Raises ValueError for a share that would bring pruned weights back.

    Source: Han et al. 2015, Learning both weights and connections for efficient neural networks,
    section 3; theirs is a threshold, of which such a share follows.
    """
    for name, share in kept.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        left = _left(layer)
        drop = left - round(share * weight.numel())
        if drop < 0:
            raise ValueError(
                f"{name} has {left} of {weight.numel()} weights left, fewer than the share {share} "
                "that it is to keep"
            )
        prune.l1_unstructured(layer, "weight", drop)


def make_permanent(model: nn.Module) -> None:
    """Turns every pruned layer into an ordinary one, with zeros in its weight."""
    for layer in model.modules():
        if hasattr(layer, "weight_mask"):
            prune.remove(layer, "weight")


def parameters_left(model: nn.Module) -> int:
    """Parameters that are trained and not pruned."""
    pruned = sum(
        int((layer.weight_mask == 0).sum())
        for layer in model.modules()
        if isinstance(getattr(layer, "weight_mask", None), torch.Tensor)
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - pruned


def _left(layer: nn.Module) -> int:
    mask = getattr(layer, "weight_mask", None)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel() if mask is None else int(mask.sum())
