"""Data sets made from another: fewer images, smaller ones, shifted ones.

Each takes uint8 images (N, 1, H, W), or the `ImageData` that holds them, and returns new ones.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop.data.images import ImageData, mean_and_std


def resize(images: Tensor, height: int, width: int | None = None) -> Tensor:
    """Images of height × width pixels (width = height if not given), by linear interpolation.

    When they become smaller, the triangle of the interpolation is widened by as much, so that no
    pixel is left out.
    """
    size = (height, height if width is None else width)
    if images.shape[-2:] == size:
        return images
    parts = [
        F.interpolate(part.float(), size=size, mode="bilinear", antialias=True)
        for part in images.split(1000)
    ]
    return torch.cat(parts).round_().clamp_(0, 255).to(torch.uint8)


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """The content moved by whole pixels; what leaves is lost, and black comes in."""
    H, W = images.shape[-2:]
    moved = torch.zeros_like(images)
    if abs(down) < H and abs(right) < W:
        moved[..., max(0, down) : H + down, max(0, right) : W + right] = images[
            ..., max(0, -down) : H - down, max(0, -right) : W - right
        ]
    return moved


def subset(data: ImageData, n: int, seed: int) -> ImageData:
    """n of the training examples, as many of each class as of any other if n is a multiple of them.

    If n is how many there are, all of them, in whatever shares. Mean and deviation of the pixels
    are those of the n. Raises ValueError if a class is too small.
    """
    if n == len(data.train):
        return data
    generator = torch.Generator().manual_seed(seed)
    order = data.train[torch.randperm(len(data.train), generator=generator).to(data.train.device)]
    labels = data.labels[order]
    classes = int(labels.max()) + 1
    parts = []
    for k in range(classes):
        share = n // classes + (k < n % classes)
        members = order[labels == k]
        if len(members) < share:
            raise ValueError(f"class {k} has {len(members)} training examples, not {share}")
        parts.append(members[:share])
    train = torch.cat(parts)
    mean, std = mean_and_std(data.images[train])
    return replace(data, train=train, mean=mean, std=std)


def suited(data: ImageData, model: Any) -> ImageData:
    """The data in the form that the model was specified for.

    A model may have an `image_size`, the side of its images in pixels, and a `normalisation`, the
    (mean, deviation) to normalise with; without them the data stay as they are.
    """
    side = getattr(model, "image_size", data.images.shape[-1])
    if side != data.images.shape[-1]:
        images = resize(data.images, side)
        mean, std = mean_and_std(images[data.train])
        data = replace(data, images=images, mean=mean, std=std)
    mean, std = getattr(model, "normalisation", (data.mean, data.std))
    return replace(data, mean=mean, std=std)
