#!/usr/bin/env python3
"""What the way to a board costs: a latency table and a whole run here, and through sshd over a link of 20 Mbit/s and 50 ms.

    tools/bench_ssh.py [MODEL] [-o docs/results/ssh.json]      the table of MODEL (resnet18), here and over the link
    tools/bench_ssh.py --run [-o docs/results/ssh_run.json]    a run of the demo, here and with --on, from the same table

The board is this machine through Debian's sshd on loopback (as in tests/board.py), the link a proxy of this program. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from board import Proxy, board  # noqa: E402

from toolkit import demo  # noqa: E402

PLAN = ("name", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet18")
    parser.add_argument("--run", action="store_true", help="a whole run of the demo instead of a table")
    parser.add_argument("--profile", "-p", default="local-onnxruntime")
    parser.add_argument("--mbit", type=float, default=20.0)
    parser.add_argument("--round-trip-ms", type=float, default=50.0)
    parser.add_argument("--budget", default="0.6x")
    parser.add_argument("-o", "--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, board(Path(name) / "board") as there:
        proxy = Proxy(there.port, chosen.mbit * 1e6 / 8, chosen.round_trip_ms / 2e3)
        job = run if chosen.run else table
        found = job(chosen, Path(name), there.url, there.config(proxy.port))
        found |= {"mbit_per_s": chosen.mbit, "round_trip_ms": chosen.round_trip_ms, "sent_bytes": proxy.passed}
        proxy.close()
        found["left_on_the_board"] = there.leftovers()
    print(json.dumps(found, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


def table(chosen: argparse.Namespace, folder: Path, url: str, config: Path) -> dict[str, Any]:
    """Seconds of `edgekit measure`, here and over the link, each from an empty cache."""
    words = ["measure", chosen.model, "-p", chosen.profile, "--json"]
    seconds, tables = {}, {}
    for where, on in (("here", []), ("over the link", ["--on", url])):
        seconds[where], done = edgekit([*words, *on], folder / where.replace(" ", "-"), config)
        tables[where] = json.loads(done.stdout)["held_out"]
    ratio = seconds["over the link"] / seconds["here"]
    return {"model": chosen.model, "profile": chosen.profile, "wall_s": seconds, "ratio": ratio, "held_out": tables}


def run(chosen: argparse.Namespace, folder: Path, url: str, config: Path) -> dict[str, Any]:
    """The demo pruned here, then with --on from the table as it then is; what is reported is confirmed anew each time."""
    data = ["--data", str(demo.data_path()), "--eval-data", str(demo.eval_path()), "--budget", chosen.budget]
    cache = folder / "cache"
    found: dict[str, Any] = {}
    for where, on in (("here", []), ("there", ["--on", url])):
        out = folder / where
        words = ["run", "demo", *data, "-p", chosen.profile, *on, "-o", str(out)]
        wall_s, _ = edgekit(words, cache, config, accept=(0, 1))
        report = json.loads((out / "report.json").read_text())
        plan = json.loads((out / "plan.json").read_text())
        found[where] = {
            "wall_s": wall_s,
            "verdict": report["verdict"],
            "valid": report["valid"],
            "table": report["table"]["id"],
            "measured_ns": report["measured_ns"],
            "measured_ci95_ns": report["measured_ci95_ns"],
            "speedup": report["speedup"],
            "speedup_ci95": report["speedup_ci95"],
            "plan": [{key: group[key] for key in PLAN} for group in plan["groups"]],
        }
    here, there = found["here"], found["there"]
    found["same_table"] = here["table"] == there["table"]
    found["same_plan"] = here.pop("plan") == there.pop("plan")
    found["latency_ratio"] = there["measured_ns"] / here["measured_ns"]
    (low, high), (other_low, other_high) = here["measured_ci95_ns"], there["measured_ci95_ns"]
    found["intervals_overlap"] = low <= other_high and other_low <= high
    return found


def edgekit(
    words: list[str], cache: Path, config: Path, accept: tuple[int, ...] = (0,)
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds and what it printed."""
    environment = {**os.environ, "EDGEKIT_CACHE": str(cache), "EDGEKIT_SSH_CONFIG": str(config)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in accept:
        raise SystemExit(f"edgekit {' '.join(words)} ended with {done.returncode}")
    return time.monotonic() - started, done


if __name__ == "__main__":
    main()
