"""The verb `sweep`: several budgets from one table, one dense measurement and one scoring of the dense network.

Budgets are met from the loosest to the tightest. A tighter one goes on from a network that a looser one led to, with as many
rounds in all as a run of its own has, or more: each round is scored on the repaired network before it, as in a single run.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit import report as reports
from toolkit import run as single
from toolkit.errors import BudgetError, EdgekitError, UsageError
from toolkit.graph import Program, apply
from toolkit.prune.pruner import Scores, State
from toolkit.prune.repair import with_parameters
from toolkit.run import loop
from toolkit.run.evaluate import predictions
from toolkit.run.pareto import knee
from toolkit.run.prepare import Progress, open_target
from toolkit.schema import (
    Budget,
    Comparison,
    Manifest,
    Plan,
    Report,
    RunRequest,
    Sweep,
    SweepPoint,
    load_json,
    save_json,
    write_text,
)
from toolkit.weights import read_weights

SCORED = ("causal", "cswap", "taylor", "l1", "l2", "random")  # methods whose first round is the same for all budgets
SHARED = ".shared"


def sweep(request: RunRequest, budgets: Sequence[Budget], progress: Progress) -> Sweep:
    """A run for each budget, in a folder of its own under `request.out`; points that are finished there are kept.

    `request.budget` does not count. A budget under the floor is refused by itself; the others go on.

    Raises:
        EdgekitError: with what was wrong and what to run next; a missed budget is no error but part of the answer.
    """
    requests = requests_of(request, budgets)
    for each in requests:
        single.check_request(each)
    if request.precision == "auto":
        raise UsageError(
            "A sweep is of one precision.", "Run it with --precision fp32 and with int8, and compare both: edgekit report A B."
        )
    out, clock = Path(request.out), single.Clock()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", "Give -o a folder.")
    points = {each.out: kept for each in requests if (kept := finished(each, out)) is not None}
    if len(points) < len(requests):
        target = open_target(request.profile, request.threads, request.precision, on=request.on)
        shared = out / SHARED
        try:
            begin = single.start(requests[0], target, shared, clock, progress)
            work_off(Work(begin, requests, clock), single.job_without_floor(begin, target), points, out)
        finally:
            shutil.rmtree(shared, ignore_errors=True)
    return summed_up(requests, points, out, clock)


def requests_of(request: RunRequest, budgets: Sequence[Budget]) -> list[RunRequest]:
    """A request for each budget, in the order given.

    Raises:
        UsageError: no budget, the same one twice, or none that is a latency.
    """
    if not budgets:
        raise UsageError("A sweep needs budgets.", "Give them like --budgets 0.9x,0.7x,0.5x.")
    if any(budget.unlimited for budget in budgets):
        raise UsageError("A sweep is over latencies; `none` is not one.", "Run that by itself: edgekit run ... --budget none.")
    names = [folder_of(budget) for budget in budgets]
    if twice := [budget.text for i, budget in enumerate(budgets) if names[i] in names[:i]]:
        raise UsageError(f"The budget {twice[0]} is there twice.", "Give every budget once.")
    out = Path(request.out)
    return [
        msgspec.structs.replace(request, budget=budget, out=str(out / name)) for budget, name in zip(budgets, names, strict=True)
    ]


def folder_of(budget: Budget) -> str:
    """A budget as the name of a folder: `0.5x`, `8ms`."""
    return re.sub("[^A-Za-z0-9.]", "", re.sub("[µμ]", "u", budget.text)).lower()


@dataclasses.dataclass(frozen=True)
class Work:
    begin: single.Beginning
    requests: Sequence[RunRequest]
    clock: single.Clock


def work_off(work: Work, base: loop.Job, points: dict[str, SweepPoint], out: Path) -> None:
    """Everything that is not in `points` yet, from the loosest budget to the tightest; points are written as they come."""
    clock, begin = work.clock, work.begin
    jobs = sorted((budgeted(base, each) for each in work.requests), key=lambda job: -job.budget)
    with clock.step("floor"):
        floor = loop.measure_floor(base, jobs[-1].budget)
    first: Scores | None = None
    before: np.ndarray[Any, Any] | None = None
    ladder: list[loop.Rung] = []
    for job in jobs:
        where = job.request.out
        if where in points:
            ladder += again(job, first)
            continue
        own = single.Clock()
        try:
            ready = dataclasses.replace(job, floor=loop.above(job, *floor))
            if first is None and job.request.method in SCORED:
                with clock.step("first scoring"):
                    first = loop.score_round(dataclasses.replace(ready, progress=begin.progress), State(ready.program), 0)
                ladder = [dataclasses.replace(rung, history=(first,)) for rung in ladder]
            if before is None:
                with clock.step("evaluate dense"):
                    before = predictions(job.target, begin.dense_path, begin.images, "accuracy, dense", begin.progress)
            single.clear(job.folder)
            for file in begin.out.glob("dense*"):
                shutil.copy(file, job.folder / file.name)
            with own.step("prune"):
                outcome = single.prune(ready, first, ladder)
            ladder += outcome.ladder
            points[where] = point_of(single.deliver(begin, ready, outcome, own, before=before), out, job.request)
        except BudgetError as error:
            if job.folder.exists():
                single.clear(job.folder)  # an earlier run's results are not this budget's
            points[where] = refused(job, out, error)
        finally:
            single.tidy(job.folder)
        summed_up(work.requests, points, out, clock, partly=True)


def budgeted(base: loop.Job, request: RunRequest) -> loop.Job:
    """The job of one budget, in its own folder."""
    exact_ns, folder = request.budget.latency_ns, Path(request.out)
    budget = exact_ns / loop.steady_ns(base, base.dense_ns) if exact_ns else request.budget.ratio
    dense_path = folder / base.dense_path.name

    def labelled(step: str, done: float, total: float) -> None:
        base.progress(f"{request.budget.text}: {step}", done, total)

    return dataclasses.replace(
        base,
        request=request,
        folder=folder,
        dense_path=dense_path,
        exact_ns=exact_ns,
        budget=budget,
        floor=None,
        progress=labelled,
        trainer=dataclasses.replace(base.trainer, request=request, folder=folder, progress=labelled) if base.trainer else None,
    )


def finished(request: RunRequest, out: Path) -> SweepPoint | None:
    """The point where a run for the same request has left all its files."""
    folder = Path(request.out)
    try:
        report, asked = load_json(Report, folder / "report.json"), load_json(RunRequest, folder / "request.json")
    except EdgekitError:
        return None
    return point_of(report, out, request) if same(request, asked) else None


def same(request: RunRequest, resolved: RunRequest) -> bool:
    """Whether `resolved` is what `request` is written down as."""

    def plain(each: RunRequest) -> RunRequest:
        data = str(Path(each.data).resolve())
        eval_data = str(Path(each.eval_data).resolve()) if each.eval_data else ""
        return msgspec.structs.replace(each, data=data, eval_data=eval_data, preprocess=None, out="")

    given = request.preprocess is None or request.preprocess == resolved.preprocess
    return given and plain(request) == plain(resolved)


def again(job: loop.Job, first: Scores | None) -> list[loop.Rung]:
    """A finished point's network as a rung, from its files; none where it is not what the plan says any more."""
    try:
        state = restored(job.program, job.folder)
    except (EdgekitError, OSError, KeyError, RuntimeError, ValueError):
        return []
    measured = load_json(Comparison, job.folder / "measurements" / "comparison.json")
    rounds = load_json(Plan, job.folder / "plan.json").rounds
    return [loop.Rung(state, measured.ratio, rounds, (first,) if first else ())]


def restored(program: Program, folder: Path) -> State:
    """The pruned network of a finished run: its plan applied to the dense program, with the weights that were delivered."""
    plan = load_json(Plan, folder / "plan.json")
    alive = {group.name: group.kept for group in plan.groups if group.width_after < group.width_before}
    sliced, saved = apply(program, alive), read_weights(folder / "weights.safetensors")
    shapes = {name: value.shape for name, value in sliced.module.state_dict().items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise UsageError(f"{folder} holds other weights than its plan says.", "Remove the folder and run it again.")
    return State(with_parameters(sliced, saved), alive)


def point_of(report: Report, out: Path, request: RunRequest) -> SweepPoint:
    """What the sweep's record says of a finished run."""
    return SweepPoint(
        budget=report.budget,
        folder=str(Path(request.out).relative_to(out)),
        verdict=report.verdict,
        valid=report.valid,
        reason="; ".join(report.invalid_reasons),
        budget_ns=report.budget_ns,
        measured_ns=report.measured_ns,
        measured_ci95_ns=report.measured_ci95_ns,
        speedup=report.speedup,
        speedup_ci95=report.speedup_ci95,
        accuracy=report.accuracy_pruned,
        accuracy_change_ci95=report.accuracy_change_ci95,
        agreement=report.agreement,
        parameters=report.parameters_pruned,
        size_bytes=report.size_pruned_bytes,
        rounds=load_json(Plan, Path(request.out) / "plan.json").rounds,
        wall_s=round(sum(report.wall_s.values()), 2),
    )


def refused(job: loop.Job, out: Path, error: BudgetError) -> SweepPoint:
    return SweepPoint(
        budget=job.request.budget.text,
        folder=str(job.folder.relative_to(out)),
        verdict="refused",
        reason=f"{error.message} {error.hint}".strip(),
        budget_ns=job.exact_ns or job.budget * job.dense_ns,
    )


def summed_up(
    requests: Sequence[RunRequest], points: dict[str, SweepPoint], out: Path, clock: single.Clock, partly: bool = False
) -> Sweep:
    """The record of what there is, written as `sweep.json` and `sweep.html`; `partly`: more is to come."""
    known = [(each, points[each.out]) for each in requests if each.out in points]
    ordered = sorted((point for _, point in known), key=lambda point: -point.budget_ns)
    found = [(each, load_json(Report, Path(each.out) / "report.json")) for each, point in known if point.verdict != "refused"]
    loosest = max((report for _, report in found), key=lambda report: report.measured_ns, default=None)
    manifest = load_json(Manifest, Path(found[0][0].out) / "manifest.json") if found else None
    request = requests[0]
    at, why = knee_of(ordered, loosest)
    record = Sweep(
        verdict="met" if not partly and all(p.verdict == "met" and p.valid for p in points.values()) else "missed",
        model=request.model,
        method=request.method,
        profile=request.profile,
        runtime=loosest.runtime if loosest else "",
        fingerprint=manifest.fingerprint.id if manifest else "",
        statistic=request.statistic,
        precision="fp32" if request.precision == "auto" else request.precision,
        dense_ns=loosest.dense_ns if loosest else None,
        accuracy_dense=loosest.accuracy_dense if loosest else None,
        parameters_dense=loosest.parameters_dense if loosest else None,
        evaluation_images=loosest.evaluation_images if loosest else None,
        points=tuple(ordered),
        knee=at,
        knee_why=why,
        wall_s={**clock.wall_s, "points": round(sum(point.wall_s for point in ordered), 2)},
        command=command_of(requests, out),
    )
    save_json(out / "sweep.json", record)
    if not partly:
        write_text(out / "sweep.html", reports.sweep_html(record))
    return record


def knee_of(points: Sequence[SweepPoint], loosest: Report | None) -> tuple[str, str]:
    """(budget of the knee, how it was found), among the points that met their budgets and the dense network."""
    met = [point for point in points if point.verdict == "met"]
    if not met or loosest is None:
        return "", "no budget was met"
    quality = [point.agreement or 0.0 if point.accuracy is None else point.accuracy for point in met]
    what = "agreement" if met[0].accuracy is None else "accuracy"
    fastest = min(met, key=lambda point: point.measured_ns or 0.0)
    if all(p.accuracy_change_ci95 is not None and p.accuracy_change_ci95[1] >= 0 for p in met):
        return fastest.budget, f"no point is shown to lose accuracy on {loosest.evaluation_images} images: the fastest"
    dense = (1.0, 1.0 if loosest.accuracy_dense is None else loosest.accuracy_dense)
    at = knee([dense, *((1 / (point.speedup or 1.0), q) for point, q in zip(met, quality, strict=True))])
    if at is None or at == 0:
        return "", f"{what} falls about as fast as latency throughout"
    return met[at - 1].budget, f"furthest above the line from the dense network to the fastest one, {what} against latency"


def command_of(requests: Sequence[RunRequest], out: Path) -> str:
    """The command line that repeats the sweep, or goes on with it."""
    words = shlex.split(single.command_of(requests[0]))
    words[1] = "sweep"
    at = words.index("--budget")
    words[at : at + 2] = ["--budgets", ",".join(each.budget.text for each in requests)]
    words[words.index("-o") + 1] = str(out)
    return shlex.join(words)


__all__ = ["sweep"]
