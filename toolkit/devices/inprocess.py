"""Artefacts loaded and timed in this process: what the local and the simulated device do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from toolkit import drivers
from toolkit.backends import Backend, KernelSample, Session, random_feeds
from toolkit.devices.base import Loaded, Meter, Reading, Taken, Visit

Call = Callable[[], object]
Clock = Callable[[], int]


class InProcess:
    """`Rig` on a backend and a clock of this process."""

    def __init__(self, backend: Backend, threads: int, clock: Clock, meter: Meter, read: Callable[[], Reading]) -> None:
        self._backend, self._threads, self._clock, self._meter, self._read = backend, threads, clock, meter, read
        self._open: dict[int, tuple[Path, str, Session, Call]] = {}
        self._count = 0

    def load(self, path: Path, precision: str, *, seed: int = 0, check: bool = False, bursts: Sequence[int] = ()) -> Loaded:
        session = self._backend.open(path, threads=self._threads, precision=precision)
        feeds = random_feeds(session.inputs, seed)
        outputs = session.run(feeds) if check else []
        finite = all(bool(np.isfinite(out).all()) for out in outputs if np.issubdtype(out.dtype, np.floating))
        call = session.prepare(feeds)
        self._count += 1
        self._open[self._count] = path, precision, session, call
        taken = tuple(np.array(drivers.time_burst(call, count, self._clock), np.int64) for count in bursts)
        return Loaded(self._count, finite, taken)

    def unload(self, handle: int) -> None:
        self._open.pop(handle)[2].close()

    def warm_up(self, handle: int) -> tuple[int, float]:
        return drivers.warm_up(self._open[handle][3], self._clock)

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
        meter = self._meter if metered else lambda: None
        yield from take(visits, lambda handle: self._open[handle][3], self._clock, meter, self._read)

    def executed_precision(self, handle: int) -> tuple[str, str]:
        return self._open[handle][2].executed_precision()

    def profile(self, handle: int, runs: int) -> tuple[KernelSample, ...]:
        path, precision, *_ = self._open[handle]
        return self._backend.profile(path, threads=self._threads, precision=precision, runs=runs)

    def read(self) -> Reading:
        return self._read()

    def now_ns(self) -> int:
        return self._clock()

    def close(self) -> None:
        for handle in list(self._open):
            self.unload(handle)


def take(
    visits: Iterable[Visit], call_of: Callable[[int], Call], clock: Clock, meter: Meter, read: Callable[[], Reading] | None = None
) -> Iterator[Taken]:
    """Make visits one at a time, each when it is asked for."""
    for visit in visits:
        call = call_of(visit.what)
        for _ in range(visit.lead):
            call()
        before = meter()
        samples = np.array(drivers.time_burst(call, visit.burst, clock), np.int64)
        after = meter()
        energy = None if before is None or after is None else after - before
        yield Taken(samples, energy, clock(), read() if read and visit.read else None)
