"""Taking samples: bursts of one call, and rounds that interleave several."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Call = Callable[[], object]

TURN_NS = 20_000_000  # a visit this long outweighs what the artefact before it left in the caches
MAX_BURST = 50
_WARM_BURST, _WARM_LIMIT_NS, _WARM_TOLERANCE = 5, 3_000_000_000, 0.03


def time_burst(call: Call, count: int) -> NDArray[np.int64]:
    """Nanoseconds of each of `count` calls in a row. No garbage is collected between them."""
    clock, stamps = time.perf_counter_ns, [0] * (count + 1)
    with _no_collection():
        stamps[0] = clock()
        for index in range(1, count + 1):
            call()
            stamps[index] = clock()
    return np.array(np.diff(stamps), np.int64)


def warm_up(call: Call) -> tuple[int, float]:
    """Calls until two bursts in a row agree within 3 % (at most three seconds): (calls made, median of the last burst in ns)."""
    made, medians = 0, [float("inf")]
    started = time.perf_counter_ns()
    while True:
        medians.append(float(np.median(time_burst(call, _WARM_BURST))))
        made += _WARM_BURST
        settled = len(medians) > 3 and abs(medians[-1] / medians[-2] - 1) <= _WARM_TOLERANCE
        if settled or time.perf_counter_ns() - started > _WARM_LIMIT_NS:
            return made, medians[-1]


def burst_length(median_ns: float, at_least: int = 1) -> int:
    """Calls in a visit: enough to fill `TURN_NS`, `at_least` so many, never more than `MAX_BURST`."""
    return min(MAX_BURST, max(at_least, -(-TURN_NS // max(1, int(median_ns)))))


def interleaved(calls: Sequence[Call], bursts: Sequence[int], rounds: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Rounds of samples, one at a time: every call in order, then in reverse (A B B A), `bursts[i]` samples of call i a visit.

    The first call of a visit refills the caches and is not recorded.
    """
    order = (*range(len(calls)), *reversed(range(len(calls))))
    for _ in range(rounds):
        visits: list[list[NDArray[np.int64]]] = [[] for _ in calls]
        for index in order:
            calls[index]()
            visits[index].append(time_burst(calls[index], bursts[index]))
        yield tuple(np.concatenate(pair) for pair in visits)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
