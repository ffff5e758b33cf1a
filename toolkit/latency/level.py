"""The level of a latency model, from end-to-end times: what profiles, taken with the profiler's own cost, get wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from toolkit.latency.formula import FOLDS, Floats
from toolkit.latency.predict import LatencyModel
from toolkit.latency.table import NetworkSample, SampleSet

LEVELS = (0.01, 0.2)  # how far the profile's level may be off
PER_SITE, PER_DROP = 0.5, 0.5  # what it may miss of a place, by the level; and what a dropped place may leave, by the mean place
PRIORS = (0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # relative spread of the kernels' factors
TIGHT = 0.9  # the tightest priors within this share of the least error: near the profile unless that is plainly worse
NOISE = 0.01  # relative, of one network's end-to-end latency


def calibrate(model: LatencyModel, networks: Sequence[NetworkSample], samples: SampleSet) -> LatencyModel:
    """Fit to end-to-end times of these networks: the level and a time per site, each kernel's
    factor around the level, and what a dropped place leaves behind or saves in its neighbours.

    Bayesian linear regression around the profile; how far it may go from there is chosen by cross-validation.
    """
    names = sorted(model.fits)
    design = np.array([_parts(model, network.widths, names) for network in networks])
    measured = np.array([samples.latency_ns(network) - model.overhead_ns for network in networks])
    mean = np.array([0.0] * len(names) + [1.0, 0.0, 0.0])
    typical, sites = float(np.median(measured)), max(1.0, float(np.median(design[:, -2])))

    def spread(level: float, kernel: float) -> Floats:
        return np.array([kernel] * len(names) + [level, PER_SITE * level * typical / sites, PER_DROP * typical / sites])

    errors = {
        (level, kernel): _left_out_error(design, measured, mean, spread(level, kernel)) for level in LEVELS for kernel in PRIORS
    }
    tightest = next(prior for prior, error in errors.items() if error * TIGHT <= min(errors.values()))
    solution = _posterior(design, measured, mean, spread(*tightest))
    level = solution[len(names)]
    fits = {
        name: replace(model.fits[name], factor=float(max(level + factor, 0.05)))
        for name, factor in zip(names, solution, strict=False)
    }
    return replace(model, fits=fits, per_site_ns=float(solution[-2]), per_drop_ns=float(solution[-1]))


def _parts(model: LatencyModel, widths: Mapping[str, int], names: Sequence[tuple[str, str]]) -> Floats:
    """Profiled time by kernel and regime, their sum, places that run, places that are gone."""
    position = {name: index for index, name in enumerate(names)}
    parts = np.zeros(len(names) + 3)
    for site in model.sites:
        c_in, c_out = site.c_in.at(widths), site.c_out.at(widths)
        if not c_in or not c_out:
            parts[-1] += 1
            continue
        name = site.key, model.alignments[site.kind].regime(c_in, c_out)
        if name in position:  # a network with dropped branches may enter a regime no variant was in
            cost = model.fits[name].profiled(c_in, c_out)
            parts[position[name]] += cost
            parts[-3] += cost
            parts[-2] += 1
    return parts


def _posterior(design: Floats, measured: Floats, mean: Floats, spread: Floats) -> Floats:
    """Mean of the coefficients given the measurements: relative noise of 1 %, a normal prior, Huber weights."""
    solution = mean
    huber = np.ones(len(measured))
    for _ in range(5):
        weight = huber / (NOISE * measured)
        rows = design * spread * weight[:, None]
        target = (measured - design @ mean) * weight
        solution = mean + spread * np.linalg.solve(rows.T @ rows + np.eye(len(mean)), rows.T @ target)
        error = np.abs(design @ solution - measured) / measured
        limit = 2.5 * max(float(np.median(error)), 0.002)
        huber = np.sqrt(np.minimum(1, limit / np.maximum(error, 1e-12)))
    return solution


def _left_out_error(design: Floats, measured: Floats, mean: Floats, spread: Floats) -> float:
    folds = np.arange(len(measured)) % (2 * FOLDS)
    errors: list[float] = []
    for fold in range(2 * FOLDS):
        out = folds == fold
        if out.any() and not out.all():
            solution = _posterior(design[~out], measured[~out], mean, spread)
            errors.extend(np.abs(design[out] @ solution / measured[out] - 1))
    return float(np.mean(errors)) if errors else 0.0
