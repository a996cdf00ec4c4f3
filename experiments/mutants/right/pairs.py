"""Pairs of NumPy functions."""

import numpy as np
import torch

from mutants.right.draw import Call, Draw


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_backward(grad, x):
    y = softmax(x)
    return (y * (grad - (grad * y).sum(-1, keepdims=True)),)


def layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)


def layer_norm_backward(grad, x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)
    x_hat = centred / deviation
    grad_hat = grad * gamma
    means = grad_hat.mean(-1, keepdims=True) + x_hat * (grad_hat * x_hat).mean(-1, keepdims=True)
    return (grad_hat - means) / deviation, (grad * x_hat).sum(tuple(range(grad.ndim - 1)))


def squared_error_backward(grad, x, y):
    slope = 2 * (x - y) / x.size * grad
    return slope, -slope


PAIRS = {
    "affine": (
        lambda x, weight, bias: x @ weight.T + bias,
        lambda grad, x, weight, bias: (grad @ weight, grad.T @ x, grad.sum(0)),
    ),
    "softmax": (softmax, softmax_backward),
    "relu": (lambda x: np.maximum(x, 0), lambda grad, x: (grad * (x > 0),)),
    "squared error": (lambda x, y: np.mean((x - y) ** 2), squared_error_backward),
    "layer norm": (layer_norm, layer_norm_backward),
    "cumulative": (
        lambda x: np.cumsum(x, -1),
        lambda grad, x: (np.flip(np.cumsum(np.flip(grad, -1), -1), -1),),
    ),
    "tanh": (np.tanh, lambda grad, x: (grad * (1 - np.tanh(x) ** 2),)),
}


def numpy_pair(d: Draw) -> Call:
    if d.dtype in (torch.bfloat16, torch.float16):
        d.dtype = torch.float64
    n, i, o = d.size(), d.size(), d.size()
    shapes = {"affine": ((n, i), (o, i), (o,)), "squared error": ((n, i), (n, i)),
              "layer norm": ((n, 5), (5,))}  # fmt: skip
    name = d.pick(*PAIRS)
    args = [d.x(*shape) for shape in shapes.get(name, ((n, i),))]
    return Call(name, PAIRS[name], tuple(x.numpy() for x in args))
