"""What can be wrong with the four MNIST files, the folders and the network; each is survived.

The table of official files is replaced by one of small files, served from this machine.
"""

import gzip
import hashlib
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product as every
from pathlib import Path

import platformdirs
import pytest
import torch
from file_server import (
    FAULTS,
    Server,
    body,
    endless,
    half,
    leftovers,
    not_found,
    one_bit,
    serving,
    stalled,
    stalled_half_way,
)
from offline import go_offline, quiet
from properties import about, refuses

from nn_backprop.data import DataError, download, files, load, loading, prepare, repair, verify

TRAIN, TEST, VALIDATION = 23, 13, 5
IMAGES = "train-images-idx3-ubyte"
ALL_OK = {name: "ok" for name in files.NAMES}


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """The eight files by name: as the official ones, but of fewer images."""
    pixels, plain = torch.Generator().manual_seed(3), {}
    for split, n in (("train", TRAIN), ("t10k", TEST)):
        noise = torch.randint(256, (n * 28 * 28,), generator=pixels, dtype=torch.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28)
        plain[f"{split}-images-idx3-ubyte"] = header + noise.numpy().tobytes()
        header = struct.pack(">4BI", 0, 0, 8, 1, n)
        plain[f"{split}-labels-idx1-ubyte"] = header + bytes(i % 10 for i in range(n))
    return plain | {f"{name}.gz": gzip.compress(data) for name, data in plain.items()}


@pytest.fixture
def server(contents):
    with serving(contents) as server:
        yield server


@pytest.fixture(autouse=True)
def small_official_files(monkeypatch, contents, server, tmp_path):
    go_offline(monkeypatch, tmp_path, server.url)
    for name, data in contents.items():
        facts = files.Official(len(data), hashlib.sha256(data).hexdigest())
        monkeypatch.setitem(files.OFFICIAL, name, facts)
    monkeypatch.setattr(loading, "MNIST_VALIDATION", VALIDATION)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def fill(root: Path, contents: dict[str, bytes], suffix: str = "") -> Path:
    """Write the four files, plain or .gz, under root; return the folder they are in."""
    raw = files.raw_folder(root)
    raw.mkdir(parents=True, exist_ok=True)
    for name in files.NAMES:
        (raw / f"{name}{suffix}").write_bytes(contents[f"{name}{suffix}"])
    return raw


@contextmanager
def unchanged(root: Path):
    def tree() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}

    before = tree()
    yield
    assert tree() == before


def patience(monkeypatch, attempt: float, quiet: float) -> None:
    """Sets how long an attempt, and all of them together, may take without a byte."""
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", attempt)
    monkeypatch.setattr(download, "QUIET_SECONDS", quiet)


# Faults of files


def test_good_files_are_used_without_network(server, contents, tmp_path):
    for suffix in ("", ".gz"):
        root = tmp_path / f"root{suffix}"
        fill(root, contents, suffix)
        with nullcontext() if suffix else unchanged(root):  # not even a lock
            data = load("mnist", root, say=quiet)
        assert data.images.shape == (TRAIN + TEST, 1, 28, 28)
        assert data.images[1, 0].numpy().tobytes() == contents[IMAGES][16 + 784 : 16 + 2 * 784]
        assert data.images[-1, 0].numpy().tobytes() == contents["t10k-images-idx3-ubyte"][-784:]
        assert data.labels.tolist() == [i % 10 for n in (TRAIN, TEST) for i in range(n)]
        assert data.test.tolist() == list(range(TRAIN, TRAIN + TEST))
        assert sorted(torch.cat([data.train, data.validation]).tolist()) == list(range(TRAIN))
        assert len(data.validation) == VALIDATION
    assert not server.requests


def test_verify_names_each_problem_and_writes_nothing(server, contents, tmp_path):
    raw = fill(tmp_path, contents)
    (raw / IMAGES).write_bytes(contents[IMAGES][:47])
    (raw / "train-labels-idx1-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(contents["t10k-images-idx3-ubyte.gz"])
    (raw / "t10k-labels-idx1-ubyte").write_bytes(contents["t10k-labels-idx1-ubyte"] + b"0")
    with unchanged(tmp_path):
        assert verify(tmp_path) == {
            IMAGES: f"truncated: 47 of {len(contents[IMAGES]):,} bytes",
            "train-labels-idx1-ubyte": "missing",
            "t10k-images-idx3-ubyte": "not extracted (archive beside it is good)",
            "t10k-labels-idx1-ubyte": f"too long: {TEST + 9} instead of {TEST + 8} bytes",
        }
    assert not server.requests


def test_a_bad_file_is_repaired(server, contents, tmp_path):
    for (fault, spoil), archive in every(FAULTS.items(), ("good", "none", "bad")):
        root, case = tmp_path / f"{fault} {archive}", (fault, archive)
        raw = fill(root, contents)
        (raw / IMAGES).write_bytes(spoil(contents[IMAGES]))
        if archive != "none":
            data = contents[f"{IMAGES}.gz"]
            (raw / f"{IMAGES}.gz").write_bytes(data if archive == "good" else data[:-5])
        said: list[str] = []
        server.requests.clear()
        problem = verify(root)[IMAGES]
        assert prepare(root, said.append) == root
        assert verify(root) == ALL_OK, case
        assert server.requests == ({} if archive == "good" else {f"/{IMAGES}.gz": 1}), case
        assert f"MNIST: {raw / IMAGES} is {problem}; taking a good one instead" in said, case
        assert not leftovers(raw), case


def test_what_a_killed_process_left_is_cleared_and_what_torchvision_left_is_not_taken(
    contents, tmp_path
):
    raw = fill(tmp_path, contents)
    (raw / IMAGES).unlink()
    for name in (f"{IMAGES}.part", f"{IMAGES}.gz.part"):
        (raw / name).write_bytes(contents[IMAGES][:100])
    processed = tmp_path / "MNIST" / "processed"  # where old versions kept theirs, unverified
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        wrong = torch.zeros(TRAIN, 28, 28, dtype=torch.uint8), torch.zeros(TRAIN, dtype=torch.int64)
        torch.save(wrong, processed / name)
    assert load("mnist", tmp_path).images.any()
    assert verify(tmp_path) == ALL_OK and not leftovers(raw)


# Faults of the network


def test_two_at_once_fetch_each_file_once_and_keep_it_for_repairs(server, tmp_path):
    """The lock is of a file, and holds between threads as it does between processes."""

    def slowly(handler, name):
        server.over.wait(0.1)
        server.send(handler, name)

    server.answer = slowly
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: prepare(tmp_path, said.append), range(2)))
    assert server.requests == {f"/{name}.gz": 1 for name in files.NAMES}
    assert any(f"downloading {server.url}/{IMAGES}.gz" in line for line in said)
    (files.raw_folder(tmp_path) / IMAGES).write_bytes(b"")
    prepare(tmp_path, quiet)
    assert verify(tmp_path) == ALL_OK and server.requests.total() == 4


def test_a_bad_answer_is_named_and_harms_nothing(server, contents, tmp_path, monkeypatch):
    patience(monkeypatch, 0.3, 0.5)
    raw = fill(tmp_path, contents)
    (raw / IMAGES).write_bytes(contents[IMAGES][:47])
    for answer, sentence in (
        (not_found, "HTTP Error 404: Not Found"),
        (half, r"truncated: [\d,]+ of [\d,]+ bytes"),
        (body(lambda right: b"<html>Please log in</html>"), "truncated: 26 of [0-9,]+ bytes"),
        (one_bit, "wrong bytes"),
        (endless, "too long"),
        (stalled, "nothing arrived for|timed out"),
        (stalled_half_way, "nothing arrived for|timed out"),
    ):
        server.answer = partial(answer, server)
        with about(answer), unchanged(raw):
            said = refuses(sentence, prepare, tmp_path, quiet, error=DataError)
        assert f"{raw / IMAGES} is truncated: 47 of" in said
        assert f"{server.url}/{IMAGES}.gz" in said
    assert server.hung_up.wait(5)  # on the endless one, when it was given up


def test_a_refused_connection_is_tried_again_and_named(monkeypatch, tmp_path):
    said: list[str] = []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("NN_BACKPROP_MNIST_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        sentence = "missing and could not be .* Connection refused"
        refuses(sentence, prepare, tmp_path, said.append, error=DataError)
    assert sum("downloading" in line for line in said) == download.ROUNDS


def test_after_a_failure_it_is_tried_again_and_the_mirror_that_works_is_asked_first(
    server, monkeypatch, tmp_path
):
    def flaky(handler, name):
        bad = "/bad/" in handler.path or server.requests.total() == 1
        (not_found if bad else Server.send)(server, handler, name)

    server.answer = flaky
    prepare(tmp_path / "one", quiet)
    assert verify(tmp_path / "one") == ALL_OK and server.requests[f"/{IMAGES}.gz"] == 2

    monkeypatch.setenv("NN_BACKPROP_MNIST_URL", f"{server.url}/bad/ {server.url}/good")
    prepare(tmp_path / "two", quiet)
    assert verify(tmp_path / "two") == ALL_OK
    assert sum(n for path, n in server.requests.items() if "/bad/" in path) == 1

    from torchvision.datasets import MNIST

    monkeypatch.delenv("NN_BACKPROP_MNIST_URL")
    assert download.mirrors() == MNIST.mirrors
    assert download.mirrors() is not MNIST.mirrors  # ours is reordered


def test_many_silent_mirrors_share_one_deadline_and_so_does_a_silent_name_server(
    server, monkeypatch, tmp_path
):
    patience(monkeypatch, 0.25, 0.6)
    monkeypatch.setenv("NN_BACKPROP_MNIST_URL", " ".join(f"{server.url}/{i}" for i in range(11)))
    server.answer = partial(stalled, server)
    refuses("", prepare, tmp_path, quiet, error=DataError)
    assert server.requests.total() <= 3

    def never(*args, **kwargs):
        server.over.wait(10)
        raise OSError("the name server was waited for")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    refuses("nothing arrived for", prepare, tmp_path, quiet, error=DataError)


def test_a_slow_download_that_progresses_is_neither_cut_nor_the_last(server, monkeypatch, tmp_path):
    patience(monkeypatch, 0.6, 0.7)

    def slow(handler, name):
        data = server.contents[name]
        server.send_body(handler, b"", len(data))
        if name != f"{IMAGES}.gz":
            handler.wfile.write(data)
            return
        step = len(data) // 10 + 1
        end = len(data) - 1 if server.requests.total() == 1 else len(data)
        for start in range(0, end, step):  # 1 s in all
            handler.wfile.write(data[start : min(start + step, end)])
            server.over.wait(0.1)

    server.answer = slow
    prepare(tmp_path, quiet)
    assert verify(tmp_path) == ALL_OK and server.requests[f"/{IMAGES}.gz"] == 2


def test_an_interrupted_download_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(url: str, patience: float) -> Iterator[bytes]:
        yield b"some bytes"
        assert leftovers(files.raw_folder(tmp_path)) == {f"{IMAGES}.gz.part"}
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, quiet)
    assert not list(files.raw_folder(tmp_path).iterdir())


def test_a_lock_that_is_never_released_is_named(server, monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(repair, "LOCK_SECONDS", 0.1)
    lock = tmp_path / "MNIST" / ".lock"
    lock.parent.mkdir()
    said: list[str] = []
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sentence = f"another process has held {lock}"
        refuses(sentence, prepare, tmp_path, said.append, error=DataError)
    assert said == [f"MNIST: waiting for another process, which holds {lock}"]
    assert not server.requests


# Folders that cannot be written


@contextmanager
def unprivileged() -> Iterator[None]:
    """For the superuser, permissions hold only in another user's name."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_root_is_read_and_archives_in_it_are_extracted_into_the_cache(
    server, contents, monkeypatch
):
    from torchvision.datasets import MNIST  # noqa: F401  # before the privileges go

    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own is closed to other users
        top = Path(name)
        (top / "cache").mkdir()
        top.chmod(0o755)
        (top / "cache").chmod(0o777)
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: top / "cache" / name)
        cache = top / "cache" / "nn_backprop"
        for suffix in ("", ".gz"):
            root = top / f"root{suffix}"
            fill(root, contents, suffix)
            for path in [root, *root.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
            said: list[str] = []
            with unchanged(root), unprivileged():
                data = load("mnist", root, say=said.append)
            assert len(data.images) == TRAIN + TEST and not server.requests
            assert data.reason == f"MNIST found in {cache if suffix else root}"
            assert cache.exists() is bool(suffix)
            cannot = f"MNIST: {root} cannot be written (Permission denied); trying elsewhere"
            assert (cannot in said) is bool(suffix)
        for path in top.rglob("root*/**"):
            path.chmod(0o755)


def test_a_root_that_is_no_folder_is_left_for_the_cache_and_a_full_disk_is_named(
    contents, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    assert prepare(tmp_path / "file", quiet) == tmp_path / "cache" / "nn_backprop"

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "replace", full)
    root = tmp_path / "other"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "more" / name)
    sentence = f"{root} cannot be written .No space left on device"
    refuses(sentence, prepare, root, quiet, error=DataError)
