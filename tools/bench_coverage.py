#!/usr/bin/env python3
"""How often a benchmark's interval holds the truth: tools/bench_coverage.py -o docs/results/coverage.json

A file is timed against itself, so the truth is 1. On this machine in both runtimes, and on simulated devices whose speed drifts
with memory of itself, where a file that is 5 % slower by the device's law is compared too. Each session on this machine is also
held against the one before it, as `edgekit bench --against` does: how often would a gate of 5 % fail though nothing changed?

  tools/bench_coverage.py -o coverage.json            the bundled network, 20 sessions in each runtime, 100 simulated ones
  tools/bench_coverage.py net.onnx --real 50          another file
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from toolkit import bench, profiles  # noqa: E402
from toolkit.bench import gate  # noqa: E402
from toolkit.schema import Benchmark, Drift, Profile  # noqa: E402

DRIFTS = {"slow": Drift(deviation=0.1, correlation_s=3.0), "middling": Drift(deviation=0.1, correlation_s=0.5),
          "fast": Drift(deviation=0.05, correlation_s=0.05)}  # fmt: skip
NOISE, PLANTED, LIMIT = 0.03, 0.05, 1.05


def steps(count: int, what: str) -> Iterable[int]:
    """Numbers from 0, with a bar on stderr."""
    return track(range(count), what, console=Console(stderr=True))


def itself(found: Benchmark) -> dict[str, Any]:
    low, high = found.ratios[0].ci95
    return {"ratio": found.ratios[0].value, "ci95": [low, high], "valid": found.measurements[0].valid,
            "reasons": list(found.measurements[0].invalid_reasons), "drift": found.measurements[0].drift}  # fmt: skip


def real(path: Path, runtime: str, sessions: int) -> dict[str, Any]:
    raw, gates, before = [], list[float](), None
    for _ in steps(sessions, f"{runtime}, {path.name} against itself"):
        found = bench.benchmark(profiles.load(f"local-{runtime}"), [path, path], retries=0)
        raw.append(itself(found))
        if before is not None and before.measurements[0].valid and found.measurements[0].valid:
            gates.append(gate.against(found, before, "the session before", LIMIT)[0].ratio)
        before = found
    return summary(f"{runtime}, this machine", 1.0, raw) | {"gate_ratios": gates}


def device(drift: Drift, seed: int) -> Profile:
    """A simulated CPU core that drifts."""
    profile = profiles.load("simulated-cpu")
    assert profile.simulation
    simulation = msgspec.structs.replace(profile.simulation, drift=drift, noise=NOISE, seed=seed)
    return msgspec.structs.replace(profile, simulation=simulation)


def simulated(paths: tuple[Path, Path], truth: float, name: str, drift: Drift, sessions: int) -> dict[str, Any]:
    raw = []
    for seed in steps(sessions, f"simulated, {name} drift, truth {truth:.3f}"):
        raw.append(itself(bench.benchmark(device(drift, seed), paths, retries=0)))
    return summary(f"simulated, {name} drift", truth, raw)


def summary(name: str, truth: float, raw: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "where": name, "truth": truth, "sessions": len(raw), "valid": sum(each["valid"] for each in raw),
        "holds_truth": sum(each["ci95"][0] <= truth <= each["ci95"][1] for each in raw),
        "finds_difference": sum(not each["ci95"][0] <= 1 <= each["ci95"][1] for each in raw),
        "widest_half_width": max((each["ci95"][1] - each["ci95"][0]) / 2 for each in raw), "raw": raw,
    }  # fmt: skip


def planted(path: Path, folder: Path) -> tuple[Path, float]:
    """The same network with element-wise nodes before it, and how much longer it takes by the simulated core's law."""
    import onnx
    from onnx import helper

    from toolkit.backends.simulated import plan

    profile = profiles.load("simulated-cpu")
    assert profile.simulation
    law = profile.simulation.law

    def cost(model: onnx.ModelProto) -> float:
        return law.inference_ns + sum(kernel.cost_ns for kernel in plan(onnx.shape_inference.infer_shapes(model).graph, law))

    model = onnx.load(str(path))
    whole, source = cost(model), model.graph.input[0].name
    readers = [(node, [i for i, name in enumerate(node.input) if name == source]) for node in model.graph.node]
    last, count = source, 0
    while cost(model) < (1 + PLANTED) * whole:
        name = f"planted_{count}"
        model.graph.node.insert(count, helper.make_node("Softmax", [last], [name], name=name))
        last, count = name, count + 1
        for node, places in readers:
            for place in places:
                node.input[place] = last
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "planted.onnx"))
    return folder / "planted.onnx", cost(model) / whole


def line(found: dict[str, Any]) -> str:
    count, ratios = found["sessions"], found.get("gate_ratios")
    text = f"| {found['where']} | {found['truth']:.3f} | {found['holds_truth']} of {count} | "
    text += f"{found['finds_difference']} of {count} | {found['valid']} of {count} | +-{found['widest_half_width']:.1%} | "
    return text + (f"{sum(ratio > LIMIT for ratio in ratios)} of {len(ratios)} |" if ratios is not None else "|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="an ONNX file; default: the bundled network")
    parser.add_argument("--real", type=int, default=20, help="sessions on this machine, in each runtime (default 20)")
    parser.add_argument("--simulated", type=int, default=100, help="sessions on each simulated device (default 100)")
    parser.add_argument("-o", "--out", type=Path, help="results as JSON")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = given.file
        if path is None:
            from toolkit.run import export

            export("demo", "", None, "local-onnxruntime", str(folder), "fp32", lambda *_: None)
            path = folder / "model.onnx"
        slower, truth = planted(path, folder)
        for kind, drift in DRIFTS.items():
            results.append(simulated((path, path), 1.0, kind, drift, given.simulated))
            results.append(simulated((path, slower), truth, kind, drift, given.simulated))
        for runtime in ("onnxruntime", "openvino") if given.real else ():
            results.append(real(path, runtime, given.real))
    if given.out:
        given.out.write_text(json.dumps({"schema": 1, "results": results}, indent=1) + "\n")
    print("| where | true ratio | interval holds it | interval excludes 1 | valid | widest | failed gates |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(line, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
