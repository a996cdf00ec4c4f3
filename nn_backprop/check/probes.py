"""The protocol: ways of calling a backward that must not change what it gives.

A formula can be right and its backward still be wrong in use: if the upstream gradient arrives
strided, if one of two outputs is not used, if the layer is called twice before the first backward.
Each probe calls the target in one such way and holds the result against the target's own gradients
in the plain case, so that it speaks whatever the verdict on the formula is; only the last two need
an oracle.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nn_backprop.check.report import Cause, Probe, in_one_line
from nn_backprop.check.target.custom_functions import returned_gradients
from nn_backprop.check.target.target import (
    ForwardRaised,
    Gradients,
    Layout,
    Target,
    Upstream,
    backward,
    filled,
    largest,
)


class Skipped(Exception):
    """A probe that does not apply; the message says why."""


class Wrong(Exception):
    """What a probe has found: the kind of cause, and the reason."""


@dataclass
class Probing:
    """The target, what it gives in the plain case, and how far rounding may move that."""

    target: Target
    upstream: list[Tensor]
    base: Gradients
    noise: dict[str, float]

    def gradients(self, upstream: Upstream | None = None, **kwargs) -> Gradients:
        """The target's gradients; its own copy of the upstream, since some write into it."""
        return self.target.gradients(upstream or self.copies(), **kwargs)

    def copies(self) -> list[Tensor]:
        return [u.clone() for u in self.upstream]

    def difference(self, actual: Gradients, expected: Gradients, slack: float = 1.0) -> str:
        """The first gradient that rounding does not explain, in words; or nothing."""
        for name, grad in actual.items():
            a, e = (filled(g, self.target.values[name]) for g in (grad, expected[name]))
            allowed = slack * self.noise[name]
            error = (a - e).abs()
            wrong = ~(error <= allowed) & (a != e) & ~(a.isnan() & e.isnan())
            if wrong.any():
                i = int(torch.where(wrong, error.nan_to_num(nan=torch.inf), -1.0).argmax())
                index = np.unravel_index(i, a.shape)
                where = f"[{', '.join(str(int(j)) for j in index)}]" if a.dim() else ""
                ours, right = a.flatten()[i].item(), e.flatten()[i].item()
                return f"grad_{name}{where} is {ours:.5g} instead of {right:.5g}"
        return ""

    def expect(
        self, kind: str, words: str, actual: Gradients, expected: Gradients, slack: float = 1.0
    ) -> None:
        """Raises Wrong, with the words and the first difference, if there is one."""
        if difference := self.difference(actual, expected, slack):
            raise Wrong(kind, words + difference)

    def other_upstream(self) -> list[Tensor]:
        """Other numbers, at other places."""
        return [_flipped(u) * 0.5 - 0.25 for u in self.upstream]


def run(probing: Probing) -> Iterator[tuple[Probe, Cause | None]]:
    """Every probe, each with the cause that its failure means."""
    steady = True
    for name, probe in PROBES.items():
        try:
            if not steady and probe is not _unchanged:
                raise Skipped("two equal calls differ already")
            probe(probing)
            yield Probe(name, "pass"), None
            continue
        except (Skipped, ForwardRaised) as why:
            reason = f"the forward raises {why}" if isinstance(why, ForwardRaised) else str(why)
            yield Probe(name, "skipped", reason), None
            continue
        except Wrong as wrong:
            kind, reason = wrong.args
        except Exception as error:
            kind = KIND_IF_RAISED.get(name, "unknown")
            reason = f"the target raised {in_one_line(error)}"
        steady = steady and probe is not _twice
        detail = f"{SENTENCES[kind]} (probe: {name})"
        yield Probe(name, "fail", reason), Cause(kind, detail, reason)


SENTENCES = {
    "assumes-contiguous": "the backward is right only if what it is handed is contiguous in memory",
    "mutates-input": "a call changes what it is handed",
    "stale-state": "the backward uses what another call has left behind",
    "needs-input-grad": "a gradient depends on which other inputs need one",
    "extra-term": "the gradient holds something that does not come from the upstream gradient",
    "nonlinear-in-upstream": "the gradient is not linear in the upstream gradient",
    "ignores-upstream": "the gradient does not depend on the upstream gradient",
    "nondeterministic": "two equal calls give different gradients",
    "wrong-reduction": "the backward returns a gradient of another shape than its input's",
    "detached": "a gradient is missing",
    "subset": "the outputs' gradients do not add up",
    "unknown": "the backward fails when it is called in this way",
}


def _laid_out(p: Probing, layout: Layout) -> None:
    """With an upstream gradient of the same numbers, elsewhere in memory."""
    if layout is _transposed and all(u.dim() < 2 for u in p.upstream):
        raise Skipped("no output has two axes")
    p.expect("assumes-contiguous", "", p.gradients(list(map(layout, p.upstream))), p.base)


def _expanded_upstream(p: Probing) -> None:
    expanded = [u.flatten()[:1].reshape([1] * u.dim()).expand(u.shape) for u in p.upstream]
    plain = p.gradients([u.contiguous() for u in expanded])
    p.expect("assumes-contiguous", "", p.gradients(expanded), plain)


def _strided_inputs(p: Probing) -> None:
    if not p.target.inputs:
        raise Skipped("no floating input")
    if p.target.draws():
        raise Skipped("the target draws random numbers, in the order of memory")
    words = "with inputs that are not contiguous, "
    for layout in (_strided, _transposed):
        grads = p.gradients(layout=layout)
        p.expect("assumes-contiguous", words, grads, p.base)


def _unchanged(p: Probing) -> None:
    leaves, handed = p.target.leaves_of()
    upstream = [u.clone() for u in p.upstream]
    before = {n: (t.detach().clone(), t._version) for n, t in handed.items()}
    outputs = p.target.forward(handed)
    between = {n: (t.detach().clone(), t._version) for n, t in handed.items()}
    backward(outputs, leaves, list(upstream))
    for name, tensor in handed.items():
        (original, version), (seen, later) = before[name], between[name]
        in_place_forward = later != version  # which torch knows of
        if not in_place_forward and not _equal(tensor.detach(), original):
            who = "forward" if not _equal(seen, original) else "backward"
            raise Wrong("mutates-input", f"the {who} has changed {name}")
    if not all(map(_equal, upstream, p.upstream)):
        raise Wrong("mutates-input", "the upstream gradient is not what it was before the call")


def _two_consumers(p: Probing) -> None:
    leaves, handed = p.target.leaves_of()
    other = [_flipped(u) for u in p.upstream]
    triples = zip(p.target.forward(handed), p.upstream, other, strict=True)
    parts = [(z * u).sum() + (z * v).sum() for z, u, v in triples if z.requires_grad]
    if not parts:
        raise Skipped("no output requires grad")
    loss = torch.stack(parts).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    together = p.gradients([u + v for u, v in zip(p.upstream, other, strict=True)])
    apart = dict(zip(leaves, grads, strict=True))
    p.expect("mutates-input", "used twice, ", apart, together, slack=4)


def _two_calls(p: Probing) -> None:
    if not p.target.inputs:
        raise Skipped("no floating input that could differ between the calls")
    # Other numbers, at other places: a mask or a maximum would survive being scaled.
    elsewhere = p.target.with_values(
        {n: _flipped(v) * 0.875 if n in p.target.inputs else v for n, v in p.target.values.items()}
    )
    try:
        alone = (p.target.fresh().gradients(p.copies()), elsewhere.fresh().gradients(p.copies()))
    except Exception as error:
        raise Skipped(f"other inputs raise {in_one_line(error)}") from error
    for order in ((0, 1), (1, 0)):
        calls = []
        first, second = p.target.fresh(), copy.copy(elsewhere)
        second.module = first.module
        for target in (first, second):
            leaves, handed = target.leaves_of()
            calls.append((target.forward(handed), leaves))
        for i in order:
            outputs, leaves = calls[i]
            if any(z.shape != u.shape for z, u in zip(outputs, p.upstream, strict=True)):
                raise Skipped("other inputs give outputs of another shape")
            words = f"two calls, then the {('first', 'second')[i]} one's backward: "
            grads = backward(outputs, leaves, p.copies())
            p.expect("stale-state", words, grads, alone[i], slack=4)


def _needs(p: Probing, left_out: bool) -> None:
    names = tuple(p.target.values)
    if len(names) < 2:
        raise Skipped("there is one input only")
    for name in names:
        wanted = tuple(n for n in names if n != name) if left_out else (name,)
        grads = p.gradients(wanted=wanted)
        who = f"if {name} needs none, " if left_out else f"if only {name} needs one, "
        p.expect("needs-input-grad", who, {n: grads[n] for n in wanted}, p.base)


def _each_output(p: Probing) -> None:
    if len(p.upstream) < 2:
        raise Skipped("there is one output only")
    total: dict[str, Tensor | None] = dict.fromkeys(p.base)
    for k in range(len(p.upstream)):
        alone: list[Tensor | None] = [u if i == k else None for i, u in enumerate(p.upstream)]
        zeros = [u if i == k else torch.zeros_like(u) for i, u in enumerate(p.upstream)]
        grads = p.gradients(alone)
        words = f"with no upstream gradient but that of {p.target.output_names[k]}, "
        p.expect("detached", words, grads, p.gradients(zeros))
        for name, value in p.target.values.items():
            total[name] = filled(total[name], value) + filled(grads[name], value)
    words = "summed over the outputs one by one, "
    p.expect("subset", words, total, p.base, slack=len(p.upstream))


def _zero_upstream(p: Probing) -> None:
    grads = p.gradients([torch.zeros_like(u) for u in p.upstream])
    words = "for an upstream gradient of 0, "
    if p.difference(grads, dict.fromkeys(grads)) and not p.difference(grads, p.base):
        why = "an upstream gradient of 0 gives the same gradient as any other"
        raise Wrong("ignores-upstream", why)
    p.expect("extra-term", words, grads, dict.fromkeys(grads))


def _linear(p: Probing) -> None:
    other = p.other_upstream()
    theirs = p.gradients([v.clone() for v in other])
    large = 2.0 ** (4 if any(torch.finfo(u.dtype).bits < 32 for u in p.upstream) else 12)
    mixed = p.gradients([2 * v - u for u, v in zip(p.upstream, other, strict=True)])
    scaled = p.gradients([large * u for u in p.upstream])
    first, second = p.target.filled(p.base), p.target.filled(theirs)
    expected = {n: 2 * second[n] - first[n] for n in first}
    expected_scaled = {n: large * first[n] for n in first}

    def comparable(found: Gradients, promised: dict[str, Tensor]) -> bool:  # nothing overflows
        finite = all(g is None or g.isfinite().all() for g in found.values())
        limit = torch.finfo(p.target.dtype).max / 8
        return finite and max(map(largest, promised.values()), default=0) < limit

    difference = p.difference(mixed, expected, slack=8) if comparable(mixed, expected) else ""
    if comparable(scaled, expected_scaled):
        difference = difference or p.difference(scaled, expected_scaled, slack=8 * large)
    if not difference:
        return
    if not p.difference(theirs, p.base) and not p.difference(scaled, p.base):
        raise Wrong("ignores-upstream", "every upstream gradient gives the same gradient")
    raise Wrong("nonlinear-in-upstream", f"grad(2v − u) is not 2·grad(v) − grad(u): {difference}")


def _twice(p: Probing) -> None:
    calls = [p.base, p.gradients(), p.gradients(), p.gradients()]
    difference = p.difference(calls[1], p.base)
    if not difference:
        p.gradients(p.other_upstream())
        words = "after a call with another upstream gradient, "
        return p.expect("stale-state", words, p.gradients(), p.base)
    numbers = [p.target.filled(grads) for grads in calls[1:]]
    steps = [
        {name: after[name] - before[name] for name in after}
        for before, after in itertools.pairwise(numbers)
    ]
    if not p.difference(steps[0], steps[1], slack=8) and p.difference(calls[2], calls[1]):
        why = "every call adds the same to what the last one left"
        raise Wrong("stale-state", f"{why}: {difference}")
    raise Wrong("nondeterministic", f"with the same random seed, called again: {difference}")


def _backward_twice(p: Probing) -> None:
    leaves, handed = p.target.leaves_of()
    outputs = p.target.forward(handed)

    def again() -> Gradients:
        grads = backward(outputs, leaves, p.copies(), retain_graph=True)
        return {n: None if g is None else g.clone() for n, g in grads.items()}

    first = again()
    try:
        difference = p.difference(again(), first)
    except Exception as error:
        raise Skipped(f"a second backward raises {in_one_line(error)}") from error
    if not difference:
        return
    grads = []
    for _ in range(2):
        torch.default_generator.manual_seed(p.target.seed)
        grads.append(again())
    if p.difference(grads[0], grads[1]):
        raise Wrong("stale-state", f"the backward again, over the same graph: {difference}")
    raise Wrong("nondeterministic", f"the backward draws random numbers of its own: {difference}")


def _raw(p: Probing) -> None:
    if p.target.function is None or p.target.loss is not None:
        raise Skipped("the target is not a Function")
    returned: list[tuple] = []
    with returned_gradients(p.target.function, returned):
        p.gradients()
    if len(returned) != 1:
        raise Skipped("the output is not the Function's own")
    for name, grad in p.target.arguments.by_name(returned[0]).items():
        shape = p.target.values[name].shape
        if grad is not None and grad.shape != shape:
            what = f"grad_{name} of shape {tuple(grad.shape)} for {name} of shape {tuple(shape)}"
            why = "autograd's engine sums it in silence, other callers do not"
            raise Wrong("wrong-reduction", f"backward returns {what}; {why}")


PROBES: dict[str, Callable[[Probing], None]] = {
    "the same call twice": _twice,
    "backward twice": _backward_twice,
    "inputs and upstream unchanged": _unchanged,
    "linear in the upstream": _linear,
    "zero upstream": _zero_upstream,
    "strided upstream": lambda p: _laid_out(p, _strided),
    "transposed upstream": lambda p: _laid_out(p, _transposed),
    "expanded upstream": _expanded_upstream,
    "upstream with an offset": lambda p: _laid_out(p, _offset),
    "inputs not contiguous": _strided_inputs,
    "two consumers": _two_consumers,
    "two calls, then two backwards": _two_calls,
    "each input alone needs a gradient": lambda p: _needs(p, left_out=False),
    "each input needs none": lambda p: _needs(p, left_out=True),
    "each output alone": _each_output,
    "shapes of the raw backward": _raw,
}
KIND_IF_RAISED = {
    **dict.fromkeys(
        ["strided upstream", "transposed upstream", "expanded upstream", "upstream with an offset",
         "inputs not contiguous"], "assumes-contiguous"),
    "each input alone needs a gradient": "needs-input-grad",
    "each input needs none": "needs-input-grad",
    "two calls, then two backwards": "stale-state",
    "each output alone": "detached",
}  # fmt: skip


def _flipped(t: Tensor) -> Tensor:
    """The same numbers, the other way round on every axis."""
    return t.flip(tuple(range(t.dim())))


def _strided(t: Tensor) -> Tensor:
    """The same numbers, every other place in memory: a differentiable function of t."""
    return torch.stack([t, torch.full_like(t, 7.0)], -1)[..., 0] if t.dim() else t.clone()


def _transposed(t: Tensor) -> Tensor:
    """The same numbers with the last two axes the other way round in memory."""
    return t.mT.clone(memory_format=torch.contiguous_format).mT if t.dim() > 1 else t.clone()


def _offset(t: Tensor) -> Tensor:
    """The same numbers, three places after the start of their storage."""
    storage = torch.full((t.numel() + 3,), 7.0, dtype=t.dtype, device=t.device)
    storage[3:] = t.flatten()
    return storage[3:].view(t.shape)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25))
