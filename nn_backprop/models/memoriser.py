"""A network that fits any n points, built and not trained: Zhang et al. 2017, theorem 1.

Its n hidden units all look in one direction a; each has a bias and an outgoing weight of its own.
That makes 2n + d numbers for points of d dimensions:

    c(x) = Σ_j w_j max(⟨a, x⟩ − b_j, 0)     j = 1 … n

Project the points on a, t_i = ⟨a, x_i⟩, and number them so that t_1 < t_2 < … < t_n. Put a bias
before the first and one between each two: b_1 < t_1 < b_2 < t_2 < … < b_n < t_n. Unit j is then
silent at every point before the j-th, so that c(x_i) = y_i, for all i, are n equations with a
triangular matrix:

    Σ_{j ≤ i} (t_i − b_j) w_j = y_i

The diagonal t_i − b_i is positive, so there is exactly one solution, found from the top down:

    w_i = (y_i − Σ_{j < i} (t_i − b_j) w_j) / (t_i − b_i)

Where between the points a bias stands makes no difference on paper. On a machine it does. Over ⟨a,
x⟩, c is a chain of straight lines with its bends at the b_j. With s_i the slope at t_i, g the gap
t_{i+1} − t_i and b_{i+1} = t_i + λ g, c goes from y_i with slope s_i for λ g, then with s_{i+1}:

    y_{i+1} = y_i + s_i λ g + s_{i+1} (1 − λ) g
    s_{i+1} = (y_{i+1} − y_i) / ((1 − λ) g) − s_i λ / (1 − λ)

Each slope hands on λ / (1 − λ) of itself. With λ above ½ that is more than all of it, and the steep
slope of one narrow gap grows from point to point until it overflows. Here λ = ¼: a third.

The weights are as large as the narrowest gap is small, and what is wanted is their small
difference: in float32 most labels of some thousand images come out wrong.

Source: Zhang, Bengio, Hardt, Recht & Vinyals 2017, Understanding deep learning requires rethinking
generalization, theorem 1 and its proof in the appendix. The choice of λ is ours.
"""

import torch
from torch import Tensor, nn

PLACE = 0.25  # λ


class Memoriser(nn.Module):
    """c(x) = Σ_j weight_j max(⟨direction, x⟩ − bias_j, 0).

    Shapes: direction (d,), bias and weight (n,); inputs (N, ...) with ∏ ... = d; output (N,).
    """

    def __init__(self, direction: Tensor, bias: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction)
        self.bias = nn.Parameter(bias)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(1) @ self.direction
        return (t[:, None] - self.bias).relu() @ self.weight


@torch.no_grad()
def memorise(points: Tensor, targets: Tensor, direction: Tensor) -> Memoriser:
    """The network that is targets[i] at points[i], up to rounding: 2n + d parameters.

    points (n, ...) with ∏ ... = d, targets (n,), direction (d,), all float64. A direction drawn at
    random tells any two different points apart. Raises ValueError if two points have the same
    projection, up to rounding, if there are no points, or for other types or shapes.
    """
    n = len(points)
    x = points.flatten(1) if n else points
    if n == 0 or targets.shape != (n,) or direction.shape != x.shape[1:]:
        raise ValueError(
            "points must be (n, ...), targets (n,) and direction (d,), n at least 1, not "
            f"{tuple(points.shape)}, {tuple(targets.shape)} and {tuple(direction.shape)}"
        )
    types = {tensor.dtype for tensor in (points, targets, direction)}
    if types != {torch.float64}:
        raise ValueError(f"points, targets and direction must be float64, not {types}")
    t, order = (x @ direction).sort()
    gaps = t.diff()
    # The bound of a sum's rounding. It is needed: BLAS may add the terms of two rows in two orders.
    rounding = x.shape[1] * torch.finfo(x.dtype).eps * (x.abs() @ direction.abs()).max()
    if (gaps <= rounding).any():
        narrowest = int(gaps.argmin())
        one, other = order[narrowest : narrowest + 2].tolist()
        same = "they are the same point" if x[one].equal(x[other]) else "try another direction"
        raise ValueError(f"points {one} and {other} have the same projection: {same}")
    bias = torch.cat([t[:1] - 1 - t[:1].abs(), t[:-1] + PLACE * gaps])
    outputs = (t[:, None] - bias).relu()  # of the hidden units: lower triangular
    weight = torch.linalg.solve_triangular(outputs, targets[order][:, None], upper=False)
    return Memoriser(direction.clone(), bias, weight.flatten())
