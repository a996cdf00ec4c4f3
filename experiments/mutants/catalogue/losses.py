"""Mistakes in softmax and in losses."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, mutant, normal, numbers

# --- Softmax and losses -------------------------------------------------------------------------


SOFTMAX = Case(
    lambda x: F.softmax(x, dim=-1),
    lambda grad_a, a, x: (a * (grad_a - (grad_a * a).sum(-1, keepdim=True)),),
    normal((5, 7)),
)


LOG_SOFTMAX = Case(
    lambda x: x - x.logsumexp(-1, keepdim=True),
    lambda grad_a, a, x: (grad_a - a.exp() * grad_a.sum(-1, keepdim=True),),
    normal((5, 7)),
)


IGNORED = -100


def cross_entropy(labels: list[int], class_weights: list[float] | None = None) -> Case:
    """−Σ_n w_y log p_ny / Σ_n w_y over the labels that are not ignored."""
    weights = torch.tensor(class_weights or [1.0] * 3, dtype=torch.float64)

    def forward(logits, labels):
        return F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED)

    def backward(grad_loss, loss, logits, labels, mistake=""):
        p = logits.softmax(-1)
        if mistake == "softmax twice":
            p = p.softmax(-1)
        y = labels.clamp(min=0)
        counted = (labels != IGNORED).to(logits.dtype)
        share = weights[y] * counted / (weights[y] * counted).sum()
        if mistake == "ignored labels":  # label 0 stands where the ignored one was
            share = weights[y] / (weights[y] * counted).sum()
        elif mistake == "divided by N":
            share = weights[y] * counted / len(labels)
        elif mistake == "no weights":
            share = counted / counted.sum()
        elif mistake == "not averaged":
            share = weights[y] * counted
        target = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        if mistake == "no target":
            target = torch.zeros_like(target)
        elif mistake == "smoothed target":
            target = 0.9 * target + 0.1 / logits.shape[1]
        elif mistake == "target of the next sample":
            target = target.roll(-1, 0)
        if mistake == "upstream ignored":
            grad_loss = torch.ones_like(grad_loss)
        return grad_loss * share[:, None] * (p - target), None

    return Case(forward, backward, lambda: (*numbers((len(labels), 3)), torch.tensor(labels)))


def squared_error(prediction, target):
    return ((prediction - target) ** 2).mean()


def squared_error_backward(grad_loss, loss, prediction, target):
    grad_prediction = grad_loss * 2 * (prediction - target) / prediction.numel()
    return grad_prediction, -grad_prediction


def squared(n: int, d: int) -> Case:
    return Case(squared_error, squared_error_backward, normal((n, d), (n, d)))


LABELS = [2, 0, 1, 1, 2]

# fmt: off
LOSS = (
    mutant("loss/softmax with its diagonal only", ("missing-term",), SOFTMAX,
        x=lambda at: at.grad_z * at.z * (1 - at.z)),
    mutant("loss/softmax without the factor a", ("missing-factor",), SOFTMAX,
        x=lambda at: at.grad_z - (at.grad_z * at.z).sum(-1, keepdim=True)),
    mutant("loss/softmax negated", ("sign",), SOFTMAX, classic=True, x=lambda at: -at.grad_x),
    mutant("loss/softmax summed over the batch", ("wrong-reduction",), SOFTMAX,
        x=lambda at: at.z * (at.grad_z - (at.grad_z * at.z).sum(0))),
    mutant("loss/log-softmax without its second term", ("missing-term",), LOG_SOFTMAX,
        x=lambda at: at.grad_z.clone()),
    mutant("loss/p without -1 at the target", ("missing-term",), cross_entropy(LABELS),
        mistake="no target", classic=True),
    mutant("loss/cross entropy without 1/N", ("scale", "wrong-reduction"), cross_entropy(LABELS),
        cross_entropy([1]), mistake="not averaged"),
    mutant("loss/ignored labels counted", ("extra-term", "missing-factor"),
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS),
        mistake="ignored labels"),
    mutant("loss/divided by N with ignored labels among them", ("scale",),
        cross_entropy([2, IGNORED, 1, 1, IGNORED]), cross_entropy(LABELS), mistake="divided by N",
        classic=True),
    mutant("loss/class weights missing", ("missing-factor", "per-channel-scale"),
        cross_entropy(LABELS, [0.5, 1.0, 3.0]), cross_entropy(LABELS, [1.0, 1.0, 1.0]),
        mistake="no weights"),
    mutant("loss/upstream gradient ignored", ("ignores-upstream",), cross_entropy(LABELS),
        mistake="upstream ignored"),
    mutant("loss/softmax twice", ("wrong-operand", "missing-factor"), cross_entropy(LABELS),
        mistake="softmax twice"),
    mutant("loss/label smoothing in the gradient only", ("extra-term",), cross_entropy(LABELS),
        mistake="smoothed target", classic=True),
    mutant("loss/targets of the next sample", ("shifted", "wrong-operand"), cross_entropy(LABELS),
        cross_entropy([1, 1, 1]), mistake="target of the next sample"),
    mutant("loss/factor 2 of the square missing", ("scale",), squared(5, 3),
        prediction=lambda at: at.grad_prediction / 2, target=lambda at: at.grad_target / 2),
    mutant("loss/1/N for 1/(N·D)", ("scale",), squared(5, 3), squared(5, 1), classic=True,
        prediction=lambda at: at.grad_prediction * at.target.shape[1],
        target=lambda at: at.grad_target * at.target.shape[1]),
    mutant("loss/target minus prediction", ("sign",), squared(5, 3),
        prediction=lambda at: -at.grad_prediction),
)
# fmt: on
