"""Times of calls that take turns, so that a busy neighbour slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from peers import Call

Seconds = dict[str, list[float]]


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of each call in each round, after one round that warms up and does not count.

    `time.process_time` as the clock counts what this process computed, whoever shares its cores.
    """
    seconds: Seconds = {name: [] for name in calls}
    for i in range(1 + rounds):
        for name, call in calls.items():
            gc.collect()
            start = clock()
            call()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio(seconds: Seconds, above: str, below: str) -> list[float]:
    """Quartiles of the ratio within each round."""
    return quartiles([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])
