"""The studies over seeds, as their users start them: what a smoke run leaves makes sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def smoke(name: str, folder: Path) -> dict:
    """Runs the script's small version in a folder of its own; its results.json."""
    command = [sys.executable, "-W", "error", str(EXPERIMENTS / f"{name}.py"), "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob(f"runs/{name}/*-smoke/results.json")
    assert path.with_suffix(".png").stat().st_size < 500_000
    assert path.with_suffix(".md").read_text() in done.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
def test_kernel_pooling(tmp_path):
    results = smoke("kernel_pooling", tmp_path)
    kernel = [row for row in results["rows"] if row["contestant"] == "kernel"]
    contests = [row for row in results["rows"] if row["contestant"] != "kernel"]

    assert sorted((row["features"], row["seed"]) for row in kernel) == [
        (d, seed) for d in (64, 256, 1024) for seed in (0, 1)
    ]
    for row in kernel:
        assert 0 < row["mean_error"] < row["root_mean_square"] < row["largest_error"] < 1
        assert 0.8 < row["root_mean_square"] / row["derived"] < 1.2

    settings = ("contestant", "n", "variant", "features", "grid", "pooling", "seed")
    named = [tuple(row[key] for key in settings) for row in contests]
    assert len(set(named)) == len(named)  # nothing is fitted twice
    assert {name[:-1] for name in named if name[-1] == 0} == {
        name[:-1] for name in named if name[-1] == 1
    }
    for variant in ("plain", "rotated", "on noise", "on clutter"):
        rivals = {row["contestant"] for row in contests if row["variant"] == variant}
        assert rivals >= {"vectors", "patches", "CNN"}
    exact = [row for row in contests if row["contestant"] in ("kernel ridge", "SVM")]
    assert len(exact) == 4 and all(row["n"] == 200 and row["accuracy"] > 0.85 for row in exact)
    for row in contests:
        assert 0 < row["accuracy"] <= 1 and row["seconds"] > 0
        if row["contestant"] == "patches":
            assert row["pooled"] == row["features"] * row["grid"] ** 2
            assert row["lifted"] == row["features"] * 12 * 12
        if row["contestant"] == "vectors" and row["n"] == 1197:  # all of them, D = 32, 144, 288
            assert row["accuracy"] > {32: 0.6, 144: 0.9, 288: 0.95}[row["features"]]
    shifted = [row for row in contests if "accuracy_shift_6" in row]
    assert {row["n"] for row in shifted} == {300}
    assert len(shifted) == 2 * 7
    for row in shifted:  # six pixels of 28: hardly anything is left
        assert row["accuracy_shift_6"] < row["accuracy"]

    assert len(results["claims"]) == 16
    for claim in results["claims"]:
        low, high = claim["interval"]
        assert low <= claim["measured"] <= high and "not MNIST" in claim["claim"]
    (slope,) = [c["measured"] for c in results["claims"] if "to the power" in c["claim"]]
    assert -0.65 < slope < -0.35
