"""Arrays from anywhere: out of NumPy, torch, JAX or a file, by name, as tensors.

Everything of an operation fits in one flat mapping, and so in one file, under these keys, of which
only the first is needed:

    grad/NAME     input/NAME  parameter/NAME  label/NAME     upstream/0 …     output/0 …

`option/NAME` may say more (a stride, an axis); it is not read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = {"inputs": "input", "parameters": "parameter", "labels": "label", "upstream": "upstream",
         "outputs": "output"}  # fmt: skip


def load(path: str | Path) -> dict[str, Any]:
    """The arrays of an .npz or .safetensors file, by name.

    Nothing in the file is executed. Raises ValueError, in one sentence, for a file that is missing,
    of another kind, damaged, without arrays, or with arrays of Python objects.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} is neither an .npz nor a .safetensors file")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = ""
    try:
        arrays: dict[str, Any] = {}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            arrays = load_file(path)
        else:
            with open(path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a single array, as .npy files hold")
                for name in archive:
                    arrays[name] = archive[name]
    except Exception as error:  # damaged files fail in many ways
        if "Object arrays" in str(error):
            what = f"{path} holds Python objects under {name!r}"
            raise ValueError(f"{what}, which are not read: save numbers only") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "allow_pickle" in reason or "pickled" in reason:  # what NumPy says of any other file
            reason = "it is not an archive of arrays"
        raise ValueError(f"{path} cannot be read as {path.suffix}: {reason}") from None
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    return arrays


def split_context(arrays: Any, who: str) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The gradients of a mapping, and its context if it is in the flat layout."""
    if not isinstance(arrays, Mapping):
        kind = type(arrays).__name__
        raise ValueError(f"{who} is a {kind}; it has to be a mapping of names to arrays")
    arrays = {str(name): value for name, value in arrays.items()}
    if not any(name.startswith("grad/") for name in arrays):
        return {n: _array(a, f"{who} {n!r}") for n, a in arrays.items()}, {}
    words = (*(f"{word}/" for word in WORDS.values()), "option/")
    context = {n: a for n, a in arrays.items() if n.startswith(words)}
    rest = {n: _array(a, f"{who} {n!r}") for n, a in arrays.items() if n not in context}
    return {n.removeprefix("grad/"): a for n, a in rest.items()}, flat_context(context)


def flat_context(context: Any) -> dict[str, Tensor]:
    """A context in the flat layout, whichever it was in."""
    if not isinstance(context, Mapping):
        raise ValueError(f"the context is a {type(context).__name__}; it has to be a mapping")
    found: dict[str, Any] = {}
    for key, value in context.items():
        word, _, name = str(key).partition("/")
        if key in WORDS and not name:
            items: Iterable = [(0 if key in ("upstream", "outputs") else key, value)]
            if isinstance(value, Mapping):
                items = value.items()
            elif isinstance(value, list | tuple) and any(map(_has_shape, value)):
                items = enumerate(value)
            found |= {f"{WORDS[key]}/{n}": part for n, part in items}
        elif name and word in WORDS.values():
            found[str(key)] = value
        elif word not in ("grad", "option"):
            allowed = f"{', '.join(WORDS)}, or keys such as input/x"
            raise ValueError(f"the context has {key!r}; it may have {allowed}")
    arrays = {key: _array(value, f"the context's {key!r}") for key, value in found.items()}
    return {key: array for key, array in arrays.items() if array is not None}


def _array(value: Any, what: str) -> Tensor | None:
    """As a tensor on the CPU; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{what} is not an array: its rows differ in length") from None
        named = getattr(torch, array.dtype.name, None)  # such as JAX's bfloat16, not of NumPy
        kind = array.dtype.kind
        if kind in "iu":
            if array.size and array.max() > np.iinfo(np.int64).max:
                why = "holds whole numbers beyond 2⁶³ − 1, which are no gradient"
                raise ValueError(f"{what} {why}")
            value = torch.from_numpy(array.astype(np.int64, order="C"))
        elif kind == "b":
            value = torch.from_numpy(array.astype(bool, order="C"))
        elif kind == "f" or (isinstance(named, torch.dtype) and named.is_floating_point):
            value = torch.from_numpy(array.astype(np.float64, order="C"))
            value = value.to(named) if isinstance(named, torch.dtype) else value
        else:
            is_object = array.dtype == object
            found = f"a {type(value).__name__}" if is_object else f"of type {array.dtype}"
            raise ValueError(f"{what} is {found}; it has to be an array of real numbers")
    if value.is_complex() or value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise ValueError(f"{what} is {value.dtype}, {value.layout}; it has to be dense and real")
    return value.detach().cpu()


def _has_shape(value: Any) -> bool:
    return hasattr(value, "shape") and not isinstance(value, np.generic)
