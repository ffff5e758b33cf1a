"""What drives a runtime and times it, in this process and on a board, where it goes with the agent.

The settings that decide a latency are here and nowhere else, so that a board and this machine time the same thing. `Worker`
offers that to the agent as verbs. Standard library only, Python 3.8 or later; runtimes are imported inside functions.
"""

from __future__ import annotations

import base64
import gc
import glob
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from typing import Any, Callable, Sequence  # noqa: UP035  (those of collections.abc take no arguments in 3.8)

MAX_VISITS = 10000
TURN_LIMIT_S = 3600.0
PROFILE_WARMUP = 3  # inferences before the profiled ones; the first allocate memory and fill caches
WARM_BURST, WARM_LIMIT_NS, WARM_TOLERANCE = 5, 3_000_000_000, 0.03
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
SHA = re.compile(r"[0-9a-f]{64}")

# What a reading holds: small files of the kernel, never written to.
SENSORS = (
    *("proc/self/task/*/schedstat", "proc/pressure/cpu", "proc/stat", "proc/loadavg"),
    *("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",),
    *("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",),
    *("sys/class/thermal/thermal_zone*/type", "sys/class/thermal/thermal_zone*/temp"),
    *("sys/class/hwmon/hwmon*/name", "sys/class/hwmon/hwmon*/temp*_input", "sys/class/hwmon/hwmon*/power*_input"),
    *("sys/class/hwmon/hwmon*/in*_input", "sys/class/hwmon/hwmon*/curr*_input"),
    *("sys/class/devfreq/*/cur_freq",),
)

Call = Callable[[], object]
Clock = Callable[[], int]


class Refused(Exception):
    """What an answer says instead of a result: a kind that the other side knows, and words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


# --- timing -----------------------------------------------------------------------------------------------------------------


def time_burst(call: Call, count: int, clock: Clock = time.perf_counter_ns) -> list[int]:
    """Nanoseconds of each of `count` calls in a row. No garbage is collected between them."""
    stamps = [0] * (count + 1)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        stamps[0] = clock()
        for index in range(1, count + 1):
            call()
            stamps[index] = clock()
    finally:
        if was_enabled:
            gc.enable()
    return [stamps[index + 1] - stamps[index] for index in range(count)]


def warm_up(call: Call, clock: Clock = time.perf_counter_ns) -> tuple[int, float]:
    """Calls until two bursts in a row agree within 3 % (at most three seconds): (calls made, median of the last burst in ns)."""
    made, medians = 0, [float("inf")]
    started = clock()
    while True:
        medians.append(float(sorted(time_burst(call, WARM_BURST, clock))[WARM_BURST // 2]))
        made += WARM_BURST
        settled = len(medians) > 3 and abs(medians[-1] / medians[-2] - 1) <= WARM_TOLERANCE
        if settled or clock() - started > WARM_LIMIT_NS:
            return made, medians[-1]


# --- runtimes: the settings that decide a latency are here only -----------------------------------------------------------------


def ort_options(threads: int) -> Any:
    """ONNX Runtime's options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


def ort_session(path: str, options: Any) -> Any:
    """A session on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ort_prepared(session: Any, feeds: dict[str, Any], outputs: Sequence[tuple[str, str, Sequence[int]]]) -> Call:
    """One inference: inputs bound, outputs left in the runtime's own memory. Called once already."""
    from functools import partial

    import numpy
    import onnxruntime

    binding = session.io_binding()
    for key, value in feeds.items():
        binding.bind_ortvalue_input(key, onnxruntime.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(value)))
    for name, dtype, dims in outputs:
        if min(dims, default=0) < 0:
            binding.bind_output(name)
        else:
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(dims), numpy.dtype(dtype)))
    call = partial(session.run_with_iobinding, binding)
    call()
    return call


_ORT_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64",
}  # fmt: skip


def ort_shape(value: Any) -> tuple[str, str, list[int]]:
    """(name, dtype, dims) of an input or output; what is open is -1."""
    dims = [dim if isinstance(dim, int) else -1 for dim in value.shape]
    return value.name, _ORT_DTYPES.get(value.type, value.type), dims


def openvino_settings(threads: int, precision: str) -> dict[str, Any]:
    """Every setting of OpenVINO's CPU plugin that changes the time; KeyError: no such precision."""
    return {
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


OPENVINO_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}  # int8 lives in the graph; floats left are f32


def openvino_unlike(compiled: Any, asked: dict[str, Any]) -> str | None:
    """What a compiled model does otherwise than asked, in words."""
    for key, value in asked.items():
        got = compiled.get_property(key)
        got = got.get_type_name() if hasattr(got, "get_type_name") else got
        if str(got) != str(value):
            return f"openvino set {key} to {got} where {value} was asked for."
    return None


def openvino_request(compiled: Any, feeds: dict[str, Any]) -> Any:
    """A request that holds copies of `feeds`."""
    import numpy
    import openvino

    request = compiled.create_infer_request()
    for key, value in feeds.items():
        request.set_tensor(key, openvino.Tensor(numpy.ascontiguousarray(value)))
    return request


def openvino_shape(port: Any) -> tuple[str, str, list[int]]:
    import numpy

    dtype = numpy.dtype(port.get_element_type().to_dtype()).name
    return port.any_name, dtype, openvino_dims(port)


def openvino_dims(port: Any) -> list[int]:
    return [dim.get_length() if dim.is_static else -1 for dim in port.get_partial_shape()]


def openvino_layers(compiled: Any) -> list[dict[str, Any]]:
    """The layers the plugin runs, in order: name, what it tells of each, and the makers and shapes of their activations."""
    layers = []
    constant = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {key: str(value.astype(str) if hasattr(value, "astype") else value) for key, value in node.get_rt_info().items()}
        name, sources = node.get_friendly_name(), [port.get_source_output() for port in node.inputs()]
        activations = [source for source in sources if source.get_node().get_friendly_name() not in constant]
        if told["layerType"] == "Const" or (sources and not activations):
            constant.add(name)
        layer = {
            "name": name,
            "inputs": [source.get_node().get_friendly_name() for source in activations],
            "input_shapes": [openvino_dims(source) for source in activations],
            "output_shapes": [openvino_dims(port) for port in node.outputs()],
        }
        layer.update({key: told.get(key, "") for key in OPENVINO_TOLD})
        layers.append(layer)
    return layers


OPENVINO_TOLD = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")


def openvino_times(compiled: Any, feeds: dict[str, Any], runs: int) -> list[dict[str, int]]:
    """Nanoseconds of each layer by inference; the plugin counts whole microseconds."""
    request = openvino_request(compiled, feeds)
    for _ in range(PROFILE_WARMUP):
        request.infer(share_outputs=True)
    times = []
    for _ in range(runs):
        request.infer(share_outputs=True)
        times.append({entry.node_name: round(entry.real_time.total_seconds() * 1e9) for entry in request.profiling_info})
    return times


def random_feeds(inputs: Sequence[tuple[str, str, Sequence[int]]], seed: int) -> dict[str, Any]:
    """Standard normal inputs, the same for the same shapes and seed; integer inputs are zero."""
    import numpy

    generator = numpy.random.default_rng(seed)
    feeds = {}
    for name, dtype, dims in inputs:
        if min(dims, default=0) < 0:
            raise Refused("usage", f"Input {name!r} has no fixed shape {tuple(dims)!r}.")
        floating = dtype.startswith("float")
        feeds[name] = generator.standard_normal(dims).astype(dtype) if floating else numpy.zeros(dims, dtype)
    return feeds


# --- files ------------------------------------------------------------------------------------------------------------------


def without_weights(model: bytes) -> bytes:
    """A serialised ONNX model with the contents of its graph's initializers left out: names, types and nodes stay.

    Protocol buffers are walked by hand, since a board with a runtime need not have the package `onnx`.
    """

    def fields(data: memoryview) -> list[tuple[int, int, int, int, int]]:
        """(number, wire type, start of the field, start of its contents, end)"""
        found, at = [], 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            start = at
            key = varint()
            kind = key & 7
            size = {0: 0, 1: 8, 5: 4}.get(kind, -1)
            if kind == 0:
                varint()
            elif kind == 2:
                size = varint()
            if size < 0:
                raise ValueError("not a protocol buffer")
            found.append((key >> 3, kind, start, at, at + size))
            at += size
        return found

    def again(data: memoryview, number: int, change: Callable[[memoryview], bytes]) -> bytes:
        """The message with each field `number` changed."""
        parts = []
        for field, kind, start, inner, end in fields(data):
            if field == number and kind == 2:
                value = change(data[inner:end])
                parts += [_varint(number << 3 | 2), _varint(len(value)), value]
            else:
                parts.append(bytes(data[start:end]))
        return b"".join(parts)

    def tensor(data: memoryview) -> bytes:  # dims 1, data_type 2, name 8: all else is contents or where they lie
        return b"".join(bytes(data[start:end]) for field, _, start, _, end in fields(data) if field in (1, 2, 8))

    return again(memoryview(model), 7, lambda graph: again(graph, 5, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def packed(data: bytes) -> str:
    """Bytes as they travel in an answer."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def read_sensors() -> dict[str, str]:
    """File -> its text, of those that this kernel has and lets us read."""
    found = {}
    for pattern in SENSORS:
        for path in sorted(glob.glob("/" + pattern))[:256]:
            try:
                with open(path, "rb") as file:
                    text = file.read(4096)
            except OSError:
                continue
            found[path[1:]] = text.decode("utf-8", "replace")
    return found


# --- the worker: one process, the artefacts loaded in it ----------------------------------------------------------------------


class Loaded:
    """An artefact that is open; `prepared` times it."""

    def __init__(self, session: Any, path: str, inputs: Any, outputs: Any) -> None:
        self.session, self.path, self.inputs, self.outputs = session, path, inputs, outputs
        self.call: Call = lambda: None


class Worker:
    """Answers the verbs of `WORKED` with artefacts of one runtime."""

    def __init__(self, folder: str) -> None:
        self.folder, self.next = folder, 0
        self.loaded: dict[int, Loaded] = {}
        self.runtime, self.threads, self.precision = "", 1, "fp32"

    def version(self, runtime: str) -> dict[str, Any]:
        if runtime == "onnxruntime":
            import onnxruntime

            return {"version": str(onnxruntime.__version__)}
        if runtime == "openvino":
            import openvino

            return {"version": str(openvino.get_version()).split("-")[0]}
        raise Refused("usage", f"The agent does not know the runtime {runtime!r}.")

    def _place(self, files: dict[str, str]) -> str:
        """A folder in which the files, known by their contents, have the names that artefacts call each other by."""
        folder = tempfile.mkdtemp(dir=self.folder)
        for name, sha in files.items():
            if not (isinstance(sha, str) and NAME.fullmatch(name) and SHA.fullmatch(sha)):
                raise Refused("usage", f"The name {name!r} or its digest is not one that the agent takes.")
            try:
                os.link(os.path.join(self.folder, "files", sha), os.path.join(folder, name))
            except FileNotFoundError:
                raise Refused("lacking", sha) from None
        return folder

    def _open(self, path: str, runtime: str, threads: int, precision: str, **extra: Any) -> Loaded:
        self.version(runtime)  # an ImportError is told as such
        try:
            if runtime == "onnxruntime":
                session = ort_session(path, ort_options(threads))
                return Loaded(
                    session, path, list(map(ort_shape, session.get_inputs())), list(map(ort_shape, session.get_outputs()))
                )
            import openvino

            if precision not in OPENVINO_HINTS:
                raise Refused("usage", f"openvino has no precision {precision!r}.")
            asked = openvino_settings(threads, precision)
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(path), "CPU", dict(asked, **extra))
        except Refused:
            raise
        except Exception as error:
            raise Refused("usage", f"{runtime} cannot open {os.path.basename(path)}: {shortened(error)}") from None
        unlike = openvino_unlike(compiled, asked)
        if unlike:
            raise Refused("missing", unlike + f" The board has {os.cpu_count()} cores.")
        return Loaded(compiled, path, list(map(openvino_shape, compiled.inputs)), list(map(openvino_shape, compiled.outputs)))

    def _prepare(self, one: Loaded, feeds: dict[str, Any]) -> None:
        if self.runtime == "onnxruntime":
            one.call = ort_prepared(one.session, feeds, one.outputs)
        else:
            from functools import partial

            one.call = partial(openvino_request(one.session, feeds).infer, share_outputs=True)
            one.call()

    def _run(self, one: Loaded, feeds: dict[str, Any]) -> list[Any]:
        import numpy

        if self.runtime == "onnxruntime":
            return list(one.session.run(None, feeds))
        results = one.session.create_infer_request().infer(feeds)
        return [numpy.array(results[port]) for port in one.session.outputs]

    def load(self, files: dict[str, str], main: str, runtime: str, threads: int, precision: str, seed: int | None, check: bool,
             bursts: list[int]) -> dict[str, Any]:  # fmt: skip
        import numpy

        self.runtime, self.threads, self.precision = runtime, threads, precision
        one = self._open(os.path.join(self._place(files), main), runtime, threads, precision)
        finite = True
        if seed is not None:
            feeds = random_feeds(one.inputs, seed)
            if check:
                floats = [out for out in self._run(one, feeds) if numpy.issubdtype(out.dtype, numpy.floating)]
                finite = all(bool(numpy.isfinite(out).all()) for out in floats)
            self._prepare(one, feeds)
        self.next += 1
        self.loaded[self.next] = one
        taken = [time_burst(one.call, min(count, 1000)) for count in bursts]
        return {"handle": self.next, "inputs": one.inputs, "outputs": one.outputs, "finite": finite, "bursts": taken}

    def unload(self, handle: int) -> dict[str, Any]:
        one = self.loaded.pop(handle)
        one.session, one.call = None, lambda: None
        shutil.rmtree(os.path.dirname(one.path), ignore_errors=True)
        return {}

    def warm(self, handle: int) -> dict[str, Any]:
        made, median_ns = warm_up(self.loaded[handle].call)
        return {"made": made, "median_ns": median_ns}

    def timed(self, visits: list[Any], seconds: float, group: int, first: int, least: int) -> dict[str, Any]:
        """Visits in order, whole groups after the first ones, until the seconds are over or none is left."""
        end = time.perf_counter_ns() + int(min(seconds, TURN_LIMIT_S) * 1e9)
        turns, readings = [], {}
        for position, (handle, lead, burst, read) in enumerate(visits[:MAX_VISITS]):
            enough = position >= max(1, first + least * group) and (position - first) % max(1, group) == 0
            if enough and time.perf_counter_ns() > end:
                break
            call = self.loaded[handle].call
            for _ in range(lead):
                call()
            turns.append([time_burst(call, burst), time.perf_counter_ns()])
            if read:
                readings[str(position)] = read_sensors()
        return {"turns": turns, "readings": readings}

    def read(self) -> dict[str, Any]:
        return {"files": read_sensors()}

    def run(self, handle: int, feeds: dict[str, list[Any]]) -> dict[str, Any]:
        import numpy

        one, arrays = self.loaded[handle], {}
        for name, (sha, dtype, dims) in feeds.items():
            if not SHA.fullmatch(sha):
                raise Refused("usage", "That is no digest.")
            data = numpy.fromfile(os.path.join(self.folder, "files", sha), dtype)
            arrays[name] = data.reshape(dims)
        outputs = self._run(one, arrays)
        return {"outputs": [[str(out.dtype), list(out.shape), packed(numpy.ascontiguousarray(out).tobytes())] for out in outputs]}

    def executed(self, handle: int) -> dict[str, Any]:
        """What the workstation needs to say in which precision the kernels run."""
        one = self.loaded[handle]
        if self.runtime == "openvino":
            return {"layers": packed(json.dumps(openvino_layers(one.session)).encode())}
        return {"graph": self._profiled_ort(one, 0)["graph"]}

    def profile(self, handle: int, runs: int) -> dict[str, Any]:
        one = self.loaded[handle]
        if self.runtime == "onnxruntime":
            return self._profiled_ort(one, runs)
        counting = self._open(one.path, self.runtime, self.threads, self.precision, PERF_COUNT=True)
        times = openvino_times(counting.session, random_feeds(one.inputs, 0), runs)
        return {
            "layers": packed(json.dumps(openvino_layers(counting.session)).encode()),
            "times": packed(json.dumps(times).encode()),
        }

    def _profiled_ort(self, one: Loaded, runs: int) -> dict[str, Any]:
        folder = tempfile.mkdtemp(dir=self.folder)
        try:
            options = ort_options(self.threads)
            options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
            options.enable_profiling = bool(runs)
            options.profile_file_prefix = os.path.join(folder, "events")
            session = ort_session(one.path, options)
            with open(options.optimized_model_filepath, "rb") as file:
                graph = without_weights(file.read())
            if not runs:
                return {"graph": packed(graph)}
            feeds = random_feeds(one.inputs, 0)
            for _ in range(PROFILE_WARMUP + runs):
                session.run(None, feeds)
            with open(session.end_profiling(), "rb") as file:
                events = [event for event in json.loads(file.read()) if event.get("cat") == "Node"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        size = len(events) // (PROFILE_WARMUP + runs)
        first = [[e["name"], e["args"]["op_name"], e["args"].get("output_type_shape", [])] for e in events[:size]]
        names = [event["name"] for event in events]
        regular = size > 0 and names == names[:size] * (PROFILE_WARMUP + runs)
        kept = {"first": first, "regular": regular, "durations": [e["dur"] for e in events[PROFILE_WARMUP * size :]]}
        return {"graph": packed(graph), "events": packed(json.dumps(kept).encode())}

    def startup(self, files: dict[str, str], main: str, runtime: str, threads: int, precision: str, runs: int) -> dict[str, Any]:
        """Nanoseconds of loading, of the first inference and of loading again; growth of the memory's peak, -1 if nobody says."""
        folder = self._place(files)
        path, clock = os.path.join(folder, main), time.perf_counter_ns
        self.runtime = runtime
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = memory("VmRSS")
        except OSError:
            before = -1
        started = clock()
        one = self._open(path, runtime, threads, precision)
        loaded = clock()
        feeds = random_feeds(one.inputs, 0)
        began = clock()
        self._run(one, feeds)
        ran = clock()
        for _ in range(runs):
            self._run(one, feeds)
        peak = memory("VmHWM")
        one.session = None
        again = clock()
        self._open(path, runtime, threads, precision)
        return {
            "load_ns": loaded - started,
            "first_ns": ran - began,
            "reload_ns": clock() - again,
            "memory_bytes": max(0, peak - before) if before >= 0 else -1,
        }


def memory(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else -1


def shortened(error: BaseException, limit: int = 300) -> str:
    """An exception's text on one line."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
