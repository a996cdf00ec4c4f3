"""`models.without_zeros`, and the multiply-adds that `counting` leaves a pruned network."""

import io

import numpy as np
import torch
from torch.testing import assert_close

from nn_backprop.models import LeNet5, counting, lenet_300_100
from nn_backprop.models.without_zeros import in_sparse_rows, packed, packed_bytes
from nn_backprop.training import make_permanent, prune_smallest


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
    model = lenet_300_100()
    prune_smallest(model, {"layers.0": 0.05, "layers.1": 0.1, "layers.2": 0.5})
    for _ in range(2):  # with masks, and with zeros
        image = torch.randn(1, 1, 28, 28)
        assert counting.multiply_adds_left(model, image) == 11_760 + 3_000 + 500
        for batch in (1, 3):
            images = torch.randn(batch, 1, 28, 28)
            with torch.inference_mode():
                assert_close(in_sparse_rows(model)(images), model(images))
        make_permanent(model)

    convolutional = LeNet5()
    with torch.no_grad():
        for kernel in (convolutional.conv1.weight, convolutional.conv2.weight):
            kernel[3:] = 0
    whole = 24**2 * 3 * 25 + 8**2 * 3 * 20 * 25 + 800 * 500 + 5_000
    assert counting.multiply_adds_left(convolutional, image) == whole
