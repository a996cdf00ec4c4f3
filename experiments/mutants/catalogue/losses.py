"""Mistakes in softmax and in losses."""

import torch
import torch.nn.functional as F

from mutants.mutant import Case, layer_of, mutant, normal, numbers

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

    @layer_of(
        lambda logits, labels: F.cross_entropy(logits, labels, weights, ignore_index=IGNORED),
        lambda: (*numbers((len(labels), 3)), torch.tensor(labels)),
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


LABELS = [2, 0, 1, 1, 2]

LOSS = (
    mutant("loss/softmax with its diagonal only", "missing-term", SOFTMAX,
        x=lambda at: at.grad_z * at.z * (1 - at.z)),
    mutant("loss/softmax without the factor a", "missing-factor", SOFTMAX,
        x=lambda at: at.grad_z - (at.grad_z * at.z).sum(-1, keepdim=True)),
    mutant("loss/softmax negated", "sign", SOFTMAX, classic=True, x=lambda at: -at.grad_x),
    mutant("loss/softmax summed over the batch", "wrong-reduction", SOFTMAX,
        x=lambda at: at.z * (at.grad_z - (at.grad_z * at.z).sum(0))),
    mutant("loss/log-softmax without its second term", "missing-term", LOG_SOFTMAX,
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
