#!/usr/bin/env python3
"""Random networks through the channel graph: tools/fuzz_graph.py 5000 --jobs 2 -o docs/results/fuzz_graph.json

Every program is a network of up to six random pieces (tests/composer.py). It is traced and cut by several random plans. Every cut
is proved in float64, checked by an oracle that knows nothing of channel groups, run at another batch size, differentiated,
analysed again and cut again. What fails is made smaller until the smallest recipe that fails the same way is left. A second call
with the same output file goes on where the first stopped. Ends with 1 if anything was wrong.

  tools/fuzz_graph.py 200                               200 programs, the summary as text
  tools/fuzz_graph.py 5000 --jobs 2 -o results.json     and as JSON, to be continued
  tools/fuzz_graph.py --recipe "(6, [('plain', 6, 0)], ('pooled', 1, 0), 0)"
                                                        one recipe as a failure prints it
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CHUNK, LIMIT_S, SHRINK_S = 50, 300, 120
COUNTS = ("programs", "prunable_groups", "cuts_proved", "without_prunable_groups")
TALLIES = ("prunable", "held")


# --- in a process of its own --------------------------------------------------------------------------------------------


def one(recipe: Any) -> dict[str, Any]:
    """What a recipe shows; where it fails also the smallest recipe that fails at the same stage."""
    from composer import Wrong, examine, shrunk

    try:
        found = examine(recipe)
    except Wrong as wrong:
        until, where, error = time.monotonic() + SHRINK_S, wrong.stage, str(wrong)
        small = shrunk(recipe, lambda r: time.monotonic() < until and failure(r)[0] == where)
        return {"recipe": str(recipe), "stage": where, "error": error, "smallest": str(small), "why": failure(small)[1]}
    return {
        "prunable_groups": found.groups,
        "cuts_proved": found.cuts,
        "largest_error": found.error,
        "prunable": dict(found.prunable),
        "held": dict(found.held),
    }


def failure(recipe: Any) -> tuple[str, str]:
    """(the stage at which a recipe fails, what is said); two empty texts where it does not."""
    from composer import Wrong, examine

    try:
        examine(recipe)
    except Wrong as wrong:
        return wrong.stage, str(wrong)
    return "", ""


def work(first: int, count: int) -> None:
    """Print what each of these seeds shows, a line each."""
    import warnings

    import torch
    from composer import recipe

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        print(json.dumps({"seed": seed, **one(recipe(seed))}), flush=True)


# --- the search ---------------------------------------------------------------------------------------------------------


def results(first: int, end: int) -> Iterator[dict[str, Any]]:
    """What the seeds of a chunk show. One that kills the process, or never ends, is a failure; the rest goes on after it."""
    from composer import recipe

    while first < end:
        command = [sys.executable, "-W", "ignore", __file__, "--work", str(first), str(end - first)]
        with tempfile.TemporaryFile("w+") as trouble, started(command, trouble) as process:
            assert process.stdout
            watch = watched(process)
            for line in process.stdout:
                watch.cancel()
                found = json.loads(line)
                first = found["seed"] + 1
                yield found
                watch = watched(process)
            watch.cancel()
            process.wait()
            trouble.seek(0)
            text = f"process: ended with {process.returncode}: {trouble.read()[-400:].strip()}"
        if process.returncode in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
            return  # somebody stopped it; the seed is still to do
        if first < end:
            yield {"seed": first, "recipe": str(recipe(first)), "stage": "process", "error": text, "smallest": "", "why": ""}
            first += 1


def started(command: list[str], trouble: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=trouble, text=True)


def watched(process: subprocess.Popen[str]) -> threading.Timer:
    """Ends the process if no result comes for a while."""
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.daemon = True
    timer.start()
    return timer


class Tally:
    """The sum over all programs up to the first that is not done yet."""

    def __init__(self, start: int, output: Path | None) -> None:
        self.output, self.pending = output, dict[int, dict[str, Any]]()
        self.kept: dict[str, Any] = {"first_seed": start, "next_seed": start, "largest_error": 0.0, "seconds": 0.0}
        self.kept |= dict.fromkeys(COUNTS, 0) | {name: {} for name in TALLIES} | {"failures": []}
        if output and output.exists():
            self.kept = {k: v for k, v in json.loads(output.read_text()).items() if k != "summary"}
        # What failed is done again: a killed process says nothing of the graph, and a mended fault has to be shown mended.
        self.again = [found["seed"] for found in self.kept["failures"]]
        self.kept["programs"] -= len(self.again)
        self.kept["failures"] = []

    def add(self, found: dict[str, Any], seconds: float) -> None:
        self.kept["seconds"] += seconds
        if found["seed"] < self.kept["next_seed"]:
            self.count(found)
        else:
            self.pending[found["seed"]] = found
        while self.kept["next_seed"] in self.pending:
            self.count(self.pending.pop(self.kept["next_seed"]))
            self.kept["next_seed"] += 1

    def count(self, found: dict[str, Any]) -> None:
        kept = self.kept
        kept["programs"] += 1
        if "stage" in found:
            kept["failures"].append(found)
            return
        kept["prunable_groups"] += found["prunable_groups"]
        kept["cuts_proved"] += found["cuts_proved"]
        kept["without_prunable_groups"] += not found["prunable_groups"]
        kept["largest_error"] = max(kept["largest_error"], found["largest_error"])
        for name in TALLIES:
            kept[name] = dict(sorted((Counter(kept[name]) + Counter(plain(found[name]))).items()))

    def save(self) -> None:
        if self.output:
            part = self.output.with_suffix(".part")
            part.write_text(json.dumps({"summary": self.line(), **self.kept}, indent=1) + "\n")
            part.replace(self.output)

    def line(self) -> str:
        kept = self.kept
        return (
            f"{kept['programs']} programs, {kept['prunable_groups']} prunable groups, {kept['cuts_proved']} cuts proved,"
            f" largest error {kept['largest_error']:.1e}, failures: {len(kept['failures'])}"
        )

    def text(self) -> str:
        lines = [self.line()]
        for found in self.kept["failures"]:
            lines.append(f"\nseed {found['seed']}: {found['smallest'] or found['recipe']}\n  {found['why'] or found['error']}")
        return "\n".join(lines)


def plain(held: dict[str, int]) -> dict[str, int]:
    """The same counts with the names of nodes left out of the reasons."""
    found: Counter[str] = Counter()
    for text, n in held.items():
        found[text.split(" at ")[0]] += n
    return found


def search(count: int, jobs: int, tally: Tally) -> None:
    """Run the seeds that are still to do, `jobs` processes at a time."""
    start, end = tally.kept["next_seed"], tally.kept["next_seed"] + count
    chunks: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    chunk = min(CHUNK, -(-count // jobs))
    for seed in tally.again:
        chunks.put((seed, seed + 1))
    for first in range(start, end, chunk):
        chunks.put((first, min(first + chunk, end)))

    def worker() -> None:
        try:
            while True:
                for found in results(*chunks.get_nowait()):
                    done.put(found)
        except queue.Empty:
            pass
        except Exception:
            traceback.print_exc()
        finally:
            done.put(None)

    for _ in range(jobs):
        threading.Thread(target=worker, daemon=True).start()
    working, began = jobs, time.monotonic()
    said_at = last = began
    while working:
        found = done.get()
        now = time.monotonic()
        if found is None:
            working -= 1
        else:
            tally.add(found, now - last)
            last = now
            if "stage" in found:
                print(f"\nseed {found['seed']}: {found['error']}", file=sys.stderr)
        if now - said_at > 5 or not working:
            said_at = now
            tally.save()
            print(f"\r{tally.line()}; {now - began:.0f} s  ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="?", type=int, help="how many programs")
    parser.add_argument(
        "--seed", type=int, default=0, help="the first seed (default 0); the output file's next one goes before it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time (default 1)")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; what it already holds is not done again")
    parser.add_argument("--recipe", help="only this recipe, as a failure prints it")
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return 0
    if options.recipe:
        from composer import Recipe

        found = one(Recipe.parse(options.recipe))
        print(json.dumps(found, indent=1))
        return int("stage" in found)
    if not options.programs:
        parser.error("say how many programs, for example: tools/fuzz_graph.py 200")
    tally = Tally(options.seed, options.output)
    try:
        search(options.programs, options.jobs, tally)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    tally.save()
    print(tally.text())
    return int(bool(tally.kept["failures"]))


if __name__ == "__main__":
    sys.exit(main())
