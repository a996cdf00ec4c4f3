"""Mistakes unseen, in recurrent layers and scans."""

import torch
from torch import Tensor

from mutants.mutant import layer_of, mutant, numbers


def scan(decay, x):
    """h_t = decay_t h_(t−1) + x_t."""
    states = [x[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(decay[:, t] * states[-1] + x[:, t])
    return torch.stack(states, 1)


@layer_of(scan, (3, 5, 2), (3, 5, 2))
def diagonal_scan(grad_z, h, decay, x):
    grad_h = grad_z.clone()
    for t in reversed(range(h.shape[1] - 1)):
        grad_h[:, t] += decay[:, t + 1] * grad_h[:, t + 1]
    grad_decay = torch.zeros_like(decay)
    grad_decay[:, 1:] = grad_h[:, 1:] * h[:, :-1]
    return grad_decay, grad_h.clone()


@layer_of(lambda x: x.cumsum(1), (3, 7, 2))
def running_sum(grad_z, z, x):
    later = grad_z.sum(1, keepdim=True) - grad_z.cumsum(1)
    return (later + grad_z,)


def gru_gates(x_t, h, weight_x, weight_h):
    """r, u, n and what r multiplies."""
    r_x, u_x, n_x = (x_t @ weight_x.T).chunk(3, 1)
    r_h, u_h, n_h = (h @ weight_h.T).chunk(3, 1)
    r, u = torch.sigmoid(r_x + r_h), torch.sigmoid(u_x + u_h)
    return r, u, torch.tanh(n_x + r * n_h), n_h


def gated(x, h0, weight_x, weight_h):
    """h_t = (1 − u) n + u h_(t−1), n = tanh(… + r weight_n h_(t−1))."""
    h, states = h0, []
    for x_t in x.unbind(1):
        _, u, n, _ = gru_gates(x_t, h, weight_x, weight_h)
        h = (1 - u) * n + u * h
        states.append(h)
    return torch.stack(states, 1)


@layer_of(gated, (3, 7, 2), (3, 5), (15, 2), (15, 5))
def gru(grad_z, z, x, h0, weight_x, weight_h):
    carry, grad_x = torch.zeros_like(h0), torch.zeros_like(x)
    grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
    for t in reversed(range(x.shape[1])):
        before = z[:, t - 1] if t else h0
        r, u, n, n_h = gru_gates(x[:, t], before, weight_x, weight_h)
        grad_h = grad_z[:, t] + carry
        grad_u = grad_h * (before - n) * u * (1 - u)
        grad_n = grad_h * (1 - u) * (1 - n**2)
        grad_r = grad_n * n_h * r * (1 - r)
        by_x = torch.cat([grad_r, grad_u, grad_n], 1)
        by_h = torch.cat([grad_r, grad_u, grad_n * r], 1)
        grad_x[:, t] = by_x @ weight_x
        grad_weight_x += by_x.T @ x[:, t]
        grad_weight_h += by_h.T @ before
        carry = grad_h * u + by_h @ weight_h
    return grad_x, carry, grad_weight_x, grad_weight_h


def elman_forward(x, start, weight_x, weight_h):
    """h_t = tanh(weight_x x_t + weight_h h_(t−1)) from h_0 = start."""
    states = [start.expand(len(x), -1)]
    for x_t in x.unbind(1):
        states.append(torch.tanh(x_t @ weight_x.T + states[-1] @ weight_h.T))
    return torch.stack(states, 1)[:, 1:]


def elman_data():
    start, weight_x, weight_h = numbers((5,), (5, 2), (5, 5), seed=1)
    return *numbers((3, 7, 2)), start, weight_x, weight_h / 2


@layer_of(elman_forward, elman_data)
def elman(grad_z, z, x, start, weight_x, weight_h):
    h = torch.cat([start.expand(len(x), 1, -1), z], 1)
    grad_x, carry = torch.zeros_like(x), torch.zeros_like(h[:, 0])
    grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
    for t in range(x.shape[1] - 1, -1, -1):
        grad_a = (grad_z[:, t] + carry) * (1 - h[:, t + 1] ** 2)
        grad_x[:, t] = grad_a @ weight_x
        grad_weight_x += grad_a.T @ x[:, t]
        grad_weight_h += grad_a.T @ h[:, t]
        carry = grad_a @ weight_h
    return grad_x, carry.sum(0), grad_weight_x, grad_weight_h


def unrolled(x, weight, decay):
    """h_t = tanh(weight x_t + decay · h_(t−1)), every unit with a decay of its own."""
    h, states = torch.zeros_like(x[:, 0] @ weight.T), []
    for x_t in x.unbind(1):
        h = torch.tanh(x_t @ weight.T + decay * h)
        states.append(h)
    return torch.stack(states, 1)


def unrolled_backward(grad_h, h, x, weight, decay):
    grads_a: list[Tensor] = []
    carry = torch.zeros_like(h[:, 0])
    for t in reversed(range(h.shape[1])):
        grads_a.insert(0, (grad_h[:, t] + carry) * (1 - h[:, t] ** 2))
        carry = grads_a[0] * decay
    grad_a = torch.stack(grads_a, 1)
    grad_decay = (grad_a[:, 1:] * h[:, :-1]).sum((0, 1))
    return grad_a @ weight, torch.einsum("nto,nti->oi", grad_a, x), grad_decay


def there_and_back(x, weight, decay, weight_2, decay_2):
    """The states of both directions side by side."""
    there = unrolled(x, weight, decay)
    return torch.cat([there, unrolled(x.flip(1), weight_2, decay_2).flip(1)], 2)


@layer_of(there_and_back, (3, 7, 2), (3, 2), (3,), (5, 2), (5,))
def both_ways(grad_z, z, x, weight, decay, weight_2, decay_2):
    (grad_1, grad_2), (h_1, h_2) = grad_z.split([3, 5], 2), z.split([3, 5], 2)
    grad_x, *there = unrolled_backward(grad_1, h_1, x, weight, decay)
    grad_2, h_2, x_2 = grad_2.flip(1), h_2.flip(1), x.flip(1)
    grad_back, *back = unrolled_backward(grad_2, h_2, x_2, weight_2, decay_2)
    return grad_x + grad_back.flip(1), *there, *back


RECURRENT = (
    mutant("recurrent/scan runs within the upstream gradient", "mutates-input", diagonal_scan,
        classic=True, change={"grad_z.clone()": "grad_z"}),
    mutant("recurrent/cumulative sum's own step left out", "missing-term shifted", running_sum,
        change={"later + grad_z": "later"}),
    mutant("recurrent/n - h for h - n in the GRU's update gate", "sign", gru,
        change={"before - n": "n - before"}),
    mutant("recurrent/reset gate missing on the GRU's way to h", "missing-factor", gru,
        classic=True, change={"grad_n * r]": "grad_n]"}),
    mutant("recurrent/first step left out of the loop", "subset", elman, classic=True, given=1,
        change={"range(x.shape[1] - 1, -1, -1)": "range(x.shape[1] - 1, 0, -1)"}),
    mutant("recurrent/grad_x of the second direction overwrites the first's",
        "overwritten missing-term", both_ways,
        change={"grad_x + grad_back.flip(1)": "grad_back.flip(1)"}),
)  # fmt: skip
