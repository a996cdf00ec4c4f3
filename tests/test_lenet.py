"""The networks that are pruned, by Han's shares; what they come to without their zeros."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from properties import all_close, by_autograd, engines_agree, same_gradients
from torch import nn
from torch.testing import assert_close

from nn_backprop import models
from nn_backprop.engines import ENGINES, for_training
from nn_backprop.models import counting
from nn_backprop.models.lenet import KEPT
from nn_backprop.models.without_zeros import in_sparse_rows, packed, packed_bytes
from nn_backprop.training import make_permanent, parameters_left, prune_smallest

NETWORKS = {
    models.lenet_300_100: KEPT["LeNet-300-100"],
    models.LeNet5: KEPT["LeNet-5"],
    models.tied_network: {"input": 0.08, "stack.layer": 0.3},
    models.untied_network: {"input": 0.08, "stack.layers.1": 0.3},
}


def test_the_lenets():
    """Their sizes and multiply-adds, and that the convolutions have no activation but the pool."""
    x, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 9])
    torch.manual_seed(0)
    mlp, cnn = (models.MODELS[name]() for name in ("lenet-300-100", "lenet-5"))
    a, b, c = mlp.layers
    pool = nn.MaxPool2d(2)
    for model, plain, parameters, cost in (
        (mlp, (nn.Flatten(), a, nn.ReLU(), b, nn.ReLU(), c),
         784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10, 784 * 300 + 300 * 100 + 100 * 10),
        (cnn, (cnn.conv1, pool, cnn.conv2, pool, nn.Flatten(), cnn.hidden, nn.ReLU(), cnn.output),
         (25 + 1) * 20 + (20 * 25 + 1) * 50 + (50 * 16 + 1) * 500 + (500 + 1) * 10,
         24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10),
    ):  # fmt: skip
        assert counting.parameters(model) == parameters_left(model) == parameters
        assert counting.multiply_adds(model, x) == 3 * cost
        assert torch.equal(model(x), nn.Sequential(*plain)(x))
    assert (counting.parameters(mlp), counting.parameters(cnn)) == (266_610, 431_080)
    z = cnn(x)
    assert z.shape == (3, 10)
    assert (F.max_pool2d(cnn.conv1(x), 2) < 0).any()  # so a ReLU there would be seen
    assert_close(cnn.loss(z, y), -z.log_softmax(1)[torch.arange(3), y].mean())
    assert_close(cnn.probabilities(z), z.softmax(1))


def test_hans_shares_add_up_to_his_totals():
    """22 and 36 thousand parameters are left, a twelfth: his table 1. He counts no biases."""
    for make, weights, thousands, biases in (
        (models.lenet_300_100, [18_816, 2_700, 260], 22, 410),
        (models.LeNet5, [330, 3_000, 32_000, 950], 36, 580),
    ):
        model, x = make(), torch.randn(1, 1, 28, 28)
        before, cost = counting.parameters(model), counting.multiply_adds(model, x)
        prune_smallest(model, NETWORKS[make])
        masks = [m.weight_mask for m in model.modules() if hasattr(m, "weight_mask")]
        assert [int(mask.sum()) for mask in masks] == weights
        assert round(sum(weights) / 1000) == thousands and round(before / sum(weights)) == 12
        assert parameters_left(model) == sum(weights) + biases
        assert counting.parameters(model) == before  # torch still holds and multiplies all of them
        assert counting.multiply_adds(model, x) == cost


def test_the_tape_has_autograds_gradients_and_what_is_pruned_gets_0():
    for make, kept in NETWORKS.items():
        torch.manual_seed(0)
        model, x, y = make().double(), torch.randn(3, 1, 28, 28).double(), torch.tensor([1, 0, 9])
        prune_smallest(model, kept)
        wanted = same_gradients(model, model.loss, x, y, make)
        wanted = {name: grad.clone() for name, grad in wanted.items()}
        for name in kept:
            dropped, grad = (
                model.get_submodule(name).weight_mask == 0,
                wanted[f"{name}.weight_orig"],
            )
            assert not grad[dropped].any() and grad[~dropped].any(), (make, name)
        replayed = for_training("tape")(model, x, y)
        assert_close(replayed, model.loss(model(x), y).detach())
        all_close({name: p.grad for name, p in model.named_parameters()}, wanted, make)


def test_lenet_300_100_by_hand():
    """The chain rule by hand knows no mask: it follows once the zeros are permanent."""
    torch.manual_seed(0)
    model, x, y = models.lenet_300_100(), torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 9])
    prune_smallest(model, KEPT["LeNet-300-100"])
    model.loss(model(x), y).backward()
    make_permanent(model)
    engines_agree(model, x, y, ["tape", "by-hand"])
    expected, wanted = by_autograd(model, model.loss, x, y)
    for engine in (ENGINES["by-hand"], for_training("by-hand")):
        model.zero_grad()
        assert_close(engine(model, x, y), expected)
        found = {name: p.grad for name, p in model.named_parameters()}
        all_close(found, wanted, rtol=1e-4, atol=1e-6)


# --- without zeros ---


def test_packed_arrays_restore_the_weights():
    generator = np.random.default_rng(0)
    sparse = generator.normal(size=(7, 5)) * (generator.random((7, 5)) < 0.3)
    arrays = {"weight": sparse, "bias": generator.normal(size=3)}
    found = packed(arrays)
    assert set(found) == {"weight", "weight there", "bias"} and found["bias"] is arrays["bias"]
    assert found["weight there"].nbytes == 5  # 35 bits
    restored = np.zeros(35)
    restored[np.unpackbits(found["weight there"], count=35) == 1] = found["weight"]
    np.testing.assert_array_equal(restored.reshape(7, 5), sparse)
    file = io.BytesIO()
    np.savez_compressed(file, **found)
    assert packed_bytes(arrays) == len(file.getvalue())


def test_a_pruned_network_in_sparse_rows_and_its_multiply_adds():
    torch.manual_seed(0)
    model = models.lenet_300_100()
    prune_smallest(model, {"layers.0": 0.05, "layers.1": 0.1, "layers.2": 0.5})
    for _ in range(2):  # with masks, and with zeros
        image = torch.randn(1, 1, 28, 28)
        assert counting.multiply_adds_left(model, image) == 11_760 + 3_000 + 500
        for batch in (1, 3):
            images = torch.randn(batch, 1, 28, 28)
            with torch.inference_mode():
                assert_close(in_sparse_rows(model)(images), model(images))
        make_permanent(model)

    convolutional = models.LeNet5()
    with torch.no_grad():
        for kernel in (convolutional.conv1.weight, convolutional.conv2.weight):
            kernel[3:] = 0
    whole = 24**2 * 3 * 25 + 8**2 * 3 * 20 * 25 + 800 * 500 + 5_000
    assert counting.multiply_adds_left(convolutional, image) == whole
