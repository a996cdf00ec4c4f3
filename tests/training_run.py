"""Runs of `experiments/train.py` on the embedded digits, stopped where a test wants, and read."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import train
from nn_backprop import figures
from nn_backprop.tracking import monitor
from nn_backprop.training import read_checkpoint

SCRIPT = Path(__file__).parents[1] / "experiments" / "train.py"


class Sketches:
    """`figures`, but for those that take long to draw."""

    def __getattr__(self, name):
        if name == "weight_pixels":
            return figures.weight_pixels
        return lambda *arguments: Figure(figsize=(1, 1), dpi=20)


def digits(run, *options, model="mlp", epochs=2, drawn=False) -> int:
    """Trains on the embedded digits, with sketches for figures; returns the exit code."""
    arguments = ["--data", "digits", "--model", model, "--epochs", epochs, "--run-dir", run]
    return command(*arguments, *options, drawn=drawn)


def resume(run, *options) -> int:
    return command("--resume", run, *options)


def command(*arguments, drawn=False) -> int:
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:
            patched.setattr(monitor, "figures", Sketches())
        return train.main([*map(str, arguments)])


def records(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def steps(run: Path | str, tag: str = "loss/train") -> dict[int, float]:
    """What was logged of each step, by its number."""
    return {r["step"]: r[tag] for r in records(run) if "loss/train" in r}


def summary(run: Path | str) -> dict:
    return json.loads(Path(run, "summary.json").read_text())


def state_of(run: Path | str) -> dict:
    return read_checkpoint(Path(run, "checkpoint.pt"))


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    yield
    assert contents() == before


def sentence(capsys) -> str:
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1, error
    return error


@contextmanager
def after_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    original = monitor.Monitor.step

    def watched(self, done) -> None:
        original(self, done)
        if done.number == step:
            act()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor.Monitor, "step", watched)
        yield


def press() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
