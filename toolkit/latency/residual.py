"""What a formula leaves over, as far as the measurements bear it out.

The relative residual of a kernel's cost over (channels in, channels out) is taken as a Gaussian process with the covariance

    v_in [i = i'] + v_out [o = o'] + v_cell [both] + v_near exp(-d^2 / 2),   d^2 = (ln i/i')^2 / l^2 + (ln o/o')^2 / l^2

and independent noise: staircases and layouts that no formula foresaw belong to one side's channels, and what bends slowly to
both (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5). The four variances and the noise
are chosen by the marginal likelihood; where nothing is left over they are zero and so is the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.latency.formula import Floats

Pairs = NDArray[np.int64]  # [n, 2]: channels in, channels out

NEAR = 0.5  # length l, in units of ln(channels)
SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)  # standard deviations tried for each part of the covariance
NOISES = (0.5, 1.0, 2.0)  # of the scatter that is seen within cells
MIN_NOISE = 0.002
OUTLIER = 3.0  # in median absolute deviations; a disturbed sample counts as one that far out
SWEEPS = 3


@dataclass(frozen=True)
class Residual:
    """The posterior mean given relative residuals in cells."""

    cells: Pairs
    weights: Floats
    spreads: tuple[float, ...]  # in, out, cell, near

    def at(self, cells: Pairs) -> Floats:
        """Relative residual expected at each of [m, 2] cells."""
        return _covariance(cells, self.cells, self.spreads) @ self.weights


def fit_residual(cells: Pairs, relative: Floats) -> Residual:
    """The process given `relative` residuals [n] in `cells` [n, 2]; a cell may occur several times."""
    if not len(relative):
        return Residual(cells, relative, (0.0, 0.0, 0.0, 0.0))
    middle = float(np.median(relative))
    limit = OUTLIER * 1.4826 * max(float(np.median(np.abs(relative - middle))), MIN_NOISE)
    relative = np.clip(relative, middle - limit, middle + limit)
    places, index = np.unique(cells, axis=0, return_inverse=True)
    index = index.ravel()
    n = np.bincount(index).astype(float)
    mean = np.bincount(index, relative) / n
    spare = len(relative) - len(places)
    scatter = float(((relative - mean[index]) ** 2).sum() / spare) if spare > len(places) / 4 else float(np.var(relative))
    parts = [_covariance(places, places, tuple(float(k == part) for k in range(4))) for part in range(4)]

    def likelihood(spreads: tuple[float, ...], noise: float) -> float:
        total = sum((s * s * part for s, part in zip(spreads, parts, strict=True) if s), np.diag(noise / n))
        sign, logdet = np.linalg.slogdet(total)
        return float(-0.5 * mean @ np.linalg.solve(total, mean) - 0.5 * logdet) if sign > 0 else -np.inf

    best: tuple[float, ...] = (0.0,) * 4
    noise = max(scatter, MIN_NOISE**2)
    found = likelihood(best, noise)
    for _ in range(SWEEPS):
        before = best, noise
        for part in (3, 1, 0, 2):
            for spread in SPREADS:
                tried = tuple(spread if k == part else old for k, old in enumerate(best))
                if tried != best and (value := likelihood(tried, noise)) > found:
                    best, found = tried, value
        for factor in NOISES:
            tried_noise = max(scatter * factor, MIN_NOISE**2)
            if (value := likelihood(best, tried_noise)) > found:
                noise, found = tried_noise, value
        if (best, noise) == before:
            break
    weights = np.linalg.solve(_covariance(places, places, best) + np.diag(noise / n), mean)
    return Residual(places, weights, best)


def _covariance(a: Pairs, b: Pairs, spreads: tuple[float, ...]) -> Floats:
    same_in, same_out = a[:, None, 0] == b[None, :, 0], a[:, None, 1] == b[None, :, 1]
    v_in, v_out, v_cell, v_near = (s * s for s in spreads)
    total: Floats = v_in * same_in + v_out * same_out + v_cell * (same_in & same_out)
    if v_near:
        distance = np.log(a[:, None, :] / b[None, :, :]) / NEAR
        total = total + v_near * np.exp(-0.5 * (distance**2).sum(axis=2))
    return total
