"""What a pruned network comes to where its zeros are left out: the size of its file, its time."""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, addmm, nn


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
            a = addmm(bias, weight, a).relu()
        weight, bias = layers[-1]
        return addmm(bias, weight, a).T

    return forward
