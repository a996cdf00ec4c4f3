"""torch's optimizers and schedules, by the names of our options."""

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> Optimizer:
    """`sgd` (no momentum) or `adam`, whose weight decay is decoupled (AdamW).

    Sources: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
    """
    if name == "sgd":
        return SGD(parameters, lr=lr, weight_decay=weight_decay)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def make_schedule(name: str, optimizer: Optimizer, lr: float, steps: int) -> LRScheduler:
    """`constant`, or `one-cycle`: up to lr in the first 30 % of the steps, then down to nearly 0.

    Source: Smith & Topin 2018, Super-convergence.
    """
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    return OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
