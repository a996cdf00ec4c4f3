"""Many networks at once: each is what it would have become alone."""

import copy
import math
from itertools import product as every

import pytest
import torch
from properties import about, refuses, same

from nn_backprop.data import ImageData
from nn_backprop.engines import autograd
from nn_backprop.models import CNN, MLP
from nn_backprop.training import (
    evaluate,
    evaluate_many,
    fit,
    fit_many,
    make_optimizer,
    make_schedule,
    many,
    steps_per_epoch,
)
from nn_backprop.training.stacked import NetworkShape

M, K, BATCH, EPOCHS = 5, 3, 7, 2
SEEDS, RATES, DECAYS = [3, 1, 4, 1, 5], [0.01, 0.03, 0.02, 0.005, 0.04], [0.0, 0.1, 0.5, 0.0, 0.3]


@pytest.fixture(scope="module")
def data() -> ImageData:
    n = 17 + 5 + 11  # batches of 7, 7 and 3
    numbers = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 1, 5, 5), generator=numbers, dtype=torch.uint8)
    labels = torch.randint(K, (n,), generator=numbers)
    splits = torch.randperm(n, generator=numbers).split([17, 5, 11])
    return ImageData("made up", "for tests", images, labels, *splits, mean=0.4, std=0.3)


@pytest.fixture(scope="module")
def own_labels(data) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(2)
    return torch.randint(K, (M, len(data.images)), generator=numbers)


def networks(sizes=(25, 11, K), activation="relu", loss="cross_entropy", count=M):
    torch.manual_seed(7)
    return [MLP(sizes, activation, loss).double() for _ in range(count)]


def relabelled(data, labels) -> ImageData:
    return ImageData(**vars(data) | {"labels": labels})


def alone(model, data, seed, lr, decay, optimizer, schedule, epochs=EPOCHS, batch_size=BATCH):
    """The loop, and the mean loss over the examples of each epoch."""
    steps = epochs * steps_per_epoch(len(data.train), batch_size)
    adam = make_optimizer(optimizer, model.parameters(), lr, decay)
    sums = [0.0] * epochs

    def add(step):
        sums[step.epoch] += step.loss.item() * step.examples

    fit(
        model, autograd, adam, make_schedule(schedule, adam, lr, steps), data, epochs=epochs,
        batch_size=batch_size, seed=seed, dtype=next(model.parameters()).dtype, on_step=add,
    )  # fmt: skip
    return [total / len(data.train) for total in sums]


def assert_same(models, expected, rtol=1e-10):
    for model, other in zip(models, expected, strict=True):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            largest = q.detach().abs().max().item()
            torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * largest)


def both(
    models, data, labels=None, seeds=SEEDS, rates=RATES, decays=DECAYS,
    optimizer="adam", schedule="one-cycle", rtol=1e-10, **options,
):  # fmt: skip
    """Trains copies one after another and the models at once; they must agree, losses included."""
    options = {"epochs": EPOCHS, "batch_size": BATCH} | options
    before = copy.deepcopy(models)
    expected = copy.deepcopy(models)
    own = [data if labels is None else relabelled(data, row) for row in labels or models]
    losses = [
        alone(*one, optimizer, schedule, **options)
        for one in zip(expected, own, seeds, rates, decays, strict=True)
    ]
    got = fit_many(
        models, data, seeds=seeds, lrs=rates, weight_decays=decays,
        labels=None if labels is None else torch.stack(labels),
        optimizer=optimizer, schedule=schedule, **options,
    )  # fmt: skip
    assert_same(models, expected, rtol)
    wanted = torch.tensor(losses, dtype=got.dtype)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=0)
    changed = [
        not torch.equal(model.layers[0].weight, old.layers[0].weight)
        for model, old in zip(models, before, strict=True)
    ]
    assert sum(changed) > M // 2 or len(models) == 1  # a ReLU output can be dead from the start


@pytest.fixture
def grouped(monkeypatch):
    """Sets how many networks are trained at once."""
    return lambda size: monkeypatch.setattr(many, "group_size", lambda *_: size)


def test_each_is_what_it_becomes_alone(data, own_labels, grouped):
    rates_and_decays = [
        (RATES, DECAYS), (RATES, [0.0] * M), ([0.02] * M, DECAYS), ([0.02] * M, [0.3] * M)
    ]  # fmt: skip
    for group, (rates, decays), optimizer, schedule in every(
        (1, 2, M), rates_and_decays, ("sgd", "adam"), ("constant", "one-cycle")
    ):
        grouped(group)
        options = {"optimizer": optimizer, "schedule": schedule, "rates": rates, "decays": decays}
        with about(group, options):
            both(networks(), data, **options)
    for group in (1, 2, M):
        grouped(group)
        both(networks(), data, list(own_labels))
        for labels in (None, list(own_labels)):  # in one order for all
            both(networks(), data, labels, seeds=[3] * M)


def test_every_shape_size_of_batch_number_of_epochs_and_type(data):
    sizes = (25, K), (25, 11, K), (25, 11, 7, K)
    activations, losses = ("relu", "sigmoid", "tanh"), ("cross_entropy", "squared_error")
    for shape in every(sizes, activations, losses):
        with about(shape):
            both(networks(*shape), data)
    for batch_size in (1, 17, 100):
        both(networks(), data, batch_size=batch_size)
    both(networks(count=1), data, seeds=[3], rates=[0.02], decays=[0.1])
    both(networks(activation="tanh"), data, epochs=30)
    models = [model.float() for model in networks()]
    both(models, data, rtol=1e-4)
    assert models[0].layers[0].weight.dtype == torch.float32


def test_one_number_holds_for_all(data):
    one, other = networks(), networks()
    options = {"seeds": SEEDS, "epochs": 1, "batch_size": BATCH}
    fit_many(one, data, lrs=0.02, weight_decays=0.5, **options)
    fit_many(other, data, lrs=[0.02] * M, weight_decays=[0.5] * M, **options)
    assert_same(one, other, rtol=0)


def test_after_each_epoch_the_parameters_are_up_to_date(data, grouped):
    grouped(2)
    models, reference, calls, before = networks(), networks(), [], copy.deepcopy(data)
    state = torch.get_rng_state()
    options = {"seeds": SEEDS, "lrs": RATES, "schedule": "constant", "batch_size": 7}
    fit_many(reference, data, epochs=1, **options)

    def on_epoch(group, done):
        calls.append((group, done))
        if done == 1:
            assert_same(models[group], reference[group], rtol=0)

    fit_many(models, data, epochs=2, on_epoch=on_epoch, **options)
    groups = [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert calls == [(group, done) for group in groups for done in (1, 2)]
    # The models are left trainable, and the rest alone.
    assert torch.equal(torch.get_rng_state(), state)
    assert same(*(vars(d) for d in (data, before)))
    for p in models[0].parameters():
        assert p.requires_grad and p.grad is None and p.is_leaf
        assert p.untyped_storage().nbytes() == p.nbytes  # no view of the stack


def test_a_network_that_diverges_has_nan_and_does_not_disturb_the_others(data):
    for optimizer, rates, value in every(("sgd", "adam"), (RATES, 0.02), (math.nan, math.inf)):
        models, good, case = networks(), networks(), (optimizer, rates, value)
        options = {"seeds": SEEDS, "lrs": rates, "optimizer": optimizer, "epochs": 3}
        expected = fit_many(good, data, batch_size=7, **options)
        with torch.no_grad():
            models[2].layers[1].bias[0] = value
        losses = fit_many(models, data, batch_size=7, **options)
        others = [0, 1, 3, 4]
        assert losses[2].isnan().all() and losses[others].isfinite().all(), case
        assert torch.equal(losses[others], expected[others]), case
        assert_same([models[m] for m in others], [good[m] for m in others], rtol=0)

    # from the epoch of the divergence on
    options = {"seeds": SEEDS, "optimizer": "sgd", "schedule": "constant", "batch_size": 100}
    rates = [0.01, 1e200, 0.01, 0.01, 0.01]
    losses = fit_many(networks(), data, lrs=rates, epochs=3, **options)
    assert losses[1, 0].isfinite() and losses[1, 1:].isnan().all()
    assert losses[[0, 2, 3, 4]].isfinite().all()
    models, rates[1] = networks(), 1e308  # whose weights are lost in the last step
    losses = fit_many(models, data, lrs=rates, weight_decays=1e5, epochs=1, **options)
    assert not models[1].layers[0].weight.isfinite().all()
    assert losses.isnan()[:, 0].tolist() == [False, True, False, False, False]


def test_evaluation_of_many(data, own_labels, grouped):
    for case in every(("cross_entropy", "squared_error"), (None, own_labels), (4, 1000), (1, 2, M)):
        loss, labels, batch_size, group = case
        grouped(group)
        models = networks(activation="tanh", loss=loss)
        found = evaluate_many(models, data, data.test, labels, batch_size)
        own = [data if labels is None else relabelled(data, labels[m]) for m in range(M)]
        each = [evaluate(model, its, data.test) for model, its in zip(models, own, strict=True)]
        assert found.loss.tolist() == pytest.approx([one.loss for one in each], rel=1e-12), case
        accuracies = pytest.approx([one.accuracy for one in each], rel=1e-12)
        assert found.accuracy.tolist() == accuracies, case
        assert len(set(found.accuracy.tolist())) > 1


def test_groups_are_small_where_networks_are_large():
    def size(*sizes, N=32, M=64):
        shape = NetworkShape(sizes, "relu", "cross_entropy", torch.float32, torch.device("cpu"))
        return many.group_size(shape, N, M)

    assert size(784, 512, 256, 10) == 1
    assert 1 < size(784, 128, 10) < size(784, 16, 10) < 64
    assert size(784, 16, 10, N=256) < size(784, 16, 10)
    assert size(2, 3, M=5) == 5
    gpu = NetworkShape((784, 512, 10), "relu", "cross_entropy", torch.float32, torch.device("cuda"))
    assert many.group_size(gpu, 256, 64) == 64


def changed(change):
    models = networks()
    change(models)
    return models


def test_what_cannot_be_trained_is_refused(data):
    def freeze(models):
        models[1].layers[0].bias.requires_grad_(False)

    options = {"seeds": SEEDS, "lrs": RATES, "epochs": 2, "batch_size": 7}
    four = networks(count=4)
    for models, sentence in (
        ([], "there are no networks"),
        ([CNN()], "only an MLP can be stacked, not CNN"),
        (four + networks((25, 7, K), count=1), "must be alike.*and 4 is"),
        (four + networks(activation="tanh", count=1), "must be alike"),
        (four + networks(loss="squared_error", count=1), "must be alike"),
        ([*four, MLP((25, 11, K))], "must be alike"),
        (changed(lambda models: models[0].layers[1].float()), "differ in type or device"),
        (changed(freeze), "a parameter is frozen"),
        ([*four, four[0]], "the same network is there twice"),
        (networks((24, K)), "the images have 25 pixels, the networks 24 inputs"),
        (networks((25, 2)), "labels must be in 0 to 1, not 0 to 2"),
    ):
        before = copy.deepcopy(models)
        refuses(sentence, fit_many, models, data, **options)
        assert_same(models, before, rtol=0)
    models, before, sizes = networks(), networks(), "epochs and batch_size must be positive, not"
    for change, sentence in (
        ({"seeds": [1, 2]}, "there are 2 seeds for 5 networks"),
        ({"lrs": [0.1] * 6}, "there are 6 lrs for 5 networks"),
        ({"lrs": -0.1}, "lrs must be finite and not negative"),
        ({"weight_decays": [0.1]}, "there are 1 weight_decays for 5 networks"),
        ({"weight_decays": math.nan}, "weight_decays must be finite"),
        ({"epochs": 0}, f"{sizes} 0 and 7"),
        ({"batch_size": 0}, f"{sizes} 2 and 0"),
        ({"optimizer": "lion"}, "optimizer must be sgd or adam, not 'lion'"),
        ({"schedule": "step"}, "schedule must be constant or one-cycle, not 'step'"),
        ({"labels": torch.zeros(M, 32).long()}, r"labels must be int64 \(5, 33\)"),
        ({"labels": torch.zeros(M, 33)}, r"must be int64 \(5, 33\), not torch.f"),
        ({"labels": torch.full((M, 33), -1)}, "labels must be in 0 to 2, not -1 to -1"),
    ):
        refuses(sentence, fit_many, models, data, **(options | change))
    none = ImageData(**vars(data) | {"train": data.train[:0]})
    refuses("no training examples", fit_many, models, none, **options)
    refuses("must be positive", evaluate_many, models, data, data.test[:0])
    assert_same(models, before, rtol=0)
