"""The training loop: batches in, steps out; what happens beside is up to the callbacks."""

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nn_backprop.data import ImageData, channels_last
from nn_backprop.training.cuda_graph import GraphedUpdate

CHECK_EVERY = 50  # steps; reading a loss waits for the device
GATHERED = 2048  # examples: for a small network, a batch costs as much to gather as to learn


@dataclass(frozen=True, slots=True)
class Step:
    """One update, as its callback sees it: the gradients are still in ``.grad``."""

    number: int  # of updates done, this one included: the first is 1
    epoch: int  # of epochs complete before it: the first epoch is 0
    examples: int  # in its batch
    loss: Tensor  # 0-d, detached, of the batch before the update
    lr: float | Tensor  # learning rate of the update; with a graph a tensor, 0-d


class Diverged(Exception):
    """A loss or a weight became NaN or infinite at a step."""

    def __init__(self, what: str, step: Step) -> None:
        super().__init__(
            f"{what} at step {step.number}, with learning rate {float(step.lr):.3g}: "
            "try a smaller --lr"
        )


class Interruptible:
    """While it is open, the first Ctrl-C only asks `fit` to stop after the current step.

    A second Ctrl-C raises KeyboardInterrupt as usual. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "Interruptible":
        try:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread, where alone signals arrive
            self._previous = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


def fit(
    model: nn.Module,
    compute_gradients: Callable[[nn.Module, Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    data: ImageData,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    graph: bool = False,
    done: int = 0,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[int, int], None] = lambda steps, epochs: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Trains on data.train, from step `done` to the end of the last epoch; returns the steps done.

    `compute_gradients(model, inputs, targets)` fills ``.grad`` and returns the loss, detached.
    `on_step` is called after each update, `on_epoch(steps done, epochs done)` after each epoch.
    After a step at which `stop()` is true, the loop returns at once. Raises Diverged, naming step
    and learning rate, if a loss or a weight was NaN or infinite: before `on_epoch` or the return, a
    loss at the latest CHECK_EVERY steps on.

    The order of the data in an epoch depends on `seed` and the epoch alone, and so do the random
    numbers of ``augment(images, generator)``, which changes the images of several batches at once;
    so a run that goes on from a checkpoint sees the same batches as one that never stopped. The
    last batch of an epoch may be smaller. With `graph`, a CUDA device runs each step as one graph
    (`GraphedUpdate`).
    """

    def update(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = compute_gradients(model, inputs, targets)
        optimizer.step()
        return loss

    one_step = GraphedUpdate(update, list(model.parameters()), batch_size) if graph else update
    n = len(data.train)
    per_epoch = steps_per_epoch(n, batch_size)
    while done < epochs * per_epoch and not stop():
        epoch, first = divmod(done, per_epoch)
        unchecked: list[Step] = []
        for inputs, targets in _batches(data, seed, epoch, batch_size, first, dtype, augment):
            lr = schedule.get_last_lr()[0]
            lr = lr.clone() if isinstance(lr, Tensor) else float(lr)  # the schedule overwrites it
            loss = one_step(inputs, targets)
            schedule.step()
            done += 1
            step = Step(done, epoch, len(targets), loss, lr)
            on_step(step)
            unchecked.append(step)
            if len(unchecked) == CHECK_EVERY:
                _check(unchecked)
            if stop():
                break
        _check(unchecked)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise Diverged("a weight became NaN or infinite", step)
        if done % per_epoch == 0:
            on_epoch(done, epoch + 1)
    return done


def _batches(
    data: ImageData,
    seed: int,
    epoch: int,
    batch_size: int,
    first: int,
    dtype: torch.dtype,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch from number `first` on, about GATHERED examples made at a time."""
    order = data.train[order_of_epoch(len(data.train), seed, epoch).to(data.train.device)]
    batches = max(1, GATHERED // batch_size)
    for number, part in enumerate(order.split(batches * batch_size)):
        skipped = first - number * batches
        if skipped >= batches:
            continue
        # Places between the pixels need more than the 8 bits of bfloat16.
        inputs, targets = data.batch(part, dtype if augment is None else torch.float32)
        if augment is not None:
            generator = torch.Generator(inputs.device)
            generator.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + number) % 2**63)
            inputs = channels_last(augment(inputs, generator).to(dtype))
        split = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        yield from itertools.islice(split, max(0, skipped), None)


def _check(steps: list[Step]) -> None:
    """Raises Diverged for the first of the steps whose loss is not finite; empties the list."""
    losses = torch.stack([step.loss for step in steps]).tolist() if steps else []
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss}", step)
    steps.clear()


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches in an epoch, the smaller last one included."""
    return -(-examples // batch_size)


def order_of_epoch(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch, int64 (n,), on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)
