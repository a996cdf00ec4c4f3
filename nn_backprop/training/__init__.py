"""Training: the loop, the learning rate over time, checkpoints, evaluation."""

from nn_backprop.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from nn_backprop.training.evaluation import Evaluation, evaluate
from nn_backprop.training.loop import Diverged, Interruptible, Step, fit, steps_per_epoch
from nn_backprop.training.optimizers import make_optimizer, make_schedule

__all__ = [
    "Diverged",
    "Evaluation",
    "Interruptible",
    "Step",
    "evaluate",
    "fit",
    "load_checkpoint",
    "load_weights",
    "make_optimizer",
    "make_schedule",
    "save_checkpoint",
    "steps_per_epoch",
]
