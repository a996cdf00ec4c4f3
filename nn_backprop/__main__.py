"""`python -m nn_backprop ...`: read the rules, check gradients, use what was trained, fetch data.

Exit codes: 0 done, or right; 1 no (gradients that are wrong, data that are not good); 2 could not
be run, with one sentence; 3 inconclusive.
"""

import inspect
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from tyro.conf import Positional, arg

from nn_backprop.errors import UsageError

Json = Annotated[bool, arg(name="json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> int:
    from nn_backprop.data import DataError

    if hasattr(sys.stdout, "reconfigure"):  # where σ cannot be written, a ? is better than nothing
        sys.stdout.reconfigure(errors="replace")
    commands = (rules, check, compare, export, evaluate, predict, data)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands},
            prog="nn_backprop", description=__doc__, args=arguments,
        )  # fmt: skip
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


def rules(name: Positional[str | None] = None, as_json: Json = False) -> int:
    """The table of derivatives; with a name, the whole derivation of that rule.

    Args:
        name: Name of a rule, such as conv2d.
    """
    from nn_backprop.rules import TABLE
    from nn_backprop.rules.rule import name_of

    callables: dict[str, list[str]] = {}
    for function, rule in TABLE.items():
        callables.setdefault(rule.name, []).append(name_of(function))
    chosen = _rules_by_name(name)
    rows: list[dict[str, Any]] = [
        {
            "name": rule.name,
            "derived_in": f"{rule.backward.__module__}.{rule.name}_forward",
            "callables": callables[rule.name],
            "equations": rule.equations.splitlines(),
        }
        for rule in chosen.values()
    ]
    if as_json:
        _print_json(rows)
    elif name is not None:
        print(f"{name}: {', '.join(callables[name])}\n")
        rule = chosen[name]
        print(inspect.getdoc(sys.modules[rule.backward.__module__]), end="\n\n")  # the letters
        print(rule.derivation)
    else:
        for row in rows:
            print(row["name"])
            for line in row["equations"]:
                print(f"    {line}")
        print("\npython -m nn_backprop rules NAME prints the derivation of one.")
    return 0


def check(
    target: Positional[str | None] = None, gallery: bool = False, seed: int = 0,
    second_order: bool = False, as_json: Json = False,
) -> int:  # fmt: skip
    """Whether a gradient is right and, if not, why.

    Args:
        target: package.module:name or file.py:name, name being a function without arguments that
            returns (target, inputs) or (target, inputs, reference), as check_gradients takes them.
        gallery: Instead, print one small mistake of every kind and what is said of it, as Markdown.
        seed: Of everything that is drawn: the upstream gradient, and what the function draws.
        second_order: Check the derivative of the backward too.
    """
    from nn_backprop.check import check_gradients
    from nn_backprop.check.factory import described, made_by
    from nn_backprop.check.target.state import seeded

    if (target is None) != gallery:
        raise UsageError("check takes either package.module:name or --gallery")
    if target is None:
        return _print_gallery(as_json)
    _check_seed(seed)
    with redirect_stdout(sys.stderr), seeded(seed):  # stdout is for the report
        try:
            made, inputs, reference = made_by(target)
            report = check_gradients(
                made, *inputs, reference=reference, seed=seed, second_order=second_order
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        except SystemExit as stop:
            raise UsageError(f"{target} left Python, with code {stop.code}") from None
        except Exception as error:  # never 1, which says that the gradient is wrong
            raise UsageError(f"{target} cannot be checked: {described(error)}") from None
    if report.error is not None and report.verdict == "inconclusive":
        if not as_json:
            raise UsageError(f"{report.target}: {report.reason}")
        _print_json(report.to_dict())
        return 2
    return _print_report(report, as_json)


def compare(
    actual: Positional[Path], expected: Positional[Path], context: Path | None = None,
    as_json: Json = False,
) -> int:  # fmt: skip
    """Whether gradients computed elsewhere are the expected ones and, if not, why.

    Args:
        actual: The gradients by name: an .npz or .safetensors file.
        expected: What they should be: such a file, or one that `export` wrote.
        context: A file with inputs, upstream gradient and outputs, such as `export` writes: they
            help to say why a gradient is wrong. What EXPECTED holds of them is used anyway.
    """
    from nn_backprop.check import compare_gradients
    from nn_backprop.check.arrays import load

    try:
        known = None if context is None else load(context)
        report = compare_gradients(load(actual), load(expected), known)
    except ValueError as error:
        raise UsageError(str(error)) from None
    report.target = f"{actual} against {expected}"
    return _print_report(report, as_json)


def export(rule: Positional[str], out: Positional[Path], seed: int = 0) -> int:
    """Write an example of a rule, gradients included, to compare a port of it with.

    Args:
        rule: Name of a rule, such as conv2d.
        out: The file to write: an .npz.
        seed: Of the operands and the upstream gradient.
    """
    from nn_backprop.rules.export import example, write

    chosen = _rules_by_name(rule)[rule]
    _check_seed(seed)
    arrays = example(chosen, seed)
    try:
        write(out, arrays)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(out)
    for key, array in arrays.items():
        what = array if key.startswith("option/") else f"{array.dtype} {array.shape}"
        print(f"    {key:<22} {what}")
    return 0


def evaluate(run: Positional[Path], data_root: Path | None = None, as_json: Json = False) -> int:
    """How well a trained network does on the test split, digit by digit.

    Args:
        run: Folder of the run.
        data_root: Folder that holds MNIST/raw, if it is not where the run found it.
    """
    from nn_backprop import training
    from nn_backprop.data import load, suited

    model, config = _trained_network(run)
    root = data_root or config["options"]["data_root"]
    images = suited(load(config["dataset"], root, say=_to_stderr), model)
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
    if as_json:
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


def predict(
    run: Positional[Path], images: Positional[tuple[Path, ...]], as_json: Json = False
) -> int:
    """Which digit a trained network sees in each picture, and how sure it is.

    Args:
        run: Folder of the run.
        images: Pictures of one digit each: any size and format, dark on light or light on dark.
    """
    from nn_backprop.data import read_digit, resize

    model, config = _trained_network(run)
    if not images:
        raise UsageError("predict needs at least one picture after the run's folder")
    layout = config["dataset"]
    pictures = [(path, read_digit(path, layout)) for path in images]
    rows: list[dict[str, Any]] = []
    for path, picture in pictures:
        picture = resize(picture[None], getattr(model, "image_size", picture.shape[-1]))
        pixels = (picture.to(_dtype(model)) / 255 - config["mean"]) / config["std"]
        with torch.no_grad():
            probabilities = model.probabilities(model(pixels))[0]  # type: ignore[operator]
        digit = int(probabilities.argmax())
        rows.append({"image": str(path), "digit": digit, "confidence": float(probabilities[digit])})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['digit']}   {100 * row['confidence']:6.2f} %   {row['image']}")
    return 0


def data(data_root: Path | None = None, check: bool = False, as_json: Json = False) -> int:
    """Fetch MNIST and verify it, ahead of time.

    Args:
        data_root: Folder to hold MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache.
        check: Only verify: write nothing, use no network.
    """
    from nn_backprop import data

    root = data.data_root(data_root)
    if not check:
        root = data.prepare(root, say=_to_stderr)
    found = data.verify(root)
    if as_json:
        print(json.dumps({"root": str(root), "files": found}, indent=2))
    else:
        print(f"{root / 'MNIST' / 'raw'}")
        for name, state in found.items():
            print(f"    {name:<26} {state}")
    return 0 if set(found.values()) == {"ok"} else 1


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed is {seed}; it has to be from 0 to 2³² − 1")


def _rules_by_name(name: str | None) -> dict[str, Any]:
    """Every rule by its name, or the named one."""
    from nn_backprop.rules import TABLE

    by_name: dict[str, Any] = {}
    for rule in TABLE.values():
        by_name.setdefault(rule.name, rule)
    if name is not None and name not in by_name:
        raise UsageError(f"there is no rule {name!r}; there are {', '.join(by_name)}")
    return {k: rule for k, rule in by_name.items() if name in (None, k)}


def _print_report(report: Any, as_json: bool) -> int:
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report)
    return {"pass": 0, "fail": 1, "inconclusive": 3}[report.verdict]


def _print_gallery(as_json: bool) -> int:
    from nn_backprop.check.gallery import gallery, page

    examples = list(gallery())
    if as_json:
        _print_json([{"kind": k, "source": s, "report": r.to_dict()} for k, s, r in examples])
    else:
        print(page(examples))
    named = [report.causes and report.causes[0].kind == kind for kind, _, report in examples]
    return 0 if all(named) else 1


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _trained_network(run: Path) -> tuple[nn.Module, dict[str, Any]]:
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
