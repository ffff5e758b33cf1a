#!/usr/bin/env python3
"""edgekit's latency beside that of the runtimes' own tools: tools/bench_agreement.py -o docs/results/agreement.json

The same file, threads and precision in OpenVINO's benchmark_app (`-hint latency`, synchronous) and in a plain loop around ONNX
Runtime's `session.run`. Every figure comes from a process of its own, in blocks of ours, theirs, theirs, ours, so that a machine
that drifts does not decide; ours against ours in the same blocks says how much two processes differ anyway. Agreement: the ratio
is within 3 %, or within twice the half-width of that self-comparison. Ends with 1 where it is not.

  tools/bench_agreement.py -o agreement.json                     three torchvision models with random weights, fp32 and int8
  tools/bench_agreement.py net.onnx --blocks 12 -o mine.json     your own files, each in the precision it has
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from toolkit import bench, profiles  # noqa: E402

MODELS = ("resnet18", "mobilenet_v2", "squeezenet1_1")
TOLERANCE = 0.03
SECONDS = 3
LOOP = """
import sys, time, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
value = session.get_inputs()[0]
feeds = {value.name: np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)}
end, times = time.perf_counter() + 1, []
while time.perf_counter() < end:
    session.run(None, feeds)
end = time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end:
    started = time.perf_counter_ns()
    session.run(None, feeds)
    times.append(time.perf_counter_ns() - started)
print(np.median(times))
"""


def ours(runtime: str, precision: str) -> Callable[[Path], float]:
    import msgspec

    profile = msgspec.structs.replace(profiles.load(f"local-{runtime}"), precision=precision)

    def measure(path: Path) -> float:
        return bench.benchmark(profile, [path], fresh_process=True, retries=0).measurements[0].latency_ns

    return measure


def benchmark_app(path: Path) -> float:
    """Median in ns of OpenVINO's own tool, from its Python package. Beside a hint it takes the threads from a file only."""
    command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"]
    command += ["-m", str(path), "-d", "CPU", "-hint", "latency", "-api", "sync", "-infer_precision", "f32", "-t", str(SECONDS)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        config.write('{"CPU": {"INFERENCE_NUM_THREADS": "1"}}')
        config.flush()
        done = subprocess.run([*command, "-load_config", config.name], capture_output=True, text=True, check=False)
    found = re.search(r"Median:\s+([\d.]+) ms", done.stdout)
    threads = re.search(r"INFERENCE_NUM_THREADS: (\d+)", done.stdout)
    if done.returncode or not found or not threads or threads[1] != "1":
        raise SystemExit(f"benchmark_app gave no median on one thread:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1]) * 1e6


def own_loop(path: Path) -> float:
    """Median in ns of a plain loop around `session.run`."""
    command = [sys.executable, "-c", LOOP, str(path), str(SECONDS)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


PEERS: dict[str, tuple[str, Callable[[Path], float]]] = {
    "openvino": ("benchmark_app", benchmark_app),
    "onnxruntime": ("session.run in a loop", own_loop),
}


def exported(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(name, precision, file) of the default models."""
    from toolkit.run import export

    for name in MODELS:
        target = folder / name
        export(name, "", None, "local-onnxruntime", str(target), "fp32", lambda *_: None)
        yield name, "fp32", target / "model.onnx"
        yield name, "int8", quantized(target / "model.onnx")


def quantized(path: Path) -> Path:
    """The same network as int8 with Q/DQ, ranges from random inputs: the speed is asked for, not the accuracy."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    value = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0]

    class Random(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [np.random.default_rng(seed).standard_normal(value.shape).astype(np.float32) for seed in range(4)]

        def get_next(self) -> dict[str, Any] | None:
            return {value.name: self.left.pop()} if self.left else None

    prepared, out = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(str(path), str(prepared))
    quantize_static(
        str(prepared), str(out), Random(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    return out


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median ratio over blocks."""
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(np.array(ratios)[drawn], axis=1), (0.025, 0.975))
    return float(low), float(high)


def compare(name: str, precision: str, runtime: str, path: Path, blocks: int) -> dict[str, Any]:
    """One file in one runtime."""
    peer_name, peer = PEERS[runtime]
    mine = ours(runtime, precision)
    raw = []
    for _ in track(range(blocks), f"{name} {precision} {runtime}", console=Console(stderr=True)):
        first, theirs, again, second = mine(path), peer(path), peer(path), mine(path)
        raw.append({"ours_ns": [first, second], "theirs_ns": [theirs, again]})
    ratios = [float(np.mean(each["ours_ns"]) / np.mean(each["theirs_ns"])) for each in raw]
    selves = [each["ours_ns"][1] / each["ours_ns"][0] for each in raw]
    ratio, (low, high), own = float(np.median(ratios)), interval(ratios), interval(selves)
    allowed = max(TOLERANCE, own[1] - own[0])  # twice the half-width
    return {
        "model": name, "precision": precision, "runtime": runtime, "peer": peer_name,
        "ours_ns": float(np.median([ns for each in raw for ns in each["ours_ns"]])),
        "theirs_ns": float(np.median([ns for each in raw for ns in each["theirs_ns"]])),
        "ratio": ratio, "ratio_ci95": [low, high], "self_ratio": float(np.median(selves)), "self_ci95": list(own),
        "allowed": allowed, "agrees": abs(ratio - 1) <= allowed, "raw": raw,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    low, high = found["ratio_ci95"]
    word = "agrees" if found["agrees"] else "DIFFERS"
    return (
        f"| {found['model']} | {found['precision']} | {found['runtime']} | {found['ours_ns'] / 1e6:.3f} ms |"
        f" {found['theirs_ns'] / 1e6:.3f} ms | {found['ratio']:.3f} ({low:.3f} to {high:.3f}) |"
        f" {found['self_ci95'][0]:.3f} to {found['self_ci95'][1]:.3f} | +-{found['allowed']:.1%} {word} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="ONNX files; default: three torchvision models")
    parser.add_argument("--blocks", type=int, default=8, help="of ours, theirs, theirs, ours (default 8)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int8"], help="of the files given (default fp32)")
    parser.add_argument("--runtime", action="append", choices=sorted(PEERS), help="default: both")
    parser.add_argument("-o", "--out", type=Path, help="results as JSON; what it already holds is not done again")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    if given.out and given.out.exists():
        results = json.loads(given.out.read_text())["results"]
    done = {(each["model"], each["precision"], each["runtime"]) for each in results}
    with tempfile.TemporaryDirectory() as folder:
        files = [(path.stem, given.precision, path) for path in given.files] or exported(Path(folder))
        for name, precision, path in files:
            for runtime in given.runtime or sorted(PEERS):
                if (name, precision, runtime) in done:
                    continue
                results.append(compare(name, precision, runtime, path, given.blocks))
                if given.out:
                    given.out.write_text(json.dumps({"schema": 1, "seconds": SECONDS, "results": results}, indent=1) + "\n")
    print("| model | precision | runtime | edgekit | its own tool | ratio | edgekit against itself | allowed |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, results)))
    return 0 if all(each["agrees"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
