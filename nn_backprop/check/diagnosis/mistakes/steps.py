"""A local derivative left out or taken twice, and a gradient turned, moved, masked or exchanged:
mistakes in one step that need no other tensor of the graph."""

import itertools
import operator
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from nn_backprop.check.diagnosis.arithmetic import Change, exchanges, offsets, only_range
from nn_backprop.check.diagnosis.recorded import (
    LINEAR,
    ORDERS,
    REDUCTIONS,
    SILENT,
    TURNS,
    Edges,
    Rule,
    Sweep,
    Upstream,
)
from nn_backprop.check.diagnosis.search import Mistake, Step


def parts_exchanged(step: Step) -> Iterator[Mistake]:
    """A split's parts exchanged, or one of them forgotten."""
    given = [n for n, u in enumerate(step.us) if u is not None]
    for a, b in itertools.combinations(given, 2):
        if step.us[a].shape == step.us[b].shape:
            text = f"exchanges the parts {a} and {b} of {step.op}"
            yield Mistake(("exchange", a, b), "permuted", text, 3, partial(_swapped, step, a, b))
    for a, word in itertools.product(given, ("only", "no")):
        text = f"receives {word} gradient from part {a} of {step.op}"
        yield Mistake((word, a), "subset", text, 3, partial(_forgotten, step, a, word == "only"))


def _swapped(step: Step, a: int, b: int, us: Upstream, _: Sweep) -> Edges:
    other = {a: b, b: a}
    return step.vjp([us[other.get(n, n)] for n in range(len(us))])


def _forgotten(step: Step, part: int, only: bool, us: Upstream, _: Sweep) -> Edges:
    """Only one part has a gradient, or all others have."""
    kept = [u if (n == part) == only else None for n, u in enumerate(us)]
    return {k: torch.zeros_like(e) for k, e in step.s.edges[step.i].items()} | step.vjp(kept)


def skipped(step: Step) -> Iterator[Mistake]:
    """The local derivative is left out, or there twice, or it and the next one are left out."""
    after = [j for j in step.g.uses[step.node.outs[0]] if j in step.s.upstream]
    for k, e in step.live.items():
        if e.shape != step.u.shape or step.op in SILENT | {"add", "sub", "neg"}:
            continue
        yield Mistake(("skip", k), *_left_out(step, k), step.instead(k, lambda u: u))
        if step.op not in LINEAR:
            text = f"has the derivative of {step.op} by {step.names[k]} twice"
            yield Mistake(("twice", k), "missing-factor", text, 4, _twice(step, k))
        if len(after) == 1 and len(step.g.nodes[after[0]].outs) == 1:
            far = step.s.upstream[after[0]][0]
            if far is not None and far.shape == e.shape:
                text = f"lacks the derivatives of both {step.g.nodes[after[0]].op} and {step.op}"
                rule = lambda _, sweep, k=k: {k: sweep[after[0]][0]}  # noqa: E731
                yield Mistake(("skip two", k), "missing-factor", text, 4, rule)


def _twice(step: Step, k: int) -> Rule:
    return step.edge(k, lambda e: step.vjp([e])[k])


def _left_out(step: Step, k: int) -> tuple[str, str, float]:
    """Kind, text and bits of a local derivative being left out."""
    turns, g = TURNS | ORDERS, step.g
    if step.op in turns:
        return turns[step.op], f"is not put back through {g.out(step.i)} ({step.op})", 2
    if step.op in ("mul", "div", "mm", "bmm"):
        other = next((j for j in step.names if j != k), None)
        number = next((x for x in step.node.flat if isinstance(x, (float, int))), None)
        v = None if other is None else step.node.flat[other].value
        name = f"{number:.6g}" if v is None and number is not None else step.names.get(other or 0)
        while v in g.maker and g.nodes[g.maker[v]].op in SILENT:
            v = next(x for _, x in g.nodes[g.maker[v]].operands())
        one = v is None or g.values[v].numel() == 1
        edge = step.s.dot({step.node.flat[k].value: step.s.edges[step.i][k]})
        kind = "scale" if one and step.s.is_whole(edge) else "missing-factor"
        word = "divisor" if step.op == "div" and k == 0 else "factor"
        return kind, f"lacks the {word} {name}", 1 if one else 2
    if step.op == "where":
        return "missing-factor", "lacks the mask of where", 2
    return "missing-factor", f"lacks the derivative of {step.op}", 2


def _is_pointwise(step: Step) -> bool:
    return step.op in SILENT or torch.Tag.pointwise in getattr(step.node.func, "tags", ())


def edge_turned(step: Step) -> Iterator[Mistake]:
    """An operand's gradient with two axes exchanged, moved along one, or mirrored."""
    for k, e in () if _is_pointwise(step) and step.op not in LINEAR else step.live.items():
        what = f"the gradient of {step.names[k]} that comes from {step.op}"
        source = step.g.maker.get(step.node.flat[k].value)
        spread = source is not None and step.g.nodes[source].op == "expand"
        for a, b, turn in exchanges(e):
            kind, text = "transposed", f"has the axes {a} and {b} of {what} exchanged"
            if step.op in REDUCTIONS or spread:
                kind, text = "wrong-reduction", f"sums {what} over the wrong axis"
            yield Mistake(("turn", k, a, b), kind, text, 4, step.edge(k, turn))
        for label, text, move in offsets(e):
            yield Mistake((*label, k), "shifted", f"has {what} {text}", 5, step.edge(k, move))
        if step.op == "convolution":
            mirror = operator.methodcaller("flip", list(range(2, e.dim())))
            text = f"has {what} mirrored in space"
            yield Mistake(("mirror", k), "flipped", text, 3, step.edge(k, mirror))


def upstream_changed(step: Step) -> Iterator[Mistake]:
    """Its upstream gradient masked, moved, reversed, transposed, or replaced by ones, for one
    operand or for all."""
    ends = step.node.outs[0] in step.g.ends
    for ks in [(k,) for k in step.live] + ([tuple(step.live)] if len(step.live) > 1 else []):
        more, what = 0.5 * (len(ks) > 1), f"the gradient of {step.g.out(step.i)}"
        if step.op not in SILENT:
            what += f" on the way to {' and '.join(step.names[k] for k in ks)}"
        text = "does not depend on the upstream gradient: ones are in its place"
        ones = step.above(ks, torch.ones_like)
        yield Mistake(("ones", ks), "ignores-upstream", text, 3 if ends else 6, ones)
        if _is_pointwise(step) and step.op not in ("alias", "expand"):
            continue  # a mask here is a mask further down
        for text, only in _ranges(step.u):
            said = f"counts only {text} of {what}"
            yield Mistake(("keep", ks, said), "subset", said, 4 + more, step.above(ks, only))
        for label, text, only in _corners(step.u) if step.op == "expand" else ():
            yield Mistake(label, "subset", f"{text} {what}", 4, step.above(ks, only))
        for label, text, move in offsets(step.u):
            said = f"has {what} {text}"
            yield Mistake((*label, ks, 0), "shifted", said, 5 + more, step.above(ks, move))
        for d in range(step.u.dim()):
            rule = step.above(ks, operator.methodcaller("flip", d))
            text = f"has {what} backwards along axis {d}"
            yield Mistake(("flip", d, ks), "permuted", text, 5 + more, rule)
        for a, b, turn in exchanges(step.u):
            kind, text, bits = "transposed", f"has the axes {a} and {b} of {what} exchanged", 4
            if step.op == "expand":
                kind, text, bits = "wrong-reduction", f"sums {what} over the wrong axis", 2
            yield Mistake(("turn", a, b, ks), kind, text, bits + more, step.above(ks, turn))


def _ranges(u: Tensor) -> Iterator[tuple[str, Change]]:
    """Zero but for a range of an axis."""
    for d, n in enumerate(u.shape):
        kept = {(0, 1): "first entry", (n - 1, n): "last entry"}
        if n > 3 and n % 2 == 0:
            kept |= {(0, n // 2): "first half", (n // 2, n): "second half"}
        if n > 2:
            kept |= {(1, n): "entries but the first", (0, n - 1): "entries but the last"}
        for (a, b), text in kept.items() if n > 1 else ():
            yield f"the {text} of axis {d}", only_range((d, a, b))


def _corners(u: Tensor) -> Iterator[tuple[tuple, str, Change]]:
    """Zero but for one position of two axes."""
    for d, c in itertools.combinations(range(u.dim()) if u.dim() > 2 else (), 2):
        for where in (0, -1):
            a, b = where % u.shape[d], where % u.shape[c]
            text = f"counts only one position of the axes {d} and {c} of"
            yield ("one", d, c, where), text, only_range((d, a, a + 1), (c, b, b + 1))


def operands_exchanged(step: Step) -> Iterator[Mistake]:
    """The gradients of two operands."""
    for j, k in itertools.combinations(step.live, 2):
        if step.live[j].shape == step.live[k].shape:
            text = f"exchanges the gradients of {step.names[j]} and {step.names[k]}"
            yield Mistake(("exchange", j, k), "permuted", text, 3, partial(_exchanged, step, j, k))


def _exchanged(step: Step, j: int, k: int, us: Upstream, _: Sweep) -> Edges:
    found = step.vjp(us)
    return {j: found[k], k: found[j]}


def branches_exchanged(step: Step) -> Iterator[Mistake]:
    if step.op == "where":
        text = "has the branches of the condition exchanged"
        yield Mistake(("branch",), "wrong-branch", text, 2, step.swapped(0, ~step.operand(0)))


def forwards(step: Step) -> Iterator[Mistake]:
    """Through a rearrangement or a running sum in the direction of the forward."""
    if len(step.names) == 1 and step.op in ("cumsum", *TURNS, *ORDERS):
        (k,) = step.live
        kind = {"roll": "shifted", "cumsum": "wrong-reduction"}.get(step.op, "permuted")
        text = f"goes through {step.op} forwards, not backwards"
        rule = step.instead(k, lambda u: step.g.call(step.i, {k: u})[0])
        yield Mistake(("forward",), kind, text, 2, rule)


def maximum_spread(step: Step) -> Iterator[Mistake]:
    """A maximum's gradient goes to every entry."""
    if step.op in ("amax", "amin"):
        (k,) = step.live
        (_, *dims), _ = tree_unflatten(step.node.flat, step.node.spec)

        def spread(u: Tensor) -> Tensor:
            x = step.operand(k).detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(x.sum(*dims), x, u)[0]

        text = f"goes to every entry, not only where {step.op} took it from"
        yield Mistake(("spread",), "missing-factor", text, 2, step.instead(k, spread))
