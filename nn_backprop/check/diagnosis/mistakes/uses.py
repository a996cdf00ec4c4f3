"""Where several uses of a value meet, and values in one another's place."""

import itertools
import math
import operator
from collections import defaultdict
from typing import Any

import torch

from nn_backprop.check.diagnosis.recorded import PRODUCTS, SILENT, TURNS
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


def without_dead_ends(s: Search) -> None:
    """What does not lead to the leaf is of no interest from here on."""
    s.g.order = [i for i in s.g.order if any(v in s.tangents for v in s.g.nodes[i].outs)]


def overwritten(s: Search) -> None:
    """A value is used several times, and the last gradient written wins."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for v, parts in s.parts.items():
        total, uses = s.g.total(s.parts, v), len(parts)
        if v not in s.tangents or uses < 2 or total is None:
            continue
        i = s.g.maker.get(v)
        alike[v if i is None else s.place[i][0]].append(v)
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
