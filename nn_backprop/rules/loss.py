"""Losses: one number for how far the answers of a network are from the wanted ones.

Letters: n example (every axis but that of the classes; for the mean square, any element), k j
class, of C; weight[k] is 1 where no weight is given; [condition] is 1 where it holds, else 0.
each[n] is the loss of one example, of which a `reduction` makes the loss that is returned:

    none:  loss[n] = each[n],           so grad_each[n] = grad_loss[n]
    sum:   loss = Σ_n each[n],          so grad_each[n] = grad_loss
    mean:  loss = (Σ_n each[n]) / D,    so grad_each[n] = grad_loss / D

D is a number of examples, or the sum of their weights: each rule says which. Where a tensor has 16
bits, the backward calculates in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nn_backprop.rules.arithmetic import like, unbroadcast, wide


def cross_entropy_forward(
    logits: Float[Tensor, "..."],
    y: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, " C"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, "..."], tuple]:
    """Minus the logarithm of the probability that softmax gives to the wanted class.

    Forward:
        log_p[n,k] = logits[n,k] − log Σ_j e^logits[n,j]
        q[n,k] = weight[k] ((1 − ε) y[n,k] + ε/C),  ε = label_smoothing
        each[n] = −Σ_k q[n,k] log_p[n,k]
        loss = each, Σ_n each[n] or (Σ_n each[n]) / D, as `reduction` says

    Derivation:
        y[n,k] is the share of class k that example n should have. A class index y[n] stands for
        the shares y[n,k] = [k = y[n]]. D is the number of examples for shares, and for indices the
        sum of weight[y[n]]. Where y[n] is `ignore_index`, each[n] is 0 whatever the logits, so
        grad_each[n] counts as 0, and n is left out of D.

        The slope of log Σ_k e^logits[k] (n is dropped) in logits[j] is
        e^logits[j] / Σ_k e^logits[k] = p[j], so ∂log_p[k]/∂logits[j] = [k = j] − p[j], and
            ∂each[n]/∂logits[n,j] = −Σ_k q[n,k] ([k = j] − p[n,j]) = p[n,j] Σ_k q[n,k] − q[n,j].
        In the plain case Σ_k q[n,k] = 1 and this is p − y: what is, minus what should be. With
        logits (0, 0, log 2) and y = 2, p = (¼, ¼, ½) and the slopes are (¼, ¼, −½). The logarithm
        is gone, so a logit of −∞, where p = 0 and log_p = −∞, leaves no 0 · ∞.

        each is linear in q, with slope −log_p[n,k]; q is linear in y with slope (1 − ε) weight[k],
        and in weight with slope (1 − ε) y[n,k] + ε/C. This is for shares, whose D is a constant. An
        index has no slope, and with indices the weight counts as a constant: torch, too, refuses
        one that requires grad.

    Backward:
        grad_logits[n,j] = grad_each[n] (p[n,j] Σ_k q[n,k] − q[n,j])
        grad_y[n,k] = −grad_each[n] (1 − ε) weight[k] log_p[n,k]
        grad_weight[k] = −Σ_n grad_each[n] ((1 − ε) y[n,k] + ε/C) log_p[n,k]

    Saved:
        logits, y and weight; softmax is taken again.

    Shapes:
        logits (N, C), (C,) or (N, C, d1, ...), y the same (shares) or without the axis of C
        (indices), weight (C,), loss () or, not reduced, as the logits without the axis of C.

    Source:
        Bridle 1990, Probabilistic interpretation of feedforward classification network outputs;
        Szegedy et al. 2016, Rethinking the Inception architecture for computer vision, section 7,
        for ε.
    """
    loss = F.cross_entropy(
        logits,
        y,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss, (logits, y, weight, ignore_index, reduction, label_smoothing)


def cross_entropy_backward(grad_loss: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    logits, y, weight, ignore_index, reduction, smoothing = saved
    axis = _class_axis(logits.shape)
    C = logits.shape[axis]
    wide_logits, weights = wide(logits), _along_classes(weight, logits.shape)
    counted: Tensor | None = None  # where an example can be ignored: 1 where it is not
    if y.is_floating_point():
        shares = wide(y)
        grad_each = _grad_each(grad_loss, reduction, y.numel() // C, axis)
    else:
        hit = _one_hot(y, logits.shape, ignore_index)
        counted = hit.any(axis, keepdim=True)
        shares = hit.to(wide_logits.dtype)
        D = counted.sum() if weight is None else (weights * shares).sum()
        grad_each = torch.where(counted, _grad_each(grad_loss, reduction, D, axis), 0.0)
    if smoothing:
        shares = (1 - smoothing) * shares + smoothing / C

    grad_logits = grad_y = grad_weight = None
    if needs[0]:
        p = torch.softmax(wide_logits, axis)
        if weight is None and counted is not None:  # Σ_k q[n,k] = 1, or grad_each[n] = 0
            grad_logits = (grad_each * (p - shares)).to(logits.dtype)
        else:
            q = weights * shares
            grad_logits = (grad_each * (p * q.sum(axis, keepdim=True) - q)).to(logits.dtype)
    if y.is_floating_point() and any(needs[1:]):
        grad_q = -grad_each * torch.log_softmax(wide_logits, axis)
        if needs[1]:
            grad_y = (grad_q * (1 - smoothing) * weights).to(y.dtype)
        if needs[2] and weight is not None:
            grad_weight = (grad_q * shares).movedim(axis, 0).reshape(C, -1).sum(1)
            grad_weight = grad_weight.to(weight.dtype)
    return grad_logits, grad_y, grad_weight


def nll_loss_forward(
    x: Float[Tensor, "..."],
    y: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, " C"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Float[Tensor, "..."], tuple]:
    """Negative log-likelihood: x holds log-probabilities, and minus the wanted class's is paid.

    Forward:
        each[n] = −weight[y[n]] x[n,y[n]],  or 0 where y[n] is `ignore_index`
        loss = each, Σ_n each[n] or (Σ_n each[n]) / D, as `reduction` says

    Derivation:
        each[n] reads one entry of x[n,·], with the factor −weight[y[n]]; its slope in the others is
        0. D is the sum of weight[y[n]] over the examples not ignored, and constant in x. After
        log_softmax this is cross_entropy: the −weight[y[n]] that arrives at one class turns into
        weight[y[n]] (p[k] − [k = y[n]]) at the logits. The weight counts as a constant, as there.

    Backward:
        grad_x[n,k] = −grad_each[n] weight[k] [k = y[n]]

    Saved:
        y and weight, and the shape and type of x.

    Shapes:
        x (N, C), (C,) or (N, C, d1, ...), y without the axis of C, weight (C,), loss () or, not
        reduced, as y.

    Source:
        Bishop 2006, Pattern recognition and machine learning, section 4.3.4.
    """
    loss = F.nll_loss(x, y, weight, ignore_index=ignore_index, reduction=reduction)
    return loss, (like(x), y, weight, ignore_index, reduction)


def nll_loss_backward(grad_loss: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    (shape, dtype), y, weight, ignore_index, reduction = saved
    if not needs[0]:
        return None, None, None
    hit = _one_hot(y, shape, ignore_index)
    weights = _along_classes(None if weight is None else wide(weight), shape)
    grad_each = _grad_each(grad_loss, reduction, (weights * hit).sum(), _class_axis(shape))
    return torch.where(hit, -grad_each * weights, 0.0).to(dtype), None, None


def mse_loss_forward(
    x: Shaped[Tensor, "..."],
    y: Shaped[Tensor, "..."],
    reduction: str = "mean",
    weight: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "..."], tuple]:
    """The square of the difference, element by element, and its mean.

    Forward:
        each[n] = weight[n] (x[n] − y[n])²
        loss = each, Σ_n each[n] or (Σ_n each[n]) / D, as `reduction` says

    Derivation:
        d(x − y)² = 2 (x − y) (dx − dy), so the two gradients are opposite. D is the number of
        elements, or with a weight its sum, D = Σ_n weight[n], which then has a slope too: by the
        quotient rule ∂loss/∂weight[n] = ((x[n] − y[n])² − loss) / D. (Raising the weight of an
        element moves a mean towards it.) The other reductions lack D, hence the term −loss.

        An operand that was broadcast sums over its copies (`unbroadcast`). The weight has the shape
        of x, and D adds up its entries once each, even where y stretches it, as torch does.

    Backward:
        grad_x[n] = grad_each[n] 2 weight[n] (x[n] − y[n])
        grad_y[n] = −grad_each[n] 2 weight[n] (x[n] − y[n])
        grad_weight[n] = grad_each[n] ((x[n] − y[n])² − [reduction is mean] loss)

    Saved:
        x, y and weight.

    Shapes:
        x and y of any shapes that broadcast, weight as x, loss () or, not reduced, the common
        shape. torch warns where the shapes of x and y differ.

    Source:
        Rumelhart, Hinton & Williams 1986, Learning representations by back-propagating errors,
        equations 3 and 4.
    """
    weighting: dict[str, Any] = {} if weight is None else {"weight": weight}  # older torch lacks it
    return F.mse_loss(x, y, reduction=reduction, **weighting), (x, y, reduction, weight)


def mse_loss_backward(grad_loss: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    x, y, reduction, weight = saved
    error = wide(x) - wide(y)
    weights = None if weight is None else wide(weight)
    D = error.numel() if weights is None else weights.sum()
    grad_each = _grad_each(grad_loss, reduction, D)
    grad_error = 2 * grad_each * (error if weights is None else weights * error)
    grad_x = unbroadcast(grad_error, (x.shape, x.dtype)) if needs[0] else None
    grad_y = unbroadcast(-grad_error, (y.shape, y.dtype)) if needs[1] else None
    grad_weight = None
    if needs[2] and weights is not None:
        grad_weight = unbroadcast(grad_each * error**2, (weights.shape, weights.dtype))
        if reduction == "mean":
            grad_weight = grad_weight - grad_each * ((weights * error**2).sum() / D)
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_y, grad_weight


def _grad_each(
    grad_loss: Tensor, reduction: str, D: Tensor | int, axis: int | None = None
) -> Tensor:
    """grad_each[n] of the table above, with an axis of size 1 where the classes have theirs."""
    grad_each = wide(grad_loss)
    if reduction == "mean":
        return grad_each / D
    return grad_each if reduction == "sum" or axis is None else grad_each.unsqueeze(axis)


def _one_hot(y: Tensor, shape: tuple[int, ...], ignore_index: int) -> Bool[Tensor, "..."]:
    """[k = y[n]] in the shape of the logits; False for every k where example n is ignored."""
    axis = _class_axis(shape)
    y = y.long().reshape(shape[:axis] + shape[axis + 1 :]).unsqueeze(axis)
    k = _along_classes(torch.arange(shape[axis], device=y.device), shape)
    return (y == k) & (y != ignore_index)


def _along_classes(vector: Tensor | None, shape: tuple[int, ...]) -> Tensor | float:
    """One number a class, laid along the class axis of the logits' shape; 1 if there are none."""
    if vector is None:
        return 1.0
    return vector.reshape(-1, *[1] * (len(shape) - 1 - _class_axis(shape)))


def _class_axis(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) > 1 else 0
