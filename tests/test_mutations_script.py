"""experiments/mutations.py, run as a user would run it; and what its rows come to."""

import json
import subprocess
import sys

import pytest

import mutants
import mutations
from mutants.mutant import changed
from nn_backprop.studies import Rows


@pytest.mark.slow
def test_a_smoke_run_leaves_rows_a_page_and_a_picture(tmp_path):
    command = [sys.executable, "-W", "error", mutations.__file__, "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs/mutations").iterdir()
    rows = Rows.read(folder)
    of = {kind: len(part) for kind, part in rows.by("of").items()}
    assert of["mistake"] == 22 and of["equivalent"] == 3  # every tenth
    assert rows.where(configurations="all").one("number") == 40
    tables = mutations.tables(rows)
    assert list(tables) == [
        "Caught and named", "By family", "Right gradients", "Every mistake", "Every equivalent"
    ]  # fmt: skip
    page = (folder / "README.md").read_text()
    assert all(f"**{title}**" in page for title in tables) and page in done.stdout
    assert all(" (smoke: not MNIST)" in line for line in page.splitlines() if "promise)" in line)
    assert ", 1 process of one thread, " in page
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_checked_is_kept_where_the_study_ends_early(tmp_path, monkeypatch, capsys):
    def checked(job):
        kind, number = job
        if job == ("configuration", 2):
            raise KeyboardInterrupt
        report = {"report": "wrong"} if number == 1 and kind == "configuration" else {}
        return {"of": kind, "number": number, "description": "…", **report}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mutations, "checked", checked)
    assert mutations.STUDY.main([]) == 130 and "interrupted" in capsys.readouterr().err
    (folder,) = (tmp_path / "runs/mutations").iterdir()
    assert len(Rows.read(folder)) == len(mutants.MUTANTS) + len(mutants.EQUIVALENTS)
    kept = (folder / "configurations.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in kept] == [0, 1]
    assert (folder / "alarms.txt").read_text() == "configuration 1: …\nwrong\n\n"


def test_a_changed_piece_stands_exactly_once():
    def backward(grad_z, x):
        return grad_z * x + x

    wrong = changed(backward, {"* x": "/ x", "+ x": "- x"})
    assert (backward(6, 2), wrong(6, 2)) == (14, 1)
    for piece, times in (("x", 3), ("+ y", 0)):
        with pytest.raises(ValueError, match=f"backward holds {times} times"):
            changed(backward, {piece: "1"})


@pytest.mark.slow
def test_a_configuration_is_drawn_from_its_number_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described = []
    for options in ("--first 3 --configurations 4", "--first 5 --configurations 2 --workers 2"):
        assert mutations.STUDY.main(["--no-catalogue", *options.split()]) == 0
        written = max(tmp_path.glob("runs/mutations/*/configurations.jsonl"))
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        described.append({row["number"]: row["description"] for row in rows})
    first, second = described
    assert list(first) == [3, 4, 5, 6] and sorted(second) == [5, 6]
    assert second.items() <= first.items()


@pytest.mark.parametrize("option", ["--workers 0", "--configurations -1"])
def test_refuses_impossible_options_in_a_sentence(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mutations.STUDY.main(option.split()) == 2
    name, _ = option.split()
    assert f"mutations.py: {name} must be" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def mistake(verdict="fail", causes=("sign",), place=1, part="unseen"):
    return {"of": "mistake", "name": "linear/…", "part": part, "verdict": verdict,
            "causes": list(causes), "place": place}  # fmt: skip


def test_how_mistakes_are_named():
    rows = [
        mistake(),
        mistake(causes=["scale", "sign"], place=2),
        mistake(causes=["unknown"], place=None),
        mistake(causes=[], place=None),
        mistake(causes=["scale"], place=None),
        mistake("pass", [], None),
    ]
    assert [mutations.naming(row) for row in rows] == [
        "first cause right", "second or third right", "unknown", "unknown", "wrong", "not caught"
    ]  # fmt: skip
    assert list(mutations.name_counts(Rows(rows)).values()) == [1, 2, 2, 2]


def test_what_is_claimed():
    right = {"of": "right gradients", "configurations": "all", "number": 99, "fail": 1}
    equivalent = {"of": "equivalent", "verdict": "pass"}
    rows = Rows([mistake()] * 20 + [mistake(place=None)] * 5 + [mistake("pass", [], None, "fit")])
    caught, named, among_three, left = mutations.claims(Rows([*rows, equivalent, right]))
    assert (caught.measured, caught.verdict) == (25 / 26, "not reproduced")
    assert (named.measured, named.verdict) == (20 / 25, "undecided")
    assert (among_three.measured, among_three.verdict) == (20 / 25, "not reproduced")
    assert (left.measured, left.verdict) == (99 / 100, "not reproduced")
    # Of no failure in n, Clopper and Pearson's lower bound is 0.025^(1/n).
    (caught, *_) = mutations.claims(Rows([mistake()] * 20))
    assert caught.interval == pytest.approx((0.025 ** (1 / 20), 1))
    assert caught.verdict == "undecided"  # no number of mistakes shows that all are caught
