"""How many units of a network are active, and what white pixels leave of its accuracy.

Source of the noise: Ahmad & Scheinkman 2019, How can we be so dense?, and the code to it.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData
from nn_backprop.layers import KWinners
from nn_backprop.training import evaluate


@torch.no_grad()
def activity(model: nn.Module, data: ImageData, indices: Tensor) -> tuple[list[float], int, int]:
    """In evaluation mode: each hidden layer's share of active units; dead units, all units.

    Hidden layers are those that end in a ReLU or in KWinners. The share is the part of a layer's
    outputs that is not 0. Dead is a unit that is 0 for all images; all places of a map are one
    unit, also where units are counted.
    """
    active: dict[nn.Module, list[Tensor]] = {}  # of each channel: active places of each image

    def look(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        places = (output != 0).reshape(*output.shape[:2], -1)
        active.setdefault(layer, []).append(places.double().mean(2))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.ReLU, KWinners))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    evaluate(model, data, indices)
    for hook in hooks:
        hook.remove()
    found = [torch.cat(parts) for parts in active.values()]
    dead = sum(int((each == 0).all(0).sum()) for each in found)
    return [each.mean().item() for each in found], dead, sum(each.shape[1] for each in found)


def under_noise(
    model: nn.Module, data: ImageData, indices: Tensor, levels: Sequence[float], order: Tensor,
    white: int,
) -> list[float]:  # fmt: skip
    """The accuracy on data[indices] at each of the levels, shares of an image's pixels.

    order (n, 1, H, W) holds the numbers 0 … HW − 1 for each image; at level ν, the pixels with a
    number below int(HW ν) become white, which is a uint8. A higher level adds to a lower one.
    """
    images, labels = data.images[indices], data.labels[indices]
    found = []
    for level in levels:
        noisy = images.masked_fill(order < int(level * images[0].numel()), white)
        tested = replace(data, images=noisy, labels=labels)
        found.append(evaluate(model, tested, torch.arange(len(labels))).accuracy)
    return found


@functools.lru_cache(1)
def order_of_pixels(n: int, side: int, seed: int) -> Tensor:
    """A random order of the pixels of each of n images, int16 (n, 1, side, side)."""
    keys = torch.rand((n, side * side), generator=torch.Generator().manual_seed(seed))
    return keys.argsort(1).to(torch.int16).view(n, 1, side, side)
