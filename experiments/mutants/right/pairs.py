"""Pairs of NumPy functions."""

import numpy as np
import torch

from mutants.right.draw import Call, Draw


def np_affine(x, weight, bias):
    return x @ weight.T + bias


def np_affine_backward(grad, x, weight, bias):
    return grad @ weight, grad.T @ x, grad.sum(0)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_softmax_backward(grad, x):
    y = np_softmax(x)
    return (y * (grad - (grad * y).sum(-1, keepdims=True)),)


def np_relu(x):
    return np.maximum(x, 0)


def np_relu_backward(grad, x):
    return (grad * (x > 0),)


def np_squared_error(x, y):
    return np.mean((x - y) ** 2)


def np_squared_error_backward(grad, x, y):
    slope = 2 * (x - y) / x.size * grad
    return slope, -slope


def np_layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)


def np_layer_norm_backward(grad, x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)
    x_hat = centred / deviation
    grad_hat = grad * gamma
    means = grad_hat.mean(-1, keepdims=True) + x_hat * (grad_hat * x_hat).mean(-1, keepdims=True)
    return (grad_hat - means) / deviation, (grad * x_hat).sum(tuple(range(grad.ndim - 1)))


def np_cumulative(x):
    return np.cumsum(x, -1)


def np_cumulative_backward(grad, x):
    return (np.flip(np.cumsum(np.flip(grad, -1), -1), -1),)


def np_tanh_backward(grad, x):
    return (grad * (1 - np.tanh(x) ** 2),)


def numpy_pair(d: Draw) -> Call:
    if d.dtype in (torch.bfloat16, torch.float16):
        d.dtype = torch.float64
    n, i, o = d.size(), d.size(), d.size()
    pair, args = d.pick(
        lambda: ((np_affine, np_affine_backward), (d.x(n, i), d.x(o, i), d.x(o))),
        lambda: ((np_softmax, np_softmax_backward), (d.x(n, i),)),
        lambda: ((np_relu, np_relu_backward), (d.x(n, i),)),
        lambda: ((np_squared_error, np_squared_error_backward), (d.x(n, i), d.x(n, i))),
        lambda: ((np_layer_norm, np_layer_norm_backward), (d.x(n, 5), d.x(5))),
        lambda: ((np_cumulative, np_cumulative_backward), (d.x(n, i),)),
        lambda: ((np.tanh, np_tanh_backward), (d.x(n, i),)),
    )()
    return Call(pair[0].__name__, pair, tuple(a.numpy() for a in args))
