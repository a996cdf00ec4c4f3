"""Convolution: one small set of weights, used at every position of the image.

Letters: n batch (may be absent), g group, c in-channel and o out-channel within their group, h w
position in the output, p q offset in the kernel; x̃ the image with its border of zeros, i j pixel
of x̃. [condition] is 1 where the condition holds, else 0. A kernel of size P × Q that moves in
steps of s and whose taps lie d apart reads, for the output at (h, w), the pixels (s h + d p, s w +
d q) of the padded image. Those pixels are the *patch* of (h, w); once they are laid out as an array
of their own, with letters h w p q, the convolution is a weighted sum like any other and its
gradients follow by rearranging letters. What remains is the way back from patches to pixels, where
what a pixel gives to several patches comes together again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pair = int | tuple[int, ...] | list[int]


class Window(NamedTuple):
    """Where a kernel of size P × Q looks, as it slides over an image of H × W pixels.

    Pairs are (vertical, horizontal); padding is (top, bottom, left, right). In the code (s, t) is
    the stride and (d, e) the dilation; the equations write s and d for both.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    def places(self, H: int, W: int) -> tuple[int, int]:
        """How many places the window has on an image: (rows, columns); 0 or less if none."""
        (P, Q), (s, t), (top, bottom, left, right), (d, e) = self
        h = (H + top + bottom - d * (P - 1) - 1) // s + 1
        return h, (W + left + right - e * (Q - 1) - 1) // t + 1

    def patches(self, x: Float[Tensor, "*n H W c"]) -> Float[Tensor, "*n h w P Q c"]:
        """patches[h,w,p,q,c] = x̃[s h + d p, s w + d q, c], where x̃ is x with a border of zeros.

        A view of the padded image: `unfold` takes the windows, the slice drops what lies between
        the taps of a dilated kernel. The channels stand last, so that whoever lays the patches out
        as an array of their own moves rows of them and not single numbers.
        """
        top, bottom, left, right = self.padding
        padded = F.pad(x, (0, 0, left, right, top, bottom)) if any(self.padding) else x
        (P, Q), (d, e) = self.kernel, self.dilation
        windows = padded.unfold(-3, d * (P - 1) + 1, self.stride[0])
        windows = windows.unfold(-3, e * (Q - 1) + 1, self.stride[1])  # h w c p q
        return windows[..., ::d, ::e].movedim(-3, -1)

    def scatter(
        self, grad_patches: Float[Tensor, "*n h w P Q c"], size: tuple[int, int]
    ) -> Float[Tensor, "*n H W c"]:
        """The transpose of `patches`: every patch adds its gradient to the pixels that it read.

        grad_x̃[s h + d p, s w + d q, c] += grad_patches[h,w,p,q,c]. A pixel that several patches
        read gets several contributions; one that no patch reads, because of the stride, gets none.
        For one offset (p, q) the pixels are a regular grid, so the sum takes one slice an offset.
        The border is cut off at the end: it was made of constants.
        """
        *n, h, w, P, Q, C = grad_patches.shape
        top, bottom, left, right = self.padding
        H, W = size
        (s, t), (d, e) = self.stride, self.dilation
        grad_padded = grad_patches.new_zeros(*n, top + H + bottom, left + W + right, C)
        for p in range(P):
            for q in range(Q):
                rows = slice(d * p, d * p + s * (h - 1) + 1, s)
                columns = slice(e * q, e * q + t * (w - 1) + 1, t)
                grad_padded[..., rows, columns, :] += grad_patches[..., p, q, :]
        return grad_padded[..., top : top + H, left : left + W, :]


def conv2d_forward(
    x: Float[Tensor, "*n C H W"],
    weight: Float[Tensor, "O K P Q"],
    bias: Float[Tensor, " O"] | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> tuple[Float[Tensor, "*n O h w"], tuple]:
    """Each output is a weighted sum of a small patch of the image; all positions share the weights.

    The equations write the channel before the pixel, as torch does; the code lays both out with the
    channel last.

    Forward:
        z[n,g,o,h,w] = Σ_c,p,q patches[n,g,c,h,w,p,q] weight[g,o,c,p,q] + bias[g,o]
        patches[n,g,c,h,w,p,q] = x̃[n,g,c, s h + d p, s w + d q]

    Derivation:
        Groups do not mix; drop the letter g. Suppose first that every position (h, w) had weights
        of its own, weight[h,w,o,c,p,q]. Then each of them meets one patch, and as in a linear layer
            grad_weight[h,w,o,c,p,q] = Σ_n grad_z[n,o,h,w] patches[n,c,h,w,p,q].
        Sharing says that these weights are one variable. The loss depends on it through every
        position, so its gradient is the sum over h and w of the unshared ones: this is what a sum
        over the letters that the operand lacks means here.

        For the image, the linear layer's other gradient gives what each *patch* gets:
            grad_patches[n,c,h,w,p,q] = Σ_o grad_z[n,o,h,w] weight[o,c,p,q].
        Pixel (i, j) of x̃ stands in the patch of (h, w) at the offset (p, q) whenever i = s h + d p
        and j = s w + d q, and the chain rule adds up all these ways. For one channel and
        s = d = 1 that is p = i − h and q = j − w, so that
            grad_x̃[i,j] = Σ_h,w grad_z[h,w] weight[i−h, j−w]
        (terms outside the kernel are 0), a sum in which the kernel runs backwards: a convolution of
        grad_z with the kernel mirrored in both axes; `_image_gradient` has it for any s and d. The
        border was made of constants, so its part of grad_x̃ is dropped. The bias is added at every
        n, h and w with slope 1: grad_bias sums over them.

        A worked case, one row, kernel (a, b), s = d = 1, no border: z_0 = a x_0 + b x_1 and
        z_1 = a x_1 + b x_2. So grad_a = grad_z_0 x_0 + grad_z_1 x_1 (shared, hence two terms) and
        grad_x_1 = b grad_z_0 + a grad_z_1 (read twice, hence two terms, kernel mirrored).

    Backward:
        grad_x̃[n,g,c,i,j] = Σ_h,w,p,q [i = s h + d p] [j = s w + d q] (
                                Σ_o grad_z[n,g,o,h,w] weight[g,o,c,p,q] )
        grad_x = grad_x̃ without the border
        grad_weight[g,o,c,p,q] = Σ_n,h,w grad_z[n,g,o,h,w] patches[n,g,c,h,w,p,q]
        grad_bias[g,o] = Σ_n,h,w grad_z[n,g,o,h,w]

    Saved:
        x and weight. The patches are up to P·Q times as large as x, and are cut again in the
        backward.

    Shapes:
        x (N, C, H, W) or (C, H, W); weight (O, C/groups, P, Q); bias (O,); z (N, O, H', W') with
        H' = ⌊(H + top + bottom − d (P − 1) − 1) / s⌋ + 1, and W' likewise.

    Source:
        LeCun et al. 1989, Backpropagation applied to handwritten zip code recognition, section 3;
        Dumoulin & Visin 2016, A guide to convolution arithmetic, for strides and padding.
    """
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    kernel = (weight.shape[2], weight.shape[3])
    window = Window(kernel, pair(stride), border(padding, kernel, pair(dilation)), pair(dilation))
    return z, (x, weight, window, groups)


def conv2d_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, weight, window, groups = saved
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _image_gradient(grad_z, weight, window, groups, (x.shape[-2], x.shape[-1]))
    if needs[1] or needs[2]:
        grad_z = _channels_last(grad_z, groups).flatten(1, 3)  # g nhw o
    if needs[1]:
        patches = window.patches(_channels_last(x, groups))  # g n h w p q c
        patches = patches.permute(0, 4, 5, 1, 2, 3, 6).flatten(3, 5)  # g p q nhw c, laid out anew
        grad_weight = torch.stack([a.mT @ b for a, b in zip(patches, grad_z, strict=True)])
        grad_weight = grad_weight.permute(0, 4, 3, 1, 2).flatten(0, 1)  # gpqnhwc,gnhwo->gocpq
    if needs[2]:
        grad_bias = grad_z.sum(1).flatten()  # gnhwo->go
    return grad_x, grad_weight, grad_bias


def _image_gradient(
    grad_z: Tensor, weight: Tensor, window: Window, groups: int, size: tuple[int, int]
) -> Tensor:
    """grad_x[i,j] = Σ_h,w,p,q [i = s h + d p] [j = s w + d q] Σ_o grad_z[o,h,w] weight[o,c,p,q].

    A convolution, too: lay grad_z[h,w] at the pixel (s h, s w), with zeros between and a border of
    d (P − 1) zeros, and let the kernel run over it backwards, with its taps d apart. At pixel i its
    tap p then reads from s h = i − d p, which is the condition above.
    """
    (P, Q), (s, t), (top, bottom, left, right), (d, e) = window
    if (s, t) != (1, 1):
        spread = grad_z.new_zeros(
            *grad_z.shape[:-2], s * (grad_z.shape[-2] - 1) + 1, t * (grad_z.shape[-1] - 1) + 1
        )
        spread[..., ::s, ::t] = grad_z
        grad_z = spread
    mirrored = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # gc o
    border = (d * (P - 1), e * (Q - 1))
    grad_padded = F.conv2d(grad_z, mirrored, None, 1, border, (d, e), groups)
    # The stride may have left pixels unread, at the bottom and on the right: their gradient is 0.
    H, W = size
    missing = (top + H + bottom - grad_padded.shape[-2], left + W + right - grad_padded.shape[-1])
    if any(missing):
        grad_padded = F.pad(grad_padded, (0, missing[1], 0, missing[0]))
    return grad_padded[..., top : top + H, left : left + W]


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) or (C, H, W) as (groups, N, H, W, C/groups), in that order in memory."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).contiguous()


def pair(size: Pair) -> tuple[int, int]:
    """torch's size arguments: one number for both axes, or (vertical, horizontal)."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def border(padding: Pair | str, kernel: tuple, dilation: tuple) -> tuple[int, int, int, int]:
    """Rows and columns added at the top, bottom, left and right.

    'same' adds d (k − 1) an axis, so that z is as large as x; of an odd number, the larger half
    goes to the bottom and to the right.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    assert not isinstance(padding, str)
    vertical, horizontal = pair(padding)
    return vertical, vertical, horizontal, horizontal
