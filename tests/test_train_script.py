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
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from offline import go_offline
from PIL import Image
from properties import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from nn_backprop import __main__ as program
from nn_backprop import data, engines, figures, training
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
FINAL_FIGURES = "confident_mistakes", "confusion_matrix", "learning_curves", "precision_recall"


class Sketches:
    """`figures`, but for those that take long to draw."""

    def __getattr__(self, name):
        if name == "weight_pixels":
            return figures.weight_pixels
        return lambda *arguments: Figure(figsize=(1, 1), dpi=20)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty working directory, no network, no MNIST, sketches for figures."""
    go_offline(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # or tyro breaks its lines anywhere
    monkeypatch.setattr(monitor, "figures", Sketches())


def digits(run, *options, model="mlp", epochs=2) -> int:
    """Trains on the embedded digits; returns the exit code."""
    arguments = ["--data", "digits", "--model", model, "--epochs", epochs, "--run-dir", run]
    return train.main([*map(str, arguments), *map(str, options)])


def resume(run, *options) -> int:
    return train.main(["--resume", str(run), *map(str, options)])


def records(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def steps(run: Path | str, tag: str = "loss/train") -> dict[int, float]:
    """What was logged of each step, by its number."""
    return {r["step"]: r[tag] for r in records(run) if "loss/train" in r}


def summary(run: Path | str) -> dict:
    return json.loads(Path(run, "summary.json").read_text())


def state_of(run: Path | str) -> dict:
    return read_checkpoint(Path(run, "checkpoint.pt"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def unchanged(folder: Path):
    before = contents(folder)
    yield
    assert contents(folder) == before


def sentence(capsys) -> str:
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1, error
    return error


@pytest.fixture
def refused(capsys):
    def refused(said: str, code: int) -> None:
        assert code == 2 and said in sentence(capsys)

    return refused


@contextmanager
def interrupt_at(step: int, number: int = signal.SIGINT):
    """Presses Ctrl-C after a step."""
    original = monitor.Monitor.step

    def pressed(self, done) -> None:
        original(self, done)
        if done.number == step:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor.Monitor, "step", pressed)
        yield


# ---- what a run leaves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run by the defaults that was never interrupted, on one thread: the order of a sum depends
    on their number."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor, "figures", Sketches())
        assert digits(run, "--threads", 1) == 0
    return run


def files_are_right(finished):
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    files = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "figures"}
    assert names - events == files and len(events) == 1
    pictures = {path.stem: Image.open(path) for path in (finished / "figures").iterdir()}
    assert pictures.keys() == {"first_layer_weights", *FINAL_FIGURES}
    for picture in pictures.values():
        with picture:
            assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20
    options = json.loads((finished / "config.json").read_text())["options"]
    assert list(options) == OPTIONS
    assert options["run_dir"] == str(finished) and options["lr"] == train.DEFAULTS["mlp"]["lr"]


def summary_is_right(finished):
    found = summary(finished)
    wanted = {
        "dataset": "digits", "dataset_reason": "asked for", "model": "mlp", "engine": "tape",
        "device": "cuda" if torch.cuda.is_available() else "cpu", "precision": "float64",
        "parameters": 784 * 128 + 128 + 128 * 10 + 10, "epochs": 12, "seed": 0,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted and "commit" in found
    assert 0 < found["train_seconds"] < found["wall_seconds"] < 600
    assert 0.9 < found["validation_accuracy"] <= 1 and 0.9 < found["test_accuracy"] <= 1
    assert 0 < found["test_loss"] < 0.5 and found["versions"]["torch"] == torch.__version__
    logged = records(finished)
    assert found["validation_accuracy"] == logged[-1]["accuracy/validation"]
    disagreements = [v for r in logged for tag, v in r.items() if "disagreement" in tag]
    assert found["max_gradient_disagreement"] == max(disagreements) < 1e-12


STEP_TAGS = {"loss/train", "learning_rate", "samples_per_second"}
STEP_TAGS |= {f"gradient_norm/{name}" for name in PARAMETERS}
EPOCH_TAGS = {"loss/validation", "accuracy/validation"}
EPOCH_TAGS |= {f"gradient_disagreement/{e}/{n}" for e in ("tape", "by-hand") for n in PARAMETERS}


def metrics_are_right(finished):
    """Steps 1 to 100 are all there, then each 50th; epochs from before the first step."""
    of_steps = [r for r in records(finished) if "loss/train" in r]
    epochs = [r for r in records(finished) if "loss/train" not in r]
    assert [(r["step"], r["epoch"]) for r in of_steps] == [(k + 1, k // 10) for k in range(100)]
    assert [(r["step"], r["epoch"]) for r in epochs] == [(10 * k, k) for k in range(13)]
    assert all(r.keys() == {"step", "epoch"} | STEP_TAGS for r in of_steps)
    assert all(r.keys() == {"step", "epoch"} | EPOCH_TAGS for r in epochs)
    assert of_steps[0]["loss/train"] != round(of_steps[0]["loss/train"], 12)  # all 17 digits
    assert all(r["samples_per_second"] > 0 for r in of_steps)


def panels_are_right(finished):
    sizes = dict.fromkeys(("tensors", "images", "histograms"), 0)
    events = EventAccumulator(str(finished), size_guidance=sizes).Reload()
    tags = events.Tags()
    logged = [(r["step"], tag) for r in records(finished) for tag in r]
    final = {"validation_accuracy", "test_accuracy", "test_loss", "max_gradient_disagreement"}
    assert set(tags["scalars"]) == STEP_TAGS | EPOCH_TAGS | {f"final/{name}" for name in final}
    for tag in STEP_TAGS | EPOCH_TAGS:
        assert [event.step for event in events.Scalars(tag)] == [s for s, t in logged if t == tag]
    epochs = [10 * k for k in range(13)]
    for name in PARAMETERS:
        assert [event.step for event in events.Histograms(f"weights/{name}")] == epochs
        shown = [event.step for event in events.Histograms(f"gradients/{name}")]
        assert shown == epochs[1:]  # there is none before training
    assert [image.step for image in events.Images("figures/first_layer")] == epochs
    for name in FINAL_FIGURES:
        (image,) = events.Images(f"figures/{name}")
        png = (finished / "figures" / f"{name}.png").read_bytes()
        assert (image.step, image.encoded_image_string) == (120, png)
    for digit in range(10):
        assert events.SummaryMetadata(f"digit_{digit}").plugin_data.plugin_name == "pr_curves"
    assert tags["graph"]
    content = events.PluginTagToContent(HPARAMS)["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(content).session_start_info
    assert set(start.hparams) == set(OPTIONS)


def test_what_a_run_leaves(monkeypatch):
    """A whole run with the figures drawn, once, on whichever processor the tests run."""
    run = Path("finished").absolute()
    with monkeypatch.context() as patched:
        patched.setattr(monitor, "figures", figures)
        assert digits(run, "--engine", "tape", "--precision", "float64", epochs=12) == 0
    for are_right in (files_are_right, summary_is_right, metrics_are_right, panels_are_right):
        are_right(run)


def test_every_option_has_its_sentence():
    nodes = ast.parse(SCRIPT.read_text()).body
    (options,) = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == "Options"]
    body = options.body[1:]  # after the docstring
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        assert len(text.value.value) > 10 and text.value.value.endswith(".")
    assert len(body) == 2 * len(OPTIONS)


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


def test_what_is_left_open_suits_the_model():
    for model, defaults in train.DEFAULTS.items():
        options = train.read_options(["--model", model])
        assert {name: getattr(options, name) for name in defaults} == defaults
        assert train.read_options(["--model", model, "--lr", "0.5"]).lr == 0.5
    assert train.read_options([]).model == "cnn" and train.DEFAULTS.keys() == train.MODELS.keys()


def test_a_preset_chooses_and_what_is_given_beside_it_counts(monkeypatch):
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
    assert train.read_options([]).precision == "float32"


@pytest.mark.parametrize("preset, precision", [
    ("fast", "bfloat16"), *(pytest.param(*p, marks=pytest.mark.slow) for p in
    [("fast", "float32"), ("accurate", "float32"), ("accurate", "bfloat16")]),
])  # fmt: skip
def test_the_presets_learn_the_digits_and_go_on_where_they_were_stopped(preset, precision):
    options = ["--preset", preset, "--precision", precision, "--data", "digits", "--epochs", "6"]
    assert train.main([*options, "--run-dir", "whole"]) == 0
    found = summary("whole")
    assert found["test_accuracy"] > 0.9 and found["precision"] == precision
    assert found["max_gradient_disagreement"] < 1e-10
    with interrupt_at(13):
        assert train.main([*options, "--run-dir", "parts"]) == 130
    assert resume("parts") == 0
    assert same(*(state_of(run)["model"] for run in ("whole", "parts")))


def test_what_the_network_does_not_allow_is_refused(refused):
    for size in (1, 4, DIGITS - 1):
        said = f"--batch-size {size} leaves a batch of one image"
        refused(said, digits("run", "--batch-size", size, model="fast-cnn"))
    said = "--engine by-hand is written out for the MLP and the CNN, not for fast-cnn"
    refused(said, digits("run", "--engine", "by-hand", model="fast-cnn"))
    assert not Path("run").exists()


def test_a_run_without_a_folder_goes_under_runs(monkeypatch, capfd):
    """With the largest seed, which augments too; its threads are set; no terminal, no bar."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    options = ["--augment", "--seed", str(2**31 - 1), "--threads", "3", "--epochs", "1"]
    assert train.main(["--data", "digits", "--model", "happy", *options]) == 0
    (run,) = Path("runs/train").iterdir()
    assert run.name.endswith("-happy") and (run / "summary.json").exists()
    assert chosen == [3] and capfd.readouterr().err == ""


def test_the_options_reach_the_loop(monkeypatch):
    seen = {}

    def spy(model, engine, optimizer, schedule, data, **arguments):
        seen.update(arguments, optimizer=optimizer, schedule=schedule)
        return 0

    monkeypatch.setattr(training, "fit", spy)
    options = "--seed 5 --batch-size 7 --lr 0.25 --weight-decay 0.5 --optimizer sgd"
    options += " --precision bfloat16 --schedule constant"
    assert digits("run", *options.split(), epochs=3) == 130
    wanted = {"seed": 5, "batch_size": 7, "epochs": 3, "dtype": torch.bfloat16, "done": 0}
    assert {name: seen[name] for name in wanted} == wanted
    (group,) = seen["optimizer"].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert type(seen["optimizer"]) is torch.optim.SGD
    assert type(seen["schedule"]) is torch.optim.lr_scheduler.LambdaLR


def test_the_seed_is_that_of_the_weights():
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert digits(run, "--seed", seed, model="happy", epochs=1) == 0
    a, b, c = (state_of(run)["model"]["layers.0.weight"] for run in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- the engines ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_engines_give_the_same_losses(model):
    """In float64, to 1e-9, for the first 100 steps."""
    losses = {}
    for engine in ENGINES:
        options = ["--engine", engine, "--precision", "float64", "--batch-size", 11]
        assert digits(engine, *options, model=model, epochs=1) == 0
        losses[engine] = [steps(engine)[k] for k in range(1, 101)]
    for engine in ("tape", "by-hand"):
        assert losses[engine] == pytest.approx(losses["autograd"], rel=1e-9, abs=0)
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
    with interrupt_at(3):
        assert train.main(["--model", "mlp", "--epochs", "2", "--run-dir", "run"]) == 130
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
    assert train.main([*options.split(), REAL_ROOT]) == 0
    found = summary("run")
    assert found["dataset"] == "mnist" and found["test_accuracy"] > 0.9
    assert found["dataset_reason"].startswith("MNIST found in ")
    assert "***" not in capsys.readouterr().out


# ---- bad input ------------------------------------------------------------------------------

BAD = {  # None: the value is missing
    "preset": ["slow", ""], "model": ["vgg", ""], "engine": ["jax"], "device": ["tpu"],
    "precision": ["float16"], "epochs": ["0", "-1", "1.5", "many", str(2**31)],
    "batch_size": ["0", "-3", "x", str(2**31)], "lr": ["0", "-0.1", "nan", "inf", "x", "1e31"],
    "optimizer": ["lbfgs"], "schedule": ["cosine"], "weight_decay": ["-1", "nan", "inf", "x"],
    "augment": ["perhaps"], "graph": ["perhaps"], "seed": ["-1", "0.5", "x", str(2**31)],
    "threads": ["0", "-2", "x", "1000000000"], "data": ["cifar"], "data_root": [None],
    "run_dir": [None], "resume": [None, "nowhere", ""],
}  # fmt: skip


def test_a_bad_value_is_refused_by_name(capsys, tmp_path):
    assert list(BAD) == OPTIONS  # none is forgotten
    for option, value in [("leaning_rate", "1"), *((o, v) for o in BAD for v in BAD[o])]:
        flag = f"--{option.replace('_', '-')}"
        wrong = [flag] if value is None else [flag, value]
        try:
            code = train.main(["--data", "digits", "--run-dir", "run", *wrong])
        except SystemExit as exit:  # tyro's own way
            code = exit.code
        error = capsys.readouterr().err
        assert code == 2 and "Traceback" not in error, wrong
        named = flag
        if option in ("augment", "graph"):  # which take no value
            named = value
        elif option == "resume" and value is not None:
            named = f"{value or '.'} holds no run that can be resumed"
        assert named in error, wrong
        assert list(tmp_path.iterdir()) == [], wrong


def test_the_device(monkeypatch, refused):
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


def test_folders_that_cannot_be_read_or_written(whole, monkeypatch, refused):
    Path("file").write_text("precious")
    for root in ("file", "nowhere"):  # no MNIST is in them
        refused(root, train.main(["--data", "mnist", "--data-root", root, "--run-dir", "run"]))
    assert not Path("run").exists()
    with unchanged(whole):  # not written over
        refused("already holds a run", digits(whole))
    for path in ("file", "file/below", "x" * 300):
        refused("cannot be a run directory", digits(path))
    assert Path("file").read_text() == "precious"

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused("run cannot be a run directory (Permission denied)", digits("run"))


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


def test_a_last_step_that_diverges_is_found_too(capsys):
    """Its own loss was finite; the update made of it is not."""
    for optimizer in ("adam", "sgd"):
        options = ["--lr", 1e30, "--optimizer", optimizer, "--schedule", "constant"]
        assert digits(optimizer, *options, "--batch-size", 5000, epochs=1) == 1
        assert "validation loss became nan at step 1, with learning rate 1e+30" in sentence(capsys)
        assert state_of(optimizer)["progress"]["step"] == 0
        assert records(optimizer)[-1]["step"] == 1


# ---- stopping and going on ------------------------------------------------------------------


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


CLOCKS = "train_seconds", "logging_seconds", "wall_seconds"


def assert_same_run(actual: Path | str, expected: Path) -> None:
    """To the last bit, but for the clock."""
    states = [state_of(run) for run in (actual, expected)]
    done = [state.pop("progress")["step"] for state in states]
    assert done[0] == done[1] and same(*states)
    a, b = ([without(r, "samples_per_second") for r in records(run)] for run in (actual, expected))
    assert a == b
    assert without(summary(actual), *CLOCKS) == without(summary(expected), *CLOCKS)


@pytest.mark.parametrize("model, options, stops", [
    ("mlp", "--threads 1", [10]),  # as an epoch ends
    ("mlp", "--engine tape --augment", [1]),
    ("mlp", "--optimizer sgd --schedule constant --engine by-hand", [7]),
    ("mlp", "--precision bfloat16", [13]),
    ("happy", "--precision float64 --batch-size 128", [4, 19]),
    pytest.param("cnn", "", [4, 16], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(model, options, stops, whole, capsys):
    if options != "--threads 1":
        whole = Path("whole")
        assert digits(whole, *options.split(), model=model) == 0
    parts = Path("parts")
    for step in stops:
        with interrupt_at(step):
            again = parts.exists()
            assert (resume(parts) if again else digits(parts, *options.split(), model=model)) == 130
        assert state_of(parts)["progress"]["step"] == records(parts)[-1]["step"] == step
        assert not (parts / "summary.json").exists()
        printed = capsys.readouterr().out
        assert f"Stopped after step {step} of 20; go on with" in printed
        assert printed.endswith(f"    python experiments/train.py --resume {parts}\n")
    assert resume(parts) == 0
    assert_same_run(parts, whole)


def test_the_clocks_of_a_resumed_run_go_on(stopped):
    shutil.copytree(stopped, "run")
    state = state_of("run")
    assert all(0 < state["progress"][clock] < 60 for clock in CLOCKS)
    state["progress"] |= dict.fromkeys(CLOCKS, 1000.0)
    torch.save(state, "run/checkpoint.pt")
    assert resume("run") == 0
    assert all(1000 < summary("run")[clock] < 1060 for clock in CLOCKS)
    # not as if the seconds before had gone into one step
    assert min(steps("run", "samples_per_second").values()) > 100


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


def test_a_run_stopped_before_its_first_step_or_while_it_draws_its_figures_goes_on(
    whole, monkeypatch, capsys
):
    original = monitor.Monitor.epoch

    def pressed(self, *numbers) -> None:
        original(self, *numbers)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(monitor.Monitor, "epoch", pressed)
        assert digits("stopped", "--threads", 1) == 130
    assert "Stopped after step 0 of 20" in capsys.readouterr().out
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(monitor.Monitor, "finish", lambda *_: sys.exit())
        digits("killed", "--threads", 1)
    for run in ("stopped", "killed"):
        assert not Path(run, "summary.json").exists()
        assert resume(run) == 0
        assert_same_run(run, whole)


def test_ctrl_c_at_the_last_step_comes_too_late_and_a_second_ends_the_run_at_once(capsys):
    with interrupt_at(20):
        assert digits("run") == 0
    assert summary("run")["epochs"] == 2
    with interrupt_at(3), interrupt_at(3):
        assert digits("twice") == 130
    assert "interrupted" in sentence(capsys)
    assert state_of("twice")["progress"]["step"] == 0


OTHER = {
    "preset": "fast", "model": "cnn", "engine": "tape", "device": "cpu",
    "precision": "float64", "epochs": "13", "batch_size": "64", "lr": "0.005", "optimizer": "sgd",
    "schedule": "constant", "weight_decay": "0.0", "augment": "", "graph": "", "seed": "1",
    "threads": "2", "data": "mnist", "data_root": "elsewhere", "run_dir": "elsewhere",
}  # fmt: skip


def test_a_finished_run_is_left_as_it_is_and_no_option_may_contradict_it(whole, refused, capsys):
    assert [*OTHER, "resume"] == OPTIONS  # none is forgotten
    with unchanged(whole):
        assert resume(whole) == 0
        assert resume(whole, "--epochs", 2, "--model", "mlp", "--run-dir", whole) == 0
        assert "is complete" in capsys.readouterr().out
        for option, value in OTHER.items():
            flag = f"--{option.replace('_', '-')}"
            said = f"{f'{flag} {value}'.strip()} contradicts the run in {whole}"
            refused(said, resume(whole, flag, *value.split()))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was interrupted after step 7."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with interrupt_at(7):
        assert digits(run) == 130
    return run


def edit(change):
    """A change of the dict that a file of JSON holds."""

    def changed(path: Path) -> None:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return changed


def replaced(change):
    """A change of the bytes of a file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGE = [
    ("config.json", "none", Path.unlink),
    ("config.json", "empty", replaced(lambda _: b"")),
    ("config.json", "binary", replaced(lambda _: b"\xff\xfe\0")),
    ("config.json", "a list", replaced(lambda _: b"[1]")),
    ("config.json", "without options", edit(lambda c: c.pop("options"))),
    ("config.json", "without data set", edit(lambda c: c.pop("dataset"))),
    ("config.json", "more epochs", edit(lambda c: c["options"].update(epochs=3))),
    ("config.json", "unknown model", edit(lambda c: c["options"].update(model="vgg"))),
    ("config.json", "option of another type", edit(lambda c: c["options"].update(lr="fast"))),
    ("checkpoint.pt", "none", Path.unlink),
    ("checkpoint.pt", "empty", replaced(lambda _: b"")),
    ("checkpoint.pt", "text", replaced(lambda _: b"hello")),
    ("checkpoint.pt", "of something else", lambda path: torch.save({"model": 1}, path)),
    ("checkpoint.pt", "cut", replaced(lambda data: data[:-3000])),
    ("checkpoint.pt", "one bit", replaced(lambda data: data[: (n := len(data) // 2)]
                                          + bytes([data[n] ^ 1]) + data[n + 1 :])),
]  # fmt: skip


def test_a_damaged_run_is_refused_and_left_as_it_is(stopped, tmp_path, refused):
    for file, damage, change in DAMAGE:
        run = tmp_path / f"{file} {damage}"  # which the sentence names
        shutil.copytree(stopped, run)
        change(run / file)
        with unchanged(run):
            refused(f"{run} holds no run that can be resumed (", resume(run))


def test_a_checkpoint_of_another_network_is_refused(stopped, monkeypatch, refused):
    monkeypatch.setitem(train.MODELS, "mlp", lambda: torch.nn.Linear(3, 5))
    with unchanged(stopped):
        refused("is of another version of this program (RuntimeError", resume(stopped))


# ---- as a program ---------------------------------------------------------------------------


def test_killed_between_checkpoints_it_goes_on_from_the_last(whole):
    """Killed in the second epoch: the steps after the checkpoint are dropped and done again."""
    parts = Path("parts").absolute()
    program = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import test_train_script as tests
tests.monitor.figures = tests.Sketches()
with tests.interrupt_at(17, signal.SIGKILL):
    tests.digits(sys.argv[2], "--threads", 1)
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state_of(parts)["progress"]["step"] == 10
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
    options = "--data digits --model happy --epochs 1000 --threads 1 --run-dir"
    command = [sys.executable, str(SCRIPT), *options.split(), "my run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = bytearray()

    def watch() -> None:
        with suppress(OSError):  # how Linux tells the end
            while part := os.read(ours, 10_000):
                shown.extend(part)

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
    assert not Path("run").exists()  # the data were being loaded
