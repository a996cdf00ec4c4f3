"""The whole backward pass of the two networks, written out line by line.

No engine, no table, no autograd: this file imports torch for its arithmetic and nothing else. The
backward goes from the loss to the first layer; in the convolutional network, each gradient stands
under a quotation of the forward line that it differentiates. Letters:
n example, i in-feature, o out-feature or out-channel, c in-channel, h w position, p q offset in the
kernel. Every gradient has the shape of what it is the gradient of.

Derivations of the single steps are in `nn_backprop.rules`; this is the chain that joins them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = dict[str, Tensor | None]


@torch.no_grad()
def mlp_backprop(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Gradients]:
    """Loss and gradients of a `models.MLP` on a batch.

    inputs (N, ...) are flattened to (N, in_features); targets (N,) are class numbers. Returns the
    loss, averaged over the examples, and {parameter name: gradient}.

    The equations in Nielsen's letters (chapter 2, BP1-BP4): C the loss, W^l and b^l weight and bias
    of layer l = 1 … L, δ^l its grad_z, ⊙ the elementwise product, one example a row:
        δ^L = ∂C/∂z^L                        at the top, from the loss
        δ^l = (δ^(l+1) W^(l+1)) ⊙ σ'(z^l)    one layer down
        ∂C/∂W^l[o,i] = Σ_n δ^l[n,o] a^(l−1)[n,i]
        ∂C/∂b^l[o] = Σ_n δ^l[n,o]
    """
    layers = list(model.layers)

    # Forward: keep what every layer read (a) and what it made.
    a = inputs.flatten(1)  # (N, in_features)
    layer_inputs = []  # a^(l−1) for layer l
    for layer in layers[:-1]:
        layer_inputs.append(a)
        z = a @ layer.weight.T + layer.bias  # (N, out_features)
        a = _activate(z, model.activation)
    layer_inputs.append(a)
    z = a @ layers[-1].weight.T + layers[-1].bias  # (N, K): the logits

    # The loss, and grad_z at the top.
    if model.loss_name == "cross_entropy":
        loss, grad_z = _cross_entropy(z, targets)
    else:
        a = _activate(z, model.activation)  # squared error judges the activated output
        loss, grad_a = _squared_error(a, targets)
        grad_z = grad_a * _slope(a, model.activation)

    # Backward: from the last layer down.
    grads: Gradients = {}
    for k in reversed(range(len(layers))):
        grads[f"layers.{k}.bias"] = grad_z.sum(0)  # Σ_n
        grads[f"layers.{k}.weight"] = grad_z.T @ layer_inputs[k]  # Σ_n grad_z[n,o] a[n,i]
        if k > 0:
            grad_a = grad_z @ layers[k].weight  # Σ_o grad_z[n,o] weight[o,i]
            grad_z = grad_a * _slope(layer_inputs[k], model.activation)
    return loss, _wanted(model, grads)


@torch.no_grad()
def cnn_backprop(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Gradients]:
    """Loss and gradients of a `models.CNN` on a batch.

    inputs (N, 1, H, W), targets (N,) class numbers. Returns the loss, averaged over the examples,
    and {parameter name: gradient}.
    """
    # Forward.
    x0 = inputs  # (N, 1, H, W)
    z1 = F.conv2d(x0, model.conv1.weight, model.conv1.bias)
    a1 = z1.clamp(min=0)
    x1, winner1 = F.max_pool2d(a1, 2, return_indices=True)
    z2 = F.conv2d(x1, model.conv2.weight, model.conv2.bias)
    a2 = z2.clamp(min=0)
    x2, winner2 = F.max_pool2d(a2, 2, return_indices=True)
    x3 = x2.flatten(1)  # (N, in_features)
    logits = x3 @ model.output.weight.T + model.output.bias  # (N, K)

    # Backward, each line from the forward line that is quoted above it.
    # loss = −1/N Σ_n log softmax(logits)[n, y_n]
    loss, grad_logits = _cross_entropy(logits, targets)

    # logits = x3 @ weightᵀ + bias
    grad_output_bias = grad_logits.sum(0)
    grad_output_weight = grad_logits.T @ x3
    grad_x3 = grad_logits @ model.output.weight

    # x3 = x2.flatten(1)
    grad_x2 = grad_x3.view_as(x2)

    # x2 = max_pool2d(a2, 2): the pixel that won its window gets the window's gradient
    grad_a2 = _unpool(grad_x2, winner2, a2)

    # a2 = max(z2, 0)
    grad_z2 = grad_a2 * (a2 > 0)

    # z2 = conv2d(x1, weight) + bias: patches x1[n, c, h+p, w+q] times weight[o,c,p,q]
    grad_conv2_bias = grad_z2.sum((0, 2, 3))  # Σ_n,h,w
    grad_conv2_weight = _kernel_gradient(grad_z2, x1)
    grad_x1 = _image_gradient(grad_z2, model.conv2.weight)

    # x1 = max_pool2d(a1, 2)
    grad_a1 = _unpool(grad_x1, winner1, a1)

    # a1 = max(z1, 0)
    grad_z1 = grad_a1 * (a1 > 0)

    # z1 = conv2d(x0, weight) + bias; nobody asks for the gradient of the image itself
    grad_conv1_bias = grad_z1.sum((0, 2, 3))
    grad_conv1_weight = _kernel_gradient(grad_z1, x0)

    grads: Gradients = {
        "conv1.weight": grad_conv1_weight,
        "conv1.bias": grad_conv1_bias,
        "conv2.weight": grad_conv2_weight,
        "conv2.bias": grad_conv2_bias,
        "output.weight": grad_output_weight,
        "output.bias": grad_output_bias,
    }
    return loss, _wanted(model, grads)


def _wanted(model: Any, grads: Gradients) -> Gradients:
    """Those of the parameters that are not frozen, in the model's order."""
    return {name: grads[name] for name, p in model.named_parameters() if p.requires_grad}


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """loss = −1/N Σ_n log p[n, y_n] with p = softmax(logits); grad_logits = (p − onehot(y)) / N.

    For log p[y] = logits[y] − log Σ_k e^logits[k]: the derivative by logits[k] is [k = y] − p[k].
    """
    wanted = F.one_hot(targets, logits.shape[1])  # raises for a class that does not exist
    log_p = logits - logits.logsumexp(1, keepdim=True)
    loss = -log_p.gather(1, targets.unsqueeze(1)).mean()
    return loss, (log_p.exp() - wanted) / len(logits)


def _squared_error(a: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """loss = 1/N Σ_n Σ_k (a[n,k] − onehot(y_n)[k])²; grad_a = 2 (a − onehot(y)) / N."""
    difference = a - F.one_hot(targets, a.shape[1])
    return difference.square().sum() / len(a), 2 * difference / len(a)


def _activate(z: Tensor, activation: str) -> Tensor:
    return {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[activation](z)


def _slope(a: Tensor, activation: str) -> Tensor:
    """σ'(z), in terms of a = σ(z)."""
    if activation == "relu":
        return (a > 0).to(a.dtype)
    return a * (1 - a) if activation == "sigmoid" else 1 - a * a


def _unpool(grad: Tensor, winner: Tensor, image: Tensor) -> Tensor:
    """Puts each window's gradient at its winner, a place in the flattened image. No two windows
    overlap, so nothing has to be added up."""
    flat = torch.zeros_like(image).flatten(2)
    return flat.scatter_(2, winner.flatten(2), grad.flatten(2)).view_as(image)


def _kernel_gradient(grad_z: Tensor, x: Tensor) -> Tensor:
    """grad_weight[o,c,p,q] = Σ_n,h,w grad_z[n,o,h,w] x[n,c,h+p,w+q].

    All positions share the kernel, so its gradient is the sum over them. Read with (p, q) as the
    position, (h, w) as the offset, and n as the channel that is summed, it is a convolution of x
    with grad_z as the kernel.
    """
    grad_weight = F.conv2d(x.transpose(0, 1), grad_z.transpose(0, 1)).transpose(0, 1)
    return grad_weight.contiguous()


def _image_gradient(grad_z: Tensor, weight: Tensor) -> Tensor:
    """grad_x[n,c,i,j] = Σ_o,p,q grad_z[n,o,i−p,j−q] weight[o,c,p,q].

    Pixel (i, j) was read at the offset (p, q) by the output at (i − p, j − q). Seen from the pixel,
    the kernel runs backwards: a convolution of grad_z, with a border of P − 1 zeros, and the kernel
    mirrored in both axes.
    """
    P, Q = weight.shape[2:]
    mirrored = weight.flip(2, 3).transpose(0, 1)  # (C, O, P, Q)
    return F.conv2d(grad_z, mirrored, padding=(P - 1, Q - 1))
