"""Mistakes in embeddings and attention."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, layer_of, mutant, numbers


def embedding(index: list[list[int]], padding: int = -1) -> Case:
    """Rows of the weight by index; the vectors at the padding index are zero."""

    @layer_of(
        lambda index, weight: F.embedding(index, weight) * (index != padding)[..., None],
        lambda: (torch.tensor(index), *numbers((11, 3))),
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


def attention(t: int = 5, d: int = 7, causal: bool = False) -> Case:
    """softmax(query keyᵀ / √d) value, (N, T, d)."""

    @layer_of(
        lambda query, key, value: F.scaled_dot_product_attention(
            query, key, value, is_causal=causal
        ),
        *((2, t, d), (2, t, d), (2, t, d)),
    )
    def attend(grad_z, z, query, key, value):
        root = d**0.5
        scores = query @ key.mT / root
        if causal:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        p = scores.softmax(-1)
        grad_p = grad_z @ value.mT
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
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
    mutant("attention/1/√d missing", "scale", attention(), attention(d=1),
        query=lambda at: at.grad_query * at.query.shape[-1] ** 0.5,
        key=lambda at: at.grad_key * at.query.shape[-1] ** 0.5),
    mutant("attention/1/√d twice", "scale", attention(), attention(d=1), classic=True,
        query=lambda at: at.grad_query / at.query.shape[-1] ** 0.5),
    mutant("attention/grad_query and grad_key exchanged", "permuted wrong-operand", attention(),
        query=lambda at: at.grad_key, key=lambda at: at.grad_query),
    mutant("attention/causal mask missing in the backward", "missing-factor wrong-operand",
        attention(causal=True), attention(t=1, causal=True), change={"if causal:": "if False:"}),
    mutant("attention/heads not summed for shared keys", "wrong-reduction", shared_keys, ONE_HEAD,
        change={"key.sum(1, keepdim=True)": "key", "value.sum(1, keepdim=True)": "value"}),
    mutant("attention/first head only for shared keys", "subset overwritten", shared_keys, ONE_HEAD,
        classic=True,
        change={"key.sum(1, keepdim=True)": "key[:, :1]",
                "value.sum(1, keepdim=True)": "value[:, :1]"}),
    mutant("attention/softmax with its diagonal only", "missing-term", attention(),
        change={" - (grad_p * p).sum(-1, keepdim=True)": ""}),
)  # fmt: skip
