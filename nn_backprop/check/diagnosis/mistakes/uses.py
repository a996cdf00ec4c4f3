"""Where several uses of a value meet, values in one another's place, and rows of operations that
move entries, such as the split into heads, undone wrongly."""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nn_backprop.check.diagnosis.recorded import MOVES, PRODUCTS, SILENT, TURNS
from nn_backprop.check.diagnosis.search import MAX_POOL, Search


def other_values(s: Search) -> None:
    """The gradient of another value; or one output sends nothing back."""
    for v in s.parts:
        total = s.g.total(s.parts, v)
        if v == s.leaf or total is None or total.shape != s.wrong.shape:
            continue
        if v in s.g.leaves:
            s.compare(3, "permuted", f"is the gradient of {s.g.leaves[v]}", total)
        else:
            text = f"is the gradient of {s.g.name(v)}"
            bits = 6 + math.log2(len(s.parts))
            more = f", not yet brought back to {s.m.name}"
            s.compare(bits, "missing-factor", text + more, total)
            for w in s.pool.get(total.shape, [])[:MAX_POOL]:
                times = f" times {s.g.name(w)}"
                s.compare(bits + 5, "wrong-operand", text + times, total * s.g.values[w])
    for v, u in s.seeds.items() if len(s.seeds) > 1 else ():
        number = s.g.ends.index(v)
        kind, text = "missing-term", f"lacks what flows back from output {number}"
        if number in s.m.cut_off:
            kind, text = "detached", text + ", which does not require grad"
        s.propose(math.log2(len(s.seeds)) + 1, kind, text, {v: -u})


def overwritten(s: Search) -> None:
    """A value is used several times, and the last gradient written wins."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for v, parts in s.parts.items():
        total, uses = s.g.total(s.parts, v), len(parts)
        if v not in s.tangents or uses < 2 or total is None:
            continue
        i = s.g.maker.get(v)
        alike[v if i is None else s.loops.place[i][0]].append(v)
        bits = s.sites + 3 + math.log2(uses) / 2
        if i is not None and s.g.nodes[i].flat[0] == (s.leaf,) and _multiplies(s, v):
            bits = s.sites - 1  # a weight used twice: likelier than a path forgotten
        for n, part in enumerate(parts):
            if n in (0, uses - 1) or uses <= 6:
                which = "last" if n == 0 else "first" if n == uses - 1 else f"{n + 1}th last"
                text = f"keeps only the contribution of the {which} of the {uses} uses of "
                s.propose(bits, "overwritten", text + s.g.name(v), {v: part - total})
        for part in parts if uses <= 6 else ():
            if (part == 0).any():
                text = f"is set, not added to, where one use of {s.g.name(v)} takes an entry"
                there = torch.where(part != 0, part - total, 0.0)
                s.propose(bits + 1, "overwritten", text, {v: there})
        if uses > 2:
            text = f"averages over the {uses} uses of {s.g.name(v)} instead of summing"
            s.propose(s.sites + 4, "wrong-reduction", text, {v: total / uses - total})
    for vs in alike.values():
        for n, which in ((0, "last"), (-1, "first")) if len(vs) > 1 else ():
            merges = dict.fromkeys(vs, operator.itemgetter(n))
            text = f"keeps only the contribution of the {which} use of {s.g.name(vs[-1])} each time"
            s.resweep(s.sites + 4, "overwritten", text, {}, merges)


def _multiplies(s: Search, v: int) -> bool:
    """Whether a value is a weight: each of its uses is a product."""
    for i in s.g.uses[v]:
        node = s.g.nodes[i]
        through = node.op in SILENT or node.op in TURNS
        if node.op not in PRODUCTS and not (through and _multiplies(s, node.outs[0])):
            return False
    return v in s.g.uses


def slices_exchanged(s: Search) -> None:
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
                text = f"exchanges the slices {s.g.out(i)} and {s.g.out(j)}"
                s.propose(s.sites + 4, "permuted", text, {v: delta})


def _followed(s: Search, start: int, goes_on: Callable[[int], bool]) -> Iterator[int]:
    """The nodes from here on, as long as each has one use and a condition holds."""
    i = start
    while goes_on(i):
        yield i
        after = s.g.uses.get(s.g.nodes[i].outs[0], [])
        if len(after) != 1 or after[0] not in s.edges:
            return
        i = after[0]


def shared_rows(s: Search) -> None:
    """Groups that share a row are taken for others: 0 1 2 0 1 2 for 0 0 1 1 2 2, or back."""
    g = s.g

    def moves(i: int) -> bool:
        node = g.nodes[i]
        return node.op in MOVES | {"index"} and s.upstream[i][0] is not None and len(node.outs) == 1

    for start in s.edges:
        right = s.edges[start].get(0)
        if right is None or (v := g.nodes[start].flat[0].value) not in s.tangents:
            continue
        for _, i in zip(range(4), _followed(s, start, moves), strict=False):
            u = s.upstream[i][0]
            same = u.dim() == right.dim()
            grown = [d for d, n in enumerate(right.shape) if same and u.shape[d] != n > 1]
            if len(grown) == 1 and u.shape[grown[0]] % right.shape[grown[0]] == 0:
                (d,) = grown
                n, often = right.shape[d], u.shape[d] // right.shape[d]
                text = f"adds up other entries of axis {d} than those that share one"
                for sizes, over in (((often, n), d), ((n, often), d + 1)):
                    other = u.unflatten(d, sizes).sum(over)
                    if other.shape == right.shape:
                        s.propose(s.sites + 3, "permuted", text, {v: other - right})


def not_undone(s: Search) -> None:
    """By a reshape instead, or by the rearrangement itself."""
    g = s.g

    def turns(i: int) -> bool:
        node = g.nodes[i]
        if node.op not in {*TURNS, *SILENT, "reshape"} or list(s.live(i)) != [0]:
            return False
        return g.values[node.flat[0].value].numel() == g.values[node.outs[0]].numel()

    for start in s.edges:
        chain = list(_followed(s, start, turns))
        first = next((n for n, i in enumerate(chain) if g.nodes[i].op in TURNS), None)
        if first is None or len(chain) < 2:
            continue
        v, right = g.nodes[start].flat[0].value, s.edges[start][0]
        for end in range(first + 1, len(chain) + 1):
            u = s.upstream[chain[end - 1]][0]
            if u is None:
                continue
            what = g.out(chain[end - 1])
            text = f"is reshaped where {what} has to be put back in order"
            s.propose(s.sites + 3, "permuted", text, {v: u.reshape(right.shape) - right})
            if u.shape == right.shape:
                for j in chain[:end]:
                    u = g.call(j, {0: u})[0]
                text = f"goes through the rearrangement {what} once more, not back"
                s.propose(s.sites + 3, "permuted", text, {v: u - right})
