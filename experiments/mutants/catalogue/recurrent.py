"""Mistakes in recurrent layers.

h_t = tanh(x_t weight_xᵀ + h_{t−1} weight_hᵀ + bias), x (N, T, C), h (N, T, H).
"""

import torch
from torch import Tensor

from mutants.mutant import Case, layer_of, mutant, numbers


def rnn(
    t: int = 5, lengths: list[int] | None = None, reverse: bool = False, symmetric: bool = False
) -> Case:
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

    def data():
        x, h0, weight_x, weight_h, bias = numbers((3, t, 2), (3, 7), (7, 2), (7, 7), (7,))
        weight_h = weight_h / 2
        return x, h0, weight_x, weight_h + weight_h.T if symmetric else weight_h, bias

    @layer_of(recurrent, data)
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


def lstm(t: int = 5) -> Case:
    """Gates i, f, g, o; c_t = f c_{t−1} + i g; h_t = o tanh c_t; returns every h and c_T."""

    def gates_of(x_t, h_t, *weights):
        weight_x, weight_h, bias = weights
        i, f, g, o = (x_t @ weight_x.T + h_t @ weight_h.T + bias).chunk(4, 1)
        return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

    def long_short_term_memory(x, h0, c0, weight_x, weight_h, bias):
        h_t, c_t, states = h0, c0, []
        for x_t in x.unbind(1):
            i, f, g, o = gates_of(x_t, h_t, weight_x, weight_h, bias)
            c_t = f * c_t + i * g
            h_t = o * torch.tanh(c_t)
            states.append(h_t)
        return torch.stack(states, 1), c_t

    shapes = (3, t, 2), (3, 5), (3, 5), (20, 2), (20, 5), (20,)

    @layer_of(long_short_term_memory, *shapes)
    def recurrence(grad_z, z, x, h0, c0, weight_x, weight_h, bias):
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

    return recurrence


RECURRENT = (
    mutant("recurrent/h_t for h_(t-1) in grad_weight_h", "wrong-operand shifted", rnn(),
        change={"(h[:, i - 1] if i else h0)": "h[:, i]"}),
    mutant("recurrent/grad_weight_h overwritten over time", "overwritten subset", rnn(), rnn(1),
        classic=True, change={"grad_weight_h + grad_a.T": "grad_a.T"}),
    mutant("recurrent/carry dropped", "missing-term", rnn(), rnn(1),
        change={"+ grad_h_t * ~runs": "+ grad_h_t * ~runs if not i else torch.zeros_like(h0)"}),
    mutant("recurrent/carry through weight_h transposed", "wrong-operand transposed", rnn(),
        rnn(symmetric=True), change={"grad_a @ weight_h": "grad_a @ weight_h.T"}),
    mutant("recurrent/o (1 - tanh² c) missing in the LSTM", "missing-factor", lstm(),
        change={" * (o * (1 - tanh_c**2))": ""}),
    mutant("recurrent/gates i and f exchanged in the LSTM", "permuted", lstm(), classic=True,
        change={"[grad_i, grad_f,": "[grad_f, grad_i,"}),
    mutant("recurrent/forget gate with c_t for c_(t-1)", "wrong-operand shifted", lstm(),
        change={"c[step] * f": "c[step + 1] * f"}),
    mutant("recurrent/gradient of the last state ignored", "ignores-upstream missing-term", lstm(),
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
    mutant("recurrent/cell's carry without the forget gate", "missing-factor", lstm(),
        change={"grad_c * f\n": "grad_c\n"}),
    mutant("recurrent/grad_bias overwritten over time in the LSTM", "overwritten subset", lstm(),
        lstm(1), change={"grad_bias + grad_a": "grad_a"}),
    mutant("recurrent/grad_weight_h divided by T", "scale wrong-reduction", rnn(), rnn(1),
        classic=True, weight_h=lambda at: at.grad_weight_h / at.x.shape[1]),
)  # fmt: skip
