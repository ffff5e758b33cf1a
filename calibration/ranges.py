"""Activation ranges, streaming: one pass, constant memory, the same answer in whatever order the batches come."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.problems import DataProblem

BINS = 1 << 13
RangeMethod = Literal["minmax", "percentile", "mse"]
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")
LEVELS = 255  # steps of eight bits
SHRINKS = 32  # candidate bounds a side for the least squared error
_LEAST_EXPONENT = -126  # of the smallest normal float32


class RangeObserver:
    """Exact minimum and maximum, and a histogram for percentiles, of all values seen.

    The histogram has `BINS` equal bins over [-2^e, 2^e) with the least e that covers the data. When e grows, neighbouring
    bins merge exactly, because every edge of the coarser grid is one of the finer.
    """

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._exponent = _LEAST_EXPONENT
        self._counts = np.zeros(BINS, np.int64)

    def update(self, array: npt.NDArray[Any]) -> None:
        """Take in more values, of any shape.

        Raises:
            DataProblem: one of them is NaN or infinite.
        """
        values = np.asarray(array).ravel()
        values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            raise DataProblem("An activation is NaN or infinite.", "Check the weights, and --mean and --std, of this model.")
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._widen(int(np.frexp(max(abs(low), abs(high)))[1]))
        bins = np.floor(values / self._bin_width()).astype(np.int64)
        np.minimum(bins, -1, out=bins, where=values < 0)  # a quotient that underflows to -0 would be among the positive ones
        self._counts += np.bincount(bins + BINS // 2, minlength=BINS)

    def range(self, method: RangeMethod = "minmax", percent: float = 99.99, symmetric: bool = False) -> tuple[float, float]:
        """(low, high) to quantize the values in.

        `minmax`: the extremes. `percentile`: the bounds that leave out (100 - percent) / 2 % of the values on each side, rounded
        outwards to the histogram's edges (a bin is at most 1/2048 of the greatest magnitude) and never outside the extremes.
        `mse`: the bounds around zero whose 8-bit grid has the least squared error on the histogram; `symmetric` ones where asked.

        Raises:
            DataProblem: nothing was seen yet, or `percent` is not in (0, 100].
        """
        total = int(self._counts.sum())
        if not total or not 0 < percent <= 100:
            raise DataProblem(f"No range for {percent} % of {total} values.", "Run calibration images through the model first.")
        if method == "minmax":
            return self._low, self._high
        if method == "mse":
            return self._least_squares(symmetric)
        tail = total * (100 - percent) / 200
        first = int(np.argmax(np.cumsum(self._counts) > tail))
        last = BINS - 1 - int(np.argmax(np.cumsum(self._counts[::-1]) > tail))
        edges = (np.array([first, last + 1]) - BINS // 2) * self._bin_width()
        return max(self._low, float(edges[0])), min(self._high, float(edges[1]))

    def _least_squares(self, symmetric: bool) -> tuple[float, float]:
        """Bounds from a grid of shrunk extremes: what is clipped, and what is rounded, weighed against each other."""
        filled = np.flatnonzero(self._counts)
        centres = (filled - BINS // 2 + 0.5) * self._bin_width()
        weights = self._counts[filled].astype(float)
        shrinks = np.linspace(1.0, 1.0 / SHRINKS, SHRINKS)
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        if symmetric:
            reach = max(-low, high)
            pairs = [(-reach * shrink, reach * shrink) for shrink in shrinks]
        else:
            pairs = [(low * a, high * b) for a in (shrinks if low else [1.0]) for b in (shrinks if high else [1.0])]
        return min(pairs, key=lambda pair: _squared_error(centres, weights, *pair))

    def _bin_width(self) -> float:
        return float(np.ldexp(2.0, self._exponent)) / BINS

    def _widen(self, exponent: int) -> None:
        for _ in range(self._exponent, exponent):
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros(BINS, np.int64)
            self._counts[BINS // 4 : -BINS // 4] = merged
        self._exponent = max(self._exponent, exponent)


def _squared_error(values: npt.NDArray[Any], weights: npt.NDArray[Any], low: float, high: float) -> float:
    """Sum of w (v - q(v))^2 with q the nearest of the levels between low and high; zero is one of them."""
    step = (high - low) / LEVELS
    if step <= 0:
        return float((weights * values**2).sum())
    zero = np.round(-low / step)
    levels = np.clip(np.round(values / step) + zero, 0, LEVELS)
    return float((weights * (values - (levels - zero) * step) ** 2).sum())
