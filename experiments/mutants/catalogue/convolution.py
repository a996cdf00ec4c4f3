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
    symmetric: bool = False,
) -> Case:
    def data():
        x, weight, bias = numbers(x_shape, weight_shape, (weight_shape[0],))
        if symmetric:
            weight = weight + weight.flip(2, 3)
            weight = weight + weight.transpose(0, 1)
        return x, weight, bias

    @layer_of(
        lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups), data
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


def transposed_conv(symmetric: bool = False) -> Case:
    _, _, data = conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=symmetric)

    @layer_of(lambda x, weight: F.conv_transpose2d(x, weight, padding=1), lambda: data()[:2])
    def transposed_convolution(grad_z, z, x, weight):
        patches = patches_of(grad_z, weight.shape[2:], padding=1)
        grad_weight = torch.einsum("ncl,nopql->copq", x.flatten(2), patches)
        return F.conv2d(grad_z, weight, padding=1), grad_weight

    return transposed_convolution


PLAIN = conv((2, 3, 7, 5), (5, 3, 3, 2))
GROUPED = conv((2, 6, 7, 5), (4, 3, 3, 2), groups=2)

CONVOLUTION = (
    mutant("convolution/kernel not flipped in grad_x", "flipped",
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1, symmetric=True), change={".flip(2, 3)": ""}),
    mutant("convolution/grad_weight flipped", "flipped", PLAIN, conv((2, 3, 7, 5), (5, 3, 1, 1)),
        weight=lambda at: at.grad_weight.flip(2, 3)),
    mutant("convolution/channels not exchanged in grad_x", "transposed wrong-operand",
        conv((2, 3, 7, 5), (3, 3, 3, 2)), conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=True),
        classic=True,
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
        transposed_conv(), transposed_conv(symmetric=True), classic=True,
        change={"F.conv2d(grad_z": "F.conv_transpose2d(grad_z"}),
)  # fmt: skip
