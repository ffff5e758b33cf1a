"""What a device can do: tell the time, say what it is doing, and run the runtimes it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import numpy as np

from toolkit.backends import Backend
from toolkit.schema import Conditions


@dataclass(frozen=True)
class Facts:
    """The processor as fingerprints name it, and the cores this process may use."""

    cpu: str
    cores: int
    instruction_set: str


@dataclass(frozen=True)
class Reading:
    """Counters and sensors at one moment. What is None is in `absent` with the reason.

    `waited_ns` is the time that threads of this process were ready to run and had no core, summed over the threads;
    `pressure_us`, `steal_ticks`, `all_ticks` and `throttled` count since the machine was started.
    """

    at_ns: int
    waited_ns: int | None = None
    pressure_us: int | None = None
    steal_ticks: int | None = None
    all_ticks: int | None = None
    runnable: int | None = None
    clock_hz: float | None = None
    temperature_c: float | None = None
    throttled: int | None = None
    absent: dict[str, str] = field(default_factory=dict)


class Device(Protocol):
    """A machine that artefacts run on."""

    def facts(self) -> Facts: ...

    def backend(self, runtime: str) -> Backend:
        """A runtime of this device. UsageError: it has no such runtime. MissingError: it is not installed."""

    def clock_ns(self) -> int:
        """The device's own monotonic clock."""

    def now(self) -> datetime:
        """The time of day."""

    def read(self) -> Reading:
        """What its kernel tells."""

    def watch_memory(self) -> Callable[[], int | None]:
        """Begins now; the call returned gives the growth of the resident memory's peak since, in bytes. None, with the reason
        in `read().absent`, where nothing counts it."""

    def energy_j(self) -> float | None:
        """Energy the processor has used since some moment; None where nothing counts it, with the reason in `read().absent`."""


def conditions(parts: Sequence[Sequence[Reading]]) -> Conditions:
    """What happened between the readings of each part, at least two; what happened between the parts does not count."""
    readings = [reading for part in parts for reading in part]
    wall_ns = max(1, sum(part[-1].at_ns - part[0].at_ns for part in parts))

    def grown(name: str) -> float | None:
        """By how much a counter grew within the parts."""
        pairs = [(getattr(part[0], name), getattr(part[-1], name)) for part in parts]
        return None if any(None in pair for pair in pairs) else float(sum(last - first for first, last in pairs))

    waited, pressure, steal, ticks, throttled = map(grown, ("waited_ns", "pressure_us", "steal_ticks", "all_ticks", "throttled"))
    queue = [reading.runnable for reading in readings if reading.runnable is not None]
    clocks = [reading.clock_hz for reading in readings if reading.clock_hz is not None]
    ends = readings[0].temperature_c, readings[-1].temperature_c
    return Conditions(
        waiting=None if waited is None else max(0.0, waited / wall_ns),
        cpu_pressure=None if pressure is None else min(1.0, pressure * 1e3 / wall_ns),
        steal=None if steal is None or ticks is None else steal / max(1.0, ticks),
        run_queue=float(np.mean(queue)) if queue else None,
        clock_hz=(float(np.quantile(clocks, 0.1)), float(np.quantile(clocks, 0.9))) if clocks else None,
        temperature_c=None if ends[0] is None or ends[1] is None else (ends[0], ends[1]),
        throttled=None if throttled is None else round(throttled),
        absent={name: why for name, why in readings[-1].absent.items() if name not in ("energy_j", "memory_peak_bytes")},
    )
