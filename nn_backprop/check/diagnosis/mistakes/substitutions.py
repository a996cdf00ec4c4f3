"""Another tensor of the graph, or another function's derivative, in the place of the right one."""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from nn_backprop.check.diagnosis.recorded import LINEAR, MOVES, Graph
from nn_backprop.check.diagnosis.search import Mistake, Step


def other_operand(step: Step) -> Iterator[Mistake]:
    """The local derivative is taken at another tensor than one of its operands."""
    for j, v in step.node.operands() if step.op not in LINEAR | {"where"} else ():
        x, name = step.g.values[v], step.names[j]
        if _matters(step, j, x):
            for kind, text, other in _variants(step, x, name):
                rule = step.swapped(j, other)
                yield Mistake(("at", j, text), kind, f"uses {text}", 2, rule)
            found = _fitting(step, v)
            for w, t in found:
                what = step.g.name(w)
                what = f"another step's {name}" if what == name else what
                text = f"uses {what} where {name} belongs in the derivative of {step.op}"
                for role in step.s.loops.roles(w, step.i):
                    bits = 2 + math.log2(1 + len(found)) + (len(role) > 2 and abs(role[-1]) > 1)
                    rule = step.swapped(j, t)
                    yield Mistake(("at", j, role), "wrong-operand", text, bits, rule)


def _matters(step: Step, j: int, x: Tensor) -> bool:
    """Whether the local derivative depends on operand j."""
    noise = step.s.noise
    if x.dtype != torch.float64 or not 1 < x.numel() <= len(noise):
        return False
    with suppress(RuntimeError, IndexError):
        got = step.g.vjp(step.i, step.us, {j: noise[: x.numel()].view(x.shape)})
        return not all(torch.equal(got[k], e) for k, e in step.live.items() if k in got)
    return True


def _variants(step: Step, x: Tensor, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """The operand itself, otherwise than it should be."""
    convolution = step.op == "convolution"
    if convolution and x.dim() > 2:
        yield "flipped", f"{name} mirrored in space", x.flip(list(range(2, x.dim())))
    if x.dim() > 1:
        a, b = (0, 1) if convolution else (-1, -2)
        if x.shape[a] == x.shape[b] > 1:
            yield "wrong-operand", f"{name} transposed", x.transpose(a, b)
    if step.op == "logsumexp":
        yield "wrong-operand", f"softmax({name})", x.softmax(step.node.flat[1])


def _fitting(step: Step, v: int) -> list[tuple[int, Tensor]]:
    """Known tensors in the shape of value v: as they are, rearranged as it is, or expanded."""
    s, g, x = step.s, step.g, step.g.values[v]
    found = [(w, g.values[w]) for w in s.near(x.shape, step.i) if w != v]
    root, chain = _unmoved(g, v)
    with suppress(RuntimeError):
        for w in s.near(g.values[root].shape, step.i) if chain else ():
            t = g.values[w]
            for node, at in chain:
                t = g.call(node, {at: t})[0]
            found += [(w, t)] if w != root and t.shape == x.shape else []
    for d, n in enumerate(x.shape) if x.dim() > 1 else ():  # what is the same along an axis
        shape = x.shape[:d] + x.shape[d + 1 :]
        few = s.near(torch.Size(shape), step.i)[:8] if n > 1 else []
        found += [(w, g.values[w].unsqueeze(d).expand(x.shape)) for w in few]
    return found


def _unmoved(g: Graph, v: int) -> tuple[int, list[tuple[int, int]]]:
    """The value that v is a rearrangement of, and the nodes from there, each with the place of
    what it moves."""
    chain: list[tuple[int, int]] = []
    while (i := g.maker.get(v)) is not None and g.nodes[i].op in MOVES:
        operands = list(g.nodes[i].operands())
        if len(operands) != 1 or len(g.nodes[i].outs) != 1:
            break
        (at, v) = operands[0]
        chain.insert(0, (i, at))
    return v, chain


SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y": lambda x, y: y,
    "1 − y": lambda x, y: 1 - y,
    "1 + y": lambda x, y: 1 + y,
    "y²": lambda x, y: y * y,
    "1 − y²": lambda x, y: 1 - y * y,
    "1 + y²": lambda x, y: 1 + y * y,
    "y(1 − y)": lambda x, y: y * (1 - y),
    "x(1 − x)": lambda x, y: x * (1 - x),
    "1 − x²": lambda x, y: 1 - x * x,
    "the derivative of relu": lambda x, y: (x > 0).double(),
    "the mask y > 0": lambda x, y: (y > 0).double(),
    "σ(x)": lambda x, y: torch.sigmoid(x),
    "tanh(x)": lambda x, y: torch.tanh(x),
    "σ'(x)": lambda x, y: torch.sigmoid(x) * (1 - torch.sigmoid(x)),
    "σ'(y)": lambda x, y: torch.sigmoid(y) * (1 - torch.sigmoid(y)),
    "tanh'(x)": lambda x, y: 1 - torch.tanh(x) * torch.tanh(x),
    "cos x": lambda x, y: x.cos(),
    "sin x": lambda x, y: x.sin(),
    "1/x": lambda x, y: 1 / x,
    "1/x²": lambda x, y: x**-2,
}


def other_derivative(step: Step) -> Iterator[Mistake]:
    """Another function's derivative, or this one's written down wrongly."""
    k = next(iter(step.live))
    x, y = step.operand(k), step.g.values[step.node.outs[0]]
    if step.op in LINEAR | {"where"} or len(step.live) > 1 or x.shape != step.u.shape:
        return
    for text, slope_at in SLOPES.items():
        slope = slope_at(x, y)
        said = f"has {text} where the derivative of y = {step.op}(x) belongs"
        rule = step.instead(k, operator.methodcaller("mul", slope))
        yield Mistake(("local", text), "wrong-operand", said, 6, rule)
    if step.op in ("relu", "clamp", "hardtanh", "threshold"):
        said = f"takes the mask of {step.op} from the gradient instead of the input"
        rule = step.instead(k, lambda u: u * (u > 0))
        yield Mistake(("mask",), "wrong-operand", said, 4, rule)


def factor(step: Step) -> Iterator[Mistake]:
    """What an edge carries, or all that reaches the output, lacks a factor or has it too many."""
    places: list[tuple[int | None, Tensor]] = [*step.live.items()]
    if step.op == "alias":
        places = [(None, step.u)]  # all that reaches a leaf
    elif len(step.g.uses[step.node.outs[0]]) > 1:
        places.append((None, step.u))
    for at, e in places:
        pool = step.s.near(e.shape, step.i)
        to = "" if at is None else f", on the way to {step.names[at]}"
        bits = (3.5 if at is None else 4) + math.log2(1 + len(pool))
        for w in pool:
            t, name = step.g.values[w], step.g.name(w)
            rows = [(f"has the factor {name} too many, or lacks it as a divisor", t, 1)]
            if t.abs().min() > 1e-12:
                rows.append((f"lacks the factor {name}", 1 / t, 0))
            for text, by, more in rows:
                times = operator.methodcaller("mul", by)
                rule = step.above((*step.live,), times) if at is None else step.edge(at, times)
                for role in step.s.loops.roles(w, step.i):
                    label = ("factor", at, more, role)
                    yield Mistake(label, "missing-factor", text + to, bits + more, rule)


def other_index(step: Step) -> Iterator[Mistake]:
    """Entries are taken at other places than they were taken from."""
    if step.op not in ("index", "gather", "index_select", "embedding"):
        return
    integers = {v: t for v, t in enumerate(step.g.values) if t.dtype == torch.int64}
    for j, v in step.node.operands():
        index, name = step.g.values[v], step.names[j]
        if index.dtype != torch.int64 or not index.numel():
            continue
        last = max([int(index.max()), *(n - 1 for k in step.live for n in step.operand(k).shape)])
        others = [
            (f"{name} + 1", "shifted", index.add(1).clamp(0, last)),
            (f"{name} − 1", "shifted", index.add(-1).clamp(0, last)),
            ("the last place", "wrong-operand", torch.full_like(index, last)),
            ("the first place", "wrong-operand", torch.full_like(index, 0)),
        ]
        fitting = [w for w, t in integers.items() if w != v and t.shape == index.shape][:8]
        others += [(step.g.name(w), "wrong-operand", integers[w]) for w in fitting]
        for text, kind, other in others:
            said = f"belongs to {name}, but is put at {text}"
            with suppress(RuntimeError, IndexError):
                step.g.vjp(step.i, step.us, {j: other})  # raises if it does not fit
                yield Mistake(("index", j, text), kind, said, 3, step.swapped(j, other))
