"""Activation ranges and Q/DQ insertion: properties on small networks, in real ONNX Runtime."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import calibration
from calibration import RECIPES, RangeObserver
from calibration.ranges import LEVELS
from toolkit.export import to_onnx
from toolkit.graph import trace

DISTINCT = [name for name in RECIPES if name != "simulated"]  # whose recipe is ONNX Runtime's


class Block(nn.Module):
    """Convolutions with a residual join, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """What a transformer does with a residual stream: normalization, a matrix product with its bias behind it, a join."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 4, stride=4), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x[:, 0])


def exported(model: nn.Module | type[nn.Module]) -> Any:
    """Its ONNX; of a class that of its first instance, which is exported once."""
    if isinstance(model, type):
        return copy.deepcopy(once(model))
    return to_onnx(trace(model.eval(), torch.randn(2, 3, 8, 8)))


@cache
def once(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return exported(kind())


def images(n: int = 16, size: int = 8, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, 3, size, size), np.float32)


def run(model: Any, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {session.get_inputs()[0].name: x[None]})[0] for x in inputs])


def singly(inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return [x[None] for x in inputs]


def quantized(model: Any, recipe: str = "onnxruntime", only: Any = None, bits: Literal[7, 8] = 8) -> Any:
    ready = calibration.prepared(model)
    seen = calibration.observe(ready, singly(images()), RECIPES[recipe])
    return calibration.quantize(ready, seen.ranges("minmax", RECIPES[recipe].signed), RECIPES[recipe], only, bits)


def error_of(values: np.ndarray[Any, Any], low: float, high: float) -> float:
    """Mean squared error of eight bits between the bounds, zero among the levels."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / LEVELS
    if step == 0:
        return float((values**2).mean())
    zero = np.round(-low / step)
    levels = np.clip(np.round(values / step) + zero, 0, LEVELS) - zero
    return float(((values - levels * step) ** 2).mean())


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from(["normal", "heavy", "positive", "one-sided outlier"]))
@settings(max_examples=40, deadline=None)
def test_least_squares_ranges_have_no_more_error_than_the_others(seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(4000)
    values = values**3 if kind == "heavy" else np.abs(values) if kind == "positive" else values
    if kind == "one-sided outlier":
        values[0] = 300.0
    observer = RangeObserver()
    observer.update(values)
    best = error_of(values, *observer.range("mse"))
    for method in ("minmax", "percentile"):
        assert best <= 1.05 * error_of(values, *observer.range(method)) + 1e-12  # the histogram's bins are an eighth of a level


def test_an_outlier_is_clipped_where_that_is_less_error_and_kept_where_it_is_more() -> None:
    few, many = RangeObserver(), RangeObserver()
    values = np.random.default_rng(0).standard_normal(1_000_000)
    few.update(np.append(values, 30.0))
    many.update(np.append(values, np.full(100_000, 30.0)))
    assert few.range("mse")[1] < 15 and many.range("mse")[1] > 28


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_symmetric_ranges_are_symmetric(seed: int) -> None:
    observer = RangeObserver()
    observer.update(np.random.default_rng(seed).standard_normal(500) + 1)
    low, high = observer.range("mse", symmetric=True)
    assert low == -high


@pytest.mark.slow
def test_ranges_do_not_depend_on_how_images_are_batched() -> None:
    ready = calibration.prepared(exported(Block))
    first = calibration.observe(ready, singly(images()), RECIPES["onnxruntime"])
    again = calibration.observe(ready, reversed(singly(images())), RECIPES["onnxruntime"])
    assert first.images == again.images == 16
    for method in ("minmax", "percentile", "mse"):
        assert first.ranges(method) == again.ranges(method)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DISTINCT)
@pytest.mark.parametrize("kind", [Block, Tokens])
def test_a_quantized_network_computes_nearly_what_it_did(kind: type[nn.Module], recipe: str) -> None:
    """In seven bits on every processor; in eight where it has instructions that add products in 32 bits."""
    model = exported(kind)
    dense, found = run(model, images()), run(quantized(model, recipe, bits=7), images())
    distortion = ((found - dense) ** 2).sum() / ((dense - dense.mean(0)) ** 2).sum()
    assert 0 < distortion < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DISTINCT)
def test_two_products_with_weights_of_seven_bits_fit_into_sixteen(recipe: str) -> None:
    largest = {}
    for bits in (7, 8):
        made = quantized(exported(Block), recipe, bits=bits)
        weights = [numpy_helper.to_array(t) for t in made.graph.initializer if t.name.endswith("weight_quantized")]
        largest[bits] = max(int(np.abs(weight.astype(np.int32)).max()) for weight in weights)
    assert largest == {7: 64, 8: 127} and 2 * 255 * largest[7] < 2**15


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DISTINCT)
def test_weights_are_within_half_a_step_of_their_own_channel(recipe: str) -> None:
    model = exported(Block)
    made = quantized(model, recipe)
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    names = [name for name in before if before[name].ndim == 4]
    assert len(names) == 2
    for name in names:
        steps = after[f"{name}_scale"].reshape(-1, 1, 1, 1)
        assert steps.size == len(before[name])  # a scale a channel
        assert (np.abs(after[f"{name}_quantized"] * steps - before[name]) <= steps / 2 * 1.001).all()


def test_only_the_layers_that_are_named_become_integers() -> None:
    ready = calibration.prepared(exported(Block))
    names = calibration.layers(ready, RECIPES["openvino"])
    made = quantized(exported(Block), "openvino", [names[0]])
    weights = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims]
    assert len([t for t in weights if len(t.dims) > 1]) == 1
    assert quantized(exported(Block), "openvino", []).graph.node == ready.graph.node


@pytest.mark.slow
def test_joins_of_convolutions_are_layers_and_joins_of_tokens_are_not() -> None:
    def kinds(model: type[nn.Module]) -> Counter[str]:
        ready = calibration.prepared(exported(model))
        chosen = calibration.layers(ready, RECIPES["onnxruntime"])
        return Counter(node.op_type for node in ready.graph.node if node.name in chosen)

    assert kinds(Block)["Add"] == 1
    assert kinds(Tokens)["Add"] == 0 and kinds(Tokens)["Conv"] == 1


@pytest.mark.slow
def test_integers_are_what_runs(tmp_path: Any) -> None:
    """Every layer with weights of both kinds of network is an integer kernel in ONNX Runtime, the biases behind products too."""
    for kind in (Block, Tokens):
        made = quantized(exported(kind))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kernels = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        integer = sum(kernels[op] for op in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"))
        assert integer == len([n for n in made.graph.node if n.op_type in calibration.WEIGHTED]), kernels
        assert not kernels["Conv"] + kernels["Gemm"]


@pytest.mark.slow
def test_an_activation_that_never_varies_is_no_fault() -> None:
    model = Block()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    dense, found = (run(m, images()) for m in (exported(model), quantized(exported(model))))
    assert np.isfinite(found).all() and np.abs(found - dense).max() < 0.05


def test_no_images_and_activations_that_are_no_numbers_are_problems() -> None:
    ready = calibration.prepared(exported(Block))
    with pytest.raises(calibration.DataProblem, match="no calibration images"):
        calibration.observe(ready, [], RECIPES["onnxruntime"])
    with pytest.raises(calibration.DataProblem, match="NaN or infinite"):
        calibration.observe(ready, [np.full((1, 3, 8, 8), np.inf, np.float32)], RECIPES["onnxruntime"])


def made_of(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...], opset: int = 20) -> Any:
    """A network from x to y of these nodes."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    )


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def odd_networks() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """What onnxruntime's quantizer gets wrong: factors of a Gemm, a Clip without zero, axes of a weight, names like its own."""
    g = np.random.default_rng(0)
    conv, three, wide = g.standard_normal((4, 3, 3, 3)), g.standard_normal((2, 6, 6)), g.standard_normal((8, 5))
    up = g.standard_normal((4, 2, 2, 2))
    pads = {"pads": [1, 1, 1, 1]}
    return {
        "gemm with factors": (
            made_of([node("Gemm", "x w b", "y", alpha=2.0, beta=0.1)], {"w": wide, "b": 50 * g.standard_normal(5)}, (1, 8)),
            (1, 8),
        ),
        "clip without zero": (
            made_of(
                [node("Conv", "x w", "c", **pads), node("Clip", "c low high", "y")],
                {"w": conv, "low": 1, "high": 2},
                (1, 3, 6, 6),
            ),
            (1, 3, 6, 6),
        ),
        "weight of three axes": (made_of([node("MatMul", "x w", "y")], {"w": three}, (2, 4, 6)), (2, 4, 6)),
        "grouped transposed convolution": (
            made_of([node("ConvTranspose", "x w b", "y", group=2)], {"w": up, "b": g.standard_normal(4)}, (1, 4, 5, 5)),
            (1, 4, 5, 5),
        ),
        "a constant called as a scale": (
            made_of(
                [node("Conv", "x w", "c1", **pads), node("Mul", "c1 c1_scale", "m"), node("Conv", "m v", "y", **pads)],
                {"w": conv, "v": g.standard_normal((2, 4, 3, 3)), "c1_scale": 3.0 * np.ones((1, 4, 1, 1))},
                (1, 3, 6, 6),
            ),
            (1, 3, 6, 6),
        ),
    }


@pytest.mark.parametrize("recipe", DISTINCT)
@pytest.mark.parametrize("name", odd_networks())
def test_what_the_quantizer_gets_wrong_stays_in_float(name: str, recipe: str) -> None:
    model, shape = odd_networks()[name]
    inputs = np.random.default_rng(1).standard_normal((12, *shape), np.float32)
    ready = calibration.prepared(model)
    seen = calibration.observe(ready, list(inputs), RECIPES[recipe])
    made = calibration.quantize(ready, seen.ranges("minmax", RECIPES[recipe].signed), RECIPES[recipe])

    def outputs(of: Any) -> Any:
        session = onnxruntime.InferenceSession(of.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.stack([session.run(None, {"x": x})[0] for x in inputs])

    dense, found = outputs(model), outputs(made)
    assert ((found - dense) ** 2).sum() <= 0.01 * ((dense - dense.mean(0)) ** 2).sum()


def test_every_node_gets_a_name_of_its_own() -> None:
    same = [
        node("Relu", "x", "a"),
        node("Relu", "a", "b", name="Relu_2"),
        node("Relu", "b", "c"),
        node("Relu", "c", "y", name="Relu_2"),
    ]
    names = [each.name for each in calibration.prepared(made_of(same, {}, (1, 3))).graph.node]
    assert len(set(names)) == len(names) and all(names)
