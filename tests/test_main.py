"""`python -m nn_backprop`: what it prints, and its exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline import go_offline
from PIL import Image

from nn_backprop.__main__ import main
from nn_backprop.data import files, load, read_digit
from nn_backprop.models import MODELS
from nn_backprop.rules import TABLE
from nn_backprop.tracking import monitor
from nn_backprop.training import (
    evaluate,
    fit,
    make_optimizer,
    make_schedule,
    read_checkpoint,
    save_checkpoint,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import train

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty working directory, no network, no MNIST."""
    go_offline(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def trained(folder: Path, precision: str) -> Path:
    """A run of the training script on the embedded digits."""
    path = folder / precision
    options = ["--data", "digits", "--model", "mlp", "--epochs", "3", "--run-dir", str(path)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor.Run, "figure", lambda *arguments, **options: None)  # slow to draw
        assert train.main([*options, "--precision", precision]) == 0
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [trained(folder, precision) for precision in ("float32", "float64", "bfloat16")]


@pytest.fixture(scope="module")
def run(runs) -> Path:
    return runs[0]


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


def digit(name: str, index: int) -> int:
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


def saved(folder: Path, model, images=None) -> None:
    """The checkpoint of a run with that MLP, trained for an epoch on the images,
    if there are any."""
    optimizer = make_optimizer("adam", model.parameters(), 4e-3, 0.1)
    schedule = make_schedule("constant", optimizer, 4e-3, 1)
    config = {"options": {"model": "mlp", "data_root": None}, "dataset": "digits"}
    config |= {"mean": 0.3, "std": 0.3}
    if images is not None:
        fit(
            model, train.for_training("by-hand"), optimizer, schedule, images,
            epochs=1, batch_size=512, seed=0,
        )  # fmt: skip
        config |= {"dataset": images.name, "mean": images.mean, "std": images.std}
    save_checkpoint(folder / "checkpoint.pt", model, optimizer, schedule, {"config": config})


def test_most_often_taken_for(capsys, tmp_path):
    """A network that takes everything for a 3."""
    model = MODELS["mlp"]()
    with torch.no_grad():
        model.layers[1].bias[3] += 1e6
    saved(tmp_path, model)
    found = json.loads(printed(capsys, "evaluate", tmp_path, "--json"))
    for row in found["digits"]:
        three = row["digit"] == 3
        assert row["accuracy"] == (1 if three else 0)
        assert row["most_taken_for"]["times"] == (0 if three else row["n"])
        assert three or row["most_taken_for"]["digit"] == 3


def test_a_run_that_goes_on_can_be_evaluated(runs, tmp_path, capsys):
    for run in runs:
        half, model = unfinished(run, tmp_path / run.name), MODELS["mlp"]()
        model.load_state_dict(read_checkpoint(half / "checkpoint.pt")["model"], assign=True)
        images = load("digits")
        expected = evaluate(model, images, images.test).accuracy
        (half / "config.json").write_text("{}")  # not needed: the checkpoint knows its own
        assert json.loads(printed(capsys, "evaluate", half, "--json"))["accuracy"] == expected


@pytest.mark.needs_mnist
def test_evaluate_on_mnist(capsys, tmp_path):
    model, images = MODELS["mlp"](), load("mnist", REAL_ROOT, say=lambda line: None)
    saved(tmp_path, model, images)
    out = printed(capsys, "evaluate", tmp_path, "--data-root", REAL_ROOT, "--json")
    found = json.loads(out)
    assert found["accuracy"] == evaluate(model, images, images.test).accuracy > 0.9
    assert sum(row["n"] for row in found["digits"]) == 10_000
    assert "nowhere" in sentence(capsys, "evaluate", tmp_path, "--data-root", "nowhere")


# ---- predict --------------------------------------------------------------------------------


def test_predict_names_the_digit_and_how_sure_it_is(runs, capsys):
    names, images = [f"{k}.png" for k in range(8)], load("digits")
    labels = [digit(name, k) for k, name in enumerate(names)]
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
        model = MODELS["mlp"]()
        model.load_state_dict(read_checkpoint(run / "checkpoint.pt")["model"], assign=True)
        picture = read_digit("3.png", "digits")
        output = model(images.normalise(picture, model.layers[0].weight.dtype)[None])
        sure = output.softmax(1).max().item()
        assert rows[3]["confidence"] == pytest.approx(sure, rel=1e-5)


def test_one_bad_picture_is_named(run, capsys):
    digit("good.png", 0)
    Path("bad.png").write_text("no picture")
    error = sentence(capsys, "predict", run, "good.png", "bad.png")
    assert "bad.png cannot be read as a picture" in error
    assert "none.png cannot be read" in sentence(capsys, "predict", run, "none.png")
    assert "at least one picture" in sentence(capsys, "predict", run)


# ---- runs that are none ---------------------------------------------------------------------


def test_a_folder_without_a_trained_network(run, tmp_path, capsys):
    half = unfinished(run, tmp_path / "half")
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


def test_data_that_cannot_be_fetched(capsys):
    assert "Connection refused" in sentence(capsys, "data", "--data-root", "root")


@pytest.mark.needs_mnist
def test_data_verifies_mnist(capsys, monkeypatch):
    monkeypatch.setenv("NN_BACKPROP_DATA", REAL_ROOT)
    for options in ([], ["--check"]):
        found = json.loads(printed(capsys, "data", "--json", *options))
        assert found["files"] == dict.fromkeys(files.NAMES, "ok")
    assert printed(capsys, "data", "--check").count(" ok") == 4


# ---- rules ----------------------------------------------------------------------------------


def test_rules_lists_the_table(capsys):
    rows = json.loads(printed(capsys, "rules", "--json"))
    assert {row["name"] for row in rows} == {rule.name for rule in TABLE.values()}
    assert sum(len(row["callables"]) for row in rows) == len(TABLE)
    assert all(row["equations"] and row["callables"] for row in rows)
    text = printed(capsys, "rules").splitlines()
    for row in rows:
        start = text.index(row["name"])
        equations = text[start + 1 : start + 1 + len(row["equations"])]
        assert equations == [f"    {line}" for line in row["equations"]]


def test_rules_prints_a_derivation(capsys):
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


@pytest.mark.parametrize("name, encoding", [("", "utf-8"), ("linear", "ascii")])
def test_a_reader_that_has_seen_enough(name, encoding):
    """As `head` does: the pipe is closed before all is written, more than it holds and less; the
    less for a terminal without Unicode."""
    command = f"{sys.executable} -m nn_backprop rules {name} | true; exit ${{PIPESTATUS[0]}}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment["PYTHONIOENCODING"] = encoding
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
