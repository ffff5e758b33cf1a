"""Q/DQ insertion: where a network is cut into integers, by onnxruntime's own quantizer, from ranges observed on images.

    observed = observe(model, inputs)                       # one pass, streaming
    int8 = quantize(model, observed.ranges("mse"), RECIPES["onnxruntime"])

The result is one ONNX file with QuantizeLinear and DequantizeLinear around what is to run in integers. Runtimes differ in what
they fuse, so each has its `Recipe`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.problems import DataProblem
from calibration.ranges import METHODS, RangeMethod, RangeObserver

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that hand 8-bit values on as they are, where they get some.
PASSING = ("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad")


@dataclass(frozen=True)
class Recipe:
    """What one runtime turns into integer kernels.

    `signed` activations are symmetric around zero, else unsigned with a zero point. `joining` operators are quantized too where
    convolutions feed them, so that integers need not become floats on the way. `outputs`: what a weighted operator writes is
    quantized at once; of matrix products it never is, since what follows them (normalization, softmax, gelu) wants floats.
    """

    signed: bool
    quantize_bias: bool
    outputs: bool
    transposed: bool  # whether transposed convolutions have an integer kernel
    joining: tuple[str, ...]


_ONNXRUNTIME = Recipe(
    signed=False,
    quantize_bias=True,
    outputs=True,
    transposed=False,
    joining=("Add", "Concat", "GlobalAveragePool", "AveragePool", *PASSING),
)
RECIPES: Mapping[str, Recipe] = {
    "onnxruntime": _ONNXRUNTIME,
    "openvino": Recipe(signed=False, quantize_bias=False, outputs=False, transposed=True, joining=("Add",)),
    "tensorrt": Recipe(signed=True, quantize_bias=False, outputs=False, transposed=True, joining=()),
    "simulated": _ONNXRUNTIME,  # which has the values of its files
}


@dataclass(frozen=True)
class Observed:
    """What every activation tensor was seen to hold, by its name in the file."""

    observers: Mapping[str, RangeObserver]
    images: int

    def ranges(self, method: RangeMethod, signed: bool = False) -> dict[str, tuple[float, float]]:
        """(low, high) of every tensor by one of `ranges.METHODS`."""
        return {name: seen.range(method, symmetric=signed) for name, seen in self.observers.items()}


def prepared(model: Any) -> Any:
    """A copy with the names and shapes that quantization needs: every node named once, the type of every tensor known.

    Raises:
        DataProblem: onnx cannot infer the shapes of this model.
    """
    from onnxruntime.quantization.quant_utils import add_infer_metadata, save_and_reload_model_with_shape_infer

    try:
        ready = save_and_reload_model_with_shape_infer(copy.deepcopy(model))
    except Exception as error:
        raise DataProblem(f"onnx cannot infer the shapes of this model: {error}.", "Check it with onnx.checker.") from error
    _name_apart(ready.graph)
    if not any(entry.key == "onnx.infer" for entry in ready.metadata_props):
        add_infer_metadata(ready)
    return ready


def _name_apart(graph: Any) -> None:
    """Every node a name of its own; no constant called as onnxruntime's quantizer would call a scale of another tensor."""
    taken = {node.name for node in graph.node if node.name}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
        taken.add(node.name)
        seen.add(node.name)
    tensors = {name for node in graph.node for name in (*node.input, *node.output)}
    clashing = {
        tensor.name: f"{tensor.name}_of_the_file"
        for tensor in graph.initializer
        for end in ("_scale", "_zero_point", "_quantized")
        if tensor.name.endswith(end) and tensor.name.removesuffix(end) in tensors
    }
    for tensor in graph.initializer:
        tensor.name = clashing.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [clashing.get(name, name) for name in node.input]


def layers(model: Any, recipe: Recipe) -> tuple[str, ...]:
    """The nodes of a prepared model that may run in integers, in order: those with weights, and what joins their results."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constant = set(constants)
    integer: set[str] = set()  # tensors that convolutions made, and what joining operators made of them
    found = []
    for node in model.graph.node:
        activations = [name for name in node.input if name and name not in constant]
        if node.op_type in WEIGHTED:
            if not _has_integer_kernel(node, constants, recipe):
                continue
            found.append(node.name)
            if node.op_type in ("Conv", "ConvTranspose"):
                integer.update(node.output)
        elif activations and integer.issuperset(activations) and _joins(node, constants, recipe):
            if node.op_type in recipe.joining:
                found.append(node.name)
            integer.update(node.output)
    return tuple(found)


def activations(model: Any, recipe: Recipe) -> dict[str, Any]:
    """The float tensors that go in and out of the layers of a prepared model, by name."""
    import onnx

    chosen, constant = set(layers(model, recipe)), {tensor.name for tensor in model.graph.initializer}
    floats = {
        value.name: value
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    names = (name for node in model.graph.node if node.name in chosen for name in (*node.input, *node.output))
    return {name: floats[name] for name in names if name in floats and name not in constant}


def _has_integer_kernel(node: Any, constants: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a node with weights can be quantized right; products of activations stay in float."""
    weight = constants.get(node.input[1])
    if weight is None:
        return False
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "MatMul":
        return len(weight.dims) == 2  # of more axes the quantizer takes a wrong one for the channels
    if node.op_type == "Gemm":  # it would drop the factors
        return all(attributes[name].f == 1.0 for name in ("alpha", "beta") if name in attributes)
    if node.op_type == "ConvTranspose":
        return recipe.transposed and ("group" not in attributes or attributes["group"].i == 1)
    return True


def _joins(node: Any, constants: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a node hands integers on. The quantizer drops a Clip for the range of its integers, which always has zero in it."""
    from onnx import numpy_helper

    if node.op_type not in (*recipe.joining, *PASSING):
        return False
    if node.op_type != "Clip":
        return True
    if any(name not in constants for name in node.input[1:] if name):
        return False
    bounds = [constants[name] for name in node.input[1:] if name]
    low, high = [*(float(numpy_helper.to_array(bound)) for bound in bounds), float("inf")][:2] if bounds else (0.0, 0.0)
    return low <= 0 <= high


def observe(model: Any, inputs: Iterable[npt.NDArray[Any]], recipe: Recipe) -> Observed:
    """Run batches [n, C, H, W] through a prepared model and watch what goes in and out of its layers. Memory does not grow with
    their number.

    Raises:
        DataProblem: there were none, or one activation is NaN or infinite.
    """
    import onnx
    import onnxruntime

    wanted = activations(model, recipe)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {value.name for value in model.graph.input}
    present = {value.name for value in model.graph.output}
    watched.graph.output.extend(value for name, value in wanted.items() if name not in present | given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [name for name in wanted if name not in given]
    (entrance,) = (value.name for value in session.get_inputs())
    observers = {name: RangeObserver() for name in wanted}
    seen = 0
    for batch in inputs:
        seen += len(batch)
        if entrance in observers:
            observers[entrance].update(batch)
        found = session.run(names, {entrance: batch}) if names else []  # of no names it would run all
        for name, value in zip(names, found, strict=True):
            observers[name].update(value)
    if not seen:
        raise DataProblem("There are no calibration images.", "Give --data.")
    return Observed(observers, seen)


def quantize(
    model: Any,
    ranges: Mapping[str, tuple[float, float]],
    recipe: Recipe,
    only: Collection[str] | None = None,
    weight_bits: Literal[7, 8] = 8,
) -> Any:
    """A prepared model with Q/DQ around its layers, or around those named `only`; weights int8, per output channel, symmetric.

    `weight_bits` 7: weights from -64 to 64. Where a processor adds two products of eight bits in sixteen (x86 without VNNI), the
    sum of two larger ones saturates.

    Raises:
        DataProblem: onnxruntime's quantizer refuses it; its own words.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    chosen = [name for name in layers(model, recipe) if only is None or name in only]
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    given = copy.deepcopy(model)
    if not chosen:
        return given
    excluded = ["MatMul", "Gemm"] if recipe.outputs else list(dict.fromkeys(node.op_type for node in given.graph.node))
    try:
        quantizer = QDQQuantizer(
            given,
            True,  # per channel
            weight_bits == 7,  # reduced range
            QuantType.QInt8,
            QuantType.QInt8 if recipe.signed else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            chosen,
            [],
            list(dict.fromkeys(node.op_type for node in given.graph.node)),
            {
                "ActivationSymmetric": recipe.signed,
                "WeightSymmetric": True,
                "QuantizeBias": recipe.quantize_bias,
                "OpTypesToExcludeOutputQuantization": excluded,
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        done = quantizer.model.model
    except Exception as error:
        raise DataProblem(
            f"onnxruntime's quantizer refuses this model: {error}.", "Run it again with --precision fp16."
        ) from error
    if recipe.quantize_bias:
        _quantize_added_biases(done)
    return done


def _quantize_added_biases(model: Any) -> None:
    """Biases that stand in an Add behind a matrix product become int32 too, in the product's own scale (input's x weight's).

    onnxruntime joins the two into one Gemm, and runs that in integers only where all three of its operands are.
    """
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made: list[Any] = []
    replaced: list[Any] = []
    for node in graph.node:
        sources = [producers.get(name) for name in node.input]
        if node.op_type != "MatMul" or any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            continue
        (add, *others) = readers.get(node.output[0]) or [None]
        if others or add is None or add.op_type != "Add":
            continue
        place = 1 - list(add.input).index(node.output[0])
        bias = constants.get(add.input[place])
        scales = [numpy_helper.to_array(constants[s.input[1]]) for s in sources if s is not None and s.input[1] in constants]
        if (
            bias is None
            or len(scales) != 2
            or len(bias.dims) != 1
            or scales[0].size != 1
            or scales[1].size not in (1, bias.dims[0])
        ):
            continue
        scale = np.broadcast_to(scales[0].reshape(-1) * scales[1].reshape(-1), bias.dims).astype(np.float32)
        steps = np.round(numpy_helper.to_array(bias).astype(np.float64) / scale)
        if np.abs(steps).max(initial=0) >= 2**31 or not np.isfinite(steps).all():
            continue  # a channel that never varies: its scale is too fine for 32 bits
        name = f"{add.name}_bias"
        graph.initializer.append(numpy_helper.from_array(steps.astype(np.int32), f"{name}_quantized"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        dequantize = onnx.helper.make_node(
            "DequantizeLinear",
            [f"{name}_quantized", f"{name}_scale"],
            [f"{name}_dequantized"],
            f"{name}_DequantizeLinear",
            axis=0,
        )
        add.input[place] = f"{name}_dequantized"
        made.append(dequantize)
        if bias not in replaced:
            replaced.append(bias)
    everything = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(everything)
    used = {name for node in graph.node for name in node.input}
    for bias in replaced:
        if bias.name not in used:
            graph.initializer.remove(bias)


__all__ = ["METHODS", "RECIPES", "Observed", "RangeMethod", "Recipe", "activations", "layers", "observe", "prepared", "quantize"]
