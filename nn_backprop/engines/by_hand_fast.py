"""The backward passes of `by_hand` again, for speed: equal to those by test, and harder to read.

Read `by_hand` first. What is different here:

- What a step writes into is made once, for one shape of batches: all of it in the MLP, in the CNN
  all but what convolution and pooling return. Nearly all of a small network's step is not
  arithmetic but the making of tensors and the way through torch's layers.
- A tensor that nobody reads any more is overwritten: by z first, then a, and in the backward σ'(z);
  grad_a by grad_z. Less memory is touched, and more of it is still in the cache.
- Parameters and gradients may lie side by side in one buffer (`flat_parameter`), so that the
  optimizer updates one tensor instead of six.
- Images have their channels last in memory; `_Stage` says how a convolution is taken back.

Letters as in `by_hand`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flat_parameter(model: nn.Module) -> nn.Parameter:
    """One parameter that holds those of the model side by side, and their gradients in its .grad.

    The model's parameters and their ``.grad`` become views of it, so an optimizer of this one
    updates them all. That is right only while gradients are written into those ``.grad``, as
    `MLPBackprop` and `CNNBackprop` do; autograd, the tape and ``zero_grad`` put others in their
    place, and the parameters must not be moved. Frozen ones stay outside. Raises ValueError if none
    is left, or if they are not all of one type and device.
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
        self.log_p, self.grad_output = inputs.new_empty(2, K, self.N)
        self.minus_one = inputs.new_full((1, self.N), -1)

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
        torch.log_softmax(logits, 0, out=self.log_p)
        loss = F.nll_loss(self.log_p.t(), targets)
        torch.exp(self.log_p, out=self.grad_output)
        self.grad_output.scatter_add_(0, targets.unsqueeze(0), self.minus_one)
        self.grad_output.div_(self.N)
        return loss

    def _squared_error(self, a: Tensor, targets: Tensor) -> Tensor:
        """loss = 1/N Σ_n Σ_k (a[n,k] − onehot(y_n)[k])²; grad_output = 2 (a − onehot(y)) / N."""
        difference = self.grad_output.copy_(a)
        difference.scatter_add_(0, targets.unsqueeze(0), self.minus_one)
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
        self.a = [inputs.new_empty(self.N, layer.out_features) for layer in layers[:-1]]
        self.grad_a = [torch.empty_like(a) for a in self.a]
        self.output = torch.empty_like(self.log_p)  # (K, N)
        self.one = inputs.new_ones(())

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        below = x = inputs.detach().flatten(1)
        last = len(self.a)

        # Forward: a = σ(below @ weightᵀ + bias), each into its buffer.
        for k, a in enumerate(self.a):
            torch.addmm(self.biases[k], below, self.transposed[k], out=a)
            self._activate(a)
            below = a
        bias = self.biases[last].unsqueeze(1)
        torch.addmm(bias, self.weights[last], below.t(), out=self.output)

        # The loss, and grad_z at the top.
        if self.loss_name == "cross_entropy":
            loss = self._cross_entropy(self.output, targets)
            grad_z = self.grad_output.t()
        else:
            self._activate(self.output)
            loss = self._squared_error(self.output, targets)
            grad_z = self.grad_output.mul_(self._slope(self.output)).t()

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

    Within it every image has its channels last in memory: see `_Stage`.
    """

    def __init__(self, model: Any, inputs: Tensor) -> None:
        super().__init__(model, inputs, model.output)
        g = self.grads
        self.stage1 = _Stage(model.conv1, g[0], g[1], inputs.shape)
        self.stage2 = _Stage(model.conv2, g[2], g[3], self.stage1.shape)
        self.weight = model.output.weight.detach()
        self.bias = model.output.bias.detach().unsqueeze(1)
        self.grad_weight, self.grad_bias = self.grads[4:6]
        self.logits = torch.empty_like(self.log_p)  # (K, N)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Forward.
        x1 = self.stage1.forward(_last(inputs.detach()))
        x2 = self.stage2.forward(x1)
        x3 = _first(x2).flatten(1)  # (N, in_features)
        torch.addmm(self.bias, self.weight, x3.t(), out=self.logits)
        loss = self._cross_entropy(self.logits, targets)

        # Backward.
        grad_logits = self.grad_output  # (K, N)
        torch.sum(grad_logits, 1, out=self.grad_bias)
        torch.mm(grad_logits, x3, out=self.grad_weight)
        grad_x3 = grad_logits.t() @ self.weight
        grad_x2 = _last(grad_x3.view_as(_first(x2)))
        self.stage2.backward(grad_x2)  # before stage 1, which overwrites x1
        self.stage1.backward(self.stage2.image_gradient())
        self._hand_over()
        return loss


class _Stage:
    """Convolution, ReLU, 2×2 max-pooling: x (N, H, W, C) to a (N, H', W', O).

    *ReLU's slope after the pool.* ReLU increases, so the largest of four pixels stays the largest:
    max relu(z) = relu(max z), and the slope at the winner is 1 where a is positive, else 0.
    Multiplied onto the gradient of a, and not of its four pixels, that is a quarter of the work,
    and so is the sum over positions that is the bias's gradient.

    *The kernel's gradient.* The patches are a view of x, (p, q, n, h, w, c) ↦ x[n, h+p, w+q, c], in
    which every pixel stands as often as a patch reads it. Copying it moves whole rows of channels,
    of w and c if the channels are few, nearly at the speed of memory. What remains is a matrix
    product for each offset, and as in a linear layer the gradient of the weight is the other
    operand times grad_z, summed over every letter that the weight lacks:
        grad_weight[p,q,c,o] = Σ_nhw patches[p,q,nhw,c] grad_z[nhw,o]

    *The image's gradient* is a convolution with the mirrored kernel, as in `by_hand`.
    """

    def __init__(
        self, conv: nn.Conv2d, grad_weight: Tensor, grad_bias: Tensor, shape: Sequence[int]
    ) -> None:
        self.weight, self.bias = conv.weight.detach(), conv.bias.detach()  # type: ignore[union-attr]
        self.grad_weight, self.grad_bias = grad_weight, grad_bias
        N, C, H, W = shape
        out_channels, _, P, Q = self.weight.shape
        h, w = H - P + 1, W - Q + 1
        self.shape = (N, out_channels, h // 2, w // 2)  # of a, in torch's order
        new = self.weight.new_empty
        self.patches = new(P, Q, N, h, w, C)
        self.grad_z = new(N, h, w, out_channels)
        self.grad_kernel = new(P, Q, C, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        z = F.conv2d(_first(x), self.weight, self.bias).relu_()
        a, winner = F.max_pool2d(z, 2, return_indices=True)
        self.a, self.winner = _last(a), _last(winner)
        return self.a

    def backward(self, grad_a: Tensor) -> None:
        """Fills the gradients of weight and bias; overwrites grad_a and a."""
        # a = relu(max z) is not negative, so its sign is ReLU's slope
        grad_max = grad_a.mul_(self.a.sign_()).flatten(1, 2)  # (N, H' W', O)
        torch.sum(grad_max, (0, 1), out=self.grad_bias)
        # the maximum over 2×2 pixels: the winner, a place in the flattened image, gets it all
        self.grad_z.zero_().flatten(1, 2).scatter_(1, self.winner.flatten(1, 2), grad_max)
        # z = Σ_pqc patches · weight + bias
        P, Q, *_, C = self.patches.shape
        view = self.x.unfold(1, P, 1).unfold(2, Q, 1)  # (N, h, w, C, P, Q)
        self.patches.copy_(view.permute(4, 5, 0, 1, 2, 3))
        patches = self.patches.view(P * Q, -1, C)
        grad_z = self.grad_z.flatten(0, 2)
        if C == 1:
            torch.mm(patches.squeeze(2), grad_z, out=self.grad_kernel.view(P * Q, -1))
        else:
            each = grad_z.expand(P * Q, *grad_z.shape)
            torch.bmm(patches.mT, each, out=self.grad_kernel.view(P * Q, C, -1))
        self.grad_weight.copy_(self.grad_kernel.permute(3, 2, 0, 1))

    def image_gradient(self) -> Tensor:
        """grad_x, (N, H, W, C), once `backward` has filled grad_z."""
        P, Q = self.weight.shape[2:]
        mirrored = self.weight.flip(2, 3).transpose(0, 1)
        return _last(F.conv2d(_first(self.grad_z), mirrored, padding=(P - 1, Q - 1)))


def _last(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), in this order in memory."""
    return images.permute(0, 2, 3, 1).contiguous()


def _first(images: Tensor) -> Tensor:
    """(N, H, W, C) as torch takes images, (N, C, H, W), with the memory as it is."""
    N, H, W, C = images.shape
    return images.flatten().view(N, H, W, C).permute(0, 3, 1, 2)  # this view sets all strides
