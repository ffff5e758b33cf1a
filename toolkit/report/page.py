"""The report as one HTML file: style, figures and text inside, nothing loaded from anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from toolkit.report import figures, units
from toolkit.schema import Comparison, KernelTime, ModuleGraph, Report

TEMPLATE = Path(__file__).with_name("report.html.j2")
IDLE = 0.95  # of its dense time: a cut that leaves more has bought nothing
UNKNOWN = {
    "energy_j": "Energy",
    "p90_ns": "p90",
    "p95_ns": "p95",
    "p99_ns": "p99",
    "clock_hz": "Clock",
    "accelerator_hz": "Accelerator's clock",
    "power_w": "Power",
    "temperature_c": "Temperature",
    "throttled": "Throttled",
    "cpu_pressure": "Processor pressure",
    "waiting": "Threads waiting for a core",
    "steal": "Time stolen by the host",
    "run_queue": "Runnable tasks",
    "memory_peak_bytes": "Memory peak",
}


def html(report: Report, comparison: Comparison, modules: ModuleGraph | None = None) -> str:
    """The page; `modules` of a network that has them.

    Every string of the records is escaped; every number on it is taken from them.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        minus=_minus,
        sentence=_sentence,
        when=_when,
        time=lambda latency_ns: units.duration(latency_ns, report.budget_ns),
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        fmt=units,
        report=report,
        comparison=comparison,
        dense=comparison.dense,
        conditions=[
            (name, before, after)
            for (name, before), (_, after) in zip(
                units.conditions(comparison.dense.conditions), units.conditions(comparison.pruned.conditions), strict=True
            )
        ],
        pruned=comparison.pruned,
        categories=figures.CATEGORIES,
        groups_shown=figures.GROUPS_SHOWN,
        held=units.by_reason(report.unprunable),
        effects_known=sum(bool(group.categories.total) for group in report.groups),
        gauge=_gauge(report),
        quality=_quality(report),
        reasons=_reasons(report, comparison),
        spent=_spent(report.kernels),
        unknown=_unknown(comparison),
        commands=_commands(report, comparison),
        figures={  # names in them are escaped by matplotlib
            name: Markup(svg) for name, svg in _draw(report, comparison, modules).items()
        },
    )


def _draw(report: Report, comparison: Comparison, modules: ModuleGraph | None) -> Mapping[str, str]:
    """Those figures that have something to show, by name."""
    found: dict[str, str] = {}
    if comparison.dense.rounds_ns or comparison.pruned.rounds_ns:
        found["latency"] = figures.latency(report, comparison)
    if report.iterations:
        found["iterations"] = figures.iterations(report)
    if report.groups:
        found["widths"] = figures.widths(report.groups)
    if any(group.responses for group in report.groups):
        found["responses"] = figures.responses(report.groups)
    if any(group.categories.total for group in report.groups):
        found["effects"] = figures.effects(report.groups)
    if report.kernels:
        found["kernels"] = figures.kernels(report)
    if modules:
        found["modules"] = figures.modules(modules)
    return found


def _gauge(report: Report) -> Mapping[str, float]:
    """Where the marks of the latency bar stand, in percent of its length; everything fits on it."""
    low, high = report.measured_ci95_ns
    full = max(report.dense_ns, report.budget_ns, report.predicted_ns, report.measured_ns, high)
    marks = {
        "measured": report.measured_ns,
        "predicted": report.predicted_ns,
        "budget": report.budget_ns,
        "low": low,
        "spread": high - low,
    }
    return {name: 100 * value / full for name, value in marks.items()}


def _reasons(report: Report, comparison: Comparison) -> Sequence[str]:
    """Why the measurement is not valid, each reason once."""
    return list(dict.fromkeys((*report.invalid_reasons, *comparison.dense.invalid_reasons, *comparison.pruned.invalid_reasons)))


def _spent(kernels: Sequence[KernelTime]) -> Mapping[str, Any]:
    """Where the time went in one sentence, and the names of the places whose cut bought nothing, by reason."""
    before, after = (sum(getattr(kernel, name) for kernel in kernels) for name in ("dense_ns", "pruned_ns"))
    idle = [(kernel.name, kernel.note) for kernel in kernels if kernel.note and kernel.pruned_ns > IDLE * kernel.dense_ns]
    saved = sum(kernel.pruned_ns < IDLE * kernel.dense_ns for kernel in kernels)
    times = f"{units.duration(before)} in the dense network, {units.duration(after, before)} in the pruned one"
    return {"sentence": f"All {len(kernels)} places together: {times}; {saved} became faster.", "idle": units.by_reason(idle)}


def _unknown(comparison: Comparison) -> Mapping[str, str]:
    """What nothing could tell about the measurement, with the reason, once each."""
    sides = (comparison.dense, comparison.pruned)
    found = {name: why for side in sides for name, why in (*side.absent.items(), *side.conditions.absent.items())}
    return {UNKNOWN.get(name, name): why for name, why in found.items()}


def _commands(report: Report, comparison: Comparison) -> Sequence[tuple[str, str]]:
    """(what it does, the command): to repeat the run, to judge it from outside, to time the files again."""
    found = [("Repeat it", report.command)]
    try:
        words = shlex.split(report.command)
        out = words[words.index("-o") + 1]
    except (ValueError, IndexError):
        return found
    files = [shlex.quote(str(Path(out, side.artefact))) for side in (comparison.dense, comparison.pruned)]
    again = f"edgekit bench {' '.join(files)} -p {shlex.quote(report.profile)} --kernels"
    if not report.runtime.startswith("simulated"):  # times that are computed cannot be measured from outside
        found.append(("Verify it, without edgekit", f"tools/verify {shlex.quote(out)}"))
    return [*found, ("Time the files again", again)]


def _quality(report: Report) -> Mapping[str, Any]:
    """Change of top-1 in points and its interval, where labels are known."""
    if report.accuracy_dense is None or report.accuracy_pruned is None:
        return {"labelled": False}
    points = units.signed(100 * (report.accuracy_pruned - report.accuracy_dense))
    interval = " to ".join(units.signed(100 * bound) for bound in report.accuracy_change_ci95 or ())
    return {"labelled": True, "points": points, "interval": interval}


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}.".replace("->", "→") if text else ""


def _when(timestamp: str) -> str:
    """`2026-03-14 09:26 UTC` of an ISO 8601 time; anything else as it is."""
    try:
        moment = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    except ValueError:
        return timestamp
    return f"{moment.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC" if moment.tzinfo else timestamp
