"""Several networks beside each other: the points of a sweep, or finished runs; in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.report import figures, units
from toolkit.report.figures import Network
from toolkit.report.terminal import _hanging, _table
from toolkit.schema import Compared, RunComparison, Sweep, SweepPoint

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TEMPLATE = Path(__file__).with_name("curve.html.j2")
SWEPT = ("budget", "verdict", "measured", "95 % interval", "speedup", "top-1", "change", "agree", "parameters", "size")
COMPARED = ("run", "budget", "measured", "speedup", "top-1", "agree", "size", "method")
STAR = "*: no other run that may be compared with it is as fast and as accurate"
ONLY_ON_PAGE = frozenset({"95 % interval", "size"})  # 80 columns are not enough for all
NUMBERS = frozenset({"measured", "95 % interval", "speedup", "top-1", "change", "agree", "parameters", "size"})


def _compact(title: str, columns: Sequence[str]) -> Table:
    """A table whose numbers are never broken; names are, where the terminal is narrow."""
    table = _table(title, *((name, name in NUMBERS) for name in columns))
    for column in table.columns:
        column.no_wrap = column.header in NUMBERS
    return table


# --- sweep ---------------------------------------------------------------------------------------------------------------


def sweep_line(sweep: Sweep) -> str:
    """`MET  5 of 5 budgets  knee 0.5x` or `MISSED  3 of 5 budgets; refused: 0.02x`."""
    met = sum(point.verdict == "met" and point.valid for point in sweep.points)
    line = f"{sweep.verdict.upper()}  {met} of {len(sweep.points)} budgets"
    for word, which in (
        ("missed", [p.budget for p in sweep.points if p.verdict == "missed"]),
        ("refused", [p.budget for p in sweep.points if p.verdict == "refused"]),
        ("not valid", [p.budget for p in sweep.points if p.verdict == "met" and not p.valid]),
    ):
        line += f"; {word}: {', '.join(which)}" if which else ""
    return line + (f"  knee {sweep.knee}" if sweep.knee else "")


def sweep_text(sweep: Sweep) -> RenderableType:
    """The points as a table, the knee, and what stood in the way of the others."""
    from rich.console import Group
    from rich.text import Text

    rows = [_dense_row(sweep)] if sweep.dense_ns is not None else []
    rows += [_point_row(sweep, point) for point in sweep.points]
    shown = [name for name in SWEPT if name not in ONLY_ON_PAGE]
    table = _compact("Budgets", shown)
    for row in rows:
        table.add_row(*(cell for name, cell in zip(SWEPT, row, strict=True) if name in shown))
    heading = f"{sweep.model} on {sweep.profile}, method {sweep.method}, {sweep.precision}"
    notes = [_hanging(f"{point.budget}: {point.reason}") for point in sweep.points if point.reason]
    return Group(Text(heading, style="dim"), table, *notes, _hanging(_knee(sweep)))


def _knee(sweep: Sweep) -> str:
    return f"knee: {sweep.knee}; {sweep.knee_why}" if sweep.knee else f"no knee: {sweep.knee_why}"


def _dense_row(sweep: Sweep) -> list[str]:
    accuracy = "" if sweep.accuracy_dense is None else units.share(sweep.accuracy_dense)
    parameters = units.count(sweep.parameters_dense or 0)
    return ["dense", "", units.duration(sweep.dense_ns or 0.0), "", "1x", accuracy, "", "", parameters, ""]


def _point_row(sweep: Sweep, point: SweepPoint) -> list[str]:
    if point.measured_ns is None:
        return [point.budget, point.verdict, *[""] * (len(SWEPT) - 2)]
    change = ""
    if point.accuracy is not None and sweep.accuracy_dense is not None:
        change = units.signed(100 * (point.accuracy - sweep.accuracy_dense))
    return [
        point.budget,
        point.verdict + ("" if point.valid else ", not valid"),
        units.duration(point.measured_ns, sweep.dense_ns or 0.0),
        units.span(*(point.measured_ci95_ns or (point.measured_ns, point.measured_ns))),
        units.factor(point.speedup or 0.0),
        "" if point.accuracy is None else units.share(point.accuracy),
        change,
        units.share(point.agreement or 0.0),
        units.count(point.parameters or 0),
        units.size(point.size_bytes or 0),
    ]


def sweep_networks(sweep: Sweep) -> list[Network]:
    """The dense network and the points that were measured."""
    labelled = sweep.accuracy_dense is not None
    level = sweep.accuracy_dense if sweep.accuracy_dense is not None else 1.0
    found = []
    if sweep.dense_ns is not None:
        found.append(Network("dense", sweep.dense_ns, (sweep.dense_ns, sweep.dense_ns), level, (level, level), dense=True))
    for point in sweep.points:
        if point.measured_ns is None:
            continue
        quality = point.accuracy if labelled and point.accuracy is not None else point.agreement or 0.0
        low, high = point.accuracy_change_ci95 if labelled and point.accuracy_change_ci95 else (quality - level, quality - level)
        span = point.measured_ci95_ns or (point.measured_ns, point.measured_ns)
        good = point.verdict == "met" and point.valid
        found.append(Network(point.budget, point.measured_ns, span, quality, (level + low, level + high), good=good))
    return _with_front(found)


def _with_front(networks: Sequence[Network]) -> list[Network]:
    """The same with those marked that no other beats."""

    def beaten(one: Network) -> bool:
        return any(
            other.latency_ns <= one.latency_ns and other.quality >= one.quality
            and (other.latency_ns, other.quality) != (one.latency_ns, one.quality)
            for other in networks
        )  # fmt: skip

    return [network._replace(best=not beaten(network)) for network in networks]


def sweep_html(sweep: Sweep) -> str:
    """The curve and its points on one page that loads nothing; each point links to its own report."""
    rows = [(_point_row(sweep, point), f"{point.folder}/report.html") for point in sweep.points]
    rows = [(_dense_row(sweep), ""), *rows] if sweep.dense_ns is not None else rows
    quality = "agreement" if sweep.accuracy_dense is None else "top-1"
    return _page(
        f"{sweep.model}: {len(sweep.points)} budgets",
        sweep_line(sweep),
        sweep.verdict == "met",
        SWEPT,
        rows,
        sweep_networks(sweep),
        quality,
        sweep.knee,
        [_knee(sweep), *(f"{point.budget}: {point.reason}" for point in sweep.points if point.reason)],
        sweep.command,
    )


# --- finished runs ---------------------------------------------------------------------------------------------------------


def comparison_line(found: RunComparison) -> str:
    """`COMPARABLE  3 runs` or what keeps them from being compared."""
    other = [run.folder for run in found.runs if run.differs]
    word = "COMPARABLE" if found.comparable else "NOT COMPARABLE"
    return f"{word}  {len(found.runs)} runs" + (f"; unlike the first: {', '.join(other)}" if other else "")


def comparison_text(found: RunComparison) -> RenderableType:
    """Finished runs as one table, a star at those that no other beats, and why some may not be compared."""
    from rich.console import Group

    table = _compact("Runs", COMPARED)
    for run in found.runs:
        table.add_row(*_run_row(run))
    return Group(table, *(_hanging(text) for text in (STAR, *_differences(found))))


def _differences(found: RunComparison) -> list[str]:
    return [f"{run.folder} may not be compared with {found.runs[0].folder}: {why}" for run in found.runs for why in run.differs]


def _run_row(run: Compared) -> list[str]:
    return [
        f"{'* ' if run.best else ''}{run.folder}",
        f"{run.budget} {run.verdict}" + ("" if run.valid else ", not valid"),
        units.duration(run.measured_ns),
        units.factor(run.speedup),
        "" if run.accuracy is None else units.share(run.accuracy),
        units.share(run.agreement),
        units.size(run.size_bytes),
        run.method if run.precision == "fp32" else f"{run.method}, {run.precision}",
    ]


def run_networks(found: RunComparison) -> list[Network]:
    """The runs that may be compared with the first."""
    networks = []
    for run in found.runs:
        if run.differs:
            continue
        quality = run.agreement if run.accuracy is None else run.accuracy
        level, interval = run.accuracy_dense or 0.0, run.accuracy_change_ci95
        span = (level + interval[0], level + interval[1]) if interval else (quality, quality)
        good = run.verdict == "met" and run.valid
        networks.append(Network(run.folder, run.measured_ns, run.measured_ci95_ns, quality, span, run.best, good))
    return networks


def comparison_html(found: RunComparison) -> str:
    """The runs and their picture on one page that loads nothing."""
    quality = "agreement" if any(run.accuracy is None for run in found.runs) else "top-1"
    rows = [(_run_row(run), "") for run in found.runs]
    line, notes = comparison_line(found), [STAR, *_differences(found)]
    command = f"edgekit report {' '.join(run.folder for run in found.runs)}"
    return _page("Runs compared", line, found.comparable, COMPARED, rows, run_networks(found), quality, "", notes, command)


def _page(
    title: str,
    line: str,
    good: bool,
    columns: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    networks: Sequence[Network],
    quality: str,
    marked: str,
    notes: Sequence[str],
    command: str,
) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        line=line,
        good=good,
        columns=columns,
        numbers=NUMBERS,
        rows=rows,
        figure=Markup(figures.pareto(networks, quality, marked)) if networks else "",  # names in it are escaped by matplotlib
        quality=quality,
        notes=notes,
        command=command,
    )
