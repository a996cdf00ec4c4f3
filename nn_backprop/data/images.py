"""Images and labels in one place, on one device; batches are gathered and normalised there."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of N images in three disjoint splits, all its tensors on one device."""

    name: str  # "mnist" or "digits"
    reason: str  # why this data set, or where it was found
    images: Tensor  # uint8 (N, 1, 28, 28); other sizes in `variants`
    labels: Tensor  # int64 (N,)
    train: Tensor  # int64 (n,): indices into images, as the next two
    validation: Tensor
    test: Tensor
    mean: float  # of the pixels of the training split, which are taken to be in 0..1
    std: float

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Normalised images (n, 1, H, W) of dtype and labels (n,) at indices, int64 (n,)."""
        images = self.images.index_select(0, indices)  # ten times as fast as images[indices]
        return channels_last(self.normalise(images, dtype)), self.labels.index_select(0, indices)

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(images / 255 - mean) / std, in dtype; images are uint8 of any shape."""
        return images.to(dtype, copy=True).sub_(255 * self.mean).mul_(1 / (255 * self.std))

    def to(self, device: str | torch.device) -> "ImageData":
        """The same data with all tensors on device."""
        fields = ("images", "labels", "train", "validation", "test")
        return replace(self, **{name: getattr(self, name).to(device) for name in fields})


def channels_last(images: Tensor) -> Tensor:
    """The same images (n, C, H, W), with strides for which a CPU convolves faster.

    With one channel nothing moves in memory, but torch, too, takes its strides for channels first.
    """
    n, C, H, W = images.shape
    return images.permute(0, 2, 3, 1).flatten().view(n, H, W, C).permute(0, 3, 1, 2)


def mean_and_std(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels of uint8 images, in units of 0..1.

    Counted by grey value, so that the sums are exact and no floating copy of the images is made.
    """
    counts = torch.bincount(images.flatten(), minlength=256).cpu().double()
    greys = torch.arange(256, dtype=torch.float64) / 255
    mean = (greys * counts).sum() / counts.sum()
    variance = ((greys - mean) ** 2 * counts).sum() / counts.sum()
    return mean.item(), variance.sqrt().item()
