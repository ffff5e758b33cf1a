"""This machine: what it is, and what else it is doing."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.profiles import describe_cpu
from toolkit.schema import Load

_PROC = Path("/proc")


@dataclass(frozen=True)
class Facts:
    """The processor as fingerprints name it, and the cores this process may use."""

    cpu: str
    cores: int
    instruction_set: str


@dataclass(frozen=True)
class Reading:
    """Counters of the kernel at one moment. None where it does not say."""

    at_s: float
    pressure_us: int | None
    steal_ticks: int | None
    all_ticks: int | None
    runnable: int | None


def facts() -> Facts:
    """What this machine is."""
    cpu, instruction_set = describe_cpu(_text("cpuinfo"), _text("device-tree/model"), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Facts(cpu=cpu, cores=cores, instruction_set=instruction_set)


def read_load() -> Reading:
    """The counters now."""
    pressure = next((line for line in _text("pressure/cpu").splitlines() if line.startswith("some")), "")
    ticks = [int(tick) for tick in _text("stat").partition("\n")[0].split()[1:9]]
    average = _text("loadavg").split()
    return Reading(
        at_s=time.monotonic(),
        pressure_us=int(pressure.rpartition("total=")[2]) if "total=" in pressure else None,
        steal_ticks=ticks[7] if len(ticks) == 8 else None,
        all_ticks=sum(ticks) if len(ticks) == 8 else None,
        runnable=int(average[3].partition("/")[0]) if len(average) > 3 else None,
    )


def load_between(before: Reading, after: Reading) -> Load:
    """Shares of time in which some task waited for a core and in which the hypervisor took one; mean number of runnable tasks."""
    wall_us, pressure, steal, queue = (after.at_s - before.at_s) * 1e6, -1.0, -1.0, -1.0
    if before.pressure_us is not None and after.pressure_us is not None and wall_us > 0:
        pressure = min(1.0, (after.pressure_us - before.pressure_us) / wall_us)
    if None not in (before.steal_ticks, after.steal_ticks, before.all_ticks, after.all_ticks):
        steal = (after.steal_ticks - before.steal_ticks) / max(1, after.all_ticks - before.all_ticks)  # type: ignore[operator]
    if before.runnable is not None and after.runnable is not None:
        queue = (before.runnable + after.runnable) / 2
    return Load(cpu_pressure=pressure, steal=steal, run_queue=queue)


def _text(name: str) -> str:
    try:
        return (_PROC / name).read_text(encoding="utf-8")
    except OSError:
        return ""
