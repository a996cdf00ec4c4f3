"""Many networks at once: M multilayer perceptrons of one shape, trained and judged together.

The arithmetic, and why each network ends as it would have ended alone, is in `stacked.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.data import ImageData
from nn_backprop.training.loop import order_of_epoch, steps_per_epoch
from nn_backprop.training.optimizers import make_optimizer, make_schedule
from nn_backprop.training.stacked import (
    CommonUpdate,
    NetworkShape,
    Stack,
    StackedBatch,
    StackedUpdate,
)

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

    On the CPU the networks are trained in groups (see `group_size`), one group after another:
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
    shape = _common_shape(models)
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
    factors = _rate_factors(schedule, epochs * steps_per_epoch(n, batch_size))

    def fit_group(group: slice) -> Tensor:
        """All at once. The steps read nothing back from the device."""
        G, own_seeds = len(models[group]), seeds[group]
        own_rates, own_decays = rates[group], decays[group]
        shared = len(set(own_seeds)) == 1
        own = data.labels.expand(G, -1) if labels is None else labels[group]
        params, grads = Stack(shape, G), Stack(shape, G)
        params.load(models[group])
        update: StackedUpdate | CommonUpdate
        if len(set(own_rates)) == len(set(own_decays)) == 1:
            update = CommonUpdate(params, grads, optimizer, own_rates[0], own_decays[0], factors)
        else:
            update = StackedUpdate(params, grads, optimizer, own_rates, own_decays, factors)
        batch_of = cache(partial(StackedBatch, shape, data, G, shared=shared))
        losses = params.flat.new_empty(epochs, G)
        per_step = params.flat.new_empty(steps_per_epoch(n, batch_size), G)
        healthy = torch.ones(G, dtype=torch.bool, device=shape.device)
        steps = count()
        for epoch in range(epochs):
            orders = {seed: order_of_epoch(n, seed, epoch) for seed in set(own_seeds)}
            order = torch.stack([orders[seed] for seed in (own_seeds[:1] if shared else own_seeds)])
            rows = data.train[order.to(shape.device)]  # (G, n), or (1, n) if shared
            y = own.gather(1, rows.expand(G, n))[:, None]
            parts = zip(rows.split(batch_size, 1), y.split(batch_size, 2), per_step, strict=True)
            for indices, targets, loss in parts:
                batch = batch_of(N=indices.shape[1])
                batch.read(indices.flatten())
                batch.forward(params)
                loss.copy_(batch.judge(targets))
                batch.backward(params, grads)
                update.step(next(steps))
            for row in (per_step.T, *params.rows):
                healthy &= row.isfinite().all(1)
            losses[epoch] = torch.where(healthy, per_step.sum(0) / n, torch.nan)
            params.store(models[group])
            on_epoch(group, epoch + 1)
        return losses.T

    size = group_size(shape, min(batch_size, n), M)
    return torch.cat([fit_group(group) for group in _slices(M, size)])


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
    shape = _common_shape(models)
    _check(data, shape, labels, M)
    if n == 0 or batch_size < 1:
        raise ValueError(f"indices and batch_size must be positive, not {n} and {batch_size}")
    G = group_size(shape, min(batch_size, n), M)
    own = data.labels[None].expand(M, -1) if labels is None else labels
    losses, right = [], []
    for group in _slices(M, G):
        size = len(models[group])
        params = Stack(shape, size)
        params.load(models[group])
        loss = params.flat.new_zeros(size)
        hits = torch.zeros(size, dtype=torch.int64, device=shape.device)
        batch_of = cache(partial(StackedBatch, shape, data, size, shared=True))
        for part in indices.split(batch_size):
            batch = batch_of(N=len(part))
            y = own[group].index_select(1, part)[:, None]
            batch.read(part)
            hits += (batch.forward(params).argmax(1) == y[:, 0]).sum(1)
            loss += batch.judge(y)
        losses.append(loss / n)
        right.append(hits.to(torch.promote_types(shape.dtype, torch.float32)) / n)
    return ManyEvaluation(torch.cat(losses), torch.cat(right))


def group_size(shape: NetworkShape, N: int, M: int) -> int:
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


def _rate_factors(schedule: str, steps: int) -> list[float]:
    """The learning rate of each step for lr = 1: both schedules are proportional to lr."""
    optimizer = make_optimizer("sgd", [nn.Parameter(torch.zeros(1))], 1.0, 0.0)
    rates = make_schedule(schedule, optimizer, 1.0, steps)
    factors = []
    for _ in range(steps):
        factors.append(float(rates.get_last_lr()[0]))
        optimizer.step()
        rates.step()
    return factors


def _each(value: float | Sequence[float], M: int, name: str) -> list[float]:
    values = [float(value)] * M if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != M:
        raise ValueError(f"there are {len(values)} {name} for {M} networks")
    if not all(0 <= v < inf for v in values):
        raise ValueError(f"{name} must be finite and not negative, not {values}")
    return values


def _common_shape(models: Sequence[Any]) -> NetworkShape:
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
        shapes.append(NetworkShape(sizes, m.activation, m.loss_name, *kinds.pop()))
    for m, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"the networks must be alike, but 0 is {shapes[0]} and {m} is {shape}")
    if len({id(model) for model in models}) < len(models):
        raise ValueError("the same network is there twice")
    return shapes[0]


def _check(data: ImageData, shape: NetworkShape, labels: Tensor | None, M: int) -> None:
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
