"""A product of thin matrices: its gradients, its start, its cost, the best one of a given layer."""

import copy
import math
from itertools import product as every

import pytest
import torch
from properties import DEVICES, about, refuses, same
from torch import nn
from torch.testing import assert_close

from nn_backprop.layers import LowRankLinear
from nn_backprop.layers.low_rank import break_even, cut_to_rank
from nn_backprop.models import counting

M, N_OUT, RANK = 11, 7, 3  # in, out
BIASES = (True, False)


def made(bias: bool = True) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(M, N_OUT, RANK, bias, dtype=torch.float64)


def test_it_is_the_affine_layer_of_the_product_and_its_gradients_those_of_the_derivation():
    for bias, shape in every(BIASES, ((5, M), (2, 5, M), (M,))):
        layer, x = made(bias), torch.randn(shape).double().requires_grad_()
        A, B = layer.down.detach(), layer.up.detach()
        assert A.shape == (RANK, M) and B.shape == (N_OUT, RANK)
        assert torch.linalg.matrix_rank(B @ A) == RANK
        z = layer(x)
        assert z.shape == (*shape[:-1], N_OUT)
        with about(bias, shape):
            assert_close(z, nn.functional.linear(x, B @ A, layer.bias))
            grad_z = torch.randn_like(z)
            z.backward(grad_z)
            X, G = x.detach().view(-1, M), grad_z.view(-1, N_OUT)
            a, grad_a = torch.einsum("ni,ki->nk", X, A), torch.einsum("no,ok->nk", G, B)
            found = [layer.up.grad, layer.down.grad, x.grad.view(-1, M)]
            wanted = [
                torch.einsum("no,nk->ok", G, a),
                torch.einsum("nk,ni->ki", grad_a, X),
                torch.einsum("nk,ki->ni", grad_a, A),
            ]
            assert_close(found, wanted, rtol=1e-12, atol=1e-12)
            if bias:
                assert_close(layer.bias.grad, G.sum(0), rtol=1e-12, atol=1e-12)


# --- the start ---


def test_the_start_has_the_variances_that_it_says():
    """The variance of n uniform numbers strays by √(0.8 / n) of itself, since their kurtosis is
    1.8; five times that is allowed. The entries of the product depend on one another: the mean of
    their squares strays by what both factors do, and by 1/√(m n) for the products of two different
    ones of the r terms. nn.Linear's own variance would show a mistake in ours."""
    m, n, r = 401, 307, 101
    layer, again = made(), made()
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
        assert_close(layer(x), linear(x), rtol=1e-10, atol=1e-12)  # of full rank


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


def test_device_type_and_names():
    layer = LowRankLinear(M, N_OUT, RANK, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert [name for name, _ in layer.named_parameters()] == ["down", "up", "bias"]
    without = LowRankLinear(M, N_OUT, RANK, bias=False)
    assert without.bias is None and "bias" in without._parameters  # registered, as in torch


# --- what it costs ---


def test_a_product_costs_less_exactly_below_the_break_even():
    """(6, 3) and (4, 4) break even at a whole number, 2: there it costs as much, not less."""
    for m, n in ((784, 300), (300, 100), (7, 11), (11, 7), (13, 13), (6, 3), (4, 4)):
        for rank in range(1, min(m, n) + 1):
            assert (rank * (m + n) < m * n) is (rank < break_even(m, n)), (m, n, rank)
        x = torch.randn(5, m)
        for rank in {1, int(break_even(m, n)), min(int(break_even(m, n)) + 1, min(m, n))}:
            layer = LowRankLinear(m, n, rank)
            assert counting.parameters(layer) == rank * (m + n) + n
            assert counting.multiply_adds(layer, x) == 5 * rank * (m + n)
    assert f"{break_even(784, 300):.2f}" == "216.97"


def test_what_a_layer_must_be_to_be_approximated():
    for rank, sentence in ((0, "rank must be an integer of at least 1, not 0"), (8, "at most 7")):
        refuses(sentence, LowRankLinear.from_linear, nn.Linear(M, N_OUT), rank)
    for m, n in ((11, 7), (7, 11)):
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
