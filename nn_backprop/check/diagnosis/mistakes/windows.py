"""Convolution, pooling, padding, and whatever reads an entry several times: contributions that
overwrite one another, borders cut off wrongly, options ignored."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from nn_backprop.check.diagnosis.recorded import MOVES, Edges, Rule, Sweep, Upstream
from nn_backprop.check.diagnosis.search import Mistake, Step


def moved(step: Step) -> Iterator[Mistake]:
    """Several places of the output are one of the input: one overwrites the others."""
    if step.op in MOVES - {"cat", "stack"} and len(step.live) == 1:
        (k,) = step.live
        read = step.g.call(step.i, {k: _places(step.operand(k))})[0].long().flatten() - 1
        yield from _overwritten(step, k, read, torch.flatten)


def _places(x: Tensor) -> Tensor:
    """Its entries numbered from 1; 0 is outside."""
    return torch.arange(1, x.numel() + 1, dtype=torch.float64).view(x.shape)


def _overwritten(
    step: Step, k: int, read: Tensor, sent: Callable[[Tensor], Tensor]
) -> Iterator[Mistake]:
    """Where an entry is read several times, one of the reads wins instead of their sum: `read`
    lists which entry of the operand each piece of what is `sent` goes to; −1 is none."""
    shape = step.operand(k).shape
    pieces = (read >= 0).nonzero().flatten()
    if len(pieces) == len(read[pieces].unique()) or len(pieces) > 20_000:
        return
    kind, bits = ("subset", 4) if step.op == "expand" else ("overwritten", 2)
    for word, order in (("last", pieces), ("first", pieces.flip(0))):
        winner = torch.full((shape.numel(),), -1)
        for place, piece in zip(read[order].tolist(), order.tolist(), strict=True):
            winner[place] = piece

        def kept(u: Tensor, winner: Tensor = winner) -> Tensor:
            return torch.where(winner >= 0, sent(u)[winner], 0.0).view(shape)

        of = f"the contributions to each entry of {step.g.out(step.i)}"
        text, rule = f"keeps only the {word} of {of}", step.instead(k, kept)
        yield Mistake(("overwrite", k, word), kind, text, bits, rule)


def pooled(step: Step) -> Iterator[Mistake]:
    """Max-pooling: every tie gets the gradient, or overlapping windows overwrite."""
    if not step.op.startswith("max_pool2d") or step.u is None or not step.live:
        return
    k = next(iter(step.live))
    x, (y, index) = step.operand(k), (step.g.values[v] for v in step.node.outs)
    args = [a for a in step.node.flat[1:] if type(a) is int]
    kernel, stride, padding = args[:2], args[2:4] or args[:2], args[4:6] or [0, 0]
    planes = x.reshape(-1, 1, *x.shape[-2:])
    fold: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": padding}

    def ties(u: Tensor) -> Tensor:
        is_largest = F.unfold(planes, **fold) == y.reshape(len(planes), 1, -1)
        spread = is_largest * u.reshape(len(planes), 1, -1)
        return F.fold(spread, x.shape[-2:], **fold).view(x.shape)

    text = "gives the gradient to every tie"
    yield Mistake(("ties",), "extra-term", text, 2, step.instead(k, ties))
    plane = torch.arange(len(planes)).view(-1, 1) * planes[0].numel()
    read = (index.reshape(len(planes), -1) + plane).flatten()
    yield from _overwritten(step, k, read, torch.flatten)


def convolved(step: Step) -> Iterator[Mistake]:
    """A convolution's input gradient: overlaps overwritten, padding cropped off wrongly."""
    if step.op != "convolution":
        return
    x, w = (step.g.values[v] for _, v in list(step.node.operands())[:2])
    n, flat = x.dim() - 2, step.node.flat
    stride, padding, dilation = (flat[3 + d * n : 3 + d * n + n] for d in range(3))
    if 0 not in step.live or flat[3 + 3 * n] or flat[-1] != 1:
        return  # transposed, or in groups
    wide = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    corner = (slice(None), slice(None), *map(slice, x.shape[2:]))

    def cropped(u: Tensor) -> Tensor:
        inputs = wide.detach().requires_grad_()
        with torch.enable_grad():
            y = torch.convolution(inputs, w, None, stride, [0] * n, dilation, False, [0] * n, 1)
        return torch.autograd.grad(y, inputs, u)[0][corner]

    text = "is cut from the wrong corner: the padding is not cropped off"
    yield Mistake(("crop",), "shifted", text, 2, step.instead(0, cropped))
    if n != 2:
        return
    fold: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    read = F.unfold(_places(x), w.shape[2:], **fold).long() - 1
    number = torch.arange(read.numel()).view(read.shape)
    rank = number.transpose(1, 2).flatten()  # window by window, or kernel place by place

    def sent(u: Tensor) -> Tensor:
        return (w.reshape(len(w), -1).T @ u.flatten(2)).flatten()

    yield from _overwritten(step, 0, read.flatten(), sent)
    yield from _overwritten(step, 0, read.flatten()[rank], lambda u: sent(u)[rank])


def uncropped(step: Step) -> Iterator[Mistake]:
    """Padding is cut off at the wrong end, or the same at both."""
    if step.op != "constant_pad_nd":
        return
    k = next(iter(step.live))
    sizes, grown = step.operand(k).shape, step.u.shape
    padded = [d for d, n in enumerate(sizes) if grown[d] != n]
    for d in padded:
        for start in {0, grown[d] - sizes[d], (grown[d] - sizes[d]) // 2}:

            def cut(u: Tensor, d: int = d, start: int = start) -> Tensor:
                for e in padded:
                    u = u.narrow(e, start if e == d else (grown[e] - sizes[e]) // 2, sizes[e])
                return u

            text = f"is cut from {step.g.out(step.i)} at place {start} of axis {d}"
            yield Mistake(("cut", d, start), "shifted", text, 3, step.instead(k, cut))


def options_ignored(step: Step) -> Iterator[Mistake]:
    """The derivative of the same operation with another option."""
    node = step.node
    tried: dict[str, Any] = {}
    if step.op == "embedding":
        tried = {"padding_idx": -1}
    elif step.op == "convolution" or "pool" in step.op:
        tried = {"stride": 1, "dilation": 1, "groups": 1, "padding": 0, "count_include_pad": None}
    names = [a.name for a in node.func._schema.arguments] if tried else []
    args, _ = tree_unflatten(list(range(len(node.flat))), node.spec)
    for name, where in zip(names, args, strict=False):
        spots = where if isinstance(where, list) else [where]
        if name not in tried or not spots:
            continue
        new = not node.flat[spots[0]] if tried[name] is None else tried[name]
        if all(node.flat[p] == new for p in spots):
            continue
        kind, text = "wrong-operand", f"ignores the {name} of {step.op}"
        if step.op == "embedding":
            kind, text = "extra-term", "counts the padding index"
        elif name == "count_include_pad":
            text = "divides by the wrong number at the padded border"
        rule = _with_options(step, dict.fromkeys(spots, new))
        yield Mistake((name, new), kind, text, 1 if step.op == "embedding" else 3, rule)


def _with_options(step: Step, swap: dict[int, Any]) -> Rule:
    def rule(us: Upstream, _: Sweep) -> Edges:
        u = torch.zeros_like(step.g.call(step.i, swap)[0])
        common = tuple(slice(min(a, b)) for a, b in zip(us[0].shape, u.shape, strict=True))
        u[common] = us[0][common]
        return step.g.vjp(step.i, [u, *us[1:]], swap)

    return rule
