#!/usr/bin/env python3
"""What the exporters make of models: every runtime and precision, and what int8 costs in accuracy.

  tools/bench_export.py zoo --data IMAGES -o docs/results/export.json
  tools/bench_export.py zoo resnet18 timm:mobilevit_xxs --data IMAGES -o mine.json
  tools/bench_export.py accuracy net.py:model --weights w.safetensors --data CALIBRATION --eval-data VALIDATION \
      --input 1x3x224x224 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 -o accuracy.json

`zoo` exports each model (random weights; the weights do not matter to what works) with ONNX Runtime's, OpenVINO's and
TensorRT-RTX's profile in fp32, fp16 and int8, through the command line: a cell is `ok` with sizes, executed precision and
parity after every step, or refused with the words of the refusal. `accuracy` counts top-1 and agreement of the delivered
files on all images of --eval-data, fp32 and int8, in both runtimes, with paired 95 % intervals; those for TensorRT with their
Q/DQ pairs emulated in floats, and not timed. What the output file holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import calibration
from toolkit import backends
from toolkit.backends import Opener, emulated
from toolkit.run.evaluate import judge

PROFILES = ("local-onnxruntime", "local-openvino", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")
ZOO = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "vit_b_32",
    "timm:deit_tiny_patch16_224", "timm:convnext_atto", "timm:mobilevit_xxs", "timm:levit_128s", "timm:repvgg_a0",
    "timm:ghostnet_050",
)  # fmt: skip

# Some begin with a classifier of zeros, whose outputs would agree whatever comes before.
MODEL = """import torch
import {package}

def model():
    torch.manual_seed(0)
    network = {made}.eval()
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return network
"""


def edgekit(arguments: list[str]) -> tuple[int, str, str, float]:
    """(exit code, stdout, stderr, seconds) of the command."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "toolkit", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def model_arguments(name: str, folder: Path) -> list[str]:
    """How the command line is told of a model of torchvision or timm, with random weights."""
    zoo, _, own = name.rpartition(":")
    made = f"timm.create_model({own!r})" if zoo else f"torchvision.models.get_model({own!r}, weights=None)"
    (folder / "zoo.py").write_text(MODEL.format(package="timm" if zoo else "torchvision", made=made))
    return [f"{folder / 'zoo.py'}:model", "--input", "1x3x224x224", "--crop", "224"]


def cell(name: str, profile: str, precision: str, data: str, samples: int) -> dict[str, Any]:
    """One export through the command line."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = ["export", *model_arguments(name, folder), "-p", profile, "--precision", precision, "-o", str(folder / "out")]
        arguments += ["--data", data, "--samples", str(samples)] if precision == "int8" else []
        code, out, err, seconds = edgekit([*arguments, "--json"])
        row: dict[str, Any] = {
            "model": name,
            "profile": profile,
            "precision": precision,
            "code": code,
            "wall_s": round(seconds, 1),
        }
        if code:
            words = err[err.index("Error:") :] if "Error:" in err else err[-500:]
            return row | {"refused": " ".join(words.split()), "left_behind": sorted(p.name for p in folder.glob("out/*"))}
        record = json.loads(out)
        return row | {"artefacts": record["artefacts"], "ratios": record["ratios"], "notes": record["notes"]}


def zoo(given: argparse.Namespace) -> int:
    done = json.loads(given.output.read_text())["cells"] if given.output.exists() else []
    seen = {(row["model"], row["profile"], row["precision"]) for row in done}
    for name in given.models or ZOO:
        for profile in PROFILES:
            for precision in PRECISIONS:
                if (name, profile, precision) in seen:
                    continue
                row = cell(name, profile, precision, given.data, given.samples)
                done.append(row)
                given.output.write_text(json.dumps({"schema": 1, "cells": done}, indent=1) + "\n")
                print(f"{name} {profile} {precision}: {told(row)}", file=sys.stderr, flush=True)
    print(zoo_table(done))
    return 0


def told(row: dict[str, Any]) -> str:
    if row["code"]:
        return f"refused: {row['refused'][:110]}"
    last = row["artefacts"][-1]
    worst = max(p["max_relative_error"] for p in last["parity"])
    text = f"{last['size_bytes'] / 1e6:.1f} MB, {last['executed_precision']}, {worst:.0e}"
    return text + (f", {row['ratios'][0]['value']:.2f}x" if row["ratios"] else "")


def zoo_table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row a model and precision, a column a profile."""
    lines = ["| model | precision | " + " | ".join(PROFILES) + " |", "|---" * (2 + len(PROFILES)) + "|"]
    by = {(row["model"], row["precision"], row["profile"]): row for row in cells}
    for name in dict.fromkeys(row["model"] for row in cells):
        for precision in PRECISIONS:
            found = (by.get((name, precision, profile)) for profile in PROFILES)
            lines.append(f"| {name} | {precision} | " + " | ".join(told(row) if row else "" for row in found) + " |")
    return "\n".join(lines)


def accuracy(given: argparse.Namespace) -> int:
    """Delivered files on evaluation images: fp32 and int8, in both runtimes; what is for TensorRT, emulated."""
    done = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    dataset = calibration.open_dataset(given.eval_data)
    assert dataset.labels is not None
    size = tuple(int(n) for n in given.input.split("x"))
    mean, std = (tuple(float(v) for v in text.split(",")) for text in (given.mean, given.std))
    transform = calibration.Transform(input=(1, size[1], size[2], size[3]), resize=0, crop=given.crop, mean=mean, std=std)
    options = ["--input", given.input, "--mean", given.mean, "--std", given.std, "--crop", str(given.crop or size[2])]
    options += ["--data", given.data, "--samples", str(given.samples), "--seed", str(given.seed), "--json"]
    labels = np.asarray(dataset.labels)
    model = Path(given.model).name
    for profile in PROFILES:
        if any((row["model"], row["profile"]) == (model, profile) for row in done):
            continue
        suffix = ".xml" if "openvino" in profile else ".onnx"
        runs: Opener = emulated if profile == "tensorrt-rtx" else backends.get(profile.removeprefix("local-"))
        with tempfile.TemporaryDirectory() as place:
            top, record = {}, {}
            for precision in ("fp32", "int8"):
                out = Path(place) / precision
                arguments = ["export", given.model, "--weights", given.weights, *options, "-p", profile, "--precision", precision]
                code, told_, err, _ = edgekit([*arguments, "-o", str(out)])
                if code:
                    print(err, file=sys.stderr)
                    return code
                record = json.loads(told_)
                session = runs.open(out / f"model{suffix}", threads=2, precision=precision)
                name = session.inputs[0].name
                batches = calibration.iterate(dataset, np.arange(len(dataset)), transform, 64)
                top[precision] = np.array([int(session.run({name: x[None]})[0].argmax()) for batch in batches for x in batch])
                session.close()
        found = judge(top["fp32"], top["int8"], labels)
        artefact, ratios = record["artefacts"][-1], [*record["ratios"], None, None]
        row = {
            "model": model, "profile": profile, "images": len(labels), "calibration_images": given.samples,
            "seed": given.seed,
            "top1_fp32": found.dense, "top1_int8": found.pruned, "change_ci95": found.change_ci95, "agreement": found.agreement,
            "ratio": ratios[0], "ratio_without_float_layers": ratios[1],
            "fp32_ns": record["fp32_ns"], "size_bytes": artefact["size_bytes"], "quantization": artefact["quantization"],
            "executed_precision": artefact["executed_precision"], "read_from": artefact["executed_precision_read_from"],
        }  # fmt: skip
        done.append(row)
        given.output.write_text(json.dumps({"schema": 1, "rows": done}, indent=1) + "\n")
    print(accuracy_table(done))
    return 0


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | profile | top-1 fp32 | int8 | change, 95 % interval | same top-1 | latency of fp32's | layers in float |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = (100 * v for v in r["change_ci95"])
        latency = f"{r['ratio']['value']:.3f}x" if r["ratio"] else "not run"
        lines.append(
            f"| {Path(r['model']).name} | {r['profile']} | {100 * r['top1_fp32']:.2f} | {100 * r['top1_int8']:.2f} "
            f"| {100 * (r['top1_int8'] - r['top1_fp32']):+.2f} ({low:+.2f} to {high:+.2f}) | {100 * r['agreement']:.1f} % "
            f"| {latency} | {len(r['quantization']['kept_float'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    cells = verbs.add_parser("zoo", help="models x runtimes x precisions")
    cells.add_argument("models", nargs="*", help="of torchvision, or timm:NAME (default: twelve)")
    cells.add_argument("--data", required=True, help="calibration images of 224 pixels or more")
    cells.add_argument("--samples", type=int, default=64)
    cells.set_defaults(do=zoo)
    points = verbs.add_parser("accuracy", help="what int8 costs on real images")
    points.add_argument("model")
    for name in ("weights", "data", "eval-data", "input", "mean", "std"):
        points.add_argument(f"--{name}", required=True)
    points.add_argument("--crop", type=int, default=0)
    points.add_argument("--samples", type=int, default=256)
    points.add_argument("--seed", type=int, default=0)
    points.set_defaults(do=accuracy)
    for each in (cells, points):
        each.add_argument("-o", "--output", type=Path, required=True, help="results as JSON")
    given = parser.parse_args()
    return int(given.do(given))


if __name__ == "__main__":
    sys.exit(main())
