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

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.autograd import Forward
from nn_backprop.check.diagnosis.guard import guarded
from nn_backprop.check.diagnosis.loops import Loops
from nn_backprop.check.diagnosis.mismatch import Hypothesis, Mismatch
from nn_backprop.check.diagnosis.recorded import Edges, Graph, Rule, Rules, Upstream, add_to
from nn_backprop.check.diagnosis.recorder import NotRecorded, record
from nn_backprop.check.report import Cause
from nn_backprop.check.target.target import ForwardRaised

EXACT = 1e-6  # the residual below which a mistake explains a gradient
PROBES = 4  # random directions that a mistake must pass before it is swept
MAX_TRIALS = 15_000  # mistakes tried by a dot product
MAX_STEPS = 40_000  # steps of sweeps for mistakes repeated in series
MAX_POOL = 32  # tensors tried in the place of another
MAX_ANSWERS = 5


class Mistake(NamedTuple):
    """A wrong local derivative of one node. At another repetition of the step, the same mistake
    has the same label."""

    label: tuple
    kind: str
    text: str
    bits: float
    rule: Rule


SearchFamilies = tuple[Callable[["Search"], None], ...]
StepFamilies = tuple[Callable[["Step"], Iterator[Mistake]], ...]


class Families(NamedTuple):
    """What is tried, in this order."""

    of_zero: SearchFamilies
    """The only ones of a gradient that is zero, which any cut explains."""
    several_steps: SearchFamilies
    one_step: StepFamilies
    """In a step of one output, …"""
    of_several_outputs: StepFamilies
    """… or of several, such as a split."""
    with_sweeps: SearchFamilies
    """Each trial of which is a sweep of its own."""
    other_tensors: StepFamilies
    """Where nothing as simple as one step without another tensor explains the gradient."""
    other_shapes: tuple[Callable[["Search"], Iterator[Hypothesis]], ...]
    """The only ones of a gradient of the wrong shape."""


class _Answer(NamedTuple):
    bits: float
    kind: str
    text: str
    pull: Callable[[], Tensor]  # the counterfactual gradient


class Search:
    """The mistakes of one graph, tried on one wrong gradient."""

    def __init__(self, graph: Graph, m: Mismatch, failures: list[str]) -> None:
        self.g, self.m, self.failures = graph, m, failures
        self.leaf = next(v for v, name in graph.leaves.items() if name == m.name)
        seeds = dict(zip(graph.ends, m.upstream, strict=True))
        self.seeds = {v: u for v, u in seeds.items() if v in graph.active}
        self.parts, self.upstream, self.edges = graph.sweep(self.seeds)
        self.answers: list[_Answer] = []
        self.trials = self.steps = 0

    def run(self, families: Families) -> list[Hypothesis]:
        right = self.g.total(self.parts, self.leaf)
        actual, expected = self.m.actual, self.m.expected
        if right is None or right.shape != expected.shape:
            return []
        bound = max(10 * self.m.tolerance, 1e-9 * float(expected.abs().max()))
        if not float((right - expected).abs().max()) <= bound:
            return []  # the recorded graph is not what was differentiated
        if actual.shape != expected.shape:
            return [found for family in families.other_shapes for found in family(self)]
        self.right, self.wrong = right, actual - expected
        self.error = float(self.wrong.norm())
        if not 0 < self.error < math.inf:
            return []
        self.prepare()
        if any(self.g.values[v].dtype != torch.float64 for v in self.tangents):
            return []  # some steps round, and what comes back through them is not exact
        self.each(families.of_zero)
        if actual.any():
            self.each(families.several_steps)
            with guarded("one_step", self.failures):
                self.everywhere(families.one_step, families.of_several_outputs, MAX_STEPS // 2)
            self.each(families.with_sweeps)
            if self.simplest() > self.sites + 2:
                with guarded("other_tensors", self.failures):
                    self.everywhere(families.other_tensors, (), MAX_STEPS)
        return self.best()

    def each(self, families: SearchFamilies) -> None:
        for family in families:
            with guarded(family.__name__, self.failures):
                family(self)

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(100_000, generator=generator, dtype=torch.float64)
        expected = self.m.expected
        rows = torch.randn(PROBES, expected.numel(), generator=generator, dtype=torch.float64)
        self.tangents = self.g.tangents(self.leaf, [r.view(expected.shape) for r in rows])
        nodes = self.g.nodes  # what does not lead to the leaf is of no interest from here on
        self.g.order = [i for i in self.g.order if self.tangents.keys() & set(nodes[i].outs)]
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
        self.loops = Loops(self.g, self.same)
        self.sites = math.log2(1 + len(self.loops.groups))

    # -- trying

    def propose(self, bits: float, kind: str, text: str, deltas: Edges, seen: Any = None) -> None:
        """A mistake that adds δ to the gradient of some values; `seen` is r · Jᵀδ, if known."""
        self.trials += 1
        if self.fits(self.dot(deltas) if seen is None else seen):
            self.answers.append(_Answer(bits, kind, text, lambda: self.pulled(deltas)))

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

    def resweep(self, bits: float, kind: str, text: str, rules: Rules, merges: Any = None) -> None:
        """A mistake that needs a sweep of its own."""
        if self.steps > MAX_STEPS:
            return
        self.steps += len(self.g.order)
        with suppress(RuntimeError):  # shapes that do not fit
            found = self.g.total(self.g.sweep(self.seeds, rules, merges)[0], self.leaf, merges)
            self.compare(bits, kind, text, found)

    def compare(self, bits: float, kind: str, text: str, found: Tensor | None) -> None:
        """A mistake of which the whole gradient is known."""
        wrong = torch.zeros_like(self.wrong) if found is None else found
        if self.residual(wrong) <= EXACT:
            self.answers.append(_Answer(bits, kind, text, lambda: wrong))

    def residual(self, wrong: Tensor) -> float:
        left = float((self.m.actual - wrong).norm()) / self.error
        return left if math.isfinite(left) else math.inf

    def simplest(self) -> float:
        return min((answer.bits for answer in self.answers), default=math.inf)

    def deltas(self, i: int, rule: Rule) -> dict[int, Tensor]:
        """By how much a wrong rule at node i changes what its operands receive."""
        found: dict[int, Tensor] = {}
        right = self.edges[i]
        for k, g in rule(self.upstream[i], self.upstream).items():
            v = self.g.nodes[i].flat[k].value
            if k in right and v in self.tangents and g.shape == right[k].shape:
                add_to(found, {v: g - right[k]})
        return found

    def live(self, i: int) -> Edges:
        """The edges of node i that lead to the leaf."""
        node = self.g.nodes[i]
        return {k: e for k, e in self.edges[i].items() if node.flat[k].value in self.tangents}

    def near(self, shape: torch.Size, i: int) -> list[int]:
        """The known tensors of a shape: the leaves, and those made near node i."""
        pool = self.pool.get(shape, [])
        far = {v: 0 if v in self.g.leaves else abs(self.g.maker.get(v, -1) - i) for v in pool}
        return sorted(pool, key=far.__getitem__)[:MAX_POOL]

    def everywhere(self, of_one: StepFamilies, of_several: StepFamilies, budget: int) -> None:
        """Try each mistake at each node alone, and at all repetitions of a step."""
        serial = []
        for group in self.loops.groups.values():
            members = [i for i in group if self.edges.get(i)]
            labels: dict[tuple, list[tuple]] = defaultdict(list)
            for i in members:
                once = f", at repetition {group.index(i) + 1} of {len(group)}"
                for label, kind, text, bits, rule in self.mistakes(of_one, of_several, i):
                    if self.trials > MAX_TRIALS:
                        break
                    with suppress(RuntimeError):  # shapes that do not fit
                        if not (deltas := self.deltas(i, rule)):
                            continue
                        change = self.dot(deltas)
                        labels[label].append((i, kind, text, bits, rule, deltas, change))
                        where = self.g.at(i) + (once if len(group) > 1 else "")
                        rare = self.sites + bits + math.log2(len(group))
                        self.propose(rare, kind, text + where, deltas, change)
            for found in labels.values():
                if 1 < len(found) >= len(members) - 1:
                    i, kind, text, bits, *_ = found[-1]
                    said = f"{text}{self.g.at(i)}, at each of {len(group)} repetitions"
                    touched = {v for *_, deltas, _ in found for v in deltas}
                    if self.loops.serial(members, touched):
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

    def mistakes(self, of_one: StepFamilies, of_several: StepFamilies, i: int) -> Iterator[Mistake]:
        step = Step(self, i)
        several, reached = len(step.node.outs) > 1, step.u is not None and step.live
        for family in of_several if several else of_one if reached else ():
            with guarded(family.__name__, self.failures):
                yield from family(step)

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
            answers.append(self.hypothesis(bits - math.log2(weight[kind]), kind, text, left))
        return sorted(answers, key=operator.itemgetter(0))[:MAX_ANSWERS]

    def hypothesis(self, bits: float, kind: str, text: str, left: float) -> Hypothesis:
        evidence = "the chain rule of the forward with this one mistake reproduces it to"
        detail = f"grad_{self.m.name} {text}"
        return Hypothesis(max(bits, 0.0), Cause(kind, detail, f"{evidence} {left:.1g}", left))


class Step:
    """One node of the graph, as the mistakes in one step see it."""

    def __init__(self, search: Search, i: int) -> None:
        self.s, self.g, self.i = search, search.g, i
        self.node, self.us = self.g.nodes[i], search.upstream[i]
        self.op, self.u = self.node.op, self.us[0]

    @cached_property
    def live(self) -> Edges:
        """What it sends to the operands that lead to the leaf."""
        return self.s.live(self.i)

    @cached_property
    def names(self) -> dict[int, str]:
        """Of its operands."""
        return {k: self.g.name(v) for k, v in self.node.operands()}

    def operand(self, k: int) -> Tensor:
        return self.g.values[self.node.flat[k].value]

    def vjp(self, us: Upstream) -> Edges:
        return self.s.edges[self.i] if us is self.us else self.g.vjp(self.i, us)

    def edge(self, k: int, change: Callable[[Tensor], Tensor]) -> Rule:
        """What the node sends to its operand k is changed."""
        return lambda us, _: {k: change(self.vjp(us)[k])}

    def instead(self, k: int, change: Callable[[Tensor], Tensor]) -> Rule:
        """Operand k receives this function of the upstream instead of what the node sends."""
        return lambda us, _: {k: change(us[0])}

    def above(self, ks: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Rule:
        """The upstream is changed, as far as the operands ks are concerned."""
        return lambda us, _: {k: e for k, e in self.vjp([change(us[0])]).items() if k in ks}

    def swapped(self, j: int, w: Any) -> Rule:
        """The local derivative is taken at another operand."""
        return lambda us, _: self.g.vjp(self.i, us, {j: w})


def explain(
    mismatch: Mismatch, forward: Forward, families: Families, failures: list[str]
) -> list[Hypothesis]:
    """The mistakes in the chain rule of `forward` that give exactly the wrong gradient, best first.

    `forward` maps the inputs by name to the outputs that `mismatch.upstream` belongs to. What
    cannot be recorded or explained gives no hypothesis."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the tensors are small
        with (
            guarded("the recorded graph", failures),
            suppress(NotRecorded, ForwardRaised),  # it may take one precision only
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
        ):
            graph = record(forward, mismatch.inputs)
            return Search(graph, mismatch, failures).run(families)
    finally:
        torch.set_num_threads(threads)
    return []
