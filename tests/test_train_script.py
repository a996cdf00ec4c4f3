"""`experiments/train.py`, on the embedded digits: what a run leaves, and all that can go wrong."""

import ast
import json
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import fields
from pathlib import Path

import platformdirs
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from nn_backprop import __main__ as program
from nn_backprop import data, engines, figures
from nn_backprop.data import download
from nn_backprop.tracking import monitor
from nn_backprop.training import read_checkpoint

SCRIPT = Path(__file__).parents[1] / "experiments" / "train.py"
sys.path.insert(0, str(SCRIPT.parent))
import train  # noqa: E402

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
OPTIONS = [field.name for field in fields(train.Options)]
ENGINES, MODELS = ("autograd", "tape", "by-hand"), ("mlp", "happy", "cnn")
PARAMETERS = [f"layers.{k}.{kind}" for k in (0, 1) for kind in ("weight", "bias")]  # of the MLP
DIGITS = 1197  # for training: 10 batches of 128


class Sketches:
    """`figures`, but for those that take long to draw."""

    def __getattr__(self, name):
        if name == "weight_pixels":
            return figures.weight_pixels
        return lambda *arguments: Figure(figsize=(1, 1), dpi=20)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty working directory, no network, no MNIST, sketches for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # or tyro breaks its lines anywhere
    monkeypatch.delenv("NN_BACKPROP_DATA", raising=False)
    monkeypatch.setenv("NN_BACKPROP_MNIST_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(monitor, "figures", Sketches())


def digits(run, *options, model="mlp", epochs=2) -> int:
    """Trains on the embedded digits; returns the exit code."""
    arguments = ["--data", "digits", "--model", model, "--epochs", epochs, "--run-dir", run]
    return train.main([*map(str, arguments), *map(str, options)])


def resume(run, *options) -> int:
    return train.main(["--resume", str(run), *map(str, options)])


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(run: Path, copy: Path) -> Path:
    return Path(shutil.copytree(run, copy))


def sentence(capsys) -> str:
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1, error
    return error


def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Presses Ctrl-C after a step."""
    original = monitor.Monitor.step

    def pressed(self, done) -> None:
        original(self, done)
        if done.number == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(monitor.Monitor, "step", pressed)


# ---- what a run leaves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run with the figures drawn."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert digits(run, "--engine", "tape", "--precision", "float64", epochs=12) == 0
    return run


def test_the_files_of_a_run(finished):
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    files = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "figures"}
    assert names - events == files and len(events) == 1
    pictures = {path.name: Image.open(path) for path in (finished / "figures").iterdir()}
    assert pictures.keys() == {
        "confident_mistakes.png",
        "confusion_matrix.png",
        "first_layer_weights.png",
        "learning_curves.png",
        "precision_recall.png",
    }
    for picture in pictures.values():
        with picture:
            assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20


def test_the_summary(finished):
    found = summary(finished)
    wanted = {
        "dataset": "digits",
        "dataset_reason": "asked for",
        "model": "mlp",
        "engine": "tape",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "float64",
        "parameters": 784 * 128 + 128 + 128 * 10 + 10,
        "epochs": 12,
        "seed": 0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert 0 < found["train_seconds"] < found["wall_seconds"] < 600
    assert 0.9 < found["validation_accuracy"] <= 1 and 0.9 < found["test_accuracy"] <= 1
    assert 0 < found["test_loss"] < 0.5
    assert found["versions"]["torch"] == torch.__version__
    assert found.keys() >= {"commit", "versions"}
    last = records(finished)[-1]
    assert found["validation_accuracy"] == last["accuracy/validation"]
    disagreements = [
        value for r in records(finished) for tag, value in r.items() if "disagreement" in tag
    ]
    assert found["max_gradient_disagreement"] == max(disagreements) < 1e-12


def test_the_options_are_in_the_config(finished):
    options = json.loads((finished / "config.json").read_text())["options"]
    assert list(options) == OPTIONS
    assert options["run_dir"] == str(finished) and options["lr"] == train.DEFAULTS["mlp"]["lr"]


STEP_TAGS = {"loss/train", "learning_rate", "samples_per_second"}
STEP_TAGS |= {f"gradient_norm/{name}" for name in PARAMETERS}
EPOCH_TAGS = {"loss/validation", "accuracy/validation"}
EPOCH_TAGS |= {f"gradient_disagreement/{e}/{n}" for e in ("tape", "by-hand") for n in PARAMETERS}


def test_the_metrics(finished):
    """Steps 1 to 100 are all there, then each 50th; epochs from before the first step."""
    steps = [r for r in records(finished) if "loss/train" in r]
    epochs = [r for r in records(finished) if "loss/train" not in r]
    assert [r["step"] for r in steps] == list(range(1, 101))
    assert [r["epoch"] for r in steps] == [k // 10 for k in range(100)]
    assert [(r["step"], r["epoch"]) for r in epochs] == [(10 * k, k) for k in range(13)]
    assert all(r.keys() == {"step", "epoch"} | STEP_TAGS for r in steps)
    assert all(r.keys() == {"step", "epoch"} | EPOCH_TAGS for r in epochs)
    assert steps[0]["loss/train"] != round(steps[0]["loss/train"], 12)  # all 17 digits
    assert all(r["samples_per_second"] > 0 for r in steps)


def test_after_the_first_hundred_each_fiftieth_step_is_logged():
    run = Path("run")
    assert digits(run, "--batch-size", 5, "--schedule", "constant", epochs=1) == 0
    steps = [r["step"] for r in records(run) if "loss/train" in r]
    assert steps == [*range(1, 101), 150, 200]


def test_the_panels_of_tensorboard(finished):
    events = EventAccumulator(
        str(finished), size_guidance=dict.fromkeys(("tensors", "images", "histograms"), 0)
    ).Reload()
    tags = events.Tags()
    logged = [(r["step"], tag) for r in records(finished) for tag in r]
    final = {"validation_accuracy", "test_accuracy", "test_loss", "max_gradient_disagreement"}
    assert set(tags["scalars"]) == STEP_TAGS | EPOCH_TAGS | {f"final/{name}" for name in final}
    for tag in STEP_TAGS | EPOCH_TAGS:
        assert [event.step for event in events.Scalars(tag)] == [s for s, t in logged if t == tag]
    epochs = [10 * k for k in range(13)]
    for name in PARAMETERS:
        shown = [event.step for event in events.Histograms(f"weights/{name}")]
        assert shown == epochs
        shown = [event.step for event in events.Histograms(f"gradients/{name}")]
        assert shown == epochs[1:]  # there is none before training
    assert [image.step for image in events.Images("figures/first_layer")] == epochs
    drawn = ("confusion_matrix", "confident_mistakes", "precision_recall", "learning_curves")
    for name in drawn:
        (image,) = events.Images(f"figures/{name}")
        png = (finished / "figures" / f"{name}.png").read_bytes()
        assert (image.step, image.encoded_image_string) == (120, png)
    for digit in range(10):
        assert events.SummaryMetadata(f"digit_{digit}").plugin_data.plugin_name == "pr_curves"
    assert tags["graph"]
    start = HParamsPluginData.FromString(
        events.PluginTagToContent(HPARAMS)["_hparams_/session_start_info"]
    )
    assert set(start.session_start_info.hparams) == set(OPTIONS)


def test_every_option_has_its_sentence():
    (options,) = [
        node
        for node in ast.parse(SCRIPT.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Options"
    ]
    body = options.body[1:]  # after the docstring
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        assert len(text.value.value) > 10 and text.value.value.endswith(".")
    assert len(body) == 2 * len(OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, epochs",
    [
        ("net5", 2),
        ("net5-unshared", 2),
        ("locally-connected", 2),
        ("shared-weights", 2),
        ("tied", 2),
        ("lenet-300-100", 2),
        ("lenet-5", 1),
        ("sparse-cnn", 2),
    ],
)
def test_a_network_trains_is_evaluated_and_predicts(model, epochs, tmp_path, capsys):
    """16 × 16 pixels for the networks of 1989, and first layers of every form, for the pictures."""
    run = tmp_path / "run"
    arguments = ["--model", model, "--data", "digits", "--epochs", str(epochs)]
    arguments += ["--run-dir", str(run)]
    assert train.main([*arguments, "--engine", "tape"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["max_gradient_disagreement"] < 1e-12
    assert summary["validation_accuracy"] > 0.5  # chance is 0.1
    capsys.readouterr()
    assert program.main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["test_accuracy"]
    picture = tmp_path / "one.png"
    image = data.load("digits").images[0, 0]
    Image.fromarray(image.numpy()).save(picture)
    assert program.main(["predict", str(run), str(picture), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 <= row["digit"] <= 9 and 0.1 < row["confidence"] <= 1


@pytest.mark.slow
def test_the_boost_of_k_winners_decays_at_every_epoch(tmp_path):
    arguments = ["--model", "sparse-cnn", "--data", "digits", "--epochs", "2"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 0
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"]
    strengths = [float(value) for name, value in state.items() if name.endswith("strength")]
    assert strengths == pytest.approx(3 * [1.5 * 0.85**2])
    assert state["active1.examples"] > 0 and state["active1.duty_cycle"].any()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in OPTIONS)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_open_suits_the_model(model):
    options = train.read_options(["--model", model])
    assert {name: getattr(options, name) for name in train.DEFAULTS[model]} == train.DEFAULTS[model]
    assert train.read_options(["--model", model, "--lr", "0.5"]).lr == 0.5
    assert train.read_options([]).model == "cnn"


@pytest.mark.parametrize("native", [True, False])
def test_a_preset_chooses_and_what_is_given_beside_it_counts(native, monkeypatch):
    monkeypatch.setattr(train, "has_bfloat16", lambda device: native)
    fast = train.read_options(["--preset", "fast"])
    assert fast.model == "fast-cnn" and not fast.augment
    assert fast.precision == ("bfloat16" if native else "float32")
    assert (fast.epochs, fast.lr) == (1, train.DEFAULTS["fast-cnn"]["lr"])
    accurate = train.read_options(["--preset", "accurate", "--epochs", "2", "--no-augment"])
    assert (accurate.model, accurate.epochs, accurate.augment) == ("accurate-cnn", 2, False)
    assert train.read_options(["--preset", "accurate"]).augment
    assert train.read_options(["--precision", "float64", "--preset", "fast"]).precision == "float64"
    assert train.read_options([]).precision == "float32"


@pytest.mark.parametrize("preset", train.PRESETS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_presets_learn_the_digits_and_go_on_where_they_were_stopped(
    preset, precision, monkeypatch
):
    options = ["--preset", preset, "--precision", precision, "--data", "digits", "--epochs", "6"]
    assert train.main([*options, "--run-dir", "whole"]) == 0
    summary = json.loads(Path("whole/summary.json").read_text())
    assert summary["test_accuracy"] > 0.9 and summary["precision"] == precision
    assert summary["max_gradient_disagreement"] < 1e-10
    real = train.fit
    monkeypatch.setattr(
        train, "fit", lambda *a, stop, on_step, **k: real(
            *a, on_step=lambda step: (on_step(step), seen.append(step.number)),
            stop=lambda: seen[-1:] == [13], **k,
        ),
    )  # fmt: skip
    seen: list[int] = []
    assert train.main([*options, "--run-dir", "parts"]) == 130
    monkeypatch.setattr(train, "fit", real)
    assert train.main(["--resume", "parts"]) == 0
    ends = [read_checkpoint(f"{run}/checkpoint.pt")["model"] for run in ("whole", "parts")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("size", [1, 4, DIGITS - 1])
def test_a_batch_of_one_image_is_refused_where_it_is_normalised(size, capsys):
    assert digits("run", "--batch-size", size, model="fast-cnn") == 2
    assert f"--batch-size {size} leaves a batch of one image" in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_largest_seed_augments(capsys):
    assert digits("run", "--augment", "--seed", 2**31 - 1, model="mlp", epochs=1) == 0


def test_the_kernel_network_learns_the_digits():
    assert digits("run", "--engine", "tape", model="kernel", epochs=3) == 0
    found = summary(Path("run"))
    assert found["test_accuracy"] > 0.8 and found["parameters"] == 40_970
    assert found["max_gradient_disagreement"] < 1e-10
    before, after = (
        make()["features.weight"]
        for make in (
            lambda: train.MODELS["kernel"]().state_dict(),
            lambda: read_checkpoint("run/checkpoint.pt")["model"],
        )
    )
    assert torch.equal(before, after)  # the filters are fixed


def test_by_hand_is_for_the_networks_that_are_written_out(capsys):
    assert digits("run", "--engine", "by-hand", model="fast-cnn") == 2
    said = capsys.readouterr().err
    assert "--engine by-hand is written out for the MLP and the CNN, not for fast-cnn" in said
    assert not Path("run").exists()


def test_a_run_without_a_folder_goes_under_runs():
    assert train.main(["--data", "digits", "--model", "happy", "--epochs", "1"]) == 0
    (run,) = Path("runs/train").iterdir()
    assert run.name.endswith("-happy") and (run / "summary.json").exists()


def test_the_options_reach_the_loop(monkeypatch):
    seen = {}

    def spy(model, engine, optimizer, schedule, data, **arguments):
        seen.update(arguments, optimizer=optimizer, schedule=schedule)
        return 0

    monkeypatch.setattr(train, "fit", spy)
    options = {"seed": 5, "batch-size": 7, "lr": 0.25, "weight-decay": 0.5, "optimizer": "sgd"}
    options |= {"precision": "bfloat16", "schedule": "constant"}
    assert digits("run", *[w for k, v in options.items() for w in (f"--{k}", v)], epochs=3) == 130
    wanted = {"seed": 5, "batch_size": 7, "epochs": 3, "dtype": torch.bfloat16, "done": 0}
    assert {name: seen[name] for name in wanted} == wanted
    (group,) = seen["optimizer"].param_groups
    assert type(seen["optimizer"]) is torch.optim.SGD
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert type(seen["schedule"]) is torch.optim.lr_scheduler.LambdaLR


def test_the_seed_is_that_of_the_weights():
    weights = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert digits(run, "--seed", seed, model="happy", epochs=1) == 0
        weights.append(read_checkpoint(f"{run}/checkpoint.pt")["model"]["layers.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_threads_are_set(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert digits("run", "--threads", 3, model="happy", epochs=1) == 0
    assert chosen == [3]


# ---- the engines ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_engines_give_the_same_losses(model):
    """In float64, to 1e-9, for the first 100 steps."""
    losses = {}
    for engine in ENGINES:
        run = Path(engine)
        options = ["--engine", engine, "--precision", "float64", "--batch-size", 11]
        assert digits(run, *options, model=model, epochs=1) == 0
        steps = {r["step"]: r["loss/train"] for r in records(run) if "loss/train" in r}
        losses[engine] = [steps[k] for k in range(1, 101)]
    assert losses["tape"] == pytest.approx(losses["autograd"], rel=1e-9, abs=0)
    assert losses["by-hand"] == pytest.approx(losses["autograd"], rel=1e-9, abs=0)
    assert losses["autograd"][-1] < 0.9 * losses["autograd"][0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_every_precision_learns(model, precision, engine):
    run = Path("run")
    assert digits(run, "--engine", engine, "--precision", precision, model=model, epochs=1) == 0
    assert summary(run)["test_accuracy"] > 0.5  # chance is 0.1
    kept = torch.float64 if precision == "float64" else torch.float32
    weights = read_checkpoint(run / "checkpoint.pt")["model"].values()
    assert {value.dtype for value in weights} == {kept}


def test_the_precision_makes_a_difference():
    losses = set()
    for precision in ("float32", "float64", "bfloat16"):
        assert digits(Path(precision), "--precision", precision, epochs=1) == 0
        losses.add(records(Path(precision))[5]["loss/train"])
    assert len(losses) == 3


def test_a_wrong_engine_shows_in_the_log_and_in_the_summary(monkeypatch, capsys):
    def spoilt(model, inputs, targets):
        loss = engines.tape(model, inputs, targets)
        model.layers[1].weight.grad *= 1.001
        return loss

    monkeypatch.setitem(engines.ENGINES, "tape", spoilt)
    run = Path("run")
    assert digits(run, epochs=1) == 0
    assert summary(run)["max_gradient_disagreement"] == pytest.approx(1e-3, rel=1e-6)
    for record in (records(run)[0], records(run)[-1]):
        wrong = {t for t, v in record.items() if t.startswith("gradient_dis") and v > 1e-12}
        assert wrong == {"gradient_disagreement/tape/layers.1.weight"}
    assert "1.0e-03 at most" in capsys.readouterr().out


def test_the_engines_are_compared_without_float64_on_the_device(monkeypatch):
    """An Apple GPU has none: `disagreement` moves what it is given to the processor first."""
    seen = set()

    def spy(model, inputs, targets):
        seen.add(inputs.dtype)
        return engines.disagreements(model, inputs, targets)

    monkeypatch.setattr(monitor, "disagreement", spy)
    assert digits("run", epochs=1) == 0
    assert seen == {torch.float32}


# ---- the data -------------------------------------------------------------------------------


def test_without_mnist_the_digits_are_taken_and_it_is_said(capsys, monkeypatch):
    options = ["--model", "mlp", "--epochs", "2", "--run-dir", "run"]
    interrupt_at(monkeypatch, 3)
    assert train.main(options) == 130
    assert "*** MNIST could not be had" in capsys.readouterr().out
    monkeypatch.setenv("NN_BACKPROP_DATA", "elsewhere")
    assert resume("run") == 0
    reason = summary(Path("run"))["dataset_reason"]
    assert summary(Path("run"))["dataset"] == "digits"
    assert reason.startswith("MNIST could not be had") and "elsewhere" not in reason
    printed = capsys.readouterr().out
    assert "*** MNIST" not in printed  # it was not even looked for
    why = reason.partition(" (")[0]
    assert f"*** Trained on the embedded digits, not on MNIST: {why}\n" in printed


@pytest.mark.skipif(not REAL_ROOT, reason="$NN_BACKPROP_DATA names no folder with MNIST")
def test_real_mnist(capsys):
    options = ["--data", "mnist", "--data-root", REAL_ROOT, "--model", "mlp", "--epochs", "1"]
    assert train.main([*options, "--engine", "by-hand", "--run-dir", "run"]) == 0
    found = summary(Path("run"))
    assert found["dataset"] == "mnist" and found["test_accuracy"] > 0.9
    assert found["dataset_reason"].startswith("MNIST found in ")
    assert "***" not in capsys.readouterr().out


# ---- bad input ------------------------------------------------------------------------------

BAD = {
    "preset": ["slow", ""],
    "model": ["vgg", ""],
    "engine": ["jax"],
    "device": ["tpu"],
    "precision": ["float16"],
    "epochs": ["0", "-1", "1.5", "many", str(2**31)],
    "batch_size": ["0", "-3", "x", str(2**31)],
    "lr": ["0", "-0.1", "nan", "inf", "x", "1e31"],
    "optimizer": ["lbfgs"],
    "schedule": ["cosine"],
    "weight_decay": ["-1", "nan", "inf", "x"],
    "augment": ["perhaps"],
    "graph": ["perhaps"],
    "seed": ["-1", "0.5", "x", str(2**31)],
    "threads": ["0", "-2", "x", "1000000000"],
    "data": ["cifar"],
    "data_root": [None],
    "run_dir": [None],
    "resume": [None, "nowhere", ""],
}


def test_no_option_is_forgotten():
    assert list(BAD) == OPTIONS


@pytest.mark.parametrize("option, value", [(o, v) for o, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_name(option, value, capsys, tmp_path):
    flag = f"--{option.replace('_', '-')}"
    wrong = [flag] if value is None else [flag, value]  # None: the value is missing
    try:
        code = train.main(["--data", "digits", "--run-dir", "run", *wrong])
    except SystemExit as exit:  # tyro's own way
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if option in ("augment", "graph"):  # which take no value
        assert value in error
    elif option == "resume" and value is not None:
        assert f"{value or '.'} holds no run that can be resumed" in error
    else:
        assert flag in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train.main(["--leaning-rate", "1"])
    assert exit.value.code == 2 and "--leaning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("there, precision", [(False, "float32"), (True, "float64")])
def test_a_device_that_cannot_be_had(there, precision, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    assert digits("run", "--device", "mps", "--precision", precision) == 2
    assert "--device mps" in sentence(capsys)
    if not there:
        assert digits("run", "--device", "cuda") == 2
        assert "--device cuda: torch finds none here; choose auto or cpu" in sentence(capsys)
    assert not Path("run").exists()


def test_auto_takes_the_processor_for_float64_beside_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = [train._device(train.Options(precision=p)).type for p in ("float32", "float64")]
    assert chosen == ["mps", "cpu"]


def test_a_data_root_without_mnist(capsys):
    Path("file").touch()
    for root in ("file", "nowhere"):
        assert train.main(["--data", "mnist", "--data-root", root, "--run-dir", "run"]) == 2
        assert root in sentence(capsys)
    assert not Path("run").exists()


def test_a_run_is_not_written_over(finished, capsys):
    before = contents(finished)
    assert digits(finished) == 2
    assert "already holds a run" in sentence(capsys)
    assert contents(finished) == before


def test_a_folder_that_cannot_be_written(monkeypatch, capsys):
    Path("file").write_text("precious")
    for path in ("file", "file/below", "x" * 300):
        assert digits(path) == 2
        assert "cannot be a run directory" in sentence(capsys)
    assert Path("file").read_text() == "precious"

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert digits("run") == 2
    assert "run cannot be a run directory (Permission denied)" in sentence(capsys)


# ---- a loss that is not finite --------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_a_run_that_diverges_says_so_and_keeps_what_was_good(precision, capsys):
    run = Path("run")
    options = ["--lr", 1e6, "--optimizer", "sgd", "--schedule", "constant", "--batch-size", 5]
    assert digits(run, *options, "--precision", precision) == 1
    error = sentence(capsys)
    pattern = r"the loss became (nan|inf) at step (\d+), with learning rate 1e\+06"
    value, step = re.search(pattern, error).groups()
    assert "The last good checkpoint is kept" in error
    logged = {r["step"]: r["loss/train"] for r in records(run) if "loss/train" in r}
    assert list(logged)[: int(step)] == list(range(1, int(step) + 1))  # nothing is lost
    assert str(logged[int(step)]) == value
    state = read_checkpoint(run / "checkpoint.pt")
    assert state["progress"]["step"] == 0
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_last_step_that_diverges_is_found_too(optimizer, capsys):
    """Its own loss was finite; the update made of it is not."""
    run = Path("run")
    options = ["--lr", 1e30, "--optimizer", optimizer, "--schedule", "constant"]
    assert digits(run, *options, "--batch-size", 5000, epochs=1) == 1
    assert "validation loss became nan at step 1, with learning rate 1e+30" in sentence(capsys)
    assert read_checkpoint(run / "checkpoint.pt")["progress"]["step"] == 0
    assert records(run)[-1]["step"] == 1


# ---- stopping and going on ------------------------------------------------------------------


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def assert_same_run(actual: Path, expected: Path) -> None:
    """To the last bit, but for the clock."""
    states = [read_checkpoint(run / "checkpoint.pt") for run in (actual, expected)]
    steps = [state.pop("progress")["step"] for state in states]
    assert steps[0] == steps[1] and same(*states)
    logged = [
        [without(r, "samples_per_second") for r in records(run)] for run in (actual, expected)
    ]
    assert logged[0] == logged[1]
    clocks = ("train_seconds", "logging_seconds", "wall_seconds")
    assert without(summary(actual), *clocks) == without(summary(expected), *clocks)


@pytest.mark.parametrize(
    "model, options, step",
    [
        ("mlp", ["--optimizer", "adam", "--schedule", "one-cycle", "--engine", "tape"], 1),
        ("mlp", ["--optimizer", "sgd", "--schedule", "constant", "--engine", "by-hand"], 7),
        ("mlp", ["--optimizer", "adam", "--schedule", "one-cycle"], 10),  # as an epoch ends
        ("mlp", ["--precision", "bfloat16"], 13),
        ("happy", ["--precision", "float64", "--batch-size", 128], 19),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(model, options, step, monkeypatch, capsys):
    whole, parts = Path("whole"), Path("parts")
    assert digits(whole, *options, model=model) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        assert digits(parts, *options, model=model) == 130
    state = read_checkpoint(parts / "checkpoint.pt")
    assert state["progress"]["step"] == step and records(parts)[-1]["step"] == step
    assert not (parts / "summary.json").exists()
    printed = capsys.readouterr().out
    assert f"Stopped after step {step} of 20; go on with" in printed
    assert printed.endswith(f"    python experiments/train.py --resume {parts}\n")
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_the_clocks_of_a_resumed_run_go_on(stopped, tmp_path):
    run = copied(stopped, tmp_path / "run")
    state = read_checkpoint(run / "checkpoint.pt")
    clocks = ("train_seconds", "logging_seconds", "wall_seconds")
    assert all(0 < state["progress"][clock] < 60 for clock in clocks)
    state["progress"] |= dict.fromkeys(clocks, 1000.0)
    torch.save(state, run / "checkpoint.pt")
    assert resume(run) == 0
    assert all(1000 < summary(run)[clock] < 1060 for clock in clocks)
    speeds = [r["samples_per_second"] for r in records(run) if "loss/train" in r]
    assert min(speeds) > 100  # not as if the seconds before had gone into one step


def test_the_clock_of_training_stops_during_evaluation(monkeypatch):
    """A step takes 2 s here, and the evaluation of an epoch 1000 s."""
    now, step, evaluate = [0.0], monitor.Monitor.step, monitor.evaluate

    def slow_step(self, done) -> None:
        now[0] += 2
        step(self, done)

    def slow_evaluation(*arguments):
        now[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(monitor.Monitor, "step", slow_step)
    monkeypatch.setattr(monitor, "evaluate", slow_evaluation)
    run = Path("run")
    assert digits(run) == 0
    assert summary(run)["train_seconds"] == 20 * 2
    assert summary(run)["wall_seconds"] == 20 * 2 + 3 * 1000
    speeds = [r["samples_per_second"] for r in records(run) if "loss/train" in r]
    assert speeds == 2 * [*(9 * [128 / 2]), 45 / 2]  # the last batch of an epoch has 45
    assert digits("long", "--batch-size", 5, epochs=1) == 0
    speeds = [r["samples_per_second"] for r in records(Path("long")) if "loss/train" in r]
    assert speeds == 102 * [5 / 2]  # the last two of them over 50 steps


def test_a_cnn_that_is_stopped_twice_is_the_uninterrupted_one(monkeypatch):
    whole, parts = Path("whole"), Path("parts")
    assert digits(whole, model="cnn") == 0
    for step in (4, 16):
        with monkeypatch.context() as patched:
            interrupt_at(patched, step)
            assert (resume(parts) if parts.exists() else digits(parts, model="cnn")) == 130
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_ctrl_c_before_the_first_step(monkeypatch, capsys):
    whole, parts = Path("whole"), Path("parts")
    assert digits(whole) == 0
    original = monitor.Monitor.epoch

    def pressed(self, *numbers) -> None:
        original(self, *numbers)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(monitor.Monitor, "epoch", pressed)
        assert digits(parts) == 130
    assert "Stopped after step 0 of 20" in capsys.readouterr().out
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_ctrl_c_at_the_last_step_comes_too_late(monkeypatch):
    interrupt_at(monkeypatch, 20)
    assert digits("run") == 0
    assert summary(Path("run"))["epochs"] == 2


def test_ctrl_c_while_the_data_are_loaded(monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if pytest is in background

    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return data.load(*arguments)

    monkeypatch.setattr(train, "load", pressed)
    assert digits("run") == 130
    assert "interrupted" in sentence(capsys)
    assert not Path("run").exists()


def test_a_second_ctrl_c_ends_the_run_at_once(monkeypatch, capsys):
    interrupt_at(monkeypatch, 3)
    interrupt_at(monkeypatch, 3)
    assert digits("run") == 130
    assert "interrupted" in sentence(capsys)
    assert read_checkpoint("run/checkpoint.pt")["progress"]["step"] == 0
    monkeypatch.undo()


def test_a_run_that_was_killed_while_it_drew_its_figures(finished, tmp_path, monkeypatch):
    whole, parts = Path("whole"), Path("parts")
    assert digits(whole) == 0

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(monitor.Monitor, "finish", killed)
        digits(parts)
    assert not (parts / "summary.json").exists()
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = contents(finished)
    assert resume(finished) == 0
    assert resume(finished, "--epochs", 12, "--model", "mlp", "--run-dir", finished) == 0
    assert "is complete" in capsys.readouterr().out
    assert contents(finished) == before


OTHER = {
    "preset": "fast",
    "model": "cnn",
    "engine": "autograd",
    "device": "cpu",
    "precision": "float32",
    "epochs": "13",
    "batch_size": "64",
    "lr": "0.005",
    "optimizer": "sgd",
    "schedule": "constant",
    "weight_decay": "0",
    "augment": "",
    "graph": "",
    "seed": "1",
    "threads": "2",
    "data": "mnist",
    "data_root": "elsewhere",
    "run_dir": "elsewhere",
}


def test_no_contradiction_is_forgotten():
    assert [*OTHER, "resume"] == OPTIONS


@pytest.mark.parametrize("option", OTHER)
def test_an_option_that_contradicts_the_run_is_refused(finished, option, capsys):
    before = contents(finished)
    flag = f"--{option.replace('_', '-')}"
    shown = f" {OTHER[option]}" if OTHER[option] else ""
    shown = " 0.0" if option == "weight_decay" else shown
    assert resume(finished, flag, *OTHER[option].split()) == 2
    assert f"{flag}{shown} contradicts the run in {finished}" in sentence(capsys)
    assert contents(finished) == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was interrupted after step 7."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 7)
        assert digits(run) == 130
    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(change):
    def changed(path: Path) -> None:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return changed


DAMAGE = {
    "no config": ("config.json", Path.unlink),
    "empty config": ("config.json", lambda path: path.write_text("")),
    "binary config": ("config.json", lambda path: path.write_bytes(b"\xff\xfe\0")),
    "list for config": ("config.json", lambda path: path.write_text("[1]")),
    "config without options": ("config.json", edit(lambda c: c.pop("options"))),
    "config without data set": ("config.json", edit(lambda c: c.pop("dataset"))),
    "more epochs": ("config.json", edit(lambda c: c["options"].update(epochs=3))),
    "unknown model": ("config.json", edit(lambda c: c["options"].update(model="vgg"))),
    "option of another type": ("config.json", edit(lambda c: c["options"].update(lr="fast"))),
    "no checkpoint": ("checkpoint.pt", Path.unlink),
    "empty checkpoint": ("checkpoint.pt", lambda path: path.write_bytes(b"")),
    "text for checkpoint": ("checkpoint.pt", lambda path: path.write_text("hello")),
    "other checkpoint": ("checkpoint.pt", lambda path: torch.save({"model": 1}, path)),
    "cut checkpoint": ("checkpoint.pt", cut),
    "flipped bit": ("checkpoint.pt", flip),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_refused_and_left_as_it_is(stopped, damage, tmp_path, capsys):
    run = copied(stopped, tmp_path / "run")
    name, change = DAMAGE[damage]
    change(run / name)
    before = contents(run)
    assert resume(run) == 2
    assert f"{run} holds no run that can be resumed (" in sentence(capsys)
    assert contents(run) == before


def test_a_checkpoint_of_another_network_is_refused(stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.MODELS, "mlp", lambda: torch.nn.Linear(3, 5))
    before = contents(stopped)
    assert resume(stopped) == 2
    assert "is of another version of this program (RuntimeError" in sentence(capsys)
    assert contents(stopped) == before


# ---- as a program ---------------------------------------------------------------------------


def test_killed_between_checkpoints_it_goes_on_from_the_last(monkeypatch):
    """Killed in the second epoch: the steps after the checkpoint are dropped and done again."""
    whole, parts = Path("whole").absolute(), Path("parts").absolute()
    assert digits(whole, "--threads", 1) == 0  # the order of a sum depends on their number
    program = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_train_script as tests, pytest
tests.monitor.figures = tests.Sketches()
with pytest.MonkeyPatch.context() as patched:
    tests.interrupt_at(patched, 17, signal.SIGKILL)
    tests.digits(sys.argv[2], "--threads", 1)
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_checkpoint(parts / "checkpoint.pt")["progress"]["step"] == 10
    assert records(parts)[-1]["step"] == 17
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "epo')  # cut off while it was written
    (parts / "checkpoint.pt.tmp").write_bytes(b"half")
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_ctrl_c_in_a_terminal():
    """A bar shows the progress there; the exit code is 130; the command to go on is complete."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, str(SCRIPT), "--data", "digits", "--model", "happy"]
    command += ["--epochs", "1000", "--threads", "1", "--run-dir", "my run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = bytearray()

    def watch() -> None:
        try:
            while part := os.read(ours, 10_000):
                shown.extend(part)
        except OSError:  # how Linux tells the end
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("epoch   2 "):
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    watcher.join()
    os.close(ours)
    process.stdout.close()
    assert b"step/s" in shown and b"Traceback" not in shown
    assert printed[-1] == "    python experiments/train.py --resume 'my run'\n"
    step = int(re.fullmatch(r"Stopped after step (\d+) of 38000; .*\n", printed[-2]).group(1))
    assert step >= 76
    assert read_checkpoint("my run/checkpoint.pt")["progress"]["step"] == step


def test_without_a_terminal_there_is_no_bar(capfd):
    assert digits("run", epochs=1) == 0
    assert capfd.readouterr().err == ""


def test_ctrl_c_during_the_imports_is_not_lost(tmp_path):
    """Somewhere in the second that they take an exception may be caught, and the key forgotten."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_after_the_imports_ctrl_c_is_an_exception_again(monkeypatch, capsys):
    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(data, "load", pressed)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended without a word"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--run-dir", "run"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.value.code == 130 and "interrupted" in sentence(capsys)


def test_the_help_gives_the_defaults_of_each_model(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("epochs", "batch_size", "lr", "weight_decay"):
        values = [f"{train.DEFAULTS[model][option]} ({model})" for model in ("cnn", "mlp", "happy")]
        pattern = ", ".join(map(re.escape, values[:2])) + "( or|,) " + re.escape(values[2])
        assert re.search(pattern, shown), values
