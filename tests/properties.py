"""What is asked of many layers, networks and functions, as functions that raise AssertionError."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nn_backprop import backprop, check_gradients
from nn_backprop.check import Report
from nn_backprop.engines import disagreements

DTYPES = (torch.float64, torch.float32)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def product(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradient is y."""
    return (z * y).sum()


def passes_the_checker(target: Any, *inputs: Any, case: object = "", **options: Any) -> Report:
    """Of all gradients, and without a probe that failed."""
    report = check_gradients(target, *inputs, **options)
    assert report.ok and not [p for p in report.probes if p.outcome == "fail"], f"{case}: {report}"
    return report


@contextmanager
def about(*subject: object) -> Iterator[None]:
    """An error inside says which case of a loop it is about."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"of {', '.join(map(str, subject))}")
        raise


def names_checked(report: Report) -> set[str]:
    return {entry.name for entry in report.tensors}


def by_autograd(model: nn.Module, loss: Callable, x: Any, y: Any) -> tuple[Tensor, dict]:
    """The loss and the gradients, by name, that torch gives; left in `.grad` too."""
    model.zero_grad()
    value = loss(model(x), y)
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def same_gradients(
    model: nn.Module, loss: Callable, x: Any, y: Any, case: object = "", **tolerance: float
) -> dict:
    """The tape's are autograd's; returns autograd's."""
    value, grads = backprop(model, loss, (x,), y)
    expected, wanted = by_autograd(model, loss, x, y)
    assert_close(value, expected, msg=f"{case}: ".__add__)
    assert grads.keys() == wanted.keys(), case
    all_close(grads, wanted, case, **tolerance)
    return wanted


def all_close(
    found: dict, wanted: dict, case: object = "", rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=rtol, atol=atol, msg=f"{case} {name}: ".__add__)


def engines_agree(model: nn.Module, x: Tensor, y: Tensor, engines: Any = ("tape",)) -> None:
    """In float64, on copies: with autograd, and none is missing."""
    found = disagreements(model, x, y)
    assert set(found) == set(engines)
    assert max(max(distances.values()) for distances in found.values()) < 1e-13


def refuses(
    sentence: str, call: Callable, *arguments: Any, error: Any = ValueError, **named
) -> str:
    """The call raises with this pattern in its sentence, which is returned."""
    try:
        call(*arguments, **named)
    except error as raised:
        assert re.search(sentence, str(raised)), f"{sentence!r} is not in {str(raised)!r}"
        return str(raised)
    raise AssertionError(f"not refused, with {sentence!r}: {arguments} {named}")


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, type included, tensors in dicts and lists too."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
