"""`experiments/train.py`, on the embedded digits: what a run leaves, and what is refused.

Stopping, going on, and losses that are not finite are in test_train_resume.py.
"""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from properties import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS
from training_run import (
    after_step,
    command,
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

from nn_backprop import __main__ as program
from nn_backprop import data, engines, training
from nn_backprop.tracking import monitor

pytestmark = pytest.mark.usefixtures("offline")

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
OPTIONS = [field.name for field in fields(train.Options)]
ENGINES = "autograd", "tape", "by-hand"
PARAMETERS = [f"layers.{k}.{kind}" for k in (0, 1) for kind in ("weight", "bias")]  # of the MLP
FINAL_FIGURES = "confident_mistakes", "confusion_matrix", "learning_curves", "precision_recall"


@pytest.fixture
def refused(capsys):
    def refused(said: str, code: int) -> None:
        assert code == 2 and said in sentence(capsys)

    return refused


# ---- what a run leaves ----------------------------------------------------------------------


STEP_TAGS = {"loss/train", "learning_rate", "samples_per_second"}
STEP_TAGS |= {f"gradient_norm/{name}" for name in PARAMETERS}
EPOCH_TAGS = {"loss/validation", "accuracy/validation"}
EPOCH_TAGS |= {f"gradient_disagreement/{e}/{n}" for e in ("tape", "by-hand") for n in PARAMETERS}


def test_what_a_run_leaves():
    """A whole run with the figures drawn, once, on whichever processor the tests run."""
    run = Path("finished").absolute()
    assert digits(run, "--engine", "tape", "--precision", "float64", epochs=12, drawn=True) == 0
    names = {path.name for path in run.iterdir()}
    (events,) = run.glob("events.out.tfevents.*")
    files = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "figures"}
    assert names == files | {events.name}
    options = json.loads((run / "config.json").read_text())["options"]
    assert list(options) == OPTIONS
    assert options["run_dir"] == str(run) and options["lr"] == train.DEFAULTS["mlp"]["lr"]

    # steps 1 to 100 are all there, then each 50th; epochs from before the first step
    of_steps = [r for r in records(run) if "loss/train" in r]
    epochs = [r for r in records(run) if "loss/train" not in r]
    assert [(r["step"], r["epoch"]) for r in of_steps] == [(k + 1, k // 10) for k in range(100)]
    assert [(r["step"], r["epoch"]) for r in epochs] == [(10 * k, k) for k in range(13)]
    assert all(r.keys() == {"step", "epoch"} | STEP_TAGS for r in of_steps)
    assert all(r.keys() == {"step", "epoch"} | EPOCH_TAGS for r in epochs)
    assert of_steps[0]["loss/train"] != round(of_steps[0]["loss/train"], 12)  # all 17 digits

    found = summary(run)
    wanted = {
        "dataset": "digits", "dataset_reason": "asked for", "model": "mlp", "engine": "tape",
        "device": "cuda" if torch.cuda.is_available() else "cpu", "precision": "float64",
        "parameters": 784 * 128 + 128 + 128 * 10 + 10, "epochs": 12, "seed": 0,
        "validation_accuracy": epochs[-1]["accuracy/validation"],
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted and "commit" in found
    assert 0 < found["train_seconds"] < found["wall_seconds"] < 600
    assert 0.9 < found["validation_accuracy"] <= 1 and 0.9 < found["test_accuracy"] <= 1
    assert 0 < found["test_loss"] < 0.5 and found["versions"]["torch"] == torch.__version__
    disagreements = [v for r in epochs for tag, v in r.items() if "disagreement" in tag]
    assert found["max_gradient_disagreement"] == max(disagreements) < 1e-12
    what_tensorboard_shows_is_right(run)


def what_tensorboard_shows_is_right(run: Path) -> None:
    sizes = dict.fromkeys(("tensors", "images", "histograms"), 0)
    events = EventAccumulator(str(run), size_guidance=sizes).Reload()
    final = {"validation_accuracy", "test_accuracy", "test_loss", "max_gradient_disagreement"}
    tags = STEP_TAGS | EPOCH_TAGS | {f"final/{name}" for name in final}
    assert set(events.Tags()["scalars"]) == tags and events.Tags()["graph"]
    epochs = [10 * k for k in range(13)]
    for name in PARAMETERS:
        assert [event.step for event in events.Histograms(f"weights/{name}")] == epochs
        shown = [event.step for event in events.Histograms(f"gradients/{name}")]
        assert shown == epochs[1:]  # there is none before training
    assert [image.step for image in events.Images("figures/first_layer")] == epochs
    names = {path.stem for path in (run / "figures").iterdir()}
    assert names == {"first_layer_weights", *FINAL_FIGURES}
    for name in names:
        (image,) = events.Images(f"figures/{name}")
        with Image.open(run / "figures" / f"{name}.png") as picture:
            assert image.step == 120 and picture.size == (image.width, image.height)
            assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20
    assert {f"digit_{digit}" for digit in range(10)} <= set(events.Tags()["tensors"])
    assert len(events.PluginTagToContent(HPARAMS)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", [
    "net5", "net5-unshared", "locally-connected", "shared-weights", "tied", "lenet-300-100",
    "lenet-5", "sparse-cnn", "kernel",
])  # fmt: skip
def test_a_network_trains_is_evaluated_and_predicts(model, capsys):
    """16 × 16 pixels for the networks of 1989, and first layers of every form, for the pictures."""
    epochs = {"lenet-5": 1, "kernel": 3}.get(model, 2)
    assert digits("run", "--engine", "tape", model=model, epochs=epochs) == 0
    found, state = summary("run"), state_of("run")["model"]
    assert found["max_gradient_disagreement"] < 1e-12
    assert found["validation_accuracy"] > 0.5  # chance is 0.1
    capsys.readouterr()
    assert program.main(["evaluate", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == found["test_accuracy"]
    Image.fromarray(data.load("digits").images[0, 0].numpy()).save("one.png")
    assert program.main(["predict", "run", "one.png", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 <= row["digit"] <= 9 and 0.1 < row["confidence"] <= 1

    if model == "sparse-cnn":  # the boost decays at every epoch
        strengths = [float(value) for name, value in state.items() if name.endswith("strength")]
        assert strengths == pytest.approx(3 * [1.5 * 0.85**2])
        assert state["active1.examples"] > 0 and state["active1.duty_cycle"].any()
    if model == "kernel":  # the filters are fixed
        fresh = train.MODELS["kernel"]().state_dict()
        assert torch.equal(state["features.weight"], fresh["features.weight"])
        assert found["parameters"] == 40_970 and found["test_accuracy"] > 0.8


# ---- the options ----------------------------------------------------------------------------


def test_help_names_every_option_and_the_defaults_of_each_model(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"--{name.replace('_', '-')}" in shown for name in OPTIONS)
    for option in ("epochs", "batch_size", "lr", "weight_decay"):
        values = [f"{train.DEFAULTS[model][option]} ({model})" for model in ("cnn", "mlp", "happy")]
        pattern = ", ".join(map(re.escape, values[:2])) + "( or|,) " + re.escape(values[2])
        assert re.search(pattern, shown), values


def test_what_is_left_open_suits_the_model_and_the_preset(monkeypatch):
    for model, defaults in train.DEFAULTS.items():
        options = train.read_options(["--model", model])
        assert {name: getattr(options, name) for name in defaults} == defaults
    assert train.read_options(["--model", "mlp", "--lr", "0.5"]).lr == 0.5
    plain = train.read_options([])
    assert (plain.model, plain.precision) == ("cnn", "float32")
    assert train.DEFAULTS.keys() == train.MODELS.keys()

    for native in (True, False):
        monkeypatch.setattr(train, "has_bfloat16", lambda device, native=native: native)
        fast = train.read_options(["--preset", "fast"])
        assert fast.model == "fast-cnn" and not fast.augment
        assert fast.precision == ("bfloat16" if native else "float32")
    assert (fast.epochs, fast.lr) == (1, train.DEFAULTS["fast-cnn"]["lr"])
    accurate = train.read_options(["--preset", "accurate", "--epochs", "2", "--no-augment"])
    assert (accurate.model, accurate.epochs, accurate.augment) == ("accurate-cnn", 2, False)
    assert train.read_options(["--preset", "accurate"]).augment
    assert train.read_options(["--precision", "float64", "--preset", "fast"]).precision == "float64"


@pytest.mark.parametrize("preset, precision", [
    ("fast", "bfloat16"), *(pytest.param(*p, marks=pytest.mark.slow) for p in
    [("fast", "float32"), ("accurate", "float32"), ("accurate", "bfloat16")]),
])  # fmt: skip
def test_the_presets_learn_the_digits_and_go_on_where_they_were_stopped(preset, precision):
    options = ["--preset", preset, "--precision", precision, "--data", "digits", "--epochs", "4"]
    assert command(*options, "--run-dir", "whole") == 0
    found = summary("whole")
    assert found["test_accuracy"] > 0.9 and found["precision"] == precision
    assert found["max_gradient_disagreement"] < 1e-10
    with after_step(13, press):
        assert command(*options, "--run-dir", "parts") == 130
    assert resume("parts") == 0
    assert same(*(state_of(run)["model"] for run in ("whole", "parts")))


def test_the_options_reach_the_loop(monkeypatch, capfd):
    seen = {}

    def spy(model, engine, optimizer, schedule, data, **arguments):
        seen.update(arguments, optimizer=optimizer, schedule=schedule)
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", spy)
        options = "--seed 5 --batch-size 7 --lr 0.25 --weight-decay 0.5 --optimizer sgd"
        options += " --precision bfloat16 --schedule constant"
        assert digits("run", *options.split(), epochs=3) == 130
    wanted = {"seed": 5, "batch_size": 7, "epochs": 3, "dtype": torch.bfloat16, "done": 0}
    assert {name: seen[name] for name in wanted} == wanted
    (group,) = seen["optimizer"].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert type(seen["optimizer"]) is torch.optim.SGD
    assert type(seen["schedule"]) is torch.optim.lr_scheduler.LambdaLR

    # Without a folder it goes under runs/. The largest seed augments, too; no terminal, no bar.
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    options = "--data digits --model happy --augment --epochs 1 --threads 3 --seed"
    for seed in (2**31 - 1, 2**31 - 1, 1):
        assert command(*options.split(), seed) == 0
    assert chosen == [3, 3, 3] and capfd.readouterr().err == ""
    runs = sorted(Path("runs/train").iterdir(), key=lambda run: run.stat().st_ctime_ns)
    assert all("-happy" in run.name and (run / "summary.json").exists() for run in runs)
    a, b, c = (state_of(run)["model"]["layers.0.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- the engines ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "happy", pytest.param("cnn", marks=pytest.mark.slow)])
def test_the_engines_give_the_same_losses(model):
    """In float64, to 1e-9, for the first 100 steps."""
    losses = {}
    for engine in ENGINES:
        options = ["--engine", engine, "--precision", "float64", "--batch-size", 11]
        assert digits(engine, *options, model=model, epochs=1) == 0
        losses[engine] = [steps(engine)[k] for k in range(1, 101)]
    for engine in ("tape", "by-hand"):
        assert losses[engine] == pytest.approx(losses["autograd"], rel=1e-9, abs=0), engine
    assert losses["autograd"][-1] < 0.9 * losses["autograd"][0]


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_every_precision_learns_and_makes_a_difference(model):
    for engine in ENGINES:
        losses = set()
        for precision in ("float32", "bfloat16", "float64")[engine != "autograd" :]:
            run = f"{engine}-{precision}"
            options = ["--engine", engine, "--precision", precision]
            assert digits(run, *options, model=model, epochs=1) == 0, run
            assert summary(run)["test_accuracy"] > 0.5, run  # chance is 0.1
            losses.add(records(run)[5]["loss/train"])
            kept = torch.float64 if precision == "float64" else torch.float32
            assert {value.dtype for value in state_of(run)["model"].values()} == {kept}, run
        assert len(losses) == (3 if engine == "autograd" else 2)


def test_a_wrong_engine_shows_in_the_log_and_in_the_summary(monkeypatch, capsys):
    right, seen = engines.ENGINES["tape"], set()

    def spoilt(model, inputs, targets):
        loss = right(model, inputs, targets)
        model.layers[1].weight.grad *= 1.001
        return loss

    def spy(model, inputs, targets):
        seen.add(inputs.dtype)
        return engines.disagreements(model, inputs, targets)

    monkeypatch.setitem(engines.ENGINES, "tape", spoilt)
    monkeypatch.setattr(monitor, "disagreements", spy)
    assert digits("run", epochs=1) == 0
    assert summary("run")["max_gradient_disagreement"] == pytest.approx(1e-3, rel=1e-6)
    for record in (records("run")[0], records("run")[-1]):
        wrong = {t for t, v in record.items() if t.startswith("gradient_dis") and v > 1e-12}
        assert wrong == {"gradient_disagreement/tape/layers.1.weight"}
    assert "1.0e-03 at most" in capsys.readouterr().out
    # An Apple GPU has no float64: `disagreements` moves what it is given to the processor first.
    assert seen == {torch.float32}


# ---- the data -------------------------------------------------------------------------------


def test_without_mnist_the_digits_are_taken_and_it_is_said(capsys, monkeypatch):
    with after_step(3, press):
        assert command("--model", "mlp", "--epochs", 2, "--run-dir", "run") == 130
    assert "*** MNIST could not be had" in capsys.readouterr().out
    monkeypatch.setenv("NN_BACKPROP_DATA", "elsewhere")
    assert resume("run") == 0
    reason = summary("run")["dataset_reason"]
    assert summary("run")["dataset"] == "digits"
    assert reason.startswith("MNIST could not be had") and "elsewhere" not in reason
    printed = capsys.readouterr().out
    assert "*** MNIST" not in printed  # it was not even looked for
    why = reason.partition(" (")[0]
    assert f"*** Trained on the embedded digits, not on MNIST: {why}\n" in printed


@pytest.mark.needs_mnist
def test_real_mnist(capsys):
    options = "--data mnist --model mlp --epochs 1 --engine by-hand --run-dir run --data-root"
    assert command(*options.split(), REAL_ROOT) == 0
    found = summary("run")
    assert found["dataset"] == "mnist" and found["test_accuracy"] > 0.9
    assert found["dataset_reason"].startswith("MNIST found in ")
    assert "***" not in capsys.readouterr().out
    assert program.main(["evaluate", "run", "--data-root", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert program.main(["evaluate", "run", "--json"]) == 0  # from where the run had found it
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == found["test_accuracy"]
    assert sum(row["n"] for row in evaluated["digits"]) == 10_000


# ---- bad input ------------------------------------------------------------------------------

BAD = {
    "preset": ["slow"], "leaning-rate": ["1"], "augment": ["perhaps"],
    "epochs": ["0", "-1", "1.5", "many", str(2**31)], "batch-size": ["0", "-3", str(2**31)],
    "lr": ["0", "-0.1", "nan", "inf", "x", "1e31"], "weight-decay": ["-1", "nan", "inf"],
    "seed": ["-1", "0.5", str(2**31)], "threads": ["0", "-2", "1000000000"],
    "resume": ["nowhere", ""],
}  # fmt: skip


def test_a_bad_value_is_refused_by_name(capsys, tmp_path):
    for option, value in ((option, value) for option, bad in BAD.items() for value in bad):
        flag = f"--{option}"
        try:
            code = command("--data", "digits", "--run-dir", "run", flag, value)
        except SystemExit as exit:  # tyro's own way
            code = exit.code
        error = capsys.readouterr().err
        assert code == 2 and "Traceback" not in error, (flag, value)
        no_run = f"{value or '.'} holds no run that can be resumed"
        named = {"augment": value, "resume": no_run}.get(option, flag)
        assert named in error and list(tmp_path.iterdir()) == [], (flag, value)


def test_what_the_network_or_the_device_does_not_allow_is_refused(monkeypatch, refused):
    for size in (1, 4, 1196):  # of 1197 examples
        said = f"--batch-size {size} leaves a batch of one image"
        refused(said, digits("run", "--batch-size", size, model="fast-cnn"))
    said = "--engine by-hand is written out for the MLP and the CNN, not for fast-cnn"
    refused(said, digits("run", "--engine", "by-hand", model="fast-cnn"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, precision in ((False, "float32"), (True, "float64")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        refused("--device mps", digits("run", "--device", "mps", "--precision", precision))
    said = "--device cuda: torch finds none here; choose auto or cpu"
    refused(said, digits("run", "--device", "cuda"))
    assert not Path("run").exists()
    # beside an Apple GPU, auto takes the processor for float64
    chosen = [train._device(train.Options(precision=p)).type for p in ("float32", "float64")]
    assert chosen == ["mps", "cpu"]


def test_folders_that_cannot_be_read_or_written(monkeypatch, refused):
    Path("file").write_text("precious")
    for root in ("file", "nowhere"):  # no MNIST is in them
        refused(root, command("--data", "mnist", "--data-root", root, "--run-dir", "run"))
    assert not Path("run").exists()
    there = Path("there")
    there.mkdir()
    (there / "config.json").write_text("{}")
    with unchanged(there):  # not written over
        refused("already holds a run", digits(there))
    for path in ("file", "file/below", "x" * 300):
        refused("cannot be a run directory", digits(path))
    assert Path("file").read_text() == "precious"

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused("run cannot be a run directory (Permission denied)", digits("run"))
