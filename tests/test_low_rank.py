"""A product of thin matrices: its gradients, its start, its cost, the best one of a given layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import backprop, check_gradients
from nn_backprop.layers import LowRankLinear
from nn_backprop.layers.low_rank import break_even, cut_to_rank
from nn_backprop.models import counting

M, N_OUT, RANK = 11, 7, 3  # in, out
SHAPES = [(5, M), (2, 5, M), (M,)]


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


def product(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradient is y."""
    return (z * y).sum()


every_way = pytest.mark.parametrize("how", ["from scratch", "from_linear"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False])


# --- what it computes, and its gradients ---


@every_way
@with_and_without_bias
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_affine_layer_of_the_product(how, bias, shape):
    layer = made(how, bias)
    assert layer.down.shape == (RANK, M) and layer.up.shape == (N_OUT, RANK)
    x = torch.randn(shape).double()
    z = layer(x)
    assert z.shape == (*shape[:-1], N_OUT)
    assert_close(z, whole(layer)(x))
    assert torch.linalg.matrix_rank(layer.up.detach() @ layer.down.detach()) == RANK


@every_way
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_gradients_pass_the_checker(how, bias, dtype, shape):
    layer = made(how, bias, dtype)
    report = check_gradients(layer, torch.randn(shape, dtype=dtype), second_order=True)
    assert report.ok and not [p for p in report.probes if p.outcome == "fail"], report
    names = {"x", "down", "up"} | ({"bias"} if bias else set())
    assert {entry.name for entry in report.tensors} == names


@every_way
@with_and_without_bias
def test_the_gradients_are_those_of_the_derivation(how, bias):
    layer = made(how, bias)
    x = torch.randn(5, M).double().requires_grad_()
    grad_z = torch.randn(5, N_OUT).double()
    _, by_tape = backprop(layer, product, x, grad_z)
    layer(x).backward(grad_z)

    X, A, B = x.detach(), layer.down.detach(), layer.up.detach()
    a = torch.einsum("ni,ki->nk", X, A)
    grad_b = grad_z.sum(0)
    grad_B = torch.einsum("no,nk->ok", grad_z, a)
    grad_a = torch.einsum("no,ok->nk", grad_z, B)
    grad_A = torch.einsum("nk,ni->ki", grad_a, X)
    grad_x = torch.einsum("nk,ki->ni", grad_a, A)
    expected = {"up": grad_B, "down": grad_A} | ({"bias": grad_b} if bias else {})
    assert by_tape.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(layer.get_parameter(name).grad, wanted, rtol=1e-12, atol=1e-12)
        assert_close(by_tape[name], wanted, rtol=1e-12, atol=1e-12)
    assert_close(x.grad, grad_x, rtol=1e-12, atol=1e-12)


@every_way
def test_the_gradients_follow_from_that_of_the_whole_matrix(how):
    layer, x, grad_z = made(how), torch.randn(5, M).double(), torch.randn(5, N_OUT).double()
    layer(x).backward(grad_z)
    linear = whole(layer)
    linear(x).backward(grad_z)
    grad_W, A, B = linear.weight.grad, layer.down.detach(), layer.up.detach()
    assert_close(layer.up.grad, grad_W @ A.T)
    assert_close(layer.down.grad, B.T @ grad_W)
    assert_close(layer.bias.grad, linear.bias.grad)


# --- the start ---


def test_the_start_has_the_variances_that_it_says():
    """The variance of n uniform numbers strays by √(0.8 / n) of itself, since their kurtosis is
    1.8; five times that is allowed. The entries of the product depend on one another: the mean of
    their squares strays by what both factors do, and by 1/√(m n) for the products of two different
    ones of the r terms. nn.Linear's own variance would show a mistake in ours."""
    m, n, r = 401, 307, 101
    torch.manual_seed(0)
    layer = LowRankLinear(m, n, r)
    down, up, bias = (p.detach().double() for p in (layer.down, layer.up, layer.bias))
    for values, variance in ((down, 1 / m), (up, 1 / (3 * r)), (bias, 1 / (3 * m))):
        stray = 5 * math.sqrt(0.8 / values.numel())
        assert (values**2).mean().item() == pytest.approx(variance, rel=stray)
        assert abs(values.mean().item()) < 5 * math.sqrt(variance / values.numel())
        bound = math.sqrt(3 * variance)
        assert values.abs().max() <= bound * (1 + 1e-6) and values.abs().max() > 0.95 * bound
    stray = 5 * math.sqrt(0.8 / down.numel() + 0.8 / up.numel() + 1 / (m * n))
    assert stray < 0.05
    mean_square = ((up @ down) ** 2).mean().item()
    assert mean_square == pytest.approx(1 / (3 * m), rel=stray)
    assert nn.Linear(m, n).weight.var().item() == pytest.approx(1 / (3 * m), rel=stray)


def test_the_parameters_are_drawn_anew():
    torch.manual_seed(0)
    layer = LowRankLinear(M, N_OUT, RANK)
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    torch.manual_seed(0)
    again = LowRankLinear(M, N_OUT, RANK)
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))


# --- the best approximation ---


@with_and_without_bias
@pytest.mark.parametrize("sizes", [(11, 7), (7, 11), (7, 7)])
def test_no_product_of_that_rank_is_nearer(sizes, bias):
    """Eckart and Young: what is left are the squares of the other singular values."""
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias, dtype=torch.float64)
    W = linear.weight.detach()
    # the squares of the singular values are the eigenvalues of W Wᵀ (or of the smaller WᵀW)
    square = W @ W.T if sizes[1] <= sizes[0] else W.T @ W
    squares = torch.linalg.eigvalsh(square).flip(0)
    x = torch.randn(5, sizes[0]).double()
    for rank in range(1, min(sizes) + 1):
        layer = LowRankLinear.from_linear(linear, rank)
        A, B = layer.down.detach(), layer.up.detach()
        left = ((W - B @ A) ** 2).sum()
        assert_close(left, squares[rank:].sum(), rtol=1e-10, atol=1e-20)
        # Each factor has the root: its squares add up to the singular value itself
        values = squares[:rank].sqrt()
        assert_close(B.T @ B, torch.diag(values), rtol=1e-8, atol=1e-12)
        assert_close(A @ A.T, torch.diag(values), rtol=1e-8, atol=1e-12)
        if rank == min(sizes):
            assert_close(layer(x), linear(x), rtol=1e-10, atol=1e-12)
            continue
        assert left > 1e-6
        for trial in range(100):
            step = 10 ** (-trial / 25)  # from far to 1e-4
            near = (B + step * torch.randn_like(B)) @ (A + step * torch.randn_like(A))
            assert ((W - near) ** 2).sum() >= left


@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_taken_over_from_the_layer(bias, dtype):
    linear = nn.Linear(M, N_OUT, bias, dtype=dtype).requires_grad_(False)
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    layer = LowRankLinear.from_linear(linear, RANK)
    assert (layer.in_features, layer.out_features, layer.rank) == (M, N_OUT, RANK)
    assert (layer.bias is not None) is bias
    for parameter in layer.parameters():  # to be trained, even of a frozen layer
        assert parameter.dtype == dtype and parameter.device == linear.weight.device
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous()
    if bias:
        assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(2)
    assert before.keys() == linear.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    assert not linear.weight.requires_grad


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_is_taken_over():
    layer = LowRankLinear.from_linear(nn.Linear(M, N_OUT, device="cuda"), RANK)
    assert {p.device.type for p in layer.parameters()} == {"cuda"}


def test_device_and_type_of_a_new_layer():
    layer = LowRankLinear(M, N_OUT, RANK, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert LowRankLinear(M, N_OUT, RANK, bias=False).bias is None
    assert [name for name, _ in layer.named_parameters()] == ["down", "up", "bias"]


# --- what it costs ---


@pytest.mark.parametrize(
    "m, n", [(784, 300), (300, 100), (7, 11), (11, 7), (13, 13), (6, 3), (4, 4)]
)
def test_a_product_costs_less_exactly_below_the_break_even(m, n):
    """(6, 3) and (4, 4) break even at a whole number, 2: there it costs as much, not less."""
    for rank in range(1, min(m, n) + 1):
        assert (rank * (m + n) < m * n) is (rank < break_even(m, n))
    x = torch.randn(5, m)
    dense = nn.Linear(m, n)
    for rank in {1, int(break_even(m, n)), min(int(break_even(m, n)) + 1, min(m, n))}:
        layer = LowRankLinear(m, n, rank)
        weights, cost = rank * (m + n), 5 * rank * (m + n)
        assert counting.parameters(layer) == weights + n
        assert counting.multiply_adds(layer, x) == cost
        below = rank < break_even(m, n)
        assert (counting.parameters(layer) < counting.parameters(dense)) is below
        assert (cost < counting.multiply_adds(dense, x)) is below


def test_the_break_even_of_the_first_layer_of_lenet_300_100():
    assert f"{break_even(784, 300):.2f}" == "216.97"
    assert 216 * (784 + 300) < 784 * 300 < 217 * (784 + 300)
    dense = counting.parameters(nn.Linear(784, 300))
    assert counting.parameters(LowRankLinear(784, 300, 216)) == dense - 1_056
    assert counting.parameters(LowRankLinear(784, 300, 217)) == dense + 28


# --- what is refused ---


@pytest.mark.parametrize("name", ["in_features", "out_features", "rank"])
@pytest.mark.parametrize("wrong", [0, -2, 3.0, "3", None])
def test_a_size_that_is_none_is_refused(name, wrong):
    right = {"in_features": M, "out_features": N_OUT, "rank": RANK}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, not {wrong!r}"):
        LowRankLinear(**(right | {name: wrong}))
    if name == "rank":
        with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
            LowRankLinear.from_linear(nn.Linear(M, N_OUT), wrong)


@pytest.mark.parametrize("m, n", [(11, 7), (7, 11)])
def test_a_rank_that_no_product_has_is_refused(m, n):
    for make in (
        LowRankLinear,
        lambda m, n, rank: LowRankLinear.from_linear(nn.Linear(m, n), rank),
    ):
        with pytest.raises(ValueError) as raised:
            make(m, n, 8)
        assert str(raised.value) == "rank must be at most 7, the smaller of the two sizes, not 8"
        make(m, n, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    linear = nn.Linear(M, N_OUT)
    linear.weight.data[2, 3] = value
    with pytest.raises(ValueError, match="the layer's weight has entries that are NaN or infinite"):
        LowRankLinear.from_linear(linear, RANK)


def test_how_it_is_shown():
    shown = "LowRankLinear(in_features=11, out_features=7, rank=3, bias=False)"
    assert repr(LowRankLinear(11, 7, 3, bias=False)) == shown


def test_training_a_cut_layer_brings_it_nearer_to_what_is_wanted():
    """Cut to rank 3, then trained by the tape's gradients alone on the whole layer's outputs."""
    torch.manual_seed(0)
    linear = nn.Linear(M, N_OUT).double()
    x = torch.randn(101, M).double() * torch.linspace(0.2, 2, M)  # some inputs matter more
    wanted = linear(x).detach()
    layer = LowRankLinear.from_linear(linear, RANK)
    first = F.mse_loss(layer(x), wanted).item()
    for _ in range(200):
        _, grads = backprop(layer, F.mse_loss, x, wanted)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter -= 0.1 * grads[name]
    assert F.mse_loss(layer(x), wanted).item() < 0.9 * first


def test_from_linear_draws_no_random_numbers_and_wants_real_ones():
    linear = nn.Linear(M, N_OUT)
    state = torch.get_rng_state()
    LowRankLinear.from_linear(linear, RANK)
    assert torch.equal(torch.get_rng_state(), state)
    for wrong in (nn.Linear(M, N_OUT, dtype=torch.complex64), nn.Linear(M, N_OUT, device="meta")):
        with pytest.raises(ValueError, match="the layer's weight must have real numbers, not"):
            LowRankLinear.from_linear(wrong, RANK)


def test_without_a_bias_it_is_registered_as_none_as_in_torch():
    assert "bias" in LowRankLinear(M, N_OUT, RANK, bias=False)._parameters


def test_layers_of_a_model_are_cut_by_their_names():
    model = nn.Sequential(nn.Linear(M, M), nn.ReLU(), nn.Linear(M, N_OUT))
    first, wanted = model[0], LowRankLinear.from_linear(model[2], 2)
    cut_to_rank(model, {"2": 2})
    assert model[0] is first and model[2].rank == 2
    assert torch.equal(model[2].up, wanted.up) and torch.equal(model[2].down, wanted.down)
    for name, error in (("1", "1 must be an nn.Linear, not ReLU"), ("0", "rank must be at most")):
        with pytest.raises(ValueError, match=error):
            cut_to_rank(model, {name: M + 1})
