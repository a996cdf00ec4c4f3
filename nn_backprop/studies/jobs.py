"""Trainings side by side, in processes of one thread each.

A job is a call of a module-level function with one argument that can be pickled. Two networks side
by side use two cores better than one network that is split between them.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from nn_backprop.training import Diverged

Job = TypeVar("Job")
Row = dict[str, Any]  # plain numbers and words, and lists and dicts of them


class StudyError(Exception):
    """A training that could not be brought to its end, in one sentence."""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread within."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def results(
    function: Callable[[Job], Any], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Any]]:
    """(number of the job, what the function made of it), in the order in which they are done.

    Raises StudyError if a training diverges or its process is killed. On any exception, Ctrl-C
    among them, the other processes end at once.
    """
    tasks = [(function, number, job) for number, job in enumerate(jobs)]
    if workers == 1:
        with one_thread():
            yield from map(_done, tasks)
        return
    # Spawned, since a forked torch may hang; they import the script anew, once each.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, _begin) as pool:
        try:
            # Each begins as a task is submitted, and inherits that Ctrl-C is ignored, even while it
            # imports; the price is that one in these milliseconds must be repeated.
            hears = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                futures = [pool.submit(_done, task) for task in tasks]
            finally:
                signal.signal(signal.SIGINT, hears)
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise StudyError(
                "the process of a training was killed, perhaps for want of memory: try --workers 1"
            ) from None
        except BaseException:  # Ctrl-C, for one
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin() -> None:
    """In each process of trainings: one thread; and if the study itself is killed, so is this."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _done(task: tuple[Callable[[Any], Any], int, Any]) -> tuple[int, Any]:
    function, number, job = task
    try:
        return number, function(job)
    except Diverged as error:
        what, _, _ = str(error).partition(":")  # goes on with advice for one who chose the rate
        raise StudyError(f"a training diverged, {job}: {what}") from None
