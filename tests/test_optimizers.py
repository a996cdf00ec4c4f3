"""The optimizers that spare the bookkeeping: torch's own arithmetic, torch's own state."""

import copy
from itertools import product as every

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from nn_backprop.training import LeanAdamW, LeanSGD, make_optimizer, make_schedule

SETTINGS = [
    (LeanSGD, SGD, {"lr": 0.1}),
    (LeanSGD, SGD, {"lr": 0.1, "weight_decay": 0.2}),
    (LeanSGD, SGD, {"lr": 0.1, "momentum": 0.9}),
    (LeanSGD, SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    (LeanSGD, SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (LeanSGD, SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (LeanSGD, SGD, {"lr": 0.1, "maximize": True}),
    (LeanAdamW, AdamW, {"lr": 0.1}),
    (LeanAdamW, AdamW, {"lr": 0.1, "weight_decay": 0.2, "betas": (0.7, 0.95), "eps": 1e-3}),
    (LeanAdamW, AdamW, {"lr": 0.1, "amsgrad": True}),
]


def steps(optimizer, parameters, first: int, last: int) -> None:
    for n in range(first, last):
        generator = torch.Generator().manual_seed(n)
        for parameter in parameters:
            parameter.grad = torch.randn(
                parameter.shape, dtype=parameter.dtype, generator=generator
            )
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (n + 1)  # as a schedule does
        optimizer.step()


def test_equals_torchs():
    for (lean, plain, options), sizes in every(SETTINGS, [(7,), (7, 5)]):  # one parameter, and two
        mine = [nn.Parameter(torch.linspace(-1, 1, size).double()) for size in sizes]
        theirs = copy.deepcopy(mine)
        optimizers = lean(mine, **options), plain(theirs, **options)
        for first, last in ((0, 5), (5, 8)):
            for optimizer, parameters in zip(optimizers, (mine, theirs), strict=True):
                steps(optimizer, parameters, first, last)
            said = f"{lean}, {options}, {sizes}, from step {first} on: "
            close = torch.testing.assert_close
            close(mine, theirs, rtol=1e-12, atol=1e-14, msg=said.__add__)
            # The state is torch's: either goes on with the other's.
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)


def test_make_optimizer_takes_the_lean_one_for_a_single_parameter():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
    for name, kinds in (("sgd", (LeanSGD, SGD)), ("adam", (LeanAdamW, AdamW))):
        made = [make_optimizer(name, some, 0.1, 0.2) for some in (parameters[:1], parameters)]
        assert tuple(map(type, made)) == kinds
        schedule = make_schedule("one-cycle", made[0], 0.1, 10)
        steps(made[0], parameters[:1], 0, 3)
        schedule.step()
        assert schedule.get_last_lr()[0] > 0.1 / 25


def test_a_small_parameter_does_not_go_through_torch(monkeypatch):
    for lean, plain, options in (
        (LeanSGD, SGD, {}), (LeanSGD, SGD, {"momentum": 0.9}), (LeanAdamW, AdamW, {})
    ):  # fmt: skip
        parameters = [nn.Parameter(torch.ones(3))]
        optimizer = lean(parameters, lr=0.1, **options)
        steps(optimizer, parameters, 0, 1)  # makes the state
        before = parameters[0].detach().clone()
        with monkeypatch.context() as patched:
            patched.setattr(plain, "step", lambda *arguments: pytest.fail("torch's step"))
            steps(optimizer, parameters, 1, 3)
        assert not torch.equal(parameters[0], before)
