"""One layer applied many times: weights shared between layers, not between places."""

import copy
from collections.abc import Callable, Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

from nn_backprop.layers.arguments import require_integers


class TiedStack(nn.Module):
    """One layer f applied `depth` times, its input u added at every step: L layers, one weight.

        h_0 = φ(u)
        z_t = f(h_{t−1}) + u,   h_t = φ(z_t)                                      t = 1 … L

    u is commonly an affine map of the network's input, u = U x + b; with f(h) = W h that makes
    h_t = φ(W h_{t−1} + U x + b), a recurrent network whose input stands still. f is any module that
    keeps the shape: `nn.Linear(H, H, bias=False)`, or a convolution with padding.

    Gradients, for f(h) = W h, from the last step to the first. h_t is used once, in z_{t+1}; W and
    u are used at every step, so their gradients are sums over the steps. With z_0 = u:
        grad_h_L = what comes from above
        grad_z_t[n,o] = grad_h_t[n,o] φ'(z_t[n,o])                                t = L … 0
        grad_h_{t−1}[n,i] = Σ_o grad_z_t[n,o] W[o,i]                              t = L … 1
        grad_W[o,i] = Σ_t Σ_n grad_z_t[n,o] h_{t−1}[n,i]                          t = 1 … L
        grad_u[n,o] = Σ_t grad_z_t[n,o]                                           t = 0 … L
    An `UntiedStack` of L copies of f computes the same; its t-th weight has the gradient
    Σ_n grad_z_t[n,o] h_{t−1}[n,i]. So the tied gradient is the sum of the untied ones.

    What it saves: parameters, and the memory of parameters, gradients and an optimizer's state:
    f's own, whatever L is. What it does not: L applications of f cost what L layers cost, and the
    backward pass needs h_0 … h_{L−1} and the φ'(z_t) of either.

    Shapes: u and the output, as f takes and gives them; for f(h) = W h, (..., H) and W (H, H).
    Raises ValueError for a depth that is no integer of at least 1; in the forward, if the layer
    changes the shape.

    Source: the derivation is backpropagation through time, Rumelhart, Hinton & Williams 1986; depth
    by weights that are tied, with the input at every step: Bai, Kolter & Koltun 2019, Deep
    equilibrium models, section 3.
    """

    def __init__(
        self, layer: nn.Module, depth: int, activation: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        require_integers(depth=depth)
        self.layer, self.depth, self.activation = layer, depth, activation

    def forward(self, u: Tensor) -> Tensor:
        return _applied(repeat(self.layer, self.depth), self.activation, u)

    def untied(self) -> "UntiedStack":
        """A stack that computes the same, with a copy of the layer, to be trained, at each step."""
        layers = [copy.deepcopy(self.layer) for _ in range(self.depth)]
        return UntiedStack(layers, copy.deepcopy(self.activation))

    def extra_repr(self) -> str:
        return f"depth={self.depth}"


class UntiedStack(nn.Module):
    """A `TiedStack` with a layer of its own at each step: h_t = φ(f_t(h_{t−1}) + u), h_0 = φ(u).

    Raises ValueError if there is no layer; in the forward, if a layer changes the shape.
    """

    def __init__(
        self, layers: Iterable[nn.Module], activation: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        self.layers, self.activation = nn.ModuleList(layers), activation
        if not self.layers:
            raise ValueError("a stack needs one layer or more")

    def forward(self, u: Tensor) -> Tensor:
        return _applied(self.layers, self.activation, u)


def _applied(
    layers: Iterable[nn.Module], activation: Callable[[Tensor], Tensor], u: Tensor
) -> Tensor:
    """h_0 = φ(u), then h_t = φ(f_t(h_{t−1}) + u) for every layer f_t, from first to last."""
    h = activation(u.clone())  # an activation in place must leave u, for the steps to add
    for layer in layers:
        f = layer(h)
        if f.shape != u.shape:  # a sum that broadcasts would hide it
            raise ValueError(
                f"the layer makes {tuple(f.shape)} of {tuple(u.shape)}: a layer of a stack must "
                "keep the shape"
            )
        h = activation(f + u)
    return h
