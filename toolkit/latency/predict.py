"""The latency model: what a network of given widths takes on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from toolkit.errors import TableError
from toolkit.latency.alignment import Alignment
from toolkit.latency.formula import Formula
from toolkit.latency.residual import Residual
from toolkit.latency.sites import Site
from toolkit.schema import AlignmentEvidence, DimForm, HeldOut, TableSummary

UNJUDGED = HeldOut(networks=0, mape=0.0, bias=0.0, spearman=0.0)
MIN_COST_NS = 1.0  # of a site that runs; a zero would make it look dropped
FREE = 0.1  # of the average cost of a channel
LEAST_RESIDUAL = -0.9  # what the residual may take of a formula's cost


@dataclass(frozen=True)
class KernelFit:
    """Cost of one kernel in one regime: a formula, what it leaves over, and the factor that end-to-end times give both."""

    alignment: Alignment
    formula: Formula
    residual: Residual
    level: float = 1.0  # of a regime seen too rarely for a formula of its own
    factor: float = 1.0
    known: dict[tuple[int, int], float] = field(default_factory=dict, compare=False, repr=False)

    def profiled(self, c_in: int, c_out: int) -> float:
        """Nanoseconds as the profile has it, without `factor`."""
        if (c_in, c_out) not in self.known:
            cells = np.array([(c_in, c_out, *self.alignment.padded(c_in, c_out))], np.int64)
            rest = max(LEAST_RESIDUAL, float(self.residual.at(cells[:, 2:])[0]))
            self.known[c_in, c_out] = self.level * float(self.formula.at(cells)[0]) * (1 + rest)
        return self.known[c_in, c_out]


@dataclass(frozen=True)
class LatencyModel:
    """Latency of any widths: `overhead_ns` plus the sum over its sites."""

    sites: tuple[Site, ...]
    alignments: Mapping[str, Alignment]  # by operator family
    fits: Mapping[tuple[str, str], KernelFit]  # by site key and regime
    reference_ns: float
    overhead_ns: float = 0.0  # of a call beside its kernels
    per_site_ns: float = 0.0  # what the profile misses of a place that runs
    per_drop_ns: float = 0.0  # what a place leaves, or saves in its neighbours, once its branch is dropped
    held_out: HeldOut = UNJUDGED
    evidence: tuple[AlignmentEvidence, ...] = ()
    coverage: float = 1.0  # share of the dense network's profiled time that belongs to sites
    table_id: str = ""
    rows: int = 0

    def site_cost(self, site: Site, c_in: int, c_out: int) -> float:
        """Nanoseconds of one site; where a plan leaves no channels on either side of it, what dropping it leaves or saves.

        In a regime nobody measured the cost is the highest that the kernel's other regimes give: a plan must not gain
        from what is not known.

        Raises:
            TableError: the kernel was not measured at all.
        """
        if c_in == 0 or c_out == 0:
            return self.per_drop_ns
        fits = self._fits_for(site, self.alignments[site.kind].regime(c_in, c_out))
        costs = (fit.factor * fit.profiled(c_in, c_out) + self.per_site_ns for fit in fits)
        return max(MIN_COST_NS, *costs)

    def why_flat(self, site: Site, before: tuple[int, int], after: tuple[int, int]) -> str:
        """Why a site of fewer channels, in and out, takes no less time, as far as the table can tell."""
        alignment = self.alignments[site.kind]
        regime = alignment.regime(*after)
        if alignment.padded(*before) == alignment.padded(*after):
            wide_in, wide_out = alignment.padded(*after)
            return f"the runtime pads its channels to the same {wide_in} in and {wide_out} out"
        if regime != alignment.regime(*before):
            return "at this width the runtime runs another, slower kernel"
        fit = self._fits_for(site, regime)[0]
        return {
            "fixed": "most of its time is fixed: the launch, and what does not depend on channels",
            "memory": "it waits for memory, and the channels that went were few of those it moves",
            "arithmetic": "its blocks are hardly fewer than before",
        }[fit.formula.bound(np.array([(*after, *alignment.padded(*after))], np.int64))]

    def _fits_for(self, site: Site, regime: str) -> list[KernelFit]:
        found = self.fits.get((site.key, regime))
        fits = [found] if found else [fit for (key, _), fit in self.fits.items() if key == site.key]
        if not fits:
            message = f"The latency table has no measurement of the kernel at {site.name} ({site.key})."
            raise TableError(message, "Run: edgekit measure MODEL -p PROFILE")
        return fits

    def predict(self, widths: Mapping[str, int]) -> float:
        """Nanoseconds of the whole network; a group of width 0 is a dropped branch."""
        costs = (self.site_cost(site, site.c_in.at(widths), site.c_out.at(widths)) for site in self.sites)
        return self.overhead_ns + sum(costs)

    def far_edges(self, candidates: Mapping[str, Sequence[int]], dense: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The candidates, each moved up as far as further channels are nearly free, all other groups being whole.

        Nearly free: they cost less than `FREE` of what channels of this group cost on average. A candidate in the middle of a
        step so becomes the widest one on it.
        """
        return {name: self._far_edges(name, sorted(set(widths)), dense) for name, widths in candidates.items()}

    def _far_edges(self, name: str, widths: Sequence[int], dense: Mapping[str, int]) -> tuple[int, ...]:
        sites = [site for site in self.sites if name in site.c_in.groups + site.c_out.groups]

        def cost(width: int) -> float:
            at = {**dense, name: width}
            return sum(self.site_cost(site, site.c_in.at(at), site.c_out.at(at)) for site in sites)

        positive = [width for width in widths if width > 0]
        average = (cost(positive[-1]) - cost(positive[0])) / max(1, positive[-1] - positive[0])
        found = set(widths[:1]) & {0} | {positive[-1]}
        for width, following in itertools.pairwise(positive):
            free = [w for w in range(width, following) if cost(w) - cost(width) <= FREE * average * (w - width)]
            found.add(free[-1])
        return tuple(sorted(found))

    def costs(self) -> tuple[PlaceCost, ...]:
        """The sites as an allocation takes them."""
        return tuple(PlaceCost(site.name, site.c_in, site.c_out, partial(self.site_cost, site)) for site in self.sites)

    def summary(self, path: str = "") -> TableSummary:
        """What a report says of the table behind this model."""
        return TableSummary(
            id=self.table_id, rows=self.rows, coverage=self.coverage, held_out=self.held_out, alignments=self.evidence, path=path
        )


@dataclass(frozen=True)
class PlaceCost:
    """Cost of one site in ns as a function of its channels in and out."""

    name: str
    c_in: DimForm
    c_out: DimForm
    cost: Callable[[int, int], float]
