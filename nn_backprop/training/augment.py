"""Images a little turned, stretched, slanted and shifted: the same digits by another hand."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES, STRETCH, SLANT, SHIFT = 10.0, 0.1, 0.1, 1.5  # the last in pixels


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image under an affine map of its own, drawn evenly between the limits above.

    images (N, C, H, W), of one shade in their upper left corner, which becomes the shade of what
    comes in from outside. The map takes a place (x, y) of the result, −1 to 1 from edge to edge,
    to the place where it is read, between the pixels by linear interpolation:
        (x, y) ↦ ((s cos φ) x + (k − s sin φ) y + u, (t sin φ) x + (t cos φ) y + v)
    with φ the angle, s and t the two stretches, k the slant, (u, v) the shift.

    Source: Simard, Steinkraus & Platt 2003, Best practices for convolutional neural networks
    applied to visual document analysis, section 2.
    """
    N, side = len(images), images.shape[-1]
    draws = torch.rand(6, N, generator=generator, device=images.device, dtype=images.dtype) * 2 - 1
    angle = draws[0] * math.radians(DEGREES)
    s, t = 1 + STRETCH * draws[1:3]
    k = SLANT * draws[3]
    u, v = draws[4:6] * SHIFT * 2 / side
    rows = [s * angle.cos(), k - s * angle.sin(), u, t * angle.sin(), t * angle.cos(), v]
    maps = torch.stack(rows, 1).view(N, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    background = images[:, :, :1, :1]
    return F.grid_sample(images - background, grid, align_corners=False) + background
