"""What studies over seeds share: their command, their trainings, their rows, their evidence.

A study is a script: its options, its trainings, and pure functions of the rows that they leave,
`claims(rows)`, `tables(rows)` and `picture(rows)`; see `Study`.
"""

from nn_backprop.errors import UsageError
from nn_backprop.studies.evidence import (
    Claim,
    at_least,
    between,
    bootstrap_interval,
    counted,
    interval,
    judged,
    mean_interval,
    mean_sd,
    median_between,
    median_interval,
    one_of,
    quartiles,
)
from nn_backprop.studies.jobs import Row, StudyError
from nn_backprop.studies.rows import Rows
from nn_backprop.studies.study import Command, Options, Study, StudyRun, Table
from nn_backprop.studies.timing import median_point, timed_rounds
from nn_backprop.studies.training import Recipe, Trained, accuracies, load_data, train_network

__all__ = [
    "Claim",
    "Command",
    "Options",
    "Recipe",
    "Row",
    "Rows",
    "Study",
    "StudyError",
    "StudyRun",
    "Table",
    "Trained",
    "UsageError",
    "accuracies",
    "at_least",
    "between",
    "bootstrap_interval",
    "counted",
    "interval",
    "judged",
    "load_data",
    "mean_interval",
    "mean_sd",
    "median_between",
    "median_interval",
    "median_point",
    "one_of",
    "quartiles",
    "timed_rounds",
    "train_network",
]
