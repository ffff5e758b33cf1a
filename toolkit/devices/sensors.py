"""What the kernel's small files say of a machine, wherever they are read: here, or on a board that sent their texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from toolkit.devices.base import Reading

# field of a reading -> the condition it tells, and where the kernel says it
_SOURCES = {
    "waited_ns": ("waiting", "/proc/self/task/*/schedstat"),
    "pressure_us": ("cpu_pressure", "/proc/pressure/cpu"),
    "steal_ticks": ("steal", "/proc/stat"),
    "runnable": ("run_queue", "/proc/loadavg"),
    "clock_hz": ("clock_hz", "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"),
    "temperature_c": ("temperature_c", "/sys/class/thermal and /sys/class/hwmon"),
    "throttled": ("throttled", "/sys/devices/system/cpu/cpu*/thermal_throttle"),
    "accelerator_hz": ("accelerator_hz", "/sys/class/devfreq/*/cur_freq"),
    "power_w": ("power_w", "/sys/class/hwmon/hwmon*/power*_input or in*_input with curr*_input"),
}
_PROCESSOR_ZONES = re.compile(r"cpu|x86_pkg|soc|core|package", re.IGNORECASE)
_PROCESSOR_MONITORS = ("coretemp", "k10temp", "cpu_thermal", "zenpower")


class Files(Protocol):
    """Files of a kernel by their path without the first slash."""

    def text(self, name: str) -> str:
        """Empty where there is no such file, or it may not be read."""

    def glob(self, pattern: str) -> list[str]: ...


class Tree:
    """`Files` of the machine whose root is here."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def text(self, name: str) -> str:
        try:
            return (self._root / name).read_text(encoding="utf-8")
        except OSError:
            return ""

    def glob(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self._root)) for path in self._root.glob(pattern))


class Sent:
    """`Files` whose texts another machine sent: names are looked up, never opened."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def text(self, name: str) -> str:
        return self._texts.get(name, "")

    def glob(self, pattern: str) -> list[str]:
        parts = pattern.split("/")
        return sorted(
            name for name in self._texts if name.count("/") == len(parts) - 1 and all(map(fnmatchcase, name.split("/"), parts))
        )


def read(files: Files, at_ns: int, more_absent: Mapping[str, str]) -> Reading:
    """All sensors at one moment; `more_absent` is what the caller knows to be missing."""
    pressure = next((line for line in files.text("proc/pressure/cpu").splitlines() if line.startswith("some")), "")
    ticks = [int(tick) for tick in files.text("proc/stat").partition("\n")[0].split()[1:9]]
    average = files.text("proc/loadavg").split()
    waits = [files.text(task).split() for task in files.glob("proc/self/task/*/schedstat")]
    clocks = _numbers(files, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    throttles = _numbers(files, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    found = {
        "waited_ns": sum(int(fields[1]) for fields in waits if fields)
        if any(set("".join(fields)) - {"0"} for fields in waits)
        else None,
        "pressure_us": int(pressure.rpartition("total=")[2]) if "total=" in pressure else None,
        "steal_ticks": ticks[7] if len(ticks) == 8 else None,
        "runnable": int(average[3].partition("/")[0]) if len(average) > 3 else None,
        # The core that is at work is the fastest; idle ones rest at their lowest clock.
        "clock_hz": max((clock * 1e3 for clock in clocks if clock is not None), default=None),
        "temperature_c": _temperature(files),
        "throttled": round(sum(count or 0 for count in throttles)) if throttles else None,
        "accelerator_hz": max((clock for clock in _numbers(files, "sys/class/devfreq/*/cur_freq") if clock), default=None),
        "power_w": _power(files),
    }
    absent = {name: f"this kernel has no {place}" for key, (name, place) in _SOURCES.items() if found[key] is None}
    absent |= more_absent
    return Reading(at_ns=at_ns, all_ticks=sum(ticks) if len(ticks) == 8 else None, absent=absent, **found)  # type: ignore[arg-type]


def _temperature(files: Files) -> float | None:
    """The hottest sensor of the processor; of the board where none says that it is the processor's."""
    zones = {name.rpartition("/")[0]: number(files.text(name)) for name in files.glob("sys/class/thermal/thermal_zone*/temp")}
    own = [value for zone, value in zones.items() if _PROCESSOR_ZONES.search(files.text(f"{zone}/type"))]
    monitors = [name.rpartition("/")[0] for name in files.glob("sys/class/hwmon/hwmon*/name")]
    monitors = [monitor for monitor in monitors if files.text(f"{monitor}/name").strip() in _PROCESSOR_MONITORS]
    values = [*own, *(value for monitor in monitors for value in _numbers(files, f"{monitor}/temp*_input"))]
    values = values or list(zones.values())
    return max((value / 1e3 for value in values if value is not None), default=None)


def _power(files: Files) -> float | None:
    """Of all power rails together; a rail tells microwatts, or millivolts and milliamperes."""
    direct = [value / 1e6 for value in _numbers(files, "sys/class/hwmon/hwmon*/power*_input") if value is not None]
    for name in files.glob("sys/class/hwmon/hwmon*/curr*_input"):
        folder, _, file = name.rpartition("/")
        if not files.glob(f"{folder}/power*_input"):
            current, voltage = number(files.text(name)), number(files.text(f"{folder}/{file.replace('curr', 'in')}"))
            direct += [current * voltage / 1e6] if current is not None and voltage is not None else []
    return sum(direct) if direct else None


def _numbers(files: Files, pattern: str) -> list[float | None]:
    return [number(files.text(name)) for name in files.glob(pattern)]


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
