"""The main job and its single steps, from a request to a report. Each raises only errors of the tree."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit import bench as benches
from toolkit import report as reports
from toolkit.errors import BudgetError, EdgekitError, UsageError
from toolkit.export import (
    Quantizing,
    Wanted,
    export_artefacts,
    from_program,
    save_onnx,
    save_program,
    save_weights,
    sha256,
    to_onnx,
)
from toolkit.graph import memory_of, unprunable
from toolkit.latency import share_table
from toolkit.prune import effects as causes
from toolkit.prune.allocate import Allocation
from toolkit.prune.modules import module_plan
from toolkit.prune.pruner import Scores
from toolkit.run import crespr, loop
from toolkit.run.evaluate import Accuracy, judge, predictions
from toolkit.run.export import quantizing_for
from toolkit.run.finetune import finetune
from toolkit.run.prepare import (
    Images,
    Networks,
    Target,
    Traced,
    allocatable,
    groups_record,
    latency_table,
    load_and_trace,
    load_images,
    open_target,
    table_networks,
)
from toolkit.run.psap import psap
from toolkit.run.training import Trainer, forget, samples_for, trains
from toolkit.run.training import check_request as check_training
from toolkit.schema import (
    Artefact,
    Budget,
    CategoryCounts,
    Effect,
    Evaluation,
    FineTuned,
    GroupPlan,
    GroupReport,
    KernelTime,
    Manifest,
    Plan,
    Precision,
    PrecisionChoice,
    Preprocess,
    Quantization,
    QuantizedDense,
    Report,
    RunRequest,
    TableSummary,
    save_json,
    write_text,
)
from toolkit.settings import differing

DEMO_SAMPLES = 256  # calibration images of the bundled network, which is small
QUANTIZING_IMAGES = 256  # that activation ranges are taken of
Progress = Callable[[str, float, float], None]
PACKAGES = ("edgekit", "torch", "onnx", "onnxruntime", "openvino", "onnxsim", "numpy", "scipy")


class Clock:
    """Wall time of each step in seconds."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.wall_s[name] = round(self.wall_s.get(name, 0.0) + time.monotonic() - started, 2)


def demo_request(out: str, budget: Budget, profile: str = "local-onnxruntime", seed: int = 0) -> RunRequest:
    """The main job on the model and images inside the package."""
    from toolkit import demo

    return RunRequest(
        model="demo",
        data=str(demo.data_path()),
        eval_data=str(demo.eval_path()),
        out=out,
        budget=budget,
        profile=profile,
        seed=seed,
        samples=DEMO_SAMPLES,
    )


def run(request: RunRequest, progress: Progress) -> Report:
    """Prune, export, measure and report; everything is written under `request.out`.

    Raises:
        EdgekitError: with what was wrong and what to run next; a missed budget is no error but the report's verdict.
    """
    check_request(request)
    clock, out = Clock(), Path(request.out)
    precisions: tuple[Precision, ...] = ("fp32", "int8") if request.precision == "auto" else (request.precision,)
    targets = [open_target(request.profile, request.threads, precision, on=request.on) for precision in precisions]
    begin = start(request, targets[0], out, clock, progress)
    try:
        job, choices, first = open_jobs(begin, targets)
        with clock.step("prune"):
            outcome = prune(job, first)
        return deliver(begin, job, outcome, clock, choices)
    finally:
        tidy(out)


def check_request(request: RunRequest) -> None:
    """Refuse what contradicts itself.

    Raises:
        UsageError: it does.
    """
    if request.max_memory_bytes and request.budget.unlimited:
        raise UsageError("--max-memory needs a latency budget.", "Give one that the dense network meets: --budget 1x.")
    if request.max_memory_bytes and request.precision != "fp32":
        message = "--max-memory counts a network in fp32, and says nothing of one in int8."
        raise UsageError(message, "Run it again with --precision fp32, or without it.")
    if request.precision == "auto" and request.budget.unlimited:
        raise UsageError("Without a budget there is nothing to choose a precision by.", "Give one, or --precision int8.")
    check_training(request)


def start(request: RunRequest, target: Target, out: Path, clock: Clock, progress: Progress) -> Beginning:
    """Model, images, and the dense network written into `out` and measured."""
    with clock.step("trace"):
        progress("trace", 0, 1)
        traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
        candidates, held = allocatable(traced.program, request.keep, request.min_width, request.method)
        progress("trace", 1, 1)
    with clock.step("images"):
        images = load_images(request, traced.preprocess, traced.classes, progress)
        trainer = Trainer(request, samples_for(request, images, traced.classes), out, progress) if trains(request) else None
    clear(out)
    with clock.step("dense"):
        progress("dense model", 0, 1)
        dense = export_dense(target, traced, images, out, request.model)
        dense_path = out / f"dense{target.artefact_suffix}"
        measured = benches.measure(target.profile, dense_path, statistic=request.statistic, time_limit_s=30.0)
        progress("dense model", 1, 1)
    return Beginning(
        request,
        traced,
        images,
        candidates,
        out,
        dense_path,
        measured.latency_ns,
        clock,
        progress,
        held=held,
        dense=dense,
        batch=target.profile.batch,
        trainer=trainer,
    )


def deliver(
    begin: Beginning,
    job: loop.Job,
    outcome: loop.Outcome,
    clock: Clock,
    choices: tuple[PrecisionChoice, ...] = (),
    before: np.ndarray[Any, Any] | None = None,
) -> Report:
    """What pruning led to, written whole into the job's folder. `before`: the dense network's predictions, where known."""
    out, images, progress = job.folder, job.images, job.progress
    tuned, one_shot = None, job.pruned_path(outcome.attempt.folder)
    if job.request.finetune:
        with clock.step("fine-tune"):
            outcome, tuned = tune(job, outcome)
    chosen = outcome.attempt
    with clock.step("deliver"):
        progress("files", 0, 1)
        artefacts = (*begin.dense, *move(chosen, out))
        save_program(chosen.cut.state.program, out / "model.pt2")
        save_weights(chosen.cut.state.program, out / "weights.safetensors")
    with clock.step("evaluate"):
        if before is None:
            before = predictions(job.target, job.dense_path, images, "accuracy, dense", progress)
        after = predictions(job.target, job.pruned_path(out), images, "accuracy, pruned", progress)
        accuracy = judge(before, after, images.labels)
        if tuned is not None:
            untuned = predictions(job.target, one_shot, images, "accuracy, one-shot", progress) if tuned.kept else after
            tuned = with_one_shot(tuned, judge(before, untuned, images.labels))
        unpruned = quantized_dense(job, before)
    progress("report", 0, 1)
    report = compose(job, begin.traced, outcome, accuracy, begin.held, clock, unpruned)
    report = msgspec.structs.replace(report, precision_choices=choices, finetuned=tuned)
    write_run(job, begin.traced, outcome, artefacts, report)
    forget(out)
    progress("report", 1, 1)
    return report


def tidy(out: Path) -> None:
    """Remove what only the way to a result needed."""
    for leftover in (*out.glob(".attempt*"), out / ".floor", out / ".lowered", out / ".networks"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(job: loop.Job, first: Scores | None, ladder: Sequence[loop.Rung] = ()) -> loop.Outcome:
    """The network that the request's method makes of the dense one, measured; each method has a module of its own.

    `ladder`: networks of looser budgets, for a method that can go on from them.
    """
    if job.request.method == "crespr":
        return crespr.close(job, first)
    if job.request.budget.unlimited:
        return loop.without_budget(job)
    if job.request.method == "psap":
        return psap(job)
    return loop.close(job, first, ladder)


def tune(job: loop.Job, outcome: loop.Outcome) -> tuple[loop.Outcome, FineTuned]:
    """Fine-tuning, with what it changed but for the accuracy of the network before it."""
    found = finetune(job, outcome)
    record = FineTuned(
        epochs=job.request.finetune,
        images=found.images,
        loss=job.request.train.loss,
        held_back_before=found.before,
        held_back_after=found.after,
        kept=found.kept,
        seconds=round(found.seconds, 1),
        accuracy_one_shot=None,
        agreement_one_shot=0.0,
    )
    return dataclasses.replace(found.outcome, notes=(*found.outcome.notes, *found.notes)), record


def with_one_shot(tuned: FineTuned, found: Accuracy) -> FineTuned:
    """The record with what the network was before fine-tuning."""
    return msgspec.structs.replace(tuned, accuracy_one_shot=found.pruned, agreement_one_shot=found.agreement)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run knows before it has a latency table."""

    request: RunRequest
    traced: Traced
    images: Images
    candidates: Mapping[str, tuple[int, ...]]
    out: Path
    dense_path: Path
    dense_ns: float
    clock: Clock
    progress: Progress
    held: Mapping[str, str]  # groups that are left whole, with the reason
    dense: tuple[Artefact, ...]
    batch: int
    trainer: Trainer | None = None  # of a run that trains weights

    @functools.cached_property
    def networks(self) -> Networks:
        """Of all its tables."""
        folder, seed = self.out / ".networks", self.request.seed
        return table_networks(self.traced.program, self.candidates, folder, seed, self.progress, self.batch)


def open_jobs(begin: Beginning, targets: Sequence[Target]) -> tuple[loop.Job, tuple[PrecisionChoice, ...], Scores | None]:
    """The job at the precision that was asked for; of several, the one that is predicted to lose least at the budget.

    Raises:
        EdgekitError: no precision can be pruned to the budget; that of the one with the lowest floor, where it has one.
    """
    if len(targets) == 1:
        return open_job(begin, targets[0]), (), None
    jobs: list[loop.Job] = []
    refused: dict[Precision, EdgekitError] = {}
    for target in targets:
        try:
            jobs.append(open_job(begin, target))
        except EdgekitError as error:
            refused[target.profile.precision] = error
    if not jobs:
        raise min(refused.values(), key=lambda e: e.smallest_budget_ns if isinstance(e, BudgetError) else float("inf"))
    jobs = [dataclasses.replace(job, budget=jobs[0].budget) for job in jobs]  # the same nanoseconds are the same share of dense
    with begin.clock.step("prune"):
        job, lost, first = loop.choose(jobs)
    found = {each.target.profile.precision: share for each, share in zip(jobs, lost, strict=True)}
    choices = [PrecisionChoice(precision=name, distortion=share) for name, share in found.items()]
    choices += [PrecisionChoice(precision=name, distortion=None, reason=error.message) for name, error in refused.items()]
    return job, tuple(choices), first


def open_job(begin: Beginning, target: Target) -> loop.Job:
    """Everything up to pruning at one precision: the table, and the floor measured.

    Raises:
        BudgetError: the budget is under the floor.
    """
    job = job_without_floor(begin, target)
    if begin.request.budget.unlimited:
        return job
    with begin.clock.step("floor"):
        return dataclasses.replace(job, floor=loop.check_floor(job))


def job_without_floor(begin: Beginning, target: Target) -> loop.Job:
    """Everything up to pruning but the floor."""
    request, clock, program = begin.request, begin.clock, begin.traced.program
    exact_ns = request.budget.latency_ns
    lowered = None
    if target.profile.precision != "fp32":
        with clock.step("lower precision"):
            lowered = lower_dense(begin, target)
    with clock.step("table"):
        in_float = [layer.layer for layer in lowered[2].kept_float] if lowered else []
        table = latency_table(target, begin.networks, begin.candidates, request.seed, begin.dense_ns, begin.progress, in_float)
        candidates = table.model.far_edges(begin.candidates, {group.name: group.width for group in program.groups})
    job = loop.Job(
        request=request,
        target=target,
        program=program,
        images=begin.images,
        candidates=candidates,
        table=table,
        dense_path=begin.dense_path,
        dense_ns=begin.dense_ns,
        folder=begin.out,
        budget=exact_ns / begin.dense_ns if exact_ns else request.budget.ratio,
        exact_ns=exact_ns,
        progress=begin.progress,
        memory=memory_of(program),
        trainer=begin.trainer,
    )
    if lowered:
        path, how, record = lowered
        measured = loop.compare(job, path, job.dense_widths)
        job = dataclasses.replace(job, lowered=loop.Lowered(path, measured, how, record))
    if exact_ns:
        job = dataclasses.replace(job, budget=exact_ns / loop.steady_ns(job, begin.dense_ns))
    return job


def clear(out: Path) -> None:
    """Make the folder, without an earlier run's results in it."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", "Give -o a folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.html", "plan.json", "manifest.json", "modules.json"):
        (out / name).unlink(missing_ok=True)


def export_dense(target: Target, traced: Traced, images: Images, out: Path, name: str) -> tuple[Artefact, ...]:
    profile = target.profile
    wanted = Wanted(
        backend=target.checking,
        formats=target.formats,
        threads=profile.threads,
        metadata={"edgekit.profile": profile.id, "edgekit.model": name},
    )
    return export_artefacts(from_program(traced.program), out, "dense", "dense", wanted, loop.parity_samples(images))


def lower_dense(begin: Beginning, target: Target) -> tuple[Path, Quantizing, Quantization]:
    """The unpruned network at the target's precision: its file, how it came about, and what that did to its outputs."""
    folder = begin.out / ".lowered"
    folder.mkdir(exist_ok=True)
    profile = target.profile
    images = begin.images.calibration[:QUANTIZING_IMAGES]
    how = quantizing_for(profile, target.checking, images, max_drop=begin.request.max_drop)
    wanted = Wanted(
        backend=target.checking, formats=target.formats, precision=profile.precision, threads=profile.threads, quantizing=how
    )
    samples = loop.parity_samples(begin.images)
    source = from_program(begin.traced.program)
    record = export_artefacts(source, folder, "model", "dense", wanted, samples, begin.progress)[0].quantization
    assert record is not None
    how = dataclasses.replace(how, ranges=record.ranges, weight_bits=record.weight_bits, search=bool(record.kept_float))
    return folder / f"model{target.artefact_suffix}", how, record


def quantized_dense(job: loop.Job, dense: np.ndarray[Any, Any]) -> QuantizedDense | None:
    """What the delivered precision alone gives, None where it is fp32."""
    if job.lowered is None:
        return None
    found = predictions(job.target, job.lowered.path, job.images, f"accuracy, {job.target.profile.precision} dense", job.progress)
    return QuantizedDense(
        ratio=job.lowered.measured.ratio,
        ratio_ci95=job.lowered.measured.ratio_ci95,
        accuracy=judge(dense, found, job.images.labels).pruned,
        quantization=job.lowered.quantization,
    )


def move(chosen: loop.Attempt, out: Path) -> tuple[Artefact, ...]:
    """The attempt's files into the run's folder."""
    for file in chosen.folder.iterdir():
        os.replace(file, out / file.name)
    return chosen.artefacts


def compose(
    job: loop.Job,
    traced: Traced,
    outcome: loop.Outcome,
    accuracy: Accuracy,
    held: Mapping[str, str],
    clock: Clock,
    unpruned: QuantizedDense | None,
) -> Report:
    """The report from what the steps returned."""
    request, chosen = job.request, outcome.attempt
    final = loop.confirmation(chosen)
    dense_ns, measured_ns = final.dense.latency_ns, final.pruned.latency_ns
    pruned_program = chosen.cut.state.program
    removed = removed_effects(job, outcome)
    repaired = chosen.cut.repaired
    return Report(
        verdict="met" if loop.met(job, chosen) else "missed",
        valid=final.pruned.valid and final.dense.valid,
        invalid_reasons=tuple(dict.fromkeys((*final.dense.invalid_reasons, *final.pruned.invalid_reasons))),
        model=request.model,
        method=request.method,
        profile=job.target.profile.id,
        runtime=f"{job.target.profile.runtime} {job.target.fingerprint.runtime_version}",
        budget=request.budget.text,
        budget_ns=job.exact_ns or request.budget.ratio * dense_ns,
        statistic=request.statistic,
        dense_ns=dense_ns,
        measured_ns=measured_ns,
        measured_ci95_ns=final.pruned.latency_ci95_ns,
        predicted_ns=chosen.predicted * dense_ns,
        speedup=1 / final.ratio,
        speedup_ci95=(1 / final.ratio_ci95[1], 1 / final.ratio_ci95[0]),
        accuracy_dense=accuracy.dense,
        accuracy_pruned=accuracy.pruned,
        accuracy_change_ci95=accuracy.change_ci95,
        agreement=accuracy.agreement,
        evaluation_images=accuracy.images,
        calibration_images=len(job.images.calibration),
        parameters_dense=job.program.parameter_count(),
        parameters_pruned=pruned_program.parameter_count(),
        macs_dense=job.program.macs(),
        macs_pruned=pruned_program.macs(),
        size_dense_bytes=size(job.dense_path),
        size_pruned_bytes=size(job.pruned_path(job.folder)),
        memory_dense_bytes=job.memory.bytes_at(job.dense_widths),
        memory_pruned_bytes=memory_of(pruned_program).bytes_at({g.name: g.width for g in pruned_program.groups}),
        memory_limit_bytes=request.max_memory_bytes,
        precision=job.target.profile.precision,
        quantization=chosen.artefacts[0].quantization,
        quantized_dense=unpruned,
        prunable_macs_share=job.program.prunable_macs_share(),
        prunable_latency_share=prunable_latency_share(job),
        floor_ns=job.floor.share * dense_ns if job.floor else 0.0,
        optimality_gap=chosen.allocation.optimality_gap,
        iterations=outcome.iterations,
        table=job.model.summary(),
        groups=group_reports(job, outcome, removed),
        unprunable=tuple(dict([*unprunable(job.program), *held.items()]).items()),
        critical_removed=sum(counts.critical + counts.undecided for counts in removed.values()),
        kernels=kernel_times(job, chosen.allocation),
        proof_max_relative_error=outcome.proof,
        repair=describe_repair(repaired, request),
        wall_s=clock.wall_s,
        seed=request.seed,
        environment=environment(job.target),
        command=command_of(request),
        notes=(*notes(traced, outcome, job.lowered is not None), *where_judged(job.target)),
    )


def prunable_latency_share(job: loop.Job) -> float:
    """Share of the kernels' dense time, as the table has it, in places that this run can make narrower; 0-1."""
    varying = {name for name, widths in job.candidates.items() if len(widths) > 1}
    dense, whole, free = job.dense_widths, 0.0, 0.0
    for site in job.model.sites:
        cost = job.model.site_cost(site, site.c_in.at(dense), site.c_out.at(dense))
        whole += cost
        free += cost if varying.intersection(site.c_in.groups + site.c_out.groups) else 0.0
    return free / whole


def size(path: Path) -> int:
    """Bytes of an artefact with its weights file."""
    return sum(
        p.stat().st_size
        for p in {path, path.with_suffix(".bin") if path.suffix == ".xml" else Path(f"{path}.data")}
        if p.exists()
    )


def describe_repair(repaired: object, request: RunRequest) -> str:
    from toolkit.prune.repair import Repaired

    if request.method == "psap":
        return "none, weights were trained"
    if not isinstance(repaired, Repaired):
        return "off" if not request.repair else "nothing was cut"
    solved = sum(layer.ridge >= 0 for layer in repaired.layers)
    verb = "kept" if repaired.kept else "not kept, it did not help"
    return (
        f"least squares in {solved} of {len(repaired.layers)} operators, {verb}: "
        f"distortion on held-back images {repaired.before:.4f} -> {repaired.after:.4f}"
    )


def removed_effects(job: loop.Job, outcome: loop.Outcome) -> dict[str, CategoryCounts]:
    """Categories, in the dense network, of the channels that went."""
    effects = outcome.scores[0].effects
    alive = outcome.attempt.cut.state.alive
    return {
        g.name: causes.count(effects, g.name, set(range(g.width)) - set(alive[g.name])) if g.name in alive else CategoryCounts()
        for g in job.program.groups
    }


def group_reports(job: loop.Job, outcome: loop.Outcome, removed: dict[str, CategoryCounts]) -> tuple[GroupReport, ...]:
    effects: dict[str, list[Effect]] = {}
    for effect in outcome.scores[0].effects:
        effects.setdefault(effect.group, []).append(effect)
    after = outcome.attempt.cut.state.widths(job.program)
    found = []
    for g in job.program.groups:
        own = effects.get(g.name, [])
        mean = sum(e.effect_logodds for e in own) / len(own) if own else 0.0
        low = sum(e.ci_low for e in own) / len(own) if own else 0.0
        high = sum(e.ci_high for e in own) / len(own) if own else 0.0
        found.append(
            GroupReport(
                name=g.name,
                kind=g.kind,
                width_before=g.width,
                width_after=after[g.name],
                effect_mean=mean,
                effect_ci95=(low, high),
                categories=causes.count(list(own), g.name),
                removed=removed[g.name],
                responses=tuple(r for s in outcome.scores if g.name in s.groups for r in s.groups[g.name].responses),
            )
        )
    return tuple(found)


def kernel_times(job: loop.Job, allocation: Allocation) -> tuple[KernelTime, ...]:
    """Where the time goes, from the latency table: each site dense and pruned, and why a cut bought nothing there."""
    before, after = job.dense_widths, allocation.widths
    found = []
    for site in job.model.sites:
        dense = job.model.site_cost(site, site.c_in.at(before), site.c_out.at(before))
        shape, cut = (site.c_in.at(before), site.c_out.at(before)), (site.c_in.at(after), site.c_out.at(after))
        pruned = max(0.0, job.model.site_cost(site, *cut))
        note = ""
        if 0 in cut and 0 not in shape:
            note = "gone with its branch"
        elif cut != shape and pruned > 0.95 * dense:
            note = f"narrower, not faster: {job.model.why_flat(site, shape, cut)}"
        found.append(KernelTime(name=site.label, key=site.key, dense_ns=dense, pruned_ns=pruned, note=note))
    return tuple(found)


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def notes(traced: Traced, outcome: loop.Outcome, lowered: bool) -> tuple[str, ...]:
    effects = outcome.scores[0].effects
    intervened = sum(e.source == "intervention" for e in effects)
    scored = (
        f"Categories: {intervened} of {len(effects)} channels were really removed; the others were screened by their gradient.",
        f"Scores used {outcome.scores[0].images} images. The dense network was cut {times(outcome.rounds)} to get here.",
    )
    return (
        *traced.loaded.notes,
        *(scored if effects else ()),
        *outcome.notes,
        "Times by kernel come from the latency table, not from a profile of the delivered file.",
        *modular_notes(outcome),
        *(("Their dense is the unpruned network in int8; weights + activations are counted in fp32.",) if lowered else ()),
    )


def where_judged(target: Target) -> tuple[str, ...]:
    """Where what was done, if that is not all one machine."""
    if not target.device.remote:
        return ()
    judge = "this machine" if target.here else "the device itself"
    said = f"Latencies were measured on {target.profile.device}; accuracy, agreement and parity in {target.profile.runtime}"
    if target.here and target.here.version() != target.backend.version():
        said += f" {target.here.version()} (the device has {target.backend.version()})"
    return (f"{said} on {judge}.",)


def modular_notes(outcome: loop.Outcome) -> tuple[str, ...]:
    """What modules were chosen, and what the figures beside them do not see of it."""
    if outcome.modules is None:
        return ()
    found = outcome.modules.option
    return (
        f"CRESPR: {found.count} modules in {found.operators} operator{'s' * (found.operators != 1)}; with all channels that took"
        f" {found.measured_share:.3f}x the dense latency ({found.predicted_share:.3f}x predicted). For the rest channels were"
        " pruned.",
        "Times by kernel are those of the pruned network before it was brought into modules.",
    )


def environment(target: Target) -> dict[str, str]:
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": target.fingerprint.device,
    }
    if target.device.remote:
        facts["measured on"] = target.profile.device
    return facts | versions() | {"threads": str(target.profile.threads), "fingerprint": target.fingerprint.id}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def command_of(request: RunRequest) -> str:
    """The command line that repeats the run."""
    words = [
        "edgekit",
        "run",
        request.model,
        "--data",
        request.data,
        "-p",
        request.profile,
        "--budget",
        request.budget.text,
        "-o",
        request.out,
    ]
    for flag, value in (
        ("--on", request.on),
        ("--weights", request.weights),
        ("--eval-data", request.eval_data),
        ("--classes", request.classes),
    ):
        words += [flag, value] if value else []
    if request.preprocess is not None:
        p = request.preprocess
        words += [
            "--input",
            "x".join(map(str, p.input)),
            "--mean",
            ",".join(map(str, p.mean)),
            "--std",
            ",".join(map(str, p.std)),
        ]
        words += ["--resize", str(p.resize)] if p.resize else []
        words += ["--crop", str(p.crop)] if p.crop else []
    for flag, chosen, default in (
        ("--statistic", request.statistic, "median"),
        ("--method", request.method, "causal"),
        ("--samples", request.samples, 512),
        ("--seed", request.seed, 0),
        ("--threads", request.threads, 0),
        ("--min-width", request.min_width, 1),
        ("--rounds", request.rounds, 0),
        ("--precision", request.precision, "fp32"),
        ("--max-drop", request.max_drop, 1.0),
        ("--finetune", request.finetune, 0),
    ):
        words += [flag, str(chosen)] if chosen != default else []
    words += ["--max-memory", f"{request.max_memory_bytes:.0f}B"] if request.max_memory_bytes else []
    words += [] if request.repair else ["--no-repair"]
    words += [word for setting in differing(request) for word in ("--set", setting)]
    words += [word for pattern in request.keep for word in ("--keep", pattern)]
    return shlex.join(words)


def make_plan(job: loop.Job, outcome: loop.Outcome, report: Report) -> Plan:
    alive = outcome.attempt.cut.state.alive
    removed = {g.name: g.removed for g in report.groups}
    delivered = min(outcome.iterations, key=lambda turn: abs(turn.ratio - outcome.attempt.measured.ratio))
    return Plan(
        model=job.request.model,
        method=job.request.method,
        seed=job.request.seed,
        profile=job.target.profile.id,
        table=job.model.table_id,
        dense_ns=report.dense_ns,
        budget_ns=report.budget_ns,
        target_ns=delivered.target_ns,
        predicted_ns=report.predicted_ns,
        optimality_gap=report.optimality_gap,
        rounds=outcome.rounds,
        groups=tuple(
            GroupPlan(
                name=g.name,
                kind=g.kind,
                width_before=g.width,
                width_after=len(alive.get(g.name, range(g.width))),
                kept=tuple(alive.get(g.name, range(g.width))),
                removed=removed[g.name],
            )
            for g in job.program.groups
        ),
        modules=module_plan(outcome.attempt.cut.form) if outcome.attempt.cut.form else None,
    )


def write_run(job: loop.Job, traced: Traced, outcome: loop.Outcome, artefacts: Sequence[Artefact], report: Report) -> None:
    """All records of a run; `report.json` last, so that its presence means a whole run."""
    out, request = job.folder, job.request
    comparison = loop.confirmation(outcome.attempt)
    save_json(out / "measurements" / "comparison.json", comparison)
    resolved = msgspec.structs.replace(
        request,
        preprocess=traced.preprocess,
        data=str(Path(request.data).resolve()),
        eval_data=str(Path(request.eval_data).resolve()) if request.eval_data else "",
    )
    save_json(out / "request.json", resolved)
    save_json(
        out / "evaluation.json",
        Evaluation(data=job.images.evaluation_path, classes=request.classes, indices=tuple(int(i) for i in job.images.indices)),
    )
    save_json(out / "groups.json", groups_record(job.program))
    save_json(out / "plan.json", make_plan(job, outcome, report))
    save_json(
        out / "manifest.json",
        Manifest(
            artefacts=tuple(artefacts),
            plan_sha256=sha256(out / "plan.json"),
            weights_sha256=sha256(out / "weights.safetensors"),
            program_sha256=sha256(out / "model.pt2"),
            profile=job.target.profile,
            fingerprint=job.target.fingerprint,
            versions=versions(),
        ),
    )
    if outcome.modules:
        save_json(out / "modules.json", outcome.modules)
    write_text(out / "report.html", reports.html(report, comparison, outcome.modules))
    save_json(out / "report.json", report)


def measure(
    model: str,
    weights: str,
    preprocess: Preprocess | None,
    profile_id: str,
    threads: int,
    precision: Precision | None,
    seed: int,
    progress: Progress,
    out: Path | None = None,
    on: str = "",
) -> TableSummary:
    """Fill the latency table that a model needs on a device; into `out` a profile with the device's table in it.

    Raises:
        EdgekitError: with what was wrong and what to run next.
    """
    target = open_target(profile_id, threads, precision, measuring=True, on=on)
    if out is not None and out.exists() and any(out.iterdir()) and not (out / "profile.json").exists():
        raise UsageError(f"{out} is not empty and no profile.", "Give -o a new folder.")
    traced = load_and_trace(model, weights, preprocess, seed)
    candidates, _ = allocatable(traced.program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        save_onnx(to_onnx(traced.program, target.profile.batch), path, {})
        dense = benches.measure(target.profile, path, time_limit_s=30.0)
        networks = table_networks(traced.program, candidates, Path(folder), seed, progress, target.profile.batch)
        table = latency_table(target, networks, candidates, seed, dense.latency_ns, progress)
    summary = table.model.summary(str(table.folder))
    if out is not None:
        whose = "local" if target.device.remote else target.profile.device  # whoever is there, or goes there with --on
        described = f"Measured on {target.fingerprint.device}"
        measured = msgspec.structs.replace(
            target.profile, id=profile_name(out), device=whose, description=described, status="measured"
        )
        save_json(out / "profile.json", measured)
        share_table(table.folder, out / "table", target.fingerprint)
        summary = msgspec.structs.replace(summary, path=str(out))
    return summary


def profile_name(folder: Path) -> str:
    """A profile id from a folder's name."""
    return "-".join(re.findall("[a-z0-9]+", folder.resolve().name.lower())) or "measured"


__all__ = ["demo_request", "measure", "run"]
