"""Is this gradient right? The steps of a check, in order."""

import math
from collections.abc import Callable
from typing import Any

import torch

from nn_backprop.check import probes
from nn_backprop.check.elsewhere import look_elsewhere
from nn_backprop.check.explanation import explain, explain_refusal
from nn_backprop.check.findings import Depth, Findings
from nn_backprop.check.inside import check_functions, search_submodules
from nn_backprop.check.oracle.rounding import SAFETY
from nn_backprop.check.report import GradientMismatch, Report
from nn_backprop.check.second_derivative import second_derivative
from nn_backprop.check.target.state import seeded
from nn_backprop.check.target.target import Target, largest
from nn_backprop.check.verdict import BackwardRaised, Stopped, give_verdict


def check_gradients(
    target: Any,
    /,
    *inputs: Any,
    reference: Any = None,
    loss: Callable | None = None,
    seed: int = 0,
    second_order: bool = False,
    **kwargs: Any,
) -> Report:
    """Whether the gradients of `target` at these inputs are right and, if not, why.

    target: an nn.Module, whose parameters are checked too; a torch.autograd.Function; a pair
        ``(forward, backward)`` of NumPy functions, called as ``forward(*inputs)`` and
        ``backward(grad, *inputs)``; or any callable on tensors. It may return nested outputs.
    inputs, kwargs: what it is called with. The gradient of every floating tensor among them is
        checked, whether or not it requires grad; everything else is passed through.
    reference: a callable or module that computes the same in plain torch. Its values are compared
        first, and its gradients, by autograd, are what is expected.
    loss: applied to the target's output; the gradient is then that of the loss.
    seed: of the random upstream gradient and of whatever the target draws.
    second_order: check the derivative of the backward too.

    The caller's tensors, gradients, buffers, random state and training mode are left as they were.
    Raises ValueError, in one sentence, for what cannot be checked: nothing differentiable among
    the inputs or outputs, complex or sparse tensors. A target that raises gives an inconclusive
    report, or a failed one if it was the backward; `error` is what it raised.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # taken only where no gradient is asked for
    try:
        with torch.inference_mode(False), torch.enable_grad():
            subject = Target(target, inputs, kwargs, loss, seed)
            with seeded(seed):
                return _check(subject, target, reference, second_order)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def assert_gradients(
    target: Any, /, *inputs: Any, allow_inconclusive: bool = False, **kwargs: Any
) -> Report:
    """`check_gradients`, for a test: raises GradientMismatch unless the gradients are right."""
    report = check_gradients(target, *inputs, **kwargs)
    if report.verdict == "fail" or (report.verdict == "inconclusive" and not allow_inconclusive):
        raise GradientMismatch(report)
    return report


def _check(
    subject: Target, original: Any, reference: Any = None, second_order: bool = False,
    depth: Depth = "whole",
) -> Report:  # fmt: skip
    """The stages; those that check other targets on the way do so by this function again."""
    report = Report(subject.label, "pass")
    found = Findings(subject, original, reference, second_order, depth, _check, report)
    try:
        give_verdict(found)
    except Stopped as stopped:
        if depth != "verdict" and isinstance(stopped, BackwardRaised):
            report.causes = explain_refusal(found, stopped)
        return report
    if depth == "verdict":
        return report
    if all(g is None or g.isfinite().all() for g in found.actual.values()):
        _probe(found)
    if found.wrong and not report.where:
        search_submodules(found)
    explain(found)
    return report


def _probe(found: Findings) -> None:
    """The protocol, what is called inside, and the same gradients elsewhere."""
    probing = probes.Probing(found.subject, found.upstream, found.actual, _noise(found))
    for probe, cause in probes.run(probing):
        found.add(probe, cause)
    steady = found.report.probes[0].outcome != "fail"  # the same call twice
    right = found.report.verdict != "fail" and steady
    has_functions = check_functions(found)
    look_elsewhere(found, right, ranges=not has_functions)
    if found.second_order:
        found.add(*second_derivative(found.oracle, found.wide_upstream))


def _noise(found: Findings) -> dict[str, float]:
    """How far rounding may move each of the target's own gradients."""
    unclear = {e.name: e.error for e in found.report.tensors if e.verdict == "inconclusive"}
    eps = torch.finfo(found.oracle.dtype).eps
    noise = {}
    for name, grad in found.actual.items():
        least = eps * math.sqrt(found.oracle.terms) * largest(grad)
        expected = found.expected[name]
        unsure = expected.uncertainty if expected.value is not None else 0.0
        most = SAFETY * max(least, found.oracle.noise[name], unsure)
        noise[name] = max(most, unclear.get(name, 0.0))
    return noise
