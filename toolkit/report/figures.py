"""The page's figures: matplotlib to inline SVG whose colours are the page's CSS variables, so that light, dark and print
all fit.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.report import units
from toolkit.schema import NO_BUDGET, Comparison, GroupReport, KernelTime, Measurement, ModuleGraph, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 440.0  # of every figure, in SVG units; text is 11 of them high
ROW = 15.0  # height of one group or kernel
GROUPS_SHOWN = 64
KERNELS_SHOWN = 16
CLASSES_SHOWN = 20
MODULES_NUMBERED = 6  # of more, figures beside the points would overlap
CATEGORIES = ("critical", "undecided", "neutral", "detrimental")

# Colours that occur nowhere else stand for CSS variables until the SVG is written.
_VARIABLES = ("ink", "muted", "rule", "dense", "pruned", "budget", *CATEGORIES)
_COLOUR = {name: f"#0a0b{number:02x}" for number, name in enumerate(_VARIABLES, start=16)}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _COLOUR["rule"],
    "axes.labelcolor": _COLOUR["muted"],
    "axes.titlecolor": _COLOUR["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": _COLOUR["ink"],
    "xtick.color": _COLOUR["rule"],
    "ytick.color": _COLOUR["rule"],
    "xtick.labelcolor": _COLOUR["muted"],
    "ytick.labelcolor": _COLOUR["ink"],
    "legend.frameon": False,
    "legend.fontsize": 11,
}
_LEGEND: dict[str, Any] = {"handlelength": 1, "handletextpad": 0.5, "columnspacing": 1.2, "borderpad": 0.2}


class Network(NamedTuple):
    """A network in the picture of several: latency against accuracy, or agreement where there are no labels; 0-1."""

    name: str
    latency_ns: float
    latency_ci95_ns: tuple[float, float]
    quality: float
    quality_ci95: tuple[float, float]
    best: bool = False  # on the front
    good: bool = True  # met and valid
    dense: bool = False


def _draw(name: str, height: float, paint: Callable[[Figure], None]) -> str:
    """Run `paint` on an empty figure `height` units high and return it as an `<svg>` for an HTML page."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks: the reader's fonts are used
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        paint(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Drop what only a stand-alone SVG needs, make ids unique on the page, and put CSS variables for the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg\b[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-labelledby="{name}">', svg, count=1)
    svg = re.sub(r'\b(id=")', rf"\1{name}-", svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\1{name}-", svg)
    svg = re.sub(
        r"font(-family)?: ?(\d+px )?'DejaVu Sans'[^;\"]*", lambda match: f"font-size: {match[2]}" if match[2] else "", svg
    )
    for variable, colour in _COLOUR.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _clean(name: str, limit: int = 24) -> str:
    """One printable line of at most `limit` characters; the middle goes first."""
    line = "".join(character if character.isprintable() else " " for character in name)
    return line if len(line) <= limit else f"{line[: limit // 2]}…{line[-(limit // 2 - 1) :]}"


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a horizontal chart, the first on top."""
    axes.set_yticks(range(len(names)), [_clean(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _legend(axes: Axes, columns: int) -> None:
    """A legend in one line above the axes."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        **_LEGEND,
    )


# --- latency -------------------------------------------------------------------------------------------------------------


def latency(report: Report, comparison: Comparison) -> str:
    """All samples of both networks beside the budget, and the median of every round in the order taken."""
    unit, scale = units.time_unit(report.budget_ns)
    sides = (("dense", comparison.dense), ("pruned", comparison.pruned))

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 2))
        _distribution(top, sides, scale)
        for line in (top.axvline, bottom.axhline) if report.budget != NO_BUDGET else ():
            line(report.budget_ns / scale, color=_COLOUR["budget"], linewidth=1.4, linestyle=(0, (4, 2)), label="budget")
        _legend(top, 3)
        top.set_xlabel(f"latency, {unit}")
        for name, side in sides:
            medians = [_median(samples) / scale for samples in side.rounds_ns if samples]
            bottom.plot(range(1, len(medians) + 1), medians, color=_COLOUR[name], marker="o", markersize=3, linewidth=1)
        bottom.set_ylim(bottom=0)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_xlim(left=0.5)
        bottom.set_xlabel("round")
        bottom.set_ylabel(f"median, {unit}")

    return _draw("latency", 300, paint)


def _median(samples: Sequence[int]) -> float:
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def _distribution(axes: Axes, sides: Sequence[tuple[str, Measurement]], scale: float) -> None:
    """Histograms over a common range; the slowest 1 % is folded into the last bin, so that one stall does not flatten the
    rest.
    """
    for name, side in sides:
        samples = sorted(sample / scale for samples in side.rounds_ns for sample in samples)
        if not samples:
            continue
        low, high = samples[0], samples[math.ceil(0.99 * len(samples)) - 1]
        clipped = [min(sample, high) for sample in samples]
        bins = max(8, min(40, len(samples) // 12))
        limits = (low, high) if high > low else None
        axes.hist(clipped, bins, limits, histtype="stepfilled", color=_COLOUR[name], alpha=0.35, linewidth=0)
        axes.hist(
            clipped, bins, limits, histtype="step", color=_COLOUR[name], linewidth=1.2, label=f"{name}, {len(samples)} samples"
        )
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(left=0)


def iterations(report: Report) -> str:
    """Aim, prediction and measurement of every turn of the closed loop, over the band that is accepted."""
    unit, scale = units.time_unit(report.budget_ns)
    turns = range(1, len(report.iterations) + 1)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if report.budget != NO_BUDGET:
            axes.axhline(report.budget_ns / scale, color=_COLOUR["budget"], linewidth=1.4, linestyle=(0, (4, 2)), label="budget")
        for name, marker, colour in (("target", "_", "muted"), ("predicted", "D", "dense"), ("measured", "o", "pruned")):
            values = [getattr(turn, f"{name}_ns") / scale for turn in report.iterations]
            axes.plot(
                turns,
                values,
                marker=marker,
                markersize=6,
                linewidth=1 if name == "measured" else 0,
                color=_COLOUR[colour],
                label=name,
            )
        axes.set_xticks(turns)
        axes.set_xlim(0.5, len(turns) + 0.5)
        axes.margins(y=0.2)
        axes.set_xlabel("turn")
        axes.set_ylabel(f"{report.statistic}, {unit}")
        _legend(axes, 4)

    return _draw("iterations", 220, paint)


# --- groups --------------------------------------------------------------------------------------------------------------


def _shown(groups: Sequence[GroupReport]) -> Sequence[GroupReport]:
    """All groups, or the first that a figure has room for; the page's table has all of them."""
    return groups[:GROUPS_SHOWN]


def widths(groups: Sequence[GroupReport]) -> str:
    """Every group as a bar of its dense width: what stays in full colour, what was removed pale, by category."""
    shown = _shown(groups)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        left, seen = [0.0] * len(shown), False
        for removed in (False, True):
            for category in (*CATEGORIES, "unknown"):
                lengths = [_part(group, category, removed) / max(group.width_before, 1) for group in shown]
                seen = seen or (any(lengths) and category in CATEGORIES)
                colour = _COLOUR.get(category, _COLOUR["pruned"])
                axes.barh(range(len(shown)), lengths, left=left, height=0.62, color=colour, alpha=0.3 if removed else 1)
                left = [before + length for before, length in zip(left, lengths, strict=True)]
        for row, group in enumerate(shown):
            kept = group.width_after / max(group.width_before, 1)
            axes.plot([kept, kept], [row - 0.45, row + 0.45], color=_COLOUR["ink"], linewidth=1.4)
            text = f"{group.width_before} → {group.width_after}" if group.width_after else f"{group.width_before} → dropped"
            axes.text(1.02, row, text, va="center", fontsize=10)
        _rows(axes, [group.name for group in shown])
        axes.set_xlim(0, 1.28)
        axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_xlabel("channels kept | removed (pale)")
        if seen:
            from matplotlib.patches import Patch

            handles = [Patch(color=_COLOUR[name], label=name) for name in CATEGORIES]
            figure.legend(handles=handles, loc="outside upper right", ncols=4, **_LEGEND)

    return _draw("widths", 76 + ROW * len(shown), paint)


def _part(group: GroupReport, category: str, removed: bool) -> int:
    """Channels of one category that stay or were removed; `unknown` is whatever no category accounts for."""
    total = group.width_before - group.width_after if removed else group.width_after
    parts = {
        name: getattr(group.removed, name) if removed else getattr(group.categories, name) - getattr(group.removed, name)
        for name in CATEGORIES
    }
    fits = min(parts.values()) >= 0 and sum(parts.values()) <= total
    if category in parts:
        return parts[category] if fits else 0
    return total - sum(parts.values()) if fits else total


def responses(groups: Sequence[GroupReport]) -> str:
    """Heat map: a row a group, width across, distortion as depth of colour on a logarithmic scale; the chosen width is
    outlined.
    """
    shown = [group for group in _shown(groups) if group.responses]
    values = [point.distortion for group in shown for point in _curve(group) if point.distortion > 0]
    low, high = (max(min(values), max(values) * 1e-4), max(values)) if values else (0.1, 1.0)

    def depth(distortion: float) -> float:
        if distortion <= low:
            return 0.04
        return 0.04 + 0.96 * (math.log(distortion / low) / math.log(high / low) if high > low else 1.0)

    def paint(figure: Figure) -> None:
        axes, key = figure.subplots(2, 1, height_ratios=(ROW * len(shown) + 30, 10))
        for row, group in enumerate(shown):
            curve = _curve(group)
            edges = _edges([point.width / group.width_before for point in curve])
            for point, start, end in zip(curve, edges, edges[1:], strict=False):
                chosen = point.width == group.width_after
                axes.barh(row, end - start, left=start, height=0.84, color=_COLOUR["critical"], alpha=depth(point.distortion))
                if chosen:
                    axes.barh(
                        row, end - start, left=start, height=0.84, fill=False, edgecolor=_COLOUR["ink"], linewidth=1.5, zorder=3
                    )
        _rows(axes, [group.name for group in shown])
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("width; the chosen one is outlined")
        steps = 24
        for step in range(steps):
            key.barh(0, 1, left=step, color=_COLOUR["critical"], alpha=0.04 + 0.96 * step / (steps - 1))
        key.set_xlim(0, steps)
        key.set_yticks([])
        key.set_xticks([0, steps], [units.small(low), units.small(high)])
        key.set_xlabel("distortion of the outputs")
        for spine in key.spines.values():
            spine.set_visible(False)

    return _draw("responses", 110 + ROW * len(shown), paint)


def _curve(group: GroupReport) -> list[Any]:
    """The responses of the last round, by width; where several orders were tried, the one that distorts least."""
    last = max(point.round for point in group.responses)
    best: dict[int, Any] = {}
    for point in group.responses:
        if point.round == last and (point.width not in best or point.distortion < best[point.width].distortion):
            best[point.width] = point
    return [best[width] for width in sorted(best)]


def _edges(centres: Sequence[float]) -> list[float]:
    """Borders of cells around ascending `centres` within 0 to 1; the outer cells reach as far out as in."""
    inner = [(left + right) / 2 for left, right in zip(centres, centres[1:], strict=False)]
    first, last = (inner[0], inner[-1]) if inner else (centres[0] + 0.04, centres[-1] - 0.04)
    return [max(0.0, 2 * centres[0] - first), *inner, min(1.0, 2 * centres[-1] - last)]


def effects(groups: Sequence[GroupReport]) -> str:
    """Mean causal effect of every group that has one, with its 95 % interval."""
    shown = _shown([group for group in groups if group.categories.total])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=_COLOUR["muted"], linewidth=0.8)
        for row, group in enumerate(shown):
            low, high = group.effect_ci95
            name = "critical" if high < 0 else "detrimental" if low > 0 else "undecided"
            axes.plot([low, high], [row, row], color=_COLOUR[name], linewidth=1.6, solid_capstyle="butt")
            axes.plot(group.effect_mean, row, "o", color=_COLOUR[name], markersize=4)
        _rows(axes, [group.name for group in shown])
        axes.grid(axis="x", color=_COLOUR["rule"], linewidth=0.5)
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.set_xlabel("change of the log-odds")

    return _draw("effects", 50 + ROW * len(shown), paint)


# --- kernels -------------------------------------------------------------------------------------------------------------


def kernels(report: Report) -> str:
    """The slowest kernels of the dense network, before and after, and the rest together."""
    ranked = sorted(report.kernels, key=lambda kernel: -max(kernel.dense_ns, kernel.pruned_ns))
    shown, rest = ranked[:KERNELS_SHOWN], ranked[KERNELS_SHOWN:]
    unit, scale = units.time_unit(max((kernel.dense_ns for kernel in shown), default=0.0))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, kernel in enumerate(shown):
            dense, pruned = kernel.dense_ns / scale, kernel.pruned_ns / scale
            axes.plot([pruned, dense], [row, row], color=_COLOUR["rule"], linewidth=3, solid_capstyle="butt", zorder=1)
            axes.plot(dense, row, "o", color=_COLOUR["dense"], markersize=5, label="" if row else "dense")
            axes.plot(pruned, row, "o", color=_COLOUR["pruned"], markersize=5, label="" if row else "pruned")
        _rows(axes, [kernel.name for kernel in shown])
        axes.set_xlim(left=0)
        axes.set_xlabel(f"time, {unit}{_rest(rest)}")
        _legend(axes, 2)

    return _draw("kernels", 80 + ROW * len(shown), paint)


def _rest(kernels: Sequence[KernelTime]) -> str:
    if not kernels:
        return ""
    before, after = (units.duration(sum(getattr(kernel, name) for kernel in kernels)) for name in ("dense_ns", "pruned_ns"))
    return f"   ({len(kernels)} more: {before} → {after})"


# --- several networks ------------------------------------------------------------------------------------------------------


def _together(points: Sequence[Network]) -> list[tuple[tuple[float, float], list[str]]]:
    """The names of the networks at every place of latency and quality."""
    places: dict[tuple[float, float], list[str]] = {}
    for point in points:
        places.setdefault((point.latency_ns, 100 * point.quality), []).append(point.name)
    return list(places.items())


def pareto(points: Sequence[Network], quality: str, marked: str = "") -> str:
    """Quality over measured latency, with the 95 % intervals of both; the network named `marked` is ringed."""
    unit, scale = units.time_unit(max(point.latency_ns for point in points))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        best = sorted((point for point in points if point.best), key=lambda point: point.latency_ns)
        axes.plot([p.latency_ns / scale for p in best], [100 * p.quality for p in best], color=_COLOUR["rule"], zorder=1)
        for point in points:
            x, y = point.latency_ns / scale, 100 * point.quality
            colour = _COLOUR["dense" if point.dense else "pruned" if point.good else "critical"]
            low, high = (bound / scale for bound in point.latency_ci95_ns)
            axes.plot([low, high], [y, y], color=colour, linewidth=1.2)
            axes.plot([x, x], [100 * bound for bound in point.quality_ci95], color=colour, linewidth=1.2)
            axes.plot(x, y, "o", color=colour, markersize=5)
            if point.name == marked:
                axes.plot(
                    x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor=_COLOUR["budget"], markeredgewidth=1.5
                )
        for (x, y), names in _together(points):  # networks that are one and the same share a label
            axes.annotate(_clean(", ".join(names)), (x / scale, y), xytext=(5, 5), textcoords="offset points", fontsize=10)
        axes.margins(x=0.12)
        bounds = [100 * bound for point in points for bound in (point.quality, *point.quality_ci95)]
        room = max(0.12 * (max(bounds) - min(bounds)), 0.5)  # where nothing differs, half a point
        axes.set_ylim(min(bounds) - room, max(bounds) + room)
        axes.set_yticks([tick for tick in axes.get_yticks() if min(bounds) - room <= tick <= min(100, max(bounds) + room)])
        axes.set_xlabel(f"measured latency, {unit}")
        axes.set_ylabel(f"{quality}, %")

    return _draw("pareto", 280, paint)


# --- modules -------------------------------------------------------------------------------------------------------------


def modules(graph: ModuleGraph) -> str:
    """The modules from the image to the classes, operator by operator, and what every class loses without each of them."""
    operators = list(dict.fromkeys(link.operator for link in graph.links))
    whole = [effect for effect in graph.effects if not effect.group]
    classes = len(whole[0].classes) if whole else 0
    shown = min(classes, CLASSES_SHOWN)
    height = ROW * (len(operators) + 1)

    def paint(figure: Figure) -> None:
        rows = ROW * max(shown, 1)
        upper, lower = figure.subplots(2, 1, height_ratios=(height, rows))
        for row, operator in enumerate(operators):
            for link in (link for link in graph.links if link.operator == operator):
                ends = [_lane(link.source, graph.count), _lane(link.target, graph.count)]
                width = 0.4 + 4 * link.share
                upper.plot(ends, [row - 0.5, row + 0.5], color=_COLOUR["pruned"], linewidth=width, solid_capstyle="round")
        _rows(upper, operators)
        upper.set_ylim(len(operators) - 0.4, -0.6)
        upper.set_xticks(
            range(graph.count), [f"module {m + 1}" if graph.count <= MODULES_NUMBERED else str(m + 1) for m in range(graph.count)]
        )
        upper.set_xlim(-0.6, graph.count - 0.4)
        upper.xaxis.tick_top()
        largest = max((abs(c) for effect in whole for c in effect.classes if c is not None), default=0.0) or 1.0
        for effect in whole:
            for row, change in enumerate(effect.classes[:shown]):
                if change is not None:
                    colour = _COLOUR["critical" if change < 0 else "detrimental"]
                    size = 1 + 8 * math.sqrt(abs(change) / largest)
                    lower.plot(effect.module, row, "o", color=colour, markersize=size)
                    if graph.count <= MODULES_NUMBERED:
                        said = units.signed(change)
                        lower.annotate(said, (effect.module, row), (8, 0), textcoords="offset points", va="center")
        _rows(lower, [f"class {row}" for row in range(shown)])
        lower.set_xlim(-0.6, graph.count - 0.4)
        lower.set_xticks([])
        lower.set_xlabel(
            "change of the class's log-odds without the module" + (f" ({shown} of {classes} classes)" * (shown < classes))
        )

    return _draw("modules", height + ROW * max(shown, 1) + 80, paint)


def _lane(module: int, count: int) -> float:
    """Where a module stands from left to right; what is no module stands in the middle."""
    return (count - 1) / 2 if module < 0 else float(module)
