"""Taking samples: bursts of one call, and rounds that interleave several."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Call = Callable[[], object]
Clock = Callable[[], int]
Meter = Callable[[], "float | None"]  # joules used since some moment

TURN_NS = 20_000_000  # a visit this long outweighs what the artefact before it left in the caches
MAX_BURST = 50
_WARM_BURST, _WARM_LIMIT_NS, _WARM_TOLERANCE = 5, 3_000_000_000, 0.03


@dataclass(frozen=True)
class Turn:
    """One artefact's part of a round: its samples in the order taken, and the energy they took together where it is counted."""

    samples_ns: NDArray[np.int64]
    energy_j: float | None


def time_burst(call: Call, count: int, clock: Clock = time.perf_counter_ns) -> NDArray[np.int64]:
    """Nanoseconds of each of `count` calls in a row. No garbage is collected between them."""
    stamps = [0] * (count + 1)
    with _no_collection():
        stamps[0] = clock()
        for index in range(1, count + 1):
            call()
            stamps[index] = clock()
    return np.array(np.diff(stamps), np.int64)


def warm_up(call: Call, clock: Clock = time.perf_counter_ns) -> tuple[int, float]:
    """Calls until two bursts in a row agree within 3 % (at most three seconds): (calls made, median of the last burst in ns)."""
    made, medians = 0, [float("inf")]
    started = clock()
    while True:
        medians.append(float(np.median(time_burst(call, _WARM_BURST, clock))))
        made += _WARM_BURST
        settled = len(medians) > 3 and abs(medians[-1] / medians[-2] - 1) <= _WARM_TOLERANCE
        if settled or clock() - started > _WARM_LIMIT_NS:
            return made, medians[-1]


def burst_length(median_ns: float, at_least: int = 1) -> int:
    """Calls in a visit: enough to fill `TURN_NS`, `at_least` so many, never more than `MAX_BURST`."""
    return min(MAX_BURST, max(at_least, -(-TURN_NS // max(1, int(median_ns)))))


def interleaved(
    reference: Call,
    calls: Sequence[Call],
    bursts: Sequence[int],
    rounds: int,
    clock: Clock = time.perf_counter_ns,
    meter: Meter = lambda: None,
) -> Iterator[tuple[Turn, ...]]:
    """Rounds, one at a time: every call in order, then in reverse (A B B A), the reference before each visit (R A R B R B R A).

    So every artefact finds the machine as the reference left it: without that the one in the middle, which follows itself, is
    about 1 % faster than its like. The first call of a visit refills the caches and is neither recorded nor counted by `meter`.

    Args:
        bursts: samples a visit, of the reference first, then of each call.

    Yields:
        a turn for the reference and one for each call.
    """
    everything = (reference, *calls)
    visits = [index for position in (*range(1, len(everything)), *range(len(calls), 0, -1)) for index in (0, position)]
    for _ in range(rounds):
        samples: list[list[NDArray[np.int64]]] = [[] for _ in everything]
        joules: list[list[float | None]] = [[] for _ in everything]
        for index in visits:
            everything[index]()
            before = meter()
            samples[index].append(time_burst(everything[index], bursts[index], clock))
            after = meter()
            joules[index].append(None if before is None or after is None else after - before)
        yield tuple(
            Turn(np.concatenate(own), sum(filter(None, energy)) if None not in energy else None)
            for own, energy in zip(samples, joules, strict=True)
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
