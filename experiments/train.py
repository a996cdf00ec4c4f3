"""Train a network on MNIST, with gradients from autograd, from the tape, or by hand.

python experiments/train.py                                 # the CNN, on MNIST
python experiments/train.py --preset fast                   # 99 % in a second or two
python experiments/train.py --preset accurate               # 99.6 % in minutes
python experiments/train.py --model mlp --engine by-hand
python experiments/train.py --resume runs/train/...         # go on where a run was stopped
tensorboard --logdir runs                                   # watch
"""

import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # amid the imports below a KeyboardInterrupt may be swallowed
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from torch import nn

from nn_backprop import training
from nn_backprop.data import DataError, load, suited
from nn_backprop.engines import for_training, has_bfloat16, in_precision
from nn_backprop.engines.by_hand_fast import flat_parameter
from nn_backprop.errors import UsageError
from nn_backprop.layers import decay_boosts
from nn_backprop.models import CNN, MLP, MODELS, counting
from nn_backprop.tracking import Run, RunError, default_run_dir, describe_machine, read_json
from nn_backprop.tracking.monitor import Monitor

# Chosen on the validation split. What an option leaves open is taken from here.
CHOSEN = {  # epochs, batch_size, lr, weight_decay
    "cnn": (10, 128, 6e-3, 0.1), "mlp": (30, 128, 4e-3, 0.2), "happy": (40, 32, 1e-2, 0.03),
    "fast-cnn": (1, 128, 2e-2, 0.01), "accurate-cnn": (12, 128, 2e-2, 0.01),
    # The next nine with the rates of receptive_fields.py, which were chosen for fewer steps.
    "net1": (20, 32, 1e-3, 0.0), "net2": (20, 32, 3e-3, 0.0), "net3": (20, 32, 1e-2, 0.0),
    "net4": (20, 32, 3e-3, 0.0), "net5": (20, 32, 1e-2, 0.0), "net5-unshared": (20, 32, 3e-3, 0.0),
    "fully-connected": (10, 128, 3e-3, 0.0), "locally-connected": (10, 128, 1e-2, 0.0),
    "shared-weights": (10, 128, 2e-2, 0.0),
    "octave-cnn": (10, 128, 1e-2, 0.05), "kernel": (10, 128, 0.1, 0.0),
    # These as tied_depth.py and cheap_weights.py train them.
    "tied": (8, 128, 1e-2, 0.0), "lenet-300-100": (12, 128, 3e-3, 0.3),
    "lenet-5": (6, 128, 3e-3, 0.3),
    # The best of five rates after two epochs on 11,000 examples.
    "sparse-cnn": (10, 128, 6e-3, 0.1),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    model: dict(zip(("epochs", "batch_size", "lr", "weight_decay"), row, strict=True))
    for model, row in CHOSEN.items()
}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"model": "fast-cnn", "precision": "auto"},
    "accurate": {"model": "accurate-cnn", "precision": "auto", "augment": True},
}
CLOCKS = ("train_seconds", "logging_seconds", "wall_seconds")
LIMITS: dict[str, tuple[float, float]] = {
    "epochs": (1, 2**31 - 1), "batch_size": (1, 2**31 - 1), "seed": (0, 2**31 - 1),
    "lr": (1e-30, 1e30),  # float32 ends at 1e-38 and 3e38
    "weight_decay": (0, 1e30), "threads": (1, 1024),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Train a network on handwritten digits."""

    preset: Literal["fast", "accurate"] | None = None
    """fast: the least time to 99 %. accurate: 99.6 % in minutes. They choose model, precision and
    augment; what is given beside them counts."""
    model: Literal[
        "cnn", "mlp", "happy", "fast-cnn", "accurate-cnn", "net1", "net2", "net3", "net4", "net5",
        "net5-unshared", "fully-connected", "locally-connected", "shared-weights", "octave-cnn",
        "kernel", "tied", "lenet-300-100", "lenet-5", "sparse-cnn"
    ] = "cnn"  # fmt: skip
    """cnn: two stages of convolution and pooling. mlp: 784-128-10. happy: 784-16-16-10 with sigmoid
    and squared error. fast-cnn, accurate-cnn: those of the presets, with batch norm. net1 … net5:
    LeCun's of 1989, on 16 × 16 pixels. fully-connected, locally-connected, shared-weights: the same
    units, linked in three ways. octave-cnn: half of the maps at half the size. kernel: random
    features of patches, pooled, and one trained layer. tied: one hidden layer, applied four times.
    lenet-300-100: 784-300-100-10. lenet-5: the one of 431,080 parameters. sparse-cnn: k winners in
    place of ReLUs, so that few units are active."""
    engine: Literal["autograd", "tape", "by-hand"] = "autograd"
    """What computes the gradients."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "float64", "bfloat16"] = "float32"
    """Type of forward and backward; for bfloat16 the parameters stay in float32. auto is bfloat16
    where the device computes in it, else float32."""
    epochs: int | None = None
    """Passes over the training data; by default 10 (cnn), 30 (mlp), 40 (happy), and for the others
    as DEFAULTS in train.py has it."""
    batch_size: int | None = None
    """Examples a step; by default 128 (cnn), 128 (mlp), 32 (happy), and as DEFAULTS has it."""
    lr: float | None = None
    """Learning rate, with one-cycle its peak; by default 0.006 (cnn), 0.004 (mlp), 0.01 (happy),
    and as DEFAULTS has it."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """sgd is plain gradient descent on batches."""
    schedule: Literal["constant", "one-cycle"] = "one-cycle"
    """How the learning rate changes over the run."""
    weight_decay: float | None = None
    """Share of each weight, times the learning rate, that is taken off at every step; by default
    0.1 (cnn), 0.2 (mlp), 0.03 (happy), and as DEFAULTS has it."""
    augment: bool = False
    """Train on images that are turned, stretched and shifted a little, each time anew."""
    graph: bool = False
    """Run each step as one CUDA graph; on a CPU the steps are computed as usual."""
    seed: int = 0
    """Seed of the initial weights and of the order of the examples."""
    threads: int | None = None
    """Processor threads; by default as many as torch takes."""
    data: Literal["auto", "mnist", "digits"] = "auto"
    """auto takes MNIST if it is there or can be fetched, else the embedded digits."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw; by default $NN_BACKPROP_DATA, else the user's cache."""
    run_dir: Path | None = None
    """Folder of this run; by default a new one under runs/train/."""
    resume: Path | None = None
    """Folder of a run to go on with; its options are taken from there."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 diverged, 2 bad input, 130 interrupted."""
    try:
        return train(read_options(sys.argv[1:] if arguments is None else arguments))
    except (UsageError, RunError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"train.py: {error}; --data digits needs neither files nor network", file=sys.stderr)
        return 2
    except training.Diverged as error:
        print(f"train.py: {error}. The last good checkpoint is kept.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130


def read_options(arguments: list[str]) -> Options:
    """The options of the command line, or those of the run that it resumes; checked."""
    options = tyro.cli(Options, args=arguments)
    if options.preset is not None and options.resume is None:
        chosen = replace(Options(), **PRESETS[options.preset])
        options = tyro.cli(Options, args=arguments, default=chosen)
    if options.resume is not None:
        stored = _stored_options(options.resume)
        # Read again with the run's options as the defaults: what differs now was asked for.
        options = tyro.cli(Options, args=arguments, default=replace(stored, resume=options.resume))
        for name, value in asdict(stored).items():
            given = asdict(options)[name]
            if name != "resume" and given != value:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{flag if given is True else f'{flag} {given}'} contradicts the run in "
                    f"{options.resume}, which has {value}: leave it out to resume, or start anew"
                )
        return options
    given = {name: value for name, value in asdict(options).items() if value is not None}
    options = Options(**(DEFAULTS[options.model] | given))
    for name, (least, most) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UsageError(
                f"--{name.replace('_', '-')} must be from {least} to {most:,}, not {value}"
            )
    if options.precision == "auto":
        native = has_bfloat16(_device(options))
        options = replace(options, precision="bfloat16" if native else "float32")
    return options


def _stored_options(path: Path) -> Options:
    try:
        config = read_json(path / "config.json")
        if config != training.read_checkpoint(path / "checkpoint.pt")["progress"]["config"]:
            raise ValueError("config.json has changed since the run began")
        stored = config["options"]
        for name in ("data_root", "run_dir", "resume"):
            stored[name] = None if stored[name] is None else Path(stored[name])
        return Options(**stored)
    except Exception as error:  # damaged files fail in many ways
        raise UsageError(
            f"{path} holds no run that can be resumed ({_first_line(error)}): give the folder of a "
            "run that has its config.json and checkpoint.pt, or start a new one"
        ) from None


def train(options: Options) -> int:
    """Trains as the options say, or goes on where `options.resume` stopped."""
    began = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = _device(options)
    path = options.resume or options.run_dir or default_run_dir("train", options.model)
    if options.resume is not None and (path / "summary.json").exists():
        print(f"The run in {path} is complete; its results are in {path / 'summary.json'}.")
        return 0
    # A run that fell back to the embedded digits goes on with them, even if MNIST is there by now.
    wanted = read_json(path / "config.json")["dataset"] if options.resume else options.data
    data = load(wanted, options.data_root, device)

    torch.manual_seed(options.seed)
    dtype: torch.dtype = getattr(torch, options.precision)
    kept = torch.float32 if dtype == torch.bfloat16 else dtype  # the type of the parameters
    model = MODELS[options.model]().to(device, kept)
    data = suited(data, model)
    if options.engine == "by-hand" and not isinstance(model, (CNN, MLP)):
        raise UsageError(
            f"--engine by-hand is written out for the MLP and the CNN, not for {options.model}: "
            "choose autograd or tape"
        )
    engine = for_training(options.engine)
    if dtype == torch.bfloat16:
        engine = in_precision(engine, dtype)
    normed = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    if normed and (options.batch_size == 1 or len(data.train) % (options.batch_size or 1) == 1):
        raise UsageError(
            f"--batch-size {options.batch_size} leaves a batch of one image, for which batch norm "
            f"has no variance: choose another for {options.model}"
        )
    epochs, batch_size, lr = options.epochs, options.batch_size, options.lr
    decay = options.weight_decay
    assert epochs and batch_size and lr and decay is not None  # read_options has filled them in
    steps = epochs * training.steps_per_epoch(len(data.train), batch_size)
    parameters: list[nn.Parameter] = list(model.parameters())
    if options.engine == "by-hand" and dtype != torch.bfloat16:
        parameters = [flat_parameter(model)]
    optimizer = training.make_optimizer(options.optimizer, parameters, lr, decay, options.graph)
    schedule = training.make_schedule(options.schedule, optimizer, lr, steps)

    past: dict[str, Any] = {"step": 0, **dict.fromkeys(CLOCKS, 0.0)}
    if options.resume is None:
        config = {
            "options": asdict(options), "device": str(device), "dataset": data.name,
            "dataset_reason": data.reason, "mean": data.mean, "std": data.std, **describe_machine(),
        }  # fmt: skip
        run = Run.create(path, config)
    else:
        try:
            past = training.load_checkpoint(path / "checkpoint.pt", model, optimizer, schedule)
        except Exception as error:
            raise UsageError(
                f"{path / 'checkpoint.pt'} is of another version of this program "
                f"({_first_line(error)}): start a new run"
            ) from None
        run = Run.reopen(path, past["step"])
    config = read_json(path / "config.json")
    began -= past["wall_seconds"]  # the clocks go on
    print(
        f"{options.model} with {counting.parameters(model):,} parameters, {options.engine} "
        f"gradients, {options.precision} on {device}, on {data.name}; run in {path}"
    )

    monitor = Monitor(run, model, data, batch_size)
    with training.Interruptible() as interrupt, run, monitor:

        def clocks() -> dict[str, float]:
            seconds = monitor.seconds, monitor.logging_seconds, time.perf_counter() - began
            return dict(zip(CLOCKS, seconds, strict=True))

        def save(done: int) -> None:
            run.flush()
            progress = {"step": done, **clocks(), "config": config}
            training.save_checkpoint(path / "checkpoint.pt", model, optimizer, schedule, progress)

        def on_epoch(done: int, complete: int) -> None:
            if complete:
                decay_boosts(model)
            monitor.epoch(done, complete)
            save(done)

        if options.resume is None:
            run.graph(model, data.batch(data.train[:1], next(model.parameters()).dtype)[0])
            on_epoch(0, 0)
        done = past["step"]
        monitor.logging_seconds += past["logging_seconds"]
        monitor.start(done, steps, past["train_seconds"])
        done = training.fit(
            model, engine, optimizer, schedule, data,
            epochs=epochs, batch_size=batch_size, seed=options.seed, dtype=dtype,
            augment=training.distort if options.augment else None, graph=options.graph, done=done,
            on_step=monitor.step, on_epoch=on_epoch, stop=lambda: interrupt.requested,
        )  # fmt: skip
        monitor.stop()
        if done < steps:
            save(done)
            print(
                f"Stopped after step {done} of {steps}; go on with\n"
                f"    python experiments/train.py --resume {shlex.quote(str(path))}"
            )
            return 130
        test = training.evaluate(model, data, data.test)  # the only time that this split is read
        repeated = ("model", "engine", "precision", "epochs", "seed")
        summary = monitor.finish(test, asdict(options)) | {
            "dataset": data.name, "dataset_reason": config["dataset_reason"],
            "device": str(device), "parameters": counting.parameters(model),
            **{name: getattr(options, name) for name in repeated}, **clocks(), **describe_machine(),
        }  # fmt: skip
        run.summary(summary)
    _print_table(summary, path)
    return 0


def _device(options: Options) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if options.device == "auto":
        mps = mps and options.precision != "float64"
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if options.device == "mps" and options.precision == "float64":
        raise UsageError("--device mps has no float64: choose --precision float32 or --device cpu")
    if not {"cpu": True, "cuda": cuda, "mps": mps}[options.device]:
        raise UsageError(f"--device {options.device}: torch finds none here; choose auto or cpu")
    return torch.device(options.device)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _print_table(summary: dict[str, Any], path: Path) -> None:
    print(f"""
    data set                     {summary["dataset"]}
    test accuracy                {100 * summary["test_accuracy"]:.2f} %
    test loss                    {summary["test_loss"]:.4f}
    validation accuracy          {100 * summary["validation_accuracy"]:.2f} %
    parameters                   {summary["parameters"]:,}
    time in the training loop    {summary["train_seconds"]:.1f} s of {summary["wall_seconds"]:.1f} s
    gradient disagreement        {summary["max_gradient_disagreement"]:.1e} at most, in float64

Figures, metrics and checkpoint: {path}
To watch: tensorboard --logdir runs""")
    if summary["dataset"] != "mnist":
        reason = summary["dataset_reason"].partition(" (")[0]  # in full above, and in summary.json
        print(f"*** Trained on the embedded digits, not on MNIST: {reason}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
