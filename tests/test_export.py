"""Exporters: what is written is what was asked, and computes what the original computes, or it is refused and nothing is left."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_quantize import Block, Tokens, exported, images, run
from torch import nn

from toolkit import backends, profiles
from toolkit.backends import emulated, tensorrt_, trtexec
from toolkit.errors import EdgekitError, MeasurementError, MissingError, ModelError, ParityError, UsageError
from toolkit.export import (
    DYNAMIC,
    Quantizing,
    Wanted,
    artefact,
    export_artefacts,
    from_file,
    from_program,
    onnx_,
    save_program,
    to_onnx,
)
from toolkit.export.precision import distortion, expected_drop, to_int8
from toolkit.graph import trace
from toolkit.run.export import export, quantizing_for
from toolkit.schema import ExportRequest, Preprocess

ORT = backends.get("onnxruntime")


def program(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return trace((model or Block()).eval(), torch.randn(2, 3, 8, 8))


def quiet(step: str, done: float, total: float) -> None:
    pass


def how(inputs: Any, **more: Any) -> Quantizing:
    return Quantizing(recipe="onnxruntime", images=inputs, backend=ORT, **more)


# --- ONNX ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_opset_asked_for_is_the_one_written(opset: int) -> None:
    model = to_onnx(program(), opset=opset)
    assert onnx_.opset_of(model) == opset
    onnx.checker.check_model(model)


@pytest.mark.slow
def test_nodes_are_called_by_their_modules_and_nothing_says_where_the_file_was_made(tmp_path: Path) -> None:
    class Fire(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.squeeze, self.norm = nn.Conv2d(wide, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.one, self.three = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.squeeze(x))
            return torch.cat([self.one(x), self.three(x)], 1)

    made = program(nn.Sequential(Fire(3), nn.ReLU(), nn.Sequential(Fire(16))))
    model = to_onnx(made)
    inside = (".squeeze/Conv", ".one/Conv", ".three/Conv", "/Concat")
    assert [node.name for node in model.graph.node] == [
        *(f"0{name}" for name in inside),
        "1/Relu",
        *(f"2.0{name}" for name in inside),
    ]
    assert not any(words in model.SerializeToString() for words in (b".py", b"stack_trace", b"aten"))
    save_program(made, tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        assert not any(words in archive.read(name) for name in archive.namelist() for words in (b".py", b"stack_trace"))


@pytest.mark.slow
def test_an_opset_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ModelError, match="opset"):
        to_onnx(program(), opset=9)


@pytest.mark.slow
def test_an_open_batch_runs_any_number_of_images() -> None:
    source = from_program(program(), batch=DYNAMIC)
    session = onnxruntime.InferenceSession(source.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    for n in (1, 3, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(n)})
        np.testing.assert_allclose(found, source.outputs(images(n))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_open_batch_stays_open_in_eight_bits(tmp_path: Path, folder_of_images: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()\n"
    )
    asked = ExportRequest(
        model=f"{tmp_path / 'net.py'}:model", out=str(tmp_path / "out"), precision="int8", data=str(folder_of_images),
        max_drop=50.0,
        preprocess=Preprocess(input=(1, 3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3), dynamic_batch=True,
    )  # fmt: skip
    export(asked, quiet)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    whole = session.run(None, {session.get_inputs()[0].name: images(3)})[0]
    each = [session.run(None, {session.get_inputs()[0].name: x[None]})[0] for x in images(3)]
    np.testing.assert_array_equal(whole, np.concatenate(each))


def saved(model: Any, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


@pytest.mark.slow
def test_a_file_computes_what_it_did(tmp_path: Path) -> None:
    model = exported(Tokens)
    source = from_file(saved(model, tmp_path / "net.onnx"))
    np.testing.assert_allclose(run(source.model, images()), run(model, images()), rtol=1e-4, atol=1e-5)
    assert source.shape == (1, 3, 8, 8) and source.opset == onnx_.opset_of(model)


@pytest.mark.slow
def test_a_file_is_converted_to_the_opset_asked_for_or_refused(tmp_path: Path) -> None:
    path = saved(exported(Block), tmp_path / "net.onnx")
    newer = from_file(path, opset=21)
    assert newer.opset == 21
    np.testing.assert_allclose(run(newer.model, images()), run(onnx.load(str(path)), images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="cannot be converted to 7"):
        from_file(saved(exported(Tokens), tmp_path / "tokens.onnx"), opset=7)


def with_input(model: Any, *dims: int | str) -> Any:
    shape = model.graph.input[0].type.tensor_type.shape
    for dim, value in zip(shape.dim, dims, strict=True):
        dim.Clear()
        setattr(dim, "dim_value" if isinstance(value, int) else "dim_param", value)
    return model


@pytest.mark.slow
def test_open_shapes_are_closed_by_the_request(tmp_path: Path) -> None:
    open_batch = to_onnx(program(), DYNAMIC)
    assert from_file(saved(open_batch, tmp_path / "batch.onnx")).shape == (1, 3, 8, 8)
    path = saved(with_input(open_batch, "n", 3, "h", "w"), tmp_path / "open.onnx")
    with pytest.raises(ModelError, match=r"open shape nx3xhxw.*--input 1x3x224x224"):
        from_file(path)
    assert from_file(path, (1, 3, 8, 8)).shape == (1, 3, 8, 8)
    with pytest.raises(ModelError, match="contradicts"):
        from_file(path, (1, 4, 8, 8))


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that cannot be used, by the words of the refusal."""
    whole = saved(exported(Block), folder / "whole.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("no network")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy")
    custom = helper.make_graph([helper.make_node("Warp", ["x"], ["y"], domain="acme")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    saved(helper.make_model(custom, opset_imports=opsets), folder / "custom.onnx")
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3, 8, 8])
    two = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "g", [x, y], [z])
    saved(helper.make_model(two, opset_imports=opsets[:1]), folder / "two.onnx")
    return {
        "no ONNX file that can be used": folder / "truncated.onnx",
        "no ONNX file": folder / "text.onnx",
        "acme::Warp": folder / "custom.onnx",
        r"2 inputs \(x, y\)": folder / "two.onnx",
        "does not exist": folder / "nowhere.onnx",
    }


@pytest.mark.slow
def test_files_that_cannot_be_used_are_named_and_leave_nothing(tmp_path: Path) -> None:
    for words, path in broken_files(tmp_path).items():
        with pytest.raises(ModelError, match=words):
            export(ExportRequest(model=str(path), out=str(tmp_path / "out")), quiet)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_large_model_keeps_its_weights_beside_it_and_is_not_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of protobuf, lowered: everything above it is one path."""
    for module in (onnx_, sys.modules["toolkit.export.precision"]):
        monkeypatch.setattr(module, "EXTERNAL_BYTES", 1000)
    source = from_program(program())
    (made,) = export_artefacts(source, tmp_path, "big", "dense", Wanted(backend=ORT), {"random": images(1)})
    assert made.companions and (tmp_path / made.companions[0][0]).stat().st_size > 1000
    again = from_file(tmp_path / "big.onnx")
    np.testing.assert_allclose(again.outputs(images(1))[0], source.outputs(images(1))[0], rtol=1e-4, atol=1e-5)
    for precision in ("fp16", "int8"):
        wanted = Wanted(backend=ORT, precision=precision, quantizing=how(images()))  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="protobuf ends at 2 GB"):
            export_artefacts(source, tmp_path / precision, "big", "dense", wanted, {"random": images(1)})
        assert not (tmp_path / precision).exists()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = artefact.to_fp16

    def wrong(model: Any) -> Any:
        found = honest(model)
        weight = next(t for t in found.graph.initializer if len(t.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        return found

    monkeypatch.setattr(artefact, "to_fp16", wrong)
    path = saved(exported(Block), tmp_path / "net.onnx")
    with pytest.raises(ParityError, match="does not compute what the model computes"):
        export(ExportRequest(model=str(path), out=str(tmp_path / "out"), precision="fp16"), quiet)
    assert not any((tmp_path / "out").iterdir())


# --- precision -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["local-onnxruntime", "local-openvino"])
def test_fp16_files_hold_half_and_say_what_runs_here(profile: str, tmp_path: Path) -> None:
    path = saved(exported(Block), tmp_path / "net.onnx")
    made = export(ExportRequest(model=str(path), out=str(tmp_path / "out"), profile=profile, precision="fp16"), quiet)
    kinds = {t.data_type for t in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.initializer if len(t.dims) == 4}
    assert kinds == {TensorProto.FLOAT16}
    last = made.artefacts[-1]
    assert last.inputs[0].dtype == "float32" and last.precision == "fp16"
    assert last.executed_precision == "fp16" or any("ran it in fp32" in note for note in made.notes)
    assert {p.step for p in made.artefacts[0].parity} == {"fp32 master", "model.onnx"}


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(3)
    np.savez(tmp_path / "images.npz", images=generator.integers(0, 256, (24, 8, 8, 3), np.uint8))
    return tmp_path / "images.npz"


@pytest.mark.timed
@pytest.mark.parametrize("profile", ["local-onnxruntime", "local-openvino"])
def test_int8_runs_as_int8_and_is_timed_beside_fp32(profile: str, tmp_path: Path, folder_of_images: Path, tool: Any) -> None:
    path = saved(exported(Block), tmp_path / "net.onnx")
    request = ExportRequest(
        model=str(path), out=str(tmp_path / "out"), profile=profile, precision="int8", data=str(folder_of_images), max_drop=50.0,
        preprocess=Preprocess(input=(1, 3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3),
    )  # fmt: skip
    made = export(request, quiet)
    last, record = made.artefacts[-1], made.artefacts[0].quantization
    assert last.executed_precision == "int8" and record is not None and record.layers == 3 and not record.kept_float
    assert tool.integer_layers(profile.removeprefix("local-"), tmp_path / "out" / last.path) == 3  # as tools/verify counts them
    assert set(record.distortion_by_ranges) == {"minmax", "percentile", "mse"}
    assert record.distortion == min(record.distortion_by_ranges.values())
    assert len(made.ratios) == 1 and made.fp32_ns > 0
    read = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert "edgekit.quantization" in {entry.key for entry in read.metadata_props}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*(a.path for a in made.artefacts), *(c for a in made.artefacts for c, _ in a.companions), "export.json"]
    )


@pytest.mark.slow
def test_weights_have_the_bits_that_change_the_outputs_less() -> None:
    model, inputs = exported(Block), images(16)
    found = {bits: to_int8(model, how(inputs, ranges="minmax", weight_bits=bits), quiet)[1] for bits in (0, 7, 8)}
    assert (found[7].weight_bits, found[8].weight_bits) == (7, 8)
    assert found[0] == min(found[7], found[8], key=lambda record: record.distortion)


class Fragile(nn.Module):
    """One layer whose input has a channel that is a thousand times the others, and matters little: eight bits lose the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 64, 5)
        with torch.no_grad():
            self.first.weight[0] *= 1000
            self.second.weight[:, 0] /= 1e5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * self.head(self.second(self.first(x).relu()).relu().flatten(1))


@pytest.mark.slow
def test_layers_that_cost_most_go_back_to_float_until_the_drop_is_small_enough() -> None:
    model, inputs = exported(Fragile), images(64)
    free, whole = to_int8(model, how(inputs, max_drop=100.0), quiet)
    made, record = to_int8(model, how(inputs, max_drop=1.0), quiet)
    assert whole.expected_drop > 1.0 >= record.expected_drop and not whole.kept_float
    assert record.kept_float and record.layers < whole.layers
    assert record.kept_float[0].distortion == max(layer.distortion for layer in record.kept_float)
    dense = run(model, inputs)
    assert distortion(run(made, inputs), dense) < distortion(run(free, inputs), dense)
    assert record.agreement >= whole.agreement
    kept = tuple(layer.layer for layer in record.kept_float)
    again, same = to_int8(
        model, how(inputs, search=False, ranges=record.ranges, weight_bits=record.weight_bits, keep_float=kept), quiet
    )
    assert {f.layer for f in same.kept_float} == {f.layer for f in record.kept_float} and same.layers == record.layers
    np.testing.assert_array_equal(run(again, inputs), run(made, inputs))


def test_the_expected_drop_is_the_probability_given_away() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    same, other = np.log(p), np.array([[1.0, 0, 0], [0, 1.0, 0]])
    assert expected_drop(same, np.log(p)) == 0
    assert expected_drop(other, np.log(p)) == pytest.approx(100 * (0.5 - 0.4) / 2)


def test_probabilities_are_taken_as_they_are_and_scores_as_their_logarithms() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(50, 0.05), 200)
    shuffled = p[:, np.random.default_rng(1).permutation(50)]
    assert expected_drop(shuffled, p) == pytest.approx(expected_drop(np.log(shuffled + 1e-30), np.log(p + 1e-30)), rel=1e-6)
    assert expected_drop(shuffled, p) > 30


@pytest.mark.slow
def test_a_drop_that_only_float_keeps_is_an_answer_and_not_a_file() -> None:
    with pytest.raises(ModelError, match="No choice of layers in int8"):
        to_int8(exported(Fragile), how(images(64), max_drop=-1.0), quiet)


def test_an_old_opset_is_refused_with_the_way_out() -> None:
    model = exported(Block)
    model.opset_import[0].version = 12
    with pytest.raises(ModelError, match=r"opset 13.*has 12.*--opset 20"):
        to_int8(model, how(images()), quiet)


@pytest.mark.slow
def test_other_results_are_not_overwritten(tmp_path: Path) -> None:
    path = saved(exported(Block), tmp_path / "model.onnx")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="where .* itself lies"):
        export(ExportRequest(model=str(path), out=str(tmp_path)), quiet)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="finished run"):
        export(ExportRequest(model=str(path), out=str(tmp_path / "run")), quiet)
    assert path.read_bytes() == before
    made = ExportRequest(model=str(path), out=str(tmp_path / "out"), profile="local-openvino")
    export(made, quiet)
    export(ExportRequest(model=str(path), out=str(tmp_path / "out")), quiet)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx"]


def test_requests_that_contradict_themselves_are_refused(tmp_path: Path, folder_of_images: Path) -> None:
    path = saved(exported(Block), tmp_path / "net.onnx")
    plain = Preprocess(input=(1, 3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    asked = ExportRequest(model=str(path), out=str(tmp_path / "out"), preprocess=plain)
    for changes, words in (
        ({"precision": "int8"}, "--data"),
        ({"precision": "int8", "data": str(folder_of_images), "samples": 4}, "too few"),
        ({"dynamic_batch": True}, "--dynamic-batch is for models"),
        ({"dynamic_batch": True, "profile": "tensorrt-rtx"}, "fixed shapes"),
        ({"compute_capability": "8.6"}, "--compute-capability is of TensorRT"),
        ({"precision": "fp16", "profile": "simulated-cpu"}, "simulated-cpu has fp32 and int8, not fp16"),
        ({"weights": "w.safetensors"}, "has its weights in it"),
        ({"precision": "int8", "data": str(folder_of_images), "preprocess": None}, "how its images are normalized"),
        ({"precision": "int8", "data": str(folder_of_images), "keep_float": ("conv9",)}, "conv9 is no layer.*Choose of"),
    ):
        fields = {name: getattr(asked, name) for name in asked.__struct_fields__}
        with pytest.raises(EdgekitError, match=words):
            export(ExportRequest(**(fields | changes)), quiet)  # type: ignore[arg-type]


# --- TensorRT ----------------------------------------------------------------------------------------------------------------


def rtx() -> None:
    """Skip where TensorRT-RTX has no wheel."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


def zoo(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        import timm

        return timm.create_model("vit_tiny_patch16_224").eval()  # type: ignore[no-any-return]
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit"])
def test_engines_are_built_in_every_precision(name: str, tmp_path: Path) -> None:
    rtx()
    torch.manual_seed(0)
    traced = trace(zoo(name), torch.randn(2, 3, 224, 224))
    source, inputs = from_program(traced), np.random.default_rng(0).standard_normal((8, 3, 224, 224), np.float32)
    backend, sizes = backends.get("tensorrt_rtx"), {}
    for precision in ("fp32", "fp16", "int8"):
        wanted = Wanted(
            backend=backend, formats=("onnx", "tensorrt"), precision=precision, compute_capability="8.6",
            quantizing=replace(how(inputs, ranges="minmax", search=False), recipe="tensorrt"),
        )  # type: ignore[arg-type]  # fmt: skip
        engine = export_artefacts(source, tmp_path, precision, "dense", wanted, {"random": inputs[:1]})[-1]
        assert engine.format == "tensorrt" and engine.executed_precision == "not executed"
        assert (tmp_path / engine.path).stat().st_size == engine.size_bytes
        sizes[precision] = engine.size_bytes
    weights = sum(p.numel() for p in zoo(name).parameters())
    assert 4 * weights <= sizes["fp32"] and sizes["fp16"] < sizes["fp32"]
    if name == "resnet18":  # of the others the engine's own code is the larger part
        assert sizes["int8"] < sizes["fp16"] < 4 * weights


@pytest.mark.slow
def test_what_cannot_run_here_is_judged_without_this_processors_kernels(tmp_path: Path, folder_of_images: Path) -> None:
    rtx()
    request = ExportRequest(
        model=str(saved(exported(Block), tmp_path / "net.onnx")), out=str(tmp_path / "out"), profile="tensorrt-rtx",
        precision="int8", compute_capability="8.6", data=str(folder_of_images), max_drop=50.0,
        preprocess=Preprocess(input=(1, 3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3),
    )  # fmt: skip
    checked = export(request, quiet).artefacts[0]
    assert checked.quantization is not None and checked.quantization.weight_bits == 8
    assert checked.executed_precision_read_from.startswith("Q/DQ emulated in floats")
    judged = quantizing_for(profiles.load("tensorrt-rtx"), backends.get("tensorrt_rtx"), images())
    assert judged.backend is emulated and judged.weight_bits == 8


def test_weights_of_seven_bits_are_for_kernels_that_saturate() -> None:
    """A simulated device emulates integers, so there is nothing to try; a real runtime decides by what its kernels do."""
    for profile, bits in (("simulated-npu", 8), ("local-onnxruntime", 0)):
        found = quantizing_for(profiles.load(profile), backends.get("onnxruntime"), images())
        assert found.weight_bits == bits


@pytest.mark.slow
def test_an_engine_is_for_the_compute_capability_asked_for(tmp_path: Path) -> None:
    rtx()
    path, built = saved(exported(Block), tmp_path / "net.onnx"), []
    for capability in ("8.6", "8.6", "8.9"):
        tensorrt_.build("tensorrt_rtx", path, tmp_path / "net.engine", compute_capability=capability)
        built.append((tmp_path / "net.engine").read_bytes())
    assert built[0] == built[1] != built[2]


@pytest.mark.slow
def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    rtx()
    path = saved(exported(Block), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match=r"compute capability 3.5.*8\.6"):
        tensorrt_.build("tensorrt_rtx", path, tmp_path / "net.engine", compute_capability="3.5")
    unsigned, _ = to_int8(exported(Block), replace(how(images()), recipe="openvino"), quiet)
    with pytest.raises(ModelError, match="(?i)zero.?point"):
        tensorrt_.build("tensorrt_rtx", saved(unsigned, tmp_path / "q.onnx"), tmp_path / "q.engine", compute_capability="8.6")
    assert not list(tmp_path.glob("*.engine")) and not list(tmp_path.glob(".*"))
    engine = tmp_path / "net.engine"
    tensorrt_.build("tensorrt_rtx", path, engine, compute_capability="8.6")
    with pytest.raises(MissingError, match=r"tensorrt_rtx --loadEngine=\S+net.engine"):
        backends.get("tensorrt_rtx").open(engine, threads=1, precision="fp32")


def test_a_runtime_that_is_not_there_names_its_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path = saved(exported(Block), tmp_path / "net.onnx")
    with pytest.raises(MissingError, match=r"edgekit\[tensorrt\].*JetPack"):
        tensorrt_.build("tensorrt", path, tmp_path / "net.engine")


def test_without_its_runtime_a_checked_file_and_the_command_are_delivered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path = saved(exported(Block), tmp_path / "net.onnx")
    asked = ExportRequest(model=str(path), out=str(tmp_path / "out"), profile="tensorrt", precision="fp16")
    with pytest.raises(MissingError, match=rf"trtexec --onnx={tmp_path}/out/model.onnx"):
        export(asked, quiet)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))


LOG = """[11/23/2026-10:00:00] [I] === Performance summary ===
[11/23/2026-10:00:00] [I] Throughput: 1201.55 qps
[11/23/2026-10:00:00] [I] Latency: min = 0.9 ms, max = 2.1 ms, mean = 1.0 ms, median = 0.95 ms, percentile(99%) = 1.9 ms
[11/23/2026-10:00:00] [I] GPU Compute Time: min = 0.81 ms, max = 1.9 ms, mean = 0.84 ms, median = 0.83 ms
&&&& PASSED TensorRT.trtexec"""


def test_what_trtexec_answers_is_parsed() -> None:
    assert trtexec.parse_log(LOG).median_ns == pytest.approx(830_000)
    times = '[{"startInMs": 1.0, "computeMs": 0.5}, {"startInMs": 2.0, "computeMs": 0.75}]'
    assert trtexec.parse_times(times).tolist() == [500_000, 750_000]
    layers = '[{"count": 10}, {"name": "conv1", "timeMs": 5.0, "medianMs": 0.4}, {"name": "fc", "averageMs": 0.1}]'
    assert trtexec.parse_profile(layers) == pytest.approx({"conv1": 400_000, "fc": 100_000})
    with pytest.raises(MeasurementError, match="Engine could not be created"):
        trtexec.parse_log("[11/23/2026-10:00:00] [E] Engine could not be created\n&&&& FAILED TensorRT.trtexec")
    for parse in (trtexec.parse_times, trtexec.parse_profile):
        with pytest.raises(MeasurementError, match="trtexec"):
            parse('{"half": ')


def test_the_commands_for_the_device_keep_paths_apart() -> None:
    text = trtexec.text(trtexec.build_engine(Path("my model/net.onnx")))
    assert "'--onnx=my model/net.onnx'" in text and "--stronglyTyped" in text
