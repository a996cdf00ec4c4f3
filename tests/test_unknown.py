"""Sets of images that are no digits: how they are made, found, verified, fetched and left out.

The table of sources is replaced by one of small files, served from this machine; the real files
are read where they are at hand.
"""

import gzip
import hashlib
import io
import os
import struct
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from offline import go_offline, quiet
from PIL import Image
from properties import refuses
from test_data_faults import FAULTS, leftovers, not_found, one_bit, serving, stalled

from nn_backprop import data
from nn_backprop.data import download, files, unknown

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
REAL_SOURCES = dict(unknown.SOURCES)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").images[:300]


def character(top: int, left: int, height: int, width: int) -> bytes:
    """A picture as Omniglot's, one bit a pixel, black on white: one filled rectangle."""
    pixels = np.full((105, 105), 255, dtype=np.uint8)
    pixels[top : top + height, left : left + width] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def idx(images: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())


RAW = np.random.default_rng(3).integers(256, size=(7, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def contents():
    """The six files by the name of the set: as the real ones, but of fewer images."""
    places = {
        "Latin/character01/1_01": (1, 2, 50, 3), "Korean/character02/3_01": (4, 20, 18, 78),
        "Korean/character01/2_01": (60, 5, 38, 38), "Greek/character01/0_01": (40, 9, 3, 50),
    }  # fmt: skip
    characters = {f"small/{name}.png": character(*place) for name, place in places.items()}
    omniglot = zipped(characters | {"small/Korean/": b""})
    letters = {"train": idx(RAW[:1]), "test": idx(RAW[:5])}
    return {
        "Omniglot 1": omniglot, "Omniglot 2": omniglot + b"\0", "notMNIST": idx(RAW),
        "Fashion-MNIST": idx(RAW[:2]), "KMNIST": idx(RAW[:3]), "EMNIST letters": zipped(
            {f"gzip/emnist-letters-{k}-images-idx3-ubyte.gz": v for k, v in letters.items()}),
    }  # fmt: skip


@pytest.fixture
def server(contents):
    with serving(contents) as server:
        yield server


@pytest.fixture(autouse=True)
def small_sources(monkeypatch, contents, server, tmp_path):
    go_offline(monkeypatch, tmp_path)
    for name, content in contents.items():
        source = unknown.SOURCES[name]._replace(
            official=files.Official(len(content), hashlib.sha256(content).hexdigest()),
            url=f"{server.url}/{name}".replace(" ", "_"),
        )
        monkeypatch.setitem(unknown.SOURCES, name, source)
        server.contents = server.contents | {name.replace(" ", "_"): content}


def path_of(root: Path, name: str) -> Path:
    return root / "unknown" / unknown.SOURCES[name].file


def fill(root: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        path_of(root, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(root, name).write_bytes(content)


# Made from digits or from nothing


def test_a_made_set_has_the_form_of_the_digits_and_follows_its_seed(digits):
    for name, make in unknown.MADE.items():
        before = digits.clone()
        made = make(digits, 5)
        assert made.shape == digits.shape and made.dtype == torch.uint8, name
        assert torch.equal(digits, before), name
        torch.manual_seed(8)
        assert torch.equal(made, make(digits, 5)), name
        assert not torch.equal(made, make(digits, 6)), name


def test_noise_is_uniform_or_gaussian_cut_off_at_black_and_white():
    black = torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)
    noise = data.uniform_noise(black, 1)
    counts = torch.bincount(noise.flatten(), minlength=256).double()
    expected = noise.numel() / 256
    assert ((counts - expected).abs() < 5 * expected**0.5).all()  # five standard deviations
    noise = data.gaussian_noise(black, 1)
    # Φ at ½, 254½ and 127½ of 255 greys
    shares = (noise == 0, 0.50078), (noise == 255, 1 - 0.84087), (noise < 128, 0.69146)
    for share, wanted in shares:
        assert share.double().mean().item() == pytest.approx(wanted, abs=0.003)


def test_gaussian_digits_have_the_moments_of_the_digits_and_their_black(digits):
    greys = torch.tensor([40, 120, 200, 70], dtype=torch.float64)  # far from the bounds
    steps = torch.tensor([[9, 3, 0, 0], [3, 9, 0, 0], [0, 0, 4, -2], [0, 0, -2, 4]]).double()
    normal = torch.randn(4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    images = (greys + normal @ steps).round().to(torch.uint8).view(-1, 1, 2, 2)
    made = data.gaussian_digits(images, 3).double().flatten(1)
    torch.testing.assert_close(made.mean(0), images.double().flatten(1).mean(0), rtol=0, atol=0.8)
    covariance = steps @ steps
    torch.testing.assert_close(made.T.cov(), covariance, rtol=0, atol=0.08 * covariance.max())

    black = (digits == 0).flatten(1).all(0)
    assert black.sum() > 10
    assert not data.gaussian_digits(digits, 3).flatten(1)[:, black].any()


def test_a_half_digit_is_one_of_the_four_halves():
    image = torch.arange(1, 5 * 7 + 1, dtype=torch.uint8).view(1, 5, 7)
    made = data.half_digits(image.expand(4000, 1, 5, 7), 0)
    for blank in (np.s_[2:], np.s_[:2], np.s_[:, 3:], np.s_[:, :3]):
        half = image.clone()
        half[0][blank] = 0
        share = (made == half).flatten(1).all(1).double().mean().item()
        assert share == pytest.approx(0.25, abs=0.035)  # five standard deviations
    assert (made != 0).flatten(1).sum(1).unique().tolist() == [14, 15, 20, 21]


# Read from files


def test_a_character_is_made_up_like_a_digit(digits, contents, tmp_path):
    fill(tmp_path, contents)
    made = data.unknown_sets(["Omniglot 1"], digits, 0, tmp_path)["Omniglot 1"]
    # Rectangles of 38 x 38 and 18 x 78 pixels, widened to 40 x 40 and 20 x 80, halved and
    # quartered. Their middles, 9.5 and 2 or 9.5, come to lie at 14 but for the half pixel.
    expected = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    expected[0, 0, 4:24, 4:24] = 255
    expected[1, 0, 12:17, 4:24] = 255
    assert torch.equal(made, expected)  # and in the order of their names, without two alphabets


def test_files_of_mnists_format_are_taken_as_they_are_but_letters_set_upright(
    digits, contents, tmp_path
):
    fill(tmp_path, contents)
    counts = {"notMNIST": 7, "Fashion-MNIST": 2, "KMNIST": 3}
    sets = data.unknown_sets([*counts, "EMNIST letters"], digits, 0, tmp_path)
    for name, n in counts.items():
        assert torch.equal(sets[name], torch.from_numpy(RAW[:n, None])), name
    letters = sets["EMNIST letters"]
    assert torch.equal(letters, torch.from_numpy(RAW[:5, None].transpose(0, 1, 3, 2)))
    assert letters.is_contiguous()


def test_sets_come_in_the_order_asked_for_and_of_the_digits_given(digits, contents, tmp_path):
    fill(tmp_path, contents)
    said: list[str] = []
    names = ["random pixels", "KMNIST", "half digits", "Omniglot 2", "uniform noise"]
    sets = data.unknown_sets(names, digits[7:20], 4, tmp_path, said.append)
    assert list(sets) == names and not said
    assert [len(images) for images in sets.values()] == [13, 3, 13, 2, 13]
    mixed, given = sets["random pixels"].flatten(1), digits[7:20].flatten(1)
    assert torch.equal(mixed.sort(1).values, given.sort(1).values)
    halves = sets["half digits"]
    assert ((halves == digits[7:20]) | (halves == 0)).all()


def test_the_root_is_found_as_that_of_mnist_is(digits, contents, monkeypatch, tmp_path):
    fill(tmp_path / "named", contents)
    monkeypatch.setenv("NN_BACKPROP_DATA", str(tmp_path / "named"))
    assert list(data.unknown_sets(["KMNIST"], digits, 0)) == ["KMNIST"]
    assert not (tmp_path / "named" / "unknown" / ".lock").exists()  # nothing was written
    sentence = r"no set 'MNIST-C': choose of uniform noise, .*KMNIST"
    refuses(sentence, data.unknown_sets, ["KMNIST", "MNIST-C"], digits, 0, say=quiet)


# Missing, damaged, downloaded


def test_a_missing_set_is_downloaded_once(digits, server, contents, tmp_path):
    said: list[str] = []
    for _ in range(2):
        sets = data.unknown_sets(contents, digits, 0, tmp_path, said.append)
        assert list(sets) == list(contents)
    assert server.requests == {f"/{name}".replace(" ", "_"): 1 for name in contents}
    for name, content in contents.items():
        assert path_of(tmp_path, name).read_bytes() == content
        line = f"{name}: downloading {unknown.SOURCES[name].url} ({len(content):,} bytes)"
        assert said.count(line) == 1


def test_a_damaged_file_is_replaced(digits, contents, tmp_path):
    fill(tmp_path, contents)
    path, good = path_of(tmp_path, "Omniglot 1"), contents["Omniglot 1"]
    for fault, spoil in FAULTS.items():
        path.write_bytes(spoil(good))
        problem = files.state(path, unknown.SOURCES["Omniglot 1"].official)
        said: list[str] = []
        sets = data.unknown_sets(["Omniglot 1"], digits, 0, tmp_path, said.append)
        assert len(sets["Omniglot 1"]) == 2 and path.read_bytes() == good, fault
        assert said[0] == f"Omniglot 1: {path} is {problem}; taking a good one instead"


def test_a_set_that_cannot_be_had_is_left_out_loudly(digits, server, contents, tmp_path):
    fill(tmp_path, contents)
    path, names = path_of(tmp_path, "Omniglot 2"), ["uniform noise", "Omniglot 2", "notMNIST"]
    answers = (not_found, "HTTP Error 404: Not Found"), (one_bit, "wrong bytes (SHA-256 ")
    for local, before in (("truncated: 47 of", contents["Omniglot 2"][:47]), ("missing", None)):
        path.unlink()
        if before is not None:
            path.write_bytes(before)
        for answer, sentence in answers:
            server.answer = partial(answer, server)
            said: list[str] = []
            sets = data.unknown_sets(names, digits, 0, tmp_path, said.append)
            assert list(sets) == ["uniform noise", "notMNIST"]
            (loud,) = [line for line in said if line.startswith("***")]
            assert loud.startswith(f"*** Omniglot 2 is left out: {path} is {local}")
            for text in (sentence, unknown.SOURCES["Omniglot 2"].url, "put the file there"):
                assert text in loud
            assert "\n" not in loud and ". " not in loud
            assert (path.read_bytes() if path.exists() else None) == before
            assert leftovers(path.parent) == {item.name for item in path.parent.iterdir()}
            assert not list(tmp_path.rglob("*.part"))


def test_without_network_the_wait_is_one_for_all(digits, server, contents, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.2)
    monkeypatch.setattr(download, "QUIET_SECONDS", 0.3)
    server.answer = lambda handler, name: stalled(server, handler, name)
    said: list[str] = []
    assert data.unknown_sets(contents, digits, 0, tmp_path, said.append) == {}
    assert server.requests.total() <= 3
    loud = [line for line in said if line.startswith("***")]
    assert len(loud) == len(contents)
    assert "not tried, since no other address had answered" in loud[-1]


def test_a_root_that_cannot_be_written_is_left_for_the_cache(digits, contents, tmp_path):
    (tmp_path / "file").touch()
    said: list[str] = []
    sets = data.unknown_sets(["KMNIST"], digits, 0, tmp_path / "file", said.append)
    assert len(sets["KMNIST"]) == 3
    assert path_of(tmp_path / "cache" / "nn_backprop", "KMNIST").exists()
    assert said[0].startswith(f"KMNIST: {tmp_path / 'file'} cannot be written")


# The real ones


def test_no_source_is_for_training_and_for_testing():
    both = [*data.UNKNOWN_FOR_TRAINING, *data.UNKNOWN_FOR_TESTING]
    assert sorted(both) == sorted([*unknown.MADE, *unknown.SOURCES])  # so each is there once


def test_addresses_are_torchvisions_where_it_has_them():
    from torchvision.datasets import EMNIST, KMNIST, FashionMNIST, Omniglot

    images = "t10k-images-idx3-ubyte.gz"
    for name, kind in (("Fashion-MNIST", FashionMNIST), ("KMNIST", KMNIST)):
        assert REAL_SOURCES[name].url in [f"{mirror}{images}" for mirror in kind.mirrors]
    assert REAL_SOURCES["EMNIST letters"].url == EMNIST.url
    for n in (1, 2):
        archive = f"{Omniglot.download_url_prefix}/images_background_small{n}.zip"
        assert REAL_SOURCES[f"Omniglot {n}"].url == archive


@cache
def real(name: str) -> torch.Tensor:
    """The images of the real file; the test is skipped where that is not at hand."""
    source = REAL_SOURCES[name]
    path = Path(REAL_ROOT or "", "unknown", source.file)
    if not REAL_ROOT or not path.exists():
        pytest.skip(f"{name} is not in $NN_BACKPROP_DATA")
    assert files.state(path, source.official) == files.OK
    return source.read(path)


@pytest.mark.parametrize(("name", "n"), [("Omniglot 1", 1720), ("Omniglot 2", 2120)])
def test_omniglot_looks_like_mnist(name, n):
    images = real(name)
    assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8
    greys = images[:, 0].double()
    assert (greys.amax((1, 2)) == 255).all()
    assert (greys == 0).double().mean() > 0.7  # MNIST: 0.81
    # MNIST's test images have 0.1325 and 0.3105.
    assert greys.mean() / 255 == pytest.approx(0.133, abs=0.01)
    assert greys.numpy().std() / 255 == pytest.approx(0.31, abs=0.01)
    where = torch.arange(28.0, dtype=torch.float64)
    for along in (1, 2):
        ink = greys.sum(along)  # by column, by row
        middle = ink @ where / ink.sum(1)
        inked = ink > 0
        first, last = inked.int().argmax(1), 27 - inked.flip(1).int().argmax(1)
        assert (last - first < 20).all()
        off = (middle - 14).abs() > 0.5 + 0.01  # the greys are rounded after the mass is found
        assert (((first == 0) | (last == 27)) | ~off).all()  # but where the image would not hold it
        assert off.sum() <= 3


def test_no_image_is_in_both_parts_of_omniglot():
    parts = [real(f"Omniglot {n}").flatten(1) for n in (1, 2)]
    first, second = ({image.numpy().tobytes() for image in part} for part in parts)
    assert not first & second


def test_not_mnist_is_white_on_black():
    images = real("notMNIST")
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.uint8
    # The blackest of its corners is black in most letters: some are squares, which fill the image.
    corners = images[:, 0, ::27, ::27].flatten(1).amin(1)
    assert (corners < 30).double().mean() > 0.85
