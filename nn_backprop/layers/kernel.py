"""Lift by a kernel, then pool: random Fourier features, of vectors and of patches.

A kernel k(x, y) is an inner product φ(x)·φ(y) in a space of more dimensions than x has; for the
Gaussian kernel, of infinitely many. A few thousand random cosines approximate that product, and a
linear layer on them then does what a kernel machine does, at a cost that is linear in the number
of examples. On patches, the features of a whole neighbourhood are averaged, which brings the
dimension down again and forgets where in the neighbourhood a patch stood.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers.arguments import as_pairs, require_integers
from nn_backprop.rules.convolution import Pair, pair

POOLINGS = ("average", "gaussian")


class RandomFourierFeatures(nn.Module):
    """z(x) = √(2/D) cos(W x + b), W from a normal distribution of deviation 1/σ, b even in [0, 2π].

    W and b are drawn once, from `seed` alone: the same numbers on every device and in every type,
    up to rounding. They are buffers, saved with the model, never trained: a state dict brings the
    W and b it was saved with, while `sigma` and `seed` go on to name what the layer was built with.

    Why. Let δ = x − y, and w and b be those of one feature. By 2 cos α cos β = cos(α − β) +
    cos(α + β), D times its term in z(x)·z(y) is
        t = 2 cos(w·x + b) cos(w·y + b) = cos(w·δ) + cos(w·(x + y) + 2b).
    Over b the second term has mean 0. The first is the real part of e^(i w·δ); w·δ is normal with
    mean 0 and deviation s = ‖δ‖/σ, and the mean of such a wave is e^(−s²/2). So
        E z(x)·z(y) = E t = exp(−‖x − y‖² / 2σ²) = k.

    How well. The two terms are uncorrelated, again because of b. With cos² α = ½ (1 + cos 2α), the
    first has E cos²(w·δ) = ½ (1 + e^(−2s²)) = ½ (1 + k⁴), the second ½. So Var t = 1 + ½ k⁴ − k²,
    and for the mean of D independent ones
        Var z(x)·z(y) = (1 + ½ k⁴ − k²) / D ≤ 1 / D:
    the error falls as 1/√D, whatever the dimension of x; Hoeffding's inequality for terms within
    [−2, 2] says the same of its tail: P(|z(x)·z(y) − k| ≥ ε) ≤ 2 exp(−D ε² / 8).

    Gradient of the input, with u = W x + b (what is fixed gets none): cos' = −sin, then linear.
        grad_u[n,o] = −√(2/D) grad_z[n,o] sin u[n,o]
        grad_x[n,i] = Σ_o grad_u[n,o] weight[o,i]

    Shapes: x (..., in_features); z (..., out_features), D = out_features; weight (D, in_features);
    bias (D,). No trained parameters; in_features · D multiply-adds an example, and D cosines.
    Raises ValueError for a size that is no integer of at least 1, or a sigma that is not positive
    and finite.

    Source: Rahimi & Recht 2007, Random features for large-scale kernel machines, algorithm 1.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sigma: float = 1.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integers(in_features=in_features, out_features=out_features)
        weight, bias = _draw((out_features, in_features), sigma, seed)
        self.register_buffer("weight", _placed(weight, device, dtype))
        self.register_buffer("bias", _placed(bias, device, dtype))
        self.in_features, self.out_features = in_features, out_features
        self.sigma, self.seed = sigma, seed

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / self.out_features) * torch.cos(F.linear(x, self.weight, self.bias))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"sigma={self.sigma:g}, seed={self.seed}"
        )


class RandomFourierFeatures2d(nn.Module):
    """Random Fourier features of every patch of an image, then averaged over the cells of a grid.

    Lift: z(patch) = √(2/D) cos(W patch + b) at every position, a convolution with D = out_channels
    random filters and a cosine, so that z(patch)·z(patch') ≈ exp(−‖patch − patch'‖² / 2σ²), as at
    `RandomFourierFeatures`. Pool: cell (k, l) of the grid gets a weighted mean of the features,
        z[n,o,k,l] = Σ_h,w rows[k,h] columns[l,w] a[n,o,h,w],
    with the two matrices fixed and every row of them of sum 1. For "average", rows[k,h] is the
    share of the k-th of `grid` equal parts of the axis that pixel h fills, so that every pixel
    counts alike even if the parts are no whole pixels; for "gaussian", a normal density about the
    middle of that part, with half a part as its deviation, so that a patch which moves fades from
    one cell into the next.

    What it computes. The products of two images' features are
        Σ_k,l z[k,l]·z'[k,l] ≈ Σ_k,l Σ_h,w Σ_h',w' (pooling weights) k(patch[h,w], patch'[h',w']):
    patches are compared by the kernel wherever they stand in a cell, and cells with cells.

    Gradient of the input, with u = conv(x, weight) + bias and a = √(2/D) cos u. Pooling is linear:
    a[n,o,h,w] enters every cell with the factor rows[k,h] columns[l,w]. Then the cosine, then the
    convolution's own way back from patches to pixels (`rules.convolution`, x̃ with its border):
        grad_a[n,o,h,w] = Σ_k,l rows[k,h] columns[l,w] grad_z[n,o,k,l]
        grad_u[n,o,h,w] = −√(2/D) grad_a[n,o,h,w] sin u[n,o,h,w]
        grad_x̃[n,c,i,j] = Σ_h,w,p,q [i = s h + p] [j = s w + q] Σ_o grad_u[n,o,h,w] weight[o,c,p,q]

    Both dimensions: `lifted` = D H' W' numbers before the pooling, `pooled` = D times the cells.

    Shapes: x (N, in_channels, *input_size); z (N, D, *grid), both without N for one image; weight
    (D, in_channels, P, Q), bias (D,), rows (grid, H'), columns (grid, W') are buffers, none of them
    trained; H' = ⌊(H + 2 · padding − P) / stride⌋ + 1. H' W' D · in_channels · P · Q multiply-adds
    an image for the lift, and D (H' W' + H' · grid) · grid for the pooling (a square grid).
    A state dict has weight and bias alone: sigma, seed and pooling are what the layer was built
    with, whatever is loaded, and of those only the pooling takes part in the forward.
    Raises ValueError for sizes that are no integers of at least 1 (padding: 0), a kernel larger
    than the padded image, a grid larger than the map of positions, a sigma that is not positive and
    finite, or an unknown pooling; in the forward, for images of another shape.

    Source: Rahimi & Recht 2007 for the lift; Mairal, Koniusz, Harchaoui & Schmid 2014,
    Convolutional kernel networks, for patches, kernel and Gaussian pooling: one layer of theirs,
    with random filters in place of learnt ones.
    """

    weight: Tensor
    bias: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Pair,
        kernel_size: Pair,
        sigma: float = 1.0,
        stride: Pair = 1,
        padding: Pair = 0,
        grid: Pair = 4,
        pooling: str = "average",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integers(in_channels=in_channels, out_channels=out_channels)
        self.input_size, self.kernel_size, self.stride, self.grid = as_pairs(
            input_size=input_size, kernel_size=kernel_size, stride=stride, grid=grid
        )
        (self.padding,) = as_pairs(0, padding=padding)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {list(POOLINGS)}, not {pooling!r}")
        axes = zip(self.input_size, self.padding, self.kernel_size, strict=True)
        free = [size + 2 * border - kernel for size, border, kernel in axes]
        if min(free) < 0:
            raise ValueError(
                f"a kernel of {self.kernel_size} is larger than an image of {self.input_size} with "
                f"a border of {self.padding}"
            )
        self.map_size = (free[0] // self.stride[0] + 1, free[1] // self.stride[1] + 1)
        if self.grid[0] > self.map_size[0] or self.grid[1] > self.map_size[1]:
            raise ValueError(f"grid {self.grid} is larger than the map of {self.map_size} patches")
        weight, bias = _draw((out_channels, in_channels, *self.kernel_size), sigma, seed)
        rows, columns = (
            _pooling_matrix(cells, size, pooling)
            for cells, size in zip(self.grid, self.map_size, strict=True)
        )
        for name, buffer in (
            ("weight", weight), ("bias", bias), ("rows", rows), ("columns", columns)
        ):  # fmt: skip
            drawn = name in ("weight", "bias")  # the others follow from the arguments
            self.register_buffer(name, _placed(buffer, device, dtype), persistent=drawn)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.sigma, self.pooling, self.seed = sigma, pooling, seed

    @property
    def lifted(self) -> int:
        """Numbers an image becomes before they are pooled."""
        return self.out_channels * self.map_size[0] * self.map_size[1]

    @property
    def pooled(self) -> int:
        """Numbers an image becomes."""
        return self.out_channels * self.grid[0] * self.grid[1]

    def forward(self, x: Tensor) -> Tensor:
        image = (self.in_channels, *self.input_size)
        if x.dim() not in (3, 4) or x.shape[-3:] != image:
            raise ValueError(
                f"the layer takes an image {image} or a batch of them, not {tuple(x.shape)}"
            )
        images = x.reshape(-1, *image)
        u = F.conv2d(images, self.weight, self.bias, self.stride, self.padding)
        a = torch.cos(u).permute(0, 2, 3, 1)  # nhwo, as a convolution of images lays it out
        z = torch.matmul(self.columns, a).flatten(2)  # lw,nhwo->nhlo
        z = torch.matmul(self.rows, z).reshape(-1, *self.grid, self.out_channels)  # kh,nhlo->nklo
        # On what is left after the pooling, the factor costs less than on a.
        z = math.sqrt(2 / self.out_channels) * z.permute(0, 3, 1, 2)
        return z.reshape(*x.shape[:-3], self.out_channels, *self.grid)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"input_size={self.input_size}, sigma={self.sigma:g}, stride={self.stride}, "
            f"padding={self.padding}, grid={self.grid}, pooling={self.pooling!r}, seed={self.seed}"
        )


def median_distance(x: Tensor, pairs: int = 10_000, seed: int = 0) -> float:
    """The median of ‖x_n − x_m‖ over random pairs n ≠ m of the rows of x, drawn from `seed`.

    The usual first guess of a Gaussian kernel's σ: with it, half of the pairs are compared where
    the kernel is above e^(−½), half where it is below. x (N, ...), each x_n taken as one vector.
    Raises ValueError for fewer than two rows or pairs < 1.

    Source: Garreau, Jitkrittum & Kanagawa 2017, Large sample analysis of the median heuristic.
    """
    N = len(x)
    if N < 2 or pairs < 1:
        raise ValueError(f"needs two rows and one pair or more, not {N} and {pairs}")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(N, (pairs,), generator=generator)
    other = (first + torch.randint(1, N, (pairs,), generator=generator)) % N
    x = x.flatten(1)
    parts = zip(first.to(x.device).split(1000), other.to(x.device).split(1000), strict=True)
    return torch.cat([(x[n] - x[m]).norm(dim=1) for n, m in parts]).median().item()


def random_patches(images: Tensor, kernel_size: Pair, count: int, seed: int = 0) -> Tensor:
    """Patches from random places of random images, drawn from `seed`, without the constant ones.

    Most patches of a digit are background alone; their distance 0 would tell nothing of σ. images
    (N, C, H, W); returns (n, C, P, Q) with n ≤ count. Raises ValueError if the kernel is larger
    than the images, or if every patch drawn is constant.
    """
    (N, _, H, W), (P, Q) = images.shape, pair(kernel_size)
    if P > H or Q > W:
        raise ValueError(f"a kernel of {(P, Q)} is larger than images of {(H, W)}")
    generator = torch.Generator().manual_seed(seed)
    n, h, w = (
        torch.randint(size, (count,), generator=generator).to(images.device)
        for size in (N, H - P + 1, W - Q + 1)
    )
    windows = images.unfold(2, P, 1).unfold(3, Q, 1)  # n c h w p q
    patches = windows[n, :, h, w]
    patches = patches[patches.flatten(1).amax(1) > patches.flatten(1).amin(1)]
    if not len(patches):
        raise ValueError(f"all of the {count} patches that were drawn are constant")
    return patches


def _draw(shape: tuple[int, ...], sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """W and b in float64, on the CPU."""
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") / sigma
    bias = torch.rand(shape[0], generator=generator, dtype=torch.float64, device="cpu")
    return weight, 2 * math.pi * bias


def _placed(buffer: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return buffer.to(device or torch.get_default_device(), dtype or torch.get_default_dtype())


def _pooling_matrix(cells: int, size: int, pooling: str) -> Tensor:
    """(cells, size): how much of each pixel of an axis goes into each cell; rows of sum 1."""
    part = size / cells
    cell = torch.arange(cells, dtype=torch.float64, device="cpu")[:, None] * part  # where it begins
    pixel = torch.arange(size, dtype=torch.float64, device="cpu")
    if pooling == "average":
        shared = torch.minimum(cell + part, pixel + 1) - torch.maximum(cell, pixel)
        weight = shared.clamp(min=0)
    else:
        weight = torch.exp(-(((pixel + 0.5 - cell - part / 2) / (part / 2)) ** 2) / 2)
    return weight / weight.sum(1, keepdim=True)
