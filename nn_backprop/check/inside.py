"""Inside a network: the Functions and submodules that it calls, each checked by itself."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nn_backprop.check.findings import Findings
from nn_backprop.check.report import Probe, Report
from nn_backprop.check.target.custom_functions import recorded_calls
from nn_backprop.check.target.target import Target


def check_functions(found: Findings) -> bool:
    """Checks each custom Function that the target calls, the last call first; whether there is
    one. Where the target's gradients are wrong, the first wrong Function is the last checked."""
    subject, report = found.subject, found.report
    if subject.function is not None or found.depth != "whole":
        return False
    with recorded_calls(subject.module) as calls:
        subject.run()
    right = report.verdict != "fail"
    checked, seen = False, set()
    for call in reversed(calls):
        kinds = [(a.shape, a.dtype) if isinstance(a, Tensor) else repr(a) for a in call.args]
        signature = (call.function, *kinds)
        if right and signature in seen:
            continue
        seen.add(signature)
        name = " ".join(filter(None, [call.where, f"({call.function.__name__})"]))
        constant = [i for i, needs in enumerate(call.needs_grad) if not needs]
        try:
            local = Target(call.function, call.args, {}, None, subject.seed, constant)
            inner = found.check(local, call.function, None, found.second_order, "alone")
        except ValueError:
            continue
        checked = True
        wrong = inner.verdict == "fail"
        found.add(Probe(f"{name} by itself", "fail" if wrong else "pass", inner.reason))
        if wrong:
            report.where = report.where or name
            found.add_from(name, inner)
            if not right:
                break
    return checked


def search_submodules(found: Findings) -> None:
    """Finds the first submodule, from the loss down, whose own gradients are wrong."""
    module, path = found.subject.module, ""
    if found.depth != "whole" or module is None:
        return
    calls = _submodule_calls(found.subject)
    wrong: Report | None = None
    while True:
        children = {f"{path}.{n}".lstrip(".") for n, _ in module.named_children()}
        for name, part, args, kwargs in reversed(calls):
            if name not in children:
                continue
            try:
                local = Target(part, args, kwargs, None, found.subject.seed)
                if found.check(local, part, depth="verdict").verdict != "fail":
                    continue
                wrong = found.check(local, part, depth="alone")
            except ValueError:
                continue
            module, path = part, name
            break
        else:
            break
    if wrong is not None:
        found.report.where = f"{path} ({type(module).__name__})"
        found.causes = []
        found.add_from(path, wrong)


def _submodule_calls(subject: Target) -> list[tuple[str, nn.Module, tuple, dict[str, Any]]]:
    """Every call of a submodule in a forward pass, in order: its name, itself, its arguments."""
    calls: list[tuple[str, nn.Module, tuple, dict]] = []
    assert subject.module is not None

    def noting(name: str) -> Callable:  # a copy of the submodule made on the way has the name too
        return lambda part, args, kwargs: calls.append((name, part, args, kwargs))

    hooks = [
        part.register_forward_pre_hook(noting(name), with_kwargs=True)
        for name, part in subject.module.named_modules()
        if name
    ]
    try:
        subject.run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
