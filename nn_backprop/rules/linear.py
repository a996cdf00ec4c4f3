"""Weighted sums: the affine layer and the matrix product.

Letters: n every axis before the last, i in-feature, o out-feature. In the matrix product: i row of
x, k column of y, j the axis that is summed, n all axes before them.

For any quantity q, grad_q is ∂loss/∂q and has the shape of q. A backward is handed grad_z, the
gradient of its result, and returns those of its operands.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nn_backprop.rules.arithmetic import like, unbroadcast


def linear_forward(
    x: Float[Tensor, "*n i"],
    weight: Float[Tensor, "*o i"],
    bias: Float[Tensor, "*o"] | None = None,
) -> tuple[Float[Tensor, "..."], tuple]:
    """Every output is a weighted sum of all inputs plus a bias.

    Forward:
        z[n,o] = Σ_i x[n,i] weight[o,i] + bias[o]

    Derivation:
        The loss reaches x[n,i] through every output o of the same example, and
        ∂z[n,o]/∂x[n,i] = weight[o,i]; it reaches weight[o,i] through every example n, and
        ∂z[n,o]/∂weight[o,i] = x[n,i]; and ∂z[n,o]/∂bias[o] = 1. The chain rule multiplies each of
        them by grad_z[n,o] and sums over every way in which the operand is used, which is the
        letter that it lacks:

    Backward:
        grad_x[n,i] = Σ_o grad_z[n,o] weight[o,i]
        grad_weight[o,i] = Σ_n grad_z[n,o] x[n,i]
        grad_bias[o] = Σ_n grad_z[n,o]

    Saved:
        x for grad_weight, weight for grad_x; the bias is not needed.

    Shapes:
        x (..., in_features), weight (out_features, in_features), bias (out_features,),
        z (..., out_features); n stands for all leading axes, of which there may be none.

    Source:
        Rumelhart, Hinton & Williams 1986, Learning representations by back-propagating errors,
        equations 1, 6 and 7.
    """
    return F.linear(x, weight, bias), (x, weight)


def linear_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, weight = saved
    if weight.dim() == 1:  # torch takes a weight (in_features,) for one output without an axis
        grads = linear_backward(grad_z.unsqueeze(-1), (x, weight.unsqueeze(0)), needs)
        return (grads[0], *(grad if grad is None else grad.squeeze(0) for grad in grads[1:]))
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = grad_z @ weight  # no,oi->ni
    N, (out_features, in_features) = math.prod(x.shape[:-1]), weight.shape
    grad_z = grad_z.reshape(N, out_features)
    if needs[1]:
        grad_weight = grad_z.T @ x.reshape(N, in_features)  # no,ni->oi
    if needs[2]:
        grad_bias = grad_z.sum(0)  # no->o
    return grad_x, grad_weight, grad_bias


def matmul_forward(x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> tuple[Tensor, tuple]:
    """Matrix product over the last two axes; the axes before them are broadcast.

    Forward:
        z[n,i,k] = Σ_j x[n,i,j] y[n,j,k]

    Derivation:
        x[n,i,j] enters z[n,i,k] for every k, with the factor y[n,j,k]; y[n,j,k] enters z[n,i,k] for
        every i, with the factor x[n,i,j]. A vector is a matrix of one row (as x) or one column
        (as y) whose axis is dropped again from z. An operand that was broadcast over an axis of n
        has been used once for every place there, so its gradients are summed over that axis.

    Backward:
        grad_x[n,i,j] = Σ_k grad_z[n,i,k] y[n,j,k]
        grad_y[n,j,k] = Σ_i x[n,i,j] grad_z[n,i,k]

    Saved:
        both operands.

    Shapes:
        x (..., I, J) or (J,), y (..., J, K) or (J,), z (..., I, K) without the axes of a vector.

    Source:
        Giles 2008, Collected matrix derivative results for forward and reverse mode algorithmic
        differentiation, section 2.2.2.
    """
    return torch.matmul(x, y), (x, y)


def matmul_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, y = saved
    rows = x.unsqueeze(0) if x.dim() == 1 else x  # (..., I, J)
    columns = y.unsqueeze(1) if y.dim() == 1 else y  # (..., J, K)
    if y.dim() == 1:
        grad_z = grad_z.unsqueeze(-1)
    if x.dim() == 1:
        grad_z = grad_z.unsqueeze(-2)
    grad_x = grad_y = None
    if needs[0]:
        grad_x = torch.einsum("...ik,...jk->...ij", grad_z, columns)
        grad_x = unbroadcast(grad_x, like(rows)).reshape(x.shape)
    if needs[1]:
        grad_y = torch.einsum("...ij,...ik->...jk", rows, grad_z)
        grad_y = unbroadcast(grad_y, like(columns)).reshape(y.shape)
    return grad_x, grad_y
