"""The latency model: what a network of given widths takes, fitted from measured networks.

Two steps. Profiled times give the shape of each kernel's cost over (channels in, channels out):

    t = a + b p_in + c p_out + d p_in p_out,    a, b, c, d >= 0

with p the channels rounded up to the step the runtime really pads to, one fit per regime of widths at which it runs other
kernels, and cells where many networks agree on another value pulled towards it. End-to-end times then give the level: per
kernel and regime a factor, and a time per executed kernel for what the profiler adds or misses, found by Bayesian linear
regression around the profiled values, because clocks of a microsecond and the profiler's own cost say little of short kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import TableError
from toolkit.latency.sites import Site
from toolkit.latency.table import NetworkSample, SampleSet
from toolkit.schema import DimForm, HeldOut, TableSummary

Floats = NDArray[np.float64]

STEPS = (1, 4, 8, 16, 32)
BLOCKS = (0, 8, 16, 32)
MULTIPLES = (1, 4, 8)
FOLDS = 5
UNJUDGED = HeldOut(networks=0, mape=0.0, bias=0.0, spearman=0.0)
OVERHEAD_SHARE = 0.02  # of a network's latency: what a call is expected to cost beside its kernels
NOISE = 0.01  # relative, of one network's end-to-end latency
EXTRA_TRUST = 3.0  # weight of a network with dropped branches; they are few and say what no variant can
CLOCK_NS = 1000.0  # resolution of the runtimes' profilers
MIN_COST_NS = 1.0  # of a site that runs; a zero would make it look dropped
WORTH = 0.97  # a less simple choice must lower the cross-validated error below this share of the simpler one's
TIGHT = 0.9  # the smallest spread of factors within this share of the least error: near the profile unless that is plainly worse
PRIORS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # relative spread of the kernels' factors, chosen by cross-validation


@dataclass(frozen=True)
class Alignment:
    """How a runtime treats channel counts of one operator family.

    Below `block` channels in it runs another kernel; channels in that are no multiple of `multiple` another still; below
    `block_out` channels out the output takes another layout. Else channels are padded to `step_in` and `step_out`.
    """

    step_in: int = 1
    step_out: int = 1
    block: int = 0
    block_out: int = 0
    multiple: int = 1

    def regime(self, c_in: int, c_out: int) -> str:
        kernel = "below" if c_in < self.block else "odd" if c_in % self.multiple else "blocked"
        return kernel + (" narrow" if c_out < self.block_out else "")

    def padded(self, c_in: int, c_out: int) -> tuple[int, int]:
        step_in = 1 if c_in < self.block or c_in % self.multiple else self.step_in
        return math.ceil(c_in / step_in) * step_in, math.ceil(c_out / self.step_out) * self.step_out


@dataclass(frozen=True)
class KernelFit:
    """Profiled cost of one kernel in one regime."""

    coefficients: tuple[float, float, float, float]
    cells: Mapping[tuple[int, int], float]  # padded channels -> factor on the fit
    kernels: Mapping[tuple[int, int], float]  # padded channels -> kernels executed
    factor: float = 1.0

    def profiled(self, cell: tuple[int, int]) -> float:
        return float(_basis(np.array([cell]))[0] @ np.array(self.coefficients)) * self.cells.get(cell, 1.0)

    def count(self, cell: tuple[int, int]) -> float:
        if cell in self.kernels:
            return self.kernels[cell]
        nearest = min(self.kernels, key=lambda other: abs(other[0] - cell[0]) + abs(other[1] - cell[1]))
        return self.kernels[nearest]


@dataclass(frozen=True)
class Observations:
    """Profiled times of one kernel key: channels in and out, time in ns, kernels executed; one entry per network and site."""

    c_in: NDArray[np.int64]
    c_out: NDArray[np.int64]
    latency: Floats
    kernels: Floats


@dataclass(frozen=True)
class LatencyModel:
    """Latency of any widths: `overhead_ns` plus the cost of each site."""

    sites: tuple[Site, ...]
    alignments: Mapping[str, Alignment]  # by operator family
    fits: Mapping[tuple[str, str], KernelFit]  # by site key and regime
    per_kernel_ns: float
    overhead_ns: float
    reference_ns: float
    held_out: HeldOut
    coverage: float = 1.0  # share of the dense network's profiled time that belongs to sites
    table_id: str = ""
    rows: int = 0
    scale: float = 1.0

    def site_cost(self, site: Site, c_in: int, c_out: int) -> float:
        """Nanoseconds of one site; 0 where a plan leaves no channels on either side of it.

        In a regime nobody measured the cost is the highest that the kernel's other regimes give: a plan must not gain
        from what is not known.

        Raises:
            TableError: the kernel was not measured at all.
        """
        if c_in == 0 or c_out == 0:
            return 0.0
        alignment = self.alignments[site.kind]
        cell = alignment.padded(c_in, c_out)
        fits = self._fits_for(site, alignment.regime(c_in, c_out))
        return self.scale * max(
            MIN_COST_NS, *(fit.factor * fit.profiled(cell) + self.per_kernel_ns * fit.count(cell) for fit in fits)
        )

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
        return self.scale * self.overhead_ns + sum(costs)

    def rescaled(self, factor: float) -> LatencyModel:
        """The same model for a machine that is `factor` times as slow now."""
        return replace(self, scale=self.scale * factor)

    def costs(self) -> tuple[PlaceCost, ...]:
        """The sites as an allocation takes them."""
        return tuple(PlaceCost(site.name, site.c_in, site.c_out, partial(self.site_cost, site)) for site in self.sites)

    def summary(self) -> TableSummary:
        """What a report says of the table behind this model."""
        return TableSummary(id=self.table_id, rows=self.rows, coverage=self.coverage, held_out=self.held_out)

    @cached_property
    def alignment_step(self) -> int:
        """Channels out that cost the same, over all operator families."""
        return max((alignment.step_out for alignment in self.alignments.values()), default=1)


@dataclass(frozen=True)
class PlaceCost:
    """Cost of one site in ns as a function of its channels in and out."""

    name: str
    c_in: DimForm
    c_out: DimForm
    cost: Callable[[int, int], float]


def fit_model(samples: SampleSet, sites: Sequence[Site]) -> LatencyModel:
    """Fit on the networks of role `train` and `extra`; judge on those of role `held_out`. Deterministic."""
    train = [network for network in samples.networks if network.role == "train"]
    extra = [network for network in samples.networks if network.role == "extra"]
    held = [network for network in samples.networks if network.role == "held_out"]
    reference = samples.reference_ns
    observed = _observations(train, sites, reference)
    kinds = {site.key: site.kind for site in sites}
    alignments = {
        kind: _probe_alignment([observed[key] for key in observed if kinds[key] == kind]) for kind in sorted(set(kinds.values()))
    }
    fits = {
        (key, regime): _fit_kernel(_select(data, alignments[kinds[key]], regime), alignments[kinds[key]])
        for key, data in observed.items()
        for regime in sorted(set(_regimes(data, alignments[kinds[key]])))
    }
    profiled = LatencyModel(tuple(sites), alignments, fits, 0.0, 0.0, reference, UNJUDGED)
    model = _calibrate(profiled, [*train, *extra])
    return replace(model, held_out=judge(model, held))


def judge(model: LatencyModel, networks: Sequence[NetworkSample]) -> HeldOut:
    """Predicted against measured on these networks."""
    from scipy.stats import spearmanr

    if not networks:
        return UNJUDGED
    measured = np.array([network.ratio * model.reference_ns for network in networks])
    predicted = np.array([model.predict(network.widths) for network in networks])
    error = predicted / measured - 1
    rank = float(spearmanr(predicted, measured).statistic) if len(networks) > 2 else 0.0
    return HeldOut(
        networks=len(networks),
        mape=float(np.abs(error).mean()),
        bias=float(error.mean()),
        spearman=rank if math.isfinite(rank) else 0.0,
    )


# --- profiled shape ---------------------------------------------------------------------------------------------------------


def _observations(networks: Sequence[NetworkSample], sites: Sequence[Site], reference_ns: float) -> dict[str, Observations]:
    rows: dict[str, list[tuple[int, int, float, int]]] = {}
    for network in networks:
        for index, latency, kernels in network.sites:
            site = sites[index]
            entry = (
                site.c_in.at(network.widths), site.c_out.at(network.widths),
                latency * reference_ns / network.profiled_reference_ns, kernels,
            )  # fmt: skip
            rows.setdefault(site.key, []).append(entry)
    found = {}
    for key, entries in rows.items():
        table = np.array(entries, float)
        found[key] = Observations(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3])
    return found


def _regimes(data: Observations, alignment: Alignment) -> list[str]:
    return [alignment.regime(int(i), int(o)) for i, o in zip(data.c_in, data.c_out, strict=True)]


def _select(data: Observations, alignment: Alignment, regime: str) -> Observations:
    chosen = np.array(_regimes(data, alignment)) == regime
    return Observations(data.c_in[chosen], data.c_out[chosen], data.latency[chosen], data.kernels[chosen])


def _basis(cells: NDArray[np.int64]) -> Floats:
    p_in, p_out = cells[:, 0].astype(float), cells[:, 1].astype(float)
    return np.stack([np.ones(len(cells)), p_in, p_out, p_in * p_out], axis=1)


def _padded(data: Observations, alignment: Alignment) -> NDArray[np.int64]:
    pairs = [alignment.padded(int(i), int(o)) for i, o in zip(data.c_in, data.c_out, strict=True)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _nonnegative(basis: Floats, latency: Floats) -> Floats:
    """Nonnegative least squares on relative errors, robust to a few disturbed networks."""
    from scipy.optimize import nnls

    size = np.maximum(basis.max(axis=0), 1e-12)
    fitted = np.full(len(latency), max(float(np.median(latency)), 1.0))
    solution: Floats = np.zeros(basis.shape[1])
    trust = np.ones(len(latency))
    for _ in range(4):
        # Relative to the fit, not to the sample: a sample that came out low must not weigh more for it.
        weight = trust / fitted
        solution = nnls(basis / size * weight[:, None], latency * weight)[0] / size
        fitted = np.maximum(basis @ solution, 0.1 * float(np.median(latency)) + 1.0)
        error = np.abs(basis @ solution - latency) / fitted
        trust = np.sqrt(np.minimum(1, 2.5 * max(float(np.median(error)), 1e-3) / np.maximum(error, 1e-12)))
    return solution


def _probe_alignment(keys: Sequence[Observations]) -> Alignment:
    """The alignment whose fits predict left-out channel pairs best: a plain block size first, then coordinate by coordinate."""
    best, error = Alignment(), _alignment_error(keys, Alignment())
    for step in STEPS[1:]:
        for plain in (Alignment(step, step), Alignment(step, step, step), Alignment(step, step, step, step)):
            found = _alignment_error(keys, plain)
            if found < error * WORTH:
                best, error = plain, found
    choices = {"block": BLOCKS, "step_out": STEPS, "step_in": STEPS, "multiple": MULTIPLES, "block_out": BLOCKS}
    for _ in range(2):
        before = best
        for field, values in choices.items():
            for value in values:
                tried = replace(best, **{field: value})
                found = _alignment_error(keys, tried) if tried != best else error
                if found < error * WORTH:
                    best, error = tried, found
        if best == before:
            break
    return best


def _alignment_error(keys: Sequence[Observations], alignment: Alignment) -> float:
    """Mean absolute relative error on left-out channel pairs, each kernel weighing what it takes."""
    total = weight = 0.0
    for data in keys:
        for regime in sorted(set(_regimes(data, alignment))):
            part = _select(data, alignment, regime)
            pairs = np.unique(np.stack([part.c_in, part.c_out], axis=1), axis=0, return_inverse=True)[1].ravel()
            basis = _basis(_padded(part, alignment))
            for fold in range(min(FOLDS, pairs.max() + 1)):
                out = pairs % FOLDS == fold
                if out.all():
                    continue
                predicted = basis[out] @ _nonnegative(basis[~out], part.latency[~out])
                total += float(np.abs(predicted - part.latency[out]).sum())
            weight += float(part.latency.sum())
    return total / weight if weight else 0.0


def _fit_kernel(data: Observations, alignment: Alignment) -> KernelFit:
    """Fit one regime, then pull cells towards what was measured in them, as far as their own scatter allows.

    With e_c the median relative error of the fit in cell c, n_c networks, s^2 the variance within cells and v that between
    them, the cell's factor is 1 + e_c v / (v + s^2 / n_c): the empirical Bayes estimate.
    """
    cells = _padded(data, alignment)
    coefficients = _nonnegative(_basis(cells), data.latency)
    fitted = _basis(cells) @ coefficients
    ratio = (data.latency - fitted) / np.maximum(fitted, CLOCK_NS)
    places, index = np.unique(cells, axis=0, return_inverse=True)
    index = index.ravel()
    n = np.bincount(index).astype(float)
    mean = np.array([np.median(ratio[index == cell]) for cell in range(len(places))])
    kernels = np.bincount(index, data.kernels) / n
    names = [(int(i), int(o)) for i, o in places]
    spare = len(ratio) - len(places)
    within = float(((ratio - mean[index]) ** 2).sum() / spare) if spare > 0 else float(np.var(ratio)) + 1e-4
    between = max(0.0, float((mean**2).mean()) - within * float((1 / n).mean()))
    shrunk = mean * between / (between + within / n) if between > 0 else np.zeros(len(places))
    a, b, c, d = (float(value) for value in coefficients)
    return KernelFit(
        (a, b, c, d),
        dict(zip(names, (max(0.0, 1 + float(e)) for e in shrunk), strict=True)),
        dict(zip(names, (float(k) for k in kernels), strict=True)),
    )


# --- end-to-end level -------------------------------------------------------------------------------------------------------


def _calibrate(model: LatencyModel, networks: Sequence[NetworkSample]) -> LatencyModel:
    """Fit factors, the time per kernel and the overhead to end-to-end times."""
    names = sorted(model.fits)
    design = np.array([_parts(model, network.widths, names) for network in networks])
    measured = np.array([network.ratio * model.reference_ns for network in networks])
    total, kernels = design[:, : len(names)].sum(axis=1), design[:, -2]
    scale, rest = _line(total, measured)
    # A constant per network and one per kernel cannot be told apart until a branch is dropped: the profiler's own cost is
    # per kernel, and a call costs a little beside its kernels, never less than nothing.
    call = OVERHEAD_SHARE * float(np.median(measured))
    count = max(float(np.median(kernels)), 1.0)
    mean = np.array([scale] * len(names) + [(rest - call) / count, call])
    wide = [max(abs(rest), call) / count, call / 2]

    def spread(prior: float) -> Floats:
        return np.array([scale * prior] * len(names) + wide)

    trust = np.array([EXTRA_TRUST if network.role == "extra" else 1.0 for network in networks])
    errors = [_left_out_error(design, measured, mean, spread(prior), trust) for prior in PRIORS]
    tightest = next(prior for prior, error in zip(PRIORS, errors, strict=True) if error * TIGHT <= min(errors))
    solution = _posterior(design, measured, mean, spread(tightest), trust)
    fits = {
        name: replace(model.fits[name], factor=float(max(factor, 0.05 * scale)))
        for name, factor in zip(names, solution, strict=False)
    }
    return replace(model, fits=fits, per_kernel_ns=float(solution[-2]), overhead_ns=float(solution[-1]))


def _parts(model: LatencyModel, widths: Mapping[str, int], names: Sequence[tuple[str, str]]) -> Floats:
    """Profiled time by kernel and regime, then kernels executed, then 1."""
    position = {name: index for index, name in enumerate(names)}
    parts = np.zeros(len(names) + 2)
    parts[-1] = 1
    for site in model.sites:
        c_in, c_out = site.c_in.at(widths), site.c_out.at(widths)
        if c_in and c_out:
            alignment = model.alignments[site.kind]
            name = site.key, alignment.regime(c_in, c_out)
            if name in position:  # an extra network may enter a regime no variant was in
                cell = alignment.padded(c_in, c_out)
                parts[position[name]] += model.fits[name].profiled(cell)
                parts[-2] += model.fits[name].count(cell)
    return parts


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Robust y = slope x + rest (Theil-Sen); through the origin where x hardly varies."""
    if float(np.ptp(x)) < 0.05 * float(np.median(x)):
        return float(np.median(y / x)), 0.0
    from scipy.stats import theilslopes

    slope, rest, *_ = theilslopes(y, x)
    return (float(slope), float(rest)) if slope > 0 else (float(np.median(y / x)), 0.0)


def _posterior(design: Floats, measured: Floats, mean: Floats, spread: Floats, trust: Floats) -> Floats:
    """Mean of the coefficients given the measurements: relative noise of 1 %, a normal prior, Huber weights where trust is 1."""
    solution = mean
    huber = np.ones(len(measured))
    for _ in range(5):
        weight = trust * huber / (NOISE * measured)
        rows = design * spread * weight[:, None]
        target = (measured - design @ mean) * weight
        solution = mean + spread * np.linalg.solve(rows.T @ rows + np.eye(len(mean)), rows.T @ target)
        error = np.abs(design @ solution - measured) / measured
        limit = 2.5 * max(float(np.median(error)), 0.002)
        huber = np.where(trust > 1, 1.0, np.sqrt(np.minimum(1, limit / np.maximum(error, 1e-12))))
    return solution


def _left_out_error(design: Floats, measured: Floats, mean: Floats, spread: Floats, trust: Floats) -> float:
    folds = np.arange(len(measured)) % (2 * FOLDS)
    errors: list[float] = []
    for fold in range(2 * FOLDS):
        out = folds == fold
        if out.any() and not out.all():
            solution = _posterior(design[~out], measured[~out], mean, spread, trust[~out])
            errors.extend(np.abs(design[out] @ solution / measured[out] - 1))
    return float(np.mean(errors)) if errors else 0.0
