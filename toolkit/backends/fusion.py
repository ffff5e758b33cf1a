"""Which nodes of an ONNX file each kernel of the runtime's optimised graph stands for.

Optimising renames tensors: a convolution moved to the blocked (NCHWc) layout writes `reorder_token_7` and is itself called
after the tensor it first wrote. So the outputs of every kernel are identified with tensors of the file first, from the
names that survive; then a kernel stands for the nodes between the tensors it ends with and those other kernels end with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_REORDERS = ("ReorderInput", "ReorderOutput")
_BLOCKED_NAME = re.compile(r"(?P<tensor>.+)_nchwc(_token_\d+)?$")
_MOVED_NAME = re.compile(r"_token_\d+$")  # of a node that was moved to another layout: its output is called after the node
_WEIGHT_INPUT = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1,
    "ConvInteger": 1, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1,
    "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_DTYPES = {1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 11: "fp64", 16: "bf16"}  # onnx.TensorProto.DataType


@dataclass(frozen=True)
class Fused:
    """One kernel: the nodes of the file it stands for; its activations by the file's names where known, and by the runtime's."""

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runtime_inputs: tuple[str, ...]
    runtime_outputs: tuple[str, ...]


def trace_back(original: Any, optimised: Any) -> list[Fused]:
    """What each node of the graph `optimised` stands for in the graph `original`, in the order of `optimised.node`."""
    aliases = _aliases(original, optimised)
    static = {tensor.name for tensor in optimised.initializer}
    ends = [[aliases[t] for t in node.output if t in aliases and node.op_type not in _REORDERS] for node in optimised.node]
    result = []
    for node, nodes in zip(optimised.node, nodes_behind(original, ends), strict=True):
        runtime_inputs = tuple(tensor for tensor in node.input if tensor and tensor not in static)
        runtime_outputs = tuple(tensor for tensor in node.output if tensor)
        result.append(
            Fused(
                nodes=nodes,
                inputs=tuple(aliases.get(tensor, tensor) for tensor in runtime_inputs),
                outputs=tuple(aliases.get(tensor, tensor) for tensor in runtime_outputs),
                runtime_inputs=runtime_inputs,
                runtime_outputs=runtime_outputs,
            )
        )
    return result


def nodes_behind(original: Any, ends: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Per kernel, in the order executed, the nodes between the tensors it ends with and those other kernels end with.

    Nodes that depend on no input belong to no kernel: they ran once, at load. No node is given to two kernels.
    """
    producers = {tensor: node for node in original.node for tensor in node.output if tensor}
    order = {id(node): position for position, node in enumerate(original.node)}
    constant, boundary = constants(original), {tensor for tensors in ends for tensor in tensors}
    claimed: set[int] = set()
    result = []
    for own in ends:
        found: list[Any] = []
        stack = list(own)
        while stack:
            node = producers.get(stack.pop())
            if node is None or id(node) in claimed or constant.issuperset(node.output):
                continue
            claimed.add(id(node))
            found.append(node)
            stack += [tensor for tensor in node.input if tensor not in boundary]
        result.append(tuple(node.name or str(node.output[0]) for node in sorted(found, key=lambda node: order[id(node)])))
    return result


def weight_dtypes(optimised: Any) -> Counter[str]:
    """In how many convolutions and matrix products of a graph the constant weight has which precision."""
    stored = {tensor.name: _DTYPES.get(tensor.data_type, str(tensor.data_type)) for tensor in optimised.initializer}
    weights = [node.input[_WEIGHT_INPUT[node.op_type]] for node in optimised.node if node.op_type in _WEIGHT_INPUT]
    return Counter(stored[weight] for weight in weights if weight in stored)


def _aliases(original: Any, optimised: Any) -> dict[str, str]:
    """Tensors of the optimised graph -> tensors of the file."""
    producers = {tensor: node for node in original.node for tensor in node.output if tensor}
    readers: dict[str, list[Any]] = {}
    for node in original.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    by_name = {node.name: node for node in original.node if node.name}
    known = set(producers) | {value.name for value in original.input}
    aliases = {tensor: tensor for node in optimised.node for tensor in (*node.input, *node.output) if tensor in known}
    reorders = [node for node in optimised.node if node.op_type in _REORDERS]
    for node in reorders:
        if node.output[0] in known:
            aliases[node.input[0]] = node.output[0]
    for node in optimised.node:
        blocked = _BLOCKED_NAME.match(node.name)
        if blocked and blocked["tensor"] in producers:
            aliases.setdefault(node.output[0], _after_fusion(blocked["tensor"], node, producers, readers))
        elif (same := by_name.get(node.name)) is not None and same.op_type == node.op_type:
            for mine, its in zip(node.output, same.output, strict=False):
                aliases.setdefault(mine, its)
        elif node.op_type.startswith("Q") and (was := by_name.get(_MOVED_NAME.sub("", node.name))) is not None:
            for mine, its in zip(node.output, was.output, strict=False):
                aliases.setdefault(mine, _quantized(its, readers))
    for node in reorders:
        if node.input[0] in aliases:
            aliases.setdefault(node.output[0], aliases[node.input[0]])
    return aliases


def _quantized(tensor: str, readers: dict[str, list[Any]]) -> str:
    """The tensor in integers, where the file turns it into some."""
    made = (str(node.output[0]) for node in readers.get(tensor, ()) if node.op_type == "QuantizeLinear")
    return next(made, tensor)


def _after_fusion(tensor: str, kernel: Any, producers: dict[str, Any], readers: dict[str, list[Any]]) -> str:
    """The tensor a blocked convolution ends with, when it first wrote `tensor` and then took in an addition and an activation."""

    def follow(current: str, operators: tuple[str, ...]) -> str:
        (reader, *others) = readers.get(current) or [None]
        return str(reader.output[0]) if reader is not None and not others and reader.op_type in operators else current

    if len(kernel.input) > 3 and kernel.input[3]:
        tensor = follow(tensor, ("Add", "Sum"))
    for attribute in kernel.attribute:
        activation = attribute.s.decode() if attribute.name == "activation" else ""
        if activation and producers[tensor].op_type != activation:
            tensor = follow(tensor, (activation,))
    return tensor


def constants(graph: Any) -> set[str]:
    """Tensors that depend on no input; what makes them runs once, at load."""
    constant = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    for node in graph.node:
        if all(tensor in constant for tensor in node.input if tensor):
            constant.update(node.output)
    return constant
