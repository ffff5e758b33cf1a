"""edgekit from Python: what the command calls, at most twenty names, documented in docs/api.md.

Importing this loads no framework; each function imports what it needs when it is called. All raise only errors of one tree.
`progress` is called with (step, done, total) as work goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit.budget import parse_budget
from toolkit.errors import BudgetError, EdgekitError, MissingError, UsageError
from toolkit.schema import (
    Benchmark,
    Budget,
    Exported,
    ExportRequest,
    Precision,
    Preprocess,
    Profile,
    Pruned,
    Report,
    RunComparison,
    RunRequest,
    Sweep,
    TableSummary,
    load_json,
)

Progress = Callable[[str, float, float], None]


def quiet(step: str, done: float, total: float) -> None:
    """Progress that nobody looks at."""


def run(request: RunRequest, progress: Progress = quiet) -> Report:
    """Prune to the budget, export, measure and report; everything is written under `request.out`."""
    from toolkit import run as job

    return job.run(request, progress)


def sweep(request: RunRequest, budgets: Sequence[Budget | str], progress: Progress = quiet) -> Sweep:
    """A run for each budget, in folders of their own, from one table and one first scoring; `request.budget` does not count."""
    from toolkit.run.sweep import sweep as job

    return job(request, [parse_budget(each) if isinstance(each, str) else each for each in budgets], progress)


def prune(model: str, plan: str | Path, out: str | Path, progress: Progress = quiet, **options: Any) -> Pruned:
    """Apply a plan, edited or not: cut, prove, repair and export. Options: weights, data, preprocess, profile, repair, samples,
    seed.
    """
    from toolkit.run.reapply import prune as job

    return job(model, plan, out, progress, **options)


def export(request: ExportRequest, progress: Progress = quiet) -> Exported:
    """Write a model, or an ONNX file, at a precision and in a profile's format, checked against the original."""
    from toolkit.run.export import export as job

    return job(request, progress)


def bench(
    paths: Sequence[str | Path], profile: str = "local-onnxruntime", progress: Progress = quiet, **options: Any
) -> Benchmark:
    """Time model files, interleaved. Options: threads, on, statistic, sustained_s, with_startup, with_kernels, against,
    fail_over, out.
    """
    from toolkit.run.bench import bench as job

    return job([Path(path) for path in paths], profile, progress, **options)


def measure(
    model: str,
    profile: str = "local-onnxruntime",
    progress: Progress = quiet,
    *,
    weights: str = "",
    preprocess: Preprocess | None = None,
    threads: int = 0,
    precision: Precision | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    on: str = "",
) -> TableSummary:
    """Fill the latency table that a model needs on a device, `on` an address or this machine; into `out` a profile with it."""
    from toolkit import run as job

    folder = Path(out) if out is not None else None
    return job.measure(model, weights, preprocess, profile, threads, precision, seed, progress, folder, on)


def compare(folders: Sequence[str | Path]) -> RunComparison:
    """Finished runs and the points of sweeps beside each other, ranked where they may be compared."""
    from toolkit.run.compare import compare as job

    return job(folders)


def load_report(folder: str | Path) -> Report:
    """The report of a finished run."""
    return load_json(Report, Path(folder) / "report.json")


def list_profiles() -> tuple[Profile, ...]:
    """The hardware profiles that come with edgekit."""
    from toolkit import profiles

    return profiles.list_profiles()


def demo_request(budget: Budget | str, out: str | Path, profile: str = "local-onnxruntime", seed: int = 0) -> RunRequest:
    """The request for a run on the model and images in the package."""
    from toolkit import run as job

    return job.demo_request(str(out), parse_budget(budget) if isinstance(budget, str) else budget, profile, seed)


__all__ = [
    "BudgetError",
    "EdgekitError",
    "ExportRequest",
    "MissingError",
    "Preprocess",
    "Report",
    "RunRequest",
    "Sweep",
    "UsageError",
    "bench",
    "compare",
    "demo_request",
    "export",
    "list_profiles",
    "load_report",
    "measure",
    "parse_budget",
    "prune",
    "run",
    "sweep",
]
