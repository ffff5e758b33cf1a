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

TURN_NS = 20_000_000
LEAD_NS = 25_000_000  # after another network one of a millisecond is 10 % slower at first, and 1 % after about so long
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


@dataclass(frozen=True)
class Visit:
    """What each visit to an artefact does: `lead` calls that refill the caches and do not count, then `burst` samples."""

    call: Call
    lead: int
    burst: int


def visit(call: Call, median_ns: float, at_least: int = 1) -> Visit:
    """A visit that leads for `LEAD_NS` and samples for `TURN_NS`, `at_least` so many samples and never more than `MAX_BURST`."""
    once = max(1, int(median_ns))
    lead = -(-LEAD_NS // once) if once < 4 * LEAD_NS else 0  # a long inference hardly notices how it began
    return Visit(call, lead, burst=min(MAX_BURST, max(at_least, -(-TURN_NS // once))))


def glance(call: Call, median_ns: float) -> Visit:
    """A visit to the reference: shorter, since it is visited most often and has only to be the same each time."""
    once = max(1, int(median_ns))
    return Visit(call, lead=max(1, -(-LEAD_NS // 6 // once)), burst=min(MAX_BURST, max(1, -(-TURN_NS // 2 // once))))


def interleaved(
    reference: Visit, artefacts: Sequence[Visit], rounds: int, clock: Clock = time.perf_counter_ns, meter: Meter = lambda: None
) -> Iterator[tuple[Turn, ...]]:
    """Rounds, one at a time: every artefact in order, then in reverse (A B B A), each after the reference (R A R B R B R A).

    So every artefact finds the machine as the reference left it: without that the one in the middle, which follows itself, is
    about 1 % faster than its like. Yields a turn for the reference and one for each artefact; `meter` counts the samples' energy.
    """
    everything = (reference, *artefacts)
    order = [index for which in (*range(1, len(everything)), *range(len(artefacts), 0, -1)) for index in (0, which)]
    for _ in range(rounds):
        samples: list[list[NDArray[np.int64]]] = [[] for _ in everything]
        joules: list[list[float | None]] = [[] for _ in everything]
        for index in order:
            now = everything[index]
            for _ in range(now.lead):
                now.call()
            before = meter()
            samples[index].append(time_burst(now.call, now.burst, clock))
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
