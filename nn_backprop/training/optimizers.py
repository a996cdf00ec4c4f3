"""torch's optimizers and schedules, by the names of our options."""

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

# Numbers of a parameter up to which the calls of an update cost more than its arithmetic.
SMALL = 1 << 16


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    graph: bool = False,
) -> Optimizer:
    """`sgd` (no momentum) or `adam`, whose weight decay is decoupled (AdamW).

    With `graph`, for a `GraphedUpdate`, the learning rate is a tensor on the parameters' device.

    Sources: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
    """
    parameters = list(parameters)
    device = parameters[0].device
    rate = torch.tensor(lr, device=device) if graph else lr
    common: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay, "fused": True}
    sgd, adam = (LeanSGD, LeanAdamW) if len(parameters) == 1 and not graph else (SGD, AdamW)
    if name == "sgd":
        return sgd(parameters, **common)
    return adam(parameters, capturable=graph and device.type == "cuda", **common)


class LeanSGD(SGD):
    """torch's SGD for one small parameter on the CPU: its update without its bookkeeping.

    That costs several times the arithmetic of a small network. What is not plain SGD with momentum
    and weight decay of one parameter of at most SMALL numbers is left to torch, and so is the step
    that makes the state. Hooks of the optimizer are not called.
    """

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        parameter = group["params"][0]
        state = self.state[parameter]
        momentum, decay = group["momentum"], group["weight_decay"]
        buffer = state.get("momentum_buffer")
        if not _is_lean(self, closure) or (momentum and buffer is None):
            return super().step(closure)
        theta, grad, lr = parameter.data, parameter.grad, group["lr"]
        if buffer is not None:  # buffer = momentum · buffer + grad + decay · theta
            buffer.mul_(momentum).add_(grad)
            if decay:
                buffer.add_(theta, alpha=decay)
            theta.add_(buffer, alpha=-lr)
        else:
            theta.mul_(1 - lr * decay).add_(grad, alpha=-lr)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it, for its profiler


class LeanAdamW(AdamW):
    """torch's AdamW for one small parameter on the CPU: as `LeanSGD`."""

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        parameter = group["params"][0]
        state = self.state[parameter]
        if not _is_lean(self, closure) or "exp_avg" not in state:
            return super().step(closure)
        theta, grad, lr = parameter.data, parameter.grad, group["lr"]
        m, v, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
        state["step"] += 1
        t = state["step"].item()
        theta.mul_(1 - lr * group["weight_decay"])
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # theta −= lr m̂ / (√v̂ + ε), with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ)
        root = v.sqrt().div_(sqrt(1 - beta2**t)).add_(group["eps"])
        theta.addcdiv_(m, root, value=-lr / (1 - beta1**t))
        return None

    step.hooked = True  # type: ignore[attr-defined]


def _is_lean(optimizer: Optimizer, closure: Any) -> bool:
    group = optimizer.param_groups[0]
    parameter = group["params"][0]
    return (
        closure is None
        and len(optimizer.param_groups) == len(group["params"]) == 1
        and parameter.grad is not None
        and parameter.numel() <= SMALL
        and parameter.is_cpu
        and not (group["maximize"] or group.get("nesterov") or group.get("amsgrad"))
        and not group.get("dampening")
    )


def make_schedule(name: str, optimizer: Optimizer, lr: float, steps: int) -> LRScheduler:
    """`constant`, or `one-cycle`: up to lr in the first 30 % of the steps, then down to nearly 0.

    Source: Smith & Topin 2018, Super-convergence.
    """
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    return OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
