"""What the leaf has no part in: turned, moved, of another sign, exchanged, or applied too late."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress

from torch import Tensor

from nn_backprop.check.diagnosis.recorded import add_to
from nn_backprop.check.diagnosis.search import Search, Step
from nn_backprop.check.diagnosis.slips import offsets


def constants(s: Search) -> None:
    """A constant is another one in every derivative."""
    equal: dict[int, list[int]] = defaultdict(list)  # as where one is broadcast twice
    for v in _fixed(s):
        equal[s.same[v]].append(v)
    for first, members in equal.items():
        name = s.g.name(members[0])
        others = list(_variants(name, s.g.values[first]))
        for kind, text, other in others:
            bits = s.sites + 2 + math.log2(len(others))
            with suppress(RuntimeError):  # shapes that do not fit
                s.propose(
                    bits, kind, f"uses {text} where {name} belongs", _taken(s, members, other)
                )


def _fixed(s: Search) -> list[int]:
    return [v for v in s.g.uses if v not in s.tangents and v in s.same]


def _variants(name: str, t: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    yield "wrong-operand", f"−{name}", -t
    for a, b in itertools.combinations(range(t.dim()), 2):
        if t.shape[a] == t.shape[b] > 1:
            yield "wrong-operand", f"{name} transposed", t.transpose(a, b)
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
