"""The chain rule of a forward that is different at one place."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from torch import Tensor
from torch.utils._pytree import tree_flatten

from nn_backprop.check.diagnosis.recorded import Graph, Node, aten
from nn_backprop.check.diagnosis.search import Search

MOST_LEFT_OUT = 60


def other_forwards(s: Search) -> None:
    """A number, a mask, a branch is left out, or a mean has another divisor."""
    tried = 0
    for i, k, kind, text, value, left_out in _places(s):
        for alias in (False, True) if left_out and tried < MOST_LEFT_OUT else (False,):
            tried += 1
            with suppress(RuntimeError):
                swept = _altered(s, i, k, value, alias).sweep(s.seeds)[0]
                said = text + s.g.at(i)
                s.compare(s.sites + 4 + alias, kind, said, s.g.total(swept, s.leaf))


def _places(s: Search) -> Iterator[tuple[int, int, str, str, Tensor, bool]]:
    """Node, operand, kind, text, the value that the node has there, and whether that is just its
    operand."""
    g = s.g
    for i in g.order:
        node = g.nodes[i]
        k, v = next((k, v) for k, v in node.operands() if v in g.active)
        x, y, number = g.values[v], g.values[node.outs[0]], None
        if x.shape == y.shape:
            number = next((a for a in node.flat if isinstance(a, float)), None)
            if number is not None and node.op in ("add", "sub", "mul", "div"):
                text = f"leaves out {number:.4g} in {g.out(i)}"
                yield i, k, "wrong-operand", text, x, True
                continue
            if node.op == "where" and _is_decided(s, node):
                yield i, k, "wrong-branch", "takes one branch of where everywhere", x, True
                continue
        infinite = any(g.values[w].isinf().any() for _, w in node.operands())
        if (x.shape == y.shape and node.op == "where") or (node.op == "add" and infinite):
            yield i, k, "missing-factor", "recomputes the values without the mask", x, True
        elif node.op == "mean" and (n := x.numel() // y.numel()) > 1:
            text = f"divides by {n - 1} instead of {n} in {g.out(i)}"
            yield i, k, "wrong-operand", text, y * (n / (n - 1)), False


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
