"""Activation ranges, streaming: one pass, constant memory, the same answer in whatever order the batches come."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.problems import DataProblem

BINS = 1 << 13
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
        values = np.asarray(array, np.float64).ravel()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            raise DataProblem("An activation is NaN or infinite.", "Check the weights, and --mean and --std, of this model.")
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._widen(int(np.frexp(max(abs(low), abs(high)))[1]))
        bins = np.floor(values / self._bin_width()).astype(np.int64) + BINS // 2
        self._counts += np.bincount(bins, minlength=BINS)

    def range(self, method: Literal["minmax", "percentile"] = "minmax", percent: float = 99.99) -> tuple[float, float]:
        """(low, high): the extremes, or the bounds that leave out (100 - percent) / 2 % of the values on each side.

        Percentile bounds are rounded outwards to the histogram's edges (a bin is at most 1/2048 of the greatest magnitude)
        and never outside the extremes.

        Raises:
            DataProblem: nothing was seen yet, or `percent` is not in (0, 100].
        """
        total = int(self._counts.sum())
        if not total or not 0 < percent <= 100:
            raise DataProblem(f"No range for {percent} % of {total} values.", "Run calibration images through the model first.")
        if method == "minmax":
            return self._low, self._high
        tail = total * (100 - percent) / 200
        first = int(np.argmax(np.cumsum(self._counts) > tail))
        last = BINS - 1 - int(np.argmax(np.cumsum(self._counts[::-1]) > tail))
        edges = (np.array([first, last + 1]) - BINS // 2) * self._bin_width()
        return max(self._low, float(edges[0])), min(self._high, float(edges[1]))

    def _bin_width(self) -> float:
        return float(np.ldexp(2.0, self._exponent)) / BINS

    def _widen(self, exponent: int) -> None:
        for _ in range(self._exponent, exponent):
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros(BINS, np.int64)
            self._counts[BINS // 4 : -BINS // 4] = merged
        self._exponent = max(self._exponent, exponent)
