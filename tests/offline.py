"""A test's surroundings: no network, no MNIST, a cache of its own."""

import platformdirs

from nn_backprop.data import download

REFUSING = "http://127.0.0.1:9"  # the discard port: nothing listens there


def go_offline(monkeypatch, tmp_path, url: str = REFUSING) -> None:
    monkeypatch.delenv("NN_BACKPROP_DATA", raising=False)
    monkeypatch.setenv("NN_BACKPROP_MNIST_URL", url)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)


def quiet(line: str) -> None:
    """Says nothing."""
