"""Statistics that are broadcast back, and what else is summed over wrong axes, or not at all."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.mismatch import Hypothesis
from nn_backprop.check.diagnosis.recorded import REDUCTIONS, Rule, add_to
from nn_backprop.check.diagnosis.search import EXACT, Search


def reduced(s: Search) -> None:
    """Back through a statistic s of x goes ∂s/∂x · Σ ū, or w ∂s/∂x · Σ ū/w if the factor w that
    the sum does not touch is taken out of it; only over the right axes is that the same."""
    g = s.g
    seen: dict[tuple, list[tuple[int, str, dict[int, Tensor], Tensor]]] = defaultdict(list)
    for i in s.upstream:
        u = s.upstream[i][0]
        chain, x = _traced(s, i)
        if not chain:
            continue
        mean = g.nodes[chain[-1]].op == "mean"
        square = g.maker.get(x, -1)
        base = {v for _, v in g.nodes[square].operands()} if square >= 0 else set()
        if len(base) == 1 and g.nodes[square].op in ("mul", "pow"):
            chain.append(square)
            x = base.pop()
        places = {x}  # where the wrong term goes: past the subtraction of a mean as well
        if x in g.maker and g.nodes[g.maker[x]].op == "sub":
            places.add(g.nodes[g.maker[x]].flat[0].value)
        slope, got = torch.ones_like(s.edges[i][0]), s.edges[i][0]
        for j in chain:
            ks = s.live(j)
            slope = torch.stack([g.vjp(j, [slope])[k] for k in ks]).sum(0)
            got = torch.stack([g.vjp(j, [got])[k] for k in ks]).sum(0)
        if slope.shape != u.shape:
            continue
        name = g.out(i)
        alone = {x: slope * u - got}
        text = f"lacks the terms between different entries: only the diagonal of {name}"
        s.propose(s.sites + 2, "missing-term", text, alone)
        text = f"does not sum the gradient of {name}"
        s.propose(s.sites + 3, "wrong-reduction", text, alone)
        factors = [torch.ones_like(u)]
        for w in s.near(u.shape, i)[:12]:
            if g.values[w].abs().min() > 1e-12:
                factors += [g.values[w], 1 / g.values[w]]
        for over, fair in _other_axes(u.shape, s.edges[i][0].shape):
            text = f"sums the gradient of {name} over axes {list(over)}"
            for by, place in itertools.product(factors, places):
                wrong = (fair if mean else 1.0) * slope * by * (u / by).sum(over, keepdim=True)
                delta = {x: -got}
                add_to(delta, {place: wrong})
                s.propose(s.sites + 3, "wrong-reduction", text, delta)
                seen[over].append((i, name, delta, s.dot(delta)))
    for over, rows in seen.items():
        rows = rows[:500]
        changes = torch.stack([change for *_, change in rows])
        left = (changes[:, None] + changes - s.seen).abs() <= s.slack
        for a, b in left.all(-1).nonzero().tolist():
            one, two = rows[a], rows[b]
            if one[0] < two[0]:
                both = dict(one[2])
                add_to(both, two[2])
                text = f"sums the gradients of {one[1]} and {two[1]} over axes {list(over)}"
                s.propose(s.sites + 5, "wrong-reduction", text, both)


def _traced(s: Search, i: int) -> tuple[list[int], int]:
    """From the expansion of a statistic back to its reduction: the nodes, and what is reduced."""
    chain: list[int] = []
    x = s.g.nodes[i].flat[0].value if s.g.nodes[i].op == "expand" and s.live(i) else -1
    while x in s.g.maker and len(chain) < 8:
        chain.append(s.g.maker[x])
        active = {v for _, v in s.g.nodes[chain[-1]].operands() if v in s.tangents}
        if len(active) != 1:
            break
        x = active.pop()
        is_reduction = s.g.nodes[chain[-1]].op in REDUCTIONS
        if is_reduction and s.g.values[x].shape == s.upstream[i][0].shape:
            break
    return (chain, x) if chain and s.g.nodes[chain[-1]].op in REDUCTIONS else ([], x)


def _other_axes(shape: torch.Size, reduced: torch.Size) -> list[tuple[tuple[int, ...], float]]:
    """Axes to sum over instead of those that are reduced, and the share that makes it a mean."""
    few = torch.Size([1] * (len(shape) - len(reduced))) + reduced
    dims = [d for d, n in enumerate(shape) if n > 1]
    wrong = [
        over for size in range(1, len(dims) + 1) for over in itertools.combinations(dims, size)
    ]
    wrong = [over for over in wrong if not all((few[d] == 1) == (d in over) for d in dims)]
    n = math.prod(shape) // few.numel()
    return [(over, n / math.prod(shape[d] for d in over)) for over in wrong]


def taken_for_constants(s: Search) -> None:
    """Several statistics, or all."""
    found = [i for i in s.upstream if s.g.nodes[i].op in REDUCTIONS and s.live(i)]
    found = [i for i in found if s.g.values[s.g.nodes[i].outs[0]].numel() > 1]
    pairs = itertools.combinations(found[:8], 2)
    for members in dict.fromkeys([tuple(found), *pairs]) if len(found) > 1 else ():
        names = " and ".join(dict.fromkeys(map(s.g.out, members)))
        text = f"lacks the terms that flow through {names}: they are taken for constants"
        s.resweep(s.sites + 3, "missing-term", text, {i: _cut(s, i) for i in members})


def _cut(s: Search, i: int) -> Rule:
    """Nothing flows back through node i."""
    return lambda us, _: {k: torch.zeros_like(e) for k, e in s.edges[i].items()}


def not_reduced(s: Search) -> Iterator[Hypothesis]:
    """It was not summed, or kept a dimension, or is transposed."""
    actual, expected = s.m.actual, s.m.expected
    options = []
    for i, edges in s.edges.items():
        if s.g.nodes[i].op == "expand" and 0 in edges:
            u = s.upstream[i][0]
            text = f"is not summed over the {u.numel() // edges[0].numel()} uses of {s.g.out(i)}"
            options.append(("wrong-reduction", text, u))
    if expected.dim() == 2:
        options.append(("transposed", "is transposed", expected.T))
    if actual.numel() == expected.numel():
        text = f"has the shape {tuple(actual.shape)}"
        options.append(("wrong-reduction", text, expected.reshape(actual.shape)))
    bits = 2.0
    for kind, text, wrong in options:
        if wrong.shape == actual.shape:
            left = float((wrong - actual).norm()) / (float(actual.norm()) or 1.0)
            if left <= EXACT:
                yield s.hypothesis(bits, kind, text, left)
                bits += 1
