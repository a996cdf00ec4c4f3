"""What a study does with its jobs, its options, its folder and its page."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nn_backprop import figures, studies
from nn_backprop.data import DataError
from nn_backprop.engines import autograd
from nn_backprop.studies.timing import seconds_of_a_call
from nn_backprop.training import Diverged, Step, evaluate, fit, make_optimizer, make_schedule

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = [path for path in EXPERIMENTS.glob("*.py") if "studies.load_data(" in path.read_text()]


def square(job):
    return {"job": job, "square": job * job}


def collect(run, options):
    rows = run.train_all(square, range(2, 7), lambda row: {"square": row["square"]})
    assert [row["job"] for row in rows] == [2, 3, 4, 5, 6]
    run.add([{"note": 1.0, "ünï": None}])


def claims(rows):
    squares = rows.having("square").values("square")
    return [studies.between("squares are from 0 to 100", None, squares, 0, 100)]


def tables(rows):
    return {"Squares": rows.having("square"), "Sum": [{"sum": sum(r.get("job", 0) for r in rows)}]}


def picture(rows):
    return figures.ratio_dots({"squares": rows.having("job").values("square")}, "squares")


def study(collect=collect):
    return studies.Study(studies.Options, collect, claims, tables, picture)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_study_leaves_rows_tables_verdicts_and_a_picture(workers, tmp_path, capsys):
    assert study().main(["--seeds", "3", "--workers", workers]) == 0
    (folder,) = tmp_path.glob("runs/test_study/*-full")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"job":2,"square":4}', '{"job":3,"square":9}']  # in the jobs' order
    assert len(lines) == 6 and lines[5] == '{"note":1.0,"ünï":null}'
    left = json.loads((folder / "claims.json").read_text())
    assert list(left) == ["experiment", "config", "claims", "machine", "seconds"]
    assert left["experiment"] == "test_study" and left["config"]["seeds"] == 3
    (claim,) = left["claims"]
    assert set(claim) == {"claim", "published", "measured", "interval", "verdict"}
    assert claim["verdict"] == "reproduced" and claim["measured"] == 18
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.out.tfevents.*")) and not list(folder.glob("*.tmp"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5]
    assert sorted(record["square"] for record in logged) == [4, 9, 16, 25, 36]
    shown = capsys.readouterr().out
    assert shown.count((folder / "README.md").read_text()) == 1
    assert "| 6 | 36 |" in shown and "**reproduced**" in shown and "6 rows in" in shown


PAGE = """# A question
<!-- generated: Sum -->
old
<!-- end -->
prose
<!-- generated: Squares -->
<!-- end -->
<!-- generated: claims -->
<!-- end -->
<!-- generated: run -->
<!-- end -->
"""


def test_a_page_is_renewed_from_its_rows(tmp_path, monkeypatch, capsys):
    assert study().main(["--workers", "1"]) == 0
    (folder,) = tmp_path.glob("runs/test_study/*-full")
    monkeypatch.setattr(studies.Study, "results", tmp_path / "results")
    assert study().main(["--page"]) == 2  # nothing is there yet
    shutil.copytree(folder, tmp_path / "results")
    page, rows = tmp_path / "results/README.md", tmp_path / "results/rows.jsonl"
    page.write_text(PAGE)
    rows.write_text(rows.read_text().replace('"square":36', '"square":360'))
    (tmp_path / "results/picture.png").unlink()
    capsys.readouterr()
    assert study().main(["--page"]) == 0 and len(list(tmp_path.glob("runs/*/*"))) == 1
    text = page.read_text()
    assert "old" not in text and "end -->\nprose\n<!-- gen" in text
    assert text.index("| 20 |") < text.index("prose") < text.index("| 6 | 360 |")
    assert "| squares are from 0 to 100 | – | 82.8 | " in text and "6 rows in" in text
    (claim,) = json.loads((tmp_path / "results/claims.json").read_text())["claims"]
    assert claim["measured"] == 82.8 and claim["verdict"] == "undecided"
    assert (tmp_path / "results/picture.png").exists()
    for wrong, why in (
        (PAGE.replace("generated: Sum", "generated: Summ"), "there is no block 'Summ'"),
        (PAGE.replace("generated: Sum", "by hand"), "the page has no block for Sum"),
    ):
        page.write_text(wrong)
        assert study().main(["--page"]) == 2 and why in capsys.readouterr().err
        assert page.read_text() == wrong


def refuse(run, options):
    raise studies.UsageError("no such thing: take another")


def lack(run, options):
    raise DataError("no MNIST: fetch it")


def test_a_study_that_cannot_begin_says_why_and_leaves_nothing(tmp_path, capsys):
    for end, arguments, why in (
        (refuse, "", "no such thing: take another"),
        (lack, "", "no MNIST: fetch it; --smoke needs neither files nor network"),
        (collect, "--seeds 1", "--seeds must be 2 or more, not 1"),
        (collect, "--seeds 1 --smoke", "--seeds must be 2 or more, not 1"),
        (collect, "--workers 0", "--workers must be 1 or more, not 0"),
    ):
        assert study(end).main(arguments.split()) == 2, why
        assert capsys.readouterr().err == f"test_study.py: {why}\n"
        assert list(tmp_path.iterdir()) == [], why


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


WAITS = """
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
from nn_backprop import studies

def train(job):
    if job > 0:
        wait_at("training")
    return {"job": job}

def collect(run, options):
    wait_at("start")
    run.train_all(train, range(3))

if __name__ == "__main__":
    sys.exit(studies.Study(studies.Options, collect, None, None, None).main(sys.argv[1:3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "workers", "jobs"),
    [("start", "1", None), ("import", "2", []), ("training", "1", [0]), ("training", "2", [0])],
)
def test_ctrl_c_is_one_line_at_any_moment(moment, workers, jobs, tmp_path):
    """Sent, as a terminal does, to every process; `jobs` are those whose rows are kept by then."""
    (script := tmp_path / "waits.py").write_text(WAITS)

    def waiting_at():
        return list(tmp_path.glob(f"{moment}.*"))

    with subprocess.Popen(
        [sys.executable, script, "--workers", workers, moment],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as running:  # fmt: skip
        kept = [] if jobs == [] else None
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
    (script := tmp_path / "waits.py").write_text(WAITS)
    with subprocess.Popen(
        [sys.executable, script, "--workers", "2", "training"], cwd=tmp_path, stderr=subprocess.PIPE
    ) as running:
        while len(list(tmp_path.glob("training.*"))) < 2:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        running.kill()
        running.communicate(timeout=60)  # they, too, hold stderr, and would for 100 s: it ends


def fails(job):
    """1 has its process killed, 2 diverges, 3 is interrupted."""
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 2:
        step = Step(number=7, epoch=0, examples=3, loss=torch.tensor(0.0), lr=0.5)
        raise Diverged("the loss became nan", step)
    raise KeyboardInterrupt


def test_a_study_that_ends_early_says_why_and_where_its_rows_are(capsys):
    for job, workers, code, why in (
        (1, "2", 1, "the process of a training was killed, perhaps for want of memory: try "
         "--workers 1"),
        (2, "1", 1, "a training diverged, 2: the loss became nan at step 7"),
        (3, "1", 130, "interrupted"),
    ):  # fmt: skip

        def collect(run, options, job=job):
            run.add([square(0)])
            run.train_all(fails, [job])

        assert study(collect).main(["--workers", workers]) == code, why
        (folder,) = Path().glob("runs/test_study/*")
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"test_study.py: {why}")
        assert last.endswith(f"; the rows so far are in {folder}")
        assert json.loads((folder / "rows.jsonl").read_text()) == square(0)
        shutil.rmtree("runs")


def test_a_smoke_run_has_the_least_of_each_count_and_its_claims_say_so(tmp_path):
    seen = []
    smoke = study(lambda run, options: (seen.append(options), collect(run, options)))
    assert smoke.main(["--smoke"]) == 0
    assert seen == [dataclasses.replace(studies.Options(), seeds=2, workers=1, smoke=True)]
    (left,) = tmp_path.glob("runs/test_study/*-smoke/claims.json")
    (claim,) = json.loads(left.read_text())["claims"]
    assert claim["claim"] == "squares are from 0 to 100 (smoke: not MNIST)"


# --- trainings, rows, timings ---


def test_a_training_goes_on_with_the_batches_that_follow_and_a_new_schedule():
    data = studies.load_data(studies.Options(smoke=True))
    assert data is studies.load_data(studies.Options(smoke=True, seeds=9)) and data.name == "digits"
    one, other = (studies.Recipe((16,), 0, 0, 0).network(seed=0) for _ in range(2))
    steps, epochs = -(-len(data.train) // 100), []
    for done in (0, 1):
        how = {"epochs": done + 1, "batch_size": 100, "seed": 3}
        trained = studies.train_network(
            one, data, lr=0.02, decay=0.1, done=done, **how, on_epoch=lambda _, n: epochs.append(n)
        )
        optimizer = make_optimizer("adam", other.parameters(), 0.02, 0.1)
        schedule = make_schedule("one-cycle", optimizer, 0.02, (done + 1) * steps)
        how["epochs"] += done
        fit(other, autograd, optimizer, schedule, data, done=done * steps, **how)
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert epochs == [1, 2, 3] and trained.seconds > 0 and trained.optimizer.state
    found = studies.accuracies(one, data)
    assert list(found) == ["train_accuracy", "validation_accuracy", "test_accuracy"]
    assert found["test_accuracy"] == evaluate(other, data, data.test).accuracy > 0.6


ROWS = studies.Rows(
    {"who": who, "lr": lr, "decay": decay, "seed": seed, "score": score, "n": 7}
    for who, lr, decay, scores in (
        ("a", 1, 0, [0.1, 0.9]), ("a", 2, 0, [0.62, 0.62]), ("a", 2, 1, [0.55, 0.55]),
        ("b", 1, 0, [0.7, 0.7]), ("b", 2, 1, [1.0, 0.1]),
    )
    for seed, score in reversed(list(enumerate(scores)))
)  # fmt: skip


def test_rows_are_chosen_grouped_and_read_in_the_order_of_the_seeds():
    assert ROWS.where(who="a", lr=1).values("score", 100).tolist() == [10, 90]
    assert ROWS.where(who="b", lr=2).values(lambda row: 1 - row["score"]).tolist() == [0, 0.9]
    assert list(ROWS.by("who", "lr")) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert ROWS.by("who")["b"] == ROWS.where(who="b") == ROWS[6:]
    assert ROWS.one("n") == 7 and not ROWS.having("other") and not ROWS.where(other=None)
    for wrong in (ROWS.where(who="a"), ROWS.where(who="c")):
        with pytest.raises(ValueError, match="one row a seed is expected"):
            wrong.values("score")
    with pytest.raises(ValueError, match="lr is not the same in all rows: 1"):
        ROWS.one("lr")


def test_the_best_settings_are_those_of_the_highest_mean_score_of_their_group():
    def kept(*of):
        return [row for row in ROWS if (row["who"], row["lr"], row["decay"]) in of]

    settings = ["lr", "decay"]
    assert ROWS.best(["who"], settings, "score") == kept(("a", 2, 0), ("b", 1, 0))
    worse = studies.Rows({**row, "score": 1 - row["score"]} for row in ROWS)
    best = worse.best(["who"], settings, "score")
    assert list(best.by("who", *settings)) == [("a", 1, 0), ("b", 2, 1)]
    assert ROWS.best([], settings, "score") == kept(("a", 2, 0), ("b", 1, 0))[:2]


def test_a_round_has_everyone_once_in_any_order_and_its_own_ratios(monkeypatch):
    """Who takes 1, 2 and 3 s, and twice as long in every round as in the last."""
    called = []

    def seconds(work, calls):
        called.append(work())
        return called[-1] * calls * 2 ** ((len(called) - 1) // 3)

    monkeypatch.setattr("nn_backprop.studies.timing.seconds_of_a_call", seconds)
    work = {"a": lambda: 1, "b": lambda: 2, "c": lambda: 3}
    timings = list(studies.timed_rounds(work, "b", 20, 5, random.Random(0)))
    orders = [tuple(called[k : k + 3]) for k in range(0, len(called), 3)]
    assert len(orders) == 21 and len(set(orders)) == 6  # with one that does not count
    assert all(sorted(order) == [1, 2, 3] for order in orders)
    assert [(t.who, t.round) for t in timings] == [(w, n) for n in range(20) for w in "abc"]
    assert all(t.ratio == {"a": 0.5, "b": 1, "c": 1.5}[t.who] for t in timings)
    assert timings[0].seconds == 10  # the second round's


def test_the_first_call_does_not_count(monkeypatch):
    calls = []  # each is a second
    monkeypatch.setattr("time.perf_counter", lambda: float(len(calls)))
    assert seconds_of_a_call(lambda: calls.append(0), 4) == 1 and len(calls) == 5
