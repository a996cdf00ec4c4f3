"""Diagnosis by counterfactual: which one mistake in the chain rule gives exactly this gradient?

A hand-written backward is the chain rule of a forward, played backwards, and most of its mistakes
are one slip in one step of it. So the forward is recorded as a graph of primitive operations
z = f(x₁, …, xₙ), and reverse mode is played over it:

    x̄ₖ = Σ over the uses f of xₖ of  (∂f/∂xₖ)ᵀ z̄        from the outputs' z̄ = upstream to the leaf

once as it should be, and then with ONE mistake built in: a summand left out, a derivative replaced
by the identity, a derivative evaluated at the wrong tensor, … The mistake that reproduces the
wrong gradient to rounding is the diagnosis.

Thousands of mistakes can be tried because almost none needs a sweep of its own. A mistake at one
step changes x̄ₖ by some δ, and so the leaf's gradient by Jᵀδ, where J = ∂xₖ/∂leaf. For a random
direction r, forward mode gives the tangents t = J r of every value at once, and then

    r · (actual − expected) = r · Jᵀδ = t · δ

must hold: a dot product. What passes for a few r is swept, and compared entry by entry. Only a
mistake repeated in series (at each step of a recurrence) needs a sweep from the start.

Of the mistakes that explain a gradient equally well the simplest is preferred: its bits are the
logarithm of how many others of its family there are, plus a constant for the family.
"""

import itertools
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from nn_backprop.check.diagnosis import mistakes_wide
from nn_backprop.check.diagnosis.graph import (
    MOVES,
    ORDERS,
    REDUCTIONS,
    SILENT,
    TURNS,
    Edges,
    Forward,
    Graph,
    Ref,
    Rule,
    Sweep,
    Upstream,
    add_to,
    offsets,
    only_range,
    record,
)
from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.report import Cause

EXACT = 1e-6  # the residual below which a mistake explains a gradient
PROBES = 4  # random directions that a mistake must pass before it is swept
MAX_TRIALS = 15_000  # mistakes tried by a dot product
MAX_STEPS = 40_000  # steps of sweeps for mistakes repeated in series
MAX_ANSWERS = 5

LINEAR = MOVES | {"add", "sub", "neg", "sum", "mean"}
SIGNS = {"mul": "·", "div": "/", "add": "+", "sub": "−", "mm": "@", "bmm": "@"}


class _Mistake(NamedTuple):
    """A wrong local derivative of one node. At another repetition of the step, the same mistake
    has the same label."""

    label: tuple
    kind: str
    text: str
    bits: float
    rule: Rule


class _Answer(NamedTuple):
    bits: float
    kind: str
    text: str
    pull: Callable[[], Tensor]  # the counterfactual gradient


class Search:
    """The mistakes of one graph, tried on one wrong gradient."""

    def __init__(self, graph: Graph, m: Mismatch) -> None:
        self.g, self.m = graph, m
        self.leaf = next(v for v, name in graph.leaves.items() if name == m.name)
        seeds = dict(zip(graph.ends, m.upstream, strict=True))
        self.seeds = {v: u for v, u in seeds.items() if v in graph.active}
        self.parts, self.upstream, self.edges = graph.sweep(self.seeds)
        self.answers: list[_Answer] = []
        self.trials = self.steps = 0

    def run(self) -> list[Hypothesis]:
        right = self.g.total(self.parts, self.leaf)
        actual, expected = self.m.actual, self.m.expected
        if right is None or right.shape != expected.shape:
            return []
        bound = max(10 * self.m.tolerance, 1e-9 * float(expected.abs().max()))
        if not float((right - expected).abs().max()) <= bound:
            return []  # the recorded graph is not what was differentiated
        if actual.shape != expected.shape:
            return self.shapes()
        self.right, self.wrong = right, actual - expected
        self.error = float(self.wrong.norm())
        if not 0 < self.error < math.inf:
            return []
        self.prepare()
        self.scales()
        if actual.any():  # else it is zero, and any cut explains it
            for family in mistakes_wide.FAMILIES:
                with suppress(Exception):  # what one cannot bear costs the others nothing
                    family(self)
            with suppress(Exception):
                self.everywhere(self.simple, MAX_STEPS // 2)
            for family in mistakes_wide.SLOW_FAMILIES:
                with suppress(Exception):
                    family(self)
            if self.simplest() > self.sites + 2:
                with suppress(Exception):
                    self.everywhere(self.substitutions, MAX_STEPS)
        return self.best()

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(100_000, generator=generator, dtype=torch.float64)
        expected = self.m.expected
        rows = torch.randn(PROBES, expected.numel(), generator=generator, dtype=torch.float64)
        self.tangents = self.g.tangents(self.leaf, [r.view(expected.shape) for r in rows])
        self.seen, self.whole = rows @ self.wrong.flatten(), rows @ expected.flatten()
        norm = float(rows.norm(dim=1).max())
        self.slack = norm * (1e-5 * self.error + 1e-11 * float(expected.norm()))
        self.pool: dict[torch.Size, list[int]] = defaultdict(list)  # the tensors of a shape
        known: dict[tuple, int] = {}
        self.same: dict[int, int] = {}  # the tensor of the pool that is equal to a value
        self.sizes: set[int] = set()
        for v, t in enumerate(self.g.values):
            if t.dtype == torch.float64 and 1 < t.numel() <= len(self.noise):
                self.sizes.update((*t.shape, t.numel()))
                content = (t.shape, t.contiguous().numpy().tobytes())
                self.same[v] = known.setdefault(content, v)
                if self.same[v] == v:
                    self.pool[t.shape].append(v)
        self.sizes.discard(1)
        self.repeats()
        self.sites = math.log2(1 + len(self.groups))

    def repeats(self) -> None:
        """Which nodes are the same step of a loop, and each node's place among them."""
        alike: dict[tuple, list[int]] = defaultdict(list)
        for i, node in enumerate(self.g.nodes):
            shapes = tuple(tuple(self.g.values[v].shape) for _, v in node.operands())
            alike[(node.site, node.op, shapes)].append(i)
        counts: dict[tuple, list[int]] = defaultdict(list)  # of a loop inside one call
        for (site, *_), members in alike.items():
            counts[site].append(len(members))
        self.groups: dict[tuple, list[int]] = {}
        self.place: dict[int, tuple[tuple, int]] = {}
        for key, members in alike.items():
            often = [n for n in counts[key[0]] if n > 1]
            most = 0.8 * sum(often)
            steps = max([1, *(n for n in often if sum(c for c in often if c % n == 0) >= most)])
            stride = len(members) // steps if steps > 1 and len(members) % steps == 0 else 1
            for r in range(stride):
                self.groups[(*key, r)] = members[r::stride]
                for ordinal, i in enumerate(members[r::stride]):
                    self.place[i] = ((*key, r), ordinal)

        self.starts: dict[int, list[tuple]] = defaultdict(list)
        for members in self.groups.values():  # what a loop carries starts from another value
            if len(members) > 1:
                first, second = (dict(self.g.nodes[i].operands()) for i in members[:2])
                for k, v in first.items():
                    if k in second and len(role := self.roles(second[k], members[1])[0]) > 2:
                        self.starts[self.same.get(v, v)].append(role)

    # -- names

    def name(self, v: int, depth: int = 2) -> str:
        """A value as an expression: of the user's variables where it is one."""
        if v in self.g.leaves:
            return self.g.leaves[v]
        if (i := self.g.maker.get(v)) is None:
            t = self.g.values[v]
            return f"{t.item():.4g}" if t.numel() == 1 else "a constant"
        node = self.g.nodes[i]
        args = [x for _, x in node.operands()]
        if node.op in SILENT and args:
            return self.name(args[1 if node.op == "write" else 0], depth)
        after = self.g.nodes[i + 1].line if i + 1 < len(self.g.nodes) else ""
        found = re.match(r"(\w+) *[-+*/@]?=(?!=)", node.line)
        if found and after != node.line and ";" not in node.line and "lambda" not in node.line:
            return found[1]  # the last operation of a line that assigns it
        if depth == 0:
            return "…"
        words = [
            self.name(a.value, depth - 1) if isinstance(a, Ref) else f"{a:.4g}"
            for a in node.flat
            if isinstance(a, (Ref, float)) or (node.op in SIGNS and type(a) is int)
        ]
        words = words if len(words) < 5 else [*words[:3], "…"]
        if node.op in SIGNS and len(words) == 2:
            return f"({words[0]} {SIGNS[node.op]} {words[1]})"
        if node.op in ("t", "transpose"):
            return f"{words[0]}ᵀ"
        dims = ", ".join(str(d) for d in node.flat[1:] if type(d) is int)
        if node.op in ("mean", "sum") and dims:
            return f"{node.op} of {words[0]} over dim {dims}"
        return f"{node.op}({', '.join(words)})"

    def out(self, i: int) -> str:
        return self.name(self.g.nodes[i].outs[0])

    def at(self, i: int) -> str:
        line = self.g.nodes[i].line
        return f" (`{line}`)" if 0 < len(line) <= 70 else ""

    def roles(self, v: int, i: int) -> list[tuple]:
        """What value v is to node i, said so that it holds at each repetition of i."""
        ordinal = self.place[i][1]
        maker = self.g.maker.get(v)
        starts = self.starts[v] if ordinal == 0 and v in self.starts else []
        if maker is None or len(self.groups[self.place[maker][0]]) == 1:
            return [("value", v), *starts]
        made, when = self.place[maker]
        return [(made, self.g.nodes[maker].outs.index(v), when - ordinal), *starts]

    # -- trying

    def dot(self, deltas: dict[int, Tensor]) -> Tensor:
        """r · Jᵀδ for each direction r."""
        total = torch.zeros(PROBES, dtype=torch.float64)
        for v, delta in deltas.items():
            if v in self.tangents:
                total = total + self.tangents[v] @ delta.flatten()
        return total

    def fits(self, change: Tensor) -> bool:
        return bool(((change - self.seen).abs() <= self.slack).all())

    def is_whole(self, change: Tensor) -> bool:
        """Whether what an edge carries, seen along each r, is the whole gradient."""
        return bool(((change - self.whole).abs() <= self.slack).all())

    def pulled(self, deltas: dict[int, Tensor]) -> Tensor:
        deltas = {v: d for v, d in deltas.items() if v in self.tangents}
        change = self.g.total(self.g.sweep(deltas)[0], self.leaf)
        return self.right if change is None else self.right + change

    def propose(self, bits: float, kind: str, text: str, deltas: dict[int, Tensor]) -> None:
        """A mistake that adds δ to the gradient of some values."""
        self.trials += 1
        if self.fits(self.dot(deltas)):
            self.answers.append(_Answer(bits, kind, text, lambda: self.pulled(deltas)))

    def resweep(
        self, bits: float, kind: str, text: str, rules: dict[int, Rule], merges: Any = None
    ) -> None:
        """A mistake that needs a sweep of its own."""
        if self.steps > MAX_STEPS:
            return
        self.steps += len(self.g.order)
        with suppress(RuntimeError):
            found = self.g.total(self.g.sweep(self.seeds, rules, merges)[0], self.leaf, merges)
            self.compare(bits, kind, text, found)

    def compare(self, bits: float, kind: str, text: str, found: Tensor | None) -> None:
        wrong = torch.zeros_like(self.wrong) if found is None else found
        if self.residual(wrong) <= EXACT:
            self.answers.append(_Answer(bits, kind, text, lambda: wrong))

    def simplest(self) -> float:
        return min((answer.bits for answer in self.answers), default=math.inf)

    def residual(self, wrong: Tensor) -> float:
        left = float((self.m.actual - wrong).norm()) / self.error
        return left if math.isfinite(left) else math.inf

    def deltas(self, i: int, rule: Rule) -> dict[int, Tensor]:
        """By how much a wrong rule at node i changes what its operands receive."""
        found: dict[int, Tensor] = {}
        right = self.edges[i]
        for k, g in rule(self.upstream[i], self.upstream).items():
            v = self.g.nodes[i].flat[k].value
            if k in right and v in self.tangents and g.shape == right[k].shape:
                add_to(found, {v: g - right[k]})
        return found

    def serial(self, members: list[int], vs: set[int]) -> bool:
        """Whether the mistake at one member changes what another one receives."""
        mask = sum(1 << i for i in members)
        return any(self.g.before[v] & mask for v in vs)

    def everywhere(self, family: Callable[[int], Iterator[_Mistake]], budget: int) -> None:
        """Try each mistake at each node alone, and at all repetitions of a step."""
        serial = []
        for group in self.groups.values():
            members = [i for i in group if self.edges.get(i)]
            labels: dict[tuple, list[tuple]] = defaultdict(list)
            for i in members:
                once = f", at repetition {group.index(i) + 1} of {len(group)}"
                for label, kind, text, bits, rule in family(i):
                    if self.trials > MAX_TRIALS:
                        break
                    with suppress(RuntimeError):
                        if not (deltas := self.deltas(i, rule)):
                            continue
                        change = self.dot(deltas)
                        labels[label].append((i, kind, text, bits, rule, deltas, change))
                        where = self.at(i) + (once if len(group) > 1 else "")
                        rare = self.sites + bits + math.log2(len(group))
                        self.propose(rare, kind, text + where, deltas)
            for found in labels.values():
                if 1 < len(found) >= len(members) - 1:
                    i, kind, text, bits, *_ = found[-1]
                    said = f"{text}{self.at(i)}, at each of {len(group)} repetitions"
                    touched = {v for *_, deltas, _ in found for v in deltas}
                    if self.serial(members, touched):
                        rules = {i: rule for i, _, _, _, rule, _, _ in found}
                        serial.append((self.sites + bits, kind, said, rules))
                    elif self.fits(torch.stack([change for *_, change in found]).sum(0)):
                        total: dict[int, Tensor] = {}
                        for *_, deltas, _ in found:
                            add_to(total, deltas)
                        self.propose(self.sites + bits, kind, said, total)
        for mistake in sorted(serial, key=operator.itemgetter(0)):
            if self.steps < budget and mistake[0] < self.simplest() + 4:
                self.resweep(*mistake)

    def edge(self, i: int, k: int, change: Callable[[Tensor], Tensor]) -> Rule:
        """What node i sends to its operand k is changed."""
        return lambda us, _: {k: change(self.g.vjp(i, us)[k])}

    def above(self, i: int, ks: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Rule:
        """The upstream is changed, as far as the operands ks are concerned."""

        def rule(us: Upstream, _: Sweep) -> Edges:
            return {k: e for k, e in self.g.vjp(i, [change(us[0])]).items() if k in ks}

        return rule

    def cut(self, i: int) -> Rule:
        """Nothing flows back through node i."""
        return lambda us, _: {k: torch.zeros_like(e) for k, e in self.edges[i].items()}

    def swapped(self, i: int, j: int, w: Tensor) -> Rule:
        """The local derivative is taken at another operand."""
        return lambda us, _: self.g.vjp(i, us, {j: w})

    def live(self, i: int) -> Edges:
        """The edges of node i that lead to the leaf."""
        node = self.g.nodes[i]
        return {k: e for k, e in self.edges[i].items() if node.flat[k].value in self.tangents}

    # -- the families

    def scales(self) -> None:
        """What an edge carries is multiplied by a constant: 0, −1, 2, 1/N, …"""
        groups: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
        for i in self.edges:
            for k in self.live(i):
                groups[(*self.place[i], k)].append((i, k))
                groups[(self.place[i][0], None, k)].append((i, k))
        for (*_, when, k), members in list(groups.items()):
            if when is None and len(members) >= 4:
                self.truncated(k, members)
        for key, members in groups.items():
            alone = key[-2] is not None
            i, k = members[-1]
            n = len(self.groups[self.place[i][0]])
            if not alone and len(members) < 2:
                continue
            much = f", at repetition {self.place[i][1] + 1} of {n}" if n > 1 else ""
            much = self.at(i) + (much if alone else f", at each of {n} repetitions")
            bits = self.sites + (math.log2(n) if alone else 0)
            op = self.g.nodes[i].op
            bits += 1.5 if op in SILENT else 0.5 if op not in REDUCTIONS else 0
            deltas: dict[int, Tensor] = {}
            for i, k in members:
                add_to(deltas, {self.g.nodes[i].flat[k].value: self.edges[i][k]})
            if not alone and self.serial([i for i, _ in members], set(deltas)):
                for s in (0.0, -1.0, 2.0) if self.m.actual.any() else ():
                    rules = {i: self.edge(i, k, lambda e, s=s: s * e) for i, k in members}  # type: ignore[misc]
                    kind, text, more = self.scaled(i, k, s, False)
                    self.resweep(bits + more, kind, text + much, rules)
                continue
            change = self.dot(deltas)
            size = float(change @ change)
            if size > 0:
                s = 1 + float(change @ self.seen) / size
                s = round(s) if abs(s - round(s)) < 1e-7 else s
                whole = self.is_whole(change)
                kind, text, more = self.scaled(i, k, s, whole)
                if more > 10 and self.m.expected.numel() < 3:
                    continue  # a number without a name fits anything
                scaled = {v: (s - 1) * d for v, d in deltas.items()}
                self.propose(bits + more, kind, text + much, scaled)

    def truncated(self, k: int, members: list[tuple[int, int]]) -> None:
        """What a loop carries is cut at every second or third step."""
        for every in (2, 3):
            for first in range(every):
                cut = [i for i, _ in members if self.place[i][1] % every == first]
                if len(cut) < 2 or not self.serial(
                    cut, {self.g.nodes[i].flat[k].value for i in cut}
                ):
                    continue
                rules = {i: self.edge(i, k, torch.zeros_like) for i in cut}
                what = self.out(cut[-1])
                text = f"lacks the term that flows through {what} at every {every}. repetition"
                self.resweep(self.sites + 4, "missing-term", text, rules)

    def scaled(self, i: int, k: int, s: float, whole: bool) -> tuple[str, str, float]:
        """Kind, text and bits of an edge's gradient being multiplied by s."""
        term = self.out(i)
        if s == 0:
            if whole:
                return "detached", f"is zero: nothing flows back through {term}", 1
            return "missing-term", f"lacks the term that flows through {term}", 1
        if s == -1:
            return "sign", "has the wrong sign" + ("" if whole else f" in the term {term}"), 1
        uses = self.g.values[self.g.nodes[i].outs[0]].numel() / self.edges[i][k].numel()
        if self.g.nodes[i].op == "expand" and abs(s * uses - 1) < 1e-7:
            text = f"averages over the {uses:.0f} uses of {term} instead of summing"
            return "wrong-reduction", text, 2
        if self.g.nodes[i].op == "mean" and not whole and abs(s * uses - 1) < 1e-7:
            return "wrong-reduction", f"sums where the forward averages: {term}", 2
        if s == 2 and not whole:
            return "extra-term", f"counts the term through {term} twice", 3
        times, bits = f"{s:.6g}", 11.0 if self.m.expected.numel() > 2 else 23.0
        for n in sorted(self.sizes | {2}, reverse=True):
            known = {f"√{n}": n**0.5, f"1/√{n}": n**-0.5, f"{n}": n, f"1/{n}": 1 / n}
            for text, c in (
                {f"{n}/{n - 1}": n / (n - 1), f"{n - 1}/{n}": 1 - 1 / n} | known
            ).items():
                if abs(s / c - 1) < 1e-7:
                    times, bits = text, 4.5
        what = "is" if whole else f"has the term through {term}"
        return "scale", f"{what} {times} times what it should be", bits

    def simple(self, i: int) -> Iterator[_Mistake]:
        """Mistakes that need no other tensor of the graph."""
        node, g, us, live = self.g.nodes[i], self.g, self.upstream[i], self.live(i)
        u, names = us[0], {k: self.name(v) for k, v in node.operands()}
        if len(node.outs) > 1:
            yield from self.several(i)
        if u is None or not live:
            return
        if node.op.startswith("max_pool2d"):
            yield from self.pooled(i, next(iter(live)))
        if len(node.outs) > 1:
            return
        pointwise = node.op in SILENT or torch.Tag.pointwise in getattr(node.func, "tags", ())
        after = [j for j in g.uses[node.outs[0]] if j in self.upstream]
        for k, e in live.items():
            if e.shape == u.shape and node.op not in SILENT | {"add", "sub", "neg"}:
                skip: Rule = lambda us, _, k=k: {k: us[0]}  # type: ignore[misc]  # noqa: E731
                yield _Mistake(("skip", k), *self.skipped(i, k, names), skip)
                if node.op not in LINEAR:
                    text = f"has the derivative of {node.op} by {names[k]} twice"
                    twice = self.edge(i, k, lambda e, k=k: g.vjp(i, [e])[k])  # type: ignore[misc]
                    yield _Mistake(("twice", k), "missing-factor", text, 4, twice)
                far = self.upstream[after[0]][0] if len(after) == 1 else None
                if far is not None and far.shape == e.shape and len(g.nodes[after[0]].outs) == 1:
                    text = f"lacks the derivatives of both {g.nodes[after[0]].op} and {node.op}"
                    both: Rule = lambda _, sweep, k=k, j=after[0]: {k: sweep[j][0]}  # type: ignore[misc]  # noqa: E731
                    yield _Mistake(("skip two", k), "missing-factor", text, 4, both)
            if not pointwise or node.op in LINEAR:
                yield from self.turned(i, k, e)
        for ks in [(k,) for k in live] + ([tuple(live)] if len(live) > 1 else []):
            yield from self.changed(i, ks, u, pointwise)
        for j, k in itertools.combinations(live, 2):
            if live[j].shape == live[k].shape:
                text = f"exchanges the gradients of {names[j]} and {names[k]}"

                def exchange(us: Upstream, _: Sweep, j: int = j, k: int = k) -> Edges:
                    found = g.vjp(i, us)
                    return {j: found[k], k: found[j]}

                yield _Mistake(("exchange", j, k), "permuted", text, 3, exchange)
        if node.op in MOVES and len(live) == 1 and node.op not in ("cat", "stack"):
            k = next(iter(live))
            x = g.values[node.flat[k].value]
            places = torch.arange(1, x.numel() + 1, dtype=torch.float64).view(x.shape)
            read = g.call(i, {k: places})[0].long().flatten() - 1
            yield from self.overwritten(i, k, [read], lambda us: us[0].flatten())
        if node.op == "where":
            text, other = (
                "has the branches of the condition exchanged",
                ~self.g.values[node.flat[0].value],
            )
            yield _Mistake(("branch",), "wrong-branch", text, 2, self.swapped(i, 0, other))
        if node.op == "convolution":
            yield from self.convolved(i)
        if node.op == "constant_pad_nd":
            yield from self.uncropped(i, next(iter(live)))
        k = next(iter(live))
        if len(names) == 1 and (node.op in ("cumsum", *TURNS, *ORDERS)):
            kind = {"roll": "shifted", "cumsum": "wrong-reduction"}.get(node.op, "permuted")
            forward: Rule = lambda us, _: {k: g.call(i, {k: us[0]})[0]}  # noqa: E731
            text = f"goes through {node.op} forwards, not backwards"
            yield _Mistake(("forward",), kind, text, 2, forward)
        if node.op in ("amax", "amin"):
            args, _ = tree_unflatten(node.flat, node.spec)

            def spread(us: Upstream, _: Sweep) -> Edges:
                x = g.values[node.flat[k].value].detach().requires_grad_()
                with torch.enable_grad():
                    return {k: torch.autograd.grad(x.sum(*args[1:]), x, us[0])[0]}

            text = f"goes to every entry, not only where {node.op} took it from"
            yield _Mistake(("spread",), "missing-factor", text, 2, spread)
        yield from self.options(i)
        yield from self.indexed(i)

    def uncropped(self, i: int, k: int) -> Iterator[_Mistake]:
        """Padding is cut off at the wrong end, or the same at both."""
        x, z = (self.g.values[v] for v in (self.g.nodes[i].flat[k].value, self.g.nodes[i].outs[0]))
        for d in range(x.dim()):
            for start in {0, z.shape[d] - x.shape[d], (z.shape[d] - x.shape[d]) // 2}:
                if z.shape[d] == x.shape[d]:
                    continue

                def cut(us: Upstream, sweep: Sweep, d: int = d, start: int = start) -> Edges:
                    u = us[0].narrow(d, start, x.shape[d])
                    others = [e for e in range(x.dim()) if e != d and z.shape[e] != x.shape[e]]
                    for e in others:
                        u = u.narrow(e, (z.shape[e] - x.shape[e]) // 2, x.shape[e])
                    return {k: u}

                text = f"is cut from {self.out(i)} at place {start} of axis {d}"
                yield _Mistake(("cut", d, start), "shifted", text, 3, cut)

    def skipped(self, i: int, k: int, names: dict[int, str]) -> tuple[str, str, float]:
        """Kind, text and bits of a local derivative being left out."""
        node = self.g.nodes[i]
        turns = TURNS | ORDERS
        if node.op in turns:
            return turns[node.op], f"is not put back through {self.out(i)} ({node.op})", 2
        if node.op in ("mul", "div", "mm", "bmm"):
            other = next((j for j in names if j != k), None)
            number = next((x for x in node.flat if isinstance(x, (float, int))), None)
            name = (
                f"{number:.6g}" if other is None and number is not None else names.get(other or 0)
            )
            word = "divisor" if node.op == "div" and k == 0 else "factor"
            v = None if other is None else node.flat[other].value
            while v in self.g.maker and self.g.nodes[self.g.maker[v]].op in SILENT:
                v = next(x for _, x in self.g.nodes[self.g.maker[v]].operands())
            one = v is None or self.g.values[v].numel() == 1
            edge = self.dot({node.flat[k].value: self.edges[i][k]})
            kind = "scale" if one and self.is_whole(edge) else "missing-factor"
            return kind, f"lacks the {word} {name}", 1 if one else 2
        if node.op == "where":
            return "missing-factor", "lacks the mask of where", 2
        return "missing-factor", f"lacks the derivative of {node.op}", 2

    def several(self, i: int) -> Iterator[_Mistake]:
        """A split's parts exchanged, or one of them forgotten."""
        us, op = self.upstream[i], self.g.nodes[i].op
        given = [n for n, u in enumerate(us) if u is not None]
        for a, b in itertools.combinations(given, 2):
            if us[a].shape == us[b].shape:
                order = list(range(len(us)))
                order[a], order[b] = b, a
                exchange: Rule = lambda us, _, order=order: self.g.vjp(i, [us[n] for n in order])  # type: ignore[misc]  # noqa: E731
                text = f"exchanges the parts {a} and {b} of {op}"
                yield _Mistake(("exchange", a, b), "permuted", text, 3, exchange)
        for a in given:
            for word in ("only", "no"):

                def rule(us: Upstream, _: Sweep, a: int = a, word: str = word) -> Edges:
                    kept = [u if (n == a) == (word == "only") else None for n, u in enumerate(us)]
                    return {k: torch.zeros_like(e) for k, e in self.edges[i].items()} | (
                        self.g.vjp(i, kept)
                    )

                text = f"receives {word} gradient from part {a} of {op}"
                yield _Mistake((word, a), "subset", text, 3, rule)

    def turned(self, i: int, k: int, e: Tensor) -> Iterator[_Mistake]:
        """An edge's gradient with two axes exchanged, moved along one, or mirrored."""
        node = self.g.nodes[i]
        v = node.flat[k].value
        what = f"the gradient of {self.name(v)} that comes from {node.op}"
        source = self.g.maker.get(v)
        sums = node.op in REDUCTIONS or (source is not None and self.g.nodes[source].op == "expand")
        for a, b in itertools.combinations(range(e.dim()), 2):
            if e.shape[a] == e.shape[b] > 1:
                kind, text = "transposed", f"has the axes {a} and {b} of {what} exchanged"
                if sums:
                    kind, text = "wrong-reduction", f"sums {what} over the wrong axis"
                turn = self.edge(i, k, lambda e, a=a, b=b: e.transpose(a, b))  # type: ignore[misc]
                yield _Mistake(("turn", k, a, b), kind, text, 4, turn)
        for label, text, change in offsets(e):
            rule = self.edge(i, k, change)
            yield _Mistake((*label, k), "shifted", f"has {what} {text}", 5, rule)
        if node.op == "convolution":
            space = list(range(2, e.dim()))
            text = f"has {what} mirrored in space"
            mirror = self.edge(i, k, lambda e: e.flip(space))
            yield _Mistake(("mirror", k), "flipped", text, 3, mirror)

    def changed(
        self, i: int, ks: tuple[int, ...], u: Tensor, pointwise: bool
    ) -> Iterator[_Mistake]:
        """A node's upstream masked, moved, reversed, transposed, or replaced by ones."""
        node, more = self.g.nodes[i], 0.5 * (len(ks) > 1)
        ends = node.outs[0] in self.g.ends
        what = f"the gradient of {self.out(i)}"
        if node.op not in SILENT:
            what += f" on the way to {' and '.join(self.name(node.flat[k].value) for k in ks)}"
        ones = self.above(i, ks, torch.ones_like)
        text = "does not depend on the upstream gradient: ones are in its place"
        yield _Mistake(("ones", ks), "ignores-upstream", text, 3 if ends else 6, ones)
        if pointwise and node.op not in ("alias", "expand"):
            return  # a mask here is a mask further down
        halves = []
        for d, n in enumerate(u.shape):
            kept = {(0, 1): "first entry", (n - 1, n): "last entry"}
            if n > 3 and n % 2 == 0:
                kept |= {(0, n // 2): "first half", (n // 2, n): "second half"}
            if n > 2:
                kept |= {(1, n): "entries but the first", (0, n - 1): "entries but the last"}
            for (a, b), text in kept.items() if n > 1 else ():
                halves.append(((d, a, b), f"counts only the {text} of axis {d} of {what}"))
        for (d, a, b), text in halves:
            rule = self.above(i, ks, lambda u, d=d, a=a, b=b: only_range(u, d, a, b))  # type: ignore[misc]
            yield _Mistake(("keep", ks, text), "subset", text, 4 + more, rule)
        if node.op == "expand" and u.dim() > 2:  # one place of several axes
            for d, c in itertools.combinations(range(u.dim()), 2):
                for where in (0, -1):

                    def one(u: Tensor, d: int = d, c: int = c, where: int = where) -> Tensor:
                        a, b = where % u.shape[d], where % u.shape[c]
                        return only_range(only_range(u, d, a, a + 1), c, b, b + 1)

                    text = f"counts only one position of the axes {d} and {c} of {what}"
                    yield _Mistake(("one", d, c, where), "subset", text, 4, self.above(i, ks, one))
        for label, text, change in offsets(u):
            rule = self.above(i, ks, change)
            yield _Mistake((*label, ks, 0), "shifted", f"has {what} {text}", 5 + more, rule)
        for d in range(u.dim()):
            rule = self.above(i, ks, lambda u, d=d: u.flip(d))  # type: ignore[misc]
            text = f"has {what} backwards along axis {d}"
            yield _Mistake(("flip", d, ks), "permuted", text, 5 + more, rule)
        for c, d in itertools.combinations(range(u.dim()), 2):
            if u.shape[c] == u.shape[d] > 1:
                rule = self.above(i, ks, lambda u, c=c, d=d: u.transpose(c, d))  # type: ignore[misc]
                kind, text, bits = "transposed", f"has the axes {c} and {d} of {what} exchanged", 4
                if node.op == "expand":
                    kind, text, bits = "wrong-reduction", f"sums {what} over the wrong axis", 2
                yield _Mistake(("turn", c, d, ks), kind, text, bits + more, rule)

    def overwritten(
        self, i: int, k: int, orders: list[Tensor], sent: Callable[[Upstream], Tensor]
    ) -> Iterator[_Mistake]:
        """Where an entry is read several times, one of the reads wins instead of their sum.

        An order lists which entry of the operand each piece of `sent` goes to; −1 is none."""
        shape = self.g.values[self.g.nodes[i].flat[k].value].shape
        spread = self.g.nodes[i].op == "expand"
        for n, read in enumerate(orders):
            pieces = (read >= 0).nonzero().flatten()
            if len(pieces) == len(read[pieces].unique()) or len(pieces) > 20_000:
                continue
            for word, order in (("last", pieces), ("first", pieces.flip(0))):
                winner = torch.full((shape.numel(),), -1)
                for place, piece in zip(read[order].tolist(), order.tolist(), strict=True):
                    winner[place] = piece

                def rule(us: Upstream, _: Sweep, winner: Tensor = winner) -> Edges:
                    return {k: torch.where(winner >= 0, sent(us)[winner], 0.0).view(shape)}

                text = f"keeps only the {word} of the contributions to each entry of {self.out(i)}"
                kind, bits = ("subset", 4) if spread else ("overwritten", 2)
                yield _Mistake(("overwrite", k, n, word), kind, text, bits, rule)

    def pooled(self, i: int, k: int) -> Iterator[_Mistake]:
        """Max-pooling: every tie gets the gradient, or overlapping windows overwrite."""
        node, g = self.g.nodes[i], self.g
        x, (y, index) = g.values[node.flat[k].value], (g.values[v] for v in node.outs)
        args = [a for a in node.flat[1:] if type(a) is int]
        kernel, stride, padding = args[:2], args[2:4] or args[:2], args[4:6] or [0, 0]
        planes = x.reshape(-1, 1, *x.shape[-2:])
        fold: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": padding}

        def ties(us: Upstream, _: Sweep) -> Edges:
            windows = torch.nn.functional.unfold(planes, **fold)
            spread = (windows == y.reshape(len(planes), 1, -1)) * us[0].reshape(len(planes), 1, -1)
            return {k: torch.nn.functional.fold(spread, x.shape[-2:], **fold).view(x.shape)}

        yield _Mistake(("ties",), "extra-term", "gives the gradient to every tie", 2, ties)
        plane = torch.arange(len(planes)).view(-1, 1) * planes[0].numel()
        read = (index.reshape(len(planes), -1) + plane).flatten()
        yield from self.overwritten(i, k, [read], lambda us: us[0].flatten())

    def convolved(self, i: int) -> Iterator[_Mistake]:
        """A convolution's input gradient: overlaps overwritten, padding cropped off wrongly."""
        node, g = self.g.nodes[i], self.g
        x, w = (g.values[v] for _, v in list(node.operands())[:2])
        n = x.dim() - 2
        stride, padding, dilation = (node.flat[3 + d * n : 3 + d * n + n] for d in range(3))
        if 0 not in self.live(i) or node.flat[3 + 3 * n] or node.flat[-1] != 1:
            return  # transposed, or in groups
        wide = torch.nn.functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
        corner = (slice(None), slice(None), *map(slice, x.shape[2:]))

        def cropped(us: Upstream, _: Sweep) -> Edges:
            inputs = wide.detach().requires_grad_()
            with torch.enable_grad():
                y = torch.convolution(inputs, w, None, stride, [0] * n, dilation, False, [0] * n, 1)
            (grad,) = torch.autograd.grad(y, inputs, us[0])
            return {0: grad[corner]}

        text = "is cut from the wrong corner: the padding is not cropped off"
        yield _Mistake(("crop",), "shifted", text, 2, cropped)
        if n != 2:
            return
        fold: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        places = torch.arange(1, x.numel() + 1, dtype=torch.float64).view(x.shape)
        read = torch.nn.functional.unfold(places, w.shape[2:], **fold).long() - 1
        number = torch.arange(read.numel()).view(read.shape)
        rank = number.transpose(1, 2).flatten()  # window by window, or kernel place by place

        def sent(us: Upstream) -> Tensor:
            return (w.reshape(len(w), -1).T @ us[0].flatten(2)).flatten()

        yield from self.overwritten(i, 0, [read.flatten()], sent)
        by_window = read.flatten()[rank]
        yield from self.overwritten(i, 0, [by_window], lambda us: sent(us)[rank])

    def options(self, i: int) -> Iterator[_Mistake]:
        """The derivative of the same operation with another option."""
        node, g = self.g.nodes[i], self.g
        tried: dict[str, Any] = {}
        if node.op == "embedding":
            tried = {"padding_idx": -1}
        elif node.op == "convolution" or "pool" in node.op:
            tried = {"stride": 1, "dilation": 1, "groups": 1, "padding": 0}
            tried |= {"count_include_pad": None}
        names = [a.name for a in node.func._schema.arguments] if tried else []
        args, _ = tree_unflatten(list(range(len(node.flat))), node.spec)
        for name, where in zip(names, args, strict=False):
            spots = where if isinstance(where, list) else [where]
            if name not in tried or not spots:
                continue
            new = not node.flat[spots[0]] if tried[name] is None else tried[name]
            if all(node.flat[p] == new for p in spots):
                continue

            def rule(us: Upstream, _: Sweep, swap: Any = dict.fromkeys(spots, new)) -> Edges:  # noqa: B008
                u = torch.zeros_like(g.call(i, swap)[0])
                common = [slice(min(a, b)) for a, b in zip(us[0].shape, u.shape, strict=True)]
                u[tuple(common)] = us[0][tuple(common)]
                return g.vjp(i, [u, *us[1:]], swap)

            kind, text = "wrong-operand", f"ignores the {name} of {node.op}"
            if node.op == "embedding":
                kind, text = "extra-term", "counts the padding index"
            elif name == "count_include_pad":
                text = "divides by the wrong number at the padded border"
            yield _Mistake((name, new), kind, text, 1 if node.op == "embedding" else 3, rule)

    def substitutions(self, i: int) -> Iterator[_Mistake]:
        """Mistakes that use another tensor of the graph: as an operand, or as a factor."""
        node, g, live = self.g.nodes[i], self.g, self.live(i)
        u = self.upstream[i][0]
        if u is None or len(node.outs) > 1 or not live:
            return
        if node.op not in LINEAR and node.op != "where":
            for j, v in node.operands():
                yield from self.replaced(i, j, v)
            k = next(iter(live))
            if len(live) == 1 and g.values[node.flat[k].value].shape == u.shape:
                yield from self.derivatives(i, k)
        places: list[tuple[int | None, Tensor]] = [*live.items()]
        if node.op == "alias":
            places = [(None, u)]  # all that reaches a leaf
        elif len(g.uses[node.outs[0]]) > 1:
            places.append((None, u))
        for at, e in places:
            pool = self.near(e.shape, i)
            to = "" if at is None else f", on the way to {self.name(node.flat[at].value)}"
            bits = (3.5 if at is None else 4) + math.log2(1 + len(pool))
            for w in pool:
                factor, name = g.values[w], self.name(w)
                rows = [(f"has the factor {name} too many, or lacks it as a divisor", factor, 1)]
                if factor.abs().min() > 1e-12:
                    rows.append((f"lacks the factor {name}", 1 / factor, 0))
                for text, by, more in rows:
                    change = operator.methodcaller("mul", by)
                    rule = (
                        self.above(i, tuple(live), change)
                        if at is None
                        else self.edge(i, at, change)
                    )
                    for role in self.roles(w, i):
                        label = ("factor", at, more, role)
                        yield _Mistake(label, "missing-factor", text + to, bits + more, rule)

    def replaced(self, i: int, j: int, v: int) -> Iterator[_Mistake]:
        """The local derivative is taken at another tensor than operand v."""
        node, g = self.g.nodes[i], self.g
        x = g.values[v]
        if x.dtype != torch.float64 or not 1 < x.numel() <= len(self.noise):
            return
        with suppress(RuntimeError, IndexError):
            got = g.vjp(i, self.upstream[i], {j: self.noise[: x.numel()].view(x.shape)})
            if all(torch.equal(got[k], e) for k, e in self.live(i).items() if k in got):
                return  # it does not matter here
        name, conv = self.name(v), node.op == "convolution"
        own: list[tuple[str, str, Tensor]] = []
        if conv and x.dim() > 2:
            own.append(("flipped", f"{name} mirrored in space", x.flip(list(range(2, x.dim())))))
        if x.dim() > 1:
            a, b = (0, 1) if conv else (-1, -2)
            if x.shape[a] == x.shape[b] > 1:
                own.append(("wrong-operand", f"{name} transposed", x.transpose(a, b)))
        if node.op == "logsumexp":
            own.append(("wrong-operand", f"softmax({name})", x.softmax(node.flat[1])))
        for kind, text, other in own:
            rule = self.swapped(i, j, other)
            yield _Mistake(("at", j, text), kind, f"uses {text}", 2, rule)
        found = [(w, g.values[w]) for w in self.near(x.shape, i) if w != v]
        root, chain = self.unmoved(v)
        with suppress(RuntimeError):
            for w in self.near(g.values[root].shape, i) if chain else ():
                t = g.values[w]
                for step, at in chain:
                    t = g.call(step, {at: t})[0]
                found += [(w, t)] if w != root and t.shape == x.shape else []
        for d in range(x.dim()) if x.dim() > 1 else ():  # what is the same along an axis
            shape = x.shape[:d] + x.shape[d + 1 :]
            few = [w for w in self.near(torch.Size(shape), i)[:8] if x.shape[d] > 1]
            found += [(w, g.values[w].unsqueeze(d).expand(x.shape)) for w in few]
        for w, t in found:
            what = self.name(w)
            what = f"another step's {name}" if what == name else what
            text = f"uses {what} where {name} belongs in the derivative of {node.op}"
            for role in self.roles(w, i):
                bits = 2 + math.log2(1 + len(found)) + (len(role) > 2 and abs(role[-1]) > 1)
                rule = self.swapped(i, j, t)
                yield _Mistake(("at", j, role), "wrong-operand", text, bits, rule)

    def unmoved(self, v: int) -> tuple[int, list[tuple[int, int]]]:
        """The value that v is a rearrangement of, and the nodes from there, each with the place of
        what it moves."""
        chain: list[tuple[int, int]] = []
        while (i := self.g.maker.get(v)) is not None and self.g.nodes[i].op in MOVES:
            operands = list(self.g.nodes[i].operands())
            if len(operands) != 1 or len(self.g.nodes[i].outs) != 1:
                break
            (at, v) = operands[0]
            chain.insert(0, (i, at))
        return v, chain

    def near(self, shape: torch.Size, i: int) -> list[int]:
        """The known tensors of a shape: the leaves, and those made near node i."""
        pool = self.pool.get(shape, [])
        far = {v: 0 if v in self.g.leaves else abs(self.g.maker.get(v, -1) - i) for v in pool}
        return sorted(pool, key=far.__getitem__)[: mistakes_wide.MAX_POOL]

    def derivatives(self, i: int, k: int) -> Iterator[_Mistake]:
        """Another function's derivative, or this one's written down wrongly."""
        node = self.g.nodes[i]
        x, y = self.g.values[node.flat[k].value], self.g.values[node.outs[0]]
        sigmoid, tanh, top = torch.sigmoid(x), torch.tanh(x), torch.sigmoid(y)
        known = {
            "y": y,
            "1 − y": 1 - y,
            "1 + y": 1 + y,
            "y²": y * y,
            "1 − y²": 1 - y * y,
            "1 + y²": 1 + y * y,
            "y(1 − y)": y * (1 - y),
            "x(1 − x)": x * (1 - x),
            "1 − x²": 1 - x * x,
            "the derivative of relu": (x > 0).double(),
            "the mask y > 0": (y > 0).double(),
            "σ(x)": sigmoid,
            "tanh(x)": tanh,
            "σ'(x)": sigmoid * (1 - sigmoid),
            "σ'(y)": top * (1 - top),
            "tanh'(x)": 1 - tanh * tanh,
            "cos x": x.cos(),
            "sin x": x.sin(),
            "1/x": 1 / x,
            "1/x²": x**-2,
        }
        for text, slope in known.items():
            said = f"has {text} where the derivative of y = {node.op}(x) belongs"
            rule: Rule = lambda us, _, slope=slope: {k: us[0] * slope}  # type: ignore[misc]  # noqa: E731
            yield _Mistake(("local", text), "wrong-operand", said, 6, rule)
        if node.op in ("relu", "clamp", "hardtanh", "threshold"):
            said = f"takes the mask of {node.op} from the gradient instead of the input"
            rule = lambda us, _: {k: us[0] * (us[0] > 0)}  # noqa: E731
            yield _Mistake(("mask",), "wrong-operand", said, 4, rule)

    def indexed(self, i: int) -> Iterator[_Mistake]:
        """Entries are taken at other places than they were taken from."""
        node, g = self.g.nodes[i], self.g
        if node.op not in ("index", "gather", "index_select", "embedding"):
            return
        integers = {v: t for v, t in enumerate(g.values) if t.dtype == torch.int64}
        for j, v in node.operands():
            index = g.values[v]
            if index.dtype != torch.int64 or not index.numel():
                continue
            size = int(index.max()) + 1
            for k in self.live(i):
                size = max(size, *g.values[node.flat[k].value].shape)
            others = [(f"{self.name(v)} {text}", "shifted", index.add(by).clamp(0, size - 1))
                      for by, text in ((1, "+ 1"), (-1, "− 1"))]  # fmt: skip
            for text, place in (("the last place", size - 1), ("the first place", 0)):
                others.append((text, "wrong-operand", torch.full_like(index, place)))
            others += [(self.name(w), "wrong-operand", t) for w, t in integers.items()
                       if w != v and t.shape == index.shape][:8]  # fmt: skip
            for text, kind, other in others:
                said = f"belongs to {self.name(v)}, but is put at {text}"
                with suppress(RuntimeError, IndexError):
                    self.g.vjp(i, self.upstream[i], {j: other})  # raises if it does not fit
                    yield _Mistake(("index", j, text), kind, said, 3, self.swapped(i, j, other))

    def shapes(self) -> list[Hypothesis]:
        """A gradient of the wrong shape: one that was not summed, or kept a dimension."""
        actual, expected = self.m.actual, self.m.expected
        options: list[tuple[str, str, Tensor]] = []
        for i, edges in self.edges.items():
            if self.g.nodes[i].op == "expand" and 0 in edges:
                u = self.upstream[i][0]
                text = (
                    f"is not summed over the {u.numel() // edges[0].numel()} uses of {self.out(i)}"
                )
                options.append(("wrong-reduction", text, u))
        if expected.dim() == 2:
            options.append(("transposed", "is transposed", expected.T))
        if actual.numel() == expected.numel():
            text = f"has the shape {tuple(actual.shape)}"
            options.append(("wrong-reduction", text, expected.reshape(actual.shape)))
        found: list[Hypothesis] = []
        for kind, text, wrong in options:
            if wrong.shape == actual.shape:
                left = float((wrong - actual).norm()) / (float(actual.norm()) or 1.0)
                if left <= EXACT:
                    cause = Cause(kind, f"grad_{self.m.name} {text}", _evidence(left), left)
                    found.append(Hypothesis(2.0 + len(found), cause))
        return found[:MAX_ANSWERS]

    def best(self) -> list[Hypothesis]:
        """The simplest mistake of each kind; the more of a kind fit, the likelier the kind."""
        found: dict[str, tuple[float, str, float]] = {}
        weight: dict[str, float] = defaultdict(float)
        checked: dict[str, int] = defaultdict(int)
        for bits, kind, text, pull in sorted(self.answers, key=operator.itemgetter(0)):
            if kind not in found:
                checked[kind] += 1
                if checked[kind] > 40 or (left := self.residual(pull())) > EXACT:
                    continue
                found[kind] = (bits, text, left)
            weight[kind] += 2.0 ** (found[kind][0] - bits)
        answers = []
        for kind, (bits, text, left) in found.items():
            cause = Cause(kind, f"grad_{self.m.name} {text}", _evidence(left), left)
            answers.append(Hypothesis(max(bits - math.log2(weight[kind]), 0.0), cause))
        return sorted(answers, key=operator.itemgetter(0))[:MAX_ANSWERS]


def _evidence(left: float) -> str:
    return f"the chain rule of the forward with this one mistake reproduces it to {left:.1g}"


def explain(mismatch: Mismatch, forward: Forward) -> list[Hypothesis]:
    """The mistakes in the chain rule of `forward` that give exactly the wrong gradient, best first.

    `forward` maps the inputs by name to the outputs that `mismatch.upstream` belongs to. What
    cannot be recorded or explained gives no hypothesis; it never raises."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the tensors are small
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return Search(record(forward, mismatch.inputs), mismatch).run()
    except Exception:  # a diagnosis is a bonus, whatever a stranger's forward does
        return []
    finally:
        torch.set_num_threads(threads)
