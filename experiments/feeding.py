"""How much faster is an epoch if the images are one tensor, rather than a DataLoader's items?

    python experiments/feeding.py                # MNIST, a minute or two
    python experiments/feeding.py --smoke        # the embedded digits, seconds

An epoch of the 784-128-10 network by `training.fit`, which gathers and normalises batches from the
tensor that holds all images; against the same network, optimizer and batch size behind
torchvision's MNIST with ToTensor and Normalize for each image, and a DataLoader in the same
process, as by default. The two are timed in turn; the ratio of a pair is free of the machine's
drift.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn.functional as F
import tyro
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from nn_backprop import figures
from nn_backprop.data import DataError, ImageData, data_root, load
from nn_backprop.engines import ENGINES
from nn_backprop.models import MLP
from nn_backprop.studies.evidence import markdown_table, write_results
from nn_backprop.tracking import default_run_dir, describe_machine
from nn_backprop.training import fit, make_optimizer, make_schedule

BATCH, LR = 128, 1e-3


@dataclass(frozen=True)
class Options:
    """An epoch from one tensor against an epoch from a DataLoader."""

    repeats: int = 5
    """Timings of the pair, after one that does not count."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""
    smoke: bool = False
    """Two timings on the embedded digits, which are transformed beforehand."""


def main(options: Options) -> int:
    began = time.perf_counter()
    repeats = 2 if options.smoke else options.repeats
    if repeats < 1:
        print(f"feeding.py: --repeats must be 1 or more, not {repeats}", file=sys.stderr)
        return 2
    try:
        data = load("digits" if options.smoke else "mnist", options.data_root)
    except DataError as error:
        print(f"feeding.py: {error}; --smoke needs neither files nor network", file=sys.stderr)
        return 2
    dataset = _items(data, options)
    pairs = [
        (_seconds(lambda: _data_loader_epoch(dataset)), _seconds(lambda: _one_tensor_epoch(data)))
        for _ in tqdm(range(repeats + 1), unit="pair")
    ][1:]
    ratios = [slow / fast for slow, fast in pairs]
    rows = [
        {
            "epoch from": name,
            "median, s": f"{statistics.median(times):.2f}",
            "range, s": f"{min(times):.2f}–{max(times):.2f}",
            "time / one tensor's": times_ours,
        }
        for name, times, times_ours in (
            (
                "DataLoader, per-sample transforms",
                [slow for slow, _ in pairs],
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})",
            ),
            ("one uint8 tensor", [fast for _, fast in pairs], "1"),
        )
    ]
    folder = default_run_dir("feeding", "smoke" if options.smoke else "full")
    folder.mkdir(parents=True)
    config = asdict(options) | {"dataset": data.name, "pairs": pairs}
    seconds = time.perf_counter() - began
    write_results(folder / "results.json", "feeding", config, rows, [], describe_machine(), seconds)
    figure = figures.ratio_dots(
        {"DataLoader / one tensor": ratios}, "Time of an epoch of 784-128-10, as a ratio"
    )
    figures.save(figure, folder / "results.png")
    table = markdown_table(rows)
    (folder / "results.md").write_text(table)
    print(f"{table}\nTable, picture and results.json: {folder}")
    return 0


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _one_tensor_epoch(data: ImageData) -> None:
    model = MLP()
    optimizer = make_optimizer("adam", model.parameters(), LR, 0.0)
    schedule = make_schedule("constant", optimizer, LR, 1)
    fit(model, ENGINES["autograd"], optimizer, schedule, data, epochs=1, batch_size=BATCH, seed=0)


def _items(data: ImageData, options: Options) -> Dataset:
    """The training images, each transformed when it is asked for."""
    if data.name != "mnist":
        return TensorDataset(*data.batch(data.train))
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((data.mean,), (data.std,))]
    )
    official = datasets.MNIST(data_root(options.data_root), train=True, transform=transform)
    return Subset(official, data.train.tolist())


def _data_loader_epoch(dataset: Dataset) -> None:
    model = MLP()
    optimizer = make_optimizer("adam", model.parameters(), LR, 0.0)
    for images, labels in DataLoader(dataset, batch_size=BATCH, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
