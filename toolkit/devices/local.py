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
from toolkit.devices.base import Facts, Reading
from toolkit.profiles import describe_cpu

# field of a reading -> the condition it tells, and where the kernel says it
_SOURCES = {
    "waited_ns": ("waiting", "/proc/self/task/*/schedstat"),
    "pressure_us": ("cpu_pressure", "/proc/pressure/cpu"),
    "steal_ticks": ("steal", "/proc/stat"),
    "runnable": ("run_queue", "/proc/loadavg"),
    "clock_hz": ("clock_hz", "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"),
    "temperature_c": ("temperature_c", "/sys/class/thermal and /sys/class/hwmon"),
    "throttled": ("throttled", "/sys/devices/system/cpu/cpu*/thermal_throttle"),
}
_PROCESSOR_ZONES = re.compile(r"cpu|x86_pkg|soc|core|package", re.IGNORECASE)
_PROCESSOR_MONITORS = ("coretemp", "k10temp", "cpu_thermal", "zenpower")


class Local:
    """`Device` on the machine this runs on. `root` is where its /proc and /sys lie."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc, self._sys = root / "proc", root / "sys"
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

    def clock_ns(self) -> int:
        return time.perf_counter_ns()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    def read(self) -> Reading:
        pressure = next((line for line in _text(self._proc / "pressure/cpu").splitlines() if line.startswith("some")), "")
        ticks = [int(tick) for tick in _text(self._proc / "stat").partition("\n")[0].split()[1:9]]
        average = _text(self._proc / "loadavg").split()
        waits = [_text(task).split() for task in self._proc.glob("self/task/*/schedstat")]
        clocks = [_number(file) for file in self._sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
        throttles = [
            _number(file) for file in self._sys.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
        ]
        found = {
            "waited_ns": sum(int(fields[1]) for fields in waits if fields)
            if any(set("".join(fields)) - {"0"} for fields in waits)
            else None,
            "pressure_us": int(pressure.rpartition("total=")[2]) if "total=" in pressure else None,
            "steal_ticks": ticks[7] if len(ticks) == 8 else None,
            "runnable": int(average[3].partition("/")[0]) if len(average) > 3 else None,
            # The core that is at work is the fastest; idle ones rest at their lowest clock.
            "clock_hz": max((clock * 1e3 for clock in clocks if clock is not None), default=None),
            "temperature_c": self._temperature(),
            "throttled": round(sum(count or 0 for count in throttles)) if throttles else None,
        }
        absent = {name: f"this kernel has no {place}" for key, (name, place) in _SOURCES.items() if found[key] is None}
        if not os.access(self._proc / "self/clear_refs", os.W_OK):
            absent["memory_peak_bytes"] = "this kernel lets no process forget its highest memory (/proc/self/clear_refs)"
        if not self._packages:
            absent["energy_j"] = "this kernel has no /sys/class/powercap/intel-rapl:*/energy_uj"
        elif None in self._last:
            absent["energy_j"] = "/sys/class/powercap/intel-rapl:*/energy_uj may be read by root only"
        return Reading(at_ns=self.clock_ns(), all_ticks=sum(ticks) if len(ticks) == 8 else None, absent=absent, **found)  # type: ignore[arg-type]

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

    def _temperature(self) -> float | None:
        """The hottest sensor of the processor; of the board where none says that it is the processor's."""
        zones = {zone: _number(zone / "temp") for zone in self._sys.glob("class/thermal/thermal_zone*")}
        own = {zone: value for zone, value in zones.items() if _PROCESSOR_ZONES.search(_text(zone / "type"))}
        monitors = [m for m in self._sys.glob("class/hwmon/hwmon*") if _text(m / "name").strip() in _PROCESSOR_MONITORS]
        values = [*own.values(), *(_number(file) for monitor in monitors for file in monitor.glob("temp*_input"))]
        values = values or list(zones.values())
        return max((value / 1e3 for value in values if value is not None), default=None)


def facts() -> Facts:
    """What this machine is."""
    return Local().facts()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
