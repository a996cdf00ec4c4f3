"""The data sets as the training loop sees them, and what is said when MNIST cannot be had."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from offline import REFUSING, quiet
from properties import refuses

from nn_backprop.data import DataError, ImageData, channels_last, data_root, files, load

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def check_layout(data: ImageData, sizes: tuple[int, int, int]):
    n = sum(sizes)
    assert data.images.shape == (n, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.labels.shape == (n,) and data.labels.dtype == torch.int64
    splits = (data.train, data.validation, data.test)
    assert tuple(map(len, splits)) == sizes
    assert torch.equal(torch.cat(splits).sort().values, torch.arange(n))  # disjoint, and all
    pixels = data.images[data.train].numpy().astype(np.uint16)
    mean, square = (x.sum(dtype=np.int64) / x.size for x in (pixels, pixels**2))  # exact sums
    assert data.mean == pytest.approx(mean / 255, rel=1e-12)
    assert data.std == pytest.approx((square - mean**2) ** 0.5 / 255, rel=1e-12)
    for split in splits:
        assert len(data.labels[split].unique()) == 10


def test_digits(digits):
    check_layout(digits, (1197, 300, 300))
    assert (digits.name, digits.reason) == ("digits", "asked for")
    # Bilinear interpolation, written as hat functions around the centres of the 8 x 8 pixels.
    from sklearn.datasets import load_digits

    original = load_digits()
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    hats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    expected = hats @ original.images @ hats.T * 255 / 16
    np.testing.assert_allclose(digits.images[:, 0].numpy(), expected, rtol=0, atol=0.5 + 1e-9)
    assert digits.labels.tolist() == original.target.tolist()
    torch.manual_seed(2)
    again = load("digits")
    assert torch.equal(again.train, digits.train) and torch.equal(again.test, digits.test)
    # Published numbers depend on this split: a torch that permutes otherwise must be noticed.
    assert digits.train[:5].tolist() == [1276, 300, 672, 854, 45]


def test_a_batch_is_normalised_and_moved_whole(digits):
    indices = torch.tensor([1276, 3, 3])
    before = digits.images.clone()
    for dtype in (torch.float32, torch.float64):
        images, labels = digits.batch(indices, dtype)
        expected = (before[indices].double() / 255 - digits.mean) / digits.std
        torch.testing.assert_close(images, expected.to(dtype))
        assert images.shape == (3, 1, 28, 28)
        assert labels.tolist() == digits.labels[indices].tolist()
        torch.testing.assert_close(digits.normalise(before[indices], dtype), images)
    assert torch.equal(digits.images, before)
    images, _ = digits.batch(digits.train, torch.float64)
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.numpy().var() == pytest.approx(1, rel=1e-12)

    moved = digits.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.is_meta for tensor in tensors)
    assert (moved.mean, moved.name) == (digits.mean, "digits")


def test_data_root_takes_the_option_then_the_variable_then_the_cache(monkeypatch, tmp_path):
    assert data_root() == tmp_path / "cache" / "nn_backprop"
    monkeypatch.setenv("NN_BACKPROP_DATA", "~/from-variable")
    assert data_root() == Path.home() / "from-variable"
    assert data_root("from-option") == Path("from-option")
    monkeypatch.setenv("NN_BACKPROP_DATA", "")
    assert data_root() == tmp_path / "cache" / "nn_backprop"


def test_auto_says_that_it_takes_the_digits_and_why(digits, tmp_path):
    said: list[str] = []
    data = load("auto", tmp_path, say=said.append)
    assert data.name == "digits" and torch.equal(data.images, digits.images)
    why = [f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte is missing", "Connection refused"]
    how = [f"put the four files, plain or .gz, into {tmp_path}/MNIST/raw", "$NN_BACKPROP_DATA"]
    for text in ["MNIST could not be had", REFUSING, *why, *how]:
        assert text in data.reason
    assert f"*** {data.reason}" in said
    assert "embedded digits" in said[-1]


def test_mnist_fails_in_one_sentence(tmp_path):
    sentence = refuses("", load, "mnist", tmp_path, say=quiet, error=DataError)
    assert "\n" not in sentence and ". " not in sentence
    for text in (f"{REFUSING}/train-images-idx3-ubyte.gz", "Connection refused"):
        assert text in sentence
    assert "--" not in sentence  # whose options are the command's to tell
    refuses("no data set 'cifar': choose auto, mnist or digits", load, "cifar", error=DataError)


def test_a_torchvision_built_for_another_torch_gives_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"nms does not exist.*both from the same index"):
        load("mnist", tmp_path)
    data = load("auto", tmp_path, say=lambda line: None)
    assert data.name == "digits" and "both from the same index" in data.reason


def test_the_table_lists_what_torchvision_lists():
    from torchvision.datasets import MNIST

    archives = {name for name, _ in MNIST.resources}
    assert set(files.OFFICIAL) == archives | {name.removesuffix(".gz") for name in archives}


@pytest.mark.needs_mnist
def test_real_mnist():
    from torchvision.datasets import MNIST

    data = load("mnist", REAL_ROOT)
    check_layout(data, (55_000, 5_000, 10_000))
    assert data.name == "mnist" and data.reason.startswith("MNIST found in ")
    assert (round(data.mean, 3), round(data.std, 3)) == (0.131, 0.308)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]  # the official order
    assert data.test.tolist() == list(range(60_000, 70_000))
    for name, md5 in MNIST.resources:
        archive = Path(REAL_ROOT, "MNIST", "raw", name)
        if archive.exists():
            assert hashlib.md5(archive.read_bytes()).hexdigest() == md5
            assert files.state(archive) == files.OK


def test_channels_last_keeps_the_images_and_sets_the_strides():
    for channels in (1, 3):
        images = torch.randn(2, channels, 5, 7)
        last = channels_last(images)
        assert torch.equal(last, images)
        assert last.stride() == (35 * channels, 1, 7 * channels, channels)
