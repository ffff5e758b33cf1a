from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from toolkit.errors import ModelError
from toolkit.models import LoadedModel, load_model, resolve_preprocess
from toolkit.schema import Preprocess

NETWORK = """
import torch
from sibling import WIDTH

class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3)
        self.norm = torch.nn.BatchNorm2d(width)
    def forward(self, x):
        return self.norm(self.conv(x))

def small(): return Net(WIDTH)
def lazy():
    from late import DEPTH
    return torch.nn.Sequential(*[Net(3) for _ in range(DEPTH)])
def needs(width, depth=1, *, height): return Net(width)
def optional(width=3, *args, **kwargs): return Net(width)
def nothing(): return None
def broken(): raise RuntimeError("no such luck")
def quits(): raise SystemExit(3)
def diverged():
    net = Net(4)
    net.norm.running_var[2] = float("nan")
    return net
def masked():
    net = Net(4)
    net.register_buffer("mask", torch.full((2,), float("-inf")))
    return net
constant = 3
"""


@pytest.fixture
def network(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("WIDTH = 4\n")
    (tmp_path / "late.py").write_text("DEPTH = 2\n")
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(autouse=True)
def unchanged_interpreter() -> Iterator[None]:
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in ("sibling", "late", "network"):
        sys.modules.pop(name, None)


def refused(spec: str, *words: str, weights: str = "") -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(spec, weights)
    assert caught.value.hint and caught.value.exit_code == 2
    for word in words:
        assert word in caught.value.message
    return caught.value


def state_of(network: Path) -> dict[str, torch.Tensor]:
    return {key: torch.randn(tensor.shape) if tensor.ndim else tensor for key, tensor in small(network).state_dict().items()}


def small(network: Path, weights: Path | str = "") -> nn.Module:
    return load_model(f"{network}:small", str(weights)).module


# --- where a model comes from ------------------------------------------------------------------------------------------------


def test_torchvision_by_name_is_random_but_seeded_and_says_so() -> None:
    loaded = load_model("resnet18", seed=3)
    assert loaded.preprocess == Preprocess(input=(1, 3, 224, 224), resize=256, crop=224)
    assert not loaded.module.training and "random initialisation (seed 3)" in loaded.notes[0]
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    again, other = load_model("resnet18", seed=3).module.state_dict(), load_model("resnet18", seed=4).module.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in loaded.module.state_dict().items())
    assert not torch.equal(again["conv1.weight"], other["conv1.weight"])
    assert torch.equal(torch.randn(3), expected), "the caller's random state has changed"


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_nothing_is_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert load_model(name).preprocess is None


def test_an_interpolation_that_differs_is_noted() -> None:
    loaded = load_model("swin_t")
    assert loaded.preprocess is not None and loaded.preprocess.resize == 232
    assert any("bicubic" in note for note in loaded.notes)


def test_a_function_of_a_file_or_module(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(network.parent)
    for spec in (f"{network}:small", "network.py:small", "network:small", "network:optional"):
        loaded = load_model(spec)
        assert loaded.name == spec.split(":")[-1] and loaded.preprocess is None
        assert not loaded.module.training
        assert loaded.module(torch.zeros(1, 3, 8, 8)).shape[2:] == (6, 6)
        assert sys.modules[type(loaded.module).__module__]
    assert isinstance(load_model(f"{network}:lazy").module, nn.Sequential)


def test_what_the_users_code_can_do_wrong(network: Path) -> None:
    refused(f"{network.parent}/gone.py:small", "gone.py", "does not exist")
    assert f"{network}:FUNCTION" in refused(str(network), "does not name a function").hint
    refused(f"{network}:smal", "no function 'smal'", "did you mean small?")
    refused(f"{network}:constant", "no function 'constant'")
    refused(f"{network}:needs", "needs arguments (width, height)")
    refused(f"{network}:nothing", "returned NoneType")
    refused("no_such_package.models:small", "no_such_package")
    error = refused(f"{network}:broken", "RuntimeError", "no such luck")
    assert isinstance(error.__cause__, RuntimeError)
    refused(f"{network}:quits", "SystemExit")
    network.write_text("def (")
    refused(f"{network}:small", "SyntaxError")
    assert not [name for name in sys.modules if name.startswith("network_") and not hasattr(sys.modules[name], "small")]


def test_unknown_names_and_files(tmp_path: Path) -> None:
    refused("resnet8", "'resnet8'", "resnet18")
    refused("", "''")
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert f"--weights {tmp_path}/w.safetensors" in refused(str(tmp_path / "w.safetensors"), "w.safetensors").hint


def test_the_demo_has_its_own_weights_and_preprocessing() -> None:
    from toolkit import demo

    if not demo.weights_path().is_file():
        pytest.skip("the demo's weights are not there")
    loaded, fresh = load_model("demo"), demo.model().state_dict()
    assert loaded.preprocess == demo.preprocess()
    assert any(not torch.equal(tensor, fresh[key]) for key, tensor in loaded.module.state_dict().items() if tensor.ndim == 4)


# --- weights ------------------------------------------------------------------------------------------------------------------

Wrap = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "best": 0.9},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}},
        lambda state: {key: tensor for key, tensor in state.items() if "num_batches" not in key},
    ],
)
def test_a_state_dict_arrives_however_it_is_wrapped(network: Path, wrap: Wrap) -> None:
    state = state_of(network)
    for name in ("w.pt", "w.pth"):
        torch.save(wrap(state), network.parent / name)
        loaded = small(network, network.parent / name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items() if "num_batches" not in key)


def test_safetensors_arrive(network: Path) -> None:
    state = state_of(network)
    save_file(state, network.parent / "w.safetensors")
    loaded = small(network, network.parent / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert load_model(f"{network}:small", str(network.parent / "w.safetensors")).notes == ()


def test_weights_that_do_not_fit_are_named_and_counted(network: Path) -> None:
    state = state_of(network)
    state["conv.weight"] = torch.zeros(5, 3, 3, 3)
    state |= {f"head.{i}": torch.zeros(1) for i in range(5)}
    del state["norm.bias"]
    path = network.parent / "w.safetensors"
    save_file(state, path)
    refused(
        f"{network}:small",
        "1 missing (norm.bias)",
        "5 unexpected (head.0, head.1, head.2, ...)",
        "1 of another shape (conv.weight is 5x3x3x3, the model's 4x3x3x3)",
        weights=str(path),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(network: Path, value: float) -> None:
    state = state_of(network)
    state["conv.bias"][1] = value
    path = network.parent / "w.safetensors"
    save_file(state, path)
    refused(f"{network}:small", "NaN or infinite", "conv.bias", weights=str(path))


def test_running_statistics_must_be_finite_but_masks_may_not(network: Path) -> None:
    refused(f"{network}:diverged", "norm.running_var")
    load_model(f"{network}:masked")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_damaged_weights(network: Path, name: str) -> None:
    path = network.parent / name
    refused(f"{network}:small", name, "does not exist", weights=str(path))
    state = state_of(network)
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(content)
        refused(f"{network}:small", name, "damaged", weights=str(path))


class Trap:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(network: Path, legacy: bool) -> None:
    path, sprung = network.parent / "w.pt", network.parent / "sprung"
    torch.save({"state_dict": state_of(network), "extra": Trap(sprung)}, path, _use_new_zipfile_serialization=not legacy)
    assert "safetensors" in refused(f"{network}:small", "pickled objects", weights=str(path)).hint
    torch.save(small(network), path)
    refused(f"{network}:small", "pickled objects", weights=str(path))
    assert not sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3)])
def test_no_state_dict(network: Path, content: Any) -> None:
    torch.save(content, network.parent / "w.pt")
    refused(f"{network}:small", "not a state dict", weights=str(network.parent / "w.pt"))
    (network.parent / "w.onnx").write_bytes(b"")
    refused(f"{network}:small", "w.onnx", weights=str(network.parent / "w.onnx"))


# --- exported programs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Path:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    path = tmp_path / "net.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},)), path)
    return path


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


def rewrite(path: Path, pattern: str, change: Callable[[bytes], bytes], extra: str = "") -> None:
    """Change the members whose names match; the copy stays readable by PyTorch."""
    copy = path.with_name("changed.zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        assert any(re.search(pattern, name) for name in old.namelist())
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if re.search(pattern, name) else old.read(name))
        if extra:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{extra}", b"")
    shutil.move(copy, path)


def test_an_exported_program_computes_what_it_did(program: Path) -> None:
    expected = torch.export.load(program).module()
    loaded = load_model(str(program))
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert loaded.name == "net"
    assert torch.equal(loaded.module(image), expected(image))


def test_an_exported_program_takes_weights(program: Path) -> None:
    state = {key: tensor * 2 for key, tensor in load_model(str(program)).module.state_dict().items()}
    save_file(state, program.parent / "w.safetensors")
    loaded = load_model(str(program), str(program.parent / "w.safetensors")).module.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_damaged_programs(program: Path) -> None:
    refused(str(program.parent / "gone.pt2"), "gone.pt2", "does not exist")
    whole = program.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no program"):
        program.write_bytes(content)
        refused(str(program), "net.pt2", "cannot be loaded")


def test_a_program_that_would_run_code_is_refused(program: Path) -> None:
    sprung = program.parent / "sprung"
    whole = program.read_bytes()
    rewrite(program, "archive_version", lambda content: content)
    load_model(str(program))  # the rewritten file is sound, so what follows is refused for its content

    trapped = io.BytesIO()
    torch.save(((Trap(sprung),), {}), trapped)
    rewrite(program, "sample_inputs/", lambda _: trapped.getvalue())
    refused(str(program), "pickled objects")

    program.write_bytes(whole)
    rewrite(program, "archive_version", lambda content: content, extra="data/constants/opaque_obj_0")
    refused(str(program), "opaque_obj_0")

    for operator in ("torch.hub.load", "torch.ops.load_library", "_operator.methodcaller"):
        program.write_bytes(whole)
        rewrite(program, "models/", swap(b"torch.ops.aten.relu.default", operator.encode()))
        refused(str(program), operator)

    program.write_bytes(whole)
    escape = json.dumps(f"__import__('pathlib').Path({str(sprung)!r}).touch()").encode()
    rewrite(program, "models/", lambda content: re.sub(rb'"expr_str":\s*"[^"]*"', lambda _: b'"expr_str": ' + escape, content))
    refused(str(program), "__import__")
    assert not sprung.exists()


def test_the_trap_springs_where_nothing_stops_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


# --- preprocessing ------------------------------------------------------------------------------------------------------------


def test_the_request_wins_then_the_model_then_nobody() -> None:
    own, asked = Preprocess(input=(1, 3, 8, 8)), Preprocess(input=(1, 3, 16, 16))
    silent = LoadedModel(name="net", module=nn.Identity())
    speaking = LoadedModel(name="net", module=nn.Identity(), preprocess=own)
    assert resolve_preprocess(asked, speaking) == asked
    assert resolve_preprocess(None, speaking) == own
    assert resolve_preprocess(asked, silent) == asked
    with pytest.raises(ModelError, match="does not say") as caught:
        resolve_preprocess(None, silent)
    assert all(flag in caught.value.hint for flag in ("--input", "--mean", "--std"))
