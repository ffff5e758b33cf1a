#!/usr/bin/env python3
"""What plain pruning loses at the latency that an edgekit run delivered: python tools/bench_baselines.py RUN_DIR

The peer prunes every channel group by one ratio, with weights left as they are and BatchNorm statistics re-estimated on the run's
calibration images. The ratio is searched on the *measured* latency, each network timed interleaved with the run's dense one.
Where a peer has several variants, all are measured and the one with the best evaluation accuracy counts, which flatters the peer.

  l1             channels ranked by the L1 norm of their producers' weights, one ratio for all groups
  torch-pruning  the library (in the `dev` extra), its own dependency graph and criteria on the eager model

--scan 0.5,0.3 measures the peer alone at these shares of the dense latency.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration  # noqa: E402
from toolkit import bench, schema  # noqa: E402
from toolkit.errors import EdgekitError, ModelError, UsageError  # noqa: E402
from toolkit.export import save_onnx, to_onnx  # noqa: E402
from toolkit.graph import Program, apply, trace  # noqa: E402
from toolkit.graph.program import BATCH_NORMS  # noqa: E402
from toolkit.prune.engine import Engine  # noqa: E402
from toolkit.prune.responses import magnitude_order  # noqa: E402
from toolkit.run.evaluate import judge, predictions  # noqa: E402
from toolkit.run.prepare import Images, Target, Traced, load_and_trace, load_images, open_target  # noqa: E402

SLACK = 0.02  # a network counts as equally fast from (1 - SLACK) of the target up to the target
GRID, HALVINGS = 1 / 16, 4  # of the pruning ratio: to 1/256
BATCH = 64
RANKED = ("l1", "lamp", "taylor")  # criteria also tried with one ranking over the whole network
LOSS = 0.10  # the scan says at which budget the peer first loses this much

Build = Callable[[float], Program]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Case:
    """A finished run: what it was asked, what it reported, and the same network and images again."""

    folder: Path
    request: schema.RunRequest
    report: schema.Report
    target: Target
    traced: Traced
    images: Images
    evaluation: torch.Tensor

    @property
    def dense(self) -> Program:
        return self.traced.program

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        labels = self.images.labels
        assert labels is not None
        return labels


def open_case(folder: Path) -> Case:
    request = schema.load_json(schema.RunRequest, folder / "request.json")
    report = schema.load_json(schema.Report, folder / "report.json")
    target = open_target(request.profile, request.threads, request.precision)
    traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
    images = load_images(request, traced.preprocess, traced.classes, lambda *_: None)
    if images.labels is None:
        raise UsageError(f"{folder} was evaluated on images without labels.", "Take a run whose --eval-data has labels.")
    evaluation = torch.from_numpy(calibration.load_batch(images.evaluation, images.indices, images.transform))
    return Case(folder, request, report, target, traced, images, evaluation)


# --- peers: a pruned program for a pruning ratio --------------------------------------------------------------------------


def l1_variants(case: Case, round_to: int) -> Iterator[tuple[str, Build]]:
    """One ratio for all prunable groups, or for those inside the residual branches only."""
    dense, params = case.dense, Engine.of(case.dense).params
    order = {g.name: magnitude_order(dense, g.name, params, 1) for g in dense.prunable}

    def build(ratio: float, names: tuple[str, ...]) -> Program:
        kept = {}
        for name in names:
            width = len(order[name])
            left = min(width, round_to * max(1, round(width * (1 - ratio) / round_to)))
            kept[name] = sorted(order[name][width - left :])
        return apply(dense, kept)

    every = tuple(order)
    inner = tuple(g.name for g in dense.prunable if g.kind != "residual")
    for scope, names in (("all groups", every), ("inner groups", inner)):
        if names and (names != every or scope == "all groups"):
            yield f"l1, {scope}{multiples(round_to)}", lambda ratio, names=names: build(ratio, names)


def torch_pruning_variants(case: Case, round_to: int) -> Iterator[tuple[str, Build]]:
    """The library's criteria, one ratio a layer and one ranking over the network, with and without the residual streams."""
    import torch_pruning as tp

    eager = case.traced.loaded.module
    if isinstance(eager, torch.fx.GraphModule):
        raise ModelError("Torch-Pruning needs the model's own classes, not an exported program.", "Use --peer l1.")
    importance = tp.importance
    criteria: Mapping[str, Callable[[], Any]] = {
        "l1": lambda: importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: importance.GroupMagnitudeImportance(p=2),
        "lamp": lambda: importance.LAMPImportance(),
        "bn scale": lambda: importance.BNScaleImportance(),
        "taylor": lambda: importance.GroupTaylorImportance(),
        "random": lambda: importance.RandomImportance(),
    }
    example = case.dense.example[:1]
    layers = {name: m for name, m in eager.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    outputs = [name for name, m in layers.items() if isinstance(m, torch.nn.Linear) and m.out_features == case.traced.classes]
    streams = [
        place.parameter.removesuffix(".weight")
        for g in case.dense.groups
        if g.kind == "residual"
        for place in g.places
        if place.axis == 0 and place.parameter.removesuffix(".weight") in layers
    ]

    def build(ratio: float, criterion: str, ignored: list[str], ranked: bool) -> Program:
        model = copy.deepcopy(eager).eval()
        torch.manual_seed(case.request.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                example,
                importance=criteria[criterion](),
                pruning_ratio=ratio,
                global_pruning=ranked,
                max_pruning_ratio=0.95 if ranked else 1.0,
                ignored_layers=[model.get_submodule(name) for name in ignored],
                round_to=round_to if round_to > 1 else None,
            )
            if criterion == "taylor":
                pseudo_gradients(model, torch.from_numpy(case.images.calibration))
            pruner.step()
        return trace(model, example)

    scopes = {"all groups": outputs, "inner groups": outputs + streams}
    for criterion in criteria:
        for scope, ignored in scopes.items():
            name = f"{criterion}, one ratio, {scope}{multiples(round_to)}"
            yield name, lambda r, c=criterion, i=ignored: build(r, c, i, False)
        if criterion in RANKED:
            name = f"{criterion}, one ranking, all groups{multiples(round_to)}"
            yield name, lambda r, c=criterion: build(r, c, outputs, True)


def pseudo_gradients(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Gradients of the cross-entropy to the model's own predictions: Taylor scores, without labels as the run had none."""
    model.zero_grad()
    for batch in images.split(BATCH):
        logits = model(batch)
        torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").div(len(images)).backward()


def multiples(round_to: int) -> str:
    return f", multiples of {round_to}" if round_to > 1 else ""


PEERS = {"l1": l1_variants, "torch-pruning": torch_pruning_variants}


# --- what a pruned network is worth ---------------------------------------------------------------------------------------


def reestimated(program: Program, images: torch.Tensor) -> Program:
    """The program with BatchNorm statistics of these images: a forward pass in training mode with a cumulative average.

    Each batch is normalised by its own mean and variance, and the running ones become the plain average over batches, the
    variance unbiased (what `momentum=None` does in PyTorch).
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(node: torch.fx.Node, args: tuple[Any, ...]) -> tuple[object, ...]:
        if node.target not in BATCH_NORMS:
            return args
        x = args[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        count = x.numel() // x.shape[1]
        seen[str(node.args[3].target)].append(mean)  # type: ignore[union-attr]
        seen[str(node.args[4].target)].append(variance * count / (count - 1))  # type: ignore[union-attr]
        return (*args[:3], mean, variance, *args[5:])

    engine = Engine.of(program)
    with torch.no_grad():
        for batch in images.split(program.batch or BATCH):
            engine.run(batch, hook=hook)
    module = copy.deepcopy(program.module)
    module.load_state_dict({name: torch.stack(values).mean(0) for name, values in seen.items()}, strict=False)
    return replace(program, module=module)


def classes_of(program: Program, images: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return torch.cat([program.module(batch).argmax(1) for batch in images.split(program.batch or BATCH)]).numpy()


Widths = tuple[tuple[str, tuple[int, ...]], ...]


def widths_of(program: Program) -> Widths:
    """The shapes of all parameters: networks that agree in them take the same time."""
    return tuple((name, tuple(value.shape)) for name, value in program.module.state_dict().items())


@dataclass(frozen=True)
class Stopwatch:
    """Measures pruned / dense once for each distinct set of shapes."""

    case: Case
    known: dict[Widths, schema.Comparison] = field(default_factory=dict)

    def __call__(self, program: Program) -> schema.Comparison:
        shapes = widths_of(program)
        if shapes not in self.known:
            self.known[shapes] = self.measure(program)
        return self.known[shapes]

    def measure(self, program: Program, fresh: bool = False) -> schema.Comparison:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.onnx"
            save_onnx(to_onnx(program), path, {})
            dense, profile, statistic = self.case.folder / "dense.onnx", self.case.target.profile, self.case.report.statistic
            return bench.compare(profile, dense, path, statistic=statistic, time_limit_s=30.0, fresh_process=fresh)


@dataclass(frozen=True)
class Found:
    """The least pruned network that was measured to be no slower than the target."""

    ratio: float  # pruning ratio
    program: Program
    measured: schema.Comparison


def search(build: Build, stopwatch: Stopwatch, target: float) -> Found | None:
    """The least pruned network whose measured / dense is at most `target`.

    Latency has steps and is not even monotone in the pruning ratio (other widths can take other kernels), so the ratio rises
    from 0 by GRID until a network is fast enough, and is then bisected back until it is within SLACK of the target. Where the
    target lies inside a step, the answer is the network on its fast side. None where no ratio is fast enough.
    """

    def at(ratio: float) -> Found:
        program = build(ratio)
        found = Found(ratio, program, stopwatch(program))
        valid = "" if found.measured.pruned.valid else "  (not valid)"
        say(f"    ratio {ratio:.4f}: {found.measured.ratio:.3f}x dense{valid}")
        return found

    rising = (at(i * GRID) for i in range(1, round(1 / GRID)))
    best = next((found for found in rising if found.measured.ratio <= target), None)
    if best is None:
        return None
    low = best.ratio - GRID
    for _ in range(HALVINGS):
        if best.measured.ratio >= (1 - SLACK) * target:
            break
        found = at((low + best.ratio) / 2)
        if found.measured.ratio <= target:
            best = found
        else:
            low = found.ratio
    return best


def points(fraction: float) -> float:
    return round(100 * fraction, 2)


def evaluate(case: Case, name: str, build: Build, stopwatch: Stopwatch, target: float) -> dict[str, Any]:
    """One variant at one target, as it goes into the file; `predictions` is taken out again before that."""
    try:
        found = search(build, stopwatch, target)
    except EdgekitError as error:
        return {"variant": name, "failed": error.message}
    except Exception as error:  # the library's own failures are a result
        return {"variant": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    if found is None:
        return {"variant": name, "failed": "no pruning ratio is fast enough"}
    again = reestimated(found.program, torch.from_numpy(case.images.calibration))
    raw, after = classes_of(found.program, case.evaluation), classes_of(again, case.evaluation)
    accuracy = float((after == case.labels).mean())
    say(f"  {name}: ratio {found.ratio:.3f}, {found.measured.ratio:.3f}x, accuracy {accuracy:.4f}")
    return {
        "variant": name,
        "pruning_ratio": round(found.ratio, 5),
        "measured_ratio": round(found.measured.ratio, 5),
        "measured_ratio_ci95": [round(bound, 5) for bound in found.measured.ratio_ci95],
        "measurement_valid": found.measured.pruned.valid,
        "within_slack": found.measured.ratio >= (1 - SLACK) * target,
        "parameters": found.program.parameter_count(),
        "macs": found.program.macs(),
        "accuracy_raw": float((raw == case.labels).mean()),
        "accuracy_batchnorm": accuracy,
        "loss_points": points(case.report.accuracy_dense - accuracy) if case.report.accuracy_dense is not None else None,
        "found": found,
        "predictions": after,
    }


def at_target(case: Case, variants: Mapping[str, Build], stopwatch: Stopwatch, target: float) -> dict[str, Any]:
    """All variants at one share of the dense latency, and the most accurate of them measured again in a fresh process."""
    say(f"at {target:.3f} of dense:")
    results = [evaluate(case, name, build, stopwatch, target) for name, build in variants.items()]
    best = max((r for r in results if "failed" not in r), key=lambda r: r["accuracy_batchnorm"], default=None)
    if best is not None:
        confirmed = stopwatch.measure(best["found"].program, fresh=True)
        best["confirmed_ratio"] = round(confirmed.ratio, 5)
        best["confirmed_ratio_ci95"] = [round(bound, 5) for bound in confirmed.ratio_ci95]
        best["confirmation_valid"] = confirmed.pruned.valid
    return {"target_ratio": round(target, 5), "best": best, "variants": results}


# --- the answer -----------------------------------------------------------------------------------------------------------


def against_run(case: Case, best: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of edgekit's file minus the peer's, in points, paired by image."""
    name = next(a.path for a in manifest(case).artefacts if a.role == "pruned" and a.format == case.target.profile.format)
    own = predictions(case.target, case.folder / name, case.images, "edgekit", lambda *_: None)
    change = judge(best["predictions"], own, case.labels)
    assert change.dense is not None and change.pruned is not None and change.change_ci95 is not None
    return {
        "edgekit_accuracy": change.pruned,
        "peer_accuracy": change.dense,
        "edgekit_minus_peer_points": points(change.pruned - change.dense),
        "edgekit_minus_peer_points_ci95": [points(bound) for bound in change.change_ci95],
    }


def manifest(case: Case) -> schema.Manifest:
    return schema.load_json(schema.Manifest, case.folder / "manifest.json")


def results(case: Case, peer: str, rounding: list[int], scan: list[float]) -> dict[str, Any]:
    report = case.report
    variants = dict(variant for round_to in rounding for variant in PEERS[peer](case, round_to))
    stopwatch = Stopwatch(case)
    targets = scan or [report.measured_ns / report.dense_ns]
    found = [at_target(case, variants, stopwatch, target) for target in targets]
    versions = {name: report.environment[name] for name in ("torch", "onnxruntime", "openvino") if name in report.environment}
    document: dict[str, Any] = {
        "schema": schema.SCHEMA,
        "model": Path(case.request.model.rpartition(":")[2]).stem,
        "profile": report.profile,
        "device": report.environment.get("device", ""),
        "versions": versions | ({"torch-pruning": metadata.version("torch-pruning")} if peer == "torch-pruning" else {}),
        "peer": peer,
        "round_to": rounding,
        "fine_tuning": False,
        "statistic": report.statistic,
        "evaluation_images": len(case.evaluation),
        "calibration_images": len(case.images.calibration),
        "accuracy_dense": report.accuracy_dense,
        "accuracy_dense_torch": float((classes_of(case.dense, case.evaluation) == case.labels).mean()),
    }
    if scan:
        losing = [f["target_ratio"] for f in found if f["best"] and f["best"]["loss_points"] >= points(LOSS)]
        document |= {"largest_scanned_ratio_losing_10_points": max(losing, default=None)}
    else:
        document["edgekit"] = {
            "budget": report.budget,
            "measured_ratio": round(1 / report.speedup, 5),
            "measured_ratio_ci95": [round(1 / bound, 5) for bound in reversed(report.speedup_ci95)],
            "accuracy": report.accuracy_pruned,
            "loss_points": points(report.accuracy_dense - report.accuracy_pruned)
            if report.accuracy_dense is not None and report.accuracy_pruned is not None
            else None,
        }
        if found[0]["best"]:
            document["difference"] = against_run(case, found[0]["best"])
    for entry in found:
        for result in entry["variants"]:
            result.pop("found", None), result.pop("predictions", None)
        entry["best"] = entry["best"] and entry["best"]["variant"]
    return document | {"points": found}


def table(document: Mapping[str, Any]) -> str:
    """The figures as text, the best variant of each target marked."""
    rows = [f"{document['model']}, dense {document['accuracy_dense']:.2%}, {document['evaluation_images']} images"]
    rows.append(f"{'':2}{'network':40}{'x dense':>9}{'raw':>9}{'BN':>9}{'loss':>8}")
    if "edgekit" in document:
        own = document["edgekit"]
        rows.append(
            f"  {'edgekit ' + own['budget']:40}{own['measured_ratio']:9.3f}{'':9}{own['accuracy']:9.2%}{own['loss_points']:8.2f}"
        )
    for entry in document["points"]:
        for r in entry["variants"]:
            mark = "* " if r["variant"] == entry["best"] else "  "
            if "failed" in r:
                rows.append(f"{mark}{r['variant']:40}  {entry['target_ratio']:.3f}: {r['failed']}")
                continue
            rows.append(
                f"{mark}{r['variant']:40}{r['measured_ratio']:9.3f}{r['accuracy_raw']:9.2%}"
                f"{r['accuracy_batchnorm']:9.2%}{r['loss_points']:8.2f}"
            )
    if "difference" in document:
        d = document["difference"]
        low, high = d["edgekit_minus_peer_points_ci95"]
        rows.append(f"edgekit - {document['peer']}: {d['edgekit_minus_peer_points']:+.2f} points [{low:+.2f}, {high:+.2f}]")
    elif "largest_scanned_ratio_losing_10_points" in document:
        rows.append(f"loses 10 points or more from {document['largest_scanned_ratio_losing_10_points']} x dense on")
    return "\n".join(rows)


def whole(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--peer", choices=sorted(PEERS), default="l1")
    parser.add_argument("--round-to", type=whole, default=[1], help="widths are multiples of this; several are tried: 1,8,16")
    parser.add_argument("--scan", type=shares, default=[], help="shares of the dense latency, e.g. 0.5,0.4,0.3")
    parser.add_argument("-o", "--out", type=Path, help="where the JSON goes, default docs/results/baseline_MODEL_PEER.json")
    options = parser.parse_args()
    try:
        document = results(open_case(options.run), options.peer, options.round_to, options.scan)
    except EdgekitError as error:
        say(str(error))
        sys.exit(error.exit_code)
    kind = options.peer.replace("-", "_") + ("_scan" if options.scan else "")
    out = options.out or ROOT / "docs" / "results" / f"baseline_{document['model']}_{kind}.json"
    schema.write_text(out, json.dumps(document, indent=1) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
