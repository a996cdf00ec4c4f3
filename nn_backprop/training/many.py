"""Many networks at once: M multilayer perceptrons of one shape, stacked and trained together.

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData
from nn_backprop.training.loop import order_of_epoch, steps_per_epoch
from nn_backprop.training.optimizers import make_optimizer, make_schedule

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # as torch's AdamW has them

# Of a group on the CPU. Measured in float32 with 1 and 2 threads of a Xeon with 2 MB of L2 a core:
# from 16 to 64 networks 784-16-10 at once take the same time each, within 8 %, at batches of 10 to
# 256; 784-128-10 from 2 to 16, with 1 thread, and best 4 with 2; of 784-512-256-10 two at once take
# 16 to 57 % longer than one after another.
GROUP_BYTES = 12 << 20


@dataclass(frozen=True, eq=False)
class ManyEvaluation:
    """What each of M networks makes of the same images."""

    loss: Tensor  # (M,), mean over the images
    accuracy: Tensor  # (M,), the share that is right, 0 to 1


@torch.no_grad()
def fit_many(
    models: Sequence[nn.Module],
    data: ImageData,
    *,
    seeds: Sequence[int],
    lrs: float | Sequence[float],
    weight_decays: float | Sequence[float] = 0.0,
    labels: Tensor | None = None,
    optimizer: str = "adam",
    schedule: str = "one-cycle",
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[slice, int], None] = lambda networks, epochs: None,
) -> Tensor:
    """Trains M networks `models.MLP` of one shape in place; each ends as it would have ended alone.

    Network m ends, up to rounding, as after `fit(models[m], autograd, optimizer, schedule, data,
    epochs=…, batch_size=…, seed=seeds[m])`, with `make_optimizer(optimizer, …, lrs[m],
    weight_decays[m])` and `make_schedule(schedule, …)`: it sees the same batches in the same order,
    the smaller last one of an epoch included. A single number for `lrs` or `weight_decays` holds
    for all. `labels`, int64 (M, len(data.images)), gives each network labels of its own. The
    arithmetic is in the type of the parameters, on their device, where `data` must be too.

    On the CPU the networks are trained in groups (see `_group_size`), one group after another:
    `on_epoch(networks, epochs done)` is called after each epoch of a group, with the group's place
    in `models`, whose parameters are then up to date.

    Returns the losses (M, epochs): the mean over an epoch's examples, each judged before the step
    that it takes part in. Nothing stops if a network's loss or weights become NaN or infinite: its
    losses are NaN from that epoch on, and the other networks do not notice.

    Raises ValueError if the networks are not alike, not distinct or have frozen parameters; if
    there are not as many seeds, rates or labels as networks; if a size, a name or a label is not
    valid.
    """
    M = len(models)
    shape = _shape(models)
    _check(data, shape, labels, M)
    if not all(p.requires_grad for model in models for p in model.parameters()):
        raise ValueError("a parameter is frozen: all parameters of all networks are trained")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be sgd or adam, not {optimizer!r}")
    if schedule not in ("constant", "one-cycle"):
        raise ValueError(f"schedule must be constant or one-cycle, not {schedule!r}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be positive, not {epochs} and {batch_size}")
    if len(data.train) == 0:
        raise ValueError("there are no training examples")
    seeds = list(seeds)
    if len(seeds) != M:
        raise ValueError(f"there are {len(seeds)} seeds for {M} networks")
    rates, decays = _each(lrs, M, "lrs"), _each(weight_decays, M, "weight_decays")

    n = len(data.train)
    factors = _factors(schedule, epochs * steps_per_epoch(n, batch_size))
    G = _group_size(shape, min(batch_size, n), M)
    losses = []
    for group in _slices(M, G):
        losses.append(
            _fit_group(
                models[group], shape, data, seeds[group], rates[group], decays[group],
                data.labels[None] if labels is None else labels[group],
                optimizer, factors, epochs, batch_size,
                partial(on_epoch, group),
            )
        )  # fmt: skip
    return torch.cat(losses)


@torch.no_grad()
def evaluate_many(
    models: Sequence[nn.Module],
    data: ImageData,
    indices: Tensor,
    labels: Tensor | None = None,
    batch_size: int = 1000,
) -> ManyEvaluation:
    """Loss and accuracy of M networks of one shape on data[indices], each as `evaluate` has it.

    `labels`, int64 (M, len(data.images)), are the networks' own, if they have any. Raises
    ValueError if the networks are not alike, if there are not as many labels as networks, or no
    indices.
    """
    M, n = len(models), len(indices)
    shape = _shape(models)
    _check(data, shape, labels, M)
    if n == 0 or batch_size < 1:
        raise ValueError(f"indices and batch_size must be positive, not {n} and {batch_size}")
    G = _group_size(shape, min(batch_size, n), M)
    own = data.labels[None].expand(M, -1) if labels is None else labels
    losses, right = [], []
    for group in _slices(M, G):
        size = len(models[group])
        params = _Stack(shape, size)
        _load(params, models[group])
        loss = params.flat.new_zeros(size)
        hits = torch.zeros(size, dtype=torch.int64, device=shape.device)
        batches: dict[int, _Batch] = {}
        for part in indices.split(batch_size):
            N = len(part)
            if N not in batches:
                batches[N] = _Batch(shape, data, size, N, shared=True)
            batch = batches[N]
            y = own[group].index_select(1, part)[:, None]
            batch.read(part)
            hits += (batch.forward(params).argmax(1) == y[:, 0]).sum(1)
            loss += batch.judge(y)
        losses.append(loss / n)
        right.append(hits.to(torch.promote_types(shape.dtype, torch.float32)) / n)
    return ManyEvaluation(torch.cat(losses), torch.cat(right))


@dataclass(frozen=True)
class _Shape:
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


class _Stack:
    """Room for the parameters of M networks: first weights, first biases, second weights, …

    Each is contiguous, network by network, which the batched products ask for; all of them are
    views of one vector.
    """

    def __init__(self, shape: _Shape, M: int) -> None:
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


class _Batch:
    """The tensors of one step of M networks on N examples each, allocated once.

    Rows are examples, except at the output, which is (M, K, N): softmax and sum over K classes are
    then sums of rows (log_softmax over K = 10 in the last axis took 20 times as long on the CPU).
    With `shared`, all networks read the same N examples: x is held once.
    """

    def __init__(self, shape: _Shape, data: ImageData, M: int, N: int, shared: bool) -> None:
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

    def forward(self, params: _Stack) -> Tensor:
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

    def backward(self, params: _Stack, grads: _Stack) -> None:
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


class _Update:
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
        params: _Stack,
        grads: _Stack,
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
            move = _Stack(params.shape, len(rates))
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


class _CommonUpdate:
    """The same where all networks, or the only one, have one rate and one decay.

    No column is needed then: torch's own optimizer takes the stack for one long parameter. The
    fused kernel of AdamW goes through memory once: for four networks 784-128-10, which no longer
    fit in the L2 cache, the update takes half the time.
    """

    def __init__(
        self,
        params: _Stack,
        grads: _Stack,
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


def _fit_group(
    models: Sequence[nn.Module],
    shape: _Shape,
    data: ImageData,
    seeds: Sequence[int],
    rates: Sequence[float],
    decays: Sequence[float],
    labels: Tensor,
    optimizer: str,
    factors: Sequence[float],
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[int], None],
) -> Tensor:
    """Trains the networks of a group, all at once. Its steps read nothing back from the device."""
    M, n = len(models), len(data.train)
    shared = len(set(seeds)) == 1
    params, grads = _Stack(shape, M), _Stack(shape, M)
    _load(params, models)
    update: _Update | _CommonUpdate
    if len(set(rates)) == len(set(decays)) == 1:
        update = _CommonUpdate(params, grads, optimizer, rates[0], decays[0], factors)
    else:
        update = _Update(params, grads, optimizer, rates, decays, factors)
    batches: dict[int, _Batch] = {}
    losses = params.flat.new_empty(epochs, M)
    per_step = params.flat.new_empty(steps_per_epoch(n, batch_size), M)
    healthy = torch.ones(M, dtype=torch.bool, device=shape.device)
    t = 0
    for epoch in range(epochs):
        orders = {seed: order_of_epoch(n, seed, epoch) for seed in set(seeds)}
        order = torch.stack([orders[seed] for seed in (seeds[:1] if shared else seeds)])
        rows = data.train[order.to(shape.device)]  # (M, n), or (1, n) if shared
        y = labels.expand(M, -1).gather(1, rows.expand(M, n))[:, None]
        parts = zip(rows.split(batch_size, 1), y.split(batch_size, 2), per_step, strict=True)
        for indices, targets, loss in parts:
            N = indices.shape[1]
            if N not in batches:
                batches[N] = _Batch(shape, data, M, N, shared)
            batch = batches[N]
            batch.read(indices.flatten())
            batch.forward(params)
            loss.copy_(batch.judge(targets))
            batch.backward(params, grads)
            update.step(t)
            t += 1
        for row in (per_step.T, *params.rows):
            healthy &= row.isfinite().all(1)
        losses[epoch] = torch.where(healthy, per_step.sum(0) / n, torch.nan)
        _unload(params, models)
        on_epoch(epoch + 1)
    return losses.T


def _group_size(shape: _Shape, N: int, M: int) -> int:
    """How many of M networks to train at once, with batches of N.

    On a GPU all of them. On the CPU as many as keep in GROUP_BYTES what a step goes through:
    parameters, gradients, moments, their fraction, and the batch. Fewer leave calls on short
    tensors, more stream from memory what was in the cache at the step before.
    """
    if shape.device.type != "cpu":
        return M
    numbers = 5 * shape.P + N * (shape.sizes[0] + 3 * sum(shape.sizes[1:]))
    most = max(1, GROUP_BYTES // (numbers * shape.dtype.itemsize))
    groups = -(-M // most)
    return -(-M // groups)  # alike in size, so that no last one is left small


def _slices(M: int, G: int) -> list[slice]:
    return [slice(first, min(first + G, M)) for first in range(0, M, G)]


def _factors(schedule: str, steps: int) -> list[float]:
    """The learning rate of each step for lr = 1: both schedules are proportional to lr."""
    optimizer = make_optimizer("sgd", [nn.Parameter(torch.zeros(1))], 1.0, 0.0)
    rates = make_schedule(schedule, optimizer, 1.0, steps)
    factors = []
    for _ in range(steps):
        factors.append(float(rates.get_last_lr()[0]))
        optimizer.step()
        rates.step()
    return factors


def _pairs(stack: _Stack, models: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the stack, network by network, with the model's own."""
    for k, (weights, biases) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        for weight, bias, model in zip(weights, biases, models, strict=True):
            yield weight, model.layers[k].weight
            yield bias, model.layers[k].bias


def _load(stack: _Stack, models: Sequence[nn.Module]) -> None:
    for stacked, parameter in _pairs(stack, models):
        stacked.copy_(parameter)


def _unload(stack: _Stack, models: Sequence[nn.Module]) -> None:
    for stacked, parameter in _pairs(stack, models):
        parameter.copy_(stacked)


def _each(value: float | Sequence[float], M: int, name: str) -> list[float]:
    values = [float(value)] * M if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != M:
        raise ValueError(f"there are {len(values)} {name} for {M} networks")
    if not all(0 <= v < inf for v in values):
        raise ValueError(f"{name} must be finite and not negative, not {values}")
    return values


def _shape(models: Sequence[Any]) -> _Shape:
    """What the networks have in common; raises ValueError if that is not enough."""
    if len(models) == 0:
        raise ValueError("there are no networks")
    shapes = []
    for m in models:
        if not all(hasattr(m, name) for name in ("layers", "activation", "loss_name")):
            raise ValueError(f"only an MLP can be stacked, not {type(m).__name__}")
        sizes = (m.layers[0].in_features, *(layer.out_features for layer in m.layers))
        kinds = {(p.dtype, p.device) for p in m.parameters()}
        if len(kinds) > 1:
            raise ValueError("the parameters of a network differ in type or device")
        shapes.append(_Shape(sizes, m.activation, m.loss_name, *kinds.pop()))
    for m, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"the networks must be alike, but 0 is {shapes[0]} and {m} is {shape}")
    if len({id(model) for model in models}) < len(models):
        raise ValueError("the same network is there twice")
    return shapes[0]


def _check(data: ImageData, shape: _Shape, labels: Tensor | None, M: int) -> None:
    """Raises ValueError if the data or the labels do not fit the networks."""
    pixels, K = data.images[0].numel(), shape.sizes[-1]
    if pixels != shape.sizes[0]:
        raise ValueError(f"the images have {pixels} pixels, the networks {shape.sizes[0]} inputs")
    if data.images.device != shape.device:
        raise ValueError(f"the data are on {data.images.device}, the networks on {shape.device}")
    wanted = (M, len(data.images))
    if labels is not None and (tuple(labels.shape) != wanted or labels.dtype != torch.int64):
        raise ValueError(f"labels must be int64 {wanted}, not {labels.dtype} {tuple(labels.shape)}")
    if labels is not None and labels.device != shape.device:
        raise ValueError(f"the labels are on {labels.device}, the networks on {shape.device}")
    least, most = (data.labels if labels is None else labels).aminmax()
    if least < 0 or most >= K:
        raise ValueError(f"labels must be in 0 to {K - 1}, not {int(least)} to {int(most)}")
