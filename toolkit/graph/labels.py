"""Labels: which entries of which dimension are the same channel.

Every dimension of every tensor carries either None (inert: batch, space, kernel; nothing to prune) or an integer array with one
label per entry. Rules make entries share a label or declare two labels equal; a fixed label can not be pruned, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Entries: TypeAlias = npt.NDArray[np.int64]
Dims: TypeAlias = list[Entries | None]


class Labels:
    """Collects equalities and fixed labels; `classes` solves them all at once (near linear)."""

    def __init__(self) -> None:
        self.count = 0
        self._left: list[Entries] = []
        self._right: list[Entries] = []
        self._fixed: list[tuple[Entries, str]] = []

    def fresh(self, n: int) -> Entries:
        """`n` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int64)

    def fixed(self, n: int, reason: str) -> Entries:
        """`n` new labels that can not be pruned."""
        entries = self.fresh(n)
        self.fix(entries, reason)
        return entries

    def fix(self, entries: Entries | None, reason: str) -> None:
        """These entries must stay, for this reason."""
        if entries is not None and len(entries):
            self._fixed.append((entries.reshape(-1), reason))

    def equate(self, a: Entries | None, b: Entries | None, reason: str) -> Entries | None:
        """Entry i of `a` is the channel that entry i of `b` is. An inert side fixes the other."""
        if a is None or b is None:
            self.fix(b if a is None else a, reason)
            return None if a is None and b is None else (b if a is None else a)
        if a is not b:
            self._left.append(a.reshape(-1))
            self._right.append(b.reshape(-1))
        return a

    def classes(self) -> tuple[Entries, dict[int, str]]:
        """(class of every label, reason of every class that is fixed)."""
        empty = [np.empty(0, np.int64)]
        left, right = np.concatenate(self._left or empty), np.concatenate(self._right or empty)
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        _, classes = connected_components(graph, directed=False)
        reasons: dict[int, str] = {}
        for entries, reason in self._fixed:
            for c in np.unique(classes[entries]):
                reasons.setdefault(int(c), reason)
        return classes.astype(np.int64), reasons


def all_labels(dims: Sequence[Entries | None]) -> list[Entries]:
    """The labelled dimensions."""
    return [d for d in dims if d is not None]
