"""torchvision's MNIST class, or one sentence that says why it cannot be imported."""

from typing import Any

import torch

from nn_backprop.data.files import DataError


def torchvision_mnist() -> Any:
    """The class ``torchvision.datasets.MNIST``.

    Raises DataError when torchvision is missing, or was built for another torch: a CPU build of
    torch beside a default build of torchvision has ``operator torchvision::nms does not exist``.
    """
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # a build for another torch fails in ways that depend on both
        raise DataError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}): install "
            "both from the same index, as in pip install --force-reinstall torch torchvision "
            "--index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return MNIST
