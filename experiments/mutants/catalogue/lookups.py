"""Mistakes in embeddings and attention."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, mutant, normal, numbers


def embedding(index: list[list[int]], padding: int = -1) -> Case:
    """Rows of the weight by index; the vectors at the padding index are zero."""

    def embed(index, weight):
        return F.embedding(index, weight) * (index != padding)[..., None]

    def backward(grad_z, z, index, weight, mistake=""):
        rows = grad_z * (index != padding)[..., None]
        if mistake == "padding counted":
            rows = grad_z
        rows, flat = rows.flatten(0, 1), index.flatten()
        grad_weight = torch.zeros_like(weight)
        if mistake == "overwritten":
            for k, row in zip(flat.tolist(), rows, strict=True):
                grad_weight[k] = row
            return None, grad_weight
        if mistake == "off by one":
            flat = (flat + 1) % len(weight)
        return None, grad_weight.index_add(0, flat, rows)

    return Case(embed, backward, lambda: (torch.tensor(index), *numbers((11, 3))))


def attention(t: int = 5, d: int = 7, causal: bool = False) -> Case:
    """softmax(query keyᵀ / √d) value, (N, T, d)."""

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def backward(grad_z, z, query, key, value, mistake=""):
        root = d**0.5
        scores = query @ key.mT / root
        if causal and mistake != "no causal mask":
            later = torch.ones(t, t, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        p = scores.softmax(-1)
        grad_p = grad_z @ value.mT
        mean = 0.0 if mistake == "diagonal" else (grad_p * p).sum(-1, keepdim=True)
        grad_scores = p * (grad_p - mean)
        return grad_scores @ key / root, grad_scores.mT @ query / root, p.mT @ grad_z

    return Case(attend, backward, normal((2, t, d), (2, t, d), (2, t, d)))


def shared_keys(query, key, value):
    """Every head of the query (N, heads, T, d) reads the same key and value (N, 1, T, d)."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def shared_keys_backward(grad_z, z, query, key, value, mistake=""):
    root = query.shape[-1] ** 0.5
    p = (query @ key.mT / root).softmax(-1)
    grad_p = grad_z @ value.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / root
    grad_key, grad_value = grad_scores.mT @ query, p.mT @ grad_z
    if mistake == "not summed":
        return grad_scores @ key, grad_key, grad_value
    if mistake == "first head":
        return grad_scores @ key, grad_key[:, :1], grad_value[:, :1]
    return grad_scores @ key, grad_key.sum(1, keepdim=True), grad_value.sum(1, keepdim=True)


def shared(heads: int) -> Case:
    shapes = (2, heads, 5, 7), (2, 1, 5, 7), (2, 1, 5, 7)
    return Case(shared_keys, shared_keys_backward, normal(*shapes))


REPEATED = [[3, 7, 3], [1, 3, 8]]
DISTINCT = [[3, 7, 0], [1, 4, 8]]

# fmt: off
EMBEDDING = (
    mutant("embedding/repeated indices overwritten", ("overwritten",), embedding(REPEATED),
        embedding(DISTINCT), mistake="overwritten"),
    mutant("embedding/padding index not zeroed", ("extra-term", "missing-factor"),
        embedding(REPEATED, padding=3), embedding(REPEATED), mistake="padding counted",
        classic=True),
    mutant("embedding/index off by one", ("shifted",), embedding(REPEATED), mistake="off by one"),
)
# fmt: on

# fmt: off
ATTENTION = (
    mutant("attention/1/√d missing", ("scale",), attention(), attention(d=1),
        query=lambda at: at.grad_query * at.query.shape[-1] ** 0.5,
        key=lambda at: at.grad_key * at.query.shape[-1] ** 0.5),
    mutant("attention/1/√d twice", ("scale",), attention(), attention(d=1), classic=True,
        query=lambda at: at.grad_query / at.query.shape[-1] ** 0.5),
    mutant("attention/grad_query and grad_key exchanged", ("permuted", "wrong-operand"),
        attention(), query=lambda at: at.grad_key, key=lambda at: at.grad_query),
    mutant("attention/causal mask missing in the backward", ("missing-factor", "wrong-operand"),
        attention(causal=True), attention(t=1, causal=True), mistake="no causal mask"),
    mutant("attention/heads not summed for shared keys", ("wrong-reduction",), shared(3), shared(1),
        mistake="not summed"),
    mutant("attention/first head only for shared keys", ("subset", "overwritten"), shared(3),
        shared(1), mistake="first head", classic=True),
    mutant("attention/softmax with its diagonal only", ("missing-term",), attention(),
        mistake="diagonal"),
)
# fmt: on
