"""A recorded forward: a graph of primitive operations, and the chain rule played over it.

Reverse mode goes from the outputs' z̄ = upstream back to the leaves,

    x̄ₖ = Σ over the uses f of xₖ of  (∂f/∂xₖ)ᵀ z̄,

where a step may be given another rule than the right one (see `search`). Forward mode gives the
tangents t = J r, J = ∂value/∂leaf, of every value at once.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

aten = torch.ops.aten

Upstream = list[Any]  # a tensor or None for each output of a node
Edges = dict[int, Tensor]  # what a node sends to its operands, by position
Sweep = dict[int, Upstream]  # the upstream of every node
Rule = Callable[[Upstream, Sweep], Edges]  # a node's wrong local derivative
Rules = dict[int, Rule]

# What sorts of operations there are, by name; of those that reorder, what undoing them wrongly is.
SILENT = {"alias", "view", "expand", "unsqueeze", "squeeze", "clone", "write", "to_copy"}
TURNS = {"t": "transposed", "transpose": "transposed", "permute": "transposed", "roll": "shifted"}
ORDERS = dict.fromkeys(("flip", "index", "gather", "index_select"), "permuted")
MOVES = SILENT | {*TURNS, *ORDERS, "select", "slice", "split", "split_with_sizes", "unsafe_split"}
MOVES |= {"unbind", "cat", "stack", "embedding", "im2col", "unfold", "repeat", "diagonal"}
MOVES |= {f"{how}_pad{d}d" for how in ("replication", "reflection") for d in (1, 2, 3)}
LINEAR = MOVES | {"add", "sub", "neg", "sum", "mean"}
REDUCTIONS = {"sum", "mean", "logsumexp", "amax", "amin", "prod"}
SIGNS = {"mul": "·", "div": "/", "add": "+", "sub": "−", "mm": "@", "bmm": "@"}
PRODUCTS = {"mm", "bmm", "convolution", "embedding"}


class Ref(NamedTuple):
    value: int  # the place in `Graph.values` of a tensor argument


@dataclass(eq=False)
class Node:
    """One recorded operation."""

    func: Any
    flat: list[Any]  # its arguments, with tensors as Ref
    spec: Any
    outs: list[int]
    site: tuple  # the chain of calls that led here: equal for the repetitions in a loop
    line: str  # of the user's code

    @property
    def op(self) -> str:
        return getattr(self.func, "overloadpacket", self.func).__name__.strip("_")

    def operands(self) -> Iterator[tuple[int, int]]:
        """Position among the arguments, and value."""
        return ((k, a.value) for k, a in enumerate(self.flat) if isinstance(a, Ref))


class Replayed:
    """A node that was run again under autograd."""

    def __init__(self, inputs: dict[int, Tensor], outs: list[Tensor]) -> None:
        self.inputs, self.outs = inputs, outs
        kernel: Any = outs[0].grad_fn
        after = [f for f, _ in kernel.next_functions] if kernel else []
        places = {id(x): k for k, x in inputs.items()}
        self.places = [places.get(id(getattr(f, "variable", None))) for f in after]
        alone = [o.grad_fn is kernel for o in outs]
        alone += [f is None or k is not None for f, k in zip(after, self.places, strict=True)]
        self.kernel = kernel if all(alone) else None  # called, it is 8 times as fast as the engine

    def vjp(self, us: Upstream) -> Edges:
        """(∂f/∂x)ᵀ ū for each operand x."""
        pairs = [(o, u) for o, u in zip(self.outs, us, strict=True) if u is not None]
        pairs = [(o, u) for o, u in pairs if o.requires_grad]
        if not pairs or not self.inputs:
            return {}
        if self.kernel and all(o.shape == u.shape for o, u in pairs):
            grads = self.kernel(*us)
            found = zip(self.places, grads if isinstance(grads, tuple) else (grads,), strict=True)
        else:
            made, given = zip(*pairs, strict=True)
            xs = list(self.inputs.values())
            grads = torch.autograd.grad(made, xs, given, retain_graph=True, allow_unused=True)
            found = zip(self.inputs, grads, strict=True)
        return {k: g for k, g in found if k is not None and g is not None}


class Graph:
    def __init__(
        self, values: list[Tensor], nodes: list[Node], leaves: dict[int, str], ends: list[int]
    ) -> None:
        self.values, self.nodes, self.leaves, self.ends = values, nodes, leaves, ends
        self.maker = {v: i for i, node in enumerate(nodes) for v in node.outs}
        self.active = set(leaves)  # the values that depend on a leaf
        for node in nodes:
            if any(v in self.active for _, v in node.operands()):
                self.active.update(v for v in node.outs if values[v].is_floating_point())
        self.order = [i for i, node in enumerate(nodes) if self.active.intersection(node.outs)]
        self.before: dict[int, int] = defaultdict(int)  # the nodes a value depends on, as bits
        self.uses: dict[int, list[int]] = defaultdict(list)
        for i in self.order:
            mask = 1 << i
            for _, v in nodes[i].operands():
                mask |= self.before[v]
                self.uses[v].append(i)
            for v in nodes[i].outs:
                self.before[v] = mask
        self.cache: dict[int, Replayed] = {}
        self.names: dict[tuple[int, int], str] = {}

    def call(self, i: int, swap: dict[int, Any]) -> list[Tensor]:
        """Run a node again, with other arguments at some positions."""
        node = self.nodes[i]
        flat = [self.values[a.value] if isinstance(a, Ref) else a for a in node.flat]
        for k, a in swap.items():
            flat[k] = a
        args, kwargs = tree_unflatten(flat, node.spec)
        return [t for t in tree_leaves(node.func(*args, **kwargs)) if isinstance(t, Tensor)]

    def replay(self, i: int, swap: dict[int, Any]) -> Replayed:
        """Run a node again under autograd."""
        inputs = {
            k: (swap[k] if k in swap else self.values[v]).detach().requires_grad_()
            for k, v in self.nodes[i].operands()
            if v in self.active
        }
        with torch.enable_grad():
            return Replayed(inputs, self.call(i, swap | inputs))

    def vjp(self, i: int, us: Upstream, swap: dict[int, Any] | None = None) -> Edges:
        """(∂f/∂x)ᵀ ū for each operand x of node i, maybe with some operands replaced."""
        if swap:
            return self.replay(i, swap).vjp(us)
        if i not in self.cache:
            self.cache[i] = self.replay(i, {})
        return self.cache[i].vjp(us)

    def sweep(
        self,
        seeds: dict[int, Tensor],
        rules: Rules | None = None,
        merges: dict[int, Callable[[list[Tensor]], Tensor]] | None = None,
    ) -> tuple[dict[int, list[Tensor]], Sweep, dict[int, Edges]]:
        """Reverse mode: the contributions to each value, each node's upstream, and its answer."""
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for v, seed in seeds.items():
            parts[v].append(seed)
        upstream: Sweep = {}
        edges: dict[int, Edges] = {}
        for i in reversed(self.order):
            node = self.nodes[i]
            if not any(v in parts for v in node.outs):
                continue
            us = upstream[i] = [self.total(parts, v, merges) for v in node.outs]
            edges[i] = self.vjp(i, us)
            if rules and i in rules:
                edges[i] |= rules[i](us, upstream)
            for k, g in edges[i].items():
                parts[node.flat[k].value].append(g)
        return parts, upstream, edges

    @staticmethod
    def total(parts: dict[int, list[Tensor]], v: int, merges: Any = None) -> Tensor | None:
        if v not in parts:
            return None
        if merges and v in merges:
            return merges[v](parts[v])
        return parts[v][0] if len(parts[v]) == 1 else torch.stack(parts[v]).sum(0)

    def tangents(self, leaf: int, directions: list[Tensor]) -> dict[int, Tensor]:
        """J r of every value that depends on the leaf, for each direction r.

        A reverse step ū ↦ Jᵀū is linear in ū; the derivative of ⟨Jᵀū, t⟩ by ū is J t."""
        found = {leaf: torch.stack([r.flatten() for r in directions])}
        for i in self.order:
            operands = dict(self.nodes[i].operands())
            replayed = self.replay(i, {})
            inputs, outs = replayed.inputs, replayed.outs
            made = [(v, o) for v, o in zip(self.nodes[i].outs, outs, strict=True)
                    if v in self.active and o.requires_grad]  # fmt: skip
            moved = {k: x for k, x in inputs.items() if operands[k] in found}
            if not made or not moved:
                continue
            us = [torch.zeros_like(o, requires_grad=True) for _, o in made]
            grads = torch.autograd.grad(
                [o for _, o in made], list(moved.values()), us, create_graph=True, allow_unused=True
            )
            pairs = zip(moved, grads, strict=True)
            linear = {k: g for k, g in pairs if g is not None and g.requires_grad}
            if not linear:
                continue
            columns = []
            for p in range(len(directions)):
                ts = [found[operands[k]][p].view(g.shape) for k, g in linear.items()]
                columns.append(
                    torch.autograd.grad(
                        list(linear.values()), us, ts,
                        retain_graph=True, allow_unused=True, materialize_grads=True,
                    )
                )  # fmt: skip
            for (v, _), column in zip(made, zip(*columns, strict=True), strict=True):
                found[v] = torch.stack([t.flatten() for t in column])
        return found

    def name(self, v: int, depth: int = 2) -> str:
        """A value as an expression: of the user's variables where it is one."""
        if (v, depth) not in self.names:
            self.names[v, depth] = self._name(v, depth)
        return self.names[v, depth]

    def _name(self, v: int, depth: int) -> str:
        if v in self.leaves:
            return self.leaves[v]
        if (i := self.maker.get(v)) is None:
            t = self.values[v]
            return f"{t.item():.4g}" if t.numel() == 1 else "a constant"
        node = self.nodes[i]
        args = [x for _, x in node.operands()]
        if node.op in SILENT and args:
            return self.name(args[1 if node.op == "write" else 0], depth)
        after = self.nodes[i + 1].line if i + 1 < len(self.nodes) else ""
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
        """A node's first output as an expression."""
        return self.name(self.nodes[i].outs[0])

    def at(self, i: int) -> str:
        """The line of the user's code, in brackets."""
        line = self.nodes[i].line
        return f" (`{line}`)" if 0 < len(line) <= 70 else ""


def add_to(total: dict[int, Tensor], deltas: dict[int, Tensor]) -> None:
    for v, d in deltas.items():
        total[v] = total[v] + d if v in total else d
