"""Mistakes unseen, in convolutions."""

import torch
import torch.nn.functional as F

from mutants.mutant import layer_of, mutant, numbers

MULTIPLIER = 2


# z_t sees x up to t only: the padding is all on the left.
@layer_of(
    lambda x, weight: F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight), (2, 3, 11), (5, 3, 3)
)
def causal(grad_z, z, x, weight):
    k = weight.shape[2]
    grad_padded = F.conv_transpose1d(grad_z, weight)
    windows = F.pad(x, (k - 1, 0)).unfold(2, k, 1)
    return grad_padded[..., k - 1 :], torch.einsum("not,nctk->ock", grad_z, windows)


# Every channel has kernels of its own, `MULTIPLIER` of them.
@layer_of(lambda x, weight: F.conv2d(x, weight, groups=x.shape[1]), (2, 3, 7, 5), (6, 1, 3, 2))
def depthwise(grad_z, z, x, weight):
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for o in range(len(weight)):
        c = o // MULTIPLIER
        grad_x[:, c] += F.conv_transpose2d(grad_z[:, o : o + 1], weight[o : o + 1])[:, 0]
        grad_weight[o, 0] = torch.einsum("nhw,nhwpq->pq", grad_z[:, o], windows[:, c])
    return grad_x, grad_weight


def around(x, weight, mode):
    p = weight.shape[2] // 2
    return F.pad(x, (p, p), mode=mode)


@layer_of(lambda x, weight: F.conv1d(around(x, weight, "circular"), weight), (2, 3, 7), (3, 3, 5))
def ring(grad_z, z, x, weight):
    k, p = weight.shape[2], weight.shape[2] // 2
    grad_padded = F.conv_transpose1d(grad_z, weight)
    grad_x = grad_padded[..., p:-p].clone()
    grad_x[..., -p:] += grad_padded[..., :p]
    grad_x[..., :p] += grad_padded[..., -p:]
    windows = around(x, weight, "circular").unfold(2, k, 1)
    return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


# The border is padded by reflection, the edge itself not repeated.
@layer_of(lambda x, weight: F.conv1d(around(x, weight, "reflect"), weight), (2, 3, 7), (3, 3, 5))
def mirror(grad_z, z, x, weight):
    k, p = weight.shape[2], weight.shape[2] // 2
    grad_padded = F.conv_transpose1d(grad_z, weight)
    grad_x = grad_padded[..., p:-p].clone()
    grad_x[..., 1 : p + 1] += grad_padded[..., :p].flip(-1)
    grad_x[..., -p - 1 : -1] += grad_padded[..., -p:].flip(-1)
    windows = around(x, weight, "reflect").unfold(2, k, 1)
    return grad_x, torch.einsum("not,nctk->ock", grad_z, windows)


@layer_of(lambda x, weight: F.conv1d(x, weight, groups=2), (2, 6, 7), (4, 3, 3))
def grouped(grad_z, z, x, weight):
    grads_x, grads_weight = [], []
    windows = x.unfold(2, weight.shape[2], 1)
    parts = zip(grad_z.chunk(2, 1), weight.chunk(2), windows.chunk(2, 1), strict=True)
    for grad_part, weight_part, window in parts:
        grads_x.append(F.conv_transpose1d(grad_part, weight_part))
        grads_weight.append(torch.einsum("not,nctk->ock", grad_part, window))
    return torch.stack(grads_x, 1).flatten(1, 2), torch.cat(grads_weight)


@layer_of(lambda x, weight: F.conv2d(x, weight, stride=2), (2, 2, 11, 7), (5, 2, 3, 3))
def strided(grad_z, z, x, weight):
    """grad_weight is x convolved with grad_z, the stride of the forward being its dilation."""
    x, upstream = x.transpose(0, 1), grad_z.transpose(0, 1)
    grad_weight = F.conv2d(x, upstream, stride=1, dilation=2).transpose(0, 1)
    grad_weight = grad_weight[..., : weight.shape[2], : weight.shape[3]]
    return F.conv_transpose2d(grad_z, weight, stride=2), grad_weight


# As many channels out as in; the weight is (in, out, k).
@layer_of(
    lambda x, weight: F.conv_transpose1d(x, weight, stride=2),
    lambda: (*numbers((3, 5, 7)), *numbers((5, 5, 3), seed=1)),
)
def upscale(grad_z, z, x, weight):
    windows = grad_z.unfold(2, weight.shape[2], 2)
    return F.conv1d(grad_z, weight, stride=2), torch.einsum("nct,notk->cok", x, windows)


# A kernel of its own at every position: weight (T, O, C, k).
@layer_of(
    lambda x, weight, bias: (
        torch.einsum("nctk,tock->not", x.unfold(2, weight.shape[3], 1), weight) + bias
    ),
    *((3, 2, 7), (5, 3, 2, 3), (3, 5)),
)
def locally_connected(grad_z, z, x, weight, bias):
    k = weight.shape[3]
    grad_windows = torch.einsum("not,tock->nctk", grad_z, weight)
    grad_x = torch.zeros_like(x)
    for t in range(z.shape[2]):
        grad_x[..., t : t + k] += grad_windows[:, :, t]
    grad_weight = torch.einsum("not,nctk->tock", grad_z, x.unfold(2, k, 1))
    return grad_x, grad_weight, grad_z.sum(0)


@layer_of(
    lambda x, weight, bias: F.conv2d(x, weight, bias).clamp(min=0),
    (2, 3, 7, 5), (5, 3, 3, 2), (5,),
)  # fmt: skip
def conv_relu(grad_a, a, x, weight, bias):
    grad_z = grad_a * (a > 0)
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_weight = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
    return F.conv_transpose2d(grad_z, weight), grad_weight, grad_z.sum((0, 2, 3))


# What mathematicians call a convolution: the kernel mirrored.
@layer_of(lambda x, weight: F.conv2d(x, weight.flip(2, 3)), (2, 3, 7, 5), (5, 3, 2, 3))
def true_convolution(grad_z, z, x, weight):
    windows = x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    grad_mirrored = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows)
    return F.conv_transpose2d(grad_z, weight.flip(2, 3)), grad_mirrored.flip([2, 3])


CONVOLUTION = (
    mutant("convolution/causal convolution cropped on the wrong side", "shifted", causal,
        classic=True, change={"[..., k - 1 :]": "[..., : x.shape[2]]"}),
    mutant("convolution/depthwise kernels of one channel overwrite each other",
        "overwritten subset", depthwise, change={"grad_x[:, c] +=": "grad_x[:, c] ="}),
    mutant("convolution/gradient of the circular padding dropped", "missing-term subset", ring,
        change={"grad_x[..., -p:] += grad_padded[..., :p]": "",
                "grad_x[..., :p] += grad_padded[..., -p:]": ""}),
    mutant("convolution/reflected border folded back on the edge", "shifted wrong-operand", mirror,
        change={"[..., 1 : p + 1]": "[..., :p]", "[..., -p - 1 : -1]": "[..., -p:]"}),
    mutant("convolution/grad_x's groups interleaved", "permuted", grouped, classic=True,
        change={"stack(grads_x, 1)": "stack(grads_x, 2)"}),
    mutant("convolution/grad_weight slides by the stride instead of dilating by it",
        "wrong-operand", strided, change={"stride=1, dilation=2": "stride=2, dilation=1"}),
    mutant("convolution/transposed convolution's grad_weight as out by in", "transposed", upscale,
        classic=True, given=1, change={"->cok": "->ock"}),
    mutant("convolution/locally connected kernels' gradient shared", "wrong-reduction",
        locally_connected,
        weight=lambda at: at.grad_weight.sum(0, keepdim=True).repeat(5, 1, 1, 1)),
    mutant("convolution/fused ReLU's mask missing in grad_bias", "missing-factor wrong-operand",
        conv_relu, classic=True, change={"grad_z.sum((0, 2, 3))": "grad_a.sum((0, 2, 3))"}),
    mutant("convolution/mirrored kernel's gradient mirrored back along one axis", "flipped",
        true_convolution, classic=True, change={"flip([2, 3])": "flip([2])"}),
)  # fmt: skip
