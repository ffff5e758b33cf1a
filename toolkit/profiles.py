"""Hardware profiles: which there are, what this machine is, and where its latency tables are kept.

A profile is `<folder>/profile.json`. The ones in `hw_profiles` are known by id; any other by its path.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import resources
from pathlib import Path

from toolkit.errors import UsageError
from toolkit.schema import Fingerprint, Profile, TableHeader, from_json, load_json

# Instruction sets that change which kernels a runtime picks. /proc/cpuinfo calls the list `flags` on x86, `Features` on Arm.
INSTRUCTION_SETS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

TABLE_FORMAT = 2  # of the latency tables in the cache; counts up where older ones cannot be read any more

_ID = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_LIST = "Run `edgekit profiles` for the list, or give the path of a folder with a profile.json."


def list_profiles() -> tuple[Profile, ...]:
    """The profiles that come with edgekit, by id."""
    return tuple(_bundled(name) for name in _known())


def load(id_or_path: str) -> Profile:
    """One profile: a known id, a folder with a profile.json, or such a file.

    Raises:
        UsageError: no such profile, or its file is not valid.
    """
    if id_or_path in _known():
        return _bundled(id_or_path)
    path = Path(id_or_path)
    if id_or_path and path.is_dir():
        path /= "profile.json"
    if not path.is_file():
        raise UsageError(f"There is no profile {id_or_path!r}; the known ones are {', '.join(_known())}.", _LIST)
    return _checked(load_json(Profile, path), str(path))


def shipped_table(id_or_path: str) -> Path | None:
    """The folder of the latency table that comes with a profile, None where it has none."""
    if id_or_path in _known():
        folder = Path(str(resources.files("hw_profiles").joinpath(id_or_path)))
    else:
        path = Path(id_or_path)
        folder = path if path.is_dir() else path.parent
    return folder / "table" if (folder / "table" / "header.json").is_file() else None


def measured_on(id_or_path: str) -> str:
    """The device that the table which comes with a profile was measured on, empty where it has none."""
    table = shipped_table(id_or_path)
    if table is None:
        return ""
    try:
        return load_json(TableHeader, table / "header.json").fingerprint.device
    except UsageError:
        return "a device its damaged table does not name"


def fingerprint(profile: Profile, runtime_version: str, processor: tuple[str, str] | None = None) -> Fingerprint:
    """What latencies measured under `profile` are a property of. `processor`: the device's own word (name, instruction sets).

    Raises:
        UsageError: the profile is of another device, which only that device can describe.
    """
    if profile.runtime == "simulated":
        device, instructions = profile.device, ""
    elif processor is not None:
        device, instructions = processor
    elif profile.device == "local":
        device, instructions = describe_cpu(_read("/proc/cpuinfo"), _read("/proc/device-tree/model"), platform.machine())
    else:
        raise UsageError(
            f"Profile {profile.id} is of the device {profile.device!r}, which cannot be fingerprinted from this machine.",
            "Choose a profile whose device is `local` (see `edgekit profiles`), or run edgekit on that device.",
        )
    return Fingerprint(
        device=device,
        runtime=profile.runtime,
        runtime_version=runtime_version,
        precision=profile.precision,
        threads=profile.threads,
        batch=profile.batch,
        instruction_set=instructions,
    )


def describe_cpu(cpuinfo: str, board: str, machine: str) -> tuple[str, str]:
    """The processor's name and its relevant instruction sets, from the texts the kernel gives of both.

    Virtual machines shorten the model name to the vendor's, so family, model and stepping belong to the name; Arm kernels give
    no name, so there the board's and the part numbers stand in.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or board.strip("\0 \n") or "unknown processor"
    numbers = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
    details = ", ".join(f"{key} {fields[key]}" for key in numbers if key in fields)
    present = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    return f"{name} ({details}) {machine}".replace(" ()", ""), " ".join(flag for flag in INSTRUCTION_SETS if flag in present)


def cache_dir() -> Path:
    """Where measured tables live: `$EDGEKIT_CACHE`, else `edgekit` in the user's cache folder. Not created here."""
    chosen, shared = os.environ.get("EDGEKIT_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen:
        return Path(chosen)
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "edgekit"


def table_dir(fingerprint: Fingerprint) -> Path:
    """The folder of one fingerprint's latency table. Tables of another format are left to the edgekit that wrote them."""
    return cache_dir() / "latency" / f"format-{TABLE_FORMAT}" / fingerprint.id


def _known() -> tuple[str, ...]:
    folders = resources.files("hw_profiles").iterdir()
    return tuple(sorted(folder.name for folder in folders if folder.joinpath("profile.json").is_file()))


def _bundled(name: str) -> Profile:
    file = resources.files("hw_profiles").joinpath(name).joinpath("profile.json")
    return _checked(from_json(Profile, file.read_bytes(), str(file)), str(file))


def _checked(profile: Profile, source: str) -> Profile:
    """Ids become names of files, and counts arguments of runtimes: refuse what would only fail there."""
    if not _ID.fullmatch(profile.id):
        raise UsageError(f"{source}: {profile.id!r} is no profile id.", "Use lower-case letters and digits, joined by . _ or -.")
    if profile.threads < 1 or profile.batch < 1:
        raise UsageError(f"{source}: threads and batch must be at least 1.", "Correct the file.")
    if (profile.runtime == "simulated") != (profile.simulation is not None):
        raise UsageError(
            f"{source}: a simulated device is described by `simulation`, and no other is.",
            "Give `simulation` with the runtime `simulated`; hw_profiles/simulated-cpu is an example.",
        )
    if profile.simulation is not None:
        of, law = profile.simulation, profile.simulation.law
        positive = (law.macs_per_s, law.bytes_per_s, law.block_in, law.block_out, law.tile_pixels, law.grouped_rate)
        if min(*positive, of.drift.correlation_s, of.burst.length_s, of.heat.tau_s) <= 0 or not 0 <= of.burst.takes < 1:
            raise UsageError(f"{source}: the rates, blocks and times of a simulation must be positive.", "Correct the file.")
    return profile


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
