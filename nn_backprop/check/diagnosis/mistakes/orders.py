"""A row of operations that only move entries, such as the split into heads, undone wrongly."""

from collections.abc import Callable, Iterator

from nn_backprop.check.diagnosis.recorded import MOVES, SILENT, TURNS
from nn_backprop.check.diagnosis.search import Search


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
