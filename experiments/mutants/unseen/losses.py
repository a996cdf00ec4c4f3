"""Mistakes unseen, in losses."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from mutants.mutant import Case, mutant, normal, numbers, written_out


def logit_loss(logits, labels):
    """Binary cross entropy with logits, averaged over the classes: one loss a sample."""
    y = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)


def logit_loss_backward(grad_loss, loss, logits, labels):
    slope = (torch.sigmoid(logits) - labels) / logits.shape[1]
    return grad_loss[:, None] * slope, None


def logit_loss_data():
    logits, chance = numbers((5, 7), (5, 7))
    return logits, (chance > 0).long()


def divergence(log_q, p):
    """KL(p ‖ q), averaged over the samples."""
    return (p * (p.log() - log_q)).sum(1).mean()


def divergence_backward(grad_loss, loss, log_q, p):
    share = grad_loss / len(p)
    return -share * p, share * (p.log() - log_q + 1)


def divergence_data():
    x, y = numbers((3, 5), (3, 5))
    return x.log_softmax(1), y.softmax(1)


TEMPERATURE = 0.3


def info_nce(a, b):
    """Row n of a has to find row n of b."""
    return F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)))


def info_nce_backward(grad_loss, loss, a, b, mistake=""):
    p = (a @ b.T / TEMPERATURE).softmax(1)
    grad_scores = grad_loss * (p - torch.eye(len(a), dtype=a.dtype)) / len(a)
    if mistake != "temperature":
        grad_scores = grad_scores / TEMPERATURE
    return grad_scores @ b, grad_scores.T @ a


FOCUS = 2.0


def focal(logits, labels):
    """−(1 − p)^γ log p of the labelled classes, averaged over the samples."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** FOCUS * log_p).mean()


def focal_backward(grad_loss, loss, logits, labels, mistake=""):
    p = logits.softmax(1)
    target = F.one_hot(labels, logits.shape[1]).to(p.dtype)
    p_label = (p * target).sum(1)
    grad_log_p = -((1 - p_label) ** FOCUS)
    if mistake != "constant":
        grad_log_p = grad_log_p + FOCUS * (1 - p_label) ** (FOCUS - 1) * p_label * p_label.log()
    return grad_loss / len(p) * grad_log_p[:, None] * (target - p), None


# Over the channels of x (N, C, T).
LOG_SUM_EXP = Case(
    lambda x: x.logsumexp(1),
    lambda grad_z, z, x: (grad_z[:, None] * x.softmax(1),),
    normal((2, 3, 7)),
)


class HuberLoss(Function):
    """Quadratic up to `delta`, linear beyond, averaged over all entries."""

    delta = 0.4

    @staticmethod
    def forward(ctx, prediction, target):
        residual = prediction - target
        ctx.save_for_backward(residual)
        size, delta = residual.abs(), HuberLoss.delta
        return torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        (residual,) = ctx.saved_tensors
        far = residual.sign()  # without δ
        slope = torch.where(residual.abs() <= HuberLoss.delta, residual, far)
        grad_prediction = grad_loss * slope / residual.numel()
        return grad_prediction, -grad_prediction


class MulticlassHinge(Function):
    """Σ_{j ≠ y} max(0, 1 + s_j − s_y), averaged over the samples."""

    @staticmethod
    def forward(ctx, scores, labels):
        margin = 1 + scores - scores.gather(1, labels[:, None])
        margin = margin.scatter(1, labels[:, None], 0.0).clamp(min=0)
        ctx.save_for_backward(margin, labels)
        return margin.sum() / len(scores)

    @staticmethod
    def backward(ctx, grad_loss):
        margin, labels = ctx.saved_tensors
        share = grad_loss / len(margin)
        grad_scores = torch.zeros_like(margin)
        for n, y in enumerate(labels.tolist()):
            for j in range(margin.shape[1]):
                if margin[n, j] > 0:
                    grad_scores[n, j] += share
                    grad_scores[n, y] = -share  # = for -=
        return grad_scores, None


class TripletLoss(nn.Module):
    """max(0, ‖a − p‖² − ‖a − n‖² + margin), averaged over the triplets."""

    class Step(Function):
        @staticmethod
        def forward(ctx, anchor, positive, negative, margin):
            ctx.save_for_backward(anchor, positive, negative)
            near = (anchor - positive).square().sum(1)
            far = (anchor - negative).square().sum(1)
            violation = near - far + margin
            ctx.active = violation > 0
            return F.relu(violation).mean()

        @staticmethod
        def backward(ctx, grad_loss):
            anchor, positive, negative = ctx.saved_tensors
            share = 2 * grad_loss / len(anchor)  # of every triplet, active or not
            grad_anchor = share * (negative - positive)
            grad_positive = share * (positive - anchor)
            grad_negative = share * (anchor - negative)
            return grad_anchor, grad_positive, grad_negative, None

    def forward(self, anchor, positive, negative):
        return self.Step.apply(anchor, positive, negative, 0.5)


# fmt: off
LOSS = (
    mutant("loss/losses of the samples taken for one, upstream gradient averaged",
        ("ignores-upstream", "wrong-reduction"),
        Case(logit_loss, logit_loss_backward, logit_loss_data),
        logits=lambda at: at.grad_z.mean() * (torch.sigmoid(at.logits) - at.labels)
        / at.logits.shape[1]),
    mutant("loss/+1 missing in the target's gradient of the divergence", ("missing-term",),
        Case(divergence, divergence_backward, divergence_data),
        p=lambda at: at.grad_z / len(at.p) * (at.p.log() - at.log_q)),
    written_out("loss/Huber's δ missing on the linear part", ("wrong-branch", "missing-factor"),
        lambda: HuberLoss, normal((5, 7), (5, 7))),
    written_out("loss/hinge's target counts one violated margin", ("overwritten", "missing-factor"),
        lambda: MulticlassHinge, lambda: (*numbers((5, 7)), torch.tensor([2, 0, 6, 3, 3]))),
    written_out("loss/triplets beyond the margin counted", ("missing-factor", "wrong-branch"),
        TripletLoss, normal((7, 5), (7, 5), (7, 5))),
    mutant("loss/temperature missing in the contrastive gradient", ("scale", "missing-factor"),
        Case(info_nce, info_nce_backward, normal((5, 3), (5, 3))), mistake="temperature"),
    mutant("loss/focal weight taken for a constant", ("missing-term",),
        Case(focal, focal_backward, lambda: (*numbers((5, 3)), torch.tensor([2, 0, 1, 1, 0]))),
        mistake="constant", classic=True),
    mutant("loss/log-sum-exp with the softmax over the last axis",
        ("wrong-reduction", "wrong-operand"),
        LOG_SUM_EXP,
        x=lambda at: at.grad_z[:, None] * at.x.softmax(-1)),
)
# fmt: on
