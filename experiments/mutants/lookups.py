"""Mistakes in embeddings, gathering, scattering and attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.mutant import Case, layer_of, mutant

CAP = 1.5
REPEATS = 3
EDGES = [[0, 0, 1, 2, 3, 4, 4, 1], [1, 2, 3, 3, 4, 0, 2, 4]]


def embedding(index: list[list[int]], padding: int = -1) -> Case:
    """Rows of the weight by index; the vectors at the padding index are zero."""

    @layer_of(
        lambda index, weight: F.embedding(index, weight) * (index != padding)[..., None],
        (11, 3),
        data=lambda weight: (torch.tensor(index), weight),
    )
    def embed(grad_z, z, index, weight):
        rows = grad_z * (index != padding)[..., None]
        return None, torch.zeros_like(weight).index_add(0, index.flatten(), rows.flatten(0, 1))

    return embed


def overwritten(at):
    grad_weight = torch.zeros_like(at.weight)
    for k, row in zip(at.index.flatten().tolist(), at.grad_z.flatten(0, 1), strict=True):
        grad_weight[k] = row
    return grad_weight


def attention(causal: bool = False, capped: bool = False) -> Case:
    """softmax(s) value, s = query keyᵀ / √d, (N, T, d). Capped, the softmax is of c tanh(s / c)."""

    def forward(query, key, value):
        if not capped:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return (CAP * torch.tanh(scores / CAP)).softmax(-1) @ value

    @layer_of(forward, (2, 5, 7), (2, 5, 7), (2, 5, 7))
    def attend(grad_z, z, query, key, value):
        root = query.shape[-1] ** 0.5
        scores = query @ key.mT / root
        slope: Tensor | float = 1.0
        if causal:
            ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        if capped:
            share = torch.tanh(scores / CAP)
            scores, slope = CAP * share, 1 - share**2
        p = scores.softmax(-1)
        grad_p = grad_z @ value.mT
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * slope
        return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z

    return attend


# Every head of the query (N, heads, T, d) reads the same key and value (N, 1, T, d).
@layer_of(
    lambda query, key, value: (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value,
    *((2, 3, 5, 7), (2, 1, 5, 7), (2, 1, 5, 7)),
)
def shared_keys(grad_z, z, query, key, value):
    root = query.shape[-1] ** 0.5
    p = (query @ key.mT / root).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / root
    grad_key, grad_value = grad_scores.mT @ query, p.mT @ grad_z
    return grad_scores @ key, grad_key.sum(1, keepdim=True), grad_value.sum(1, keepdim=True)


def bags(index, offsets, right=True):
    """Which bag an item is in; bag b starts at offsets[b]."""
    return torch.searchsorted(offsets, torch.arange(len(index)), right=right) - 1


# The sum over each bag.
@layer_of(
    lambda index, offsets, weight: weight.new_zeros(len(offsets), weight.shape[1]).index_add(
        0, bags(index, offsets), weight[index]
    ),
    (11, 5),
    data=lambda weight: (torch.tensor([3, 7, 0, 3, 9, 1, 7]), torch.tensor([0, 2, 5]), weight),
)
def embedding_bag(grad_z, z, index, offsets, weight):
    rows = grad_z[bags(index, offsets)]
    return None, None, torch.zeros_like(weight).index_add(0, index, rows)


# Every node sums the features of the nodes that point to it.
@layer_of(
    lambda edges, x: torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]),
    (5, 3),
    data=lambda x: (torch.tensor(EDGES), x),
)
def message_passing(grad_z, z, edges, x):
    source, target = edges
    return None, torch.zeros_like(x).index_add(0, source, grad_z[target])


@layer_of(lambda x: x.repeat_interleave(REPEATS, 1), (3, 5))
def upsample(grad_z, z, x):
    return (grad_z.view(len(x), -1, REPEATS).sum(2),)


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


ATTEND = attention()
ONE_FEATURE = ATTEND.of((2, 5, 1), (2, 5, 1), (2, 5, 1))
ONE_HEAD = shared_keys.of((2, 1, 5, 7), (2, 1, 5, 7), (2, 1, 5, 7))
REPEATED = [[3, 7, 3], [1, 3, 8]]
DISTINCT = [[3, 7, 0], [1, 4, 8]]

EMBEDDING = (
    mutant("embedding/repeated indices overwritten", "overwritten", embedding(REPEATED),
        embedding(DISTINCT), weight=overwritten),
    mutant("embedding/padding index not zeroed", "extra-term missing-factor",
        embedding(REPEATED, padding=3), embedding(REPEATED), classic=True,
        change={" * (index != padding)[..., None]": ""}),
    mutant("embedding/index off by one", "shifted", embedding(REPEATED),
        change={"index.flatten()": "(index.flatten() + 1) % len(weight)"}),
)  # fmt: skip
ATTENTION = (
    mutant("attention/1/√d missing", "scale", ATTEND, ONE_FEATURE,
        query=lambda at: at.grad_query * at.query.shape[-1] ** 0.5,
        key=lambda at: at.grad_key * at.query.shape[-1] ** 0.5),
    mutant("attention/1/√d twice", "scale", ATTEND, ONE_FEATURE, classic=True,
        query=lambda at: at.grad_query / at.query.shape[-1] ** 0.5),
    mutant("attention/grad_query and grad_key exchanged", "permuted wrong-operand", ATTEND,
        query=lambda at: at.grad_key, key=lambda at: at.grad_query),
    mutant("attention/causal mask missing in the backward", "missing-factor wrong-operand",
        attention(causal=True), attention(causal=True).of((2, 1, 7), (2, 1, 7), (2, 1, 7)),
        change={"if causal:": "if False:"}),
    mutant("attention/heads not summed for shared keys", "wrong-reduction", shared_keys, ONE_HEAD,
        change={"key.sum(1, keepdim=True)": "key", "value.sum(1, keepdim=True)": "value"}),
    mutant("attention/first head only for shared keys", "subset overwritten", shared_keys, ONE_HEAD,
        classic=True,
        change={"key.sum(1, keepdim=True)": "key[:, :1]",
                "value.sum(1, keepdim=True)": "value[:, :1]"}),
    mutant("attention/softmax with its diagonal only", "missing-term", ATTEND,
        change={" - (grad_p * p).sum(-1, keepdim=True)": ""}),
)  # fmt: skip
UNSEEN_EMBEDDING = (
    mutant("embedding/first item of a bag counted to the bag before", "shifted wrong-operand",
        embedding_bag, change={"bags(index, offsets)": "bags(index, offsets, right=False)"}),
    mutant("embedding/edges not reversed in the backward", "wrong-operand transposed",
        message_passing, classic=True, change={"source, target =": "target, source ="}),
    mutant("embedding/repeated entries summed as if the whole had been tiled",
        "permuted wrong-reduction", upsample,
        x=lambda at: at.grad_z.view(len(at.x), REPEATS, -1).sum(1)),
)  # fmt: skip
UNSEEN_ATTENTION = (
    mutant("attention/rotary embedding turned onwards in the backward", "wrong-operand transposed",
        rotary_embedding, classic=True, change={"grad_z, -1": "grad_z"}),
    mutant("attention/derivative of the scores' cap missing", "missing-factor",
        attention(capped=True).of((2, 5, 7), (2, 3, 7), (2, 3, 7)), change={" * slope": ""}),
)  # fmt: skip
