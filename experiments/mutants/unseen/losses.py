"""Mistakes unseen, in losses."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, layer_of, mutant, normal, numbers


def logit_data():
    logits, chance = numbers((5, 7), (5, 7))
    return logits, (chance > 0).long()


# Binary cross entropy with logits, averaged over the classes: one loss a sample.
@layer_of(
    lambda logits, labels: F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), reduction="none"
    ).mean(1),
    logit_data,
)
def logit_loss(grad_loss, loss, logits, labels):
    return grad_loss[:, None] * (torch.sigmoid(logits) - labels) / logits.shape[1], None


def divergence_data():
    x, y = numbers((3, 5), (3, 5))
    return x.log_softmax(1), y.softmax(1)


# KL(p ‖ q), averaged over the samples.
@layer_of(lambda log_q, p: (p * (p.log() - log_q)).sum(1).mean(), divergence_data)
def divergence(grad_loss, loss, log_q, p):
    share = grad_loss / len(p)
    return -share * p, share * (p.log() - log_q + 1)


TEMPERATURE = 0.3


# Row n of a has to find row n of b.
@layer_of(lambda a, b: F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a))), (5, 3), (5, 3))
def info_nce(grad_loss, loss, a, b):
    p = (a @ b.T / TEMPERATURE).softmax(1)
    grad_scores = grad_loss * (p - torch.eye(len(a), dtype=a.dtype)) / len(a)
    grad_scores = grad_scores / TEMPERATURE
    return grad_scores @ b, grad_scores.T @ a


FOCUS = 2.0


def focal_loss(logits, labels):
    """−(1 − p)^γ log p of the labelled classes, averaged over the samples."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** FOCUS * log_p).mean()


@layer_of(focal_loss, lambda: (*numbers((5, 3)), torch.tensor([2, 0, 1, 1, 0])))
def focal(grad_loss, loss, logits, labels):
    p = logits.softmax(1)
    target = F.one_hot(labels, logits.shape[1]).to(p.dtype)
    p_label = (p * target).sum(1)
    slope = FOCUS * (1 - p_label) ** (FOCUS - 1) * p_label * p_label.log()
    grad_log_p = -((1 - p_label) ** FOCUS) + slope
    return grad_loss / len(p) * grad_log_p[:, None] * (target - p), None


# Over the channels of x (N, C, T).
LOG_SUM_EXP = Case(
    lambda x: x.logsumexp(1),
    lambda grad_z, z, x: (grad_z[:, None] * x.softmax(1),),
    normal((2, 3, 7)),
)
DELTA = 0.4


def huber_loss(prediction, target):
    """Quadratic up to δ, linear beyond, averaged over all entries."""
    size = (prediction - target).abs()
    return torch.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).mean()


@layer_of(huber_loss, (5, 7), (5, 7))
def huber(grad_loss, loss, prediction, target):
    residual = prediction - target
    slope = torch.where(residual.abs() <= DELTA, residual, DELTA * residual.sign())
    grad_prediction = grad_loss * slope / residual.numel()
    return grad_prediction, -grad_prediction


def margins(scores, labels):
    margin = 1 + scores - scores.gather(1, labels[:, None])
    return margin.scatter(1, labels[:, None], 0.0).clamp(min=0)


# Σ_{j ≠ y} max(0, 1 + s_j − s_y), averaged over the samples.
@layer_of(
    lambda scores, labels: margins(scores, labels).sum() / len(scores),
    lambda: (*numbers((5, 7)), torch.tensor([2, 0, 6, 3, 3])),
)
def hinge(grad_loss, loss, scores, labels):
    margin, share = margins(scores, labels), grad_loss / len(scores)
    grad_scores = torch.zeros_like(scores)
    for n, y in enumerate(labels.tolist()):
        for j in range(margin.shape[1]):
            if margin[n, j] > 0:
                grad_scores[n, j] += share
                grad_scores[n, y] -= share
    return grad_scores, None


MARGIN = 0.5


def violation(anchor, positive, negative):
    near, far = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
    return near - far + MARGIN


# max(0, ‖a − p‖² − ‖a − n‖² + margin), averaged over the triplets.
@layer_of(
    lambda anchor, positive, negative: F.relu(violation(anchor, positive, negative)).mean(),
    *((7, 5), (7, 5), (7, 5)),
)
def triplet_loss(grad_loss, loss, anchor, positive, negative):
    active = (violation(anchor, positive, negative) > 0)[:, None]
    share = 2 * grad_loss / len(anchor) * active
    return share * (negative - positive), share * (positive - anchor), share * (anchor - negative)


LOSS = (
    mutant("loss/losses of the samples taken for one, upstream gradient averaged",
        "ignores-upstream wrong-reduction", logit_loss,
        change={"grad_loss[:, None]": "grad_loss.mean()"}),
    mutant("loss/+1 missing in the target's gradient of the divergence", "missing-term", divergence,
        change={"log_q + 1": "log_q"}),
    mutant("loss/Huber's δ missing on the linear part", "wrong-branch missing-factor", huber,
        classic=True, change={"DELTA * residual.sign()": "residual.sign()"}),
    mutant("loss/hinge's target counts one violated margin", "overwritten missing-factor", hinge,
        classic=True, change={"grad_scores[n, y] -= share": "grad_scores[n, y] = -share"}),
    mutant("loss/triplets beyond the margin counted", "missing-factor wrong-branch", triplet_loss,
        classic=True, given=3, change={"len(anchor) * active": "len(anchor)"}),
    mutant("loss/temperature missing in the contrastive gradient", "scale missing-factor", info_nce,
        change={"grad_scores = grad_scores / TEMPERATURE": ""}),
    mutant("loss/focal weight taken for a constant", "missing-term", focal, classic=True,
        change={"FOCUS) + slope": "FOCUS)"}),
    mutant("loss/log-sum-exp with the softmax over the last axis", "wrong-reduction wrong-operand",
        LOG_SUM_EXP, x=lambda at: at.grad_z[:, None] * at.x.softmax(-1)),
)  # fmt: skip
