"""What an edge of the graph carries is multiplied by a constant: 0, −1, 2, 1/N, …"""

import math
import operator
from collections import defaultdict

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.recorded import REDUCTIONS, SILENT, add_to
from nn_backprop.check.diagnosis.search import Search, Step


def multiplied(s: Search) -> None:
    """Each edge alone, and at all repetitions of a step."""
    groups: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for i in s.edges:
        for k in s.live(i):
            groups[(*s.loops.place[i], k)].append((i, k))
            groups[(s.loops.place[i][0], None, k)].append((i, k))
    for (*_, when, k), members in list(groups.items()):
        if when is None and len(members) >= 4:
            _cut_now_and_then(s, k, [i for i, _ in members])
    for key, members in groups.items():
        alone = key[-2] is not None
        i, k = members[-1]
        n = len(s.loops.groups[s.loops.place[i][0]])
        if not alone and len(members) < 2:
            continue
        often = f", at repetition {s.loops.place[i][1] + 1} of {n}" if n > 1 else ""
        where = s.g.at(i) + (often if alone else f", at each of {n} repetitions")
        op = s.g.nodes[i].op
        bits = s.sites + (math.log2(n) if alone else 0)
        bits += 1.5 if op in SILENT else 0.5 if op not in REDUCTIONS else 0
        deltas: dict[int, Tensor] = {}
        for i, k in members:
            add_to(deltas, {s.g.nodes[i].flat[k].value: s.edges[i][k]})
        if not alone and s.loops.serial([i for i, _ in members], set(deltas)):
            for by in (0.0, -1.0, 2.0) if s.m.actual.any() else ():
                times = operator.methodcaller("mul", by)
                rules = {i: Step(s, i).edge(k, times) for i, k in members}
                kind, text, more = _named(s, i, k, by, False)
                s.resweep(bits + more, kind, text + where, rules)
            continue
        change = s.dot(deltas)
        if (size := float(change @ change)) > 0:
            by = 1 + float(change @ s.seen) / size
            by = round(by) if abs(by - round(by)) < 1e-7 else by
            kind, text, more = _named(s, i, k, by, s.is_whole(change))
            if more > 10 and s.m.expected.numel() < 3:
                continue  # a number without a name fits anything
            s.propose(bits + more, kind, text + where, {v: (by - 1) * d for v, d in deltas.items()})


def _cut_now_and_then(s: Search, k: int, members: list[int]) -> None:
    """What a loop carries is cut at every second or third step."""
    for every in (2, 3):
        for first in range(every):
            cut = [i for i in members if s.loops.place[i][1] % every == first]
            if len(cut) > 1 and s.loops.serial(cut, {s.g.nodes[i].flat[k].value for i in cut}):
                rules = {i: Step(s, i).edge(k, torch.zeros_like) for i in cut}
                through = f"{s.g.out(cut[-1])} at every {every}. repetition"
                text = f"lacks the term that flows through {through}"
                s.resweep(s.sites + 4, "missing-term", text, rules)


def _named(s: Search, i: int, k: int, by: float, whole: bool) -> tuple[str, str, float]:
    """Kind, text and bits of an edge's gradient being multiplied by a number."""
    term, op = s.g.out(i), s.g.nodes[i].op
    if by == 0 and whole:
        return "detached", f"is zero: nothing flows back through {term}", 1
    if by == 0:
        return "missing-term", f"lacks the term that flows through {term}", 1
    if by == -1:
        return "sign", "has the wrong sign" + ("" if whole else f" in the term {term}"), 1
    uses = s.g.values[s.g.nodes[i].outs[0]].numel() / s.edges[i][k].numel()
    if op == "expand" and abs(by * uses - 1) < 1e-7:
        text = f"averages over the {uses:.0f} uses of {term} instead of summing"
        return "wrong-reduction", text, 2
    if op == "mean" and not whole and abs(by * uses - 1) < 1e-7:
        return "wrong-reduction", f"sums where the forward averages: {term}", 2
    if by == 2 and not whole:
        return "extra-term", f"counts the term through {term} twice", 3
    times, bits = f"{by:.6g}", 11.0 if s.m.expected.numel() > 2 else 23.0
    for n in sorted(s.sizes | {2}, reverse=True):
        known = {f"{n}/{n - 1}": n / (n - 1), f"{n - 1}/{n}": 1 - 1 / n, f"√{n}": n**0.5}
        known |= {f"1/√{n}": n**-0.5, f"{n}": n, f"1/{n}": 1 / n}
        for text, c in known.items():
            if abs(by / c - 1) < 1e-7:
                times, bits = text, 4.5
    what = "is" if whole else f"has the term through {term}"
    return "scale", f"{what} {times} times what it should be", bits
