"""Mistakes unseen, in embeddings, gathering, scattering and attention."""

import torch

from mutants.mutant import Case, layer_of, mutant, normal, numbers


def bags(index, offsets, right=True):
    """Which bag an item is in; bag b starts at offsets[b]."""
    return torch.searchsorted(offsets, torch.arange(len(index)), right=right) - 1


# The sum over each bag.
@layer_of(
    lambda index, offsets, weight: weight.new_zeros(len(offsets), weight.shape[1]).index_add(
        0, bags(index, offsets), weight[index]
    ),
    lambda: (torch.tensor([3, 7, 0, 3, 9, 1, 7]), torch.tensor([0, 2, 5]), *numbers((11, 5))),
)
def embedding_bag(grad_z, z, index, offsets, weight):
    rows = grad_z[bags(index, offsets)]
    return None, None, torch.zeros_like(weight).index_add(0, index, rows)


EDGES = [[0, 0, 1, 2, 3, 4, 4, 1], [1, 2, 3, 3, 4, 0, 2, 4]]


# Every node sums the features of the nodes that point to it.
@layer_of(
    lambda edges, x: torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]),
    lambda: (torch.tensor(EDGES), *numbers((5, 3))),
)
def message_passing(grad_z, z, edges, x):
    source, target = edges
    return None, torch.zeros_like(x).index_add(0, source, grad_z[target])


REPEATS = 3
UPSAMPLE = Case(
    lambda x: x.repeat_interleave(REPEATS, 1),
    lambda grad_z, z, x: (grad_z.view(len(x), -1, REPEATS).sum(2),),
    normal((3, 5)),
)


def turned(x, way=1):
    """The pairs of features of x (N, T, D), turned by an angle that grows with the position."""
    position = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    angle = way * position * 0.4 ** torch.arange(x.shape[2] // 2, dtype=x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


@layer_of(lambda x: turned(x), (2, 5, 6))
def rotary_embedding(grad_z, z, x):
    return (turned(grad_z, -1),)


CAP = 1.5


def capped(query, key, value):
    """Attention whose scores s are capped: c tanh(s / c)."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (CAP * torch.tanh(scores / CAP)).softmax(-1) @ value


@layer_of(capped, (2, 5, 7), (2, 3, 7), (2, 3, 7))
def capped_attention(grad_z, z, query, key, value):
    root = query.shape[-1] ** 0.5
    share = torch.tanh(query @ key.mT / root / CAP)
    p = (CAP * share).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    grad_scores = grad_scores * (1 - share**2)
    return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z


EMBEDDING = (
    mutant("embedding/first item of a bag counted to the bag before", "shifted wrong-operand",
        embedding_bag, change={"bags(index, offsets)": "bags(index, offsets, right=False)"}),
    mutant("embedding/edges not reversed in the backward", "wrong-operand transposed",
        message_passing, classic=True, change={"source, target =": "target, source ="}),
    mutant("embedding/repeated entries summed as if the whole had been tiled",
        "permuted wrong-reduction", UPSAMPLE,
        x=lambda at: at.grad_z.view(len(at.x), REPEATS, -1).sum(1)),
)  # fmt: skip
ATTENTION = (
    mutant("attention/rotary embedding turned onwards in the backward", "wrong-operand transposed",
        rotary_embedding, classic=True, change={"grad_z, -1": "grad_z"}),
    mutant("attention/derivative of the scores' cap missing", "missing-factor", capped_attention,
        change={"grad_scores = grad_scores * (1 - share**2)": ""}),
)  # fmt: skip
