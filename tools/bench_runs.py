#!/usr/bin/env python3
"""Gather finished runs into one table: tools/bench_runs.py RUN_DIR [RUN_DIR ...] -o docs/results/runs.json

Every run is judged again by tools/verify first; its lines are kept beside the figures. "Of the budget" is the latency that verify
measured in a plain runtime, over the budget. Prints the table as Markdown, and in how many runs that is in [0.93, 1.02].
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from toolkit.schema import Report, load_json

VERIFY = Path(__file__).with_name("verify")
AGAIN = re.compile(r"pruned/dense is ([0-9.]+)")  # verify's own timing
LOWEST, HIGHEST = 0.93, 1.02
FIELDS = (
    "verdict", "valid", "method", "runtime", "budget", "dense_ns", "measured_ns", "predicted_ns", "speedup",
    "speedup_ci95", "accuracy_dense", "accuracy_pruned", "accuracy_change_ci95", "agreement", "evaluation_images",
    "calibration_images", "parameters_dense", "parameters_pruned", "macs_dense", "macs_pruned", "floor_ns",
    "optimality_gap", "proof_max_relative_error", "wall_s", "seed", "environment", "precision",
)  # fmt: skip


def gather(folder: Path) -> dict[str, object]:
    """One run: what its report says, and what verify says of it."""
    report = load_json(Report, folder / "report.json")
    judged = subprocess.run([sys.executable, VERIFY, folder], capture_output=True, text=True)
    table, alone = report.table, report.quantized_dense
    lines = [" ".join(line.split()) for line in judged.stdout.splitlines()]
    again, budget = next((found for line in lines if (found := AGAIN.search(line))), None), str(report.budget)
    return {
        "model": Path(report.model).name,
        **{name: getattr(report, name) for name in FIELDS},
        "iterations": len(report.iterations),
        "quantized_dense": None if alone is None else {"ratio": alone.ratio, "accuracy": alone.accuracy},
        "table": {"rows": table.rows, "coverage": table.coverage, "mape": table.held_out.mape, "bias": table.held_out.bias},
        "of_budget_measured_again": round(float(again[1]) / float(budget[:-1]), 4) if again and budget[-1] == "x" else None,
        "verify": lines,
    }


def markdown(runs: list[dict[str, object]]) -> str:
    lines = [
        "| model | runtime | precision | budget | dense | pruned | of the budget | top-1 | table error | minutes | verify |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        change = "unlabelled"
        if r["accuracy_dense"] is not None:
            low, high = (100 * x for x in r["accuracy_change_ci95"])  # type: ignore[attr-defined]
            change = f"{100 * r['accuracy_dense']:.1f} -> {100 * r['accuracy_pruned']:.1f} ({low:+.1f} to {high:+.1f})"  # type: ignore[operator]
        again = r["of_budget_measured_again"]
        lines.append(
            f"| {r['model']} | {r['runtime']} | {r['precision']} | {r['budget']} "
            f"| {r['dense_ns'] / 1e6:.3f} ms | {r['measured_ns'] / 1e6:.3f} ms "  # type: ignore[operator]
            f"{r['verdict'].upper()} | {'' if again is None else f'{again:.3f}'} | {change} | {100 * r['table']['mape']:.1f} % | "  # type: ignore[attr-defined,index]
            f"{sum(r['wall_s'].values()) / 60:.1f} | {r['verify'][-1]} |"  # type: ignore[attr-defined,index]
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    runs = [gather(folder) for folder in given.runs]
    given.out.write_text(json.dumps({"schema": 1, "runs": runs}, indent=1) + "\n")
    print(markdown(runs))
    shares = [run["of_budget_measured_again"] for run in runs if run["of_budget_measured_again"] is not None]
    inside = sum(LOWEST <= share <= HIGHEST for share in shares)  # type: ignore[operator]
    print(f"\n{inside} of {len(shares)} runs with a relative budget are in [{LOWEST}, {HIGHEST}] of it when measured again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
