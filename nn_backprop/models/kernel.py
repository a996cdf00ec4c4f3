"""A kernel machine for images: random features of patches, pooled; one trained layer."""

from torch import Tensor, nn

from nn_backprop.layers import RandomFourierFeatures2d
from nn_backprop.models.classifier import Classifier

# Half the median distance between patches of 5 × 5 pixels that are not constant, of MNIST's
# normalised training split: `median_distance(random_patches(...))` is 9.3 to 9.5 there. On the
# validation split half of it was better than the whole and than a quarter.
SIGMA = 4.7


class KernelNetwork(Classifier):
    """Lift, pool, decide: random Fourier features of patches, a grid of their means, one layer.

    Nothing below the last layer is trained, so the loss is convex in what is. With the defaults an
    image of 784 pixels is lifted to 256 · 12 · 12 = 36,864 numbers and pooled to 256 · 4 · 4 =
    4,096; the last layer has 40,970 parameters. `sigma` is by default half of
    what the median heuristic gives for MNIST; `seed` is that of the random filters.

    Shapes: inputs (N, 1, image_size, image_size); output (N, classes), logits.
    Raises ValueError for what `RandomFourierFeatures2d` refuses, or classes below 1.

    Source: Rahimi & Recht 2007, Random features for large-scale kernel machines; Mairal et al.
    2014, Convolutional kernel networks, of which this is one layer, with random filters.
    """

    def __init__(
        self,
        features: int = 256,
        kernel_size: int = 5,
        stride: int = 2,
        grid: int = 4,
        pooling: str = "gaussian",
        sigma: float = SIGMA,
        seed: int = 0,
        image_size: int = 28,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        if classes < 1:
            raise ValueError(f"classes must be at least 1, not {classes}")
        self.features = RandomFourierFeatures2d(
            1, features, image_size, kernel_size, sigma, stride, grid=grid, pooling=pooling,
            seed=seed,
        )  # fmt: skip
        self.output = nn.Linear(self.features.pooled, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x).flatten(1))
