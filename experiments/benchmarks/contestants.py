"""Contestants of time to accuracy: a textbook loop, scikit-learn, presets, rungs of a ladder."""

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adadelta
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from benchmarks import common
from benchmarks.training_step import engine_for
from nn_backprop import engines, studies
from nn_backprop.data import ImageData, data_root, load
from nn_backprop.models import MODELS
from nn_backprop.tracking import read_json
from nn_backprop.training import evaluate, fit, make_optimizer, make_schedule, steps_per_epoch


@dataclass(frozen=True)
class Outcome:
    """A training run. Its seconds are those of training alone, without any evaluation."""

    seconds: float
    validation: float  # accuracies, 0 to 1
    test: float
    epoch_seconds: float  # the median
    epochs: int


class Unavailable(Exception):
    """A contestant cannot take part, for the reason given."""


class Textbook(nn.Sequential):
    """The convolutional network of many introductions: 1,199,882 weights and biases."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 10),
        )  # fmt: skip
        assert sum(p.numel() for p in self.parameters()) == 1_199_882

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets)

    def probabilities(self, output: Tensor) -> Tensor:
        return output.softmax(1)


@dataclass(frozen=True)
class Rung:
    """A step of the ladder from the textbook's loop to the fastest: images in one tensor, and
    `training.fit`."""

    model: str  # of MODELS, or textbook
    optimizer: str  # of make_optimizer, or adadelta with the textbook's schedule
    lr: float
    batch_size: int
    epochs: int
    weight_decay: float = 0.0
    channels_last: bool = True
    bfloat16: bool = False  # where the processor has it
    few: bool = False  # as few seeds as the textbook's loop


CYCLE = Rung("cnn", "adam", 6e-3, 128, 3, 0.1)
RUNGS = {
    "images in one tensor": Rung("textbook", "adadelta", 1.0, 64, 4, channels_last=False, few=True),
    "… and a small network": Rung("cnn", "adadelta", 1.0, 64, 6, channels_last=False),
    "… one-cycle, fused AdamW": replace(CYCLE, channels_last=False),
    "… channels last": CYCLE,
    "… bfloat16": replace(CYCLE, bfloat16=True),
    "… batch norm, on 2 × 2 blocks": Rung("fast-cnn", "adam", 2e-2, 128, 1, 0.01, bfloat16=True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(common.Options):
    """Seconds of training to a validation accuracy, against a textbook's loop."""

    least: ClassVar[dict[str, int]] = {"rounds": 1, "seeds": 1, "textbook_seeds": 1}

    seeds: int = 10
    """Seeds, from 0, of every contestant but those below; of the preset accurate, half of them."""
    textbook_seeds: int = 3
    """Seeds of the textbook's loop, of scikit-learn and of the rungs that last as long."""
    target: float = 0.99
    """Validation accuracy, 0 to 1, at which the textbook's loop ends."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""

    @property
    def data(self) -> Literal["mnist", "digits"]:
        return "digits" if self.smoke else "mnist"

    @property
    def to_reach(self) -> float:
        return 0.6 if self.smoke else self.target

    @property
    def most_epochs(self) -> int:
        return 2 if self.smoke else 14

    def begin(self) -> None:
        super().begin()
        if not 0 < self.target < 1:
            raise studies.UsageError(f"--target must be between 0 and 1, not {self.target}")


@cache
def data_of(options: AccuracyOptions) -> ImageData:
    return load(options.data, options.data_root, options.device)


def textbook_run(seed: int, options: AccuracyOptions) -> Outcome:
    """As introductions train it: a DataLoader, Adadelta, a learning rate that falls each epoch."""
    from torchvision import datasets, transforms

    options.begin()
    torch.manual_seed(seed)
    data = data_of(options)
    if options.data == "mnist":
        transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        )
        root = data_root(options.data_root)
        items: Dataset = datasets.MNIST(root, train=True, transform=transform)
        unseen: Dataset = datasets.MNIST(root, train=False, transform=transform)
    else:  # the embedded digits, transformed beforehand
        items = TensorDataset(*data.to("cpu").batch(torch.arange(len(data.images))))
        unseen = Subset(items, data.test.tolist())
    batches = DataLoader(Subset(items, data.train.tolist()), batch_size=64, shuffle=True)
    held_out = Subset(items, data.validation.tolist())
    model = Textbook().to(options.device)
    optimizer = Adadelta(model.parameters(), lr=1.0)
    schedule = StepLR(optimizer, step_size=1, gamma=0.7)
    seconds: list[float] = []
    accuracy = 0.0
    while len(seconds) < options.most_epochs and accuracy < options.to_reach:
        began = time.perf_counter()
        model.train()
        for images, labels in batches:
            images, labels = images.to(options.device), labels.to(options.device)
            optimizer.zero_grad()
            model.loss(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        common.wait(options.device)
        seconds.append(time.perf_counter() - began)
        accuracy = _accuracy(model, held_out, options.device)
    return Outcome(
        sum(seconds), accuracy, _accuracy(model, unseen, options.device),
        statistics.median(seconds), len(seconds),
    )  # fmt: skip


@torch.no_grad()
def _accuracy(model: nn.Module, items: Dataset, device: str) -> float:
    model.eval()
    right = torch.cat([
        model(images.to(device)).argmax(1).cpu() == labels
        for images, labels in DataLoader(items, batch_size=1000)
    ])  # fmt: skip
    return right.double().mean().item()


def sklearn_run(seed: int, options: AccuracyOptions) -> Outcome:
    """scikit-learn's MLPClassifier with its own options, 50 epochs at most."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    data = data_of(replace(options, device="cpu"))
    splits = [data.batch(indices) for indices in (data.train, data.validation, data.test)]
    (x, y), *others = [(images.flatten(1).numpy(), labels.numpy()) for images, labels in splits]
    model = MLPClassifier(max_iter=2 if options.data == "digits" else 50, random_state=seed)
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        began = time.perf_counter()
        model.fit(x, y)
        seconds = time.perf_counter() - began
        validation, test = (float(model.score(*split)) for split in others)
    return Outcome(seconds, validation, test, seconds / model.n_iter_, model.n_iter_)


def preset_run(name: str, seed: int, options: AccuracyOptions) -> Outcome:
    """`train.py --preset NAME`, as a user runs it; the seconds are those of its training loop."""
    script = Path(__file__).parents[1] / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--preset", name]
        command += ["--seed", str(seed), "--run-dir", f"{folder}/run", "--data", options.data]
        command += ["--threads", str(options.threads), "--device", options.device]
        command += ["--data-root", str(options.data_root)] if options.data_root else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.replace("─", " ").split())[:200]
            raise Unavailable(f"train.py --preset {name} ended with {done.returncode}: {said}")
        summary = read_json(f"{folder}/run/summary.json")
    seconds, epochs = summary["train_seconds"], summary["epochs"]
    accuracies = summary["validation_accuracy"], summary["test_accuracy"]
    return Outcome(seconds, *accuracies, seconds / epochs, epochs)


def rung_run(name: str, seed: int, options: AccuracyOptions) -> Outcome:
    """A rung of the ladder, in this process."""
    rung, data = RUNGS[name], data_of(options)
    epochs = min(rung.epochs, options.most_epochs)
    options.begin()
    torch.manual_seed(seed)
    model = (Textbook() if rung.model == "textbook" else MODELS[rung.model]()).to(options.device)
    compute, parameters = engine_for("autograd", model)
    if rung.bfloat16 and engines.has_bfloat16(torch.device(options.device)):
        compute = engines.in_precision(engines.autograd, torch.bfloat16)
    if not rung.channels_last:
        compute = _channels_first(compute)
    per_epoch = steps_per_epoch(len(data.train), rung.batch_size)
    if rung.optimizer == "adadelta":
        optimizer: torch.optim.Optimizer = Adadelta(parameters, lr=rung.lr)
        schedule: LRScheduler = LambdaLR(optimizer, lambda done: 0.7 ** (done // per_epoch))
    else:
        optimizer = make_optimizer(rung.optimizer, parameters, rung.lr, rung.weight_decay)
        schedule = make_schedule("one-cycle", optimizer, rung.lr, epochs * per_epoch)
    model.train()
    began = time.perf_counter()
    steps = fit(
        model, compute, optimizer, schedule, data, epochs=epochs, batch_size=rung.batch_size,
        seed=seed,
    )  # fmt: skip
    common.wait(options.device)
    seconds = time.perf_counter() - began
    validation, test = (evaluate(model, data, x).accuracy for x in (data.validation, data.test))
    trained = steps // per_epoch
    return Outcome(seconds, validation, test, seconds / trained, trained)


def _channels_first(compute: engines.Engine) -> engines.Engine:
    """Images as torch usually has them. (`ImageData.batch` hands them out with channels last.)"""

    def computed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return compute(model, inputs.flatten(1).view(-1, 1, 28, 28), targets)

    return computed
