#!/usr/bin/env python3
"""Accuracy against measured latency, edgekit's methods and other pruners: tools/bench_pruning.py RUN_DIR --shares 0.8,0.6

Takes the model, weights, images and profile of a finished run. At each share of the dense latency every method makes a whole run
of its own (score, allocate, measure, correct), kept under --work. Each peer's pruning ratio is then searched on the *measured*
latency, every network timed interleaved with the dense one, until it is as fast as what `causal` delivered there. Of a peer's
variants and of its finishes (as it is, BatchNorm re-estimated, its own repair) the one with the best evaluation accuracy
counts, which flatters the peer; "with our repair" is told apart. No labels are used for pruning, nothing is fine-tuned by
gradients, and all have the same calibration images.

  tools/bench_pruning.py runs/resnet56 --shares 0.9,0.7,0.5 -o docs/results/pruning.json --plot docs/results/pruning
  tools/bench_pruning.py edgekit-out --shares 0.3 --methods causal --peers l1          one method, one peer
  tools/bench_pruning.py edgekit-out --shares 0.6 --methods causal --seeds 0,1,2 --peers none

Every finished row is written at once; started again with the same -o, what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from peers import PEERS, Build, Case, Network, Shapes, classes_of, open_case, quiet  # noqa: E402

from toolkit import bench, schema  # noqa: E402
from toolkit.budget import parse_budget  # noqa: E402
from toolkit.errors import EdgekitError  # noqa: E402
from toolkit.run import run  # noqa: E402
from toolkit.run.evaluate import judge, predictions  # noqa: E402

METHODS = ("causal", "cswap", "taylor", "l1", "l2", "random")
SHARES = "0.9,0.8,0.7,0.6,0.5,0.4,0.3"
SLACK = 0.02  # a network counts as equally fast from (1 - SLACK) of the target up to the target
GRID, HALVINGS = 1 / 16, 4  # of the pruning ratio: to 1/256


def say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False)


def points(fraction: float) -> float:
    return round(100 * fraction, 2)


# --- edgekit's own runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A whole run at a share of the dense latency, and what its delivered file predicts."""

    report: schema.Report
    classes: np.ndarray[Any, Any]

    @property
    def ratio(self) -> float:
        return 1 / self.report.speedup


def own_run(case: Case, work: Path, method: str, share: float, seed: int) -> Own:
    """The run, made unless it is there."""
    out = work / f"{model_name(case)}-{case.target.profile.runtime}-{method}-{share:g}-{seed}"
    if not (out / "report.json").exists():
        say(f"  {method} at {share:g}x, seed {seed}")
        wanted = {"method": method, "budget": parse_budget(f"{share:g}x"), "seed": seed, "out": str(out)}
        run(msgspec.structs.replace(case.request, **wanted), quiet)
    report = schema.load_json(schema.Report, out / "report.json")
    manifest = schema.load_json(schema.Manifest, out / "manifest.json")
    name = next(a.path for a in manifest.artefacts if a.role == "pruned" and a.format == case.target.profile.format)
    return Own(report, predictions(case.target, out / name, case.images, "edgekit", quiet))


def model_name(case: Case) -> str:
    return Path(case.request.model.rpartition(":")[2]).stem


def own_row(case: Case, work: Path, method: str, share: float, seed: int) -> dict[str, Any]:
    try:
        found = own_run(case, work, method, share, seed)
    except EdgekitError as error:  # a share under the floor
        return {"failed": error.message}
    report = found.report
    low, high = report.speedup_ci95
    return {
        "measured_ratio": round(found.ratio, 5),
        "measured_ratio_ci95": [round(1 / high, 5), round(1 / low, 5)],
        "met": report.verdict == "met",
        "wall_s": round(sum(report.wall_s.values()), 1),
        **accuracy_row(case, "accuracy", found.classes),
    }


def accuracy_row(case: Case, name: str, classes: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Accuracy and what it lost, with the paired 95 % interval over images."""
    found = judge(dense_classes(case), classes, case.labels)
    assert found.dense is not None and found.pruned is not None and found.change_ci95 is not None
    low, high = found.change_ci95
    return {
        name: round(found.pruned, 5),
        f"{name}_loss_points": points(found.dense - found.pruned),
        f"{name}_loss_points_ci95": [points(-high), points(-low)],
    }


_dense: dict[Path, np.ndarray[Any, Any]] = {}


def dense_classes(case: Case) -> np.ndarray[Any, Any]:
    if case.folder not in _dense:
        _dense[case.folder] = predictions(case.target, case.dense_path, case.images, "dense", quiet)
    return _dense[case.folder]


# --- peers at a measured latency ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopwatch:
    """Measures pruned / dense once for each distinct set of shapes."""

    case: Case
    known: dict[Shapes, schema.Comparison] = field(default_factory=dict)

    def __call__(self, network: Network) -> schema.Comparison:
        shapes = network.shapes()
        if shapes not in self.known:
            self.known[shapes] = self.measure(network)
        return self.known[shapes]

    def measure(self, network: Network, fresh: bool = False) -> schema.Comparison:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.onnx"
            network.save(path)
            profile, statistic = self.case.target.profile, self.case.report.statistic
            return bench.compare(profile, self.case.dense_path, path, statistic=statistic, time_limit_s=30.0, fresh_process=fresh)


@dataclass(frozen=True)
class Found:
    """The least pruned network that was measured to be no slower than the target."""

    ratio: float  # pruning ratio
    network: Network
    measured: schema.Comparison


def search(build: Build, stopwatch: Stopwatch, target: float) -> Found | None:
    """The least pruned network whose measured / dense is at most `target`.

    Latency has steps and is not even monotone in the pruning ratio (other widths can take other kernels), so the ratio rises
    from 0 by GRID until a network is fast enough, and is then bisected back until it is within SLACK of the target. Where the
    target lies inside a step, the answer is the network on its fast side. None where no ratio is fast enough.
    """

    def at(ratio: float) -> Found:
        network = build(ratio)
        return Found(ratio, network, stopwatch(network))

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


def peer_row(case: Case, build: Build, stopwatch: Stopwatch, work: Path, share: float, seed: int) -> dict[str, Any]:
    """One variant of a peer at the latency that `causal` delivered there."""
    try:
        own = own_run(case, work, "causal", share, seed)
        found = search(build, stopwatch, own.ratio)
        if found is None:
            return {"failed": "no pruning ratio is fast enough"}
        finishes = found.network.classes()
    except EdgekitError as error:
        return {"failed": error.message}
    except Exception as error:  # the library's own failures are a result
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    row: dict[str, Any] = {
        "pruning_ratio": round(found.ratio, 5),
        "measured_ratio": round(found.measured.ratio, 5),
        "measured_ratio_ci95": [round(bound, 5) for bound in found.measured.ratio_ci95],
        "measurement_valid": found.measured.pruned.valid,
        "within_slack": found.measured.ratio >= (1 - SLACK) * own.ratio,
    }
    for name, classes in finishes.items():
        row |= accuracy_row(case, name, classes)
        change = judge(classes, own.classes, case.labels)
        assert change.change_ci95 is not None
        row[f"causal_minus_{name}_points_ci95"] = [points(bound) for bound in change.change_ci95]
    return row


# --- the file -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """Rows as JSON; a row that is there is not made again."""

    path: Path | None
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path | None) -> Document:
        there = json.loads(path.read_text()) if path and path.exists() else {"schema": schema.SCHEMA, "rows": []}
        return cls(path, there)

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def has(self, key: Mapping[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        self.rows.append({**key, **row})
        say("    " + json.dumps({**key, **row}))
        if self.path:
            schema.write_text(self.path, json.dumps(self.content, indent=1) + "\n")


FINISHES = ("raw", "batchnorm", "finetuned")


def best_of(rows: list[dict[str, Any]], finishes: tuple[str, ...]) -> tuple[dict[str, Any], str] | None:
    """The row and finish of best accuracy; of edgekit's own runs, which have one finish, the first seed's."""
    every = [(row, finish) for row in rows for finish in finishes if finish in row]
    return next(iter(every), None) if finishes == ("accuracy",) else max(every, key=lambda pair: pair[0][pair[1]], default=None)


def table(rows: list[dict[str, Any]]) -> Table:
    """The most accurate variant of each peer, and edgekit's methods, by model and share."""
    shown = Table("model", "asked", "pruner", "variant", "x dense", "top-1", "loss, points", "95 %")
    keys = sorted({(row["model"], row["runtime"], row["share"]) for row in rows}, key=lambda k: (k[0], k[1], -k[2]))
    for model, runtime, share in keys:
        here = [r for r in rows if (r["model"], r["runtime"], r["share"]) == (model, runtime, share) and "failed" not in r]
        for pruner in dict.fromkeys(r["pruner"] for r in here):
            own = [r for r in here if r["pruner"] == pruner]
            for finishes, mark in ((("accuracy",), ""), (FINISHES, ""), (("repaired",), " + our repair")):
                if pick := best_of(own, finishes):
                    row, finish = pick
                    low, high = row[f"{finish}_loss_points_ci95"]
                    variant = row["variant"] if finish == "accuracy" else f"{row['variant']}, {finish}"
                    shown.add_row(
                        model, f"{share:g}x", pruner + mark, variant, f"{row['measured_ratio']:.3f}", f"{row[finish]:.1%}",
                        f"{row[f'{finish}_loss_points']:.2f}", f"{low:.2f} to {high:.2f}",
                    )  # fmt: skip
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over measured latency, a panel for each model."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys((row["model"], row["runtime"]) for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        here = [r for r in rows if (r["model"], r["runtime"]) == model and "failed" not in r]
        for pruner in dict.fromkeys(r["pruner"] for r in here):
            for finishes, mark in ((("accuracy",), ""), (FINISHES, ""), (("repaired",), " + our repair")):
                best = [
                    best_of([r for r in here if r["pruner"] == pruner and r["share"] == share], finishes)
                    for share in sorted({r["share"] for r in here})
                ]
                dots = [(p[0]["measured_ratio"], 100 * p[0][p[1]]) for p in best if p]
                if dots:
                    axis.plot(*zip(*dots, strict=True), marker="o", label=pruner + mark)
        axis.set(title=" in ".join(model), xlabel="measured latency, x dense", ylabel="top-1, %")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--shares", default=SHARES, help=f"of the dense latency (default {SHARES})")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"edgekit's (default {','.join(METHODS)})")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"other pruners, or none (default {','.join(PEERS)})")
    parser.add_argument("--seeds", default="0", help="of edgekit's runs; peers are held against the first (default 0)")
    parser.add_argument("--round-to", default="1", help="widths of peers are multiples of this; several are tried: 1,8,16")
    parser.add_argument("--work", type=Path, default=Path("bench-pruning"), help="where runs are kept (default bench-pruning)")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; what it already holds is not done again")
    given = parser.parse_args()
    peers = [] if given.peers == "none" else given.peers.split(",")
    for name, known in [*((peer, PEERS) for peer in peers), *((method, METHODS) for method in given.methods.split(","))]:
        if name not in known:
            parser.error(f"no pruner {name}; there are {', '.join((*METHODS, *PEERS))}")
    document = Document.open(given.output)
    try:
        case = open_case(given.run)
        same = {"model": model_name(case), "runtime": case.target.profile.runtime}
        document.content.setdefault("versions", {}).update(versions(case, peers))
        document.content.setdefault("models", {})[same["model"]] = {
            "accuracy_dense": float((dense_classes(case) == case.labels).mean()),
            "accuracy_dense_torch": float((classes_of(case.dense, case.evaluation) == case.labels).mean()),
            "evaluation_images": len(case.evaluation),
            "calibration_images": len(case.images.calibration),
        }
        seeds = [int(seed) for seed in given.seeds.split(",")]
        for share in map(float, given.shares.split(",")):
            say(f"{same['model']} at {share:g}x of dense:")
            for method in given.methods.split(","):
                for seed in seeds:
                    key = same | {"share": share, "pruner": method, "variant": f"seed {seed}"}
                    if not document.has(key):
                        document.add(key, own_row(case, given.work, method, share, seed))
            stopwatch = Stopwatch(case)
            for peer in peers:
                for round_to in map(int, given.round_to.split(",")):
                    for variant, build in PEERS[peer](case, round_to):
                        key = same | {"share": share, "pruner": peer, "variant": variant}
                        if not document.has(key):
                            document.add(key, peer_row(case, build, stopwatch, given.work, share, seeds[0]))
    except EdgekitError as error:
        say(str(error))
        sys.exit(error.exit_code)
    Console().print(table(document.rows))
    if given.plot:
        plot(document.rows, given.plot)


def versions(case: Case, peers: list[str]) -> dict[str, str]:
    names = ("torch", "onnxruntime", "openvino")
    own = {name: case.report.environment[name] for name in names if name in case.report.environment}
    return own | {peer: metadata.version(peer) for peer in peers if peer != "l1"}


if __name__ == "__main__":
    main()
