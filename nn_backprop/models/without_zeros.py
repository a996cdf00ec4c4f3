"""What a pruned network comes to where its zeros are left out: the size of its file, its time."""

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What suffices to restore arrays whose shapes are known.

    Of one with zeros: "<name>", what is not zero, and "<name> there", a bit for each place. Another
    stays as it is.
    """
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        there = array != 0
        found[name] = array if there.all() else array[there]
        if not there.all():
            found[f"{name} there"] = np.packbits(there)
    return found


def packed_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Of the file that `numpy.savez_compressed` makes of packed arrays."""
    file = io.BytesIO()
    np.savez_compressed(file, **packed(arrays))
    return file.tell()


def write_arrays(model: nn.Module, file: Path) -> dict[str, int]:
    """Leaves a model's numbers in an npz file: its "bytes", and "bytes_packed" if they were."""
    arrays: dict[str, Any] = {name: x.numpy() for name, x in model.state_dict().items()}
    np.savez_compressed(file, **arrays)
    return {"bytes": file.stat().st_size, "bytes_packed": packed_bytes(arrays)}


def read_arrays(model: nn.Module, file: Path) -> None:
    """Gives a model the numbers that `write_arrays` left in a file."""
    with np.load(file) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})


def in_sparse_rows(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """An MLP's forward pass with its matrices in `torch.sparse_csr`: zᵀ = W aᵀ + b, then ReLU.

    Its layers are the `nn.Linear`s of the model, in their order, as they are at the time of this
    call. It takes what the model takes, (N, …), and knows no gradients.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        layers = [
            (layer.weight.detach().to_sparse_csr(), layer.bias.detach()[:, None])
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        ]

    def forward(x: Tensor) -> Tensor:
        a = x.flatten(1).T
        for weight, bias in layers[:-1]:
            a = torch.addmm(bias, weight, a).relu()
        weight, bias = layers[-1]
        return torch.addmm(bias, weight, a).T

    return forward
