"""The properties of a right gradient, as functions that raise AssertionError, and their tolerances.

Each takes a case and, in place of the rule of its row, another rule if one is given: what is
required of the rules must be refused to a rule that has been spoilt.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from cases import LINEAR_IN, Case
from properties import about
from torch import Tensor
from torch.testing import assert_close

from nn_backprop import backprop
from nn_backprop.rules import Rule

# Two ways to the same numbers in float64: relative to an entry, and to the largest entry.
RTOL = 1e-10
# Finite differences: what the step below leaves, of order STEP⁴ in the series and 1e-16/STEP in
# rounding, is at most 6e-11 in these cases.
DIFFERENCE_RTOL = 1e-9
STEP = 2e-3
# How often a rule rounds one term of a gradient: what it saved, the products, the result. These
# are counted in the code; two for each place where a saved number enters twice.
ROUNDINGS = {"gelu": 16, "softmax": 8, "log_softmax": 8, "tanh": 6}
ROUNDINGS_OF_OTHERS = 4
# A wrong rule that every check has to notice.
SPOILT = 1.001


def backwards(t: Tensor) -> Tensor:
    return t.permute(tuple(reversed(range(t.dim()))))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, -t], -1)[..., 0],
    "transposed": lambda t: backwards(backwards(t).contiguous()),
    "offset": lambda t: torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t.flatten()[:1].sum().expand(t.shape),
}


class Played(NamedTuple):
    """A case, played forward and backward by a rule."""

    operands: dict[str, Tensor]  # the tensors among the forward's arguments
    z: Tensor
    saved: tuple
    needs: tuple[bool, ...]
    grad_z: Tensor
    grads: dict[str, Tensor]  # of the operands that are differentiable


def play(
    case: Case,
    rule: Rule | None = None,
    upstream_layout: Callable[[Tensor], Tensor] = lambda t: t,
    input_layout: Callable[[Tensor], Tensor] = lambda t: t,
    **drawn,
) -> Played:
    """The layouts rearrange memory; `drawn` is handed to `Case.draw`."""
    rule = rule or case.rule
    args, kwargs = case.draw(**drawn)
    with torch.no_grad():
        arguments, _ = rule.arguments(args, kwargs)
        arguments = tuple(input_layout(a) if isinstance(a, Tensor) else a for a in arguments)
        operands = {
            name: arguments[i]
            for name, i in rule.tensors.items()
            if i < len(arguments) and isinstance(arguments[i], Tensor)
        }
        torch.manual_seed(case.seed)
        z, saved = rule.forward(*arguments)
        grad_z = upstream_layout(upstream(case, z))
        needs = tuple(name in case.names for name in rule.tensors)
        grads = rule.backward(grad_z, saved, needs)
    return Played(operands, z, saved, needs, grad_z, by_name(rule, grads))


def by_name(rule: Rule, grads: tuple) -> dict[str, Tensor]:
    assert type(grads) is tuple
    named = zip(rule.tensors, grads, strict=True)
    return {name: grad for name, grad in named if grad is not None}


def upstream(case: Case, z: Tensor) -> Tensor:
    """A random upstream gradient: of ones, a third of ordinary mistakes would not be seen."""
    seeded = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(z.shape, dtype=torch.float64, generator=seeded).to(z)


def by_autograd(
    case: Case, grad_z: Tensor | None = None, **drawn
) -> tuple[Tensor, dict[str, Tensor]]:
    """z and the gradients as torch has them, from its own callable."""
    z, leaves = by_torch(case, **drawn)
    grads = torch.autograd.grad(z, leaves, upstream(case, z) if grad_z is None else grad_z)
    return z.detach(), dict(zip(case.names, grads, strict=True))


def by_torch(case: Case, **drawn) -> tuple[Tensor, list[Tensor]]:
    """z from torch's own callable, with its graph, and the leaves named in `case.names`."""
    args, kwargs = case.draw(**drawn)
    arguments, _ = case.rule.arguments(args, kwargs)
    leaves = [arguments[case.rule.tensors[name]] for name in case.names]
    torch.manual_seed(case.seed)
    # Copies, since the callable may work in place, which a leaf does not allow.
    copies = [a.clone() if isinstance(a, Tensor) and a.requires_grad else a for a in args]
    named = {n: a.clone() if isinstance(a, Tensor) and a.requires_grad else a
             for n, a in kwargs.items()}  # fmt: skip
    return case.function(*copies, **named), leaves


def close(actual: Tensor, expected: Tensor, rtol: float = RTOL, least: float = 0.0) -> None:
    """Equal in shape, type and device; in value to `rtol` of the entry or of the largest entry.

    `least` stands for the largest entry where that is smaller.
    """
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert_close(actual, expected, rtol=rtol, atol=rtol * max(largest, least))


def all_close(actual: dict, expected: dict, rtol: float = RTOL, least: float = 0.0) -> None:
    """Of the same names, and each close; None where None is expected."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        with about(name):
            assert (actual[name] is None) == (wanted is None)
            if wanted is not None:
                close(actual[name], wanted, rtol, least)


def each_close(actual: Iterable, expected: Iterable, **tolerance: float) -> None:
    """One after the other, as many, and each close; None where None is expected."""
    all_close(dict(enumerate(actual)), dict(enumerate(expected)), **tolerance)


def matches_autograd(case: Case, rule: Rule | None = None, device: str = "cpu") -> None:
    z, grads = by_autograd(case, device=device)
    played = play(case, rule, device=device)
    close(played.z, z)
    all_close(played.grads, grads)


def matches_float32(case: Case, rule: Rule | None = None) -> None:
    """In float32, the float64 gradient of the same numbers, to torch's defaults for float32."""
    played = play(case, rule, dtype=torch.float32, rounded=torch.float32)
    _, grads = by_autograd(case, played.grad_z.to(torch.float64), rounded=torch.float32)
    assert played.grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert_close(played.grads[name], grad.to(torch.float32))


def matches_bfloat16(case: Case, rule: Rule | None = None) -> None:
    """In bfloat16, the float64 gradient of the same numbers, to what rounding can do to its terms.

    An entry grad[j] = Σ_k grad_z[k] J[k,j] of n terms, each rounded r times, is wrong by at most
    γ Σ_k |grad_z[k] J[k,j]| with m = n + r, γ = m u / (1 − m u) and the unit roundoff u
    (Higham 2002, Accuracy and stability of numerical algorithms, lemma 3.1). An entry J may itself
    be a difference of larger numbers, so the largest of these sums stands for all of them.
    """
    played = play(case, rule, dtype=torch.bfloat16, rounded=torch.bfloat16)
    grad_z = played.grad_z.to(torch.float64)
    z, leaves = by_torch(case, rounded=torch.bfloat16)
    sums, count = [0] * len(leaves), [0] * len(leaves)
    for k, upstream_k in enumerate(grad_z.flatten()):
        row = torch.autograd.grad(z.flatten()[k], leaves, upstream_k, retain_graph=True)
        sums = [s + r.abs() for s, r in zip(sums, row, strict=True)]
        count = [c + (r != 0) for c, r in zip(count, row, strict=True)]
    expected = torch.autograd.grad(z, leaves, grad_z)
    u = torch.finfo(torch.bfloat16).eps / 2
    for i, name in enumerate(case.names):
        m = count[i].max().item() + ROUNDINGS.get(case.rule.name, ROUNDINGS_OF_OTHERS)
        assert m * u < 1
        bound = m * u / (1 - m * u) * sums[i].max().item()
        assert played.grads[name].dtype == torch.bfloat16
        assert_close(played.grads[name].to(torch.float64), expected[i], rtol=0.0, atol=bound)


def matches_differences(case: Case, rule: Rule | None = None) -> None:
    all_close(play(case, rule).grads, by_differences(case), DIFFERENCE_RTOL)


@functools.cache
def by_differences(case: Case) -> dict[str, Tensor]:
    """The gradients of Σ z · grad_z by central differences of the rule's forward.

    With D(s) = (f(x + s) − f(x − s)) / 2s = f' + c s² + O(s⁴), the combination
    (4 D(s/2) − D(s)) / 3 is f' + O(s⁴).
    """
    args, kwargs = case.draw()
    arguments, _ = case.rule.arguments(args, kwargs)
    grad_z = play(case).grad_z
    forward = inspect.unwrap(case.rule.forward)  # without the check of shapes, which takes time

    def scalar() -> Tensor:
        torch.default_generator.manual_seed(case.seed)
        return (forward(*arguments)[0] * grad_z).sum()

    @torch.no_grad()
    def derivative(tensor: Tensor) -> Tensor:
        grad = torch.zeros_like(tensor)
        for place in itertools.product(*map(range, tensor.shape)):
            value, at = tensor[place].item(), {}
            for step in (STEP, -STEP, STEP / 2, -STEP / 2):
                tensor[place] = value + step
                at[step] = scalar() / (2 * step)
            tensor[place] = value
            wide, narrow = at[STEP] + at[-STEP], at[STEP / 2] + at[-STEP / 2]
            grad[place] = (4 * narrow - wide) / 3
        return grad

    return {name: derivative(arguments[case.rule.tensors[name]]) for name in case.names}


def linear_in(case: Case) -> list[str]:
    return [name for name in LINEAR_IN.get(case.rule.name, []) if name in case.names]


def is_the_adjoint(case: Case, rule: Rule | None = None) -> None:
    """⟨A x, u⟩ = ⟨x, Aᵀ u⟩, where A x is the change of z from 0 to x, and Aᵀ u the gradient."""
    rule, played = rule or case.rule, play(case, rule)

    @torch.no_grad()
    def z_with(name: str, value: Tensor) -> Tensor:
        arguments, _ = rule.arguments(*case.draw())
        arguments[rule.tensors[name]].copy_(value)
        torch.manual_seed(case.seed)
        return rule.forward(*arguments)[0]

    for name in linear_in(case):
        grad, seeded = played.grads[name], torch.Generator().manual_seed(case.seed + 2)
        x = torch.randn(grad.shape, dtype=grad.dtype, generator=seeded)
        change = z_with(name, x) - z_with(name, torch.zeros_like(x))
        # The tolerance is relative to the terms of the sum, which may cancel.
        left, right = change * played.grad_z, x * grad
        bound = RTOL * (left.abs().sum() + right.abs().sum()).item()
        assert_close(left.sum(), right.sum(), rtol=0.0, atol=bound)


def spoilt(rule: Rule, name: str, by: Callable[[Tensor], Tensor] = lambda g: g * SPOILT) -> Rule:
    """The rule with a mistake in one gradient."""

    def backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
        grads = zip(rule.tensors, rule.backward(grad_z, saved, needs), strict=True)
        return tuple(by(g) if n == name and g is not None else g for n, g in grads)

    return replace(rule, backward=backward)


def backprop_agrees(model, loss_fn, inputs, targets, rtol: float = RTOL) -> None:
    """Loss, gradients and buffers as autograd has them, from the same seed on a copy.

    The absolute tolerance is relative to the largest entry of all gradients: before a batch norm a
    bias has gradient 0, of which both sides give only rounding errors.
    """
    reference = copy.deepcopy(model)
    parameters = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    output = reference(*inputs) if isinstance(inputs, tuple) else reference(inputs)
    expected_loss = loss_fn(output, targets)
    expected = torch.autograd.grad(expected_loss, list(parameters.values()), allow_unused=True)
    torch.manual_seed(3)
    loss, grads = backprop(model, loss_fn, inputs, targets)

    assert loss.shape == () and not loss.requires_grad and not hasattr(loss, "_made_by")
    assert_close(loss, expected_loss.detach(), rtol=rtol, atol=rtol)
    assert list(grads) == list(parameters)  # in this order
    largest = max((g.abs().max().item() for g in expected if g is not None), default=0.0)
    all_close(grads, dict(zip(parameters, expected, strict=True)), rtol, largest)
    # Running statistics, moved once.
    assert all(map(torch.equal, model.buffers(), reference.buffers()))
    assert all(p.grad is None for p in model.parameters())
