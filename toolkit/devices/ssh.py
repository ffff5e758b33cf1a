"""A board at the other end of the user's own `ssh`: artefacts go there by content, and are timed there by its own clock."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from toolkit import profiles
from toolkit.backends import KernelSample, openvino_, ort
from toolkit.backends.base import Array, Feeds, require_file
from toolkit.devices import sensors
from toolkit.devices.base import Facts, Loaded, Reading, Taken, Visit
from toolkit.devices.link import MARGIN_S, Address, Answer, Greeting, Link, parse_address, printable, ssh_command, unpacked
from toolkit.drivers import NAME
from toolkit.errors import EdgekitError, LinkError, MeasurementError, MissingError, UsageError
from toolkit.schema import Format, Shape

T = TypeVar("T")

BEGIN_S, LOAD_S, TIMED_S, PROFILE_S, FILE_S = 60.0, 300.0, 300.0, 600.0, 600.0  # what the board may take
BATCH_S = 1.5  # of visits made at once: long beside a round trip, short beside a session
KEEP_S = 60.0  # how long the board keeps uploads for a link that comes back
MAX_BATCH = 1000  # visits
_REPEATABLE = ("about", "begin", "has")  # what means the same to the next agent
SMALL = 1 << 18  # bytes of a file that is sent without asking first
SAMPLE, MAX_COMPRESSED = 1 << 16, 256 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=10**16)]
Dims = Annotated[list[Annotated[int, msgspec.Meta(ge=-1, le=2**40)]], msgspec.Meta(max_length=16)]
Name = Annotated[str, msgspec.Meta(max_length=1000)]
Port = tuple[Name, Annotated[str, msgspec.Meta(pattern=r"^[a-z]{3,8}[0-9]{0,3}$")], Dims]
Ports = Annotated[list[Port], msgspec.Meta(max_length=1000)]
Texts = Annotated[dict[Name, Annotated[str, msgspec.Meta(max_length=20000)]], msgspec.Meta(max_length=4096)]


class _Nothing(msgspec.Struct, frozen=True):
    pass


class _Worker(msgspec.Struct, frozen=True):
    worker: Count


class _Version(msgspec.Struct, frozen=True):
    version: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.+_-]{1,60}$")]


class _Has(msgspec.Struct, frozen=True):
    size: Count
    whole: bool


class _Loaded(msgspec.Struct, frozen=True):
    handle: Count
    inputs: Ports
    outputs: Ports
    finite: bool
    bursts: list[list[Count]]


class _Warm(msgspec.Struct, frozen=True):
    made: Count
    median_ns: Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class _Timed(msgspec.Struct, frozen=True):
    turns: list[tuple[list[Count], int]]
    readings: dict[str, Texts]


class _Read(msgspec.Struct, frozen=True):
    files: Texts


class _Outputs(msgspec.Struct, frozen=True):
    outputs: list[tuple[Annotated[str, msgspec.Meta(pattern=r"^[a-z]{3,8}[0-9]{0,3}$")], Dims, str]]


class _Told(msgspec.Struct, frozen=True):
    """Of ONNX Runtime the optimised graph and its events, of OpenVINO the layers and their times; packed."""

    graph: str = ""
    events: str = ""
    layers: str = ""
    times: str = ""


class _Events(msgspec.Struct, frozen=True):
    first: list[tuple[str, str, list[dict[str, list[int]]]]]
    regular: bool
    durations: list[Count]


class _Layer(msgspec.Struct, frozen=True):
    name: str
    inputs: list[str]
    input_shapes: list[list[int]]
    output_shapes: list[list[int]]
    layerType: str
    runtimePrecision: str
    primitiveType: str
    originalLayersNames: str


class Started(msgspec.Struct, frozen=True):
    """What loading took on the board; `memory_bytes` -1: its kernel does not tell."""

    load_ns: Count
    first_ns: Count
    reload_ns: Count
    memory_bytes: int


class Ssh:
    """`Device` at an address. The link is made when it is first needed, and made again when it was lost."""

    remote = True

    def __init__(self, address: Address, command: Callable[[Address], list[str]] = ssh_command) -> None:
        self.address, self._command = address, command
        self._link: Link | None = None
        self._greeting: Greeting | None = None
        self._there: set[str] = set()  # digests of the files that this link's agent has
        self._versions: dict[str, str] = {}
        self._reading: Reading | None = None

    # the protocol's

    def facts(self) -> Facts:
        told = self._greeted().facts
        cpu, instruction_set = profiles.describe_cpu(told.cpuinfo, told.board, told.machine)
        return Facts(cpu=printable(cpu), cores=told.cores, instruction_set=instruction_set)

    def backend(self, runtime: str) -> SshBackend:
        if runtime not in ("onnxruntime", "openvino"):
            raise UsageError(
                f"edgekit's agent does not run {runtime}.",
                "Run with -p local-onnxruntime or -p local-openvino; for TensorRT, edgekit export writes the command.",
            )
        return SshBackend(self, runtime)

    def rig(self, runtime: str, threads: int) -> SshRig:
        self.backend(runtime)
        return SshRig(self, runtime, threads)

    def clock_ns(self) -> int:
        return self.live().now_ns()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    def read(self) -> Reading:
        """The last reading of any rig, since sensors are read where artefacts run."""
        absent = {
            "energy_j": "edgekit's agent counts no energy",
            "memory_peak_bytes": "it is watched where an artefact is loaded",
        }
        return self._reading or Reading(at_ns=self.clock_ns(), absent=absent)

    def watch_memory(self) -> Callable[[], int | None]:
        return lambda: None

    def energy_j(self) -> float | None:
        return None

    # for what lies on top of it

    @property
    def system(self) -> str:
        """What runs there, for people."""
        told = self._greeted().facts
        return printable(f"{told.system}, Python {told.python}")

    def version(self, runtime: str) -> str:
        if runtime not in self._versions:
            self._versions[runtime] = self.ask("about", {"runtime": runtime}, _Version, BEGIN_S + 120).version
        return self._versions[runtime]

    def live(self) -> Link:
        """The link, made if there is none.

        Raises:
            MissingError: it cannot be made.
        """
        if self._link is not None and self._link.alive:
            return self._link
        before = self._greeting
        if self._link is not None:
            self._link.close()
        self._there.clear()
        link = Link(self._command(self.address), str(self.address))
        self._greeting = link.greet()
        self._link = link
        if self._greeting.edgekit != 1:
            raise MeasurementError(f"{self.address} answers in another version of the protocol.", "Update edgekit.")
        self.ask("adopt", {"token": before.token if before else "", "keep_s": KEEP_S}, msgspec.Raw, BEGIN_S)
        return link

    def ask(self, verb: str, how: dict[str, Any], kind: type[T], limit_s: float, **more: Any) -> T:
        """One request and its result; once more through a new link where this one turns out to be lost."""
        link = self.live()
        try:
            answer = link.wait(link.post(verb, how, **more), limit_s)
        except LinkError:
            if verb not in _REPEATABLE:
                raise
            link = self.live()
            answer = link.wait(link.post(verb, how, **more), limit_s)
        return self.result(answer, kind)

    def result(self, answer: Answer, kind: type[T]) -> T:
        """What an answer holds; an error of the tree where that is what it tells."""
        if answer.error:
            raise self._told(answer)
        try:
            return msgspec.json.decode(answer.result, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self.odd(printable(str(error), 80)) from None

    def odd(self, what: str) -> MeasurementError:
        """An answer that cannot be: nothing more is asked of this agent."""
        if self._link is not None:
            self._link.close()
        return MeasurementError(f"{self.address} gave an answer that cannot be: {what}.", "Check what runs on that device.")

    def put(self, data: Path | bytes) -> tuple[str, list[int]]:
        """Have a file on the board: its digest, and the requests whose answers say that it arrived."""
        sha = _digest(data)
        if sha in self._there:
            return sha, []
        try:
            posted = self._put(data, sha)
        except LinkError:
            posted = self._put(data, sha)  # the next link goes on where this one ended
        self._there.add(sha)
        return sha, posted

    def arrived(self, requests: Sequence[int]) -> None:
        """Wait for the uploads of these requests."""
        link = self.live()
        for number in requests:
            try:
                self.result(link.wait(number, FILE_S), _Nothing)
            except EdgekitError:
                self._there.clear()
                raise

    def noticed(self, files: Mapping[str, str], at_ns: int) -> Reading:
        """A reading from the files that the board sent."""
        try:
            absent = {"energy_j": "edgekit's agent counts no energy"}
            self._reading = sensors.read(sensors.Sent(files), at_ns, absent)
        except (ValueError, IndexError, OverflowError):
            raise self.odd("its kernel's files are not what kernels write") from None
        return self._reading

    def close(self) -> None:
        """Leave the board, with nothing of ours on it."""
        if self._link is not None:
            self._link.close()

    def _greeted(self) -> Greeting:
        if self._greeting is None:
            self.live()
        assert self._greeting is not None
        return self._greeting

    def _put(self, data: Path | bytes, sha: str) -> list[int]:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        offset = 0
        if size > SMALL:
            found = self.ask("has", {"sha": sha}, _Has, BEGIN_S)
            if found.whole:
                return []
            offset = found.size if found.size <= size else 0
        compressed, sent, blocks = _travelling(data, offset)
        how = {"sha": sha, "size": size, "offset": offset, "sent": sent, "compressed": compressed}
        link = self.live()
        number = link.post("put", how, blocks)
        if size > SMALL:
            self.result(link.wait(number, FILE_S), _Nothing)
            return []
        return [number]

    def _told(self, answer: Answer) -> EdgekitError:
        """An error that the agent told, in this tree's terms."""
        said, where = printable(answer.message, 300).rstrip("."), self.address
        if answer.error == "usage":
            return UsageError(f"On {where}: {said}.", "Export the file again.")
        if answer.error == "missing":
            return MissingError(f"On {where}: {said}.", "Change the profile.")
        if answer.error == "import":
            return MissingError(
                f"The runtime cannot be imported on {where}: {said}.",
                f"Install it there, for the python3 that a login finds: ssh {where.host} python3 -m pip install onnxruntime",
            )
        if answer.error == "busy":
            return MissingError(f"Someone else measures on {where}: {said}.", "Wait until they have finished, then run it again.")
        if answer.error == "system":
            return MeasurementError(f"{where} cannot do it: {said}.", "Look at the free space and the rights in its /tmp.")
        if answer.error == "gone":
            return LinkError(f"On {where}: {said}.", "Run the same command again: what was measured is kept.")
        return MeasurementError(f"On {where}: {said}.", "Look at the runtime there; run the same command again.")


class SshRig:
    """`Rig` in a process of its own on the board."""

    def __init__(self, device: Ssh, runtime: str, threads: int) -> None:
        self._device, self._runtime, self._threads = device, runtime, threads
        self._link = device.live()
        self._worker = device.ask("begin", {}, _Worker, BEGIN_S).worker
        self._paths: dict[int, Path] = {}
        self._ports: dict[int, tuple[tuple[Shape, ...], tuple[Shape, ...]]] = {}

    def load(self, path: Path, precision: str, *, seed: int = 0, check: bool = False, bursts: Sequence[int] = ()) -> Loaded:
        found = self.open(path, precision, seed, check, bursts)
        return Loaded(found.handle, found.finite, tuple(np.array(burst, np.int64) for burst in found.bursts))

    def open(self, path: Path, precision: str, seed: int | None, check: bool = False, bursts: Sequence[int] = ()) -> _Loaded:
        """Load, prepared for random inputs where there is a seed."""
        main, files, uploads = self._sent(path)
        how = {"files": files, "main": main, "runtime": self._runtime, "threads": self._threads, "precision": precision}
        how |= {"seed": seed, "check": check, "bursts": list(bursts)}
        found = self._ask("load", how, _Loaded, LOAD_S, uploads)
        if len(found.bursts) != len(bursts) or any(len(a) != n for a, n in zip(found.bursts, bursts, strict=True)):
            raise self._device.odd("it made other bursts than it was asked for")
        self._paths[found.handle] = path
        self._ports[found.handle] = tuple(map(_shape, found.inputs)), tuple(map(_shape, found.outputs))
        return found

    def ports(self, handle: int) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
        """(inputs, outputs)"""
        return self._ports[handle]

    def unload(self, handle: int) -> None:
        self._ask("unload", {"handle": handle}, _Nothing, BEGIN_S)

    def warm_up(self, handle: int) -> tuple[int, float]:
        found = self._ask("warm", {"handle": handle}, _Warm, LOAD_S)
        return found.made, found.median_ns

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
        waiting, rest = list[Visit](), iter(visits)
        seconds = min(within_s or BATCH_S, BATCH_S)
        while True:
            waiting += islice(rest, first + (MAX_BATCH // group + 1) * group - len(waiting))
            if not waiting:
                return
            made = self._batch(waiting, {"seconds": seconds, "group": group, "first": first, "least": least})
            del waiting[: len(made)]
            yield from made
            first, least = 0, 1

    def executed_precision(self, handle: int) -> tuple[str, str]:
        told = self._ask("executed", {"handle": handle}, _Told, PROFILE_S)
        with self._believable():
            if self._runtime == "openvino":
                return openvino_.precision_of(_layers(told.layers))
            return ort.precision_of(_graph(told.graph), self._ports[handle][0][0].dtype)

    def profile(self, handle: int, runs: int) -> tuple[KernelSample, ...]:
        path = self._paths[handle]
        told = self._ask("profile", {"handle": handle, "runs": runs}, _Told, PROFILE_S)
        with self._believable():
            if self._runtime == "openvino":
                times = msgspec.json.decode(unpacked(told.times), type=list[dict[str, Count]])
                return openvino_.kernels_of(path, _layers(told.layers), times[:runs])
            events = msgspec.json.decode(unpacked(told.events), type=_Events)
            if not events.regular:
                raise MeasurementError(
                    f"The kernels of {path} differ from inference to inference.", "Remove control flow from the model."
                )
            durations = np.array(events.durations, np.int64).reshape(runs, len(events.first))
            return ort.kernels_of(path, _graph(told.graph), self._ports[handle][0], events.first, durations)

    def run(self, handle: int, feeds: Feeds) -> list[Array]:
        """One inference on these inputs, which travel there; the outputs travel back."""
        sent, uploads = dict[str, Any](), list[int]()
        for name, value in feeds.items():
            array = np.ascontiguousarray(value)
            sha, posted = self._device.put(array.tobytes())
            sent[name], uploads = (sha, array.dtype.name, array.shape), uploads + posted
        found = self._ask("run", {"handle": handle, "feeds": sent}, _Outputs, LOAD_S, uploads)
        with self._believable():
            return [np.frombuffer(unpacked(data), np.dtype(dtype)).reshape(dims) for dtype, dims, data in found.outputs]

    def startup(self, path: Path, precision: str, runs: int) -> Started:
        """Load in this process, in which the runtime's libraries are loaded already."""
        main, files, uploads = self._sent(path)
        how = {"files": files, "main": main, "runtime": self._runtime, "threads": self._threads, "precision": precision}
        return self._ask("startup", how | {"runs": runs}, Started, LOAD_S, uploads)

    def read(self) -> Reading:
        answer = self._answer("read", {}, BEGIN_S)
        return self._device.noticed(self._device.result(answer, _Read).files, answer.at_ns)

    def now_ns(self) -> int:
        return self._link.now_ns()

    def close(self) -> None:
        if self._link.alive:
            with contextlib.suppress(EdgekitError):
                self._device.ask("end", {"worker": self._worker}, _Nothing, BEGIN_S)

    def _sent(self, path: Path) -> tuple[str, dict[str, str], list[int]]:
        """An artefact on the board: its main file's name there, digests by name, and the uploads to wait for."""
        files, uploads = dict[str, str](), list[int]()
        for name, file in artefact_files(path).items():
            files[name], posted = self._device.put(file)
            uploads += posted
        return next(iter(files)), files, uploads

    def _answer(self, verb: str, how: dict[str, Any], limit_s: float) -> Answer:
        if not self._link.alive:
            raise LinkError(
                f"The link to {self._device.address} was lost.", "Run the same command again: what was measured is kept."
            )
        return self._link.wait(self._link.post(verb, how, worker=self._worker, limit_s=limit_s), limit_s + MARGIN_S)

    def _ask(self, verb: str, how: dict[str, Any], kind: type[T], limit_s: float, uploads: Sequence[int] = ()) -> T:
        answer = self._answer(verb, how, limit_s)
        self._device.arrived(uploads)
        return self._device.result(answer, kind)

    def _batch(self, visits: Sequence[Visit], bounds: dict[str, Any]) -> list[Taken]:
        """As many of the visits as the bounds allow."""
        how = {"visits": [(v.what, v.lead, v.burst, v.read) for v in visits], **bounds}
        found = self._ask("timed", how, _Timed, TIMED_S)
        made = list(zip(visits, found.turns, strict=False))
        right = 0 < len(found.turns) <= len(visits) and all(len(turn[0]) == visit.burst for visit, turn in made)
        if not right or ((len(made) - bounds["first"]) % bounds["group"] and len(made) < len(visits)):
            raise self._device.odd("it made other visits than it was asked for")
        taken = []
        for position, (visit, (samples, at_ns)) in enumerate(made):
            files = found.readings.get(str(position)) if visit.read else None
            reading = self._device.noticed(files, at_ns) if files is not None else None
            if visit.read and reading is None:
                raise self._device.odd("it did not read its sensors")
            taken.append(Taken(np.array(samples, np.int64), None, at_ns, reading))
        return taken

    @contextlib.contextmanager
    def _believable(self) -> Iterator[None]:
        """What a board tells of a network may fit nothing: any way in which that shows is one error."""
        try:
            yield
        except EdgekitError:
            raise
        except Exception as error:
            raise self._device.odd(printable(f"{type(error).__name__}: {error}", 100)) from None


class SshSession:
    """`Session` on a board: inputs and outputs travel, so for values, not for timing."""

    def __init__(self, rig: SshRig, handle: int) -> None:
        self._rig, self._handle = rig, handle
        self.inputs, self.outputs = rig.ports(handle)

    def run(self, feeds: Feeds) -> list[Array]:
        return self._rig.run(self._handle, feeds)

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        return lambda: self.run(feeds)

    def executed_precision(self) -> tuple[str, str]:
        return self._rig.executed_precision(self._handle)

    def close(self) -> None:
        self._rig.close()


class SshBackend:
    """`Backend` of a runtime on a board."""

    def __init__(self, device: Ssh, runtime: str) -> None:
        self._device, self.name = device, runtime
        self.format: Format = "openvino" if runtime == "openvino" else "onnx"

    def version(self) -> str:
        return self._device.version(self.name)

    def open(self, path: Path, *, threads: int, precision: str) -> SshSession:
        rig = self._device.rig(self.name, threads)
        try:
            return SshSession(rig, rig.open(path, precision, None).handle)
        except EdgekitError:
            rig.close()
            raise

    def profile(self, path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
        with contextlib.closing(self._device.rig(self.name, threads)) as rig:
            return rig.profile(rig.load(path, precision).handle, runs)


@cache
def connected(url: str) -> Ssh:
    """The device of a URL, the same one each time; left when this process ends."""
    device = Ssh(parse_address(url))
    atexit.register(device.close)
    return device


def artefact_files(path: Path) -> dict[str, Path]:
    """Names on the board -> files here, the one that is opened first.

    Raises:
        UsageError: there is none, or it names weights elsewhere than beside it.
    """
    require_file(path)
    if path.suffix == ".xml":
        return {"model.xml": path, "model.bin": path.with_suffix(".bin")}
    import onnx
    from onnx.external_data_helper import uses_external_data

    files = {"model.onnx": path}
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # what it is instead is for the runtime to say
        return files
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            file = path.parent / name
            if not NAME.fullmatch(name) or name == "model.onnx" or file.is_symlink() or not file.is_file():
                raise UsageError(f"{path} keeps weights in {printable(name, 80)!r}, not in a file beside it.", "Export it again.")
            files[name] = file
    return files


def _travelling(data: Path | bytes, offset: int) -> tuple[bool, int, Iterator[bytes]]:
    """(whether compressed, bytes on the way, the blocks) of what is left of a file."""
    with open(data, "rb") if isinstance(data, Path) else contextlib.nullcontext() as file:
        size = os.fstat(file.fileno()).st_size if file else len(data)  # type: ignore[arg-type]

        def part(start: int, length: int) -> bytes:
            if file is None:
                return data[start : start + length]  # type: ignore[index]
            file.seek(start)
            return file.read(length)

        sample = part(offset, SAMPLE)
        if size - offset <= MAX_COMPRESSED and len(zlib.compress(sample, 6)) < 0.85 * len(sample):
            whole = zlib.compress(part(offset, size - offset), 6)
            return True, len(whole), iter((whole,))
    return False, size - offset, _blocks(data, offset)


def _blocks(data: Path | bytes, offset: int, length: int = 1 << 18) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield from (data[start : start + length] for start in range(offset, len(data), length))
        return
    with data.open("rb") as file:
        file.seek(offset)
        while block := file.read(length):
            yield block


def _digest(data: Path | bytes) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    for block in _blocks(data, 0, 1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _shape(port: Port) -> Shape:
    name, dtype, dims = port
    return Shape(name=name, dtype=dtype, dims=tuple(dims))


def _graph(packed: str) -> Any:
    import onnx

    return onnx.load_from_string(unpacked(packed)).graph


def _layers(packed: str) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(layer) for layer in msgspec.json.decode(unpacked(packed), type=list[_Layer])]
