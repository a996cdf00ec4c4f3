"""Saving a training so that it can go on as if it had never stopped."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    step: int,
    seconds: float,
) -> None:
    """All that the next step depends on, written under a temporary name and then renamed.

    `step` counts the steps done, `seconds` the time that they took. The state of
    the random generators is included (dropout); the order of the data is not, since it follows from
    the seed and the epoch.
    """
    state = {
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    temporary = Path(f"{path}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Puts the parameters and buffers of a checkpoint into a model, in the model's precision."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> tuple[int, float]:
    """Puts everything back as it was saved; returns the steps done and the seconds they took.

    Raises OSError if there is no such file, and whatever torch.load raises if it is damaged.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["seconds"]
