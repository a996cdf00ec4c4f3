"""Under pytest alone, every call into the rules is checked against the shapes they declare."""

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
