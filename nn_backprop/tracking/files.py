"""Files that are written in one step, JSON among them."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as JSON, in one step; what JSON lacks (a Path) is written as its string."""
    replace_file(Path(path), (json.dumps(obj, indent=2, default=str) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: whoever reads it finds the old content or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
