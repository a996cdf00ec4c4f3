"""The loop, the checkpoints, the optimizers and the evaluation, on data and models made up here."""

import math
import os
import signal
import threading
import zipfile
from collections import Counter, OrderedDict
from itertools import product as every
from pathlib import Path

import pytest
import torch
from properties import refuses, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nn_backprop.data import ImageData
from nn_backprop.engines import autograd
from nn_backprop.models import LayerNetwork
from nn_backprop.training import (
    Diverged,
    Interruptible,
    Step,
    distort,
    evaluate,
    fit,
    load_checkpoint,
    loop,
    make_optimizer,
    make_schedule,
    read_checkpoint,
    save_checkpoint,
    steps_per_epoch,
)
from nn_backprop.training.loop import CHECK_EVERY

TRAIN, VALIDATION, TEST = 17, 5, 7
BATCH, PER_EPOCH = 5, 4  # 17 examples: batches of 5, 5, 5 and 2


@pytest.fixture(scope="module")
def data() -> ImageData:
    n = TRAIN + VALIDATION + TEST
    numbers = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 1, 28, 28), generator=numbers, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)  # by which an image can be told
    labels = torch.randint(3, (n,), generator=numbers)
    splits = torch.randperm(n, generator=numbers).split([TRAIN, VALIDATION, TEST])
    return ImageData("made up", "for tests", images, labels, *splits, mean=0.5, std=0.25)


def small(dropout: float = 0.0) -> LayerNetwork:
    """28 × 28 to 3 classes; with dropout, whose random numbers a resumed run must draw again."""
    layers = {"flat": nn.Flatten(), "hidden": nn.Linear(784, 11), "tanh": nn.Tanh()}
    layers |= {"dropout": nn.Dropout(dropout), "output": nn.Linear(11, 3)}
    return LayerNetwork(OrderedDict(layers))


class Training:
    """A model with all that `fit` wants, from a seed."""

    def __init__(self, optimizer="sgd", schedule="constant", epochs=3, dropout=0.0, seed=0):
        torch.manual_seed(seed)
        self.model = small(dropout)
        self.optimizer = make_optimizer(optimizer, self.model.parameters(), 0.01, 0.1)
        self.schedule = make_schedule(schedule, self.optimizer, 0.01, epochs * PER_EPOCH)
        self.state = (self.model, self.optimizer, self.schedule)
        self.epochs = epochs

    def fit(self, data, gradients=autograd, seed=0, **callbacks):
        return fit(
            self.model, gradients, self.optimizer, self.schedule, data,
            epochs=self.epochs, batch_size=BATCH, seed=seed, **callbacks,
        )  # fmt: skip


class Recorder:
    """An engine that notes which images each batch holds, and computes nothing."""

    def __init__(self, data: ImageData) -> None:
        self.data, self.batches = data, []

    def __call__(self, model, inputs, targets):
        numbers = (inputs[:, 0, 0, 0] * self.data.std + self.data.mean) * 255
        numbers = numbers.round().long()
        assert torch.equal(targets, self.data.labels[numbers])
        self.batches.append(numbers.tolist())
        return torch.tensor(1.0)


def order(data, **options):
    recorder = Recorder(data)
    Training().fit(data, recorder, **options)
    return recorder.batches


def test_an_epoch_is_every_training_example_once_in_an_order_of_its_own(data):
    """The order follows from the seed and the epoch alone."""
    batches = order(data, seed=3)
    assert [len(batch) for batch in batches] == 3 * [5, 5, 5, 2]
    numbers = [number for batch in batches for number in batch]
    epochs = [numbers[:17], numbers[17:34], numbers[34:]]
    assert all(sorted(epoch) == sorted(data.train.tolist()) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3  # shuffled anew
    torch.manual_seed(99)
    for done in (0, 6, 8, 12):  # in the middle of an epoch, too
        assert order(data, seed=3, done=done) == batches[done:]
    assert order(data, seed=4) != batches
    for examples, batch_size, steps in ((17, 5, 4), (15, 5, 3), (1, 5, 1), (5, 1, 5)):
        assert steps_per_epoch(examples, batch_size) == steps


def test_the_callbacks_see_every_step_and_epoch(data):
    training = Training(schedule="one-cycle")
    steps, epochs, grads, losses = [], [], [], []

    def gradients(model, inputs, targets):
        assert (inputs.dtype, targets.dtype) == (torch.bfloat16, torch.int64)
        loss = autograd(model, inputs.float(), targets)
        losses.append(loss.item())
        return loss

    def on_step(step: Step) -> None:
        steps.append(step)
        grads.append(training.model.output.bias.grad.clone())

    done = training.fit(
        data, gradients, dtype=torch.bfloat16, on_step=on_step,
        on_epoch=lambda *n: epochs.append(n),
    )  # fmt: skip
    assert done == 12 and epochs == [(4, 1), (8, 2), (12, 3)]
    assert [(step.number, step.epoch) for step in steps] == [(k + 1, k // 4) for k in range(12)]
    assert [step.examples for step in steps] == 3 * [5, 5, 5, 2]
    assert [step.loss.item() for step in steps] == losses
    assert [step.lr for step in steps] == rates("one-cycle", 12, 0.01)
    assert all(grad.any() for grad in grads) and not torch.equal(grads[0], grads[1])


def test_stop_is_heeded_after_the_step(data):
    for last in (0, 1, 3, 4, 5, 12):
        training, steps, epochs = Training(), [], []
        on_epoch, stop = (lambda *n: epochs.append(n)), (lambda: len(steps) >= last)  # noqa: B023
        done = training.fit(data, on_step=steps.append, on_epoch=on_epoch, stop=stop)
        assert done == len(steps) == last
        assert epochs == [(4 * k, k) for k in range(1, last // 4 + 1)]


class BadAt:
    """An engine whose loss at a step is a value, or whose update is if the value is None."""

    def __init__(self, step: int, value: float | None) -> None:
        self.step, self.value, self.done = step, value, 0

    def __call__(self, model, inputs, targets):
        self.done += 1
        loss = autograd(model, inputs, targets)
        if self.done == self.step and self.value is None:
            model.hidden.weight.grad[0, 0] = math.inf
        return torch.tensor(self.value) if self.done == self.step and self.value else loss


def test_a_loss_or_a_weight_that_is_not_finite_stops_the_run_and_is_not_saved(data):
    """The last loss before a checkpoint can be finite while its update is not."""
    cases = [(value, bad, False) for value, bad in every((math.nan, math.inf), (1, 3, 4))]
    for value, bad, stopped in [*cases, (None, 4, False), (None, 4, True)]:
        engine = BadAt(bad, value)
        what = "a weight became NaN or infinite" if value is None else f"the loss became {value}"
        where = f"at step {bad}, with learning rate 0.01: try a smaller --lr"
        with pytest.raises(Diverged, match=f"^{what} {where}$"):
            Training().fit(
                data, engine, on_epoch=lambda *_: pytest.fail("saved"),
                stop=lambda engine=engine, stopped=stopped: stopped and engine.done == 4,
            )  # fmt: skip
    engine = BadAt(3, math.nan)  # long before a long epoch ends
    long = ImageData(**vars(data) | {"train": data.train.repeat(50)})
    with pytest.raises(Diverged, match="step 3,"):
        Training(epochs=50).fit(long, engine)
    assert engine.done == CHECK_EVERY < 170


def test_a_resumed_training_is_the_uninterrupted_one(data, tmp_path):
    for case in every(("sgd", "adam"), ("constant", "one-cycle"), (1, 4, 6)):
        *how, last = case
        whole, first, second = (Training(*how, dropout=0.5, seed=seed) for seed in (0, 0, 1))
        losses, parts = [], []
        torch.manual_seed(5)
        whole.fit(data, on_step=lambda step, losses=losses: losses.append(step.loss.item()))
        save_checkpoint(tmp_path / "whole.pt", *whole.state, {})

        def on_step(step: Step, parts=parts) -> None:
            parts.append(step.loss.item())

        torch.manual_seed(5)
        first.fit(data, on_step=on_step, stop=lambda parts=parts, last=last: len(parts) == last)
        save_checkpoint(tmp_path / "part.pt", *first.state, {"step": last, "note": ["a", None]})
        torch.manual_seed(6)
        progress = load_checkpoint(tmp_path / "part.pt", *second.state)
        assert progress == {"step": last, "note": ["a", None]}
        second.fit(data, done=last, on_step=on_step)
        save_checkpoint(tmp_path / "parts.pt", *second.state, {})

        assert parts == losses and len(set(losses)) == len(losses), case
        ends = (read_checkpoint(tmp_path / f"{name}.pt") for name in ("parts", "whole"))
        assert same(*ends), case


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    training = Training()
    save_checkpoint(tmp_path / "a.pt", *training.state, {"step": 1})

    def fails(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    refuses("no space", save_checkpoint, tmp_path / "a.pt", *training.state, {}, error=OSError)
    assert load_checkpoint(tmp_path / "a.pt", *training.state) == {"step": 1}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("proof",)


def test_damage_to_a_checkpoint_is_noticed_and_it_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("a.pt")
    save_checkpoint(path, *Training("adam").state, {})
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.header_offset, archive.read(entry)) for entry in archive.infolist()]
    assert len(parts) >= 9  # what torch 2.6 writes; later ones add records of their own
    for offset, content in parts:
        middle = good.index(content, offset) + len(content) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        refuses("checksum", read_checkpoint, path)
    for length in range(0, len(good), len(good) // 20):
        path.write_bytes(good[:length])
        refuses("", read_checkpoint, path, error=zipfile.BadZipFile)
    refuses("", read_checkpoint, "none.pt", error=FileNotFoundError)
    torch.save({"progress": Malicious()}, path)
    refuses("mkdir", read_checkpoint, path, error=Exception)
    assert not Path("proof").exists()


def test_sgd_and_adam_by_hand_with_decoupled_weight_decay():
    # torch keeps adam's two bias corrections in other roundings: 1e-9 tells it from any other rule
    for (name, rel), decay in every({"sgd": 1e-14, "adam": 1e-9}.items(), (0.0, 0.5)):
        weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = make_optimizer(name, [weight], 0.1, decay)
        expected, m, v = 2.0, 0.0, 0.0
        for t, grad in enumerate((3.0, -5.0), start=1):
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            adam = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
            expected = expected * (1 - 0.1 * decay) - 0.1 * (grad if name == "sgd" else adam)
            weight.grad = torch.tensor(grad, dtype=torch.float64)
            optimizer.step()
            assert weight.item() == pytest.approx(expected, rel=rel), (name, decay, t)


def rates(name: str, steps: int, lr: float = 0.02) -> list[float]:
    optimizer = make_optimizer("adam", [nn.Parameter(torch.zeros(1))], lr, 0.0)
    schedule = make_schedule(name, optimizer, lr, steps)
    found = []
    for _ in range(steps):
        found += schedule.get_last_lr()
        assert optimizer.param_groups[0]["lr"] == found[-1]
        optimizer.step()
        schedule.step()
    return found


def test_one_cycle_rises_to_lr_and_falls_to_nearly_nothing_and_constant_is_constant():
    found = rates("one-cycle", 100)
    assert found[29] == max(found) == pytest.approx(0.02, rel=1e-12)
    assert (found[0], found[-1]) == pytest.approx((0.02 / 25, 0.02 / 25e4))
    for steps in (1, 2, 3, 10):  # a short one stays within its bounds
        assert all(0 < rate <= 0.02 * (1 + 1e-12) for rate in rates("one-cycle", steps)), steps
    assert rates("constant", 7) == 7 * [0.02]


def test_evaluation_by_hand(data):
    model = small(dropout=0.5)
    images = ((data.images[data.test] / 255) - 0.5) / 0.25
    log_p = model.eval()(images).log_softmax(1).detach()
    labels, predicted = data.labels[data.test], log_p.argmax(1)
    loss = -sum(log_p[n, label].item() for n, label in enumerate(labels)) / TEST
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    for batch_size in (1, 3, 1000):
        result = evaluate(model.train(), data, data.test, batch_size)
        assert model.dropout.training
        assert torch.equal(result.labels, labels) and torch.equal(result.predictions, predicted)
        torch.testing.assert_close(result.probabilities, log_p.exp())
        assert result.loss == pytest.approx(loss, rel=1e-5)  # float32
        assert result.accuracy == sum(pairs[k, k] for k in range(3)) / TEST
        assert 0 < result.accuracy < 1
        assert result.confusion.tolist() == [[pairs[k, m] for m in range(3)] for k in range(3)]


class NoFloat64(TorchDispatchMode):
    """As on an Apple GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64), func
        return result


def test_training_and_evaluation_in_float32_need_no_float64(data):
    training = Training("adam", "one-cycle")
    with NoFloat64():
        training.fit(data)
        evaluate(training.model, data, data.validation)
        with pytest.raises(AssertionError):
            data.batch(data.train, torch.float64)


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    before, seen = signal.getsignal(signal.SIGINT), []
    with Interruptible() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

    def work() -> None:  # outside the main thread, where nothing is handled
        with Interruptible() as interrupt:
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGINT) is before


def test_augment_sees_all_images_and_draws_the_same_numbers_whenever_it_goes_on(data, monkeypatch):
    """Whatever the number of batches made at once, and wherever a run is taken up."""
    monkeypatch.setattr(loop, "GATHERED", 2 * BATCH)

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.rand(images.shape, generator=generator)

    def seen(first: int, last: int, **more) -> list[Tensor]:
        batches: list[Tensor] = []

        def gradients(model, inputs, targets):
            batches.append(inputs)
            return autograd(model, inputs, targets)

        Training().fit(
            data, gradients, done=first, stop=lambda: first + len(batches) >= last, **more
        )
        return batches

    whole = seen(0, 2 * PER_EPOCH, augment=augment)
    plain = seen(0, 2 * PER_EPOCH)
    noise = [a - b for a, b in zip(whole, plain, strict=True)]
    assert all(x.min() >= 0 and x.max() <= 1.0001 for x in noise)
    for other in (1, PER_EPOCH):  # where the differences are far above those of rounding
        assert not torch.allclose(noise[0], noise[other], rtol=0, atol=1e-3), other
    for first in range(1, 2 * PER_EPOCH):
        rest = seen(first, 2 * PER_EPOCH, augment=augment)
        assert all(map(torch.equal, rest, whole[first:])), first


def test_a_step_as_a_graph_is_the_same_step(data):
    """Without a GPU nothing is recorded, but batches are copied, and the rate is a tensor."""
    for optimizer in ("sgd", "adam"):
        ends = []
        for graph in (False, True):
            training, steps = Training(optimizer, "one-cycle"), []
            parameters = training.model.parameters()
            training.optimizer = make_optimizer(optimizer, parameters, 0.01, 0.1, graph=graph)
            training.schedule = make_schedule("one-cycle", training.optimizer, 0.01, 3 * PER_EPOCH)
            training.fit(data, graph=graph, on_step=steps.append)
            rates = torch.tensor([float(step.lr) for step in steps])
            losses = torch.stack([step.loss for step in steps])
            ends.append([rates, losses, *(p.data for p in training.model.parameters())])
        torch.testing.assert_close(ends[1], ends[0])


def test_distort_moves_the_digit_and_leaves_the_background():
    images = torch.full((50, 1, 28, 28), -0.4)
    images[:, :, 10:18, 12:16] = 2.0
    moved, again = (distort(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(moved, again) and not torch.equal(moved[0], moved[1])
    assert moved.shape == images.shape
    edge = torch.cat([moved[..., 0, :].flatten(), moved[..., :, -1].flatten()])
    assert torch.allclose(edge, torch.tensor(-0.4))
    mass = (moved + 0.4).sum((1, 2, 3)) / (images + 0.4).sum((1, 2, 3))
    assert 0.75 < mass.min() < 0.95 and 1.05 < mass.max() < 1.35  # 1 / (s t), up to the edges
    centre = ((moved + 0.4).sum((1, 2)) @ torch.arange(28.0)) / (moved + 0.4).sum((1, 2, 3))
    assert 0.5 < (centre - 13.5).abs().max() < 3.0 and abs(centre.mean() - 13.5) < 0.5
