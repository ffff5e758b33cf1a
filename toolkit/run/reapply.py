"""The verb `prune`: a plan, as a run left it or as a person edited it, applied to the dense model. Nothing is measured."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.errors import UsageError
from toolkit.export import Wanted, export_artefacts, from_program, save_program, save_weights
from toolkit.graph import Program
from toolkit.prune.attention import attentions
from toolkit.prune.pruner import Cut, State, cut
from toolkit.prune.repair import Repaired
from toolkit.run.export import Place, find_place
from toolkit.run.prepare import Progress, Traced, groups_record, load_and_trace, load_images
from toolkit.schema import (
    NO_BUDGET,
    Artefact,
    Budget,
    ExportRequest,
    GroupPlan,
    Plan,
    Preprocess,
    Pruned,
    RunRequest,
    load_json,
    save_json,
)


def prune(
    model: str,
    plan: str | Path,
    out: str | Path,
    progress: Progress,
    *,
    weights: str = "",
    data: str = "",
    preprocess: Preprocess | None = None,
    profile: str = "local-onnxruntime",
    repair: bool = True,
    samples: int = 512,
    seed: int = 0,
) -> Pruned:
    """Cut the model to the plan, prove the cut, repair, and export for the profile.

    Args:
        data: calibration images for the repair; of those, as in a run, a part is held back for accuracy.

    Raises:
        UsageError: a plan that does not fit the model, every fault of it named; or no images to repair with.
        EdgekitError: with what was wrong and what to run next.
    """
    written, folder = load_json(Plan, Path(plan)), Path(out)
    if (folder / "report.json").exists():
        raise UsageError(f"{folder} holds a finished run, whose files this would replace.", "Give -o another folder.")
    if repair and not data:
        raise UsageError(
            "The repair needs calibration images.", "Give --data as for `run`, or leave the weights with --no-repair."
        )
    place = find_place(ExportRequest(model=model, out=str(folder), profile=profile))
    progress("trace", 0, 1)
    traced = load_and_trace(model, weights, preprocess, seed)
    kept = checked(traced.program, written, str(plan))
    if not data and (narrowed := attentions(traced.program).keys() & kept.keys()):
        message = f"Which directions of {sorted(narrowed)[0]} stay depends on images: the plan makes queries and keys narrower."
        raise UsageError(message, "Give --data as for `run`.")
    progress("trace", 1, 1)
    images = np.empty((0, *traced.preprocess.input[1:]), np.float32)
    if data:
        asked = RunRequest(
            model=model, data=data, out=str(folder), budget=Budget(text=NO_BUDGET, ratio=1.0), samples=samples, seed=seed
        )
        images = load_images(asked, traced.preprocess, traced.classes, progress).calibration
    progress("cut and proof", 0, 1)
    done = cut(traced.program, State(traced.program), kept, images, repair_=repair, seed=seed, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    artefacts = write(traced, done, place, images, folder, progress)
    save_json(folder / "plan.json", written)
    save_json(folder / "groups.json", groups_record(traced.program))
    repaired, smaller = done.repaired, done.state.program
    record = Pruned(
        model=model,
        plan=str(plan),
        profile=place.profile.id,
        widths=done.state.widths(traced.program),
        parameters_dense=traced.program.parameter_count(),
        parameters_pruned=smaller.parameter_count(),
        macs_dense=traced.program.macs(),
        macs_pruned=smaller.macs(),
        proof_max_relative_error=done.proof,
        distortion=(repaired.before, repaired.after) if isinstance(repaired, Repaired) else None,
        repaired=isinstance(repaired, Repaired) and repaired.kept,
        artefacts=artefacts,
        next_command=bench_command(folder, artefacts, place),
    )
    save_json(folder / "pruned.json", record)
    return record


def checked(program: Program, plan: Plan, source: str) -> dict[str, tuple[int, ...]]:
    """The channels that stay, of every group that gets narrower.

    Raises:
        UsageError: the plan does not fit; all that is wrong with it, by group.
    """
    groups = {group.name: group for group in program.groups}
    faults = [f"{name} is there {n} times" for name, n in Counter(group.name for group in plan.groups).items() if n > 1]
    for each in plan.groups:
        if each.name not in groups:
            faults.append(f"{each.name} is no channel group of this model")
        else:
            faults += [f"{each.name}: {fault}" for fault in faults_of(each, program)]
    if faults:
        known = ", ".join(groups)
        raise UsageError(f"{source} does not fit the model: {'; '.join(faults)}.", f"Correct it; the groups are {known}.")
    return {group.name: group.kept for group in plan.groups if len(group.kept) < group.width_before}


def faults_of(plan: GroupPlan, program: Program) -> Sequence[str]:
    """What is wrong with one group's part of a plan."""
    group, kept = program.group(plan.name), plan.kept
    if plan.width_before != group.width:
        return [f"width_before is {plan.width_before}, the model has {group.width} channels"]
    found = []
    if outside := [index for index in kept if not 0 <= index < group.width]:
        found.append(f"kept has {outside[0]}, outside of 0 to {group.width - 1}")
    if twice := [index for index, n in Counter(kept).items() if n > 1]:
        found.append(f"kept has {twice[0]} more than once")
    elif list(kept) != sorted(kept):
        found.append("kept is not in ascending order")
    if plan.width_after != len(kept):
        found.append(f"width_after is {plan.width_after}, kept has {len(kept)}")
    if not group.prunable and len(kept) < group.width:
        found.append(f"it cannot be pruned: {group.reason}")
    elif not kept and plan.name not in program.branches:
        found.append("it is on the only path and cannot lose all its channels")
    return found


def write(
    traced: Traced,
    done: Cut,
    place: Place,
    images: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    folder: Path,
    progress: Progress,
) -> tuple[Artefact, ...]:
    """Dense and pruned in the profile's formats, and the pruned network for plain PyTorch."""
    profile, smaller = place.profile, done.state.program
    samples = {"random": np.random.default_rng(0).standard_normal((1, *images.shape[1:]), np.float32)}
    samples |= {"real": images[:1]} if len(images) else {}
    wanted = Wanted(
        backend=place.backend,
        formats=place.formats,
        precision=profile.precision,
        threads=profile.threads,
        metadata={"edgekit.profile": profile.id},
        compute_capability=profile.compute_capability,
    )
    progress("export", 0, 2)
    found = export_artefacts(from_program(traced.program), folder, "dense", "dense", wanted, samples)
    progress("export", 1, 2)
    found += export_artefacts(from_program(smaller), folder, "model", "pruned", wanted, samples)
    save_program(smaller, folder / "model.pt2")
    save_weights(smaller, folder / "weights.safetensors")
    progress("export", 2, 2)
    return found


def bench_command(folder: Path, artefacts: Sequence[Artefact], place: Place) -> str:
    """The command that measures what was written."""
    pair = {role: [a.path for a in artefacts if a.role == role][-1] for role in ("dense", "pruned")}
    return shlex.join(["edgekit", "bench", *(str(folder / path) for path in pair.values()), "-p", place.profile.id, "--kernels"])


__all__ = ["prune"]
