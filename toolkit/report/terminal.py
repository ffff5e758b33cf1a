"""The report for a terminal: the verdict line that scripts read, and a summary that fits any width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.report import units
from toolkit.schema import (
    NO_BUDGET,
    AlignmentEvidence,
    Artefact,
    Benchmark,
    DryRun,
    Gate,
    KernelDifference,
    KernelProfile,
    Measurement,
    Pruned,
    Ratio,
    Report,
    TableHeader,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

GROUPS_SHOWN = 40
KERNELS_SHOWN = 8
BENCH_KERNELS_SHOWN = 20


def verdict_line(report: Report) -> str:
    """One line: `MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  top-1 -0.4`.

    Without labels `agreement 93.1 %` replaces the change of top-1. `not valid` is appended where the measurement is not, and
    `measured_ns` 0 (nothing was measured) gives the prediction.
    """
    word = report.verdict.upper()
    unit, scale = units.time_unit(report.budget_ns)
    times = [value / scale for value in (report.measured_ns, report.predicted_ns, report.budget_ns)]
    digits = units.time_digits((times[0], times[2]))
    measured, predicted, budget = (f"{value:.{digits}f}" for value in times)
    if not report.measured_ns:
        return f"{word}  {predicted} {unit} {report.statistic} predicted, nothing measured (budget {budget})"
    allowed = "no budget" if report.budget == NO_BUDGET else f"budget {budget}"
    line = f"{word}  {measured} {unit} {report.statistic} (predicted {predicted}, {allowed})  {units.factor(report.speedup)}  "
    return line + _quality(report) + ("" if report.valid else "  not valid")


def _quality(report: Report) -> str:
    if report.accuracy_dense is None or report.accuracy_pruned is None:
        return f"agreement {units.share(report.agreement)}"
    return f"top-1 {units.signed(100 * (report.accuracy_pruned - report.accuracy_dense))}"


def summary_text(report: Report) -> RenderableType:
    """What stands above the verdict line, as one rich renderable: both networks, widths, turns, validity, kernels, notes."""
    from rich.console import Group
    from rich.text import Text

    held = units.by_reason(report.unprunable)
    parts: list[RenderableType] = [
        Text(f"{report.model} on {report.profile}, method {report.method}, seed {report.seed}", style="dim"),
        _comparison(report),
        _widths(report),
        *(_hanging(f"left whole: {', '.join(names)}: {reason}") for reason, names in held.items()),
        *([Text()] if held else []),
        _iterations(report),
        _validity(report),
    ]
    if report.kernels:
        parts.append(_kernels(report))
    parts += [_hanging(note) for note in report.notes]
    return Group(*parts)


def _hanging(text: str, mark: str = "- ") -> Table:
    """A paragraph whose further lines stand under its first word."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid()
    grid.add_column(width=len(mark))
    grid.add_column(overflow="fold")
    grid.add_row(mark, Text(text))
    return grid


def _table(title: str, *columns: tuple[str, bool]) -> Table:
    """An unframed table; `columns` are (heading, is it a number)."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading, number in columns:
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _comparison(report: Report) -> Table:
    table = _table("Dense against pruned", ("", False), ("dense", True), ("pruned", True), ("change", True))

    def row(name: str, before: str, after: str, difference: str) -> None:
        table.add_row(name, before, after, difference)

    row(
        f"latency, {report.statistic}",
        units.duration(report.dense_ns, report.budget_ns),
        units.duration(report.measured_ns, report.budget_ns),
        units.change(report.dense_ns, report.measured_ns),
    )
    if report.accuracy_dense is not None and report.accuracy_pruned is not None:
        points = units.signed(100 * (report.accuracy_pruned - report.accuracy_dense))
        row("top-1", units.share(report.accuracy_dense), units.share(report.accuracy_pruned), f"{points} points")
    row("same top-1 as dense", "", units.share(report.agreement), f"{report.evaluation_images} images")
    if (tuned := report.finetuned) is not None:
        name, value, epochs = units.one_shot(tuned)
        row(name, "", value, epochs)
    if (alone := report.quantized_dense) is not None:
        latency = units.duration(alone.ratio * report.dense_ns, report.budget_ns)
        row(f"{report.precision} alone, unpruned", "", latency, units.change(1, alone.ratio))
        if alone.accuracy is not None and report.accuracy_dense is not None:
            change = units.signed(100 * (alone.accuracy - report.accuracy_dense))
            row(f"top-1, {report.precision} alone", "", units.share(alone.accuracy), f"{change} points")
    for name, before, after, text in (
        ("parameters", report.parameters_dense, report.parameters_pruned, units.count),
        ("MACs", report.macs_dense, report.macs_pruned, units.count),
        ("file size", report.size_dense_bytes, report.size_pruned_bytes, units.size),
        (units.memory(report), report.memory_dense_bytes, report.memory_pruned_bytes, units.size),
    ):
        row(name, text(before), text(after), units.change(before, after))
    for choice in report.precision_choices:
        lost = "out of reach" if choice.distortion is None else units.small(choice.distortion)
        taken = "taken" if choice.precision == report.precision else ""
        row(f"predicted distortion, {choice.precision}", "", lost, taken)
    return table


def _widths(report: Report) -> Table:
    from rich.text import Text

    table = _table("Widths", ("group", False), ("before", True), ("after", True), ("kept", False), ("effect", True))
    for group in report.groups[:GROUPS_SHOWN]:
        kept = round(10 * group.width_after / max(group.width_before, 1))
        table.add_row(
            Text(group.name),
            str(group.width_before),
            str(group.width_after) if group.width_after else "dropped",
            "#" * kept + "." * (10 - kept),
            units.small(group.effect_mean) if group.categories.total else "",
        )
    rest = report.groups[GROUPS_SHOWN:]
    if rest:
        before, after = sum(group.width_before for group in rest), sum(group.width_after for group in rest)
        table.add_row(f"{len(rest)} others", str(before), str(after), "", "")
    return table


def _iterations(report: Report) -> Table:
    table = _table(
        "Closed loop", ("turn", True), ("aimed at", True), ("predicted", True), ("measured", True), ("table scale", True)
    )
    for number, turn in enumerate(report.iterations, start=1):
        times = (units.duration(value, report.budget_ns) for value in (turn.target_ns, turn.predicted_ns, turn.measured_ns))
        table.add_row(str(number), *times, f"{turn.scale:.3f}")
    return table


def _validity(report: Report) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    held_out = report.table.held_out
    low, high = report.speedup_ci95
    heading = Text.assemble(
        ("Validity", "bold"), ": the measurement is ", ("valid", "green") if report.valid else ("not valid", "red")
    )
    lines = (
        *(f"because {reason}" for reason in report.invalid_reasons),
        f"measured, 95 % interval: {units.span(*report.measured_ci95_ns)}; speedup {low:.2f}x to {high:.2f}x",
        f"table {report.table.id}: {units.share(report.table.coverage)} of the dense latency covered; "
        f"held-out error {units.share(held_out.mape)} on {held_out.networks} networks",
        f"slices proved to {units.small(report.proof_max_relative_error)} relative",
        f"repair: {report.repair}",
        *([f"critical or undecided channels cut: {report.critical_removed}"] if report.judged else ()),
        f"floor {units.duration(report.floor_ns)} (measured); optimality gap {units.share(report.optimality_gap, 2)}",
    )
    return Padding(Group(heading, *(_hanging(line, "  ") for line in lines)), (1, 0))


def _kernels(report: Report) -> Table:
    from rich.text import Text

    table = _table(
        "Where the milliseconds went", ("kernel", False), ("dense", True), ("pruned", True), ("saved", True), ("", False)
    )
    ranked = sorted(report.kernels, key=lambda kernel: kernel.pruned_ns - kernel.dense_ns)
    for kernel in ranked[:KERNELS_SHOWN]:
        saved = units.duration(kernel.dense_ns - kernel.pruned_ns)
        table.add_row(
            Text(kernel.name), units.duration(kernel.dense_ns), units.duration(kernel.pruned_ns), saved, Text(kernel.note)
        )
    rest = ranked[KERNELS_SHOWN:]
    if rest:
        dense, pruned = sum(kernel.dense_ns for kernel in rest), sum(kernel.pruned_ns for kernel in rest)
        table.add_row(f"{len(rest)} others", units.duration(dense), units.duration(pruned), units.duration(dense - pruned), "")
    return table


def benchmark_text(found: Benchmark) -> RenderableType:
    """What `edgekit bench` measured, as one rich renderable: latencies, ratios, loading, conditions, kernels."""
    from rich.console import Group
    from rich.text import Text

    profile, first = found.profile, found.measurements[0]
    settled = f", after {found.sustained_s:g} s of sustained load" if found.sustained_s else ""
    parts: list[RenderableType] = [
        Text(f"{profile.id}: {found.fingerprint.runtime} {found.fingerprint.runtime_version}{settled}", style="dim"),
        Text(f"timed: {first.scope}", style="dim"),
        _latencies(found),
        _percentiles(found),
    ]
    if found.startup:
        parts.append(_startup(found))
    parts.append(_conditions(first))
    parts += [_profile(each) for each in found.kernels if len(found.kernels) == 1]
    parts += [_difference(each) for each in found.differences]
    for measured in found.measurements:
        parts += [_hanging(f"{measured.artefact}, {name}: {why}") for name, why in measured.absent.items() if name != "energy_j"]
    parts += [_hanging(f"{name} not known: {why}") for name, why in _unknown(found).items()]
    return Group(*parts)


def gate_line(gate: Gate) -> str:
    """`PASSED  1.012x (0.998 to 1.024) of earlier.json: model.onnx, limit 1.050x`."""
    low, high = gate.ratio_ci95
    word = "PASSED" if gate.passed else "FAILED"
    notes = "".join(f"; {note}" for note in gate.notes)
    return f"{word}  {gate.ratio:.3f}x ({low:.3f} to {high:.3f}) of {gate.against}, limit {gate.limit:.3f}x{notes}"


def _latencies(found: Benchmark) -> Table:
    first = found.measurements[0]
    table = _table("Latency", ("artefact", False), (first.statistic, True), ("95 % interval", True), ("to the first", True))
    for index, each in enumerate(found.measurements):
        ratio = ""
        if index:
            low, high = found.ratios[index - 1].ci95
            ratio = f"{found.ratios[index - 1].value:.3f}x ({low:.3f} to {high:.3f})"
        latency = units.duration(each.latency_ns, first.latency_ns)
        table.add_row(each.artefact, latency, units.span(*each.latency_ci95_ns), ratio)
    return table


def _percentiles(found: Benchmark) -> Table:
    columns = (("artefact", False), ("p50", True), ("p90", True), ("p95", True), ("p99", True), ("samples", True))
    table = _table("Percentiles", *columns, ("energy", True), ("runs in", False))
    for each in found.measurements:
        values = (each.median_ns, each.p90_ns, each.p95_ns, each.p99_ns)
        times = ("" if value is None else units.duration(value, each.latency_ns) for value in values)
        energy = "" if each.energy_j is None else f"{1e3 * each.energy_j:.3g} mJ"
        table.add_row(each.artefact, *times, str(each.samples), energy, each.executed_precision)
    return table


def _startup(found: Benchmark) -> Table:
    table = _table(
        "Loading", ("artefact", False), ("load", True), ("first inference", True), ("load again", True), ("memory peak", True)
    )
    for each in found.startup:
        memory = "" if each.memory_peak_bytes is None else units.size(each.memory_peak_bytes)
        table.add_row(each.artefact, *map(units.duration, (each.load_ns, each.first_inference_ns, each.reload_ns)), memory)
    return table


def _conditions(measured: Measurement) -> RenderableType:
    """One line on the machine."""
    said = [f"{name.lower()} {text}" for name, text in units.conditions(measured.conditions) if text != "not known"]
    said += [f"drift {units.signed(100 * measured.drift)} %", f"even and odd rounds differ by {units.share(measured.split_half)}"]
    return _hanging("; ".join(said), "machine: ")


def _unknown(found: Benchmark) -> dict[str, str]:
    """What nothing could tell about this session, once each."""
    first = found.measurements[0]
    energy = {name: why for name, why in first.absent.items() if name == "energy_j"}
    startup = {name: why for each in found.startup for name, why in each.absent.items()}
    return {**first.conditions.absent, **energy, **startup}


def _profile(profile: KernelProfile) -> Table:
    from rich.text import Text

    table = _table(f"Kernels of {profile.artefact}", ("kernel", False), ("time", True), ("MACs", True), ("implementation", False))
    ranked = sorted(profile.kernels, key=lambda kernel: -kernel.latency_ns)
    for kernel in ranked[:BENCH_KERNELS_SHOWN]:
        macs = units.count(kernel.macs) if kernel.macs else ""
        implementation = f"{kernel.op} {kernel.implementation}".strip()
        table.add_row(Text(kernel.name), units.duration(kernel.latency_ns), macs, Text(implementation))
    rest = ranked[BENCH_KERNELS_SHOWN:]
    if rest:
        table.add_row(f"{len(rest)} others", units.duration(sum(kernel.latency_ns for kernel in rest)), "", "")
    return table


def _difference(found: KernelDifference) -> Table:
    from rich.text import Text

    columns = (("kernel", False), ("first", True), (found.artefact, True), ("", False), ("why", False))
    table = _table("What got faster, what did not", *columns)
    for change in found.changes[:BENCH_KERNELS_SHOWN]:
        times = ("" if value is None else units.duration(value) for value in (change.before_ns, change.after_ns))
        table.add_row(Text(change.name), *times, change.verdict, Text(change.why))
    rest = found.changes[BENCH_KERNELS_SHOWN:]
    if rest:
        before, after = (
            sum(value or 0.0 for value in side) for side in zip(*((c.before_ns, c.after_ns) for c in rest), strict=True)
        )
        table.add_row(f"{len(rest)} others", units.duration(before), units.duration(after), "", "")
    return table


def alignment(found: AlignmentEvidence) -> str:
    """How a runtime treats the channels of an operator family, in words."""
    said = [f"channels padded to {found.step_in} in and {found.step_out} out"]
    sides = ((found.block, found.multiple, "in"), (found.block_out, found.multiple_out, "out"))
    said += [f"others below {block} {side}" for block, _, side in sides if block]
    said += [f"others where no multiple of {multiple} {side}" for _, multiple, side in sides if multiple > 1]
    return f"{'; '.join(said)} (left-out error {found.error:.1%}, {found.error_without:.1%} without)"


def table(profile: str, folder: Path, header: TableHeader | None, rows: int) -> list[str]:
    """What there is of a profile's latency table on this device."""
    if header is None:
        return ["latency table: none yet", f"  measure one with: edgekit measure MODEL -p {profile}"]
    of = header.fingerprint
    return [
        f"latency table: {folder}",
        f"  {of.device}",
        f"  {of.runtime} {of.runtime_version}, {of.precision}, threads {of.threads}, batch {of.batch}",
        f"  {rows} rows, first on {header.created_at}",
        *(
            f"  model {label}: {of.networks} networks, coverage {of.coverage:.1%}, held-out error {of.held_out.mape:.1%}"
            for label, of in header.models.items()
        ),
        *(f"  {found.kind}: {alignment(found)}" for found in header.alignments),
    ]


def exported(out: str, artefacts: Sequence[Artefact], ratios: Sequence[Ratio], fp32_ns: float, notes: Sequence[str]) -> list[str]:
    """What `edgekit export` wrote, a line each; what int8 does to the outputs and to the latency; what else to know."""
    lines = []
    for each in artefacts:
        worst = max((p.max_relative_error for p in each.parity if p.step == each.path), default=None)
        differs = f", differs from the original by {worst:.1e}" if worst is not None else ""
        runs = each.executed_precision if each.executed_precision == "not executed" else f"runs in {each.executed_precision}"
        lines.append(
            f"{Path(out) / each.path}: {each.size_bytes / 1e6:.2f} MB, {each.precision}, opset {each.opset}, {runs}{differs}"
        )
    q = artefacts[0].quantization
    if q is not None:
        lines.append(
            f"int8: {q.layers} layers, weights of {q.weight_bits} bits, {q.ranges} ranges of {q.images} images;"
            f" same top-1 as fp32 {units.share(q.agreement)}, expected drop {q.expected_drop:.2f} of {q.max_drop:g} points"
        )
    if q is not None and q.kept_float:
        lines.append("in float: " + ", ".join(layer.layer for layer in q.kept_float))
    if ratios:
        unit, scale = units.time_unit(fp32_ns)
        (low, high), value = ratios[0].ci95, ratios[0].value
        lines.append(f"latency: {value:.3f}x ({low:.3f} to {high:.3f}) of fp32's {fp32_ns / scale:.2f} {unit}")
    if len(ratios) > 1:
        lines.append(f"latency with no layer in float: {ratios[1].value:.3f}x")
    return [*lines, *(f"note: {note}" for note in notes)]


def pruned(found: Pruned, out: str) -> list[str]:
    """What `edgekit prune` wrote, and the command that measures it."""
    lines = [
        f"parameters {units.count(found.parameters_dense)} -> {units.count(found.parameters_pruned)},"
        f" MACs {units.count(found.macs_dense)} -> {units.count(found.macs_pruned)};"
        f" slices proved to {units.small(found.proof_max_relative_error)} relative",
    ]
    if found.distortion is not None:
        before, after = found.distortion
        verb = "kept" if found.repaired else "not kept, it did not help"
        lines.append(f"repair {verb}: distortion on held-back images {units.small(before)} -> {units.small(after)}")
    lines += exported(out, found.artefacts, (), 0.0, ())
    return [*lines, "not measured yet; run:", f"  {found.next_command}"]


def dry_run(found: DryRun) -> list[str]:
    """What a run would do, in lines."""
    lines = [
        f"{found.model} on {found.profile} ({found.runtime}): {units.count(found.parameters)} parameters,"
        f" {units.count(found.macs)} MACs, about {units.duration(found.dense_ns)}",
        f"budget {found.budget}: {units.duration(found.budget_ns, found.dense_ns)}"
        + (", met without pruning" if found.budget_ns >= found.dense_ns and found.budget != NO_BUDGET else ""),
        f"{len(found.groups)} channel groups can be cut:",
    ]
    for name, widths in found.groups.items():
        narrower = ", ".join(map(str, widths[:-1]))
        lines.append(f"  {name}: {widths[-1]} channels, or {narrower}" + (" (0: the branch goes)" if widths[0] == 0 else ""))
    lines += [f"left whole: {', '.join(names)}: {reason}" for reason, names in units.by_reason(found.held.items()).items()]
    lines.append(f"{found.calibration_images} images to score and repair on, {found.evaluation_images} to count accuracy on")
    table = "there is one" if found.table_known else f"none yet, about {units.seconds(found.table_s)} to measure"
    lines.append(f"latency table: {table}")
    rounds = f"{found.rounds} round{'s' if found.rounds > 1 else ''}"
    lines.append(f"{rounds} of scoring, about {units.seconds(found.scoring_s)}; in all about {units.seconds(found.total_s)}")
    return [*lines, f"nothing was written; without --dry-run the results go to {found.out}"]
