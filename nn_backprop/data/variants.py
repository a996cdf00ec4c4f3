"""Data sets made from another: fewer images, smaller ones, moved, rotated, cluttered ones; noise.

Each takes uint8 images (N, 1, H, W), or the `ImageData` that holds them, and returns new ones.
"""

import math
from collections.abc import Callable
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


def shuffled_pixels(images: Tensor, seed: int) -> Tensor:
    """All images with their pixels in another order, the same for all.

    Source of this and of the next two: Zhang, Bengio, Hardt, Recht & Vinyals 2017, Understanding
    deep learning requires rethinking generalization, section 2.
    """
    pixels = images.shape[1:].numel()
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))
    return images.flatten(1)[:, order.to(images.device)].view_as(images)


def random_pixels(images: Tensor, seed: int) -> Tensor:
    """Each image with its pixels in an order of its own: its greys stay, its shape goes."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in images.flatten(1).split(10_000):
        keys = torch.rand(part.shape, generator=generator)
        parts.append(part.gather(1, keys.argsort(1).to(images.device)))
    return torch.cat(parts).view_as(images)


def gaussian_images(images: Tensor, seed: int, of: Tensor | None = None) -> Tensor:
    """As many images from a normal distribution with the mean and the covariance of the pixels.

    Mean and covariance are those of images[of], by default of all. Normal numbers have no bounds,
    and bytes have: all are brought to 0 … 255 by one affine map, the smallest to 0, the largest to
    255, and rounded. Training normalises such a map away.
    """
    drawn = normal_pixels(images, seed, of)
    least, most = drawn.aminmax()
    drawn.sub_(least).mul_(255 / (most - least).clamp(min=1e-30))
    return drawn.round_().clamp_(0, 255).to(torch.uint8)


def normal_pixels(images: Tensor, seed: int, of: Tensor | None = None) -> Tensor:
    """As `gaussian_images`, but before the map: float32, of the shape of images.

    An image is x = μ + Σ_k √λ_k ε_k v_k, with the mean μ, the eigenvectors v_k and eigenvalues λ_k
    of the covariance, and ε_k standard normal.
    """
    flat = images.flatten(1)
    sample = (flat if of is None else flat[of]).double()
    mean = sample.mean(0)
    sample -= mean
    values, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
    root = vectors * values.clamp(min=0).sqrt()  # rounding makes some of the zeros negative
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(flat.shape, generator=generator).to(images.device)
    return (drawn @ root.T.float() + mean.float()).view_as(images)


def varied(data: ImageData, make: Callable[[Tensor, int], Tensor], seed: int) -> ImageData:
    """Every split in a variant, such as `rotated`, normalised by its own training images.

    Each split is made apart, from a seed of its own: no piece of a test image comes to lie beside a
    training image.
    """
    images = data.images.clone()
    for number, split in enumerate((data.train, data.validation, data.test)):
        images[split] = make(images[split], 3 * seed + number)
    mean, std = mean_and_std(images[data.train])
    return replace(data, images=images, mean=mean, std=std)


def quarter_shifted(data: ImageData, pixels: int) -> ImageData:
    """Every fourth test image, data.test[::4], moved: one up, the next down, left, and right."""
    images = data.images.clone()
    for number, way in enumerate([(-pixels, 0), (pixels, 0), (0, -pixels), (0, pixels)]):
        part = data.test[4 * number :: 16]
        images[part] = shift(images[part], *way)
    return replace(data, images=images)


def random_labels(data: ImageData, share: float, seed: int) -> ImageData:
    """The data with a share of the training labels drawn anew, evenly from all K classes.

    round(share · n) of the n training examples, chosen by the seed, get a label that does not
    depend on the image, and keep it in every epoch; of them, one in K gets its own again. The
    labels of the other splits stay. Raises ValueError for a share that is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share}")
    generator = torch.Generator().manual_seed(seed)
    n, classes = len(data.train), int(data.labels.max()) + 1
    chosen = torch.randperm(n, generator=generator)[: round(share * n)]
    drawn = torch.randint(classes, (len(chosen),), generator=generator)
    labels = data.labels.clone()
    labels[data.train[chosen.to(labels.device)]] = drawn.to(labels.device)
    return replace(data, labels=labels)


def training_only(data: ImageData, n: int) -> ImageData:
    """The first n training examples, and no others at all: validation and test are empty.

    Mean and deviation of the pixels are those of the n.
    """
    used = data.train[:n]
    images, none = data.images[used], used[:0]
    mean, std = mean_and_std(images)
    return replace(data, images=images, labels=data.labels[used], train=torch.arange(len(used)),
                   validation=none, test=none, mean=mean, std=std)  # fmt: skip


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
