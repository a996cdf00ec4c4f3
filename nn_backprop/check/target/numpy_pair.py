"""A pair of NumPy functions, as a Function of torch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function


def numpy_pair(forward: Callable, backward: Callable) -> type[Function]:
    """A Function around NumPy functions ``forward(*inputs)`` and ``backward(grad, *inputs)``.

    Several outputs are a tuple, and then so is `grad`. The backward returns one array for each
    input, or for each floating one.
    """

    class NumpyPair(Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in args]
            ctx.floating = [
                i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()
            ]
            output = forward(*ctx.arrays)
            ctx.single = not isinstance(output, tuple | list)
            outputs = [output] if ctx.single else output
            # Copies, since what is returned may share memory with an input.
            outputs = tuple(torch.from_numpy(np.array(z)) for z in outputs)
            return outputs[0] if ctx.single else outputs

        @staticmethod
        def backward(ctx, *upstream):
            arrays = tuple(grad_z.detach().numpy() for grad_z in upstream)
            grads = backward(arrays[0] if ctx.single else arrays, *ctx.arrays)
            grads = grads if isinstance(grads, tuple | list) else (grads,)
            tensors = [None if g is None else torch.from_numpy(np.array(g)) for g in grads]
            if len(tensors) == len(ctx.arrays):
                return tuple(tensors)
            if len(tensors) != len(ctx.floating):
                raise ValueError(
                    f"backward returned {len(tensors)} gradients for {len(ctx.arrays)} inputs, "
                    f"{len(ctx.floating)} of them floating"
                )
            result: list[Tensor | None] = [None] * len(ctx.arrays)
            for i, tensor in zip(ctx.floating, tensors, strict=True):
                result[i] = tensor
            return tuple(result)

    return NumpyPair
