#!/usr/bin/env python3
"""What CRESPR's clusters are worth: tools/bench_modules.py MODEL --data IMAGES --eval-data IMAGES -o docs/results/modules.json

  tools/bench_modules.py net.py:resnet20 --weights w.safetensors --data train.npz --eval-data test.npz --input 1x3x32x32 \
      --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --density 0.1 -p local-onnxruntime -p local-openvino -o modules.json

Every operator that can be is made of so many modules that the density of these operators is nearest to the one asked for (1/2,
1/4, 1/8, 1/16 can be deployed; the record says which it became). Compared at that density, with PyTorch on the evaluation images:
joint clusters, random clusters (a row a seed, the same repair), and connections kept by magnitude wherever they are, as they are
and solved again by least squares operator by operator. The grouped form is held against the masked one in float64, and timed
beside the dense network, interleaved, in every runtime given. Started again with the same -o, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration  # noqa: E402
from toolkit import bench, profiles  # noqa: E402
from toolkit.budget import parse_budget  # noqa: E402
from toolkit.export import save_onnx, to_onnx  # noqa: E402
from toolkit.graph import Program  # noqa: E402
from toolkit.graph.modular import masked, modular_operators  # noqa: E402
from toolkit.graph.program import operand  # noqa: E402
from toolkit.prune.consumers import consumer, matrix  # noqa: E402
from toolkit.prune.engine import Engine, cache  # noqa: E402
from toolkit.prune.modules import Coupling, dense_modules, magnitudes, modular_cut, restricted, sparse_between  # noqa: E402
from toolkit.prune.order import ridge_for  # noqa: E402
from toolkit.prune.positions import position_importance  # noqa: E402
from toolkit.prune.pruner import CACHE_BYTES, Cut, State  # noqa: E402
from toolkit.prune.repair import outputs, with_parameters  # noqa: E402
from toolkit.prune.responses import LARGEST_GRAM, gram, overrides  # noqa: E402
from toolkit.run.prepare import Images, load_and_trace, load_images  # noqa: E402
from toolkit.schema import Crespr, Preprocess, RunRequest  # noqa: E402

COUNTS = (2, 4, 8, 16)
COUPLING: Coupling = Crespr().coupling  # as a run has it


def quiet(step: str, done: float, total: float) -> None:
    pass


def top1(program: Program, images: Images) -> float:
    """Share of the evaluation images that are classified right."""
    engine, right = Engine.of(program), 0
    labels = images.labels
    assert labels is not None
    at = 0
    for batch in calibration.iterate(images.evaluation, images.indices, images.transform, 250):
        found = outputs(engine, torch.from_numpy(batch)).argmax(1).numpy()
        right += int((found == labels[at : at + len(found)]).sum())
        at += len(found)
    return right / at


def in_clusters(
    program: Program, images: Images, count: int, names: list[str], how: Any, seed: int, repair: bool
) -> Cut:  # fmt: skip
    return modular_cut(
        program, Cut(State(program), 0.0, None), count, names, images.calibration, coupling=COUPLING, how=how,
        repair_=repair, seed=seed, progress=quiet,
    )  # fmt: skip


def by_magnitude(program: Program, images: Images, names: list[str], density: float) -> tuple[Program, Program]:
    """(the largest connections of these operators as they are, the same solved again on the dense network's activations)."""
    engine = Engine.of(program)
    factors, stays = {}, {}
    for name in names:
        weight = operand(program.nodes[name], 1)
        strength = magnitudes(engine.params[str(weight.target)])
        stays[name] = sparse_between(strength, np.zeros(strength.shape, bool), density)
        shape = (*strength.shape, *[1] * (len(program.shapes[weight.name]) - 2))
        factors[str(weight.target)] = torch.from_numpy(stays[name]).reshape(shape)
    raw = masked(program, factors)
    fit = cache(engine, torch.from_numpy(images.calibration), CACHE_BYTES)
    positions, changed = position_importance(engine, fit.images), {}
    for name in names:
        c = consumer(program, program.nodes[name])
        if c is None or c.columns > LARGEST_GRAM:
            continue
        moments = gram(fit, c, positions)
        old = matrix(engine.params[c.weight])
        weight = restricted(old, moments.matrix, stays[name], c.kernel, ridge_for(c.columns, moments.rows))
        changed |= overrides(c, {**engine.params, **changed}, moments, weight)
    return raw, with_parameters(raw, changed)


def timed(program: Program, modular: Program, profile_id: str) -> dict[str, Any]:
    """The grouped form beside the dense network in one session."""
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / "dense.onnx", Path(place) / "modular.onnx"]
        for each, path in zip((program, modular), paths, strict=True):
            save_onnx(to_onnx(each, 1), path, {})
        found = bench.benchmark(profiles.load(profile_id), paths)
    dense, grouped = found.measurements
    low, high = found.ratios[0].ci95
    return {
        "profile": profile_id,
        "dense_ns": dense.latency_ns,
        "grouped_ns": grouped.latency_ns,
        "speedup": 1 / found.ratios[0].value,
        "speedup_ci95": [1 / high, 1 / low],
        "valid": dense.valid and grouped.valid,
        "invalid_reasons": [*dense.invalid_reasons, *grouped.invalid_reasons],
    }


def main() -> int:
    given = parse()
    numbers = {key: tuple(float(n) for n in getattr(given, key).split(",")) for key in ("mean", "std")}
    preprocess = Preprocess(input=tuple(int(n) for n in given.input.split("x")), mean=numbers["mean"], std=numbers["std"])  # type: ignore[arg-type]
    request = RunRequest(
        model=given.model, weights=given.weights, data=given.data, eval_data=given.eval_data, out="", samples=given.samples,
        budget=parse_budget("none"), preprocess=preprocess,
    )  # fmt: skip
    traced = load_and_trace(given.model, given.weights, preprocess, 0)
    images, program = load_images(request, traced.preprocess, traced.classes, quiet), traced.program
    clusterings = {
        k: found for k in COUNTS if (found := dense_modules(program, images.calibration[:8], k, "weights", "random", 0))
    }
    if not clusterings:
        print("No operator of this model can be made of modules.", file=sys.stderr)
        return 1
    count = min(clusterings, key=lambda k: abs(1 / k - given.density))
    names = modular_operators(program, clusterings[count], count)[0]
    record: dict[str, Any] = {
        "schema": 1, "model": given.model.rpartition("/")[2], "coupling": COUPLING,
        "modules": count, "density": 1 / count, "density_asked_for": given.density,
        "operators": names, "calibration_images": len(images.calibration), "evaluation_images": len(images.indices),
        "accuracy_dense": top1(program, images), "rows": [], "speed": [],
    }  # fmt: skip

    if given.output.exists():
        before = json.loads(given.output.read_text())
        if all(before.get(key) == record[key] for key in record if key not in ("rows", "speed")):
            record |= {key: before[key] for key in ("rows", "speed")}

    def save() -> None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=1) + "\n")

    def known(what: str, seed: int | None = None) -> bool:
        return any((each["what"], each["seed"]) == (what, seed) for each in record["rows"])

    def row(what: str, seed: int | None, accuracy: float, **more: Any) -> None:
        record["rows"].append({"what": what, "seed": seed, "accuracy": accuracy, **more})
        save()
        print(f"{what} {'' if seed is None else seed}: {accuracy:.4f}", file=sys.stderr, flush=True)

    for how in ("spectral", "random"):
        for seed in range(given.seeds):
            if known(f"{how} clusters", seed):
                continue
            started = time.monotonic()
            done = in_clusters(program, images, count, names, how, seed, True)
            assert done.form is not None and done.repaired is not None
            told = {
                "distortion": done.repaired.after,
                "float64_error": done.proof,
                "wall_s": round(time.monotonic() - started, 1),
            }
            row(f"{how} clusters", seed, top1(done.state.program, images), **told)
    whats = [f"magnitude, anywhere, {how}" for how in ("as it is", "solved again")]
    if not all(known(what) for what in whats):
        for what, found in zip(whats, by_magnitude(program, images, names, 1 / count), strict=True):
            if not known(what):
                row(what, None, top1(found, images))
    timed_already = {each["profile"] for each in record["speed"]}
    if wanted := [each for each in given.profiles or [] if each not in timed_already]:
        modular = in_clusters(program, images, count, names, "spectral", 0, False).state.program
        for profile_id in wanted:
            record["speed"].append(timed(program, modular, profile_id))
            save()
            print(f"{profile_id}: {record['speed'][-1]['speedup']:.2f}x", file=sys.stderr, flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--input", default="1x3x224x224")
    parser.add_argument("--mean", default="0.485,0.456,0.406")
    parser.add_argument("--std", default="0.229,0.224,0.225")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-p", dest="profiles", action="append", help="runtime to time in; repeatable")
    parser.add_argument("-o", dest="output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
