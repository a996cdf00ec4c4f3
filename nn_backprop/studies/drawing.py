"""Images that a network is asked to draw, and which digit somebody else sees in them."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.data import ImageData, uniform_noise
from nn_backprop.studies.jobs import Row

LENGTH = 0.1  # of the first step, where white is 1


def draw(model: nn.Module, data: ImageData, steps: int) -> Tensor:
    """Ten images, uint8 (10, 1, 28, 28): to the network, ever more of the digits 0 to 9.

    x ← clip(x + η_t s / ‖s‖) in float64, from x = 0, where white is 1, with s = ∂ log p_k / ∂x for
    digit k, but 0 where x is 0 and s < 0 or x is 1 and s > 0; p are the outputs, after softmax if
    they are logits, and η_t = LENGTH · (1 − t/steps), t = 0, 1, …  The slope is divided by its
    length because it vanishes as p_k nears 1; if it is 0, x stays.
    """
    model = copy.deepcopy(model).double()
    wanted = torch.arange(10)
    x = torch.zeros(10, 1, 28, 28, dtype=torch.float64)
    for t in range(steps):
        x.requires_grad_()
        given = model(data.normalise(x, torch.float64))
        log_p = given.log_softmax(1) if model.loss_name == "cross_entropy" else given.log()
        (slope,) = torch.autograd.grad(log_p[wanted, wanted].sum(), x)
        x = x.detach()
        free = torch.where(slope < 0, x > 0, x < 255)
        step = F.normalize((slope * free).flatten(1)).view_as(x)
        x = (x + 255 * LENGTH * (1 - t / steps) * step).clamp_(0, 255)
    return x.round().to(torch.uint8)


def nearest(images: Tensor, data: ImageData) -> tuple[Tensor, Tensor]:
    """The label of the training image that correlates most with each of (n, 1, H, W): (n,), (n,).

    Of their pixels, so that neither brightness nor contrast matter; then the correlation itself.
    """
    correlation, place = (_centred(images) @ _centred(data.images[data.train]).T).max(1)
    return data.labels[data.train[place]], correlation


def judged(indices: Tensor, data: ImageData, seed: int) -> Row:
    """How `nearest` does on data[indices]: the share right, the correlation; and that of noise."""
    images = data.images[indices]
    digit, digits = nearest(images, data)
    _, noise = nearest(uniform_noise(images, seed), data)
    right = (digit == data.labels[indices]).double().mean().item()
    return {"right": right, "of_digits": digits.mean().item(), "of_noise": noise.mean().item()}


def _centred(images: Tensor) -> Tensor:
    """Each image's pixels less their mean, of length 1; 0 if it has no contrast: (n, HW)."""
    pixels = images.flatten(1).float()
    return F.normalize(pixels - pixels.mean(1, keepdim=True))


def stretched(images: Tensor) -> Tensor:
    """uint8 images (n, 1, H, W), each made so bright that its brightest pixel is 255."""
    brightest = images.flatten(1).amax(1).clamp(min=1)
    return (images * (255 / brightest)[:, None, None, None]).round().to(torch.uint8)


def sheet(images: Tensor) -> Tensor:
    """Images (rows, columns, H, W) side by side in one, a grey line around each."""
    framed = F.pad(images, (1, 1, 1, 1), value=64)
    rows, columns, H, W = framed.shape
    return framed.transpose(1, 2).reshape(rows * H, columns * W)
