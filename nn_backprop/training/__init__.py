"""Training: the loop, the learning rate over time, checkpoints, evaluation."""

from nn_backprop.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
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
    "make_optimizer",
    "make_schedule",
    "read_checkpoint",
    "save_checkpoint",
    "steps_per_epoch",
]
