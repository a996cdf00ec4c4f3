"""What the checkers say of one mistake, one equivalent or one right configuration."""

import collections
import copy
import re
import time
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

from mutants import EQUIVALENTS, MUTANTS, UNSEEN, Mutant, fit
from mutants.right import configuration
from nn_backprop.check import Report, check_gradients
from nn_backprop.studies import Row

Job = tuple[str, int]  # mistake, equivalent or configuration; its number


def checked(job: Job) -> Row:
    """A row; `of` is the first word of the job."""
    kind, number = job
    with warnings.catch_warnings():  # what the targets warn of is not in question
        warnings.simplefilter("ignore")
        if kind == "configuration":
            return {"of": kind} | check_configuration(number)
        return {"of": kind} | check_mutant((MUTANTS if kind == "mistake" else EQUIVALENTS)[number])


def check_mutant(mutant: Mutant) -> Row:
    """What each checker says of it, on its data and, where there are such, where it hides."""
    target, inputs = mutant.make()
    began = time.perf_counter()
    report = check_gradients(target, *inputs, second_order=mutant.second_order)
    seconds = time.perf_counter() - began
    kinds = [cause.kind for cause in report.causes[:3]]
    row: Row = {
        "name": mutant.name,
        "part": "unseen" if mutant in UNSEEN else "fit" if mutant in fit() else "read",
        "right_kinds": mutant.kinds,
        "verdict": report.verdict,
        "causes": kinds,
        "place": next((n for n, kind in enumerate(kinds, 1) if kind in mutant.kinds), None),
        "seconds": seconds,
    }
    if mutant.hides:
        target, inputs = mutant.hides()
        row["hidden_verdict"] = check_gradients(target, *inputs).verdict
    for mode in ("gradcheck", "fast"):
        began = time.perf_counter()
        row[mode] = gradchecked(*mutant.make(), mode == "fast", mutant.second_order)
        row[f"{mode}_seconds"] = time.perf_counter() - began
        if mutant.hides:
            row[f"hidden_{mode}"] = gradchecked(*mutant.hides(), mode == "fast", False)
    return row


def gradchecked(
    target: Any, inputs: tuple, fast: bool, second_order: bool
) -> Literal["caught", "passed", "not run"]:
    """torch's own checker on the same data in float64; a module's parameters are inputs too."""
    given = [leaf(x) for x in inputs]
    if isinstance(target, nn.Module):
        module = copy.deepcopy(target).double()
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        given += [leaf(dict(module.named_parameters())[name].detach()) for name in names]

        def call(*args: Any) -> Any:
            count = len(args) - len(names)
            parameters = dict(zip(names, args[count:], strict=True))
            return functional_call(module, parameters, args[:count])

    else:
        call = target.apply if isinstance(target, type) and issubclass(target, Function) else target

    def function(*args: Any) -> Any:
        torch.manual_seed(0)  # gradcheck has no seed for what a target draws
        return call(*args)

    try:
        function(*given)
    except Exception:
        return "not run"
    try:
        gradcheck(function, given, fast_mode=fast)
        if second_order:
            gradgradcheck(function, given, fast_mode=fast)
    except ValueError:  # it refuses the inputs
        return "not run"
    except (GradcheckError, RuntimeError, TypeError):  # or the backward raised
        return "caught"
    return "passed"


def leaf(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().clone().requires_grad_()
    return x


def check_configuration(number: int) -> Row:
    """The full check, probes and all, of a right gradient."""
    began = time.perf_counter()
    call = configuration(number)
    row: Row = {"number": number, "kind": call.kind, "name": call.name,
                "precision": call.precision, "description": call.description}  # fmt: skip
    try:
        report = check_gradients(
            call.target, *call.args, seed=call.seed, second_order=call.second_order, **call.kwargs
        )
    except Exception as error:  # counts as an alarm too: the target can be run
        reason = f"check_gradients raised {type(error).__name__}: {error}"
        report = Report(call.name, "fail", reason)
    row |= {
        "verdict": report.verdict,
        "reason": reason_of(report),
        "probes": collections.Counter(probe.outcome for probe in report.probes),
        "seconds": time.perf_counter() - began,
    }
    return row | ({"report": str(report)} if report.verdict == "fail" else {})


def reason_of(report: Report) -> str:
    """Why a check was inconclusive, in a few words that several can have in common."""
    if report.verdict != "inconclusive":
        return report.reason
    text = re.sub(r"^grad_\S+: ", "", report.reason)
    return re.sub(r" in output.*| of its largest.*", "", text.split(":")[0])
