"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import drivers
from toolkit.backends import fusion
from toolkit.backends.base import PROFILE_WARMUP, Array, Feeds, KernelSample, random_feeds, require_file, running, shorten
from toolkit.errors import MeasurementError, UsageError
from toolkit.schema import Format, Shape

name = "onnxruntime"
format: Format = "onnx"


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def open(path: Path, *, threads: int, precision: str) -> OrtSession:
    """See `Backend.open`. The precision lives in the graph: it is read back, never set."""
    return OrtSession(path, opened(path, drivers.ort_options(threads)), threads)


class OrtSession:
    """`Session` on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, session: Any, threads: int) -> None:
        self._path, self._session, self._threads = path, session, threads
        self.inputs = tuple(map(_shape, session.get_inputs()))
        self.outputs = tuple(map(_shape, session.get_outputs()))

    def run(self, feeds: Feeds) -> list[Array]:
        with running("onnxruntime", self._path):
            return list(self._session.run(None, dict(feeds)))

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        with running("onnxruntime", self._path):
            return drivers.ort_prepared(self._session, dict(feeds), [(s.name, s.dtype, s.dims) for s in self.outputs])

    def executed_precision(self) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            optimised = _optimised(self._path, self._threads, Path(folder))[1]
        return precision_of(optimised, self.inputs[0].dtype)

    def close(self) -> None:
        self._session = None


def profile(path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
    """See `Backend.profile`: the runtime's own event log, tied to the file's nodes through the graph it optimised."""
    with tempfile.TemporaryDirectory() as folder:
        session, optimised = _optimised(path, threads, Path(folder), events=True)
        inputs = tuple(map(_shape, session.get_inputs()))
        feeds = random_feeds(inputs, 0)
        with running("onnxruntime", path):
            for _ in range(PROFILE_WARMUP + runs):
                session.run(None, feeds)
        events = [event for event in json.loads(Path(session.end_profiling()).read_bytes()) if event.get("cat") == "Node"]
    table = _by_run(events, PROFILE_WARMUP + runs, path)
    first = [(event["name"], event["args"]["op_name"], event["args"]["output_type_shape"]) for event in table[0]]
    durations_us = np.array([[event["dur"] for event in run] for run in table[PROFILE_WARMUP:]], np.int64)
    return kernels_of(path, optimised, inputs, first, durations_us)


Event = tuple[str, str, Sequence[dict[str, list[int]]]]  # name, operator, outputs by type


def kernels_of(
    path: Path, optimised: Any, inputs: Sequence[Shape], first: Sequence[Event], durations_us: NDArray[np.int64]
) -> tuple[KernelSample, ...]:
    """What the runtime told of an artefact, tied to its file: the events of one inference, and [run, event] microseconds."""
    import onnx

    durations = durations_us * 1000
    matched = _match(first, optimised.node, path)
    kernels = fusion.trace_back(onnx.load(str(path), load_external_data=False).graph, optimised)

    seen = {shape.name: shape.dims for shape in inputs}
    for (_, _, shapes), position in zip(first, matched, strict=True):
        seen.update(zip(kernels[position].runtime_outputs, map(_dims, shapes), strict=False))
    return tuple(
        KernelSample(
            name=node.name or f"{node.op_type}_{index}",
            op=node.op_type,
            nodes=kernel.nodes,
            inputs=kernel.inputs,
            outputs=kernel.outputs,
            input_shapes=tuple(seen.get(tensor, ()) for tensor in kernel.runtime_inputs),
            output_shapes=tuple(seen.get(tensor, ()) for tensor in kernel.runtime_outputs),
            samples_ns=durations[:, index],
            implementation=node.domain.removeprefix("com.microsoft").lstrip(".") or ("contrib" if node.domain else ""),
        )
        for index, (node, kernel) in enumerate((optimised.node[position], kernels[position]) for position in matched)
    )


def precision_of(optimised: Any, input_dtype: str) -> tuple[str, str]:
    """See `Session.executed_precision`: from the graph that the runtime made of the file."""
    found = fusion.weight_dtypes(optimised)
    if not found:
        return {"float32": "fp32", "float16": "fp16"}.get(input_dtype, input_dtype), "input type of the session"
    return "+".join(kind for kind, _ in found.most_common()), f"weights of the optimised graph: {_counts(found)}"


def opened(path: Path, options: Any) -> Any:
    """A session with these options; UsageError, in the runtime's words, where it cannot be."""
    require_file(path)
    if path.suffix == ".xml":
        raise UsageError(
            f"{path} is OpenVINO's own format, which onnxruntime does not read.", "Run it again with -p local-openvino."
        )
    try:
        return drivers.ort_session(str(path), options)
    except Exception as error:
        raise UsageError(f"onnxruntime cannot open {path}: {shorten(error)}.", "Export the file again.") from None


def _optimised(path: Path, threads: int, folder: Path, *, events: bool = False) -> tuple[Any, Any]:
    """A session and the graph it really runs, which the runtime tells only by writing it to a file."""
    import onnx

    options = drivers.ort_options(threads)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.enable_profiling = events
    options.profile_file_prefix = str(folder / "events")
    session = opened(path, options)
    return session, onnx.load(str(folder / "optimised.onnx"), load_external_data=False).graph


def _by_run(events: list[dict[str, Any]], runs: int, path: Path) -> list[list[dict[str, Any]]]:
    """Events cut into runs; MeasurementError where runs executed different kernels (loops, branches)."""
    size, rest = divmod(len(events), runs)
    table = [events[index * size : (index + 1) * size] for index in range(runs)]
    names = [[event["name"] for event in run] for run in table]
    if rest or not size or any(other != names[0] for other in names):
        raise MeasurementError(
            f"The kernels of {path} differ from inference to inference.", "Remove control flow from the model."
        )
    return table


def _match(events: Sequence[Event], nodes: Any, path: Path) -> list[int]:
    """Position of each event's node in the optimised graph: by name, and by operator and order where nodes are unnamed."""
    waiting: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        waiting.setdefault(node.name or f"operator {node.op_type}", []).append(position)
    matched = []
    for name, operator, _ in events:
        keys = name.removesuffix("_kernel_time"), f"operator {operator}"
        key = next((key for key in keys if waiting.get(key)), None)
        if key is None:
            raise MeasurementError(f"onnxruntime timed a kernel {keys[0]!r} that its graph of {path} does not have.")
        matched.append(waiting[key].pop(0))
    return matched


def _shape(value: Any) -> Shape:
    name, dtype, dims = drivers.ort_shape(value)
    return Shape(name=name, dtype=dtype, dims=tuple(dims))


def _dims(typed: dict[str, list[int]]) -> tuple[int, ...]:
    return tuple(next(iter(typed.values()), ()))


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{kind} in {count}" for kind, count in found.most_common())
