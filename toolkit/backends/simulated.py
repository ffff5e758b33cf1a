"""The runtime of the simulated device: it runs an ONNX file's kernels by a known law, and its values by ONNX Runtime.

A convolution or matrix product takes the element-wise nodes after it into its kernel, reshapes cost nothing, and everything
else is a kernel bound by memory. Q/DQ pairs stand for integers: what they enclose moves a byte an entry, and a convolution or
product whose activations and weights are both integers runs at the law's rate for them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit.backends import fusion
from toolkit.backends.base import PROFILE_WARMUP, Array, Feeds, KernelSample, Session, require_file, running, shorten
from toolkit.errors import UsageError
from toolkit.schema import Format, Law, Precision, Shape, Simulation

_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ABSORBED = (
    *("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Gelu", "Elu", "Tanh", "Erf"),
    *("Add", "Mul", "Sub", "Div", "BatchNormalization", "QuantizeLinear"),
)
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "DequantizeLinear")


@dataclass(frozen=True)
class Kernel:
    """What the device runs as one: a node of the file and those it takes in."""

    op: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    cost_ns: float
    integer: bool  # whether it convolves or multiplies integers


class SimulatedBackend:
    """`Backend` by a law. `spend` lets the device do so many nanoseconds of work and returns the time that took."""

    name = "simulated"
    format: Format = "onnx"

    def __init__(self, simulation: Simulation, spend: Callable[[float], float]) -> None:
        self._of, self._spend = simulation, spend

    def version(self) -> str:
        """A digest of the law: what latencies are a property of."""
        return hashlib.sha256(msgspec.json.encode(self._of.law)).hexdigest()[:8]

    def open(self, path: Path, *, threads: int, precision: str) -> SimulatedSession:
        """See `Backend.open`. Loading takes time too: three launches a kernel, and the weights once through memory."""
        graph = self._graph(path, precision)
        kernels = plan(graph, self._of.law)
        sizes = _entry_bytes(graph)
        weights = sum(_bytes(list(tensor.dims), sizes[tensor.name]) for tensor in graph.initializer)
        self._spend(3 * self._of.law.launch_ns * len(kernels) + weights / self._of.law.bytes_per_s * 1e9)
        total = self._of.law.inference_ns + sum(kernel.cost_ns for kernel in kernels)
        return SimulatedSession(path, graph, partial(self._spend, total), any(kernel.integer for kernel in kernels))

    def _graph(self, path: Path, precision: str) -> Any:
        """The file's graph, if the device has the precision that is asked for."""
        if precision not in offered(self._of):
            raise UsageError(f"The simulated device has no precision {precision!r}.", "Run with --precision fp32.")
        return _graph(path)

    def profile(self, path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
        """See `Backend.profile`. Kernels take what the law says, at the speed the device has just then."""
        kernels = plan(self._graph(path, precision), self._of.law)
        times = np.empty((runs, len(kernels)), np.int64)
        for run in range(-PROFILE_WARMUP, runs):
            self._spend(self._of.law.inference_ns)
            for index, kernel in enumerate(kernels):
                spent = self._spend(kernel.cost_ns)
                if run >= 0:
                    times[run, index] = round(spent)
        if self._of.law.opaque:
            whole = Kernel(
                "Network", tuple(name for kernel in kernels for name in kernel.nodes), kernels[0].inputs, kernels[-1].outputs,
                kernels[0].input_shapes, kernels[-1].output_shapes, 0.0, any(kernel.integer for kernel in kernels),
            )  # fmt: skip
            kernels, times = [whole], times.sum(axis=1, keepdims=True)
        return tuple(
            KernelSample(
                name=kernel.nodes[0],
                op=kernel.op,
                nodes=kernel.nodes,
                inputs=kernel.inputs,
                outputs=kernel.outputs,
                input_shapes=kernel.input_shapes,
                output_shapes=kernel.output_shapes,
                samples_ns=times[:, index],
                implementation="law",
            )
            for index, kernel in enumerate(kernels)
        )


class SimulatedSession:
    """`Session` whose inference takes what the law says. Integers are emulated, so that values do not depend on this machine."""

    def __init__(self, path: Path, graph: Any, infer: Callable[[], object], integer: bool) -> None:
        self._path, self._infer, self._integer = path, infer, integer
        weights = {tensor.name for tensor in graph.initializer}
        self.inputs = tuple(_shape(value) for value in graph.input if value.name not in weights)
        self.outputs = tuple(map(_shape, graph.output))
        self._values: Session | None = None

    def run(self, feeds: Feeds) -> list[Array]:
        from toolkit.backends import emulated

        if self._values is None:
            self._values = emulated.open(self._path, threads=1, precision="fp32")
        self._infer()
        return self._values.run(feeds)

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        with running("simulated", self._path):
            for shape in self.inputs:
                if feeds[shape.name].shape != shape.dims:
                    raise ValueError(f"{shape.name} has the shape {shape.dims}, not {feeds[shape.name].shape}")
        return self._infer

    def executed_precision(self) -> tuple[str, str]:
        return "int8" if self._integer else "fp32", "the law of the simulated device"

    def close(self) -> None:
        self._values = None


def offered(simulation: Simulation) -> tuple[Precision, ...]:
    """The precisions that the device has kernels for."""
    return ("fp32", "int8") if simulation.law.int8_rate else ("fp32",)


def plan(graph: Any, law: Law) -> list[Kernel]:
    """The kernels of a graph whose shapes are inferred, in the order executed. Nodes that depend on no input cost nothing."""
    constant = fusion.constants(graph)
    shapes = {value.name: _dims(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes = _entry_bytes(graph)
    integers = {t for node in graph.node if node.op_type == "DequantizeLinear" for t in node.output if sizes[t] == 1}
    readers: dict[str, int] = {}
    for node in graph.node:
        for tensor in node.input:
            readers[tensor] = readers.get(tensor, 0) + 1
    members: list[list[Any]] = []  # nodes by kernel
    owner: dict[str, int] = {}  # tensor -> the kernel that ends with it
    for node in graph.node:
        if constant.issuperset(node.output):
            continue
        made = [owner[tensor] for tensor in node.input if tensor in owner]
        last = max(made, default=-1)
        joins = last >= 0 and readers.get(members[last][-1].output[0]) == 1 and members[last][-1].output[0] in node.input
        if joins and (node.op_type in _VIEWS or (node.op_type in _ABSORBED and members[last][0].op_type in _COMPUTE)):
            members[last].append(node)
        else:
            members.append([node])
            last = len(members) - 1
        owner.update(dict.fromkeys(node.output, last))
    return [_kernel(nodes, shapes, sizes, integers, constant, law) for nodes in members]


def _kernel(
    nodes: list[Any],
    shapes: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
    integers: set[str],
    constant: set[str],
    law: Law,
) -> Kernel:
    inside = {tensor for node in nodes for tensor in node.output}
    reads = [tensor for node in nodes for tensor in node.input if tensor and tensor not in inside]
    inputs = tuple(dict.fromkeys(tensor for tensor in reads if tensor not in constant))
    outputs = tuple(tensor for tensor in nodes[-1].output if tensor)
    moved = sum(_bytes(shapes.get(tensor, ()), sizes.get(tensor, 4)) for tensor in (*dict.fromkeys(reads), *outputs))
    head = nodes[0]
    work_ns = 0.0
    integer = head.op_type in _COMPUTE and law.int8_rate > 0 and integers.issuperset(head.input[:2])
    if head.op_type in _COMPUTE:
        work_ns = _work(head, shapes, law) / (law.macs_per_s * (law.int8_rate if integer else 1.0)) * 1e9
    free = all(node.op_type in _VIEWS for node in nodes)
    return Kernel(
        op=head.op_type,
        nodes=tuple(node.name or str(node.output[0]) for node in nodes),
        inputs=inputs,
        outputs=outputs,
        input_shapes=tuple(shapes.get(tensor, ()) for tensor in inputs),
        output_shapes=tuple(shapes.get(tensor, ()) for tensor in outputs),
        cost_ns=0.0 if free else law.launch_ns + max(work_ns, moved / law.bytes_per_s * 1e9),
        integer=integer,
    )


def _work(node: Any, shapes: dict[str, tuple[int, ...]], law: Law) -> float:
    """Multiply-accumulates the device does for a node, those of padded channels and of idle tiles included."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    output, weight = shapes[node.output[0]], shapes[node.input[1]]
    groups = 1
    if node.op_type in ("Conv", "ConvTranspose"):
        groups = attributes["group"].i if "group" in attributes else 1
        turned = node.op_type == "ConvTranspose"
        c_out, c_in = (weight[1], weight[0] // groups) if turned else (weight[0] // groups, weight[1])
        pixels = output[0] * math.prod(shapes[node.input[0]][2:] if turned else output[2:])
        taps = math.prod(weight[2:])
    else:
        turned = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
        c_in, c_out = (weight[-1], weight[-2]) if turned else (weight[-2], weight[-1])
        pixels, taps = math.prod(output[:-1]), 1
    if groups > 1 and c_in == 1:  # depthwise: channels lie side by side
        c_out, blocks, rate = groups * c_out, 1, law.grouped_rate
        c_in = 1
    else:
        blocks, rate = groups, law.grouped_rate if groups > 1 else 1.0
        c_in = _up(c_in, law.block_in)
    c_out = _up(c_out, law.block_out)
    work = pixels * taps * c_in * c_out * blocks / rate
    if law.tiles:
        count = -(-pixels // law.tile_pixels) * (c_out // law.block_out) * blocks
        work *= _up(count, law.tiles) / count
    return work


def _entry_bytes(graph: Any) -> dict[str, int]:
    """Bytes an entry of every tensor has on the device: what a DequantizeLinear makes stays as it was stored."""
    from onnx import helper

    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    sizes = {name: helper.tensor_dtype_to_np_dtype(kind).itemsize for name, kind in types.items()}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            sizes |= dict.fromkeys(node.output, sizes[node.input[0]])
    return sizes


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _graph(path: Path) -> Any:
    import onnx

    require_file(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except Exception as error:
        raise UsageError(f"The simulated device cannot open {path}: {shorten(error)}.", "Export the file again.") from None
    known = {value.name for value in (*graph.input, *graph.value_info, *graph.output) if min(_dims(value), default=0) >= 0}
    unknown = [node for node in graph.node if not known.issuperset(filter(None, node.output))]
    if unknown or not graph.node:
        why = f"the shape of {unknown[0].output[0]} is not known" if unknown else "it has no nodes"
        raise UsageError(f"The simulated device cannot open {path}: {why}.", "Export the file again, with fixed shapes.")
    return graph


def _shape(value: Any) -> Shape:
    from onnx import helper

    return Shape(name=value.name, dtype=helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name, dims=_dims(value))


def _dims(value: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)


def _bytes(dims: Any, entry: int) -> int:
    return entry * abs(int(math.prod(dims)))
