"""Magnitude pruning with torch.nn.utils.prune: drop the smallest weights, train on, drop more."""

from collections.abc import Iterator, Mapping

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
    _require_shares(kept)
    return [
        {name: share ** (done / rounds) for name, share in kept.items()}
        for done in range(1, rounds + 1)
    ]


@torch.no_grad()
def prune_smallest(model: nn.Module, kept: Mapping[str, float]) -> None:
    """Holds at 0 all but the largest weights of some layers, by absolute value.

    `kept` has, by the layer's name, the share of its `weight` that stays, of all of it: a layer can
    be pruned again, to a smaller share. What is pruned gets the gradient 0. The parameter is
    `weight_orig` from now on, the same object as before, and `weight` its product with the mask
    `weight_mask`, computed anew before each forward pass (see torch.nn.utils.prune);
    `make_permanent` ends that.
    Only the next forward pass knows the new mask, not a recorded one: make an engine of
    `engines.for_training` anew after each pruning. The gradients by hand know no mask, and
    copy.deepcopy refuses a pruned model whose last forward pass was for gradients.
    Raises ValueError, before anything is changed, for a share that is not above 0 and at most 1,
    that would leave no weight or bring pruned ones back, or for a layer that is named twice.

    Source: Han et al. 2015, Learning both weights and connections for efficient neural networks,
    section 3; theirs is a threshold, of which such a share follows.
    """
    _require_shares(kept)
    drops: list[tuple[nn.Module, int]] = []
    for name, share in kept.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if any(layer is other for other, _ in drops):
            raise ValueError(f"{name} is a layer that has another name, too: give it one share")
        left, keep = weight.numel() - _dropped(layer), round(share * weight.numel())
        if keep == 0:
            raise ValueError(f"the share {share} of {name} is none of its {weight.numel()} weights")
        drop = left - keep
        if drop < 0:
            raise ValueError(
                f"{name} has {left} of {weight.numel()} weights left, fewer than the share {share} "
                "that it is to keep"
            )
        drops.append((layer, drop))
    for layer, drop in drops:
        # Of a layer that is pruned already, `weight` may be older than the last step.
        latest = getattr(layer, "weight_orig", layer.weight)
        order = _names(layer)
        prune.l1_unstructured(layer, "weight", drop, importance_scores=latest)
        _reorder(layer, ["weight_orig" if name == "weight" else name for name in order])


def make_permanent(model: nn.Module) -> None:
    """Turns every pruned layer into an ordinary one, with zeros in its weight."""
    for layer in _pruned(model):
        order = _names(layer)
        prune.remove(layer, "weight")
        _reorder(layer, ["weight" if name == "weight_orig" else name for name in order])


def parameters_left(model: nn.Module) -> int:
    """Parameters that are trained and not pruned."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained - sum(
        _dropped(layer)
        for layer in _pruned(model)
        if layer.get_parameter("weight_orig").requires_grad
    )


def _require_shares(kept: Mapping[str, float]) -> None:
    for name, share in kept.items():
        if not 0 < share <= 1:
            raise ValueError(f"the share of {name} must be above 0 and at most 1, not {share}")


def _pruned(model: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in model.modules() if hasattr(layer, "weight_mask"))


def _dropped(layer: nn.Module) -> int:
    mask = getattr(layer, "weight_mask", None)
    return 0 if mask is None else int((mask == 0).sum())  # exact in any type


def _names(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters(recurse=False)]


def _reorder(layer: nn.Module, names: list[str]) -> None:
    """Gives the parameters the order of the names: optimizers go by it."""
    for name in names:
        parameter = layer.get_parameter(name)
        delattr(layer, name)
        layer.register_parameter(name, parameter)
