"""OpenVINO on the CPU. Reads its own `.xml` and `.onnx`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import drivers
from toolkit.backends import fusion
from toolkit.backends.base import Array, Feeds, KernelSample, random_feeds, require_file, running, shorten
from toolkit.errors import MissingError, UsageError
from toolkit.schema import Format, Shape

name = "openvino"
format: Format = "openvino"

_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8", "f64": "fp64"}
_COMPUTE = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
_STATIC = ("Input", "Const", "Output")


def version() -> str:
    import openvino

    return str(openvino.get_version()).split("-")[0]


def open(path: Path, *, threads: int, precision: str) -> OpenVinoSession:
    """See `Backend.open`. Every setting that changes the time is set, and read back from the compiled model."""
    return OpenVinoSession(path, _compile(path, threads, precision))


class OpenVinoSession:
    """`Session` on OpenVINO's CPU plugin, one stream."""

    def __init__(self, path: Path, compiled: Any) -> None:
        self._path, self._compiled = path, compiled
        self.inputs = tuple(map(_shape, compiled.inputs))
        self.outputs = tuple(map(_shape, compiled.outputs))

    def run(self, feeds: Feeds) -> list[Array]:
        with running("openvino", self._path):
            request = self._compiled.create_infer_request()
            results = request.infer(dict(feeds))
            return [np.array(results[output]) for output in self._compiled.outputs]

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        with running("openvino", self._path):
            call = partial(drivers.openvino_request(self._compiled, dict(feeds)).infer, share_outputs=True)
            call()
        return call

    def executed_precision(self) -> tuple[str, str]:
        return precision_of(drivers.openvino_layers(self._compiled))

    def close(self) -> None:
        self._compiled = None


def convert(onnx_path: Path, ir_path: Path, *, compress_to_fp16: bool) -> None:
    """Write an ONNX file as OpenVINO IR (`.xml` and its `.bin`); weights keep their precision unless asked otherwise."""
    import openvino

    with running("openvino", onnx_path):
        openvino.save_model(openvino.convert_model(onnx_path), ir_path, compress_to_fp16=compress_to_fp16)


def profile(path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
    """See `Backend.profile`: the plugin's own per-node times (whole microseconds), tied to the file by its runtime model."""
    compiled = _compile(path, threads, precision, {"PERF_COUNT": True})
    with running("openvino", path):
        times = drivers.openvino_times(compiled, random_feeds(tuple(map(_shape, compiled.inputs)), 0), runs)
    return kernels_of(path, drivers.openvino_layers(compiled), times)


def precision_of(layers: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """See `Session.executed_precision`: from the layers of the runtime's model."""
    executed = [layer for layer in layers if layer["layerType"] not in _STATIC]
    compute = [layer for layer in executed if layer["layerType"] in _COMPUTE] or executed
    found = Counter(_PRECISIONS.get(layer["runtimePrecision"], layer["runtimePrecision"]) for layer in compute)
    counts = ", ".join(f"{kind} in {count}" for kind, count in found.most_common())
    return "+".join(kind for kind, _ in found.most_common()), f"runtimePrecision of the runtime model: {counts}"


def kernels_of(path: Path, told: Sequence[dict[str, Any]], times: Sequence[Mapping[str, int]]) -> tuple[KernelSample, ...]:
    """What the runtime told of an artefact, tied to its file: the layers, and nanoseconds by layer of each inference."""
    # A kernel below the clock's microsecond is listed as not run; one that never shows is fused away or in place.
    executed = {name for run in times for name, duration in run.items() if duration}
    layers = [layer for layer in told if layer["name"] in executed and layer["layerType"] not in _STATIC]
    named = [_original_names(layer) for layer in layers]
    tensors, nodes = _in_file(path, layers, named) if path.suffix == ".onnx" else ({}, named)
    return tuple(
        KernelSample(
            name=layer["name"],
            op=layer["layerType"],
            nodes=stands_for,
            inputs=tuple(tensors.get(name, name) for name in layer["inputs"]),
            outputs=(tensors.get(layer["name"], layer["name"]),),
            input_shapes=tuple(map(tuple, layer["input_shapes"])),
            output_shapes=tuple(map(tuple, layer["output_shapes"])),
            samples_ns=np.array([run.get(layer["name"], 0) for run in times], np.int64),
            implementation=layer["primitiveType"],
        )
        for layer, stands_for in zip(layers, nodes, strict=True)
    )


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _compile(path: Path, threads: int, precision: str, extra: dict[str, Any] | None = None) -> Any:
    require_file(path)
    if precision not in drivers.OPENVINO_HINTS:
        raise UsageError(f"openvino has no precision {precision!r}.", f"Choose one of: {', '.join(drivers.OPENVINO_HINTS)}.")
    asked = drivers.openvino_settings(threads, precision)
    try:
        compiled = _core().compile_model(_core().read_model(str(path)), "CPU", {**asked, **(extra or {})})
    except Exception as error:
        raise UsageError(f"openvino cannot open {path}: {shorten(error)}.", "Export the file again.") from None
    unlike = drivers.openvino_unlike(compiled, asked)
    if unlike:
        raise MissingError(unlike, f"This machine has {os.cpu_count()} cores; change the profile.")
    return compiled


def _original_names(layer: dict[str, Any]) -> tuple[str, ...]:
    """The names a layer's operations had in the file; a convolution split from its bias counts once."""
    return tuple(dict.fromkeys(name.removesuffix("/WithoutBiases") for name in layer["originalLayersNames"].split(",") if name))


def _in_file(
    path: Path, layers: list[dict[str, Any]], named: list[tuple[str, ...]]
) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """Layer -> the tensor of the `.onnx` file it ends with; and the nodes each layer stands for.

    A layout change stands for none and ends with the tensor it was given.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    outputs: dict[str, tuple[int, str]] = {}
    for position, node in enumerate(graph.node):
        outputs.update({name: (position, node.output[0]) for name in (*node.output, node.name) if name})
    tensors: dict[str, str] = {}
    ends: list[list[str]] = []
    for layer, names in zip(layers, named, strict=True):
        known = [outputs[name] for name in names if name in outputs]
        ends.append([max(known)[1]] if known else [])
        if known:
            tensors[layer["name"]] = max(known)[1]
        elif len(layer["inputs"]) == 1:
            tensors[layer["name"]] = tensors.get(layer["inputs"][0], layer["inputs"][0])
    return tensors, fusion.nodes_behind(graph, ends)


def _shape(port: Any) -> Shape:
    name, dtype, dims = drivers.openvino_shape(port)
    return Shape(name=name, dtype=dtype, dims=tuple(dims))
