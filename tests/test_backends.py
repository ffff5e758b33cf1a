"""Runtimes: equal outputs, explicit settings, and kernels that are tied to the nodes of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import residual
from onnx import TensorProto, helper, numpy_helper

from toolkit import backends
from toolkit.backends import Backend, emulated, fusion, random_feeds
from toolkit.errors import MeasurementError, MissingError, UsageError

pytestmark = pytest.mark.slow

RUNTIMES = backends.RUNTIMES


@pytest.fixture(scope="module", params=[(16, 32, 32), (16, 12, 20)], ids=["aligned", "odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual(tmp_path_factory.mktemp("model") / "model.onnx", request.param, size=64)


@pytest.fixture(params=RUNTIMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends.get(request.param)


def test_runtimes_agree(model: Path) -> None:
    outputs = []
    for runtime in RUNTIMES:
        session = backends.get(runtime).open(model, threads=1, precision="fp32")
        assert [shape.name for shape in session.inputs] == ["x"]
        assert session.inputs[0].dims == (1, 3, 64, 64) and session.outputs[0].dims == (1, 10)
        outputs += session.run(random_feeds(session.inputs, 3))
        session.close()
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-4 * np.abs(outputs[0]).max()


def test_prepared_call_can_be_repeated_and_leaves_run_as_it_was(backend: Backend, model: Path) -> None:
    session = backend.open(model, threads=1, precision="fp32")
    feeds = random_feeds(session.inputs, 1)
    before = session.run(feeds)
    call = session.prepare(random_feeds(session.inputs, 2))
    for _ in range(3):
        call()
    assert np.array_equal(session.run(feeds)[0], before[0])


def test_executed_precision_is_read_from_what_runs(backend: Backend, model: Path) -> None:
    precision, source = backend.open(model, threads=1, precision="fp32").executed_precision()
    assert precision == "fp32" and "fp32 in 11" in source


def test_kernels_stand_for_the_nodes_of_the_file(backend: Backend, model: Path) -> None:
    """Every node belongs to exactly one kernel: none is lost in a fusion, none is counted twice."""
    kernels = backend.profile(model, threads=1, precision="fp32", runs=5)
    named = [node for kernel in kernels for node in kernel.nodes]
    nodes = {node.name for node in onnx.load(str(model)).graph.node}
    assert len(named) == len(set(named))
    assert set(named) | {"flatten"} == nodes | {"flatten"}  # a flatten may be nothing but a view
    assert all(len(kernel.samples_ns) == 5 for kernel in kernels)


def test_a_fused_block_is_one_kernel_with_its_own_tensors(backend: Backend, model: Path) -> None:
    kernels = {node: kernel for kernel in backend.profile(model, threads=1, precision="fp32", runs=2) for node in kernel.nodes}
    first = kernels["b1.conv1"]
    assert {"b1.conv1", "b1.relu1"} <= set(first.nodes)
    assert first.inputs[0] == "b0.relu2_out" and first.outputs == ("b1.relu1_out",)
    assert first.input_shapes[0][2:] == (32, 32) and first.output_shapes[0][2:] == (16, 16)


def test_profiled_time_is_of_the_order_of_the_whole(backend: Backend, model: Path) -> None:
    from toolkit.bench.timing import time_burst

    session = backend.open(model, threads=1, precision="fp32")
    whole = np.median(time_burst(session.prepare(random_feeds(session.inputs, 0)), 30))
    parts = sum(np.median(kernel.samples_ns) for kernel in backend.profile(model, threads=1, precision="fp32", runs=30))
    assert 0.1 < parts / whole < 10


def test_openvino_profiles_its_own_format_too(model: Path, tmp_path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(model)), str(tmp_path / "model.xml"), compress_to_fp16=False)
    backend = backends.get("openvino")
    session = backend.open(tmp_path / "model.xml", threads=1, precision="fp32")
    feeds = random_feeds(session.inputs, 0)
    expected = backends.get("onnxruntime").open(model, threads=1, precision="fp32").run(feeds)[0]
    assert np.abs(session.run(feeds)[0] - expected).max() <= 1e-4 * np.abs(expected).max()
    named = {
        node for kernel in backend.profile(tmp_path / "model.xml", threads=1, precision="fp32", runs=2) for node in kernel.nodes
    }
    assert {"b0.conv1", "b0.add", "clip"} <= named


def test_emulated_integers_add_as_an_accelerator_does(tmp_path: Path) -> None:
    """Weights and values as large as eight bits have them, whose sums of products saturate in sixteen bits on some processors."""
    generator = np.random.default_rng(0)
    x = generator.integers(-128, 128, (1, 64, 4, 4)).astype(np.float32)
    weight = generator.choice([-127, 127], (8, 64, 1, 1)).astype(np.int8)
    one, none, coarse = np.float32(1), np.int8(0), np.float32(2048)
    constants = {"w": weight, "one": one, "none": none, "coarse": coarse}
    steps = [
        ("QuantizeLinear", ["x", "one", "none"], "xq"), ("DequantizeLinear", ["xq", "one", "none"], "xd"),
        ("DequantizeLinear", ["w", "one", "none"], "wd"), ("Conv", ["xd", "wd"], "y"),
        ("QuantizeLinear", ["y", "coarse", "none"], "yq"), ("DequantizeLinear", ["yq", "coarse", "none"], "z"),
    ]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, [output], name=output) for operator, inputs, output in steps],
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 8, 4, 4))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = tmp_path / "quantized.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    session = emulated.open(path, threads=1, precision="int8")
    exact = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0].astype(np.int64), x.astype(np.int64))
    expected = 2048 * np.clip(np.rint(exact / 2048), -128, 127)
    assert np.abs(exact).max() > 2**15 and np.array_equal(session.run({"x": x})[0], expected)
    assert session.executed_precision()[0] == "int8, emulated"


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_unreadable_files_are_usage_errors(backend: Backend, model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    if damage != "missing":
        path.write_bytes({"truncated": model.read_bytes()[:5000], "text": b"no network", "empty": b""}[damage])
    for action in (backend.open, lambda path, **how: backend.profile(path, runs=1, **how)):
        with pytest.raises(UsageError, match="model.onnx") as caught:
            action(path, threads=1, precision="fp32")
        assert "\n" not in str(caught.value) and caught.value.hint


def test_wrong_inputs_are_measurement_errors(backend: Backend, model: Path) -> None:
    session = backend.open(model, threads=1, precision="fp32")
    for feeds in ({"x": np.zeros((1, 3, 7, 7), np.float32)}, {"y": np.zeros((1, 3, 64, 64), np.float32)}):
        for action in (session.run, session.prepare):
            with pytest.raises(MeasurementError):
                action(feeds)


def test_openvino_never_substitutes(model: Path) -> None:
    with pytest.raises(MissingError, match="INFERENCE_NUM_THREADS"):
        backends.get("openvino").open(model, threads=10_000, precision="fp32")
    with pytest.raises(UsageError, match="int3"):
        backends.get("openvino").open(model, threads=1, precision="int3")


def test_unknown_runtime() -> None:
    with pytest.raises(UsageError, match="onnxruntime, openvino"):
        backends.get("tensorflow")


def test_missing_runtime_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingError, match="pip install openvino"):
        backends.get("openvino")


def test_nodes_that_depend_on_no_input_belong_to_no_kernel() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["w"], ["negative"], name="folded"),
            helper.make_node("Add", ["x", "negative"], ["sum"], name="add"),
            helper.make_node("Relu", ["sum"], ["y"], name="relu"),
        ],
        "folding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.ones(1, np.float32), "w")],
    )
    assert fusion.nodes_behind(graph, [["y"]]) == [("add", "relu")]
    assert fusion.nodes_behind(graph, [["sum"], ["y"]]) == [("add",), ("relu",)]


def test_feeds_follow_the_seed() -> None:
    shapes = (backends.base.Shape(name="x", dtype="float32", dims=(2, 3)),)
    assert np.array_equal(random_feeds(shapes, 5)["x"], random_feeds(shapes, 5)["x"])
    assert not np.array_equal(random_feeds(shapes, 5)["x"], random_feeds(shapes, 6)["x"])
    with pytest.raises(UsageError, match="fixed"):
        random_feeds((backends.base.Shape(name="x", dtype="float32", dims=(-1, 3)),), 0)


def test_openvinos_own_format_is_refused_by_onnxruntime_with_the_profile_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(UsageError, match="-p local-openvino"):
        backends.get("onnxruntime").open(tmp_path / "model.xml", threads=1, precision="fp32")
