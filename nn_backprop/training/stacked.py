"""The arithmetic of many networks at once: M multilayer perceptrons of one shape, stacked.

A small network leaves a processor idle: its products are so short that calling them takes longer
than computing them. Here every tensor of the network gets one more axis, m for the network, and one
call computes all M. Letters: m network, n example, i in-feature, o out-feature, k class.

The networks do not meet. Laid side by side they are one network of which every weight matrix is
block-diagonal, block m being W_m, and whose loss is C = Σ_m C_m. A parameter of network m occurs in
C_m alone, so ∂C/∂θ_m = ∂C_m/∂θ_m: each equation of the lone network (`by_hand.mlp_backprop`) holds
with the letter m on each of its tensors. No sum runs over m, for no operand lacks it. With
a⁰ = x, layers l = 1 … L and a^l = σ(z^l):

    z^l[m,n,o]      = Σ_i a^(l−1)[m,n,i] weight^l[m,o,i] + bias^l[m,o]
    grad_z^L        = ∂C/∂z^L                                   from the loss, below
    grad_weight^l[m,o,i] = Σ_n grad_z^l[m,n,o] a^(l−1)[m,n,i]
    grad_bias^l[m,o]     = Σ_n grad_z^l[m,n,o]
    grad_a^(l−1)[m,n,i]  = Σ_o grad_z^l[m,n,o] weight^l[m,o,i]
    grad_z^(l−1)    = grad_a^(l−1) ⊙ σ'(z^(l−1))

With y[m,n,k] the one-hot target, the loss of network m and its derivative are

    cross_entropy   C_m = −1/N Σ_n,k y log p, p = softmax(z^L);   grad_z^L = (p − y) / N
    squared_error   C_m = 1/N Σ_n,k (a^L − y)²;                   grad_a^L = 2 (a^L − y) / N

All parameters lie in one vector of M·P numbers, and so do their gradients: the update is a few
operations on whole vectors. Only where the learning rate and the weight decay enter, which each
network has of its own, is the vector taken apart: into matrices with a row for each network, which
rate and decay multiply as columns (M, 1).

Sources: Rumelhart, Hinton & Williams 1986 (the equations); Kingma & Ba 2015, algorithm 1, and
Loshchilov & Hutter 2019, algorithm 2 (the update).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData
from nn_backprop.training.optimizers import make_optimizer

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # as torch's AdamW has them


@dataclass(frozen=True)
class NetworkShape:
    """What networks must have in common to be stacked."""

    sizes: tuple[int, ...]
    activation: str
    loss: str
    dtype: torch.dtype
    device: torch.device

    @property
    def P(self) -> int:
        """Parameters of one network."""
        return sum((i + 1) * o for i, o in pairwise(self.sizes))


class Stack:
    """Room for the parameters of M networks: first weights, first biases, second weights, …

    Each is contiguous, network by network, which the batched products ask for; all of them are
    views of one vector.
    """

    def __init__(self, shape: NetworkShape, M: int) -> None:
        self.shape = shape
        self.flat = torch.zeros(M * shape.P, dtype=shape.dtype, device=shape.device)
        sizes = [size for i, o in pairwise(shape.sizes) for size in (o * i, o)]
        tensors = self.flat.split([M * size for size in sizes])
        self.rows = [tensor.view(M, -1) for tensor in tensors]
        self.weights = [
            row.view(M, o, i)
            for row, (i, o) in zip(self.rows[::2], pairwise(shape.sizes), strict=True)
        ]
        self.biases = self.rows[1::2]  # (M, o)

    def load(self, models: Sequence[Any]) -> None:
        """Takes the parameters of the models."""
        for stacked, parameter in self._beside_those_of(models):
            stacked.copy_(parameter)

    def store(self, models: Sequence[Any]) -> None:
        """Gives the models their parameters."""
        for stacked, parameter in self._beside_those_of(models):
            parameter.copy_(stacked)

    def _beside_those_of(self, models: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the stack, network by network, with the model's own."""
        for k, (weights, biases) in enumerate(zip(self.weights, self.biases, strict=True)):
            for weight, bias, model in zip(weights, biases, models, strict=True):
                yield weight, model.layers[k].weight
                yield bias, model.layers[k].bias


class StackedBatch:
    """The tensors of one step of M networks on N examples each, allocated once.

    Rows are examples, except at the output, which is (M, K, N): softmax and sum over K classes are
    then sums of rows (log_softmax over K = 10 in the last axis took 20 times as long on the CPU).
    With `shared`, all networks read the same N examples: x is held once.
    """

    def __init__(self, shape: NetworkShape, data: ImageData, M: int, N: int, shared: bool) -> None:
        def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=shape.device)

        self.shape, self.N = shape, N
        self.images = data.images.flatten(1)
        self.scale = 1 / (255 * data.std)
        self.shift = torch.tensor(-data.mean / data.std, dtype=shape.dtype, device=shape.device)
        features, *hidden, K = shape.sizes
        rows = N if shared else M * N
        self.pixels, self.x = empty(rows, features, dtype=torch.uint8), empty(rows, features)
        self.a = [self.x.view(-1, N, features).expand(M, N, features)]  # what each layer reads
        self.a += [empty(M, N, o) for o in hidden]
        self.grad_a = [empty(M, N, o) for o in hidden]
        self.slope = [empty(M, N, o) for o in hidden]
        self.output, self.grad_output, self.scratch = (empty(M, K, N) for _ in range(3))
        self.minus_one = -torch.ones_like(self.output[:, :1])

    def read(self, indices: Tensor) -> None:
        """Gathers the images at indices, int64 (N,) or (M·N,), and normalises them."""
        torch.index_select(self.images, 0, indices, out=self.pixels)
        self.x.copy_(self.pixels)
        torch.add(self.shift, self.x, alpha=self.scale, out=self.x)

    def forward(self, params: Stack) -> Tensor:
        """The outputs (M, K, N): logits, or activations if the loss is the squared error."""
        activate = _ACTIVATE[self.shape.activation]
        *hidden, last = zip(params.weights, params.biases, strict=True)
        for k, (weight, bias) in enumerate(hidden):
            activate(torch.baddbmm(bias[:, None], self.a[k], weight.mT, out=self.a[k + 1]))
        weight, bias = last
        torch.baddbmm(bias[..., None], weight, self.a[-1].mT, out=self.output)
        if self.shape.loss == "squared_error":
            activate(self.output)
        return self.output

    def judge(self, y: Tensor) -> Tensor:
        """The losses (M,), summed over the examples; grad_z^L goes to grad_output.

        y (M, 1, N) are the class numbers. The output is overwritten.
        """
        a, grad = self.output, self.grad_output
        if self.shape.loss == "cross_entropy":
            torch.log_softmax(a, 1, out=a)
            loss = a.gather(1, y).sum((1, 2)).neg_()
            torch.exp(a, out=grad).scatter_add_(1, y, self.minus_one).mul_(1 / self.N)
        else:
            grad.copy_(a).scatter_add_(1, y, self.minus_one)
            loss = torch.square(grad, out=self.scratch).sum((1, 2))
            grad.mul_(2 / self.N).mul_(_slope(self.shape.activation, a, self.scratch))
        return loss

    def backward(self, params: Stack, grads: Stack) -> None:
        """From the last layer down, after `judge`."""
        grad_z = self.grad_output  # (M, o, N)
        for k in reversed(range(len(self.a))):
            torch.sum(grad_z, 2, out=grads.biases[k])
            torch.bmm(grad_z, self.a[k], out=grads.weights[k])
            if k > 0:
                grad_a = torch.bmm(grad_z.mT, params.weights[k], out=self.grad_a[k - 1])
                slope = _slope(self.shape.activation, self.a[k], self.slope[k - 1])
                grad_z = grad_a.mul_(slope).mT


_ACTIVATE = {"relu": torch.relu_, "sigmoid": torch.sigmoid_, "tanh": torch.tanh_}


def _slope(activation: str, a: Tensor, out: Tensor) -> Tensor:
    """σ'(z), in terms of a = σ(z)."""
    if activation == "relu":
        return torch.sign(a, out=out)  # a ≥ 0
    if activation == "sigmoid":
        return torch.addcmul(a, a, a, value=-1, out=out)  # a − a²
    return torch.mul(a, a, out=out).neg_().add_(1)  # 1 − a²


class StackedUpdate:
    """The step of `make_optimizer`'s sgd or adam, for all networks, in place.

    adam, torch's AdamW, with t = 1, 2, … the step, g the gradient, and f the schedule's factor:
        mean ← β1 mean + (1 − β1) g
        square ← β2 square + (1 − β2) g²
        params ← (1 − lr f wd) params − lr f / (1 − β1^t) · mean / (√square / s + ε)
    with s = √(1 − β2^t). The last fraction is s · mean / (√square + s ε), so that what changes with
    t is one number, s ε, and one per network. sgd has g in the place of that fraction, and lr f in
    the place of its factor; its decay, lr f (g + wd params), comes to the same.
    """

    def __init__(
        self,
        params: Stack,
        grads: Stack,
        optimizer: str,
        rates: Sequence[float],
        decays: Sequence[float],
        factors: Sequence[float],
    ) -> None:
        def table(values: Tensor) -> list[Tensor]:
            return list(values.to(params.flat.dtype).to(params.flat.device).unbind())

        t = torch.arange(1, len(factors) + 1, dtype=torch.float64)
        lr = torch.tensor(factors, dtype=torch.float64)[:, None, None] * torch.tensor(
            rates, dtype=torch.float64
        ).unsqueeze(1)  # (steps, M, 1)
        decay = torch.tensor(decays, dtype=torch.float64).unsqueeze(1)
        self.params, self.grad = params.rows, grads.flat
        self.keep = table(1 - lr * decay) if any(decays) else None
        self.adam = optimizer == "adam"
        if self.adam:
            s = (1 - BETA2**t).sqrt()
            lr = lr * (s / (1 - BETA1**t))[:, None, None]
            self.s_eps = table(s * EPS)
            self.mean, self.square = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
            move = Stack(params.shape, len(rates))
            self.fraction, self.moves = move.flat, move.rows
        else:
            self.moves = grads.rows
        self.rate = table(-lr)

    def step(self, t: int) -> None:
        """The step number t, counted from 0."""
        if self.adam:
            self.mean.lerp_(self.grad, 1 - BETA1)
            self.square.mul_(BETA2).addcmul_(self.grad, self.grad, value=1 - BETA2)
            torch.sqrt(self.square, out=self.fraction).add_(self.s_eps[t])
            torch.div(self.mean, self.fraction, out=self.fraction)
        for params, move in zip(self.params, self.moves, strict=True):
            if self.keep is not None:
                params.mul_(self.keep[t])
            params.addcmul_(move, self.rate[t])


class CommonUpdate:
    """The same where all networks, or the only one, have one rate and one decay.

    No column is needed then: torch's own optimizer takes the stack for one long parameter. The
    fused kernel of AdamW goes through memory once: for four networks 784-128-10, which no longer
    fit in the L2 cache, the update takes half the time.
    """

    def __init__(
        self,
        params: Stack,
        grads: Stack,
        optimizer: str,
        rate: float,
        decay: float,
        factors: Sequence[float],
    ) -> None:
        parameter = nn.Parameter(params.flat)  # which shares its memory
        parameter.grad = grads.flat
        self.optimizer = make_optimizer(optimizer, [parameter], rate, decay)
        self.rates = [rate * factor for factor in factors]

    def step(self, t: int) -> None:
        """The step number t, counted from 0."""
        self.optimizer.param_groups[0]["lr"] = self.rates[t]
        self.optimizer.step()
