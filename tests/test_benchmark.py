"""experiments/benchmark.py: its smoke runs, its arithmetic, and what it refuses."""

import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

SCRIPT = Path(__file__).parents[1] / "experiments" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module, under a name by which the processes that it starts find it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("benchmark")


SUBCOMMANDS = [
    ("engines", ["autograd", "matrix product"]),
    ("many", ["autograd, one by one"]),
    ("checker", ["gradcheck, fast mode"]),
    ("scaling", ["autograd"]),
    pytest.param("memory", ["autograd", "itself after 20 steps"], marks=pytest.mark.slow),
    pytest.param("startup", ["import torch"], marks=pytest.mark.slow),
    pytest.param("time-to-accuracy", ["textbook"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "peers"), SUBCOMMANDS)
def test_a_smoke_run_writes_table_picture_and_results(
    benchmark, name, peers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main([name, "--smoke"]) == 0
    (folder,) = tmp_path.glob(f"runs/benchmark/*-{name}-smoke")
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "results.md", "results.png"
    }  # fmt: skip
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    written = (folder / "results.md").read_text()
    assert written.rstrip() in capsys.readouterr().out

    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == f"benchmark {name}"
    assert results["claims"] == []  # they need the whole run
    rows = results["rows"]
    assert sorted({row["peer"] for row in rows}) == sorted(peers)
    for row in rows:
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in row["ratios"])
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["ratio"] == statistics.median(row["ratios"])
        if row["contestant"] == row["peer"]:
            assert row["ratio"] == 1
        assert row["contestant"] in written
    machine = results["machine"]
    assert machine["processor"] in written and machine["versions"]["torch"] in written
    assert f"{machine['threads']} of {machine['cores']} cores" in written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("engines --rounds 0", "--rounds must be 1 or more, not 0"),
        ("scaling --threads 0", "--threads must be 1 or more, not 0"),
        ("many --turn 0", "--turn must be a number of seconds above 0, not 0.0"),
        ("time-to-accuracy --textbook-seeds 0", "--textbook-seeds must be 1 or more, not 0"),
        ("time-to-accuracy --target 99", "--target must be between 0 and 1, not 99.0"),
        ("time-to-accuracy --rungs ninth", "there is no rung 'ninth'"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_code_2(
    benchmark, options, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(options.split()) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith(f"benchmark.py: {said}")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sub_command_has_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "sprint"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sprint" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(benchmark, capsys):
    assert benchmark.main(["engines", "--device", "cuda"]) == 2
    assert "torch finds none here" in capsys.readouterr().err


def test_contestants_work_in_turn(benchmark, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    worked: list[str] = []
    contestants = {name: lambda name=name: worked.append(name) for name in "ab"}
    options = benchmark.Engines(rounds=4, turn=0.5)
    times = benchmark.in_turn(contestants, options)
    assert times == {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}  # one call between two ticks
    assert "".join(worked).endswith("abbaabba")


def test_ratios_are_of_one_round(benchmark):
    times = {"peer": [2.0, 9.0, 4.0], "ours": [1.0, 3.0, 1.0]}
    theirs, ours = benchmark.compared("case", times, "peer", per=2)
    assert theirs["ratios"] == [1, 1, 1] and theirs["seconds"] == 2
    assert ours["ratios"] == [2, 3, 4] and ours["seconds"] == 0.5
    assert (ours["lowest"], ours["ratio"], ours["highest"]) == (2, 3, 4)


@pytest.mark.parametrize(("count", "k"), [(5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (15, 4)])
def test_the_interval_of_the_median(benchmark, count, k):
    # Ranks k for 95 %: Conover, Practical Nonparametric Statistics, binomial table with p = 1/2.
    values = [float(value) for value in range(1, count + 1)]
    assert benchmark.median_interval(values[::-1]) == (k, count + 1 - k)


def test_a_bar_is_reached_by_the_whole_interval(benchmark):
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    verdicts = {bar: benchmark.held("", bar, values).verdict for bar in (1.0, 1.2, 1.6)}
    assert verdicts == {1.0: "reproduced", 1.2: "undecided", 1.6: "not reproduced"}
    verdicts = {
        bar: benchmark.held("", bar, values, at_most=True).verdict for bar in (0.9, 1.2, 1.5)
    }
    assert verdicts == {0.9: "not reproduced", 1.2: "undecided", 1.5: "reproduced"}


def test_operations_are_counted_as_by_hand(benchmark):
    # Forward and weight gradient 2 N i o each; the gradient of the input of all but the first.
    expected = 2 * 32 * (2 * (784 * 16 + 16 * 16 + 16 * 10) + 16 * 16 + 16 * 10)
    assert benchmark._operations(benchmark.CASES["784-16-16-10, batch 32"]) == expected


@pytest.mark.parametrize("name", ["autograd", "tape", "by-hand"])
def test_every_engine_takes_the_same_step(benchmark, name):
    updated = []
    for engine in ("autograd", name):
        made = []
        work = benchmark.step(
            engine, lambda made=made: made.append(benchmark.happy()) or made[0], 7
        )
        for _ in range(3):
            work()
        updated.append([parameter.detach() for parameter in made[0].parameters()])
    torch.testing.assert_close(*updated)


def test_ways_to_train_many_networks_move_them_alike(benchmark):
    """One step on a batch that holds all examples, whatever their order."""
    data, moved = benchmark._noise(11, "cpu"), {}
    for name, make in benchmark.MANY_WAYS.items():
        torch.manual_seed(0)
        models = [benchmark.MLP((784, 7, 10)) for _ in range(3)]
        try:
            work = make(models, data, 11)
        except benchmark.Unavailable:
            continue
        work()
        cells = [cell.cell_contents for cell in getattr(work, "__closure__", None) or ()]
        stacked = [cell for cell in cells if isinstance(cell, dict)]  # vmap has its own
        moved[name] = (
            [stacked[0][key] for key in models[0].state_dict()]
            if name == "vmap(grad)"
            else [
                torch.stack([model.state_dict()[key].clone() for model in models])
                for key in models[0].state_dict()
            ]
        )
    expected = moved.pop("autograd, one by one")
    assert len(moved) >= 2
    for name, values in moved.items():
        for actual, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=2e-6, msg=name)


def test_the_peak_is_that_of_a_step(benchmark):
    """autograd holds parameters, gradients, momentum and the batch at least, each of 4 bytes."""
    case = benchmark.CASES["784-16-16-10, batch 32"]
    peak = benchmark._profiled_peak("autograd", case)
    parameters = 784 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    least = 4 * (3 * parameters + 32 * 784)
    assert least <= peak <= 1.2 * least


def test_gradcheck_is_given_what_passes(benchmark):
    target, inputs, _ = benchmark._targets()["linear Function by hand"]
    assert gradcheck(target.apply, [x.requires_grad_() for x in inputs])
    for target, inputs, _ in list(benchmark._targets().values())[1:3]:
        assert benchmark._gradcheck(target, inputs, True)()


@pytest.mark.slow
def test_the_textbook_loop_learns(benchmark):
    setting = benchmark.Setting("digits", None, 0.8, 3, 1, "cpu")
    outcome = benchmark.textbook_run(0, setting)
    assert outcome.validation >= 0.8 and outcome.test > 0.7
    assert outcome.epochs <= 3
    assert outcome.seconds >= outcome.epoch_seconds > 0
