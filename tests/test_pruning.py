"""Magnitude pruning: what is kept, what stays 0, what is counted; training, and files."""

import copy
from itertools import product as every

import pytest
import torch
from properties import refuses, same
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import models
from nn_backprop.data import ImageData
from nn_backprop.engines import ENGINES, for_training
from nn_backprop.layers import TiedStack
from nn_backprop.models import counting
from nn_backprop.training import (
    LeanAdamW,
    evaluate,
    fit,
    load_checkpoint,
    make_optimizer,
    make_permanent,
    make_schedule,
    parameters_left,
    prune_smallest,
    save_checkpoint,
    shares_kept,
)

STRIPES, SIDE = 3, 7
TWO_ENGINES = "autograd", "tape"


def network() -> nn.Sequential:
    """A convolution of 5 · 2 · 3 · 5 = 150 weights, then 13 · 45 = 585 and 3 · 13 = 39."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 5, (3, 5)), nn.ReLU(), nn.Flatten(), nn.Linear(45, 13), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(13, 3, bias=False))


def images() -> Tensor:
    return torch.randn(2, 2, 5, 7)


def largest(weight: Tensor, count: int) -> set[int]:
    """The places of so many entries, by sorting Python's own numbers."""
    values = [abs(v) for v in weight.detach().flatten().tolist()]
    return set(sorted(range(len(values)), key=values.__getitem__)[len(values) - count :])


def kept_places(layer: nn.Module) -> set[int]:
    return set(layer.weight_mask.flatten().nonzero().flatten().tolist())


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Images whose class is the row with the brightest stripe: easy, and not too easy."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(STRIPES, (211,), generator=generator)
    pictures = torch.randint(0, 101, (211, 1, SIDE, SIDE), generator=generator)
    pictures[torch.arange(211), 0, 2 * labels] += 101
    splits = torch.arange(211).split([101, 53, 57])
    return ImageData("made up", "", pictures.to(torch.uint8), labels, *splits, 0.3, 0.2)


def small_mlp(seed: int = 0) -> models.MLP:
    torch.manual_seed(seed)
    return models.MLP((SIDE * SIDE, 11, STRIPES))


def adam(model: nn.Module, graph: bool = False):
    return make_optimizer("adam", model.parameters(), 1e-2, 0.1, graph)


def trained(model, data, engine, optimizer=None, epochs: int = 2, seed: int = 0, **options):
    """Trains on; returns the optimizer."""
    optimizer = optimizer or adam(model)
    schedule = make_schedule("constant", optimizer, 1e-2, 1)
    options |= {"epochs": epochs, "batch_size": 17, "seed": seed}
    fit(model, engine, optimizer, schedule, data, **options)
    return optimizer


def lose_track(layer: nn.Module) -> None:
    """Moves what is pruned away from 0, as an optimizer with moments does."""
    with torch.no_grad():
        layer.weight_orig.add_(1 - layer.weight_mask)


# --- what is kept ---


def test_shares_of_the_rounds():
    assert shares_kept({"a": 0.125, "b": 1.0}, 3) == [
        {"a": pytest.approx(0.5), "b": 1.0},
        {"a": pytest.approx(0.25), "b": 1.0},
        {"a": 0.125, "b": 1.0},  # the last is the share itself, not a rounded one
    ]
    assert shares_kept({"a": 0.08}, 5)[-1] == {"a": 0.08}
    assert shares_kept({"a": 0.3}, 1) == [{"a": 0.3}] and shares_kept({}, 2) == [{}, {}]


def test_exactly_the_largest_weights_stay():
    for name, share in every(("0", "3", "5"), (0.08, 0.3, 0.5, 0.997, 1.0, 1)):
        model = network()
        layer = model.get_submodule(name)
        parameter, before = layer.weight, layer.weight.detach().clone()
        prune_smallest(model, {name: share})
        count = round(share * before.numel())
        places = kept_places(layer)
        assert places == largest(before, count) and len(places) == count, (name, share)
        assert layer.weight_orig is parameter and torch.equal(parameter, before)
        assert torch.equal(layer.weight, layer.weight_mask * before)
        others = [m for key, m in model.named_modules() if key != name]
        assert not any(hasattr(other, "weight_mask") for other in others)
        assert parameters_left(model) == counting.parameters(model) - before.numel() + count
    model = network()  # each layer by its own share
    prune_smallest(model, {"0": 0.66, "3": 0.12})
    assert [len(kept_places(model[k])) for k in (0, 3)] == [99, 70]  # of 150 and 585
    assert parameters_left(model) == 99 + 5 + 70 + 13 + 39


def test_round_after_round_fewer_of_the_same_are_kept():
    model = network()
    before, last = model[3].weight.detach().clone(), set(range(585))
    for shares in shares_kept({"3": 0.1}, 3):
        prune_smallest(model, shares)
        places = kept_places(model[3])
        assert places < last and places == largest(before, round(585 * shares["3"]))
        last = places
    prune_smallest(model, {"3": 0.1})  # once more: nothing is left to drop
    assert kept_places(model[3]) == last and len(last) == 58
    make_permanent(model)  # after which it can be pruned again
    prune_smallest(model, {"3": 0.05})
    assert kept_places(model[3]) == largest(before, 29)
    # A later round judges the weights as they are by then, not as they were at the last forward
    # pass, a step of the optimizer or a loading before.
    model = network()
    prune_smallest(model, {"3": 0.5})
    kept = model[3].weight_mask.clone()
    model(images())
    new = torch.randn(13, 45)
    new[kept == 0] *= 1000  # pruned, however large
    with torch.no_grad():
        model[3].weight_orig.copy_(new)
    prune_smallest(model, {"3": 0.2})
    assert kept_places(model[3]) == largest(new * kept, 117)


def test_the_counts_are_exact_in_16_bits():
    """Where a sum of 50,000 ones would be rounded to a multiple of 256 or 32."""
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(331, 307, dtype=dtype))
        prune_smallest(model, {"0": 0.5})
        prune_smallest(model, {"0": 0.3001})
        count = round(0.3001 * 331 * 307)
        assert len(kept_places(model[0])) == count, dtype
        assert parameters_left(model) == count + 307


def test_frozen_parameters_do_not_count():
    model = network()
    assert parameters_left(model) == 150 + 5 + 585 + 13 + 39
    model[0].requires_grad_(False)
    prune_smallest(model, {"0": 0.1, "3": 0.2})
    assert parameters_left(model) == 117 + 13 + 39
    model[3].bias.requires_grad_(False)
    assert parameters_left(model) == 117 + 39
    make_permanent(model)
    assert parameters_left(model) == 585 + 39  # ordinary layers again: nothing is held at 0


# --- training ---


def test_the_lean_optimizer_leaves_zeros_and_moves_the_rest(data):
    """It needs a single parameter. It had moments before the mask."""
    for engine in TWO_ENGINES:
        torch.manual_seed(0)
        layer = nn.Linear(SIDE * SIDE, STRIPES, bias=False)
        model = models.LayerNetwork(nn.Flatten(), layer)
        optimizer = trained(model, data, for_training(engine))
        assert type(optimizer) is LeanAdamW
        for share in (0.5, 0.2):
            prune_smallest(model, {"1": share})
            before, dropped, seen = layer.weight.detach().clone(), layer.weight_mask == 0, []

            def on_step(step, layer=layer, dropped=dropped, seen=seen):
                assert not layer.weight_orig.grad[dropped].any()
                with torch.no_grad():
                    layer(torch.zeros(1, SIDE * SIDE))
                seen.append(layer.weight[dropped].abs().max().item())

            trained(model, data, for_training(engine), optimizer, on_step=on_step)
            assert seen == [0.0] * 12, (engine, share)
            assert torch.equal(layer.weight == 0, dropped)
            assert (layer.weight != before)[~dropped].all()
        assert evaluate(model, data, data.validation).accuracy > 0.6  # chance is 1/3
        make_permanent(model)
        assert torch.equal(layer.weight == 0, dropped)


def test_train_prune_train_prune(data):
    """With biases and two layers, as the study does it: 30 % and 60 % of them are left."""
    for case in every(TWO_ENGINES, (True, False), (False, True)):
        engine, kept, graph = case  # kept: the optimizer, from before the pruning
        model = small_mlp()
        same_optimizer = adam(model, graph)
        trained(model, data, for_training(engine), same_optimizer, graph=graph)
        for shares in shares_kept({"layers.0": 0.3, "layers.1": 0.6}, 2):
            prune_smallest(model, shares)
            masks = [layer.weight_mask.clone() for layer in model.layers]
            batch = data.batch(data.train[:17])  # an engine made anew knows the new mask
            assert_close(*(for_training(name)(model, *batch) for name in TWO_ENGINES))
            again = same_optimizer if kept else None
            trained(model, data, for_training(engine), again, graph=graph)
            evaluate(model, data, data.validation)
            for layer, mask in zip(model.layers, masks, strict=True):
                assert torch.equal(layer.weight_mask, mask), case
                assert not layer.weight[mask == 0].any(), case
        assert parameters_left(model) == round(0.3 * 539) + 11 + round(0.6 * 33) + 3
        accuracy = evaluate(model, data, data.validation).accuracy
        assert accuracy > 0.6, case
        make_permanent(model)
        assert evaluate(model, data, data.validation).accuracy == accuracy


# --- an ordinary network again; saved and read ---


def test_make_permanent_leaves_an_ordinary_network():
    model, fresh = network(), network()
    parameters = list(model.parameters())
    prune_smallest(model, {"0": 0.6, "3": 0.1, "5": 0.3})
    prune_smallest(model, {"3": 0.05})
    x = images()
    z = model(x)
    masks = {k: model[k].weight_mask for k in (0, 3, 5)}
    for k in masks:
        lose_track(model[k])
    make_permanent(model)
    assert list(model.state_dict()) == list(fresh.state_dict())  # in this order, too
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for k, mask in masks.items():
        assert torch.equal(model[k].weight != 0, mask != 0) and model[k].weight.requires_grad
        assert not model[k]._forward_pre_hooks and not list(model[k].buffers())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), z) and torch.equal(fresh(x), z)
    make_permanent(model)  # there is nothing left to do
    assert torch.equal(copy.deepcopy(model)(x), z)

    layer = nn.Linear(7, 5)  # whatever the order of the parameters was: here the bias first
    layer._parameters["weight"] = layer._parameters.pop("weight")
    model = nn.Sequential(layer)
    prune_smallest(model, {"0": 0.5})
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "0.weight_orig"]
    make_permanent(model)
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "0.weight"]


def test_a_pruned_network_can_be_copied_until_gradients_are_recorded():
    model, x = network(), images()
    prune_smallest(model, {"3": 0.5})
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    refuses("deepcopy", copy.deepcopy, model, error=RuntimeError)
    with torch.no_grad():
        model(x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    stack, u = TiedStack(nn.Linear(7, 7), 3), torch.randn(5, 7)
    prune_smallest(stack, {"layer": 0.3})
    assert torch.equal(stack.untied()(u), stack(u))


def test_a_pruned_network_is_saved_and_read(tmp_path, data):
    """Into one that was pruned otherwise: the masks come from the file, the state of the optimizer
    too, by the order of the parameters, and training goes on as if it had never stopped."""
    model, engine = small_mlp(), ENGINES["autograd"]
    optimizer = trained(model, data, engine)  # made before the pruning
    prune_smallest(model, {"layers.0": 0.3})
    trained(model, data, engine, optimizer)
    schedule = make_schedule("constant", optimizer, 1e-2, 1)
    save_checkpoint(tmp_path / "saved.pt", model, optimizer, schedule, {"round": 1})

    other = small_mlp(seed=1)
    prune_smallest(other, {"layers.0": 1})
    its_optimizer = adam(other)
    its_schedule = make_schedule("constant", its_optimizer, 1e-2, 1)
    progress = load_checkpoint(tmp_path / "saved.pt", other, its_optimizer, its_schedule)
    assert progress == {"round": 1}
    found = [key for key in other.state_dict() if key.startswith("layers.0")]
    assert found == [f"layers.0.{key}" for key in ("weight_orig", "bias", "weight_mask")]
    prune_smallest(model, {"layers.0": 0.1})
    prune_smallest(other, {"layers.0": 0.1})  # no forward pass since it was read
    assert kept_places(other.layers[0]) == kept_places(model.layers[0])
    assert parameters_left(other) == parameters_left(model) == 54 + 11 + 33 + 3
    for each, its in ((model, optimizer), (other, its_optimizer)):
        trained(each, data, engine, its, seed=7)
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_what_is_refused_and_that_it_changes_nothing():
    refuses("rounds must be at least 1, not 0", shares_kept, {"a": 0.5}, 0)
    for share in (0, 0.0, -0.1, 1.1, float("nan"), float("inf")):
        sentence = f"^the share of 3 must be above 0 and at most 1, not {share}$"
        refuses(sentence, shares_kept, {"0": 0.5, "3": share}, 2)
        model, fresh = network(), network()
        refuses(sentence, prune_smallest, model, {"0": 0.5, "3": share})
        assert list(model.state_dict()) == list(fresh.state_dict())  # nor is the first pruned
    for name, missing in (("7", "7"), ("conv", "conv"), ("1", "weight")):
        sentence = f"no attribute .{missing}"
        refuses(sentence, prune_smallest, network(), {name: 0.5}, error=AttributeError)
    layer = nn.Linear(7, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    for sentence, shares in (
        ("2 is a layer that has another name, too", {"0": 0.5, "2": 0.5}),
        (r"the share 0\.01 of 0 is none of its 35 weights", {"0": 0.01}),
    ):
        refuses(sentence, prune_smallest, model, shares)
    assert set(layer.state_dict()) == {"weight", "bias"}
    # weights that are pruned do not come back
    model, x = network(), images()
    prune_smallest(model, {"3": 0.2})
    before, z = model.state_dict(), model(x)
    refuses("", prune_smallest, model, {"3": -1})
    sentence = "^3 has 117 of 585 weights left, fewer than the share 0.5 that it is to keep$"
    refuses(sentence, prune_smallest, model, {"0": 0.5, "3": 0.5})
    assert list(model.state_dict()) == list(before)
    lose_track(model[3])  # the mask is still applied
    assert torch.equal(model(x), z)
