"""Every rule against autograd, finite differences and arithmetic, and every check against a rule
that has been spoilt."""

import ast
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import comparison as check
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, labels, positive, x
from comparison import about
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from nn_backprop import rules
from nn_backprop.rules import Rule, activation, linear
from nn_backprop.rules.winners import k_winners

# torch and therefore the rule say that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

BY_ID = {case.id: case for case in CASES}
RULES = {rule.name: rule for rule in rules.TABLE.values()}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Each property is one test a rule, over all its cases: see `cases_of`.
every_rule = pytest.mark.parametrize("name", RULES)


def cases_of(name: str, aliases: bool = False) -> list[Case]:
    """Of one rule. An alias differs in its adapter alone, which three of the properties see."""
    return [case for case in CASES if case.rule.name == name and (aliases or not case.alias)]


# --- the table of cases ---


def test_every_callable_of_the_table_has_a_case():
    assert set(rules.TABLE) == {case.function for case in CASES}
    assert len(BY_ID) == len(CASES)


def test_every_gradient_that_a_rule_derives_has_a_case():
    for name, rule in RULES.items():
        derived = set(re.findall(r"^ *grad_(\w+)", section(rule, "Backward"), re.MULTILINE))
        assert derived == {n for case in cases_of(name) for n in case.names}, name


# --- the properties, and that each of them can fail ---


def holds(prop: Callable, case: Case, operands: list[str]) -> None:
    """Of the rule; and not of one that is wrong by a thousandth in one gradient."""
    with about(case.id):
        prop(case)
        for operand in operands:
            with about(f"{operand} spoilt"), pytest.raises(AssertionError, match="not close"):
                prop(case, check.spoilt(case.rule, operand))


@every_rule
def test_matches_autograd(name):
    for case, device in itertools.product(cases_of(name, aliases=True), DEVICES):
        with about(device):
            holds(lambda *of, on=device: check.matches_autograd(*of, device=on), case,
                  [] if case.alias else case.names)  # fmt: skip


@every_rule
def test_matches_finite_differences(name):
    for case in cases_of(name):
        if not case.staircase:
            holds(check.matches_differences, case, case.names)


@every_rule
def test_is_the_adjoint_of_a_linear_map(name):
    for case in cases_of(name):
        if not case.staircase:
            holds(check.is_the_adjoint, case, check.linear_in(case))


@every_rule
def test_float32(name):
    for case in cases_of(name):
        holds(check.matches_float32, case, case.names)


@every_rule
def test_bfloat16(name):
    """With 8 bits and many terms no check is sharp; some case of each rule has few terms, and
    notices a quarter."""
    missed = set()
    for case in cases_of(name):
        with about(case.id):
            check.matches_bfloat16(case)
        missed |= set(case.names)
    for case in cases_of(name):
        for operand in missed & set(case.names):
            try:
                check.matches_bfloat16(case, check.spoilt(case.rule, operand, lambda g: 1.25 * g))
            except AssertionError:
                missed.remove(operand)
    assert not missed


def test_a_loss_or_norm_in_bfloat16_calculates_in_float32():
    """So that nothing but the result is rounded to 8 bits."""
    bits = torch.bfloat16
    for name in ("cross_entropy", "nll_loss", "mse_loss", "batch_norm", "layer_norm"):
        for case in cases_of(name):
            played = check.play(case, dtype=bits, rounded=bits)
            _, grads = check.by_autograd(case, played.grad_z.double(), rounded=bits)
            for operand, grad in grads.items():
                atol = 1e-5 * grad.abs().max().item()
                with about(case.id, operand):
                    assert_close(played.grads[operand].double(), grad, rtol=2.0**-8, atol=atol)


@every_rule
def test_memory_layout(name):
    """Of the upstream gradient, and of the inputs; but dropout's mask follows the memory."""
    for case in cases_of(name):
        _, expected = check.by_autograd(case)
        for layout, arrange in check.LAYOUTS.items():
            with about(case.id, layout):
                played = check.play(case, upstream_layout=arrange)
                _, grads = check.by_autograd(case, played.grad_z)
                # Where all of the upstream gradient is one number, softmax and the norms leave 0
                # and rounding.
                check.all_close(played.grads, grads, least=played.grad_z.abs().max().item())
                if layout != "expanded" and name != "dropout":
                    check.all_close(check.play(case, input_layout=arrange).grads, expected)


def test_dropout_of_a_transposed_input_drops_what_torch_drops():
    image = torch.ones(7, 11).T
    torch.manual_seed(0)
    z, _ = RULES["dropout"].forward(image, 0.3)
    torch.manual_seed(0)
    assert torch.equal(z, F.dropout(image, 0.3))


@every_rule
def test_the_result_shares_memory_with_an_input_where_torch_does(name):
    """What is a view, and what is a copy, decides what an in-place operation changes later."""
    for case in cases_of(name, aliases=True):
        shared = []
        for by_rule in (True, False):
            args, kwargs = case.draw()
            with torch.no_grad():
                arguments, in_place = case.rule.arguments(args, kwargs)
                if in_place:
                    break
                z = case.rule.forward(*arguments)[0] if by_rule else case.function(*args, **kwargs)
            memory = z.untyped_storage().data_ptr()
            shared.append([memory == t.untyped_storage().data_ptr() for t in tensors(arguments)])
        assert in_place or shared[0] == shared[1], case.id


@every_rule
def test_needs(name):
    """What is not wanted is None, and what is does not depend on what else is."""
    for case in cases_of(name, aliases=True):
        rule, played = case.rule, check.play(case)
        for wanted in itertools.product([False, True], repeat=len(case.names)):
            chosen = set(itertools.compress(case.names, wanted))
            needs = tuple(operand in chosen for operand in rule.tensors)
            with about(case.id, chosen), torch.no_grad():
                grads = check.by_name(rule, rule.backward(played.grad_z, played.saved, needs))
                check.all_close(grads, {operand: played.grads[operand] for operand in chosen})


@every_rule
def test_changes_nothing_that_it_was_handed(name):
    for case in cases_of(name):
        rule, (args, kwargs) = case.rule, case.draw()
        arguments, _ = rule.arguments(args, kwargs)
        training = name == "batch_norm" and True in arguments[5:6]
        buffers = [id(arguments[i]) for i in (1, 2)] if training else []
        inputs = [t for t in tensors((args, kwargs)) if id(t) not in buffers]
        needs = tuple(operand in case.names for operand in rule.tensors)
        with about(case.id), torch.no_grad():
            before = [t.clone() for t in inputs]
            torch.manual_seed(case.seed)
            z, saved = rule.forward(*arguments)
            assert all(map(torch.equal, inputs, before))
            handed = [*inputs, *tensors(saved), check.upstream(case, z)]
            before = [t.clone() for t in handed]
            first = check.by_name(rule, rule.backward(handed[-1], saved, needs))
            assert all(map(torch.equal, handed, before))
            kept = [grad.clone() for grad in first.values()]
            again = check.by_name(rule, rule.backward(handed[-1], saved, needs))
            assert all(map(torch.equal, again.values(), kept))


def tensors(nested) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    nested = nested.values() if isinstance(nested, dict) else nested
    return [t for n in nested for t in tensors(n)] if isinstance(nested, (tuple, list)) else []


def test_the_spoilt_rule_is_otherwise_the_rule():
    """`spoilt` by a factor of 1 passes: what is refused is the mistake and nothing else."""
    for case in CASES:
        for operand in [] if case.alias else case.names:
            check.matches_autograd(case, check.spoilt(case.rule, operand, lambda g: g * 1.0))


# --- kinks and ties ---

KINKS = [
    (torch.relu, [-1.0, -0.0, 0.0, 2.0], (), [0, 0, 0, 1]),
    (F.leaky_relu, [-1.0, -0.0, 0.0, 2.0], (0.25,), [0.25, 0.25, 0.25, 1]),
    (F.max_pool2d, [[[3.0, 3.0], [3.0, 3.0]]], (2,), [[[1, 0], [0, 0]]]),
    (F.max_pool2d, [[[0.0, -0.0, 0.0]]], ((1, 2), 1), [[[1, 1, 0]]]),
    (F.max_pool2d, [[[1.0, 3.0, 3.0, 3.0]]], ((1, 3), 1), [[[0, 2, 0, 0]]]),
    (F.max_pool2d, [[[2.0, math.nan, math.nan]]], ((1, 3),), [[[0, 0, 1]]]),
    (F.max_pool2d, [[[-math.inf, -math.inf]]], ((1, 2),), [[[1, 0]]]),
    (k_winners, [[1.0, 3.0, 3.0, 3.0]], (2,), [[0, 1, 1, 0]]),
    (k_winners, [[0.0, -0.0, 0.0]], (2,), [[1, 1, 0]]),
    (k_winners, [[math.inf, -math.inf, -math.inf]], (2,), [[1, 1, 0]]),
    (k_winners, [[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]], (1,), [[1, 1, 1], [0, 0, 1]]),
    (torch.pow, [0.0, 2.0], (0,), [0, 0]),
    (torch.pow, [0.0, 2.0], (1,), [1, 1]),
    (torch.pow, [0.0, 4.0], (0.5,), [math.inf, 0.25]),
]


def test_kinks_and_ties():
    for function, values, args, slope in KINKS:
        rule, z = rules.TABLE[function], torch.tensor(values, requires_grad=True)
        a = function(z, *args)
        (expected,) = torch.autograd.grad(a, z, torch.ones_like(a))
        _, saved = rule.forward(*rule.arguments((z.detach(), *args), {})[0])
        grad = rule.backward(torch.ones_like(a), saved, (True,))[0]
        assert torch.equal(grad, torch.tensor(slope, dtype=torch.float32)), (rule.name, values)
        assert torch.equal(grad, expected), (rule.name, values)


# --- what single rules promise ---


def test_the_shared_gradient_is_the_sum_of_the_unshared_ones():
    played, rule = check.play(BY_ID["functional.conv2d"]), RULES["locally_connected2d"]
    image, weight = played.operands["x"], played.operands["weight"]
    unshared = weight.expand(*played.z.shape[-2:], *weight.shape)
    _, saved = rule.forward(image, unshared, None, 1, 0)
    _, grad, _ = rule.backward(played.grad_z, saved, (False, True, False))
    check.close(played.grads["weight"], grad.sum((0, 1)))


def test_batch_norm_moves_its_buffers_as_torch_does():
    for training in (True, False):
        case = Case(F.batch_norm, (x(2, 3, 5), x(3), positive(3), None, None, training, 0.3))
        (args, _), (torchs, _), (before, _) = case.draw(), case.draw(), case.draw()
        with torch.no_grad():
            case.rule.forward(*args)
            F.batch_norm(*torchs)
        for i in (1, 2):
            check.close(args[i], torchs[i])
            assert torch.equal(args[i], before[i]) != training


@pytest.mark.filterwarnings("ignore:Using a target size")  # one of the subjects
def test_shapes_that_differ_no_images_and_dropout_of_everything():
    for function, *args in [
        (F.mse_loss, x(3, 5), x(5)), (F.interpolate, x(0, 3, 5, 7), None, 2),
        (F.dropout, x(3, 5), 1.0),
    ]:  # fmt: skip
        with about(function):
            check.matches_autograd(Case(function, tuple(args)))


def test_interpolate_sends_back_along_the_way_that_it_read():
    """At these factors torch reads other pixels for float64 than for float32 or another layout, and
    its own backward (of 2.14, at least) sends some gradients in float64 to a pixel beside."""
    rule = RULES["upsample_nearest"]
    for dtype, layout, mode, (rows, factor) in itertools.product(
        [torch.float64, torch.float32, torch.bfloat16],
        [torch.contiguous_format, torch.channels_last],
        ["nearest", "nearest-exact"],
        [(17, 7.4), (18, 6.9)],
    ):
        image = torch.arange(rows).to(dtype).view(1, 1, rows, 1).expand(2, 3, rows, 5)
        image = image.contiguous(memory_format=layout)
        z, saved = rule.forward(image, None, (factor, 1.0), mode)
        (grad,) = rule.backward(torch.ones_like(z), saved, (True,))
        copies = torch.bincount(z[0, 0, :, 0].long(), minlength=rows).to(dtype).view(rows, 1)
        with about(dtype, layout, mode, factor):
            assert torch.equal(z, F.interpolate(image, None, (factor, 1.0), mode))
            assert torch.equal(grad, copies.expand_as(grad))


REFUSED = [
    (F.interpolate, (x(1, 3, 5, 7), 11), {"mode": "bilinear"}, "bilinear"),
    (F.interpolate, (x(3, 5, 7), 11), {}, "3 axes"),
    (F.interpolate, (x(1, 3, 5, 7), 11), {"antialias": True}, "antialias"),
    (F.max_pool2d, (x(1, 2, 2), 2), {"return_indices": True}, "return_indices"),
    (F.softmax, (x(3, 5),), {}, "dim"),
    (F.cross_entropy, (x(3, 5), x(3, 5)), {"size_average": True}, "size_average"),
    (F.nll_loss, (x(3, 5), labels(3, classes=5)), {"reduce": False}, "reduce"),
    (F.mse_loss, (x(3), x(3)), {"reduce": True}, "reduce"),
    (torch.div, (x(3), x(3)), {"rounding_mode": "floor"}, "rounding_mode"),
    (torch.pow, (positive(3), x(3)), {}, "exponent"),
    (Tensor.view, (x(3), torch.int64), {}, "dtype"),
    (Tensor.view, (x(3),), {"dtype": torch.int64}, "dtype"),
    (Tensor.to, (x(3), "meta"), {}, "device"),
]


def test_a_use_that_is_not_covered_is_refused():
    for function, args, kwargs, why in REFUSED:
        case = Case(function, args, kwargs)
        with about(case.id, why), pytest.raises(NotImplementedError, match=why):
            case.rule.arguments(*case.draw())


# --- how they are written ---

SECTIONS = ["Forward", "Derivation", "Backward", "Saved", "Shapes", "Source"]


def section(rule: Rule, name: str) -> str:
    """The text of a section of the derivation, without its heading."""
    parts = re.split(r"^(\w+):$", rule.derivation, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[name].strip("\n")


def test_derivations_are_complete():
    for name, rule in RULES.items():
        parts = re.split(r"^(\w+):$", rule.derivation, flags=re.MULTILINE)
        assert parts[0].strip() and parts[1::2] == SECTIONS, name
        assert all(section(rule, heading).strip() for heading in SECTIONS), name
        lines = [*section(rule, "Forward").splitlines(), *section(rule, "Backward").splitlines()]
        assert all(line.strip() in rule.equations for line in lines), name


def names_in(source: str) -> set[str]:
    """Of what is imported, and of attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
            names |= set((getattr(node, "module", None) or "").split("."))
    return names


def forbidden(source: str) -> set[str]:
    """Names by which another would do the work: autograd, its functions, torch's own kernels."""
    return {
        name
        for name in names_in(source)
        if re.search(r"autograd|_backward$|^grad$|^[vj][jv]p$|^aten$|^func$|requires_grad", name)
    }


def test_rules_are_arithmetic_alone():
    paths = list(Path(rules.__file__).parent.glob("*.py"))
    assert len(paths) > 10
    assert not {path.name: found for path in paths if (found := forbidden(path.read_text()))}
    for source in [
        "torch.nn.grad.conv2d_weight(x)",
        "torch.ops.aten.convolution_backward(x)",
        "torch.autograd.grad(z, x)",
        "from torch.func import vjp",
    ]:
        assert forbidden(source), source


def test_shapes_are_checked_under_pytest():
    with pytest.raises(TypeCheckError):
        linear.linear_forward(torch.zeros(3, 5), torch.zeros(7, 2))
    with pytest.raises(TypeCheckError):
        activation.softmax_forward(torch.zeros(3, dtype=torch.int64), 0)
