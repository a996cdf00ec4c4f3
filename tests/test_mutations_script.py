"""experiments/mutations.py, run as a user would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "mutations.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_smoke_run_writes_tables_picture_and_results(tmp_path):
    done = run(tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "mutations").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == "mutations"
    assert results["claims"] == []  # they speak of the whole catalogue
    tables = {row["table"] for row in results["rows"]}
    assert tables == {
        "Caught and named", "By family", "Right gradients", "Every mistake", "Every equivalent"
    }  # fmt: skip
    (everything,) = (row for row in results["rows"] if row.get("configurations") == "all")
    assert everything["number"] == 40
    written = (folder / "results.md").read_text()
    assert all(f"**{title}**" in written for title in tables)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_configuration_is_drawn_from_its_number_alone(tmp_path):
    described = []
    for options in (["--first", "3", "--configurations", "4"], ["--first", "5", "--workers", "2"]):
        folder = tmp_path / options[1]
        folder.mkdir()
        few = [] if "--configurations" in options else ["--configurations", "2"]
        done = run(folder, "--no-catalogue", *options, *few)
        assert done.returncode == 0, done.stderr
        (written,) = folder.glob("runs/mutations/*/configurations.jsonl")
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        described.append({row["number"]: row["description"] for row in rows})
    first, second = described
    assert list(first) == [3, 4, 5, 6] and list(second) == [5, 6]
    assert second.items() <= first.items()


def test_refuses_impossible_options_in_a_sentence(tmp_path):
    done = run(tmp_path, "--workers", "0")
    assert done.returncode == 2
    assert "--workers must be 1 or more" in done.stderr
