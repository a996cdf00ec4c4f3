"""The studies, run as a user runs them, with --smoke: do their results make sense?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nn_backprop import models

ROOT = Path(__file__).parents[1]


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
