"""The checker itself is spoilt, one part after the other, and a test of it has to fail."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import test_check_oracle as oracles
import test_check_probes as protocol
import test_check_target as targets_of_all_kinds
import test_check_verdict as verdicts

from nn_backprop.check import checker, elsewhere, judge, probes, verdict
from nn_backprop.check.oracle import differences, directions, oracle, rounding
from nn_backprop.check.report import Probe
from nn_backprop.check.target import target as targets
from nn_backprop.check.target.target import Target

pytestmark = pytest.mark.slow


def spoilt(by: Callable) -> Callable:
    """A method whose numbers, named ones too, are spoilt."""

    def each(found):
        if isinstance(found, dict):
            return {name: None if value is None else by(value) for name, value in found.items()}
        if isinstance(found, rounding.Noise):
            return replace(found, by_name=each(found.by_name))
        return tuple(map(by, found)) if isinstance(found, tuple) else by(found)

    return lambda method: lambda *args, **kwargs: each(method(*args, **kwargs))


def answering(value) -> Callable:
    return lambda method: lambda *args, **kwargs: value


def accepting(method):
    return lambda *args: replace(method(*args), verdict="pass")


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
named_and_right = oracles.test_each_oracle_is_named_and_right
all_zero = verdicts.test_an_all_zero_gradient_of_a_small_function_is_found
SPOILT = {  # and the test that has to fail
    "plain gradients × 1.01": (on(Target, "plain_gradients", spoilt(larger)), named_and_right),
    "plain gradients zero": (on(Target, "plain_gradients", spoilt(nothing)), named_and_right),
    "forward mode × 1.01": (on(directions, "product", spoilt(larger)), named_and_right),
    "forward mode zero": (on(directions, "product", spoilt(nothing)), named_and_right),
    "differences × 1.01": (on(differences, "extrapolated", spoilt(larger)), named_and_right),
    "differences zero": (on(differences, "extrapolated", spoilt(nothing)), named_and_right),
    "differences sure of themselves": (on(
        differences, "extrapolated", lambda method: lambda *args: (larger(method(*args)[0]), 0.0)),
        named_and_right),
    "differences sure of nothing": (on(
        differences, "extrapolated", lambda method: lambda *args: (method(*args)[0], 1e9)),
        named_and_right),
    "every oracle believed": (
        believing, oracles.test_a_forward_that_hides_a_dependence_is_not_believed),
    "no oracle believed": (
        on(differences.Differences, "contradict", answering(True)), named_and_right),
    "plain gradients × 1.01, believed": (either(
        believing, on(Target, "plain_gradients", spoilt(larger))), named_and_right),
    "forward mode zero, believed": (either(
        believing, on(directions, "product", spoilt(nothing))), named_and_right),
    "everything accepted": (on(verdict, "judge", accepting), all_zero),
    "a tolerance of 10¹² times as much": (
        on(judge, "SAFETY", lambda safety: 1e12 * safety),
        oracles.test_a_well_conditioned_layer_has_a_tight_bound),
    "a tolerance of 0": (on(judge, "SAFETY", nothing), named_and_right),
    "endless noise": (
        on(oracle, "noise_of", spoilt(lambda value: float("inf"))), named_and_right),
    "no noise": (on(oracle, "noise_of", spoilt(nothing)), named_and_right),
    "rounding that does nothing": (
        on(rounding.Rounding, "moved", lambda method: lambda self, value: value),
        oracles.test_the_bound_grows_with_cancellation),
    "every value a kink": (on(judge.kinks, "accepted", answering("a kink")), all_zero),
    "no value a kink": (
        on(judge.kinks, "accepted", answering("")), verdicts.test_ties_share_one_gradient),
    "no seed": (
        on(targets, "seed_generators", answering(None)),
        targets_of_all_kinds.test_nothing_of_the_callers_is_touched),
    "probes with 10¹² times the tolerance": (
        on(checker, "SAFETY", lambda safety: 1e12 * safety),
        protocol.test_other_mistakes_are_found_by_a_probe_and_named),
    "probes without a tolerance": (
        on(probes.Probing, "difference", lambda method: (
            lambda self, actual, expected, slack=1.0: method(
                self, {n: g if g is None else g + 1e-9 for n, g in actual.items()}, expected,
                slack))),
        protocol.test_a_right_function_passes_every_probe_that_applies),
    "probes that see no difference": (
        on(probes.Probing, "difference", answering("")),
        protocol.test_a_mistake_is_found_by_its_probe_alone),
    "no other precision": (
        on(Target, "cast", lambda method: lambda self, dtype: self),
        protocol.test_other_precisions_and_ranges_are_checked_too),
    "no float32": (
        on(elsewhere, "in_float32", answering([])),
        protocol.test_other_precisions_and_ranges_are_checked_too),
    "no ranges": (
        on(elsewhere, "in_ranges", answering([])),
        protocol.test_other_precisions_and_ranges_are_checked_too),
    "no second derivative": (
        on(checker, "second_derivative", answering((Probe("second derivative", "pass"), None))),
        protocol.test_a_second_derivative_is_checked_if_asked_for),
    "no look at the Functions inside": (
        on(checker, "check_functions", answering(False)),
        verdicts.test_a_mistake_of_protocol_deep_in_a_network_is_named),
    "no other mode": (
        on(Target, "fresh", lambda method: lambda self, mode=None: method(self)),
        protocol.test_the_other_mode_is_checked_too),
}  # fmt: skip


@pytest.mark.parametrize("spoiling", SPOILT)
def test_what_is_spoilt_is_noticed(spoiling, monkeypatch):
    spoil, noticing = SPOILT[spoiling]
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        noticing()
