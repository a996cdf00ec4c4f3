"""A training step as one CUDA graph: recorded once, then started by one call."""

from collections.abc import Callable

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor], Tensor]

WARM_UP = 3  # steps before the recording, so that all that is made once has been made


class GraphedUpdate:
    """``update(inputs, targets) -> loss``, for batches of one shape, as a graph.

    A small step on a GPU spends its time starting kernels; a graph starts them all at once. The
    batch is copied to where the recording read its own, and the loss comes back as a copy. The
    first WARM_UP steps, all steps on a CPU, and batches of another shape are computed as usual; so
    on a CPU the same code runs without the recording.

    Whatever changes from step to step has to live in tensors: the learning rate, too, so make the
    optimizer by ``make_optimizer(..., graph=True)``.

    Source: torch.cuda.CUDAGraph's documentation, whole-network capture.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs = self.targets = self.loss = torch.empty(0)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.done == 0:
            self.inputs, self.targets = inputs.clone(), targets.clone()
        if inputs.shape != self.inputs.shape:
            return self.update(inputs, targets)
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
        self.graph.replay()
        return self.loss.clone()
