"""The verb `report` for several finished runs: beside each other, and ranked only where they may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

import calibration
from toolkit.errors import UsageError
from toolkit.run.pareto import front
from toolkit.schema import Compared, Evaluation, Manifest, Report, RunComparison, Sweep, load_json

DEVICE = ("device", "instruction_set", "batch")  # fields of a fingerprint in which latencies must agree; the rest is a choice


def compare(folders: Sequence[str | Path]) -> RunComparison:
    """Finished runs as they stand in their folders; a sweep's folder stands for its points.

    Raises:
        UsageError: fewer than two runs, or a folder without a finished one.
    """
    every = [run for folder in folders for run in runs_in(Path(folder))]
    if len(every) < 2:
        raise UsageError("There is only one run to compare.", "Give several folders: edgekit report A B.")
    records = [(folder, load_json(Report, folder / "report.json")) for folder in every]
    apart = [unlike(every[0], folder) for folder in every]
    ranked = [i for i, why in enumerate(apart) if not why and records[i][1].verdict == "met"]
    labelled = all(records[i][1].accuracy_pruned is not None for i in ranked)
    points = [(records[i][1].measured_ns, quality(records[i][1], labelled)) for i in ranked]
    best = {ranked[i] for i in front(points)}
    runs = tuple(compared(folder, report, i in best, apart[i]) for i, (folder, report) in enumerate(records))
    return RunComparison(runs=runs, comparable=not any(apart))


def runs_in(folder: Path) -> list[Path]:
    """The folder, or those of the points of a sweep that was written there."""
    if (folder / "report.json").exists() or not (folder / "sweep.json").exists():
        return [folder]
    points = load_json(Sweep, folder / "sweep.json").points
    return [folder / point.folder for point in points if point.verdict != "refused"]


def quality(report: Report, labelled: bool) -> float:
    return report.accuracy_pruned if labelled and report.accuracy_pruned is not None else report.agreement


def unlike(first: Path, other: Path) -> tuple[str, ...]:
    """In what two runs may not be compared, in words."""
    found = []
    here, there = (load_json(Manifest, folder / "manifest.json").fingerprint for folder in (first, other))
    for name in DEVICE:
        if getattr(here, name) != getattr(there, name):
            found.append(f"other {name.replace('_', ' ')}: {getattr(there, name) or 'none'}, not {getattr(here, name) or 'none'}")
    a, b = (load_json(Report, folder / "report.json").statistic for folder in (first, other))
    if a != b:
        found.append(f"other statistic: {b}, not {a}")
    mine, its = (load_json(Evaluation, folder / "evaluation.json") for folder in (first, other))
    if mine.indices != its.indices or (mine.data != its.data and contents(mine) != contents(its)):
        found.append(f"other evaluation images: {len(its.indices)} of {its.data}, not {len(mine.indices)} of {mine.data}")
    return tuple(found)


def contents(evaluation: Evaluation) -> str:
    """What the evaluation images are, or where they were if they are there no longer."""
    try:
        return calibration.open_dataset(evaluation.data, evaluation.classes or None).fingerprint
    except (calibration.DataProblem, OSError):
        return evaluation.data


def compared(folder: Path, report: Report, best: bool, differs: tuple[str, ...]) -> Compared:
    shared = {name: getattr(report, name) for name in Compared.__struct_fields__ if name in Report.__struct_fields__}
    return msgspec.convert(
        shared
        | {
            "folder": str(folder),
            "accuracy": report.accuracy_pruned,
            "parameters": report.parameters_pruned,
            "size_bytes": report.size_pruned_bytes,
            "best": best,
            "differs": differs,
        },
        Compared,
    )


__all__ = ["compare"]
