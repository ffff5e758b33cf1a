#!/usr/bin/env python3
"""All methods at one latency budget: tools/bench_methods.py MODEL --weights W --data TRAIN --eval-data TEST --work DIR -o FILE

Every cell is `edgekit run` with one method and seed, in a process of its own; all share one latency table. Runs are kept under
--work and made once: started again with the same options, what is finished is read, and what was stopped in the middle of its
training goes on there. Training methods see the same images for the same epochs. Prints mean and spread over seeds.

  tools/bench_methods.py models.py:resnet20 --weights w.safetensors --data train.npz --eval-data test.npz --input 1x3x32x32 \\
      --work /tmp/methods -o docs/results/methods.json
  ... --only psap --seeds 0            one cell          ... --only psap,psap-uniform          two rows
  ... -- --mean 0.5 --set train.lr=0.01                  what follows -- goes to every run

Rows of the same accuracy against sparsity that no latency is behind (unrestricted magnitude, random clusters) come from
another tool: --extra FILE, JSON with a list `rows` of {name, seed, accuracy, note}, are shown beside these.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FINETUNED = 5  # epochs, as the acceptance has it

# name of a row -> what it adds to the command line; {epochs} and {images} are the benchmark's own
ROWS: dict[str, tuple[str, ...]] = {
    "causal": ("--method", "causal"),
    "cswap": ("--method", "cswap"),
    "l1": ("--method", "l1"),
    "taylor": ("--method", "taylor"),
    "random": ("--method", "random"),
    "crespr": ("--method", "crespr"),
    "psap": ("--method", "psap", "--set", "psap.epochs={epochs}"),
    "psap-uniform": ("--method", "psap", "--set", "psap.epochs={epochs}", "--set", "psap.ratios=uniform"),
    "psap-unprotected": ("--method", "psap", "--set", "psap.epochs={epochs}", "--set", "psap.protect=false"),
    "causal-finetuned": ("--method", "causal", "--finetune", str(FINETUNED)),
}
LONGER: dict[str, tuple[str, ...]] = {  # only when named by --only: far more epochs, from random weights
    "psap-scratch": (
        "--method", "psap", "--set", "psap.scratch=true", "--set", "train.loss=labels", "--set", "psap.epochs={scratch_epochs}",
        "--set", "train.lr=0.1", "--set", "train.images=0",
    ),
}  # fmt: skip


def say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False)


def command_of(given: argparse.Namespace, row: str, seed: int) -> list[str]:
    """The command line of a cell."""
    words = [sys.executable, "-m", "toolkit", "run", given.model, "--data", given.data, "-p", given.profile]
    words += ["--budget", given.budget, "--seed", str(seed), "-o", str(cell_folder(given, row, seed)), "--json"]
    for flag, value in (("--weights", given.weights), ("--eval-data", given.eval_data), ("--input", given.input)):
        words += [flag, value] if value else []
    words += ["--set", f"train.images={given.images}", "--set", f"train.augment={given.augment}"]
    values = {"epochs": given.epochs, "scratch_epochs": given.scratch_epochs}
    return [*words, *given.rest, *(word.format(**values) for word in (ROWS | LONGER)[row])]


def cell_folder(given: argparse.Namespace, row: str, seed: int) -> Path:
    return Path(given.work) / f"{row}-{given.budget}-{seed}"


def cell(given: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """A finished run, made unless it is there; why, where it failed. A missed budget is a result."""
    folder, command = cell_folder(given, row, seed), command_of(given, row, seed)
    kept = folder / "bench.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["command"] == command:
        return dict(found["cell"])
    say(f"{row}, seed {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    environment = {"EDGEKIT_CACHE": str(Path(given.work) / "cache")} | dict(os.environ)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=given.run_from, env=environment)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        return {"row": row, "seed": seed, "failed": f"exit {done.returncode}"}
    found = measured(json.loads(done.stdout), row, seed, time.monotonic() - started)
    kept.write_text(json.dumps({"command": command, "cell": found}, indent=1) + "\n")
    return found


def measured(report: dict[str, Any], row: str, seed: int, wall_s: float) -> dict[str, Any]:
    """What the table takes of a report. Times are of this session; of a resumed run they are of its last part."""
    tuned = report["finetuned"]
    return {
        "row": row,
        "seed": seed,
        "verdict": report["verdict"],
        "valid": report["valid"],
        "ratio": 1 / report["speedup"],
        "ratio_ci95": [1 / bound for bound in reversed(report["speedup_ci95"])],
        "accuracy_dense": report["accuracy_dense"],
        "accuracy": report["accuracy_pruned"],
        "accuracy_one_shot": tuned["accuracy_one_shot"] if tuned else None,
        "agreement": report["agreement"],
        "macs": report["macs_pruned"] / report["macs_dense"],
        "parameters": report["parameters_pruned"] / report["parameters_dense"],
        "prune_s": report["wall_s"]["prune"] + report["wall_s"].get("fine-tune", 0.0),
        "wall_s": round(wall_s, 1),
        "notes": report["notes"],
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, in the order of the cells."""
    found = []
    for name in dict.fromkeys(each["row"] for each in cells):
        own = [each for each in cells if each["row"] == name]
        done = [each for each in own if "failed" not in each]
        row: dict[str, Any] = {"row": name, "seeds": len(done), "failed": len(own) - len(done)}
        labelled = [each for each in done if each["accuracy"] is not None]
        if labelled:
            lost = [100 * (each["accuracy_dense"] - each["accuracy"]) for each in labelled]
            row |= dict(zip(("lost_points", "lost_points_sd"), spread(lost), strict=True))
            row |= dict(zip(("accuracy", "accuracy_sd"), spread([each["accuracy"] for each in labelled]), strict=True))
        if done:
            row |= {name: statistics.fmean(each[name] for each in done) for name in ("ratio", "macs", "prune_s")}
            row["met"] = sum(each["verdict"] == "met" for each in done)
        found.append(row)
    return found


def table_of(rows: Sequence[dict[str, Any]], extra: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="At one budget", title_justify="left")
    for heading in ("method", "seeds", "met", "of dense", "MACs", "top-1", "loses, points", "prune and train, min"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading == "method")
    for row in rows:
        if not row["seeds"]:
            table.add_row(row["row"], "0", "failed")
            continue
        told = ("", "")
        if "accuracy" in row:
            told = (f"{100 * row['accuracy']:.2f}", f"{row['lost_points']:.2f} +- {row['lost_points_sd']:.2f}")
        figures = (f"{row['ratio']:.3f}x", f"{row['macs']:.2f}", *told, f"{row['prune_s'] / 60:.1f}")
        table.add_row(row["row"], str(row["seeds"]), str(row["met"]), *figures)
    for name in dict.fromkeys(each["name"] for each in extra):
        mean, deviation = spread([100 * each["accuracy"] for each in extra if each["name"] == name])
        count = sum(each["name"] == name for each in extra)
        note = next((each.get("note", "") for each in extra if each["name"] == name), "")
        table.add_row(name, str(count), "", note, "", f"{mean:.2f} +- {deviation:.2f}", "", "")
    return table


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", default="")
    parser.add_argument("--input", default="")
    parser.add_argument("-p", "--profile", default="local-onnxruntime")
    parser.add_argument("--budget", default="0.5x")
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, of {', '.join((*ROWS, *LONGER))}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--scratch-epochs", type=int, default=160)
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--augment", default="crop+flip", choices=("none", "crop", "crop+flip"))
    parser.add_argument("--work", required=True, help="folder of the runs and their table")
    parser.add_argument("--extra", type=Path, help="JSON of rows that another tool made")
    parser.add_argument("-o", "--out", type=Path, required=True)
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:split])
    given.rest = list(arguments[split + 1 :])
    given.run_from = str(ROOT)
    for name in ("weights", "data", "eval_data", "work"):
        setattr(given, name, str(Path(getattr(given, name)).resolve()) if getattr(given, name) else "")
    place, colon, function = given.model.rpartition(":")
    given.model = f"{Path(place).resolve()}:{function}" if colon and place.endswith(".py") else given.model
    if unknown := set(given.only.split(",")) - set(ROWS | LONGER):
        parser.error(f"--only knows no {', '.join(sorted(unknown))}")
    return given


def main(arguments: Sequence[str]) -> int:
    given = parsed(arguments)
    extra = json.loads(given.extra.read_text())["rows"] if given.extra else []
    cells = []
    for seed in (int(seed) for seed in given.seeds.split(",")):
        for row in given.only.split(","):
            cells.append(cell(given, row, seed))
            options = {k: v for k, v in vars(given).items() if isinstance(v, str | int | list) and k != "run_from"}
            options |= {k: Path(str(options[k])).name for k in ("model", "weights", "data", "eval_data", "work")}
            found = {"schema": 1, "options": options, "cells": cells, "rows": summary(cells), "extra": extra}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table_of(summary(cells), extra))
    return 1 if any("failed" in each for each in cells) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
