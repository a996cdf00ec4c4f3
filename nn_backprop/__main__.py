"""`python -m nn_backprop ...`: read the rules, use what was trained, fetch the data.

Exit codes: 0 done; 1 no (data that are not good); 2 could not be run, with one sentence.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from tyro.conf import Positional, subcommand


class UsageError(Exception):
    """One clear sentence: what was wrong, what was expected, what to do."""


@dataclass(frozen=True)
class Rules:
    """The table of derivatives; with a name, the whole derivation of that rule."""

    name: Positional[str | None] = None
    """Name of a rule, such as conv2d."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Evaluate:
    """How well a trained network does on the test split, digit by digit."""

    run: Positional[Path]
    """Folder of the run."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw, if it is not where the run found it."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Predict:
    """Which digit a trained network sees in each picture, and how sure it is."""

    run: Positional[Path]
    """Folder of the run."""
    images: Positional[tuple[Path, ...]]
    """Pictures of one digit each: any size and format, dark on light or light on dark."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Data:
    """Fetch MNIST and verify it, ahead of time."""

    data_root: Path | None = None
    """Folder to hold MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""
    check: bool = False
    """Only verify: write nothing, use no network."""
    json: bool = False
    """Print JSON."""


Command = (
    Annotated[Rules, subcommand("rules")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Data, subcommand("data")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    command: Any = tyro.cli(Command, args=arguments, prog="nn_backprop", description=__doc__)
    from nn_backprop.data import DataError

    if hasattr(sys.stdout, "reconfigure"):  # where σ cannot be written, a ? is better than nothing
        sys.stdout.reconfigure(errors="replace")
    run: dict[type, Callable[[Any], int]] = {
        Rules: rules,
        Evaluate: evaluate,
        Predict: predict,
        Data: data,
    }
    try:
        code = run[type(command)](command)
        sys.stdout.flush()
        return code
    except (UsageError, DataError) as error:
        print(f"nn_backprop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def rules(command: Rules) -> int:
    from torch.overrides import resolve_name

    from nn_backprop.rules import TABLE, Rule

    callables: dict[str, list[str]] = {}
    by_name: dict[str, Rule] = {}
    for function, rule in TABLE.items():
        by_name.setdefault(rule.name, rule)
        callables.setdefault(rule.name, []).append(resolve_name(function) or repr(function))
    if command.name is not None and command.name not in by_name:
        raise UsageError(f"there is no rule {command.name!r}; there are {', '.join(by_name)}")
    chosen = {k: v for k, v in by_name.items() if command.name in (None, k)}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "derived_in": f"{rule.backward.__module__}.{name}_forward",
            "callables": callables[name],
            "equations": rule.equations.splitlines(),
        }
        for name, rule in chosen.items()
    ]
    if command.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif command.name is not None:
        print(f"{command.name}: {', '.join(callables[command.name])}\n")
        rule = chosen[command.name]
        print(inspect.getdoc(sys.modules[rule.backward.__module__]), end="\n\n")  # the letters
        print(rule.derivation)
    else:
        for row in rows:
            print(row["name"])
            for line in row["equations"]:
                print(f"    {line}")
        print("\npython -m nn_backprop rules NAME prints the derivation of one.")
    return 0


def evaluate(command: Evaluate) -> int:
    from nn_backprop import training
    from nn_backprop.data import load

    model, config = _trained(command.run)
    root = command.data_root or config["options"]["data_root"]
    images = load(config["dataset"], root, say=_to_stderr)
    result = training.evaluate(model, images, images.test)
    confusion = result.confusion
    digits: list[dict[str, Any]] = []
    for k, row in enumerate(confusion):
        n, right = int(row.sum()), int(row[k])
        others = row.clone()
        others[k] = 0
        taken_for = {"digit": int(others.argmax()), "times": int(others.max())}
        accuracy = right / n if n else None
        digits.append({"digit": k, "n": n, "accuracy": accuracy, "most_taken_for": taken_for})
    summary = {"dataset": images.name, "accuracy": result.accuracy, "loss": result.loss}
    if command.json:
        print(json.dumps(summary | {"digits": digits}, indent=2))
        return 0
    print(f"{'digit':>6} {'images':>7} {'right':>8}   most often taken for")
    for row in digits:
        share = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        wrong = row["most_taken_for"]
        mistaken = f"{wrong['digit']} ({wrong['times']} times)" if wrong["times"] else "–"
        print(f"{row['digit']:>6} {row['n']:>7} {share:>8}   {mistaken}")
    print(
        f"{'all':>6} {len(result.labels):>7} {100 * result.accuracy:>6.2f} %   "
        f"loss {result.loss:.4f}, test split of {images.name}"
    )
    return 0


def predict(command: Predict) -> int:
    from nn_backprop.data import read_digit

    model, config = _trained(command.run)
    if not command.images:
        raise UsageError("predict needs at least one picture after the run's folder")
    layout = config["dataset"]
    pictures = [(path, read_digit(path, layout)) for path in command.images]
    rows: list[dict[str, Any]] = []
    for path, picture in pictures:
        pixels = (picture[None].to(_dtype(model)) / 255 - config["mean"]) / config["std"]
        with torch.no_grad():
            probabilities = model.probabilities(model(pixels))[0]  # type: ignore[operator]
        digit = int(probabilities.argmax())
        rows.append({"image": str(path), "digit": digit, "confidence": float(probabilities[digit])})
    if command.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['digit']}   {100 * row['confidence']:6.2f} %   {row['image']}")
    return 0


def data(command: Data) -> int:
    from nn_backprop.data import data_root, prepare, verify

    root = data_root(command.data_root)
    if not command.check:
        root = prepare(root, say=_to_stderr)
    found = verify(root)
    if command.json:
        print(json.dumps({"root": str(root), "files": found}, indent=2))
    else:
        print(f"{root / 'MNIST' / 'raw'}")
        for name, state in found.items():
            print(f"    {name:<26} {state}")
    return 0 if set(found.values()) == {"ok"} else 1


def _trained(run: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run as its last checkpoint has it, on the CPU, and the run's config."""
    from nn_backprop.models import MODELS
    from nn_backprop.training import read_checkpoint

    try:
        state = read_checkpoint(run / "checkpoint.pt")
        config = state["progress"]["config"]
        model = MODELS[config["options"]["model"]]()
        model.load_state_dict(state["model"], assign=True)  # in the precision that they have
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{run} holds no trained network ({type(error).__name__}: {reason}): give the folder "
            "of a run of experiments/train.py"
        ) from None
    return model.eval(), config


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
