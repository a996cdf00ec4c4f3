"""The directory of a run, and what TensorBoard shows of it.

    config.json      what the run was asked to do, and the machine that did it
    metrics.jsonl    one JSON object a line: step, epoch and the values logged; the source of truth
    events.*         the same for TensorBoard, with histograms, images, the graph and PR curves
    figures/*.png    the figures that were given a file name
    summary.json     how it ended

Python's own JSON is written: the shortest decimals (17 digits at most) that read back as the same
float64, and the tokens NaN, Infinity and -Infinity, which `json.loads` reads, so that a run that
diverged keeps its record. TensorBoard's copy of a value has float32 precision.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from nn_backprop.tracking.files import replace_file, write_json

_LARGEST = 1e19  # TensorBoard's histogram bins end at 1e20
_log = logging.getLogger(__name__)


class RunError(Exception):
    """A run directory cannot be used: what was wrong, what was expected, what to do."""


def default_run_dir(experiment: str, name: str) -> Path:
    """`runs/<experiment>/<YYYYmmdd-HHMMSS>-<name>`, numbered -2, -3, … if that is taken.

    The path is relative to the working directory, and nothing is created.
    """
    first = Path("runs", experiment, f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    path, number = first, 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


class Run:
    """A run directory that is open for writing; a context manager that closes it.

    Made by `Run.create` or `Run.reopen`. `step` counts the optimizer steps done: 0 is before
    training, and is shown like any other.
    """

    def __init__(self, path: Path, next_step: int) -> None:
        self.path = path
        self._last_step = max(0, next_step - 1)
        # Line-buffered: a record is with the operating system when log() returns, so that a killed
        # process loses none. TensorBoard's are written by a thread, every 10 seconds. A new run
        # purges too: TensorBoard's Python reader heeds a purge only from the second on.
        self._metrics = open(path / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._writer: Any = SummaryWriter(
            str(path), purge_step=next_step, max_queue=1000, flush_secs=10
        )

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> Run:
        """Makes the directory, with its parents, and writes `config` to config.json.

        Raises RunError if the directory already holds a run or cannot be written.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / "config.json").exists():
                raise RunError(
                    f"{path} already holds a run (config.json); resume it or name a new directory."
                )
            write_json(path / "config.json", config)
            return cls(path, next_step=0)
        except OSError as error:
            raise _unusable(path, error) from error

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], step: int) -> Run:
        """Opens a run to go on after `step`; what was logged later is dropped.

        metrics.jsonl keeps the records whose step is at most `step`; a last line that was cut off
        while it was written goes too. TensorBoard is told to forget the later events.

        Raises RunError if there is no run, or its metrics cannot be read, or it cannot be written.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise RunError(
                f"{path} holds no run: expected a config.json in it; give the directory of a run."
            )
        try:
            _cut(path / "metrics.jsonl", step)
            _wait_for_a_later_name(path)
            return cls(path, next_step=step + 1)
        except OSError as error:
            raise _unusable(path, error) from error

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Appends {"step", "epoch", **values} to metrics.jsonl; each value is a scalar of its tag.

        A NumPy scalar or a detached 0-d tensor will do for a float.
        """
        numbers = {tag: float(value) for tag, value in values.items()}
        self._metrics.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
        self._scalars(numbers, step)
        self._last_step = step

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """The distribution of each tensor's finite entries; a tensor without any is left out."""
        for tag, tensor in tensors.items():
            finite = tensor.detach()[tensor.isfinite()].clamp(-_LARGEST, _LARGEST)
            if finite.numel():
                self._writer.add_histogram(tag, finite, step)

    def figure(self, tag: str, figure: Any, step: int, file: str | None = None) -> bytes:
        """Shows a matplotlib Figure under `tag`; returns the PNG.

        It is kept as figures/<file>.png if that is named.
        """
        png = io.BytesIO()
        figure.savefig(png, format="png")
        width, height = figure.canvas.get_width_height()
        image = Summary.Image(
            encoded_image_string=png.getvalue(), width=width, height=height, colorspace=4
        )
        self._summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        if file is not None:
            (self.path / "figures").mkdir(exist_ok=True)
            replace_file(self.path / "figures" / f"{file}.png", png.getvalue())
        return png.getvalue()

    def image(self, tag: str, pixels: Any, step: int) -> None:
        """Shows an image, uint8 (height, width, 3)."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def graph(self, model: nn.Module, example_input: Tensor) -> None:
        """The graph of the model in evaluation, traced on a copy that is moved to the CPU.

        The model and the random state stay as they are. A model that cannot be traced is left out,
        and the log says so in a line.
        """
        try:
            with (
                torch.random.fork_rng(devices=[]),
                warnings.catch_warnings(action="ignore"),
                redirect_stdout(io.StringIO()),
            ):
                self._writer.add_graph(copy.deepcopy(model).cpu(), example_input.detach().cpu())
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            _log.warning("no graph for TensorBoard: %s: %s", type(error).__name__, reason)

    def pr_curve(self, tag: str, is_class: Tensor, probability: Tensor, step: int) -> None:
        """Precision against recall: `is_class` (n,) bool, its `probability` (n,) in 0 to 1."""
        self._writer.add_pr_curve(tag, is_class, probability, step)

    def hparams(self, options: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """One row of the HPARAMS tab: the options, and final metrics as scalars of the last step.

        An option that is neither a number nor a string is shown as its string. This is written to
        the run itself; `SummaryWriter.add_hparams` would start a second one.
        """
        shown = {k: v if type(v) in (int, float, str) else str(v) for k, v in options.items()}
        for summary in hparams(shown, dict(metrics)):
            self._summary(summary, self._last_step)
        self._scalars(metrics, self._last_step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json: how the run ended."""
        write_json(self.path / "summary.json", values)

    def flush(self) -> None:
        """Waits until TensorBoard's events are on disk too; a checkpoint is best written after."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files; a second close does nothing."""
        self._metrics.close()
        self._writer.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        """All values in one event: SummaryWriter.add_scalar spends one on each."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._summary(Summary(value=scalars), step)

    def _summary(self, summary: Summary, step: int) -> None:
        self._writer.file_writer.add_summary(summary, step)


def _cut(path: Path, step: int) -> None:
    """Keeps the records of a metrics file whose step is at most `step`."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise RunError(
                    f"{path}, line {number} is not a record with a step: expected a JSON object "
                    "a line; repair or remove that line to resume."
                ) from None
    replace_file(path, b"".join(kept))


def _wait_for_a_later_name(path: Path) -> None:
    """TensorBoard reads event files in the order of their names, which hold the second."""
    seconds = [int(file.name.split(".")[3]) for file in path.glob("events.out.tfevents.*")]
    while seconds and int(time.time()) == max(seconds):
        time.sleep(0.01)


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path} cannot be a run directory ({error.strerror}): expected a directory that can be "
        "made and written; name another."
    )
