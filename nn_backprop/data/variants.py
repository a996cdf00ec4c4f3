"""Data sets made from another: fewer images, smaller ones, shifted, rotated, cluttered ones.

Each takes uint8 images (N, 1, H, W), or the `ImageData` that holds them, and returns new ones.
"""

import math
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


def rotated(images: Tensor, seed: int) -> Tensor:
    """Each image turned about its middle by an angle of its own, even in 0 to 360 degrees.

    Read between the pixels by linear interpolation; black comes in. images (N, C, H, H): a
    rectangle would be stretched as it turns.

    Source: Larochelle, Erhan, Courville, Bergstra & Bengio 2007, An empirical evaluation of deep
    architectures on problems with many factors of variation: their set mnist-rot is made like this.
    """
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(len(images), generator=generator).to(images.device)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    maps = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    turned = []
    for part, turns in zip(images.split(1000), maps.split(1000), strict=True):
        grid = F.affine_grid(turns, list(part.shape), align_corners=False)
        turned.append(F.grid_sample(part.float(), grid, align_corners=False).round_())
    return torch.cat(turned).clamp_(0, 255).to(torch.uint8)


def on_noise(images: Tensor, seed: int) -> Tensor:
    """A background of noise, each pixel even in 0 to 255; where the digit is brighter, the digit.

    Source: Larochelle et al. 2007, as at `rotated`: their set mnist-back-rand.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    return torch.maximum(images, noise.to(images.device))


def on_clutter(images: Tensor, seed: int, pieces: int = 8, side: int = 8) -> Tensor:
    """Pieces of other images strewn over each: the brightest of what lies at a pixel is seen.

    A piece is a square of `side` pixels from a random place of a random image of the same tensor,
    laid at a random place. The clutter is strokes, like the digit itself. The set mnist-back-image
    of Larochelle et al. 2007 has patches of photographs as its background; this is not that set.
    Raises ValueError for a side that is not from 1 to the image's, or fewer than two images.

    Source: Mnih, Heess, Graves & Kavukcuoglu 2014, Recurrent models of visual attention, whose
    cluttered digits lie among pieces of 8 × 8 pixels, on a larger canvas.
    """
    (N, C, H, W), device = images.shape, images.device
    if not 1 <= side <= min(H, W):
        raise ValueError(f"side must be from 1 to {min(H, W)}, not {side}")
    if N < 2:
        raise ValueError("the pieces are those of other images, and there is only one")
    generator = torch.Generator().manual_seed(seed)

    def draw(largest: int) -> Tensor:
        return torch.randint(largest, (N,), generator=generator).to(device)

    windows = images.unfold(2, side, 1).unfold(3, side, 1)  # n c h w p q
    offset = torch.arange(side, device=device)
    seen = images.clone()
    flat = seen.view(N, C, H * W)
    for _ in range(pieces):
        other = (torch.arange(N, device=device) + 1 + draw(N - 1)) % N
        piece = windows[other, :, draw(H - side + 1), draw(W - side + 1)].flatten(2)
        rows = draw(H - side + 1)[:, None] + offset
        columns = draw(W - side + 1)[:, None] + offset
        place = (rows[:, :, None] * W + columns[:, None, :]).view(N, 1, -1).expand_as(piece)
        flat.scatter_reduce_(2, place, piece, "amax")
    return seen


def subset(data: ImageData, n: int, seed: int) -> ImageData:
    """n of the training examples, as many of each class as of any other if n is a multiple of them.

    If n is how many there are, all of them, in whatever shares. Mean and deviation of the pixels
    are those of the n. Raises ValueError for n < 1, or if a class is too small.
    """
    if n == len(data.train):
        return data
    if n < 1:
        raise ValueError(f"a subset needs an example or more, not {n}")
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
    train = train[torch.randperm(n, generator=generator).to(train.device)]
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
