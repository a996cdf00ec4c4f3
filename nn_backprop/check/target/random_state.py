"""The random state of a check: the same for each call, and the caller's put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random states of torch, NumPy and Python start from `seed`, and are put back."""
    on_gpu = torch.cuda.is_initialized()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpu else []
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as a small layer
    np.random.seed(seed)
    random.seed(seed)
    if on_gpu:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(gpu_states)
