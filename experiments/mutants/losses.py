"""Mistakes in softmax and in losses."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, layer_of, mutant

IGNORED = -100
TEMPERATURE = 0.3
FOCUS = 2.0
DELTA = 0.4
MARGIN = 0.5


@layer_of(lambda x: F.softmax(x, dim=-1), (5, 7))
def softmax(grad_a, a, x):
    return (a * (grad_a - (grad_a * a).sum(-1, keepdim=True)),)


@layer_of(lambda x: x - x.logsumexp(-1, keepdim=True), (5, 7))
def log_softmax(grad_a, a, x):
    return (grad_a - a.exp() * grad_a.sum(-1, keepdim=True),)


# Over the channels of x (N, C, T).
@layer_of(lambda x: x.logsumexp(1), (2, 3, 7))
def log_sum_exp(grad_z, z, x):
    return (grad_z[:, None] * x.softmax(1),)


def cross_entropy(labels: list[int], class_weights: list[float] | None = None) -> Case:
    """−Σ_n w_y log p_ny / Σ_n w_y over the labels that are not ignored."""
    weights = torch.tensor(class_weights or [1.0] * 3, dtype=torch.float64)

    @layer_of(
        lambda logits, labels: F.cross_entropy(logits, labels, weights, ignore_index=IGNORED),
        (len(labels), 3),
        data=lambda logits: (logits, torch.tensor(labels)),
    )
    def loss(grad_loss, loss, logits, labels):
        p = logits.softmax(-1)
        y = labels.clamp(min=0)  # label 0 stands where the ignored one was
        counted = (labels != IGNORED).to(logits.dtype)
        share = weights[y] * counted / (weights[y] * counted).sum()
        target = F.one_hot(y, 3).to(logits.dtype)
        return grad_loss * share[:, None] * (p - target), None

    return loss


@layer_of(lambda prediction, target: ((prediction - target) ** 2).mean(), (5, 3), (5, 3))
def squared_error(grad_loss, loss, prediction, target):
    grad_prediction = grad_loss * 2 * (prediction - target) / prediction.numel()
    return grad_prediction, -grad_prediction


# Binary cross entropy with logits, averaged over the classes: one loss a sample.
@layer_of(
    lambda logits, labels: F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), reduction="none"
    ).mean(1),
    *((5, 7), (5, 7)),
    data=lambda logits, chance: (logits, (chance > 0).long()),
)
def logit_loss(grad_loss, loss, logits, labels):
    return grad_loss[:, None] * (torch.sigmoid(logits) - labels) / logits.shape[1], None


# KL(p ‖ q), averaged over the samples.
@layer_of(
    lambda log_q, p: (p * (p.log() - log_q)).sum(1).mean(),
    *((3, 5), (3, 5)),
    data=lambda x, y: (x.log_softmax(1), y.softmax(1)),
)
def divergence(grad_loss, loss, log_q, p):
    share = grad_loss / len(p)
    return -share * p, share * (p.log() - log_q + 1)


# Row n of a has to find row n of b.
@layer_of(lambda a, b: F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a))), (5, 3), (5, 3))
def info_nce(grad_loss, loss, a, b):
    p = (a @ b.T / TEMPERATURE).softmax(1)
    grad_scores = grad_loss * (p - torch.eye(len(a), dtype=a.dtype)) / len(a)
    grad_scores = grad_scores / TEMPERATURE
    return grad_scores @ b, grad_scores.T @ a


def focal_loss(logits, labels):
    """−(1 − p)^γ log p of the labelled classes, averaged over the samples."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** FOCUS * log_p).mean()


@layer_of(focal_loss, (5, 3), data=lambda logits: (logits, torch.tensor([2, 0, 1, 1, 0])))
def focal(grad_loss, loss, logits, labels):
    p = logits.softmax(1)
    target = F.one_hot(labels, logits.shape[1]).to(p.dtype)
    p_label = (p * target).sum(1)
    slope = FOCUS * (1 - p_label) ** (FOCUS - 1) * p_label * p_label.log()
    grad_log_p = -((1 - p_label) ** FOCUS) + slope
    return grad_loss / len(p) * grad_log_p[:, None] * (target - p), None


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
    (5, 7),
    data=lambda scores: (scores, torch.tensor([2, 0, 6, 3, 3])),
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


LABELS = [2, 0, 1, 1, 2]

LOSS = (
    mutant("loss/softmax with its diagonal only", "missing-term", softmax,
        x=lambda at: at.grad_z * at.z * (1 - at.z)),
    mutant("loss/softmax without the factor a", "missing-factor", softmax,
        x=lambda at: at.grad_z - (at.grad_z * at.z).sum(-1, keepdim=True)),
    mutant("loss/softmax negated", "sign", softmax, classic=True, x=lambda at: -at.grad_x),
    mutant("loss/softmax summed over the batch", "wrong-reduction", softmax,
        x=lambda at: at.z * (at.grad_z - (at.grad_z * at.z).sum(0))),
    mutant("loss/log-softmax without its second term", "missing-term", log_softmax,
        x=lambda at: at.grad_z.clone()),
    mutant("loss/p without -1 at the target", "missing-term", cross_entropy(LABELS), classic=True,
        change={"(p - target)": "p"}),
    mutant("loss/cross entropy without 1/N", "scale wrong-reduction", cross_entropy(LABELS),
        cross_entropy([1]), change={" / (weights[y] * counted).sum()": ""}),
    mutant("loss/ignored labels counted", "extra-term missing-factor",
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS),
        change={"counted / (": "1 / ("}),
    mutant("loss/divided by N with ignored labels among them", "scale",
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS), classic=True,
        change={"(weights[y] * counted).sum()": "len(labels)"}),
    mutant("loss/class weights missing", "missing-factor per-channel-scale",
        cross_entropy(LABELS, [0.5, 1.0, 3.0]), cross_entropy(LABELS, [1.0, 1.0, 1.0]),
        change={"weights[y] * counted / (weights[y] * counted).sum()": "counted / counted.sum()"}),
    mutant("loss/upstream gradient ignored", "ignores-upstream", cross_entropy(LABELS),
        change={"grad_loss * share": "share"}),
    mutant("loss/softmax twice", "wrong-operand missing-factor", cross_entropy(LABELS),
        change={"softmax(-1)": "softmax(-1).softmax(-1)"}),
    mutant("loss/label smoothing in the gradient only", "extra-term", cross_entropy(LABELS),
        classic=True, change={"target)": "(0.9 * target + 0.1 / 3))"}),
    mutant("loss/targets of the next sample", "shifted wrong-operand", cross_entropy(LABELS),
        cross_entropy([1, 1, 1]), change={"target)": "target.roll(-1, 0))"}),
    mutant("loss/factor 2 of the square missing", "scale", squared_error,
        prediction=lambda at: at.grad_prediction / 2, target=lambda at: at.grad_target / 2),
    mutant("loss/1/N for 1/(N·D)", "scale", squared_error, squared_error.of((5, 1), (5, 1)),
        classic=True, prediction=lambda at: at.grad_prediction * at.target.shape[1],
        target=lambda at: at.grad_target * at.target.shape[1]),
    mutant("loss/target minus prediction", "sign", squared_error,
        prediction=lambda at: -at.grad_prediction),
)  # fmt: skip
UNSEEN_LOSS = (
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
        log_sum_exp, x=lambda at: at.grad_z[:, None] * at.x.softmax(-1)),
)  # fmt: skip
