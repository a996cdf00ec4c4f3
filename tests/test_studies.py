"""The studies, run as a user runs them, with --smoke; and their committed results."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from nn_backprop import models, studies
from nn_backprop.studies import old_study, page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"
sys.path.insert(0, str(ROOT / "experiments"))
import benchmark  # noqa: E402
import receptive_fields  # noqa: E402

CONVERTED = sorted(path.parent.name for path in RESULTS.glob("*/rows.jsonl"))


@pytest.mark.parametrize("name", CONVERTED)
def test_the_page_and_the_claims_are_those_of_the_rows(name):
    measure = name.removeprefix("benchmark-").replace("-", "_")
    module = f"benchmarks.{measure}" if name.startswith("benchmark-") else name
    study = importlib.import_module(module).STUDY
    folder = RESULTS / name
    rows, about = studies.Rows.read(folder), page.read_about(folder)
    committed = json.loads((folder / "claims.json").read_text())
    recomputed = [asdict(claim) for claim in study.claims(rows)]
    assert json.loads(json.dumps(recomputed)) == committed["claims"]
    assert about["experiment"] == name and not about["config"]["smoke"]
    text = (folder / "README.md").read_text()
    assert page.renewed(text, study.blocks(rows, about)) == text  # of every table, too
    assert text.startswith("# ") and "](picture.png)" in text
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert all(file.stat().st_size <= 300 * 1024 for file in folder.iterdir())


def test_every_study_has_results():
    scripts = [path.stem for path in (ROOT / "experiments").glob("*.py")
               if "studies.Study(" in path.read_text()]  # fmt: skip
    benchmarks = [f"benchmark-{name}" for name in benchmark.NAMES]
    assert sorted([*scripts, *benchmarks]) == CONVERTED


def smoke_rows(name: str, folder: Path, *options: str) -> tuple[studies.Rows, dict[str, dict]]:
    """The rows of `experiments/<name>.py --smoke`, and its claims by their words.

    The claims' words are those before "(smoke: not MNIST)", which each of them has.
    """
    command = [sys.executable, "-W", "error", str(ROOT / f"experiments/{name}.py"), "--smoke"]
    done = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (left,) = folder.glob(f"runs/{name}/*-smoke")
    results = json.loads((left / "claims.json").read_text())
    assert results["experiment"] == name and results["config"]["smoke"] and results["seconds"] > 0
    text = (left / "README.md").read_text()
    assert text in done.stdout
    assert (left / "picture.png").read_bytes().startswith(b"\x89PNG")
    claims = {}
    for claim in results["claims"]:
        low, high = claim["interval"]
        assert low <= claim["measured"] <= high
        assert claim["verdict"] in ("reproduced", "not reproduced", "undecided")
        assert f"| {claim['claim']} |" in text
        words, smoke = claim["claim"][:-19], claim["claim"][-19:]
        assert smoke == " (smoke: not MNIST)"
        claims[words] = claim
    assert len(claims) == len(results["claims"])
    return studies.Rows.read(left), claims


def smoke(name: str, folder: Path) -> dict:
    """The results of `experiments/<name>.py --smoke`, of which it has left all files."""
    command = [sys.executable, "-W", "error", str(ROOT / "experiments" / f"{name}.py"), "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob(f"runs/{name}/*-smoke/results.json")
    results = json.loads(written.read_text())
    assert results["experiment"] == name and results["config"]["smoke"] and results["seconds"] > 0
    table = (written.parent / "results.md").read_text()
    assert table in done.stdout
    assert (written.parent / "results.png").read_bytes().startswith(b"\x89PNG")
    for claim in results["claims"]:
        low, high = claim["interval"]
        assert low <= claim["measured"] <= high
        assert claim["verdict"] in ("reproduced", "not reproduced", "undecided")
        assert f"| {claim['claim']} |" in table
    return results


@pytest.mark.slow
def test_receptive_fields(tmp_path):
    results = smoke("receptive_fields", tmp_path)
    rows = results["rows"]
    settings = {(row["protocol"], row["model"], row["n"], row["seed"]) for row in rows}
    nets = {
        (protocol, net, 320, seed)
        for protocol in ("leaky", "clean")
        for net in models.NETS
        for seed in (0, 1)
    }
    families = {
        ("28 × 28", family, n, seed)
        for family in ("fully-connected", "locally-connected", "shared-weights")
        for n in (100, 1_000)
        for seed in (0, 1)
    }
    assert settings == nets | families and len(rows) == len(settings)
    weights = {row["model"]: (row["parameters"], row["links"]) for row in rows}
    assert weights["net4"] == (1_132, 2_266) and weights["net5"] == (1_060, 5_194)
    assert weights["shared-weights"] == (4_842, 63_906)
    for row in rows:
        assert 0 <= row["test"] <= 1 and row["seconds"] > 0
        if row["n"] == 1_000:
            assert row["test"] > 0.5 > row["shift 6"]  # chance is 0.1
            shares = [row["test"], *(row[f"shift {s}"] for s in (1, 2, 3, 4, 6))]
            assert shares == sorted(shares, reverse=True)
    # Four steps, two jumps and the net without sharing, twice; two claims against each family.
    assert len(results["claims"]) == 2 * 7 + 2 * 2
    by_hand = [
        100 * sum(s * row["test"] for row in rows for net, s in (("net2", 1), ("net1", -1))
                  if (row["model"], row["protocol"], row["seed"]) == (net, "clean", seed))
        for seed in (0, 1)
    ]  # fmt: skip
    (claim,) = (c for c in results["claims"] if c["claim"].startswith("clean: net2 is more"))
    assert claim["published"] == "+7.0"
    assert claim["measured"] == pytest.approx(sum(by_hand) / 2)


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
    assert len(shifted) == 2 * 8
    for row in shifted:  # six pixels of 28: hardly anything is left
        assert row["accuracy_shift_6"] < row["accuracy"]

    assert len(results["claims"]) == 17
    for claim in results["claims"]:
        low, high = claim["interval"]
        assert low <= claim["measured"] <= high and "not MNIST" in claim["claim"]
    (slope,) = [c["measured"] for c in results["claims"] if "to the power" in c["claim"]]
    assert -0.65 < slope < -0.35


# --- the claims, on rows made up for them ---


def test_the_claims_about_receptive_fields_have_the_right_sign():
    accuracy = {"net1": 70, "net2": 75, "net3": 76, "net4": 80, "net5": 90, "net5-unshared": 83}
    rows = [
        {"protocol": protocol, "model": net, "n": 320, "seed": seed,
         "test": (percent + seed) / 100}
        for protocol in ("clean", "leaky") for net, percent in accuracy.items() for seed in (0, 1)
    ]  # fmt: skip
    # at n = 100 sharing gains 7 and 9 points, at 1,000 3 and 4; moved, it loses 2 points, they 5, 4
    for family, few, many, moved in (
        ("shared-weights", 69, 93, 91),
        ("locally-connected", 62, 90, 85),
        ("fully-connected", 60, 89, 85),
    ):
        for seed in (0, 1):
            common = {"protocol": "28 × 28", "model": family, "seed": seed}
            rows.append({**common, "n": 100, "test": (few + seed) / 100})
            rows.append(
                {**common, "n": 1_000, "test": (many + seed) / 100, "shift 2": (moved + seed) / 100}
            )
    claims = receptive_fields._claims(rows[::-1], (100, 1_000))
    measured = {claim.claim: round(claim.measured, 9) for claim in claims}
    expected = {}
    for protocol in ("leaky", "clean"):
        for before, after, points in (
            ("net1", "net2", 5), ("net2", "net3", 1), ("net3", "net4", 4), ("net4", "net5", 10)
        ):  # fmt: skip
            expected[f"{protocol}: {after} is more accurate than {before}, in points"] = points
        for net, points in (("net4", 3), ("net5", 9)):
            jump = f"{protocol}: the step to {net} is larger than the step to net3, by points"
            expected[jump] = points
        sharing = "sharing, not size: net5 is more accurate than net5-unshared, in points"
        expected[f"{protocol}: {sharing}"] = 7
    for other, gained, lost in (("locally-connected", 4, 3), ("fully-connected", 5, 2)):
        gain = f"shared-weights gains more on {other} at n = 100 than at 1,000, in points"
        expected[gain] = gained
        expected[f"moved by 2 px, shared-weights loses less than {other}, in points"] = lost
    assert measured == expected
    assert {claim.verdict for claim in claims} == {"reproduced"}
    # the other way round, nothing is
    swapped = {"test", "shift 2"}
    worse = [{k: 1 - v if k in swapped else v for k, v in row.items()} for row in rows]
    found = receptive_fields._claims(worse, (100, 1_000))
    assert {claim.verdict for claim in found} == {"not reproduced"}


@pytest.mark.parametrize("draws", ["0", "1"])
def test_receptive_fields_refuses_too_few_draws(draws, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = old_study.command(
        receptive_fields.Options, "", receptive_fields.conduct, ["--draws", draws, "--smoke"]
    )
    assert code == 2 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.startswith("receptive_fields.py: --draws must be 2 or more, not")
