"""What a training run tells: to TensorBoard, to metrics.jsonl, to the terminal, and by figures."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nn_backprop import figures
from nn_backprop.data import ImageData
from nn_backprop.engines import disagreements
from nn_backprop.tracking import Run
from nn_backprop.training import Diverged, Evaluation, Step, evaluate


class Monitor:
    """Watches a run: its `step` and `epoch` are what `training.fit` calls back.

    `seconds` counts training alone: its clock stops during `epoch`. `logging_seconds` is what
    logging took, during steps and epochs, without the evaluation and the final figures.
    """

    DENSE, EVERY = 100, 50  # steps: the first 100 are all logged, then each 50th

    def __init__(self, run: Run, model: nn.Module, data: ImageData, batch_size: int) -> None:
        self.run, self.model, self.data, self.batch_size = run, model, data, batch_size
        self.seconds = self.logging_seconds = 0.0
        self._since: float | None = None
        self._step: Step | None = None  # the last one
        self._examples, self._last_seconds = 0, 0.0  # since the last record, and when that was
        self._bar = tqdm(disable=True)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def start(self, done: int, total: int, seconds: float) -> None:
        """Starts the clock; `seconds` have gone into the `done` steps before."""
        self.seconds = self._last_seconds = seconds
        self._bar = tqdm(total=total, initial=done, unit="step", disable=None, leave=False)
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def step(self, step: Step) -> None:
        """Logs the loss, the learning rate, the gradients' norms and the speed."""
        began = time.perf_counter()
        self._bar.update()
        self._step = step
        self._examples += step.examples
        if step.number > self.DENSE and step.number % self.EVERY:
            return
        values = {"loss/train": step.loss.item(), "learning_rate": float(step.lr)}
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norms = torch.stack([grad.norm() for grad in grads.values()]).tolist()
        values |= {f"gradient_norm/{name}": norm for name, norm in zip(grads, norms, strict=True)}
        assert self._since is not None  # between start and stop
        seconds = self.seconds + time.perf_counter() - self._since
        values["samples_per_second"] = self._examples / (seconds - self._last_seconds)
        self._examples, self._last_seconds = 0, seconds
        self.run.log(step.number, step.epoch, values)
        self.logging_seconds += time.perf_counter() - began

    def epoch(self, steps: int, complete: int) -> None:
        """Logs the validation split, the engines' disagreement and the weights.

        Raises Diverged if the loss on the validation split is NaN or infinite.
        """
        running = self._since is not None
        self.stop()
        validation = evaluate(self.model, self.data, self.data.validation)
        values = {"loss/validation": validation.loss, "accuracy/validation": validation.accuracy}
        batch = self.data.batch(self.data.train[: self.batch_size])
        values |= {
            f"gradient_disagreement/{engine}/{name}": distance
            for engine, distances in disagreements(self.model, *batch).items()
            for name, distance in distances.items()
        }
        began = time.perf_counter()
        self.run.log(steps, complete, values)
        named = dict(self.model.named_parameters())
        shown: dict[str, Tensor] = {f"weights/{name}": p for name, p in named.items()}
        shown |= {f"gradients/{n}": p.grad for n, p in named.items() if p.grad is not None}
        self.run.histograms(steps, shown)
        pixels = figures.weight_pixels(_first_layer(self.model))
        self.run.image("figures/first_layer", pixels, steps)
        self.logging_seconds += time.perf_counter() - began
        tqdm.write(
            f"epoch {complete:3d}   validation loss {validation.loss:.4f}   "
            f"accuracy {100 * validation.accuracy:.2f} %   {self.seconds:6.1f} s"
        )
        if self._step is not None and not math.isfinite(validation.loss):
            raise Diverged(f"the validation loss became {validation.loss}", self._step)
        if running:
            self._since = time.perf_counter()

    def finish(self, test: Evaluation, options: Mapping[str, Any]) -> dict[str, Any]:
        """Draws the figures of the test split; returns the final numbers.

        `options` are those of the run, for TensorBoard's table of hyper-parameters.
        """
        lines = (self.run.path / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = records[-1]["step"]
        classes = test.probabilities.shape[1]
        is_class = F.one_hot(test.labels, classes).bool()
        for k in range(classes):
            self.run.pr_curve(f"digit_{k}", is_class[:, k], test.probabilities[:, k], steps)
        weights = _first_layer(self.model), "Weights of the first layer, after training"
        names = [*map(str, range(classes))]
        for name, figure in {
            "learning_curves": figures.learning_curves(records),
            "confusion_matrix": figures.confusion_matrix(test.confusion, names),
            "confident_mistakes": self._mistakes(test),
            "precision_recall": figures.precision_recall(is_class, test.probabilities),
            "first_layer_weights": figures.weight_images(*weights),
        }.items():
            self.run.figure(f"figures/{name}", figure, steps, file=name)
        tag = "gradient_disagreement/"
        disagreements = [v for r in records for name, v in r.items() if name.startswith(tag)]
        validation = [r["accuracy/validation"] for r in records if "accuracy/validation" in r]
        final = {
            "validation_accuracy": validation[-1],
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "max_gradient_disagreement": max(disagreements),
        }
        self.run.hparams(options, {f"final/{k}": v for k, v in final.items()})
        return final

    def _mistakes(self, test: Evaluation) -> Any:
        confidence, predicted = test.probabilities.max(1)
        wrong = (predicted != test.labels).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)]
        images = self.data.images[self.data.test[wrong.to(self.data.test.device)], 0]
        return figures.mistakes(
            images, test.labels[wrong], predicted[wrong], confidence[wrong],
            "The most confident mistakes on the test split",
        )  # fmt: skip


def _first_layer(model: nn.Module) -> Tensor:
    """The first layer's weights as images, (units, H, W), in the pixels of the input."""
    weight = next(iter(model.state_dict().values()))  # also one that is fixed: a buffer
    if weight.dim() == 2:
        side = math.isqrt(weight.shape[1])
        return weight.view(-1, side, side)
    if weight.dim() == 6:  # fields with weights of their own: (h, w, o, c, p, q)
        return weight[..., 0, :, :].flatten(0, 2)
    return F.pixel_shuffle(weight, math.isqrt(weight.shape[1]))[:, 0]  # see NormCNN's blocks
