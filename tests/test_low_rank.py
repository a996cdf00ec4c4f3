"""A product of thin matrices: its gradients, its start, its cost, the best one of a given layer."""

import copy
import math
from itertools import product as every

import pytest
import torch
from properties import (
    DEVICES,
    DTYPES,
    all_close,
    names_checked,
    passes_the_checker,
    product,
    refuses,
    same,
    same_gradients,
)
from torch import nn
from torch.testing import assert_close

from nn_backprop.layers import LowRankLinear
from nn_backprop.layers.low_rank import break_even, cut_to_rank
from nn_backprop.models import counting

M, N_OUT, RANK = 11, 7, 3  # in, out
SHAPES = [(5, M), (2, 5, M), (M,)]
WAYS, BIASES = ("from scratch", "from_linear"), (True, False)


def made(how: str, bias: bool = True, dtype=torch.float64) -> LowRankLinear:
    torch.manual_seed(0)
    if how == "from scratch":
        return LowRankLinear(M, N_OUT, RANK, bias, dtype=dtype)
    return LowRankLinear.from_linear(nn.Linear(M, N_OUT, bias, dtype=dtype), RANK)


def whole(layer: LowRankLinear) -> nn.Linear:
    """The affine layer whose weight is the product."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear = linear.to(layer.down.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.up @ layer.down)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


# --- what it computes, and its gradients ---


def test_it_is_the_affine_layer_of_the_product():
    for how, bias, shape in every(WAYS, BIASES, SHAPES):
        layer = made(how, bias)
        assert layer.down.shape == (RANK, M) and layer.up.shape == (N_OUT, RANK)
        x = torch.randn(shape).double()
        z = layer(x)
        assert z.shape == (*shape[:-1], N_OUT)
        assert_close(z, whole(layer)(x), msg=f"{how}, {bias}, {shape}: ".__add__)
        assert torch.linalg.matrix_rank(layer.up.detach() @ layer.down.detach()) == RANK


FEW = [(*a, *b) for a, b in zip(every(WAYS, BIASES), every(DTYPES, SHAPES[:2]), strict=True)]
EVERY = [*every(WAYS, BIASES, DTYPES, SHAPES[:2])]


@pytest.mark.parametrize("cases", [FEW, pytest.param(EVERY, marks=pytest.mark.slow)])
def test_the_gradients_pass_the_checker(cases):
    for how, bias, dtype, shape in cases:
        x, case = torch.randn(shape, dtype=dtype), (how, bias, dtype, shape)
        report = passes_the_checker(made(how, bias, dtype), x, second_order=True, case=case)
        assert names_checked(report) == {"x", "down", "up"} | ({"bias"} if bias else set())


def test_the_gradients_are_those_of_the_derivation():
    for how, bias in every(WAYS, BIASES):
        layer = made(how, bias)
        x = torch.randn(5, M).double().requires_grad_()
        grad_z = torch.randn(5, N_OUT).double()
        grads = same_gradients(layer, product, x, grad_z, (how, bias), rtol=1e-12)

        X, A, B = x.detach(), layer.down.detach(), layer.up.detach()
        a = torch.einsum("ni,ki->nk", X, A)
        grad_a = torch.einsum("no,ok->nk", grad_z, B)
        expected = {
            "up": torch.einsum("no,nk->ok", grad_z, a),
            "down": torch.einsum("nk,ni->ki", grad_a, X),
        } | ({"bias": grad_z.sum(0)} if bias else {})
        assert grads.keys() == expected.keys()
        grad_x = torch.einsum("nk,ki->ni", grad_a, A)
        all_close(grads | {"x": x.grad}, expected | {"x": grad_x}, (how, bias), rtol=1e-12)


# --- the start ---


def test_the_start_has_the_variances_that_it_says():
    """The variance of n uniform numbers strays by √(0.8 / n) of itself, since their kurtosis is
    1.8; five times that is allowed. The entries of the product depend on one another: the mean of
    their squares strays by what both factors do, and by 1/√(m n) for the products of two different
    ones of the r terms. nn.Linear's own variance would show a mistake in ours."""
    m, n, r = 401, 307, 101
    layer, again = made("from scratch"), made("from scratch")
    before = [p.clone() for p in layer.parameters()]
    assert same(before, [p.data for p in again.parameters()])  # they follow from the seed
    layer.reset_parameters()
    assert not any(map(torch.equal, before, layer.parameters()))
    torch.manual_seed(0)
    layer = LowRankLinear(m, n, r)
    down, up, bias = (p.detach().double() for p in (layer.down, layer.up, layer.bias))
    for values, variance in ((down, 1 / m), (up, 1 / (3 * r)), (bias, 1 / (3 * m))):
        stray = 5 * math.sqrt(0.8 / values.numel())
        assert (values**2).mean().item() == pytest.approx(variance, rel=stray)
        assert abs(values.mean().item()) < 5 * math.sqrt(variance / values.numel())
        bound = math.sqrt(3 * variance)
        assert 0.95 * bound < values.abs().max() <= bound * (1 + 1e-6)
    stray = 5 * math.sqrt(0.8 / down.numel() + 0.8 / up.numel() + 1 / (m * n))
    assert stray < 0.05
    mean_square = ((up @ down) ** 2).mean().item()
    assert mean_square == pytest.approx(1 / (3 * m), rel=stray)
    assert nn.Linear(m, n).weight.var().item() == pytest.approx(1 / (3 * m), rel=stray)


# --- the best approximation ---


def test_no_product_of_that_rank_is_nearer():
    """Eckart and Young: what is left are the squares of the other singular values."""
    torch.manual_seed(0)
    for (m, n), bias in every([(11, 7), (7, 11), (7, 7)], BIASES):
        linear = nn.Linear(m, n, bias, dtype=torch.float64)
        W, x = linear.weight.detach(), torch.randn(5, m).double()
        # the squares of the singular values are the eigenvalues of W Wᵀ (or of the smaller WᵀW)
        squares = torch.linalg.eigvalsh(W @ W.T if n <= m else W.T @ W).flip(0)
        for rank in range(1, min(m, n) + 1):
            layer = LowRankLinear.from_linear(linear, rank)
            A, B = layer.down.detach(), layer.up.detach()
            left = ((W - B @ A) ** 2).sum()
            assert_close(left, squares[rank:].sum(), rtol=1e-10, atol=1e-20)
            # Each factor has the root: its squares add up to the singular value itself
            values = squares[:rank].sqrt()
            assert_close(B.T @ B, torch.diag(values), rtol=1e-8, atol=1e-12)
            assert_close(A @ A.T, torch.diag(values), rtol=1e-8, atol=1e-12)
            if rank == min(m, n):
                assert_close(layer(x), linear(x), rtol=1e-10, atol=1e-12)
                continue
            assert left > 1e-6
            for trial in range(100):
                step = 10 ** (-trial / 25)  # from far to 1e-4
                near = (B + step * torch.randn_like(B)) @ (A + step * torch.randn_like(A))
                assert ((W - near) ** 2).sum() >= left


def test_what_is_taken_over_from_the_layer():
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for bias, dtype, device in every(BIASES, types, DEVICES):
        linear = nn.Linear(M, N_OUT, bias, device, dtype).requires_grad_(False)
        before, state = copy.deepcopy(dict(linear.state_dict())), torch.get_rng_state()
        layer = LowRankLinear.from_linear(linear, RANK)
        assert torch.equal(torch.get_rng_state(), state)  # no random numbers are drawn
        assert (layer.in_features, layer.out_features, layer.rank) == (M, N_OUT, RANK)
        assert (layer.bias is not None) is bias
        if bias:
            assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias
        for parameter in layer.parameters():  # to be trained, even of a frozen layer
            assert parameter.dtype == dtype and parameter.device == linear.weight.device
            assert isinstance(parameter, nn.Parameter)
            assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous()
            parameter.data.fill_(2)
        assert same(before, dict(linear.state_dict())) and not linear.weight.requires_grad


def test_the_sum_is_computed_in_float64():
    """A singular value of a millionth of the largest: float32 alone would lose its direction."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 2).double())[0] for n in (N_OUT, M))
    W = u @ torch.diag(torch.tensor([1.0, 1e-6]).double()) @ v.T
    linear = nn.Linear(M, N_OUT, dtype=torch.float32)
    linear.weight.data.copy_(W)
    layer = LowRankLinear.from_linear(linear, 2)
    left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    for found, wanted in ((layer.up[:, 1], left[:, 1]), (layer.down[1], right[1])):
        assert (found.double() @ wanted).item() ** 2 == pytest.approx(values[1].item(), rel=1e-6)


def test_device_type_names_and_how_it_is_shown():
    layer = LowRankLinear(M, N_OUT, RANK, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert [name for name, _ in layer.named_parameters()] == ["down", "up", "bias"]
    without = LowRankLinear(M, N_OUT, RANK, bias=False)
    assert without.bias is None and "bias" in without._parameters  # registered, as in torch
    assert repr(without) == "LowRankLinear(in_features=11, out_features=7, rank=3, bias=False)"


# --- what it costs ---


@pytest.mark.parametrize(
    "m, n", [(784, 300), (300, 100), (7, 11), (11, 7), (13, 13), (6, 3), (4, 4)]
)
def test_a_product_costs_less_exactly_below_the_break_even(m, n):
    """(6, 3) and (4, 4) break even at a whole number, 2: there it costs as much, not less."""
    for rank in range(1, min(m, n) + 1):
        assert (rank * (m + n) < m * n) is (rank < break_even(m, n))
    x, dense = torch.randn(5, m), nn.Linear(m, n)
    for rank in {1, int(break_even(m, n)), min(int(break_even(m, n)) + 1, min(m, n))}:
        layer = LowRankLinear(m, n, rank)
        weights, cost = rank * (m + n), 5 * rank * (m + n)
        assert counting.parameters(layer) == weights + n
        assert counting.multiply_adds(layer, x) == cost
        below = rank < break_even(m, n)
        assert (counting.parameters(layer) < counting.parameters(dense)) is below
        assert (cost < counting.multiply_adds(dense, x)) is below
    if (m, n) == (784, 300):
        assert f"{break_even(m, n):.2f}" == "216.97"


# --- what is refused ---


def test_what_is_refused():
    right = {"in_features": M, "out_features": N_OUT, "rank": RANK}
    for name, wrong in every(right, [0, -2, 3.0, "3", None]):
        sentence = f"{name} must be an integer of at least 1, not {wrong!r}"
        refuses(sentence, LowRankLinear, **(right | {name: wrong}))
        if name == "rank":
            refuses(sentence, LowRankLinear.from_linear, nn.Linear(M, N_OUT), wrong)
    for m, n in ((11, 7), (7, 11)):
        sentence = "^rank must be at most 7, the smaller of the two sizes, not 8$"
        refuses(sentence, LowRankLinear, m, n, 8)
        refuses(sentence, LowRankLinear.from_linear, nn.Linear(m, n), 8)
        LowRankLinear(m, n, 7), LowRankLinear.from_linear(nn.Linear(m, n), 7)
    for value in (math.nan, math.inf, -math.inf):
        linear = nn.Linear(M, N_OUT)
        linear.weight.data[2, 3] = value
        sentence = "the layer's weight has entries that are NaN or infinite"
        refuses(sentence, LowRankLinear.from_linear, linear, RANK)
    for wrong in (nn.Linear(M, N_OUT, dtype=torch.complex64), nn.Linear(M, N_OUT, device="meta")):
        sentence = "the layer's weight must have real numbers, not"
        refuses(sentence, LowRankLinear.from_linear, wrong, RANK)


def test_layers_of_a_model_are_cut_by_their_names():
    model = nn.Sequential(nn.Linear(M, M), nn.ReLU(), nn.Linear(M, N_OUT))
    first, wanted = model[0], LowRankLinear.from_linear(model[2], 2)
    cut_to_rank(model, {"2": 2})
    assert model[0] is first and model[2].rank == 2
    assert same(dict(model[2].state_dict()), dict(wanted.state_dict()))
    for name, sentence in (("1", "1 must be an nn.Linear, not ReLU"), ("0", "rank must be at")):
        refuses(sentence, cut_to_rank, model, {name: M + 1})
