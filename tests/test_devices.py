"""Devices: what this machine's kernel tells, read from made-up files; what happened between readings."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgspec
import pytest

from toolkit import devices, profiles
from toolkit.devices import Reading, conditions, local
from toolkit.errors import UsageError
from toolkit.schema import Conditions, Profile

STAT = "cpu  100 0 50 800 0 0 0 50 0 0\n"
FILES = {
    "proc/pressure/cpu": "some avg10=1.00 avg60=1.00 avg300=1.00 total=5000000\nfull avg10=0 avg60=0 avg300=0 total=0\n",
    "proc/stat": STAT,
    "proc/loadavg": "0.50 0.40 0.30 3/200 4242\n",
    "proc/self/task/1/schedstat": "900 2000000 5\n",
    "proc/self/task/2/schedstat": "900 1000000 5\n",
    "proc/self/status": "Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t    1000 kB\n",
    "proc/self/clear_refs": "",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "800000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
    "sys/class/thermal/thermal_zone0/type": "battery\n",
    "sys/class/thermal/thermal_zone0/temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51500\n",
    "sys/class/devfreq/gpu/cur_freq": "624750000\n",
    "sys/class/hwmon/hwmon0/name": "ina3221\n",
    "sys/class/hwmon/hwmon0/in1_input": "5000\n",
    "sys/class/hwmon/hwmon0/curr1_input": "800\n",
    "sys/class/hwmon/hwmon1/power1_input": "2500000\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "900000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "777\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_sensor_is_read(machine: Path) -> None:
    reading = local.Local(machine).read()
    assert (reading.waited_ns, reading.pressure_us, reading.runnable) == (3_000_000, 5_000_000, 3)
    assert (reading.steal_ticks, reading.all_ticks) == (50, 1000)
    assert reading.clock_hz == 2.4e9  # the busy core's, not an idle one's
    assert reading.temperature_c == 51.5  # the processor's, not the battery's
    assert reading.accelerator_hz == 624_750_000 and reading.power_w == pytest.approx(5 * 0.8 + 2.5)
    assert reading.throttled == 7 and reading.absent == {}


@pytest.mark.parametrize(
    ("gone", "name"),
    [
        ("proc/self/task", "waiting"), ("proc/pressure", "cpu_pressure"), ("proc/stat", "steal"), ("proc/loadavg", "run_queue"),
        ("sys/devices/system/cpu/cpu0/cpufreq", ""), ("sys/class/thermal", "temperature_c"),
        ("sys/devices/system/cpu", "clock_hz"), ("sys/devices/system/cpu", "throttled"),
        ("sys/class/devfreq", "accelerator_hz"), ("sys/class/hwmon", "power_w"), ("sys/class/powercap", "energy_j"),
        ("proc/self/clear_refs", "memory_peak_bytes"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_tell_is_named_with_its_place(machine: Path, gone: str, name: str) -> None:
    import shutil

    path = machine / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    device = local.Local(machine)
    absent = device.read().absent
    assert (name in absent) if name else absent == {}
    if name not in ("", "energy_j", "memory_peak_bytes"):
        found = conditions([[device.read(), device.read()]])
        assert getattr(found, name) is None and "/" in found.absent[name]


def test_a_kernel_that_keeps_no_account_of_waiting_does_not_tell_it(machine: Path) -> None:
    for task in (1, 2):
        (machine / f"proc/self/task/{task}/schedstat").write_text("0 0 0\n")
    assert "waiting" in local.Local(machine).read().absent


def test_this_machine_names_whatever_it_does_not_tell() -> None:
    device = local.Local()
    found = conditions([[device.read(), device.read()]])
    for field in Conditions.__struct_fields__:
        assert field == "absent" or (getattr(found, field) is None) == (field in found.absent)
    assert (device.energy_j() is None) == ("energy_j" in device.read().absent)


def test_energy_is_of_whole_packages_and_survives_the_counters_wrap(machine: Path) -> None:
    device, counter = local.Local(machine), machine / "sys/class/powercap/intel-rapl:0/energy_uj"
    assert device.energy_j() == 0
    counter.write_text("950000")
    assert device.energy_j() == pytest.approx(0.05)
    counter.write_text("30000")  # over the range of 1,000,000 and on
    assert device.energy_j() == pytest.approx(0.13)


def test_memory_is_the_growth_of_the_peak(machine: Path) -> None:
    peak = local.Local(machine).watch_memory()
    assert (machine / "proc/self/clear_refs").read_text() == "5"
    assert peak() == 2000 * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this kernel lets no process forget its peak")
def test_memory_that_was_used_and_freed_is_seen() -> None:
    peak = local.Local().watch_memory()
    with mmap.mmap(-1, 64 << 20) as block:  # not of the heap, where 64 MiB may lie free and resident from earlier tests
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    found = peak()
    assert found is not None and 60 << 20 < found < 80 << 20


def test_conditions_are_what_happened_between_the_readings() -> None:
    first = Reading(10_000_000_000, 100, 1_000_000, 50, 1000, 1, 2e9, 40.0, 3)
    middle = Reading(11_000_000_000, 200, 1_200_000, 55, 1200, 4, 1e9, 45.0, 3)
    last = Reading(12_000_000_000, 500_000_100, 1_500_000, 60, 1400, 4, 2e9, 50.0, 5)
    found = conditions([[first, middle, last]])
    assert (found.waiting, found.cpu_pressure, found.steal, found.run_queue) == (0.25, 0.25, 0.025, 3)
    assert found.clock_hz == pytest.approx((1.2e9, 2e9)) and found.temperature_c == (40, 50) and found.throttled == 2


def test_what_happens_between_the_parts_of_a_session_does_not_count() -> None:
    def at(seconds: int, waited_ns: int, throttled: int) -> Reading:
        return Reading(seconds * 10**9, waited_ns=waited_ns, throttled=throttled)

    found = conditions([[at(0, 0, 0), at(2, 10**9, 1)], [at(100, 50 * 10**9, 40), at(102, 50 * 10**9, 40)]])
    assert found.waiting == 0.25 and found.throttled == 1 and found.steal is None


def test_a_simulated_device_goes_on_only_while_it_works() -> None:
    profile = profiles.load("simulated-cpu")
    device = devices.open(profile)
    assert device.clock_ns() == device.clock_ns() == 0 and device.energy_j() == 0
    before = device.now()
    device.spend(1e9)  # type: ignore[attr-defined]
    assert 0.8e9 < device.clock_ns() < 1.3e9 and device.energy_j() and device.now() > before
    assert device.facts().cores == 1


def test_only_this_machine_and_simulated_ones_are_reached() -> None:
    board = msgspec.structs.replace(profiles.load("local-onnxruntime"), device="jetson")
    with pytest.raises(UsageError, match="jetson") as caught:
        devices.open(board)
    assert "edgekit profiles" in caught.value.hint
    with pytest.raises(UsageError, match="no runtime 'openvino'"):
        devices.open(profiles.load("simulated-cpu")).backend("openvino")


def test_a_profile_is_simulated_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    from toolkit.schema import save_json

    good = profiles.load("simulated-cpu")
    assert good.simulation
    wrong: tuple[Profile, ...] = (
        msgspec.structs.replace(good, simulation=None),
        msgspec.structs.replace(good, runtime="onnxruntime"),
        msgspec.structs.replace(
            good,
            simulation=msgspec.structs.replace(good.simulation, law=msgspec.structs.replace(good.simulation.law, block_in=0)),
        ),
    )
    for profile in wrong:
        save_json(tmp_path / "profile.json", profile)
        with pytest.raises(UsageError, match=r"simulat|rates, blocks"):
            profiles.load(str(tmp_path))
