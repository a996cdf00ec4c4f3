"""`python -m nn_backprop`: what it prints, and its exit codes."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_run import digits

from nn_backprop.__main__ import main
from nn_backprop.data import files, load, read_digit
from nn_backprop.models import MLP
from nn_backprop.rules import TABLE
from nn_backprop.training import evaluate, read_checkpoint

pytestmark = pytest.mark.usefixtures("offline")
REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Trained on the embedded digits, in each precision."""
    folder = tmp_path_factory.mktemp("runs")
    for precision in ("float32", "float64", "bfloat16"):
        assert digits(folder / precision, "--precision", precision, epochs=3) == 0
    return list(folder.iterdir())


def unfinished(run: Path, copy: Path) -> Path:
    """A copy that has no summary: a run that goes on, or was stopped."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    return copy


def printed(capsys, *arguments: object) -> str:
    """What the command says when all is well."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def sentence(capsys, *arguments: object) -> str:
    """The one line that the command says when it could not be run, after what it tried."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    *tried, said = output.err.splitlines()
    assert output.out == "" and said.startswith("nn_backprop: ")
    assert all(line.startswith("MNIST: downloading ") for line in tried)
    return said


def draw(name: str, index: int) -> int:
    """Saves a training image of the digits as a picture; returns its label."""
    images = load("digits")
    Image.fromarray(images.images[index, 0].numpy()).resize((90, 90)).save(name)
    return int(images.labels[index])


# ---- evaluate -------------------------------------------------------------------------------


def test_evaluate_finds_what_the_run_found_and_the_table_says_the_same(runs, capsys):
    for run in runs:
        found = json.loads(printed(capsys, "evaluate", run, "--json"))
        summary = json.loads((run / "summary.json").read_text())
        assert found["dataset"] == "digits"
        assert found["accuracy"] == summary["test_accuracy"] > 0.8
        if not torch.cuda.is_available():
            assert found["loss"] == summary["test_loss"], run
        assert [row["digit"] for row in found["digits"]] == list(range(10))
        assert sum(row["n"] for row in found["digits"]) == 300
        right = sum(row["n"] * row["accuracy"] for row in found["digits"])
        assert right / 300 == pytest.approx(found["accuracy"], rel=1e-12)

        lines = printed(capsys, "evaluate", run).splitlines()
        assert len(lines) == 12
        for line, row in zip(lines[1:11], found["digits"], strict=True):
            wrong = row["most_taken_for"]
            words = [str(row["digit"]), str(row["n"]), f"{100 * row['accuracy']:.2f}", "%"]
            taken = [str(wrong["digit"]), f"({wrong['times']}", "times)"]
            assert line.split() == words + (taken if wrong["times"] else ["–"])
        assert lines[11].split()[:4] == ["all", "300", f"{100 * found['accuracy']:.2f}", "%"]
        assert f"loss {found['loss']:.4f}, test split of digits" in lines[11]


def loaded(run: Path) -> MLP:
    model = MLP()
    model.load_state_dict(read_checkpoint(run / "checkpoint.pt")["model"], assign=True)
    return model


def test_most_often_taken_for(runs, capsys, tmp_path):
    """A network that takes everything for a 3."""
    three = unfinished(runs[0], tmp_path / "three")
    state = torch.load(three / "checkpoint.pt", weights_only=True)
    state["model"]["layers.1.bias"][3] += 1e6
    torch.save(state, three / "checkpoint.pt")
    for row in json.loads(printed(capsys, "evaluate", three, "--json"))["digits"]:
        wrong = row["n"] if row["digit"] != 3 else 0
        assert (row["accuracy"], row["most_taken_for"]["times"]) == (not wrong, wrong)
        assert not wrong or row["most_taken_for"]["digit"] == 3


def test_a_run_that_goes_on_can_be_evaluated(runs, tmp_path, capsys):
    for run in runs:
        half, images = unfinished(run, tmp_path / run.name), load("digits")
        expected = evaluate(loaded(run), images, images.test).accuracy
        (half / "config.json").write_text("{}")  # not needed: the checkpoint knows its own
        assert json.loads(printed(capsys, "evaluate", half, "--json"))["accuracy"] == expected


# ---- predict --------------------------------------------------------------------------------


def test_predict_names_the_digit_and_how_sure_it_is(runs, capsys):
    names, images = [f"{k}.png" for k in range(8)], load("digits")
    labels = [draw(name, k) for k, name in enumerate(names)]
    for run in runs:
        rows = json.loads(printed(capsys, "predict", run, *names, "--json"))
        assert [row["image"] for row in rows] == names
        right = sum(row["digit"] == label for row, label in zip(rows, labels, strict=True))
        assert right >= 6 and all(0.1 < row["confidence"] <= 1 for row in rows)
        lines = printed(capsys, "predict", run, *names).splitlines()
        for line, row in zip(lines, rows, strict=True):
            words = [str(row["digit"]), f"{100 * row['confidence']:.2f}", "%", row["image"]]
            assert line.split() == words
        # the confidence is the probability of the digit
        model = loaded(run)
        picture = read_digit("3.png", "digits")
        output = model(images.normalise(picture, model.layers[0].weight.dtype)[None])
        sure = output.softmax(1).max().item()
        assert rows[3]["confidence"] == pytest.approx(sure, rel=1e-5)


def test_one_bad_picture_is_named(runs, capsys):
    run = runs[0]
    draw("good.png", 0)
    Path("bad.png").write_text("no picture")
    error = sentence(capsys, "predict", run, "good.png", "bad.png")
    assert "bad.png cannot be read as a picture" in error
    assert "none.png cannot be read" in sentence(capsys, "predict", run, "none.png")
    assert "at least one picture" in sentence(capsys, "predict", run)


# ---- runs that are none ---------------------------------------------------------------------


def test_a_folder_without_a_trained_network(runs, tmp_path, capsys):
    half = unfinished(runs[0], tmp_path / "half")
    Path("file").touch()
    Path("empty").mkdir()
    whole = (half / "checkpoint.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for command, *pictures in (("evaluate",), ("predict", "a.png")):
        for path in ("file", "empty", "nowhere"):
            error = sentence(capsys, command, path, *pictures)
            assert f"{path} holds no trained network (" in error
            assert "give the folder of a run of experiments/train.py" in error
        for content in (b"", b"text", whole[:-3000], bytes(flipped)):
            (half / "checkpoint.pt").write_bytes(content)
            assert "holds no trained network (" in sentence(capsys, command, half, *pictures)


# ---- data -----------------------------------------------------------------------------------


def test_data_check_only_looks(capsys, tmp_path):
    assert main(["data", "--check", "--data-root", "root"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(Path("root/MNIST/raw"))
    assert [line.split() for line in lines[1:]] == [[name, "missing"] for name in files.NAMES]
    assert main(["data", "--check", "--json"]) == 1  # the default root
    found = json.loads(capsys.readouterr().out)
    assert found["root"] == str(tmp_path / "cache" / "nn_backprop")
    assert found["files"] == dict.fromkeys(files.NAMES, "missing")
    assert list(tmp_path.iterdir()) == []
    assert "Connection refused" in sentence(capsys, "data", "--data-root", "root")


@pytest.mark.needs_mnist
def test_data_verifies_mnist(capsys, monkeypatch):
    monkeypatch.setenv("NN_BACKPROP_DATA", REAL_ROOT)
    for options in ([], ["--check"]):
        found = json.loads(printed(capsys, "data", "--json", *options))
        assert found["files"] == dict.fromkeys(files.NAMES, "ok")
    assert printed(capsys, "data", "--check").count(" ok") == 4


# ---- rules ----------------------------------------------------------------------------------


def test_rules_lists_the_table_and_prints_a_derivation(capsys):
    rows = json.loads(printed(capsys, "rules", "--json"))
    assert {row["name"] for row in rows} == {rule.name for rule in TABLE.values()}
    assert sum(len(row["callables"]) for row in rows) == len(TABLE)
    assert all(row["equations"] and row["callables"] for row in rows)
    text = printed(capsys, "rules").splitlines()
    for row in rows:
        start = text.index(row["name"])
        equations = text[start + 1 : start + 1 + len(row["equations"])]
        assert equations == [f"    {line}" for line in row["equations"]]

    text = printed(capsys, "rules", "linear")
    assert text.startswith("linear: ") and "torch.nn.functional.linear" in text
    (row,) = json.loads(printed(capsys, "rules", "linear", "--json"))
    assert row["name"] == "linear" and row["derived_in"].endswith("linear_forward")
    assert all(line in text for line in row["equations"])
    assert "there is no rule 'liner'; there are " in sentence(capsys, "rules", "liner")


# ---- the program ----------------------------------------------------------------------------


def test_a_wrong_command_line_and_help(capsys):
    wrong = [[], ["bogus"], ["evaluate"], ["predict"], ["rules", "a", "b"], ["data", "--chek"]]
    for arguments in wrong:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error and "Traceback" not in error, arguments
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("rules", "evaluate", "predict", "data"))


def test_a_reader_that_has_seen_enough(monkeypatch, capsys):
    """As `head` does: the pipe is closed before all is written, more than it holds and less; the
    less for a terminal without Unicode."""
    for encoding, name in (("utf-8", []), ("ascii", ["linear"])):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", encoding=encoding) as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert main(["rules", *name]) == 0  # and closes without a word
    assert capsys.readouterr().err == ""
