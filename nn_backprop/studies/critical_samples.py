"""Critical samples: images near which, in a small box, the network predicts another class.

Source: Arpit et al. 2017, A closer look at memorization in deep networks, section 4.1.
"""

import torch
from torch import Tensor

from nn_backprop.data import ImageData
from nn_backprop.models import MLP

RADIUS, STEP, NOISE = 0.3, 0.25, 0.2  # the authors' r, α and β, in grey values of 0 to 255
SEARCH_STEPS = 5  # they find no fewer than the authors' 100 at most


def critical_share(
    model: MLP, data: ImageData, indices: Tensor, factor: float, noise: torch.Generator
) -> float:
    """The share of the images at `indices` for which a search finds a critical sample, 0 to 1.

    One that has another predicted class somewhere within ±r of each pixel. A step of the search is
    α sign(∂C/∂x) + β η, then back into the box, with C the loss of the class predicted at first and
    η normal, drawn from `noise`. `factor` multiplies r, α and β. As in the authors' code, the
    gradient is that of the loss, taken at each point. Parameters get no gradients.
    """
    radius = factor * RADIUS
    greys = data.images[indices].float()
    moved = greys
    with torch.enable_grad():  # asked in the midst of `fit_many`, which has it off
        predicted = model(data.normalise(greys)).argmax(1)
        found = torch.zeros_like(predicted, dtype=torch.bool)
        for _ in range(SEARCH_STEPS):
            moved = moved.detach().requires_grad_()
            loss = model.loss(model(data.normalise(moved)), predicted)
            (grad_moved,) = torch.autograd.grad(loss, moved)
            random = torch.randn(greys.shape, generator=noise)
            moved = moved.detach() + factor * (STEP * grad_moved.sign() + NOISE * random)
            moved = greys + (moved - greys).clamp(-radius, radius)
            found |= model(data.normalise(moved)).argmax(1) != predicted
    return found.double().mean().item()
