"""`edgekit run --dry-run`: what a run would do and about how long it would take. Nothing is written, not even to the cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit import bench as benches
from toolkit import profiles
from toolkit import run as single
from toolkit.export import save_onnx, to_onnx
from toolkit.graph import Program
from toolkit.latency import ModelTable
from toolkit.prune.pruner import scoring_macs
from toolkit.run import loop
from toolkit.run.prepare import (
    Progress,
    allocatable,
    load_and_trace,
    load_images,
    lowering,
    measuring_seconds,
    open_target,
    variant_maker,
)
from toolkit.schema import DryRun, RunRequest

FORWARD_IMAGES, FORWARD_S = 8, 0.5
ATTEMPT_S = 15.0  # export, measurement and confirmation of one network, with a share of what is measured for the table on the way


def dry_run(request: RunRequest, progress: Progress) -> DryRun:
    """Everything up to the first thing that would be written.

    Raises:
        EdgekitError: what `run` would raise by then.
    """
    single.check_request(request)
    target = open_target(
        request.profile, request.threads, None if request.precision == "auto" else request.precision, on=request.on
    )
    progress("trace", 0, 1)
    traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
    candidates, held = allocatable(traced.program, request.keep, request.min_width, request.method)
    progress("trace", 1, 1)
    images = load_images(request, traced.preprocess, traced.classes, progress)
    progress("dense model", 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        save_onnx(to_onnx(traced.program), path, {})
        dense_ns = benches.measure(target.profile, path, statistic=request.statistic, time_limit_s=5.0).latency_ns
    progress("dense model", 1, 1)
    lower = lowering(target)
    maker = replace(variant_maker(traced.program, candidates, request.seed, progress, target.profile.batch), finish=lower)
    folder_of_table = profiles.table_dir(target.fingerprint)
    known = ModelTable(
        target.profile, target.fingerprint, target.device, maker, candidates, folder_of_table, request.seed
    ).known()
    ratio = request.budget.latency_ns / dense_ns if request.budget.latency_ns else request.budget.ratio
    rounds = request.rounds or loop.rounds_for(ratio, request.method)
    scoring_s = scoring_seconds(traced.program, candidates, len(images.calibration), rounds)
    table_s = 0.0 if known else measuring_seconds(dense_ns)
    return DryRun(
        model=request.model,
        profile=target.profile.id,
        runtime=f"{target.profile.runtime} {target.fingerprint.runtime_version}",
        budget=request.budget.text,
        budget_ns=request.budget.latency_ns or ratio * dense_ns,
        dense_ns=dense_ns,
        groups={name: tuple(widths) for name, widths in candidates.items()},
        held=held,
        parameters=traced.program.parameter_count(),
        macs=traced.program.macs(),
        calibration_images=len(images.calibration),
        evaluation_images=len(images.indices),
        rounds=rounds,
        table_known=known,
        table_s=table_s,
        scoring_s=scoring_s,
        total_s=table_s + scoring_s + (rounds + 1) * ATTEMPT_S,
        out=request.out,
    )


def scoring_seconds(program: Program, candidates: Mapping[str, Sequence[int]], images: int, rounds: int) -> float:
    """How long the rounds' forward passes take at the speed of a few here and now; solving for weights comes on top."""
    import torch

    inputs = torch.zeros(FORWARD_IMAGES if not program.batch else program.batch, *program.example.shape[1:])
    with torch.no_grad():
        program.module(inputs)
        started, runs = time.monotonic(), 0
        while time.monotonic() - started < FORWARD_S or not runs:
            program.module(inputs)
            runs += 1
    per_mac = (time.monotonic() - started) / (runs * len(inputs) * max(1, program.macs()))
    return rounds * scoring_macs(program, candidates, images, loop.EFFECT_PASSES) * per_mac


__all__ = ["dry_run"]
