#!/usr/bin/env python3
"""What scoring costs, and how right it is: tools/bench_scoring.py edgekit-out -o docs/results/scoring.json

Takes the model, weights and calibration images of a finished run. Every channel is really removed on all images (brute force);
beside that the effects as edgekit measures them, at several budgets of forward passes: share of equal categories, rank
correlation of the effects among channels that brute force calls critical or detrimental, passes over the images that were
spent (by multiply-accumulates and by the clock), and the growth of memory.

  tools/bench_scoring.py edgekit-out --images 128 --passes 0,5,20        fewer images
  tools/bench_scoring.py edgekit-out --no-brute                          a large network: cost only
  tools/bench_scoring.py edgekit-out --no-brute --passes 20 --round      and a whole round of `causal`
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit import schema  # noqa: E402
from toolkit.errors import EdgekitError  # noqa: E402
from toolkit.prune.consumers import scored  # noqa: E402
from toolkit.prune.effects import (  # noqa: E402
    categorise,
    first_consumer,
    measure_effects,
    paired,
    paired_test,
    removal,
    sensitivities,
)
from toolkit.prune.engine import Cached, Engine, cache  # noqa: E402
from toolkit.prune.pruner import State, score  # noqa: E402
from toolkit.prune.repair import outputs  # noqa: E402
from toolkit.run.loop import EFFECT_PASSES  # noqa: E402
from toolkit.run.prepare import Traced, allocatable, load_and_trace, load_images  # noqa: E402

SIGNIFICANT = ("critical", "detrimental")
CACHE_BYTES = 1e9


def note(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False)


def brute_force(cached: Cached) -> tuple[list[tuple[str, int]], list[schema.Category], list[float]]:
    """(channel, category, mean effect on the log-odds) of every channel, removed on all images."""
    program, engine = cached.engine.program, cached.engine
    keys = [(g.name, n) for g in scored(program) for n in range(g.width)]
    tests = []
    with torch.no_grad():
        for group, channel in track(keys, "brute force", console=Console(stderr=True)):
            after = cached.outputs_with(removal(program, engine, group, channel), first_consumer(program, engine, group))
            tests.append(paired_test(paired(cached.outputs, after)[1]))
    return keys, categorise(tests)[0], [test.mean for test in tests]


def brute_passes(cached: Cached) -> float:
    """Forward passes over the images that brute force costs, counted as those of `measure_effects`."""
    engine, total = cached.engine, len(cached.engine.steps)
    groups = scored(engine.program)
    return sum(g.width * (1 - cached.restart(first_consumer(engine.program, engine, g.name)) / total) for g in groups)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scoring(engine: Engine, images: torch.Tensor, passes: float, seed: int) -> dict[str, Any]:
    """Effects within a budget of passes, and what they cost."""
    spent = 0.0

    def progress(step: str, done: float, total: float) -> None:
        nonlocal spent
        if step == "causal effects" and done < total:
            spent = done

    began = time.monotonic()
    cached = cache(engine, images, CACHE_BYTES)
    one_pass_s = time.monotonic() - began
    sensitivity = sensitivities(engine.program, engine, images, seed)
    effects = measure_effects(cached, sensitivity, progress, passes)
    wall_s = time.monotonic() - began
    return {
        "passes_allowed": passes,
        "passes_spent": round(spent, 2),
        "passes_by_the_clock": round(wall_s / one_pass_s, 1),
        "wall_s": round(wall_s, 1),
        "intervened": sum(e.source == "intervention" for e in effects),
        "channels": len(effects),
        "memory_peak_bytes": peak_bytes(),
        "effects": effects,
    }


def whole_round(traced: Traced, images: np.ndarray[Any, Any], seed: int) -> dict[str, Any]:
    """What the first round of a run costs: effects, orders and the responses of every candidate width."""
    began = time.monotonic()
    outputs(Engine.of(traced.program), torch.from_numpy(images))
    one_pass_s = time.monotonic() - began
    candidates, _ = allocatable(traced.program)
    began = time.monotonic()
    found = score(
        traced.program, State(traced.program), images, candidates, "causal",
        repair=True, round_=0, seed=seed, effect_passes=EFFECT_PASSES, progress=lambda *_: None,
    )  # fmt: skip
    wall_s = time.monotonic() - began
    return {
        "widths": sum(len(widths) for widths in found.losses.values()),
        "images": len(images),
        "images_of_responses": found.images,
        "pass_s": round(one_pass_s, 2),
        "wall_s": round(wall_s, 1),
        "passes_by_the_clock": round(wall_s / one_pass_s, 1),
        "memory_peak_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--images", type=int, default=256, help="calibration images (default 256)")
    parser.add_argument("--passes", default="0,5,20,60", help="budgets of forward passes (default 0,5,20,60)")
    parser.add_argument("--no-brute", action="store_true", help="cost only")
    parser.add_argument("--round", action="store_true", help="the cost of a whole first round of `causal`, responses included")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; other models' are kept")
    given = parser.parse_args()
    try:
        request = schema.load_json(schema.RunRequest, given.run / "request.json")
        traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
        images = load_images(request, traced.preprocess, traced.classes, lambda *_: None)
    except EdgekitError as error:
        note(str(error))
        sys.exit(error.exit_code)
    sample = torch.from_numpy(images.calibration[: given.images])
    engine = Engine.of(traced.program)
    name = Path(request.model.rpartition(":")[2]).stem
    found: dict[str, Any] = {"model": name, "images": len(sample), "rows": []}
    budgets = [float(text) for text in given.passes.split(",")]
    scores = [scoring(engine, sample, passes, request.seed) for passes in budgets]
    truth = None if given.no_brute else brute_force(cache(engine, sample, CACHE_BYTES))
    for row in scores:
        effects = {(e.group, e.channel): e for e in row.pop("effects")}
        if truth:
            keys, categories, means = truth
            told = [effects[key] for key in keys]
            at = [i for i, category in enumerate(categories) if category in SIGNIFICANT]
            row |= {
                "categories_agree": float(np.mean([e.category == c for e, c in zip(told, categories, strict=True)])),
                "significant": len(at),
                "spearman_significant": float(spearmanr([means[i] for i in at], [told[i].effect_logodds for i in at])[0]),
            }
        found["rows"].append(row)
        note(json.dumps(row))
    if truth:
        counts = {c: truth[1].count(c) for c in ("critical", "neutral", "detrimental", "undecided")}
        found["brute_force"] = counts | {"passes": round(brute_passes(cache(engine, sample, CACHE_BYTES)), 1)}
        note(json.dumps(found["brute_force"]))
    if given.round:
        found["round"] = whole_round(traced, images.calibration[: given.images], request.seed)
        note(json.dumps(found["round"]))
    if given.output:
        document = json.loads(given.output.read_text()) if given.output.exists() else {"results": []}
        document["results"] = [r for r in document["results"] if r["model"] != name] + [found]
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
