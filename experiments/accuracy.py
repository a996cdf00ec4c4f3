"""How accurate are the three networks, trained as `train.py` trains them by default?

    python experiments/accuracy.py                # 3 networks × 5 seeds on MNIST
    python experiments/accuracy.py --smoke        # the embedded digits, a minute

What is compared, and what came out: results/accuracy/README.md.
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from nn_backprop import figures, studies
from nn_backprop.studies import Claim, Row, Rows, Table
from nn_backprop.tracking import read_json

CLAIMS = {
    "happy": ("784-16-16-10, sigmoid, squared error: about 96 % (3Blue1Brown)", 0.96),
    "mlp": ("784-128-10, ReLU, cross-entropy: 98.0 % (this project's promise)", 0.98),
    "cnn": ("the convolutional network: 99.0 % (this project's promise)", 0.99),
}
OF_A_RUN = ("parameters", "epochs", "dataset", "test_accuracy", "validation_accuracy",
            "train_seconds", "wall_seconds", "max_gradient_disagreement")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(studies.Command):
    """Test accuracy of the three networks over seeds."""

    least: ClassVar[dict[str, int]] = {"seeds": 2}

    seeds: int = 5
    """Number of seeds, from 0."""
    engine: Literal["autograd", "tape", "by-hand"] = "autograd"
    """What computes the gradients."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""


def collect(run: studies.StudyRun, options: Options) -> None:
    studies.load_data(options)
    turns = [(model, seed) for model in CLAIMS for seed in range(options.seeds)]
    for model, seed in tqdm(turns, unit="run"):
        run.add([train(model, seed, options, run.opened.path / f"{model}-{seed}")])


def train(model: str, seed: int, options: Options, folder: Path) -> Row:
    """A run of train.py, as a user would start it."""
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    command += ["--model", model, "--seed", str(seed), "--run-dir", str(folder)]
    command += ["--engine", options.engine]
    command += ["--data", "digits", "--epochs", "2"] if options.smoke else ["--data", "mnist"]
    command += ["--data-root", str(options.data_root)] if options.data_root else []
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:  # it has said why
        raise studies.StudyError(
            f"train.py --model {model} --seed {seed} was not brought to an end"
        )
    summary = read_json(folder / "summary.json")
    logging = summary["logging_seconds"] / summary["train_seconds"]
    return {"model": model, "seed": seed, "logging_share": logging,
            **{key: summary[key] for key in OF_A_RUN}}  # fmt: skip


# --- What the rows come to ----------------------------------------------------------------------


def claims(rows: Rows) -> list[Claim]:
    """The test accuracies, which are of MNIST, against what was published or promised."""
    return [
        studies.at_least(claim, published, by_seed(rows, model))
        for model, (claim, published) in CLAIMS.items()
    ]


def by_seed(rows: Rows, model: str) -> list[float]:
    return list(rows.where(model=model).having("seed").values("test_accuracy"))


def tables(rows: Rows) -> dict[str, Table]:
    return {"The three networks": [line(model, part) for model, part in rows.by("model").items()]}


def line(model: str, rows: Rows) -> dict[str, Any]:
    """One network: means and medians over its runs."""
    accuracies = [100 * row["test_accuracy"] for row in rows.having("seed")]

    def every(key: str) -> list[float]:
        return [row[key] for row in rows.having(key)]

    return {
        "model": model,
        "parameters": every("parameters")[0],
        "epochs": every("epochs")[0],
        "seeds": len(accuracies),
        "test accuracy, %": studies.mean_sd(accuracies),
        "lowest, %": f"{min(accuracies):.2f}",
        "validation, %": f"{100 * statistics.fmean(every('validation_accuracy')):.2f}",
        "training, s": f"{statistics.median(every('train_seconds')):.1f}",
        "logging, % of training": f"{100 * statistics.median(every('logging_share')):.1f}",
        "whole run, s": f"{statistics.median(every('wall_seconds')):.1f}",
    }


def picture(rows: Rows) -> figures.Figure:
    accuracies = {
        f"{line['model']}\n{line['parameters']:,} parameters": by_seed(rows, str(line["model"]))
        for line in tables(rows)["The three networks"]
    }
    published = {index: published for index, (_, published) in enumerate(CLAIMS.values())}
    seeds = len(by_seed(rows, "cnn"))
    dataset = rows.having("dataset")[0]["dataset"]
    return figures.seed_dots(
        accuracies, published, f"Test accuracy on {dataset}, {seeds} seeds each"
    )


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
