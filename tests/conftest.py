"""Under pytest alone, every call into the rules is checked against the shapes they declare."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and NumPy ask, here and in children

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before anything imports nn_backprop: a module that is loaded already is no longer checked.
# The configuration lets an int stand for a float, as type checkers do.
jaxtyping.install_import_hook(
    "nn_backprop.rules", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

torch.set_num_threads(1)  # small tensors: threads would cost more than they save

# The same examples in every run, without a clock and without a folder of past ones.
settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def strict_diagnosis():
    """A family of hypotheses that raises is a mistake in it, and fails the test."""
    from nn_backprop.check.diagnosis import guard

    guard.STRICT = True


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty working directory, no network, no MNIST, a cache of the test's own."""
    from offline import go_offline

    go_offline(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # or tyro breaks its lines anywhere


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes up to four processors; a path keeps to one, and so does -n 0."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    worker = hasattr(config, "workerinput")
    if whole and not worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = "logical"  # "auto" counts two threads of a core as one
        config.option.maxprocesses = config.option.maxprocesses or 4
        if config.option.dist == "no":
            config.option.dist = "worksteal"  # some tests take a hundred times as long as others


def _has_mnist(root: str | None) -> bool:
    """Whether each of the four files is there, extracted or not. What is in them, tests say."""
    files = [f"{part}-{kind}" for part in ("train", "t10k")
             for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]  # fmt: skip
    raw = Path(root or "", "MNIST", "raw").expanduser()
    return bool(root) and all((raw / f).exists() or (raw / f"{f}.gz").exists() for f in files)


HAS_MNIST = _has_mnist(os.environ.get("NN_BACKPROP_DATA"))  # now: tests hide the variable


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_mnist") and not HAS_MNIST:
        pytest.skip("$NN_BACKPROP_DATA names no folder with the four files in MNIST/raw")
