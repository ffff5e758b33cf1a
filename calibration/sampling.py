"""Which images: deterministic by seed, spread evenly over the classes where there are labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from calibration.datasets import Dataset, Ints
from calibration.problems import DataProblem


def select(dataset: Dataset, n: int, seed: int, exclude: Iterable[int] = ()) -> Ints:
    """Indices of `n` images (all, where fewer are left), none twice and none of `exclude`.

    Class counts differ by at most one until a class runs out. The order is random but fixed by the seed, every prefix is
    as balanced as the whole, and a smaller `n` gives a prefix of a larger one.

    Raises:
        DataProblem: `n` is under 1, or nothing is left.
    """
    candidates = np.setdiff1d(np.arange(len(dataset)), np.fromiter(exclude, np.int64))
    if n < 1 or not len(candidates):
        raise DataProblem(
            f"Cannot select {n} of {len(candidates)} images left in {dataset.path}.", "Give more images, or --samples 1 or more."
        )
    shuffled = np.random.default_rng(seed).permutation(candidates)
    if dataset.labels is not None:
        # Deal the classes out in turn: the k-th image of every class comes before the (k + 1)-th of any.
        shuffled = shuffled[np.argsort(_rank_within(dataset.labels[shuffled]), kind="stable")]
    return shuffled[:n]


def split(dataset: Dataset, held_out: float | int, seed: int) -> tuple[Ints, Ints]:
    """(calibration, evaluation) indices: disjoint, both balanced, together the whole dataset.

    `held_out` is the evaluation's share (a float between 0 and 1) or its number of images (an int).

    Raises:
        DataProblem: one of the two would be empty.
    """
    size = len(dataset)
    if isinstance(held_out, int):
        n = held_out
    else:
        n = max(1, round(held_out * size)) if 0 < held_out < 1 else 0
    if not 1 <= n < size:
        raise DataProblem(
            f"Cannot hold {held_out} of the {size} images in {dataset.path} back for evaluation.",
            "Give more images, or --eval-data.",
        )
    evaluation = select(dataset, n, seed)
    return select(dataset, size, seed, exclude=evaluation), evaluation


def _rank_within(labels: Ints) -> Ints:
    """For each entry, how many equal ones come before it."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return rank
