"""The studies, run as a user runs them, with --smoke; and their committed results."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import benchmark
from nn_backprop import studies
from nn_backprop.studies import page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"

CONVERTED = sorted(path.parent.name for path in RESULTS.glob("*/rows.jsonl"))


@pytest.mark.parametrize("name", CONVERTED)
def test_the_page_and_the_claims_are_those_of_the_rows(name):
    measure = name.removeprefix("benchmark-").replace("-", "_")
    module = f"benchmarks.{measure}" if name.startswith("benchmark-") else name
    study = importlib.import_module(module).STUDY
    folder = RESULTS / name
    rows, about = studies.Rows.read(folder), page.read_about(folder)
    committed = json.loads((folder / "claims.json").read_text())
    claims = study.claims(rows)
    recomputed = json.loads(json.dumps([asdict(claim) for claim in claims]))
    for claim, kept in zip(recomputed, committed["claims"], strict=True):
        for key in ("measured", "interval"):  # SciPy's versions have other last digits
            assert claim.pop(key) == pytest.approx(kept.pop(key), rel=1e-9), kept
        assert claim == kept
    assert about["experiment"] == name and not about["config"]["smoke"]
    text = (folder / "README.md").read_text()
    blocks = page.blocks(study.tables(rows), claims, len(rows), about)
    assert page.renewed(text, blocks) == text  # which holds every table
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


def verdicts(claims) -> str:
    """The first letter of each: reproduced, not reproduced, undecided."""
    return "".join(claim.verdict[0] for claim in claims)


def splits_of(data) -> list[set[int]]:
    """The examples of the three splits, none of which is in two of them."""
    splits = [set(split.tolist()) for split in (data.train, data.validation, data.test)]
    assert sum(map(len, splits)) == len(set.union(*splits))
    return splits
