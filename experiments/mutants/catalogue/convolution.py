"""Mistakes in convolutions: z_nohw = Σ_cpq patches_ncpqhw weight_ocpq + bias_o."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, mutant, normal, numbers


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
    def convolution(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def grad_of_x(grad_z, x, weight, mistake):
        """grad_z spread out by the stride, correlated with the kernel mirrored in space."""
        n, o, h, w = grad_z.shape
        spread = grad_z.new_zeros(n, o, (h - 1) * stride + 1, (w - 1) * stride + 1)
        spread[..., ::stride, ::stride] = grad_z
        if mistake == "stride not spread out":
            spread = grad_z
        kernel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        if mistake == "kernel not flipped":
            kernel = kernel.flip(2, 3)
        elif mistake == "channels not exchanged":
            kernel = weight.flip(2, 3)
        rows, columns = dilation * (weight.shape[2] - 1), dilation * (weight.shape[3] - 1)
        reached = F.conv2d(
            F.pad(spread, (columns, columns, rows, rows)), kernel, dilation=dilation, groups=groups
        )
        below = x.shape[2] + 2 * padding - reached.shape[2]  # what no window reached: zero
        right = x.shape[3] + 2 * padding - reached.shape[3]
        if mistake == "remainder first":
            padded = F.pad(reached, (right, 0, below, 0))
        elif mistake == "remainder cut off":
            cropped = F.pad(reached, (-padding, -padding, -padding, -padding))
            return F.pad(cropped, (0, right, 0, below))
        else:
            padded = F.pad(reached, (0, right, 0, below))
        first = 0 if mistake == "padding not cropped" else padding
        return padded[..., first : first + x.shape[2], first : first + x.shape[3]]

    def backward(grad_z, z, x, weight, bias, mistake=""):
        if mistake == "dilation ignored":  # the dense patches that start where the dilated ones do
            patches = patches_of(x, weight.shape[2:], stride, padding)
            rows = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
            patches = patches.unflatten(-1, (rows, -1))[..., : z.shape[2], : z.shape[3]]
            patches = patches.flatten(-2)
        else:
            patches = patches_of(x, weight.shape[2:], stride, padding, dilation)
        grad_weight = torch.einsum(
            "ngol,ngcpql->gocpq",
            grad_z.flatten(2).unflatten(1, (groups, -1)),
            patches.unflatten(1, (groups, -1)),
        )
        grad_x = grad_of_x(grad_z, x, weight, mistake)
        if mistake == "group 0 only":
            grad_weight = torch.cat([grad_weight[:1], 0 * grad_weight[1:]])
        elif mistake == "leak between groups":
            grad_groups = grad_x.unflatten(1, (groups, -1))
            grad_x = grad_groups.sum(1, keepdim=True).expand_as(grad_groups).flatten(1, 2)
        return grad_x, grad_weight.flatten(0, 1), grad_z.sum((0, 2, 3))

    def data():
        x, weight, bias = numbers(x_shape, weight_shape, (weight_shape[0],))
        if symmetric:
            weight = weight + weight.flip(2, 3)
            weight = weight + weight.transpose(0, 1)
        return x, weight, bias

    return Case(convolution, backward, data)


def conv_by_patches(stride: int) -> Case:
    """The same layer by unfolding, one matrix product, and folding back window by window."""

    def convolution(x, weight):
        patches = patches_of(x, weight.shape[2:], stride)
        columns = (x.shape[3] - weight.shape[3]) // stride + 1
        return torch.einsum("ncpql,ocpq->nol", patches, weight).unflatten(2, (-1, columns))

    def backward(grad_z, z, x, weight, mistake=""):
        patches = patches_of(x, weight.shape[2:], stride)
        grad_patches = torch.einsum("nohw,ocpq->ncpqhw", grad_z, weight)
        grad_x = torch.zeros_like(x)
        for h in range(z.shape[2]):
            for w in range(z.shape[3]):
                window = grad_x[
                    :,
                    :,
                    h * stride : h * stride + weight.shape[2],
                    w * stride : w * stride + weight.shape[3],
                ]
                if mistake == "overlap overwritten":
                    window.copy_(grad_patches[..., h, w])
                else:
                    window.add_(grad_patches[..., h, w])
        return grad_x, torch.einsum("nol,ncpql->ocpq", grad_z.flatten(2), patches)

    return Case(convolution, backward, normal((2, 3, 7, 5), (5, 3, 3, 2)))


def transposed_conv(symmetric: bool = False) -> Case:
    def transposed_convolution(x, weight):
        return F.conv_transpose2d(x, weight, padding=1)

    def backward(grad_z, z, x, weight, mistake=""):
        plain = mistake == "plain convolution's gradient"
        grad_x = (F.conv_transpose2d if plain else F.conv2d)(grad_z, weight, padding=1)
        patches = patches_of(grad_z, weight.shape[2:], padding=1)
        return grad_x, torch.einsum("ncl,nopql->copq", x.flatten(2), patches)

    _, _, data = conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=symmetric)
    return Case(transposed_convolution, backward, lambda: data()[:2])


PLAIN = conv((2, 3, 7, 5), (5, 3, 3, 2))
GROUPED = conv((2, 6, 7, 5), (4, 3, 3, 2), groups=2)


# fmt: off
CONVOLUTION = (
    mutant("convolution/kernel not flipped in grad_x", ("flipped",),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1),
        conv((2, 3, 7, 5), (3, 3, 3, 3), padding=1, symmetric=True), mistake="kernel not flipped"),
    mutant("convolution/grad_weight flipped", ("flipped",), PLAIN, conv((2, 3, 7, 5), (5, 3, 1, 1)),
        weight=lambda at: at.grad_weight.flip(2, 3)),
    mutant("convolution/channels not exchanged in grad_x", ("transposed", "wrong-operand"),
        conv((2, 3, 7, 5), (3, 3, 3, 2)), conv((2, 3, 7, 5), (3, 3, 3, 3), symmetric=True),
        mistake="channels not exchanged", classic=True),
    mutant("convolution/input channels of grad_weight in reverse order", ("permuted",), PLAIN,
        conv((2, 1, 7, 5), (5, 1, 3, 2)), weight=lambda at: at.grad_weight.flip(1)),
    mutant("convolution/padding not cropped", ("shifted",),
        conv((2, 3, 7, 5), (5, 3, 3, 2), padding=1), PLAIN, mistake="padding not cropped"),
    mutant("convolution/upstream gradient not spread out by the stride", ("wrong-operand",),
        conv((2, 3, 7, 5), (5, 3, 3, 2), stride=2), PLAIN, mistake="stride not spread out"),
    mutant("convolution/remainder rows of a stride put first", ("shifted",),
        conv((2, 3, 8, 7), (5, 3, 3, 2), stride=2), PLAIN, mistake="remainder first", classic=True),
    mutant("convolution/remainder rows of a stride cut off", ("subset",),
        conv((2, 3, 8, 6), (5, 3, 3, 3), stride=2, padding=1), PLAIN, mistake="remainder cut off"),
    mutant("convolution/dilation ignored in grad_weight", ("wrong-operand",),
        conv((2, 3, 11, 7), (5, 3, 3, 2), dilation=2), PLAIN, mistake="dilation ignored"),
    mutant("convolution/grad_x leaks between groups", ("extra-term", "wrong-reduction"), GROUPED,
        PLAIN, mistake="leak between groups"),
    mutant("convolution/grad_weight of group 0 only", ("subset",), GROUPED, PLAIN,
        mistake="group 0 only", classic=True),
    mutant("convolution/grad_bias from one position", ("subset",), PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z[:, :, 0, 0].sum(0)),
    mutant("convolution/grad_bias averaged over the positions", ("scale", "wrong-reduction"), PLAIN,
        conv((2, 3, 3, 2), (5, 3, 3, 2)), bias=lambda at: at.grad_z.mean((2, 3)).sum(0)),
    mutant("convolution/fold overwrites where patches overlap", ("overwritten",),
        conv_by_patches(1), conv_by_patches(3), mistake="overlap overwritten"),
    mutant("convolution/transposed convolution with the plain one's gradient", ("wrong-operand",),
        transposed_conv(), transposed_conv(symmetric=True), mistake="plain convolution's gradient",
        classic=True),
)
# fmt: on
