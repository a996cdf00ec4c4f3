"""What `check package.module:name` checks: made by a function of the user's, found by its name."""

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from nn_backprop.check.report import in_one_line

WANTED = "it has to return (target, inputs) or (target, inputs, reference)"
OURS = {__file__, str(Path(__file__).parents[1] / "__main__.py")}


def made_by(where: str) -> tuple[Any, tuple, Any]:
    """(target, inputs, reference), from the function package.module:name or file.py:name.

    Raises ValueError, with one sentence, if there is none, or if it raises or returns what is none.
    """
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"{where!r} is neither package.module:name nor file.py:name")
    factory: Any = _module(place)
    for part in name.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"there is no {name!r} in {place}")
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, type):
        what = "a class" if isinstance(factory, type) else f"of type {type(factory).__name__}"
        wanted = "it has to be a function without arguments that returns (target, inputs)"
        raise ValueError(f"{where} is {what}; {wanted}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} raises {described(error)}") from None
    if not isinstance(made, tuple | list) or len(made) not in (2, 3):
        count = f" of length {len(made)}" if isinstance(made, tuple | list) else ""
        raise ValueError(f"{where} returns {type(made).__name__}{count}; {WANTED}")
    target, inputs, reference = (*made, None)[:3]
    if not isinstance(inputs, tuple | list):
        if not hasattr(inputs, "shape"):  # a single array does as well
            raise ValueError(f"{where} returns {type(inputs).__name__} as the inputs; {WANTED}")
        inputs = (inputs,)
    return target, tuple(inputs), reference


def _module(place: str) -> Any:
    """The module of that name, or of that file, with the current directory importable."""
    path, is_file = Path(place), place.endswith(".py")
    if is_file and not path.is_file():
        raise ValueError(f"there is no file {place}")
    folders = [os.getcwd(), *([str(path.parent.resolve())] if is_file else [])]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    try:
        if not is_file:
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"{path.stem} of {path.resolve()}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not is_file and f"{place}.".startswith(f"{missing}."):
            hint = "start from the folder that holds it, or give file.py:name"
            raise ValueError(f"there is no module {missing!r} here: {hint}") from None
        raise ValueError(f"{place} cannot be imported: {described(error)}") from None


def described(error: BaseException) -> str:
    """The error in one line, with the place in the user's code that it comes from."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in OURS
        and not any(part in frame.filename for part in ("importlib", "site-packages"))
    ]  # fmt: skip
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return in_one_line(error) + place
