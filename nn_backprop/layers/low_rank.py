"""An affine layer whose weight is a product of two thin matrices."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_backprop.layers.arguments import require_integers


class LowRankLinear(nn.Module):
    """z = B (A x) + b: an affine layer whose weight W = B A has rank r or less.

        a[n,k] = Σ_i x[n,i] A[k,i]                                                k = 1 … r
        z[n,o] = Σ_k a[n,k] B[o,k] + b[o]

    Gradients: those of two affine layers, one upon the other.
        grad_b[o]   = Σ_n grad_z[n,o]
        grad_B[o,k] = Σ_n grad_z[n,o] a[n,k]
        grad_a[n,k] = Σ_o grad_z[n,o] B[o,k]
        grad_A[k,i] = Σ_n grad_a[n,k] x[n,i]
        grad_x[n,i] = Σ_k grad_a[n,k] A[k,i]
    With the gradient that the whole matrix would have, grad_W[o,i] = Σ_n grad_z[n,o] x[n,i], the
    second and the fourth read grad_B = grad_W Aᵀ and grad_A = Bᵀ grad_W.

    Cost: r (m + n) weights and as many multiply-adds an example, for m = in_features and
    n = out_features, against m n of the whole matrix: less if and only if r < `break_even(m, n)`.

    Shapes: x (..., in_features), z (..., out_features); A `down` (rank, in_features), B `up`
    (out_features, rank), b `bias` (out_features,) or None.
    Start: A uniform with variance 1/m, B with variance 1/(3 r), so that an entry of B A, a sum of r
    products, has the variance 1/(3 m) that nn.Linear's weights have; b as nn.Linear's.
    Raises ValueError for a size that is no integer of at least 1, or a rank above the smaller of
    the two sizes: no product has more.

    Source: Denton et al. 2014, Exploiting linear structure within convolutional networks for
    efficient evaluation, for networks whose trained matrices are replaced by products.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integers(in_features=in_features, out_features=out_features, rank=rank)
        if rank > min(in_features, out_features):
            raise ValueError(
                f"rank must be at most {min(in_features, out_features)}, the smaller of the two "
                f"sizes, not {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew. A uniform number within ±c has the variance c²/3."""
        down, up = math.sqrt(3 / self.in_features), 1 / math.sqrt(self.rank)
        nn.init.uniform_(self.down, -down, down)
        nn.init.uniform_(self.up, -up, up)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best approximation of a layer: of its weight W, the `rank` largest singular values.

        With W = Σ_k s_k u_k v_kᵀ, s_1 ≥ s_2 ≥ …, the sum of the first r terms is as near to W as a
        matrix of rank r can be: ‖W − B A‖² = Σ_{k>r} s_k² (Frobenius). Of each s_k, both factors
        get the root: B = [√s_k u_k], A = [√s_k v_kᵀ], so that neither learns faster for its scale.
        `linear` stays as it is; device, type and the bias are taken over. The sum is computed in
        float64. Raises ValueError as the constructor does, and for a weight that is complex, on the
        meta device, or not finite.

        Source: Eckart & Young 1936, The approximation of one matrix by another of lower rank.
        """
        weight = linear.weight.detach()
        if weight.is_complex() or weight.is_meta:
            raise ValueError(
                f"the layer's weight must have real numbers, not {weight.dtype} on {weight.device}"
            )
        layer = nn.utils.skip_init(  # which draws nothing
            cls, linear.in_features, linear.out_features, rank, linear.bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        if not weight.isfinite().all():
            raise ValueError("the layer's weight has entries that are NaN or infinite")
        u, s, vh = torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False)
        root = s[:rank].sqrt()
        layer.up.copy_(u[:, :rank] * root)
        layer.down.copy_(root[:, None] * vh[:rank])
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def break_even(in_features: int, out_features: int) -> float:
    """The rank at which a product costs as much as the whole matrix: m n / (m + n)."""
    return in_features * out_features / (in_features + out_features)


def cut_to_rank(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Puts `LowRankLinear.from_linear` in the place of affine layers: `ranks` by a layer's name.

    Raises ValueError as that does, and for another kind of layer.
    """
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} must be an nn.Linear, not {type(layer).__name__}")
        model.set_submodule(name, LowRankLinear.from_linear(layer, rank))
