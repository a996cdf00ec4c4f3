"""The checker itself is spoilt, one part after the other, and a small battery has to notice."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from suspects import Doubled, Square, cancels, double, elementwise, function
from test_check_probes import RIGHT, WRONG, X, square
from torch import Tensor, nn

from nn_backprop.check import Report, check_gradients, checker, elsewhere, judge, probes, verdict
from nn_backprop.check.oracle import differences, directions, oracle, rounding
from nn_backprop.check.report import Probe
from nn_backprop.check.target import target as targets
from nn_backprop.check.target.target import Target

pytestmark = pytest.mark.slow

# --- the battery ---


class Trial(NamedTuple):
    """A check, the verdict that it has to end with, and the oracle that it has to rest on."""

    verdict: str
    oracle: str
    target: object
    inputs: tuple
    options: Mapping[str, Any] = MappingProxyType({})


def hiding(slope: float):
    """x³, of which autograd sees 2x²."""
    return function(
        lambda x: x.square() * x.detach(),
        lambda ctx, grad_z: slope * ctx.saved_tensors[0].square() * grad_z,
    )


def relu(at_zero: float):
    return elementwise(torch.relu, lambda x: torch.where(x == 0, at_zero, (x > 0).to(x)))


def hooked(factor: float):
    def target(x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda grad: grad * factor)
        return x.sin()

    return target


def pair(factor: float):
    return np.sin, lambda grad, x: factor * grad * np.cos(x)


def slightly(probe_only: Callable[[Tensor], bool]):
    """Wrong by a millionth where the upstream gradient is of some form."""
    return square(lambda grad_z, x: 2 * x * grad_z * (1 + 1e-6 * probe_only(grad_z)))


class Deep(nn.Module):
    """Its gradients are right; its Function has a mistake that shows in other uses."""

    def __init__(self):
        super().__init__()
        self.linear, self.function = nn.Linear(5, 7), WRONG["expanded upstream"][1]

    def forward(self, x):
        return 3 * self.function.apply(self.linear(x))


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Tanh()).double()


TIED = torch.tensor([[0.0, 0, 1, -1, 2]], dtype=torch.float64)
PLAIN, FORWARD, DIFFERENCES = "plain forward", "forward mode", "differences"
FORMULA = {
    "a right Function": Trial("pass", PLAIN, Square, (X,)),
    "wrong by a thousandth": Trial(
        "fail", PLAIN, elementwise(torch.square, lambda x: 2.002 * x), (X,)),
    "an all-zero gradient": Trial("fail", PLAIN, elementwise(torch.square, torch.zeros_like), (X,)),
    "right in bfloat16": Trial("pass", PLAIN, Square, (X.bfloat16(),)),
    "wrong in bfloat16": Trial("fail", PLAIN, Doubled, (X.bfloat16(),)),
    "right in plain torch": Trial("pass", FORWARD, hooked(1.0), (X,)),
    "wrong in plain torch": Trial("fail", FORWARD, hooked(1.001), (X,)),
    "right, many elements": Trial("pass", "forward-mode products", torch.sin, (double(4000),)),
    "right in NumPy": Trial("pass", DIFFERENCES, pair(1.0), (X.numpy(),)),
    "wrong in NumPy": Trial("fail", DIFFERENCES, pair(1.0001), (X.numpy(),)),
    "right, by a reference": Trial(
        "pass", "reference", torch.sin, (X,), {"reference": lambda x: x.sin() * 1}),
    "wrong, by a reference": Trial("fail", "reference", hooked(1.001), (X,),
                                   {"reference": torch.sin}),
    "right, and autograd misled": Trial("pass", DIFFERENCES, hiding(3.0), (X,)),
    "wrong, as autograd is misled": Trial("fail", DIFFERENCES, hiding(2.0), (X,)),
    "at a kink, a half": Trial("pass", PLAIN, relu(0.5), (TIED,)),
    "at a kink, beyond the slopes": Trial("fail", PLAIN, relu(1.5), (TIED,)),
    "lost in rounding": Trial("inconclusive", FORWARD, cancels, (double(11).float() + 3e5,)),
    "with a random mask": Trial("pass", FORWARD, block(), (double(3, 5),)),
}  # fmt: skip
PROTOCOL = {
    **{f"right: {name}": Trial("pass", PLAIN, *trial) for name, trial in RIGHT.items()},
    **{f"wrong: {name}": Trial("fail", PLAIN, *trial[1:]) for name, trial in WRONG.items()},
    "by a millionth, strided": Trial(
        "fail", PLAIN, slightly(lambda u: not u.is_contiguous() and 0 not in u.stride()), (X,)),
    "in float32 only": Trial("fail", PLAIN, elementwise(
        torch.square, lambda x: x * (2.2 if x.dtype == torch.float32 else 2)), (X,)),
    "for large inputs only": Trial("fail", PLAIN, elementwise(
        torch.square, lambda x: x * torch.where(x.abs() > 20, 2.2, 2.0)), (X,)),
    "in evaluation only": Trial("fail", FORWARD, type("Evaluated", (nn.Module,), {
        "forward": lambda self, x: hooked(1.0 if self.training else 2.0)(x)})(), (X,)),
    "the second derivative": Trial("fail", PLAIN, elementwise(
        torch.square, lambda x: 2 * x.detach()), (X,), {"second_order": True}),
    "a different answer each time": Trial(
        "fail", PLAIN, square(lambda g, x: 2 * x * g * np.random.default_rng().random()), (X,)),
    "inside a network": Trial("fail", PLAIN, Deep().double(), (X,)),
}  # fmt: skip


def surprises(battery: dict[str, Trial]) -> Iterator[str]:
    for name, (wanted, source, target, inputs, options) in battery.items():
        try:
            report: Report = check_gradients(target, *inputs, **options)
        except Exception as error:
            yield f"{name}: raised {error!r}"
            continue
        sources = {entry.oracle for entry in report.tensors}
        if report.verdict != wanted:
            yield f"{name}: {report.verdict}, {report.reason}"
        elif sources != {source}:
            yield f"{name}: by {sources}"


def symptoms(battery: dict[str, Trial], most: int | None = None) -> list[str]:
    """What the battery finds wrong with the checker; at most so many things."""
    return list(islice(surprises(battery), most))


def test_the_checker_has_no_symptoms():
    assert symptoms(FORMULA | PROTOCOL) == []


# --- the spoilings ---


def spoilt_dict(by: Callable) -> Callable:
    """A method that returns named tensors or numbers, which are spoilt."""
    return lambda method: (
        lambda *args, **kwargs: {
            name: None if value is None else by(value)
            for name, value in method(*args, **kwargs).items()
        }
    )


def spoilt_noise(by: Callable) -> Callable:
    return lambda method: (
        lambda *args: replace(
            found := method(*args),
            by_name={name: by(value) for name, value in found.by_name.items()},
        )
    )


def spoilt_pair(by: Callable) -> Callable:
    return lambda method: lambda *args: tuple(map(by, method(*args)))


def spoilt_number(by: Callable) -> Callable:
    return lambda method: lambda *args: by(method(*args))


def answering(value) -> Callable:
    return lambda method: lambda *args, **kwargs: value


def accepting(method):
    def accepted(*args):
        entry = method(*args)
        entry.verdict = "pass"
        return entry

    return accepted


def larger(value):
    return 1.01 * value


def nothing(value):
    return 0 * value


def either(*spoilings):
    return lambda monkeypatch: [spoil(monkeypatch) for spoil in spoilings]


def on(owner, name: str, by: Callable) -> Callable:
    """Replaces an attribute by what `by` makes of it."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, by(getattr(owner, name)))


believing = on(differences.Differences, "contradict", answering(False))
SPOILT = {
    "plain gradients × 1.01": on(Target, "plain_gradients", spoilt_dict(larger)),
    "plain gradients zero": on(Target, "plain_gradients", spoilt_dict(nothing)),
    "forward mode × 1.01": on(directions, "product", spoilt_number(larger)),
    "forward mode zero": on(directions, "product", spoilt_number(nothing)),
    "differences × 1.01": on(differences, "extrapolated", spoilt_pair(larger)),
    "differences zero": on(differences, "extrapolated", spoilt_pair(nothing)),
    "differences sure of themselves": on(
        differences, "extrapolated", lambda method: lambda *args: (larger(method(*args)[0]), 0.0)),
    "differences sure of nothing": on(
        differences, "extrapolated", lambda method: lambda *args: (method(*args)[0], 1e9)),
    "every oracle believed": believing,
    "no oracle believed": on(differences.Differences, "contradict", answering(True)),
    "plain gradients × 1.01, believed": either(
        believing, on(Target, "plain_gradients", spoilt_dict(larger))),
    "forward mode zero, believed": either(
        believing, on(directions, "product", spoilt_number(nothing))),
    "everything accepted": on(verdict, "judge", accepting),
    "a tolerance of 10¹² times as much": on(judge, "SAFETY", lambda safety: 1e12 * safety),
    "a tolerance of 0": on(judge, "SAFETY", nothing),
    "endless noise": on(oracle, "noise_of", spoilt_noise(lambda value: float("inf"))),
    "no noise": on(oracle, "noise_of", spoilt_noise(nothing)),
    "rounding that does nothing": on(
        rounding.Rounding, "moved", lambda method: lambda self, value: value),
    "every value a kink": on(judge.kinks, "accepted", answering("a kink")),
    "no value a kink": on(judge.kinks, "accepted", answering("")),
    "no seed": on(targets, "seed_generators", answering(None)),
}  # fmt: skip
SPOILT_PROTOCOL = {
    "probes with 10¹² times the tolerance": on(checker, "SAFETY", lambda safety: 1e12 * safety),
    "probes without a tolerance": on(probes.Probing, "difference", lambda method: (
        lambda self, actual, expected, slack=1.0: method(
            self, {n: g if g is None else g + 1e-9 for n, g in actual.items()}, expected, slack))),
    "probes that see no difference": on(probes.Probing, "difference", answering("")),
    "no other precision": on(Target, "cast", lambda method: lambda self, dtype: self),
    "no float32": on(elsewhere, "in_float32", answering([])),
    "no ranges": on(elsewhere, "in_ranges", answering([])),
    "no second derivative": on(
        checker, "second_derivative", answering((Probe("second derivative", "pass"), None))),
    "no look at the Functions inside": on(checker, "check_functions", answering(False)),
    "no other mode": on(Target, "fresh", lambda method: lambda self, mode=None: method(self)),
}  # fmt: skip


@pytest.mark.parametrize("spoiling", SPOILT)
def test_a_spoilt_comparison_is_noticed(spoiling, monkeypatch):
    SPOILT[spoiling](monkeypatch)
    assert symptoms(FORMULA, most=1)


@pytest.mark.parametrize("spoiling", SPOILT_PROTOCOL)
def test_a_spoilt_protocol_is_noticed(spoiling, monkeypatch):
    SPOILT_PROTOCOL[spoiling](monkeypatch)
    assert symptoms(PROTOCOL, most=1)


@pytest.mark.parametrize("probe", probes.PROBES)
def test_a_probe_that_finds_nothing_is_noticed(probe, monkeypatch):
    monkeypatch.setitem(probes.PROBES, probe, lambda probing: None)
    if probe == "the same call twice":  # whatever it finds, another probe finds too
        assert probe not in [p.name for p in check_failures()]
    else:
        assert symptoms({"": PROTOCOL[f"wrong: {probe}"]})


def check_failures() -> list[Probe]:
    trial = PROTOCOL["a different answer each time"]
    return [p for p in check_gradients(trial.target, *trial.inputs).probes if p.outcome == "fail"]


def test_the_probe_of_two_equal_calls_finds_something_unspoilt():
    assert "the same call twice" in [probe.name for probe in check_failures()]
