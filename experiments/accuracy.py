"""How accurate are the three networks, trained as `train.py` trains them by default?

    python experiments/accuracy.py                # 3 networks × 5 seeds on MNIST
    python experiments/accuracy.py --smoke        # the embedded digits, seconds

Runs `train.py` once for each network and seed, as a user would, and holds the test accuracies
against 3Blue1Brown's "about 96 %" for 784-16-16-10 (no set-up given) and against this project's own
promises, 98.0 and 99.0 %. (LeCun, Bottou, Bengio & Haffner 1998 report 95.3 % for 784-300-10 and
98.9 % for LeNet-4.)
"""

import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from nn_backprop import figures
from nn_backprop.studies.evidence import Claim, at_least, markdown_table, write_results
from nn_backprop.tracking import default_run_dir, describe_machine, read_json

CLAIMS = {
    "happy": ("784-16-16-10, sigmoid, squared error: about 96 % (3Blue1Brown)", 0.96),
    "mlp": ("784-128-10, ReLU, cross-entropy: 98.0 % (this project's promise)", 0.98),
    "cnn": ("the convolutional network: 99.0 % (this project's promise)", 0.99),
}


@dataclass(frozen=True)
class Options:
    """Test accuracy of the three networks over seeds."""

    seeds: int = 5
    """Number of seeds, from 0; at least 2."""
    engine: Literal["autograd", "tape", "by-hand"] = "autograd"
    """What computes the gradients."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""
    smoke: bool = False
    """Two seeds and two epochs on the embedded digits."""


def main(options: Options) -> int:
    began = time.perf_counter()
    if options.seeds < 2:
        print(f"accuracy.py: --seeds must be 2 or more, not {options.seeds}", file=sys.stderr)
        return 2
    folder = default_run_dir("accuracy", "smoke" if options.smoke else "full")
    seeds = 2 if options.smoke else options.seeds
    summaries: dict[str, list[dict[str, Any]]] = {model: [] for model in CLAIMS}
    for model, seed in tqdm([(m, s) for m in CLAIMS for s in range(seeds)], unit="run"):
        run = folder / f"{model}-{seed}"
        command = [sys.executable, str(Path(__file__).with_name("train.py"))]
        command += ["--model", model, "--seed", str(seed), "--run-dir", str(run)]
        command += ["--engine", options.engine]
        command += ["--data", "digits", "--epochs", "2"] if options.smoke else ["--data", "mnist"]
        command += ["--data-root", str(options.data_root)] if options.data_root else []
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:  # it has said why
            return done.returncode
        summaries[model].append(read_json(run / "summary.json"))

    accuracies = {m: [run["test_accuracy"] for run in runs] for m, runs in summaries.items()}
    rows = [_row(model, runs) for model, runs in summaries.items()]
    claims: list[Claim] = [  # they speak of MNIST, not of the embedded digits
        at_least(claim, published, accuracies[model])
        for model, (claim, published) in CLAIMS.items()
        if not options.smoke
    ]
    seconds = time.perf_counter() - began
    write_results(
        folder / "results.json",
        "accuracy",
        asdict(options),
        rows,
        claims,
        describe_machine(),
        seconds,
    )
    figure = figures.seed_dots(
        {
            f"{row['model']}\n{row['parameters']:,} parameters": accuracies[row["model"]]
            for row in rows
        },
        {index: published for index, (_, published) in enumerate(CLAIMS.values())},
        f"Test accuracy on {summaries['cnn'][0]['dataset']}, {seeds} seeds each",
    )
    figures.save(figure, folder / "results.png")
    table = markdown_table(rows)
    (folder / "results.md").write_text(table)
    print(table)
    for claim in claims:
        low, high = claim.interval
        print(
            f"{claim.verdict}: {claim.claim}; measured {100 * claim.measured:.2f} % "
            f"[{100 * low:.2f}, {100 * high:.2f}]"
        )
    print(f"Table, picture and results.json: {folder}")
    return 0


def _row(model: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One network: means over its runs."""
    accuracies = [100 * run["test_accuracy"] for run in runs]
    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    validation = 100 * statistics.fmean(run["validation_accuracy"] for run in runs)
    logging = [run["logging_seconds"] / run["train_seconds"] for run in runs]
    return {
        "model": model,
        "parameters": runs[0]["parameters"],
        "epochs": runs[0]["epochs"],
        "seeds": len(runs),
        "test accuracy, %": f"{mean:.2f} ± {deviation:.2f}",
        "lowest, %": f"{min(accuracies):.2f}",
        "validation, %": f"{validation:.2f}",
        "training, s": f"{statistics.median(run['train_seconds'] for run in runs):.1f}",
        "logging, % of training": f"{100 * statistics.median(logging):.1f}",
        "whole run, s": f"{statistics.median(run['wall_seconds'] for run in runs):.1f}",
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
