"""`experiments/train.py`: a run stops, goes on to the same numbers, or diverges."""

import io
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from properties import same
from training_run import (
    SCRIPT,
    after_step,
    digits,
    press,
    records,
    resume,
    sentence,
    state_of,
    steps,
    summary,
    train,
    unchanged,
)

from nn_backprop import data
from nn_backprop.tracking import monitor

pytestmark = pytest.mark.usefixtures("offline")
CLOCKS = "train_seconds", "logging_seconds", "wall_seconds"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Holds `whole`, by the defaults but for one thread: the order of a sum depends on their
    number. It was copied to `killed` after step 17, and `stopped` is one that was, after step 7."""
    runs = tmp_path_factory.mktemp("runs")
    with after_step(17, lambda: shutil.copytree(runs / "whole", runs / "killed")):
        assert digits(runs / "whole", "--threads", 1) == 0
    with after_step(7, press):
        assert digits(runs / "stopped", "--threads", 1) == 130
    return runs


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def assert_same_run(actual: Path | str, expected: Path | str) -> None:
    """To the last bit, but for the clock."""
    states = [state_of(run) for run in (actual, expected)]
    done = [state.pop("progress")["step"] for state in states]
    assert done[0] == done[1] and same(*states)
    a, b = ([without(r, "samples_per_second") for r in records(run)] for run in (actual, expected))
    assert a == b
    assert without(summary(actual), *CLOCKS) == without(summary(expected), *CLOCKS)


@pytest.mark.parametrize("model, options, stops", [
    ("mlp", "--engine tape --augment", [1, 10]),  # the latter as an epoch ends
    ("mlp", "--optimizer sgd --schedule constant --engine by-hand", [7]),
    ("mlp", "--precision bfloat16", [13]),
    ("happy", "--precision float64 --batch-size 128", [4, 19]),
    pytest.param("cnn", "", [4, 16], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(model, options, stops, capsys):
    assert digits("whole", *options.split(), model=model) == 0
    for step in stops:
        with after_step(step, press):
            again = Path("parts").exists()
            code = resume("parts") if again else digits("parts", *options.split(), model=model)
        assert code == 130
        assert state_of("parts")["progress"]["step"] == records("parts")[-1]["step"] == step
        assert not Path("parts/summary.json").exists()
        printed = capsys.readouterr().out
        assert f"Stopped after step {step} of 20; go on with" in printed
        assert printed.endswith("    python experiments/train.py --resume parts\n")
    assert resume("parts") == 0
    assert_same_run("parts", "whole")


def test_a_run_that_ended_at_another_moment_goes_on_too(runs, monkeypatch, capsys):
    """Before the first step; while the figures are drawn; killed between two checkpoints, where the
    clocks stood at 1000 s."""
    epoch = monitor.Monitor.epoch

    def pressed(self, *numbers) -> None:
        epoch(self, *numbers)
        press()

    with monkeypatch.context() as patched:
        patched.setattr(monitor.Monitor, "epoch", pressed)
        assert digits("before", "--threads", 1) == 130
    assert "Stopped after step 0 of 20" in capsys.readouterr().out
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(monitor.Monitor, "finish", lambda *_: sys.exit())
        digits("drawing", "--threads", 1)

    shutil.copytree(runs / "killed", "killed")
    assert state_of("killed")["progress"]["step"] == 10
    assert records("killed")[-1]["step"] == 17  # what comes after the checkpoint is done again
    with open("killed/metrics.jsonl", "a") as file:
        file.write('{"step": 18, "epo')  # cut off while it was written
    Path("killed/checkpoint.pt.tmp").write_bytes(b"half")
    state = state_of("killed")
    assert all(0 < state["progress"][clock] < 60 for clock in CLOCKS)
    state["progress"] |= dict.fromkeys(CLOCKS, 1000.0)
    torch.save(state, "killed/checkpoint.pt")
    for run in ("before", "drawing", "killed"):
        assert not Path(run, "summary.json").exists()
        assert resume(run) == 0
        assert_same_run(run, runs / "whole")
    assert all(1000 < summary("killed")[clock] < 1060 for clock in CLOCKS)  # they go on,
    # and not as if the seconds before had gone into one step
    assert min(steps("killed", "samples_per_second").values()) > 100


def test_the_clock_of_training_stops_during_evaluation(monkeypatch):
    """A step takes 2 s here, and the evaluation of an epoch 1000 s."""
    now = [0.0]

    def slow(seconds, call):
        def slowed(*arguments):
            now[0] += seconds
            return call(*arguments)

        return slowed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(monitor.Monitor, "step", slow(2, monitor.Monitor.step))
    monkeypatch.setattr(monitor, "evaluate", slow(1000, monitor.evaluate))
    assert digits("run") == 0
    assert summary("run")["train_seconds"] == 20 * 2
    assert summary("run")["wall_seconds"] == 20 * 2 + 3 * 1000
    speeds = [*steps("run", "samples_per_second").values()]
    assert speeds == 2 * [*(9 * [128 / 2]), 45 / 2]  # the last batch of an epoch has 45
    assert digits("long", "--batch-size", 5, epochs=1) == 0
    speeds = [*steps("long", "samples_per_second").values()]
    assert speeds == 102 * [5 / 2]  # the last two of them over 50 steps, since
    # after the first hundred each fiftieth step is logged
    assert list(steps("long")) == [*range(1, 101), 150, 200]


def test_ctrl_c_at_the_last_step_comes_too_late_and_a_second_ends_the_run_at_once(capsys):
    with after_step(20, press):
        assert digits("run") == 0
    assert summary("run")["epochs"] == 2
    with after_step(3, press), after_step(3, press):
        assert digits("twice") == 130
    assert "interrupted" in sentence(capsys)
    assert state_of("twice")["progress"]["step"] == 0


# ---- what cannot be resumed -----------------------------------------------------------------


def refused(capsys, said: str, *arguments) -> None:
    assert resume(*arguments) == 2 and said in sentence(capsys)


def test_a_finished_run_is_left_as_it_is_and_no_option_may_contradict_it(runs, capsys):
    whole = runs / "whole"
    with unchanged(whole):
        assert resume(whole) == 0
        assert resume(whole, "--epochs", 2, "--model", "mlp", "--run-dir", whole) == 0
        assert "is complete" in capsys.readouterr().out
        for other in ("--preset fast", "--epochs 13", "--lr 0.005", "--augment", "--run-dir there"):
            refused(capsys, f"{other} contradicts the run in {whole}", whole, *other.split())


def test_a_damaged_run_and_another_networks_are_refused_and_left(runs, monkeypatch, capsys):
    stopped = runs / "stopped"
    good, flipped = (bytearray((stopped / "checkpoint.pt").read_bytes()) for _ in range(2))
    flipped[len(good) // 2] ^= 1
    other = io.BytesIO()
    torch.save({"model": 1}, other)
    more = (stopped / "config.json").read_bytes().replace(b'"epochs": 2', b'"epochs": 3')
    for number, (file, content) in enumerate((
        *(("config.json", c) for c in (None, b"", b"\xff\xfe\0", b"[1]", more)),
        *(("checkpoint.pt", c) for c in (None, b"", b"hello", good[:-3000], flipped)),
        ("checkpoint.pt", other.getvalue()),
    )):  # fmt: skip
        run = Path(f"damage {number}")  # which the sentence names
        shutil.copytree(stopped, run)
        (run / file).unlink()
        if content is not None:
            (run / file).write_bytes(content)
        with unchanged(run):
            refused(capsys, f"{run} holds no run that can be resumed (", run)
    monkeypatch.setitem(train.MODELS, "mlp", lambda: torch.nn.Linear(3, 5))
    with unchanged(stopped):
        refused(capsys, "is of another version of this program (RuntimeError", stopped)


# ---- a loss that is not finite --------------------------------------------------------------


def test_a_run_that_diverges_says_so_and_keeps_what_was_good(capsys):
    options = ["--lr", 1e6, "--optimizer", "sgd", "--schedule", "constant", "--batch-size", 5]
    for run in ("float32", "float64", "bfloat16"):
        assert digits(run, *options, "--precision", run) == 1
        error = sentence(capsys)
        pattern = r"the loss became (nan|inf) at step (\d+), with learning rate 1e\+06"
        value, step = re.search(pattern, error).groups()
        assert "The last good checkpoint is kept" in error
        assert list(steps(run))[: int(step)] == list(range(1, int(step) + 1))  # nothing is lost
        assert str(steps(run)[int(step)]) == value
        assert state_of(run)["progress"]["step"] == 0
        assert all(weight.isfinite().all() for weight in state_of(run)["model"].values())
        assert not Path(run, "summary.json").exists()
    # Of the last step, its own loss is finite; the update made of it is not.
    for run in ("adam", "sgd"):
        options = ["--lr", 1e30, "--optimizer", run, "--schedule", "constant"]
        assert digits(run, *options, "--batch-size", 5000, epochs=1) == 1
        assert "validation loss became nan at step 1, with learning rate 1e+30" in sentence(capsys)
        assert state_of(run)["progress"]["step"] == 0
        assert records(run)[-1]["step"] == 1


# ---- as a program ---------------------------------------------------------------------------


def test_ctrl_c_in_a_terminal():
    """A bar shows the progress there; the exit code is 130; the command to go on is complete."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    options = "--data digits --model happy --epochs 1000 --threads 1 --run-dir"
    command = [sys.executable, str(SCRIPT), *options.split(), "my run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        os.close(terminal)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("epoch   2 "):
                process.send_signal(signal.SIGINT)
    with open(ours, "rb", buffering=0) as screen:
        shown = screen.read(10_000)
    assert process.returncode == 130
    assert b"step/s" in shown and b"Traceback" not in shown
    assert printed[-1] == "    python experiments/train.py --resume 'my run'\n"
    step = int(re.fullmatch(r"Stopped after step (\d+) of 38000; .*\n", printed[-2]).group(1))
    assert state_of("my run")["progress"]["step"] == step >= 76


def test_ctrl_c_during_the_imports_is_not_lost(tmp_path):
    """Somewhere in the second that they take an exception may be caught, and the key forgotten."""
    (tmp_path / "torch.py").write_text("""
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
""")
    options = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}, "text": True}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_after_the_imports_ctrl_c_is_an_exception_again(monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *arguments: press())
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended without a word"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--run-dir", "run"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.value.code == 130 and "interrupted" in sentence(capsys)
    assert not Path("run").exists()  # the data were being loaded
