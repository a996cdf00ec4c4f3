"""Diagnosis by counterfactual, continued: mistakes that concern more than one step of a chain.

A value that is used several times, a row of rearrangements, a statistic that is broadcast back, a
constant wherever it occurs, another forward. Each family is a function of the search (`mistakes`),
to which it proposes the mistakes that it knows.
"""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nn_backprop.check.diagnosis.graph import (
    MOVES,
    PRODUCTS,
    REDUCTIONS,
    SILENT,
    TURNS,
    Graph,
    Rule,
    add_to,
    aten,
    offsets,
)

if TYPE_CHECKING:
    from nn_backprop.check.diagnosis.mistakes import Search

MAX_POOL = 32  # tensors tried in the place of another


def fan_out(s: "Search") -> None:
    """A value is used several times, and the last gradient written wins."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for v, parts in s.parts.items():
        total = s.g.total(s.parts, v)
        if v not in s.tangents or len(parts) < 2 or total is None:
            continue
        i = s.g.maker.get(v)
        alike[v if i is None else s.place[i][0]].append(v)
        bits = s.sites + 3 + math.log2(len(parts)) / 2
        if i is not None and s.g.nodes[i].flat[0] == (s.leaf,) and _multiplies(s, v):
            bits = s.sites - 1  # a weight used twice: likelier than a path forgotten
        for n, part in enumerate(parts):
            if n not in (0, len(parts) - 1) and len(parts) > 6:
                continue
            which = "last" if n == 0 else "first" if n == len(parts) - 1 else f"{n + 1}th last"
            text = f"keeps only the contribution of the {which} of the {len(parts)} uses of "
            s.propose(bits, "overwritten", text + s.name(v), {v: part - total})
        for part in parts if len(parts) < 7 else ():
            if (part == 0).any():
                text = f"is set, not added to, where one use of {s.name(v)} takes an entry"
                there = torch.where(part != 0, part - total, 0.0)
                s.propose(bits + 1, "overwritten", text, {v: there})
        if len(parts) > 2:
            text = f"averages over the {len(parts)} uses of {s.name(v)} instead of summing"
            mean = {v: total / len(parts) - total}
            s.propose(s.sites + 4, "wrong-reduction", text, mean)
    for vs in alike.values():
        for n, which in ((0, "last"), (-1, "first")) if len(vs) > 1 else ():
            merges = dict.fromkeys(vs, operator.itemgetter(n))
            text = f"keeps only the contribution of the {which} use of {s.name(vs[-1])}"
            s.resweep(s.sites + 4, "overwritten", text + " each time", {}, merges)


def _multiplies(s: "Search", v: int) -> bool:
    """Whether a value is a weight: each of its uses is a product."""
    for i in s.g.uses[v]:
        node = s.g.nodes[i]
        through = node.op in SILENT or node.op in TURNS
        if node.op not in PRODUCTS and not (through and _multiplies(s, node.outs[0])):
            return False
    return v in s.g.uses


def slices_exchanged(s: "Search") -> None:
    """The gradients of two slices of one tensor are exchanged."""
    for v, users in s.g.uses.items():
        cuts = [i for i in dict.fromkeys(users) if s.g.nodes[i].op in ("select", "slice")]
        cuts = [i for i in cuts if i in s.edges and s.live(i)]
        cuts = cuts if v in s.tangents else []
        for i, j in itertools.combinations(cuts, 2) if len(cuts) <= 8 else ():
            first, second = s.upstream[i], s.upstream[j]
            if first[0].shape == second[0].shape:
                delta = s.g.vjp(i, second)[0] + s.g.vjp(j, first)[0]
                delta = delta - s.edges[i][0] - s.edges[j][0]
                text = f"exchanges the slices {s.out(i)} and {s.out(j)}"
                s.propose(s.sites + 4, "permuted", text, {v: delta})


def rearranged(s: "Search") -> None:
    """A row of operations that only move entries, such as the split into heads, is undone by
    the wrong reshape, or by itself."""
    g = s.g
    for i in s.edges:
        _repeated(s, i)
    for start in s.edges:
        chain, i = [], start
        while True:
            node = g.nodes[i]
            if node.op not in {*TURNS, *SILENT, "reshape"} or list(s.live(i)) != [0]:
                break
            x = g.values[node.flat[0].value]
            if x.numel() != g.values[node.outs[0]].numel():
                break
            chain.append(i)
            after = g.uses.get(node.outs[0], [])
            if len(after) != 1 or after[0] not in s.edges:
                break
            i = after[0]
        turns = [j for j in chain if g.nodes[j].op in TURNS]
        if not turns or len(chain) < 2:
            continue
        v = g.nodes[start].flat[0].value
        right = s.edges[start][0]
        for end in range(chain.index(turns[0]) + 1, len(chain) + 1):
            u = s.upstream[chain[end - 1]][0]
            if u is None:
                continue
            what = s.out(chain[end - 1])
            text = f"is reshaped where {what} has to be put back in order"
            s.propose(s.sites + 3, "permuted", text, {v: u.reshape(right.shape) - right})
            if u.shape == right.shape:
                for j in chain[:end]:
                    u = g.call(j, {0: u})[0]
                text = f"goes through the rearrangement {what} once more, not back"
                s.propose(s.sites + 3, "permuted", text, {v: u - right})


def _repeated(s: "Search", start: int) -> None:
    """Groups that share a row are taken for others: 0 1 2 0 1 2 for 0 0 1 1 2 2, or back."""
    g, i = s.g, start
    right = s.edges[start].get(0)
    if right is None or g.nodes[start].flat[0].value not in s.tangents:
        return
    v = g.nodes[start].flat[0].value
    for _ in range(4):
        node, u = g.nodes[i], s.upstream[i][0]
        if node.op not in MOVES | {"index"} or u is None or len(node.outs) > 1:
            return
        grown = [d for d in range(right.dim()) if u.dim() == right.dim()
                 and u.shape[d] != right.shape[d] > 1]  # fmt: skip
        if len(grown) == 1 and u.shape[grown[0]] % right.shape[grown[0]] == 0:
            d = grown[0]
            n, often = right.shape[d], u.shape[d] // right.shape[d]
            text = f"adds up other entries of axis {d} than those that share one"
            for sizes, over in (((often, n), d), ((n, often), d + 1)):
                other = u.unflatten(d, sizes).sum(over)
                if other.shape == right.shape:
                    s.propose(s.sites + 3, "permuted", text, {v: other - right})
        after = g.uses.get(node.outs[0], [])
        if len(after) != 1 or after[0] not in s.edges:
            return
        i = after[0]


def constants(s: "Search") -> None:
    """What the leaf has no part in is taken with the other sign, turned, or moved, in every
    derivative."""
    g = s.g
    equal: dict[int, list[int]] = defaultdict(list)  # as where one is broadcast twice
    for v in g.uses:
        if v not in s.tangents and v in s.same:
            equal[s.same[v]].append(v)
    for first, members in equal.items():
        v, t = members[0], g.values[first]
        name = s.name(v)
        others = [("wrong-operand", f"−{name}", -t)]
        for a, b in itertools.combinations(range(t.dim()), 2):
            if t.shape[a] == t.shape[b] > 1:
                others.append(("wrong-operand", f"{name} transposed", t.transpose(a, b)))
        others += [("flipped", f"{name} mirrored", t.flip(d)) for d in range(t.dim())]
        others += [("shifted", f"{name} {text}", move(t)) for _, text, move in offsets(t)]
        for kind, text, other in others:
            total: dict[int, Tensor] = {}
            with suppress(RuntimeError):
                for i in {i for w in members for i in g.uses[w]}:
                    for j, w in g.nodes[i].operands():
                        if w in members and i in s.edges:
                            add_to(total, s.deltas(i, s.swapped(i, j, other)))
                bits = s.sites + 2 + math.log2(len(others))
                s.propose(bits, kind, f"uses {text} where {name} belongs", total)


def exchanged(s: "Search") -> None:
    """Two such values of one shape, as two weights of an interpolation, for each other."""
    g = s.g
    fixed = [v for v in g.uses if v not in s.tangents and v in s.same]
    for v, w in itertools.islice(itertools.combinations(fixed, 2), 200):
        if g.values[v].shape != g.values[w].shape or s.same[v] == s.same[w]:
            continue
        total: dict[int, Tensor] = {}
        with suppress(RuntimeError):
            for mine, other in ((v, w), (w, v)):
                for i in g.uses[mine]:
                    for j, x in g.nodes[i].operands():
                        if x == mine and i in s.edges:
                            add_to(total, s.deltas(i, s.swapped(i, j, g.values[other])))
            text = f"has {s.name(v)} and {s.name(w)} exchanged"
            s.propose(s.sites + 4, "wrong-operand", text, total)


def delayed(s: "Search") -> None:
    """A factor is taken at the end of the way back, where it belongs before what lies between:
    sums over other entries, say, have gone without it."""
    g = s.g
    for i in s.edges:
        node = g.nodes[i]
        pair = list(node.operands())
        if node.op != "mul" or len(pair) != 2:
            continue
        for (k, v), (_, w) in (pair, pair[::-1]):
            factor, right, u = g.values[w], s.edges[i].get(k), s.upstream[i][0]
            if v not in s.tangents or v == s.leaf or u is None or right is None:
                continue
            if factor.shape != s.wrong.shape or u.shape != right.shape:
                continue
            text = f"is multiplied by {s.name(w)} at the end, not where the forward is"
            s.compare(s.sites + 4, "wrong-operand", text, factor * s.pulled({v: u - right}))


def whole_values(s: "Search") -> None:
    """The gradient of another value; or one output sends nothing back."""
    for v in s.parts:
        total = s.g.total(s.parts, v)
        if v == s.leaf or total is None or total.shape != s.wrong.shape:
            continue
        if v in s.g.leaves:
            s.compare(3, "permuted", f"is the gradient of {s.g.leaves[v]}", total)
        else:
            text = f"is the gradient of {s.name(v)}, not yet brought back to {s.m.name}"
            bits = 6 + math.log2(len(s.parts))
            s.compare(bits, "missing-factor", text, total)
            for w in s.pool.get(total.shape, [])[:MAX_POOL]:
                text = f"is the gradient of {s.name(v)} times {s.name(w)}"
                s.compare(bits + 5, "wrong-operand", text, total * s.g.values[w])
    for v, u in s.seeds.items() if len(s.seeds) > 1 else ():
        number = s.g.ends.index(v)
        kind, text = "missing-term", f"lacks what flows back from output {number}"
        if number in s.m.cut_off:
            kind, text = "detached", text + ", which does not require grad"
        s.propose(math.log2(len(s.seeds)) + 1, kind, text, {v: -u})


def reduced(s: "Search") -> None:
    """A statistic that is broadcast back: its gradient summed over the wrong axes, or not.

    Back through a statistic s of x goes ∂s/∂x · Σ ū, or w ∂s/∂x · Σ ū/w if the factor w that
    the sum does not touch is taken out of it; only over the right axes is that the same."""
    g = s.g
    seen: dict[tuple, list[tuple[int, str, dict[int, Tensor], Tensor]]] = defaultdict(list)
    for i in s.upstream:
        node, u = g.nodes[i], s.upstream[i][0]
        chain: list[int] = []
        x = node.flat[0].value if node.op == "expand" and s.live(i) else -1
        while x in g.maker and len(chain) < 8:
            chain.append(g.maker[x])
            active = {v for _, v in g.nodes[chain[-1]].operands() if v in s.tangents}
            if len(active) != 1:
                break
            x = active.pop()
            if g.nodes[chain[-1]].op in REDUCTIONS and g.values[x].shape == u.shape:
                break
        if not chain or g.nodes[chain[-1]].op not in REDUCTIONS:
            continue
        mean, square = g.nodes[chain[-1]].op == "mean", g.maker.get(x, -1)
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
        name = s.out(i)
        alone = {x: slope * u - got}
        text = f"lacks the terms between different entries: only the diagonal of {name}"
        s.propose(s.sites + 2, "missing-term", text, alone)
        text = f"does not sum the gradient of {name}"
        s.propose(s.sites + 3, "wrong-reduction", text, alone)
        dims = [d for d in range(u.dim()) if u.shape[d] > 1]
        few = s.edges[i][0].shape
        few = torch.Size([1] * (u.dim() - len(few))) + few
        n = u.numel() // few.numel()
        factors = [torch.ones_like(u)]
        for w in s.near(u.shape, i)[:12]:
            if g.values[w].abs().min() > 1e-12:
                factors += [g.values[w], 1 / g.values[w]]
        for size in range(1, len(dims) + 1):
            for over in itertools.combinations(dims, size):
                if all((few[d] == 1) == (d in over) for d in dims):
                    continue  # the right ones
                fair = n / math.prod(u.shape[d] for d in over)
                fair = fair if mean else 1.0
                text = f"sums the gradient of {name} over axes {list(over)}"
                for by, place in itertools.product(factors, places):
                    delta = {x: -got}
                    add_to(delta, {place: fair * slope * by * (u / by).sum(over, keepdim=True)})
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


def statistics(s: "Search") -> None:
    """Several statistics taken for constants."""
    found = [i for i in s.upstream if s.g.nodes[i].op in REDUCTIONS and s.live(i)]
    found = [i for i in found if s.g.values[s.g.nodes[i].outs[0]].numel() > 1]
    pairs = itertools.combinations(found[:8], 2)
    for members in {tuple(found): 0} | dict.fromkeys(pairs, 0) if len(found) > 1 else ():
        rules: dict[int, Rule] = {i: s.cut(i) for i in members}
        names = " and ".join(dict.fromkeys(map(s.out, members)))
        text = f"lacks the terms that flow through {names}: they are taken for constants"
        s.resweep(s.sites + 3, "missing-term", text, rules)


def other_forwards(s: "Search") -> None:
    """The local derivatives are those of a forward that is different at one place."""
    g, tried = s.g, 0
    for i in g.order:
        node = g.nodes[i]
        k, v = next((k, v) for k, v in node.operands() if v in g.active)
        x, y = g.values[v], g.values[node.outs[0]]
        number = next((a for a in node.flat if isinstance(a, float)), None)
        if x.shape == y.shape and number is not None and node.op in ("add", "sub", "mul", "div"):
            kind, text, value = "wrong-operand", f"leaves out {number:.4g} in {s.out(i)}", x
        elif x.shape == y.shape and node.op == "where" and _decided(s, node):
            kind, text, value = "wrong-branch", "takes one branch of where everywhere", x
        elif (x.shape == y.shape and node.op == "where") or (
            node.op == "add" and any(s.g.values[w].isinf().any() for _, w in node.operands())
        ):
            kind, text, value = "missing-factor", "recomputes the values without the mask", x
        elif node.op == "mean" and (n := x.numel() // y.numel()) > 1:
            kind, value = "wrong-operand", y * (n / (n - 1))
            text = f"divides by {n - 1} instead of {n} in {s.out(i)}"
        else:
            continue
        for alias in (False, True) if value is x and tried < 60 else (False,):
            tried += 1
            with suppress(RuntimeError):
                swept = _altered(s, i, k, value, alias).sweep(s.seeds)[0]
                text += s.at(i) * (not alias)
                s.compare(s.sites + 4 + alias, kind, text, g.total(swept, s.leaf))


def _decided(s: "Search", node: Any) -> bool:
    """Whether the condition of a `where` depends on the inputs; else it is a mask."""
    waiting, seen = [node.flat[0].value], set()
    while waiting:
        v = waiting.pop()
        if v in s.g.active:
            return True
        if v in s.g.maker and v not in seen:
            seen.add(v)
            waiting += [w for _, w in s.g.nodes[s.g.maker[v]].operands()]
    return False


def _altered(s: "Search", i: int, k: int, value: Tensor, alias: bool) -> Graph:
    """The graph with the values that follow when node i makes another one."""
    nodes, values = list(s.g.nodes), list(s.g.values)
    if alias:  # node i does nothing in the backward either
        _, spec = tree_flatten(((0,), {}))
        node = replace(nodes[i], func=aten.alias.default, flat=[nodes[i].flat[k]], spec=spec)
        nodes[i] = node
    values[nodes[i].outs[0]] = value
    other = Graph(values, nodes, s.g.leaves, s.g.ends)
    moved = set(nodes[i].outs)
    for j in s.g.order:
        if j > i and any(v in moved for _, v in nodes[j].operands()):
            moved.update(nodes[j].outs)
            for v, t in zip(nodes[j].outs, other.call(j, {}), strict=True):
                values[v] = t
    return other


def dead_ends(s: "Search") -> None:
    """What does not lead to the leaf is of no interest from here on."""
    s.g.order = [i for i in s.g.order if any(v in s.tangents for v in s.g.nodes[i].outs)]


FAMILIES: list[Callable[["Search"], None]] = [
    whole_values, dead_ends, fan_out, slices_exchanged, reduced, rearranged, constants, exchanged,
    delayed,
]  # fmt: skip
SLOW_FAMILIES: list[Callable[["Search"], None]] = [statistics, other_forwards]
