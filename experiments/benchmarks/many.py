"""A step of many networks at once, against the same networks one after another.

A step is a batch gathered from uint8 images and normalised, gradients, and AdamW, fused; each
network has an order of its own. One by one is `training.fit`; the time of `fit_many` includes what
it sets up.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from tqdm import tqdm

from benchmarks import common
from benchmarks.training_step import LR, engine_for
from nn_backprop.data import ImageData
from nn_backprop.models import MLP
from nn_backprop.studies import Rows, StudyRun
from nn_backprop.training import fit, fit_many, make_optimizer, make_schedule

# Sizes, batch, steps of a call, and numbers of networks.
MANY: dict[str, tuple[tuple[int, ...], int, int, tuple[int, ...]]] = {
    "784-16-10, batch 32": ((784, 16, 10), 32, 100, (1, 8, 64)),
    "784-30-10, batch 10": ((784, 30, 10), 10, 100, (1, 8, 64)),
    "784-128-10, batch 64": ((784, 128, 10), 64, 50, (1, 8, 64)),
    "784-512-256-10, batch 256": ((784, 512, 256, 10), 256, 10, (1, 8)),
}
BAR_OF_MANY = {"64 × 784-16-10, batch 32": 6}  # elsewhere 1
PEER = "autograd, one by one"


def collect(run: StudyRun, options: common.Options) -> None:
    options.begin()
    cases = [
        (f"{number} × {name}", sizes, batch, 5 if options.smoke else steps, number)
        for name, (sizes, batch, steps, numbers) in MANY.items()
        for number in numbers
    ]
    for name, sizes, batch, steps, number in tqdm(
        cases[:2] if options.smoke else cases, unit="case"
    ):
        data = noise(steps * batch, options.device)
        contestants: dict[str, common.Work] = {}
        for contestant, make in WAYS.items():
            torch.manual_seed(0)
            models = [MLP(sizes).to(options.device) for _ in range(number)]
            contestants[contestant] = make(models, data, batch)
        times = common.in_turn(contestants, options)
        run.add(common.compared(name, times, PEER, number * steps, networks=number))


def noise(examples: int, device: str) -> ImageData:
    images = torch.randint(256, (examples, 1, 28, 28), dtype=torch.uint8)
    labels, none = torch.randint(10, (examples,)), torch.arange(0)
    return ImageData(
        "noise", "a benchmark", images, labels, torch.arange(examples), none, none, 0.5, 0.29
    ).to(device)


def _at_once(models: Sequence[nn.Module], data: ImageData, batch: int) -> common.Work:
    return lambda: fit_many(
        models, data, seeds=range(len(models)), lrs=LR, optimizer="adam", schedule="constant",
        epochs=1, batch_size=batch,
    )  # fmt: skip


def _one_by_one(
    engine: str, models: Sequence[nn.Module], data: ImageData, batch: int
) -> common.Work:
    ready = []
    for model in models:
        compute, parameters = engine_for(engine, model)
        optimizer = make_optimizer("adam", parameters, LR, 0.0)
        ready.append((model, compute, optimizer, make_schedule("constant", optimizer, LR, 1)))

    def work() -> None:
        for seed, training in enumerate(ready):
            fit(*training, data, epochs=1, batch_size=batch, seed=seed)

    return work


def _vmapped(models: Sequence[nn.Module], data: ImageData, batch: int) -> common.Work:
    """torch.func's ensembles: one network's gradient, mapped over stacked parameters."""
    parameters, _ = stack_module_state(list(models))
    skeleton: Any = copy.deepcopy(models[0]).to("meta")

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return skeleton.loss(functional_call(skeleton, parameters, (inputs,)), targets)

    gradients = vmap(grad(loss_of))
    optimizer = make_optimizer("adam", parameters.values(), LR, 0.0)

    def work() -> None:
        orders = torch.stack([torch.randperm(len(data.train)) for _ in models])
        for rows in orders.to(data.train.device).split(batch, 1):
            inputs, targets = data.batch(data.train[rows.flatten()])
            with torch.no_grad():
                found = gradients(
                    parameters, inputs.unflatten(0, rows.shape), targets.unflatten(0, rows.shape)
                )
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            optimizer.step()

    return work


WAYS: dict[str, Callable[[Sequence[nn.Module], ImageData, int], common.Work]] = {
    PEER: partial(_one_by_one, "autograd"),
    "by-hand, one by one": partial(_one_by_one, "by-hand"),
    "vmap(grad)": _vmapped,
    "at once": _at_once,
}


def _bars(rows: Rows) -> dict[tuple[str, str], float]:
    return {(row["case"], "at once"): BAR_OF_MANY.get(row["case"], 1) for row in rows}


STUDY = common.Benchmark(
    common.Options, collect,
    claims=lambda rows: common.bar_claims(rows, _bars(rows)),
    tables=lambda rows: {"Many networks": common.times_table(rows, "network's step")},
    picture=lambda rows: common.ratios_picture(
        rows, "Many networks against autograd one by one", _bars(rows)
    ),
)  # fmt: skip
