"""How much faster is an epoch if the images are one tensor, rather than a DataLoader's items?

    python experiments/feeding.py                # MNIST, a minute or two
    python experiments/feeding.py --smoke        # the embedded digits, seconds

What is compared, and what came out: results/feeding/README.md.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from nn_backprop import figures, studies
from nn_backprop.data import ImageData, data_root
from nn_backprop.models import MLP
from nn_backprop.studies import Rows, Table
from nn_backprop.training import make_optimizer

BATCH, LR = 128, 1e-3


@dataclass(frozen=True, kw_only=True)
class Options(studies.Command):
    """An epoch from one tensor against an epoch from a DataLoader."""

    least: ClassVar[dict[str, int]] = {"repeats": 1}

    repeats: int = 5
    """Timings of the pair, after one that does not count."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""


def collect(run: studies.StudyRun, options: Options) -> None:
    data = studies.load_data(options)
    dataset = items(data, options)
    for repeat in tqdm(range(-1, options.repeats), unit="pair"):
        slow = seconds(lambda: data_loader_epoch(dataset))
        fast = seconds(lambda: one_tensor_epoch(data))
        if repeat >= 0:
            run.add([{"repeat": repeat, "data_loader": slow, "one_tensor": fast}])


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_tensor_epoch(data: ImageData) -> None:
    studies.train_network(
        MLP(), data, lr=LR, epochs=1, batch_size=BATCH, seed=0, schedule="constant"
    )


def items(data: ImageData, options: Options) -> Dataset:
    """The training images, each transformed when it is asked for; the digits beforehand."""
    if data.name != "mnist":
        return TensorDataset(*data.batch(data.train))
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((data.mean,), (data.std,))]
    )
    official = datasets.MNIST(data_root(options.data_root), train=True, transform=transform)
    return Subset(official, data.train.tolist())


def data_loader_epoch(dataset: Dataset) -> None:
    model = MLP()
    optimizer = make_optimizer("adam", model.parameters(), LR, 0.0)
    for images, labels in DataLoader(dataset, batch_size=BATCH, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


# --- What the rows come to ----------------------------------------------------------------------


def ratios_of(rows: Rows) -> list[float]:
    return [row["data_loader"] / row["one_tensor"] for row in rows]


def tables(rows: Rows) -> dict[str, Table]:
    ratios = ratios_of(rows)
    middle = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"

    def line(name: str, key: str, ratio: str) -> dict[str, str]:
        times = [row[key] for row in rows]
        return {
            "epoch from": name,
            "median, s": f"{statistics.median(times):.2f}",
            "range, s": f"{min(times):.2f}–{max(times):.2f}",
            "time / one tensor's": ratio,
        }

    return {
        "Time of an epoch": [
            line("DataLoader, per-sample transforms", "data_loader", middle),
            line("one uint8 tensor", "one_tensor", "1"),
        ]
    }


def picture(rows: Rows) -> figures.Figure:
    ratios = {"DataLoader / one tensor": ratios_of(rows)}
    return figures.ratio_dots(ratios, "Time of an epoch of 784-128-10, as a ratio")


STUDY = studies.Study(Options, collect, lambda rows: [], tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
