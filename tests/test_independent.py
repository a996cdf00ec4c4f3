"""Every rule and three whole networks against arithmetic that shares no code with torch or with us.

Each Forward equation is written here a second time, in plain Python: an array is a dict
{index: number}, so that `x[n, i]` reads as in the equation, `x.get(index, 0)` is x with a border of
zeros, and a sum is a loop. No derivative is written down. The numbers have 40 digits, so that the
derivative of L = Σ u z, u random, is (L(q + STEP) − L(q − STEP)) / 2 STEP to 20 digits and more:
what is left is of order STEP² = 1e-24 in the series and 1e-40 / STEP = 1e-28 in rounding. Letters
as in `nn_backprop.rules`.
"""

import ast
import functools
import inspect
from itertools import product, zip_longest
from pathlib import Path

import comparison as check
import mpmath  # torch brings it: it needs sympy, which needs mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import Case, constant, labels, once_or_twice, positive, shares, x

from nn_backprop import backprop, models, rules
from nn_backprop.engines import by_hand
from nn_backprop.rules.locally_connected import locally_connected2d as local
from nn_backprop.rules.winners import k_winners as winners

# torch says that an uneven border costs a copy; that is no fault here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

mp = mpmath.mp.clone()  # our own: the precision of others stays as it is
mp.dps = 40
exp, log, sqrt, tanh, erf, STEP = mp.exp, mp.log, mp.sqrt, mp.tanh, mp.erf, mp.mpf("1e-12")
# What is expected is exact, so all that may differ is the float64 of the rule: 1e-16 a rounding.
RTOL = 1e-12

# --- the forwards, in plain Python ---


def places(*sizes):
    """Every index of an array of these sizes, in reading order."""
    return product(*map(range, sizes))


def sizes(x):
    return [max(axis) + 1 for axis in zip(*x, strict=True)]


def common(*shapes):
    """The shape to which these broadcast."""
    return [max(axis) for axis in zip_longest(*map(reversed, shapes), fillvalue=1)][::-1]


def at(x, *n):
    """x[n], where x is used again along the axes that it lacks or has with size 1."""
    own = sizes(x)
    return x[tuple(i % size for i, size in zip(n[len(n) - len(own) :], own, strict=True))]


def linear(x, weight, bias):
    (N, in_features), z = sizes(x), {}
    for n, o in places(N, len(bias)):
        z[n, o] = sum(x[n, i] * weight[o, i] for i in range(in_features)) + bias[o,]
    return z


def matmul(x, y):
    (*n_x, rows, J), (*n_y, J, columns), z = sizes(x), sizes(y), {}
    for *n, i, k in places(*common(n_x, n_y), rows, columns):
        z[*n, i, k] = sum(at(x, *n, i, j) * at(y, *n, j, k) for j in range(J))
    return z


def read(H, P, s, border, d, ceil_mode=False):
    """For one axis of H pixels: [h][p] is the pixel s h + d p that the output at h reads.

    Those of the image are 0 … H − 1. `border` is on both sides together, its larger half behind.
    """
    top = border // 2
    count = (H + border - d * (P - 1) - 1 + ceil_mode * (s - 1)) // s + 1
    if (count - 1) * s >= H + top:  # with ceil_mode a window may end past the border, not begin
        count -= 1
    return [[s * h + d * p - top for p in range(P)] for h in range(count)]


def conv2d(x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    (N, _, *image), (out_channels, C, *kernel), z = sizes(x), sizes(weight), {}
    same = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
    border = same if padding == "same" else [2 * width for width in padding]
    rows, columns = map(read, image, kernel, stride, border, dilation)
    for n, o, h, w in places(N, out_channels, len(rows), len(columns)):
        first = o // (out_channels // groups) * C  # the first channel of the group of o
        z[n, o, h, w] = bias[o,] + sum(
            x.get((n, first + c, rows[h][p], columns[w][q]), 0) * weight[o, c, p, q]
            for c, p, q in places(C, *kernel)
        )
    return z


def locally_connected2d(x, weight, bias, stride=(1, 1), padding=(0, 0)):
    (N, _, *image), (*extent, out_channels, C, P, Q), z = sizes(x), sizes(weight), {}
    border = [2 * width for width in padding]
    rows, columns = map(read, image, (P, Q), stride, border, (1, 1))
    assert extent == [len(rows), len(columns)]
    for n, o, h, w in places(N, out_channels, *extent):
        z[n, o, h, w] = bias[o, h, w] + sum(
            x.get((n, c, rows[h][p], columns[w][q]), 0) * weight[h, w, o, c, p, q]
            for c, p, q in places(C, P, Q)
        )
    return z


def windows(x, kernel, stride, padding, dilation, ceil_mode):
    """{(n, c, h, w): the pixels that it reads}."""
    (N, C, *image), border = sizes(x), [2 * width for width in padding]
    rows, columns = map(read, image, kernel, stride, border, dilation, [ceil_mode] * 2)
    return {
        (n, c, h, w): [(n, c, i, j) for i, j in product(rows[h], columns[w])]
        for n, c, h, w in places(N, C, len(rows), len(columns))
    }


def max_pool2d(x, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    pixels = windows(x, kernel, stride, padding, dilation, ceil_mode)
    return {n: max(x.get(pixel, -mp.inf) for pixel in pixels[n]) for n in pixels}


def avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor=None):
    (_, _, H, W), (top, left), z = sizes(x), padding if count_include_pad else (0, 0), {}
    for n, pixels in windows(x, kernel, stride, padding, (1, 1), ceil_mode).items():
        K = sum(-top <= i < H + top and -left <= j < W + left for _, _, i, j in pixels)
        z[n] = sum(x.get(pixel, 0) for pixel in pixels) / (divisor or K)
    return z


def nearest(x, size, scale_factor=None, mode="nearest"):
    N, C, *image = sizes(x)
    factors = scale_factor or [mp.mpf(new) / old for new, old in zip(size, image, strict=True)]
    size = size or [int(old * s) for old, s in zip(image, factors, strict=True)]
    shift = mp.mpf("0.5" if mode == "nearest-exact" else 0) + mp.mpf("1e-30")  # never just below
    rows, columns = ([int((h + shift) / s) for h in range(new)]
                     for new, s in zip(size, factors, strict=True))  # fmt: skip
    return {(n, c, h, w): x[n, c, rows[h], columns[w]] for n, c, h, w in places(N, C, *size)}


def elementwise(σ):
    """a[n] = σ(z[n])."""
    return lambda z, *constants, **named: {n: σ(z[n], *constants, **named) for n in z}


relu = elementwise(lambda z: max(z, 0))
sigmoid = elementwise(lambda z: 1 / (1 + exp(-z)))


def sum_of_exp(z, dim):
    """For every n,k: Σ_j e^z[n,j], j along the axis `dim`."""
    others = {n: n[:dim] + n[dim + 1 :] for n in z}  # the letters n without that of the axis
    return {n: sum(exp(z[j]) for j in z if others[j] == others[n]) for n in z}


def log_softmax(z, dim):
    return {n: z[n] - log(s) for n, s in sum_of_exp(z, dim).items()}


def pad(x, widths, mode, value):
    """`widths` from the last axis on: before, after."""
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]
    free = len(sizes(x)) - len(pairs)
    before = [0] * free + [before for before, _ in pairs]
    extent = [0] * free + [sum(pair) for pair in pairs]
    return {
        i: x.get(tuple(j - b for j, b in zip(i, before, strict=True)), mp.mpf(value))
        for i in places(*[size + more for size, more in zip(sizes(x), extent, strict=True)])
    }


def reduced(each, reduction, D):
    total = sum(each.values())
    return {"none": each, "sum": {(): total}, "mean": {(): total / D}}[reduction]


def cross_entropy(logits, y, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0):
    (N, C, *d_sizes), ε, each, D = sizes(logits), mp.mpf(label_smoothing), {}, 0
    weight, log_p = weight or {(k,): 1 for k in range(C)}, log_softmax(logits, 1)
    for n, *d in places(N, *d_sizes):
        if len(y) == len(logits):  # shares
            share, counts, D = [y[n, k, *d] for k in range(C)], True, D + 1
        else:
            share, counts = [k == y[n, *d] for k in range(C)], y[n, *d] != ignore_index
            D += counts * sum(share[k] * weight[k,] for k in range(C))
        q = [weight[k,] * ((1 - ε) * share[k] + ε / C) for k in range(C)]
        each[n, *d] = -counts * sum(q[k] * log_p[n, k, *d] for k in range(C))
    return reduced(each, reduction, D)


def nll_loss(x, y, weight, ignore_index, reduction):
    used = {n: 0 if k == ignore_index else weight[k,] for n, k in y.items()}
    each = {(n, *d): -used[n, *d] * x[n, y[n, *d], *d] for n, *d in y}
    return reduced(each, reduction, sum(used.values()))


def mse_loss(x, y, reduction="mean", weight=None):
    weight = weight or dict.fromkeys(x, 1)
    each = {n: weight[n] * (x[n] - y[n]) ** 2 for n in x}
    return reduced(each, reduction, sum(weight.values()))


def mean(values):
    return sum(values) / len(values)


def batch_norm(x, running_mean, running_var, weight, bias, training=False, *, eps=1e-5):
    z = {}
    for c in weight:
        places_n = [n for n in x if n[1:2] == c]
        μ = mean([x[n] for n in places_n]) if training else running_mean[c]
        v = mean([(x[n] - μ) ** 2 for n in places_n]) if training else running_var[c]
        z |= {n: weight[c] * (x[n] - μ) / sqrt(v + eps) + bias[c] for n in places_n}
    return z


def layer_norm(x, normalized_shape, weight, bias, eps=1e-5):
    z = {}
    for n in places(*sizes(x)[: -len(normalized_shape)]):
        μ = mean([x[n + k] for k in weight])
        v = mean([(x[n + k] - μ) ** 2 for k in weight])
        z |= {n + k: weight[k] * (x[n + k] - μ) / sqrt(v + eps) + bias[k] for k in weight}
    return z


def broadcast(f):
    """z[n] = f(x[n], y[n])."""
    return lambda x, y, **named: {
        n: f(at(x, *n), at(y, *n), **named) for n in places(*common(sizes(x), sizes(y)))
    }


def over_axes(f, x, dim, keepdim):
    """z[n] = f([x[n,k] for every place k along the axes `dim`])."""
    terms = {}
    for index in x:
        n = (0 if d in dim else i for d, i in enumerate(index) if keepdim or d not in dim)
        terms.setdefault(tuple(n), []).append(x[index])
    return {n: f(values) for n, values in terms.items()}


def k_winners(x, k, boost=None):
    (N, *units), z = sizes(x), {}
    for n in range(N):
        score = {u: x[n, *u] * (1 if boost is None else at(boost, *u)) for u in places(*units)}
        first = sorted(score, key=score.get, reverse=True)[:k]  # equal ones stay in reading order
        z |= {(n, *u): x[n, *u] if u in first else mp.mpf(0) for u in score}
    return z


def reshape(x, shape):
    return dict(zip(places(*shape), (x[n] for n in sorted(x)), strict=True))


def squared_error(z, y):
    a = sigmoid(z)
    return {(): sum((a[n, k] - (k == y[n,])) ** 2 for n, k in a) / len(y)}


def mlp(σ, loss, x, y, p):
    a = σ(linear(x, p["layers.0.weight"], p["layers.0.bias"]))
    return loss(linear(a, p["layers.1.weight"], p["layers.1.bias"]), y)


def cnn(x, y, p):
    x1 = max_pool2d(relu(conv2d(x, p["conv1.weight"], p["conv1.bias"])), (2, 2), (2, 2))
    x2 = max_pool2d(relu(conv2d(x1, p["conv2.weight"], p["conv2.bias"])), (2, 2), (2, 2))
    x3 = reshape(x2, (len(y), len(x2) // len(y)))
    return cross_entropy(linear(x3, p["output.weight"], p["output.bias"]), y)


# --- the table: a plain forward, and a call of torch's with the same arguments ---

part, REDUCTIONS, IMAGE = functools.partial, ["mean", "none", "sum"], x(2, 3, 5, 7)
LOGITS, INDICES, WEIGHTS = x(3, 5, 2), labels(3, 2, classes=5, ignored=4), positive(5)
RUNNING = (x(2, 3, 5), constant(x(3)), constant(positive(3)), x(3), x(3))
ROWS = [
    (linear, Case(F.linear, (x(3, 5), x(2, 5), x(2)))),
    *[(matmul, Case(torch.matmul, xy)) for xy in [(x(3, 5), x(5, 2)), (x(2, 1, 3, 5), x(7, 5, 2))]],
    *[(conv2d, Case(F.conv2d, args)) for args in [
        (x(2, 1, 5, 7), x(3, 1, 2, 3), x(3)),
        (x(1, 2, 7, 5), x(3, 2, 3, 2), x(3), (3, 2), (2, 1)),
        (x(1, 2, 5, 3), x(3, 2, 2, 2), x(3), (1, 1), "same", (1, 3)),
        (x(1, 4, 5, 7), x(6, 2, 2, 3), x(6), (2, 1), (1, 2), (3, 2), 2)]],
    *[(locally_connected2d, Case(local, args)) for args in [
        (x(2, 1, 3, 5), x(2, 3, 5, 1, 2, 3), x(5, 2, 3)),
        (x(1, 2, 5, 3), x(2, 3, 3, 2, 3, 2), x(3, 2, 3), (3, 2), (1, 2))]],
    *[(max_pool2d, Case(F.max_pool2d, (IMAGE, *args))) for args in [
        ((2, 3), (2, 3)), ((3, 2), (2, 1), (1, 1), (1, 2)), ((2, 2), (3, 3), (1, 1), (1, 1), True),
        ((3, 5), (5, 4), (1, 2), (1, 1), True)]],
    # With ceil_mode, the second drops a window that begins in the border; in the third, windows
    # reach over the image, the border and what is beyond.
    *[(avg_pool2d, Case(F.avg_pool2d, (IMAGE, *where, *flags)))
      for where in [((3, 2), (2, 3), (1, 0)), ((2, 2), (3, 3), (1, 1)), ((3, 5), (5, 4), (1, 2))]
      for flags in [(False, True), (False, False), (True, True), (True, False), (True, True, 5)]],
    *[(nearest, Case(F.interpolate, (IMAGE, *args), mode)) for args in [
        ((11, 13),), ((3, 2),), (None, (2.0, 3.0)), (None, (2.5, 0.75))]
      for mode in [{}, {"mode": "nearest-exact"}]],
    (relu, Case(F.relu, (x(3, 5),))),
    (elementwise(lambda z, negative_slope: z if z > 0 else negative_slope * z),
     Case(F.leaky_relu, (x(3, 5), 0.2))),
    (sigmoid, Case(torch.sigmoid, (x(3, 5),))),
    (elementwise(tanh), Case(torch.tanh, (x(3, 5),))),
    (elementwise(lambda z: z / 2 * (1 + erf(z / sqrt(2)))), Case(F.gelu, (x(3, 5),))),
    (elementwise(lambda z, approximate:
        z / 2 * (1 + tanh(sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))),
     Case(F.gelu, (x(3, 5),), {"approximate": "tanh"})),
    (elementwise(mp.cos), Case(torch.cos, (x(3, 5),))),
    *[(k_winners, Case(winners, args)) for args in [
        (x(3, 5), 2), (x(3, 5), 2, constant(positive(5))), (x(3, 5), 7),
        (x(2, 3, 5, 2), 11, constant(once_or_twice(3, 1, 1)))]],
    *[(log_softmax, Case(torch.log_softmax, (x(2, 3, 5), dim))) for dim in range(3)],
    *[(lambda z, dim: {n: exp(z[n]) / s for n, s in sum_of_exp(z, dim).items()},
       Case(torch.softmax, (x(2, 3, 5), dim))) for dim in range(3)],
    *[(cross_entropy, Case(F.cross_entropy, args, {"reduction": r, "label_smoothing": ε, **more}))
      for r in REDUCTIONS for ε in [0.0, 0.3] for *args, more in [
          (LOGITS, INDICES, constant(WEIGHTS), {"ignore_index": 4}), (LOGITS, INDICES, None, {}),
          (LOGITS, shares(3, 5, 2), WEIGHTS, {}), (LOGITS, shares(3, 5, 2), None, {})]],
    *[(nll_loss, Case(F.nll_loss, (LOGITS, INDICES, constant(WEIGHTS)),
                      {"ignore_index": 4, "reduction": r})) for r in REDUCTIONS],
    *[(mse_loss, Case(F.mse_loss, (x(3, 5), x(3, 5)), {"reduction": r, **weight}))
      for r in REDUCTIONS for weight in [{}, {"weight": positive(3, 5)}]],
    (batch_norm, Case(F.batch_norm, (x(7, 3), None, None, x(3), x(3), True))),
    *[(batch_norm, Case(F.batch_norm, RUNNING, {"training": training, "eps": 0.5}))
      for training in [True, False]],
    (layer_norm, Case(F.layer_norm, (x(3, 5), (5,), x(5), x(5)))),
    (layer_norm, Case(F.layer_norm, (x(3, 5, 2), (5, 2), x(5, 2), x(5, 2), 0.5))),
    (lambda x, p, mask: {n: x[n] * mask[n] / (1 - mp.mpf(p)) for n in x},
     Case(F.dropout, (x(5, 7), 0.3))),
    *[(broadcast(f), Case(function, (positive(2, 1, 5), positive(3, 1)))) for f, function in [
        (lambda x, y: x + y, torch.add), (lambda x, y: x - y, torch.sub),
        (lambda x, y: x * y, torch.mul), (lambda x, y: x / y, torch.div)]],
    *[(broadcast(f), Case(function, (x(5), x(3, 5)), {"alpha": 3})) for f, function in [
        (lambda x, y, alpha: x + alpha * y, torch.add),
        (lambda x, y, alpha: x - alpha * y, torch.sub)]],
    *[(elementwise(lambda z, exponent: z**exponent), Case(torch.pow, args))
      for args in [(x(3, 5), 3), (positive(3, 5), -0.7)]],
    (elementwise(lambda z: -z), Case(torch.neg, (x(3, 5),))),
    (elementwise(exp), Case(torch.exp, (x(3, 5),))),
    (elementwise(log), Case(torch.log, (positive(3, 5),))),
    *[(part(over_axes, f), Case(function, (x(2, 3, 5), *axes)))
      for f, function in [(sum, torch.sum), (mean, torch.mean)]
      for axes in [((0, 1, 2), False), ((1,), False), ((0, 2), True)]],
    (reshape, Case(torch.reshape, (x(3, 10), (2, 15)))),
    (lambda x, dims: {tuple(n[d] for d in dims): x[n] for n in x},
     Case(torch.permute, (x(2, 3, 5), (2, 0, 1)))),
    *[(pad, Case(F.pad, (x(2, 3, 5), widths, "constant", -1.5)))
      for widths in [(1, 2), (0, 3, 2, 1), (-1, 2, 1, -1)]],
    (lambda x: dict(x), Case(torch.clone, (x(3, 5),))),
]  # fmt: skip
NETWORKS = [
    (part(mlp, sigmoid, squared_error), by_hand.mlp_backprop,
     models.MLP, ((5, 3, 2), "sigmoid", "squared_error"), (7, 5)),
    (part(mlp, relu, cross_entropy), by_hand.mlp_backprop,
     models.MLP, ((5, 3, 2), "relu", "cross_entropy"), (7, 5)),
    (cnn, by_hand.cnn_backprop, models.CNN, ((2, 3), 2, 10, 2), (3, 1, 10, 10)),
]  # fmt: skip


def numbers(t):
    """A tensor as a dict of numbers that equal its own; anything else as it is."""
    if not isinstance(t, torch.Tensor):
        return t
    return {n: (mp.mpf if t.is_floating_point() else int)(t[n].item()) for n in places(*t.shape)}


def tensor(z):
    assert set(z) == set(places(*sizes(z)))
    return torch.tensor([float(z[n]) for n in sorted(z)], dtype=torch.float64).reshape(sizes(z))


def derivatives(L, operands):
    """∂L/∂q for every element q of the operands, which L reads."""
    grads = {name: {} for name in operands}
    for name, q in operands.items():
        for n, value in list(q.items()):
            q[n] = value + STEP
            above = L()
            q[n] = value - STEP
            grads[name][n] = (above - L()) / (2 * STEP)
            q[n] = value
    return {name: tensor(grad) for name, grad in grads.items()}


def expected(plain, case):
    """z, and the derivatives of Σ_n u[n] z[n] with u = grad_z, named as the rule names operands."""
    (args, kwargs), played = case.draw(), check.play(case)
    kwargs = {name: numbers(a) for name, a in kwargs.items()}
    if "mask" in inspect.signature(plain).parameters:
        kwargs["mask"] = numbers(played.saved[0])  # chance has no equation: what was drawn is given
    bound, u = inspect.signature(plain).bind(*map(numbers, args), **kwargs), numbers(played.grad_z)

    def L():
        z = plain(*bound.args, **bound.kwargs)
        return sum(u[n] * z[n] for n in z)

    z = tensor(plain(*bound.args, **bound.kwargs))
    return z, derivatives(L, {name: bound.arguments[name] for name in case.names})


@pytest.mark.parametrize("plain, case", ROWS, ids=[case.id for _, case in ROWS])
def test_a_rule_is_its_equation_and_the_derivative_of_it(plain, case):
    played, (z, grads) = check.play(case), expected(plain, case)
    check.close(played.z, z, RTOL)
    check.all_close(played.grads, grads, RTOL)
    for name, factor in product(case.names, [check.SPOILT, 1 + 1e-9]):  # which is refused
        wrong = check.spoilt(case.rule, name, lambda grad, factor=factor: grad * factor)
        with check.about(name, factor), pytest.raises(AssertionError, match="not close"):
            check.all_close(check.play(case, wrong).grads, grads, RTOL)


@pytest.mark.parametrize("plain, by_hand_backprop, make, args, shape", NETWORKS)
def test_whole_networks(plain, by_hand_backprop, make, args, shape):
    torch.manual_seed(4)
    model, inputs = make(*args).double(), torch.randn(shape, dtype=torch.float64)
    targets = torch.randint(2, shape[:1])
    p = {name: numbers(parameter.detach()) for name, parameter in model.named_parameters()}
    L = part(plain, numbers(inputs), numbers(targets), p)
    loss, grads = tensor(L()), derivatives(lambda: L()[()], p)
    assert all(grad.all() for grad in grads.values())  # no ReLU is dead
    for backward in [by_hand_backprop, lambda m, *batch: backprop(m, m.loss, *batch)]:
        computed_loss, computed = backward(model, inputs, targets)
        check.close(computed_loss, loss, RTOL)
        check.all_close(computed, grads, RTOL)


def test_every_rule_has_a_plain_forward():
    without = {rule.name for rule in rules.TABLE.values()} - {case.rule.name for _, case in ROWS}
    assert without == {"cast"}  # it rounds: its derivative is that of no equation


def test_the_plain_forwards_share_no_code():
    section = Path(__file__).read_text(encoding="utf-8").split("\n# --- ")[1]
    names = {node.id for node in ast.walk(ast.parse("# " + section)) if isinstance(node, ast.Name)}
    ours = {"torch", "F", "check", "Case", "backprop", "by_hand", "models", "rules", "rule", "case"}
    assert "conv2d" in names and not names & ours
