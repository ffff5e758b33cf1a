"""From measured networks to a latency model: the shape of each kernel's cost from profiles, the level from end-to-end times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from toolkit.latency.alignment import MIN_SAMPLES, Alignment, Observations, evidence, probe_alignment
from toolkit.latency.formula import Floats, fit_formula
from toolkit.latency.level import calibrate
from toolkit.latency.predict import UNJUDGED, KernelFit, LatencyModel
from toolkit.latency.residual import fit_residual
from toolkit.latency.sites import Site
from toolkit.latency.table import Entry, NetworkSample, SampleSet
from toolkit.schema import HeldOut

Place = tuple[str, int, int]  # kernel key, channels in, channels out
Span = tuple[list[Place], float, str]  # places, nanoseconds they took together, kernels executed

RIDGE = 1e-3  # of the joint fit, relative to a coefficient's largest part in any span
CLOCK_NS = 1000.0  # resolution of the runtimes' profilers
MOST_OVERHEAD = 0.5  # of the fastest network's latency that may be beside its kernels
LEAST_SHARE = 0.1  # of a kernel's profiled time that the profiler's own cost may leave of it


def fit_model(samples: SampleSet, sites: Sequence[Site], alignments: Mapping[str, Alignment] | None = None) -> LatencyModel:
    """Fit on the networks of every role but `held_out`; judge on those. Deterministic. `alignments` are probed unless given."""
    fitted = samples.of("train", "extra", "plan")
    known = [network.widths for network in fitted]
    held = [network for network in samples.of("held_out") if network.widths not in known]
    kinds = {site.key: site.kind for site in sites}
    entries, overhead = observe(fitted, sites, samples)
    observed = {key: _columns(found) for key, found in entries.items()}
    by_kind: dict[str, list[Observations]] = {}
    for key, data in observed.items():
        by_kind.setdefault(kinds[key], []).append(data)
    if alignments is None:
        alignments = {kind: probe_alignment(by_kind[kind]) for kind in sorted(by_kind)}
    fits: dict[tuple[str, str], KernelFit] = {}
    for key, data in observed.items():
        alignment = alignments[kinds[key]]
        for regime in sorted(set(data.regimes(alignment))):
            fits[key, regime] = _fit_kernel(data.select(alignment, regime), data, alignment)
    profiled = LatencyModel(
        tuple(sites), alignments, fits, samples.reference_ns, overhead,
        evidence=tuple(evidence(kind, by_kind[kind], alignments[kind]) for kind in sorted(by_kind)),
    )  # fmt: skip
    model = calibrate(profiled, fitted, samples)
    return replace(model, held_out=judge(model, held, samples))


def judge(model: LatencyModel, networks: Sequence[NetworkSample], samples: SampleSet) -> HeldOut:
    """Predicted against measured on these networks."""
    from scipy.stats import spearmanr

    if not networks:
        return UNJUDGED
    measured = np.array([samples.latency_ns(network) for network in networks])
    predicted = np.array([model.predict(network.widths) for network in networks])
    error = predicted / measured - 1
    rank = float(spearmanr(predicted, measured).statistic) if len(networks) > 2 else 0.0
    return HeldOut(
        networks=len(networks),
        mape=float(np.abs(error).mean()),
        bias=float(error.mean()),
        spearman=rank if math.isfinite(rank) else 0.0,
    )


def observe(networks: Sequence[NetworkSample], sites: Sequence[Site], samples: SampleSet) -> tuple[dict[str, list[Entry]], float]:
    """(profiled times by kernel key, nanoseconds of a call beside its kernels). Rows that other models brought are among them.

    Each network's profile is brought to its own end-to-end latency. A profiled kernel takes g (t + k): k is what the profiler
    adds to each, and g what the machine was doing meanwhile. With S the sum over a network of K kernels, E its latency and o
    what a call takes beside them, S = g (E - o + k K). The intercept of S over E gives k K - o, of which one is taken as 0; then
    each network has its own g.
    """
    rows: dict[str, list[Entry]] = {}
    for row in samples.borrowed:
        rows.setdefault(row.key, []).append((row.c_in, row.c_out, row.ratio * samples.reference_ns, row.kernels))
    profiled = [network for network in networks if network.spans]
    if not profiled:
        return rows, 0.0
    end_to_end = np.array([samples.latency_ns(network) for network in profiled])
    total = np.array([sum(latency for _, latency, _ in network.spans) + network.lost_ns for network in profiled])
    level = samples.anchor_ns / np.array([network.anchor_ns for network in profiled])
    count = np.array([sum(len(kernels.split()) for *_, kernels in network.spans) for network in profiled])
    rest = _intercept(end_to_end, total * level)
    added = max(0.0, rest) / max(float(np.median(count)), 1.0)
    overhead = min(max(0.0, -rest), MOST_OVERHEAD * float(end_to_end.min()))
    spans: list[Span] = []
    for network, factor in zip(profiled, (end_to_end - overhead + added * count) / total, strict=True):
        for indices, latency, kernels in network.spans:
            known = float(max(latency * factor - added * len(kernels.split()), LEAST_SHARE * latency * factor))
            places = [(sites[i].key, sites[i].c_in.at(network.widths), sites[i].c_out.at(network.widths)) for i in indices]
            spans.append((places, known, kernels))
    for (key, c_in, c_out), latency, kernels in split(spans):
        rows.setdefault(key, []).append((c_in, c_out, latency, kernels))
    return rows, overhead


def split(spans: Sequence[Span]) -> Iterator[tuple[Place, float, str]]:
    """Single places with their times. What several took together is shared out as one nonnegative bilinear cost for each kernel,
    fitted to all spans at once, has it: widths vary independently, so that many networks tell the places apart.
    """
    from scipy.optimize import nnls

    joint = any(len(places) > 1 for places, *_ in spans)
    costs: dict[str, Floats] = {}
    if joint:
        keys = sorted({key for places, *_ in spans for key, *_ in places})
        design = np.zeros((len(spans), 4 * len(keys)))
        for row, (places, *_) in enumerate(spans):
            for key, c_in, c_out in places:
                at = 4 * keys.index(key)
                design[row, at : at + 4] += (1, c_in, c_out, c_in * c_out)
        latency = np.array([known for _, known, _ in spans])
        weight = 1 / np.maximum(latency, CLOCK_NS)
        size = np.maximum((design * weight[:, None]).max(axis=0), 1e-12)
        ridge = RIDGE * np.eye(len(size))  # of places that only ever occur together each gets its part
        solution = nnls(np.vstack([design * weight[:, None] / size, ridge]), np.append(np.ones(len(spans)), np.zeros(len(size))))[
            0
        ]
        costs = dict(zip(keys, (solution / size).reshape(-1, 4), strict=True))
    for places, known, kernels in spans:
        if len(places) == 1:
            yield places[0], known, kernels
        else:
            parts = np.array([max(1e-9, costs[key] @ (1, c_in, c_out, c_in * c_out)) for key, c_in, c_out in places])
            for place, share in zip(places, parts / parts.sum(), strict=True):
                yield place, known * float(share), kernels


def _intercept(end_to_end: Floats, summed: Floats) -> float:
    """c of S = g (E + c), by Theil and Sen's line through S / E over 1 / E, since g scatters relatively: as near to nothing as
    the middle half of its distribution allows. 0 where networks are too alike to tell.
    """
    from scipy.stats import theilslopes

    if float(np.ptp(end_to_end)) <= 0.2 * float(np.median(end_to_end)):
        return 0.0
    _, rest, low, high = theilslopes(summed / end_to_end, 1 / end_to_end, alpha=0.5)
    return float(np.clip(0.0, low, high)) / float(rest) if rest > 0 else 0.0


def _columns(entries: Sequence[Entry]) -> Observations:
    c_in, c_out, latency, kernels = zip(*entries, strict=True)
    return Observations(np.array(c_in, np.int64), np.array(c_out, np.int64), np.array(latency, float), kernels)


def _fit_kernel(data: Observations, everywhere: Observations, alignment: Alignment) -> KernelFit:
    """Fit one regime: the formula, then what it leaves over. Where it was seen too rarely, all regimes give the formula and
    the regime its level.
    """
    source = data if len(data.latency) >= MIN_SAMPLES else everywhere
    formula = fit_formula(source.cells(alignment), source.latency, alignment.step_out)
    cells = data.cells(alignment)
    fitted = np.maximum(formula.at(cells), CLOCK_NS)
    if source is everywhere:
        return KernelFit(alignment, formula, fit_residual(cells[:0, 2:], fitted[:0]), float(np.median(data.latency / fitted)))
    return KernelFit(alignment, formula, fit_residual(cells[:, 2:], (data.latency - fitted) / fitted))
