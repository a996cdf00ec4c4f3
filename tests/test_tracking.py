"""The run directory, read back: its JSON files, and the events by TensorBoard's own readers."""

import json
import math
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from properties import refuses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServerAccumulator,
)
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from nn_backprop import tracking
from nn_backprop.tracking import Run, RunError


def records(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def events(run: Run) -> EventAccumulator:
    return EventAccumulator(str(run.path), size_guidance={"tensors": 0}).Reload()


def scalars(run: Run, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run).Scalars(tag)]


def served(run: Run, tag: str) -> list[tuple[int, float]]:
    """As `scalars`, by the reader behind TensorBoard's pages, which purges by rules of its own."""
    tensors = ServerAccumulator(str(run.path)).Reload().Tensors(tag)
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in tensors]


def figure() -> Figure:
    drawn = Figure(figsize=(3, 2), dpi=50)
    drawn.subplots().plot([1, 2])
    return drawn


def test_everything_is_in_one_event_folder(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    is_class, probability = torch.tensor([True, False, True]), torch.tensor([0.9, 0.2, 1.0])
    with Run.create(tmp_path / "run", {"lr": 0.1}) as run:
        run.graph(model, torch.randn(2, 3))
        run.log(0, 0, {"loss/validation": 2.0})
        run.log(7, 1, {"loss/train": 0.5, "loss/validation": 0.25})
        run.histograms(7, dict(model.named_parameters()))
        run.figure("curves", figure(), 7, file="curves")
        run.figure("shown only", figure(), 7)
        run.pr_curve("digit/1", is_class, probability, 7)
        asked = {"lr": 0.1, "epochs": 2, "model": "mlp", "adam": True, "root": Path("a")}
        run.hparams(asked | {"resume": None}, {"final/accuracy": 0.75})
        run.summary({"accuracy": 0.75})

    found = events(run)
    assert scalars(run, "loss/validation") == [(0, 2.0), (7, 0.25)]
    assert scalars(run, "final/accuracy") == [(7, 0.75)]
    assert found.Tags()["graph"]
    assert set(found.Tags()["histograms"]) == dict(model.named_parameters()).keys()
    assert found.Histograms("0.weight")[0].histogram_value.num == 15
    assert set(found.Tags()["images"]) == {"curves", "shown only"}
    (image,) = found.Images("curves")
    assert (image.step, image.width, image.height) == (7, 150, 100)
    assert image.encoded_image_string == (run.path / "figures" / "curves.png").read_bytes()
    assert found.SummaryMetadata("digit/1").plugin_data.plugin_name == "pr_curves"
    assert found.Tensors("digit/1")[0].step == 7

    contents = found.PluginTagToContent(HPARAMS)
    assert len(contents) == 3
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"])
    options = {k: v for k, v in start.session_start_info.hparams.items()}
    assert {k: v.string_value for k, v in options.items() if v.HasField("string_value")} == {
        **{"model": "mlp", "adam": "True", "root": "a", "resume": "None"}
    }
    assert (options["lr"].number_value, options["epochs"].number_value) == (0.1, 2)

    assert tracking.read_json(run.path / "summary.json") == {"accuracy": 0.75}
    assert tracking.read_json(run.path / "config.json") == {"lr": 0.1}
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {run.path}
    assert os.listdir(run.path / "figures") == ["curves.png"]


def test_metrics_read_back_exactly_and_at_once(tmp_path):
    values = {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    with Run.create(tmp_path, {}) as run:
        run.log(3, 1, values | {"tensor": torch.tensor(0.1, dtype=torch.float64)})
        (record,) = records(run)  # before any flush
    assert record.pop("tensor") == 0.1
    assert math.isnan(record.pop("nan"))
    values.pop("nan")
    assert record == {"step": 3, "epoch": 1, **values}


def test_histograms_of_a_diverged_run(tmp_path):
    with Run.create(tmp_path, {}) as run:
        run.histograms(0, {"nan": torch.full((3,), math.nan), "empty": torch.zeros(0)})
        run.histograms(0, {"some": torch.tensor([math.inf, 1e30, math.nan, 2.0])})
    assert events(run).Tags()["histograms"] == ["some"]
    assert events(run).Histograms("some")[0].histogram_value.num == 2


def test_reopen_forgets_what_came_after_the_step(tmp_path):
    with Run.create(tmp_path, {}) as run:
        for step in range(6):
            run.log(step, 0, {"loss": float(step), **({"late": 1.0} if step > 3 else {})})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "epoch": 0, "lo')
    with Run.reopen(tmp_path, 3) as run:
        assert [record["step"] for record in records(run)] == [0, 1, 2, 3]
        run.log(4, 0, {"loss": 40.0})
        run.hparams({}, {"final": 1.0})
    assert [record["loss"] for record in records(run)] == [0, 1, 2, 3, 40]
    for read in (scalars, served):
        assert read(run, "loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
        assert read(run, "late") == []
        assert read(run, "final") == [(4, 1)]


def test_a_run_is_not_written_over_and_a_file_is_no_run_directory(tmp_path):
    run = tmp_path / "run"
    Run.create(run, {"first": 1}).close()
    refuses("already holds a run", Run.create, run, {"second": 2}, error=RunError)
    assert tracking.read_json(run / "config.json") == {"first": 1}
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        refuses("cannot be a run directory", Run.create, path, {}, error=RunError)
        refuses("holds no run", Run.reopen, path, 0, error=RunError)


def test_damage_inside_the_metrics_is_reported_and_a_last_line_is_completed(tmp_path):
    Run.create(tmp_path, {}).close()
    metrics = tmp_path / "metrics.jsonl"
    for line in (b'{"st', b"\xff\xfe", b"[]", b'{"loss": 1}'):
        damaged = b'{"step": 0}\n' + line + b'\n{"step": 2}\n'
        metrics.write_bytes(damaged)
        refuses("line 2", Run.reopen, tmp_path, 5, error=RunError)
        assert metrics.read_bytes() == damaged  # not repaired
    metrics.write_bytes(b'{"step": 0}\n{"step": 1}')
    with Run.reopen(tmp_path, 1) as run:
        run.log(2, 0, {})
    assert [record["step"] for record in records(run)] == [0, 1, 2]


def test_the_graph_leaves_the_model_and_the_random_state_alone(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[0].eval()  # as when its statistics are frozen
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with Run.create(tmp_path, {}) as run:
        run.graph(model, torch.randn(5, 3))
    generator_after = torch.get_rng_state()
    torch.set_rng_state(generator)
    torch.randn(5, 3)
    assert torch.equal(generator_after, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert events(run).Tags()["graph"]


class Untraceable(nn.Module):
    def forward(self, x):
        raise RuntimeError("first line\nsecond line")


def test_a_model_without_a_graph_costs_one_line(tmp_path, caplog, capfd):
    with Run.create(tmp_path, {}) as run:
        run.graph(Untraceable(), torch.zeros(1))
    (record,) = caplog.records
    assert "RuntimeError" in record.getMessage() and "\n" not in record.getMessage()
    assert capfd.readouterr().out == "" and not events(run).Tags()["graph"]


def test_a_closed_run_takes_nothing_more_and_leaves_no_thread(tmp_path):
    threads = threading.active_count()
    run = Run.create(tmp_path, {})
    run.close()
    run.close()
    refuses("closed", run.log, 0, 0, {})
    assert threading.active_count() == threads


def test_default_run_dirs_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    for _ in range(3):
        made.append(tracking.default_run_dir("train", "mlp"))
        made[-1].mkdir(parents=True)
    assert len(set(made)) == 3
    assert made[0].parent == Path("runs/train") and made[0].name.endswith("-mlp")


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    tracking.write_json(path, {"root": Path("x"), "value": 0.1})
    assert tracking.read_json(path) == {"root": "x", "value": 0.1}
    with pytest.raises(TypeError):
        tracking.write_json(path, {(1, 2): "a key that JSON lacks"})
    assert tracking.read_json(path) == {"root": "x", "value": 0.1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_machine_can_be_written_and_names_torch():
    machine = json.loads(json.dumps(tracking.describe_machine()))
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["versions"].keys() >= {"python", "torchvision", "numpy", "tensorboard"}
    assert machine["processor"] and machine["threads"] == torch.get_num_threads()


def test_the_commit_is_that_of_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        return tracking.describe_machine()["commit"]

    monkeypatch.setattr("nn_backprop.tracking.machine._SOURCE", tmp_path)
    assert commit() is None  # no checkout
    git("init")
    assert commit() is None  # nothing committed
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", "")
    assert commit() is None  # no git
