"""What samples say: pure functions on arrays. A session is rounds; a round holds one artefact's samples in the order taken.

Every round visits each artefact twice, forwards and backwards, so its first and second half lie symmetrically about its
middle and a drift that is linear in time cancels in the round's level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from toolkit.schema import Statistic

Rounds = Sequence[NDArray[np.int64]]
QUANTILES: dict[Statistic, float] = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
MIN_SAMPLES: dict[Statistic, int] = {"median": 11, "p90": 64, "p95": 130, "p99": 662}
_RESAMPLES = 2000
BLOCK = 3  # rounds that are drawn together


def percentile(samples: NDArray[np.int64], statistic: Statistic) -> float | None:
    """The statistic of samples, or None where there are too few for it to mean anything."""
    return value(samples, statistic) if len(samples) >= MIN_SAMPLES[statistic] else None


def value(samples: NDArray[np.int64], statistic: Statistic) -> float:
    """The statistic of samples, however few."""
    return float(np.quantile(samples, QUANTILES[statistic]))


def levels(rounds: Rounds) -> NDArray[np.float64]:
    """One level a round: the mean of the medians of its two visits."""
    return np.array(
        [(np.median(samples[: -(-len(samples) // 2)]) + np.median(samples[len(samples) // 2 :])) / 2 for samples in rounds]
    )


def ratio(a: Rounds, b: Rounds, statistic: Statistic) -> float:
    """Statistic of `b` over statistic of `a`. The median's is the median of the rounds' own ratios, which drift does not move."""
    if statistic == "median":
        return float(np.median(levels(b) / levels(a)))
    return value(np.concatenate(b), statistic) / value(np.concatenate(a), statistic)


def ratio_interval(a: Rounds, b: Rounds, statistic: Statistic) -> tuple[float, float]:
    """95 % bootstrap interval of `ratio`: rounds are drawn, the same ones of both, so that they stay paired."""
    drawn = draws(len(a))
    if statistic == "median":
        return bounds(np.median((levels(b) / levels(a))[drawn], axis=1), len(a))
    return bounds(resampled(b, drawn, statistic) / resampled(a, drawn, statistic), len(a))


def interval(rounds: Rounds, statistic: Statistic) -> tuple[float, float]:
    """95 % bootstrap interval of the statistic, in the samples' unit; whole rounds are drawn."""
    return bounds(resampled(rounds, draws(len(rounds)), statistic), len(rounds))


def split_half(rounds: Rounds) -> float:
    """|median of the even rounds - median of the odd rounds| / median."""
    whole = np.median(np.concatenate(rounds))
    return float(abs(np.median(np.concatenate(rounds[::2])) - np.median(np.concatenate(rounds[1::2] or rounds))) / whole)


def split_half_ratio(a: Rounds, b: Rounds, statistic: Statistic) -> float:
    """Relative difference of the ratio between even and odd rounds."""
    even, odd = ratio(a[::2], b[::2], statistic), ratio(a[1::2] or a, b[1::2] or b, statistic)
    return abs(even - odd) / ratio(a, b, statistic)


def drift(reference: Rounds) -> float:
    """Relative change of the reference from the first to the last third of the session; positive: the machine became slower."""
    level = levels(reference)
    third = -(-len(level) // 3)
    return float((np.median(level[-third:]) - np.median(level[:third])) / np.median(level))


def draws(rounds: int, seed: int = 0) -> NDArray[np.int64]:
    """Rounds drawn with replacement, a row for each bootstrap draw.

    Whole blocks of neighbours are drawn, the last round being the first one's neighbour (the circular block bootstrap of Politis
    and Romano, 1992): what the machine did to one round it did to the next.
    """
    blocks = -(-rounds // BLOCK)
    starts = np.random.default_rng(seed).integers(0, rounds, (_RESAMPLES, blocks, 1))
    return ((starts + np.arange(BLOCK)) % rounds).reshape(_RESAMPLES, -1)[:, :rounds]


def resampled(rounds: Rounds, drawn: NDArray[np.int64], statistic: Statistic) -> NDArray[np.float64]:
    """The statistic of every draw of rounds: samples are sorted once, and a draw only counts how often each occurs."""
    samples = np.concatenate(rounds)
    order = np.argsort(samples, kind="stable")
    owner = np.repeat(np.arange(len(rounds)), [len(one) for one in rounds])[order]
    result = np.empty(len(drawn))
    for index, draw in enumerate(drawn):
        cumulated = np.cumsum(np.bincount(draw, minlength=len(rounds))[owner])
        result[index] = samples[order[np.searchsorted(cumulated, QUANTILES[statistic] * cumulated[-1])]]
    return result


def bounds(values: NDArray[np.float64], rounds: int) -> tuple[float, float]:
    """95 % interval of bootstrap draws of so many rounds: Hesterberg's expanded percentile interval (2015, section 3.3).

    Plain percentiles are too narrow for few units. With n blocks the tails are Phi(-sqrt(n / (n - 1)) t), with t of Student's
    n - 1 degrees of freedom by its expansion in 1 / (n - 1).
    """
    normal = NormalDist()
    z, free = normal.inv_cdf(0.975), max(rounds // BLOCK - 1, 2)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    tail = normal.cdf(-math.sqrt((free + 1) / free) * t)
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
