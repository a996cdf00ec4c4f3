"""What cannot be checked, and the sentence that says what to hand over instead."""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nn_backprop.check.report import dtype_name


class Unsuitable(ValueError):
    """What was handed over cannot be checked; the message says what to hand over instead."""


def refuse_unsupported(name: str, tensor: Tensor) -> None:
    """Raises Unsuitable for a tensor that is not dense, real and made of numbers."""
    if isinstance(tensor, nn.UninitializedParameter):
        raise Unsuitable(f"{name} has no values yet: call the lazy module once before the check")
    if tensor.is_meta:
        raise Unsuitable(f"{name} is a meta tensor, without numbers: hand over one on a device")
    if tensor.is_nested or (tensor.is_floating_point() and tensor.itemsize < 2):
        what = "nested" if tensor.is_nested else dtype_name(tensor.dtype)
        raise Unsuitable(f"{name} is a tensor of kind {what}, which the checker does not support")
    if tensor.is_complex():
        raise Unsuitable(
            f"{name} is complex, which the checker does not support: hand its real and imaginary "
            "parts (torch.view_as_real) to a target that puts them together"
        )
    if tensor.layout != torch.strided:
        raise Unsuitable(
            f"{name} is a sparse tensor, which the checker does not support: hand over its values"
        )


def hint_at_dataclasses(leaves: list[Any]) -> str:
    """A hint at objects that tensors may be in, which are not looked into."""
    kinds = {type(x).__name__ for x in leaves if is_dataclass(x)}
    return (
        f"; tensors inside a {kinds.pop()} are not seen: hand over a dict or tuple" if kinds else ""
    )


def described(value: Any) -> str:
    """Its type with an article, such as "an int" or "the class Linear"."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
