"""experiments/benchmark.py: its smoke runs, its arithmetic, and what it refuses."""

import math
import statistics

import pytest
import torch
from torch.autograd import gradcheck

import benchmark
from benchmarks import checker, common, contestants, engines, many, memory, training_step
from nn_backprop import studies
from nn_backprop.models import MLP, happy

SMALL = training_step.CASES["784-16-16-10, batch 32"]


@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("engines", ["autograd", "matrix product"]),
        ("many", ["autograd, one by one"]),
        ("checker", ["gradcheck, fast mode"]),
        ("scaling", ["autograd"]),
        pytest.param("memory", ["autograd", "itself after 20 steps"], marks=pytest.mark.slow),
        pytest.param("startup", ["import torch"], marks=pytest.mark.slow),
        pytest.param("time-to-accuracy", ["textbook"], marks=pytest.mark.slow),
    ],
)
def test_a_smoke_run_leaves_rows_a_page_and_a_picture(name, peers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main([name, "--smoke"]) == 0
    (folder,) = tmp_path.glob(f"runs/benchmark-{name}/*-smoke")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "README.md").read_text()
    assert page in capsys.readouterr().out
    rows = studies.Rows.read(folder)
    assert sorted(rows.by("peer")) == sorted(peers)
    for row in rows:
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in row["ratios"])
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["ratio"] == statistics.median(row["ratios"])
        assert row["ratio"] == 1 or row["contestant"] != row["peer"]
        assert row["contestant"] in page


def test_a_bad_option_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, said in {
        "engines --rounds 0": "--rounds must be 1 or more, not 0",
        "scaling --threads 0": "--threads must be 1 or more, not 0",
        "many --turn 0": "--turn must be a number of seconds above 0, not 0.0",
        "time-to-accuracy --textbook-seeds 0": "--textbook-seeds must be 1 or more, not 0",
        "time-to-accuracy --target 99": "--target must be between 0 and 1, not 99.0",
        "sprint": "there is no 'sprint'",
        "engines --device cuda": "--device cuda: torch finds none here",
    }.items():
        assert benchmark.main(options.split()) == 2, options
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert sentence.partition(".py: ")[2].startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_the_script_lists_its_measures(capsys):
    assert benchmark.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"benchmark.py {name} " in said for name in benchmark.NAMES)


def test_contestants_work_in_turn(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    worked: list[str] = []
    contestants = {name: lambda name=name: worked.append(name) for name in "ab"}
    times = common.in_turn(contestants, common.Options(rounds=4, turn=0.5))
    assert times == {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}  # one call between two ticks
    assert "".join(worked).endswith("abbaabba")


def test_ratios_are_of_one_round():
    times = {"peer": [2.0, 9.0, 4.0], "ours": [1.0, 3.0, 1.0]}
    theirs, ours = common.compared("case", times, "peer", per=2)
    assert theirs["ratios"] == [1, 1, 1] and theirs["seconds"] == 2
    assert ours["ratios"] == [2, 3, 4] and ours["seconds"] == 0.5
    assert (ours["lowest"], ours["ratio"], ours["highest"]) == (2, 3, 4)


def test_a_bar_is_reached_by_the_whole_interval():
    row = {"case": "case", "contestant": "ours", "peer": "theirs"}

    def verdicts(ratios, *bars):
        rows = studies.Rows([{**row, "ratios": ratios}])
        found = [common.bar_claims(rows, {("case", "ours"): bar}) for bar in bars]
        return [claim.verdict for claims in found for claim in claims]

    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    expected = ["reproduced", "undecided", "not reproduced"]
    assert verdicts(ratios, 1.0, 1.2, 1.6) == expected
    assert verdicts(ratios[:5], 1.0) == []  # of five rounds no interval has 95 %


def test_what_is_claimed_of_memory():
    def verdict(grown, tensors):
        row = {"case": "case", "contestant": "ours", "steps": [1, 2], "tensors": tensors,
               "resident": [0, grown * 2**20]}  # fmt: skip
        return memory.claims(studies.Rows([row]))[0].verdict

    assert verdict(1, [7, 7]) == "reproduced"
    assert verdict(1.5, [7, 7]) == verdict(0, [7, 8]) == "not reproduced"


def test_operations_are_counted_as_by_hand():
    # Forward and weight gradient 2 N i o each; the gradient of the input of all but the first.
    expected = 2 * 32 * (2 * (784 * 16 + 16 * 16 + 16 * 10) + 16 * 16 + 16 * 10)
    assert engines.operations_of(SMALL) == expected


def test_every_engine_takes_the_same_step():
    updated = {}
    for engine in ("autograd", "tape", "by-hand"):
        made = []
        work = training_step.step(engine, lambda made=made: made.append(happy()) or made[0], 7)
        for _ in range(3):
            work()
        updated[engine] = [parameter.detach() for parameter in made[0].parameters()]
    torch.testing.assert_close(updated["tape"], updated["autograd"])
    torch.testing.assert_close(updated["by-hand"], updated["autograd"])


def test_ways_to_train_many_networks_move_them_alike():
    """One step on a batch that holds all examples, whatever their order."""
    data, moved = many.noise(11, "cpu"), {}
    for name, make in many.WAYS.items():
        torch.manual_seed(0)
        models = [MLP((784, 7, 10)) for _ in range(3)]
        work = make(models, data, 11)
        work()
        cells = [cell.cell_contents for cell in getattr(work, "__closure__", None) or ()]
        own = [cell for cell in cells if isinstance(cell, dict)]  # vmap has its own
        moved[name] = {
            key: own[0][key] if name == "vmap(grad)"
            else torch.stack([model.state_dict()[key].clone() for model in models])
            for key in models[0].state_dict()
        }  # fmt: skip
    expected = moved.pop(many.PEER)
    assert len(moved) == 3
    for name, values in moved.items():
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=2e-6, msg=name)


def test_the_peak_is_that_of_a_step():
    """autograd holds parameters, gradients, momentum and the batch at least, each of 4 bytes."""
    peak = memory.profiled_peak("autograd", SMALL)
    parameters = 784 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    least = 4 * (3 * parameters + 32 * 784)
    assert least <= peak <= 1.2 * least


def test_gradcheck_is_given_what_passes():
    target, inputs, _ = checker.targets()["linear Function by hand"]
    assert gradcheck(target.apply, [x.requires_grad_() for x in inputs])
    for target, inputs, _ in list(checker.targets().values())[1:3]:
        assert checker.gradcheck_of(target, inputs, True)()


@pytest.mark.slow
def test_the_textbook_loop_learns(monkeypatch):
    monkeypatch.setattr(contestants.AccuracyOptions, "to_reach", 0.8)
    monkeypatch.setattr(contestants.AccuracyOptions, "most_epochs", 3)
    options = contestants.AccuracyOptions(smoke=True, threads=1)
    outcome = contestants.textbook_run(0, options)
    assert outcome.validation >= 0.8 and outcome.test > 0.7
    assert outcome.epochs <= 3
    assert outcome.seconds >= outcome.epoch_seconds > 0
