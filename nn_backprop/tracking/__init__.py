"""The directory of a run, TensorBoard, the machine, and what a training run tells of itself."""

from nn_backprop.tracking.files import read_json, write_json
from nn_backprop.tracking.machine import describe_machine
from nn_backprop.tracking.run import Run, RunError, default_run_dir

__all__ = ["Run", "RunError", "default_run_dir", "describe_machine", "read_json", "write_json"]
