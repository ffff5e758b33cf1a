"""A machine that is computed: its clock moves only while it works, and the same seed gives the same samples.

It is there so that what edgekit does with a device can be tested and shown; a time it tells says nothing of any real device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from toolkit.backends import Backend
from toolkit.backends.simulated import SimulatedBackend
from toolkit.devices.base import Facts, Reading, Rig
from toolkit.devices.inprocess import InProcess
from toolkit.errors import UsageError
from toolkit.schema import Simulation

_EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)
_STEP_NS = 10_000_000.0  # longest time in which speed, heat and foreign load are taken as constant


class Simulated:
    """`Device` that follows a `Simulation`. Drift, foreign load and heat go on as long as the object is used."""

    remote = False

    def __init__(self, name: str, simulation: Simulation) -> None:
        self._name, self._of, self._random = name, simulation, random.Random(simulation.seed)
        self._now_ns = self._joules = self._waited_ns = 0.0
        self._speed = self._random.gauss(0, simulation.drift.deviation)  # logarithm
        self._heat_c, self._throttled, self._slow = simulation.heat.ambient_c, 0, False
        self._foreign = self._random.random() < simulation.burst.share
        self._until_ns = self._next_switch()

    def facts(self) -> Facts:
        return Facts(cpu=self._name, cores=1, instruction_set="")

    def backend(self, runtime: str) -> Backend:
        if runtime != "simulated":
            raise UsageError(
                f"The simulated device has no runtime {runtime!r}.", "Choose a profile whose runtime is `simulated`."
            )
        return SimulatedBackend(self._of, self.spend)

    def rig(self, runtime: str, threads: int) -> Rig:
        return InProcess(self.backend(runtime), threads, self.clock_ns, self.energy_j, self.read)

    def clock_ns(self) -> int:
        return int(self._now_ns)

    def now(self) -> datetime:
        return _EPOCH + timedelta(microseconds=self._now_ns / 1e3)

    def read(self) -> Reading:
        ticks = int(self._now_ns / 1e7)
        return Reading(
            at_ns=self.clock_ns(),
            waited_ns=int(self._waited_ns),
            pressure_us=int(self._waited_ns / 1e3),
            steal_ticks=0,
            all_ticks=ticks,
            runnable=2 if self._foreign else 1,
            clock_hz=self._clock() * self._of.heat.clock_hz,
            temperature_c=self._heat_c,
            throttled=self._throttled,
            absent={
                "memory_peak_bytes": "a simulated device has no memory",
                "accelerator_hz": "a simulated device has one clock",
                "power_w": "a simulated device has no power rails",
            },
        )

    def watch_memory(self) -> Callable[[], int | None]:
        return lambda: None

    def energy_j(self) -> float:
        return self._joules

    def spend(self, work_ns: float) -> float:
        """Do what takes `work_ns` on the cool, quiet device at its mean speed; the nanoseconds that it took here."""
        left, began_ns = work_ns, self._now_ns
        if self._of.noise:
            left *= 1 + self._of.noise * math.exp(0.7 * self._random.gauss(0, 1))
        while left > 0:
            clock = self._clock()
            speed = clock * math.exp(self._speed) * (1 - self._of.burst.takes if self._foreign else 1)
            step = min(left / speed, _STEP_NS, max(1.0, self._until_ns - self._now_ns))
            left -= step * speed
            self._pass(step, clock)
            if left < 1e-6:
                break
        return self._now_ns - began_ns

    def _pass(self, step_ns: float, clock: float) -> None:
        """Let a short time of work at this share of the full clock go by."""
        drift, burst, heat = self._of.drift, self._of.burst, self._of.heat
        self._now_ns += step_ns
        if drift.deviation:
            kept = math.exp(-step_ns / 1e9 / drift.correlation_s)
            self._speed = kept * self._speed + drift.deviation * math.sqrt(1 - kept * kept) * self._random.gauss(0, 1)
        if self._foreign:
            self._waited_ns += step_ns * burst.takes
        if self._now_ns >= self._until_ns:
            self._foreign = not self._foreign
            self._until_ns = self._next_switch()
        self._joules += heat.power_w * clock * step_ns / 1e9
        target = heat.ambient_c + heat.rise_c * clock
        self._heat_c += (target - self._heat_c) * (1 - math.exp(-step_ns / 1e9 / heat.tau_s))
        slow = self._heat_c > heat.limit_c
        self._throttled += slow and not self._slow
        self._slow = slow

    def _clock(self) -> float:
        """Share of the full clock."""
        over_c = self._heat_c - self._of.heat.limit_c
        return 1.0 if over_c <= 0 else max(0.2, 1 - self._of.heat.slope * over_c)

    def _next_switch(self) -> float:
        """When foreign load next comes or goes."""
        burst = self._of.burst
        if not burst.share:
            return math.inf
        mean_s = burst.length_s if self._foreign or burst.share >= 1 else burst.length_s * (1 - burst.share) / burst.share
        return self._now_ns + self._random.expovariate(1 / mean_s) * 1e9
