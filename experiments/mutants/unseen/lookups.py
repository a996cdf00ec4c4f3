"""Mistakes unseen, in embeddings, gathering, scattering and attention."""

import torch
from torch.autograd import Function

from mutants.mutant import Case, mutant, normal, numbers, written_out


def embedding_bag(index, offsets, weight):
    """The sum over each bag; bag b starts at offsets[b]."""
    bag = torch.searchsorted(offsets, torch.arange(len(index)), right=True) - 1
    return weight.new_zeros(len(offsets), weight.shape[1]).index_add(0, bag, weight[index])


def embedding_bag_backward(grad_z, z, index, offsets, weight, mistake=""):
    inclusive = mistake != "starts in the bag before"
    bag = torch.searchsorted(offsets, torch.arange(len(index)), right=inclusive) - 1
    return None, None, torch.zeros_like(weight).index_add(0, index, grad_z[bag])


def bag_data():
    return torch.tensor([3, 7, 0, 3, 9, 1, 7]), torch.tensor([0, 2, 5]), *numbers((11, 5))


def message_passing(edges, x):
    """Every node sums the features of the nodes that point to it."""
    source, target = edges
    return torch.zeros_like(x).index_add(0, target, x[source])


def message_passing_backward(grad_z, z, edges, x):
    source, target = edges
    return None, torch.zeros_like(x).index_add(0, source, grad_z[target])


def graph_data():
    edges = torch.tensor([[0, 0, 1, 2, 3, 4, 4, 1], [1, 2, 3, 3, 4, 0, 2, 4]])
    return edges, *numbers((5, 3))


REPEATS = 3


UPSAMPLE = Case(
    lambda x: x.repeat_interleave(REPEATS, 1),
    lambda grad_z, z, x: (grad_z.view(len(x), -1, REPEATS).sum(2),),
    normal((3, 5)),
)


def rotated(x):
    """The pairs of features of x (N, T, D), turned by an angle that grows with the position."""
    position = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    angle = position * 0.4 ** torch.arange(x.shape[2] // 2, dtype=x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class RotaryEmbedding(Function):
    @staticmethod
    def forward(ctx, x):
        return rotated(x)

    @staticmethod
    def backward(ctx, grad_z):
        return rotated(grad_z)  # onwards, not back


CAP = 1.5


def capped_attention(query, key, value):
    """Attention whose scores s are capped: c tanh(s / c)."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (CAP * torch.tanh(scores / CAP)).softmax(-1) @ value


def capped_attention_backward(grad_z, z, query, key, value, mistake=""):
    root = query.shape[-1] ** 0.5
    share = torch.tanh(query @ key.mT / root / CAP)
    p = (CAP * share).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    if mistake != "cap":
        grad_scores = grad_scores * (1 - share**2)
    return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z


# fmt: off
EMBEDDING = (
    mutant("embedding/first item of a bag counted to the bag before", ("shifted", "wrong-operand"),
        Case(embedding_bag, embedding_bag_backward, bag_data), mistake="starts in the bag before"),
    mutant("embedding/edges not reversed in the backward", ("wrong-operand", "transposed"),
        Case(message_passing, message_passing_backward, graph_data), classic=True,
        x=lambda at: torch.zeros_like(at.x).index_add(0, at.edges[1], at.grad_z[at.edges[0]])),
    mutant("embedding/repeated entries summed as if the whole had been tiled",
        ("permuted", "wrong-reduction"), UPSAMPLE,
        x=lambda at: at.grad_z.view(len(at.x), REPEATS, -1).sum(1)),
)
# fmt: on

# fmt: off
ATTENTION = (
    written_out("attention/rotary embedding turned onwards in the backward",
        ("wrong-operand", "transposed"), lambda: RotaryEmbedding, normal((2, 5, 6))),
    mutant("attention/derivative of the scores' cap missing", ("missing-factor",),
        Case(capped_attention, capped_attention_backward, normal((2, 5, 7), (2, 3, 7), (2, 3, 7))),
        mistake="cap"),
)
# fmt: on
