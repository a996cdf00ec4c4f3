"""A training step as one CUDA graph: recorded once, then started by one call."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Update = Callable[[Tensor, Tensor], Tensor]

WARM_UP = 3  # steps before the recording, so that all that is made once has been made


class GraphedUpdate:
    """``update(inputs, targets) -> loss``, for batches of `batch_size`, as a graph.

    A small step on a GPU spends its time starting kernels; a graph starts them all at once. The
    batch is copied to where the recording read its own, and the loss comes back as a copy. The
    first WARM_UP steps, all steps on a CPU, and batches of another size are computed as usual; so
    on a CPU the same code runs without the recording. The gradients of `parameters` are left in
    ``.grad``.

    Whatever changes from step to step has to live in tensors: the learning rate, too, so make the
    optimizer by ``make_optimizer(..., graph=True)``.

    Source: torch.cuda.CUDAGraph's documentation, whole-network capture.
    """

    def __init__(self, update: Update, parameters: Sequence[nn.Parameter], batch_size: int) -> None:
        self.update, self.parameters, self.batch_size = update, parameters, batch_size
        self.grads: list[Tensor | None] = []  # where the graph writes them
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs = self.targets = self.loss = torch.empty(0)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if len(inputs) != self.batch_size:
            return self.update(inputs, targets)
        if self.done == 0:
            self.inputs, self.targets = inputs.clone(), targets.clone()
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.done += 1
        if not inputs.is_cuda:
            return self.update(self.inputs, self.targets)
        if self.graph is None and self.done <= WARM_UP:
            stream = torch.cuda.Stream()  # a capture must not meet work of the default stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self.update(self.inputs, self.targets)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.loss = self.update(self.inputs, self.targets)
            self.grads = [parameter.grad for parameter in self.parameters]
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()
