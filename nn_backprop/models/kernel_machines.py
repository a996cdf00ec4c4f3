"""Machines without a training loop: a ridge on fixed features, and exact Gaussian kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nn_backprop.data import ImageData
from nn_backprop.layers import RandomFourierFeatures, median_distance, random_patches

Predict = Callable[[Tensor], Tensor]  # normalised images (N, C, H, W) to features or scores (N, k)


def half_median_distance(data: ImageData, seed: int, patch: int | None = None) -> float:
    """A Gaussian kernel's σ for images, or for patches of so many pixels that are not constant.

    Half of the median distance between up to 5,000 random training images, or 20,000 of their
    patches.
    """
    # At random, since the training split may be in any order.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    x = data.batch(data.train[order[:5000]])[0]
    if patch is not None:
        x = random_patches(x, patch, 20_000, seed)
    return median_distance(x, seed=seed) / 2


def kernel_errors(data: ImageData, features: int, seed: int, pairs: int = 1000) -> dict[str, float]:
    """How far z·z' is from the Gaussian kernel k, over pairs of training images, in float64.

    z are so many random Fourier features of an image. Of |z·z' − k| there are "mean_error",
    "largest_error" and "root_mean_square". "derived" is the latter's expectation over draws of the
    features, √(mean of (1 + k⁴/2 − k²)/D). "pairs" are fewer where the images are.
    """
    sigma = half_median_distance(data, seed)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    pairs = min(pairs, len(order) // 2)
    x, y = (
        data.batch(data.train[part], torch.float64)[0].flatten(1)
        for part in (order[:pairs], order[pairs : 2 * pairs])
    )
    lift = RandomFourierFeatures(x.shape[1], features, sigma, seed, dtype=torch.float64)
    k = torch.exp(-((x - y) ** 2).sum(1) / (2 * sigma**2))
    error = ((lift(x) * lift(y)).sum(1) - k).abs()
    derived = (1 + k**4 / 2 - k**2) / features
    return {
        "sigma": sigma,
        "pairs": pairs,
        "mean_error": error.mean().item(),
        "largest_error": error.max().item(),
        "root_mean_square": error.square().mean().sqrt().item(),
        "derived": derived.mean().sqrt().item(),
    }


def ridge(lift: Predict, data: ImageData, strength: float) -> Predict:
    """Least squares from the features, and a constant, to the one-hot labels less a tenth.

    Minimizes |Z w − Y|² + s |w|², where s is `strength` times the mean square of an example's
    features. `lift` makes features of images, (N, …). Returns what makes scores (N, 10) of images.

    Products of blocks in float32, sums and solution in float64; of the symmetric Gram matrix only
    the lower triangle, which is what a Cholesky decomposition reads.
    """

    def features(images: Tensor) -> Tensor:
        z = torch.cat([lift(part).flatten(1) for part in images.split(100)])  # fits a core's cache
        return torch.cat([z, z.new_ones(len(z), 1)], 1)

    gram = cross = torch.zeros(0)
    for indices in data.train.split(4000):
        images, labels = data.batch(indices)
        z, y = features(images), _targets(labels)
        if not len(gram):
            gram, cross = (
                torch.zeros(z.shape[1], k, dtype=torch.float64) for k in (z.shape[1], 10)
            )
        for first in range(0, len(gram), 1024):
            gram[first:, first : first + 1024] += z[:, first:].T @ z[:, first : first + 1024]
        cross += z.double().T @ y
    unit = gram.trace().item() / len(data.train)
    return _solved(features, gram, cross, strength * unit)


def kernel_ridge(data: ImageData, sigma: float, strength: float) -> Predict:
    """The same with the exact Gaussian kernel exp(−|x − x'|²/(2 σ²)), in float64.

    The limit of random Fourier features for D → ∞: (K + λ I) α = Y, where K is k + 1, for features
    and constant. Takes memory for a matrix of all pairs of training examples.
    """
    x, y = data.batch(data.train, torch.float64)
    x = x.flatten(1)

    def kernel(other: Tensor) -> Tensor:
        distances = torch.cdist(other.flatten(1).double(), x)
        return torch.exp(-(distances**2) / (2 * sigma**2)) + 1

    # An example's features are of mean square 2: k(x, x) + 1.
    return _solved(kernel, kernel(x), _targets(y), 2 * strength)


def kernel_svm(data: ImageData, sigma: float, cost: float) -> Predict:
    """scikit-learn's support vector machine with the same kernel and the cost C.

    The score of an image is 1 for the class that it is taken for, else 0.
    """
    from sklearn.svm import SVC

    x, y = data.batch(data.train)
    machine = SVC(C=cost, gamma=1 / (2 * sigma**2)).fit(x.flatten(1).numpy(), y.numpy())

    def predict(images: Tensor) -> Tensor:
        return F.one_hot(torch.from_numpy(machine.predict(images.flatten(1).numpy())), 10)

    return predict


def share_right(predict: Predict, data: ImageData, indices: Tensor) -> float:
    """Of data[indices], those whose own class has the highest score."""
    right = 0
    for part in indices.split(1000):
        images, labels = data.batch(part)
        right += int((predict(images).argmax(1) == labels).sum())
    return right / len(indices)


def _solved(features: Predict, gram: Tensor, cross: Tensor, ridge: float) -> Predict:
    """The prediction features · weight, with (gram + ridge I) weight = cross."""
    gram.diagonal().add_(ridge)
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))

    def predict(images: Tensor) -> Tensor:
        z = features(images)
        return z @ weight.to(z.dtype)

    return predict


def _targets(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 10).double() - 0.1
