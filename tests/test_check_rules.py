"""Every rule of the table, as a Function, before the checker: right ones pass, spoilt ones fail."""

from dataclasses import replace
from functools import cache

import comparison as check
import pytest
from cases import CASES, Case
from suspects import oracles
from torch import Tensor

from nn_backprop import as_function
from nn_backprop.check import Report, check_gradients
from nn_backprop.rules import Rule

# torch and therefore the rule say that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@cache
def unadapted(rule: Rule) -> Rule:
    """The rule on its forward's own arguments: `.apply` knows neither keywords nor in-place."""
    return replace(rule, adapt=None)


def checked(case: Case, rule: Rule | None = None) -> Report:
    """The report on a case, second derivatives included unless the forward rounds."""
    rule = rule or case.rule
    args, kwargs = case.draw()
    arguments, in_place = rule.arguments(args, kwargs)
    if kwargs or in_place:
        rule, args = unadapted(rule), arguments
    function = as_function(rule)
    options = {"seed": case.seed, "second_order": not case.staircase}
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    constant = [
        a for a in args if isinstance(a, Tensor) and a.is_floating_point() and not a.requires_grad
    ]
    if not constant:
        return check_gradients(function, *args, **options)

    def apply(*tensors: Tensor):
        filled = [a.clone() if isinstance(a, Tensor) else a for a in args]
        for i, tensor in zip(wanted, tensors, strict=True):
            filled[i] = tensor
        return function.apply(*filled)

    return check_gradients(apply, *(args[i] for i in wanted), **options)


# Several names for one rule are one case here.
DISTINCT = list({(c.rule, repr(c.args), repr(c.kwargs), c.note): c for c in CASES}.values())
OF_RULE: dict[str, list[Case]] = {}
for _case in DISTINCT:
    OF_RULE.setdefault(_case.rule.name, []).append(_case)


def passes(case: Case) -> None:
    report = checked(case)
    assert report.ok, (case.id, report)
    assert len(report.tensors) == len(case.names)
    assert oracles(report) == {"plain forward"}
    assert not [probe for probe in report.probes if probe.outcome == "fail"]
    if not case.staircase:
        second = next(p for p in report.probes if p.name == "second derivative")
        # torch's own double backward of a norm with a bias but no weight raises.
        assert second.outcome == "pass" or "the plain forward has none" in second.reason


@pytest.mark.parametrize("name", OF_RULE)
def test_its_cases_pass(name):
    for case in OF_RULE[name]:
        passes(case)


@pytest.mark.parametrize("name", OF_RULE)
def test_a_rule_wrong_by_a_thousandth_fails(name):
    case = next(c for c in CASES if c.rule.name == name and not c.kwargs)
    for place, operand in enumerate(case.names):
        report = checked(case, check.spoilt(case.rule, operand))
        assert report.verdict == "fail"
        wrong = [entry.verdict == "fail" for entry in report.tensors]
        assert wrong == [i == place for i in range(len(case.names))]
        assert report.causes
