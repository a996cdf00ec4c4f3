"""k winners: the operation, the layer with its duty cycle, and the networks made of it."""

import copy
import math
from itertools import product as every

import torch
import torch.nn.functional as F
from properties import (
    all_close,
    by_autograd,
    engines_agree,
    passes_the_checker,
    refuses,
    same,
)
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import Tape, backprop, models, rules
from nn_backprop.engines import for_training, in_precision
from nn_backprop.layers import KWinners, decay_boosts
from nn_backprop.models import ActivityPenalty, LayerNetwork, counting
from nn_backprop.rules.winners import k_winners

RULE = rules.TABLE[k_winners]
VECTORS, MAPS = (5, 11), (3, 5, 2, 7)


def one_by_one(x: Tensor, k: int, boost: Tensor) -> Tensor:
    """The k best of each example, by a search for the best that is left, k times."""
    z, boost = torch.zeros_like(x), boost.expand(x.shape)
    for n, example in enumerate(x):
        left = list(every(*map(range, example.shape)))  # in reading order
        for _ in range(min(k, len(left))):
            best = max(left, key=lambda u: (x[n][u] * boost[n][u]).item())  # the first of the best
            left.remove(best)
            z[n][best] = example[best]
    return z


# --- the operation ---


def test_the_k_largest_stay_and_of_equal_ones_the_first():
    boosted = (VECTORS, (11,)), (MAPS, (5, 1, 1)), (MAPS, (2, 7))
    for (shape, of_boost), k, seed in every(boosted, (1, 7, 10), range(2)):
        torch.manual_seed(seed)
        boost, one = 2.0 ** torch.randint(-1, 2, of_boost), torch.ones(())
        few = torch.randint(-2, 3, shape).double()  # few values, many ties
        for x, factor in ((few, boost), (few, one), (torch.randn(shape), boost)):
            z = k_winners(x, k, None if factor is one else factor)
            assert torch.equal(z, one_by_one(x, k, factor)), (shape, of_boost, k, seed)
    # whatever the order in memory; and the type is kept, whatever that of the boost
    x = torch.randint(-2, 3, MAPS).double()
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(k_winners(other, 13), k_winners(x, 13))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.half):
        x, boost = torch.randn(VECTORS).to(dtype), torch.rand(11)
        assert k_winners(x, 3, boost).dtype == dtype
        assert torch.equal(k_winners(x, 3, boost), one_by_one(x, 3, boost))


def test_the_boost_chooses_and_is_not_passed_on_and_gets_no_gradient():
    x = torch.tensor([[3.0, 1.0, 2.0], [8.0, 1.0, 2.0]], requires_grad=True)
    boost = torch.tensor([1.0, 4.0, 1.0], requires_grad=True)
    z = k_winners(x, 1, boost)
    assert z.tolist() == [[0, 1, 0], [8, 0, 0]]
    upstream = torch.tensor([[5.0, 7.0, 11.0], [13.0, 17.0, 19.0]])
    grad, none = torch.autograd.grad(z, (x, boost), upstream, allow_unused=True)
    assert grad.tolist() == [[0, 7, 0], [13, 0, 0]] and none is None
    with Tape() as tape:
        loss = (k_winners(x, 1, boost.detach()) * upstream).sum()
    assert tape.gradients(loss, [x])[0].tolist() == grad.tolist()


def test_if_there_are_no_more_than_k_units_all_pass_whatever_the_boost():
    for shape, units in ((VECTORS, 11), (MAPS, 70)):
        x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
        for k in (units, units + 1, 10**9):
            z = k_winners(x, k, torch.full((), 1e-30))
            assert torch.equal(z, x)
            assert torch.equal(torch.autograd.grad(z, x, upstream)[0], upstream)
        assert (k_winners(x, units - 1) == 0).flatten(1).sum(1).eq(1).all()
    layer, x = KWinners(3, 12, boost=100.0), torch.randn(5, 3, 2, 2)
    for _ in range(2):  # the layer counts them all the same
        assert torch.equal(layer(x), x)
    assert layer.duty_cycle.tolist() == [1, 1, 1]
    layer, x = KWinners(8, 6, evaluation_factor=1.5), torch.randn(5, 8)
    assert (layer(x) == 0).any() and torch.equal(layer.eval()(x), x)  # 9 of 8


def test_values_that_are_not_finite_are_not_hidden():
    for value in (math.nan, math.inf, -math.inf):
        x, one = torch.randn(3, 7), torch.ones(())
        x[1, 4] = value
        z = k_winners(x, 2)
        assert torch.equal(z[::2], one_by_one(x, 2, one)[::2])
        expected = x[1] if math.isnan(value) else one_by_one(x, 2, one)[1]
        assert_close(z[1], expected, rtol=0, atol=0, equal_nan=True)
        assert z[1, 4].item() != 0 or value == -math.inf
        # ... and what a loser is sent back does not reach it, even if that is not finite
        _, saved = RULE.forward(torch.randn(3, 7), 2)
        grad, _ = RULE.backward(torch.full((3, 7), value), saved, (True, False))
        assert (grad == 0).sum(1).tolist() == [5, 5, 5], value


def test_what_the_function_refuses():
    of_units = r"^the units of examples are \(N, ...\), with two axes or more, not 1"
    for sentence, shape, k, *boost in (
        (of_units, (7,), 2),
        ("^k must be at least 1, not 0$", (3, 7), 0),
        (r"expand to the activations' \(3, 7\), which \(5,\)", (3, 7), 2, torch.ones(5)),
        (r"which \(2, 3, 7\) does not$", (3, 7), 2, torch.ones(2, 3, 7)),
        (r"which \(5,\) does not$", (3, 7), 9, torch.ones(5)),
    ):
        refuses(sentence, k_winners, torch.ones(shape), k, *boost)


# --- the layer, its duty cycle and its boost ---


def used(shape: tuple[int, ...], k: int, **options) -> KWinners:
    """A layer that has counted a few batches."""
    layer = KWinners(shape[1], k, dtype=torch.float64, **options)
    for _ in range(4):
        layer(torch.randn(shape, dtype=torch.float64))
    assert layer.duty_cycle.min() < layer.duty_cycle.max()
    return layer


def test_the_tape_counts_as_autograd_does():
    for make, training in every((models.sparse_mlp, models.sparse_cnn), (True, False)):
        torch.manual_seed(0)
        model = make().double().train(training)
        twin, recorded = copy.deepcopy(model), copy.deepcopy(model)
        replayed = for_training("tape")
        for _ in range(3):
            x, y = torch.randn(7, 1, 28, 28).double(), torch.randint(10, (7,))
            loss, grads = backprop(model, model.loss, x, y)
            expected, wanted = by_autograd(twin, twin.loss, x, y)
            assert_close([loss, replayed(recorded, x, y)], [expected, expected])
            assert all(grad.any() for grad in wanted.values())
            all_close(grads, wanted, (make, training))
            found = {name: p.grad for name, p in recorded.named_parameters()}
            all_close(found, wanted, (make, training))
            for each in (model, twin, recorded):
                decay_boosts(each)
            for each in (model, recorded):
                assert_close(dict(each.named_buffers()), dict(twin.named_buffers()))


def test_the_duty_cycle_by_hand():
    layer, seen = KWinners(3, 1, boost=0.0, period=4), 0
    for winners, duty in (
        ([0, 0, 2], [2 / 3, 0, 1 / 3]),  # the mean of the first three examples,
        ([1], [2 / 4, 1 / 4, 1 / 4]),  # of the first four; from then on an example counts ¼:
        ([1], [3 / 4 * 2 / 4, 3 / 4 * 1 / 4 + 1 / 4, 3 / 4 * 1 / 4]),
        ([2, 0, 0, 0, 0], [4 / 5, 0, 1 / 5]),  # more than a period: they alone
    ):
        x = torch.eye(3)[winners]
        assert torch.equal(layer(x), x)
        seen += len(x)
        assert_close(layer.duty_cycle, torch.tensor(duty))
        assert layer.examples.item() == seen
    layer = KWinners(2, 3)  # of a channel it is the mean over its places
    x = torch.tensor([[[[5.0, 1.0]], [[4.0, 3.0]]], [[[0.0, 0.0]], [[-1.0, 2.0]]]])
    # the third winner of the second example is a 0, and so not active
    assert layer(x).tolist() == [[[[5, 0]], [[4, 3]]], [[[0, 0]], [[0, 2]]]]
    assert layer.duty_cycle.tolist() == [1 / 4, 3 / 4]


def test_who_wins_is_decided_by_the_boost_of_the_paper():
    for (shape, k), training in every([(VECTORS, 3), (MAPS, 17)], (True, False)):
        torch.manual_seed(0)
        layer = used(shape, k, boost=3.0).train(training)
        target, duty = k / math.prod(shape[1:]), layer.duty_cycle.clone()
        boost = torch.exp(3.0 * (target - duty)).view(-1, *[1] * (len(shape) - 2))
        x = torch.randn(shape).double()
        z = layer(x)
        assert torch.equal(z, one_by_one(x, k, boost)), (shape, k, training)
        assert not torch.equal(z, one_by_one(x, k, torch.ones(())))  # the boost matters here


def test_an_empty_batch_and_evaluation_count_nothing():
    for shape in ((0, 5), (0, 5, 2, 7)):
        for layer in (KWinners(5, 3), used((3, *shape[1:]), 3)):
            before = copy.deepcopy(dict(layer.state_dict()))
            assert layer(torch.ones(shape, dtype=layer.duty_cycle.dtype)).shape == shape
            assert same(dict(layer.state_dict()), before)
    layer = used(MAPS, 17)
    before = copy.deepcopy(dict(layer.state_dict()))
    x = torch.randn(MAPS).double()
    z = layer.eval()(x)
    assert torch.equal(layer(x), z) and same(dict(layer.state_dict()), before)
    layer.train()(x)
    assert layer.examples == before["examples"] + len(x)
    assert not torch.equal(layer.duty_cycle, before["duty_cycle"])


def test_how_many_win():
    for k, factor, training, evaluation in (
        (3, 1.0, 3, 3), (3, 1.5, 3, 4), (0.3, 1.5, 3, 4), (0.01, 1.0, 1, 1), (5, 2.0, 5, 10)
    ):  # fmt: skip
        layer, x = KWinners(11, k, evaluation_factor=factor), torch.randn(7, 11)
        assert (layer(x) != 0).sum(1).tolist() == 7 * [training], (k, factor)
        assert (layer.eval()(x) != 0).sum(1).tolist() == 7 * [evaluation], (k, factor)
    z = KWinners(5, 0.1, boost=0.0)(torch.randn(3, 5, 4, 5))  # a share is of all maps together
    assert (z != 0).flatten(1).sum(1).tolist() == [10, 10, 10]
    assert len(set((z != 0).sum((2, 3)).flatten().tolist())) > 1  # not so many of each


def test_decay_boosts_reaches_every_layer_of_a_model_and_nothing_else():
    model = LayerNetwork(KWinners(5, 2), nn.Sequential(KWinners(5, 2, boost=4.0, decay=0.5)))
    before = copy.deepcopy(model.state_dict())
    decay_boosts(model)
    decay_boosts(model)
    after = model.state_dict()
    assert_close(after["0.strength"].item(), 1.5 * 0.85**2)
    assert after["1.0.strength"].item() == 1.0
    assert all(torch.equal(after[key], before[key]) for key in before if "strength" not in key)


def test_all_that_decides_is_in_the_state_dict():
    layer = used(VECTORS, 3)
    decay_boosts(layer)
    other = KWinners(11, 3, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(VECTORS).double()
        assert torch.equal(layer(x), other(x))
    assert all(map(torch.equal, layer.state_dict().values(), other.state_dict().values()))
    assert set(layer.state_dict()) == {"duty_cycle", "strength", "examples"}


def test_what_is_counted_in_bfloat16_arrives_in_the_model():
    torch.manual_seed(0)
    model = models.sparse_mlp()
    twin, compute = copy.deepcopy(model), in_precision(for_training("autograd"), torch.bfloat16)
    for _ in range(3):
        x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
        compute(model, x, y)
        twin(x)
    counted, expected = model.active.duty_cycle, twin.active.duty_cycle
    assert counted.dtype == torch.float32 and model.active.examples == 96
    assert (counted - expected).abs().mean() < 0.05 * expected.mean()
    before = counted.clone()
    compute(model.eval(), x, y)
    assert torch.equal(model.active.duty_cycle, before)


# --- the networks ---


def test_parameters_of_the_networks_and_how_many_units_are_active():
    sparse = (25 + 1) * 32 + (25 * 32 + 1) * 64 + (16 * 64 + 1) * 700 + 701 * 10
    dense = (25 + 1) * 30 + (25 * 30 + 1) * 30 + (16 * 30 + 1) * 1000 + 1001 * 10
    assert counting.parameters(models.sparse_cnn()) == sparse == 776_606
    assert counting.parameters(models.dense_cnn()) == dense == 514_320
    assert counting.parameters(models.sparse_mlp()) == counting.parameters(models.MLP())
    torch.manual_seed(0)
    for training, factor in ((True, 1), (False, 1.5)):
        model, seen = models.sparse_cnn().train(training), []
        for layer in model:
            if isinstance(layer, KWinners):
                layer.register_forward_hook(lambda _, x, z, seen=seen: seen.append(z.flatten(1)))
        assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)
        assert [z.shape[1] for z in seen] == [4608, 1024, 700]
        active = [3 * [factor * k] for k in (400, 300, 100)]
        assert [(z != 0).sum(1).tolist() for z in seen] == active


def test_the_price_is_the_mean_activity_of_each_layer_in_training_and_its_gradients():
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)
    model = ActivityPenalty(LayerNetwork(*layers).double(), 0.3)
    x, y = torch.randn(13, 5).double(), torch.randint(3, (13,))
    first, _, second, _, last = model.network
    a = F.relu(first(x))
    b = F.relu(second(a))
    expected = F.cross_entropy(last(b), y) + 0.3 * (a.abs().mean() + b.abs().mean())
    assert_close(model.loss(model(x), y), expected)
    model.eval()
    assert_close(model.loss(model(x), y), F.cross_entropy(last(b), y))
    assert_close(model.probabilities(model(x)), last(b).softmax(1))
    model.train()
    passes_the_checker(model, x, loss=lambda z: model.loss(z, y), second_order=True)
    engines_agree(model, x, y)
    # by the docstring: each active unit of the second priced layer has 0.3 / (N U) from the price
    weight = model.network[2].bias
    (with_price,) = torch.autograd.grad(model.loss(model(x), y), weight)
    (without,) = torch.autograd.grad(model.network.loss(model(x)[0], y), weight)
    active = model.network[:4](x) > 0
    assert_close(with_price - without, 0.3 * active.double().sum(0) / (13 * 11))
    model = LayerNetwork(nn.Linear(5, 3))
    refuses(r"has no nn.ReLU whose activity could be priced", ActivityPenalty, model, 0.1)
