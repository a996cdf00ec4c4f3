"""Who may import whom: DESIGN's layout, read from the sources with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nn_backprop

PACKAGE = Path(nn_backprop.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"

# Imports point downward only: to a unit (a file or folder of the package) of a lower level.
LEVELS = {
    "rules": 0,
    "tape": 1, "function": 1, "by_hand": 1, "by_hand_fast": 1, "replay": 2,
    "layers": 2,
    "models": 3,
    "engines": 4, "export": 4, "study": 4,
    "monitor": 5,
    "__main__": 6,
}  # fmt: skip
# These stand beside: they import nothing of the levels nor one another, and are used from the
# engines upward.
BESIDE = {
    "check", "counting", "data", "training", "tracking", "figures", "evidence", "rejection",
}  # fmt: skip
# ... but for this: training draws its batches from data.ImageData.
ALLOWED = {("training", "data")}
FIRST_USER_OF_BESIDE = LEVELS["engines"]
# Read from top to bottom without another file.
ALONE = {"by_hand"}
# Slow to import, so a single file does.
ONLY_IN = {"tensorboard": "tracking", "matplotlib": "figures"}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Full names of what a module imports, at the top or inside a function."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def violation(importer: str, imported: str) -> str:
    """What is wrong with `importer` importing `imported`, or nothing."""
    where, *rest = importer.split(".")
    unit = rest[0] if rest else ""  # "" is the public face, nn_backprop/__init__.py
    for library, home in ONLY_IN.items():
        if library in imported.split(".") and (where, unit) != ("nn_backprop", home):
            return f"only {home}.py imports {library}"
    origin, *inner = imported.split(".")
    if where == "experiments":
        if origin == "experiments" or (EXPERIMENTS / f"{origin}.py").exists():
            return "a script imports another"
        private = origin == "nn_backprop" and any(name.startswith("_") for name in inner)
        return "a script imports a private name" if private else ""
    if origin == "experiments":
        return "the package imports a script"
    if origin != "nn_backprop":
        return ""
    other = inner[0] if inner and (inner[0] in LEVELS or inner[0] in BESIDE) else ""
    if unit not in LEVELS and unit not in BESIDE and unit:
        return f"{unit} has no level: give it one here and in DESIGN.md"
    if unit == other:
        return ""
    if unit in ALONE:
        return f"{unit} imports nothing of the package"
    if unit in BESIDE:
        return "" if (unit, other) in ALLOWED else f"{unit} stands beside {other or 'the rest'}"
    if not unit:
        return "the face imports a program" if other == "__main__" else ""
    level = LEVELS[unit]
    if other in BESIDE:
        return "" if level >= FIRST_USER_OF_BESIDE else f"{unit} is below {other}"
    if not other:  # the face, which imports nearly everything
        return "" if unit == "__main__" else f"{unit} imports the face"
    return "" if LEVELS[other] < level else f"{unit} is not above {other}"


def sources() -> list[tuple[str, Path]]:
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *EXPERIMENTS.glob("*.py")]):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=[module for module, _ in sources()])
def test_imports_point_downward(module, path):
    wrong = {
        imported: why
        for imported in imports(path.read_text(), module, path.name == "__init__.py")
        if (why := violation(module, imported))
    }
    assert not wrong


def test_the_sources_are_found():
    assert {"nn_backprop", "nn_backprop.rules", "nn_backprop.rules.linear"} <= dict(
        sources()
    ).keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nn_backprop.rules.linear", "from nn_backprop.tape import Tape"),
        ("nn_backprop.rules.linear", "from nn_backprop import models"),
        ("nn_backprop.rules.linear", "from ..tape import Tape"),
        ("nn_backprop.rules.linear", "from nn_backprop.data import load"),
        ("nn_backprop.rules.linear", "import nn_backprop"),
        ("nn_backprop.tape", "def f():\n    from nn_backprop.models.cnn import CNN"),
        ("nn_backprop.tape", "from nn_backprop.function import as_function"),
        ("nn_backprop.models.mlp", "from . import cnn, Tape\nfrom .. import engines"),
        ("nn_backprop.by_hand", "from nn_backprop.rules import TABLE"),
        ("nn_backprop.by_hand", "from . import rules"),
        ("nn_backprop.check.oracles", "from nn_backprop.rules import TABLE"),
        ("nn_backprop.check.oracles", "from nn_backprop.figures import grid"),
        ("nn_backprop.training.loop", "from nn_backprop import Tape"),
        ("nn_backprop.training.loop", "from nn_backprop.tracking import Run"),
        ("nn_backprop.engines", "import nn_backprop.__main__"),
        ("nn_backprop.engines", "from torch.utils.tensorboard import SummaryWriter"),
        ("nn_backprop.tracking", "import matplotlib.pyplot as plt"),
        ("nn_backprop.tracking", "import experiments.train"),
        ("nn_backprop.helpers", "from nn_backprop.rules import TABLE"),
        ("nn_backprop", "from nn_backprop.__main__ import main"),
        ("experiments.accuracy", "from experiments.train import Options"),
        ("experiments.accuracy", "from experiments import train"),
        ("experiments.accuracy", "import train"),
        ("experiments.accuracy", "from nn_backprop.tape import _Step"),
        ("experiments.accuracy", "import matplotlib"),
    ],
)
def test_a_violation_is_noticed(module, source):
    assert any(violation(module, imported) for imported in imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nn_backprop.models.mlp", "import torch\nfrom nn_backprop.rules import TABLE"),
        ("nn_backprop.models.mlp", "from . import cnn\nfrom ..rules.linear import linear_forward"),
        ("nn_backprop.engines", "from nn_backprop import by_hand\nimport nn_backprop.data"),
        ("nn_backprop.__main__", "from nn_backprop import Tape, training"),
        ("nn_backprop.tracking", "from torch.utils.tensorboard import SummaryWriter"),
        ("experiments.accuracy", "from nn_backprop import Tape\nfrom nn_backprop.data import load"),
    ],
)
def test_what_is_allowed_is_allowed(module, source):
    assert not any(violation(module, imported) for imported in imports(source, module))


def test_importing_the_package_is_light():
    """In a new interpreter: this one has imported the others by now."""
    heavy = ["torchvision", "tensorboard", "matplotlib", "sklearn"]
    code = f"import sys, nn_backprop; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
