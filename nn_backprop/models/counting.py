"""What a network costs on paper: parameters, links, multiply-adds, memory.

A multiply-add is one product that is added to a sum; biases, activations and pools are not counted.
torch.utils.flop_counter counts two operations for each, as the literature's FLOPs often do. A link
leads from one unit, or from the constant 1 that a bias multiplies, to another: one for each
multiply-add of an example, and one for each unit with a bias.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Numbers that training may change: a weight that is used at many places counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one forward pass in evaluation mode, for the whole batch.

    The virtual inputs of a border count like others. Only products of matrices and convolutions are
    seen: a product written as a sum of element-wise ones is not. Every module's mode stays.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@torch.no_grad()
def multiply_adds_left(model: nn.Module, example: Any) -> int:
    """Those without a weight that is zero, for a batch of one; a pruned layer's mask counts.

    A matrix's zero saves one product, a kernel's one at every place of its maps. Weights that are
    neither are taken to have no zeros.
    """
    saved = []

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        zeros = layer.weight.numel() - int(layer.weight.count_nonzero())
        saved.append(zeros * output[0, 0].numel())

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    with watched(layers, count):
        return multiply_adds(model, example) - sum(saved)


@torch.no_grad()
def links(model: nn.Module, example: Any) -> int:
    """Links of the network that sees `example`, a batch of one; shared weights have many each.

    A layer with a parameter or a buffer `bias…` is taken to add one to each of its outputs.
    """
    units: list[int] = []

    def count(layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        units.extend(tensor.numel() for tensor in outputs)

    biased = [
        module
        for module in model.modules()
        if any(name.startswith("bias") for name, _ in _own_tensors(module))
    ]
    with watched(biased, count):
        return multiply_adds(model, example) + sum(units)


@contextmanager
def watched(layers: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Within, `look(layer, inputs, output)` is called after each forward pass of a layer."""
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Of all that autograd keeps of a forward pass for the backward pass, but for parameters.

    What is kept twice counts once: h_t is what the ReLU made, and what the next layer was handed.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # alive to the end: no address serves twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
