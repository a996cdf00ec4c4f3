"""Training: the loop, many networks at once, learning rates, checkpoints, evaluation."""

from nn_backprop.training.augment import distort
from nn_backprop.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nn_backprop.training.cuda_graph import GraphedUpdate
from nn_backprop.training.evaluation import Evaluation, evaluate
from nn_backprop.training.loop import Diverged, Interruptible, Step, fit, steps_per_epoch
from nn_backprop.training.many import ManyEvaluation, evaluate_many, fit_many
from nn_backprop.training.optimizers import LeanAdamW, LeanSGD, make_optimizer, make_schedule
from nn_backprop.training.pruning import (
    make_permanent,
    parameters_left,
    prune_smallest,
    shares_kept,
)

__all__ = [
    "Diverged",
    "Evaluation",
    "GraphedUpdate",
    "Interruptible",
    "LeanAdamW",
    "LeanSGD",
    "ManyEvaluation",
    "Step",
    "distort",
    "evaluate",
    "evaluate_many",
    "fit",
    "fit_many",
    "load_checkpoint",
    "make_optimizer",
    "make_permanent",
    "make_schedule",
    "parameters_left",
    "prune_smallest",
    "read_checkpoint",
    "save_checkpoint",
    "shares_kept",
    "steps_per_epoch",
]
