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


def conditions(readings: Sequence[Reading]) -> Conditions:
    """What happened between the first and the last of at least two readings."""
    first, last = readings[0], readings[-1]
    wall_ns = max(1, last.at_ns - first.at_ns)
    absent = {name: why for name, why in last.absent.items() if name not in ("energy_j", "memory_peak_bytes")}
    waiting = pressure = steal = None
    if first.waited_ns is not None and last.waited_ns is not None:
        waiting = max(0.0, (last.waited_ns - first.waited_ns) / wall_ns)
    if first.pressure_us is not None and last.pressure_us is not None:
        pressure = min(1.0, (last.pressure_us - first.pressure_us) * 1e3 / wall_ns)
    if first.steal_ticks is not None and last.steal_ticks is not None and first.all_ticks and last.all_ticks:
        steal = (last.steal_ticks - first.steal_ticks) / max(1, last.all_ticks - first.all_ticks)
    queue = [reading.runnable for reading in readings if reading.runnable is not None]
    clocks = [reading.clock_hz for reading in readings if reading.clock_hz is not None]
    found = Conditions(
        waiting=waiting,
        cpu_pressure=pressure,
        steal=steal,
        run_queue=float(np.mean(queue)) if queue else None,
        clock_hz=(float(np.quantile(clocks, 0.1)), float(np.quantile(clocks, 0.9))) if clocks else None,
        temperature_c=None
        if first.temperature_c is None or last.temperature_c is None
        else (first.temperature_c, last.temperature_c),
        throttled=None if first.throttled is None or last.throttled is None else last.throttled - first.throttled,
        absent=absent,
    )
    return found
