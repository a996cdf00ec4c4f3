"""What a study does with its jobs, its options and its folder."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nn_backprop import figures
from nn_backprop.data import DataError
from nn_backprop.studies import study
from nn_backprop.studies.evidence import between
from nn_backprop.studies.study import Study, StudyOptions, UsageError
from nn_backprop.training import Diverged, Step

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = [path for path in EXPERIMENTS.glob("*.py") if "command(Options" in path.read_text()]


def square(job: int) -> dict:
    return {"job": job, "square": job * job}


def conduct(under_way: Study, options: StudyOptions) -> None:
    rows = under_way.carry_out(square, range(2, 7), lambda row: {"square": row["square"]})
    assert [row["job"] for row in rows] == [2, 3, 4, 5, 6]
    values = [row["square"] for row in rows]
    claims = [between("squares are from 0 to 100", None, values, 0, 100)]
    figure = figures.ratio_dots({"squares": values}, "squares")
    under_way.finish({"Squares": rows}, claims, figure)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_study_leaves_rows_tables_verdicts_and_a_picture(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--seeds", "3", "--workers", workers]
    assert study.command(StudyOptions, "squares", conduct, arguments) == 0
    (folder,) = tmp_path.glob("runs/test_study/*-full")
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == "test_study"
    assert results["rows"] == [square(n) for n in range(2, 7)]
    assert results["config"]["seeds"] == 3
    (claim,) = results["claims"]
    assert claim["verdict"] == "reproduced" and claim["measured"] == 18
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.out.tfevents.*"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5]
    assert sorted(record["square"] for record in logged) == [4, 9, 16, 25, 36]
    shown = capsys.readouterr().out
    assert shown.count((folder / "results.md").read_text()) == 1
    assert "| 6 | 36 |" in shown and "**reproduced**" in shown and "5 rows in" in shown


@pytest.mark.parametrize(
    "wrong", [["--seeds", "1"], ["--workers", "0"], ["--seeds", "1", "--smoke"]]
)
def test_a_bad_count_is_one_sentence_and_leaves_nothing(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.command(StudyOptions, "", conduct, wrong) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"test_study.py: {wrong[0]} must be")
    assert list(tmp_path.iterdir()) == []


def refuse(under_way: Study, options: StudyOptions) -> None:
    raise UsageError("no such thing: take another")


def lack(under_way: Study, options: StudyOptions) -> None:
    raise DataError("no MNIST: fetch it")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (refuse, "no such thing: take another"),
        (lack, "no MNIST: fetch it; --smoke needs neither files nor network"),
    ],
)
def test_a_study_that_cannot_begin_says_why_and_leaves_nothing(
    end, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert study.command(StudyOptions, "", end, []) == 2
    assert capsys.readouterr().err == f"test_study.py: {told}\n"
    assert list(tmp_path.iterdir()) == []


def interrupt(under_way: Study, options: StudyOptions) -> None:
    under_way.carry_out(square, [1])
    raise KeyboardInterrupt


def test_an_interrupted_study_says_where_its_rows_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.command(StudyOptions, "", interrupt, ["--workers", "1"]) == 130
    (folder,) = Path().glob("runs/test_study/*")
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"test_study.py: interrupted; the rows so far are in {folder}"
    assert json.loads((folder / "rows.jsonl").read_text()) == square(1)


@pytest.mark.slow
@pytest.mark.parametrize("script", STUDIES, ids=lambda path: path.stem)
def test_without_mnist_every_study_says_so_and_leaves_nothing(script, tmp_path):
    """--data-root lies below a device, where no folder can be made, not even by root."""
    offline = {"NN_BACKPROP_MNIST_URL": "http://127.0.0.1:9", "no_proxy": "*"}
    elsewhere = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "cache")}
    (work := tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, str(script), "--data-root", "/dev/null/none"],
        cwd=work, env=os.environ | offline | elsewhere, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(
        f"{script.name}: /dev/null/none/MNIST/raw/train-images-idx3-ubyte is"
    )
    assert sentence.endswith("to a mirror; --smoke needs neither files nor network")
    assert list(work.iterdir()) == []


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path

def wait_at(moment):
    if moment == sys.argv[-1]:
        Path(f"{moment}.{os.getpid()}").touch()
        time.sleep(100)

if __name__ != "__main__":
    wait_at("import")
else:  # what a shell starts in the background is deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
from nn_backprop.studies import study

def train(job):
    if job > 0:
        wait_at("training")
    return {"job": job}

def conduct(under_way, options):
    wait_at("start")
    under_way.carry_out(train, range(3))

if __name__ == "__main__":
    sys.exit(study.command(study.StudyOptions, "", conduct, sys.argv[1:3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "workers", "jobs"),
    [
        ("start", "1", None),
        ("import", "2", []),
        ("training", "1", [0]),
        ("training", "2", [0]),
    ],
)
def test_ctrl_c_is_one_line_at_any_moment(moment, workers, jobs, tmp_path):
    """Sent, as a terminal does, to every process; `jobs` are those whose rows are kept by then."""
    script = tmp_path / "waits.py"
    script.write_text(INTERRUPTED)

    def waiting_at() -> list[Path]:
        return list(tmp_path.glob(f"{moment}.*"))

    with subprocess.Popen(
        [sys.executable, script, "--workers", workers, moment],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as running:  # fmt: skip
        kept: list[int] | None = None
        while not waiting_at() or kept != jobs:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
            for rows in tmp_path.glob("runs/waits/*/rows.jsonl"):
                kept = sorted(json.loads(row)["job"] for row in rows.read_text().splitlines())
        for waiting in {int(path.suffix[1:]) for path in waiting_at()} - {running.pid}:
            os.kill(waiting, signal.SIGINT)  # of a worker alone nothing may come
        time.sleep(1)
        os.killpg(running.pid, signal.SIGINT)
        told = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 130
    folders = list(tmp_path.glob("runs/waits/*"))
    kept_in = "".join(f"; the rows so far are in {path.relative_to(tmp_path)}" for path in folders)
    assert told.pop() == f"waits.py: interrupted{kept_in}"
    assert len(folders) == (jobs is not None)
    assert all(line.startswith("train: ") for line in told if line)  # the progress bar


@pytest.mark.slow
def test_trainings_end_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, script, "--workers", "2", "training"], cwd=tmp_path, stderr=subprocess.PIPE
    ) as running:
        while len(list(tmp_path.glob("training.*"))) < 2:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        running.kill()
        running.communicate(timeout=60)  # they, too, hold stderr, and would for 100 s: it ends


def die(job: int) -> dict:
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(job)


def diverge(job: int) -> dict:
    step = Step(number=7, epoch=0, examples=3, loss=torch.tensor(0.0), lr=0.5)
    raise Diverged("the loss became nan", step)


@pytest.mark.parametrize(
    ("training", "workers", "told"),
    [
        (die, "2", "the process of a training was killed"),
        (diverge, "1", "a training diverged, 0: the loss became nan at step 7"),
        (diverge, "2", "a training diverged, 0: the loss became nan at step 7"),
    ],
)
def test_a_training_that_fails_is_one_sentence(
    training, workers, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def conduct(under_way: Study, options: StudyOptions) -> None:
        under_way.carry_out(training, [0, 1] if training is die else [0])

    assert study.command(StudyOptions, "", conduct, ["--workers", workers]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"test_study.py: {told}")
    assert "rows so far are in runs/test_study/" in sentence


def test_a_smoke_run_has_two_seeds_and_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    study.command(StudyOptions, "", lambda under_way, options: seen.append(options), ["--smoke"])
    assert seen == [dataclasses.replace(StudyOptions(), seeds=2, workers=1, smoke=True)]
