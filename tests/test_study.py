"""What a study does with its jobs, its options and its folder."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from nn_backprop import figures, study
from nn_backprop.evidence import between
from nn_backprop.study import Study, StudyOptions, UsageError
from nn_backprop.training import Diverged, Step


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


def interrupt(under_way: Study, options: StudyOptions) -> None:
    under_way.carry_out(square, [1])
    raise KeyboardInterrupt


def test_how_a_study_ends_early(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.command(StudyOptions, "", refuse, []) == 2
    assert capsys.readouterr().err == "test_study.py: no such thing: take another\n"
    assert list(tmp_path.iterdir()) == []
    assert study.command(StudyOptions, "", interrupt, ["--workers", "1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    (rows,) = tmp_path.glob("runs/test_study/*/rows.jsonl")
    assert json.loads(rows.read_text()) == square(1)


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
