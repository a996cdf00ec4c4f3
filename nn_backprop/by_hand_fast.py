"""The backward passes of `by_hand` again, for speed: equal to those by test, and harder to read.

Read `by_hand` first. What is different here:

- Everything that a step writes into is made once, for one batch size. Nearly all of a small
  network's step is not arithmetic but the making of tensors and the way through torch's layers.
- Where a value is not needed any more, its gradient takes its place: ``z`` holds z in the forward
  and grad_z in the backward. Less memory is touched, and more of it is still in the cache.
- Parameters and gradients may lie side by side in one buffer (`flat_parameter`), so that the
  optimizer updates one tensor instead of six.
- A convolution is one matrix product with the patches, the examples innermost (see `CNNBackprop`).

Letters as in `by_hand`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flat_parameter(model: nn.Module) -> nn.Parameter:
    """One parameter that holds those of the model side by side, and their gradients in its .grad.

    The model's parameters and their ``.grad`` become views of it, so an optimizer of this one
    updates them all. Frozen ones stay outside. Raises ValueError if none is left, or if they are
    not all of one type and device.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if len({(p.dtype, p.device) for p in parameters}) != 1:
        raise ValueError("the parameters that require grad must share one dtype and one device")
    sizes = [p.numel() for p in parameters]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    parts = zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True)
    for parameter, value, grad in parts:
        parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)
    return flat


class _Backprop:
    """What both networks have: parameters read in place, a gradient for each, and the loss."""

    def __init__(self, model: Any, inputs: Tensor, output: nn.Linear) -> None:
        self.model, self.parameters = model, list(model.parameters())
        self.places = [p.data_ptr() for p in self.parameters]
        self.grads = [
            torch.empty_like(p) if p.grad is None else p.grad.detach() for p in self.parameters
        ]
        self.shape, self.dtype = inputs.shape, inputs.dtype
        self.N, K = len(inputs), output.out_features
        self.log_p, self.grad_output = inputs.new_empty(2, self.N, K)
        self.minus_one = inputs.new_full((self.N, 1), -1)

    def fits(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> bool:
        """Whether the buffers are for inputs like these, and the parameters where they were."""
        return (
            model is self.model
            and inputs.shape == self.shape
            and inputs.dtype == self.dtype
            and self.places == [p.data_ptr() for p in self.parameters]
        )

    def _hand_over(self) -> None:
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if parameter.requires_grad:
                parameter.grad = grad

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """loss = −1/N Σ_n log p[n, y_n]; grad_output = (p − onehot(y)) / N."""
        torch.log_softmax(logits, 1, out=self.log_p)
        loss = F.nll_loss(self.log_p, targets)
        torch.exp(self.log_p, out=self.grad_output)
        self.grad_output.scatter_add_(1, targets.unsqueeze(1), self.minus_one)
        self.grad_output.div_(self.N)
        return loss

    def _squared_error(self, a: Tensor, targets: Tensor) -> Tensor:
        """loss = 1/N Σ_n Σ_k (a[n,k] − onehot(y_n)[k])²; grad_output = 2 (a − onehot(y)) / N."""
        difference = self.grad_output.copy_(a)
        difference.scatter_add_(1, targets.unsqueeze(1), self.minus_one)
        loss = difference.square().sum().div_(self.N)
        difference.mul_(2 / self.N)
        return loss


class MLPBackprop(_Backprop):
    """`by_hand.mlp_backprop` for one model and inputs of one shape; gradients go to ``.grad``.

    Called with inputs and targets, it returns the loss, a new 0-d tensor. The next call overwrites
    the gradients. Once the parameters have moved (``model.to``), a new one is needed: see `fits`.
    """

    def __init__(self, model: Any, inputs: Tensor) -> None:
        layers = list(model.layers)
        super().__init__(model, inputs, layers[-1])
        self.activation, self.loss_name = model.activation, model.loss_name
        self.weights = [layer.weight.detach() for layer in layers]
        self.transposed = [weight.t() for weight in self.weights]
        self.biases = [layer.bias.detach() for layer in layers]
        self.grad_weights, self.grad_biases = self.grads[0::2], self.grads[1::2]
        self.a = [inputs.new_empty(self.N, layer.out_features) for layer in layers]
        self.grad_a = [torch.empty_like(a) for a in self.a]
        self.one = inputs.new_ones(())

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = inputs.detach().flatten(1)
        last = len(self.a) - 1

        # Forward: a = σ(below @ weightᵀ + bias), each into its buffer.
        below = x
        for k, a in enumerate(self.a):
            torch.addmm(self.biases[k], below, self.transposed[k], out=a)
            if k < last or self.loss_name == "squared_error":
                self._activate(a)
            below = a

        # The loss, and grad_z at the top.
        grad_z = self.grad_output
        if self.loss_name == "cross_entropy":
            loss = self._cross_entropy(self.a[last], targets)
        else:
            loss = self._squared_error(self.a[last], targets)
            grad_z.mul_(self._slope(self.a[last]))

        # Backward: from the last layer down.
        for k in range(last, -1, -1):
            below = self.a[k - 1] if k > 0 else x
            torch.sum(grad_z, 0, out=self.grad_biases[k])  # Σ_n
            torch.mm(grad_z.t(), below, out=self.grad_weights[k])  # Σ_n grad_z[n,o] a[n,i]
            if k > 0:
                torch.mm(grad_z, self.weights[k], out=self.grad_a[k - 1])  # Σ_o
                grad_z = self.grad_a[k - 1].mul_(self._slope(below))
        self._hand_over()
        return loss

    def _activate(self, z: Tensor) -> None:
        """a = σ(z), in the place of z."""
        {"relu": torch.relu_, "sigmoid": torch.sigmoid_, "tanh": torch.tanh_}[self.activation](z)

    def _slope(self, a: Tensor) -> Tensor:
        """σ'(z) in terms of a = σ(z), in the place of a, which nobody reads after this."""
        if self.activation == "relu":
            return a.sign_()  # a ≥ 0, so 1 where it is positive and 0 elsewhere
        if self.activation == "sigmoid":
            return torch.addcmul(a, a, a, value=-1, out=a)  # a − a²
        return torch.addcmul(self.one, a, a, value=-1, out=a)  # 1 − a²


class CNNBackprop(_Backprop):
    """`by_hand.cnn_backprop` for one model and inputs of one shape; used like `MLPBackprop`.

    Within it the examples are the last axis of everything: see `_Stage`.
    """

    def __init__(self, model: Any, inputs: Tensor) -> None:
        super().__init__(model, inputs, model.output)
        self.x0 = inputs.new_empty(*inputs.shape[1:], self.N)  # (1, H, W, N)
        self.stage1 = _Stage(self.x0, model.conv1, *self.grads[0:2])
        self.stage2 = _Stage(self.stage1.a, model.conv2, *self.grads[2:4])
        self.weight, self.bias = model.output.weight.detach(), model.output.bias.detach()
        self.grad_weight, self.grad_bias = self.grads[4:6]
        self.x3 = self.stage2.a.view(-1, self.N)  # (in_features, N)
        self.logits = torch.empty_like(self.log_p)
        self.grad_x1, self.grad_x2 = (torch.empty_like(s.a) for s in (self.stage1, self.stage2))

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Forward.
        self.x0.copy_(inputs.detach().permute(1, 2, 3, 0))
        self.stage1.forward()
        self.stage2.forward()
        x3, weight = self.x3.t(), self.weight
        torch.addmm(self.bias, x3, weight.t(), out=self.logits)
        loss = self._cross_entropy(self.logits, targets)

        # Backward.
        grad_logits = self.grad_output
        torch.sum(grad_logits, 0, out=self.grad_bias)
        torch.mm(grad_logits.t(), x3, out=self.grad_weight)
        torch.mm(weight.t(), grad_logits.t(), out=self.grad_x2.view_as(self.x3))
        self.stage2.backward(self.grad_x2, self.grad_x1)
        self.stage1.backward(self.grad_x1)
        self._hand_over()
        return loss


class _Stage:
    """Convolution, 2×2 max-pooling, bias, ReLU: x (C, H, W, N) to a (O, H', W', N).

    *Convolution.* The patches are a view of x, (c, p, q, h, w, n) ↦ x[c, h+p, w+q, n], in which
    every pixel stands as often as a patch reads it. Copying it moves rows of w and n at once,
    nearly at the speed of memory; with the examples outermost it would be P pixels at a time. What
    remains is the product of an o × (cpq) and a (cpq) × (hwn) matrix, and as in a linear layer the
    gradient of each operand is the other one times grad_z:
        z[o,hwn] = Σ_cpq weight[o,cpq] patches[cpq,hwn]
        grad_weight[o,cpq] = Σ_hwn grad_z[o,hwn] patches[cpq,hwn]
        grad_patches[cpq,hwn] = Σ_o weight[o,cpq] grad_z[o,hwn]
    Each pixel gets the sum over the patches that read it, one slice an offset:
        grad_x[c, h+p, w+q, n] += grad_patches[c,p,q,h,w,n]

    *Pooling before bias and ReLU.* Both increase, and are the same at all four pixels of a window:
    relu(max z + bias) = max relu(z + bias), won by the same pixel (or the gradient is 0). That is a
    quarter of the work, forward and backward. The two columns compete first, then the two rows; of
    equals the first in reading order wins, as in torch. The winner gets the gradient of the
    maximum, the loser what is left of it.
    """

    def __init__(self, x: Tensor, conv: nn.Conv2d, grad_weight: Tensor, grad_bias: Tensor) -> None:
        self.weight = conv.weight.detach().flatten(1)  # (O, C P Q)
        self.bias = conv.bias.detach().view(-1, 1, 1, 1)  # type: ignore[union-attr]
        self.grad_weight, self.grad_bias = grad_weight.view_as(self.weight), grad_bias
        out_channels, _, P, Q = conv.weight.shape
        N = x.shape[3]
        half_h, half_w = (x.shape[1] - P + 1) // 2, (x.shape[2] - Q + 1) // 2
        view = x.unfold(1, P, 1).unfold(2, Q, 1)  # (C, h, w, N, P, Q)
        view = view[:, : 2 * half_h, : 2 * half_w]  # no window reads a last odd line
        self.view_of_x = view.permute(0, 4, 5, 1, 2, 3)
        self.patches = x.new_empty(self.view_of_x.shape)
        self.z = x.new_empty(out_channels, 2 * half_h, 2 * half_w, N)
        self.columns = self.z[:, :, 0::2], self.z[:, :, 1::2]
        self.winners = x.new_empty(out_channels, 2 * half_h, half_w, N)
        self.rows = self.winners[:, 0::2], self.winners[:, 1::2]
        self.first_column = torch.empty_like(self.winners, dtype=torch.bool)
        self.a = x.new_empty(out_channels, half_h, half_w, N)
        self.first_row = torch.empty_like(self.a, dtype=torch.bool)

    def forward(self) -> None:
        self.patches.copy_(self.view_of_x)
        torch.mm(self.weight, self._flat(self.patches), out=self.z.flatten(1))
        torch.ge(*self.columns, out=self.first_column)
        torch.maximum(*self.columns, out=self.winners)
        torch.ge(*self.rows, out=self.first_row)
        torch.maximum(*self.rows, out=self.a)
        self.a.add_(self.bias).relu_()

    def backward(self, grad_a: Tensor, grad_x: Tensor | None = None) -> None:
        """Fills the gradients of weight and bias, and grad_x; overwrites grad_a and the buffers."""
        # a = relu(max z + bias)
        grad_a.mul_(self.a.sign_())
        torch.sum(grad_a.flatten(1), 1, out=self.grad_bias)
        # the maximum over the rows, then over the columns; grad_z takes the place of z
        for grad, first, (one, other) in (
            (grad_a, self.first_row, self.rows),
            (self.winners, self.first_column, self.columns),
        ):
            torch.mul(grad, first, out=one)
            torch.sub(grad, one, out=other)
        # z = weight @ patches
        grad_z, patches = self.z.flatten(1), self._flat(self.patches)
        torch.mm(grad_z, patches.t(), out=self.grad_weight)
        if grad_x is not None:
            torch.mm(self.weight.t(), grad_z, out=patches)  # grad_patches takes their place
            grad_x.zero_()
            _, P, Q, h, w, _ = self.patches.shape
            for p in range(P):
                for q in range(Q):
                    grad_x[:, p : p + h, q : q + w] += self.patches[:, p, q]

    @staticmethod
    def _flat(patches: Tensor) -> Tensor:
        return patches.flatten(3).flatten(0, 2)  # (C P Q, h w N)
