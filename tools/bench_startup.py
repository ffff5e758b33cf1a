#!/usr/bin/env python3
"""How soon the command answers: tools/bench_startup.py -o docs/results/startup.json [--run RUN_DIR] [--times 5]

Each command is started several times in a process of its own; the median counts, because a shared machine stalls now and then.
With `--run` the pages of that finished run are rendered too, in a process that has loaded what it needs to and no more.
Exit code 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS_S = {"--help": 0.3, "doctor": 3.0, "doctor --json": 3.0, "report": 5.0}
VERBS = ("run", "sweep", "demo", "prune", "measure", "bench", "export", "report", "profiles", "doctor")


def seconds(arguments: list[str], times: int) -> list[float]:
    """Wall seconds of each start, after one that warms the file cache and is not counted.

    Raises:
        SystemExit: the command fails.
    """
    found = []
    for _ in range(times + 1):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "toolkit", *arguments], cwd=ROOT, capture_output=True, text=True)
        found.append(round(time.monotonic() - started, 3))
        if done.returncode not in (0, 1):
            raise SystemExit(f"edgekit {' '.join(arguments)} failed: {done.stderr}")
    return found[1:]


def heaviest() -> list[tuple[str, float]]:
    """The ten imports that take longest as the command is loaded, with their own milliseconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import toolkit.cli"], cwd=ROOT, capture_output=True, text=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    found = [(name.strip(), int(own) / 1e3) for own, _, name in rows if own.strip().isdigit()]
    return sorted(found, key=lambda pair: -pair[1])[:10]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    commands = ["--help", *(f"{verb} --help" for verb in VERBS), "doctor", "doctor --json"]
    found = {command: seconds(command.split(), given.times) for command in commands}
    if given.run:
        found["report"] = seconds(["report", str(given.run.resolve())], given.times)
    kept = {name: statistics.median(found[name]) < limit for name, limit in LIMITS_S.items() if name in found}
    record = {"schema": 1, "limits_s": LIMITS_S, "kept": kept, "seconds": found, "heaviest_imports_ms": heaviest()}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print("| command | median s | limit |\n|---|---|---|")
    for name, values in found.items():
        limit = LIMITS_S.get(name)
        print(f"| `edgekit {name}` | {statistics.median(values):.2f} | {'' if limit is None else limit} |")
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
