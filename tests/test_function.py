"""A rule inside PyTorch's own graph: first and second derivatives, clear errors for the rest."""

from dataclasses import replace

import comparison as check
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, constant, labels, positive, x
from jaxtyping import Float
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nn_backprop import as_function, rules
from nn_backprop.rules import Rule

# torch and therefore the rule say that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def in_place(case: Case) -> bool:
    return case.rule.arguments(*case.draw())[1]


# `.apply` takes positional arguments.
POSITIONAL = [case for case in CASES if not case.alias and not case.kwargs and not in_place(case)]
OF = {name: [case for case in POSITIONAL if case.rule.name == name]
      for name in sorted({rule.name for rule in rules.TABLE.values()})}  # fmt: skip
every_rule = pytest.mark.parametrize("name", OF)
# gradcheck's own tolerances (1e-3) would let a rule pass that is wrong by a thousandth. Its step of
# 1e-6 leaves 1e-16/1e-6 of rounding in numbers of order 1 to 100, so 1e-7 is what it can do.
TOLERANCES = {"eps": 1e-6, "rtol": 1e-6, "atol": 1e-7}


def seeded(case: Case, rule: Rule | None = None):
    """The Function's apply, with the seed that dropout draws its mask from."""
    apply = as_function(rule or case.rule).apply

    def function(*args):
        torch.manual_seed(case.seed)
        return apply(*args)

    return function


def leaves(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def derivatives(function, case: Case) -> list[Tensor]:
    """z, the first derivatives, and of a random combination of these the second ones."""
    args, _ = case.draw()
    torch.manual_seed(case.seed)
    z = function(*args)
    grad_z = check.upstream(case, z).requires_grad_()
    first = torch.autograd.grad(z, leaves(args), grad_z, create_graph=True)
    v = [torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(case.seed + i))
         for i, g in enumerate(first)]  # fmt: skip
    combination = sum((g * v_g).sum() for g, v_g in zip(first, v, strict=True))
    second = torch.autograd.grad(combination, [*leaves(args), grad_z], materialize_grads=True)
    return [tensor.detach() for tensor in (z, *first, *second)]


@every_rule
def test_first_and_second_derivatives_are_torchs(name):
    assert OF[name]
    for case in OF[name]:
        with check.about(case.id):
            actual = derivatives(as_function(case.rule).apply, case)
            check.each_close(actual, derivatives(case.function, case))


@every_rule
def test_gradcheck(name):
    """On the rule's smallest case: in fast mode, a weight of some thousand entries would hide an
    error of a thousandth."""
    cases = [case for case in OF[name] if not case.staircase]
    case = min(cases, key=lambda c: (-len(c.names), sum(t.numel() for t in leaves(c.draw()[0]))))
    options = {**TOLERANCES, "fast_mode": True}
    assert gradcheck(seeded(case), case.draw()[0], **options)
    assert gradgradcheck(seeded(case), case.draw()[0], **options)
    for operand in case.names:
        wrong = seeded(case, check.spoilt(case.rule, operand))
        assert not gradcheck(wrong, case.draw()[0], **options, raise_exception=False), operand


@every_rule
def test_only_what_is_wanted_is_computed(name):
    for case in OF[name]:
        (args, _), asked = case.draw(), []

        def backward(grad_z, saved, needs, rule=case.rule, asked=asked):
            asked.append(sum(needs))
            return rule.backward(grad_z, saved, needs)

        function = seeded(case, replace(case.rule, backward=backward))
        z = function(*args)
        grad_z = check.upstream(case, z)
        together = torch.autograd.grad(z, leaves(args), grad_z)
        for leaf, expected in zip(leaves(args), together, strict=True):
            frozen = [a.detach() if isinstance(a, Tensor) and a is not leaf else a for a in args]
            (grad,) = torch.autograd.grad(function(*frozen), leaf, grad_z)
            with check.about(case.id):
                check.close(grad, expected)
        assert asked == [len(together)] + [1] * len(together), case.id


# --- second derivatives of rules that save something else than inputs and outputs ---


Shape = Float[Tensor, "..."]


def backward_by_slope(grad_a: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    return (grad_a * saved[0][0],)


def test_a_saved_intermediate_does_not_spoil_the_second_derivative():
    for kind in (tuple, list):

        def forward(z: Shape, kind=kind) -> tuple[Shape, tuple]:
            return z.exp() * z, (kind([z.exp() * (z + 1)]),)

        z = x(3, 5).draw(torch.Generator().manual_seed(0)).requires_grad_()
        function = as_function(Rule("z_exp_z", forward, backward_by_slope)).apply
        with check.about(kind):
            assert gradcheck(function, z, **TOLERANCES)
            assert gradgradcheck(function, z, **TOLERANCES)


def test_buffers_move_once_however_often_it_is_differentiated():
    arrays = (x(7, 3), constant(x(3)), constant(positive(3)), constant(x(3)), x(3), True)
    case = Case(F.batch_norm, arrays)
    (ours, _), (torchs, _) = case.draw(), case.draw()
    for args, function in ((ours, as_function(case.rule).apply), (torchs, F.batch_norm)):
        z = function(*args)
        (grad,) = torch.autograd.grad(z, args[0], check.upstream(case, z), create_graph=True)
        torch.autograd.grad(grad.square().sum(), args[0])
    check.each_close(ours[1:3], torchs[1:3])


def test_buffers_that_have_moved_since_the_forward():
    """Evaluate, train a step, and only then differentiate twice: the old statistics count."""
    arrays = (x(7, 3), constant(x(3)), constant(positive(3)), x(3), x(3))
    case = Case(F.batch_norm, arrays)

    def second(moved: float) -> Tensor:
        args, _ = case.draw()
        z = as_function(case.rule).apply(*args)
        args[2].add_(moved)
        grad_z = check.upstream(case, z)
        (grad,) = torch.autograd.grad(z, args[0], grad_z, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), args[3])[0]

    check.close(second(moved=1.0), second(moved=0.0))


# --- errors ---


def test_in_place_is_refused():
    for case in CASES:
        if not case.kwargs and in_place(case):
            args, _ = case.draw()
            with check.about(case.id), pytest.raises(NotImplementedError, match="in place"):
                as_function(case.rule).apply(*args)


def test_what_has_no_derivative_is_refused():
    """torch refuses these too; a None would be a gradient dropped in silence."""
    for function, args, place in [
        (F.nll_loss, (x(3, 5), labels(3, classes=5), positive(5)), 2),
        (F.cross_entropy, (x(3, 5), labels(3, classes=5), positive(5)), 2),
        (F.batch_norm, (x(7, 3), x(3), constant(positive(3))), 1),
    ]:
        case = Case(function, args)
        z = as_function(case.rule).apply(*case.draw()[0])
        with check.about(case.id), pytest.raises(NotImplementedError, match=f"argument {place}"):
            z.sum().backward()


def test_a_tensor_that_the_rule_does_not_read_is_refused():
    reads_one = Rule(
        "double", lambda z: (2 * z, ()), backward_by_slope, lambda z, other: ((z,), False)
    )
    with pytest.raises(TypeError, match="argument 1"):
        as_function(reads_one).apply(torch.ones(3), torch.ones(3, requires_grad=True))


def test_a_saved_input_that_was_overwritten_is_noticed():
    case = Case(F.linear, (x(3, 5), constant(x(7, 5))))
    (image, weight), _ = case.draw()
    z = as_function(case.rule).apply(image, weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z, image, check.upstream(case, z))


def test_inside_a_graph_of_torchs_own():
    """Between two operations of torch, and used twice."""
    linear = as_function(rules.TABLE[F.linear]).apply
    grads = []
    for function in (linear, F.linear):
        drawn, _ = Case(F.linear, (x(3, 5), x(5, 5), x(5))).draw()
        image, weight, bias = drawn
        a = function(torch.sin(function(image.exp(), weight, bias)), weight, bias)
        grads.append(torch.autograd.grad(a.square().mean(), drawn))
    check.each_close(*grads)


def test_one_function_a_rule():
    rule = rules.TABLE[F.relu]
    assert as_function(rule) is as_function(rules.TABLE[torch.relu]) is as_function(rule)
    assert as_function(rule).__name__ == "relu"
