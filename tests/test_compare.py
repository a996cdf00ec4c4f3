"""Two sets of gradients from anywhere, one against the other."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from suspects import double

from nn_backprop import compare_gradients
from nn_backprop.check.arrays import load

DRAWS = np.random.default_rng(0)
RIGHT = DRAWS.normal(size=(5, 3))
X, WEIGHT, UPSTREAM = (DRAWS.normal(size=size) for size in ((7, 3), (5, 3), (7, 5)))
LINEAR = {"x": UPSTREAM @ WEIGHT, "weight": UPSTREAM.T @ X, "bias": UPSTREAM.sum(0)}
ONE = {"g": 1.0}


def verdict(actual, expected=RIGHT) -> str:
    """Of a single gradient."""
    return compare_gradients({"g": actual}, {"g": expected}).verdict


def first(report) -> tuple[str, str]:
    """The verdict and the kind of the first cause."""
    return report.verdict, report.causes[0].kind


def test_a_wrong_one_fails_and_its_cause_is_named():
    for actual, kind in [
        (2 * RIGHT, "scale"), (-RIGHT, "sign"), (RIGHT.T, "transposed"), (RIGHT[::-1], "flipped"),
        (0 * RIGHT, "detached"),
    ]:  # fmt: skip
        report = compare_gradients({"weight": actual}, {"weight": RIGHT})
        assert report.verdict == "fail"
        assert kind in [cause.kind for cause in report.causes[:3]], report


# ---- what an array may be -------------------------------------------------------------------


def test_any_array_will_do():
    for i, form in enumerate([
        torch.tensor,
        lambda a: torch.tensor(a, requires_grad=True),
        lambda a: torch.nn.Parameter(torch.tensor(a)),
        np.ndarray.tolist,
        lambda a: tuple(map(tuple, a)),
        lambda a: a.astype(">f8"),
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(np.longdouble),
        lambda a: np.frombuffer(a.tobytes()).reshape(a.shape),  # read-only
    ]):  # fmt: skip
        assert verdict(form(RIGHT)) == verdict(RIGHT, form(RIGHT)) == "pass", i
        assert verdict(form(RIGHT * 1.001)) == verdict(RIGHT * 1.001, form(RIGHT)) == "fail", i
    assert verdict(0.5, np.float64(0.5)) == verdict([1, -2, 3], [1.0, -2.0, 3.0]) == "pass"
    assert verdict([1, -2, 3], np.array([1, -2, 4], dtype=np.int16)) == "fail"


def test_what_is_no_array():
    for bad, says in [
        ([[1.0], [1.0, 2.0]], "'g' is not an array: its rows differ in length"),
        ("text", "is of type <U4; it has to be an array of real numbers"),
        ({"inner": [1.0]}, "is a dict; it has to be"),
        (np.array([1j]), "is of type complex128; it has to be"),
        (torch.tensor([1j]), "torch.complex64"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo; it has to be dense and real"),
    ]:
        for mine, theirs in ({"g": bad}, {}), ({}, {"g": bad}):
            with pytest.raises(ValueError, match="'g' is ") as error:
                compare_gradients(mine, theirs)
            assert says in str(error.value)
        with pytest.raises(ValueError, match="the context's 'input/g' is "):
            compare_gradients(ONE, ONE, {"inputs": {"g": bad}})
    for arguments, says in [
        (([1.0], {}), "actual is a list; it has to be a mapping"),
        (({}, {}), "neither side holds a gradient"),
        ((ONE, ONE, [1.0]), "the context is a list"),
        ((ONE, ONE, {"x": 1.0}), "the context has 'x'; it may have inputs, "),
    ]:
        with pytest.raises(ValueError, match=says):
            compare_gradients(*arguments)


# ---- precision ------------------------------------------------------------------------------


def test_the_coarser_precision_counts():
    """Whichever side has it, and when it was widened since."""
    right = torch.from_numpy(LINEAR["weight"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rounded in (right.to(dtype), right.to(dtype).double()):
            for pair in itertools.product((rounded, right), repeat=2):
                report = compare_gradients({"g": pair[0]}, {"g": pair[1]})
                assert report.ok, report
                if rounded is pair[0] or rounded is pair[1]:
                    widened = rounded.dtype != dtype
                    assert ("values are " in report.tensors[0].note) == widened
            # What this precision can see, it sees.
            (entry,) = compare_gradients({"g": rounded}, {"g": rounded}).tensors
            visible = 1.5 * entry.smallest_visible / right.abs().max()
            assert visible < 0.25
            assert verdict((right * (1 + visible)).to(dtype), right) == "fail"
            assert verdict(right * (1 + 1e-9), right) == "fail"


def test_whole_numbers_are_not_a_low_precision():
    """As toy data give them; they fit bfloat16, but nothing was rounded. Nor are powers of two."""
    right = np.arange(2.0, 62.0).reshape(5, 12)
    wrong = right.copy()
    wrong[3, 4] += 1
    for unit in (1.0, 0.25, 8.0):
        assert verdict(unit * right, unit * right) == "pass"
        assert verdict(unit * wrong, unit * right) == "fail"
    powers = 2.0 ** np.arange(-6.0, 6.0)
    assert verdict(1.1 * powers, powers) == "fail"


def test_a_precision_is_told_from_all_arrays_and_a_common_factor_is_none():
    right = {"weight": DRAWS.normal(size=(7, 11)), "bias": DRAWS.normal(size=1)}
    rounded = {name: a.astype(np.float32).astype(np.float64) for name, a in right.items()}
    assert compare_gradients(rounded, right).ok
    w = double(100)
    coarse = {"w": w.bfloat16().double()}
    assert compare_gradients({"w": w}, coarse).ok
    assert first(compare_gradients({"w": 1.1 * w}, coarse)) == ("fail", "scale")


def test_the_smallest_visible_error():
    for dtype in (np.float64, np.float32):
        right = RIGHT.astype(dtype)
        (entry,) = compare_gradients({"g": right}, {"g": right}).tensors
        for factor, expected in ((0.9, "pass"), (1.1, "fail")):
            moved = right.copy()
            moved[2, 1] += factor * entry.smallest_visible
            assert verdict(moved, right) == expected
        bound = 16 * np.finfo(dtype).eps * 100 * np.abs(right).max()
        assert entry.smallest_visible == pytest.approx(bound)


# ---- verdicts -------------------------------------------------------------------------------


def test_a_missing_one_or_one_too_many_fails():
    assert first(compare_gradients({}, {"weight": RIGHT})) == ("fail", "detached")
    report = compare_gradients({"w": LINEAR["weight"], "x": LINEAR["x"]}, LINEAR)
    assert report.reason == "grad_weight, grad_bias are missing; grad_w is given, but not expected"
    assert [cause.kind for cause in report.causes] == ["detached", "unknown"]
    assert "nobody expected there are: w" in report.causes[0].evidence
    assert [entry.verdict for entry in report.tensors] == ["pass", "fail", "fail", "fail"]
    report = compare_gradients(LINEAR, {"x": LINEAR["x"]})
    assert report.verdict == "fail" and "weight" in report.causes[0].detail
    assert compare_gradients(LINEAR, {}).verdict == "fail"


def test_none_is_zero():
    one, zero = {"weight": RIGHT}, np.zeros(3)
    for mine, theirs in [(None, zero), (zero, None), (None, None)]:
        assert compare_gradients({**one, "g": mine}, {**one, "g": theirs}).ok
    assert compare_gradients({**one, "g": None}, one).ok
    assert first(compare_gradients({"weight": None}, one)) == ("fail", "detached")
    assert compare_gradients({"g": None}, {"g": None}).verdict == "inconclusive"


def test_what_is_not_finite():
    for value in (math.nan, math.inf, -math.inf):
        spoilt = RIGHT.copy()
        spoilt[1, 2] = value
        report = compare_gradients({"g": spoilt}, {"g": RIGHT})
        assert report.verdict == "fail" and report.tensors[0].worst_index == (1, 2)
        assert "1 of 15 entries, first at (1, 2)" in report.causes[0].evidence
        assert verdict(RIGHT, spoilt) == verdict(spoilt, spoilt) == "inconclusive"
        json.dumps(report.to_dict(), allow_nan=False)
        # A wrong one beside it is still a failure.
        report = compare_gradients({"a": spoilt, "b": 2 * RIGHT}, {"a": spoilt, "b": RIGHT})
        assert first(report) == ("fail", "scale")


def test_zeros():
    zero, empty = np.zeros((3, 2)), np.zeros((0, 3))
    assert "no power" in compare_gradients({"g": zero}, {"g": zero}).reason
    assert verdict(zero, zero) == verdict(empty, empty) == "inconclusive"
    assert verdict(zero + 1e-30, zero) == "fail"
    report = compare_gradients({**LINEAR, "g": zero}, {**LINEAR, "g": zero})
    assert report.ok and "only a zero" in report.tensors[-1].note
    assert compare_gradients({**LINEAR, "g": zero + 1e-5}, {**LINEAR, "g": zero}).verdict == "fail"
    assert compare_gradients({**LINEAR, "g": empty}, {**LINEAR, "g": empty}).ok


def test_nothing_but_rounding():
    """The bias before a batch norm: its gradient is zero, and comes out as what is left over."""

    def gradients(dtype: torch.dtype) -> dict:
        seeded = torch.Generator().manual_seed(0)
        x, weight, bias, upstream = (
            torch.randn(size, generator=seeded, dtype=torch.float64).to(dtype).requires_grad_()
            for size in ((11, 3), (5, 3), (5,), (11, 5))
        )
        z = F.batch_norm(F.linear(x, weight, bias), None, None, training=True)
        grads = torch.autograd.grad(z, (x, weight, bias), upstream)
        return dict(zip(("x", "weight", "bias"), grads, strict=True))

    right = gradients(torch.float64)
    report = compare_gradients(gradients(torch.float32), right)
    assert report.ok and report.tensors[-1].note.startswith("zero to rounding")
    assert compare_gradients({**right, "bias": right["weight"][:, 0]}, right).verdict == "fail"
    assert compare_gradients({**right, "bias": right["bias"] + 1e-6}, right).verdict == "fail"
    # Where the expected one is in float32 too, as small a gradient could be a real one.
    expected = gradients(torch.float32)
    bias = expected["bias"].flip(0) * 0.5
    assert compare_gradients({**expected, "bias": bias}, expected).verdict == "inconclusive"


def test_another_shape():
    report = compare_gradients({**LINEAR, "bias": UPSTREAM}, LINEAR, {"upstream": UPSTREAM})
    assert first(report) == ("fail", "wrong-reduction")
    assert report.tensors[-1].note == "the given one has shape (7, 5)"
    json.dumps(report.to_dict(), allow_nan=False)
    assert verdict(np.ones((1,)), np.array(1.0)) == "fail"


def test_nothing_is_changed():
    mine, theirs = {"g": RIGHT.copy()}, {"g": torch.from_numpy(LINEAR["weight"])}
    state = torch.get_rng_state()
    report = compare_gradients(mine, theirs).to_dict()
    assert report == compare_gradients(mine, theirs).to_dict()
    assert np.array_equal(mine["g"], RIGHT) and torch.equal(torch.get_rng_state(), state)


# ---- the context ----------------------------------------------------------------------------

CONTEXT = {
    "inputs": {"x": X},
    "parameters": {"weight": WEIGHT, "bias": np.zeros(5)},
    "upstream": UPSTREAM,
    "outputs": X @ WEIGHT.T,
}
FLAT = {"input/x": X, "parameter/weight": WEIGHT, "parameter/bias": np.zeros(5),
        "upstream/0": UPSTREAM, "output/0": X @ WEIGHT.T}  # fmt: skip


def test_the_context_helps():
    """In any of its forms: which input stands where the output belongs cannot be seen from the
    gradient alone."""
    wrong = {**LINEAR, "weight": UPSTREAM.T @ (2 + np.tanh(X))}
    assert compare_gradients(wrong, LINEAR).causes[0].kind == "unknown"
    wrong = {**LINEAR, "x": UPSTREAM @ WEIGHT * X}
    report = compare_gradients(wrong, LINEAR, CONTEXT)
    assert report.causes[0].kind == "missing-factor" and "x" in report.causes[0].detail
    wrong["bias"] = UPSTREAM.mean(0)
    reports = [
        compare_gradients(wrong, expected, context).to_dict()
        for expected, context in [
            (LINEAR, CONTEXT),
            (LINEAR, {**CONTEXT, "upstream": [UPSTREAM], "outputs": {"z": CONTEXT["outputs"]}}),
            (LINEAR, {**CONTEXT, "upstream": UPSTREAM.tolist()}),
            (LINEAR, FLAT),
            (LINEAR, {**FLAT, "grad/x": LINEAR["x"], "option/stride": np.array("text")}),
            ({f"grad/{name}": grad for name, grad in LINEAR.items()} | FLAT, None),
        ]
    ]
    assert all(report == reports[0] for report in reports)
    assert "missing-factor" in {cause["kind"] for cause in reports[0]["causes"]}


def test_numbered_upstreams_are_in_their_order():
    """Of twelve outputs, the one numbered 10 does not count."""
    parts = {f"upstream/{k}": DRAWS.normal(size=(3, 5)) for k in range(12)}
    context = dict(sorted(parts.items()))  # 0, 1, 10, 11, 2, …
    expected = sum(part * (k + 1) for k, part in enumerate(parts.values()))
    report = compare_gradients({"x": expected + 3 * parts["upstream/10"]}, {"x": expected}, context)
    assert report.causes[0].kind == "extra-term" and "upstream 10" in report.causes[0].detail


def test_labels_are_told_by_their_type():
    logits, y = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 3, 2, 4, 4, 1, 0])
    shares = logits.softmax(1)
    right = {"logits": (shares - F.one_hot(y, 5)) / 7}
    for context in (
        {"inputs": {"logits": logits}, "labels": {"y": y}},
        {"inputs": {"logits": logits, "y": y}},
    ):
        context["upstream"] = torch.ones(())
        (cause, *_) = compare_gradients({"logits": shares / 7}, right, context).causes
        assert cause.kind == "missing-term" and "y" in cause.detail, cause


# ---- files ----------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    tensors = {"weight": torch.from_numpy(LINEAR["weight"]).bfloat16(), "bias": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and compare_gradients(found, tensors).ok
    assert compare_gradients({"weight": found["weight"]}, {"weight": LINEAR["weight"]}).ok


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    np.savez(tmp_path / "a.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects under 'x'"):
        load(tmp_path / "a.npz")
