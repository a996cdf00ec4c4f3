"""Saving a training so that it can go on as if it had never stopped."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    progress: Mapping[str, Any],
) -> None:
    """All that the next step depends on, written under a temporary name and then renamed.

    `progress` is what the caller wants back: numbers, strings, None, lists and dicts of them. The
    state of the random generators is included (dropout); the order of the data is not, since it
    follows from the seed and the epoch.
    """
    state = {
        "progress": dict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    temporary = Path(f"{path}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, by the names above, its tensors on the CPU.

    Raises OSError if there is no such file, ValueError if a byte of it has changed, and whatever
    zipfile and torch.load raise if it is no checkpoint.
    """
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        if archive.testzip() is not None:
            raise ValueError("the checksum is wrong")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> dict[str, Any]:
    """Puts everything back as it was saved; returns the `progress`. Raises as `read_checkpoint`."""
    state = read_checkpoint(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:  # a rate that is a tensor was read to the CPU
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(group["params"][0].device)
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    progress: dict[str, Any] = state["progress"]
    return progress
