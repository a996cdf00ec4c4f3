"""The data of a study, and the training that most of them have in common."""

import functools
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nn_backprop.data import ImageData, load
from nn_backprop.engines import Engine, autograd
from nn_backprop.models import MLP
from nn_backprop.studies.jobs import StudyError
from nn_backprop.training import (
    evaluate,
    fit,
    fit_many,
    make_optimizer,
    make_schedule,
    steps_per_epoch,
)

SPLITS = ("train", "validation", "test")


class DataOptions(Protocol):
    """Where the images are, and which."""

    @property
    def data_root(self) -> Path | None: ...
    @property
    def smoke(self) -> bool: ...


def load_data(options: DataOptions) -> ImageData:
    """MNIST, or the embedded digits of a smoke run; read once in a process.

    Raises DataError if MNIST is not there and cannot be fetched. A study asks for it before its
    first training, so that it ends in one sentence, and leaves nothing.
    """
    return _loaded("digits" if options.smoke else "mnist", options.data_root)


@functools.cache
def _loaded(name: str, root: Path | None) -> ImageData:
    return load(name, root, say=lambda line: None)


class Trained(NamedTuple):
    """What a training leaves beside the network."""

    optimizer: Optimizer
    seconds: float


def train_network(
    model: nn.Module,
    data: ImageData,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    decay: float = 0.0,
    optimizer: str = "adam",
    schedule: str = "one-cycle",
    done: int = 0,
    engine: Engine = autograd,
    on_epoch: Callable[[int, int], None] = lambda steps, epochs: None,
) -> Trained:
    """Trains for so many epochs; optimizer and schedule as `make_optimizer` names them.

    After `done` earlier epochs, the batches are those of the epochs that follow; the schedule
    begins anew. The start of the network is the caller's: set torch's seed before it is built.
    """
    per_epoch = steps_per_epoch(len(data.train), batch_size)
    made = make_optimizer(optimizer, model.parameters(), lr, decay)
    began = time.perf_counter()
    fit(
        model, engine, made, make_schedule(schedule, made, lr, epochs * per_epoch), data,
        epochs=done + epochs, batch_size=batch_size, seed=seed, done=done * per_epoch,
        on_epoch=on_epoch,
    )  # fmt: skip
    return Trained(made, time.perf_counter() - began)


class Recipe(NamedTuple):
    """A network of inputs-hidden-classes, and how it is trained, many at once."""

    hidden: tuple[int, ...]
    epochs: int
    lr: float
    batch_size: int
    activation: str = "relu"
    loss: str = "cross_entropy"
    optimizer: str = "adam"
    schedule: str = "one-cycle"

    def network(self, seed: int, inputs: int = 784, classes: int = 10) -> MLP:
        """With the first weights of the seed."""
        torch.manual_seed(seed)
        return MLP((inputs, *self.hidden, classes), self.activation, self.loss)

    def train(
        self, models: Sequence[MLP], data: ImageData, seeds: Sequence[int],
        labels: Tensor | None = None,
        on_epoch: Callable[[slice, int], None] = lambda networks, epochs: None,
    ) -> None:  # fmt: skip
        """All in place, by `fit_many`, which has more on the arguments.

        Raises StudyError if a loss is not finite.
        """
        losses = fit_many(
            models, data, seeds=seeds, lrs=self.lr, labels=labels, optimizer=self.optimizer,
            schedule=self.schedule, epochs=self.epochs, batch_size=self.batch_size,
            on_epoch=on_epoch,
        )  # fmt: skip
        if not losses.isfinite().all():
            raise StudyError(f"a training diverged, seeds {list(seeds)}: {self}")


def accuracies(
    model: nn.Module, data: ImageData, splits: Collection[str] = SPLITS
) -> dict[str, float]:
    """ "<split>_accuracy", from 0 to 1. The test split is to be read once, after the training."""
    return {
        f"{split}_accuracy": evaluate(model, data, getattr(data, split)).accuracy
        for split in splits
    }
