"""Normalisation: shift and stretch a set of numbers until its mean is 0 and its variance is 1.

What differs between the norms is the set: batch norm takes one channel over all examples and
pixels, layer norm one example over its features. `standardize_backward`, derived at batch norm, is
the step that they share.

Letters: n m place in the batch (for batch norm, example and pixel), c channel, k j feature.
In the code x̂ is x_hat and s is inv_std. Without weight and bias, weight = 1 and bias = 0. Where x
has 16 bits, the backward calculates in float32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nn_backprop.rules.arithmetic import like, unbroadcast, wide


def batch_norm_forward(
    x: Float[Tensor, "N C *d"],
    running_mean: Float[Tensor, " C"] | None = None,
    running_var: Float[Tensor, " C"] | None = None,
    weight: Float[Tensor, " C"] | None = None,
    bias: Float[Tensor, " C"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "N C *d"], tuple]:
    """Every channel, normalised over the batch, then given a scale and a shift that are learned.

    Forward:
        z[n,c] = weight[c] x̂[n,c] + bias[c]
        x̂[n,c] = (x[n,c] − μ[c]) s[c],  s[c] = 1/√(v[c] + ε),  ε = eps
        training:  μ[c] = 1/M Σ_n x[n,c],  v[c] = 1/M Σ_n (x[n,c] − μ[c])²,  M places n
        evaluation:  μ[c] = running_mean[c],  v[c] = running_var[c]

    Derivation:
        In training, running_mean moves the fraction `momentum` of the way to μ, and running_var to
        v M/(M − 1), the unbiased variance. They have no part in z, hence none in its gradient.

        z is affine in each of x̂, weight and bias: that gives grad_weight, grad_bias and
        grad_x̂[n,c] = grad_z[n,c] weight[c]. In evaluation μ and s are constants, so
        grad_x = grad_x̂ s. In training every x[n] moves them too. Channels do not mix; drop the
        letter c. From x[n] the loss is reached in three ways:

        directly, μ and v held: ∂x̂[n]/∂x[n] = s, so this part of grad_x[n] is
            s grad_x̂[n].
        through the mean: ∂x̂[m]/∂μ = −s for every m, so grad_μ = −s Σ_m grad_x̂[m]. (μ moves v as
        well, but ∂v/∂μ = −2/M Σ_m (x[m] − μ) = 0.) With ∂μ/∂x[n] = 1/M this part is
            −s · 1/M Σ_m grad_x̂[m].
        through the variance, μ held: ds/dv = −½ (v + ε)^(−3/2) = −½ s³, so
        ∂x̂[m]/∂v = −½ s³ (x[m] − μ) = −½ s² x̂[m] and grad_v = −½ s² Σ_m grad_x̂[m] x̂[m]. With
        ∂v/∂x[n] = 2/M (x[n] − μ) = 2/M x̂[n]/s this part is
            −s x̂[n] · 1/M Σ_m grad_x̂[m] x̂[m].
        The sum of the three is grad_x below.

        By hand: x = (1, 1, 4), ε = 2. μ = 2, v = (1 + 1 + 4)/3 = 2, s = ½, x̂ = (−½, −½, 1). Let
        grad_x̂ = (6, 0, 0). The three ways give (3, 0, 0), (−1, −1, −1) and, from the mean −1 of
        grad_x̂ x̂, (−¼, −¼, ½). Together grad_x = (1¾, −1¼, −½).

        Two checks. Shifting all x changes no x̂, so Σ_n grad_x[n] = 0: 1¾ − 1¼ − ½ = 0. Scaling
        them about μ would change no x̂ either, if ε were 0. Since the mean of x̂² is v/(v + ε),
            Σ_n x̂[n] grad_x[n] = ε/(v + ε) · s Σ_n grad_x̂[n] x̂[n],
        which is 0 for ε = 0, small for v ≫ ε, and here ½ · ½ · (−3) = −¾ = −⅞ + ⅝ − ½.

    Backward:
        grad_x[n,c] = s[c] (grad_x̂[n,c] − 1/M Σ_m grad_x̂[m,c] − x̂[n,c] 1/M Σ_m grad_x̂[m,c] x̂[m,c])
        evaluation:  grad_x[n,c] = s[c] grad_x̂[n,c]
        in both, grad_x̂[n,c] = grad_z[n,c] weight[c]
        grad_weight[c] = Σ_n grad_z[n,c] x̂[n,c]
        grad_bias[c] = Σ_n grad_z[n,c]

    Saved:
        x, weight and the type of bias; x̂ and s are computed again. In evaluation also copies of the
        running statistics, which a training step may change before the backward comes.

    Shapes:
        x and z (N, C) or (N, C, d1, ...), all others (C,); M = N·d1·…, at least 2 in training, else
        torch's ValueError.

    Source:
        Ioffe & Szegedy 2015, Batch normalization, algorithm 1 and the gradients in section 3.
    """
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    constants = None
    if not training:
        assert running_mean is not None and running_var is not None  # else F.batch_norm has raised
        constants = (running_mean.clone(), running_var.clone())
    bias_dtype = None if bias is None else bias.dtype
    return z, (x, constants, weight, bias_dtype, eps)


def batch_norm_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, constants, weight, bias_dtype, eps = saved
    over_n = tuple(d for d in range(x.dim()) if d != 1)

    def along_c(vector: Tensor) -> Tensor:
        return vector.reshape(-1, *[1] * (x.dim() - 2))

    grad_z = wide(grad_z)
    if constants is None:
        x_hat, inv_std = standardize(x, over_n, eps)
    else:
        running_mean, running_var = constants
        inv_std = along_c(torch.rsqrt(wide(running_var) + eps))
        x_hat = (wide(x) - along_c(running_mean)) * inv_std

    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x_hat = grad_z if weight is None else grad_z * along_c(weight)
        if constants is None:
            grad_x = standardize_backward(grad_x_hat, x_hat, inv_std, over_n)
        else:
            grad_x = inv_std * grad_x_hat
        grad_x = grad_x.to(x.dtype)
    if needs[3] and weight is not None:
        grad_weight = (grad_z * x_hat).sum(over_n).to(weight.dtype)
    if needs[4] and bias_dtype is not None:
        grad_bias = grad_z.sum(over_n).to(bias_dtype)
    return grad_x, None, None, grad_weight, grad_bias


def layer_norm_forward(
    x: Float[Tensor, "..."],
    normalized_shape: tuple[int, ...] | list[int],
    weight: Float[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "..."], tuple]:
    """Every example, normalised over its features, then given a scale and a shift for each feature.

    Forward:
        z[n,k] = weight[k] x̂[n,k] + bias[k]
        x̂[n,k] = (x[n,k] − μ[n]) s[n],  s[n] = 1/√(v[n] + ε),  ε = eps
        μ[n] = 1/K Σ_k x[n,k],  v[n] = 1/K Σ_k (x[n,k] − μ[n])²,  K features k

    Derivation:
        The step from x to x̂ is that of batch_norm in training, with the features k of one example
        where there the places n of one channel were averaged; the three ways (direct, through μ,
        through v) and their sum are derived there. Not so the affine step: weight and bias still
        belong to the features, so their gradients sum over n, while the means in grad_x run over k,
        with the weight inside them: grad_x̂[n,k] = grad_z[n,k] weight[k].

    Backward:
        grad_x[n,k] = s[n] (grad_x̂[n,k] − 1/K Σ_j grad_x̂[n,j] − x̂[n,k] 1/K Σ_j grad_x̂[n,j] x̂[n,j])
        where grad_x̂[n,k] = grad_z[n,k] weight[k]
        grad_weight[k] = Σ_n grad_z[n,k] x̂[n,k]
        grad_bias[k] = Σ_n grad_z[n,k]

    Saved:
        x, weight and the shape and type of bias; x̂ and s are computed again.

    Shapes:
        x and z (..., *normalized_shape), weight and bias normalized_shape; k stands for all the
        axes of normalized_shape, n for those before them, of which there may be none.

    Source:
        Ba, Kiros & Hinton 2016, Layer normalization, section 3.
    """
    z = F.layer_norm(x, normalized_shape, weight, bias, eps)
    like_bias = None if bias is None else like(bias)
    return z, (x, len(normalized_shape), weight, like_bias, eps)


def layer_norm_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, axes, weight, like_bias, eps = saved
    over_k = tuple(range(-axes, 0))
    grad_z = wide(grad_z)
    x_hat, inv_std = standardize(x, over_k, eps)
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x_hat = grad_z if weight is None else grad_z * weight
        grad_x = standardize_backward(grad_x_hat, x_hat, inv_std, over_k).to(x.dtype)
    if needs[1] and weight is not None:
        grad_weight = unbroadcast(grad_z * x_hat, (weight.shape, weight.dtype))
    if needs[2] and like_bias is not None:
        grad_bias = unbroadcast(grad_z, like_bias)
    return grad_x, grad_weight, grad_bias


def standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = (x − μ) s, and s = 1/√(v + ε), with the mean μ and the variance v of x over `dims`."""
    x = wide(x)
    centred = x - x.mean(dims, keepdim=True)
    inv_std = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * inv_std, inv_std


def standardize_backward(
    grad_x_hat: Tensor, x_hat: Tensor, inv_std: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """grad_x: the direct way, the way through μ and the way through v, as derived at batch norm."""
    through_mean = grad_x_hat.mean(dims, keepdim=True)
    through_var = x_hat * (grad_x_hat * x_hat).mean(dims, keepdim=True)
    return inv_std * (grad_x_hat - through_mean - through_var)
