"""This machine: what it is, what else it is doing, and what its sensors say."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from toolkit import backends
from toolkit.backends import Backend
from toolkit.devices import sensors
from toolkit.devices.base import Facts, Reading, Rig
from toolkit.devices.inprocess import InProcess
from toolkit.profiles import describe_cpu


class Local:
    """`Device` on the machine this runs on. `root` is where its /proc and /sys lie."""

    remote = False

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc, self._sys, self._files = root / "proc", root / "sys", sensors.Tree(root)
        self._packages = self._find_packages()
        self._joules = [0.0] * len(self._packages)
        self._last = [self._microjoules(package) for package in self._packages]

    def facts(self) -> Facts:
        cpu, instruction_set = describe_cpu(
            _text(self._proc / "cpuinfo"), _text(self._proc / "device-tree/model"), platform.machine()
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Facts(cpu=cpu, cores=cores, instruction_set=instruction_set)

    def backend(self, runtime: str) -> Backend:
        return backends.get(runtime)

    def rig(self, runtime: str, threads: int) -> Rig:
        return InProcess(self.backend(runtime), threads, self.clock_ns, self.energy_j, self.read)

    def clock_ns(self) -> int:
        return time.perf_counter_ns()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    def read(self) -> Reading:
        absent = {}
        if not os.access(self._proc / "self/clear_refs", os.W_OK):
            absent["memory_peak_bytes"] = "this kernel lets no process forget its highest memory (/proc/self/clear_refs)"
        if not self._packages:
            absent["energy_j"] = "this kernel has no /sys/class/powercap/intel-rapl:*/energy_uj"
        elif None in self._last:
            absent["energy_j"] = "/sys/class/powercap/intel-rapl:*/energy_uj may be read by root only"
        return sensors.read(self._files, self.clock_ns(), absent)

    def watch_memory(self) -> Callable[[], int | None]:
        try:
            (self._proc / "self/clear_refs").write_text("5")  # forget the highest so far
        except OSError:
            return lambda: None
        before = self._status("VmRSS")
        return lambda: None if before is None or (peak := self._status("VmHWM")) is None else max(0, peak - before)

    def energy_j(self) -> float | None:
        """All packages together, since this object was made; the counters' wrapping is undone."""
        for index, package in enumerate(self._packages):
            now, before = self._microjoules(package), self._last[index]
            if now is None or before is None:
                return None
            span = _number(package / "max_energy_range_uj") or 0.0
            self._joules[index] += (now - before if now >= before else now - before + span) / 1e6
            self._last[index] = now
        return sum(self._joules) if self._packages else None

    def _status(self, name: str) -> int | None:
        """A size of this process in bytes."""
        found = re.search(rf"^{name}:\s+(\d+) kB$", _text(self._proc / "self/status"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _find_packages(self) -> list[Path]:
        zones = sorted(self._sys.glob("class/powercap/intel-rapl:*"))
        return [zone for zone in zones if _text(zone / "name").startswith("package")]

    @staticmethod
    def _microjoules(package: Path) -> float | None:
        return _number(package / "energy_uj")


def facts() -> Facts:
    """What this machine is."""
    return Local().facts()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    return sensors.number(_text(path))
