"""The padding row of an embedding, which autograd takes for a constant."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PaddingStays(TorchFunctionMode):
    """Inside, the row of an embedding at its `padding_idx` is a constant, as torch defines it.

    handed: what the forward is called with; values: the same before anything in it moved.
    """

    def __init__(self, handed: dict[str, Tensor], values: dict[str, Tensor]):
        super().__init__()
        self.original = {id(t): values[name] for name, t in handed.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.embedding:
            x, weight, *rest = args if len(args) > 1 else (*args, kwargs.pop("weight"))
            row = rest[0] if rest else kwargs.get("padding_idx")
            if row is not None and id(weight) in self.original:
                padding = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
                padding[row] = True
                weight = torch.where(padding, self.original[id(weight)], weight)
            args = (x, weight, *rest)
        return func(*args, **kwargs)
