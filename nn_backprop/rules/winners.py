"""k winners: of all units of an example, only the few with the largest activations stay active."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def k_winners(input: Tensor, k: int, boost: Tensor | None = None) -> Tensor:
    """Keeps the k units of each example with the largest input · boost, and sets the others to 0.

    `boost` decides who wins and nothing else: what is passed on is the input itself. It is taken as
    a constant: no gradient reaches it. Shapes: input (N, ...), at least two axes, of which all but
    the first are the units that compete; boost of any shape that expands to the input's; the output
    has the input's shape. With k at least the number of units the output is the input. Ties and
    NaN: see `k_winners_forward`. Raises ValueError for a k below 1 and for other shapes.
    """
    operands = (input,) if boost is None else (input, boost)
    if has_torch_function(operands):
        return handle_torch_function(k_winners, operands, input, k, boost)
    return k_winners_forward(input, k, boost)[0]


def k_winners_forward(
    x: Float[Tensor, "*shape"], k: int, boost: Float[Tensor, "..."] | None = None
) -> tuple[Float[Tensor, "*shape"], tuple]:
    """The k largest activations of each example, chosen after a boost and passed on without it.

    Forward:
        z[n,u] = x[n,u] [u wins in n],  the winners being the k units u of largest x[n,u] boost[u]

    Derivation:
        Fix an example and call x[u] boost[u] the score of unit u. As long as no score overtakes
        that of a winner from below, the winners stay the same ones. There z is linear in x: of a
        winner, z[u] = x[u], a copy with slope 1; of a loser, z[u] = 0, with slope 0. No z[u]
        depends on another unit, and none on the boost, which only says where such a region ends:
        its derivative is 0, and the rule treats it as a constant.

        A worked case, k = 1, x = (3, 1, 2): without a boost unit 0 wins, z = (3, 0, 0), and
        grad_x = (grad_z[0], 0, 0). With boost = (1, 4, 1) the scores are (3, 4, 2), so that unit 1
        wins: z = (0, 1, 0), not 4, and grad_x = (0, grad_z[1], 0).

        Where a loser draws level with a winner, z jumps: one of the two falls to 0 and the other
        rises from it. (A maximum has only a kink there.) No derivative exists, and the rule takes
        the one of the region that the tie is counted to. Of equal scores the first in reading
        order wins, as in max-pooling: for maps by channel, then row, then column, whatever the
        order in memory. torch.topk promises nothing about which of them it returns, so only the
        k-th largest score is taken from it, which is certain; the ties are counted here. No score
        compares with NaN: an example that has one among its scores is passed on whole, so that the
        NaN is seen. If k is the number of units or more, all win, whatever the boost, and z is x.

    Backward:
        grad_x[n,u] = grad_z[n,u] [u wins in n]

    Saved:
        who loses, one byte a unit.

    Shapes:
        x and z (N, ...), u standing for all axes but the first; boost any shape that expands to
        that of x, such as (C, 1, 1) for one number a channel.

    Source:
        Ahmad & Scheinkman 2019, How can we be so dense? The benefits of using highly sparse
        representations; without the boost, Makhzani & Frey 2014, k-sparse autoencoders.
    """
    if x.dim() < 2:
        raise ValueError(
            f"the units of examples are (N, ...), with two axes or more, not {x.dim()}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    score = x.detach()
    if boost is not None:
        try:
            score = score * boost.detach().expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"boost must expand to the activations' {(*x.shape,)}, which {(*boost.shape,)} "
                "does not"
            ) from None
    score = score.flatten(1)
    if k >= score.shape[1]:
        return x, (None,)
    least = score.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)  # NaN if one is there
    room = k - (score > least).sum(1, keepdim=True)  # for so many of those that tie at `least`
    tied = score == least
    losers = (score < least) | (tied & (tied.cumsum(1, dtype=torch.int32) > room))
    losers = losers.view(x.shape)
    return x.masked_fill(losers, 0), (losers,)


def k_winners_backward(grad_z: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (losers,) = saved
    if not needs[0]:
        return None, None
    return grad_z if losers is None else grad_z.masked_fill(losers, 0), None
