#!/usr/bin/env python3
"""What each part of the pruner is worth: tools/bench_ablation.py edgekit-out --shares 0.7,0.5 -o docs/results/ablation.json

Takes the model, images and profile of a finished run, and prunes to the same shares of the dense latency with one part changed at
a time. All variants are held to the *predicted* latency of one table, the run's own where the cache still has it, so that
nothing but the part differs; accuracy is counted with PyTorch on the run's evaluation images. Nothing is timed.

  tools/bench_ablation.py edgekit-out --only causal,cswap --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration  # noqa: E402
from toolkit import schema  # noqa: E402
from toolkit.errors import EdgekitError  # noqa: E402
from toolkit.graph import Program  # noqa: E402
from toolkit.latency import LatencyModel  # noqa: E402
from toolkit.prune import pruner, repair, responses  # noqa: E402
from toolkit.prune.allocate import allocate  # noqa: E402
from toolkit.prune.engine import Engine, distortion  # noqa: E402
from toolkit.prune.repair import outputs  # noqa: E402
from toolkit.run.evaluate import judge  # noqa: E402
from toolkit.run.loop import AIM, EFFECT_PASSES, rounds_for  # noqa: E402
from toolkit.run.prepare import (  # noqa: E402
    Images,
    allocatable,
    latency_table,
    load_and_trace,
    load_images,
    open_target,
    table_networks,
)


def note(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False)


def quiet(step: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """A pruner with one part changed: the method, whether it repairs, rounds (0: as a run takes), and functions in its place."""

    what: str
    method: str = "causal"
    repair: bool = True
    rounds: int = 0
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def only_order(name: str) -> Callable[..., dict[str, Sequence[int] | None]]:
    """`removal_orders` with one of the two orders that `causal` compares."""
    original = pruner.removal_orders
    return lambda *given: {key: order for key, order in original(*given).items() if key == name}


def unsolved(*given: Any, **named: Any) -> responses.GroupResponses:
    return responses.group_responses(*given, **{**named, "repair": False})


def by_count(group: responses.GroupResponses) -> dict[int, float]:
    """Instead of what was measured, the squared share of the group's channels that go."""
    width = max(response.width for response in group.responses)
    return {response.width: (1 - response.width / width) ** 2 for response in group.responses}


VARIANTS = {
    "causal": Variant("as it is"),
    "order-causal": Variant("channels go by causal effect", instead={"removal_orders": only_order("causal effect")}),
    "order-least-squares": Variant("channels go by least squares", instead={"removal_orders": only_order("least squares")}),
    "drops-as-they-are": Variant(
        "a dropped branch is judged without what the next one can make up for", instead={"drop": lambda *_: {}}
    ),
    "responses-as-they-are": Variant(
        "a width is judged without solving its consumers again", instead={"group_responses": unsolved}
    ),
    "no-responses": Variant("a width loses the squared share of channels that go", instead={"measured_losses": by_count}),
    "no-feedback": Variant("repair does not make up for what a residual stream lacks", instead={"join_of": lambda *_: None}),
    "one-round": Variant("one round", rounds=1),
    "three-rounds": Variant("three rounds, the last cut from what the second left", rounds=3),
    "five-rounds": Variant("five rounds, likewise", rounds=5),
    "no-repair": Variant("weights stay", repair=False),
    "cswap": Variant("C-SWAP: summed single effects instead of responses, five rounds", method="cswap"),
    "l1": Variant("channels go by L1 norm", method="l1"),
    "taylor": Variant("channels go by first-order effect", method="taylor"),
    "random": Variant("channels go at random", method="random"),
}


@contextmanager
def replaced(variant: Variant) -> Iterator[None]:
    """The variant's functions in place."""
    places = {
        "removal_orders": (pruner, "removal_orders"),
        "group_responses": (pruner, "group_responses"),
        "measured_losses": (pruner, "measured_losses"),
        "drop": (responses, "without_branch"),
        "join_of": (repair, "join_of"),
    }
    patches = [mock.patch.object(*places[name], function) for name, function in variant.instead.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@dataclass(frozen=True)
class Case:
    """What all variants share."""

    program: Program
    candidates: Mapping[str, Sequence[int]]
    images: Images
    model: LatencyModel
    evaluation: torch.Tensor
    dense: torch.Tensor  # outputs on the evaluation images
    device: str

    def share(self, widths: Mapping[str, int]) -> float:
        return self.model.predict(widths) / self.model.predict({g.name: g.width for g in self.program.groups})


def open_case(folder: Path, samples: int, seed: int) -> Case:
    request = schema.load_json(schema.RunRequest, folder / "request.json")
    report = schema.load_json(schema.Report, folder / "report.json")
    request = msgspec.structs.replace(request, samples=samples or request.samples, seed=seed)
    target = open_target(request.profile, request.threads, request.precision)
    traced = load_and_trace(request.model, request.weights, request.preprocess, 0)
    candidates, _ = allocatable(traced.program, request.keep, request.min_width)
    images = load_images(request, traced.preprocess, traced.classes, quiet)
    with tempfile.TemporaryDirectory() as temporary:
        networks = table_networks(traced.program, candidates, Path(temporary), 0, quiet, target.profile.batch)
        table = latency_table(target, networks, candidates, 0, report.dense_ns, quiet)
    full = {group.name: group.width for group in traced.program.groups}
    evaluation = torch.from_numpy(calibration.load_batch(images.evaluation, images.indices, images.transform))
    dense = outputs(Engine.of(traced.program), evaluation)
    return Case(
        traced.program, table.model.far_edges(candidates, full), images, table.model, evaluation, dense, target.fingerprint.device
    )


def pruned(case: Case, variant: Variant, share: float, seed: int) -> tuple[Program, float]:
    """The network at this share of the predicted dense latency, and what was predicted of it."""
    state = pruner.State(case.program)
    rounds = variant.rounds or rounds_for(share, variant.method)
    whole = case.model.predict(state.widths(case.program))
    free = variant.repair and not variant.rounds and variant.method != "cswap"  # where a run may leave rounds out
    ways = []
    for r in range(rounds):
        now = state.widths(case.program)
        options = {name: tuple(w for w in ws if w <= now[name]) or (now[name],) for name, ws in case.candidates.items()}
        passes = EFFECT_PASSES if r == 0 or variant.method == "cswap" else 0.0
        scores = pruner.score(
            case.program, state, case.images.calibration, options, variant.method,
            repair=variant.repair, round_=r, seed=seed, effect_passes=passes, progress=quiet,
        )  # fmt: skip
        ways = [*ways, (state, scores, options)] if free else [(state, scores, options)]
        budget = AIM * share ** ((r + 1) / rounds) * whole
        found = [cut(case, variant, *way, budget, seed) for way in (ways if r == rounds - 1 else ways[-1:])]
        state = min(found, key=lambda done: done.repaired.distortion if done.repaired else 0.0).state
    return state.program, case.share(state.widths(case.program))


def cut(
    case: Case, variant: Variant, state: pruner.State, scores: pruner.Scores, options: Mapping[str, Sequence[int]],
    budget: float, seed: int,
) -> pruner.Cut:  # fmt: skip
    """Cut to what a budget in the table's nanoseconds allows."""
    widths = allocate(case.program.groups, options, scores.losses, case.model.costs(), case.model.overhead_ns, budget).widths
    kept = pruner.kept_channels(state, scores, widths)
    return pruner.cut(case.program, state, kept, case.images.calibration, repair_=variant.repair, seed=seed, progress=quiet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--shares", default="0.7,0.5", help="of the dense latency (default 0.7,0.5)")
    parser.add_argument("--only", default=",".join(VARIANTS), help=f"variants (default all: {', '.join(VARIANTS)})")
    parser.add_argument("--seeds", default="0", help="calibration images and order (default 0)")
    parser.add_argument("--samples", type=int, default=0, help="calibration images (default as the run)")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; what it already holds is not done again")
    given = parser.parse_args()
    unknown = [name for name in given.only.split(",") if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    document = json.loads(given.output.read_text()) if given.output and given.output.exists() else {"results": []}
    name = Path(schema.load_json(schema.RunRequest, given.run / "request.json").model.rpartition(":")[2]).stem
    for seed in map(int, given.seeds.split(",")):
        try:
            case = open_case(given.run, given.samples, seed)
        except EdgekitError as error:
            note(str(error))
            sys.exit(error.exit_code)
        for share in map(float, given.shares.split(",")):
            for label in given.only.split(","):
                key = {"model": name, "share": share, "variant": label, "seed": seed}
                if any(key.items() <= done.items() for done in document["results"]):
                    continue
                began, variant = time.monotonic(), VARIANTS[label]
                with replaced(variant):
                    program, predicted = pruned(case, variant, share, seed)
                after = outputs(Engine.of(program), case.evaluation)
                labels = case.images.labels
                found = judge(
                    case.dense.argmax(1).numpy(), after.argmax(1).numpy(), None if labels is None else np.asarray(labels)
                )
                row = key | {
                    "what": variant.what, "predicted_share": round(predicted, 4), "accuracy_dense": found.dense,
                    "accuracy": found.pruned, "change_ci95": found.change_ci95, "agreement": found.agreement,
                    "distortion": distortion(after, case.dense), "evaluation_images": found.images,
                    "calibration_images": len(case.images.calibration), "table_mape": case.model.held_out.mape,
                    "wall_s": round(time.monotonic() - began, 1), "device": case.device,
                }  # fmt: skip
                document["results"].append(row)
                right = row["accuracy"] or row["agreement"]
                note(f"{name} {share:.2f}x {label:22} {right:.4f} at {predicted:.3f}x  {row['wall_s']:.0f} s")
                if given.output:
                    given.output.parent.mkdir(parents=True, exist_ok=True)
                    given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
