"""Mistakes unseen, in convolutions."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from mutants.mutant import Case, Weighted, mutant, normal, written_out


class CausalConv(Function):
    """z_t sees x up to t only: the padding is all on the left."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        k = weight.shape[2]
        grad_padded = F.conv_transpose1d(grad_z, weight)
        grad_x = grad_padded[..., : x.shape[2]]  # the padding stands on the left, not on the right
        windows = F.pad(x, (k - 1, 0)).unfold(2, k, 1)
        return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


MULTIPLIER = 2


def depthwise(x, weight):
    """Every channel has kernels of its own, `MULTIPLIER` of them."""
    return F.conv2d(x, weight, groups=x.shape[1])


def depthwise_backward(grad_z, z, x, weight, mistake=""):
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for o in range(len(weight)):
        c = o // MULTIPLIER
        back = F.conv_transpose2d(grad_z[:, o : o + 1], weight[o : o + 1])[:, 0]
        if mistake == "set, not added":
            grad_x[:, c] = back
        else:
            grad_x[:, c] += back
        grad_weight[o, 0] = torch.einsum("nhw,nhwpq->pq", grad_z[:, o], windows[:, c])
    return grad_x, grad_weight


def ring(x, weight):
    """A convolution on a circle."""
    p = weight.shape[2] // 2
    return F.conv1d(F.pad(x, (p, p), mode="circular"), weight)


def ring_backward(grad_z, z, x, weight, mistake=""):
    k = weight.shape[2]
    p = k // 2
    grad_padded = F.conv_transpose1d(grad_z, weight)
    grad_x = grad_padded[..., p:-p].clone()
    if mistake != "cropped only":
        grad_x[..., -p:] += grad_padded[..., :p]
        grad_x[..., :p] += grad_padded[..., -p:]
    windows = F.pad(x, (p, p), mode="circular").unfold(2, k, 1)
    return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


class MirrorConv(Function):
    """A convolution whose border is padded by reflection, the edge itself not repeated."""

    @staticmethod
    def forward(x, weight):
        p = weight.shape[2] // 2
        return F.conv1d(F.pad(x, (p, p), mode="reflect"), weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_z):
        x, weight = ctx.saved_tensors
        k, p = weight.shape[2], weight.shape[2] // 2
        grad_padded = F.conv_transpose1d(grad_z, weight)
        grad_x = grad_padded[..., p:-p].clone()
        grad_x[..., :p] += grad_padded[..., :p].flip(-1)  # one place off: the edge has no image
        grad_x[..., -p:] += grad_padded[..., -p:].flip(-1)
        windows = F.pad(x, (p, p), mode="reflect").unfold(2, k, 1)
        return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


def grouped(x, weight):
    return F.conv1d(x, weight, groups=2)


def grouped_backward(grad_z, z, x, weight, mistake=""):
    grads_x, grads_weight = [], []
    windows = x.unfold(2, weight.shape[2], 1)
    parts = zip(grad_z.chunk(2, 1), weight.chunk(2), windows.chunk(2, 1), strict=True)
    for grad_part, weight_part, window in parts:
        grads_x.append(F.conv_transpose1d(grad_part, weight_part))
        grads_weight.append(torch.einsum("not,nctk->ock", grad_part, window))
    axis = 2 if mistake == "stacked behind the channels" else 1
    return torch.stack(grads_x, axis).flatten(1, 2), torch.cat(grads_weight)


def strided(x, weight):
    return F.conv2d(x, weight, stride=2)


def strided_backward(grad_z, z, x, weight, mistake=""):
    """grad_weight is x convolved with grad_z, the stride of the forward being its dilation."""
    stride, dilation = (2, 1) if mistake == "stride kept a stride" else (1, 2)
    grad_weight = F.conv2d(
        x.transpose(0, 1), grad_z.transpose(0, 1), stride=stride, dilation=dilation
    ).transpose(0, 1)
    grad_weight = grad_weight[..., : weight.shape[2], : weight.shape[3]]
    return F.conv_transpose2d(grad_z, weight, stride=2), grad_weight


class Upscale(Weighted):
    """A transposed convolution with as many channels out as in."""

    class Step(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.conv_transpose1d(x, weight, stride=2)

        @staticmethod
        def backward(ctx, grad_z):
            x, weight = ctx.saved_tensors
            windows = grad_z.unfold(2, weight.shape[2], 2)
            # weight is (in, out, k) here, unlike a plain convolution's
            grad_weight = torch.einsum("nct,notk->ock", x, windows)
            return F.conv1d(grad_z, weight, stride=2), grad_weight


def locally_connected(x, weight, bias):
    """A kernel of its own at every position: weight (T, O, C, k)."""
    windows = x.unfold(2, weight.shape[3], 1)
    return torch.einsum("nctk,tock->not", windows, weight) + bias


def locally_connected_backward(grad_z, z, x, weight, bias):
    k = weight.shape[3]
    grad_windows = torch.einsum("not,tock->nctk", grad_z, weight)
    grad_x = torch.zeros_like(x)
    for t in range(z.shape[2]):
        grad_x[..., t : t + k] += grad_windows[:, :, t]
    grad_weight = torch.einsum("not,nctk->tock", grad_z, x.unfold(2, k, 1))
    return grad_x, grad_weight, grad_z.sum(0)


class ConvRelu(Function):
    """Convolution and ReLU in one."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        a = F.conv2d(x, weight, bias).clamp(min=0)
        ctx.save_for_backward(x, weight, a)
        return a

    @staticmethod
    def backward(ctx, grad_a):
        x, weight, a = ctx.saved_tensors
        grad_bias = grad_a.sum((0, 2, 3))  # before the mask
        grad_z = grad_a * (a > 0)
        windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
        grad_weight = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
        return F.conv_transpose2d(grad_z, weight), grad_weight, grad_bias


def true_convolution(x, weight):
    """What mathematicians call a convolution: the kernel mirrored."""
    return F.conv2d(x, weight.flip(2, 3))


def true_convolution_backward(grad_z, z, x, weight, mistake=""):
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_mirrored = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
    axes = [2] if mistake == "rows only" else [2, 3]
    return F.conv_transpose2d(grad_z, weight.flip(2, 3)), grad_mirrored.flip(axes)


# fmt: off
CONVOLUTION = (
    written_out("convolution/causal convolution cropped on the wrong side", ("shifted",),
        lambda: CausalConv, normal((2, 3, 11), (5, 3, 3))),
    mutant("convolution/depthwise kernels of one channel overwrite each other",
        ("overwritten", "subset"),
        Case(depthwise, depthwise_backward, normal((2, 3, 7, 5), (6, 1, 3, 2))),
        mistake="set, not added"),
    mutant("convolution/gradient of the circular padding dropped", ("missing-term", "subset"),
        Case(ring, ring_backward, normal((2, 3, 7), (3, 3, 5))), mistake="cropped only"),
    written_out("convolution/reflected border folded back on the edge",
        ("shifted", "wrong-operand"), lambda: MirrorConv, normal((2, 3, 7), (3, 3, 5))),
    mutant("convolution/grad_x's groups interleaved", ("permuted",),
        Case(grouped, grouped_backward, normal((2, 6, 7), (4, 3, 3))), classic=True,
        mistake="stacked behind the channels"),
    mutant("convolution/grad_weight slides by the stride instead of dilating by it",
        ("wrong-operand",), Case(strided, strided_backward, normal((2, 2, 11, 7), (5, 2, 3, 3))),
        mistake="stride kept a stride"),
    written_out("convolution/transposed convolution's grad_weight as out by in", ("transposed",),
        lambda: Upscale(5, 5, 3), normal((3, 5, 7))),
    mutant("convolution/locally connected kernels' gradient shared", ("wrong-reduction",),
        Case(locally_connected, locally_connected_backward,
             normal((3, 2, 7), (5, 3, 2, 3), (3, 5))),
        weight=lambda at: at.grad_weight.sum(0, keepdim=True).repeat(len(at.weight), 1, 1, 1)),
    written_out("convolution/fused ReLU's mask missing in grad_bias",
        ("missing-factor", "wrong-operand"), lambda: ConvRelu,
        normal((2, 3, 7, 5), (5, 3, 3, 2), (5,))),
    mutant("convolution/mirrored kernel's gradient mirrored back along one axis", ("flipped",),
        Case(true_convolution, true_convolution_backward, normal((2, 3, 7, 5), (5, 3, 2, 3))),
        classic=True, mistake="rows only"),
)
# fmt: on
