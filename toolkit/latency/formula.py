"""What one kernel costs by its channels: formulas that hardware follows, and which of them the measurements choose.

With c the channels as they are and p as the runtime pads them, a place of the network takes either the sum

    t = a + b c_in + c c_out + d c_in c_out + e p_in + f p_out + g p_in p_out

(kernels one after another: arithmetic in whole blocks, memory by the element), or the larger of the two,

    t = max(a + e p_in + f p_out + g p_in p_out,  a' + b c_in + c c_out + d c_in c_out)

(one kernel that waits for whichever is slower: the roofline of Williams, Waterman and Patterson, 2009). All coefficients are
at least 0. A processor that works off blocks in waves has p_out = s ceil(x n) / x for n blocks of s channels: x is the share of
a wave that one block fills.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Cells = NDArray[np.int64]  # [n, 4]: channels in, channels out, and both as padded
Bound = Literal["fixed", "memory", "arithmetic"]  # what most of the time goes to

FOLDS = 5
WORTH = 0.97  # a less simple choice must lower the cross-validated error below this share of the simpler one's
WORTH_WAVES = 0.6  # there are many waves to choose from
WORTH_LOOKING, LIKELY = 0.8, 6  # rough misfit, relative to that without waves, of waves that are looked at; and how many
MAX_BLOCKS = 32
TURNS = 6  # in which samples change sides of the maximum
MIN_SIDE = 5  # samples on each side of a maximum


@dataclass(frozen=True)
class Formula:
    """`slower` is None for the sum, whose coefficients are those of both sides in one row; else the memory side."""

    coefficients: Floats
    slower: Floats | None = None
    step_out: int = 1
    wave: float = 0.0  # x; 0 where blocks are not worked off in waves

    def at(self, cells: Cells) -> Floats:
        """Nanoseconds in each cell."""
        if self.slower is None:
            return self._sum(cells) @ self.coefficients
        return np.maximum(self._blocks(cells) @ self.coefficients, _elements(cells) @ self.slower)

    def bound(self, cells: Cells) -> Bound:
        """What most of the time of the first cell goes to: what no channel changes, memory by the element, or blocks."""
        elements, blocks = _elements(cells)[0, 1:], self._blocks(cells)[0, 1:]
        parts: dict[Bound, float]
        if self.slower is None:
            memory, work = float(elements @ self.coefficients[1:4]), float(blocks @ self.coefficients[4:])
            parts = {"fixed": float(self.coefficients[0]), "memory": memory, "arithmetic": work}
        elif float(_elements(cells)[0] @ self.slower) > float(self._blocks(cells)[0] @ self.coefficients):
            parts = {"memory": float(elements @ self.slower[1:]), "fixed": float(self.slower[0])}
        else:
            parts = {"arithmetic": float(blocks @ self.coefficients[1:]), "fixed": float(self.coefficients[0])}
        return max(parts, key=parts.__getitem__)

    def _sum(self, cells: Cells) -> Floats:
        return np.concatenate([_elements(cells), self._blocks(cells)[:, 1:]], axis=1)

    def _blocks(self, cells: Cells) -> Floats:
        p_in, p_out = cells[:, 2].astype(float), cells[:, 3].astype(float)
        if self.wave:
            p_out = np.ceil(np.round(p_out / self.step_out * self.wave, 9)) / self.wave * self.step_out
        return np.stack([np.ones(len(cells)), p_in, p_out, p_in * p_out], axis=1)


def fit_formula(cells: Cells, latency: Floats, step_out: int) -> Formula:
    """The simplest formula that predicts left-out channel pairs nearly as well as any."""
    plain = Formula(np.zeros(7), step_out=step_out)
    roof = replace(plain, coefficients=np.zeros(4), slower=np.zeros(4))
    choices = [(roof, WORTH)]
    flat = solved(roof, cells, latency)
    assert flat.slower is not None
    computing = flat._blocks(cells) @ flat.coefficients > _elements(cells) @ flat.slower
    waves = {*_likely_waves(cells, latency, step_out), *_likely_waves(cells[computing], latency[computing], step_out)}
    choices += [(replace(form, wave=wave), WORTH_WAVES) for wave in sorted(waves) for form in (plain, roof)]
    best, error = plain, left_out_error(plain, cells, latency)
    for form, worth in choices:
        found = left_out_error(form, cells, latency)
        if found < error * (worth if not best.wave else 1.0):
            best, error = form, found
    return solved(best, cells, latency)


def solved(form: Formula, cells: Cells, latency: Floats) -> Formula:
    """The coefficients of a form. Which side of a maximum a sample is on is found by turns, from several first guesses: the
    more work there is for each element, the likelier it is arithmetic that takes the time.
    """
    if form.slower is None:
        return replace(form, coefficients=nonnegative(form._sum(cells), latency))
    blocks, elements = form._blocks(cells), _elements(cells)
    intensity = blocks[:, 3] / np.maximum(1.0, elements[:, 1] + elements[:, 2])
    found = [_sides(form, blocks, elements, latency, intensity > np.quantile(intensity, share)) for share in (0.2, 0.4, 0.6, 0.8)]
    alone = replace(form, coefficients=np.zeros(4), slower=nonnegative(elements, latency))
    return min((*filter(None, found), alone), key=lambda each: float(np.abs(each.at(cells) - latency).sum()))


def _sides(form: Formula, blocks: Floats, elements: Floats, latency: Floats, computes: NDArray[np.bool_]) -> Formula | None:
    """Both sides of the maximum from a first guess of who is on which; None where one side runs out of samples."""
    for _ in range(TURNS):
        if min(computes.sum(), (~computes).sum()) < MIN_SIDE:
            return None
        coefficients = nonnegative(blocks[computes], latency[computes], sweeps=2)
        slower = nonnegative(elements[~computes], latency[~computes], sweeps=2)
        now = blocks @ coefficients > elements @ slower
        if (now == computes).all():
            break
        computes = now
    return replace(form, coefficients=coefficients, slower=slower)


def left_out_error(form: Formula, cells: Cells, latency: Floats) -> float:
    """Summed absolute error on left-out channel pairs over the summed latency."""
    pairs = np.unique(cells[:, :2], axis=0, return_inverse=True)[1].ravel()
    total = 0.0
    for fold in range(min(FOLDS, pairs.max() + 1)):
        out = pairs % FOLDS == fold
        if not out.all():
            total += float(np.abs(solved(form, cells[~out], latency[~out]).at(cells[out]) - latency[out]).sum())
    return total / max(float(latency.sum()), 1.0)


def nonnegative(basis: Floats, latency: Floats, sweeps: int = 4) -> Floats:
    """Nonnegative least squares on relative errors, robust to a few disturbed networks."""
    from scipy.optimize import nnls

    size = np.maximum(basis.max(axis=0), 1e-12)
    middle = max(float(np.median(latency)), 1.0)
    fitted = np.maximum(latency, 0.1 * middle) if sweeps == 1 else np.full(len(latency), middle)
    solution: Floats = np.zeros(basis.shape[1])
    trust = np.ones(len(latency))
    for _ in range(sweeps):
        # Relative to the fit, not to the sample: a sample that came out low must not weigh more for it.
        weight = trust / fitted
        solution = nnls(basis / size * weight[:, None], latency * weight)[0] / size
        fitted = np.maximum(basis @ solution, 0.1 * middle + 1.0)
        error = np.abs(basis @ solution - latency) / fitted
        trust = np.sqrt(np.minimum(1, 2.5 * max(float(np.median(error)), 1e-3) / np.maximum(error, 1e-12)))
    return solution


def _likely_waves(cells: Cells, latency: Floats, step_out: int) -> list[float]:
    """The waves that fit best by a rough fit, of all that make different staircases; none where they say nothing."""
    blocks = -(-cells[:, 3] // step_out)
    most = int(blocks.max(initial=0))
    if len(np.unique(blocks)) < 4 or most > MAX_BLOCKS:
        return []
    plain = Formula(np.zeros(7), step_out=step_out)

    def misfit(wave: float) -> float:
        basis = replace(plain, wave=wave)._sum(cells)
        return float(np.abs(basis @ nonnegative(basis, latency, sweeps=1) - latency).sum())

    found = sorted((misfit(wave), wave) for wave in _waves(most))[:LIKELY]
    return [wave for error, wave in found if error < WORTH_LOOKING * misfit(0.0)]


def _waves(most: int) -> Iterator[float]:
    """Every x that makes another staircase of up to `most` blocks: the fractions j / n, up to 4."""
    fractions = {math.floor(1e9 * j / n) / 1e9 for n in range(1, most + 1) for j in range(1, n + 1)}
    for whole in range(4):
        yield from sorted(whole + fraction for fraction in fractions)


def _elements(cells: Cells) -> Floats:
    c_in, c_out = cells[:, 0].astype(float), cells[:, 1].astype(float)
    return np.stack([np.ones(len(cells)), c_in, c_out, c_in * c_out], axis=1)
