"""Mistakes in recurrent layers and scans.

h_t = tanh(x_t weight_xᵀ + h_{t−1} weight_hᵀ + bias), x (N, T, C), h (N, T, H).
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from mutants.mutant import Case, layer_of, mutant, numbers


def states_of(step: Callable[[Tensor, Tensor], Tensor], h0: Tensor, x: Tensor) -> Tensor:
    """Every h_t = step(h_{t−1}, x_t), (N, T, H)."""
    return torch.stack(list(accumulate(x.unbind(1), step, initial=h0))[1:], 1)


def halved(x, h0, weight_x, weight_h, *others):
    return x, h0, weight_x, weight_h / 2, *others


def symmetric(x, h0, weight_x, weight_h, *others):
    return x, h0, weight_x, weight_h / 2 + weight_h.T / 2, *others


def rnn(t: int = 5, lengths: list[int] | None = None, reverse: bool = False) -> Case:
    """A plain recurrent layer; a sample that has ended (`lengths`) keeps its last state."""
    running = torch.tensor([[[i < end] for i in range(t)] for end in lengths or [t, t, t]])

    def recurrent(x, h0, weight_x, weight_h, bias):
        h_t, states = h0, []
        for i in range(x.shape[1]):
            x_t = x[:, -1 - i if reverse else i]
            new = torch.tanh(x_t @ weight_x.T + h_t @ weight_h.T + bias)
            h_t = torch.where(running[:, i], new, h_t)
            states.append(h_t)
        return torch.stack(states[::-1] if reverse else states, 1)

    @layer_of(recurrent, (3, t, 2), (3, 7), (7, 2), (7, 7), (7,), data=halved)
    def recurrence(grad_h, h, x, h0, weight_x, weight_h, bias):
        if reverse:  # from here on in the order of the steps taken
            grad_h, h, x = grad_h.flip(1), h.flip(1), x.flip(1)
        grad_x: list[Tensor] = []
        carry = torch.zeros_like(h0)
        grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
        grad_bias = torch.zeros_like(bias)
        for i in reversed(range(x.shape[1])):
            grad_h_t = grad_h[:, i] + carry
            runs = running[:, i]
            grad_a = grad_h_t * runs * (1 - h[:, i] ** 2)
            grad_weight_x = grad_weight_x + grad_a.T @ x[:, i]
            grad_weight_h = grad_weight_h + grad_a.T @ (h[:, i - 1] if i else h0)
            grad_bias = grad_bias + grad_a.sum(0)
            grad_x.insert(0, grad_a @ weight_x)
            carry = grad_a @ weight_h + grad_h_t * ~runs
        stacked = torch.stack(grad_x[::-1] if reverse else grad_x, 1)
        return stacked, carry, grad_weight_x, grad_weight_h, grad_bias

    return recurrence


def gates_of(x_t, h_t, weight_x, weight_h, bias):
    i, f, g, o = (x_t @ weight_x.T + h_t @ weight_h.T + bias).chunk(4, 1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def long_short_term_memory(x, h0, c0, weight_x, weight_h, bias):
    """Gates i, f, g, o; c_t = f c_{t−1} + i g; h_t = o tanh c_t; returns every h and c_T."""
    h_t, c_t, states = h0, c0, []
    for x_t in x.unbind(1):
        i, f, g, o = gates_of(x_t, h_t, weight_x, weight_h, bias)
        c_t = f * c_t + i * g
        h_t = o * torch.tanh(c_t)
        states.append(h_t)
    return torch.stack(states, 1), c_t


@layer_of(long_short_term_memory, (3, 5, 2), (3, 5), (3, 5), (20, 2), (20, 5), (20,))
def lstm(grad_z, z, x, h0, c0, weight_x, weight_h, bias):
    h_before = torch.cat([h0[:, None], z[0][:, :-1]], 1)
    gates, c = [], [c0]
    for x_t, h_t in zip(x.unbind(1), h_before.unbind(1), strict=True):
        gates.append(gates_of(x_t, h_t, weight_x, weight_h, bias))
        c.append(gates[-1][1] * c[-1] + gates[-1][0] * gates[-1][2])
    grad_x: list[Tensor] = []
    carry_h, carry_c = torch.zeros_like(h0), grad_z[1]
    grad_weight_x, grad_weight_h = torch.zeros_like(weight_x), torch.zeros_like(weight_h)
    grad_bias = torch.zeros_like(bias)
    for step in reversed(range(x.shape[1])):
        i, f, g, o = gates[step]
        tanh_c = torch.tanh(c[step + 1])
        grad_h_t = grad_z[0][:, step] + carry_h
        grad_c = carry_c + grad_h_t * (o * (1 - tanh_c**2))
        grad_i = grad_c * g * i * (1 - i)
        grad_f = grad_c * c[step] * f * (1 - f)
        grad_g = grad_c * i * (1 - g**2)
        grad_o = grad_h_t * tanh_c * o * (1 - o)
        grad_a = torch.cat([grad_i, grad_f, grad_g, grad_o], 1)
        grad_weight_x = grad_weight_x + grad_a.T @ x[:, step]
        grad_weight_h = grad_weight_h + grad_a.T @ h_before[:, step]
        grad_bias = grad_bias + grad_a.sum(0)
        grad_x.insert(0, grad_a @ weight_x)
        carry_h, carry_c = grad_a @ weight_h, grad_c * f
    grad_weights = grad_weight_x, grad_weight_h, grad_bias
    return torch.stack(grad_x, 1), carry_h, carry_c, *grad_weights


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

    def step(h, x_t):
        _, u, n, _ = gru_gates(x_t, h, weight_x, weight_h)
        return (1 - u) * n + u * h

    return states_of(step, h0, x)


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

    def step(h, x_t):
        return torch.tanh(x_t @ weight_x.T + h @ weight_h.T)

    return states_of(step, start.expand(len(x), -1), x)


@layer_of(
    elman_forward, (3, 7, 2), data=lambda x: halved(x, *numbers((5,), (5, 2), (5, 5), seed=1))
)
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
    start = torch.zeros_like(x[:, 0] @ weight.T)
    return states_of(lambda h, x_t: torch.tanh(x_t @ weight.T + decay * h), start, x)


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
    mutant("recurrent/h_t for h_(t-1) in grad_weight_h", "wrong-operand shifted", rnn(),
        change={"(h[:, i - 1] if i else h0)": "h[:, i]"}),
    mutant("recurrent/grad_weight_h overwritten over time", "overwritten subset", rnn(), rnn(1),
        classic=True, change={"grad_weight_h + grad_a.T": "grad_a.T"}),
    mutant("recurrent/carry dropped", "missing-term", rnn(), rnn(1),
        change={"+ grad_h_t * ~runs": "+ grad_h_t * ~runs if not i else torch.zeros_like(h0)"}),
    mutant("recurrent/carry through weight_h transposed", "wrong-operand transposed", rnn(),
        rnn().on(symmetric), change={"grad_a @ weight_h": "grad_a @ weight_h.T"}),
    mutant("recurrent/o (1 - tanh² c) missing in the LSTM", "missing-factor", lstm,
        change={" * (o * (1 - tanh_c**2))": ""}),
    mutant("recurrent/gates i and f exchanged in the LSTM", "permuted", lstm, classic=True,
        change={"[grad_i, grad_f,": "[grad_f, grad_i,"}),
    mutant("recurrent/forget gate with c_t for c_(t-1)", "wrong-operand shifted", lstm,
        change={"c[step] * f": "c[step + 1] * f"}),
    mutant("recurrent/gradient of the last state ignored", "ignores-upstream missing-term", lstm,
        change={", grad_z[1]": ", torch.zeros_like(c0)"}),
    mutant("recurrent/only the last step receives upstream", "subset ignores-upstream", rnn(),
        rnn(1),
        change={"grad_h[:, i] + carry":
                "(grad_h[:, i] + carry if i == x.shape[1] - 1 else carry)"}),
    mutant("recurrent/reverse direction not reversed", "flipped permuted", rnn(reverse=True),
        rnn(1, reverse=True), classic=True,
        change={"grad_x[::-1] if reverse else grad_x": "grad_x"}),
    mutant("recurrent/padded steps contribute", "extra-term missing-factor", rnn(5, [5, 2, 3]),
        rnn(5, [5, 5, 5]),
        change={"runs = running[:, i]": "runs = torch.ones_like(running[:, i])"}),
    mutant("recurrent/h0's gradient missing", "detached", rnn(), h0=lambda at: None),
    mutant("recurrent/cell's carry without the forget gate", "missing-factor", lstm,
        change={"grad_c * f\n": "grad_c\n"}),
    mutant("recurrent/grad_bias overwritten over time in the LSTM", "overwritten subset", lstm,
        lstm.of((3, 1, 2), *lstm.shapes[1:]), change={"grad_bias + grad_a": "grad_a"}),
    mutant("recurrent/grad_weight_h divided by T", "scale wrong-reduction", rnn(), rnn(1),
        classic=True, weight_h=lambda at: at.grad_weight_h / at.x.shape[1]),
)  # fmt: skip
UNSEEN_RECURRENT = (
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
