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
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from offline import go_offline
from PIL import Image
from properties import refuses
from test_data_faults import FAULTS, leftovers, not_found, one_bit, serving, stalled

from nn_backprop import data
from nn_backprop.data import download, files, unknown

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
REAL_SOURCES = dict(unknown.SOURCES)


DIGITS = data.load("digits").images[:300]


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


PLACES = {
    "Latin/character01/1_01": (1, 2, 50, 3), "Korean/character02/3_01": (4, 20, 18, 78),
    "Korean/character01/2_01": (60, 5, 38, 38), "Greek/character01/0_01": (40, 9, 3, 50),
}  # fmt: skip
OMNIGLOT = zipped({f"small/{name}.png": character(*place) for name, place in PLACES.items()}
                  | {"small/Korean/": b""})  # fmt: skip
CONTENTS = {  # as the real ones, but of fewer images
    "Omniglot 1": OMNIGLOT, "Omniglot 2": OMNIGLOT + b"\0", "notMNIST": idx(RAW),
    "Fashion-MNIST": idx(RAW[:2]), "KMNIST": idx(RAW[:3]),
    "EMNIST letters": zipped({"gzip/emnist-letters-train-images-idx3-ubyte.gz": idx(RAW[:1]),
                              "gzip/emnist-letters-test-images-idx3-ubyte.gz": idx(RAW[:5])}),
}  # fmt: skip


@pytest.fixture
def server():
    with serving({name.replace(" ", "_"): content for name, content in CONTENTS.items()}) as server:
        yield server


@pytest.fixture(autouse=True)
def small_sources(monkeypatch, server, tmp_path):
    go_offline(monkeypatch, tmp_path)
    for name, content in CONTENTS.items():
        source = unknown.SOURCES[name]._replace(
            official=files.Official(len(content), hashlib.sha256(content).hexdigest()),
            url=f"{server.url}/{name}".replace(" ", "_"),
        )
        monkeypatch.setitem(unknown.SOURCES, name, source)


def path_of(root: Path, name: str) -> Path:
    return root / "unknown" / unknown.SOURCES[name].file


def fill(root: Path) -> None:
    for name, content in CONTENTS.items():
        path_of(root, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(root, name).write_bytes(content)


def taken(names, root: Path | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The sets, and what was said."""
    said: list[str] = []
    return data.unknown_sets(names, DIGITS, 4, root, said.append), said


# Made from digits or from nothing


def test_a_made_set_has_the_form_of_the_digits_and_follows_its_seed():
    for name, make in unknown.MADE.items():
        before = DIGITS.clone()
        made = make(DIGITS, 5)
        assert made.shape == DIGITS.shape and made.dtype == torch.uint8, name
        assert torch.equal(DIGITS, before), name
        torch.manual_seed(8)
        assert torch.equal(made, make(DIGITS, 5)), name
        assert not torch.equal(made, make(DIGITS, 6)), name


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


def test_gaussian_digits_have_the_moments_of_the_digits_and_their_black():
    greys = torch.tensor([40, 120, 200, 70], dtype=torch.float64)  # far from the bounds
    steps = torch.tensor([[9, 3, 0, 0], [3, 9, 0, 0], [0, 0, 4, -2], [0, 0, -2, 4]]).double()
    normal = torch.randn(4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    images = (greys + normal @ steps).round().to(torch.uint8).view(-1, 1, 2, 2)
    made = data.gaussian_digits(images, 3).double().flatten(1)
    torch.testing.assert_close(made.mean(0), images.double().flatten(1).mean(0), rtol=0, atol=0.8)
    covariance = steps @ steps
    torch.testing.assert_close(made.T.cov(), covariance, rtol=0, atol=0.08 * covariance.max())
    corner = DIGITS[..., :14, :14]
    black = (corner == 0).flatten(1).all(0)
    assert 10 < black.sum() < 100
    assert not data.gaussian_digits(corner, 3).flatten(1)[:, black].any()


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


def test_what_is_in_the_files_is_taken_as_it_is_but_characters_made_up_and_letters_upright(
    tmp_path,
):
    fill(tmp_path)
    names = ["random pixels", "KMNIST", "EMNIST letters", "Omniglot 1", "notMNIST", "half digits"]
    sets, said = taken(names, tmp_path)
    assert list(sets) == names and not said
    for name, n in {"notMNIST": 7, "KMNIST": 3}.items():
        assert torch.equal(sets[name], torch.from_numpy(RAW[:n, None])), name
    letters = sets["EMNIST letters"]
    assert torch.equal(letters, torch.from_numpy(RAW[:5, None].transpose(0, 1, 3, 2)))
    assert letters.is_contiguous()
    # Rectangles of 38 x 38 and 18 x 78 pixels, widened to 40 x 40 and 20 x 80, halved and
    # quartered. Their middles, 9.5 and 2 or 9.5, come to lie at 14 but for the half pixel.
    expected = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    expected[0, 0, 4:24, 4:24] = 255
    expected[1, 0, 12:17, 4:24] = 255
    assert torch.equal(sets["Omniglot 1"], expected)  # by their names, without two alphabets
    mixed = sets["random pixels"].flatten(1).sort(1).values
    assert torch.equal(mixed, DIGITS.flatten(1).sort(1).values)
    assert ((sets["half digits"] == DIGITS) | (sets["half digits"] == 0)).all()


def test_the_root_is_found_as_that_of_mnist_is(monkeypatch, tmp_path):
    fill(tmp_path / "named")
    monkeypatch.setenv("NN_BACKPROP_DATA", str(tmp_path / "named"))
    assert list(taken(["KMNIST"], None)[0]) == ["KMNIST"]
    assert not (tmp_path / "named" / "unknown" / ".lock").exists()  # nothing was written
    (tmp_path / "file").touch()  # one that cannot be written is left for the cache
    sets, said = taken(["KMNIST"], tmp_path / "file")
    assert len(sets["KMNIST"]) == 3
    assert path_of(tmp_path / "cache" / "nn_backprop", "KMNIST").exists()
    assert said[0].startswith(f"KMNIST: {tmp_path / 'file'} cannot be written")
    refuses(r"no set 'MNIST-C': choose of .*half digits, .*KMNIST", taken, ["MNIST-C"], tmp_path)


# Missing, damaged, downloaded


def test_a_missing_set_is_downloaded_once(server, tmp_path):
    every = []
    for _ in range(2):
        sets, said = taken(CONTENTS, tmp_path)
        assert list(sets) == list(CONTENTS)
        every += said
    assert server.requests == {f"/{name}".replace(" ", "_"): 1 for name in CONTENTS}
    for name, content in CONTENTS.items():
        assert path_of(tmp_path, name).read_bytes() == content
        line = f"{name}: downloading {unknown.SOURCES[name].url} ({len(content):,} bytes)"
        assert every.count(line) == 1


def test_a_damaged_file_is_replaced(tmp_path):
    fill(tmp_path)
    path, good = path_of(tmp_path, "Omniglot 1"), CONTENTS["Omniglot 1"]
    for fault, spoil in FAULTS.items():
        path.write_bytes(spoil(good))
        problem = files.state(path, unknown.SOURCES["Omniglot 1"].official)
        sets, said = taken(["Omniglot 1"], tmp_path)
        assert len(sets["Omniglot 1"]) == 2 and path.read_bytes() == good, fault
        assert said[0] == f"Omniglot 1: {path} is {problem}; taking a good one instead"


def test_a_set_that_cannot_be_had_is_left_out_loudly(server, tmp_path):
    fill(tmp_path)
    path, names = path_of(tmp_path, "Omniglot 2"), ["uniform noise", "Omniglot 2", "notMNIST"]
    answers = (not_found, "HTTP Error 404: Not Found"), (one_bit, "wrong bytes (SHA-256 ")
    for local, before in (("truncated: 47 of", CONTENTS["Omniglot 2"][:47]), ("missing", None)):
        path.unlink()
        if before is not None:
            path.write_bytes(before)
        for answer, sentence in answers:
            server.answer = partial(answer, server)
            sets, said = taken(names, tmp_path)
            assert list(sets) == ["uniform noise", "notMNIST"]
            (loud,) = [line for line in said if line.startswith("***")]
            assert loud.startswith(f"*** Omniglot 2 is left out: {path} is {local}")
            for text in (sentence, unknown.SOURCES["Omniglot 2"].url, "put the file there"):
                assert text in loud
            assert "\n" not in loud and ". " not in loud
            assert (path.read_bytes() if path.exists() else None) == before
            assert leftovers(path.parent) == {item.name for item in path.parent.iterdir()}
            assert not list(tmp_path.rglob("*.part"))


def test_without_network_the_wait_is_one_for_all(server, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.2)
    monkeypatch.setattr(download, "QUIET_SECONDS", 0.3)
    server.answer = lambda handler, name: stalled(server, handler, name)
    sets, said = taken(CONTENTS, tmp_path)
    assert sets == {} and server.requests.total() <= 3
    loud = [line for line in said if line.startswith("***")]
    assert len(loud) == len(CONTENTS)
    assert "not tried, since no other address had answered" in loud[-1]


# The real ones


def test_no_source_is_for_training_and_for_testing_and_addresses_are_torchvisions():
    from torchvision.datasets import EMNIST, KMNIST, FashionMNIST, Omniglot

    both = [*data.UNKNOWN_FOR_TRAINING, *data.UNKNOWN_FOR_TESTING]
    assert sorted(both) == sorted([*unknown.MADE, *unknown.SOURCES])  # so each is there once
    images, letters = (
        "t10k-images-idx3-ubyte.gz",
        f"{Omniglot.download_url_prefix}/images_background",
    )
    for name, among in {
        "Fashion-MNIST": [mirror + images for mirror in FashionMNIST.mirrors],
        "KMNIST": [mirror + images for mirror in KMNIST.mirrors], "EMNIST letters": [EMNIST.url],
        "Omniglot 1": [f"{letters}_small1.zip"], "Omniglot 2": [f"{letters}_small2.zip"],
    }.items():  # fmt: skip
        assert REAL_SOURCES[name].url in among


@pytest.mark.slow
def test_the_real_files_are_white_on_black_and_omniglots_look_like_mnist():
    """MNIST's test images have the mean 0.1325 and the deviation 0.3105, and 81 % black."""
    sets = {}
    for name, n in (("Omniglot 1", 1720), ("Omniglot 2", 2120), ("notMNIST", 10_000)):
        source = REAL_SOURCES[name]
        path = Path(REAL_ROOT or "", "unknown", source.file)
        if not REAL_ROOT or not path.exists():
            pytest.skip(f"{name} is not in $NN_BACKPROP_DATA")
        assert files.state(path, source.official) == files.OK
        images = sets[name] = source.read(path)
        assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8
        if name == "notMNIST":  # its darkest corner is black in most: some are squares, and full
            corners = images[:, 0, ::27, ::27].flatten(1).amin(1)
            assert (corners < 30).double().mean() > 0.85
            continue
        greys = images[:, 0].double()
        assert (greys.amax((1, 2)) == 255).all() and (greys == 0).double().mean() > 0.7
        assert greys.mean() / 255 == pytest.approx(0.133, abs=0.01)
        assert greys.numpy().std() / 255 == pytest.approx(0.31, abs=0.01)
        inked = (greys.sum(1) > 0, greys.sum(2) > 0)  # by column, by row
        assert all((inks.sum(1) <= 20).all() for inks in inked)
    first, second = ({image.numpy().tobytes() for image in sets[f"Omniglot {k}"]} for k in (1, 2))
    assert not first & second
