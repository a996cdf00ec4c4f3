"""Who may import whom: the README's layout, read from the sources with `ast`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nn_backprop

PACKAGE = Path(nn_backprop.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"

# Imports point downward only: a wing imports wings of a lower level, and those of level 0 none.
LEVELS = {
    "errors": 0, "rules": 0, "check": 0, "data": 0, "figures": 0,
    "layers": 1, "training": 1,
    "models": 2,
    "engines": 3,
    "tracking": 4,
    "studies": 5,
    "__main__": 6,
}  # fmt: skip
# Read from top to bottom without another file.
ALONE = {"nn_backprop.engines.by_hand"}
# Slow to import, so that a single wing does.
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
    wing = rest[0] if rest else ""  # "" is the public face, nn_backprop/__init__.py
    for library, home in ONLY_IN.items():
        if library in imported.split(".") and (where, wing) != ("nn_backprop", home):
            return f"only {home}/ imports {library}"
    origin, *inner = imported.split(".")
    scripts = {"experiments", *(path.stem for path in EXPERIMENTS.iterdir())}  # and their folders
    ours = origin == "nn_backprop" or origin in scripts
    if ours and any(re.match("_[a-z]", name) for name in inner):
        return "a private name of another file"
    if where == "experiments":
        script = origin == "experiments" or (EXPERIMENTS / f"{origin}.py").exists()
        return "a script imports another" if script else ""
    if origin in scripts:
        return "the package imports a script"
    if origin != "nn_backprop":
        return ""
    other = inner[0] if inner and inner[0] in LEVELS else ""
    if importer in ALONE:
        return f"{importer} imports nothing of the package"
    if not wing:
        return "the face imports a program" if other == "__main__" else ""
    if wing not in LEVELS:
        return f"{wing} has no level: give it one here and in the README"
    if not other:  # the face, which imports nearly everything
        return "" if wing == "__main__" else f"{wing} imports the face"
    return "" if wing == other or LEVELS[other] < LEVELS[wing] else f"{wing} is not above {other}"


def modules() -> dict[str, Path]:
    """All sources of the package and the scripts, by their full names."""
    paths = sorted([*PACKAGE.rglob("*.py"), *EXPERIMENTS.rglob("*.py")])
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return {n.removesuffix(".__init__"): path for n, path in zip(names, paths, strict=True)}


def test_imports_point_downward():
    found = modules()
    assert {"nn_backprop", "nn_backprop.rules", "nn_backprop.rules.linear"} <= found.keys()
    wrong = {
        (module, imported): why
        for module, path in found.items()
        for imported in imports(path.read_text(), module, path.name == "__init__.py")
        if (why := violation(module, imported))
    }
    assert not wrong


def test_a_violation_is_noticed_and_what_is_allowed_is_allowed():
    for table, allowed in ((VIOLATIONS, False), (ALLOWED, True)):
        for module, sources in table.items():
            for source in sources:
                wrong = any(violation(module, name) for name in imports(source, module))
                assert wrong != allowed, (module, source)


VIOLATIONS = {
    "nn_backprop.rules.linear": ["from nn_backprop.engines.tape import Tape",
        "from ..engines import tape", "from nn_backprop.data import load", "import nn_backprop"],
    "nn_backprop.models.mlp": ["def f():\n    from nn_backprop.engines.tape import Tape",
        "from . import cnn, Tape\nfrom .. import engines"],
    "nn_backprop.engines.by_hand": ["from nn_backprop.rules import TABLE", "from . import tape"],
    "nn_backprop.engines.replay": ["from nn_backprop.engines.tape import _name"],
    "nn_backprop.check.oracle.kinks": ["from nn_backprop.rules import TABLE"],
    "nn_backprop.training.loop": ["from nn_backprop.tracking import Run",
        "from torch.utils.tensorboard import SummaryWriter"],
    "nn_backprop.tracking.run": ["import matplotlib.pyplot as plt", "import experiments.train",
        "from nn_backprop.studies import study", "import nn_backprop.__main__"],
    "nn_backprop.helpers": ["from nn_backprop.rules import TABLE"],
    "nn_backprop": ["from nn_backprop.__main__ import main"],
    "experiments.octave": ["from experiments.train import Options", "import train",
        "from nn_backprop.engines.tape import _play", "import matplotlib"],
    "experiments.mutants.mutant": ["import mutations", "from mutants.right.draw import _looks"],
}  # fmt: skip
ALLOWED = {
    "nn_backprop.layers.winners": ["import torch\nfrom nn_backprop.rules import TABLE"],
    "nn_backprop.models.mlp": ["from . import cnn\nfrom ..rules.linear import linear_forward"],
    "nn_backprop.__main__": ["from nn_backprop import Tape, training"],
    "nn_backprop.tracking.run": ["from torch.utils.tensorboard import SummaryWriter"],
    "experiments.octave": ["from nn_backprop import Tape\nfrom nn_backprop.data import load"],
    "experiments.mutations": ["from mutants import MUTANTS"],
}  # fmt: skip


def test_importing_the_package_is_light():
    """In a new interpreter: this one has imported the others by now."""
    code = """
import sys, nn_backprop, nn_backprop.data
print([m for m in ("torchvision", "tensorboard", "matplotlib", "sklearn") if m in sys.modules])
import nn_backprop.figures
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "False"], done.stderr
