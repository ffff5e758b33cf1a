"""The outside check: it passes an honest run and fails each kind of tampering, whatever else was made to fit."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from board import board, needs_sshd
from safetensors.torch import save_file
from torch import nn

from toolkit import backends, bench
from toolkit.schema import Profile, to_json

pytestmark = [pytest.mark.slow, pytest.mark.timed]

TOOL = Path(__file__).resolve().parent.parent / "tools" / "verify"
PROFILE = Profile(id="local-onnxruntime", device="local", runtime="onnxruntime", format="onnx")
DENSE, PRUNED = (64, 64), (32, 48)
EXAMPLE = torch.zeros(1, 3, 48, 48)
Change = Callable[[dict[str, Any]], object]


def network(widths: tuple[int, int]) -> nn.Sequential:
    torch.manual_seed(sum(widths))
    first, second = widths
    body = (nn.Conv2d(3, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 4)).eval()


def export(model: nn.Module, path: Path) -> None:
    torch.onnx.export(model, (EXAMPLE,), str(path), dynamo=True, external_data=False, verbose=False)


def say_origin(folder: Path, widths: dict[str, int]) -> None:
    """Into the pruned file, what it was made of."""
    model = onnx.load(str(folder / "model.onnx"))
    del model.metadata_props[:]
    digest = sha256(folder / "weights.safetensors")
    for key, value in (("edgekit.weights_sha256", digest), ("edgekit.widths", json.dumps(widths))):
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(folder / "model.onnx"))


def entry(folder: Path, name: str, role: str) -> dict[str, Any]:
    path = folder / name
    return {
        "path": name,
        "role": role,
        "format": "onnx",
        "sha256": sha256(path),
        "size_bytes": path.stat().st_size,
        "companions": [],
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: a small network cut by hand, exported and measured for real."""
    folder = tmp_path_factory.mktemp("run")
    models = {"dense.onnx": network(DENSE), "model.onnx": network(PRUNED)}
    for name, model in models.items():
        export(model, folder / name)
    pruned = models["model.onnx"]
    torch.export.save(torch.export.export(pruned, (EXAMPLE,)), str(folder / "model.pt2"))
    save_file(pruned.state_dict(), str(folder / "weights.safetensors"))
    say_origin(folder, dict(zip(("first", "second"), PRUNED, strict=True)))

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 48, 48, 3), np.uint8), rng.integers(0, 4, 40)
    np.savez(folder / "images.npz", images=images, labels=labels)
    batches = [(image.transpose(2, 0, 1)[None].astype(np.float32) / 255 - 0.5) / 0.25 for image in images[5:]]
    top = {}
    for name in models:
        session = backends.get("onnxruntime").open(folder / name, threads=1, precision="fp32")
        top[name] = np.array([session.run({session.inputs[0].name: batch})[0].argmax() for batch in batches])

    measured = bench.compare(PROFILE, folder / "dense.onnx", folder / "model.onnx", fresh_process=True)
    groups = [
        {"name": name, "kind": "conv", "width_before": before, "width_after": after, "kept": list(range(after)), "removed": {}}
        for name, before, after in zip(("first", "second"), DENSE, PRUNED, strict=True)
    ]
    places = {
        "first": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)],
        "second": [("2.weight", 0), ("2.bias", 0), ("6.weight", 1)],
    }
    records: dict[str, Any] = {
        "plan": {"schema": 1, "groups": groups},
        "groups": {
            "groups": [
                {"name": name, "width": 64, "places": [{"parameter": p, "axis": a, "elements": 1} for p, a in found]}
                for name, found in places.items()
            ],
            "dense_shapes": {name: list(value.shape) for name, value in models["dense.onnx"].state_dict().items()},
        },
        "request": {"preprocess": {"input": [1, 3, 48, 48], "resize": 0, "crop": 0, "mean": [0.5] * 3, "std": [0.25] * 3}},
        "evaluation": {"data": str(folder / "images.npz"), "indices": list(range(5, 40))},
        "report": {
            "schema": 1,
            "verdict": "met",
            "valid": measured.pruned.valid,
            "invalid_reasons": list(measured.pruned.invalid_reasons),
            "budget": "0.8x",
            "budget_ns": 0.8 * measured.dense.latency_ns,
            "statistic": "median",
            "dense_ns": measured.dense.latency_ns,
            "measured_ns": measured.pruned.latency_ns,
            "measured_ci95_ns": list(measured.pruned.latency_ci95_ns),
            "predicted_ns": 1.02 * measured.pruned.latency_ns,
            "speedup": 1 / measured.ratio,
            "speedup_ci95": [1 / bound for bound in reversed(measured.ratio_ci95)],
            "accuracy_dense": float((top["dense.onnx"] == labels[5:]).mean()),
            "accuracy_pruned": float((top["model.onnx"] == labels[5:]).mean()),
            "agreement": float((top["dense.onnx"] == top["model.onnx"]).mean()),
            "evaluation_images": 35,
            "parameters_pruned": sum(parameter.numel() for parameter in pruned.parameters()),
            "groups": groups,
        },
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "measurements").mkdir()
    (folder / "measurements" / "comparison.json").write_text(to_json(measured))
    manifest = {
        "schema": 1,
        "artefacts": [entry(folder, "dense.onnx", "dense"), entry(folder, "model.onnx", "pruned")],
        "plan_sha256": sha256(folder / "plan.json"),
        "weights_sha256": sha256(folder / "weights.safetensors"),
        "program_sha256": sha256(folder / "model.pt2"),
        "profile": json.loads(to_json(PROFILE)),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def edit(folder: Path, name: str, change: Change) -> None:
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def seal(folder: Path) -> None:
    """Make the manifest and the measurement's hashes fit whatever the files are now."""

    def artefacts(manifest: dict[str, Any]) -> None:
        manifest["artefacts"] = [entry(folder, one["path"], one["role"]) for one in manifest["artefacts"]]
        manifest["plan_sha256"] = sha256(folder / "plan.json")

    edit(folder, "manifest.json", artefacts)
    for role, name in (("dense", "dense.onnx"), ("pruned", "model.onnx")):
        edit(folder, "measurements/comparison.json", lambda record, r=role, n=name: record[r].update(sha256=sha256(folder / n)))


def failures(tool: ModuleType, folder: Path, *names: str) -> set[str]:
    options = argparse.Namespace(data=None, input=None, resize=None, crop=None, mean=None, std=None, time=5.0)
    lines = list(tool.judge(tool.Run(folder, options), list(names or tool.CHECKS)))
    return {name for state, name, _ in lines if state == "FAIL"}


UNTIMED = ("files", "hashes", "smaller", "plan", "shapes", "parity", "samples", "prediction", "accuracy", "verdict")


def test_an_honest_run_is_verified(tool: ModuleType, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(honest), "--time", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "VERIFIED" and len(lines) == len(tool.CHECKS) + 1
    assert all(line.startswith("ok  ") for line in lines[:-1])


def test_a_falsified_time_is_not_verified(tool: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "report.json", lambda report: report.update(measured_ns=0.9 * report["measured_ns"]))
    assert tool.main([str(copy), "--time", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT VERIFIED: ")


def test_a_time_falsified_in_every_field_of_the_report(tool: ModuleType, copy: Path) -> None:
    def falsify(report: dict[str, Any]) -> None:
        for name in ("measured_ns", "predicted_ns"):
            report[name] *= 0.7
        report["measured_ci95_ns"] = [0.7 * bound for bound in report["measured_ci95_ns"]]
        report["speedup"] /= 0.7
        report["speedup_ci95"] = [bound / 0.7 for bound in report["speedup_ci95"]]

    edit(copy, "report.json", falsify)
    assert failures(tool, copy, "samples", "timing") == {"samples", "timing"}


def test_samples_falsified_with_the_report_do_not_time_again(tool: ModuleType, copy: Path) -> None:
    def faster(record: dict[str, Any]) -> None:
        record["pruned"]["rounds_ns"] = [[round(0.7 * sample) for sample in one] for one in record["pruned"]["rounds_ns"]]
        record["pruned"]["latency_ns"] *= 0.7
        record["ratio"] *= 0.7

    edit(copy, "measurements/comparison.json", faster)
    edit(
        copy,
        "report.json",
        lambda report: report.update(measured_ns=0.7 * report["measured_ns"], speedup=report["speedup"] / 0.7),
    )
    assert failures(tool, copy, "samples", "timing") == {"timing"}


@needs_sshd
def test_a_run_on_a_board_is_timed_there_again(tool: ModuleType, copy: Path, tmp_path: Path, monkeypatch) -> None:
    with board(tmp_path / "board") as there:
        monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str(there.config()))
        edit(copy, "request.json", lambda request: request.update(on=there.url))
        found = tool.CHECKS["timing"](tool.Run(copy, argparse.Namespace(time=5.0)))
        assert re.match(r"pruned/dense on ssh://board is [\d.]+ \+- ", found)
        assert list(there.tmp.iterdir()) == []
        monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str(there.config(known_hosts="wrong_hosts")))
        with pytest.raises(tool.Problem, match="the board of the run cannot be used: Host key verification failed"):
            tool.CHECKS["timing"](tool.Run(copy, argparse.Namespace(time=5.0)))
        monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str(there.config()))
        edit(copy, "report.json", lambda report: report.update(measured_ns=0.7 * report["measured_ns"]))
        assert failures(tool, copy, "timing") == {"timing"}


@needs_sshd
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "-x", "a b", "a;b"])
def test_no_file_from_outside_the_run_goes_to_a_board(
    tool: ModuleType, copy: Path, tmp_path: Path, name: str, monkeypatch
) -> None:
    (tmp_path / "secret").write_text("secret")
    edit(copy, "request.json", lambda request: request.update(on="ssh://board"))
    edit(copy, "manifest.json", lambda manifest: manifest["artefacts"][1]["companions"].append([name, ""]))
    with board(tmp_path / "board") as there:
        monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str(there.config()))
        with pytest.raises(tool.Problem, match="is no file of the run's folder that a board is sent"):
            tool.CHECKS["timing"](tool.Run(copy, argparse.Namespace(time=5.0)))
        assert list(there.tmp.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["board", "ssh://-oProxyCommand=touch", "ssh://board; touch x", "ssh://a@b@c", "ssh://board:22:22"]
)
def test_an_address_that_is_none_reaches_no_ssh(tool: ModuleType, copy: Path, url: str, monkeypatch) -> None:
    edit(copy, "request.json", lambda request: request.update(on=url))
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: pytest.fail("ssh was called"))
    assert failures(tool, copy, "timing") == {"timing"}


def test_a_swapped_artefact(tool: ModuleType, copy: Path) -> None:
    other = network(PRUNED)
    other[0].weight.data += 0.05
    export(other, copy / "model.onnx")
    assert failures(tool, copy, "hashes") == {"hashes"}
    seal(copy)
    assert "parity" in failures(tool, copy, "hashes", "parity")


def test_the_dense_model_in_place_of_the_pruned(tool: ModuleType, copy: Path) -> None:
    shutil.copy(copy / "dense.onnx", copy / "model.onnx")
    assert "hashes" in failures(tool, copy, "hashes")
    seal(copy)
    assert failures(tool, copy, "hashes", "smaller", "shapes", "parity", "timing", "budget") == {
        "smaller", "shapes", "parity", "timing", "budget"
    }  # fmt: skip


def test_a_file_made_of_other_weights_or_widths(tool: ModuleType, copy: Path) -> None:
    say_origin(copy, dict(zip(("first", "second"), DENSE, strict=True)))
    seal(copy)
    assert failures(tool, copy, "hashes", "origin", "shapes") == {"origin"}
    say_origin(copy, dict(zip(("first", "second"), PRUNED, strict=True)))
    seal(copy)
    assert failures(tool, copy, "hashes", "origin") == set()
    edit(copy, "manifest.json", lambda record: record.update(weights_sha256="0" * 64))
    assert failures(tool, copy, "origin") == {"origin"}


@pytest.mark.parametrize("width", [16, 31, 33])
def test_an_edited_plan(tool: ModuleType, copy: Path, width: int) -> None:
    def change(record: dict[str, Any]) -> None:
        record["groups"][0].update(width_after=width, kept=list(range(width)))

    edit(copy, "plan.json", change)
    assert failures(tool, copy, "hashes", "plan", "shapes") == {"hashes", "plan", "shapes"}
    seal(copy)
    edit(copy, "report.json", change)
    assert failures(tool, copy, "hashes", "plan", "shapes") == {"shapes"}


@pytest.mark.parametrize(
    ("caught_by", "change"),
    [
        ("prediction", lambda report: report.update(predicted_ns=1.2 * report["measured_ns"])),
        ("accuracy", lambda report: report.update(accuracy_pruned=report["accuracy_pruned"] + 0.03)),
        ("accuracy", lambda report: report.update(agreement=report["agreement"] - 0.03)),
        ("accuracy", lambda report: report.update(evaluation_images=34)),
        ("smaller", lambda report: report.update(parameters_pruned=report["parameters_pruned"] - 1)),
        ("smaller", lambda report: report.update(memory_limit_bytes=1e9, memory_pruned_bytes=2e9)),
        ("smaller", lambda report: report.update(memory_limit_bytes=1e9, memory_pruned_bytes=90.0)),
        ("verdict", lambda report: report.update(verdict="missed", valid=True, invalid_reasons=[])),
        ("verdict", lambda report: report.update(invalid_reasons=["noise"], valid=True)),
        ("samples", lambda report: report.update(speedup=1.05 * report["speedup"])),
    ],
)
def test_a_falsified_report(tool: ModuleType, copy: Path, caught_by: str, change: Change) -> None:
    edit(copy, "report.json", change)
    assert failures(tool, copy, *UNTIMED) == {caught_by}


@pytest.mark.parametrize("name", ["report.json", "model.pt2", "weights.safetensors", "groups.json", "dense.onnx"])
def test_a_missing_or_damaged_file_fails_and_nothing_else_stops(tool: ModuleType, copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    assert "files" in failures(tool, copy, "files")
    (copy / name).write_bytes(content[: len(content) // 2])
    assert failures(tool, copy, *UNTIMED)


def test_nothing_of_the_toolkit_is_imported() -> None:
    import ast

    imported = set()
    for node in ast.walk(ast.parse(TOOL.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnx", "onnxruntime", "openvino", "torch", "safetensors", "PIL"}


def test_images_are_read_in_one_order_from_each_layout(tool: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("b", "a"):
        (tmp_path / "classes" / folder).mkdir(parents=True)
        for name in ("2", "1"):
            Image.new("RGB", (4, 4)).save(tmp_path / "classes" / folder / f"{name}.png")
    files, pixels, labels = tool.read_dataset(tmp_path / "classes", [])
    assert [path.relative_to(tmp_path / "classes").as_posix() for path in files] == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    assert pixels is None and labels == [0, 0, 1, 1]
    assert tool.read_dataset(tmp_path / "classes", ["b", "a"])[2] == [1, 1, 0, 0]
    (tmp_path / "classes" / "labels.csv").write_text("file,label\nb/2.png,7\na/1.png,3\n")
    files, _, labels = tool.read_dataset(tmp_path / "classes", [])
    assert [path.name for path in files] == ["2.png", "1.png"] and labels == [7, 3]
