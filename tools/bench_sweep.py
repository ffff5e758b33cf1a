#!/usr/bin/env python3
"""What a sweep costs beside one run, and whether its points are as good as runs of their own:

    tools/bench_sweep.py -o docs/results/sweep.json --each -- MODEL --data DATA -p PROFILE [other options of `edgekit run`]

The latency table is measured once; then one run at the median budget and the sweep start from copies of it, so that neither
profits from what the other measured: `warm` is sweep / run, `cold` the same with the table's time added to both. Seconds are
wall-clock; processor seconds stand beside them, which a busy machine disturbs less. With `--each` every budget also gets a run of
its own. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from toolkit.budget import parse_budget
from toolkit.schema import Report, Sweep, load_json

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2.5
OF_MEASURE = (
    "--weights",
    "-p",
    "--profile",
    "--input",
    "--resize",
    "--crop",
    "--mean",
    "--std",
    "--threads",
    "--precision",
    "--seed",
)


def timed(arguments: list[str], cache: Path) -> dict[str, float]:
    """Wall and processor seconds of one edgekit command.

    Raises:
        SystemExit: it failed, other than by a missed budget.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    around = os.environ | {"EDGEKIT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "toolkit", *arguments], env=around, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"edgekit {' '.join(arguments)} failed with exit code {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(cpu, 1)}


def of_measure(arguments: list[str]) -> list[str]:
    """Of the options of `run` those that `measure` takes too, with the model."""
    chosen = arguments[:1]
    for name, value in zip(arguments[1:], arguments[2:], strict=False):
        chosen += [name, value] if name in OF_MEASURE else []
    return chosen


def copied(source: Path, target: Path) -> Path:
    """A cache with the table alone, as `measure` left it."""
    shutil.copytree(source, target)
    return target


def figures(folder: Path) -> dict[str, Any]:
    """What a run gave."""
    report = load_json(Report, folder / "report.json")
    names = ("verdict", "valid", "dense_ns", "measured_ns", "accuracy_dense", "accuracy_pruned", "agreement", "parameters_pruned")
    return {name: getattr(report, name) for name in names}


def compare(budgets: list[str], arguments: list[str], each: bool, work: Path) -> dict[str, Any]:
    """All measurements, in the order table, run, sweep, single runs."""
    table = timed(["measure", *of_measure(arguments)], work / "table")
    shares = sorted(budgets, key=lambda text: -(parse_budget(text).ratio or parse_budget(text).latency_ns))
    median = shares[len(shares) // 2]
    one = timed(["run", *arguments, "--budget", median, "-o", str(work / median)], copied(work / "table", work / "cache-run"))
    swept = ["sweep", *arguments, "--budgets", ",".join(shares), "-o", str(work / "sweep")]
    every = timed(swept, copied(work / "table", work / "cache-sweep"))
    sweep = load_json(Sweep, work / "sweep" / "sweep.json")
    points = {
        point.budget: {"sweep": figures(work / "sweep" / point.folder), "rounds": point.rounds}
        for point in sweep.points
        if point.verdict != "refused"
    }
    for budget in points if each else [median]:
        if budget != median:
            timed(
                ["run", *arguments, "--budget", budget, "-o", str(work / budget)],
                copied(work / "table", work / f"cache-{budget}"),
            )
        points[budget]["run"] = figures(work / budget)
    ratios = {
        unit: {
            "warm": round(every[unit] / one[unit], 3),
            "cold": round((table[unit] + every[unit]) / (table[unit] + one[unit]), 3),
        }
        for unit in ("wall_s", "cpu_s")
    }
    return {
        "schema": 1,
        "arguments": arguments,
        "budgets": shares,
        "median": median,
        "table": table,
        "run": one,
        "sweep": every,
        "sweep_steps_s": sweep.wall_s,
        "ratios": ratios,
        "limit": LIMIT,
        "knee": sweep.knee,
        "points": points,
    }


def markdown(found: dict[str, Any]) -> str:
    wall, cpu = found["ratios"]["wall_s"], found["ratios"]["cpu_s"]
    lines = [
        f"{len(found['budgets'])} budgets cost {wall['warm']:.2f} runs with a table and {wall['cold']:.2f} without one (processor"
        f" time: {cpu['warm']:.2f} and {cpu['cold']:.2f}); limit {found['limit']}.",
        "",
        "| budget | sweep: x dense | top-1 | rounds | own run: x dense | top-1 |",
        "|---|---|---|---|---|---|",
    ]

    def cells(of: dict[str, Any] | None) -> str:
        if of is None:
            return "| "
        quality = of["agreement"] if of["accuracy_pruned"] is None else of["accuracy_pruned"]
        return f"{of['measured_ns'] / of['dense_ns']:.3f} {of['verdict'].upper()} | {100 * quality:.2f}"

    for budget, point in found["points"].items():
        lines.append(f"| {budget} | {cells(point['sweep'])} | {point['rounds']} | {cells(point.get('run'))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--budgets", default="0.9x,0.7x,0.5x,0.35x,0.25x")
    parser.add_argument("--each", action="store_true", help="a run of its own for every budget")
    parser.add_argument("--keep", type=Path, help="folder for all that is made; default: a temporary one")
    parser.add_argument("arguments", nargs="+", help="MODEL and options of `edgekit run`, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.keep or Path(folder)
        found = compare(given.budgets.split(","), given.arguments, given.each, work)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    return 0 if found["ratios"]["wall_s"]["warm"] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
