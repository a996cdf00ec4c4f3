"""State under a check: of modules, which are copied and given other parameters and buffers; and of
the random generators, which is the same for each call, and the caller's put back at the end."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nn_backprop.check.report import in_one_line
from nn_backprop.check.target.arguments import Unsuitable


def copied(module: nn.Module) -> nn.Module:
    """A copy, with a module that keeps activations on itself too: deepcopy refuses those."""
    kept = {
        id(value): value.detach().clone()
        for part in module.modules()
        for held in vars(part).values()
        for value in tree_leaves(held)
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(module, kept)
    except Exception as error:
        why = "the module cannot be copied, which a check does to leave it as it is"
        raise Unsuitable(f"{why}: {in_one_line(error)}") from error


class Placing:
    """Gives a module parameters and buffers, until the next call: a backward that runs parts of
    the forward again, as of a checkpoint, has to find them."""

    def __init__(self) -> None:
        self.places: WeakKeyDictionary[nn.Module, dict[str, list]] = WeakKeyDictionary()

    def place(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        if module not in self.places:
            tied: dict[int, list[tuple[dict[str, Any], str]]] = {}
            for part in module.modules():
                for held in (part._parameters, part._buffers):
                    for name, tensor in held.items():
                        tied.setdefault(id(tensor), []).append((held, name))
            named = (*module.named_parameters(), *module.named_buffers())
            self.places[module] = {key: tied[id(tensor)] for key, tensor in named}
        for key, tensor in state.items():
            for held, name in self.places[module].get(key, ()):
                held[name] = tensor


class Beside(nn.Module):
    """Calls a function that uses a module, so that the module's parameters can be exchanged."""

    def __init__(self, original: nn.Module, function: Callable):
        super().__init__()
        self.original, self.function = original, function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def seed_generators(seed: int) -> None:
    """The random states of torch, NumPy and Python start from `seed`."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as a small layer
    np.random.seed(seed)
    random.seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the random states start from `seed`; they are put back, which takes longer."""
    on_gpu = torch.cuda.is_initialized()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        seed_generators(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(gpu_states)
