"""Mistakes in convolutions: z_nohw = Σ_cpq patches_ncpqhw weight_ocpq + bias_o."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, layer_of, mutant, numbers


def patches_of(x, kernel, stride=1, padding=0, dilation=1):
    """ncpqhw, with h and w laid out in one axis."""
    patches = F.unfold(x, tuple(kernel), dilation, padding, stride)
    return patches.view(len(x), x.shape[1], *kernel, -1)


def conv(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Case:
    @layer_of(
        lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups),
        *(x_shape, weight_shape, (weight_shape[0],)),
    )
    def convolution(grad_z, z, x, weight, bias):
        patches = patches_of(x, weight.shape[2:], stride, padding, dilation)
        by_group = torch.einsum(
            "ngol,ngcpql->gocpq",
            grad_z.flatten(2).unflatten(1, (groups, -1)),
            patches.unflatten(1, (groups, -1)),
        )
        # grad_x: grad_z spread out by the stride, correlated with the kernel mirrored in space.
        n, o, h, w = grad_z.shape
        spread = grad_z.new_zeros(n, o, (h - 1) * stride + 1, (w - 1) * stride + 1)
        spread[..., ::stride, ::stride] = grad_z
        kernel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        rows, columns = dilation * (weight.shape[2] - 1), dilation * (weight.shape[3] - 1)
        around = F.pad(spread, (columns, columns, rows, rows))
        reached = F.conv2d(around, kernel, dilation=dilation, groups=groups)
        below = x.shape[2] + 2 * padding - reached.shape[2]  # what no window reached: zero
        right = x.shape[3] + 2 * padding - reached.shape[3]
        padded = F.pad(reached, (0, right, 0, below))
        first = padding
        grad_x = padded[..., first : first + x.shape[2], first : first + x.shape[3]]
        return grad_x, by_group.flatten(0, 1), grad_z.sum((0, 2, 3))

    return convolution


def with_symmetric_kernel(x, weight, *bias):
    weight = weight + weight.flip(2, 3)
    return x, weight + weight.transpose(0, 1), *bias


def dense_patches(x, z, weight, stride, padding):
    """The patches of a layer without dilation that start where z's dilated ones do."""
    patches = patches_of(x, weight.shape[2:], stride, padding)
    rows = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    return patches.unflatten(-1, (rows, -1))[..., : z.shape[2], : z.shape[3]].flatten(-2)


def leaking(grad_x, groups):
    grad_groups = grad_x.unflatten(1, (groups, -1))
    return grad_groups.sum(1, keepdim=True).expand_as(grad_groups).flatten(1, 2)


def conv_by_patches(stride: int) -> Case:
    """The same layer by unfolding, one matrix product, and folding back window by window."""

    def by_patches(x, weight):
        patches = patches_of(x, weight.shape[2:], stride)
        columns = (x.shape[3] - weight.shape[3]) // stride + 1
        return torch.einsum("ncpql,ocpq->nol", patches, weight).unflatten(2, (-1, columns))

    @layer_of(by_patches, (2, 3, 7, 5), (5, 3, 3, 2))
    def convolution(grad_z, z, x, weight):
        patches = patches_of(x, weight.shape[2:], stride)
        grad_patches = torch.einsum("nohw,ocpq->ncpqhw", grad_z, weight)
        grad_x = torch.zeros_like(x)
        for h in range(z.shape[2]):
            for w in range(z.shape[3]):
                rows = slice(h * stride, h * stride + weight.shape[2])
                columns = slice(w * stride, w * stride + weight.shape[3])
                grad_x[:, :, rows, columns] += grad_patches[..., h, w]
        return grad_x, torch.einsum("nol,ncpql->ocpq", grad_z.flatten(2), patches)

    return convolution


@layer_of(lambda x, weight: F.conv_transpose2d(x, weight, padding=1), (2, 3, 7, 5), (3, 3, 3, 3))
def transposed_conv(grad_z, z, x, weight):
    patches = patches_of(grad_z, weight.shape[2:], padding=1)
    grad_weight = torch.einsum("ncl,nopql->copq", x.flatten(2), patches)
    return F.conv2d(grad_z, weight, padding=1), grad_weight


def padded_conv(mode: str, *shapes: tuple[int, ...]) -> Case:
    """In one dimension; causal (the padding is all on the left), circular, or reflect, where the
    edge itself is not repeated."""

    def around(x, k):
        return F.pad(x, (k - 1, 0)) if mode == "causal" else F.pad(x, (k // 2, k // 2), mode=mode)

    @layer_of(lambda x, weight: F.conv1d(around(x, weight.shape[2]), weight), *shapes)
    def convolution(grad_z, z, x, weight):
        k, p = weight.shape[2], weight.shape[2] // 2
        grad_weight = torch.einsum("not,nctk->ock", grad_z, around(x, k).unfold(2, k, 1))
        grad_padded = F.conv_transpose1d(grad_z, weight)
        if mode == "causal":
            return grad_padded[..., k - 1 :], grad_weight
        grad_x = grad_padded[..., p:-p].clone()
        if mode == "circular":
            grad_x[..., -p:] += grad_padded[..., :p]
            grad_x[..., :p] += grad_padded[..., -p:]
        else:
            grad_x[..., 1 : p + 1] += grad_padded[..., :p].flip(-1)
            grad_x[..., -p - 1 : -1] += grad_padded[..., -p:].flip(-1)
        return grad_x, grad_weight

    return convolution


def windows_of(x, weight):
    return x.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)


# Every channel has two kernels of its own.
@layer_of(lambda x, weight: F.conv2d(x, weight, groups=x.shape[1]), (2, 3, 7, 5), (6, 1, 3, 2))
def depthwise(grad_z, z, x, weight):
    windows = windows_of(x, weight)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for o in range(len(weight)):
        c = o // 2
        grad_x[:, c] += F.conv_transpose2d(grad_z[:, o : o + 1], weight[o : o + 1])[:, 0]
        grad_weight[o, 0] = torch.einsum("nhw,nhwpq->pq", grad_z[:, o], windows[:, c])
    return grad_x, grad_weight


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
    (3, 5, 7),
    data=lambda x: (x, *numbers((5, 5, 3), seed=1)),
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
    grad_weight = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows_of(x, weight))
    return F.conv_transpose2d(grad_z, weight), grad_weight, grad_z.sum((0, 2, 3))


# What mathematicians call a convolution: the kernel mirrored.
@layer_of(lambda x, weight: F.conv2d(x, weight.flip(2, 3)), (2, 3, 7, 5), (5, 3, 2, 3))
def true_convolution(grad_z, z, x, weight):
    grad_mirrored = torch.einsum("nohw,nchwpq->ocpq", grad_z, windows_of(x, weight))
    return F.conv_transpose2d(grad_z, weight.flip(2, 3)), grad_mirrored.flip([2, 3])


PLAIN = conv((2, 3, 7, 5), (5, 3, 3, 2))
GROUPED = conv((2, 6, 7, 5), (4, 3, 3, 2), groups=2)

CONVOLUTION = (
    mutant("convolution/kernel not flipped in grad_x", "flipped",
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1).on(with_symmetric_kernel),
        change={".flip(2, 3)": ""}),
    mutant("convolution/grad_weight flipped", "flipped", PLAIN, conv((2, 3, 7, 5), (5, 3, 1, 1)),
        weight=lambda at: at.grad_weight.flip(2, 3)),
    mutant("convolution/channels not exchanged in grad_x", "transposed wrong-operand",
        conv((2, 3, 7, 5), (3, 3, 3, 2)),
        conv((2, 3, 7, 5), (3, 3, 3, 3)).on(with_symmetric_kernel), classic=True,
        change={"weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)": "weight"}),
    mutant("convolution/input channels of grad_weight in reverse order", "permuted", PLAIN,
        conv((2, 1, 7, 5), (5, 1, 3, 2)), weight=lambda at: at.grad_weight.flip(1)),
    mutant("convolution/padding not cropped", "shifted",
        conv((2, 3, 7, 5), (5, 3, 3, 2), padding=1), PLAIN,
        change={"first = padding": "first = 0"}),
    mutant("convolution/upstream gradient not spread out by the stride", "wrong-operand",
        conv((2, 3, 7, 5), (5, 3, 3, 2), stride=2), PLAIN,
        change={"spread[..., ::stride, ::stride] = grad_z": "spread = grad_z"}),
    mutant("convolution/remainder rows of a stride put first", "shifted",
        conv((2, 3, 8, 7), (5, 3, 3, 2), stride=2), PLAIN, classic=True,
        change={"(0, right, 0, below)": "(right, 0, below, 0)"}),
    mutant("convolution/remainder rows of a stride cut off", "subset",
        conv((2, 3, 8, 6), (5, 3, 3, 3), stride=2, padding=1), PLAIN,
        change={"padded = F.pad(reached, (0, right, 0, below))":
                "padded = F.pad(F.pad(reached, (-padding,) * 4), (0, right, 0, below))",
                "first = padding": "first = 0"}),
    mutant("convolution/dilation ignored in grad_weight", "wrong-operand",
        conv((2, 3, 11, 7), (5, 3, 3, 2), dilation=2), PLAIN,
        change={"patches_of(x, weight.shape[2:], stride, padding, dilation)":
                "dense_patches(x, z, weight, stride, padding)"}),
    mutant("convolution/grad_x leaks between groups", "extra-term wrong-reduction", GROUPED, PLAIN,
        change={"return grad_x,": "return leaking(grad_x, groups),"}),
    mutant("convolution/grad_weight of group 0 only", "subset", GROUPED, PLAIN, classic=True,
        change={"by_group.flatten": "torch.cat([by_group[:1], 0 * by_group[1:]]).flatten"}),
    mutant("convolution/grad_bias from one position", "subset", PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z[:, :, 0, 0].sum(0)),
    mutant("convolution/grad_bias averaged over the positions", "scale wrong-reduction", PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z.mean((2, 3)).sum(0)),
    mutant("convolution/fold overwrites where patches overlap", "overwritten", conv_by_patches(1),
        conv_by_patches(3), change={"+=": "="}),
    mutant("convolution/transposed convolution with the plain one's gradient", "wrong-operand",
        transposed_conv, transposed_conv.on(with_symmetric_kernel), classic=True,
        change={"F.conv2d(grad_z": "F.conv_transpose2d(grad_z"}),
)  # fmt: skip
UNSEEN_CONVOLUTION = (
    mutant("convolution/causal convolution cropped on the wrong side", "shifted",
        padded_conv("causal", (2, 3, 11), (5, 3, 3)), classic=True,
        change={"[..., k - 1 :]": "[..., : x.shape[2]]"}),
    mutant("convolution/depthwise kernels of one channel overwrite each other",
        "overwritten subset", depthwise, change={"grad_x[:, c] +=": "grad_x[:, c] ="}),
    mutant("convolution/gradient of the circular padding dropped", "missing-term subset",
        padded_conv("circular", (2, 3, 7), (3, 3, 5)),
        change={"grad_x[..., -p:] += grad_padded[..., :p]": "pass",
                "grad_x[..., :p] += grad_padded[..., -p:]": "pass"}),
    mutant("convolution/reflected border folded back on the edge", "shifted wrong-operand",
        padded_conv("reflect", (2, 3, 7), (3, 3, 5)),
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
