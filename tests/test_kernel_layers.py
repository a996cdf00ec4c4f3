"""Random Fourier features: their numbers, their gradients, and that their products are a kernel."""

import math
from itertools import product as every

import pytest
import torch
import torch.nn.functional as F
from properties import about, refuses
from torch.testing import assert_close

from nn_backprop import layers, models
from nn_backprop.models import counting

SIZES = [  # channels, kernel, image, stride, padding, grid: odd ones, and a grid of all patches
    (3, (2, 3), (11, 7), (2, 1), (1, 0), (3, 2)), (1, 5, 13, 2, 0, 2),
    (2, 3, 7, 1, 0, 5), (1, 3, 5, 1, 1, 1),
]  # fmt: skip
POOLINGS = ("average", "gaussian")


def patches_layer(sizes, pooling="average", D=5, **kind):
    channels, kernel, image, stride, padding, grid = sizes
    return layers.RandomFourierFeatures2d(
        channels, D, image, kernel, 1.7, stride, padding, grid, pooling, seed=3, **kind
    )


def drawn(*shape: int, seed: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def image_for(layer, N=2):
    return drawn(N, layer.in_channels, *layer.input_size)


def vectors_layer(**kind):
    return layers.RandomFourierFeatures(3, 5, 1.7, seed=3, **kind)


# --- the numbers ---


def test_features_of_vectors_are_their_formula():
    layer, x = vectors_layer(dtype=torch.float64), drawn(2, 7, 3)
    z = layer(x)
    for n, m, o in every(range(2), range(7), range(5)):
        u = sum(float(x[n, m, i] * layer.weight[o, i]) for i in range(3))
        expected = math.sqrt(2 / 5) * math.cos(u + float(layer.bias[o]))
        assert float(z[n, m, o]) == pytest.approx(expected, rel=1e-12)


def cell_weight(k, cells, position, size, pooling):
    """How much of a place counts in cell k, found by cutting the axis into fine slices."""
    fine = 2520  # divisible by every number of cells and sizes here
    part = size / cells
    if pooling == "average":
        slices = [position + (j + 0.5) / fine for j in range(fine)]
        return sum(k * part <= s < (k + 1) * part for s in slices) / fine
    away = (position + 0.5 - (k + 0.5) * part) / (part / 2)
    return math.exp(-away * away / 2)


def test_features_of_patches_are_the_weighted_means_of_each_patch():
    for sizes, pooling in every(SIZES, POOLINGS):
        with about(sizes, pooling):
            layer = patches_layer(sizes, pooling, dtype=torch.float64)
            are_weighted_means(layer, image_for(layer))


def are_weighted_means(layer, x):
    (top, left), (P, Q), (s, t) = layer.padding, layer.kernel_size, layer.stride
    padded = F.pad(x, (left, left, top, top))
    H, W = layer.map_size
    vectors = layers.RandomFourierFeatures(1, 5, dtype=torch.float64)  # given the filters below
    vectors.weight, vectors.bias = layer.weight.flatten(1), layer.bias
    lifted = {
        (h, w): vectors(padded[:, :, s * h : s * h + P, t * w : t * w + Q].flatten(1))
        for h, w in every(range(H), range(W))
    }
    z = layer(x)
    assert z.shape == (2, 5, *layer.grid)
    for k, m in every(*map(range, layer.grid)):
        rows = [cell_weight(k, layer.grid[0], h, H, layer.pooling) for h in range(H)]
        columns = [cell_weight(m, layer.grid[1], w, W, layer.pooling) for w in range(W)]
        mean = sum(lifted[h, w] * rows[h] * columns[w] for h, w in lifted)
        assert_close(z[:, :, k, m], mean / sum(rows) / sum(columns), rtol=1e-10, atol=1e-12)
    # a constant stays as it is, and of an average every patch counts alike
    for matrix in (layer.rows, layer.columns):
        assert (matrix >= 0).all()
        assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    if layer.pooling == "average":
        share = len(layer.rows) / layer.rows.shape[1]
        assert_close(layer.rows.sum(0), torch.full_like(layer.rows[0], share))


def test_shapes_dimensions_and_multiply_adds():
    layer = patches_layer(SIZES[0], dtype=torch.float64)
    x = image_for(layer)
    assert layer(x[:0]).shape == (0, 5, 3, 2)
    assert_close(layer(x[1]), layer(x)[1])
    assert (layer.map_size, layer.lifted, layer.pooled) == ((6, 5), 5 * 6 * 5, 5 * 3 * 2)
    full = patches_layer(SIZES[2])
    assert full.lifted == full.pooled and torch.equal(full.rows, torch.eye(5))
    layer = layers.RandomFourierFeatures2d(3, 5, 11, 2, stride=2, grid=3)
    H = W = layer.map_size[0]
    by_hand = H * W * 5 * 3 * 2 * 2 + 5 * (H * W + H * 3) * 3
    assert counting.multiply_adds(layer, image_for(layer, 7).float()) == 7 * by_hand
    assert counting.parameters(layer) == 0
    assert counting.multiply_adds(vectors_layer(), torch.randn(7, 3)) == 7 * 15


def test_the_network():
    model = models.KernelNetwork()
    assert (model.features.lifted, model.features.pooled) == (36_864, 4_096)
    assert model(torch.zeros(0, 1, 28, 28)).shape == (0, 10)
    model = models.KernelNetwork(image_size=20)  # which tells the side of its images
    assert model.image_size == 20 and model(torch.zeros(2, 1, 20, 20)).shape == (2, 10)
    refuses("classes must be at least 1", models.KernelNetwork, classes=0)
    refuses("larger than the map", models.KernelNetwork, image_size=8)


def test_a_state_dict_brings_the_filters_and_leaves_the_pooling():
    other = layers.RandomFourierFeatures2d(3, 5, (11, 7), (2, 3), 9.0, (2, 1), (1, 0), (3, 2),
                                           "gaussian", seed=8)  # fmt: skip
    layer = patches_layer(SIZES[0])
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    assert (layer.sigma, layer.seed, layer.pooling) == (1.7, 3, "average")
    assert torch.equal(layer.rows, patches_layer(SIZES[0]).rows)


# --- the kernel ---


def test_the_product_is_the_gaussian_kernel_within_its_derived_deviation():
    D, sigma = 200_000, 1.3
    layer = layers.RandomFourierFeatures(5, D, sigma, seed=2, dtype=torch.float64)
    x = drawn(5, seed=1)
    for distance in (0.0, 0.7, 2.0, 5.0):
        y = x + distance * F.normalize(torch.ones(5, dtype=torch.float64), dim=0)
        k = math.exp(-(distance**2) / (2 * sigma**2))
        deviation = math.sqrt((1 + k**4 / 2 - k**2) / D)
        product = layer(x) * layer(y)
        assert abs(float(product.sum()) - k) < 4 * deviation
        # the deviation itself, from that of the D terms
        assert float(product.std()) * math.sqrt(D) == pytest.approx(deviation, rel=0.02)
    assert 0 <= layer.bias.min() < 0.01 and 6.27 < layer.bias.max() <= 2 * math.pi


def test_the_numbers_are_those_of_the_seed_in_every_type():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for make in (vectors_layer, lambda **kind: patches_layer(SIZES[0], **kind)):
        single, double = make(dtype=torch.float32), make(dtype=torch.float64)
        assert make().weight.dtype == torch.get_default_dtype()
        for name, buffer in double.named_buffers():
            assert torch.equal(buffer.float(), single.get_buffer(name))
        assert not list(double.parameters())
        assert set(double.state_dict()) == {"weight", "bias"}
    assert torch.equal(state, torch.get_rng_state())
    other = layers.RandomFourierFeatures(3, 5, 1.7, seed=4)
    assert not torch.equal(other.weight, vectors_layer().weight)
    # σ only scales W
    assert_close(layers.RandomFourierFeatures(3, 5, 3.4, 3).weight * 2, vectors_layer().weight)


def test_the_gradient_of_the_input_is_the_one_that_the_docstring_derives():
    patches, vectors = patches_layer(SIZES[0], dtype=torch.float64), vectors_layer().double()
    for layer, x in ((patches, image_for(patches)), (vectors, drawn(7, 3))):
        z = layer(x.requires_grad_())
        grad_z = torch.randn_like(z)
        if layer is patches:
            grad_a = torch.einsum("kh,lw,nokl->nohw", layer.rows, layer.columns, grad_z)
            u = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        else:
            grad_a, u = grad_z, F.linear(x, layer.weight, layer.bias)
        grad_u = -math.sqrt(2 / 5) * grad_a * u.sin().detach()
        assert_close(torch.autograd.grad(u, x, grad_u), torch.autograd.grad(z, x, grad_z))


def test_the_median_distance_is_the_median_of_distances():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert layers.median_distance(x) == 5.0
    x = torch.randn(50, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    all_pairs = F.pdist(x.flatten(1)).median().item()
    assert layers.median_distance(x) == pytest.approx(all_pairs, rel=0.02)
    assert layers.median_distance(x, 100, 1) == layers.median_distance(x, 100, 1)
    assert layers.median_distance(x, 100, 1) != layers.median_distance(x, 100, 2)
    # pairs are of two different rows: of two, every pair is 0 and 1
    assert layers.median_distance(torch.tensor([[0.0], [2.0]]), pairs=1) == 2.0
    refuses("two rows", layers.median_distance, torch.zeros(1, 3))
    refuses("one pair", layers.median_distance, torch.zeros(2, 3), 0)


def test_random_patches_are_patches_and_none_is_constant():
    images = torch.zeros(3, 2, 11, 13)
    images[:, :, 4:7, 5:8] = torch.arange(1.0, 55).view(3, 2, 3, 3)
    patches = layers.random_patches(images, (2, 3), 500, seed=1)
    assert 0 < len(patches) < 500 and patches.shape[1:] == (2, 2, 3)
    assert torch.equal(patches, layers.random_patches(images, (2, 3), 500, seed=1))
    every_patch = images.unfold(2, 2, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    assert set(map(tuple, patches.flatten(1).tolist())) <= set(map(tuple, every_patch.tolist()))
    assert all(len(set(p)) > 1 for p in patches.flatten(1).tolist())
    image = torch.zeros(2, 1, 5, 5)
    refuses("larger than images", layers.random_patches, image, 6, 9)
    refuses("constant", layers.random_patches, image, 3, 9)
