"""Taking samples: bursts of one call, and rounds that interleave several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import drivers
from toolkit.devices import Reading, Taken, Visit
from toolkit.devices.inprocess import take

__all__ = ["Call", "Clock", "Turn", "Visit", "glance", "interleaved", "time_burst", "visit"]

Call = Callable[[], object]
Clock = Callable[[], int]

TURN_NS = 20_000_000
LEAD_NS = 25_000_000  # after another network one of a millisecond is 10 % slower at first, and 1 % after about so long
MAX_BURST = 50


@dataclass(frozen=True)
class Turn:
    """One artefact's part of a round: its samples in the order taken, the energy they took together where it is counted, and
    the end of its last visit with the sensors, where they were read then.
    """

    samples_ns: NDArray[np.int64]
    energy_j: float | None
    at_ns: int
    reading: Reading | None


def time_burst(call: Call, count: int, clock: Clock = time.perf_counter_ns) -> NDArray[np.int64]:
    """Nanoseconds of each of `count` calls in a row. No garbage is collected between them."""
    return np.array(drivers.time_burst(call, count, clock), np.int64)


def visit(what: Any, median_ns: float, at_least: int = 1) -> Visit:
    """A visit that leads for `LEAD_NS` and samples for `TURN_NS`, `at_least` so many samples and never more than `MAX_BURST`."""
    once = max(1, int(median_ns))
    lead = -(-LEAD_NS // once) if once < 4 * LEAD_NS else 0  # a long inference hardly notices how it began
    return Visit(what, lead, burst=min(MAX_BURST, max(at_least, -(-TURN_NS // once))))


def glance(what: Any, median_ns: float) -> Visit:
    """A visit to the reference: shorter, since it is visited most often and has only to be the same each time."""
    once = max(1, int(median_ns))
    return Visit(what, lead=max(1, -(-LEAD_NS // 6 // once)), burst=min(MAX_BURST, max(1, -(-TURN_NS // 2 // once))))


def calls_here(visits: Iterable[Visit], *, group: int) -> Iterator[Taken]:
    """Visits whose `what` is a call of this process."""
    return take(visits, lambda call: call, time.perf_counter_ns, lambda: None)  # type: ignore[arg-type,return-value]


def interleaved(
    reference: Visit, artefacts: Sequence[Visit], rounds: int, timed: Callable[..., Iterator[Taken]] = calls_here
) -> Iterator[tuple[Turn, ...]]:
    """Rounds, one at a time: every artefact in order, then in reverse (A B B A), each after the reference (R A R B R B R A).

    So every artefact finds the machine as the reference left it: without that the one in the middle, which follows itself, is
    about 1 % faster than its like. Yields a turn for the reference and one for each artefact; `rounds` 0: without end. The
    sensors are read after the last visit of each round.
    """
    everything = (reference, *artefacts)
    order = [index for which in (*range(1, len(everything)), *range(len(artefacts), 0, -1)) for index in (0, which)]
    last = [replace(everything[index], read=place == len(order) - 1) for place, index in enumerate(order)]
    schedule = (visit for _ in (range(rounds) if rounds else count()) for visit in last)
    taken = iter(timed(schedule, group=len(order)))
    while (first := next(taken, None)) is not None:
        whole = [first, *(next(taken) for _ in order[1:])]
        own = [[one for one, index in zip(whole, order, strict=True) if index == which] for which in range(len(everything))]
        yield tuple(_turn(visits) for visits in own)


def _turn(visits: Sequence[Taken]) -> Turn:
    energy = [one.energy_j for one in visits]
    return Turn(
        samples_ns=np.concatenate([one.samples_ns for one in visits]),
        energy_j=sum(filter(None, energy)) if None not in energy else None,
        at_ns=visits[-1].at_ns,
        reading=visits[-1].reading,
    )
