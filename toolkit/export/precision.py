"""From fp32 to what is delivered: fp16 by casting the graph, int8 by Q/DQ, with the layers that cost most left in float."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

import calibration
from calibration.quantize import METHODS, RangeMethod
from toolkit.backends import Opener
from toolkit.backends.base import shorten
from toolkit.errors import DataError, ModelError, UsageError
from toolkit.export.onnx_ import EXTERNAL_BYTES, opset_of, save_onnx, weights_bytes
from toolkit.schema import FloatLayer, Quantization

Array = np.ndarray[Any, Any]
Progress = Callable[[str, float, float], None]
JUDGED_IMAGES = 32  # that one layer's cost is measured on
LEAST_OPSET = 13


@dataclass(frozen=True)
class Quantizing:
    """How a network becomes int8, and the images it is judged on.

    Args:
        recipe: the runtime whose kernels the Q/DQ pairs are laid for; a key of `calibration.RECIPES`.
        images: calibration inputs [M, C, H, W].
        ranges: how activation ranges are taken; `auto` tries all and keeps the one that changes the outputs least.
        max_drop: points of accuracy that may be lost, as the fp32 network itself estimates it (see `expected_drop`); of a network
            whose outputs are no class scores, percent of the outputs' variance.
        keep_float: layers that stay in float whatever they cost.
    """

    recipe: str
    images: Array
    backend: Opener  # judges
    threads: int = 1
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    max_drop: float = 1.0
    keep_float: tuple[str, ...] = ()
    weight_bits: Literal[0, 7, 8] = 0  # 0: whichever changes the outputs less in the judging runtime
    search: bool = True  # for layers to leave in float; else all of them, but for `keep_float`, are quantized


@dataclass(frozen=True)
class Attempt:
    """One choice of ranges, bits and layers, and what it does to the outputs."""

    model: Any
    bits: Literal[7, 8]
    distortion: float
    drop: float
    agreement: float
    kept: tuple[str, ...]


def to_fp16(model: Any) -> Any:
    """Weights and arithmetic in half precision, inputs and outputs still float32, by onnxruntime's own converter.

    Raises:
        ModelError: the converter refuses; its own words.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        made = ONNXModel(convert_float_to_float16(model, keep_io_types=True))
        made.topological_sort()  # its casts stand at the end
        return made.model
    except Exception as error:
        message = f"onnxruntime cannot convert this model to fp16: {shorten(error)}."
        raise ModelError(message, "Run it again with --precision fp32.") from None


def to_int8(model: Any, how: Quantizing, progress: Progress) -> tuple[Any, Quantization]:
    """The network with Q/DQ, judged in its runtime; layers that cost most go back to float until `max_drop` holds.

    Processors differ in whether sums of products of eight bits saturate, so seven bits for the weights are tried too.

    Raises:
        DataError: no images, or activations that are no numbers.
        ModelError: onnxruntime's quantizer refuses; its own words.
    """
    recipe = calibration.RECIPES[how.recipe]
    if opset_of(model) < LEAST_OPSET:
        message = f"Scales by channel need opset {LEAST_OPSET}; this model has {opset_of(model)}."
        raise ModelError(message, "Run it again with --opset 20.")
    try:
        ready = calibration.prepared(model)
        everything = [name for name in calibration.layers(ready, recipe) if name not in how.keep_float]
        if not everything:
            raise ModelError("No layer of this model can run in int8.", "Run it again with --precision fp16.")
        seen = calibration.observe(ready, counted(how.images, "activation ranges", progress), recipe)
        dense = outputs(model, how, how.images, "fp32 outputs", progress)
        ranks = [len(value.type.tensor_type.shape.dim) for value in model.graph.output]
        classes = ranks == [2] and dense.shape[1] > 1
        unknown = [name for name in how.keep_float if name not in calibration.layers(ready, recipe)]
        if unknown:
            names = ", ".join(calibration.layers(ready, recipe))
            raise UsageError(f"--keep-float {unknown[0]} is no layer of this model.", f"Choose of: {names}.")
        tried: dict[RangeMethod, Attempt] = {}

        @cache
        def ranges_by(method: RangeMethod) -> dict[str, tuple[float, float]]:
            return seen.ranges(method, recipe.signed)

        def attempt(method: RangeMethod, kept: Collection[str], bits: Literal[7, 8]) -> Attempt:
            chosen = [name for name in everything if name not in kept]
            made = calibration.quantize(ready, ranges_by(method), recipe, chosen, bits)
            step = f"int8, {len(kept)} layers in float" if kept else f"int8, {method} ranges"
            step += ", weights of 7 bits" if bits == 7 else ""
            found = outputs(made, how, how.images, step, progress)
            lost = distortion(found, dense)
            return Attempt(
                made, bits, lost, expected_drop(found, dense) if classes else 100 * lost, agreement(found, dense), tuple(kept)
            )

        first, *others = METHODS if how.ranges == "auto" else (how.ranges,)
        offered: tuple[Literal[7, 8], ...] = (how.weight_bits,) if how.weight_bits else (8, 7)
        tried[first] = min((attempt(first, (), bits) for bits in offered), key=lambda each: each.distortion)
        for method in others:
            tried[method] = attempt(method, (), tried[first].bits)
        best = min(tried, key=lambda method: tried[method].distortion)
        chosen, costs = tried[best], dict[str, float]()
        if how.search and chosen.drop > how.max_drop:
            costs = layer_costs(ready, ranges_by(best), recipe, everything, chosen.bits, how, progress)
            order, count = sorted(costs, key=lambda name: -costs[name]), 1
            while chosen.drop > how.max_drop and count <= len(order):
                chosen = attempt(best, order[:count], chosen.bits)
                count = len(order) if count < len(order) < 2 * count else 2 * count
    except calibration.DataProblem as problem:
        raise DataError(problem.message, problem.hint) from problem
    if len(chosen.kept) == len(everything):
        message = f"No choice of layers in int8 keeps the expected drop under {how.max_drop:g} points."
        raise ModelError(message, "Run it again with a larger --max-drop, or --precision fp16.")
    weighted = {node.name for node in ready.graph.node if node.op_type in calibration.WEIGHTED}.intersection(everything)
    return chosen.model, Quantization(
        recipe=how.recipe,
        ranges=best,
        images=len(how.images),
        layers=len(weighted.difference(chosen.kept)),
        weight_bits=chosen.bits,
        kept_float=tuple(FloatLayer(layer=name, distortion=costs.get(name, 0.0)) for name in (*how.keep_float, *chosen.kept)),
        distortion=chosen.distortion,
        agreement=chosen.agreement,
        expected_drop=chosen.drop,
        max_drop=how.max_drop,
        judged_by="probabilities" if classes else "variance",
        distortion_by_ranges={str(method): each.distortion for method, each in tried.items()},
    )


class RoughInt8:
    """Networks with Q/DQ whose ranges are those of one random input: as fast as the real ones, and no more right.

    Width variants of one network have the same tensors, so the first one's ranges do for all; whatever has others gets its own.
    """

    def __init__(self, recipe: str, keep_float: Collection[str] = ()) -> None:
        self._recipe, self._keep_float = calibration.RECIPES[recipe], frozenset(keep_float)
        self._ranges: dict[str, tuple[float, float]] = {}

    def __call__(self, model: Any) -> Any:
        try:
            return self._quantized(model)
        except calibration.DataProblem as problem:
            raise ModelError(problem.message, problem.hint) from problem

    def file(self, path: Path, out: Path) -> Path:
        """The network of a file, written to another."""
        import onnx

        save_onnx(self(onnx.load(str(path))), out, {})
        return out

    def _quantized(self, model: Any) -> Any:
        ready = calibration.prepared(model)
        if not self._ranges.keys() >= calibration.activations(ready, self._recipe).keys():
            shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
            inputs = [np.random.default_rng(0).standard_normal(shape, np.float32)]
            self._ranges |= calibration.observe(ready, inputs, self._recipe).ranges("minmax")
        chosen = [name for name in calibration.layers(ready, self._recipe) if name not in self._keep_float]
        return calibration.quantize(ready, self._ranges, self._recipe, chosen)


def layer_costs(
    ready: Any,
    ranges: Mapping[str, tuple[float, float]],
    recipe: calibration.Recipe,
    everything: Collection[str],
    bits: Literal[7, 8],
    how: Quantizing,
    progress: Progress,
) -> dict[str, float]:
    """Distortion of the outputs when one layer alone is quantized, by layer: an intervention on each."""
    images = how.images[:JUDGED_IMAGES]
    dense = outputs(ready, how, images, "", progress)
    costs = {}
    for done, name in enumerate(everything):
        progress("layers one by one", done, len(everything))
        alone = calibration.quantize(ready, ranges, recipe, [name], bits)
        costs[name] = distortion(outputs(alone, how, images, "", progress), dense)
    progress("layers one by one", len(everything), len(everything))
    return costs


def outputs(model: Any, how: Quantizing, images: Array, step: str, progress: Progress) -> Array:
    """All outputs of a model in the judging runtime, flattened: [M, D]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judged.onnx"
        save_onnx(model, path, {entry.key: entry.value for entry in model.metadata_props})
        session = how.backend.open(path, threads=how.threads, precision="int8")
        try:
            name = session.inputs[0].name
            batches = counted(images, step, progress) if step else (images[i : i + 1] for i in range(len(images)))
            return np.stack([np.concatenate([o.reshape(-1) for o in session.run({name: x})]) for x in batches])
        finally:
            session.close()


def counted(images: Array, step: str, progress: Progress) -> Any:
    """Images one at a time, telling how far it is."""
    for index in range(len(images)):
        if index % 16 == 0:
            progress(step, index, len(images))
        yield images[index : index + 1]
    progress(step, len(images), len(images))


def distortion(found: Array, dense: Array) -> float:
    """E|g - f|^2 / E|f - E f|^2 over images, as for widths."""
    mean = dense.mean(0, dtype=np.float64)
    spread = sum(float(np.square(row - mean).sum()) for row in dense)
    return sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(found, dense, strict=True)) / max(spread, 1e-30)


def agreement(found: Array, dense: Array) -> float:
    """Share of images with the same largest output."""
    return float((found.argmax(1) == dense.argmax(1)).mean())


def expected_drop(found: Array, dense: Array) -> float:
    """Points of accuracy lost, by the fp32 network's own probabilities: 100 E[p(its class) - p(the class chosen now)].

    Were those calibrated, this would be the drop itself; it needs no labels, and has far less noise than counting right answers.
    Outputs that are probabilities already (not negative, of sum 1) are taken as they are, others as their logarithms.
    """
    scores = np.exp(dense.astype(np.float64) - dense.max(1, keepdims=True))
    already = bool((dense >= 0).all() and np.allclose(dense.sum(1), 1, atol=1e-3))
    p = dense if already else scores / scores.sum(1, keepdims=True)
    rows = np.arange(len(p))
    return 100 * float((p.max(1) - p[rows, found.argmax(1)]).mean())


def refuse_large(model: Any, precision: str) -> None:
    if (size := weights_bytes(model)) > EXTERNAL_BYTES:
        message = f"This model has {size / 1e9:.1f} GB; protobuf ends at 2 GB, and so do the {precision} converters."
        raise ModelError(message, "Run it again with --precision fp32.")
