"""What a device can do: tell the time, say what it is doing, and run the runtimes it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.backends import Backend, KernelSample
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
    accelerator_hz: float | None = None
    power_w: float | None = None
    absent: dict[str, str] = field(default_factory=dict)


Meter = Callable[[], "float | None"]  # joules used since some moment


@dataclass(frozen=True)
class Loaded:
    """An artefact that is open and prepared for inference on random inputs."""

    handle: int
    finite: bool  # its outputs, where that was to be checked
    bursts_ns: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Visit:
    """What each visit to an artefact does: `lead` calls that refill the caches and do not count, then `burst` samples.

    `what` is its handle on a rig, or a call; `read` asks for the sensors after it.
    """

    what: Any
    lead: int
    burst: int
    read: bool = False


@dataclass(frozen=True)
class Taken:
    """One visit: its samples in the order taken, the energy they took together where it is counted, and when it ended."""

    samples_ns: NDArray[np.int64]
    energy_j: float | None
    at_ns: int
    reading: Reading | None


class Rig(Protocol):
    """Artefacts of one runtime, loaded beside each other in one process of the device and timed by its clock.

    Errors as `Backend.open`; LinkError where the device was reached and is not any more.
    """

    def load(self, path: Path, precision: str, *, seed: int = 0, check: bool = False, bursts: Sequence[int] = ()) -> Loaded:
        """Open and prepare; then bursts of so many samples each. `check` looks whether the outputs are finite."""

    def unload(self, handle: int) -> None: ...

    def warm_up(self, handle: int) -> tuple[int, float]:
        """Calls until two bursts in a row agree: (calls made, median of the last burst in ns)."""

    def timed(
        self,
        visits: Iterable[Visit],
        *,
        group: int = 1,
        first: int = 0,
        least: int = 1,
        within_s: float = 0.0,
        metered: bool = False,
    ) -> Iterator[Taken]:
        """Make visits, in order, as long as the caller goes on asking.

        A device that is far makes several before it is asked, whole groups after `first` single ones, at least `least` groups,
        and for about `within_s` (0: as it likes); what is not asked for is lost.
        """

    def executed_precision(self, handle: int) -> tuple[str, str]:
        """As `Session.executed_precision`."""

    def profile(self, handle: int, runs: int) -> tuple[KernelSample, ...]:
        """As `Backend.profile`."""

    def read(self) -> Reading:
        """What the kernel tells, of this process where that matters."""

    def now_ns(self) -> int:
        """The device's clock, as well as it is known here."""

    def close(self) -> None: ...


class Device(Protocol):
    """A machine that artefacts run on. `remote`: it is another one than this, and each rig there is a process of its own."""

    remote: bool

    def facts(self) -> Facts: ...

    def backend(self, runtime: str) -> Backend:
        """A runtime of this device. UsageError: it has no such runtime. MissingError: it is not installed."""

    def rig(self, runtime: str, threads: int) -> Rig:
        """A place to load and time artefacts. Errors as `backend`."""

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
    ends = readings[0].temperature_c, readings[-1].temperature_c
    return Conditions(
        waiting=None if waited is None else max(0.0, waited / wall_ns),
        cpu_pressure=None if pressure is None else min(1.0, pressure * 1e3 / wall_ns),
        steal=None if steal is None or ticks is None else steal / max(1.0, ticks),
        run_queue=float(np.mean(queue)) if queue else None,
        clock_hz=_spread([reading.clock_hz for reading in readings]),
        temperature_c=None if ends[0] is None or ends[1] is None else (ends[0], ends[1]),
        throttled=None if throttled is None else round(throttled),
        accelerator_hz=_spread([reading.accelerator_hz for reading in readings]),
        power_w=_spread([reading.power_w for reading in readings]),
        absent={name: why for name, why in readings[-1].absent.items() if name not in ("energy_j", "memory_peak_bytes")},
    )


def _spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """10th and 90th percentile of what is known."""
    known = [value for value in values if value is not None]
    return (float(np.quantile(known, 0.1)), float(np.quantile(known, 0.9))) if known else None
