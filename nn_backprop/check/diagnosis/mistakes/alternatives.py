"""The chain rule of another forward: with other constants, without a number, a mask or a branch."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from torch import Tensor
from torch.utils._pytree import tree_flatten

from nn_backprop.check.diagnosis.arithmetic import exchanges, offsets
from nn_backprop.check.diagnosis.recorded import Graph, Node, add_to, aten
from nn_backprop.check.diagnosis.search import Search, Step


def constants(s: Search) -> None:
    """A constant is another one in every derivative."""
    equal: dict[int, list[int]] = defaultdict(list)  # as where one is broadcast twice
    for v in _fixed(s):
        equal[s.same[v]].append(v)
    for first, members in equal.items():
        name = s.g.name(members[0])
        others = list(_variants(name, s.g.values[first]))
        bits = s.sites + 2 + math.log2(len(others))
        for kind, text, other in others:
            said = f"uses {text} where {name} belongs"
            with suppress(RuntimeError):  # shapes that do not fit
                s.propose(bits, kind, said, _taken(s, members, other))


def _fixed(s: Search) -> list[int]:
    return [v for v in s.g.uses if v not in s.tangents and v in s.same]


def _variants(name: str, t: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    yield "wrong-operand", f"−{name}", -t
    for _, _, turn in exchanges(t):
        yield "wrong-operand", f"{name} transposed", turn(t)
    for d in range(t.dim()):
        yield "flipped", f"{name} mirrored", t.flip(d)
    for _, text, move in offsets(t):
        yield "shifted", f"{name} {text}", move(t)


def _taken(s: Search, values: list[int], other: Tensor) -> dict[int, Tensor]:
    """What changes if another tensor is taken for these values wherever they are used."""
    total: dict[int, Tensor] = {}
    for i in {i for v in values for i in s.g.uses[v]}:
        for j, v in s.g.nodes[i].operands():
            if v in values and i in s.edges:
                add_to(total, s.deltas(i, Step(s, i).swapped(j, other)))
    return total


def exchanged(s: Search) -> None:
    """Two such values of one shape, as two weights of an interpolation, for each other."""
    values = s.g.values
    for v, w in itertools.islice(itertools.combinations(_fixed(s), 2), 200):
        if values[v].shape == values[w].shape and s.same[v] != s.same[w]:
            with suppress(RuntimeError):  # shapes that do not fit
                total = _taken(s, [v], values[w])
                add_to(total, _taken(s, [w], values[v]))
                text = f"has {s.g.name(v)} and {s.g.name(w)} exchanged"
                s.propose(s.sites + 4, "wrong-operand", text, total)


def delayed(s: Search) -> None:
    """A factor is taken at the end of the way back, where it belongs before what lies between:
    sums over other entries, say, have gone without it."""
    for i in s.edges:
        node = s.g.nodes[i]
        pair = list(node.operands())
        for (k, v), (_, w) in (pair, pair[::-1]) if node.op == "mul" and len(pair) == 2 else ():
            factor, right, u = s.g.values[w], s.edges[i].get(k), s.upstream[i][0]
            if v not in s.tangents or v == s.leaf or u is None or right is None:
                continue
            if factor.shape == s.wrong.shape and u.shape == right.shape:
                text = f"is multiplied by {s.g.name(w)} at the end, not where the forward is"
                found = factor * s.pulled({v: u - right})
                s.compare(s.sites + 4, "wrong-operand", text, found)


MOST_LEFT_OUT = 60


def other_forwards(s: Search) -> None:
    """A number, a mask, a branch is left out, or a mean has another divisor."""
    tried = 0
    for i, k, kind, text, value in _places(s):
        left_out = value is s.g.values[s.g.nodes[i].flat[k].value]
        for alias in (False, True) if left_out and tried < MOST_LEFT_OUT else (False,):
            tried += 1
            with suppress(RuntimeError):
                swept = _altered(s, i, k, value, alias).sweep(s.seeds)[0]
                said = text + s.g.at(i)
                s.compare(s.sites + 4 + alias, kind, said, s.g.total(swept, s.leaf))


def _places(s: Search) -> Iterator[tuple[int, int, str, str, Tensor]]:
    """Node, operand, kind, text, and the value that the node has in the other forward."""
    g = s.g
    for i in g.order:
        node = g.nodes[i]
        k, v = next((k, v) for k, v in node.operands() if v in g.active)
        x, y = g.values[v], g.values[node.outs[0]]
        number = next((a for a in node.flat if isinstance(a, float)), None)
        same = x.shape == y.shape
        if same and number is not None and node.op in ("add", "sub", "mul", "div"):
            yield i, k, "wrong-operand", f"leaves out {number:.4g} in {g.out(i)}", x
        elif same and node.op == "where" and _is_decided(s, node):
            yield i, k, "wrong-branch", "takes one branch of where everywhere", x
        elif (same and node.op == "where") or (
            node.op == "add" and any(g.values[w].isinf().any() for _, w in node.operands())
        ):
            yield i, k, "missing-factor", "recomputes the values without the mask", x
        elif node.op == "mean" and (n := x.numel() // y.numel()) > 1:
            text = f"divides by {n - 1} instead of {n} in {g.out(i)}"
            yield i, k, "wrong-operand", text, y * (n / (n - 1))


def _is_decided(s: Search, node: Node) -> bool:
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


def _altered(s: Search, i: int, k: int, value: Tensor, alias: bool) -> Graph:
    """The graph with the values that follow when node i makes another one."""
    nodes, values = list(s.g.nodes), list(s.g.values)
    if alias:  # node i does nothing in the backward either
        _, spec = tree_flatten(((0,), {}))
        nodes[i] = replace(nodes[i], func=aten.alias.default, flat=[nodes[i].flat[k]], spec=spec)
    values[nodes[i].outs[0]] = value
    other = Graph(values, nodes, s.g.leaves, s.g.ends)
    moved = set(nodes[i].outs)
    for j in s.g.order:
        if j > i and any(v in moved for _, v in nodes[j].operands()):
            moved.update(nodes[j].outs)
            for v, t in zip(nodes[j].outs, other.call(j, {}), strict=True):
                values[v] = t
    return other
