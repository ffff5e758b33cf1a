#!/usr/bin/env python3
"""How right latency tables are on networks they never saw: tools/bench_tables.py -o docs/results/tables.json --plot tables.png

For each model and runtime: a fresh table is measured and its cost counted; then random networks (a global scale from 0.3 to 1.0
with jitter by group, half of them on the planner's candidates, half at any width) and plans that the allocator chose for random
losses and budgets, before and after refinement. Each is measured twice beside the dense network (dense, pruned, pruned, dense
...), before the table and after it, so that the difference of the two says what a latency measured then is worth now; predicted
and measured are both taken relative to dense, as budgets are. Beside the table: (a) every kernel measured alone at exactly the
widths needed, (b) latency in proportion to multiply-accumulates, (c) a line through three networks over multiply-accumulates.

  tools/bench_tables.py resnet18 --runtime onnxruntime -o mine.json     one model
  tools/bench_tables.py models.py:deit_tiny --seed 7                    your own model and other networks
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from toolkit import backends  # noqa: E402
from toolkit.backends import random_feeds  # noqa: E402
from toolkit.bench.timing import Visit, time_burst, visit  # noqa: E402
from toolkit.latency import ModelTable  # noqa: E402
from toolkit.latency.measure import AROUND_S  # noqa: E402
from toolkit.prune.allocate import allocate  # noqa: E402
from toolkit.run import prepare  # noqa: E402
from toolkit.schema import Preprocess  # noqa: E402

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_32")
ROUNDS = 10
VARIANTS = 40
BUDGETS = (0.4, 0.9)
JITTER = 0.2

Widths = dict[str, int]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def steps(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a bar on stderr."""
    return track(items, what, console=Console(stderr=True))


class Bench:
    """One model in one runtime."""

    def __init__(self, model: str, runtime: str, size: int, seed: int, folder: Path) -> None:
        self.model, self.runtime, self.folder = model, runtime, folder
        self.rng = np.random.default_rng(seed)
        self.target = prepare.open_target(f"local-{runtime}", 1, "fp32")
        self.backend = backends.get(runtime)
        pre = Preprocess(input=(1, 3, size, size), resize=0, crop=0, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.program = prepare.load_and_trace(model, "", pre, seed).program
        self.candidates, _ = prepare.allocatable(self.program)
        self.dense = {group.name: group.width for group in self.program.groups}
        note(f"{model} in {runtime}: width variants")
        self.maker = prepare.variant_maker(self.program, self.candidates, seed, lambda *_: None)
        self.dense_s = float(np.median(time_burst(self.open(self.dense).call, 9))) / 1e9
        self.table = ModelTable(
            self.target.profile, self.target.fingerprint, self.target.device, self.maker, self.candidates, folder / "table", seed
        )

    def measure_table(self) -> dict[str, Any]:
        """Measure the table; what that cost."""
        began = time.monotonic()
        for widths in self.random_widths(VARIANTS):
            self.maker.write(widths, self.folder, "variant.onnx")
        variants_per_s = VARIANTS / (time.monotonic() - began)
        seconds = prepare.measuring_seconds(self.dense_s * 1e9)
        told = seconds + AROUND_S
        extra = prepare.dropped_networks(self.program, self.candidates, self.folder, 0)
        started = time.monotonic()
        clock = Console(stderr=True)
        clock.print(f"  measuring the table, about {told:.0f} s")
        model = self.table.measure(seconds=seconds, extra=extra)
        spent = time.monotonic() - started
        return {
            "variants_per_s": round(variants_per_s, 1),
            "told_s": told, "spent_s": round(spent, 1), "dense_ms": round(self.dense_s * 1e3, 3),
            "dense_inferences": round(spent / self.dense_s), "rows": model.rows, "coverage": model.coverage,
            "held_out_mape": model.held_out.mape, "evidence": [evidence_of(found) for found in model.evidence],
        }  # fmt: skip

    def random_widths(self, count: int) -> list[Widths]:
        """Networks scaled as a whole, with jitter; every other one on the candidates."""
        found = []
        for index in range(count):
            scale, widths = self.rng.uniform(0.3, 1.0), dict(self.dense)
            for name, options in self.candidates.items():
                positive = [width for width in options if width]
                wanted = self.dense[name] * scale * math.exp(self.rng.normal(0, JITTER))
                nearest = min(positive, key=lambda width: abs(width - wanted))
                widths[name] = nearest if index % 2 else int(np.clip(round(wanted), positive[0], positive[-1]))
            found.append(widths)
        return found

    def plan(self) -> Widths:
        """What the allocator makes of random losses and a random budget, with the table as it is."""
        losses = {}
        for name, options in self.candidates.items():
            weight = math.exp(self.rng.normal(0, 1))
            losses[name] = {width: weight * (1 - width / self.dense[name]) ** 2 for width in options if width}
        positive = {name: [width for width in options if width] for name, options in self.candidates.items()}
        budget = self.rng.uniform(*BUDGETS) * self.table.model.predict(self.dense)
        model = self.table.model
        found = allocate(self.program.groups, positive, losses, model.costs(), model.overhead_ns, budget, time_limit_s=8.0)
        return found.widths

    def open(self, widths: Widths, name: str = "net") -> Visit:
        path = self.maker.write(widths, self.folder, f"{name}.onnx")
        session = self.backend.open(path, threads=1, precision="fp32")
        call = session.prepare(random_feeds(session.inputs, 0))
        time_burst(call, 2)
        return visit(call, float(np.median(time_burst(call, 3))))

    def ratio(self, widths: Widths) -> float:
        """Measured latency over dense: the median over rounds of dense, pruned, pruned, dense. Both are loaded for it: where a
        runtime happens to lay a network in memory is worth some per cent.
        """
        dense, own = self.open(self.dense), self.open(widths)
        ratios = []
        for index in range(ROUNDS):
            order = (dense, own) if index % 2 else (own, dense)
            level = {id(each): float(np.median(take(each))) for each in order}
            ratios.append(level[id(own)] / level[id(dense)])
        return float(np.median(ratios))

    def ratios(self, networks: Sequence[Widths], what: str) -> list[float]:
        """Those of several networks, measured in random order."""
        found = {i: self.ratio(networks[i]) for i in steps(self.rng.permutation(len(networks)).tolist(), what)}
        return [found[i] for i in range(len(networks))]

    def predicted(self, widths: Widths) -> float:
        return self.table.model.predict(widths) / self.table.model.predict(self.dense)

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates of a variant."""
        import onnx

        graph = onnx.shape_inference.infer_shapes(self.maker.make(widths), data_prop=True).graph
        dims = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.value_info, *graph.output)
        }
        dims |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        total = 0
        for node in graph.node:
            if node.op_type == "Conv":
                total += math.prod(dims[node.output[0]]) * math.prod(dims[node.input[1]][1:])
            elif node.op_type in ("Gemm", "MatMul"):
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                inner = dims[node.input[1]][-1 if turned else -2]
                total += math.prod(dims[node.output[0]]) * inner
        return total

    def alone(self, networks: Sequence[Widths]) -> list[float]:
        """(a): every place of the network timed as a network of its own, at these widths, less what a call costs; their sum over
        that of dense.
        """
        import onnx

        call_ns = self.time_file(nothing(self.folder / "nothing.onnx"))
        known: dict[tuple[str, int, int], float] = {}
        sums = []
        for widths in steps([self.dense, *networks], "  kernels alone"):
            model = onnx.shape_inference.infer_shapes(self.maker.make(widths, inline=True), data_prop=True)
            total = 0.0
            for site in self.table.sites:
                place = site.key, site.c_in.at(widths), site.c_out.at(widths)
                if place not in known:
                    known[place] = max(0.0, self.time_alone(model, set(site.nodes)) - call_ns)
                total += known[place]
            sums.append(total)
        return [total / sums[0] for total in sums[1:]]

    def time_alone(self, model: Any, names: set[str]) -> float:
        """Nanoseconds of some nodes of a model as a network of their own."""
        import onnx
        from onnx.utils import Extractor

        graph = model.graph
        nodes = [node for node in graph.node if node.name in names or names.intersection(node.output)]
        weights = {tensor.name for tensor in graph.initializer}
        made = {out for node in nodes for out in node.output}
        inputs = [name for node in nodes for name in node.input if name and name not in weights and name not in made]
        users = {name for node in graph.node if node not in nodes for name in node.input}
        ends = {value.name for value in graph.output}
        outputs = [out for node in nodes for out in node.output if out in users or out in ends]
        path = self.folder / "alone.onnx"
        onnx.save(Extractor(model).extract_model(list(dict.fromkeys(inputs)), outputs), str(path))
        return self.time_file(path)

    def time_file(self, path: Path) -> float:
        """Median nanoseconds of an inference, alone."""
        session = self.backend.open(path, threads=1, precision="fp32")
        call = session.prepare(random_feeds(session.inputs, 0))
        once = float(np.median(time_burst(call, 3)))
        return float(np.median(time_burst(call, int(np.clip(15e6 / once, 5, 200)))))


def nothing(path: Path) -> Path:
    """A network of one addition: what a call costs."""
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "nothing", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def take(what: Visit) -> Any:
    for _ in range(what.lead):
        what.call()
    return time_burst(what.call, what.burst)


def evidence_of(found: Any) -> dict[str, Any]:
    import msgspec

    return dict(msgspec.to_builtins(found))


def errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """How far predictions are off: mean absolute relative error, bias, shares within 5 and 10 %, rank correlation."""
    from scipy.stats import spearmanr

    p, m = np.array(predicted), np.array(measured)
    off = p / m - 1
    return {
        "mape": float(np.abs(off).mean()), "bias": float(off.mean()), "worst": float(np.abs(off).max()),
        "within_5": float((np.abs(off) <= 0.05).mean()), "within_10": float((np.abs(off) <= 0.10).mean()),
        "spearman": float(spearmanr(p, m).statistic),
    }  # fmt: skip


def examine(model: str, runtime: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, runtime, arguments.size, arguments.seed, Path(folder))
        networks = bench.random_widths(arguments.random)
        n = len(networks)
        first = bench.ratios(networks, "  before the table")
        cost = bench.measure_table()
        note(
            f"  table: {cost['spent_s']} s, {cost['dense_inferences']} dense inferences, own held-out {cost['held_out_mape']:.1%}"
        )
        plans = [bench.plan() for _ in steps(range(arguments.plans), "  plans")]
        todo = [*networks, *plans]
        before = [bench.predicted(widths) for widths in todo]
        first += bench.ratios(plans, "  plans before refinement")
        bench.table.refine([(widths, None) for widths in plans])
        after = [bench.predicted(widths) for widths in plans]
        passes = [first, bench.ratios(todo, "  after the table")]
        measured = [(a + b) / 2 for a, b in zip(*passes, strict=True)]
        middle = {
            name: min((w for w in options if w), key=lambda w: abs(w - bench.dense[name] / 2))
            for name, options in bench.candidates.items()
        }
        narrow = {name: min(w for w in options if w) for name, options in bench.candidates.items()}
        subnets = [bench.dense, bench.dense | middle, bench.dense | narrow]
        macs = [bench.macs(widths) for widths in (*todo, *subnets)]
        slope, rest = np.polyfit(macs[-3:], [1.0, bench.ratio(subnets[1]), bench.ratio(subnets[2])], 1)
        baselines = {
            "macs": [m / macs[-3] for m in macs[:-3]],
            "three subnets": [float(slope * m + rest) for m in macs[:-3]],
        }
        if not arguments.no_alone:
            baselines["kernels alone"] = bench.alone(todo)
        retest = float(np.mean([abs(a / b - 1) for a, b in zip(*passes, strict=True)]))
        judged = {
            name: {"random": errors(p[:n], measured[:n]), "plans": errors(p[n:], measured[n:])} for name, p in baselines.items()
        }
        result = {
            "model": Path(model).name, "runtime": runtime, "version": bench.backend.version(), "seed": arguments.seed,
            "table": cost,
            "retest": retest, "spread": max(measured[:n]) / min(measured[:n]),
            "random": errors(before[:n], measured[:n]),
            "random_on_candidates": errors(before[1:n:2], measured[1:n:2]),
            "plans_before": errors(before[n:], measured[n:]), "plans_after": errors(after, measured[n:]),
            "baselines": judged,
            "raw": {"measured": passes, "predicted": before, "plans_refined": after, "baselines": baselines, "widths": todo},
        }  # fmt: skip
        result["accepted"] = accepted(result)
        note("  " + line(result))
        return result


def accepted(found: Mapping[str, Any]) -> bool:
    """Random networks: mean error within 3 % or 1.5 times the retest error, bias within 2 %, rank correlation 0.98. Plans: within
    5 % before refinement and 3 % after it. Both: better than the baselines.
    """
    own, plans = found["random"], found["plans_before"]["mape"]
    best = all(own["mape"] < other["random"]["mape"] and plans < other["plans"]["mape"] for other in found["baselines"].values())
    near = own["mape"] <= max(0.03, 1.5 * found["retest"]) and abs(own["bias"]) <= 0.02 and own["spearman"] >= 0.98
    return bool(near and plans <= 0.05 and found["plans_after"]["mape"] <= 0.03 and best)


def line(found: Mapping[str, Any]) -> str:
    own, others = found["random"], {name: other["random"]["mape"] for name, other in found["baselines"].items()}
    return (
        f"{found['model']} {found['runtime']}: random {own['mape']:.1%} (bias {own['bias']:+.1%}, rank {own['spearman']:.3f}),"
        f" plans {found['plans_before']['mape']:.1%} -> {found['plans_after']['mape']:.1%}, retest {found['retest']:.1%};"
        f" {', '.join(f'{name} {error:.0%}' for name, error in others.items())}; {'yes' if found['accepted'] else 'NO'}"
    )


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Predicted over measured, one panel per model and runtime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 5
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
    for axis, found in zip(axes.ravel(), results, strict=False):
        measured = np.mean(found["raw"]["measured"], axis=0)
        count = len(measured) - len(found["raw"]["plans_refined"])
        low, high = float(measured.min()) * 0.9, float(measured.max()) * 1.1
        axis.fill_between([low, high], [low * 0.95, high * 0.95], [low * 1.05, high * 1.05], alpha=0.15, color="grey", lw=0)
        for name, marker in (("macs", "x"), ("kernels alone", "+")):
            if name in found["raw"]["baselines"]:
                axis.plot(measured, found["raw"]["baselines"][name], marker, color="silver", ms=4, label=name)
        axis.plot(measured[:count], found["raw"]["predicted"][:count], "o", ms=4, label="random networks")
        axis.plot(measured[count:], found["raw"]["predicted"][count:], "s", ms=4, label="plans, before refinement")
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=f"{found['model']}\n{found['runtime']}")
    axes[0][0].set(xlabel="measured / dense", ylabel="predicted / dense")
    axes[0][0].legend(fontsize=6)
    for axis in axes.ravel()[len(results) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=list(MODELS), help=f"as `edgekit run` takes them (default {' '.join(MODELS)})"
    )
    parser.add_argument("--runtime", action="append", choices=backends.RUNTIMES, help="default: all")
    parser.add_argument("--random", type=int, default=20, help="random networks (default 20)")
    parser.add_argument("--plans", type=int, default=10, help="the allocator's plans (default 10)")
    parser.add_argument("--size", type=int, default=224, help="side of the input (default 224)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-alone", action="store_true", help="leave out the kernels measured alone, the slowest baseline")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; what it already holds is not done again")
    parser.add_argument("--plot", type=Path, help="predicted over measured as PNG")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text())["results"] if arguments.output and arguments.output.exists() else []
    for model in arguments.models:
        for runtime in arguments.runtime or backends.RUNTIMES:
            if any((old["model"], old["runtime"], old["seed"]) == (Path(model).name, runtime, arguments.seed) for old in results):
                continue
            results.append(examine(model, runtime, arguments))
            if arguments.output:
                arguments.output.write_text(json.dumps({"results": results}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    for found in results:
        print(line(found))
    return 0 if all(found["accepted"] for found in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
