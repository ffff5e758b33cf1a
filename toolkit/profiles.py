"""Hardware profiles: which there are, what this machine is, and where its latency tables are kept.

A profile is `<folder>/profile.json`. The ones in `hw_profiles` are known by id; any other by its path.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

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
    profile = _checked(_parsed(path.read_bytes(), str(path)), str(path))
    if profile.status == "measured" and shipped_table(id_or_path) is None:
        raise UsageError(
            f"{path} says that it was measured, and there is no table beside it.",
            f"Measure it: edgekit measure MODEL -p PROFILE -o {path.parent}; or write `ready` as its status.",
        )
    return profile


def next_step(template: Profile) -> str:
    """The command that makes more of a template than facts."""
    if template.format == "tensorrt":
        return f"edgekit export MODEL -p {template.id} --on ssh://user@board"
    return f"edgekit measure MODEL -p {template.id} --on ssh://user@board -o my-board"


def check_measured(profile: Profile) -> None:
    """Refuse what describes a device without being one: nothing was measured there, and nothing here stands in for it.

    Raises:
        UsageError: a template that was not put on a device.
    """
    if profile.status != "template" or profile.device.startswith("ssh://"):
        return
    what = (
        "it writes the file and the command that builds the engine there"
        if profile.format == "tensorrt"
        else "then give -p my-board"
    )
    raise UsageError(
        f"Profile {profile.id} is a template: it has facts about a board, and nothing was measured on one.",
        f"Run: {next_step(profile)}; {what}.",
    )


def check_measurable(profile: Profile) -> None:
    """Refuse what this version would measure on something else than was asked for.

    Raises:
        UsageError: a device of OpenVINO other than the processor.
    """
    if profile.openvino_device != "CPU":
        raise UsageError(
            f"Profile {profile.id} asks for OpenVINO's {profile.openvino_device}; this version measures its CPU device only.",
            "Choose the profile of the board's CPU (see `edgekit profiles`); benchmark_app of OpenVINO times the others.",
        )


def json_schema() -> str:
    """The JSON schema of a profile.json, from the record itself; `hw_profiles/profile.schema.json` is a copy for editors."""
    schema = msgspec.json.schema(Profile)
    for each in schema["$defs"].values():
        if "description" in each:  # some versions of msgspec leave a docstring indented
            each["description"] = inspect.cleandoc(each["description"])
    record = schema["$defs"]["Profile"]
    complete = [name for name in record["required"] if name != "id"]
    record |= {"required": ["id"], "anyOf": [{"required": ["extends"]}, {"required": complete}]}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "profile.json of edgekit", **schema}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


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
    return _checked(_parsed(file.read_bytes(), str(file)), str(file))


def _parsed(text: bytes, source: str) -> Profile:
    """The record of a file, with all that it extends."""
    return from_json(Profile, json.dumps(_merged(text, source, ())), source)


def _merged(text: bytes, source: str, below: tuple[str, ...]) -> dict[str, Any]:
    """A file's fields over those of the profile it extends, and that one's likewise; `below` are the ids on the way here.

    Raises:
        UsageError: no JSON object, an unknown profile to extend, or a circle.
    """
    try:
        fields = json.loads(text)
    except (UnicodeDecodeError, ValueError):
        fields = None
    if not isinstance(fields, dict):
        from_json(Profile, text, source)  # says what is wrong with it
        raise UsageError(f"{source} is not a valid Profile record.", "Correct the file.")
    parent = fields.pop("extends", "")
    if not parent:
        return fields
    way = (*below, str(fields.get("id", source)))
    if parent in way:
        raise UsageError(f"{source}: {' extends '.join((*way, str(parent)))}, a circle.", "Take `extends` out of one of them.")
    if parent not in _known():
        raise UsageError(f"{source} extends {parent!r}; the known profiles are {', '.join(_known())}.", _LIST)
    file = resources.files("hw_profiles").joinpath(parent).joinpath("profile.json")
    above = _merged(file.read_bytes(), str(file), way)
    del above["id"]  # a profile's own
    facts = {
        name: fact for each in (above, fields) if isinstance(found := each.get("facts", {}), dict) for name, fact in found.items()
    }
    return above | fields | ({"facts": facts} if facts and isinstance(fields.get("facts", {}), dict) else {})


def _checked(profile: Profile, source: str) -> Profile:
    """Ids become names of files, and counts arguments of runtimes: refuse what would only fail there."""
    if not _ID.fullmatch(profile.id):
        raise UsageError(f"{source}: {profile.id!r} is no profile id.", "Use lower-case letters and digits, joined by . _ or -.")
    if profile.threads < 1 or profile.batch < 1:
        raise UsageError(f"{source}: threads and batch must be at least 1.", "Correct the file.")
    if profile.openvino_device != "CPU" and profile.runtime != "openvino":
        raise UsageError(f"{source}: openvino_device is of the runtime openvino, not {profile.runtime}.", "Correct the file.")
    unsourced = [name for name, fact in profile.facts.items() if not fact.source.strip()]
    if unsourced:
        raise UsageError(f"{source}: the fact {unsourced[0]} has no source.", "Name the document it is from, or leave it out.")
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
