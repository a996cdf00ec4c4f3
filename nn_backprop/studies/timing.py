"""Times that are compared within a round, which a machine's drift leaves alone."""

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from nn_backprop.studies.evidence import quartile_values
from nn_backprop.studies.jobs import one_thread


class Timing(NamedTuple):
    """What one contestant took in one round."""

    who: Any
    round: int
    seconds: float  # of one call
    ratio: float  # to the base's in the same round


def timed_rounds(
    work: Mapping[Any, Callable[[], object]],
    base: Any,
    rounds: int,
    calls: int,
    order: random.Random,
) -> Iterator[Timing]:
    """The contestants' times on one thread, and their ratios to those of `base`, one of them.

    A round has every contestant once, so many `calls` in a row, in an order drawn anew. Neither the
    first round counts nor a first call before the others: until then, the memory is another's.
    """
    with one_thread():
        for number in range(-1, rounds):
            shuffled = order.sample(list(work), len(work))
            seconds = {who: seconds_of_a_call(work[who], calls) for who in shuffled}
            if number >= 0:
                for who in work:
                    yield Timing(who, number, seconds[who], seconds[who] / seconds[base])


def seconds_of_a_call(work: Callable[[], object], calls: int) -> float:
    """The mean of so many calls in a row, after one that does not count."""
    work()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def median_point(x: float | str, values: Collection[float]) -> tuple[float | str, float, float]:
    """A point of a Panel: the median and half of the interquartile range."""
    low, middle, high = quartile_values(values)
    return x, middle, (high - low) / 2
