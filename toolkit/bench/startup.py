"""What comes before the first answer: loading an artefact, its first inference, and the memory both take."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

from toolkit import backends, devices
from toolkit.bench import fresh
from toolkit.bench.reference import reference_path
from toolkit.devices.ssh import Ssh
from toolkit.schema import Profile, Record, Startup

LIMIT_S = 600.0
_INFERENCES = 3  # runtimes allocate in the first ones


class Request(Record, frozen=True, kw_only=True):
    """Which artefact is to be loaded."""

    profile: Profile
    path: str


def startup(profile: Profile, path: Path) -> Startup:
    """Load the artefact in a process of its own. Errors as `bench.benchmark`."""
    device = devices.open(profile)
    if isinstance(device, Ssh):
        return _on_board(device, profile, path)
    return fresh.ask("startup", Request(profile=profile, path=str(path.resolve())), Startup, LIMIT_S)


def _on_board(device: Ssh, profile: Profile, path: Path) -> Startup:
    """The same on a board: there every rig is a fresh process."""
    with tempfile.TemporaryDirectory() as folder, closing(device.rig(profile.runtime, profile.threads)) as rig:
        rig.load(reference_path(Path(folder)), profile.precision, check=True)
        found = rig.startup(path, profile.precision, _INFERENCES)
    memory = found.memory_bytes if found.memory_bytes >= 0 else None
    why = {} if memory is not None else {"memory_peak_bytes": "the board's kernel does not tell it"}
    return Startup(
        artefact=path.name,
        load_ns=found.load_ns,
        first_inference_ns=found.first_ns,
        reload_ns=found.reload_ns,
        memory_peak_bytes=memory,
        absent=why,
    )


def answer(request: Request) -> Startup:
    """In the fresh process: the reference network loads the libraries, then the artefact is loaded, run, loaded again."""
    profile, path = request.profile, Path(request.path)
    device = devices.open(profile)
    backend, clock = device.backend(profile.runtime), device.clock_ns
    with tempfile.TemporaryDirectory() as folder:
        first = backend.open(reference_path(Path(folder)), threads=profile.threads, precision=profile.precision)
        first.run(backends.random_feeds(first.inputs, 0))
        first.close()
    peak = device.watch_memory()
    started = clock()
    session = backend.open(path, threads=profile.threads, precision=profile.precision)
    loaded = clock()
    feeds = backends.random_feeds(session.inputs, 0)
    began = clock()
    session.run(feeds)
    ran = clock()
    for _ in range(_INFERENCES):
        session.run(feeds)
    memory = peak()
    session.close()
    again = clock()
    backend.open(path, threads=profile.threads, precision=profile.precision).close()
    return Startup(
        artefact=path.name,
        load_ns=loaded - started,
        first_inference_ns=ran - began,
        reload_ns=clock() - again,
        memory_peak_bytes=memory,
        absent={}
        if memory is not None
        else {"memory_peak_bytes": device.read().absent.get("memory_peak_bytes", "this kernel does not tell it")},
    )
